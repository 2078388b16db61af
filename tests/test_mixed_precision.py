"""Mixed precision of the whole model on a CPU: operators in fp32, losses, a run on Shapes.

Shape letters: T targets, H W pixels.
"""

import importlib
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[1]
HALVES = [torch.bfloat16, torch.float16]
NUM_LAYERS = 5  # of tiny_cfg

# Operators (names below autograd) that stay in fp32, see the docstring of mask2former.modeling:
# normalisation, class probabilities and matching costs, sampling of features, masks and targets,
# losses.
IN_FULL_PRECISION = {
    "native_layer_norm",
    "_log_softmax",
    "_embedding_bag_forward_only",
    "grid_sampler_2d",
    "binary_cross_entropy_with_logits",
    "sigmoid",
    "softplus",
}


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    return build_model(tiny_cfg)


@pytest.fixture
def batch(make_input) -> list[dict]:
    return [make_input(64, 96, [0, 2, 1], seed=1), make_input(50, 70, [2], seed=2)]


class Dtypes(TorchDispatchMode):
    """The dtypes of the floating-point tensors that each operator reads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dtypes = {
            x.dtype
            for x in tree_iter((args, kwargs))
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        }
        self.seen[function.overloadpacket.__name__] |= dtypes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_stays_in_full_precision(model, batch, dtype):
    with torch.autocast("cpu", dtype=dtype), Dtypes() as operators:
        losses = model(batch)
    seen = operators.seen
    in_half = {name for name in IN_FULL_PRECISION if seen[name] != {torch.float32}}
    assert not in_half, {name: seen[name] for name in in_half}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    # Convolutions, attention and mask logits are in half precision.
    assert seen["convolution"] == {dtype}
    assert seen["_scaled_dot_product_flash_attention_for_cpu"] == {dtype}
    assert dtype in seen["mm"] and dtype in seen["addmm"]


class SameMatching(nn.Module):
    """Matches in the first forward pass and returns the same pairs in later ones."""

    def __init__(self, matcher: nn.Module):
        super().__init__()
        self.matcher = matcher
        self.layers: dict[int, list] = {}
        self.calls = 0

    def forward(self, outputs, targets):
        layer = self.calls % NUM_LAYERS
        self.calls += 1
        if layer not in self.layers:
            self.layers[layer] = self.matcher(outputs, targets)
        return self.layers[layer]


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_at_the_start(model, batch, dtype):
    """Each within 1 % of fp32, for the same pairs and points.

    The pairs of an untrained model are fixed because rounding may change them.
    """
    criterion = model.criterion
    criterion.matcher = SameMatching(criterion.matcher)
    criterion.num_points = 1024
    model(batch)
    torch.manual_seed(1)
    expected = model(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(batch)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-2), name


@pytest.fixture
def shapes(monkeypatch) -> list[dict]:
    """Twelve images of Shapes as training inputs."""
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    categories = importlib.import_module("prepare_shapes").load_categories()
    make_scene = importlib.import_module("shapes_scenes").make_scene
    inputs = []
    for index in range(12):
        scene = make_scene(0, "train", index, 32, categories)
        kept = [i for i, (_, iscrowd) in enumerate(scene.segments) if not iscrowd]
        instances = Instances(scene.segment_map.shape)
        instances.gt_classes = torch.tensor([scene.segments[i][0] for i in kept]).long()
        segments = torch.tensor(kept).view(-1, 1, 1)
        instances.gt_masks = torch.from_numpy(scene.segment_map) == segments  # (T, H, W)
        image = torch.from_numpy(scene.image).permute(2, 0, 1).clamp(0, 255).to(torch.uint8)
        inputs.append({"image": image, "instances": instances})
    for name in ("prepare_shapes", "shapes_scenes"):
        monkeypatch.delitem(sys.modules, name)
    return inputs


def test_a_run_on_shapes_stays_finite_and_learns(tiny_cfg, shapes):
    tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 10
    tiny_cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    # Convolutions in half precision are slow on CPUs that only emulate it.
    tiny_cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    swin = tiny_cfg.MODEL.SWIN
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE = 16, [1] * 4, [1, 2, 4, 8], 4
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    totals = []
    for step in range(30):
        torch.manual_seed(step)
        first = 2 * step % len(shapes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(model(shapes[first : first + 2]).values())
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(loss.item())
    first, last = sum(totals[:6]) / 6, sum(totals[-6:]) / 6  # each image once
    assert last < 0.9 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())
