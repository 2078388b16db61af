"""The op against a naive loop, numbers computed by hand, float64 gradients and bad shapes.

Every test runs on the compiled kernels and on the PyTorch formulation.

Shape letters as in the module: B batch, S values, Q queries, M heads, D channels, L levels,
P points.
"""

import importlib
import math

import pytest
import torch
from torch import Tensor

from mask2former.ops import MSDeformAttn, backend, ms_deform_attn, ms_deform_attn_fused
from mask2former.ops.ms_deform_attn import _gather_formulation, exported_as

op_module = importlib.import_module("mask2former.ops.ms_deform_attn")

SHAPES = [(3, 4), (2, 1), (1, 1)]  # the last level is a single pixel


@pytest.fixture(params=["compiled", "pytorch"], autouse=True)
def op_backend(request, monkeypatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(op_module, "has_kernel", lambda device: False)
    elif backend("cpu") != "compiled":
        pytest.skip("the library was not built here: no C++ compiler")
    assert backend("cpu") == request.param


def naive(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition as a loop over points, in Python floats."""
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = torch.zeros(batch, queries, heads, dim, dtype=torch.float64)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        x, y = x * width - 0.5, y * height - 0.5
                        weight = weights[b, q, m, level, p].item()
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if not (0 <= row < height and 0 <= column < width):
                                    continue
                                share = (1 - abs(y - row)) * (1 - abs(x - column))
                                index = starts[level] + row * width + column
                                out[b, q, m] += weight * share * value[b, index, m].double()
    return out.flatten(2)


def random_inputs(
    batch: int = 2, queries: int = 5, shapes: list | None = None, dtype=torch.float64, points=2
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations inside and outside the levels, and normalised weights."""
    shapes = SHAPES if shapes is None else shapes
    heads, dim, levels = 2, 3, len(shapes)
    generator = torch.Generator().manual_seed(0)
    total = sum(h * w for h, w in shapes)
    value = torch.randn(batch, total, heads, dim, generator=generator, dtype=dtype)
    size = (batch, queries, heads, levels, points)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(size, generator=generator, dtype=dtype).flatten(3).softmax(-1)
    return value, locations, weights.view(size)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.25, 0.25, 1.0),  # centre of the first pixel
        (0.5, 0.5, 2.5),  # between all four pixels
        (0.5, 0.25, 1.5),  # between the pixels of the first row
        (0.0, 0.0, 0.25),  # corner: a quarter of the pixel, the rest is outside
        (1.0, 0.25, 1.0),  # right border: half of 2
        (1.25, 0.75, 0.0),  # one pixel beyond the last column
        (-3.0, 0.5, 0.0),
        (0.5, 7.0, 0.0),
    ],
)
def test_bilinear_by_hand(x, y, expected):
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    locations = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(2, 2)], locations, torch.ones(1, 1, 1, 1, 1))
    assert out.item() == pytest.approx(expected, abs=1e-6)


def test_levels_heads_and_weights_by_hand():
    # Level 0 is one pixel, level 1 a row of two; head 0 holds 1, 2, 3 and head 1 ten times that.
    value = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]).view(1, 3, 2, 1)
    locations = torch.tensor([[0.5, 0.5], [0.75, 0.5]]).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).view(1, 1, 2, 2, 1)
    out = ms_deform_attn(value, [(1, 1), (1, 2)], locations.expand(1, 1, 2, 2, 1, 2), weights)
    # Head 0: 0.25·1 + 0.75·3; head 1: 1·10 + 0·30.
    torch.testing.assert_close(out, torch.tensor([[[2.5, 10.0]]]))


@pytest.mark.parametrize("shapes", [SHAPES, [(5, 3)], [(1, 1)], [(1, 6), (6, 1)]])
def test_naive_loop(shapes):
    value, locations, weights = random_inputs(shapes=shapes)
    out = ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(out, naive(value, shapes, locations, weights))


def test_odd_batch():
    """The batch size need not be a multiple of the original's im2col_step."""
    value, locations, weights = random_inputs(batch=33, queries=1)
    out = ms_deform_attn(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, naive(value, SHAPES, locations, weights))


def test_shapes_as_tensor():
    inputs = random_inputs()
    expected = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    out = ms_deform_attn(inputs[0], torch.tensor(SHAPES), *inputs[1:])
    assert torch.equal(out, expected)


def test_non_contiguous():
    inputs = random_inputs()
    expected = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    out = ms_deform_attn(strided[0], SHAPES, *strided[1:])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert out.is_contiguous()


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0), (0, 0)])
def test_empty(batch, queries):
    inputs = [x.requires_grad_() for x in random_inputs(batch=batch, queries=queries)]
    out = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    assert out.shape == (batch, queries, 6)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


def test_empty_level_contributes_nothing():
    value, locations, weights = random_inputs(shapes=[(2, 3)])
    expected = ms_deform_attn(value, [(2, 3)], locations, weights)
    locations = torch.cat([locations, locations], dim=3)
    weights = torch.cat([weights, weights], dim=3)
    out = ms_deform_attn(value, [(2, 3), (0, 4)], locations, weights)
    torch.testing.assert_close(out, expected)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in random_inputs(batch=1, queries=2)]
    assert torch.autograd.gradcheck(
        lambda value, *rest: ms_deform_attn(value, SHAPES, *rest), inputs, fast_mode=False
    )


def test_gradcheck_fused():
    value, reference, offsets, logits = fused_inputs(batch=1, queries=2)
    inputs = [x.requires_grad_() for x in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(
        lambda value, *rest: ms_deform_attn_fused(value, SHAPES, *rest), inputs, fast_mode=False
    )


def fused_inputs(batch=2, queries=5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, locations, weights = random_inputs(batch, queries)
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(batch, queries, len(SHAPES), 2, generator=generator).double()
    offsets = torch.randn(locations.shape, generator=generator).double()
    logits = torch.randn(weights.flatten(3).shape, generator=generator).double()
    return value, reference, offsets, logits


@pytest.mark.parametrize("reference_size", [(2, 5, 3), (1, 5, 3), (2, 5, 1), (2, 1, 3), (1, 1, 1)])
def test_fused_equals_classic(reference_size):
    value, reference, offsets, logits = fused_inputs()
    batch, queries, levels = reference_size
    reference = reference[:batch, :queries, :levels]
    # A pixel is 1 / width by 1 / height of its level.
    locations = offsets.clone()
    for level, (height, width) in enumerate(SHAPES):
        locations[..., level, :, 0] /= width
        locations[..., level, :, 1] /= height
    locations += reference[:, :, None, :, None]
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = ms_deform_attn(value, SHAPES, locations, weights.view(offsets.shape[:-1]))
    out = ms_deform_attn_fused(value, SHAPES, reference, offsets, logits)
    torch.testing.assert_close(out, expected)


def test_fused_reference_boxes_by_hand():
    # Box around (0.5, 0.5), 0.5 wide and 1 high, two points: an offset of (1, -2) is
    # (1 / 2) · (0.5 / 2) = 0.125 to the right and (2 / 2) · (1 / 2) = 0.5 up: (0.625, 0).
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    reference = torch.tensor([0.5, 0.5, 0.5, 1.0]).view(1, 1, 1, 4)
    offsets = torch.tensor([[1.0, -2.0], [0.0, 0.0]]).view(1, 1, 1, 1, 2, 2)
    logits = torch.tensor([100.0, 0.0]).view(1, 1, 1, 2)
    out = ms_deform_attn_fused(value, [(2, 2)], reference, offsets, logits)
    # In pixels x = 0.75, y = -0.5: half outside, the other half 0.25·1 + 0.75·2.
    assert out.item() == pytest.approx(0.875, abs=1e-5)


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_fused_broadcasts_reference_points(last, needs_grad):
    value, _, offsets, logits = fused_inputs()
    shared = torch.rand(1, 5, 1, last).double().requires_grad_(needs_grad)
    repeated = shared.detach().repeat(2, 1, len(SHAPES), 1).requires_grad_(needs_grad)
    out = ms_deform_attn_fused(value, SHAPES, shared, offsets, logits)
    expected = ms_deform_attn_fused(value, SHAPES, repeated, offsets, logits)
    torch.testing.assert_close(out, expected)
    if needs_grad:
        out.square().sum().backward()
        expected.square().sum().backward()
        summed = repeated.grad.sum((0, 2), keepdim=True)
        torch.testing.assert_close(shared.grad, summed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -3e38, 2.0**31])
@pytest.mark.parametrize("axis", [0, 1])
def test_locations_far_outside_or_not_finite_are_ignored(bad, axis):
    value, locations, weights = random_inputs(dtype=torch.float32)
    locations = locations.clamp(0.1, 0.9)
    locations[:, 0, :, :, 0, axis] = bad  # the first of the two points of query 0
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn(value, SHAPES, locations, weights)
    rest = (x.detach()[:, :, :, :, 1:] for x in (locations, weights))
    expected = ms_deform_attn(value, SHAPES, *rest)
    torch.testing.assert_close(out[:, 0], expected[:, 0])
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not locations.grad[:, 0, :, :, 0].any() and not weights.grad[:, 0, :, :, 0].any()
    assert locations.grad[:, 0, :, :, 1].any() and weights.grad[:, 0, :, :, 1].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_neighbours_in_memory_do_not_leak(poison):
    """Beyond the right border, the next value in memory belongs to the next row or level."""
    weights = torch.ones(1, 1, 1, 2, 1)
    # A level of 2 x 2 pixels, then one of 1 x 1; one location at pixel (1.25, -0.5) of the first
    # level, and one far outside.
    value = torch.tensor([1.0, 2.0, poison, 4.0, poison]).view(1, 5, 1, 1).requires_grad_()
    locations = torch.tensor([[0.875, 0.0], [9.0, 9.0]]).view(1, 1, 1, 2, 1, 2)
    out = ms_deform_attn(value, [(2, 2), (1, 1)], locations, weights)
    assert out.item() == pytest.approx(0.75 * 0.5 * 2)
    out.backward()
    assert value.grad.flatten().tolist() == pytest.approx([0, 0.75 * 0.5, 0, 0, 0])
    # Pixel (1.25, 1.25), which is beyond the last row as well.
    value = torch.tensor([1.0, 2.0, poison, 4.0, poison]).view(1, 5, 1, 1)
    locations = torch.tensor([[0.875, 0.875], [9.0, 9.0]]).view(1, 1, 1, 2, 1, 2)
    out = ms_deform_attn(value, [(2, 2), (1, 1)], locations, weights)
    assert out.item() == pytest.approx(0.75 * 0.75 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(dtype):
    """Only values and output are rounded, so the error is half an ulp of the output."""
    inputs = random_inputs(dtype=torch.float32)
    value = inputs[0].to(dtype).requires_grad_()
    locations, weights = (x.requires_grad_() for x in inputs[1:])
    out = ms_deform_attn(value, SHAPES, locations, weights)
    assert out.dtype == dtype
    grad = torch.ones_like(out)
    grads = torch.autograd.grad(out, (value, locations, weights), grad)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    exact = [x.detach().double().requires_grad_() for x in (value, locations, weights)]
    expected = ms_deform_attn(exact[0], SHAPES, *exact[1:])
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(grads[0].double(), expected_grads[0], rtol=rounding, atol=1e-6)
    for ours, theirs in zip(grads[1:], expected_grads[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    # Locations and weights in half precision are converted without further rounding.
    halves = [x.detach().to(dtype) for x in (locations, weights)]
    out = ms_deform_attn(value, SHAPES, *halves)
    torch.testing.assert_close(out, ms_deform_attn(value, SHAPES, *(x.float() for x in halves)))


def test_wrong_dtypes_devices_and_levels():
    value, locations, weights = random_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="value must be one of .*, got torch.int64"):
        ms_deform_attn(value.long(), SHAPES, locations, weights)
    with pytest.raises(ValueError, match="sampling locations are torch.float64.*torch.float32"):
        ms_deform_attn(value, SHAPES, locations.double(), weights)
    with pytest.raises(ValueError, match="attention weights are torch.int64"):
        ms_deform_attn(value, SHAPES, locations, weights.long())
    with pytest.raises(ValueError, match="attention weights are on meta, but value is on cpu"):
        ms_deform_attn(value, SHAPES, locations, weights.to("meta"))
    with pytest.raises(ValueError, match="at most 16 levels are supported, got 17"):
        ms_deform_attn(value, [(1, 1)] * 17, locations, weights)
    with pytest.raises(ValueError, match=r"got \[\(-3, -5\)\]"):
        ms_deform_attn(value, [(-3, -5)], locations, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value must be \(B, S, M, D\)"),
        (lambda v, s, x, w: (v, s, x[..., :1], w), r"sampling locations must be"),
        (lambda v, s, x, w: (v, s, x[0], w), r"sampling locations must be"),
        (lambda v, s, x, w: (v, s, x[:1], w[:1]), r"sampling locations are \(1, 5, 2, 3, 2, 2\)"),
        (lambda v, s, x, w: (v, s, x[:, :, :1], w), r"must be \(2, 5, 2, 3, 2, 2\)"),
        (lambda v, s, x, w: (v, s, x[:, :, :, :2], w), r"3 levels they must be"),
        (lambda v, s, x, w: (v, s, x, w[..., :1]), r"attention weights are \(2, 5, 2, 3, 1\)"),
        (lambda v, s, x, w: (v, s, x, w.flatten(3)), r"attention weights are \(2, 5, 2, 6\)"),
        (lambda v, s, x, w: (v[:, 1:], s, x, w), r"hold 15 locations, but value has 14"),
    ],
)
def test_wrong_shapes(change, message):
    value, locations, weights = random_inputs()
    value, shapes, locations, weights = change(value, SHAPES, locations, weights)
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(value, shapes, locations, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, r, o, a: (v, r[..., :1], o, a), "must end in 2"),
        (lambda v, r, o, a: (v, r[0], o, a), "reference points"),
        (lambda v, r, o, a: (v, r[:, :, :2], o, a), "reference points"),
        (lambda v, r, o, a: (v, r[:, :3], o, a), "reference points"),
        (lambda v, r, o, a: (v, r, o[:, :, :, :1], a), "sampling offsets"),
        (lambda v, r, o, a: (v, r, o[..., 0], a), "sampling offsets"),
        (lambda v, r, o, a: (v, r, o.float()[:1], a), "sampling offsets are"),
        (lambda v, r, o, a: (v[:, :, :1], r, o, a), r"must be \(2, Q, 1, 3, P, 2\)"),
        (lambda v, r, o, a: (v, r, o, a[..., :5]), "attention logits"),
        (lambda v, r, o, a: (v, r, o, a[:, :2]), "attention logits"),
        (lambda v, r, o, a: (v[:, 1:], r, o, a), "hold 15 locations, but value has 14"),
    ],
)
def test_fused_wrong_shapes(change, message):
    value, *rest = change(*fused_inputs())
    with pytest.raises(ValueError, match=message):
        ms_deform_attn_fused(value, SHAPES, *rest)


def test_original_import_paths():
    modules = importlib.import_module("mask2former.modeling.pixel_decoder.ops.modules")
    functions = importlib.import_module("mask2former.modeling.pixel_decoder.ops.functions")
    assert modules.MSDeformAttn is MSDeformAttn
    value, locations, weights = random_inputs()
    out = functions.MSDeformAttnFunction.apply(
        value, torch.tensor(SHAPES), torch.tensor([0, 12, 14]), locations, weights, 128
    )
    assert torch.equal(out, ms_deform_attn(value, SHAPES, locations, weights))


def test_original_pytorch_function(monkeypatch):
    path = "mask2former.modeling.pixel_decoder.ops.functions.ms_deform_attn_func"
    functions = importlib.import_module(path)
    value, locations, weights = random_inputs()
    expected = naive(value, SHAPES, locations, weights)
    monkeypatch.setattr(op_module, "_formulation", lambda device: pytest.fail("called a kernel"))
    out = functions.ms_deform_attn_core_pytorch(value, torch.tensor(SHAPES), locations, weights)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="hold 15 locations, but value has 14"):
        functions.ms_deform_attn_core_pytorch(value[:, 1:], SHAPES, locations, weights)


def test_module_starts_from_a_star_of_points():
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=8, n_points=3)
    bias = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    # Head m points in direction m · 45°, scaled so that the larger coordinate is 1.
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for level in range(2):
            for point in range(3):
                expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
                torch.testing.assert_close(bias[head, level, point], expected, atol=1e-5, rtol=0)


def test_module_names_and_bad_arguments():
    module = MSDeformAttn()
    assert (module.d_model, module.n_levels, module.n_heads, module.n_points) == (256, 4, 8, 4)
    names = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert list(module.state_dict()) == keys
    with pytest.raises(ValueError, match="d_model=10 is not divisible by n_heads=4"):
        MSDeformAttn(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="got 1 spatial shapes for 4 levels"):
        module(torch.zeros(1, 1, 256), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 256), [(1, 1)])


def module_and_inputs() -> tuple[MSDeformAttn, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=12, n_levels=3, n_heads=2, n_points=2).double()
    for parameter in module.parameters():  # including those initialised to zero
        torch.nn.init.normal_(parameter, std=0.5)
    query, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 15, 12).double()
    return module, query, torch.rand(1, 5, 3, 2).double(), memory


def test_module_padding_mask_zeroes_values():
    module, query, reference, memory = module_and_inputs()
    padding = torch.zeros(2, 15, dtype=torch.bool)
    padding[0, 3:9] = True
    padding[1, 14] = True
    out = module(query, reference, memory, torch.tensor(SHAPES), None, padding)
    # The mask applies after the value projection, so that it removes the bias too.
    value = module.value_proj(memory) * ~padding[..., None]
    expected = ms_deform_attn_fused(
        value.view(2, 15, 2, 6),
        SHAPES,
        reference,
        module.sampling_offsets(query).view(2, 5, 2, 3, 2, 2),
        module.attention_weights(query).view(2, 5, 2, 6),
    )
    torch.testing.assert_close(out, module.output_proj(expected))
    assert not torch.allclose(out, module(query, reference, memory, SHAPES))
    nothing = torch.zeros_like(padding)
    torch.testing.assert_close(
        module(query, reference, memory, SHAPES, None, nothing),
        module(query, reference, memory, SHAPES),
    )


def test_module_broadcasts_reference_points_and_padding_mask():
    module, query, _, memory = module_and_inputs()
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 12, 14])
    reference, padding = torch.rand(1, 5, 1, 2).double(), torch.arange(15)[None] % 4 == 0
    out = module(query, reference, memory, shapes, starts, padding)
    reference, padding = reference.expand(2, 5, 3, 2), padding.expand(2, 15)
    torch.testing.assert_close(out, module(query, reference, memory, shapes, starts, padding))


def test_subclass_with_a_forward_of_its_own():
    """The original's steps: the attributes and the function are all that a subclass needs."""

    class Own(MSDeformAttn):
        def forward(self, query, reference, memory, shapes, starts):
            batch, queries, _ = query.shape
            value = self.value_proj(memory).view(batch, -1, self.n_heads, self.d_model // 2)
            sizes = (batch, queries, self.n_heads, self.n_levels, self.n_points)
            offsets = self.sampling_offsets(query).view(*sizes, 2)
            weights = self.attention_weights(query).view(*sizes[:3], -1).softmax(-1).view(sizes)
            pixels = torch.stack([shapes[..., 1], shapes[..., 0]], -1)
            locations = reference[:, :, None, :, None] + offsets / pixels[:, None]
            functions = importlib.import_module("mask2former.modeling.pixel_decoder.ops.functions")
            out = functions.MSDeformAttnFunction.apply(
                value, shapes, starts, locations, weights, self.im2col_step
            )
            return self.output_proj(out)

    module, query, reference, memory = module_and_inputs()
    own = Own(d_model=12, n_levels=3, n_heads=2, n_points=2).double()
    own.load_state_dict(module.state_dict())
    inputs = (query, reference, memory, torch.tensor(SHAPES), torch.tensor([0, 12, 14]))
    torch.testing.assert_close(own(*inputs), module(*inputs))


def test_module_exports_with_dynamic_sizes():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MSDeformAttn(d_model=8, n_levels=1, n_heads=2, n_points=2)
            torch.nn.init.normal_(self.attention.sampling_offsets.weight)

        def forward(self, x):
            memory = x.flatten(2).transpose(1, 2)
            reference = memory.sigmoid()[:, :, None, :2]
            return self.attention(memory, reference, memory, [(x.shape[2], x.shape[3])])

    network = Network()
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (torch.randn(2, 8, 5, 6),), dynamic_shapes=(sizes,))
    other = torch.randn(2, 8, 9, 4)
    torch.testing.assert_close(program.module()(other), network(other))


@pytest.mark.parametrize("formulation", ["gather", "gridsample"])
def test_formulations_for_export_are_the_op(formulation):
    value, locations, weights = random_inputs()
    locations[0, 0, 0, 0, 0, 0] = float("nan")
    expected = ms_deform_attn(value, SHAPES, locations, weights)
    with exported_as(formulation):
        out = ms_deform_attn(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, expected)


def test_gathers_of_large_maps_in_half_precision():
    """131,072 positions, twice the largest number of fp16: corners of exact sampling points."""
    height, width = 512, 256
    value = torch.randn(1, height * width, 1, 2, dtype=torch.float16)
    pixels = [(0, 0), (300, 0), (511, 255), (510, 3), (256, 129)]
    points = torch.tensor([((x + 0.5) / width, (y + 0.5) / height) for y, x in pixels])
    locations = points.half().view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(pixels), 1, 1, 1, dtype=torch.float16)
    output = _gather_formulation(value, [(height, width)], locations, weights)
    expected = value[0, [y * width + x for y, x in pixels], 0]
    assert torch.equal(output[0], expected)


def test_unknown_formulation():
    text = "one of gather, gridsample, custom, not 'onnx'"
    with pytest.raises(ValueError, match=text), exported_as("onnx"):
        pass


def test_module_gradients_reach_every_parameter():
    module, query, reference, memory = module_and_inputs()
    module(query, reference, memory, SHAPES).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_used_in_inference_mode_first():
    """What inference mode caches for a shape works in training afterwards."""
    shapes = [(5, 3)]  # used by no other test
    value, offsets = torch.randn(1, 15, 1, 2), torch.randn(1, 4, 1, 1, 2, 2)
    reference, logits = torch.rand(1, 4, 1, 2), torch.randn(1, 4, 1, 2, requires_grad=True)
    with torch.inference_mode():
        expected = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    offsets.requires_grad_()
    out = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert offsets.grad.any() and logits.grad.any()
