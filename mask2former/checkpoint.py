"""Checkpoints: loaded without executing code, checked against the model, written atomically.

A file must fill the whole model, except at the start of a training run from other weights: an
ImageNet backbone, or the same model for other classes or with another number of queries.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import nn

from .architecture import CLASSES, QUERIES, has_class_layer
from .checkpoint_differences import (
    Differences,
    compare,
    explain,
    first_names,
    other_parts,
    other_setting,
)
from .checkpoint_weights import (
    CLASS_WEIGHTS,
    adapt_stem,
    as_tensors,
    drop_class_weights,
    find_weights,
    from_pickle,
    from_pycls,
    keep_queries,
    non_finite,
    update_names,
)
from .modeling.backbone.timm_weights import fit_weights, local_file, warn_without_weights
from .utils.files import (
    atomic_write,
    checkpoint_format,
    explained_read_errors,
    load_pickle,
    load_safetensors,
    load_torch,
)
from .weights.conversion import convert_names
from .weights.coverage import coverage_by_module, describe_coverage
from .weights.folders import INDEX, load_file

# May be missing or unexpected: they come from the config or are not used.
_COUNTERS = "num_batches_tracked"
_HARMLESS = (_COUNTERS, "pixel_mean", "pixel_std", CLASS_WEIGHTS)
# What objects raise for a state that is not theirs.
_STATE_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# In bytes, of a file in Linux's file systems; longer contents of `last_checkpoint` are no name.
_LONGEST_NAME = 255


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
        # The file being loaded, its shapes, and whether it need not fill the model.
        self._path = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._partial = False
        # Number of queries in the file and in the model, by embedding.
        self._kept_queries: dict[str, tuple[int, int]] = {}
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
            path: path, URL, `detectron2://` or `timm://` name, or folder of Hugging Face. Empty:
                load nothing, allowed only at the start of a training run.
            checkpointables: names of the other objects to load; None: all that the file has.

        Returns:
            The remaining contents of the file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: no path is given but one is needed, the file cannot be downloaded or read
                safely, or it does not fit the model.
        """
        self._partial = self._partial_init and checkpointables == []
        if not path and not self._partial:
            raise ValueError("MODEL.WEIGHTS is empty: name the checkpoint to load.")
        path = local_file(path) if path else ""
        if not path:
            warn_without_weights(self.model)
        local = path.split("?")[0]
        if path and "://" not in path and not os.path.isfile(local):
            problem = "is not a file" if os.path.exists(local) else "does not exist"
            raise FileNotFoundError(f"Checkpoint {path} {problem}.")
        self._path = path
        self._model_is_loaded = False
        try:
            return super().load(path, checkpointables)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise ValueError(
                f"Checkpoint {path} cannot be downloaded: {getattr(error, 'reason', error)}. "
                "Without network, fetch it on another machine and set MODEL.WEIGHTS to the file."
            ) from error
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

    def load_weights(self, weights: dict[str, torch.Tensor], origin: str) -> None:
        """Load weights that a program has, with the checks of `load`.

        Args:
            weights: state dict by the model's names.
            origin: where they come from, for messages.

        Raises:
            ValueError: they do not fit the model.
        """
        self._partial, self._path = False, origin
        incompatible = self._load_model({"model": as_tensors(dict(weights), origin)})
        self._log_incompatible_keys(incompatible)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(INDEX):
            return {"model": as_tensors(load_file(filename), filename)}
        with explained_read_errors(filename):
            file_format = checkpoint_format(filename)
            if file_format == "pickle":
                data = load_pickle(filename)
            elif file_format == "safetensors":
                data = load_safetensors(filename)
            else:
                data = self._torch_load(filename)
        if file_format == "pickle":
            loaded = from_pickle(data, filename, self.checkpointables)
        elif filename.endswith(".pyth"):
            loaded = from_pycls(data, filename)
        else:
            loaded = find_weights(data, filename, self.checkpointables)
        url: Any = self._parsed_url_during_load
        queries = parse_qs(url.query)
        if queries.pop("matching_heuristics", None) == ["True"]:
            loaded["matching_heuristics"] = True
        if queries:
            raise ValueError(
                f"Checkpoint {self._path}: nothing reads {', '.join(queries)} after the question "
                "mark; allowed: matching_heuristics=True."
            )
        loaded["model"] = as_tensors(loaded["model"], filename)
        return loaded

    def _torch_load(self, f: str) -> Any:
        data = load_torch(f)
        if not isinstance(data, dict):
            raise TypeError(f"expected a dict, got {type(data).__name__}")
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint["model"]
        in_model = self.model.state_dict()
        update_names(weights, in_model)
        by_suffix = checkpoint.get("matching_heuristics", False)
        if not by_suffix:
            weights = checkpoint["model"] = convert_names(self.model, weights, self._path)
        if self._partial:
            weights = checkpoint["model"] = fit_weights(self.model, weights, self._path)
        # At the start of a training, the images may have other channels.
        adapted = adapt_stem(weights, in_model, by_suffix) if self._partial else None
        if adapted is not None:
            self.logger.warning(f"{self._path}: {adapted}.")
        self._shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self._require_number_types(weights, by_suffix)
        changed = drop_class_weights(weights, in_model)
        if changed and self._partial_init:  # evaluation does not use them
            self.logger.warning(
                f"{self._path} was trained with MODEL.MASK_FORMER.NO_OBJECT_WEIGHT {changed[0]:g}; "
                f"this training uses the config's, {changed[1]:g}."
            )
        self._kept_queries = keep_queries(weights, in_model) if self._partial else {}
        with_infinity = non_finite(dict(self.model.named_buffers()))
        try:
            incompatible = super()._load_model(checkpoint)
        # Name matching and conversion rely on names and shapes of known files.
        except (AssertionError, *_STATE_ERRORS) as error:
            model_shapes = {name: tuple(value.shape) for name, value in in_model.items()}
            bare = {f"backbone.{name}": shape for name, shape in self._shapes.items()}
            differences = compare(model_shapes, list(in_model), bare, [])
            if differences.has_other_backbone:
                raise self._misfit(differences) from error
            raise ValueError(
                f"Checkpoint {self._path}: its weights cannot be matched with the model: {error}"
            ) from error
        incompatible.missing_keys.extend(
            self._filled_statistics(incompatible.missing_keys, by_suffix)
        )
        not_loaded = {
            *incompatible.missing_keys,
            *(name for name, *_ in incompatible.incorrect_shapes),
        }
        loaded = self.model.state_dict()
        self._require_finite(
            {k: v for k, v in loaded.items() if k not in not_loaded}, with_infinity
        )
        if by_suffix:
            self._name_rest_of_backbone(incompatible, in_model)
        return incompatible

    def _name_rest_of_backbone(self, incompatible: Any, in_model: dict[str, torch.Tensor]) -> None:
        """Give weights that name matching left over their names in the model.

        These are of another shape, which matching drops silently, or of a deeper backbone.
        """
        modules = {name.split(".")[1] for name in in_model if name.startswith("backbone.")}
        unexpected = incompatible.unexpected_keys
        for i, name in reversed(list(enumerate(unexpected))):
            full_name = f"backbone.{name}"
            if full_name in incompatible.missing_keys and name in self._shapes:
                del unexpected[i]
                incompatible.missing_keys.remove(full_name)
                shape = tuple(in_model[full_name].shape)
                incompatible.incorrect_shapes.append((full_name, self._shapes[name], shape))
            elif name.split(".")[0] in modules:
                unexpected[i] = full_name

    def _filled_statistics(self, missing: list[str], by_suffix: bool) -> list[str]:
        """The missing statistics of frozen norms, which Detectron2 fills with zeros and ones."""

        def is_given(name: str) -> bool:
            parts = name.split(".")
            suffixes = [".".join(parts[i:]) for i in range(len(parts) if by_suffix else 1)]
            return any(suffix in self._shapes for suffix in suffixes)

        filled = []
        for prefix, module in self.model.named_modules():
            # Names that neither are given nor missing are converted: nothing is known of these.
            weight = f"{prefix}.weight"
            if isinstance(module, FrozenBatchNorm2d) and (weight in missing or is_given(weight)):
                names = [f"{prefix}.running_mean", f"{prefix}.running_var"]
                filled += [name for name in names if name not in missing and not is_given(name)]
        return filled

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
        bad = non_finite(loaded)
        bad -= {name for name in bad & with_infinity if not loaded[name].isnan().any()}
        if bad:
            raise ValueError(
                f"Checkpoint {self._path}: {len(bad)} of its weights hold NaN or infinite values "
                f"({first_names(list(bad))}). The training that wrote it diverged, or the file is "
                "damaged: use an earlier checkpoint."
            )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Raise for keys that do not fit, or warn if partial weights are allowed.

        Raises:
            ValueError: the file does not fit, with the cause.
        """
        self._log_coverage(incompatible)
        for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
            keys[:] = [key for key in keys if not key.endswith(_HARMLESS)]
        in_model = {k: tuple(v.shape) for k, v in self.model.state_dict().items()}
        differences = compare(
            {name: shape for name, shape in in_model.items() if not name.endswith(_HARMLESS)},
            incompatible.missing_keys,
            {name: self._shapes.get(name, ()) for name in incompatible.unexpected_keys},
            incompatible.incorrect_shapes,
        )
        if self._partial:
            self._check_partial(incompatible, differences)
            super()._log_incompatible_keys(incompatible)
        elif any(incompatible):
            raise self._misfit(differences)
        self._model_is_loaded = True

    def _log_coverage(self, incompatible: Any) -> None:
        names = [name for name in self.model.state_dict() if not name.endswith(_COUNTERS)]
        absent = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        of_config = {name for name in absent if name.endswith(CLASS_WEIGHTS)}
        coverage = coverage_by_module(names, set(names) - absent, of_config)
        line = f"Tensors from {self._path}: {describe_coverage(coverage)}."
        self.logger.info(line)
        if not self.logger.isEnabledFor(logging.INFO) and comm.is_main_process():
            # A program that sets up no log, such as a notebook.
            print(line, file=sys.stderr)

    def _check_partial(self, incompatible: Any, differences: Differences) -> None:
        shapes = {name for name, *_ in incompatible.incorrect_shapes}
        names = [name for name in self.model.state_dict() if not name.endswith(_HARMLESS)]
        # A model without class layer has one query per class.
        per_class = [CLASSES.decides]
        if not has_class_layer(names):
            per_class.append(QUERIES.decides)
        for name, in_file, of_model in incompatible.incorrect_shapes:
            is_per_class = any(pattern.fullmatch(name) for pattern in per_class)
            if not is_per_class or in_file[1:] != of_model[1:]:
                raise self._misfit(differences)
        # A model without a submodule of this name counts as its own backbone.
        backbone = {name for name in names if name.startswith("backbone.")} or set(names)
        fits_backbone = bool(backbone - shapes - set(incompatible.missing_keys))
        if not fits_backbone or differences.has_other_backbone or differences.foreign:
            raise self._misfit(differences)
        if shapes:
            numbers = differences.settings.get(CLASSES) or differences.settings.get(QUERIES)
            if numbers is None:
                raise self._misfit(differences)
            self.logger.warning(
                f"Fine-tuning to other classes: {first_names(shapes)} keep their random "
                f"initialisation, because {self._path} has {numbers[0]} classes and the config "
                f"{numbers[1]} ({CLASSES.key})."
            )
        self._log_kept(differences)

    def _log_kept(self, differences: Differences) -> None:
        """What else a training starts with that differs from the file."""
        self.logger.info(
            f"{self._path} fills {differences.num_fitting} of the model's {differences.num_names} "
            "parameters and buffers."
        )
        others = [other_parts(differences)] if differences.parts else []
        for setting, values in differences.settings.items():
            if setting not in (QUERIES, CLASSES):
                others.append(other_setting(setting, *values))
        if others:
            self.logger.warning(
                f"{self._path} is of another architecture ({'; '.join(others)}): what it lacks "
                "keeps its random initialisation."
            )
        for in_file, in_model in set(self._kept_queries.values()):
            names = [k for k, sizes in self._kept_queries.items() if sizes == (in_file, in_model)]
            if in_file < in_model:
                rest = f"the other {in_model - in_file} keep their random initialisation"
            else:
                rest = f"its other {in_file - in_model} are not used"
            self.logger.warning(
                f"Fine-tuning with another number of queries, {in_model} ({QUERIES.key}) instead "
                f"of {in_file}: the first {min(in_file, in_model)} rows of {first_names(names)} "
                f"come from {self._path}; {rest}."
            )

    def _misfit(self, differences: Differences) -> ValueError:
        model = type(self.model).__name__
        if hasattr(self.model, "backbone"):
            model += f" with {type(self.model.backbone).__name__}"
        buffers = {name for name, _ in self.model.named_buffers()}
        return ValueError(
            f"Checkpoint {self._path} does not fit the model of this config ({model}): "
            f"{explain(differences, buffers)}"
        )
