"""What a run writes: errors name file, cause and remedy; what was written before stays."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from safetensors.torch import load_file
from toy_training import ToyTrainer, WriteLosses, read_losses, toy_config

from mask2former.inference.model_file import load_model_folder
from mask2former.utils.files import WriteError
from mask2former.utils.log_file import checked_log_file
from mask2former.utils.output_lock import lock_output
from mask2former.writers import EventsWriter, MetricsWriter

# Every write to it fails as on a full disk.
FULL = "/dev/full"
FULL_DISK = r"No space left on device\. Free space there, or"

pytestmark = pytest.mark.usefixtures("restore_loggers")


def toy_trainer(folder, *options, resume=False):
    torch.manual_seed(0)
    trainer = ToyTrainer(toy_config(folder, "SEED", "3", *options))
    trainer.resume_or_load(resume=resume)
    return trainer


def test_full_disk_while_saving(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    toy_trainer(whole).train()
    trainer = toy_trainer(broken)
    os.symlink(FULL, broken / "model_0000029.pth.tmp")
    with pytest.raises(
        WriteError, match=rf"Cannot write \S*model_0000029\.pth: {FULL_DISK}.*--resume"
    ):
        trainer.train()
    assert (broken / "last_checkpoint").read_text() == "model_0000014.pth"
    assert not [*broken.glob("*.tmp"), *broken.glob("model_0000029*")]

    toy_trainer(broken, resume=True).train()
    assert read_losses(broken) == read_losses(whole)


def folder_weights(folder):
    """Weights of a model's folder, checked as `Predictor.from_pretrained` does."""
    saved = load_model_folder(str(folder))
    assert saved.cfg.MODEL.META_ARCHITECTURE == "ToyArchitecture"
    return load_file(saved.path)


def test_folders_of_models(tmp_path, monkeypatch):
    """Beside the final checkpoints; after an interrupt between the two, resuming writes both."""
    options = (
        "SOLVER.MAX_ITER",
        "3",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
        "SOLVER.EMA.ENABLED",
        "True",
    )
    trainer = toy_trainer(tmp_path, *options)
    save = torch.save

    def interrupted(data, file):
        if "model_final" in file.name:
            raise KeyboardInterrupt
        save(data, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        trainer.train()
    assert not (tmp_path / "model_final.pth").exists()
    assert not (tmp_path / "model_0000001").exists()
    before = folder_weights(tmp_path / "model_final")
    toy_trainer(tmp_path, *options, resume=True).train()
    for name in ("model_final", "model_final_ema"):
        expected = torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"]
        found = folder_weights(tmp_path / name)
        torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)
    torch.testing.assert_close(folder_weights(tmp_path / "model_final"), before, rtol=0, atol=0)


def test_full_disk_while_writing_the_folder_of_the_model(tmp_path):
    trainer = toy_trainer(tmp_path, "SOLVER.MAX_ITER", "2")
    (tmp_path / "model_final").mkdir()
    os.symlink(FULL, tmp_path / "model_final" / "model.json.tmp")
    with pytest.raises(WriteError, match=rf"Cannot write \S*model\.json: {FULL_DISK}.*--resume"):
        trainer.train()
    assert not (tmp_path / "last_checkpoint").exists()
    folder_weights(tmp_path / "model_final")


def test_full_disk_while_marking_the_last_checkpoint(tmp_path):
    toy_trainer(tmp_path, "SOLVER.MAX_ITER", "1").train()
    trainer = toy_trainer(tmp_path, "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1")
    os.symlink(FULL, tmp_path / "last_checkpoint.tmp")
    with pytest.raises(WriteError, match=rf"Cannot write \S*last_checkpoint: {FULL_DISK}"):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


class DeleteOutput(HookBase):
    def before_step(self):
        if self.trainer.iter == 10:
            shutil.rmtree(self.trainer.cfg.OUTPUT_DIR)


@pytest.mark.parametrize(("period", "file"), [("12", "model_0000011.pth"), ("30", "metrics.json")])
def test_folder_deleted_in_training(tmp_path, period, file):
    trainer = toy_trainer(tmp_path / "output", "SOLVER.CHECKPOINT_PERIOD", period)
    trainer._hooks = [hook for hook in trainer._hooks if type(hook) is not WriteLosses]
    trainer.register_hooks([DeleteOutput()])
    with pytest.raises(WriteError, match=r"it, or its folder, does not exist\. Rest.*") as caught:
        trainer.train()
    chain = []
    error = caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert any(f"output/{file}: it, or" in text for text in chain)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "output").touch()
    for folder in ("output", "output/deeper"):
        with pytest.raises(
            WriteError, match=r"Cannot write \S*/output\S*: a file is in the place of a folder\. Re"
        ):
            toy_trainer(tmp_path / folder)
        with pytest.raises(WriteError, match=r"output\S*: a file is in the place of a folder"):
            with lock_output(str(tmp_path / folder)):
                pass


def test_folder_in_place_of_the_lock(tmp_path):
    (tmp_path / "training.lock").mkdir()
    with pytest.raises(WriteError, match=r"training\.lock: a folder is in the place of the file"):
        with lock_output(str(tmp_path)):
            pass


def write_metrics(writer, iteration):
    with EventStorage(iteration) as storage:
        storage.put_scalar("loss", 1.0 + iteration)
        writer.write()


def test_metrics_are_whole_lines(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "lo')
    writer = MetricsWriter(str(path))
    assert path.read_text() == '{"iteration": 0}\n'
    write_metrics(writer, 1)
    before = path.read_text()
    assert before == '{"iteration": 0}\n{"iteration": 1, "loss": 2.0}\n'

    path.rename(tmp_path / "kept")
    os.symlink(FULL, path)
    with pytest.raises(WriteError, match=rf"Cannot write \S*metrics\.json: {FULL_DISK}"):
        write_metrics(writer, 2)
    # As once there is space again: nothing is lost.
    (tmp_path / "kept").rename(path)
    write_metrics(writer, 2)
    assert path.read_text() == before + '{"iteration": 2, "loss": 3.0}\n'
    writer.close()
    path.unlink()
    with pytest.raises(WriteError, match=r"metrics\.json: it, or its folder, does not exist"):
        write_metrics(writer, 3)
    assert not path.exists()


# TensorBoard's thread raises as well.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_on_a_full_disk(tmp_path):
    threads = set(threading.enumerate())
    writer = EventsWriter(str(tmp_path))
    write_metrics(writer, 0)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert file.stat().st_size > 0
    file.unlink()
    os.symlink(FULL, file)
    with pytest.raises(WriteError, match=rf"Cannot write \S*tfevents\S*: {FULL_DISK}"):
        write_metrics(writer, 1)
    for thread in set(threading.enumerate()) - threads:
        thread.join()


LOGGING = """
import sys
from detectron2.utils.logger import setup_logger
from mask2former.utils.log_file import checked_log_file
with checked_log_file():
    logger = setup_logger(sys.argv[1], name="mask2former")
try:
    logger.info("a line")
except OSError:
    # As a trainer does.
    logger.exception("Exception during training")
    raise
"""


def test_log_on_a_full_disk(tmp_path):
    """Nothing follows the error, not even when the process ends."""
    os.symlink(FULL, tmp_path / "log.txt")
    command = [sys.executable, "-c", LOGGING, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert f"WriteError: Cannot write {tmp_path}/log.txt: No space left on device. Free" in last


def test_log_on_a_full_disk_at_the_start(tmp_path):
    os.symlink(FULL, tmp_path / "log.txt")
    with pytest.raises(WriteError, match=rf"Cannot write \S*log\.txt: {FULL_DISK}"):
        with checked_log_file():
            setup_logger(str(tmp_path), name="mask2former").info("a line")


def test_log(tmp_path):
    with checked_log_file():
        logger = setup_logger(str(tmp_path), name="mask2former")
        logger.info("a line")
    logger.info("another line")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(": ")[-1] for line in lines] == ["a line", "another line"]


def test_no_last_checkpoint(tmp_path, caplog):
    trainer = toy_trainer(tmp_path, resume=True)
    assert "no last_checkpoint" not in caplog.text
    (tmp_path / "model_0000002.pth").touch()
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert "has checkpoints (model_0000002.pth), but no last_checkpoint" in caplog.text
