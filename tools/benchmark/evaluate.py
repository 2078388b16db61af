"""`evaluate`: mask AP and panoptic quality, our evaluators against the official code.

Ground truth and predictions are random, 480x640: every object is predicted slightly shifted and
mostly with its class; the remaining instances are wrong. The official code is pycocotools and
panopticapi: the same evaluators with `use_fast_impl=False`. Ours is timed only if both give the
same digits. `process` handles the outputs of an image; `evaluate` runs once at the end. All times
are per image.
"""

import argparse
import contextlib
import copy
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import WrongNumbers, try_each
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from options import OURS, add_choices, add_common_options, add_threads_option, positive
from panopticapi.utils import rgb2id
from PIL import Image
from report import Report, failure, table_row
from synthetic_coco import (
    HEIGHT,
    NUM_CLASSES,
    NUM_THINGS,
    WIDTH,
    category_id,
    draw,
    random_polygon,
    write_dataset,
)
from timing import Call, Row, set_threads, take_turns, timed_rows

from mask2former.evaluation import InstanceSegEvaluator, PanopticEvaluator

OFFICIAL = "official"
TASKS = ("segm AP", "PQ")
FULL = {"images": 100, "instances": 100, "rounds": 5}
QUICK = {"images": 10, "instances": 40, "rounds": 3}
_DATASET = "benchmark_evaluate"
_EVALUATORS = {"segm AP": InstanceSegEvaluator, "PQ": PanopticEvaluator}
# Number of images used to time `process`: their masks are kept, and large.
_PROCESSED = 4

Outputs = dict[str, Any]


def register(folder: Path) -> None:
    ids = {category_id(c): c for c in range(NUM_CLASSES)}
    names = [f"class {c}" for c in range(NUM_CLASSES)]
    MetadataCatalog.get(_DATASET).set(
        json_file=str(folder / "instances.json"),
        panoptic_json=str(folder / "panoptic.json"),
        panoptic_root=str(folder / "panoptic"),
        thing_classes=names,
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={k: c for k, c in ids.items() if c < NUM_THINGS},
        stuff_dataset_id_to_contiguous_id=ids,
    )


def predict(record: Row, num_instances: int) -> Outputs:
    """Random predictions, the same for the same image."""
    rng = np.random.default_rng(record["image_id"])
    masks, classes = [], []
    for annotation in record["annotations"][:num_instances]:
        mask = draw(np.reshape(annotation["segmentation"][0], (-1, 2)))
        masks.append(np.roll(mask, rng.integers(-3, 4, 2), (0, 1)))
        classes.append(annotation["category_id"])
    while len(masks) < num_instances:
        masks.append(draw(random_polygon(rng)))
        classes.append(int(rng.integers(NUM_THINGS)))
    wrong = rng.random(num_instances) < 0.1
    classes = np.where(wrong, rng.integers(NUM_THINGS, size=num_instances), classes)
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_masks = torch.from_numpy(np.stack(masks)).float()
    instances.pred_boxes = Boxes(torch.zeros(num_instances, 4))
    instances.scores = torch.from_numpy(rng.random(num_instances))
    instances.pred_classes = torch.from_numpy(classes)

    gt_ids = rgb2id(np.array(Image.open(record["pan_seg_file_name"])))
    ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    infos = []
    for segment in record["segments_info"]:
        if rng.random() < 0.9:
            class_id = segment["category_id"]
            mask = np.roll(gt_ids == segment["id"], rng.integers(-3, 4, 2), (0, 1))
            number = len(infos) + 1
            ids[torch.from_numpy(mask)] = number
            is_thing = class_id < NUM_THINGS
            infos.append({"id": number, "isthing": is_thing, "category_id": class_id})
    visible = set(ids.unique().tolist())
    infos = [info for info in infos if info["id"] in visible]
    return {"instances": instances, "panoptic_seg": (ids, infos)}


class Contender:
    """An evaluator of one task that has processed all images."""

    def __init__(self, task: str, name: str, records: list[Row], options: argparse.Namespace):
        arguments: dict[str, Any] = {"use_fast_impl": name == OURS}
        if task == "segm AP":
            arguments["distributed"] = False
        with _quiet():
            self.evaluator: DatasetEvaluator = _EVALUATORS[task](_DATASET, **arguments)
        self.name = name
        self._outputs: list[tuple[Row, Outputs]] = []
        self.evaluator.reset()
        for index, record in enumerate(records):
            outputs = predict(record, options.instances)
            self._process(record, outputs)
            if index < _PROCESSED:
                self._outputs.append((record, outputs))
        self._predictions = self.evaluator._predictions
        self.num_processed = len(self._outputs)

    def _process(self, record: Row, outputs: Outputs) -> None:
        ids, infos = outputs["panoptic_seg"]
        # Evaluators modify the segments.
        copied = outputs | {"panoptic_seg": (ids, copy.deepcopy(infos))}
        self.evaluator.process([record], [copied])

    def process(self) -> None:
        self.evaluator.reset()
        for record, outputs in self._outputs:
            self._process(record, outputs)

    def prepare(self) -> Call:
        """`evaluate` consumes its predictions, so each call gets a copy."""
        self.evaluator._predictions = copy.deepcopy(self._predictions)
        return self.evaluate

    def evaluate(self) -> dict[str, dict[str, float]]:
        with _quiet():
            return self.evaluator.evaluate()


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def digits(contender: Contender) -> dict[str, str]:
    """All results as exact text, so that NaN equals NaN."""
    contender.prepare()
    (results,) = contender.evaluate().values()
    return {key: repr(float(value)) for key, value in results.items()}


def check_digits(actual: dict[str, str], expected: dict[str, str]) -> None:
    """Raise WrongNumbers unless the digits are the same."""
    if wrong := [key for key in {**expected, **actual} if actual.get(key) != expected.get(key)]:
        key = wrong[0]
        raise WrongNumbers(
            f"{len(wrong)} of {len(expected)} results differ from the official ones: {key} is "
            f"{actual.get(key)}, not {expected.get(key)}"
        )


def run(options: argparse.Namespace) -> int:
    """Measure all evaluators; returns the exit status, see `Report.finish`."""
    set_threads(options.threads)
    columns = {
        "digits": lambda row: row.get("digits", ""),
    }
    row_of = table_row(("task", "part"), (OFFICIAL,), columns)
    head = {key: getattr(options, key) for key in ("images", "instances", "threads")}
    packages = ("pycocotools", "panopticapi-lite")
    total = 2 * len(options.tasks) * options.rounds
    report = Report("evaluate", options, row_of, total, packages, head=head)
    with tempfile.TemporaryDirectory(prefix="benchmark_evaluate") as folder:
        records = write_dataset(Path(folder) / "data", options.images)
        register(Path(folder) / "data")
        try:
            for task in options.tasks:
                report.add(_rows(task, records, options, report))
                report.save()
        finally:
            MetadataCatalog.remove(_DATASET)
    return report.finish()


def _rows(task: str, records: list[Row], options: argparse.Namespace, report: Report) -> list[Row]:
    """Rows of one task."""
    contenders: dict[str, Contender] = {
        OFFICIAL: Contender(task, OFFICIAL, records, options),
    }
    expected = digits(contenders[OFFICIAL])
    shown = {"segm AP": ("AP", "AP50"), "PQ": ("PQ", "SQ", "RQ")}[task]
    report.note(f"{task}: " + ", ".join(f"{key} {float(expected[key]):.3f}" for key in shown))

    def attempt(name: str) -> None:
        contender = Contender(task, name, records, options)
        check_digits(digits(contender), expected)
        contenders[name] = contender

    _, failed = try_each([OURS], attempt)
    contenders = {name: contenders[name] for name in (OURS, OFFICIAL) if name in contenders}
    parts: dict[str, tuple[Callable[[Contender], Call], int, bool]] = {
        "process": (lambda contender: contender.process, min(_PROCESSED, options.images), True),
        "evaluate": (lambda contender: contender.prepare(), options.images, False),
    }
    rows, total = [], {name: [{}] * options.rounds for name in contenders}
    for part, (prepare, images, is_repeatable) in parts.items():
        calls = {name: partial(prepare, contender) for name, contender in contenders.items()}
        samples, _ = take_turns(calls, "cpu", options, report.round, is_repeatable)
        per_image = {
            name: [{clock: value / images for clock, value in times.items()} for times in own]
            for name, own in samples.items()
        }
        rows += timed_rows({"task": task, "part": part}, per_image, (OFFICIAL,))
        # Evaluators do the same work early or late: the sum counts.
        total = {
            name: [
                {clock: value + before.get(clock, 0) for clock, value in times.items()}
                for before, times in zip(total[name], own, strict=False)
            ]
            for name, own in per_image.items()
        }
    rows += timed_rows({"task": task, "part": "both"}, total, (OFFICIAL,))
    for row in rows:
        row["digits"] = "same" if row["contender"] == OURS else ""
    labels = {"task": task, "part": "evaluate"}
    rows += [labels | {"contender": name} | failure(error, True) for name, error in failed.items()]
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, "10 images, 40 instances each, 3 rounds, unless given")
    parser.set_defaults(devices=["cpu"])
    add_threads_option(parser)
    parser.add_argument("--images", type=positive, help="number of images [100]")
    parser.add_argument("--instances", type=positive, help="predicted instances per image [100]")
    add_choices(parser, "tasks", "task", TASKS, TASKS, "what is measured [all]")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    pass
