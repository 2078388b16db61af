"""Dataset mappers: from a record of a data set to a training sample."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from .coco_instance_new_baseline_dataset_mapper import COCOInstanceNewBaselineDatasetMapper
from .coco_panoptic_new_baseline_dataset_mapper import COCOPanopticNewBaselineDatasetMapper
from .mask_former_instance_dataset_mapper import MaskFormerInstanceDatasetMapper
from .mask_former_panoptic_dataset_mapper import MaskFormerPanopticDatasetMapper
from .mask_former_semantic_dataset_mapper import MaskFormerSemanticDatasetMapper

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "DATASET_MAPPER_REGISTRY",
    "build_mapper",
]

_MAPPERS = {
    "coco_instance_lsj": COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": COCOPanopticNewBaselineDatasetMapper,
    "mask_former_instance": MaskFormerInstanceDatasetMapper,
    "mask_former_panoptic": MaskFormerPanopticDatasetMapper,
    "mask_former_semantic": MaskFormerSemanticDatasetMapper,
}


_LSJ = {
    "INPUT.COLOR_AUG_SSD": False,
    "INPUT.SIZE_DIVISIBILITY": -1,
    "INPUT.CROP.ENABLED": False,
}
DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
for _name, _mapper in _MAPPERS.items():
    DATASET_MAPPER_REGISTRY._do_register(_name, _mapper)
    _mapper.unread_keys = _LSJ if _name.endswith("_lsj") else {"INPUT.RANDOM_FLIP": "horizontal"}


def build_mapper(cfg: CfgNode, is_train: bool = True) -> Callable[[dict], dict]:
    """Build the mapper that `INPUT.DATASET_MAPPER_NAME` names.

    Raises:
        ValueError: there is no mapper of that name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in DATASET_MAPPER_REGISTRY:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME is {name!r}; known mappers: {', '.join(_MAPPERS)}."
        )
    return DATASET_MAPPER_REGISTRY.get(name)(cfg, is_train)
