"""`data`: mappers, from a record of the data set to a training sample.

Images are random, 480x640, with files in COCO's formats. The mappers are those of the COCO panoptic
and instance recipes (large-scale jittering) and of the ADE20K semantic one. `upstream steps` are
the functions of `upstream_mappers.py`; `expanded` is ours with the masks unpacked, which otherwise
happens on the device. The same random numbers give the same samples, which is checked first.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import WrongNumbers, try_each
from options import OURS, UPSTREAM, add_choices, add_common_options, positive
from report import Report, failure, table_row
from synthetic_coco import write_dataset
from timing import Call, Row, set_threads, take_turns, timed_rows
from upstream_mappers import instance_sample, panoptic_sample, semantic_sample

from mask2former.config import load_config
from mask2former.data.dataset_mappers import build_mapper

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {
    "panoptic": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "instance": "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "semantic": "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
}
_READ = {
    "panoptic": ("pan_seg_file_name", "segments_info"),
    "instance": ("annotations",),
    "semantic": ("sem_seg_file_name",),
}
FULL = {"images": 32, "rounds": 7}
QUICK = {"images": 8, "rounds": 3}
EXPANDED = "expanded"

Mapper = Callable[[Row], Row]


def make_mappers(task: str, options: argparse.Namespace) -> dict[str, Mapper]:
    """The contenders."""
    cfg = load_config(str(CONFIGS / RECIPES[task]))
    if task != "semantic":
        cfg.INPUT.IMAGE_SIZE = options.jitter
    ours = build_mapper(cfg)
    upstream = {
        "panoptic": panoptic_sample,
        "instance": instance_sample,
        "semantic": partial(
            semantic_sample,
            padded_size=cfg.INPUT.SIZE_DIVISIBILITY,
            ignore_label=getattr(ours, "ignore_label", None),
        ),
    }[task]

    def expanded(record: Row) -> Row:
        sample = ours(record)
        _ = sample["instances"].gt_masks
        return sample

    return {
        OURS: ours,
        EXPANDED: expanded,
        UPSTREAM: partial(upstream, augmentations=ours.tfm_gens),
    }


def seed() -> None:
    random.seed(0)
    np.random.seed(0)


def map_all(mapper: Mapper, records: list[Row]) -> None:
    seed()
    for record in records:
        mapper(record)


def check_samples(name: str, mappers: dict[str, Mapper], records: list[Row]) -> None:
    """Raise WrongNumbers unless a mapper gives the same samples as ours."""

    def tensors(sample: Row) -> dict[str, Any]:
        fields = sample | sample["instances"].get_fields()
        return {k: fields[k] for k in ("image", "gt_classes", "gt_masks")}

    for record in records:
        seed()
        expected = tensors(mappers[OURS](record))
        seed()
        for key, actual in tensors(mappers[name](record)).items():
            if not torch.equal(actual, expected[key]):
                raise WrongNumbers(f"{key} of {Path(record['file_name']).name} differs from {OURS}")


def run(options: argparse.Namespace) -> int:
    """Measure all mappers; returns the exit status, see `Report.finish`."""
    set_threads(1)  # as in the processes that load data
    columns = {
        "samples/s/core": lambda row: (
            f"{options.images / row['cpu_seconds']['median']:.1f}" if "cpu_seconds" in row else ""
        )
    }
    row_of = table_row(("part",), (UPSTREAM,), columns)
    total = len(options.mappers) * options.rounds
    head = {"images": options.images, "jitter": options.jitter}
    report = Report("data", options, row_of, total, ("pillow", "opencv-python-headless"), head=head)
    with tempfile.TemporaryDirectory(prefix="benchmark_data") as folder:
        records = write_dataset(Path(folder), options.images)
        for task in options.mappers:
            keys = ("file_name", "image_id", "height", "width", *_READ[task])
            inputs = [{key: record[key] for key in keys} for record in records]
            mappers = make_mappers(task, options)
            check = partial(check_samples, mappers=mappers, records=inputs[:8])
            usable, failed = try_each([EXPANDED, UPSTREAM], check)
            timed = {name: partial(map_all, mappers[name], inputs) for name in (OURS, *usable)}
            calls: dict[str, Callable[[], Call]] = {
                name: lambda call=call: call for name, call in timed.items()
            }
            samples, _ = take_turns(calls, "cpu", options, report.round)
            report.add(timed_rows({"part": task}, samples, (UPSTREAM,)))
            report.add(
                {"part": task, "contender": name} | failure(error, True)
                for name, error in failed.items()
            )
            report.save()
    return report.finish()


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, "8 images, 3 rounds, unless given")
    parser.set_defaults(devices=["cpu"])
    parser.add_argument("--images", type=positive, help="number of images [32]")
    parser.add_argument(
        "--jitter", type=positive, default=1024, help="side of the jittered square [1024]"
    )
    add_choices(parser, "mappers", "mapper", list(RECIPES), list(RECIPES), "what is loaded [all]")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    pass
