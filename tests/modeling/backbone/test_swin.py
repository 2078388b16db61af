"""Swin backbone: parts computed by hand, two peer implementations, and the original's contract.

Shape letters: see `mask2former.modeling.backbone.swin_layers`.
"""

import copy
import inspect

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from mask2former.modeling.backbone import swin_layers
from mask2former.modeling.backbone.swin import (
    BasicLayer,
    D2SwinTransformer,
    PatchEmbed,
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from mask2former.utils.shape_cache import cached_by_shape
from mask2former.utils.twins import run_plain, runs_fast

# A Swin small enough to run often: 24 to 192 channels, 8 per head, one shifted block per stage.
SMALL = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}
# No multiple of the patch, the window or 32.
ODD_SIZE = (75, 101)


def small_swin(seed: int = 0, **arguments) -> SwinTransformer:
    """A small Swin with random norms, biases and position biases."""
    torch.manual_seed(seed)
    model = SwinTransformer(**{"drop_path_rate": 0.0, **SMALL, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def swin_config(**options) -> CfgNode:
    """Detectron2's config with `MODEL.SWIN` for a small Swin."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    cfg.MODEL.SWIN = CfgNode(
        {
            "PRETRAIN_IMG_SIZE": 224,
            "PATCH_SIZE": 4,
            "EMBED_DIM": 24,
            "DEPTHS": [1, 1, 1, 1],
            "NUM_HEADS": [3, 6, 12, 24],
            "WINDOW_SIZE": 7,
            "MLP_RATIO": 4.0,
            "QKV_BIAS": True,
            "QK_SCALE": None,
            "DROP_RATE": 0.0,
            "ATTN_DROP_RATE": 0.0,
            "DROP_PATH_RATE": 0.3,
            "APE": False,
            "PATCH_NORM": True,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "USE_CHECKPOINT": False,
            **options,
        }
    )
    return cfg


def detectron2_swin(**arguments) -> nn.Module:
    """Detectron2's Swin with PyTorch's default initialisation."""
    peer = pytest.importorskip("detectron2.modeling.backbone.swin")

    class Peer(peer.SwinTransformer):
        def _init_weights(self, m: nn.Module) -> None:
            pass

    # Its drop path needs a package that this project does not require.
    return Peer(**{**SMALL, "drop_path_rate": 0.0, **arguments})


def scalar(features: dict[str, Tensor]) -> Tensor:
    """A weighted sum of all values of all maps."""
    return sum((f * torch.linspace(-1, 1, f.numel()).view_as(f)).sum() for f in features.values())


def assert_same_features(ours: dict[str, Tensor], theirs: list[Tensor], atol: float = 1e-4):
    assert list(ours) == ["res2", "res3", "res4", "res5"]
    for (name, feature), other in zip(ours.items(), theirs, strict=True):
        torch.testing.assert_close(feature, other, atol=atol, rtol=0, msg=lambda m, n=name: n + m)


# --- parts computed by hand


def test_window_partition_orders_images_then_rows_then_columns():
    image = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    x = torch.stack([image, image + 10])[..., None]  # (2, 2, 4, 1)
    windows = window_partition(x, 2)
    assert windows.squeeze(-1).flatten(1).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [10, 11, 14, 15],
        [12, 13, 16, 17],
    ]
    assert torch.equal(window_reverse(windows, 2, 2, 4), x)


def test_shifted_window_mask_by_hand():
    # 4 x 4 tokens, windows of 2, shift 1: the last row and column come from the opposite border.
    # The upper left window has one region; the upper right is split between columns 2 and 3, the
    # lower left between rows 2 and 3, the lower right between both.
    mask = swin_layers._shifted_window_mask(4, 4, 2, 1, torch.device("cpu"))
    x = -100
    assert mask.tolist() == [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, x, 0, x], [x, 0, x, 0], [0, x, 0, x], [x, 0, x, 0]],
        [[0, 0, x, x], [0, 0, x, x], [x, x, 0, 0], [x, x, 0, 0]],
        [[0, x, x, x], [x, 0, x, x], [x, x, 0, x], [x, x, x, 0]],
    ]


def test_relative_position_index_by_hand():
    # Offsets (row, column) from -1 to 1 in row-major order; 4 is the token itself.
    index = WindowAttention(4, (2, 2), 2).relative_position_index
    assert index.dtype == torch.int64
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    # With one column only the row offsets -1, 0 and 1 exist.
    assert WindowAttention(4, (2, 1), 2).relative_position_index.tolist() == [[1, 0], [2, 1]]


def test_patch_merging_takes_columns_first_and_pads_odd_maps():
    merge = PatchMerging(1)
    merge.norm = nn.Identity()
    merge.reduction = nn.Identity()
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]).view(1, 9, 1)
    assert merge(x, 3, 3).tolist() == [[[0, 3, 1, 4], [2, 5, 0, 0], [6, 0, 7, 0], [8, 0, 0, 0]]]


def test_patch_embed_pads_incomplete_patches_with_zeros():
    embed = PatchEmbed(patch_size=(2, 4), in_chans=1, embed_dim=1)
    nn.init.ones_(embed.proj.weight)
    nn.init.zeros_(embed.proj.bias)
    assert embed(torch.ones(1, 1, 3, 5)).tolist() == [[[[8, 2], [4, 1]]]]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("qk_scale", [None, 0.3])
@pytest.mark.parametrize("num_images, shifted", [(1, False), (1, True), (3, False), (3, True)])
def test_window_attention_equals_a_loop(num_images, shifted, qk_scale, fast):
    torch.manual_seed(0)
    num_windows, num_heads, dim = 4, 3, 12
    attention = WindowAttention(dim, (2, 3), num_heads, qk_scale=qk_scale).double()
    assert runs_fast(attention)
    if not fast:
        run_plain(attention)
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(num_images * num_windows, 6, dim, dtype=torch.float64, requires_grad=True)
    mask = torch.where(torch.rand(num_windows, 6, 6) < 0.4, -100.0, 0.0) if shifted else None
    inputs = [x, *attention.parameters()]
    weight = torch.randn_like(x)

    out = attention(x, mask)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    with torch.no_grad():
        out_without_grad = attention(x, mask)  # fast: another kernel

    rows = []
    for i, window in enumerate(x):
        heads = []
        for head in range(num_heads):
            channels = slice(head * 4, head * 4 + 4)
            q, k, v = (part[:, channels] for part in attention.qkv(window).split(dim, dim=1))
            logits = q @ k.T * (qk_scale or 0.5)
            index = attention.relative_position_index
            logits = logits + attention.relative_position_bias_table[index, head]
            if shifted:
                logits = logits + mask[i % num_windows]
            heads.append(logits.softmax(1) @ v)
        rows.append(attention.proj(torch.cat(heads, 1)))
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out_without_grad, expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("fast", [False, True])
def test_attention_dropout_only_in_training(fast):
    torch.manual_seed(0)
    attention = WindowAttention(8, (2, 2), 2, attn_drop=0.5)
    if not fast:
        run_plain(attention)
    x = torch.randn(3, 4, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not torch.equal(attention.train()(x), attention(x))
            assert torch.equal(attention.eval()(x), attention(x))


def test_shifted_block_separates_opposite_borders():
    # The cyclic shift puts the first row next to the last one; they must not attend to each other.
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, 2, window_size=4, shift_size=2).eval()
    mask = swin_layers._shifted_window_mask(8, 8, 4, 2, torch.device("cpu"))
    x = torch.randn(1, 64, 8, requires_grad=True)
    block.H, block.W = 8, 8
    block(x, mask).view(8, 8, 8)[0].sum().backward()
    seen = x.grad.view(8, 8, 8).abs().amax(2)  # (H, W)
    assert (seen[:2] > 1e-6).all()  # rows 0 and 1 share the shifted window
    assert seen[2:].max() < 1e-20


# --- peers


@pytest.mark.parametrize(
    "arguments, size",
    [
        ({}, (64, 96)),
        ({}, ODD_SIZE),
        ({}, (20, 300)),
        ({"window_size": 4, "depths": (1, 3, 2, 1)}, ODD_SIZE),
        ({"window_size": 1}, (64, 96)),
        ({"ape": True, "pretrain_img_size": 48}, ODD_SIZE),
        ({"patch_norm": False, "qkv_bias": False, "qk_scale": 0.2, "mlp_ratio": 2.5}, (64, 96)),
        ({"patch_size": 2}, (33, 46)),
    ],
)
def test_same_features_and_gradients_as_detectron2(arguments, size):
    model = small_swin(**arguments)
    peer = detectron2_swin(**arguments)
    peer.load_state_dict(model.state_dict())  # strict: the names are the same
    image = torch.randn(2, 3, *size)
    features, peer_features = model(image), peer(image)
    assert_same_features(features, list(peer_features.values()), atol=2e-5)

    scalar(features).backward()
    scalar(peer_features).backward()
    peer_grads = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        scale = max(1.0, peer_grads[name].abs().max().item())
        error = (parameter.grad - peer_grads[name]).abs().max().item()
        assert error <= 1e-4 * scale, f"{name}: {error}"


def test_same_random_numbers_as_detectron2():
    arguments = {"ape": True, "pretrain_img_size": 32}
    torch.manual_seed(3)
    model = SwinTransformer(**SMALL, **arguments, drop_path_rate=0.5, drop_rate=0.1)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    peer = detectron2_swin(**arguments, drop_rate=0.1)
    assert torch.equal(state, torch.get_rng_state())
    for (name, ours), theirs in zip(
        model.state_dict().items(), peer.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name

    for layer, peer_layer in zip(model.layers, peer.layers, strict=True):
        for block, peer_block in zip(layer.blocks, peer_layer.blocks, strict=True):
            peer_block.drop_path = copy.deepcopy(block.drop_path)
    image = torch.randn(3, 3, 64, 64)
    torch.manual_seed(4)
    features = model(image)
    torch.manual_seed(4)
    assert_same_features(features, list(peer(image).values()), atol=2e-5)


def transformers_state_dict(model: SwinTransformer) -> dict[str, Tensor]:
    """The weights under the names of `SwinBackbone` in the transformers package."""
    renamed = {
        "patch_embed.proj.": "swin.embeddings.patch_embeddings.projection.",
        "patch_embed.norm.": "swin.embeddings.norm.",
        "layers.": "swin.encoder.layers.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.proj.": ".attention.o_proj.",
        ".attn.relative_position_bias_table": (
            ".attention.relative_position_bias.relative_position_bias_table"
        ),
    }
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("relative_position_index"):
            continue
        if name.startswith("norm"):
            name = f"hidden_states_norms.stage{int(name[4]) + 1}.{name.split('.')[1]}"
        else:
            for ours, theirs in renamed.items():
                name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = third
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("size", [(64, 96), ODD_SIZE])
def test_same_features_as_transformers(size):
    transformers = pytest.importorskip("transformers")
    model = small_swin().eval()
    config = transformers.SwinConfig(
        embed_dim=SMALL["embed_dim"],
        depths=list(SMALL["depths"]),
        num_heads=list(SMALL["num_heads"]),
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        attn_implementation="eager",
    )
    peer = transformers.SwinBackbone(config).eval()
    missing, unexpected = peer.load_state_dict(transformers_state_dict(model), strict=False)
    assert not unexpected
    assert all(name.startswith("swin.layernorm.") for name in missing)  # not used in a backbone
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_same_features(model(image), list(peer(image).feature_maps))


# --- the whole backbone


def test_every_parameter_gets_a_gradient():
    model = small_swin(ape=True, pretrain_img_size=64)
    scalar(model(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_checkpointing_changes_nothing():
    image = torch.randn(2, 3, 60, 90)
    results = []
    for use_checkpoint in (False, True):
        model = small_swin(drop_path_rate=0.3, drop_rate=0.1, use_checkpoint=use_checkpoint)
        torch.manual_seed(1)
        features = model(image)
        scalar(features).backward()
        results.append((features, {n: p.grad for n, p in model.named_parameters()}))
    (features, grads), (features_again, grads_again) = results
    for name, feature in features.items():
        assert torch.equal(feature, features_again[name]), name
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], msg=name)


def test_drop_path_grows_linearly_and_acts_in_training_only():
    model = SwinTransformer(**{**SMALL, "depths": (1, 2, 1, 2)}, drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "p", 0) for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    image = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(image)["res5"], model(image)["res5"])
    model.eval()
    assert torch.equal(model(image)["res5"], model(image)["res5"])


def test_drop_path_skips_branches_per_image():
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, 2, window_size=2, drop_path=0.5)
    x = torch.randn(400, 4, 8)
    block.H, block.W = 2, 2
    untouched = (block(x, None) == x).flatten(1).all(1)
    # A quarter of the images skip both branches: 100 of 400, standard deviation 8.7.
    assert 70 < untouched.sum() < 130


def test_window_12():
    model = small_swin(window_size=12).eval()
    features = model(torch.randn(1, 3, 96, 96))
    assert [tuple(f.shape) for f in features.values()] == [
        (1, 24, 24, 24),
        (1, 48, 12, 12),
        (1, 96, 6, 6),
        (1, 192, 3, 3),
    ]
    assert all(f.is_contiguous() for f in features.values())


def test_images_of_a_batch_are_independent():
    model = small_swin().eval()
    images = torch.randn(3, 3, *ODD_SIZE)
    together = model(images)
    for i, image in enumerate(images):
        for name, feature in model(image[None]).items():
            torch.testing.assert_close(together[name][i], feature[0], atol=1e-5, rtol=0)


def test_float64_bfloat16_weights_and_autocast():
    model = small_swin().eval()
    image = torch.randn(1, 3, 64, 64)
    reference = copy.deepcopy(model).double()(image.double())
    assert all(f.dtype == torch.float64 for f in reference.values())
    reference = [f.float() for f in reference.values()]
    assert_same_features(model(image), reference, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(image)
    assert_same_features({n: f.float() for n, f in cast.items()}, reference, atol=0.15)
    half = copy.deepcopy(model).bfloat16()(image.bfloat16())
    assert all(f.dtype == torch.bfloat16 for f in half.values())
    assert_same_features({n: f.float() for n, f in half.items()}, reference, atol=0.3)


def test_absolute_position_table_is_resized_bicubically():
    model = small_swin(ape=True, pretrain_img_size=(16, 32)).eval()
    assert model.absolute_pos_embed.shape == (1, 24, 4, 8)
    image = torch.randn(1, 3, 36, 20)  # 9 × 5 tokens
    with torch.no_grad():
        table = model.absolute_pos_embed
        larger = nn.functional.interpolate(table, size=(9, 5), mode="bicubic")
        model.absolute_pos_embed = nn.Parameter(larger)
        expected = model(image)
        model.absolute_pos_embed = nn.Parameter(table)
        assert_same_features(model(image), list(expected.values()), atol=1e-5)


def test_masks_are_computed_once_per_size(monkeypatch):
    computed = []
    compute = swin_layers.window_partition

    def counted(x, window_size):
        computed.extend([x.shape] if x.shape[-1] == 1 else [])  # regions have one channel
        return compute(x, window_size)

    monkeypatch.setattr(swin_layers, "window_partition", counted)
    # An empty cache.
    mask = cached_by_shape(maxsize=8)(inspect.unwrap(swin_layers._shifted_window_mask))
    monkeypatch.setattr(swin_layers, "_shifted_window_mask", mask)
    model = small_swin()
    names = list(model.state_dict())
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    # Stages of 16, 8, 4 and 2 tokens: padded to 21, 14 and 7.
    assert len(computed) == 3
    # Masks from inference mode serve training, and copies of the model.
    scalar(model(torch.randn(1, 3, 64, 64))).backward()
    scalar(copy.deepcopy(model)(torch.randn(1, 3, 64, 64))).backward()
    assert len(computed) == 3
    assert list(model.state_dict()) == names


def test_checkpointed_blocks_keep_their_image_size():
    """A forward pass of another size before backward does not disturb recomputation."""
    images = torch.randn(1, 3, 64, 96), torch.randn(1, 3, 32, 64)
    grads = []
    for use_checkpoint in (False, True):
        model = small_swin(use_checkpoint=use_checkpoint)
        loss, other = (scalar(model(image)) for image in images)
        (loss + other).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# --- calls and attributes that forks of the original rely on


def test_every_module_is_called():
    model = small_swin(drop_path_rate=0.2, drop_rate=0.1, attn_drop_rate=0.1)
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    for training in (True, False):
        called.clear()
        with torch.set_grad_enabled(training):
            model.train(training)(torch.randn(1, 3, 64, 64))
        containers = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        assert {name for name, _ in model.named_modules()} - containers == called


def test_hook_on_softmax_sees_attention_weights():
    model = small_swin().eval()
    seen = []
    model.layers[3].blocks[1].attn.softmax.register_forward_hook(lambda *x: seen.append(x[2]))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    (weights,) = seen
    assert weights.shape == (2, 24, 49, 49)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 24, 49))


def test_replaced_parts_are_called():
    """Attributes and calls as in the original: the block's H and W, keywords, return values."""
    calls = []

    class Attention(WindowAttention):
        def forward(self, x, mask=None):
            calls.append(("attn", None if mask is None else tuple(mask.shape)))
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = self.softmax(q * self.scale @ k.transpose(-2, -1))
            return self.proj_drop(
                self.proj((self.attn_drop(weights) @ v).transpose(1, 2).flatten(2))
            )

    class Block(SwinTransformerBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.attn = Attention(self.dim, (self.window_size,) * 2, self.num_heads)

        def forward(self, x, mask_matrix):
            calls.append(("block", self.H, self.W, self.mlp_ratio))
            return super().forward(x, mask_matrix)

    layer = BasicLayer(8, 2, 2, 4, downsample=PatchMerging)
    layer.blocks = nn.ModuleList(Block(8, 2, 4, shift) for shift in (0, 2))
    out, height, width, merged, next_height, next_width = layer(torch.randn(3, 35, 8), 5, 7)
    assert calls == [
        ("block", 5, 7, 4.0),
        ("attn", None),
        ("block", 5, 7, 4.0),
        ("attn", (4, 16, 16)),
    ]
    assert (out.shape, height, width) == ((3, 35, 8), 5, 7)
    assert (merged.shape, next_height, next_width) == ((3, 12, 16), 3, 4)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_stage_compiles_without_a_graph_break(use_checkpoint):
    stage = BasicLayer(8, 2, 2, 4, downsample=PatchMerging, use_checkpoint=use_checkpoint)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 35, 8)
    grads = []
    for function in (stage, compiled):
        stage.zero_grad()
        out = function(x, 5, 7)[3]
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in stage.parameters())])
    for eager, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_frozen_stages_stay_frozen_in_training():
    model = small_swin(frozen_stages=2, ape=True, drop_rate=0.1, drop_path_rate=0.2)
    assert model.train() is model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("patch_embed.", "layers.0.")) or n == "absolute_pos_embed"
    }
    assert not model.layers[0].training and not model.patch_embed.training
    assert not model.pos_drop.training
    assert model.layers[1].training
    assert all(p.requires_grad for p in small_swin(frozen_stages=-1).parameters())


def test_init_weights_draws_a_truncated_normal():
    model = small_swin(embed_dim=48)
    model.init_weights()
    weight = model.layers[3].blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (model.layers[0].blocks[0].attn.qkv.bias == 0).all()
    assert (model.norm2.weight == 1).all() and (model.norm2.bias == 0).all()


# --- as a Detectron2 backbone


def test_backbone_from_config():
    cfg = swin_config(APE=True, WINDOW_SIZE=4, PRETRAIN_IMG_SIZE=64, DROP_RATE=0.25)
    backbone = build_backbone(cfg)
    assert BACKBONE_REGISTRY.get("D2SwinTransformer") is D2SwinTransformer
    assert isinstance(backbone, D2SwinTransformer)
    assert isinstance(backbone, SwinTransformer) and isinstance(backbone, Backbone)
    assert backbone.size_divisibility == 32
    assert backbone.output_shape() == {
        "res2": ShapeSpec(channels=24, stride=4),
        "res3": ShapeSpec(channels=48, stride=8),
        "res4": ShapeSpec(channels=96, stride=16),
        "res5": ShapeSpec(channels=192, stride=32),
    }
    assert backbone.absolute_pos_embed.shape == (1, 24, 16, 16)
    assert backbone.layers[0].window_size == 4
    assert backbone.pos_drop.p == 0.25
    assert backbone.layers[3].blocks[0].drop_path.p == pytest.approx(0.3)
    for name, feature in backbone(torch.randn(1, 3, 64, 96)).items():
        spec = backbone.output_shape()[name]
        assert feature.shape == (1, spec.channels, 64 // spec.stride, 96 // spec.stride)


@pytest.mark.parametrize(
    "key, value, read",
    [
        ("PATCH_SIZE", 2, lambda b: b.output_shape()["res5"].stride == 16),
        ("MLP_RATIO", 2.0, lambda b: b.layers[0].blocks[0].mlp.fc1.out_features == 48),
        ("QKV_BIAS", False, lambda b: b.layers[0].blocks[0].attn.qkv.bias is None),
        ("QK_SCALE", 0.5, lambda b: b.layers[0].blocks[0].attn.scale == 0.5),
        ("DROP_RATE", 0.5, lambda b: b.layers[0].blocks[0].mlp.drop.p == 0.5),
        ("ATTN_DROP_RATE", 0.5, lambda b: b.layers[0].blocks[0].attn.attn_drop.p == 0.5),
        ("PATCH_NORM", False, lambda b: b.patch_embed.norm is None),
        ("USE_CHECKPOINT", True, lambda b: all(layer.use_checkpoint for layer in b.layers)),
        ("DEPTHS", [1, 2, 1, 1], lambda b: len(b.layers[1].blocks) == 2),
        ("NUM_HEADS", [2, 2, 2, 2], lambda b: b.layers[3].blocks[0].attn.num_heads == 2),
        ("EMBED_DIM", 48, lambda b: b.output_shape()["res2"].channels == 48),
    ],
)
def test_each_config_key_is_read(key, value, read):
    assert not read(D2SwinTransformer(swin_config(), ShapeSpec(channels=3)))
    assert read(D2SwinTransformer(swin_config(**{key: value}), ShapeSpec(channels=3)))


def test_backbone_from_keywords_returns_out_features():
    backbone = D2SwinTransformer(out_features=["res5", "res3"], in_chans=4, **SMALL)
    assert list(backbone.output_shape()) == ["res5", "res3"]
    assert set(backbone(torch.randn(1, 4, 32, 32))) == {"res3", "res5"}
    with pytest.raises(AssertionError, match=r"\(4, 32, 32\)"):
        backbone(torch.randn(4, 32, 32))


def test_stem_has_three_channels_whatever_pixel_mean_says():
    class ColoursOnly(D2SwinTransformer):
        def forward(self, x):
            return super().forward(x[:, :3])

    image = torch.randn(1, 4, 64, 64)
    backbone = D2SwinTransformer(swin_config(), ShapeSpec(channels=4))
    with pytest.raises(ValueError, match=r"4 channels .*MODEL\.PIXEL_MEAN.* this Swin has 3"):
        backbone(image)
    colours = ColoursOnly(swin_config(), ShapeSpec(channels=4))
    assert colours(image)["res2"].shape == (1, 24, 16, 16)
    backbone.patch_embed.proj = nn.Conv2d(4, 24, 4, 4)
    assert backbone(image)["res2"].shape == (1, 24, 16, 16)


def test_subclass_of_another_project_is_built_from_a_config():
    class Adapted(D2SwinTransformer):
        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            self.adapter = nn.Linear(2, 2)

    assert set(Adapted(swin_config(), None).output_shape()) == {"res2", "res3", "res4", "res5"}


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"NUM_HEADS": [5, 6, 12, 24]}, r"MODEL\.SWIN\.NUM_HEADS.*24 channels of stage 0.*5 heads"),
        ({"NUM_HEADS": [0, 6, 12, 24]}, r"MODEL\.SWIN\.NUM_HEADS"),
        ({"NUM_HEADS": [3, 6, 12]}, r"MODEL\.SWIN\.DEPTHS\) has 4 stages.*NUM_HEADS\) has 3"),
        ({"DEPTHS": [1, 1, 0, 1]}, r"MODEL\.SWIN\.DEPTHS\) is \[1, 1, 0, 1\]"),
        ({"WINDOW_SIZE": 0}, r"MODEL\.SWIN\.WINDOW_SIZE\) is 0"),
        ({"EMBED_DIM": -24}, r"MODEL\.SWIN\.EMBED_DIM\) is -24"),
        ({"PATCH_SIZE": 0}, r"MODEL\.SWIN\.PATCH_SIZE\) is 0"),
        ({"MLP_RATIO": 0.0}, r"MODEL\.SWIN\.MLP_RATIO\) is 0\.0"),
        ({"PRETRAIN_IMG_SIZE": 3, "APE": True}, r"MODEL\.SWIN\.PRETRAIN_IMG_SIZE\) is 3"),
        ({"DROP_PATH_RATE": 1.0}, r"MODEL\.SWIN\.DROP_PATH_RATE\) is 1\.0"),
        ({"DROP_PATH_RATE": -0.1}, r"MODEL\.SWIN\.DROP_PATH_RATE\) is -0\.1"),
        ({"DROP_RATE": 1.5}, r"MODEL\.SWIN\.DROP_RATE\) is 1\.5"),
        ({"ATTN_DROP_RATE": 2.0}, r"MODEL\.SWIN\.ATTN_DROP_RATE\) is 2\.0"),
        ({"OUT_FEATURES": ["res2", "p3"]}, r"MODEL\.SWIN\.OUT_FEATURES\) is \['res2', 'p3'\]"),
        ({"OUT_FEATURES": []}, r"MODEL\.SWIN\.OUT_FEATURES\) is \[\]"),
    ],
)
def test_bad_config_names_its_key(options, culprit):
    with pytest.raises(ValueError, match=culprit):
        D2SwinTransformer(swin_config(**options), ShapeSpec(channels=3))


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        ({"out_indices": (0, 4)}, r"out_indices is \(0, 4\)"),
        ({"frozen_stages": 6}, "frozen_stages is 6"),
        ({"patch_size": (2, 4)}, "patches must be square"),
    ],
)
def test_bad_keyword_is_named(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        D2SwinTransformer(**{**SMALL, **arguments})


# --- accelerator


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_cuda_gives_the_cpu_features_and_gradients(dtype, tolerance):
    model = small_swin(embed_dim=96)
    twin = copy.deepcopy(model).cuda()
    image = torch.randn(2, 3, *ODD_SIZE)
    model(image)["res5"].square().mean().backward()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        twin(image.cuda())["res5"].float().square().mean().backward()
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # norms of the other stages
            continue
        error = (grads[name].cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, f"{name}: {error}"
