"""The semantic evaluator equals Detectron2's, and its labels equal argmax."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from mask2former.evaluation.semantic_evaluation import (
    LabelReader,
    SemanticEvaluator,
    best_labels,
)


@pytest.mark.parametrize("num_classes", [1, 2, 19, 256, 257, 300])
def test_labels(num_classes):
    # Few values, so that ties occur: the first class wins.
    scores = torch.randint(0, 7, (num_classes, 13, 17), generator=torch.manual_seed(0)).float()
    labels = best_labels(scores)
    np.testing.assert_array_equal(labels, scores.argmax(0).numpy())
    assert labels.max() == min(num_classes - 1, labels.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_labels_of_other_dtypes(dtype):
    scores = torch.randint(0, 7, (9, 13, 17), generator=torch.manual_seed(0)).to(dtype)
    np.testing.assert_array_equal(best_labels(scores), scores.argmax(0).numpy())


def test_labels_of_nan_and_inf():
    scores = torch.randn(5, 8, 9, generator=torch.manual_seed(0)).transpose(1, 2)
    scores[3, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    scores[1, 0, 0] = torch.nan
    scores[:, 0, 2] = -torch.inf
    before = scores.clone()
    for case in (scores, scores.nan_to_num()):
        np.testing.assert_array_equal(best_labels(case), case.argmax(0).numpy())
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())


@pytest.mark.gpu
def test_labels_on_a_gpu():
    scores = torch.randn(19, 40, 50, generator=torch.manual_seed(0))
    np.testing.assert_array_equal(best_labels(scores.cuda()), best_labels(scores))


@pytest.fixture(params=[4, 40, 300])
def dataset(request, tmp_path):
    """Three images of block noise; dataset ids differ from contiguous ids."""
    num_classes, random, records = request.param, np.random.default_rng(0), []
    for image_id in range(3):
        labels = random.integers(-1, num_classes, size=(6, 8)).repeat(9, 0).repeat(9, 1)
        path = tmp_path / f"{image_id}.tif"
        Image.fromarray(np.where(labels < 0, 65535, labels).astype(np.uint16)).save(path)
        records.append({"file_name": f"{image_id}.jpg", "sem_seg_file_name": str(path)})
    DatasetCatalog.register("sem_scenes", lambda: records)
    metadata = MetadataCatalog.get("sem_scenes").set(
        stuff_classes=[str(k) for k in range(num_classes)],
        stuff_dataset_id_to_contiguous_id={3 * k + 5: k for k in range(num_classes)},
        ignore_label=65535,
    )
    yield metadata
    DatasetCatalog.remove("sem_scenes")
    MetadataCatalog.remove("sem_scenes")


def test_results_equal_detectron2(dataset, tmp_path):
    ours, expected = (
        kind("sem_scenes", output_dir=str(tmp_path), sem_seg_loading_fn=LabelReader(dataset))
        for kind in (SemanticEvaluator, SemSegEvaluator)
    )
    num_classes = len(dataset.stuff_classes)
    scores = {
        record["file_name"]: torch.rand(num_classes, 6, 8, generator=torch.manual_seed(7))
        .repeat_interleave(9, 1)
        .repeat_interleave(9, 2)
        for record in DatasetCatalog.get("sem_scenes")
    }
    results = []
    for evaluator in (ours, expected):
        evaluator.reset()
        for file_name, image_scores in scores.items():
            evaluator.process([{"file_name": file_name}], [{"sem_seg": image_scores}])
        results.append(evaluator.evaluate())
        results.append((tmp_path / "sem_seg_predictions.json").read_text())
    np.testing.assert_equal(results[:2], results[2:])
    assert results[0]["sem_seg"]["pACC"] > 0
    assert ("BoundaryIoU-0" in results[0]["sem_seg"]) == (num_classes < 255)
    np.testing.assert_array_equal(ours._conf_matrix, expected._conf_matrix, strict=True)
    np.testing.assert_array_equal(ours._b_conf_matrix, expected._b_conf_matrix, strict=True)
    assert ours._predictions == expected._predictions


def test_class_missing_in_metadata(dataset):
    evaluator = SemanticEvaluator("sem_scenes", sem_seg_loading_fn=LabelReader(dataset))
    del evaluator._contiguous_id_to_dataset_id[0]
    with pytest.raises(ValueError, match="class 0 is not in the metadata of sem_scenes"):
        evaluator.encode_json_sem_seg(np.zeros((3, 4), dtype=int), "1.jpg")
