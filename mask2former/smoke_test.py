"""Is everything in place for a training? `tools/train_net.py --smoke`, minutes instead of days.

    data → model and weights → two iterations → checkpoint → evaluation → drawing

Each step runs the code of the real training, with the config's batch, model, precision and data, so
that what fails there fails here first. Only a few test images are evaluated, against ground truth
of just these. All files go to OUTPUT_DIR/smoke, which is emptied first; a later training or
`--resume` does not look there.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import ColorMode
from tabulate import tabulate

from .best_checkpoint import BestModel, unknown_metric
from .checkpoint import Mask2FormerCheckpointer
from .data.formats.images import read_image
from .data.loader import evaluates_tiles
from .ema import EMA, uses_ema
from .trainer import Trainer
from .utils.files import atomic_write, make_folder
from .utils.memory import peak_resident_bytes
from .utils.misc import unwrapped
from .utils.seeding import isolated_rng
from .utils.visualization import (
    contact_sheet,
    draw_panoptic_gt,
    draw_prediction,
    enabled_tasks,
    magnify,
    make_visualizer,
)

FOLDER = "smoke"
NUM_ITERATIONS = 2
_NUM_IMAGES = 4  # of each test set
_SUFFIX = "__smoke"
_DRAWN_WIDTH = 640  # pixels, of each image of the drawing

_logger = logging.getLogger(__name__)


class SmokeTestError(RuntimeError):
    """A step failed; the message names it."""


class _Checklist:
    """What was checked, with times; the main process logs it."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, str]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Run a step; it appends what it found to the list.

        Raises:
            SmokeTestError: the step failed.
        """
        found: list[str] = []
        start = time.perf_counter()
        try:
            yield found
        except Exception as error:
            self._add("✗", name, start, [f"{type(error).__name__}: {error}"])
            self.log()
            raise SmokeTestError(f"The smoke test failed in the step {name!r}: {error}") from error
        self._add("✓", name, start, found)

    def _add(self, mark: str, name: str, start: float, found: list[str]) -> None:
        seconds = f"{time.perf_counter() - start:.1f} s"
        self._rows.append((name, mark, seconds, "; ".join(found)))

    def log(self) -> None:
        if comm.is_main_process():
            table = tabulate(self._rows, ["step", "", "time", "found"], maxcolwidths=90)
            _logger.info(f"Smoke test:\n{table}")


def run_smoke_test(cfg: CfgNode) -> dict:
    """Run all steps in this process of the job; a collective call.

    Args:
        cfg: the checked config; its OUTPUT_DIR is the folder of the smoke test, see `smoke_folder`.

    Returns:
        The results of the evaluation, on the main process.

    Raises:
        SmokeTestError: a step failed.
        ValueError: OUTPUT_DIR is not such a folder.
    """
    if os.path.basename(cfg.OUTPUT_DIR) != FOLDER:
        raise ValueError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR}: a smoke test would write among the files of a "
            "training there. `launch` sets another folder."
        )
    checklist = _Checklist()
    with checklist.step("test data") as found:
        names = _few_images_of(cfg)
        found.append(f"{len(names)} test set(s): {', '.join(names) or 'DATASETS.TEST is empty'}")
    with checklist.step("training data and model") as found:
        trainer = Trainer(training_config(cfg))
        records = getattr(trainer.data_loader, "dataset", ())
        found.append(f"{len(records)} training images in {', '.join(cfg.DATASETS.TRAIN)}")
        number = sum(p.numel() for p in trainer.model.parameters())
        found.append(f"{number / 1e6:.1f} million parameters on {cfg.MODEL.DEVICE}")
    with checklist.step("weights") as found:
        trainer.resume_or_load(resume=False)
        found.append(cfg.MODEL.WEIGHTS or "none: MODEL.WEIGHTS is empty, the start is random")
    with checklist.step("training") as found:
        found.append(_train(trainer))
    with checklist.step("checkpoint") as found:
        found.append(_check_checkpoint(trainer))
    test_cfg = _with_test_sets(cfg, names)
    with checklist.step("evaluation") as found:
        results = trainer.test(test_cfg, trainer.model)
        if comm.is_main_process():
            found.append(_describe(names, results))
            _check_best_metric(cfg, names, results)
    with checklist.step("drawing") as found:
        # On the main process alone, which has all test sets.
        if comm.is_main_process():
            found += _draw(test_cfg, unwrapped(trainer.model))
        comm.synchronize()
    checklist.log()
    if comm.is_main_process():
        _logger.info(f"Everything is in place. The files of this test are in {cfg.OUTPUT_DIR}")
    return results


def smoke_folder(cfg: CfgNode) -> str:
    """Where a smoke test of a config writes."""
    return os.path.join(cfg.OUTPUT_DIR, FOLDER)


def empty_smoke_folder(folder: str) -> None:
    """Remove what an earlier smoke test has left.

    Raises:
        ValueError: the folder holds something else.
    """
    if not os.path.isdir(folder):
        return
    # A kill may have left half of a file.
    names = [path.name.removesuffix(".tmp") for path in Path(folder).iterdir()]
    unknown = [n for n in names if n not in _KNOWN_FILES and not n.startswith(_KNOWN_STARTS)]
    if unknown:
        raise ValueError(
            f"{folder} is the folder of the smoke test, but holds {sorted(unknown)[0]}, which none "
            "has written: rename the folder."
        )
    shutil.rmtree(folder)


_KNOWN_STARTS = ("model_", "events.", "log.txt", "non_finite_")
_KNOWN_FILES = (
    "config.yaml",
    "drawings",
    "ema",
    "evaluation.json",
    "evaluation.md",
    "ground_truth",
    "inference",
    "last_checkpoint",
    "metrics.json",
    "training.lock",
)


def training_config(cfg: CfgNode) -> CfgNode:
    """The config of the two iterations, which fail on losses that are NaN, and are no experiment.

    Args:
        cfg: that of the training, checked.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.EXPECTED_RESULTS = []
    # Configs made by another project's copy of `add_maskformer2_config` lack these keys.
    if "NON_FINITE" in cfg.SOLVER:
        cfg.SOLVER.NON_FINITE.MAX_SKIPPED = 0
    if "LOGGING" in cfg:
        cfg.LOGGING.WANDB = cfg.LOGGING.MLFLOW = False
    cfg.freeze()
    return cfg


def _train(trainer: Trainer) -> str:
    """Train for NUM_ITERATIONS, without evaluation; returns losses, time and memory in words."""
    evaluating = hooks.EvalHook | BestModel
    trainer._hooks[:] = [hook for hook in trainer._hooks if not isinstance(hook, evaluating)]
    trainer.max_iter = NUM_ITERATIONS
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start) / NUM_ITERATIONS
    if not comm.is_main_process():
        return ""
    losses = [f"{v:.2f}" for v, _ in trainer.storage.histories()["total_loss"].values()]
    device = next(trainer.model.parameters()).device
    memory = f"{peak_resident_bytes() / 2**30:.1f} GiB in the main process"
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU"
    return (
        f"{NUM_ITERATIONS} iterations with {trainer.cfg.SOLVER.IMS_PER_BATCH} images, total loss "
        f"{' → '.join(losses)}, {seconds:.1f} s/it with the start of the loader, peak memory "
        f"{memory}"
    )


def _check_checkpoint(trainer: Trainer) -> str:
    """Read the checkpoint of training back and compare it; returns its name and size."""
    comm.synchronize()
    checkpointer = Mask2FormerCheckpointer(unwrapped(trainer.model), trainer.cfg.OUTPUT_DIR)
    path = checkpointer.get_checkpoint_file()
    before = {name: v.clone() for name, v in unwrapped(trainer.model).state_dict().items()}
    rest = checkpointer.load(path, checkpointables=[])
    for name, value in unwrapped(trainer.model).state_dict().items():
        if comm.is_main_process() and not torch.equal(value, before[name]):
            raise ValueError(f"{name} is not the same in {path} as in the model")
    if rest.get("iteration") != NUM_ITERATIONS - 1:
        raise ValueError(f"{path} is of iteration {rest.get('iteration')}")
    return f"{os.path.basename(path)}, {os.path.getsize(path) / 2**20:.0f} MiB"


# ---- a few images of each test set ----


def _few_images_of(cfg: CfgNode) -> dict[str, str]:
    """Register a few images of each test set as a data set with ground truth of just these.

    Returns:
        Name of the test set → name of its part.
    """
    parts = {}
    for name in cfg.DATASETS.TEST:
        part = name + _SUFFIX
        records = DatasetCatalog.get(name)
        few = [records[i] for i in range(0, len(records), max(1, len(records) // _NUM_IMAGES))]
        few = few[:_NUM_IMAGES]
        metadata = {k: v for k, v in MetadataCatalog.get(name).as_dict().items() if k != "name"}
        folder = os.path.join(cfg.OUTPUT_DIR, "ground_truth", name)
        if comm.is_main_process():
            make_folder(folder)
            _write_gt(metadata, few, folder)
        comm.synchronize()
        for key in ("json_file", "panoptic_json", "gt_dir"):
            if os.path.exists(file := os.path.join(folder, key)):
                metadata[key] = file
        for catalog in (DatasetCatalog, MetadataCatalog):
            if part in catalog.list():
                catalog.remove(part)
        load: Any = partial(list, few)
        # Instances of Detectron2's own data sets are read with its leniency.
        load.__module__ = getattr(DatasetCatalog[name], "__module__", None)
        DatasetCatalog.register(part, load)
        MetadataCatalog.get(part).set(**metadata)
        parts[name] = part
    return parts


def _write_gt(metadata: dict[str, Any], records: list[dict], folder: str) -> None:
    """Write what evaluators read besides the records, under the names of the metadata entries."""
    ids = {record.get("image_id") for record in records}
    for key in ("json_file", "panoptic_json"):
        if metadata.get(key):
            with PathManager.open(metadata[key]) as file:
                content = json.load(file)
            for section, image_id in (("images", "id"), ("annotations", "image_id")):
                if section in content:
                    content[section] = [x for x in content[section] if x[image_id] in ids]
            with atomic_write(os.path.join(folder, key)) as file:
                json.dump(content, file)
    if metadata.get("gt_dir"):
        _link_cityscapes(metadata["gt_dir"], records, os.path.join(folder, "gt_dir"))


def _link_cityscapes(gt_dir: str, records: list[dict], folder: str) -> None:
    """Link the files of a few images, because the official scripts evaluate a whole folder."""
    for record in records:
        image = Path(record["file_name"])
        stem = image.name.removesuffix("_leftImg8bit.png")
        city = Path(folder) / image.parent.name
        city.mkdir(parents=True, exist_ok=True)
        for file in (Path(gt_dir) / image.parent.name).glob(f"{stem}_*"):
            (city / file.name).symlink_to(file.resolve())


def _with_test_sets(cfg: CfgNode, parts: dict[str, str]) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = tuple(parts.values())
    cfg.freeze()
    return cfg


def _by_part(parts: dict[str, str], results: dict) -> dict[str, dict]:
    return results if len(parts) > 1 else {part: results for part in parts.values()}


def _check_best_metric(cfg: CfgNode, parts: dict[str, str], results: dict) -> None:
    """Check that the evaluation gives TEST.BEST_METRIC; a training would find out at its first.

    Raises:
        ValueError: it does not.
    """
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    metric = cfg.TEST.get("BEST_METRIC", "")
    if not metric:
        return
    by_part = _by_part(parts, results)
    known = [
        f"{f'{name}/' if len(parts) > 1 else ''}{average}{task}/{value}"
        for name, part in parts.items()
        for average in ("", f"{EMA}/")[: 1 + uses_ema(cfg)]
        for task, values in by_part[part].items()
        for value in values
    ]
    if metric not in known:
        raise unknown_metric(metric, known)


def _describe(parts: dict[str, str], results: dict) -> str:
    if not parts:
        return "nothing: DATASETS.TEST is empty"
    by_part = _by_part(parts, results)
    texts = []
    for name, part in parts.items():
        number = len(DatasetCatalog.get(part))
        metrics = [f"{task}/{next(iter(values))}" for task, values in by_part[part].items()]
        texts.append(f"{number} images of {name}: {', '.join(metrics)}")
    return ", ".join(texts)


# ---- drawing ----


def _draw(cfg: CfgNode, model: torch.nn.Module) -> list[str]:
    """Draw ground truth beside predictions, one image of each test set; returns the files."""
    if evaluates_tiles(cfg):
        return []  # images are too large to draw
    tasks, files = enabled_tasks(cfg), []
    for name in cfg.DATASETS.TEST:
        record = next((r for r in DatasetCatalog.get(name) if _has_gt(r)), None)
        if record is None:
            continue
        metadata = MetadataCatalog.get(name)
        image = read_image(record["file_name"], "RGB")
        scale = _DRAWN_WIDTH / image.shape[1]
        with torch.inference_mode():
            was_training = model.training
            batch = next(b for b in Trainer.build_test_loader(cfg, name) if _is_of(b, record))
            outputs = model.eval()(batch)[0]
            model.train(was_training)
        row = {"image": image}
        for task in tasks:
            if _GT_KEYS[task](record):
                row[f"{task} ground truth"] = _draw_gt(image, record, metadata, task, scale)
            row[f"{task} prediction"] = draw_prediction(
                image, outputs, metadata, task, confidence_threshold=0.0, scale=scale
            )
        folder = os.path.join(cfg.OUTPUT_DIR, "drawings")
        make_folder(folder)
        path = os.path.join(folder, f"{name.removesuffix(_SUFFIX)}.png")
        drawings = [magnify(drawing, _DRAWN_WIDTH / drawing.shape[1]) for drawing in row.values()]
        contact_sheet([drawings], path, list(row))
        files.append(path)
    return files or ["nothing: there is no test image with ground truth"]


def _is_of(batch: list[dict], record: dict) -> bool:
    return batch[0]["file_name"] == record["file_name"]


def _has_gt(record: dict) -> bool:
    return bool(
        record.get("annotations") or record.get("segments_info") or record.get("sem_seg_file_name")
    )


_GT_KEYS: dict[str, Callable[[dict], bool]] = {
    "panoptic": lambda record: "pan_seg_file_name" in record,
    "instance": lambda record: bool(record.get("annotations")),
    "semantic": lambda record: "sem_seg_file_name" in record,
}


def _draw_gt(image: Any, record: dict, metadata: Metadata, task: str, scale: float) -> Any:
    """The ground truth of a task, which the record has."""
    if task == "panoptic":
        return draw_panoptic_gt(image, record, metadata, scale=scale)
    key = "annotations" if task == "instance" else "sem_seg_file_name"
    with isolated_rng(0):
        visualizer = make_visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
        return visualizer.draw_dataset_dict({key: record[key]}).get_image()
