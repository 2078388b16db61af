"""Load programs by path: other packages install top-level packages named tools and setup."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str | Path) -> ModuleType:
    """Import a fresh copy of a program; it can import its neighbours, as when it is run.

    Args:
        name: its path, relative to the repository or absolute. A folder stands for its __main__.py.
    """
    path = ROOT / name
    module_name = f"{path.stem}_script"
    if path.is_dir():
        path /= "__main__.py"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up by its name.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
