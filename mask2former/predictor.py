"""From one image to the outputs of a trained model."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from .checkpoint import Mask2FormerCheckpointer
from .trainer import check_device


class Predictor(DefaultPredictor):
    """Detectron2's predictor, with checkpoints loaded without executing code and checked.

    Calling it with a BGR image, uint8 (H, W, 3), returns the model's outputs for it: a dict with
    the entries the config turns on, `sem_seg`, `panoptic_seg` and `instances`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: `MODEL.WEIGHTS` names the checkpoint, `DATASETS.TEST` the data set whose class
                names and colours become `metadata`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: no data set or no checkpoint is named, or the checkpoint does not fit; or
                the config asks for a GPU and there is none.
        """
        # Detectron2's __init__ is not called: it would load the checkpoint by unpickling.
        check_device(cfg)
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: name the data set whose classes to predict.")
        self.cfg = cfg.clone()
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        self.model = build_model(self.cfg).eval()
        Mask2FormerCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.aug = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT
