"""Official Cityscapes metrics on two images worked out by hand, and errors.

Images are 40 x 100. The first has a car in the left half and road in the right half; the second has
a person of 30 columns, a group of persons of 10, void of 20 and road of 40.
"""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

pytest.importorskip("cityscapesscripts", reason="the optional package is not installed")

from mask2former.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator

ROAD, PERSON, CAR = 0, 11, 13
THINGS = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
RECORDS = [{"file_name": f"images/ulm_00000{i}_000019_leftImg8bit.png"} for i in (1, 2)]


def columns(*parts):
    values, widths = zip(*parts, strict=True)
    return np.repeat(values, widths)[None].repeat(40, 0)


# Label ids: void 0, road 7, person 24, car 26. Instance ids: label id x 1000 + number.
LABELS = [columns((26, 50), (7, 50)), columns((24, 40), (0, 20), (7, 40))]
INSTANCES = [
    columns((26000, 50), (7, 50)),
    columns((24000, 30), (24, 10), (0, 20), (7, 40)),
]


@pytest.fixture(autouse=True)
def dataset(tmp_path, monkeypatch):
    folder = tmp_path / "gtFine" / "val" / "ulm"
    folder.mkdir(parents=True)
    for i, (labels, instances) in enumerate(zip(LABELS, INSTANCES, strict=True), start=1):
        name = str(folder / f"ulm_00000{i}_000019_gtFine_")
        Image.fromarray(labels.astype(np.uint8)).save(f"{name}labelIds.png")
        Image.fromarray(instances.astype(np.uint16)).save(f"{name}instanceIds.png")
    metadata = MetadataCatalog.get("city_val")
    metadata.set(gt_dir=str(tmp_path / "gtFine" / "val"), thing_classes=THINGS)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield folder
    assert not list((tmp_path / "cwd").iterdir()), "nothing is written to the current folder"
    MetadataCatalog.remove("city_val")


def semantic(train_ids):
    return {"sem_seg": torch.nn.functional.one_hot(torch.from_numpy(train_ids), 19).movedim(2, 0)}


def instances(*pred):
    """Model outputs from (thing, score, mask) of one image."""
    result = Instances((40, 100))
    masks = np.stack([mask for _, _, mask in pred]) if pred else np.zeros((0, 40, 100))
    result.pred_masks = torch.from_numpy(masks).float()
    result.pred_boxes = Boxes(torch.zeros(len(pred), 4))
    result.scores = torch.tensor([score for _, score, _ in pred])
    result.pred_classes = torch.tensor([THINGS.index(t) for t, _, _ in pred], dtype=torch.int64)
    return {"instances": result}


def evaluate(evaluator, outputs):
    evaluator.reset()
    for record, output in zip(RECORDS, outputs, strict=False):
        evaluator.process([record], [output])
    return evaluator.evaluate()


def test_gt_scores_100():
    perfect = [
        columns((CAR, 50), (ROAD, 50)),
        # Predictions in void are ignored.
        columns((PERSON, 40), (CAR, 20), (ROAD, 40)),
    ]
    metrics = evaluate(CityscapesSemSegEvaluator("city_val"), map(semantic, perfect))["sem_seg"]
    assert metrics["IoU"] == metrics["iIoU"] == metrics["IoU_sup"] == metrics["iIoU_sup"] == 100
    assert metrics["IoU-car"] == 100
    assert np.isnan(metrics["IoU-sky"])
    metrics = evaluate(
        CityscapesInstanceEvaluator("city_val"),
        [
            instances(("car", 0.9, columns((1, 50), (0, 50)))),
            # A prediction inside a group is no false positive.
            instances(
                ("person", 0.4, columns((1, 30), (0, 70))),
                ("person", 0.8, columns((0, 30), (1, 10), (0, 60))),
            ),
        ],
    )["segm"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP-person"] == pytest.approx(100)
    assert np.isnan(metrics["AP-bus"])


def test_semantic_by_hand():
    metrics = evaluate(
        CityscapesSemSegEvaluator("city_val"),
        [
            # A fifth of the car is predicted as road.
            semantic(columns((CAR, 40), (ROAD, 60))),
            semantic(columns((PERSON, 40), (ROAD, 60))),
        ],
    )["sem_seg"]
    assert metrics["IoU-car"] == pytest.approx(100 * 40 / 50)
    assert metrics["IoU-road"] == pytest.approx(100 * 90 / 100)
    assert metrics["IoU"] == pytest.approx(100 * (0.8 + 0.9 + 1) / 3)


def test_instances_by_hand():
    metrics = evaluate(
        CityscapesInstanceEvaluator("city_val"),
        [
            # IoU 0.78: matches at the 6 thresholds up to 0.75.
            instances(("car", 0.9, columns((1, 39), (0, 61)))),
            # The person is missed: no prediction at all.
            instances(),
        ],
    )["segm"]
    assert metrics["AP-car"] == pytest.approx(60)
    assert metrics["AP-person"] == 0
    assert metrics["AP"] == pytest.approx(30)
    assert metrics["AP50"] == pytest.approx(50)


def test_image_without_prediction():
    with pytest.raises(ValueError, match="1 of 2 images .* no prediction, .*ulm_000002_000019_gtF"):
        evaluate(CityscapesInstanceEvaluator("city_val"), [instances()])


def test_no_ground_truth(dataset):
    for file in dataset.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no ground truth .*<city>/\*_gtFine_labelIds.png"):
        evaluate(CityscapesSemSegEvaluator("city_val"), [])


def test_wrong_size_is_an_error():
    """The official script would exit the program."""
    wrong = semantic(np.zeros((20, 100), dtype=int))
    with pytest.raises(ValueError, match="are not equal"):
        evaluate(CityscapesSemSegEvaluator("city_val"), [wrong, wrong])
