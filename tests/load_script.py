"""Programs of the repository as modules: other packages install packages named tools and setup."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str | Path) -> ModuleType:
    """A fresh copy of a program, which can import what lies beside it, as where it is started.

    Args:
        name: its path, relative to the repository or absolute.
    """
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up by its name.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
