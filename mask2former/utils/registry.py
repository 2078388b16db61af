"""Registration that two forks in one process survive."""

import logging
from collections.abc import Callable
from typing import TypeVar

from detectron2.utils.registry import Registry

T = TypeVar("T", bound=type)


def register_unless_taken(registry: Registry) -> Callable[[T], T]:
    """A class decorator: register under the class's name, unless another project has it already.

    Several projects carry parts of these names; importing two of them is no error. The first one
    stays registered, and a warning says which.
    """

    def register(cls: T) -> T:
        if cls.__name__ in registry:
            logging.getLogger(__name__).warning(
                "%r already belongs to %s and still does.",
                cls.__name__,
                registry.get(cls.__name__).__module__,
            )
        else:
            registry.register(cls)
        return cls

    return register
