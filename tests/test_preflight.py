"""The checks before a run: each runs once, and a mistake ends the run before it starts."""

import json
import logging
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import forked
import own_data
import pytest
import torch
import toy_training as toy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

from mask2former import config as config_module
from mask2former import launch as launch_module
from mask2former import preflight
from mask2former.config import load_config
from mask2former.launch import launch, main, setup
from mask2former.preflight import check_run, load_and_check
from mask2former.trainer import Trainer, has_own_evaluators

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
CHECKS = (
    "check_config",
    "check_device",
    "check_dataset_names",
    "check_evaluator_types",
    "check_batch_size",
    "check_class_counts",
)
ONCE = dict.fromkeys(CHECKS, 1)


pytestmark = pytest.mark.usefixtures("restore_loggers")


@pytest.fixture(autouse=True)
def catalogs(monkeypatch, caplog):
    """Names that a test registers are gone afterwards."""
    caplog.set_level(logging.INFO)
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def counts(monkeypatch):
    """How often each check has run."""
    counts = Counter()

    def counted(name, check):
        def wrapper(*args):
            counts[name] += 1
            return check(*args)

        return wrapper

    for name in CHECKS:
        wrapper = counted(name, getattr(preflight, name))
        for module in (preflight, config_module):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, wrapper)
    return counts


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(toy.toy_config(tmp_path / "output", "SOLVER.MAX_ITER", "2").dump())
    return str(path)


def parse(*arguments):
    return default_argument_parser().parse_args(list(arguments))


def test_once_through_launch(toy_file, counts, monkeypatch):
    monkeypatch.setattr(launch_module, "Trainer", toy.ToyTrainer)
    launch(main, parse("--config-file", toy_file))
    assert counts == ONCE
    assert Path(toy_file).with_name("output").joinpath("model_final.pth").is_file()


def test_once_in_an_evaluation(toy_file, counts, monkeypatch):
    monkeypatch.setattr(launch_module, "Trainer", toy.ToyTrainer)
    read = []
    monkeypatch.setattr(
        preflight, "check_ground_truth", lambda cfg, dataset_name: read.append(dataset_name)
    )
    opts = ["DATASETS.TEST", "('shapes_val_sem_seg',)"]
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        launch(main, parse("--config-file", toy_file, "--eval-only", *opts))
    assert counts == {name: 1 for name in CHECKS if name != "check_batch_size"}
    assert read == ["shapes_val_sem_seg"]


def test_once_without_launch(toy_file, counts, tmp_path):
    """Scripts that build the trainer themselves, with a config from either source."""
    toy.ToyTrainer(load_config(toy_file))
    assert counts == ONCE
    counts.clear()
    toy.ToyTrainer(load_and_check(toy_file))
    assert counts == ONCE
    counts.clear()
    toy.ToyTrainer(toy.toy_config(tmp_path))
    assert counts == ONCE


def test_once_in_main(toy_file, counts, monkeypatch):
    """`main` called by a script, which has not checked anything."""
    monkeypatch.setattr(launch_module, "Trainer", toy.ToyTrainer)
    main(parse("--config-file", toy_file))
    assert counts == ONCE


def test_own_program_checks_the_rest_later(toy_file, counts):
    """A program of your own may register data sets in the processes that `launch` starts."""

    def program(args):
        DatasetCatalog.register("late", toy.load_toy_dataset)
        cfg = setup(args)
        assert counts == {"check_config": 1, "check_device": 1, "check_class_counts": 1}
        toy.ToyTrainer(cfg)

    launch(program, parse("--config-file", toy_file, "DATASETS.TRAIN", "('late',)"))
    # Again, with the data set that was registered in between.
    assert counts == ONCE | {"check_class_counts": 2}


def test_passed_checks_survive_copies_but_not_changes(toy_file, counts):
    cfg = load_and_check(toy_file)
    keys = set(cfg)
    text = cfg.dump()
    cfg.freeze()
    check_run(pickle.loads(pickle.dumps(cfg.clone())))
    assert counts == ONCE
    assert (set(cfg), cfg.dump()) == (keys, text)

    changed = cfg.clone()
    changed.defrost()
    changed.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 0"):
        check_run(changed)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 0"):  # a failure is not kept
        check_run(changed)
    counts.clear()
    check_run(cfg)
    assert not counts
    check_run(cfg, num_workers=2)
    assert counts == {"check_batch_size": 1}


def test_values_that_processes_change_are_used(toy_file):
    """`setup` does not take the handed-over config for other arguments."""
    seen = []

    def program(args):
        assert "checked config" in repr(args)
        seen.append(setup(args).SOLVER.MAX_ITER)
        args.opts += ["SOLVER.MAX_ITER", "7"]
        seen.append(setup(args).SOLVER.MAX_ITER)

    args = parse("--config-file", toy_file, "SOLVER.MAX_ITER", "5")
    launch(program, args)
    assert seen == [5, 7]
    assert "checked" not in vars(args)


def test_purposes(toy_file, counts):
    """Evaluation needs no training data, drawing only the first test set."""
    opts = ["DATASETS.TRAIN", "('absent',)", "SOLVER.IMS_PER_BATCH", "0"]
    load_and_check(toy_file, opts, "evaluate")
    assert counts["check_batch_size"] == 0
    test = ["DATASETS.TEST", f"('{toy.DATASET}', 'absent')"]
    load_and_check(toy_file, [*opts, *test], "predict")
    with pytest.raises(ValueError, match="'absent' is not registered"):
        load_and_check(toy_file, [*opts, *test], "evaluate")
    with pytest.raises(ValueError, match="'absent' is not registered"):
        load_and_check(toy_file, opts, "train")


def test_batch_size_of_processes_to_be_started(toy_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = parse("--config-file", toy_file, "--num-gpus", "4", "SOLVER.IMS_PER_BATCH", "6")
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 6, .* number of workers, 4"):
        launch(main, args)
    # It is for REFERENCE_WORLD_SIZE processes where that is set.
    reference = ["SOLVER.REFERENCE_WORLD_SIZE", "3", "SOLVER.IMS_PER_BATCH", "6"]
    load_and_check(toy_file, reference, num_workers=4)


def test_unknown_evaluator_type(toy_file, counts):
    MetadataCatalog.get(toy.DATASET).evaluator_type = "depth"
    opts = ["DATASETS.TEST", f"('{toy.DATASET}',)"]
    expected = (
        "Data set 'toy_train' has evaluator_type 'depth' in its metadata; known: sem_seg, coco, "
        ".*cityscapes_panoptic_seg. For others call .*register_evaluator_type or override "
        "Trainer.build_evaluator"
    )
    for purpose in ("train", "evaluate"):
        with pytest.raises(ValueError, match=expected):
            load_and_check(toy_file, opts, purpose)

    class Own(toy.ToyTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            raise NotImplementedError

    cfg = load_config(toy_file, opts)
    with pytest.raises(ValueError, match=expected):
        toy.ToyTrainer(cfg)
    counts.clear()
    Own(cfg)
    assert counts["check_evaluator_types"] == 0


def test_nothing_to_evaluate_is_noticed_before_training():
    opts = ["DATASETS.TEST", "('shapes_val_sem_seg',)", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False"]
    with pytest.raises(ValueError, match="Nothing to evaluate on 'shapes_val_sem_seg'"):
        load_and_check(str(SHAPES), opts)


def test_own_evaluators(monkeypatch):
    assert not has_own_evaluators(Trainer)
    assert not has_own_evaluators(toy.ToyTrainer)
    monkeypatch.setattr(Trainer, "build_evaluator", classmethod(lambda *args: None))
    assert has_own_evaluators(Trainer)
    assert has_own_evaluators(toy.ToyTrainer)


# Two processes; in each, a check that runs again fails.
PROGRAM = """
import json, sys
from detectron2.utils import comm
from detectron2.data import DatasetCatalog
from mask2former import config, launch, preflight

def extend(cfg):
    cfg.MODEL.OF_MINE = 3

def refuse(*args):
    raise AssertionError("checked again")

def main(args):
    for name in {checks}:
        for module in (config, preflight):
            setattr(module, name, refuse)
    cfg = launch.setup(args)
    preflight.check_run(cfg, "unknown")
    seen = [cfg.MODEL.OF_MINE, len(DatasetCatalog.get("own_train"))]
    with open(f"{{cfg.OUTPUT_DIR}}/rank{{comm.get_rank()}}.json", "w") as file:
        json.dump(seen, file)

if __name__ == "__main__":
    launch.run(main, extend_config=extend)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="spawns CPU processes, without a GPU only")
def test_spawned_processes_get_the_checked_config(tmp_path):
    own_data.instances(tmp_path)
    config = f"""
_BASE_: {SHAPES}
MODEL: {{OF_MINE: 1, DEVICE: cpu}}
OUTPUT_DIR: {tmp_path}
DATASETS:
  CUSTOM: [{json.dumps(own_data.entry("instance", tmp_path))}]
  TRAIN: [own_train]
  TEST: []
"""
    (tmp_path / "own.yaml").write_text(config)
    (tmp_path / "program.py").write_text(PROGRAM.format(checks=CHECKS))
    # The processes that it spawns find the program by its whole path.
    command = [sys.executable, tmp_path / "program.py", "--config-file", "own.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = forked.run(
        [*command, "--num-gpus", "2", "--dist-url", "auto", "MODEL.OF_MINE", "2"],
        env=environment,
        cwd=tmp_path,
    )
    assert program.returncode == 0, program.stderr[-3000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [2, 3]


def test_devices_that_the_machine_lacks(toy_file, monkeypatch):
    with pytest.raises(
        ValueError, match="MODEL.DEVICE is 'vulkan', which this machine does not have"
    ):
        load_and_check(toy_file, ["MODEL.DEVICE", "vulkan"])
    with pytest.raises(ValueError, match="'meta', on which a model can be built but not run"):
        load_and_check(toy_file, ["MODEL.DEVICE", "meta"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    load_and_check(toy_file, ["MODEL.DEVICE", "cuda:1"])
    with pytest.raises(ValueError, match=r"'cuda:2', but this machine has 2 CUDA GPU\(s\)"):
        load_and_check(toy_file, ["MODEL.DEVICE", "cuda:2"])
