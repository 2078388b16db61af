"""`tools/train_net.py` as a user runs it, with a tiny model on a few Shapes images."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from load_script import load_script
from small_resnet import SMALL_RESNET

from mask2former.data.datasets.register_shapes import register_all_shapes

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "train_net.py"
CONFIG = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
OPTIONS = SMALL_RESNET | {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 4096,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 1,
    "SOLVER.IMS_PER_BATCH": 4,
    "LOGGING.PICTURES": 1,
    "LOGGING.HARD_EXAMPLES": 1,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 8,
    "SOLVER.CHECKPOINT_PERIOD": 2,
}


train_net = load_script(PROGRAM)


pytestmark = pytest.mark.usefixtures("restore_loggers")


def forget_shapes():
    for name in [name for name in DatasetCatalog.list() if name.startswith("shapes_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Write the data set and point the registered names to it."""
    root = tmp_path_factory.mktemp("datasets")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    command += ["--output", str(root / "shapes"), "--size", "64"]
    command += ["--num-train", "24", "--num-val", "4"]
    forked.run(command, check=True)
    forget_shapes()
    register_all_shapes(str(root))
    yield root
    forget_shapes()
    register_all_shapes(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def arguments(output_dir, *flags, **overrides):
    options = OPTIONS | {"OUTPUT_DIR": str(output_dir)}
    options |= {key.replace("__", "."): value for key, value in overrides.items()}
    pairs = [str(item) for pair in options.items() for item in pair]
    return ["--config-file", str(CONFIG), *flags, *pairs]


def run(output_dir, *flags, **overrides):
    """Run in this process, which saves the import time."""
    args = arguments(output_dir, *flags, **overrides)
    return train_net.main(default_argument_parser().parse_args(args))


def environment(root, threads):
    """Of a separate process."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "DETECTRON2_DATASETS": str(root),
    }


def losses(output_dir):
    """Read the median losses of the whole run from metrics.json."""
    rows = map(json.loads, (output_dir / "metrics.json").read_text().splitlines())
    (row,) = [row for row in rows if row["iteration"] == OPTIONS["SOLVER.MAX_ITER"] - 1]
    return {key: value for key, value in row.items() if "loss" in key}


@pytest.fixture(scope="module")
def full_run(data_root, tmp_path_factory):
    """Output folder of an uninterrupted run, evaluated at its end."""
    output_dir = tmp_path_factory.mktemp("full_run")
    run(output_dir)
    return output_dir


def test_training_writes_checkpoints_metrics_and_results(full_run):
    assert (full_run / "model_final.pth").is_file()
    assert (full_run / "last_checkpoint").read_text() == "model_final.pth"
    assert "Effective batch size 4 = 1 process(es) x 4 images" in (full_run / "log.txt").read_text()
    results = json.loads((full_run / "evaluation.json").read_text())["shapes_val_panoptic"]
    assert {"PQ", "PQ_th", "PQ_st"} <= set(results["panoptic_seg"])
    assert "AP" in results["segm"]
    assert "mIoU" in results["sem_seg"]
    # Four predictions (ten in the original models) with three losses each, and their sum.
    assert len(losses(full_run)) == 4 * 3 + 1


def test_predicting_as_in_the_readme(full_run, data_root, tmp_path, monkeypatch, capsys):
    """The example in README.md, with the folder that training wrote and nothing else of it."""
    text = (ROOT / "README.md").read_text().partition("## Predict from Python")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    shutil.copytree(full_run / "model_final", tmp_path / "output" / "model_final")
    (image,) = itertools.islice(data_root.rglob("*.jpg"), 1)
    shutil.copy(image, tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "drawing.png").is_file()
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {
        "image_instances.json",
        "image_panoptic.json",
        "image_panoptic.png",
        "image_semantic.png",
    }
    assert capsys.readouterr().out.startswith("Result(image.jpg: ")


def test_eval_only_reproduces_the_results(full_run, data_root, tmp_path):
    weights = str(full_run / "model_final.pth")
    run(tmp_path, "--eval-only", MODEL__WEIGHTS=weights)
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluated == json.loads((full_run / "evaluation.json").read_text())


def test_evaluation_with_test_time_augmentation(full_run, data_root, tmp_path):
    weights = str(full_run / "model_final.pth")
    augmentation = {"TEST__AUG__ENABLED": True, "TEST__AUG__MIN_SIZES": "(48, 64)"}
    results = run(tmp_path, "--eval-only", MODEL__WEIGHTS=weights, **augmentation)
    assert list(results) == ["panoptic_seg", "segm", "sem_seg", "sem_seg_TTA"]
    # The plain results equal an evaluation without augmentation.
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluated == json.loads((full_run / "evaluation.json").read_text())
    augmented = json.loads((tmp_path / "inference_TTA" / "evaluation.json").read_text())
    assert list(augmented) == ["shapes_val_panoptic"]
    assert augmented["shapes_val_panoptic"]["sem_seg"]["mIoU"] == results["sem_seg_TTA"]["mIoU"]
    assert results["sem_seg_TTA"] != results["sem_seg"]


def test_resume_after_kill_gives_the_same_losses(full_run, data_root, tmp_path):
    process = forked.Popen(
        [sys.executable, PROGRAM, *arguments(tmp_path, DATASETS__TEST="()")],
        # As many as here: sums with another number of threads differ in the last digits.
        env=environment(data_root, threads=torch.get_num_threads()),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    marker = tmp_path / "last_checkpoint"
    while not marker.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert marker.read_text() != "model_final.pth"
    run(tmp_path, "--resume", DATASETS__TEST="()", DATALOADER__NUM_WORKERS=0)
    assert losses(tmp_path) == losses(full_run)


def test_two_processes_train_like_one(full_run, data_root, tmp_path):
    """Median losses of 8 steps agree within 3 % (total) and 8 % (each).

    They cannot be equal: each process samples points for its own masks and normalises the
    classification loss over its own images, which gives images with few objects more weight. The
    bounds still catch losses or gradients that are not averaged over processes.
    tests/test_trainer.py checks that both see the same samples, with a model without these effects.
    """
    command = [sys.executable, PROGRAM, *arguments(tmp_path, DATASETS__TEST="()")]
    done = forked.run_ranks(2, command, env=environment(data_root, threads=1))
    assert done.returncode == 0, done.stderr
    assert "Effective batch size 4 = 2 process(es) x 2 images" in done.stdout + done.stderr
    expected, actual = losses(full_run), losses(tmp_path)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=0.03 if name == "total_loss" else 0.08), (
            name
        )


def test_checkpoint_of_another_architecture(full_run, data_root, tmp_path):
    weights = str(full_run / "model_final.pth")
    with pytest.raises(ValueError, match=r"model_final\.pth does not fit .*MaskFormer with ResNet"):
        run(tmp_path, "--eval-only", MODEL__WEIGHTS=weights, MODEL__MASK_FORMER__DEC_LAYERS=5)
    with pytest.raises(ValueError, match=r"model_final\.pth does not fit .*QUERIES to \d+\."):
        run(
            tmp_path,
            "--eval-only",
            MODEL__WEIGHTS=weights,
            MODEL__MASK_FORMER__NUM_OBJECT_QUERIES=31,
        )
    with pytest.raises(ValueError, match=r"model_final\.pth does not fit .*DIM_FEEDFORWARD to"):
        run(tmp_path, MODEL__WEIGHTS=weights, MODEL__MASK_FORMER__DIM_FEEDFORWARD=40)


def test_fine_tuning_to_other_classes(full_run, data_root, tmp_path):
    """From panoptic to instance segmentation: 6 classes instead of 10."""
    run(
        tmp_path,
        MODEL__WEIGHTS=str(full_run / "model_final.pth"),
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=6,
        MODEL__MASK_FORMER__TEST__PANOPTIC_ON=False,
        DATASETS__TRAIN="('shapes_train',)",
        DATASETS__TEST="('shapes_val',)",
        INPUT__DATASET_MAPPER_NAME="coco_instance_lsj",
        SOLVER__MAX_ITER=1,
    )
    assert "Fine-tuning to other classes" in (tmp_path / "log.txt").read_text()
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(results["shapes_val"]) == {"segm"}


def test_command_line_errors(tmp_path, data_root):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        run(tmp_path, "--eval-only")
    with pytest.raises(ValueError, match="SOLVER.BASE_RL.*SOLVER.BASE_LR"):
        run(tmp_path, SOLVER__BASE_RL=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        train_net.setup(default_argument_parser().parse_args(["--config-file", "nowhere.yaml"]))
    with pytest.raises(ValueError, match="shapes_trian.*did you mean shapes_train"):
        run(tmp_path, DATASETS__TRAIN="('shapes_trian_panoptic',)")
    with pytest.raises(ValueError, match="Nothing to evaluate on 'shapes_val_sem_seg'"):
        run(
            tmp_path,
            DATASETS__TEST="('shapes_val_sem_seg',)",
            MODEL__MASK_FORMER__TEST__SEMANTIC_ON=False,
            SOLVER__MAX_ITER=1,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(ValueError, match="add `MODEL.DEVICE cpu` to the command"):
        run(tmp_path, MODEL__DEVICE="cuda")
