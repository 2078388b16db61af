"""tools/analyze_model.py: counts by hand, from torch's counter, and from the paper."""

import copy
import functools
import gc
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from load_script import load_script
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d
from uninitialised import build_uninitialised

from mask2former.config import load_config
from mask2former.ops import MSDeformAttn, ms_deform_attn

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT / "configs/coco/instance-segmentation"
MASKFORMER = ROOT / "configs/maskformer"
SHAPES = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
ADE20K = ROOT / "configs/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml"
MEAN_SIZE = {(450, 640): 1}  # with about as many multiply-adds as the mean over COCO_SIZES
NUM_PARAMETERS = json.loads((ROOT / "tests/contracts/num_parameters.json").read_text())


tool = load_script("tools/analyze_model.py")


def count_operators(function) -> tuple[dict[str, int], dict[str, int]]:
    """Return multiply-adds and activations by operator."""
    mode = tool.CountingMode()
    with torch.no_grad(), mode:
        function()
    return tuple(
        {operator: number for (_, operator), number in counter.items()}
        for counter in (mode.multiply_adds, mode.activations)
    )


@pytest.fixture
def register():
    """Return a function that registers records as "tests_sizes"."""

    def register(records: list[dict]) -> None:
        if "tests_sizes" in DatasetCatalog:
            DatasetCatalog.remove("tests_sizes")
        DatasetCatalog.register("tests_sizes", lambda: records)

    yield register
    DatasetCatalog.remove("tests_sizes")


@pytest.fixture
def small_model():
    cfg = load_config(str(SHAPES), ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    return build_model(cfg).eval()


@pytest.mark.parametrize(
    ("recipe", "params", "giga"),
    [
        ("maskformer2_R50_bs16_50ep.yaml", 44, 226),
        ("maskformer2_R101_bs16_50ep.yaml", 63, 293),
        ("swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml", 216, 868),
    ],
)
def test_numbers_of_the_paper(recipe, params, giga, capsys, monkeypatch):
    monkeypatch.setattr(tool, "build_model", build_uninitialised)
    is_first = "_R50_" in recipe
    if not is_first:  # one size is quicker
        monkeypatch.setattr(tool, "COCO_SIZES", MEAN_SIZE)
    tool.main(["--tasks", "parameter", "flop", "--config-file", str(COCO / recipe)])
    out = capsys.readouterr().out
    number = NUM_PARAMETERS[f"coco/instance-segmentation/{recipe}"]
    assert f"Parameters: {number / 1e6:.2f} M" in out
    assert number / 1e6 == pytest.approx(params, abs=0.5)
    paper = float(
        re.search(r"every layer and without sampling, as in the paper: ([\d.]+) G", out)[1]
    )
    assert paper == pytest.approx(giga, rel=0.03)
    executed = float(re.search(r"^Multiply-adds: ([\d.]+) G", out, re.M)[1])
    assert 0.9 * paper < executed < paper
    if is_first:
        assert "36 of 480x640, 28 of 427x640" in out and "multiples of 32" in out
        assert sum(tool.COCO_SIZES.values()) == 100


@pytest.mark.parametrize(
    ("recipe", "params", "giga"),
    [
        ("maskformer_panoptic_R50_bs64_554k.yaml", 45, 181),
        ("maskformer_panoptic_R101_bs64_554k.yaml", 64, 248),
        ("swin/maskformer_panoptic_swin_large_IN21k_384_bs64_554k.yaml", 212, 792),
    ],
)
def test_numbers_of_maskformer(recipe, params, giga):
    """Table 1 of the paper. The masks of all layers are one product, so none is left out."""
    cfg = load_config(str(MASKFORMER / "coco-panoptic" / recipe), ["MODEL.DEVICE", "cpu"])
    model = build_uninitialised(cfg).eval()
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number / 1e6 == pytest.approx(params, abs=0.5)
    images = tool.count_all(cfg, model, MEAN_SIZE, resize=True)
    paper = [counts.as_in_the_paper() for counts in images]
    assert sum(paper) / len(paper) / 1e9 == pytest.approx(giga, rel=0.03)
    assert paper == [counts.executed() for counts in images]


@pytest.mark.parametrize(("head", "params"), [("baseline", 31.03), ("baseline_plus", 41.23)])
def test_per_pixel_heads(head, params, capsys, monkeypatch):
    monkeypatch.setattr(tool, "build_model", build_uninitialised)
    recipe = MASKFORMER / f"ade20k-150/per_pixel_{head}_R50_bs16_160k.yaml"
    tasks = ["--tasks", "parameter", "flop", "--use-fixed-input-size"]
    tool.main([*tasks, "--config-file", str(recipe)])
    out = capsys.readouterr().out
    assert f"Parameters: {params:.2f} M" in out
    # The 1x1 convolution to 150 classes, or the decoder, is a part of its own.
    adds = float(re.search(r"^transformer decoder +([\d.]+)", out, re.M)[1])
    if head == "baseline":
        assert adds == pytest.approx(128 * 128 * 256 * 150 / 1e9, abs=0.005)
    else:
        assert adds > 6 * 128 * 128 * 256 * 150 / 1e9  # of the masks alone


def test_padding_step(small_model):
    """Detectron2's meta-architectures have no size_divisibility, and 0 is no padding."""
    assert tool.padding_step(small_model) == 32
    small_model.size_divisibility = 0
    assert tool.padding_step(small_model) == 1
    del small_model.size_divisibility
    assert tool.padding_step(small_model) == max(small_model.backbone.size_divisibility, 1)


def test_convolutions_and_products_by_hand():
    x = torch.zeros(1, 4, 8, 8)
    # 6 output channels, 2 input channels per group, 3 × 3, at 4 × 4 positions.
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    adds, activations = count_operators(lambda: conv(x))
    assert adds == {"convolution": 6 * 4 * 4 * 2 * 9}
    assert activations == {"convolution": 6 * 4 * 4}
    # Each of 4 · 8 · 8 values contributes to 3 channels at 2 × 2 positions.
    transposed = nn.ConvTranspose2d(4, 3, 2, stride=2)
    assert count_operators(lambda: transposed(x))[0] == {"convolution": 4 * 8 * 8 * 3 * 4}
    assert count_operators(lambda: nn.Linear(8, 5)(x))[0] == {"matrix product": 4 * 8 * 8 * 5}
    assert count_operators(lambda: nn.Linear(8, 5, bias=False)(x))[0] == {
        "matrix product": 4 * 8 * 8 * 5
    }
    assert count_operators(lambda: x @ x)[0] == {"matrix product": 4 * 8 * 8 * 8}
    product = count_operators(lambda: torch.einsum("qc,chw->qhw", torch.zeros(3, 4), x[0]))[0]
    assert product == {"matrix product": 3 * 4 * 8 * 8}
    assert count_operators(lambda: F.relu(F.layer_norm(x, (8,)) + x).softmax(1).sum()) == ({}, {})


def test_attention_by_hand():
    q, k = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)  # 5 queries, 7 keys, 8 channels
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    adds, activations = count_operators(
        lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    )
    assert adds == {"attention": 2 * 3 * 5 * 7 * (8 + 8)}
    assert activations == {"attention": 2 * 3 * 5 * 8}


@pytest.mark.parametrize("compiled", [True, False])
def test_deformable_attention_by_hand(compiled, monkeypatch):
    """The compiled operators and the PyTorch formulation have the same counts."""
    if not compiled:
        # The package has a function with the name of the module.
        module = sys.modules["mask2former.ops.ms_deform_attn"]
        monkeypatch.setattr(module, "has_kernel", lambda device: False)
    shapes = [(4, 6), (2, 3)]  # 30 values
    sampled = 7 * 8 * 2 * 4  # queries, heads, levels, points
    attention = MSDeformAttn(32, n_levels=2, n_heads=8, n_points=4).eval()
    query, values = torch.zeros(1, 7, 32), torch.zeros(1, 30, 32)
    reference = torch.zeros(1, 7, 2, 2)
    adds, activations = count_operators(lambda: attention(query, reference, values, shapes))
    # Offsets (2 coordinates), weights, values, output; per sampled value: 4 corners, 1 weight.
    projections = 7 * 32 * (8 * 2 * 4 * 3) + 30 * 32 * 32 + 7 * 32 * 32
    assert adds == {"matrix product": projections, "deformable attention": sampled * 4 * 5}
    assert activations == {"matrix product": 7 * 8 * 2 * 4 * 3 + 30 * 32 + 7 * 32}

    classic = (values.view(1, 30, 8, 4), shapes, torch.zeros(1, 7, 8, 2, 4, 2))
    adds, _ = count_operators(lambda: ms_deform_attn(*classic, torch.zeros(1, 7, 8, 2, 4)))
    assert adds == {"deformable attention": sampled * 4 * 5}


@pytest.mark.parametrize(("has_modulation", "per_sample"), [(False, 4), (True, 5)])
def test_deformable_convolution_by_hand(has_modulation, per_sample):
    """The convolution, and per sampled value four corners and the modulation."""
    conv = DeformConv2d(6, 4, (3, 2), stride=2, padding=1, groups=2)
    x = torch.zeros(2, 6, 7, 8)  # → 4 × 5 positions
    offset = torch.zeros(2, 2 * 3 * 6, 4, 5)  # three groups of channels
    modulation = torch.zeros(2, 3 * 6, 4, 5) if has_modulation else None
    adds, activations = count_operators(lambda: conv(x, offset, modulation))
    products, samples = 2 * 4 * 20 * (3 * 6), 2 * 6 * 20 * 6
    assert adds == {"deformable convolution": products + samples * per_sample}
    assert activations == {"deformable convolution": 2 * 4 * 20}


def test_counts_equal_torch_flop_counter(small_model):
    """Convolutions, matrix products and attention, as torch counts them in a real run.

    Its counter sets global hooks, so that attention runs as written, as matrix products.
    """
    counts = tool.count(small_model, 128, 192)
    small_model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        features = small_model.backbone(torch.zeros(1, 3, 128, 192))
        outputs = small_model.sem_seg_head(features)
        for output in (outputs, *outputs["aux_outputs"]):
            assert output["pred_masks"].shape == (1, 30, 32, 48)
    by_operator = {}
    for (_, operator), number in counts.multiply_adds.items():
        by_operator[operator] = by_operator.get(operator, 0) + number
    sampling = by_operator.pop("deformable attention")
    assert sampling > 0
    assert set(by_operator) == {"convolution", "matrix product", "attention"}
    assert 2 * sum(by_operator.values()) == counter.get_total_flops()
    parts = {part for part, _ in counts.multiply_adds}
    assert parts == {"backbone", "pixel decoder", "transformer decoder", "masks of earlier layers"}
    # Three earlier layers: 30 queries, 128 channels, 32 × 48 positions.
    difference = counts.as_in_the_paper() + sampling - counts.executed()
    assert difference == 3 * 30 * 128 * 32 * 48


@pytest.mark.parametrize(
    ("attention", "reads_masks"),
    [("masked", True), ("mask_pooling", True), ("full", False), ("smca", False)],
)
def test_earlier_masks_count_only_if_attention_reads_them(small_model, attention, reads_masks):
    opts = ["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "ConfigurableTransformerDecoder"]
    opts += ["MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION", attention, "MODEL.DEVICE", "cpu"]
    counts = tool.count(build_model(load_config(str(SHAPES), opts)).eval(), 64, 96)
    base = tool.count(small_model, 64, 96)
    # Three earlier layers: 30 queries, 128 channels, 16 × 24 positions.
    masks = counts.multiply_adds["masks of earlier layers", "matrix product"]
    assert masks == (3 * 30 * 128 * 16 * 24 if reads_masks else 0)
    # Nor are there attention masks, on three scales.
    attention_masks = 0 if reads_masks else 30 * 128 * (2 * 3 + 4 * 6 + 8 * 12)
    if attention in ("masked", "full"):
        assert counts.executed() == base.executed() - attention_masks


def test_counting_leaves_caches_valid(small_model):
    image = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))

    def logits(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            outputs = model.sem_seg_head(model.backbone(image))
            return outputs["pred_logits"], outputs["pred_masks"]

    def clear_caches() -> None:
        for item in gc.get_objects():
            if type(item) is functools._lru_cache_wrapper:
                if item.__module__.startswith("mask2former"):
                    item.cache_clear()

    untouched = copy.deepcopy(small_model)
    clear_caches()
    tool.count(small_model, 96, 160)  # fills the caches
    after = logits(small_model)
    clear_caches()
    for a, b in zip(after, logits(untouched), strict=True):
        assert torch.equal(a, b) and b.std() > 0


def test_sizes(tmp_path, register):
    cfg = load_config(str(ADE20K))
    assert tool.fixed_size(cfg) == (512, 512)
    assert tool.padded_size(cfg, 32, 300, 400) == (512, 704)  # 512 × 682.7
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert tool.padded_size(cfg, 0, 300, 400) == (300, 400)
    cfg.INPUT.CROP.ENABLED = False
    with pytest.raises(ValueError, match="INPUT.CROP.ENABLED is False"):
        tool.fixed_size(cfg)
    assert tool.fixed_size(load_config(str(SHAPES))) == (128, 128)

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    records = [{"height": 7, "width": 9}, {"file_name": str(tmp_path / "a.png")}] * 2
    register(records)
    assert tool.dataset_sizes("tests_sizes", 3) == {(7, 9): 2, (20, 30): 1}
    register([])
    with pytest.raises(ValueError, match="'tests_sizes' has no image"):
        tool.dataset_sizes("tests_sizes", 3)


def test_command_line(capsys, register):
    records = [{"height": 100, "width": 150}, {"height": 150, "width": 100}]
    register(records)
    config = ["--config-file", str(SHAPES), "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "10"]
    tool.main(["--tasks", "structure", "activation", "--dataset", "tests_sizes", *config])
    out = capsys.readouterr().out
    assert "Means over 2 images, the first images of tests_sizes: 1 of 100x150, 1 of 150x100" in out
    assert "(backbone): ResNet(" in out and "Embedding(10, 128)" in out
    tool.main(["--tasks", "flop", "--use-fixed-input-size", *config])
    assert (
        "Means over 1 images, the size of training images: 1 of 128x128" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="'nowhere' is not registered"):
        tool.main(["--tasks", "flop", "--dataset", "nowhere", *config])
    with pytest.raises(SystemExit, match="does not exist"):
        tool.main(["--tasks", "flop", "--config-file", "nowhere.yaml"])
    for bad in (["-n", "3"], ["--dataset", "x", "-n", "0"]):
        with pytest.raises(SystemExit):
            tool.main(["--tasks", "flop", *bad, *config])
        assert "--num-inputs is the number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--tasks", "flop", "--dataset", "x", "--use-fixed-input-size", *config])
    assert "mutually exclusive" in capsys.readouterr().err


def test_images_per_second(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tool, "COCO_SIZES", {(60, 80): 2, (90, 60): 1})
    tool.main(["--tasks", "fps", "--config-file", str(SHAPES), "MODEL.DEVICE", "cpu"])
    out = capsys.readouterr().out
    assert (
        float(re.search(r"Images per second: ([\d.]+) \(cpu, batch 1, random weights", out)[1]) > 0
    )
    with pytest.raises(SystemExit, match="missing.pth"):
        tool.main(
            ["--tasks", "fps", "--config-file", str(SHAPES)]
            + ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(tmp_path / "missing.pth")]
        )
