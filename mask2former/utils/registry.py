"""Registration that two forks in one process survive, and questions to registries."""

import logging
from collections.abc import Callable
from typing import TypeVar

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import Registry

T = TypeVar("T", bound=type)


def register_unless_taken(registry: Registry) -> Callable[[T], T]:
    """A class decorator: register under the class's name, unless another project has it already.

    Several projects have parts of these names, and importing two of them is no error. The first one
    stays registered; a warning names it.
    """

    def register(cls: T) -> T:
        if cls.__name__ in registry:
            logging.getLogger(__name__).warning(
                "%r is already registered by %s, which stays registered.",
                cls.__name__,
                registry.get(cls.__name__).__module__,
            )
        else:
            registry.register(cls)
        return cls

    return register


def is_mask_former(name: str) -> bool:
    """Whether a meta-architecture is the registered `MaskFormer` or a subclass of it.

    Args:
        name: value of MODEL.META_ARCHITECTURE.
    """
    if name not in META_ARCH_REGISTRY or "MaskFormer" not in META_ARCH_REGISTRY:
        return name == "MaskFormer"
    # Detectron2 also registers functions.
    architecture = META_ARCH_REGISTRY.get(name)
    return isinstance(architecture, type) and issubclass(
        architecture, META_ARCH_REGISTRY.get("MaskFormer")
    )
