"""Deterministic mode: which operators a training step runs, and whether training repeats its bits.

`tests/utils/test_determinism.py` tests how the mode is turned on.
"""

import json
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import repeated_training
import torch
from detectron2.config import CfgNode
from torch.utils import backend_registration

from mask2former.ops import _library

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def restore_mode():
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def use_swin(cfg: CfgNode) -> None:
    """A small one, whose second stage has a shifted window."""
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    cfg.MODEL.SWIN.EMBED_DIM = 24
    cfg.MODEL.SWIN.DEPTHS = [1, 2, 1, 1]


def run_program(name: str, *arguments: Path) -> Any:
    """The JSON that a program of this folder prints in its last line."""
    command = [sys.executable, "-W", "ignore", HERE / name, *arguments]
    result = forked.run(command)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.skipif(not _library.is_loaded(), reason="the compiled operators were not built")
def test_torch_refuses_no_operator_of_a_training_step(tiny_cfg, tmp_path):
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    tiny_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    tiny_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    # Checkpointed convolutions recognise tensors by their addresses, which this device lacks.
    tiny_cfg.MODEL.CHECKPOINTING = "none"
    resnet, plain, swin, full = tiny_cfg, tiny_cfg.clone(), tiny_cfg.clone(), tiny_cfg.clone()
    plain.MODEL.FAST = False
    full.MODEL.MASK_FORMER.MATCHER_NAME = "MaskFormerMatcher"
    full.MODEL.MASK_FORMER.CRITERION_NAME = "MaskFormerCriterion"
    use_swin(swin)
    swin.MODEL.CHECKPOINTING = "selective"
    paths = [tmp_path / f"{i}.yaml" for i in range(4)]
    for path, cfg in zip(paths, (resnet, plain, swin, full), strict=True):
        path.write_text(cfg.dump())
    result = run_program("deterministic_step.py", *paths)
    assert result["known"] == ["grid_sampler_2d_backward", "nll_loss2d_forward"]
    for step in result["steps"]:
        assert {"ms_deform_attn_fused_backward", "addcdiv_"} <= {*step["names"]}
        assert step["refused"] == []
    # Of point sampling, which whole masks do without.
    assert ["index_add_" in step["names"] for step in result["steps"]] == [True, True, True, False]


def assert_repeated(digests: dict[str, str]) -> None:
    assert digests["once"] == digests["again"] == digests["resumed"] != digests["interrupted"]


def test_training_repeats_its_bits_on_a_cpu(tiny_cfg, tmp_path):
    use_swin(tiny_cfg)  # its checkpoints are small
    tiny_cfg.DETERMINISTIC = True
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    assert_repeated(repeated_training.digests(tiny_cfg, tmp_path))
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("swin", "mixed_precision", "fast"),
    [(False, False, True), (False, True, True), (True, True, True), (False, False, False)],
)
def test_training_repeats_its_bits_on_a_gpu(tiny_cfg, tmp_path, swin, mixed_precision, fast):
    if swin:
        use_swin(tiny_cfg)
    tiny_cfg.DETERMINISTIC = True
    tiny_cfg.MODEL.DEVICE = "cuda"
    tiny_cfg.MODEL.FAST = fast
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    tiny_cfg.SOLVER.AMP.ENABLED = mixed_precision
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump())
    assert_repeated(run_program("repeated_training.py", path, tmp_path))
