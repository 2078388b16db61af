"""Panoptic quality by the official panopticapi code, or counted here with the same digits."""

import contextlib
import io
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
from panopticapi.evaluation import PQStat, pq_compute_multi_core
from tabulate import tabulate

from ..utils.files import atomic_write
from .panoptic_quality import add_up, as_segment_ids, count_segments, read_segment_ids

_GROUPS = {"All": None, "Things": True, "Stuff": False}


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, also where neither truth nor predictions have a thing (or a stuff).

    Each image is compared with the truth as it comes, so that predictions are not kept as PNG, and
    errors in them are found at once. The official code divides by the number of classes that occur;
    here the averages of a group without any are NaN.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, use_fast_impl: bool = True
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata names `panoptic_json` and `panoptic_root`.
            output_dir: where to write `predictions.json`, if given.
            use_fast_impl: False leaves it to panopticapi, which gives the same digits from PNG
                files when all images are done.
        """
        super().__init__(dataset_name, output_dir)
        self._use_fast_impl = use_fast_impl

    def reset(self) -> None:
        super().reset()
        with open(PathManager.get_local_path(self._metadata.panoptic_json)) as file:
            self._truth = json.load(file)
        self._categories = self._categories_of(self._truth)
        self._annotations = {a["image_id"]: a for a in self._truth["annotations"]}
        if len(self._annotations) < len(self._truth["annotations"]):
            raise ValueError(f"{self._metadata.panoptic_json} lists an image more than once.")
        self._truth_folder = PathManager.get_local_path(self._metadata.panoptic_root)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with `image_id` and `file_name`.
            outputs: with `panoptic_seg`: the map (H, W) of segment ids, 0 where there is none, and
                its segments; or a map of labels and None, as Detectron2 has it.

        Raises:
            KeyError: ids of map and segments differ, or a category is unknown.
            ValueError: the map has another size than the truth.
        """
        if not self._use_fast_impl:
            super().process(inputs, outputs)
            return
        for of_image, output in zip(inputs, outputs, strict=True):
            panoptic_map, segments = output["panoptic_seg"]
            panoptic_map = panoptic_map.cpu().numpy()
            if segments is None:
                panoptic_map, segments = self._segments_of_labels(panoptic_map)
            segments = [self._convert_category_id(dict(segment)) for segment in segments]
            stem, _ = os.path.splitext(os.path.basename(of_image["file_name"]))
            prediction = {
                "image_id": of_image["image_id"],
                "file_name": f"{stem}.png",
                "segments_info": segments,
            }
            annotation = self._annotations.get(of_image["image_id"])
            if annotation is not None:
                truth_file = os.path.join(self._truth_folder, annotation["file_name"])
                prediction["counts"] = count_segments(
                    read_segment_ids(truth_file),
                    as_segment_ids(panoptic_map),
                    annotation,
                    segments,
                    self._categories,
                )
            self._predictions.append(prediction)

    def _segments_of_labels(self, labels: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Segments of a map of labels, class × `label_divisor` + number, -1 where there is none."""
        things = set(self._metadata.thing_dataset_id_to_contiguous_id.values())
        segments = []
        for label in np.unique(labels[labels != -1]).tolist():
            class_id = label // self._metadata.label_divisor
            segments.append(
                {"id": label + 1, "category_id": class_id, "isthing": class_id in things}
            )
        return labels + 1, segments

    def evaluate(self) -> OrderedDict | None:
        """Returns {"panoptic_seg": {"PQ": ..., "SQ_th": ..., ...}} in percent, on the main worker.

        Raises:
            ValueError: an image of the ground truth has no prediction.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = {p["image_id"]: dict(p) for p in itertools.chain(*gathered)}
        annotations = self._truth["annotations"]
        unpredicted = [a for a in annotations if a["image_id"] not in predictions]
        if unpredicted:
            raise ValueError(
                f"{len(unpredicted)} images of {self._metadata.panoptic_json} have no prediction, "
                f"the first is {unpredicted[0]['file_name']}."
            )
        results = {
            image_id: prediction.pop("counts" if self._use_fast_impl else "png_string", None)
            for image_id, prediction in predictions.items()
        }
        if self._output_dir:
            path = os.path.join(self._output_dir, "predictions.json")
            with atomic_write(path) as file:
                # Not `dump`, which is much slower.
                file.write(json.dumps({**self._truth, "annotations": list(predictions.values())}))
        if self._use_fast_impl:
            stat = add_up([results[a["image_id"]] for a in annotations])
        else:
            stat = self._official_sums(predictions, results)
        return self._summarise(stat, self._categories)

    def _official_sums(
        self, predictions: dict[Any, dict[str, Any]], png_files: dict[Any, bytes]
    ) -> PQStat:
        pairs = [(a, predictions[a["image_id"]]) for a in self._truth["annotations"]]
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            for image_id, content in png_files.items():
                name = predictions[image_id]["file_name"]
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(content)
            with contextlib.redirect_stdout(io.StringIO()):
                return pq_compute_multi_core(pairs, self._truth_folder, folder, self._categories)

    def _categories_of(self, truth: dict) -> dict[int, dict]:
        """The classes by their id in the data set: those of the JSON, else of the metadata."""
        if "categories" in truth:
            return {category["id"]: category for category in truth["categories"]}
        # Things come last, for "stuff" may list all classes.
        maps = (self._stuff_contiguous_id_to_dataset_id, self._thing_contiguous_id_to_dataset_id)
        return {
            category_id: {"id": category_id, "isthing": is_thing}
            for is_thing, ids in enumerate(maps)
            for category_id in ids.values()
        }

    @staticmethod
    def _summarise(stat: PQStat, categories: dict[int, dict]) -> OrderedDict:
        results, rows = {}, []
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
