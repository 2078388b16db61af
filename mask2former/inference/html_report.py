"""A report of a folder's predictions: one HTML file that needs no other and no network.

Images are embedded as JPEG and objects as run-length encodings at the size of the JPEG, so the page
draws, filters and highlights objects itself. Both are decoded only when an image is in view. The
page and its script are in html/; the script's hash is in the page's content security policy, which
forbids all other scripts and all addresses.

h w: size of an image in the report, H W: of the image itself, in pixels.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..utils.files import atomic_write

_PAGE = Path(__file__).parent / "html"
# Longest side of embedded images by their number: a report of 1,000 images takes about 50 MB.
_SIZES = ((100, 1024), (300, 768), (2000, 560))
_SIZE_OF_MANY = 400
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class ReportObject:
    """An instance, a panoptic segment or the pixels of a class.

    Attributes:
        label: contiguous class id.
        counts: compressed COCO run lengths of the mask (h, w), see `report_objects.py`.
        area: share of the image, 0 to 1.
        score: 0 to 1; None for ground truth and where the model gives none.
        is_crowd: of ground truth.
    """

    label: int
    counts: str
    area: float
    score: float | None = None
    is_crowd: bool = False


class HtmlReport:
    """Writes the report while images come; it appears under its name when the context ends."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        title: str,
        classes: Sequence[str],
        colours: Sequence[Sequence[int]],
        num_images: int,
        score: float = 0.0,
        unit: str = "object",
        notes: Sequence[str] = (),
    ) -> None:
        """
        Args:
            path: the file to write; an existing one is replaced.
            title: of the page.
            classes: names by contiguous id.
            colours: RGB, 0 to 255, by contiguous id.
            num_images: that will come; more images are embedded smaller.
            score: where the score filter stands at first, 0 to 1.
            unit: what an object is called, in the singular.
            notes: sentences below the title.
        """
        self.path = os.fspath(path)
        self._title, self._unit, self._score = title, unit, score
        self._classes = list(classes)
        self._colours = [[int(value) for value in colour] for colour in colours]
        self._notes = list(notes)
        self._longest = next((size for limit, size in _SIZES if num_images <= limit), _SIZE_OF_MANY)
        self._images: list[dict[str, Any]] = []
        self._broken: list[tuple[str, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> "HtmlReport":
        page = (_PAGE / "page.html").read_text(encoding="utf-8")
        script = (_PAGE / "page.js").read_text(encoding="utf-8")
        # The policy is for the element's text, exactly.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        head, self._tail = page.split("{{payload}}")
        style = (_PAGE / "page.css").read_text(encoding="utf-8")
        head = head.replace("{{style}}", style).replace("{{script_hash}}", digest)
        self._tail = self._tail.replace("{{script}}", script)
        self._file: IO[bytes] = self._stack.enter_context(atomic_write(self.path, "wb"))
        self._write(head.replace("{{title}}", escape(self._title)))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            try:
                self._write_end()
            except BaseException as problem:
                self._stack.__exit__(type(problem), problem, problem.__traceback__)
                raise
        return self._stack.__exit__(*error)

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of an image of (H, W) in the report, to which masks must be scaled."""
        scale = min(1.0, self._longest / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def add(
        self,
        name: str,
        image: np.ndarray,
        predictions: Sequence[ReportObject],
        gt: Sequence[ReportObject] | None = None,
    ) -> None:
        """Add an image.

        Args:
            name: of its file, to show.
            image: (H, W, 3) RGB, uint8.
            predictions: what the model predicted.
            gt: ground truth; None without.

        Raises:
            WriteError: the file cannot be written.
        """
        height, width = image.shape[:2]
        h, w = self.image_size((height, width))
        small = Image.fromarray(image)
        if (h, w) != (height, width):
            small = small.resize((w, h), Image.Resampling.LANCZOS, reducing_gap=2.0)
        jpeg = io.BytesIO()
        small.save(jpeg, format="JPEG", quality=_JPEG_QUALITY)
        gt = gt if gt is None else list(gt)
        masks = [x.counts for x in (*predictions, *(gt or ()))]
        number = len(self._images)
        encoded = base64.b64encode(jpeg.getvalue()).decode()
        self._write_data(f"m{number}", masks)
        self._write(f'<script type="text/plain" id="i{number}">{encoded}</script>\n')
        self._images.append(
            {
                "name": name,
                "width": width,
                "height": height,
                "w": w,
                "h": h,
                "pred": [
                    [one.label, _rounded(one.score), _rounded(one.area)] for one in predictions
                ],
                "gt": None
                if gt is None
                else [[one.label, one.is_crowd, _rounded(one.area)] for one in gt],
            }
        )

    def add_broken(self, name: str, reason: str) -> None:
        """List a file that could not be read or predicted."""
        self._broken.append((name, reason))

    def _write_end(self) -> None:
        num_objects = sum(len(image["pred"]) for image in self._images)
        num_gt = sum(image["gt"] is not None for image in self._images)
        summary = f"{_counted(len(self._images), 'image')}, {_counted(num_objects, self._unit)}"
        if num_gt:
            summary += f"; ground truth of {_counted(num_gt, 'image')}"
        if self._broken:
            summary += f"; {_counted(len(self._broken), 'broken file')}"
        data = {
            "summary": f"{summary}.",
            "notes": self._notes,
            "unit": self._unit,
            "score": self._score,
            "classes": self._classes,
            "colours": self._colours,
            "images": self._images,
            "broken": self._broken,
        }
        self._write_data("data", data)
        self._write(self._tail)

    def _write_data(self, element_id: str, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":"))
        # No text can end the element.
        text = text.replace("<", "\\u003c")
        self._write(f'<script type="application/json" id="{element_id}">{text}</script>\n')

    def _write(self, text: str) -> None:
        # Names of files may be no Unicode.
        self._file.write(text.encode("utf-8", "backslashreplace"))


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)
