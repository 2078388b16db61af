"""Mask AP on LVIS by the official code: AP_r, AP_c, AP_f by class frequency, 300 detections."""

import itertools
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import LVISEvaluator as _LVISEvaluator

from .mask_encoding import EncodesMasks
from .official_packages import import_official, numpy_with_old_names, replaced
from .results import WritesPredictions


class LVISEvaluator(EncodesMasks, WritesPredictions, _LVISEvaluator):
    """Detectron2's LVIS evaluator, for masks only by default and with current NumPy."""

    def __init__(
        self, dataset_name: str, tasks: Sequence[str] | None = ("segm",), **kwargs: Any
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata has the LVIS `json_file`.
            tasks: "segm", optionally "bbox"; the model predicts empty boxes.
            kwargs: `distributed`, `output_dir`, `max_dets_per_image` of Detectron2.

        Raises:
            ImportError: the package lvis is not installed.
        """
        self._official = import_official("lvis.eval", dataset_name)
        super().__init__(dataset_name, tasks, **kwargs)

    def _eval_predictions(self, predictions: list[dict]) -> None:
        self.write_predictions("instances_predictions.pth", predictions)
        results = itertools.chain(*(prediction["instances"] for prediction in predictions))
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        to_dataset = to_contiguous and {v: k for k, v in to_contiguous.items()}
        # The base class maps ids in place, where LVIS' own count from 1.
        in_dataset_ids = [
            result | {"category_id": to_dataset[class_id] if to_dataset else class_id + 1}
            for result in results
            for class_id in (result["category_id"],)
        ]
        self.write_predictions("lvis_instances_results.json", in_dataset_ids)
        with replaced(self._official, np=numpy_with_old_names()):
            super()._eval_predictions(predictions)
        # The official code returns -1 for an average without any gt object.
        for metrics in self._results.values():
            metrics.update({name: float("nan") for name, value in metrics.items() if value < 0})
