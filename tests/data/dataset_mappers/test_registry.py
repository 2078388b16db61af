"""Mappers by name: those of this package and those of other projects."""

import logging

import pytest
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former import add_maskformer2_config
from mask2former.data.dataset_mappers import (
    DATASET_MAPPER_REGISTRY,
    COCOPanopticNewBaselineDatasetMapper,
    build_mapper,
    register_mapper,
)

BUILTIN = [
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "detr_panoptic",
    "mask_former_instance",
    "mask_former_panoptic",
    "mask_former_semantic",
]


@pytest.fixture
def registry(monkeypatch):
    """The registry, restored after the test."""
    monkeypatch.setattr(DATASET_MAPPER_REGISTRY, "_obj_map", dict(DATASET_MAPPER_REGISTRY._obj_map))
    return DATASET_MAPPER_REGISTRY


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_mapper(name, cfg, mappers):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    mapper = build_mapper(cfg)
    assert type(mapper) is mappers[name] is DATASET_MAPPER_REGISTRY.get(name)
    assert mapper.is_train and mapper.img_format == "RGB" and mapper.num_classes == 3


def test_unknown_name(cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_semantic_lsj"
    with pytest.raises(ValueError, match=f"'coco_semantic_lsj'.*{', '.join(BUILTIN)}"):
        build_mapper(cfg)


def test_own_mapper_under_a_name(registry, cfg, records):
    @register_mapper("my_panoptic")
    class Mapper(COCOPanopticNewBaselineDatasetMapper):
        def __call__(self, dataset_dict):
            return super().__call__(dataset_dict) | {"mine": True}

    cfg.INPUT.DATASET_MAPPER_NAME = "my_panoptic"
    sample = build_mapper(cfg)(records["coco_panoptic_lsj"])
    assert sample["mine"] and sample["instances"].gt_classes.tolist() == [2, 0]


def test_own_mapper_under_its_class_name(registry, cfg):
    @registry.register()
    class MyMapper:
        def __init__(self, cfg, is_train):
            self.is_train = is_train

    cfg.INPUT.DATASET_MAPPER_NAME = "MyMapper"
    assert type(build_mapper(cfg, is_train=False)) is MyMapper
    assert not build_mapper(cfg, is_train=False).is_train


def test_first_registration_stays(registry, caplog):
    def first(cfg, is_train): ...

    def second(cfg, is_train): ...

    with caplog.at_level(logging.WARNING):
        assert register_mapper("taken")(first) is first
        assert register_mapper("taken")(first) is first
        assert not caplog.records
        assert register_mapper("taken")(second) is second
    assert registry.get("taken") is first
    assert f"'taken' is already registered by {__name__}" in caplog.text


@pytest.mark.parametrize("name", BUILTIN)
def test_unread_keys_accept_the_defaults(name, mappers):
    defaults = get_cfg()
    add_deeplab_config(defaults)
    add_maskformer2_config(defaults)
    assert mappers[name].unread_keys
    for key, value in mappers[name].unread_keys.items():
        node = defaults
        for part in key.split("."):
            node = node[part]
        assert node == value, key
