"""Official Cityscapes evaluation of semantic (IoU, iIoU) and instance segmentation (AP).

Each worker writes its predictions to its own temporary folder, and the main worker collects
them. Unlike Detectron2's classes, this works on several machines.
"""

import glob
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from detectron2.evaluation import CityscapesInstanceEvaluator as _InstanceEvaluator
from detectron2.evaluation import CityscapesSemSegEvaluator as _SemSegEvaluator
from detectron2.evaluation.cityscapes_evaluation import CityscapesEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..utils.files import explained_write_errors
from .official_packages import import_official, numpy_with_old_names, replaced

_SCRIPTS = "cityscapesscripts.evaluation"


class _OfficialEvaluation(CityscapesEvaluator):
    """Collects predictions and runs an official script on them."""

    _script: str  # module of the package
    _gt_suffix: str  # of ground truth files
    _prediction_suffix: str  # of prediction files

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: registered name; its metadata has `gt_dir`.

        Raises:
            ImportError: the package cityscapesscripts is not installed.
        """
        self._official = import_official(f"{_SCRIPTS}.{self._script}", dataset_name)
        super().__init__(dataset_name)

    def reset(self) -> None:
        self._working_dir = tempfile.TemporaryDirectory(prefix="cityscapes_eval_")
        self._temp_dir = self._working_dir.name

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        with explained_write_errors(self._temp_dir):
            super().process(inputs, outputs)

    def evaluate(self) -> OrderedDict | None:
        """Return {task: {metric: value}} in percent, on the main worker.

        Raises:
            FileNotFoundError: the ground truth is missing.
            ValueError: an image has no prediction, or the script reports an error.
        """
        comm.synchronize()
        self._collect()
        results = OrderedDict(self._run()) if comm.is_main_process() else None
        self._working_dir.cleanup()
        return results

    def _collect(self) -> None:
        """Copy the files of all workers into the main worker's folder."""
        if comm.get_world_size() == 1:
            return
        main = comm.is_main_process()
        files = {} if main else {p.name: p.read_bytes() for p in Path(self._temp_dir).iterdir()}
        for worker_files in comm.gather(files):
            for name, content in worker_files.items():
                path = Path(self._temp_dir) / name
                with explained_write_errors(str(path)):
                    path.write_bytes(content)

    def _run(self) -> Mapping[str, Mapping[str, float]]:
        gt_files, predictions = self._pairs()
        self._logger.info(f"Evaluating {len(gt_files)} images with the official Cityscapes script")
        args = self._official.args
        args.quiet, args.JSONOutput, args.colorized = True, False, False
        # The script compares this with the prediction paths, so resolve links.
        args.predictionPath = os.path.realpath(self._temp_dir)
        args.gtInstancesFile = os.path.join(args.predictionPath, "gtInstances.json")
        with replaced(
            self._official,
            np=numpy_with_old_names(),
            printError=_raise,
            # Keep it from writing intermediate results to the current folder.
            writeDict2JSON=lambda content, file_name: None,
        ):
            return self._summarise(
                self._official.evaluateImgLists(predictions, gt_files, self._official.args)
            )

    def _pairs(self) -> tuple[list[str], list[str]]:
        """Return ground truth files and prediction files, in the same order."""
        gt_dir = PathManager.get_local_path(self._metadata.gt_dir)
        gt_files = sorted(glob.glob(os.path.join(gt_dir, "*", f"*{self._gt_suffix}")))
        if not gt_files:
            raise FileNotFoundError(
                f"There is no ground truth {os.path.join(gt_dir, '<city>', '*' + self._gt_suffix)}."
            )
        folder = os.path.realpath(self._temp_dir)
        predictions = [
            os.path.join(
                folder, os.path.basename(f).removesuffix(self._gt_suffix) + self._prediction_suffix
            )
            for f in gt_files
        ]
        missing = [f for f, p in zip(gt_files, predictions, strict=True) if not os.path.isfile(p)]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(gt_files)} images of the ground truth have no prediction, "
                f"the first is {missing[0]}."
            )
        return gt_files, predictions

    def _summarise(self, scores: dict[str, Any]) -> Mapping[str, Mapping[str, float]]:
        raise NotImplementedError


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


class CityscapesInstanceEvaluator(_OfficialEvaluation, _InstanceEvaluator):
    """Instance AP: {"segm": {"AP", "AP50", "AP-person", ...}}."""

    _script = "evalInstanceLevelSemanticLabeling"
    _gt_suffix = "_gtFine_instanceIds.png"
    _prediction_suffix = "_leftImg8bit_pred.txt"

    def _summarise(self, scores: dict[str, Any]) -> Mapping[str, Mapping[str, float]]:
        averages = scores["averages"]
        results = {"AP": 100 * averages["allAp"], "AP50": 100 * averages["allAp50%"]}
        for name, metrics in averages["classes"].items():
            results[f"AP-{name}"] = 100 * metrics["ap"]
        return {"segm": {name: float(value) for name, value in results.items()}}


class CityscapesSemSegEvaluator(_OfficialEvaluation, _SemSegEvaluator):
    """IoU over classes and categories: {"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup", ...}}."""

    _script = "evalPixelLevelSemanticLabeling"
    _gt_suffix = "_gtFine_labelIds.png"
    _prediction_suffix = "_leftImg8bit_pred.png"

    def _summarise(self, scores: dict[str, Any]) -> Mapping[str, Mapping[str, float]]:
        results = {
            "IoU": 100 * scores["averageScoreClasses"],
            "iIoU": 100 * scores["averageScoreInstClasses"],
            "IoU_sup": 100 * scores["averageScoreCategories"],
            "iIoU_sup": 100 * scores["averageScoreInstCategories"],
        }
        labels = self._official.labels
        for name in [label.name for label in labels if not label.ignoreInEval]:
            results[f"IoU-{name}"] = 100 * scores["classScores"][name]
        return {"sem_seg": {name: float(value) for name, value in results.items()}}
