"""Checkpoints: loaded without executing code, checked against the model, written atomically.

A file must fill the whole model, except at the start of a training run from other weights: an
ImageNet backbone, or the same model for other classes.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .utils.files import (
    atomic_write,
    checkpoint_format,
    explained_read_errors,
    load_pickle,
    load_safetensors,
    load_torch,
)

# Parameters whose shapes depend on the number of classes.
_CLASS_DEPENDENT = re.compile(r"(^|\.)(class_embed\.(weight|bias)|empty_weight)$")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# May be missing or unexpected in older files; they come from the config or are not used.
_HARMLESS = ("num_batches_tracked", "pixel_mean", "pixel_std")

# What objects raise for a state that is not theirs.
_STATE_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# In bytes, of a file in Linux's file systems; longer contents of `last_checkpoint` are no name.
_LONGEST_NAME = 255
# Names of Mask2Former in the transformers package.
_OF_TRANSFORMERS = ("model.pixel_level_module.", "model.transformer_module.", "class_predictor.")


def _first_names(names: list[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")


def _non_finite(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors with NaN or infinite values. One device sync."""
    checked = {
        name: value.detach()
        for name, value in tensors.items()
        if value.dtype in _FLOATS and value.numel() and not value.is_meta
    }
    if not checked:
        return set()
    # Extremes are much faster than `isfinite` of all elements; NaN is both.
    finite = [torch.stack(value.aminmax()).isfinite().all() for value in checked.values()]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return {name for name, is_finite in zip(checked, flags, strict=True) if not is_finite}


class Mask2FormerCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe for files from unknown sources.

    Accepts local paths, URLs and `detectron2://` names, in the formats of Detectron2's model zoo
    (`.pkl`, with name matching) and of torch.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        partial_init: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model, possibly wrapped for distributed training.
            save_dir: local folder to write to and to resume from.
            partial_init: weights loaded with `checkpointables=[]` initialise a training run: they
                are optional and need not fill the whole model.
            save_to_disk: whether this process writes; default: only the main process.
            checkpointables: other objects to save, with `state_dict` and `load_state_dict`.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._partial_init = partial_init
        # The file being loaded, its names, and whether it need not fill the model.
        self._path = ""
        self._names: list[str] = []
        self._partial = False
        self._model_is_loaded = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `{name}.pth` atomically and mark it as the last checkpoint.

        Args:
            name: file name without its extension.
            kwargs: extra data to save.

        Raises:
            WriteError: a file cannot be written. Earlier checkpoints, and which is the last, are as
                they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        assert os.path.basename(path) == file_name, name
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_write(path, "wb") as file:
            torch.save(data | kwargs, file)
        self.tag_last_checkpoint(file_name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(self._last_checkpoint) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        # Also a link to nothing, which must not start a training anew in silence.
        return bool(self.save_dir) and os.path.lexists(self._last_checkpoint)

    @property
    def _last_checkpoint(self) -> str:
        return os.path.join(self.save_dir, "last_checkpoint")

    def get_checkpoint_file(self) -> str:
        """The file that `last_checkpoint` names; empty if there is no `last_checkpoint`.

        Raises:
            ValueError: it names no file of its folder, or cannot be read.
        """
        if not self.has_checkpoint():
            return ""
        problem = ""
        # Reading a pipe would not return.
        if not os.path.isfile(self._last_checkpoint):
            problem = "is not a file, or a link to one that does not exist"
        else:
            try:
                with open(self._last_checkpoint, "rb") as file:
                    content = file.read(_LONGEST_NAME + 1)
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
        if not problem:
            name = content.decode(errors="replace").strip()
            path = os.path.join(self.save_dir, name)
            if not name:
                problem = "is empty"
            elif len(content) > _LONGEST_NAME or not name.isprintable() or "\ufffd" in name:
                problem = "holds something else than the name of a file"
            elif os.path.basename(name) != name:
                problem = f"names {name}, but a checkpoint must be in the same folder"
            elif not os.path.isfile(path):
                problem = f"names {name}, which is not a file in its folder"
            else:
                return path
        raise ValueError(
            f"{self._last_checkpoint} {problem}. Write the name of the checkpoint to resume from "
            f"into it ({self._candidates()}), or delete it to start anew."
        )

    def _candidates(self) -> str:
        files = [path for path in Path(self.save_dir).glob("*.pth") if path.is_file()]
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return f"the newest is {files[0].name}" if files else "its folder has none"

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: path, URL or `detectron2://` name. Empty: load nothing, allowed only at the start
                of a training run.
            checkpointables: names of the other objects to load; None: all that the file has.

        Returns:
            The remaining contents of the file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: no path is given but one is needed, the file cannot be read safely, or it
                does not fit the model.
        """
        self._partial = self._partial_init and checkpointables == []
        if not path and not self._partial:
            raise ValueError("MODEL.WEIGHTS is empty: name the checkpoint to load.")
        local = path.split("?")[0]
        if path and "://" not in path and not os.path.isfile(local):
            problem = "is not a file" if os.path.exists(local) else "does not exist"
            raise FileNotFoundError(f"Checkpoint {path} {problem}.")
        self._path = path
        self._model_is_loaded = False
        try:
            return super().load(path, checkpointables)
        except _STATE_ERRORS as error:
            if not self._model_is_loaded:
                raise
            problem = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"Checkpoint {path}: the state of training in it cannot be restored: {problem}"
            ) from error
        finally:
            # Detectron2 leaves this set after a failure and then refuses to load again.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        with explained_read_errors(filename):
            file_format = checkpoint_format(filename)
            if file_format == "pickle":
                data = load_pickle(filename)
            elif file_format == "safetensors":
                data = load_safetensors(filename)
            else:
                data = self._torch_load(filename)
        if file_format == "pickle":
            loaded = self._from_pickle(data, filename)
        elif filename.endswith(".pyth"):
            loaded = self._from_pycls(data, filename)
        else:
            loaded = data if "model" in data else {"model": data}
        url: Any = self._parsed_url_during_load
        queries = parse_qs(url.query)
        if queries.pop("matching_heuristics", None) == ["True"]:
            loaded["matching_heuristics"] = True
        if queries:
            raise ValueError(
                f"Checkpoint {self._path}: nothing reads {', '.join(queries)} after the question "
                "mark; allowed: matching_heuristics=True."
            )
        loaded["model"] = self._as_tensors(loaded["model"], filename)
        return loaded

    def _torch_load(self, f: str) -> Any:
        data = load_torch(f)
        if not isinstance(data, dict):
            raise TypeError(f"expected a dict, got {type(data).__name__}")
        return data

    @staticmethod
    def _from_pickle(data: Any, path: str) -> dict[str, Any]:
        """Distinguish Detectron2's and Caffe2's model zoo formats, as Detectron2 does."""
        if not isinstance(data, dict):
            raise ValueError(f"Checkpoint {path} holds {type(data).__name__}, not a dict.")
        if "model" in data and "__author__" in data:
            return data
        data = data.get("blobs", data)
        if not isinstance(data, dict):
            raise ValueError(f"Checkpoint {path}: its 'blobs' are no dict.")
        weights = {k: v for k, v in data.items() if not str(k).endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    @staticmethod
    def _from_pycls(data: dict, path: str) -> dict[str, Any]:
        weights = data.get("model_state")
        if not isinstance(weights, dict):
            raise ValueError(f"Checkpoint {path} is no pycls file: it has no 'model_state'.")
        weights = {k: v for k, v in weights.items() if not str(k).endswith("num_batches_tracked")}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}

    @staticmethod
    def _as_tensors(weights: Any, path: str) -> dict[str, torch.Tensor]:
        """Arrays become tensors, in place."""
        if not isinstance(weights, dict):
            raise ValueError(
                f"Checkpoint {path}: its 'model' is a {type(weights).__name__}, not a dict."
            )
        for name, value in weights.items():
            kind = f"of type {type(value).__name__}"
            if isinstance(value, np.ndarray):
                if value.dtype.kind in "biufc" and value.dtype.itemsize <= 16:
                    native = value.astype(value.dtype.newbyteorder("="), copy=False)
                    value = torch.from_numpy(np.require(native, requirements="W"))
                else:
                    kind = f"an array of {value.dtype}"
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"Checkpoint {path} is not a state dict: its entry {name!r} is {kind}. "
                    "Weights belong under the key 'model'."
                )
            weights[name] = value
        return weights

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint["model"]
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self._names = list(weights)
        self._require_number_types(weights, checkpoint.get("matching_heuristics", False))
        with_infinity = _non_finite(dict(self.model.named_buffers()))
        try:
            incompatible = super()._load_model(checkpoint)
        # Name matching and conversion rely on names and shapes of known files.
        except (AssertionError, *_STATE_ERRORS) as error:
            raise ValueError(
                f"Checkpoint {self._path}: its weights cannot be matched with the model: {error}"
            ) from error
        not_loaded = {
            *incompatible.missing_keys,
            *(name for name, *_ in incompatible.incorrect_shapes),
        }
        loaded = self.model.state_dict()
        self._require_finite(
            {k: v for k, v in loaded.items() if k not in not_loaded}, with_infinity
        )
        # Name matching silently drops backbone weights of another shape.
        for name in incompatible.unexpected_keys[:]:
            full_name = f"backbone.{name}"
            if full_name in incompatible.missing_keys and name in shapes:
                incompatible.missing_keys.remove(full_name)
                incompatible.unexpected_keys.remove(name)
                in_model = tuple(self.model.state_dict()[full_name].shape)
                incompatible.incorrect_shapes.append((full_name, shapes[name], in_model))
        return incompatible

    def _require_number_types(self, weights: dict[str, torch.Tensor], by_suffix: bool) -> None:
        """Integers and complex numbers would be converted, or cut, in silence."""
        in_model = self.model.state_dict()
        if by_suffix:
            for name, value in list(in_model.items()):
                parts = name.split(".")
                for i in range(1, len(parts)):
                    in_model.setdefault(".".join(parts[i:]), value)
        for name, value in weights.items():
            target = in_model.get(name, in_model.get(name.removeprefix("module.")))
            if target is None or value.is_floating_point() or target.dtype == value.dtype:
                continue
            if target.is_floating_point() or value.is_complex():
                raise ValueError(
                    f"Checkpoint {self._path}: {name} holds {value.dtype}, but the model needs "
                    f"{target.dtype}. The file is damaged or was converted wrongly."
                )

    def _require_finite(self, loaded: dict[str, torch.Tensor], with_infinity: set[str]) -> None:
        """
        Args:
            loaded: the model's tensors that come from the file.
            with_infinity: buffers that the model itself sets to infinite values, such as masks.
        """
        bad = _non_finite(loaded)
        bad -= {name for name in bad & with_infinity if not loaded[name].isnan().any()}
        if bad:
            raise ValueError(
                f"Checkpoint {self._path}: {len(bad)} of its weights hold NaN or infinite values "
                f"({_first_names(list(bad))}). The training that wrote it diverged, or the file is "
                "damaged: use an earlier checkpoint."
            )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Raise for keys that do not fit, or warn if partial weights are allowed.

        Raises:
            ValueError: the file was written by another architecture.
        """
        for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
            keys[:] = [key for key in keys if not key.endswith(_HARMLESS)]
        if self._partial:
            self._check_partial(incompatible)
            super()._log_incompatible_keys(incompatible)
        elif any(incompatible):
            raise self._misfit(incompatible)
        self._model_is_loaded = True

    def _check_partial(self, incompatible: Any) -> None:
        shapes = {name for name, *_ in incompatible.incorrect_shapes}
        if not all(map(_CLASS_DEPENDENT.search, shapes)):
            raise self._misfit(incompatible)
        names = [name for name in self.model.state_dict() if not name.endswith(_HARMLESS)]
        # A model without a submodule of this name counts as its own backbone.
        backbone = {name for name in names if name.startswith("backbone.")} or set(names)
        if not backbone - shapes - set(incompatible.missing_keys):
            raise self._misfit(incompatible)
        if shapes:
            self.logger.warning(
                f"Fine-tuning to other classes: {_first_names(list(shapes))} keep their random "
                f"initialisation, because {self._path} has another number of classes."
            )

    def _misfit(self, incompatible: Any) -> ValueError:
        shapes = [
            f"{name} {in_file} instead of {in_model}"
            for name, in_file, in_model in incompatible.incorrect_shapes
        ]
        # Detectron2 also lists keys of another shape as missing.
        misshapen = {name for name, *_ in incompatible.incorrect_shapes}
        problems = {
            "missing": [name for name in incompatible.missing_keys if name not in misshapen],
            "unknown to the model": incompatible.unexpected_keys,
            "of another shape": shapes,
        }
        text = "; ".join(
            f"{len(names)} {what} ({_first_names(names)})"
            for what, names in problems.items()
            if names
        )
        parts = [type(self.model).__name__]
        parts += [type(self.model.backbone).__name__] if hasattr(self.model, "backbone") else []
        remedy = "Use the config file that the checkpoint was trained with."
        if any(name.startswith(_OF_TRANSFORMERS) for name in self._names):
            remedy = (
                "Its names are those of the transformers package, which are not converted: use the "
                "checkpoint in Detectron2's format."
            )
        return ValueError(
            f"Checkpoint {self._path} does not fit the model of this config "
            f"({' with '.join(parts)}); it was written by another architecture: keys {text}. "
            f"{remedy}"
        )
