"""TEST.EXPECTED_RESULTS that names what no evaluation returns."""

import own_data
import pytest
import toy_training as toy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from mask2former.data import evaluator_types
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.evaluator_types import register_evaluator_type
from mask2former.evaluation.expected_results import check_expected_results
from mask2former.preflight import check_run

EXPECTED = "TEST.EXPECTED_RESULTS"
NAME = "own_train"


@pytest.fixture(autouse=True)
def own_semantic(tmp_path, monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
        catalog.pop(NAME, None)
    own_data.semantic(tmp_path)
    names = (NAME, "own_val")
    register_entries([own_data.entry("semantic", tmp_path, name) for name in names])


def config(tmp_path, expected, *options):
    tests = f"('{NAME}',)"
    opts = ("DATASETS.TEST", tests, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "True", *options)
    return toy.toy_config(tmp_path, *opts, EXPECTED, expected)


def test_task_that_is_not_evaluated(tmp_path):
    cfg = config(tmp_path, "[['sem_seg', 'mIoU', 30.0, 1.0], ['segm', 'AP', 30.0, 1.0]]")
    message = rf"EXPECTED_RESULTS\[1\] has the task 'segm', .* '{NAME}': 'sem_seg'"
    for purpose in ("train", "evaluate"):
        with pytest.raises(ValueError, match=message):
            check_run(cfg, purpose)
    for purpose in ("train", "evaluate"):
        check_run(cfg, purpose, own_evaluators=True)


def test_augmentation_is_evaluated_alone(tmp_path):
    expected = "[['sem_seg_TTA', 'mIoU', 30.0, 1.0]]"
    cfg = config(tmp_path, expected, "TEST.AUG.ENABLED", "True")
    check_run(cfg, "evaluate")
    with pytest.raises(ValueError, match="has the task 'sem_seg_TTA'"):
        check_run(cfg, "train")
    cfg.TEST.AUG.ENABLED = False
    with pytest.raises(ValueError, match="has the task 'sem_seg_TTA'"):
        check_run(cfg, "evaluate")


@pytest.mark.parametrize("names", ["()", f"('{NAME}', 'own_val')"])
def test_not_one_data_set(names, tmp_path):
    opts = ("DATASETS.TEST", names)
    cfg = config(tmp_path, "[['sem_seg', 'mIoU', 30.0, 1.0]]", *opts)
    with pytest.raises(ValueError, match="of one data set, but DATASETS.TEST is"):
        check_run(cfg, "evaluate")


class Depth(DatasetEvaluator):
    def evaluate(self):
        return {"depth": {"RMSE": 3.0}}


class Evaluating(toy.ToyTrainer):
    @classmethod
    def build_test_loader(cls, cfg, name):
        return [[toy.augment({"image_id": 1})]]


def test_what_is_known_after_evaluation(tmp_path, monkeypatch):
    """An evaluator of another project, whose results are known only after training."""
    monkeypatch.setattr(evaluator_types, "EVALUATOR_TYPES", {})
    register_evaluator_type("depth", {"SEMANTIC_ON": lambda *_: Depth()}, classes="stuff_classes")
    MetadataCatalog.pop(toy.DATASET, None)
    MetadataCatalog.get(toy.DATASET).evaluator_type = "depth"
    opts = ("DATASETS.TEST", f"('{toy.DATASET}',)", "SOLVER.MAX_ITER", "2")
    for expected, message in (
        ("[['depth', 'RMSE', 3.0, 0.1], ['normals', 'RMSE', 3.0, 0.1]]", "the task 'normals'"),
        ("[['depth', 'abs', 3.0, 0.1]]", r"EXPECTED_RESULTS\[0\] has the metric 'abs'.*'RMSE'"),
    ):
        cfg = config(tmp_path, expected, *opts)
        with pytest.raises(ValueError, match=message):
            Evaluating(cfg).train()
    cfg = config(tmp_path, "[['depth', 'RMSE', 3.0, 0.1]]", *opts)
    assert Evaluating(cfg).train() == {"depth": {"RMSE": 3.0}}


def test_nothing_was_evaluated(tmp_path):
    cfg = config(tmp_path, "[['sem_seg', 'mIoU', 30.0, 1.0]]")
    with pytest.raises(ValueError, match="'sem_seg', which the evaluation has not: nothing"):
        check_expected_results(cfg, {})
