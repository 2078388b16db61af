import json
import sys

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools.coco import COCO

from mask2former.inference import (
    InstanceMasks,
    InstanceResult,
    PanopticResult,
    PredictionFilter,
    Result,
    Segment,
)
from mask2former.utils.files import WriteError

METADATA = Metadata(
    name="tests_result",
    thing_classes=["cup", "plate"],
    stuff_classes=["cup", "plate", "table"],
    thing_dataset_id_to_contiguous_id={5: 0, 9: 1},
    stuff_dataset_id_to_contiguous_id={5: 0, 9: 1, 300: 2},
    evaluator_type="coco_panoptic_seg",
)
HEIGHT, WIDTH = 4, 6


@pytest.fixture
def outputs():
    """Two instances, the less probable one first; a cup, and table as panoptic segments."""
    instances = Instances((HEIGHT, WIDTH))
    masks = torch.zeros(2, HEIGHT, WIDTH)
    masks[0, 1:3, 2:5] = 1
    masks[1, 0, 0] = 1
    instances.pred_masks = masks
    instances.scores = torch.tensor([0.25, 0.75])
    instances.pred_classes = torch.tensor([1, 0])
    ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    ids[:2, :3], ids[3] = 1, 2
    segments = [
        {"id": 1, "isthing": True, "category_id": 0, "score": 0.5},
        {"id": 2, "isthing": False, "category_id": 2},
    ]
    scores = torch.zeros(3, HEIGHT, WIDTH)
    scores[2], scores[0, 0, 1] = 0.5, 1
    return {"instances": instances, "panoptic_seg": (ids, segments), "sem_seg": scores}


@pytest.fixture
def result(outputs):
    image = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    return Result.from_outputs(outputs, METADATA, file_name="photos/a.b.jpg", image=image)


def test_of_outputs(result):
    assert result.image_size == (HEIGHT, WIDTH)
    assert result.class_names == ("cup", "plate", "table")
    assert result.tasks == ["panoptic", "instance", "semantic"]
    assert result.scores.tolist() == [0.75, 0.25] and result.scores.dtype == np.float32
    assert result.labels.tolist() == [0, 1] and result.labels.dtype == np.int64
    assert result.names == ["cup", "plate"]
    assert result.boxes.tolist() == [[0, 0, 1, 1], [2, 1, 5, 3]]
    assert result.instances[1].labels.tolist() == result.instances[-1:].labels.tolist() == [1]
    # Crops, not views of full-size masks.
    assert [crop.base for crop in result.masks.crops] == [None, None]
    assert result.panoptic.segments == [
        Segment(1, 0, True, 0.5, area=6),
        Segment(2, 2, False, None, area=6),
    ]
    expected = np.full((HEIGHT, WIDTH), 2)
    expected[0, 1] = 0
    np.testing.assert_array_equal(result.semantic, expected)
    assert repr(result) == (
        "Result(photos/a.b.jpg: 4 x 6 pixels, 2 instances, 2 panoptic segments, "
        "semantic map of 3 classes)"
    )


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16)]
)
def test_type_of_the_semantic_map(num_classes, dtype):
    result = Result.from_outputs({"sem_seg": torch.zeros(num_classes, 2, 2)})
    assert result.semantic.dtype == dtype
    assert len(result.class_names) == num_classes and result.class_names[0] == "0"


def test_one_task_only(outputs):
    result = Result.from_outputs({"sem_seg": outputs["sem_seg"]}, METADATA)
    assert result.tasks == ["semantic"] and result.to_coco() == {}
    with pytest.raises(ValueError, match="no instances: .*INSTANCE_ON True"):
        _ = result.boxes
    with pytest.raises(ValueError, match="the model returned \\['other'\\]"):
        Result.from_outputs({"other": 1}, METADATA)


def test_instances_of_different_lengths():
    with pytest.raises(ValueError, match="0 masks, 1 scores and 0 labels"):
        InstanceResult(InstanceMasks.empty((3, 3)), [0.5], [])


def test_coco(result):
    content = json.loads(json.dumps(result.to_coco(image_id=17)))
    first, second = content["instances"]
    assert (first["category_id"], second["category_id"]) == (5, 9)
    assert first["image_id"] == 17 and first["score"] == 0.75
    assert second["bbox"] == [2, 1, 3, 2]
    np.testing.assert_array_equal(
        InstanceMasks.from_rle([second["segmentation"]]).full()[0], result.masks[1]
    )
    assert content["panoptic"] == {
        "image_id": 17,
        "file_name": "a.b.png",
        "segments_info": [
            {"id": 1, "category_id": 5, "isthing": 1, "area": 6, "score": 0.5},
            {"id": 2, "category_id": 300, "isthing": 0, "area": 6},
        ],
    }


def test_coco_without_mapping(outputs):
    result = Result.from_outputs(outputs, class_names=("a", "b", "c"))
    assert [x["category_id"] for x in result.to_coco()["instances"]] == [0, 1]


def test_class_without_category(outputs):
    metadata = Metadata(thing_dataset_id_to_contiguous_id={5: 0}, thing_classes=["cup", "plate"])
    with pytest.raises(ValueError, match="class 1 \\('plate'\\) has no category id"):
        Result.from_outputs({"instances": outputs["instances"]}, metadata).to_coco()


def test_files(result, tmp_path):
    written = result.save(tmp_path / "new" / "folder", image_id=17)
    names = "a.b_instances.json a.b_panoptic.png a.b_panoptic.json a.b_semantic.png".split()
    assert [path.name for path in written] == names
    assert sorted(p.name for p in written[0].parent.iterdir()) == sorted(names)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 17, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 5}, {"id": 9}],
        "annotations": [],
        "info": {},
    }
    coco.createIndex()
    loaded = coco.loadRes(str(written[0]))
    masks = [loaded.annToMask(annotation) for annotation in loaded.dataset["annotations"]]
    np.testing.assert_array_equal(np.array(masks), result.masks.full())
    (annotation,) = json.loads(written[2].read_text())["annotations"]
    assert annotation["file_name"] == written[1].name
    ids = rgb2id(np.array(Image.open(written[1])))
    np.testing.assert_array_equal(ids, result.panoptic.segment_ids)
    labels = np.array(Image.open(written[3]))
    # Category ids, of which 300 needs 16 bits.
    assert labels[0, 1] == 5 and labels[1, 1] == 300 and labels.dtype == np.uint16


def test_file_names(result, tmp_path):
    written = result.save(tmp_path / "mine.json")
    assert written[0] == tmp_path / "mine_instances.json"
    result.file_name = None
    assert result.save(tmp_path)[0].name == "prediction_instances.json"
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        result.save(tmp_path / "file" / "folder")


def test_supervision(result):
    pytest.importorskip("supervision")
    detections = result.to_supervision()
    np.testing.assert_array_equal(detections.xyxy, result.boxes)
    np.testing.assert_array_equal(detections.mask, result.masks.full())
    assert detections.class_id.tolist() == [0, 1]
    assert detections.confidence.tolist() == [0.75, 0.25]
    assert detections.data["class_name"].tolist() == ["cup", "plate"]
    empty = result.filter(PredictionFilter(top_k=0)).to_supervision()
    assert len(empty) == 0
    segments = result.to_supervision("panoptic")
    assert segments.xyxy.tolist() == [[0, 0, 3, 2], [0, 3, 6, 4]]
    assert segments.confidence is None  # one has no score
    with pytest.raises(ValueError, match="task is 'semantic'"):
        result.to_supervision("semantic")


def test_supervision_is_not_installed(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install supervision"):
        result.to_supervision()


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_drawing(result, task):
    image = np.full((60, 90, 3), 100, np.uint8)
    masks = np.zeros((1, 60, 90), bool)
    masks[0, 10:50, 10:50] = True
    large = Result(
        (60, 90),
        result.class_names,
        InstanceResult(InstanceMasks.from_full(masks), [0.01], [1]),
        PanopticResult(masks[0].astype(np.int32), [Segment(1, 2, False, None, 1600)]),
        masks[0].astype(np.uint8),
        image=image,
    )
    drawn = large.draw(task)
    assert drawn.shape == image.shape and (drawn[20:40, 20:40] != 100).any()
    assert large.draw(task, scale=2).shape == (120, 180, 3)
    if task == "instance":
        # Of no instance, nothing.
        large.panoptic = None
        nothing = large.filter(PredictionFilter(min_score=0.5)).draw(task)
        np.testing.assert_array_equal(nothing, image)


def test_drawing_needs_image_and_task(result):
    result.image = None
    with pytest.raises(ValueError, match="keep_image=True"):
        result.draw()
    with pytest.raises(ValueError, match=r"\(2, 2, 3\); allowed: \(4, 6, 3\)"):
        result.draw(image=np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="task is 'depth'; this result has panoptic, instance, se"):
        result.draw("depth", image=np.zeros((4, 6, 3), np.uint8))


def test_panoptic_masks(result):
    masks = result.panoptic.masks()
    assert masks.boxes().tolist() == [[0, 0, 3, 2], [0, 3, 6, 4]]
    result.panoptic.segments.append(Segment(9, 0, True, None, 0))
    assert result.panoptic.masks().areas().tolist() == [6, 6, 0]


def test_drawing_nothing_and_classes_without_things():
    """A label may be of stuff, which the metadata does not list among the things."""
    image = np.full((60, 90, 3), 100, np.uint8)
    nothing = Result(
        (60, 90),
        METADATA.stuff_classes,
        InstanceResult(InstanceMasks.empty((60, 90)), [], []),
        PanopticResult(np.zeros((60, 90), np.int32), []),
        image=image,
        metadata=METADATA,
    )
    for task in ("panoptic", "instance"):
        np.testing.assert_array_equal(nothing.draw(task), image)
    masks = InstanceMasks([np.ones((20, 20), bool)], [(10, 10)], (60, 90))
    table = Result(
        (60, 90), METADATA.stuff_classes, InstanceResult(masks, [0.5], [2]), metadata=METADATA
    )
    assert (table.draw(image=image)[15:25, 15:25] != 100).any()
