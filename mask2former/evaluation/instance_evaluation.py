"""Mask AP by the official COCO code, for data sets whose thing ids need not be 0 to n - 1."""

from collections.abc import Sequence
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval


class InstanceSegEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for the thing classes of any data set.

    In a panoptic data set things may have any of the class ids, so predicted ids go back to the
    data set's through `thing_dataset_id_to_contiguous_id` as it is.
    """

    def __init__(
        self, dataset_name: str, tasks: Sequence[str] | None = ("segm",), **kwargs: Any
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata names the COCO `json_file`.
            tasks: "segm" and possibly "bbox": the boxes that the model predicts are empty.
            kwargs: `distributed`, `output_dir`, `max_dets_per_image`, as Detectron2 has them.
        """
        super().__init__(dataset_name, tasks, use_fast_impl=False, **kwargs)
        metadata = MetadataCatalog.get(dataset_name)
        to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
        self._to_dataset_id = to_contiguous and {v: k for k, v in to_contiguous.items()}
        # The base class would map ids on its own, and would take class names that a data set may
        # have for more classes than its annotation file has. AP comes in the order of the file.
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        self._metadata = Metadata(
            name=dataset_name, thing_classes=[category["name"] for category in categories]
        )

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        if self._to_dataset_id is not None:
            for prediction in predictions:
                for result in prediction["instances"]:
                    result["category_id"] = self._dataset_id(result["category_id"])
        super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Adds to AP what the official code prints besides: AR by detections and by size."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        names = [*(f"AR{limit}" for limit in self._max_dets_per_image), "ARs", "ARm", "ARl"]
        stats = [-1.0] * len(names) if coco_eval is None else coco_eval.stats[6:12]
        recalls = {
            name: float(100 * value) if value >= 0 else float("nan")
            for name, value in zip(names, stats, strict=True)
        }
        summary = {name: value for name, value in results.items() if "-" not in name}
        return summary | recalls | results

    def _dataset_id(self, class_id: int) -> int:
        if class_id not in self._to_dataset_id:
            raise ValueError(
                f"An instance was predicted of class {class_id}, which is no thing class of data "
                f"set {self._metadata.name}. A model of things and stuff predicts instances of "
                "things only if MODEL.MASK_FORMER.TEST.PANOPTIC_ON is True."
            )
        return self._to_dataset_id[class_id]
