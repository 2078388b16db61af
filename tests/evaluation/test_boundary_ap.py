import json
from pathlib import Path

import numpy as np
import pytest
from load_script import load_script
from pycocotools import mask as mask_util

from mask2former.evaluation import evaluate_boundary_ap, mask_to_boundary

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "evaluators" / "coco_ap"
# Metrics of the official API for the masks of the sample.
REAL_FIGURES = """
    AP .319545 AP50 .562288 AP75 .298927 APs .387374 APm .310183 APl .326934
    AR1 .268230 AR10 .415449 AR100 .416839 ARs .469450 ARm .376759 ARl .381472
""".split()

# Metrics of the package faster-coco-eval 1.8.0 for the same boundaries.
REAL_BOUNDARIES = """
    .226394 .377501 .225580 .387374 .272367 .075544
    .187226 .312652 .314043 .469450 .340543 .103870
""".split()


tool = load_script("tools/evaluate_coco_boundary_ap.py")


def square(top, left, size=40, shape=(100, 100)):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + size, left : left + size] = 1
    return mask


def entry(mask, **fields):
    rle = mask_util.encode(np.asfortranarray(mask))
    box = mask_util.toBbox(rle).tolist()
    rle["counts"] = rle["counts"].decode()
    return {"image_id": 1, "category_id": 5, "segmentation": rle, "bbox": box} | fields


@pytest.fixture
def write_files(tmp_path):
    def write(gt, predictions):
        annotations = [
            t | {"id": i, "area": int(mask_util.area(t["segmentation"]))}
            for i, t in enumerate(gt, start=1)
        ]
        content = {
            "info": {},
            "images": [{"id": 1, "height": 100, "width": 100}],
            "categories": [{"id": 5, "name": "square"}],
            "annotations": annotations,
        }
        files = tmp_path / "gt.json", tmp_path / "predictions.json"
        for file, data in zip(files, (content, predictions), strict=True):
            file.write_text(json.dumps(data))
        return [str(file) for file in files]

    return write


def test_boundary_by_hand():
    # The diagonal is 141.4, so boundaries are 3 wide.
    boundary = mask_to_boundary(square(10, 10))
    assert boundary.sum() == 40**2 - 34**2
    assert boundary[10:13, 10:50].all() and not boundary[13:47, 13:47].any()
    # The border of the image ends a mask; its diagonal is 28.3, so the boundary is 1 wide.
    assert mask_to_boundary(np.ones((20, 20), dtype=np.uint8)).sum() == 4 * 19
    assert not mask_to_boundary(np.zeros((20, 20), dtype=np.uint8)).any()
    # A thin object is all boundary, and so is one in a tiny image.
    assert (mask_to_boundary(square(3, 3, size=5)) == square(3, 3, size=5)).all()
    assert mask_to_boundary(np.ones((2, 2), dtype=np.uint8)).sum() == 4


def test_boundary_against_the_definition():
    random = np.random.default_rng(0)
    for height, width in ((30, 40), (57, 91), (120, 60)):
        mask = (random.random((height // 5 + 1, width // 5 + 1)) < 0.7).astype(np.uint8)
        mask = mask.repeat(5, 0).repeat(5, 1)[:height, :width]
        distance = max(1, round(0.05 * (height**2 + width**2) ** 0.5))
        padded = np.pad(mask, distance)
        expected = np.zeros_like(mask)
        for y, x in np.argwhere(mask):
            window = padded[y : y + 2 * distance + 1, x : x + 2 * distance + 1]
            expected[y, x] = not window.all()
        assert (mask_to_boundary(mask, dilation_ratio=0.05) == expected).all()


def test_boundary_ap_by_hand(write_files):
    """A square moved by 2 pixels.

    Masks share 38 x 40 of 2 x 40 x 40 pixels: IoU 1520 / 1680 = 0.90, above 9 of 10 thresholds.
    Boundaries have 444 pixels. In the 1520 shared ones, those inside one of the inner squares are
    34 x 34 twice less the 32 x 34 inside both: 1224. So they share 296: IoU 296 / 592 = 0.5.
    """
    files = write_files([entry(square(10, 10), iscrowd=0)], [entry(square(10, 12), score=0.9)])
    boundary = evaluate_boundary_ap(*files)
    assert boundary["AP50"] == pytest.approx(100)
    assert boundary["AP75"] == 0
    assert boundary["AP"] == pytest.approx(10)
    assert boundary["AR100"] == pytest.approx(10)
    assert evaluate_boundary_ap(*files, iou_type="segm")["AP"] == pytest.approx(90)


def test_gt_scores_100(write_files):
    masks = [square(5, 5), square(50, 40), square(0, 60, size=30)]
    files = write_files(
        [entry(m, iscrowd=0) for m in masks],
        # Ignored boxes: with them, objects would fall into other size ranges.
        [entry(m, score=0.5) | {"bbox": [0, 0, 1, 1]} for m in masks],
    )
    metrics = evaluate_boundary_ap(*files)
    assert metrics["AP"] == metrics["AR100"] == metrics["APm"] == pytest.approx(100)


def test_crowds_use_mask_iou(write_files):
    """A detection inside a crowd is ignored, although it does not overlap the crowd's boundary."""
    crowd = entry(square(0, 0, size=50), iscrowd=1)
    pred = [entry(square(20, 20, size=10), score=0.99), entry(square(60, 60, size=30), score=0.5)]
    files = write_files([crowd, entry(square(60, 60, size=30), iscrowd=0)], pred)
    assert evaluate_boundary_ap(*files)["AP"] == pytest.approx(100)


def test_sorting_and_limit_of_detections(write_files):
    """Overlaps stay aligned with unsorted detections, also with more than 100 of them."""
    wrong = [entry(square(70, 70, size=20), score=0.1 + i / 1e4) for i in range(120)]
    pred = [*wrong, entry(square(10, 10), score=0.9)]
    files = write_files([entry(square(10, 10), iscrowd=0)], pred)
    assert evaluate_boundary_ap(*files)["AP"] == pytest.approx(100)


def test_bad_predictions(write_files):
    gt = [entry(square(10, 10), iscrowd=0)]
    with pytest.raises(ValueError, match=r"\$\[0\]\.image_id: image 7 is not one of"):
        evaluate_boundary_ap(*write_files(gt, [entry(square(1, 1), score=1.0, image_id=7)]))
    with pytest.raises(ValueError, match="is not a list of masks, the COCO result"):
        evaluate_boundary_ap(*write_files(gt, {"annotations": []}))
    with pytest.raises(ValueError, match="iou_type is 'bbox'"):
        evaluate_boundary_ap(*write_files(gt, []), iou_type="bbox")
    assert np.isnan(evaluate_boundary_ap(*write_files(gt, []))["AP"])


def test_tool(write_files, tmp_path, capsys):
    gt, pred = write_files([entry(square(10, 10), iscrowd=0)], [entry(square(10, 12), score=0.9)])
    options = ["--gt-json-file", gt, "--dt-json-file", pred]
    tool.main([*options, "--output-dir", str(tmp_path / "out")])
    assert "| boundary | AP       |  10.000 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "boundary_ap.json").read_text())
    assert written[gt]["boundary"]["AP50"] == pytest.approx(100)
    with pytest.raises(SystemExit, match="error: .*absent.json"):
        tool.main(["--gt-json-file", "absent.json", "--dt-json-file", pred])
    with pytest.raises(SystemExit):
        tool.main([*options, "--dilation-ratio", "0"])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the sample of the COCO API")
def test_sample_results_of_the_coco_api():
    """All twelve metrics of masks and of boundaries."""
    files = [
        str(REAL / f"instances_val2014_{name}.json") for name in ("100", "fakesegm100_results")
    ]
    masks = evaluate_boundary_ap(*files, iou_type="segm")
    assert [f"{masks[name] / 100:.6f}" for name in REAL_FIGURES[::2]] == [
        f"0{figure}" for figure in REAL_FIGURES[1::2]
    ]
    boundaries = evaluate_boundary_ap(*files)
    figures = [f"{value / 100:.6f}" for value in boundaries.values()]
    assert figures == [f"0{figure}" for figure in REAL_BOUNDARIES]
