"""The table of evaluator types, and entries from outside."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from mask2former.data.class_counts import class_names
from mask2former.data.evaluator_types import EVALUATOR_TYPES
from mask2former.evaluation import build_evaluator, register_evaluator_type


@pytest.fixture(autouse=True)
def data_set(monkeypatch):
    """A data set of an evaluator type that is not registered yet; both are gone afterwards."""
    before = dict(EVALUATOR_TYPES)
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    DatasetCatalog.register("parts", list)
    MetadataCatalog.get("parts").set(
        evaluator_type="parts_seg", stuff_classes=["wheel", "door", "road"], thing_classes=["car"]
    )
    yield
    EVALUATOR_TYPES.clear()
    EVALUATOR_TYPES.update(before)


class Recorder(DatasetEvaluator):
    def __init__(self, name, output_folder):
        self.arguments = name, output_folder


def test_classes_of_the_types_here():
    things = {name for name, entry in EVALUATOR_TYPES.items() if entry.classes == "thing_classes"}
    assert things == {"coco", "lvis", "cityscapes_instance"}
    assert len(EVALUATOR_TYPES) == 9


def test_an_entry_from_outside(tiny_cfg):
    assert class_names("parts") is None
    with pytest.raises(ValueError, match="'parts' has evaluator_type 'parts_seg' .*known: sem_seg"):
        build_evaluator(tiny_cfg, "parts")

    builders = {"SEMANTIC_ON": Recorder, "PANOPTIC_ON": lambda name, folder: None}
    register_evaluator_type("parts_seg", builders, classes="stuff_classes")
    assert class_names("parts") == ["wheel", "door", "road"]
    evaluator = build_evaluator(tiny_cfg, "parts", "/predictions")
    assert evaluator.arguments == ("parts", "/predictions")
    # A builder may find that this data set lacks the annotation.
    tiny_cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(
        ValueError, match="Nothing to evaluate on 'parts' .*SEMANTIC_ON or PANOPTIC_ON to True"
    ):
        build_evaluator(tiny_cfg, "parts")


def test_several_tasks(tiny_cfg):
    builders = {"SEMANTIC_ON": Recorder, "PANOPTIC_ON": Recorder}
    register_evaluator_type("parts_seg", builders, classes="thing_classes")
    assert class_names("parts") == ["car"]
    assert isinstance(build_evaluator(tiny_cfg, "parts"), DatasetEvaluators)


def test_the_first_entry_stays(caplog):
    before = EVALUATOR_TYPES["coco"]
    register_evaluator_type("coco", {"INSTANCE_ON": Recorder}, classes="thing_classes")
    assert EVALUATOR_TYPES["coco"] is before
    assert "'coco' is already registered" in caplog.text


def test_bad_entries():
    with pytest.raises(ValueError, match=r"'x' has the tasks \['DEPTH_ON'\]; allowed: .*INST"):
        register_evaluator_type("x", {"DEPTH_ON": Recorder}, classes="thing_classes")
    with pytest.raises(ValueError, match=r"'x' has the tasks \[\]"):
        register_evaluator_type("x", {}, classes="thing_classes")
    with pytest.raises(ValueError, match="'x' has classes='things'; allowed: thing_classes, stuff"):
        register_evaluator_type("x", {"SEMANTIC_ON": Recorder}, classes="things")
