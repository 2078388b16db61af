"""COCO JSON of some of the images of another one, under other classes, kept in the cache.

    derive_instances    COCO instance JSON
    derive_panoptic     COCO panoptic JSON; the PNGs stay as they are

Entries are copied whole. Mistakes in them are found where all COCO JSON is checked.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ..formats.coco_instances import Category, Id, image_file
from ..formats.coco_panoptic import Panoptic, read_panoptic
from ..formats.coco_schemas import Annotation, Image
from ..formats.findings import Findings
from ..formats.json_files import decode_list, decode_value, read_sections, without_gc
from .annotation_cache import cached, stamp, write_json
from .selection import OTHERS, Selection, map_classes, short_list

_logger = logging.getLogger(__name__)
# One line per data set says what has been found, before any other logger is set up.
_logger.setLevel(logging.INFO)


@dataclass(frozen=True)
class Changes:
    """What a registration changes about the annotations it names.

    Attributes:
        selection: the images.
        classes: all classes in order; None: those of the data.
        rename: see `map_classes`.
    """

    selection: Selection = field(default_factory=Selection)
    classes: tuple[str, ...] | None = None
    rename: Mapping[str, str | None] | None = None

    def __bool__(self) -> bool:
        return not (self.selection.is_all and self.classes is None and self.rename is None)

    def key(self) -> list[Any]:
        rename = None if self.rename is None else list(self.rename.items())
        return [self.selection.key(), self.classes, rename]


@dataclass(frozen=True)
class _Classes:
    """The categories of a JSON and what becomes of them.

    Attributes:
        categories: of the JSON.
        renamed: old name → new name, or None.
        new_ids: new name → category id, in the order of the new JSON.
    """

    categories: Sequence[Category]
    renamed: Mapping[str, str | None]
    new_ids: Mapping[str, Id]

    def ids(self) -> dict[Id, Id | None]:
        """Old category id → new one; None for classes that are left out."""
        names = {c.id: self.renamed[c.name or ""] for c in self.categories}
        return {key: None if name is None else self.new_ids[name] for key, name in names.items()}

    def entries(self) -> list[dict[str, Any]]:
        """The categories of the new JSON; each has the keys of the first that got its name."""
        first: dict[str | None, dict[str, Any]] = {}
        for category in self.categories:
            first.setdefault(self.renamed[category.name or ""], category.as_dict())
        return [
            first.get(name, {}) | {"id": key, "name": name} for name, key in self.new_ids.items()
        ]


def derive_instances(
    name: str, json_file: str, categories: Sequence[Category], changes: Changes, source: str
) -> str:
    """The COCO instance JSON of the images and classes that a registration asks for.

    Args:
        name: of the data set, for messages.
        json_file: the JSON that has all.
        categories: of the JSON, checked.
        changes: what is asked for.
        source: what the JSON was made of, for errors.

    Returns:
        Its path in the cache, or `json_file` where nothing changes.

    Raises:
        FileNotFoundError, ValueError: see `Selection.choose` and `map_classes`, or the JSON is
            damaged.
        WriteError: the cache cannot be written.
    """
    if not changes:
        return json_file
    where = f"Data set {name!r}: {source}"
    # The loader numbers classes in the order of their ids.
    ordered = sorted(categories, key=lambda category: category.id)
    names, renamed = map_classes(
        where, [c.name or "" for c in ordered], changes.classes, changes.rename
    )
    ids = _first_ids(ordered, renamed)
    if changes.classes is not None or OTHERS in (changes.rename or {}):
        ids = {new: i for i, new in enumerate(names, 1)}
    classes = _Classes(ordered, renamed, ids)
    is_same = names == [category.name for category in ordered]
    if is_same and changes.selection.is_all:
        return json_file
    key = ["instances", stamp(json_file), changes.key()]

    def choose(images: Sequence[str]) -> set[str]:
        return changes.selection.choose(images, where)

    write = partial(_write_instances, name, json_file, classes, choose)
    derived = cached(_source_name(json_file), ".json", key, write)
    _log(name, derived, changes)
    return derived


def _first_ids(categories: Sequence[Category], renamed: Mapping[str, str | None]) -> dict[str, Id]:
    """New name → the id of the first category that gets it."""
    ids: dict[str, Id] = {}
    for category in categories:
        new = renamed[category.name or ""]
        if new is not None:
            ids.setdefault(new, category.id)
    return ids


def _write_instances(
    name: str,
    json_file: str,
    classes: _Classes,
    choose: Callable[[Sequence[str]], set[str]],
    path: str,
) -> None:
    findings = Findings()
    with without_gc():
        sections = read_sections(json_file, findings) or {}
        findings.raise_first(name, is_data=False)
        images = decode_list(sections, "images", Image, json_file, findings, "an image")
        annotations: Sequence[Annotation | None] | None = []
        if "annotations" in sections:
            annotations = decode_list(
                sections, "annotations", Annotation, json_file, findings, "an annotation"
            )
        names: dict[Id, str] = {}
        for image in images or ():
            file = None if image is None else image_file(image)
            if file is not None:
                names[image.id] = file
            elif image is not None:
                findings.problem(json_file, image.id, "an image has no 'file_name'")
        findings.raise_first(name, is_data=False)
        chosen = choose(list(names.values()))
        kept = {image_id for image_id, file in names.items() if file in chosen}
        ids = classes.ids()
        old_names = {category.id: category.name for category in classes.categories}
        left_out: Counter[str] = Counter()
        objects: list[dict[str, Any]] = []
        entries = decode_value(sections["annotations"]) if annotations else []
        for entry, annotation in zip(entries, annotations or (), strict=True):
            if annotation.image_id in names and annotation.image_id not in kept:
                continue
            if annotation.category_id not in ids:
                why = (
                    f"the annotation of image {annotation.image_id!r} has category_id "
                    f"{annotation.category_id!r}, which is not one of the categories"
                )
                findings.problem(json_file, f"annotation {annotation.id}", why)
                continue
            category_id = ids[annotation.category_id]
            if category_id is None:
                left_out[str(old_names[annotation.category_id])] += 1
            else:
                objects.append(entry | {"category_id": category_id})
        findings.raise_first(name, is_data=False)
        content: dict[str, Any] = {
            "info": _Info(len(names), len(kept), len(objects), dict(left_out)),
            "images": [
                entry
                for entry, image in zip(decode_value(sections["images"]), images, strict=True)
                if image.id in kept
            ],
            "categories": classes.entries(),
        }
        if "annotations" in sections:
            content["annotations"] = objects
        write_json(path, msgspec.json.encode(content))


def derive_panoptic(
    name: str,
    panoptic_json: str,
    instances_json: str | None,
    categories: Sequence[Category],
    things: Sequence[Category],
    changes: Changes,
) -> tuple[str, str | None]:
    """The COCO panoptic JSON, and the instance JSON of the same images if there is one.

    Args:
        name: of the data set, for messages.
        panoptic_json, instances_json: the JSONs that have all.
        categories: of the panoptic JSON, checked, with `isthing`.
        things: of the instance JSON.
        changes: what is asked for. No class can be left out, and no stuff merged, because the
            pixels of the PNGs stay.

    Returns:
        Their paths in the cache, or those given where nothing changes.

    Raises:
        FileNotFoundError, ValueError: see `derive_instances`, or the PNGs would have to change.
        WriteError: the cache cannot be written.
    """
    if not changes:
        return panoptic_json, instances_json
    where = f"Data set {name!r}: {panoptic_json}"
    names, renamed = map_classes(
        where, [c.name or "" for c in categories], changes.classes, changes.rename
    )
    _check_panoptic_classes(where, categories, names, renamed)
    first = _first_ids(categories, renamed)
    classes = _Classes(categories, renamed, {new: first[new] for new in names})
    findings = Findings()
    # Whether ids are distinct within an image is the loader's concern.
    data = read_panoptic(panoptic_json, findings, allow_repeated_ids=True)
    findings.raise_first(name, is_data=False)
    assert data is not None
    listed = [data.image_name(annotation) for annotation in data.annotations]
    chosen = changes.selection.choose(listed, where)
    key = ["panoptic", stamp(panoptic_json), changes.key()]
    write = partial(_write_panoptic, data, chosen, classes)
    derived = cached(_source_name(panoptic_json), ".json", key, write)
    _log(name, derived, changes)
    if instances_json is None:
        return derived, None
    key = ["instances of", stamp(instances_json), *key]
    write = partial(
        _write_instances,
        name,
        instances_json,
        _Classes(things, renamed, {c: first[c] for c in names if _is_thing(c, things, renamed)}),
        chosen.intersection,
    )
    return derived, cached(_source_name(instances_json), ".json", key, write)


def _is_thing(new: str, things: Sequence[Category], renamed: Mapping[str, str | None]) -> bool:
    return any(renamed[category.name or ""] == new for category in things)


def _check_panoptic_classes(
    where: str,
    categories: Sequence[Category],
    names: Sequence[str],
    renamed: Mapping[str, str | None],
) -> None:
    """Check that new classes need no new PNGs.

    Raises:
        ValueError: a class is left out or unknown, or stuff is merged.
    """
    left_out = [old for old, new in renamed.items() if new is None]
    if left_out:
        raise ValueError(
            f"{where}: RENAME leaves out {short_list(left_out)}, but each pixel of the panoptic "
            "PNGs keeps its segment: rename the class, or convert the data."
        )
    for new in names:
        merged = [c for c in categories if renamed[c.name or ""] == new]
        if not merged:
            raise ValueError(
                f"{where}: CLASSES lists {new!r}, which is no class of the JSON; whether it is a "
                "thing is unknown."
            )
        if len(merged) > 1 and not all(category.isthing for category in merged):
            listed = short_list([str(category.name) for category in merged])
            raise ValueError(
                f"{where}: RENAME merges {listed}, but only things can be merged: stuff has one "
                "segment per image in the panoptic PNGs."
            )


def _write_panoptic(data: Panoptic, chosen: set[str], classes: _Classes, path: str) -> None:
    ids = classes.ids()
    kept = [entry for entry in data.annotations if data.image_name(entry) in chosen]
    annotations = [
        entry
        | {
            "segments_info": [
                segment | {"category_id": ids[segment["category_id"]]}
                for segment in entry["segments_info"]
            ]
        }
        for entry in kept
    ]
    image_ids = {entry["image_id"] for entry in kept}
    objects = sum(len(entry["segments_info"]) for entry in kept)
    content: dict[str, Any] = {"info": _Info(len(data.annotations), len(kept), objects)}
    if data.images:
        content["images"] = [data.images[key] for key in data.images if key in image_ids]
    content |= {"categories": classes.entries(), "annotations": annotations}
    write_json(path, msgspec.json.encode(content))


class _Info(msgspec.Struct):
    """What a derived JSON says about itself.

    Attributes:
        source_images: images of the JSON it is derived from.
        images, objects: that it has.
        left_out: class that RENAME leaves out → objects.
    """

    source_images: int
    images: int
    objects: int
    left_out: dict[str, int] = {}


def _log(name: str, derived: str, changes: Changes) -> None:
    """Say once what the derived JSON has."""
    sections = read_sections(derived, Findings()) or {}
    info = msgspec.convert(decode_value(sections["info"]), _Info)
    if not changes.selection.is_all:
        _logger.info(
            f"Data set {name!r}: {changes.selection.text()}: {info.images} of "
            f"{info.source_images} images, {info.objects} objects"
        )
    for class_name, objects in info.left_out.items():
        _logger.info(
            f"Data set {name!r}: RENAME leaves out class {class_name!r}: {objects} objects are "
            "background"
        )


def _source_name(file: str) -> str:
    path = Path(file).absolute()
    return f"{path.parent.name}_{path.stem}"
