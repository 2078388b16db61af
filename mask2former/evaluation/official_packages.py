"""Imports the optional official Cityscapes and LVIS packages and adapts them to current NumPy.

Neither has a release for current NumPy, which has dropped names that they use.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

# Installed without their other dependencies, which would replace packages used here.
_PACKAGES = {
    "cityscapesscripts": "cityscapesscripts pyquaternion",
    "lvis": "lvis",
}


def import_official(module: str, dataset_name: str) -> ModuleType:
    """Import a module of an official evaluation package.

    Args:
        module: full name.
        dataset_name: the data set to evaluate, for the error message.

    Raises:
        ImportError: the package or one of its dependencies is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Evaluation on {dataset_name} uses the official package {package}, which cannot be "
            f"imported ({error}). To install it: `pip install --no-deps {_PACKAGES[package]}`."
        ) from error


def numpy_with_old_names() -> ModuleType:
    """Return a copy of NumPy with `float` (dropped in 1.24) and `in1d` (dropped in 2.4)."""

    def in1d(values: Any, test_values: Any, **kwargs: Any) -> np.ndarray:
        return np.isin(values, test_values, **kwargs).ravel()

    module = ModuleType("numpy_with_old_names")
    vars(module).update(vars(np), float=float, in1d=in1d)
    return module


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Temporarily replace attributes of a module."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)
