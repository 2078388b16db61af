"""Data sets below the folder `DETECTRON2_DATASETS`, registered with Detectron2 on import.

register_*.py      names, class tables and loaders, one file per data set
custom_entries.py  registers the DATASETS.CUSTOM of a config
arguments.py       checks of their arguments
selection.py       images and classes of a split; derived_json.py, semantic_source.py: applied
label_values.py    what the pixels of label images mean
annotation_cache.py  converted annotations, kept between runs
loading.py         helpers shared by the loaders
checks.py          checks of the data sets that Detectron2 itself registers
categories/        class tables
"""

from . import (
    register_ade20k_full,
    register_ade20k_instance,
    register_ade20k_panoptic,
    register_annotations,
    register_coco_instances,
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
    "register_annotations",
    "register_coco_instances",
    "register_coco_panoptic_annos_semseg",
    "register_coco_stuff_10k",
    "register_custom",
    "register_mapillary_vistas",
    "register_mapillary_vistas_panoptic",
    "register_shapes",
]
