"""Registration that two forks in one process survive, and look-ups with clear errors."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import Registry

T = TypeVar("T", bound=Callable)


def register_unless_taken(registry: Registry, name: str | None = None) -> Callable[[T], T]:
    """A decorator: register a class, unless another project has registered its name already.

    Several projects have parts of these names, and importing two of them is no error. The first one
    stays registered; a warning names it.

    Args:
        registry: of Detectron2's kind.
        name: to register under; by default the name of the class.
    """

    def register(entry: T) -> T:
        key = name or entry.__name__
        if key not in registry:
            registry._do_register(key, entry)
        elif (registered := registry.get(key)) is not entry:
            logging.getLogger(__name__).warning(
                "%r is already registered by %s, which stays registered.",
                key,
                registered.__module__,
            )
        return entry

    return register


def registered_names(registry: Registry) -> list[str]:
    """All names of a registry, sorted."""
    return sorted(name for name, _ in registry)


def look_up(registry: Registry, name: str, key: str) -> Any:
    """The entry that a config key names.

    Args:
        registry: of Detectron2's kind.
        name: value of the config key.
        key: the config key, for the error.

    Raises:
        ValueError: the name is not registered.
    """
    if name not in registry:
        raise ValueError(
            f"{key} is {name!r}, which is not registered. Registered: "
            f"{', '.join(registered_names(registry)) or 'none'}. Import the module that registers "
            "it before the model or the loader is built."
        )
    return registry.get(name)


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
