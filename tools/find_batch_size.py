#!/usr/bin/env python
"""Find the largest batch of a process that fits into memory, and what to set for it.

    python tools/find_batch_size.py --config-file configs/... [--num-gpus 8] [KEY VALUE ...]
    python tools/find_batch_size.py --config-file configs/... --memory-limit 8 MODEL.DEVICE cpu

Each size trains for a few iterations in a process of its own: forward, losses, backward, optimiser,
and SOLVER.EMA if it is on. The batch is random, as large as the config's mapper can make it, with
many targets; no data set is read. Sizes double until one does not fit or --max is reached, and are
then bisected.

On a GPU a size fits if no allocation fails. On a CPU it fits if the process stays below
--memory-limit; one that exceeds it is ended. MODEL.CHECKPOINTING "auto" is measured as training
starts, with selective checkpointing. Leave a margin on a GPU that others use as well.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from mask2former.config import load_config
from mask2former.config_parts import has_mask_former, mapped_by
from mask2former.data.dataset_mappers import DETRPanopticDatasetMapper
from mask2former.data.dataset_mappers.base import (
    LargeScaleJitterDatasetMapper,
    ResizeCropDatasetMapper,
)
from mask2former.ema import WeightAverage, uses_ema
from mask2former.preflight import check_device, check_precision
from mask2former.trainer import Trainer
from mask2former.utils.interrupts import run_program
from mask2former.utils.memory import peak_resident_bytes

_POLL_SECONDS = 0.02
# Share of the available memory that a CPU process may take by default.
_SHARE = 0.8


class Measured(NamedTuple):
    """A batch size.

    Attributes:
        size: images.
        peak: bytes at most; None if it did not fit.
        seconds: of an iteration; None if it did not fit.
    """

    size: int
    peak: int | None = None
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        return self.peak is not None


# ---- the batch ----


def largest_image(cfg: CfgNode) -> tuple[int, int]:
    """Height and width in pixels to which the config's mapper can pad a training batch.

    Raises:
        ValueError: the config does not tell.
    """
    if mapped_by(LargeScaleJitterDatasetMapper)(cfg):
        return cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE
    if not mapped_by(ResizeCropDatasetMapper, DETRPanopticDatasetMapper)(cfg):
        raise ValueError(
            f"The images of INPUT.DATASET_MAPPER_NAME {cfg.INPUT.DATASET_MAPPER_NAME!r} may have "
            "any size: name the largest with --size HEIGHT WIDTH."
        )
    crop, sizes = cfg.INPUT.CROP, cfg.INPUT.MIN_SIZE_TRAIN
    short = max(sizes) if isinstance(sizes, list | tuple) else sizes
    if short == 0 and not (crop.ENABLED and crop.TYPE.startswith("absolute")):
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN is 0, so images keep their size: name the largest with --size "
            "HEIGHT WIDTH."
        )
    long = max(cfg.INPUT.MAX_SIZE_TRAIN, short)
    height, width = min(short, cfg.INPUT.MAX_SIZE_TRAIN), long
    if crop.ENABLED and crop.TYPE == "absolute":
        height, width = map(int, crop.SIZE)
    elif crop.ENABLED and crop.TYPE == "absolute_range":
        height = width = int(crop.SIZE[1])
    else:
        if crop.ENABLED and crop.TYPE == "relative":
            height = math.ceil(height * crop.SIZE[0])
            width = math.ceil(width * crop.SIZE[1])
        if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            # A batch may have wide and high images.
            height = width = max(height, width)
    if mapped_by(ResizeCropDatasetMapper)(cfg):
        height, width = (max(side, cfg.INPUT.SIZE_DIVISIBILITY) for side in (height, width))
    return height, width


def random_sample(cfg: CfgNode, height: int, width: int, num_targets: int) -> dict[str, Any]:
    """One training image with random pixels and rectangles as targets."""
    channels = len(cfg.MODEL.PIXEL_MEAN)
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    masks = torch.zeros(num_targets, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(side, ())) for side in (height, width))
        mask[top : top + max(1, height // 4), left : left + max(1, width // 4)] = True
    instances = Instances((height, width))
    instances.gt_classes = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (num_targets,))
    instances.gt_masks = masks
    sample = {"image": image, "instances": instances, "height": height, "width": width}
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    if cfg.INPUT.get("IGNORE_UNLABELLED", False):
        sample["ignored"] = ~masks.any(0)
    return sample


# ---- one size, in a process of its own ----


def limit_memory(device: torch.device, limit: float) -> None:
    """Let this process allocate at most so many GiB of a GPU."""
    total = torch.cuda.get_device_properties(device).total_memory
    # torch refuses a device without an index, as MODEL.DEVICE "cuda" is one.
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / total), device.index)


def measure(cfg: CfgNode, size: int, options: argparse.Namespace) -> Measured:
    """Train on a random batch in this process.

    Args:
        cfg: the config.
        size: images.
        options: of the command line.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    on_gpu = device.type == "cuda"
    if on_gpu and options.memory_limit:
        limit_memory(device, options.memory_limit)
    torch.manual_seed(0)
    height, width = options.size or largest_image(cfg)
    batch = [random_sample(cfg, height, width, options.targets) for _ in range(size)]
    try:
        model = Trainer.build_model(cfg).train()
        optimizer = Trainer.build_optimizer(cfg, model)
        step = Trainer._build_step(cfg, model, [batch] * options.iterations, optimizer)
        step.cudnn_benchmark = on_gpu  # which takes memory too
        average = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if uses_ema(cfg) else None
        seconds = []
        with EventStorage() as storage:
            for step.iter in range(options.iterations):
                storage.iter = step.iter
                start = time.perf_counter()
                step.run_step()
                if average is not None:
                    average.update(model)
                if on_gpu:
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return Measured(size)
    peak = torch.cuda.max_memory_reserved(device) if on_gpu else peak_resident_bytes()
    # The first ones allocate memory and choose algorithms.
    return Measured(size, peak, min(seconds))


def measure_apart(size: int, arguments: list[str], limit: int | None) -> Measured:
    """Run `measure` in a process.

    Args:
        size: images.
        arguments: of this program.
        limit: bytes of resident memory at which the process is ended; None: no limit.

    Raises:
        RuntimeError: the process failed for another reason than memory.
    """
    command = [sys.executable, __file__, "--measure", str(size), *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        exceeded = False
        try:
            while process.poll() is None:
                if limit is not None and _resident_bytes(process.pid) > limit:
                    exceeded = True
                    process.kill()
                    process.wait()
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        # The system ends processes with SIGKILL when its memory is full.
        if exceeded or (limit is not None and process.returncode == -9):
            return Measured(size)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(
                f"The process for a batch of {size} ended with status {process.returncode}:\n"
                f"{errors.read()[-4000:]}"
            )
        output.seek(0)
        measured = Measured(*json.loads(output.read().splitlines()[-1]))
    if limit is not None and measured.fits and measured.peak > limit:
        return Measured(size)
    return measured


def _resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that this machine can give to a process.

    Raises:
        ValueError: the system does not tell.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise ValueError("This system does not tell its memory: set --memory-limit.") from error
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 2**10


# ---- search and advice ----


def search(run: Callable[[int], Measured], maximum: int) -> list[Measured]:
    """Measure sizes until the largest that fits is known.

    Args:
        run: measures a size.
        maximum: largest size to try.

    Returns:
        All sizes tried, in ascending order.
    """
    tried = [run(1)]
    while tried[-1].fits and tried[-1].size < maximum:
        tried.append(run(min(2 * tried[-1].size, maximum)))
    low = max((one.size for one in tried if one.fits), default=0)
    high = min((one.size for one in tried if not one.fits), default=low + 1)
    while high - low > 1:
        middle = run((low + high) // 2)
        tried.append(middle)
        low, high = (middle.size, high) if middle.fits else (low, middle.size)
    return sorted(tried)


def advice(batch: int, largest: int, num_processes: int) -> str:
    """What to set.

    Args:
        batch: SOLVER.IMS_PER_BATCH of the config.
        largest: images of a process that fit.
        num_processes: that share a batch.
    """
    if largest == 0:
        return (
            "Not even one image fits. Smaller images (INPUT.IMAGE_SIZE, INPUT.CROP.SIZE), "
            "MODEL.CHECKPOINTING blocks, SOLVER.AMP.ENABLED True on a GPU or a smaller model need "
            "less."
        )
    total = largest * num_processes
    most = f"Largest batch: SOLVER.IMS_PER_BATCH {total} ({num_processes} process(es) x {largest})."
    share, rest = divmod(batch, num_processes)
    if rest:
        return f"{most} The config's {batch} is not a multiple of {num_processes} processes."
    if share <= largest:
        return f"{most} The config's {batch} fits as it is."
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= largest)
    return (
        f"{most} For the config's {batch}: SOLVER.NUM_ACCUMULATION_STEPS {steps}, each with "
        f"{share // steps} images in each process."
    )


def table(tried: list[Measured]) -> str:
    rows = [
        (one.size, f"{one.peak / 2**30:.2f} GiB", f"{one.seconds:.3f}", one.size / one.seconds)
        if one.peak is not None and one.seconds
        else (one.size, "does not fit", "", "")
        for one in tried
    ]
    headers = ["images", "peak memory", "s/it", "images/s"]
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".2f")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is needed")
    return int(text)


def gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of GiB above 0 is needed")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--num-gpus", type=positive, default=1, help="processes that share a batch [1]"
    )
    parser.add_argument("--max", type=positive, default=64, help="largest size to try [64]")
    parser.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images in pixels [the largest that the config's mapper makes]",
    )
    parser.add_argument("--targets", type=positive, default=50, help="for each image [50]")
    parser.add_argument("--iterations", type=positive, default=3, help="for each size [3]")
    parser.add_argument(
        "--memory-limit",
        type=gibibytes,
        metavar="GIB",
        help=f"memory of a process [all of the GPU; {_SHARE:.0%} of what is available on a CPU]",
    )
    parser.add_argument("--measure", type=positive, help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if not even one image fits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    cfg = load_config(options.config_file, options.opts)
    check_device(cfg)
    if not has_mask_former(cfg):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; this tool makes batches "
            "for MaskFormer and its subclasses."
        )
    if "NUM_ACCUMULATION_STEPS" in cfg.SOLVER:
        cfg.SOLVER.NUM_ACCUMULATION_STEPS = 1
    if options.measure:
        check_precision(cfg)
        print(json.dumps(measure(cfg, options.measure, options)))
        return 0
    height, width = options.size or largest_image(cfg)
    limit = None
    if torch.device(cfg.MODEL.DEVICE).type != "cuda":
        gib = options.memory_limit
        limit = int(gib * 2**30 if gib else _SHARE * available_bytes())
    bound = "" if limit is None else f", at most {limit / 2**30:.2f} GiB"
    print(
        f"Training {cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.DEVICE} with images of {height} x "
        f"{width} pixels and {options.targets} targets{bound}"
    )

    def run(size: int) -> Measured:
        measured = measure_apart(size, arguments, limit)
        text = "does not fit"
        if measured.peak is not None:
            text = f"{measured.peak / 2**30:.2f} GiB, {measured.seconds:.3f} s/it"
        print(f"batch of {size}: {text}", flush=True)
        return measured

    tried = search(run, options.max)
    largest = max((one.size for one in tried if one.fits), default=0)
    print(f"\n{table(tried)}\n\n{advice(cfg.SOLVER.IMS_PER_BATCH, largest, options.num_gpus)}")
    return 0 if largest else 1


if __name__ == "__main__":
    run_program(main)
