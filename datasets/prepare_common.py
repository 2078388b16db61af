"""Shared by the preparation scripts: arguments, parallel processing, atomic writing.

Files are written atomically, so a script can be interrupted and repeated: it skips complete files.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

CATEGORIES = Path(__file__).resolve().parents[1] / "mask2former/data/datasets/categories"

_PNG_END = b"IEND\xaeB`\x82"


# ---- command line ----


def parse_args(
    description: str, splits: Sequence[str], argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the options of all scripts: root, splits, workers, force."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=root, help="folder that holds all data sets (as read by "
        "DETECTRON2_DATASETS)",
    )  # fmt: skip
    parser.add_argument("--splits", nargs="+", choices=splits, default=list(splits))
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of parallel processes"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist already")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, not {args.workers}")
    return args


def run(prepare: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a script; errors in the data are printed in one line with exit status 1."""
    try:
        prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: repeat the command to continue")


def require(paths: Iterable[Path], expected: str) -> None:
    """Check that files or folders of the official download exist.

    Args:
        paths: files and folders.
        expected: what they are and where to get them, for the error.

    Raises:
        FileNotFoundError: one does not exist.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist. Expected: {expected} Set --root or DETECTRON2_DATASETS to "
                "the folder that holds the data sets; datasets/README.md shows the layout."
            )


def list_files(folder: Path, pattern: str, expected: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted.

    Raises:
        FileNotFoundError: no file matches.
    """
    require([folder], expected)
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {pattern}. Expected: {expected}")
    return files


# ---- processing ----


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process; only the parent handles it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def process(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    what: str,
    workers: int,
    folders: Iterable[Path] = (),
) -> list[Any]:
    """Call a function for each task, in parallel and with a progress bar.

    Args:
        function: a module-level function, so that it can be pickled.
        tasks: one argument per call.
        what: title of the progress bar.
        workers: number of processes.
        folders: folders that the function writes to; created, and cleaned of temporary files.

    Returns:
        The results in the order of the tasks.
    """
    folders = list(folders)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    progress = {"desc": what, "total": len(tasks), "unit": "file"}
    try:
        if workers == 1 or len(tasks) == 1:
            return [function(task) for task in tqdm(tasks, **progress)]
        # Leaving the block ends the processes, even after an error.
        with Pool(workers, initializer=_ignore_interrupt) as pool:
            return list(tqdm(pool.imap(function, tasks, chunksize=8), **progress))
    finally:
        for folder in folders:
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()


def report(written: Sequence[bool], folder: Path) -> None:
    """Print how many files were written (True) and how many existed already (False)."""
    kept = len(written) - sum(written)
    print(f"{folder}: {sum(written)} files written, {kept} existed already")


# ---- files ----


def _temporary(path: Path) -> Path:
    # Loaders list files by their extension, so they skip this one.
    return path.with_name(f".{path.name}.tmp")


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: under a temporary name, which is then renamed."""
    temporary = _temporary(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_image(array: np.ndarray, path: Path) -> None:
    """Save (H, W) or (H, W, 3) atomically as a PNG or TIFF, chosen by the extension."""
    image_format = {".png": "PNG", ".tif": "TIFF"}[path.suffix]
    replace(path, lambda file: Image.fromarray(array).save(file, format=image_format))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""

    def write(file: Path) -> None:
        file.unlink(missing_ok=True)
        try:
            os.link(source, file)
        except OSError:
            shutil.copyfile(source, file)

    # os.replace between two hard links of the same file does nothing and leaves the temporary one.
    if not (target.exists() and target.samefile(source)):
        replace(target, write)


def save_json(content: Any, path: Path) -> None:
    """Write JSON atomically."""
    replace(path, lambda file: file.write_text(json.dumps(content)))


def load_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON, download it again: {error}") from error


def load_categories(name: str) -> list[dict]:
    """The class table `name`.json of the package."""
    return json.loads((CATEGORIES / f"{name}.json").read_text())


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, from its header.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise _unreadable(path, error) from error


def read_array(path: Path) -> np.ndarray:
    """The stored pixels of an image; for a palette image the indices.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged or not an image.
    """
    try:
        with Image.open(path) as image:
            return np.array(image)
    # PIL raises any of these for damaged files.
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path} does not exist, the download is incomplete.")
    return ValueError(f"{path} cannot be read, download it again: {error}")


def check_size(array: np.ndarray, size: tuple[int, int], path: Path, image: Path) -> None:
    """Check that an annotation has the (width, height) of its image.

    Raises:
        ValueError: the sizes differ.
    """
    if array.shape[1::-1] != size:
        raise ValueError(
            f"{path} is {array.shape[1]}x{array.shape[0]} pixels, its image {image} "
            f"{size[0]}x{size[1]}. They do not match: download both again."
        )


def is_complete(path: Path, size: tuple[int, int]) -> bool:
    """Whether a file is a complete image of the given (width, height)."""
    try:
        with Image.open(path) as image:
            if image.size != size:
                return False
            if path.suffix != ".png":
                image.load()
                return True
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except (OSError, SyntaxError, ValueError):
        return False


def is_finished(json_file: Path, images: list[Path]) -> bool:
    """Whether a file is a complete JSON of the given images."""
    try:
        content = json.loads(json_file.read_text())
        return [entry["id"] for entry in content["images"]] == [image.stem for image in images]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def segment_ids(array: np.ndarray) -> np.ndarray:
    """Ids (H, W) of a panoptic PNG (H, W, 3): R + 256 G + 65536 B."""
    red, green, blue = np.moveaxis(array.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] in pixels of a non-empty mask (H, W)."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]
