"""Mask AP by the official COCO rules, for data sets with any thing class ids."""

import itertools
from collections.abc import Sequence
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .class_tables import mask_rows, result_file, write_class_table
from .ground_truth import read_coco
from .mask_ap import evaluate_masks
from .mask_encoding import EncodesMasks
from .official_packages import replaced
from .results import WritesPredictions


class InstanceSegEvaluator(EncodesMasks, WritesPredictions, COCOEvaluator):
    """Detectron2's COCO evaluator without the restriction of thing classes to ids 0 to n - 1.

    In a panoptic data set things may have any class ids. `thing_dataset_id_to_contiguous_id` maps
    predicted ids back to those of the data set.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = ("segm",),
        *args: Any,
        use_fast_impl: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata has the COCO `json_file`.
            tasks: "segm", optionally "bbox"; the model predicts empty boxes.
            args, kwargs: `distributed`, `output_dir`, `max_dets_per_image` of Detectron2.
            use_fast_impl: False uses pycocotools, which gives the same digits and always runs for
                tasks other than "segm" alone.
        """
        metadata = MetadataCatalog.get(dataset_name)

        def read(json_file: str) -> COCO:
            return read_coco(json_file, metadata.get("image_root", ""), dataset_name)

        with replaced(coco_evaluation, COCO=read):
            # Detectron2's own fast implementation differs in some digits.
            super().__init__(dataset_name, tasks, *args, use_fast_impl=False, **kwargs)
        self._use_fast_encoding = self._evaluates_compiled = use_fast_impl
        to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
        self._to_dataset_id = to_contiguous and {v: k for k, v in to_contiguous.items()}
        # With the full metadata, the base class would map ids itself and expect one class name per
        # annotated class, but a data set may name more. AP is in the order of the file.
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        self._metadata = Metadata(
            name=dataset_name, thing_classes=[category["name"] for category in categories]
        )

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        self.write_predictions("instances_predictions.pth", predictions)
        if self._to_dataset_id is not None:
            for prediction in predictions:
                for result in prediction["instances"]:
                    result["category_id"] = self._dataset_id(result["category_id"])
        results = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        # Several test sets share the folder; other programs know Detectron2's name.
        self.write_predictions(self._results_file, results)
        self.link_predictions(self._results_file, "coco_instances_results.json")
        if self._evaluates_compiled and self._tasks is not None and set(self._tasks) == {"segm"}:
            self._eval_masks(results, img_ids)
        else:
            super()._eval_predictions(predictions, img_ids)

    @property
    def _results_file(self) -> str:
        return f"{result_file('results', self._metadata.name, 'segm')}.json"

    def _eval_masks(self, results: list[dict], img_ids: list[int] | None) -> None:
        """Do what the base class does for masks, with `evaluate_masks`."""
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        evaluation = None
        if results:
            evaluation = evaluate_masks(
                self._coco_api, results, max_dets=self._max_dets_per_image, img_ids=img_ids
            )
            evaluation.summarize()
        self._results["segm"] = self._derive_coco_results(
            evaluation, "segm", class_names=self._metadata.thing_classes
        )

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Add AR by number of detections and by size, which the official code also prints."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "segm":
            images = None if coco_eval is None else coco_eval.params.imgIds
            rows = mask_rows(self._coco_api, coco_eval, self._metadata.thing_classes, images)
            name = self._metadata.name
            metadata = MetadataCatalog.get(name)
            write_class_table(
                self._folder,
                name,
                "segm",
                rows,
                gt_file=metadata.json_file,
                image_root=metadata.get("image_root"),
                results_file=self._results_file,
            )
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
                f"Class {class_id} of a predicted instance is not a thing class of data set "
                f"{self._metadata.name}. A model with stuff classes predicts only instances of "
                "things if MODEL.MASK_FORMER.TEST.PANOPTIC_ON is True."
            )
        return self._to_dataset_id[class_id]
