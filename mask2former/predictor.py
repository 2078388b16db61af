"""Inference on single images with a trained model."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from .checkpoint import Mask2FormerCheckpointer
from .config_checks import check_once
from .data.augmentations import ResizeShortestEdge
from .data.formats.bands import as_colours, image_format_of
from .data.formats.images import read_image
from .fast.setup import apply_config
from .preflight import check_device


class Predictor(DefaultPredictor):
    """Detectron2's predictor, but checkpoints are checked and cannot execute code.

    Called with a BGR image, uint8 (H, W, 3), it returns the model's outputs: a dict with those of
    `sem_seg`, `panoptic_seg` and `instances` that the config turns on. With INPUT.FORMAT L or
    BANDS the image has the channels that `read` gives.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: `MODEL.WEIGHTS` names the checkpoint, `DATASETS.TEST` the data set whose class
                names and colours become `metadata`.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            ValueError: no data set or no checkpoint is named, the checkpoint does not fit, or
                MODEL.DEVICE does not exist on this machine.
        """
        # Detectron2's __init__ is not called: it unpickles the checkpoint.
        check_once(cfg, "device", check_device)
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: name the data set whose classes to predict.")
        self.cfg = cfg.clone()
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        self.model = build_model(self.cfg).eval()
        apply_config(self.cfg, self.model)
        Mask2FormerCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.aug = ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT

    def read(self, file_name: str) -> np.ndarray:
        """Read an image as this predictor is called with it.

        Raises:
            FileNotFoundError, ValueError: see `read_image`.
        """
        is_colour = self.input_format in ("RGB", "BGR")
        return read_image(file_name, "BGR" if is_colour else image_format_of(self.cfg))

    def colours(self, image: np.ndarray) -> np.ndarray:
        """The RGB image (H, W, 3) on which to draw the predictions for an image of `read`."""
        is_colour = self.input_format in ("RGB", "BGR")
        return as_colours(image, "BGR" if is_colour else self.input_format)
