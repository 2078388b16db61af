"""The scripts of datasets/ as modules."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "datasets"
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """Function (script name) → its module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def shared_data() -> Path:
    """The folder of real samples."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def interrupted(monkeypatch) -> Callable[[ModuleType, str, int], AbstractContextManager]:
    """Context (module, function name, n): Ctrl-C interrupts the call after the first n ones."""

    @contextmanager
    def context(module: ModuleType, name: str, calls: int) -> Iterator[None]:
        original, remaining = getattr(module, name), iter(range(calls))

        def call(*args, **options):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, call)
            with pytest.raises(SystemExit, match="interrupted: repeat the command"):
                yield

    return context
