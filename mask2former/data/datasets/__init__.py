"""Data sets registered with Detectron2 on import, below the folder `DETECTRON2_DATASETS`."""

from . import register_coco_panoptic_annos_semseg, register_custom, register_shapes

__all__ = ["register_coco_panoptic_annos_semseg", "register_custom", "register_shapes"]
