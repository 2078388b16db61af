"""Checkpoints of training with the model's folder beside them, see `model_file.py`."""

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from torch import nn

from .checkpoint import Mask2FormerCheckpointer
from .inference.model_file import save_model_folder


def training_metadata(cfg: CfgNode) -> Metadata:
    """Of the first training set, whose classes the model has."""
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    return MetadataCatalog.get(names[0]) if names else Metadata()


class ModelFolderCheckpointer(Mask2FormerCheckpointer):
    """Writes the folder NAME beside some files NAME.pth, before them.

    A run that is killed between the two is resumed before NAME.pth, and writes both again.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, cfg: CfgNode, suffix: str = "", **options: Any
    ) -> None:
        """
        Args:
            model, save_dir, options: see `Mask2FormerCheckpointer`.
            cfg: builds the model.
            suffix: of the names that get a folder.
        """
        super().__init__(model, save_dir, **options)
        self._cfg, self._suffix = cfg, suffix

    def save(self, name: str, **kwargs: Any) -> None:
        if self.save_dir and self.save_to_disk and name.endswith(self._suffix):
            folder = os.path.join(self.save_dir, name)
            self.logger.info(f"Saving the model with its config and classes to {folder}")
            save_model_folder(self.model, self._cfg, training_metadata(self._cfg), folder)
        super().save(name, **kwargs)
