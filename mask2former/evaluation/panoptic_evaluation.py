"""Panoptic quality by the official panopticapi code, or counted here to the same digits."""

import itertools
import json
import logging
import os
import tempfile
from collections import OrderedDict
from typing import Any

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from panopticapi.evaluation import PQStat
from tabulate import tabulate

from ..utils.files import atomic_write, explained_write_errors
from .class_tables import panoptic_rows, write_class_table
from .ground_truth import read_panoptic_gt
from .image_statistics import write_panoptic_statistics
from .panoptic_errors import find_errors, write_errors
from .panoptic_quality import (
    add_up,
    as_segment_ids,
    category_counts,
    image_stat,
    match_segments,
    official_image_stats,
    read_segment_ids,
    segment_overlaps,
    with_sufficient_areas,
)

_GROUPS = {"All": None, "Things": True, "Stuff": False}


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, also for data without any thing (or stuff) segments.

    Each image is matched with its ground truth in `process`, so predictions need not be kept as PNG
    and errors in them show up at once. The official code divides by the number of classes that
    occur; here the averages over a group without any are NaN.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, use_fast_impl: bool = True
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata has `panoptic_json` and `panoptic_root`.
            output_dir: folder for `predictions.json`, tables per class and counts per image, not
                written by default.
            use_fast_impl: False uses panopticapi instead: the same digits, computed from PNG files
                after the last image.
        """
        with explained_write_errors(output_dir or ""):
            super().__init__(dataset_name, output_dir)
        self._use_fast_impl = use_fast_impl

    def reset(self) -> None:
        super().reset()
        self._gt = read_panoptic_gt(self._metadata).content
        self._categories = self._read_categories(self._gt)
        self._annotations = {a["image_id"]: a for a in self._gt["annotations"]}
        self._gt_folder = PathManager.get_local_path(self._metadata.panoptic_root)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with `image_id` and `file_name`.
            outputs: with `panoptic_seg`: a map (H, W) of segment ids, 0 for void, and the list of
                segments; or a map of labels and None, as in Detectron2.

        Raises:
            KeyError: the ids of map and segments differ, or a category is unknown.
            ValueError: the map differs in size from the ground truth.
        """
        if not self._use_fast_impl:
            super().process(inputs, outputs)
            return
        for image, output in zip(inputs, outputs, strict=True):
            panoptic_map, segments = output["panoptic_seg"]
            panoptic_map = panoptic_map.cpu().numpy()
            if segments is None:
                panoptic_map, segments = self._labels_to_segments(panoptic_map)
            segments = [self._convert_category_id(dict(segment)) for segment in segments]
            stem, _ = os.path.splitext(os.path.basename(image["file_name"]))
            prediction = {
                "image_id": image["image_id"],
                "file_name": f"{stem}.png",
                "segments_info": segments,
            }
            annotation = self._annotations.get(image["image_id"])
            if annotation is not None:
                gt_ids, pred_ids = self._read_gt_ids(annotation), as_segment_ids(panoptic_map)
                annotation = with_sufficient_areas(annotation, gt_ids)
                overlaps = segment_overlaps(gt_ids, pred_ids, annotation)
                matches = match_segments(overlaps, annotation, segments, self._categories)
                prediction["counts"] = category_counts(matches, annotation, segments)
                if self._output_dir:
                    prediction["errors"] = find_errors(overlaps, matches, annotation, segments)
            self._predictions.append(prediction)

    def _read_gt_ids(self, annotation: dict[str, Any]) -> np.ndarray:
        return read_segment_ids(os.path.join(self._gt_folder, annotation["file_name"]))

    def _labels_to_segments(self, labels: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Split a map of labels, class × `label_divisor` + number or -1 for void, into segments."""
        things = set(self._metadata.thing_dataset_id_to_contiguous_id.values())
        segments = []
        for label in np.unique(labels[labels != -1]).tolist():
            class_id = label // self._metadata.label_divisor
            segments.append(
                {"id": label + 1, "category_id": class_id, "isthing": class_id in things}
            )
        return labels + 1, segments

    def evaluate(self) -> OrderedDict | None:
        """Return {"panoptic_seg": {"PQ": ..., "SQ_th": ..., ...}} in percent, on the main worker.

        Raises:
            ValueError: an image of the ground truth has no prediction.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = {p["image_id"]: dict(p) for p in itertools.chain(*gathered)}
        annotations = self._gt["annotations"]
        unpredicted = [a for a in annotations if a["image_id"] not in predictions]
        if unpredicted:
            raise ValueError(
                f"{len(unpredicted)} images of {self._metadata.panoptic_json} have no prediction, "
                f"the first is {unpredicted[0]['file_name']}."
            )
        image_results = {
            image_id: prediction.pop("counts" if self._use_fast_impl else "png_string", None)
            for image_id, prediction in predictions.items()
        }
        errors = {image_id: p.pop("errors", None) for image_id, p in predictions.items()}
        if self._output_dir:
            path = os.path.join(self._output_dir, "predictions.json")
            with atomic_write(path) as file:
                # `dumps` is much faster than `dump`.
                file.write(json.dumps({**self._gt, "annotations": list(predictions.values())}))
        if self._use_fast_impl:
            stats = [image_stat(image_results[a["image_id"]]) for a in annotations]
        else:
            stats = self._official_stats(predictions, image_results)
        total = add_up(stats)
        self._write_tables(total, stats, errors)
        return self._summarise(total, self._categories)

    def _write_tables(
        self, total: PQStat, stats: list[PQStat], errors: dict[Any, list | None]
    ) -> None:
        """Write what explains the averages: classes, images, kinds of errors."""
        name, folder = self._metadata.name, self._output_dir
        rows = panoptic_rows(total, self._categories)
        files = {
            "gt_file": self._metadata.panoptic_json,
            "image_root": self._metadata.get("image_root"),
        }
        write_class_table(folder, name, "panoptic_seg", rows, **files)
        if not folder:
            return
        images = [annotation["image_id"] for annotation in self._gt["annotations"]]
        write_panoptic_statistics(folder, name, self._categories, images, stats)
        if self._use_fast_impl:
            png_files = {a["image_id"]: a["file_name"] for a in self._gt["annotations"]}
            evaluated = {png_files[i]: errors[i] or [] for i in images}
            write_errors(folder, name, self._categories, self._gt_folder, evaluated)

    def _official_stats(
        self, predictions: dict[Any, dict[str, Any]], png_files: dict[Any, bytes]
    ) -> list[PQStat]:
        pairs = [
            (with_sufficient_areas(a, self._read_gt_ids(a)), predictions[a["image_id"]])
            for a in self._gt["annotations"]
        ]
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            for image_id, content in png_files.items():
                path = os.path.join(folder, predictions[image_id]["file_name"])
                with explained_write_errors(path), open(path, "wb") as file:
                    file.write(content)
            return official_image_stats(pairs, self._gt_folder, folder, self._categories)

    def _read_categories(self, gt: dict) -> dict[int, dict]:
        """Return the categories by id, from the JSON file or else from the metadata."""
        if gt.get("categories"):
            things = set(self._thing_contiguous_id_to_dataset_id.values())
            return {
                category["id"]: {"isthing": int(category["id"] in things)} | category
                for category in gt["categories"]
            }
        # "stuff" may list all classes, so things come last to override it.
        maps = (self._stuff_contiguous_id_to_dataset_id, self._thing_contiguous_id_to_dataset_id)
        return {
            category_id: {"id": category_id, "isthing": is_thing}
            for is_thing, ids in enumerate(maps)
            for category_id in ids.values()
        }

    @staticmethod
    def _summarise(stat: PQStat, categories: dict[int, dict]) -> OrderedDict:
        results: dict[str, float] = {}
        rows = []
        for name, is_thing in _GROUPS.items():
            group = {k: c for k, c in categories.items() if is_thing in (None, c["isthing"] == 1)}
            if any(stat[k].tp + stat[k].fp + stat[k].fn for k in group):
                average, _ = stat.pq_average(group, isthing=None)
            else:
                average = {"pq": float("nan"), "sq": float("nan"), "rq": float("nan"), "n": 0}
            suffix = {"All": "", "Things": "_th", "Stuff": "_st"}[name]
            for key in ("pq", "sq", "rq"):
                results[key.upper() + suffix] = 100 * float(average[key])
            rows.append([name, *(100 * average[key] for key in ("pq", "sq", "rq")), average["n"]])
        table = tabulate(
            rows,
            headers=["", "PQ", "SQ", "RQ", "#categories"],
            tablefmt="pipe",
            floatfmt=".3f",
            stralign="center",
            numalign="center",
        )
        logging.getLogger(__name__).info("Panoptic Evaluation Results:\n" + table)
        return OrderedDict(panoptic_seg=results)
