"""Train the R50 recipe of COCO panoptic on random images with the project's Trainer.

    python tools/gpu_steps/trainer.py FOLDER [--device cpu] [--iterations 40] [--config FILE] ...

fp16 mixed precision, two images of 1024 x 1024, from random weights. Reports seconds an iteration
(median of the last half), peak memory, the final scale of the loss, and the host syncs of one step
with their places. Three steps are profiled: profile.txt, and trace.json.gz unless it is too large.
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from step_result import make_parser, write_result
from synthetic_coco import NUM_CLASSES, NUM_THINGS, write_dataset

from mask2former.config import load_config
from mask2former.hooks import READING_PERIODS
from mask2former.trainer import Trainer
from mask2former.utils.seeding import seed_all

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
DATASET = "gpu_check_train"
PROFILED = 3
MAX_TRACE_BYTES = 12 * 2**20


def register(folder: Path, num_images: int) -> None:
    records = write_dataset(folder, num_images)
    DatasetCatalog.register(DATASET, lambda: records)
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    MetadataCatalog.get(DATASET).set(
        thing_classes=names[:NUM_THINGS],
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(NUM_THINGS)},
        stuff_dataset_id_to_contiguous_id={i + 1: i for i in range(NUM_CLASSES)},
    )


class Measure(HookBase):
    """Times all steps, counts the syncs of one and profiles the next three.

    Args:
        folder: for the profile.
        iterations: of the run.
        on_gpu: whether syncs can be counted.
    """

    def __init__(self, folder: Path, iterations: int, on_gpu: bool):
        self.folder, self.on_gpu = folder, on_gpu
        self.watched = iterations // 4
        self.last_profiled = min(self.watched + PROFILED, iterations - 1)
        self.seconds: list[float] = []
        self.syncs: Counter[str] = Counter()
        self.trace = ""

    def before_step(self) -> None:
        if self.trainer.iter == self.watched and self.on_gpu:
            self._caught = warnings.catch_warnings(record=True)
            self._warnings = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if self.trainer.iter == self.watched + 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] * self.on_gpu
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.__enter__()
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        if self.trainer.iter == self.watched and self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.syncs.update(
                f"{Path(x.filename).name}:{x.lineno}"
                for x in self._warnings
                # Torch also warns, once, that this mode is a prototype.
                if "called a synchronizing" in str(x.message)
            )
        if self.trainer.iter == self.last_profiled and self.last_profiled > self.watched:
            self._profile.__exit__(None, None, None)
            self._write_profile()

    def _write_profile(self) -> None:
        averages = self._profile.key_averages()
        keys = ["self_device_time_total", "self_cpu_time_total"] if self.on_gpu else []
        tables = [averages.table(sort_by=k, row_limit=40, max_name_column_width=70) for k in keys]
        text = "\n".join(tables or [averages.table(row_limit=40)])
        (self.folder / "profile.txt").write_text(text)
        trace = self.folder / "trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        size = trace.stat().st_size
        self.trace = f"{size / 2**20:.1f} MiB"
        if size > MAX_TRACE_BYTES:
            trace.unlink()
            self.trace += ", not kept"


# Otherwise the trainer would write losses at once, as for any hook that may read them.
READING_PERIODS[Measure] = None


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--size", type=int, default=1024, help="of the square crops [1024]")
    parser.add_argument("--config", default=str(RECIPE), metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="of the config")
    options = parser.parse_intermixed_args()
    on_gpu, folder = options.device == "cuda", options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        register(Path(data), 32 if on_gpu else 4)
        values = {
            "MODEL.DEVICE": options.device,
            "MODEL.WEIGHTS": "",
            "DATASETS.TRAIN": (DATASET,),
            "DATASETS.TEST": (),
            "DATALOADER.NUM_WORKERS": 6 if on_gpu else 0,
            "INPUT.IMAGE_SIZE": options.size,
            "SOLVER.AMP.ENABLED": True,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": options.iterations,
            "SOLVER.STEPS": (),
            "SEED": 1,
            "OUTPUT_DIR": f"{data}/output",
        }
        opts = [part for pair in values.items() for part in pair]
        seed_all(1)  # of the initial weights
        trainer = Trainer(load_config(options.config, [*opts, *options.opts]))
        # No checkpoint is written at the end.
        trainer._hooks = [x for x in trainer._hooks if "Checkpointer" not in type(x).__name__]
        measure = Measure(folder, options.iterations, on_gpu)
        trainer.register_hooks([measure])
        begin = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - begin
    losses = trainer.storage.history("total_loss").values()
    last = measure.seconds[len(measure.seconds) // 2 :]
    numbers = {
        "s/it": f"{statistics.median(last):.4g} (median of the last {len(last)})",
        "training": f"{total:.1f} s, {options.iterations} iterations of 2 images",
        "loss": f"{losses[0][0]:.4g} to {losses[-1][0]:.4g}",
        "trace": measure.trace,
    }
    if on_gpu:
        numbers |= {
            "peak": f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB",
            "scale": trainer._trainer.grad_scaler.get_scale(),
            "host syncs": sum(measure.syncs.values()),
            "at": json.dumps(dict(measure.syncs.most_common(12))),
        }
    write_result(folder, numbers)
    return int(not all(value == value and abs(value) != float("inf") for value, _ in losses))


if __name__ == "__main__":
    sys.exit(main())
