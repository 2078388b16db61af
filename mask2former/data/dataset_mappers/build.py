"""The registry of dataset mappers, from which `INPUT.DATASET_MAPPER_NAME` chooses one."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ...utils.registry import look_up, register_unless_taken

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = """
Dataset mappers by the name that `INPUT.DATASET_MAPPER_NAME` takes.

An entry is called as `entry(cfg, is_train)` and returns the mapper: a callable from a record of a
data set to a sample. A mapper class may state `unread_keys`, see `BaseDatasetMapper`.
"""


def register_mapper(name: str) -> Callable[[Any], Any]:
    """A decorator: register a mapper class under `name`, unless the name is taken.

    `@DATASET_MAPPER_REGISTRY.register()` registers under the name of the class. As in
    `register_unless_taken`, the first registration stays and a second one logs a warning.
    """
    return register_unless_taken(DATASET_MAPPER_REGISTRY, name)


def build_mapper(cfg: CfgNode, is_train: bool = True) -> Callable[[dict], dict]:
    """Build the mapper that `INPUT.DATASET_MAPPER_NAME` names.

    Raises:
        ValueError: no mapper is registered under that name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    return look_up(DATASET_MAPPER_REGISTRY, name, "INPUT.DATASET_MAPPER_NAME")(cfg, is_train)
