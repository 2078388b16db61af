"""The registry of dataset mappers, from which `INPUT.DATASET_MAPPER_NAME` chooses one."""

import logging
from collections.abc import Callable
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

T = TypeVar("T", bound=Callable)

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = """
Dataset mappers by the name that `INPUT.DATASET_MAPPER_NAME` takes.

An entry is called as `entry(cfg, is_train)` and returns the mapper: a callable from a record of a
data set to a sample. A mapper class may state `unread_keys`, see `BaseDatasetMapper`.
"""


def register_mapper(name: str) -> Callable[[T], T]:
    """A decorator: register a mapper class under `name`, unless the name is taken.

    `@DATASET_MAPPER_REGISTRY.register()` registers under the name of the class. As in
    `register_unless_taken`, the first registration stays and a second one logs a warning.
    """

    def register(mapper: T) -> T:
        if name not in DATASET_MAPPER_REGISTRY:
            DATASET_MAPPER_REGISTRY._do_register(name, mapper)
        elif (registered := DATASET_MAPPER_REGISTRY.get(name)) is not mapper:
            logging.getLogger(__name__).warning(
                "Dataset mapper %r is already registered by %s and stays.",
                name,
                registered.__module__,
            )
        return mapper

    return register


def build_mapper(cfg: CfgNode, is_train: bool = True) -> Callable[[dict], dict]:
    """Build the mapper that `INPUT.DATASET_MAPPER_NAME` names.

    Raises:
        ValueError: no mapper is registered under that name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in DATASET_MAPPER_REGISTRY:
        known = ", ".join(sorted(registered for registered, _ in DATASET_MAPPER_REGISTRY))
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME is {name!r}; registered mappers: {known}. Import the "
            "module that registers your own mapper (register_mapper) before it is used."
        )
    return DATASET_MAPPER_REGISTRY.get(name)(cfg, is_train)
