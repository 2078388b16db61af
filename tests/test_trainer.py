"""Training: exact resuming, several processes, and the checks before a run."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training as toy
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from mask2former.evaluation import write_results
from mask2former.trainer import Trainer

TOY = Path(__file__).parent / "toy_training.py"
# Metrics that depend on the clock.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}


@pytest.fixture(autouse=True)
def show_logs(caplog):
    """Without a level the trainer would set up Detectron2's loggers, which bypass caplog."""
    caplog.set_level(logging.INFO)


class Stop(HookBase):
    """Interrupts a run in this process, before the given iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def run(output_dir, *options, resume=False, stop_before=None):
    torch.manual_seed(100 if resume else 0)
    trainer = toy.ToyTrainer(toy.toy_config(output_dir, *options))
    trainer.resume_or_load(resume=resume)
    if stop_before is None:
        trainer.train()
    else:
        trainer.register_hooks([Stop(stop_before)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


def start_program(*arguments, launcher=(), cwd=None):
    """Runs the toy training as a separate program, as a user would."""
    root = str(TOY.parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(TOY), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def metrics(output_dir):
    """Iteration → its last row of metrics.json, without TIMES."""
    rows = map(json.loads, (Path(output_dir) / "metrics.json").read_text().splitlines())
    return {r["iteration"]: {k: v for k, v in r.items() if k not in TIMES} for r in rows}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("DATALOADER.NUM_WORKERS", "2", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
        ("SOLVER.OPTIMIZER", "SGD", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    ],
)
def test_resume_is_exact(tmp_path, options):
    """Interrupted at iteration 27; the last checkpoint is of 14. The seed is random."""
    interrupted = run(tmp_path / "resumed", *options, stop_before=27)
    resumed = run(tmp_path / "resumed", *options, resume=True)
    assert resumed.start_iter == 15
    assert resumed.seed == interrupted.seed
    run(tmp_path / "whole", *options, "SEED", str(interrupted.seed))

    expected = toy.read_losses(tmp_path / "whole")
    assert len(expected) == len(set(expected.values())) == 45
    # Iterations 15 to 26 ran twice; read_losses compares them.
    assert toy.read_losses(tmp_path / "resumed") == expected
    rows = metrics(tmp_path / "whole")
    assert list(rows) == [19, 39, 44]
    # The interrupt wrote one more row. Row 19 needs values from before the checkpoint.
    assert {i: row for i, row in metrics(tmp_path / "resumed").items() if i in rows} == rows


@pytest.mark.parametrize("scheduler", ["WarmupPolyLR", "WarmupMultiStepLR"])
def test_checkpoint_with_a_group_for_each_parameter(tmp_path, scheduler):
    """The layout of the original release's training checkpoints; the losses are the same."""
    options = ("SOLVER.LR_SCHEDULER_NAME", scheduler, "SEED", "7")
    run(tmp_path, *options, stop_before=27)
    path = tmp_path / (tmp_path / "last_checkpoint").read_text().strip()
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["trainer"]
    optimizer, rates = state["_trainer"]["optimizer"], state["hooks"]["LRScheduler"]
    groups = optimizer["param_groups"]
    assert max(len(group["params"]) for group in groups) > 1
    optimizer["param_groups"] = [g | {"params": [i]} for g in groups for i in g["params"]]
    for key in {"base_lrs", "_last_lr"} & rates.keys():
        pairs = zip(rates[key], groups, strict=True)
        rates[key] = [rate for rate, group in pairs for _ in group["params"]]
    torch.save(checkpoint, path)
    resumed = run(tmp_path, *options, resume=True)
    assert resumed.start_iter == 15
    assert len(resumed.scheduler.base_lrs) == len(groups)
    run(tmp_path / "whole", *options)
    expected = toy.read_losses(tmp_path / "whole")
    assert toy.read_losses(tmp_path) == expected


def test_seed_order_and_noise_change_the_losses(tmp_path):
    """Otherwise the test above could pass because nothing is random."""
    curves = [
        toy.read_losses(run(tmp_path / name, *options, "SOLVER.MAX_ITER", "6").cfg.OUTPUT_DIR)
        for name, options in {
            "a": ("SEED", "1"),
            "same": ("SEED", "1"),
            "other seed": ("SEED", "2"),
            "grouped": ("SEED", "1", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
            "no noise": ("SEED", "1", "MODEL.MASK_FORMER.DROPOUT", "0.0"),
        }.items()
    ]
    assert curves[0] == curves[1]
    assert len({str(curve) for curve in curves}) == 4


def test_resume_after_kill(tmp_path):
    """`kill -9` while writing the checkpoint of iteration 29, with loader processes."""
    options = ("SEED", "3", "DATALOADER.NUM_WORKERS", "2")
    killed = start_program("--kill-at", 29, tmp_path, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000014.pth"
    run(tmp_path, *options, resume=True)
    # Iterations 15 to 28 ran before the kill and again after it; read_losses compares them.
    assert sorted(toy.read_losses(tmp_path)) == list(range(45))


def test_two_processes_train_like_one(tmp_path):
    """The same losses as one process with the same total batch, within 1e-5.

    Rounding differs, because the mean of two workers' means has another order of summation.
    """
    options = ("SEED", "3", "SOLVER.IMS_PER_BATCH", "4", "MODEL.MASK_FORMER.DROPOUT", "0.0")
    options += ("SOLVER.MAX_ITER", "20")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = start_program(tmp_path / "both", *options, launcher=launcher)
    assert both.returncode == 0, both.stderr
    run(tmp_path / "one", *options)
    expected, actual = toy.read_losses(tmp_path / "one"), toy.read_losses(tmp_path / "both")
    assert len(expected) == len(actual) == 20
    for iteration, line in expected.items():
        for (name, value), (_, other) in zip(eval(line), eval(actual[iteration]), strict=True):
            assert other == pytest.approx(value, rel=1e-5, abs=1e-6), (iteration, name)
    assert "Effective batch size 4 = 2 process(es) x 2 images" in (both.stdout + both.stderr)


def test_seed_of_the_config_takes_precedence(tmp_path, caplog):
    options = ("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "3")
    run(tmp_path, "SEED", "1", *options, stop_before=2)
    trainer = run(tmp_path, "SEED", "2", *options, resume=True)
    assert trainer.seed == 2
    assert "had seed 1, but SEED is 2" in caplog.text


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    trainer = run(tmp_path, "SOLVER.MAX_ITER", "2", resume=True)
    assert trainer.start_iter == 0


def test_resume_with_more_iterations(tmp_path):
    """The schedule continues to the new end; Detectron2's fails beyond the old one."""
    run(tmp_path, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0")
    run(tmp_path, "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "0", resume=True)
    assert sorted(toy.read_losses(tmp_path)) == [0, 1, 2, 3]
    # The learning rate written is the backbone's, a tenth of SOLVER.BASE_LR.
    assert metrics(tmp_path)[3]["lr"] == pytest.approx(0.001 * (1 - 3 / 4) ** 0.9)


def test_foreign_loader(tmp_path, caplog):
    """Subclasses may use Detectron2's loader: they train, with a warning when resuming."""

    class Foreign(toy.ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=toy.augment)

    cfg = toy.toy_config(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "4")
    interrupted = Foreign(cfg)
    interrupted.register_hooks([Stop(2)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert "samples come in another order" not in caplog.text
    resumed = Foreign(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "samples come in another order" in caplog.text
    assert sorted(toy.read_losses(tmp_path)) == [0, 1, 2, 3]


def test_start_is_logged(tmp_path, caplog):
    toy.ToyTrainer(toy.toy_config(tmp_path, "SEED", "4"))
    line = "Effective batch size 2 = 1 process(es) x 2 images, base learning rate 0.01, 45 iterat"
    assert line in caplog.text
    assert "seed 4" in caplog.text


def test_mixed_precision_on_a_cpu(tmp_path, caplog):
    run(tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "2")
    warnings = [r.getMessage() for r in caplog.records if "AMP" in r.getMessage()]
    assert len(warnings) == 1
    assert "Training in float32" in warnings[0]


@pytest.mark.gpu
def test_resume_is_exact_in_mixed_precision(tmp_path):
    options = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "SEED", "3")
    run(tmp_path / "whole", *options)
    run(tmp_path / "resumed", *options, stop_before=27)
    run(tmp_path / "resumed", *options, resume=True)
    assert toy.read_losses(tmp_path / "resumed") == toy.read_losses(tmp_path / "whole")


def test_batch_that_does_not_divide(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)

    class NoModel(toy.ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            raise AssertionError("checked too late")

    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 6, .* number of workers, 4"):
        NoModel(toy.toy_config(tmp_path, "SOLVER.IMS_PER_BATCH", "6"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda'.* add `MODEL.DEVICE cpu`"):
        toy.ToyTrainer(toy.toy_config(tmp_path, "MODEL.DEVICE", "cuda"))


class CountImages(DatasetEvaluator):
    def reset(self):
        self.images, self.without_autograd = 0, 0

    def process(self, inputs, outputs):
        self.images += len(outputs)
        self.without_autograd += sum(x["sem_seg"].is_inference() for x in outputs)

    def evaluate(self):
        counts = {"images": self.images, "without_autograd": self.without_autograd}
        return {"sem_seg": counts | {"mIoU": float("nan")}}


def test_periodic_evaluation_is_written(tmp_path):
    class Evaluating(toy.ToyTrainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            return [[toy.augment(record)] for record in toy.load_toy_dataset()]

        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return CountImages()

    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "3")
    trainer = Evaluating(toy.toy_config(tmp_path, *options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    written = json.loads((tmp_path / "evaluation.json").read_text())
    counts = {"images": 11.0, "without_autograd": 11.0}
    assert written == {"toy_train": {"sem_seg": counts | {"mIoU": None}}}


def test_results_of_several_datasets(tmp_path):
    results = {"a": {"segm": {"AP": 1}}, "b": {}}
    write_results(str(tmp_path), results)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "a": {"segm": {"AP": 1.0}},
        "b": {},
    }


def test_unknown_test_set_is_noticed_before_training(tmp_path):
    with pytest.raises(ValueError, match="'toy_trian' is not registered; did you mean toy_train"):
        toy.ToyTrainer(toy.toy_config(tmp_path, "DATASETS.TEST", "('toy_trian',)"))


def test_empty_test_set(tmp_path):
    MetadataCatalog.get("toy_empty").image_root = "/images"
    toy.DatasetCatalog.register("toy_empty", lambda: [])
    try:
        with pytest.raises(ValueError, match="toy_empty.*is empty.*image_root=/images"):
            Trainer.build_test_loader(toy.toy_config(tmp_path), "toy_empty")
    finally:
        toy.DatasetCatalog.remove("toy_empty")
        MetadataCatalog.remove("toy_empty")
