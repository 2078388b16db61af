"""How processes are started."""

import contextlib
import datetime
import logging
import pickle

import pytest
import torch
from detectron2.engine import default_argument_parser
from load_script import ROOT, load_script

from mask2former import launch as launch_module
from mask2former.config import load_config
from mask2former.launch import launch, setup, started_by_torchrun
from mask2former.trainer import Trainer

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {DEVICE: cpu, META_ARCHITECTURE: Toy}\nVERSION: 2\n")
    return str(path)


def parse(*arguments):
    return default_argument_parser().parse_args(list(arguments))


def test_started_by_torchrun():
    assert started_by_torchrun(TORCHRUN)
    # Job schedulers set some of the names.
    assert not started_by_torchrun({"RANK": "0", "WORLD_SIZE": "1"})


def test_one_process(config_file):
    seen = []
    args = parse("--config-file", config_file)
    launch(seen.append, args)
    assert seen == [args]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_config_in_another_encoding(tmp_path, encoding):
    path, output = tmp_path / "config.yaml", tmp_path / "größe"
    text = f"MODEL: {{DEVICE: cpu, META_ARCHITECTURE: Toy}}\nVERSION: 2\nOUTPUT_DIR: {output}\n"
    path.write_bytes(text.encode(encoding))
    assert setup(parse("--config-file", str(path))).OUTPUT_DIR == str(output)
    assert load_config(str(output / "config.yaml")).MODEL.META_ARCHITECTURE == "Toy"


def test_warnings_of_the_checks_are_in_the_log_file(tmp_path, monkeypatch):
    """They come before the log file, and must be in it, also of a spawned process."""
    # Other tests leave log files.
    monkeypatch.setattr(logging.getLogger("mask2former"), "handlers", [])
    path, output = tmp_path / "config.yaml", tmp_path / "output"
    base = ROOT / "configs/shapes/semantic-segmentation/maskformer2_R18_quickstart.yaml"
    path.write_text(
        f"_BASE_: {base}\nMODEL: {{DEVICE: cpu}}\nINPUT: {{IMAGE_SIZE: 64}}\nOUTPUT_DIR: {output}\n"
    )

    def main(args):
        setup(pickle.loads(pickle.dumps(args)))
        setup(parse("--config-file", str(path)))

    launch(main, parse("--config-file", str(path)))
    for handler in logging.getLogger("mask2former").handlers:
        handler.flush()
    text = (output / "log.txt").read_text()
    assert text.count("Set but not read with these parts: INPUT.IMAGE_SIZE") == 2


def test_empty_output_folder(config_file):
    with pytest.raises(ValueError, match="OUTPUT_DIR is empty"):
        setup(parse("--config-file", config_file, "OUTPUT_DIR", ""))


def test_torchrun_and_num_gpus_at_once(config_file, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    args = parse("--config-file", config_file, "--num-gpus", "2")
    with pytest.raises(ValueError, match="torchrun started this process, so --num-gpus 2 "):
        launch(print, args)


def test_more_processes_than_gpus(config_file, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = parse("--config-file", config_file, "MODEL.DEVICE", "cuda")
    with pytest.raises(ValueError, match="started 2 processes on this machine, which has 1 GPUs"):
        launch(print, args)


def test_cpu_training_spawned_on_a_machine_with_gpus(config_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = parse("--config-file", config_file, "--num-gpus", "2")
    with pytest.raises(
        ValueError, match="MODEL.DEVICE is 'cpu' .* start the processes with torchrun"
    ):
        launch(print, args)


def test_spawned_arguments(config_file, monkeypatch):
    """What Detectron2's launcher is called with; tests/test_preflight.py starts processes."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        launch_module.detectron2.engine,
        "launch",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    args = parse(
        *("--config-file", config_file, "--num-gpus", "2", "--num-machines", "3"),
        *("--machine-rank", "1", "--dist-url", "tcp://host:1", "DISTRIBUTED_TIMEOUT", "1.5"),
    )
    launch(print, args)
    (((main, num_processes), kwargs),) = calls
    assert (main, num_processes) == (launch_module._run_spawned, 2)
    assert kwargs.pop("args")[:2] == (print, args)
    assert kwargs == {
        "num_machines": 3,
        "machine_rank": 1,
        "dist_url": "tcp://host:1",
        "timeout": datetime.timedelta(minutes=1.5),
    }


@pytest.mark.parametrize(("device", "expected"), [("cpu", [True]), ("cuda", [])])
def test_programs_keep_freed_memory_on_a_cpu(config_file, monkeypatch, tmp_path, device, expected):
    calls = []
    monkeypatch.setattr(launch_module, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(launch_module, "default_setup", lambda cfg, args: None)
    monkeypatch.setattr(launch_module, "setup_logger", lambda **kwargs: None)
    # Its self-test would run on the GPU.
    monkeypatch.setattr(launch_module, "describe", lambda *, self_test: ([], []))

    class Stop(Exception):
        pass

    class Toy(Trainer):
        def __init__(self, cfg):
            raise Stop

    monkeypatch.setattr(launch_module, "Trainer", Toy)
    with pytest.raises(Stop):
        launch_module.main(parse("--config-file", config_file, "MODEL.DEVICE", device))
    assert calls == expected


@pytest.mark.parametrize(("flags", "expected"), [((), [True]), (("--eval-only",), [False])])
def test_training_locks_its_folder_before_it_writes(
    config_file, monkeypatch, tmp_path, flags, expected
):
    seen, locked = [], []

    @contextlib.contextmanager
    def lock(folder):
        locked.append(folder)
        yield
        locked.remove(folder)

    def stop(args):
        seen.append(locked == [str(tmp_path / "out")])
        raise ValueError("stop here")

    monkeypatch.setattr(launch_module, "lock_output", lock)
    monkeypatch.setattr(launch_module, "setup", stop)
    args = parse("--config-file", config_file, *flags, "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="stop here"):
        launch(lambda args: launch_module.main(args), args)
    assert seen == expected


@pytest.mark.parametrize(("value", "expected"), [("True", ["set up", "on"]), ("False", ["set up"])])
def test_setup_turns_deterministic_mode_on(config_file, monkeypatch, value, expected):
    """After Detectron2's set-up, which sets cudnn.benchmark."""
    calls = []
    monkeypatch.setattr(launch_module, "default_setup", lambda *args: calls.append("set up"))
    monkeypatch.setattr(launch_module, "setup_logger", lambda **kwargs: None)
    monkeypatch.setattr(launch_module, "use_deterministic_algorithms", lambda: calls.append("on"))
    launch_module.setup(parse("--config-file", config_file, "DETERMINISTIC", value))
    assert calls == expected


def test_demo_keeps_freed_memory_on_a_cpu(monkeypatch, tmp_path):
    demo, calls = load_script("tools/demo.py"), []

    def stop(cfg):
        raise ValueError("stop here")

    monkeypatch.setattr(demo, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(demo, "Predictor", stop)
    (tmp_path / "a.png").touch()
    config = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
    arguments = ["--config-file", config, "--input", tmp_path, "--output", tmp_path / "drawings"]
    with pytest.raises(SystemExit, match="stop here"):
        demo.main([*map(str, arguments), "--opts", "MODEL.DEVICE", "cpu"])
    assert calls == [True]


def test_run_passes_the_hook_on(config_file, monkeypatch, capsys):
    def extend(cfg):
        cfg.OF_MINE = 1

    seen = []
    arguments = ["train.py", "--config-file", config_file, "OF_MINE", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    launch_module.run(lambda args: seen.append(args.checked.cfg.OF_MINE), extend_config=extend)
    assert seen == [2]


def test_mistakes_are_reported_before_processes_start(config_file):
    args = parse("--config-file", config_file, "--num-gpus", "2", "SOLVER.BASE_RL", "1")
    with pytest.raises(ValueError, match="SOLVER.BASE_RL"):
        launch(print, args)


def test_program_at_the_root_forwards_to_tools():
    program = load_script("train_net.py")
    assert program.main is launch_module.main
    assert (program.Trainer, program.setup) == (Trainer, launch_module.setup)
