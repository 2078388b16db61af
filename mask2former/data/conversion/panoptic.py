"""Converts COCO instance JSON and label maps to COCO panoptic JSON and PNGs.

`composition.py` says what is on top of what. `info` of the panoptic JSON lists the objects that
have no segment.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from panopticapi.utils import id2rgb

from ...utils.parallel import map_tasks
from ..datasets.colours import class_colours
from ..formats.coco_instances import Instances, raw_annotations, read_instances
from ..formats.coco_schemas import Category, Id
from ..formats.findings import Findings
from .composition import Overlap, PlacedObject, Rules, Unassigned, compose
from .label_files import LabelMaps, read_label_map
from .output import png_names, save_png, staged_output, write_json

# What `convert_panoptic` writes.
OUTPUT = ("panoptic", "instances.json", "panoptic.json")

_IGNORE_LABEL = 255


@dataclass(frozen=True)
class PanopticOptions:
    """What `convert_panoptic` makes of its sources.

    Attributes:
        label_root: folder of label maps with the names of the images; None: there are none.
        classes: label → class name. Classes named like a thing are this thing, all others stuff.
        ignore_labels: labels of pixels without a class, also if `classes` has them; None: 255,
            unless it is the label of a class.
        stuff: class names of the instances that are stuff, such as a road drawn as a polygon.
        background: name of the stuff class that fills the pixels of no object, without label maps;
            None: they are void.
        overlap, min_area, unassigned: see `Rules`.
    """

    label_root: Path | None = None
    classes: Mapping[int, str] = field(default_factory=dict)
    ignore_labels: frozenset[int] | None = None
    stuff: tuple[str, ...] = ()
    background: str | None = None
    overlap: Overlap = "area"
    min_area: int = 1
    unassigned: Unassigned = "void"

    def __post_init__(self) -> None:
        if (self.label_root is None) != (not self.classes):
            raise ValueError("Label maps and the classes of their labels must be given together.")
        if self.label_root is not None and self.background is not None:
            raise ValueError(
                "A background class fills images without label maps; with them, all stuff is in "
                "the label maps."
            )

    @property
    def void_labels(self) -> frozenset[int]:
        if self.ignore_labels is not None:
            return self.ignore_labels
        return frozenset({_IGNORE_LABEL} - self.classes.keys())

    @property
    def used_classes(self) -> dict[int, str]:
        """`classes` without the ignored labels."""
        return {n: name for n, name in self.classes.items() if n not in self.void_labels}


@dataclass
class PanopticSummary:
    """What `convert_panoptic` made.

    Attributes:
        num_images, num_segments: of the panoptic JSON.
        things, stuff: class names.
        empty, hidden, small: ids of annotations without a segment; see `PanopticImage`.
        unassigned: thing → pixels with its label where no object is.
        unused_label_maps: number of label maps without an image in the instance JSON.
    """

    num_images: int = 0
    num_segments: int = 0
    things: list[str] = field(default_factory=list)
    stuff: list[str] = field(default_factory=list)
    empty: list[Id] = field(default_factory=list)
    hidden: list[Id] = field(default_factory=list)
    small: list[Id] = field(default_factory=list)
    unassigned: Counter[str] = field(default_factory=Counter)
    unused_label_maps: int = 0


# ---- classes ----


def _panoptic_categories(
    categories: Sequence[Category], options: PanopticOptions
) -> list[dict[str, Any]]:
    """The categories of the panoptic JSON: those of the instances, then the other stuff.

    Raises:
        ValueError: the names of `options` do not fit.
    """
    names = [category.name for category in categories]
    unknown = [name for name in options.stuff if name not in names]
    if unknown:
        raise ValueError(
            f"The stuff class {unknown[0]!r} is not one of the classes of the objects: "
            f"{', '.join(map(str, names))}."
        )
    rows = []
    for category in categories:
        is_stuff = category.name in options.stuff or category.isthing in (0, False)
        rows.append(category.as_dict() | {"isthing": int(not is_stuff)})
    others = list(options.used_classes.values())
    if options.background is not None:
        things = [row["name"] for row in rows if row["isthing"]]
        if options.background in things:
            raise ValueError(
                f"The background class {options.background!r} is a class of the objects: choose "
                "another name, or make that class stuff, too."
            )
        others.append(options.background)
    others = [name for name in dict.fromkeys(others) if name not in names]
    _refuse_similar(names, others)
    ids: list[Any] = [category.id for category in categories]
    for name in others:
        is_text = bool(ids) and isinstance(ids[0], str)
        ids.append(_free_text(name, ids) if is_text else max(ids, default=0) + 1)
        rows.append({"id": ids[-1], "name": name, "isthing": 0})
    for row, colour in zip(rows, class_colours(len(rows)), strict=True):
        row.setdefault("color", colour)
    return rows


def _free_text(name: str, ids: Sequence[Id]) -> str:
    while name in ids:
        name += "_stuff"
    return name


def _refuse_similar(names: Sequence[str], others: Sequence[str]) -> None:
    """Refuse stuff whose name differs from a class in case or separators only."""

    def key(name: str) -> str:
        return name.casefold().replace("_", " ").replace("-", " ").strip()

    known = {key(name): name for name in names}
    for name in others:
        if key(name) in known:
            raise ValueError(
                f"The class {known[key(name)]!r} of the objects and the stuff class {name!r} "
                "differ in case or separators only. Write the class in one way, or rename one."
            )


def _rules(categories: Sequence[Mapping[str, Any]], options: PanopticOptions) -> Rules:
    ids = {row["name"]: row["id"] for row in categories}
    thing_ids = {row["id"] for row in categories if row["isthing"]}
    labels = {label: ids[name] for label, name in options.used_classes.items()}
    return Rules(
        overlap=options.overlap,
        min_area=options.min_area,
        stuff_ids=frozenset(ids.values()) - thing_ids,
        stuff={label: key for label, key in labels.items() if key not in thing_ids},
        things={label: key for label, key in labels.items() if key in thing_ids},
        void=options.void_labels,
        unassigned=options.unassigned,
        background=None if options.background is None else ids[options.background],
    )


# ---- instances and label maps → panoptic ----


class _Task(NamedTuple):
    image: str
    size: tuple[int, int]
    objects: list[PlacedObject]
    label_map: Path | None
    png: Path


class _Composed(NamedTuple):
    segments: list[dict[str, Any]]
    empty: list[Id]
    hidden: list[Id]
    small: list[Id]
    unassigned: dict[Id, int]


class _Composer:
    """Writes the PNG of an image. Holds no images, because it is sent to worker processes."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def __call__(self, task: _Task) -> _Composed:
        """
        Raises:
            FileNotFoundError, ValueError: the label map cannot be read or does not fit.
            WriteError: the PNG cannot be written.
        """
        labels = None if task.label_map is None else read_label_map(task.label_map)
        try:
            image = compose(task.size, task.objects, self._rules, labels)
        except ValueError as error:
            raise ValueError(f"Label map {task.label_map} of {task.image} {error}.") from error
        save_png(id2rgb(image.ids), task.png)
        return _Composed(image.segments, image.empty, image.hidden, image.small, image.unassigned)


def convert_panoptic(
    json_file: Path,
    image_root: Path,
    output: Path,
    options: PanopticOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> PanopticSummary:
    """Compose COCO panoptic data of instances and label maps.

    Args:
        json_file: COCO instance JSON. A category with `isthing` 0 is stuff.
        image_root: folder of its images, read only if the JSON does not state their sizes.
        output: folder that gets `panoptic/`, `panoptic.json` and `instances.json`, which has the
            things of `panoptic.json` with their whole masks.
        options: what to make of them.
        workers: number of processes.
        overwrite: whether existing output is replaced.

    Raises:
        FileExistsError: the output exists, and is not to be overwritten.
        FileNotFoundError: the JSON, the label map of an image or a folder is missing.
        ValueError: the JSON or a label map is damaged, or they do not fit together.
        WriteError: the output cannot be written.
    """
    findings = Findings()
    data = read_instances(str(json_file), str(image_root), findings)
    findings.raise_first()
    findings.log()
    if data is None:
        raise ValueError(f"{json_file} is not COCO instance JSON.")
    categories = _panoptic_categories(data.categories, options)
    names = {row["id"]: row["name"] for row in categories}
    summary = PanopticSummary(
        len(data.images),
        things=[row["name"] for row in categories if row["isthing"]],
        stuff=[row["name"] for row in categories if not row["isthing"]],
    )
    pngs = png_names(image.file_name for image in data.images)
    label_maps = _find_label_maps(data, options, summary)
    with staged_output(output, OUTPUT, overwrite) as staging:
        tasks = [
            _Task(
                image.file_name,
                (image.height, image.width),
                [
                    PlacedObject(
                        a["id"], a["category_id"], a["segmentation"], bool(a.get("iscrowd"))
                    )
                    for a in raw_annotations(data, image)
                ],
                label_maps.get(image.file_name),
                staging / "panoptic" / pngs[image.file_name],
            )
            for image in data.images
        ]
        composed = map_tasks(_Composer(_rules(categories, options)), tasks, workers, "panoptic")
        for result in composed:
            summary.num_segments += len(result.segments)
            summary.empty += result.empty
            summary.hidden += result.hidden
            summary.small += result.small
            for category_id, pixels in result.unassigned.items():
                summary.unassigned[names[category_id]] += pixels
        write_json(staging / "instances.json", _things(data, categories))
        annotations = [
            {
                "image_id": image.id,
                "file_name": pngs[image.file_name],
                "segments_info": result.segments,
            }
            for image, result in zip(data.images, composed, strict=True)
        ]
        content = {
            "info": _info(options, summary),
            "images": [
                {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
                for i in data.images
            ],
            "annotations": annotations,
            "categories": categories,
        }
        write_json(staging / "panoptic.json", content)
    return summary


def _find_label_maps(
    data: Instances, options: PanopticOptions, summary: PanopticSummary
) -> dict[str, Path]:
    """Image → label map, for all images."""
    if options.label_root is None:
        return {}
    folder = LabelMaps(options.label_root)
    found = {image.file_name: folder.find(image.file_name) for image in data.images}
    missing = [image for image, label_map in found.items() if label_map is None]
    if missing:
        raise FileNotFoundError(
            f"The image {missing[0]} has no label map in {options.label_root} ({len(missing)} of "
            f"{len(found)} images have none). Label maps have the names of the images."
        )
    summary.unused_label_maps = len(folder) - len(set(found.values()))
    return {image: label_map for image, label_map in found.items() if label_map is not None}


def _info(options: PanopticOptions, summary: PanopticSummary) -> dict[str, Any]:
    return {
        "description": "Panoptic annotation composed of objects and label maps.",
        "overlap": options.overlap,
        "min_area": options.min_area,
        "annotations_without_segment": {
            "empty": summary.empty,
            "hidden": summary.hidden,
            "small": summary.small,
        },
        "thing_pixels_without_object": dict(summary.unassigned),
    }


def _things(data: Instances, categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """COCO instance JSON of the things, for AP."""
    things = [row for row in categories if row["isthing"]]
    thing_ids = {row["id"] for row in things}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        content = data.as_coco().dataset
    annotations = [a for a in content.get("annotations", []) if a["category_id"] in thing_ids]
    return content | {"annotations": annotations, "categories": things}
