"""tools/find_batch_size.py: the search, the advice, the batch, and a run with a tiny model."""

import re
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from load_script import load_script
from small_resnet import SMALL_RESNET

from mask2former.config import load_config
from mask2former.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SHAPES = CONFIGS / "shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
TINY = [
    *(str(item) for pair in SMALL_RESNET.items() for item in pair),
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32", "MODEL.MASK_FORMER.NHEADS", "4"),
    *("MODEL.MASK_FORMER.DIM_FEEDFORWARD", "64", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "256"),
]

tool = load_script("tools/find_batch_size.py")


@pytest.fixture(autouse=True)
def forks(monkeypatch) -> None:
    """Programs are forked, which saves the time of their imports."""
    monkeypatch.setattr(tool, "subprocess", forked)


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 5, 6, 7, 8, 100])
def test_search(largest):
    sizes = []

    def run(size):
        sizes.append(size)
        return tool.Measured(size, *((size, 1.0) if size <= largest else ()))

    tried = tool.search(run, 13)
    assert max((one.size for one in tried if one.fits), default=0) == min(largest, 13)
    assert [one.size for one in tried] == sorted(set(sizes)) and len(set(sizes)) == len(sizes)
    assert max(sizes) <= 13 and len(sizes) <= 8


@pytest.mark.parametrize(
    ("batch", "largest", "processes", "text"),
    [
        (16, 3, 1, "IMS_PER_BATCH 3 .*NUM_ACCUMULATION_STEPS 8, each with 2 images"),
        (16, 3, 8, "IMS_PER_BATCH 24 .*16 fits as it is"),
        (16, 1, 8, "IMS_PER_BATCH 8 .*NUM_ACCUMULATION_STEPS 2, each with 1 image"),
        (7, 6, 1, "NUM_ACCUMULATION_STEPS 7, each with 1 "),
        (16, 4, 3, "16 is not a multiple of 3 processes"),
        (16, 0, 1, "Not even one image fits"),
    ],
)
def test_advice(batch, largest, processes, text):
    assert re.search(text, tool.advice(batch, largest, processes))


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml", (), (1024, 1024)),
        ("cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml", (), (512, 1024)),
        ("ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml", (), (512, 512)),
        (
            "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml",
            ("INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", "(300, 700)"),
            (700, 700),
        ),
        (
            "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml",
            ("INPUT.CROP.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(600, 800)")
            + ("INPUT.MAX_SIZE_TRAIN", "1333", "DATALOADER.ASPECT_RATIO_GROUPING", "True")
            + ("INPUT.SIZE_DIVISIBILITY", "-1"),
            (800, 1333),
        ),
        (
            "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml",
            ("INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "(0.5, 0.5)")
            + ("INPUT.MIN_SIZE_TRAIN", "(600,)", "INPUT.MAX_SIZE_TRAIN", "1000")
            + ("DATALOADER.ASPECT_RATIO_GROUPING", "False", "INPUT.SIZE_DIVISIBILITY", "-1"),
            (500, 500),
        ),
    ],
)
def test_largest_image(config, options, expected):
    assert tool.largest_image(load_config(str(CONFIGS / config), options)) == expected


def test_image_of_unknown_size():
    cfg = load_config(str(SHAPES))
    cfg.INPUT.DATASET_MAPPER_NAME = "of another project"
    with pytest.raises(ValueError, match="may have any size: .*--size HEIGHT WIDTH"):
        tool.largest_image(cfg)


@pytest.mark.parametrize("ignores", [False, True])
def test_sample_trains(ignores):
    cfg = load_config(str(SHAPES), [*TINY, "INPUT.IGNORE_UNLABELLED", str(ignores)])
    torch.manual_seed(0)
    sample = tool.random_sample(cfg, 64, 32, 3)
    assert sample["instances"].gt_masks.flatten(1).any(1).all()
    assert ("ignored" in sample) == ignores
    losses = Trainer.build_model(cfg).train()([sample])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("limit", [None, "0.05"])
def test_run_with_a_tiny_model(capsys, limit):
    arguments = ["--config-file", str(SHAPES), "--max", "2", "--size", "64", "64"]
    arguments += ["--iterations", "2", "--targets", "2"]
    arguments += ["--memory-limit", limit] if limit else []
    status = tool.main([*arguments, *TINY, "SOLVER.IMS_PER_BATCH", "4"])
    text = capsys.readouterr().out
    if limit:
        assert status == 1 and "batch of 1: does not fit" in text and "Not even one" in text
    else:
        assert status == 0 and re.search(r"\| +2 \| \d\.\d\d GiB", text)
        assert "SOLVER.NUM_ACCUMULATION_STEPS 2, each with 2 images" in text


@pytest.mark.parametrize(("device", "index"), [("cuda", None), ("cuda:1", 1)])
def test_memory_limit_of_a_gpu(monkeypatch, device, index):
    """torch takes an index or None, the current GPU, but no device without an index."""
    limits = []
    properties = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit)
    )
    tool.limit_memory(torch.device(device), 2.0)
    tool.limit_memory(torch.device(device), 16.0)
    assert limits == [(0.25, index), (1.0, index)]


def test_failure_of_another_kind():
    """Is no lack of memory: the message of the process is shown."""
    arguments = ["--config-file", str(SHAPES), "--size", "32", "32", *TINY]
    arguments += ["MODEL.BACKBONE.NAME", "no_such_backbone"]
    with pytest.raises(RuntimeError, match="(?s)ended with status 1.*no_such_backbone"):
        tool.main(arguments)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--max", "0", "at least 1"),
        ("--memory-limit", "nan", "GiB above 0"),
        ("--memory-limit", "much", "GiB above 0"),
    ],
)
def test_bad_options(capsys, option, value, text):
    with pytest.raises(SystemExit):
        tool.main(["--config-file", str(SHAPES), option, value])
    assert text in capsys.readouterr().err
