"""Checkpoints: loaded without executing code, checked against the model, written atomically.

A file must fill the whole model, except at the start of a training run from other weights: an
ImageNet backbone, or the same model for other classes.
"""

import os
import re
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .utils.files import atomic_write, explained_read_errors, load_pickle, load_torch

# Parameters whose shapes depend on the number of classes.
_CLASS_DEPENDENT = re.compile(r"(^|\.)(class_embed\.(weight|bias)|empty_weight)$")
# May be missing or unexpected in older files; they come from the config or are not used.
_HARMLESS = ("num_batches_tracked", "pixel_mean", "pixel_std")


def _first_names(names: list[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")


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
        # The file being loaded, and whether it need not fill the model.
        self._path = ""
        self._partial = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `{name}.pth` atomically and mark it as the last checkpoint.

        Args:
            name: file name without its extension.
            kwargs: extra data to save.
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
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

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
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(f"Checkpoint {path} does not exist.")
        self._path = path
        try:
            return super().load(path, checkpointables)
        finally:
            # Detectron2 leaves this set after a failure and then refuses to load again.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            with explained_read_errors(filename):
                data = load_pickle(filename)
            loaded = self._from_pickle(data, filename)
        else:
            with explained_read_errors(filename):
                loaded = super()._load_file(filename)
        self._require_weights(loaded["model"], filename)
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
        weights = {name: value for name, value in data.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    @staticmethod
    def _require_weights(weights: Any, path: str) -> None:
        if not isinstance(weights, dict):
            raise ValueError(
                f"Checkpoint {path}: its 'model' is a {type(weights).__name__}, not a dict."
            )
        for name, value in weights.items():
            if not isinstance(value, (np.ndarray, torch.Tensor)):
                raise ValueError(
                    f"Checkpoint {path} is not a state dict: its entry {name!r} is of type "
                    f"{type(value).__name__}. Weights belong under the key 'model'."
                )

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        shapes = {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
        incompatible = super()._load_model(checkpoint)
        # Name matching silently drops backbone weights of another shape.
        for name in incompatible.unexpected_keys[:]:
            full_name = f"backbone.{name}"
            if full_name in incompatible.missing_keys and name in shapes:
                incompatible.missing_keys.remove(full_name)
                incompatible.unexpected_keys.remove(name)
                in_model = tuple(self.model.state_dict()[full_name].shape)
                incompatible.incorrect_shapes.append((full_name, shapes[name], in_model))
        return incompatible

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
        return ValueError(
            f"Checkpoint {self._path} does not fit the model of this config "
            f"({' with '.join(parts)}); it was written by another architecture: keys {text}. "
            "Use the config file that the checkpoint was trained with."
        )
