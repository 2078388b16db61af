"""Predictions of a folder as files that evaluation and labelling tools read.

    json       coco_instances_results.json, the COCO result format, and images.json, the images
               and categories that it is about: `COCO("images.json").loadRes(...)`
    panoptic   panoptic.json, COCO panoptic format, and panoptic/*.png with segment ids as colours
    semantic   semantic/*.png, maps of category ids

Ids of images and categories are those of a data set, where the images are of one.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..utils.files import atomic_write, make_folder
from .result import Result
from .result_files import panoptic_png, semantic_png, write_png

KINDS = ("json", "panoptic", "semantic")
# The task whose predictions each kind has.
TASK_OF_KIND = {"json": "instance", "panoptic": "panoptic", "semantic": "semantic"}


class FolderResults:
    """Collects the predictions of a folder. The PNGs are written at once, the JSON at the end."""

    def __init__(
        self,
        folder: str | os.PathLike,
        kinds: Iterable[str],
        *,
        class_names: Sequence[str],
        things: Iterable[int],
        category_ids: Mapping[int, int] | None = None,
        known_image_ids: Iterable[Any] = (),
    ) -> None:
        """
        Args:
            folder: to write to.
            kinds: of `KINDS`.
            class_names: K names, by label.
            things: labels of things.
            category_ids: label → category id of the files; default: the label itself. Classes
                without an id, which the model must not predict, are not listed.
            known_image_ids: of the data set, which no other image gets.
        """
        self._folder = Path(folder)
        self._kinds = frozenset(kinds)
        assert self._kinds <= set(KINDS), kinds
        self._category_ids = (
            {i: i for i in range(len(class_names))} if category_ids is None else dict(category_ids)
        )
        is_thing = set(things)
        self._categories = [
            {"id": self._category_ids[label], "name": name, "isthing": int(label in is_thing)}
            for label, name in enumerate(class_names)
            if label in self._category_ids
        ]
        numbers = [known for known in known_image_ids if isinstance(known, int)]
        self._next_id = max(numbers, default=0) + 1
        self._images: list[dict[str, Any]] = []
        self._instances: list[dict[str, Any]] = []
        self._panoptic: list[dict[str, Any]] = []

    def add(self, stem: Path, file_name: str, result: Result, image_id: Any = None) -> None:
        """Add an image.

        Args:
            stem: of the PNGs, relative, without suffix.
            file_name: of the image, as the JSON names it.
            result: with the tasks of the kinds.
            image_id: in the data set; default: a number that is not taken.

        Raises:
            ValueError: a predicted class has no category id.
            WriteError: a PNG cannot be written.
        """
        if image_id is None:
            image_id, self._next_id = self._next_id, self._next_id + 1
        height, width = result.image_size
        self._images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )
        content = result.to_coco(image_id)
        if "json" in self._kinds:
            self._instances += content["instances"]
        png = Path(f"{stem}.png")
        if "panoptic" in self._kinds:
            assert result.panoptic is not None
            segment_ids = result.panoptic.segment_ids
            write_png(self._folder / "panoptic" / png, panoptic_png(result.panoptic))
            # As gt files have it: tools that edit panoptic files need it.
            segments = [
                {"bbox": list(cv2.boundingRect((segment_ids == one["id"]).astype(np.uint8)))}
                | {"iscrowd": 0}
                | one
                for one in content["panoptic"]["segments_info"]
            ]
            annotation = {"file_name": png.as_posix(), "segments_info": segments}
            self._panoptic.append(content["panoptic"] | annotation)
        if "semantic" in self._kinds:
            assert result.semantic is not None
            write_png(self._folder / "semantic" / png, semantic_png(result))

    def finish(self) -> list[Path]:
        """Write the JSON.

        Returns:
            The files and folders that were written.

        Raises:
            WriteError: a file cannot be written.
        """
        written = []
        listed = {"images": self._images, "categories": self._categories}
        if "json" in self._kinds:
            written += [
                self._write_json("coco_instances_results.json", self._instances),
                self._write_json("images.json", listed | {"annotations": []}),
            ]
        if "panoptic" in self._kinds:
            content = listed | {"annotations": self._panoptic}
            written += [self._write_json("panoptic.json", content), self._folder / "panoptic"]
        if "semantic" in self._kinds:
            written.append(self._folder / "semantic")
        return written

    def _write_json(self, name: str, content: Any) -> Path:
        make_folder(str(self._folder))
        path = self._folder / name
        with atomic_write(str(path)) as file:
            # `dumps` is much faster than `dump`.
            file.write(json.dumps(content))
        return path
