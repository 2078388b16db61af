"""Panoptic quality by the official panopticapi code."""

import contextlib
import io
import itertools
import json
import logging
import os
import tempfile
from collections import OrderedDict

from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from panopticapi.evaluation import PQStat, pq_compute_multi_core
from tabulate import tabulate

_GROUPS = {"All": None, "Things": True, "Stuff": False}


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, also where neither truth nor predictions have a thing (or a stuff).

    The official code divides by the number of classes that occur; here the averages of a group
    without any are NaN.
    """

    def evaluate(self) -> OrderedDict | None:
        """Returns {"panoptic_seg": {"PQ": ..., "SQ_th": ..., ...}} in percent, on the main worker.

        Raises:
            ValueError: an image of the ground truth has no prediction.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = {p["image_id"]: p for p in itertools.chain(*gathered)}

        with open(PathManager.get_local_path(self._metadata.panoptic_json)) as file:
            truth = json.load(file)
        categories = self._categories(truth)
        unpredicted = [a for a in truth["annotations"] if a["image_id"] not in predictions]
        if unpredicted:
            raise ValueError(
                f"{len(unpredicted)} images of {self._metadata.panoptic_json} have no prediction, "
                f"the first is {unpredicted[0]['file_name']}."
            )

        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            for prediction in predictions.values():
                with open(os.path.join(folder, prediction["file_name"]), "wb") as file:
                    file.write(prediction.pop("png_string"))
            if self._output_dir:
                path = os.path.join(self._output_dir, "predictions.json")
                with PathManager.open(path, "w") as file:
                    json.dump({**truth, "annotations": list(predictions.values())}, file)
            pairs = [(a, predictions[a["image_id"]]) for a in truth["annotations"]]
            with contextlib.redirect_stdout(io.StringIO()):
                stat = pq_compute_multi_core(
                    pairs,
                    PathManager.get_local_path(self._metadata.panoptic_root),
                    folder,
                    categories,
                )
        return self._summarise(stat, categories)

    def _categories(self, truth: dict) -> dict[int, dict]:
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
