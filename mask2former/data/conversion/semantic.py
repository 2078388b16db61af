"""Converts COCO panoptic JSON and PNGs to label maps, as semantic segmentation trains on them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from panopticapi.utils import rgb2id

from ...utils.files import explained_write_errors
from ...utils.parallel import map_tasks
from ..datasets.register_custom import panoptic_metadata
from ..formats.coco_panoptic import read_panoptic
from ..formats.findings import Findings
from ..formats.images import read_panoptic_png
from ..label_maps import present_values
from .output import png_names, save_png, staged_output

# What `convert_semantic` writes.
OUTPUT = ("labels", "classes.txt")

_IGNORE_LABEL = 255


class _LabelTask(NamedTuple):
    source: Path
    labels: dict[int, int]  # segment id → label
    target: Path


class _Labeller:
    """Writes the label map of a panoptic PNG."""

    def __init__(self, num_classes: int) -> None:
        self._dtype = np.uint8 if num_classes <= _IGNORE_LABEL else np.uint16
        self.ignore_label = int(np.iinfo(self._dtype).max)

    def __call__(self, task: _LabelTask) -> None:
        """
        Raises:
            FileNotFoundError, ValueError: the PNG cannot be read, or has other segments.
            WriteError: the label map cannot be written.
        """
        ids = rgb2id(read_panoptic_png(str(task.source)))
        values = present_values(ids)
        unknown = [v for v in values.tolist() if v != 0 and v not in task.labels]
        if unknown:
            raise ValueError(
                f"{task.source} has the segment id {unknown[0]} ({len(unknown)} unknown ids), "
                "which the panoptic JSON does not list for it."
            )
        labels = [task.labels.get(value, self.ignore_label) for value in values.tolist()]
        save_png(np.array(labels, self._dtype)[np.searchsorted(values, ids)], task.target)


def convert_semantic(
    json_file: Path,
    panoptic_root: Path,
    output: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[list[str], int]:
    """Write the label maps of COCO panoptic data: things first, then stuff, as in training.

    Args:
        json_file: COCO panoptic JSON with categories.
        panoptic_root: folder of its PNGs.
        output: folder that gets `labels/` and `classes.txt`.
        workers: number of processes.
        overwrite: whether existing output is replaced.

    Returns:
        The class names in the order of the labels, and the label of void pixels: 255, or 65535
        with more than 255 classes.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, WriteError: see `panoptic.py`.
    """
    findings = Findings()
    data = read_panoptic(str(json_file), findings)
    findings.raise_first()
    findings.log()
    if data is None or not data.categories:
        raise ValueError(f"{json_file} has no list of 'categories'.")
    bare = [c.id for c in data.categories if c.isthing is None or not c.name]
    if bare:
        raise ValueError(f"{json_file}: category {bare[0]!r} has no 'isthing' or no 'name'.")
    metadata = panoptic_metadata([category.as_dict() for category in data.categories])
    labels, classes = metadata["stuff_dataset_id_to_contiguous_id"], metadata["stuff_classes"]
    images = [data.image_name(annotation) for annotation in data.annotations]
    targets = png_names(images)
    labeller = _Labeller(len(classes))
    with staged_output(output, OUTPUT, overwrite) as staging:
        tasks = [
            _LabelTask(
                panoptic_root / annotation["file_name"],
                {s["id"]: labels[s["category_id"]] for s in annotation["segments_info"]},
                staging / "labels" / targets[image],
            )
            for annotation, image in zip(data.annotations, images, strict=True)
        ]
        map_tasks(labeller, tasks, workers, "labels")
        path = staging / "classes.txt"
        with explained_write_errors(str(path)):
            path.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return classes, labeller.ignore_label
