"""Multi-scale deformable attention (Deformable DETR, equation 3) as a function and as a module.

Every query looks at a few points around its reference point, on every level, in every head. Values
are sampled as grid_sample does with bilinear interpolation, zeros outside and
``align_corners=False``. A location that is not finite counts as outside.

Two levels: `ms_deform_attn` takes sampling locations and normalised weights, the classic
signature; `ms_deform_attn_fused` takes what the projections give and does the rest in one pass.
Both run the compiled kernels where the device has them, see `backend`, and otherwise, and while a
model is exported, their formulation in PyTorch. Any of float32, float16, bfloat16 and float64 will
do for the values; locations, weights and sums are float32 then (float64 for float64).

Shape letters: B batch, S values of all levels together, Q queries, M heads, D channels of a head,
L levels, P points per level and head.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._kernels import has_kernel

SpatialShapes = Sequence[Sequence[int]] | Tensor

# Of the kernels, see csrc/ms_deform_attn.h.
_MAX_LEVELS = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def backend(device: torch.device | str) -> str:
    """What runs the op on a device: "compiled" or "pytorch"."""
    return "compiled" if has_kernel(torch.device(device)) else "pytorch"


def _host_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """Level sizes as host integers; a tensor on a GPU costs a synchronisation.

    Raises:
        ValueError: a size is negative, or there are more levels than the kernels support.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    if len(shapes) > _MAX_LEVELS:
        raise ValueError(f"at most {_MAX_LEVELS} levels are supported, got {len(shapes)}")
    if any(height < 0 or width < 0 or height * width >= 2**31 for height, width in shapes):
        raise ValueError(f"spatial shapes must be in 0 ... 2**31 - 1 positions, got {shapes}")
    return shapes


@functools.lru_cache(maxsize=32)
def _widths_and_heights(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Width and height of every level, (L, 2). Kept, as a GPU would wait for each copy."""
    # A tensor made in inference mode could not be used for training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(shapes, dtype=dtype).flip(-1).to(device)


def _accumulate_dtype(value: Tensor) -> torch.dtype:
    """The dtype of everything but the values."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _check(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    """Raise ValueError where the arguments do not fit together."""
    _check_value(value, shapes)
    if locations.dim() != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"sampling locations must be (B, Q, M, L, P, 2), got {tuple(locations.shape)}"
        )
    batch, _, num_heads, _ = value.shape
    expected = (batch, locations.shape[1], num_heads, len(shapes), locations.shape[4])
    if tuple(locations.shape[:5]) != expected:
        raise ValueError(
            f"sampling locations are {tuple(locations.shape)}; with value {tuple(value.shape)} and "
            f"{len(shapes)} levels they must be {(*expected, 2)}"
        )
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"attention weights are {tuple(weights.shape)}, but the locations ask for {expected}"
        )
    _check_dtypes_and_devices(
        value, {"sampling locations": locations, "attention weights": weights}
    )


def _check_value(value: Tensor, shapes: list[tuple[int, int]]) -> None:
    """Raise ValueError where `value` is none, or does not fit the shapes."""
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), got {tuple(value.shape)}")
    total = sum(height * width for height, width in shapes)
    if total != value.shape[1]:
        raise ValueError(
            f"spatial shapes {shapes} hold {total} locations, but value has {value.shape[1]}"
        )
    if value.dtype not in _DTYPES:
        raise ValueError(f"value must be one of {_DTYPES}, got {value.dtype}")


def _check_dtypes_and_devices(value: Tensor, others: dict[str, Tensor]) -> None:
    """Raise ValueError unless the others are where value is, and not more exact than the sums."""
    allowed = [dtype for dtype in _DTYPES if dtype != torch.float64 or value.dtype == dtype]
    for name, tensor in others.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} are on {tensor.device}, but value is on {value.device}")
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} are {tensor.dtype}, which does not go with {value.dtype}")


def _check_fused(
    value: Tensor,
    shapes: list[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> None:
    """Raise ValueError where the arguments of `ms_deform_attn_fused` do not fit together."""
    _check_value(value, shapes)
    levels = len(shapes)
    if offsets.dim() != 6 or offsets.shape[3] != levels or offsets.shape[-1] != 2:
        raise ValueError(
            f"sampling offsets must be (B, Q, M, {levels}, P, 2) with {levels} levels, got "
            f"{tuple(offsets.shape)}"
        )
    batch, num_queries, num_heads, _, num_points, _ = offsets.shape
    if (batch, num_heads) != (value.shape[0], value.shape[2]):
        raise ValueError(
            f"sampling offsets are {tuple(offsets.shape)}; with value {tuple(value.shape)} they "
            f"must be ({value.shape[0]}, Q, {value.shape[2]}, {levels}, P, 2)"
        )
    if reference.shape[-1] not in (2, 4):
        raise ValueError(
            "reference points must end in 2 (x, y) or 4 (x, y, width, height), got "
            f"{tuple(reference.shape)}"
        )
    sizes = [(size, num_queries, levels) for size in (batch, 1)]
    if reference.dim() != 4 or tuple(reference.shape[:3]) not in sizes:
        raise ValueError(
            f"reference points are {tuple(reference.shape)}; with sampling offsets "
            f"{tuple(offsets.shape)} they must begin with {sizes[0]} or {sizes[1]}"
        )
    expected = (batch, num_queries, num_heads, levels * num_points)
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"attention logits are {tuple(logits.shape)}; with sampling offsets "
            f"{tuple(offsets.shape)} they must be {expected}"
        )
    _check_dtypes_and_devices(
        value,
        {"reference points": reference, "sampling offsets": offsets, "attention logits": logits},
    )


def _use_kernel(device: torch.device) -> bool:
    """Whether to call the compiled op: an exported model must run where it is not installed."""
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    return not exporting and has_kernel(device)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample and sum: the classic signature.

    Args:
        value: (B, S, M, D), the levels one after the other, each row by row.
        spatial_shapes: L pairs (height, width), as host integers or as a (L, 2) tensor.
        sampling_locations: (B, Q, M, L, P, 2), x and y in [0, 1] over each level.
        attention_weights: (B, Q, M, L, P), summing to 1 over L and P.

    Returns:
        (B, Q, M·D), dtype of value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    shapes = _host_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    dtype = _accumulate_dtype(value)
    sampling_locations, attention_weights = (
        sampling_locations.to(dtype),
        attention_weights.to(dtype),
    )
    if not _use_kernel(value.device):
        return _pytorch_formulation(value, shapes, sampling_locations, attention_weights)
    return torch.ops.mask2former.ms_deform_attn(
        value, [size for shape in shapes for size in shape], sampling_locations, attention_weights
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Softmax of the weights, locations from offsets, sampling and sum.

    Args:
        value: (B, S, M, D), as for `ms_deform_attn`.
        spatial_shapes: L pairs (height, width).
        reference_points: (B or 1, Q, L, 2) x and y in [0, 1], or (B or 1, Q, L, 4) boxes as
            x, y, width, height; offsets are then in units of P-ths of half a box. The one pass is
            for points that need no gradient; boxes and others go through `ms_deform_attn`.
        sampling_offsets: (B, Q, M, L, P, 2), in pixels of each level.
        attention_logits: (B, Q, M, L·P).

    Returns:
        (B, Q, M·D), dtype of value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    shapes = _host_shapes(spatial_shapes)
    _check_fused(value, shapes, reference_points, sampling_offsets, attention_logits)
    dtype = _accumulate_dtype(value)
    reference_points = reference_points.to(dtype)
    sampling_offsets, attention_logits = sampling_offsets.to(dtype), attention_logits.to(dtype)
    are_points = reference_points.shape[-1] == 2 and not reference_points.requires_grad
    if are_points and _use_kernel(value.device):
        return torch.ops.mask2former.ms_deform_attn_fused(
            value,
            [size for shape in shapes for size in shape],
            reference_points,
            sampling_offsets,
            attention_logits,
        )
    num_points = sampling_offsets.shape[4]
    reference = reference_points[:, :, None, :, None, :]  # (B or 1, Q, 1, L, 1, 2 or 4)
    if reference_points.shape[-1] == 2:
        # The cache must not keep the fake tensors that torch.export traces with.
        compiling = torch.compiler.is_compiling()
        compute = _widths_and_heights.__wrapped__ if compiling else _widths_and_heights
        sizes = compute(tuple(shapes), dtype, value.device)
        locations = reference + sampling_offsets / sizes[:, None, :]
    else:
        half_box = reference[..., 2:] * 0.5
        locations = reference[..., :2] + sampling_offsets / num_points * half_box
    weights = attention_logits.softmax(-1).unflatten(-1, (len(shapes), num_points))
    return ms_deform_attn(value, shapes, locations, weights)


def _pytorch_formulation(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The op in terms of grid_sample, one call per level; arguments as `ms_deform_attn`."""
    batch, _, num_heads, dim = value.shape
    _, num_queries, _, _, num_points, _ = locations.shape
    # -1 and 2 lie outside on levels of any size.
    locations = locations.nan_to_num(2.0, 2.0, -1.0).clamp(-1.0, 2.0)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, L, P, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, 1, Q, L, P)
    out = locations.new_zeros((batch * num_heads, dim, num_queries))
    levels = value.split([height * width for height, width in shapes], dim=1)
    for level, ((height, width), values) in enumerate(zip(shapes, levels, strict=True)):
        if height * width == 0:
            continue
        # (B, H·W, M, D) → (B·M, D, H, W)
        image = values.permute(0, 2, 3, 1).reshape(batch * num_heads, dim, height, width)
        sampled = F.grid_sample(
            image.to(grids.dtype),
            grids[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (B·M, D, Q, P)
        out = out + (sampled * weights[:, :, :, level]).sum(-1)
    out = out.view(batch, num_heads * dim, num_queries).transpose(1, 2)
    assert out.shape == (batch, num_queries, num_heads * dim), (out.shape, num_points)
    return out.to(value.dtype).contiguous()


class MSDeformAttnFunction:
    """The published call, ``MSDeformAttnFunction.apply(...)``, served by `ms_deform_attn`."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As `ms_deform_attn`; ``value_level_start_index`` follows from the shapes and any batch
        size works, so that it and ``im2col_step`` are not used.
        """
        del value_level_start_index, im2col_step
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections, under the published parameter names.

    Args:
        d_model: channels C = M·D.
        n_levels: levels L.
        n_heads: heads M.
        n_points: points P per level and head.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Start from points spread in M directions, the p-th of them p steps away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (M, 2)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * steps[None, None, :, None]  # (M, 1, P, 2)
        offsets = offsets.expand(-1, self.n_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to the levels.

        Args:
            query: (B, Q, C).
            reference_points: (B or 1, Q, L, 2) or (B or 1, Q, L, 4), see `ms_deform_attn_fused`.
            input_flatten: (B, S, C), the levels one after the other, each row by row.
            input_spatial_shapes: L pairs (height, width); host integers avoid a synchronisation.
            input_level_start_index: published argument; the start of each level follows from the
                shapes, so it is not used.
            input_padding_mask: (B, S) bool, True at padding, whose values count as zero.

        Returns:
            (B, Q, C).
        """
        del input_level_start_index
        if len(input_spatial_shapes) != self.n_levels:
            raise ValueError(
                f"got {len(input_spatial_shapes)} spatial shapes for {self.n_levels} levels"
            )
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.unflatten(2, (self.n_heads, -1))  # (B, S, M, D)
        # Where to look and how much is decided in full precision under autocast too: rounded to
        # bfloat16, an offset of ten pixels is off by up to a thirtieth of a pixel.
        with torch.autocast(query.device.type, enabled=False):
            query = query.to(self.sampling_offsets.weight.dtype)
            offsets = self.sampling_offsets(query).unflatten(
                2, (self.n_heads, self.n_levels, self.n_points, 2)
            )
            logits = self.attention_weights(query).unflatten(2, (self.n_heads, -1))
        out = ms_deform_attn_fused(value, input_spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(out)
