"""Memory of a training step with losses on whole masks and on points: the paper's Table 5.

    python tools/gpu_steps/loss_memory.py FOLDER [--device cpu] [--size 1024] [--targets 20] ...

The rows of configs/ablations/table5 on their recipe, R50 on COCO: fp16 mixed precision, one image,
no activation checkpointing, as in the paper. The number is torch's peak of a whole step, weights
and optimiser state included, beside the paper's memory per image. On a CPU, which has no such
counter, the steps only run.
"""

import argparse
import gc
import math
import sys
from pathlib import Path

from step_result import make_parser, write_result  # first: it adds the path of the benchmark

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch
from ablation_page import Row, read_tables
from detectron2.modeling import build_model
from run_ablations import CONFIGS, write_row_config
from train import Step, make_batch

from mask2former.config import load_config
from mask2former.utils.seeding import seed_all

BASE = CONFIGS / "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
# The rows whose memory the paper sets against each other: 18 and 6 GB an image.
RATIO = ("match masks, train masks", "match points, train points")


def peak_of(row: Row, options: argparse.Namespace) -> int | None:
    """Bytes of a step of a row; None on a CPU.

    Raises:
        ValueError: a loss is not finite.
    """
    config = options.folder / f"{row.slug}.yaml"
    write_row_config(row, Path(options.config), config)
    seed_all(1)
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    size, classes = (options.size, options.size), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    inputs = make_batch(size, 1, options.targets, classes, options.device)
    model = build_model(cfg)
    step = Step("no checkpointing", cfg, model, options, options.device, inputs, "fp16")
    step.warm_up()
    losses = {name: float(loss) for name, loss in step.losses().items()}
    if wrong := {name: loss for name, loss in losses.items() if not math.isfinite(loss)}:
        raise ValueError(f"losses of {row.name!r} are not finite: {wrong}")
    if options.device == "cpu":
        step.run()
        return None
    torch.cuda.reset_peak_memory_stats()
    step.run()
    return torch.cuda.max_memory_allocated()


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=1024, help="of the square image [1024]")
    parser.add_argument("--targets", type=int, default=20, help="objects in it [20]")
    parser.add_argument("--config", default=str(BASE), metavar="FILE", help="recipe of the rows")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = read_tables(CONFIGS / "ablations/paper.yaml")["5"].rows
    numbers: dict[str, str] = {}
    peaks: dict[str, int] = {}
    for row in rows:
        try:
            peak = peak_of(row, options)
        except torch.OutOfMemoryError:
            text = "more than this GPU has"
        else:
            text = "not measured on a CPU" if peak is None else f"{peak / 2**30:.2f} GiB"
            if peak is not None:
                peaks[row.name] = peak
        numbers[row.name] = f"{text} (paper: {row.paper['memory']:g} GB)"
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        # After every row, since the step may run out of time.
        write_result(options.folder, numbers)
    if set(RATIO) <= peaks.keys():
        numbers["masks : points"] = f"{peaks[RATIO[0]] / peaks[RATIO[1]]:.2f} (paper: 3)"
        write_result(options.folder, numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
