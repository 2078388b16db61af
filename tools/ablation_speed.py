"""Rows of a table of speed: a trained model, evaluated with other settings of inference and timed.

A part of tools/run_ablations.py.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ablation_page import Row, Run
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.data.loader import build_test_loader
from mask2former.utils.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 16
NUM_ROUNDS = 7
_WEIGHTS = "model_final.pth"


def test_opts(row: Row, run: Run) -> list[str]:
    """Overrides of inference: those of the training and the settings of the row."""
    return [*run.opts, *(str(x) for x in itertools.chain.from_iterable(row.test.items()))]


def evaluate(row: Row, run: Run, num_gpus: int) -> Path:
    """Evaluate a trained model with the settings of a row, unless that is done.

    Args:
        row: with settings of inference.
        run: its finished training.
        num_gpus: 0 on a CPU.

    Returns:
        The folder with evaluation.json.

    Raises:
        subprocess.CalledProcessError: the evaluation failed.
    """
    folder = run.folder / "test" / row.slug
    settings = folder / "settings.json"
    own = json.dumps(dict(row.test))
    if settings.is_file() and settings.read_text() == own:
        return folder
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--eval-only"]
    command += ["--config-file", str(run.config), "--num-gpus", str(num_gpus)]
    command += [*test_opts(row, run), "OUTPUT_DIR", str(folder), "MODEL.WEIGHTS"]
    subprocess.run([*command, str(run.folder / _WEIGHTS)], check=True)
    with atomic_write(str(settings)) as file:  # last: it stands for a finished evaluation
        file.write(own)
    return folder


def measure(trained: list[tuple[Row, Run]]) -> list[dict[str, float]]:
    """Latency of inference on the first images of the test set, one at a time.

    Rows take turns, so that a machine that is busy for a while slows down all of them, and the
    fastest of the rounds counts for each image. On a CPU it is the CPU time on one thread, which
    does not include waiting for other programs.

    Args:
        trained: rows and their finished trainings; timed in this process, on the MODEL.DEVICE of
            their configs.

    Returns:
        Per row `latency`, the mean over images in milliseconds, post-processing included;
        `relative` to the first row; `queries`, the mean number in the last prediction.
    """
    models, inputs = [], []
    for row, run in trained:
        cfg = load_config(str(run.config), test_opts(row, run))
        model = build_model(cfg).eval()
        Mask2FormerCheckpointer(model).load(str(run.folder / _WEIGHTS))
        models.append(model)
        inputs.append(_first_images(cfg))
    best = [[float("inf")] * len(images) for images in inputs]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(NUM_ROUNDS):
        for i in range(len(inputs[0])):  # the same image in all rows
            for model, images, times in zip(models, inputs, best, strict=True):
                times[i] = min(times[i], _seconds(model, images[i]))
    torch.set_num_threads(num_threads)
    results = []
    for model, images, times in zip(models, inputs, best, strict=True):
        latency = 1000 * statistics.mean(times)
        queries = statistics.mean(_num_queries(model, image) for image in images)
        results.append({"latency": latency, "queries": queries})
    return [result | {"relative": result["latency"] / results[0]["latency"]} for result in results]


def _first_images(cfg: CfgNode) -> list[list[dict[str, Any]]]:
    """Batches of one."""
    (name,) = cfg.DATASETS.TEST
    cfg.DATALOADER.NUM_WORKERS = 0
    return list(itertools.islice(build_test_loader(cfg, name), NUM_IMAGES))


@torch.inference_mode()
def _seconds(model: Any, batch: list[dict[str, Any]]) -> float:
    if model.device.type != "cuda":
        start = time.thread_time()
        model(batch)
        return time.thread_time() - start
    torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    model(batch)
    torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


@torch.inference_mode()
def _num_queries(model: Any, batch: list[dict[str, Any]]) -> int:
    """Queries of the last prediction."""
    numbers: list[int] = []
    # Takes the place of post-processing.
    model.forward_inference = lambda outputs, *_: numbers.append(outputs["pred_logits"].shape[1])
    try:
        model(batch)
    finally:
        del model.forward_inference
    return numbers[0]
