"""The project's files beside the package: recipes, tools, pinned requirements.

A checkout has them beside the package; a wheel carries copies inside it (`setup.py`).
"""

from pathlib import Path

# Of recipes: `_BASE_: mask2former://configs/coco/...`.
SCHEME = "mask2former://"
_PACKAGE = Path(__file__).resolve().parents[1]
# The folder of the copies in an installed package.
BUNDLE = "_project"


def project_root() -> Path:
    """The folder that holds configs/ and tools/.

    Raises:
        FileNotFoundError: the package was copied without them.
    """
    for root in (_PACKAGE / BUNDLE, _PACKAGE.parent):
        if (root / "configs").is_dir() and (root / "tools" / "train_net.py").is_file():
            return root
    raise FileNotFoundError(
        f"The package in {_PACKAGE} has no configs/ and tools/, neither inside nor beside it: "
        "install it with pip, or use a checkout."
    )


def local_path(path: str) -> str:
    """The file that a path with the scheme names; other paths are returned as they are."""
    if not path.startswith(SCHEME):
        return path
    return str(project_root() / path.removeprefix(SCHEME))
