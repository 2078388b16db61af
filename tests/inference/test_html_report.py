"""The HTML report: what is in the file, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image

from mask2former.inference.html_report import HtmlReport, ReportObject
from mask2former.inference.report_objects import report_mask

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here")

EVIL = "</script><script>document.title = 'broken out'</script>"
CLASSES = ["cat", EVIL, 'Käse & "co"', "unseen"]
COLOURS = [(255, 0, 0), (0, 0, 255), (0, 160, 0), (9, 9, 9)]
SIZE = 60, 80


def half(target: tuple[int, int], left: bool = True) -> str:
    """Run lengths of the left or right half of an image."""
    mask = np.zeros(SIZE, bool)
    mask[:, :40] = left
    mask[:, 40:] = not left
    return report_mask(mask, (0, 0), SIZE, target)


def write_report(path: Path) -> None:
    """Three images: two cats of scores 0.9 and 0.4; a cheese of 0.7, missed by gt; nothing."""
    report = HtmlReport(
        path,
        title="a <b>title</b>",
        classes=CLASSES,
        colours=COLOURS,
        num_images=3,
        score=0.3,
        notes=["A note."],
    )
    grey = np.full((*SIZE, 3), 100, np.uint8)
    with report:
        target = report.image_size(SIZE)
        assert target == SIZE
        left, right = half(target), half(target, left=False)
        cats = [ReportObject(0, left, 0.5, 0.9), ReportObject(0, right, 0.5, 0.4)]
        report.add("a/two cats.jpg", grey, cats, [ReportObject(0, left, 0.5)])
        report.add('b/"Käse" <1>.jpg', grey, [ReportObject(2, right, 0.5, 0.7)], [])
        report.add("a/nothing.jpg", grey, [], [ReportObject(1, left, 0.5, is_crowd=True)])
        report.add_broken("a/<broken>.jpg", "image file is truncated & useless")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    # The path has what an address must escape.
    path = tmp_path_factory.mktemp("report") / "käse #1 report.html"
    write_report(path)
    return path


def browse(page: Path, fragment: str = "", *options: str) -> str:
    """The document as it is once its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=2000"]
    options = options or ("--dump-dom",)
    result = subprocess.run(
        [*command, *options, page.as_uri() + fragment], capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def text_of(dom: str, element_id: str) -> str:
    (text,) = re.findall(rf'<(\w+) id="{element_id}"[^>]*>(.*?)</\1>', dom, re.S)
    return unescape(re.sub("<[^>]*>", "", text[1]))


def shown_names(dom: str) -> list[str]:
    grid = dom[dom.index('<ul id="grid">') :]
    return [unescape(name) for name in re.findall(r"<b title=\"[^\"]*\">(.*?)</b>", grid)]


# ---- the file ----


def test_file_needs_nothing_else_and_holds_what_was_added(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?\w""", text), "an address"
    assert "http" not in text.replace("http-equiv", "")
    assert "<title>a &lt;b&gt;title&lt;/b&gt;</title>" in text
    assert "broken out" in text and EVIL not in text
    blocks = dict(re.findall(r'<script type="[^"]*" id="(\w+)">(.*?)</script>', text, re.S))
    data = json.loads(blocks["data"])
    assert data["classes"] == CLASSES
    assert data["broken"] == [["a/<broken>.jpg", "image file is truncated & useless"]]
    assert [image["name"] for image in data["images"]][1] == 'b/"Käse" <1>.jpg'
    assert data["images"][0]["pred"] == [[0, 0.9, 0.5], [0, 0.4, 0.5]]
    assert data["images"][2]["gt"] == [[1, True, 0.5]]
    with Image.open(io.BytesIO(base64.b64decode(blocks["i0"]))) as image:
        assert (image.format, image.size) == ("JPEG", (80, 60))
    counts = json.loads(blocks["m0"])[1]
    mask = mask_utils.decode({"size": list(SIZE), "counts": counts})
    assert mask[:, 40:].all() and not mask[:, :40].any()


def test_nothing_is_written_after_an_error(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        with HtmlReport(path, title="t", classes=[], colours=[], num_images=1):
            raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_many_images_are_embedded_smaller(tmp_path):
    def size(number: int) -> tuple[int, int]:
        report = HtmlReport(tmp_path / "r", title="", classes=[], colours=[], num_images=number)
        return report.image_size((1500, 3000))

    assert size(3) == (512, 1024)
    assert size(1000) == (280, 560)
    assert size(10_000) == (200, 400)


# ---- masks ----


def decoded(counts: str, target: tuple[int, int]) -> np.ndarray:
    return mask_utils.decode({"size": list(target), "counts": counts}).astype(bool)


def test_masks_are_scaled_from_their_crop():
    """A square of 4 at (x 6, y 2) in 10 x 12, halved: pixels with centres at 1, 3, 5, ..."""
    target = 5, 6
    crop = np.ones((4, 4), bool)
    crop[0, 0] = False  # between the samples, at rows 3 and 5, columns 7 and 9
    small = decoded(report_mask(crop, (6, 2), (10, 12), target), target)
    expected = np.zeros(target, bool)
    expected[1:3, 3:5] = True
    assert (small == expected).all()


@pytest.mark.parametrize("where", [(0, 0), (99, 199), (50, 3)])
def test_tiny_masks_keep_a_pixel(where):
    target = 10, 20
    small = decoded(report_mask(np.ones((1, 1), bool), where[::-1], (100, 200), target), target)
    assert np.argwhere(small).tolist() == [[where[0] // 10, where[1] // 10]]


def test_empty_mask():
    assert not decoded(report_mask(np.zeros((0, 0), bool), (0, 0), (9, 9), (3, 3)), (3, 3)).any()


# ---- in a browser ----


@needs_chromium
def test_browser_shows_all_and_runs_no_foreign_script(page):
    dom = browse(page)
    assert shown_names(dom) == ["a/nothing.jpg", "a/two cats.jpg", 'b/"Käse" <1>.jpg']
    assert text_of(dom, "count") == "3 of 3 images, 3 objects"
    assert text_of(dom, "summary") == (
        "3 images, 3 objects; ground truth of 3 images; 1 broken file."
    )
    assert "<title>a &lt;b&gt;title&lt;/b&gt;</title>" in dom
    rows = re.findall(r'<tr data-class="(.*?)"(.*?)</tr>', dom, re.S)
    counts = {unescape(name): re.findall(r"<td[^>]*>(\d+)</td>", row) for name, row in rows}
    assert counts[CLASSES[0]] == ["2", "1", "1"]  # predicted, gt, images
    assert counts[EVIL] == ["0", "1", "0"]
    assert text_of(dom, "absent") == "Not seen (1): unseen"
    assert "a/&lt;broken&gt;.jpg</td><td>image file is truncated &amp; useless</td>" in dom


@needs_chromium
def test_browser_filters_by_class_and_score(page):
    dom = browse(page, "#class=cat&score=0.5&view=pred")
    assert shown_names(dom) == ["a/two cats.jpg"]
    assert text_of(dom, "count") == "1 of 3 images, 1 object"
    dom = browse(page, "#score=0.95&sort=difference")
    assert shown_names(dom) == ["a/nothing.jpg", "a/two cats.jpg", 'b/"Käse" <1>.jpg']
    assert text_of(dom, "count") == "3 of 3 images, 0 objects"


@needs_chromium
def test_browser_enlarges_an_image_and_draws_masks(page, tmp_path):
    dom = browse(page, "#open=a%2Ftwo+cats.jpg")
    viewer = dom[dom.index("<dialog") :]
    assert re.match(r"<dialog[^>]* open", viewer)
    assert "Prediction: 2 objects" in viewer and "Ground truth: 1 object" in viewer
    assert re.findall(r"<td>(0\.\d{3})</td>", viewer) == ["0.900", "0.400"]

    shot = tmp_path / "shot.png"
    browse(page, "#view=pred&class=cat&score=0.8", f"--screenshot={shot}", "--window-size=1000,700")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # 0.45 of red over grey 100, on the left half only: the cat on the right has 0.4.
    drawn = (np.abs(pixels - (170, 55, 55)).max(2) < 8).sum()
    plain = (np.abs(pixels - 100).max(2) < 4).sum()
    assert drawn > 5000 and 0.8 < drawn / plain < 1.25
