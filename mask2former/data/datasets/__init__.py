"""Data sets registered with Detectron2 on import, below the folder `DETECTRON2_DATASETS`.

register_*.py      names, class tables, loaders; one file a data set
custom_entries.py  DATASETS.CUSTOM of a config
loading.py         what the loaders share
checks.py          checks of the data sets that Detectron2 itself registers
categories/        class tables
"""

from . import (
    register_ade20k_full,
    register_ade20k_instance,
    register_ade20k_panoptic,
    register_coco_panoptic_annos_semseg,
    register_coco_stuff_10k,
    register_custom,
    register_mapillary_vistas,
    register_mapillary_vistas_panoptic,
    register_shapes,
)

__all__ = [
    "register_ade20k_full",
    "register_ade20k_instance",
    "register_ade20k_panoptic",
    "register_coco_panoptic_annos_semseg",
    "register_coco_stuff_10k",
    "register_custom",
    "register_mapillary_vistas",
    "register_mapillary_vistas_panoptic",
    "register_shapes",
]
