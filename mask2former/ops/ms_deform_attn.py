"""Multi-scale deformable attention (Deformable DETR, equation 3) as functions and as a module.

In every head and on every level, each query samples a few points around its reference point.
Sampling is that of grid_sample: bilinear, zeros outside, ``align_corners=False``. A location that
is not finite counts as outside.

`ms_deform_attn` takes sampling locations and normalised weights, as the original op does.
`ms_deform_attn_fused` takes the outputs of the projections and does the rest in one pass over
memory. Both run the compiled kernels if the device has them (see `backend`), else, and while a
model is exported, the same computation in PyTorch. Values may be float32, float16, bfloat16 or
float64; locations, weights and sums are float32 (float64 for float64 values).

Shape letters: B batch, S values of all levels, Q queries, M heads, D channels per head, L levels,
P points per level and head.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.shape_cache import cached_by_shape, sizes_tensor
from ._kernels import has_kernel

SpatialShapes = Sequence[Sequence[int]] | Tensor

# The limit of the kernels, see csrc/ms_deform_attn.h.
_MAX_LEVELS = 16
EXPORTED_FORMULATIONS = ("gather", "gridsample", "custom")
_exported_as: ContextVar[str | None] = ContextVar("_exported_as", default=None)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def backend(device: torch.device | str) -> str:
    """The implementation that runs on a device: "compiled" or "pytorch"."""
    return "compiled" if has_kernel(torch.device(device)) else "pytorch"


def _host_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """Level sizes as host integers. A tensor on a GPU costs a host sync, one on the CPU does not.

    Raises:
        ValueError: a size is negative, or there are more levels than the kernels support.
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    # The exporter's symbolic sizes stay symbolic: int() would make them constants.
    shapes: list[Any] = [
        tuple(size if isinstance(size, torch.SymInt) else int(size) for size in shape)
        for shape in spatial_shapes
    ]
    if len(shapes) > _MAX_LEVELS:
        raise ValueError(f"at most {_MAX_LEVELS} levels are supported, got {len(shapes)}")
    if any(height < 0 or width < 0 or height * width >= 2**31 for height, width in shapes):
        raise ValueError(f"spatial shapes must have 0 ... 2**31 - 1 positions, got {shapes}")
    return shapes


@cached_by_shape(maxsize=32)
def _widths_and_heights(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Width and height of every level, (L, 2)."""
    return sizes_tensor([shape[::-1] for shape in shapes], dtype, device)


def _accumulate_dtype(value: Tensor) -> torch.dtype:
    """The dtype of everything except the values."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _check(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    """Raise ValueError unless the arguments of `ms_deform_attn` fit together."""
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
            f"attention weights are {tuple(weights.shape)}, but the locations need {expected}"
        )
    _check_dtypes_and_devices(
        value, {"sampling locations": locations, "attention weights": weights}
    )


def _check_value(value: Tensor, shapes: list[tuple[int, int]]) -> None:
    """Raise ValueError unless `value` is (B, S, M, D) and fits the shapes."""
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
    """Raise ValueError for another device, or a dtype wider than that of the sums."""
    allowed = [dtype for dtype in _DTYPES if dtype != torch.float64 or value.dtype == dtype]
    for name, tensor in others.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} are on {tensor.device}, but value is on {value.device}")
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} are {tensor.dtype}, which does not fit {value.dtype} values")


def _check_fused(
    value: Tensor,
    shapes: list[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> None:
    """Raise ValueError unless the arguments of `ms_deform_attn_fused` fit together."""
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
    sizes = (batch, num_queries, levels)
    if reference.dim() != 4 or any(
        size not in (1, full) for size, full in zip(reference.shape, sizes, strict=False)
    ):
        raise ValueError(
            f"reference points are {tuple(reference.shape)}; with sampling offsets "
            f"{tuple(offsets.shape)} they must begin with {sizes}, each size possibly 1"
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


@contextmanager
def exported_as(formulation: str) -> Iterator[None]:
    """What calls become in programs exported or traced in this context.

    Args:
        formulation: "gridsample", also the default of torch.export; "gather", which runtimes
            without a correct GridSample need; "custom", this project's op, without which the
            program then does not load.

    Raises:
        ValueError: no such formulation.
    """
    if formulation not in EXPORTED_FORMULATIONS:
        raise ValueError(
            f"deformable attention is exported as one of {', '.join(EXPORTED_FORMULATIONS)}, not "
            f"{formulation!r}"
        )
    token = _exported_as.set(formulation)
    try:
        yield
    finally:
        _exported_as.reset(token)


def _formulation(device: torch.device) -> str:
    """What runs: "custom", the compiled op, or "gridsample" or "gather" in PyTorch.

    An exported model must run where the op is not installed, unless its user chooses otherwise.
    """
    chosen = _exported_as.get()
    if chosen is not None:
        return chosen
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    return "custom" if not exporting and has_kernel(device) else "gridsample"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample the values and sum them by weight: the original signature.

    Args:
        value: (B, S, M, D), levels concatenated, each in row-major order.
        spatial_shapes: L pairs (height, width), as host integers or as an (L, 2) tensor.
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
    formulation = _formulation(value.device)
    if formulation == "gather":
        return _gather_formulation(value, shapes, sampling_locations, attention_weights)
    if formulation == "gridsample":
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
    """Softmax of the weights, locations from offsets, sampling and weighted sum.

    This is one pass over memory for reference points without a gradient. Boxes, and points that
    need a gradient, go through `ms_deform_attn`.

    Args:
        value: (B, S, M, D), as for `ms_deform_attn`.
        spatial_shapes: L pairs (height, width).
        reference_points: (B, Q, L, 2) x and y in [0, 1], or (B, Q, L, 4) boxes as x, y, width,
            height. B, Q and L may be 1: the size is then broadcast.
        sampling_offsets: (B, Q, M, L, P, 2), in pixels of each level; with boxes in units of half
            the box size divided by P.
        attention_logits: (B, Q, M, L·P).

    Returns:
        (B, Q, M·D), dtype of value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    shapes = _host_shapes(spatial_shapes)
    _check_fused(value, shapes, reference_points, sampling_offsets, attention_logits)
    dtype = _accumulate_dtype(value)
    # The kernels broadcast the batch, but neither queries nor levels.
    reference_points = reference_points.to(dtype).expand(
        -1, sampling_offsets.shape[1], len(shapes), -1
    )
    sampling_offsets, attention_logits = sampling_offsets.to(dtype), attention_logits.to(dtype)
    are_points = reference_points.shape[-1] == 2 and not reference_points.requires_grad
    if are_points and _formulation(value.device) == "custom":
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
        sizes = _widths_and_heights(tuple(shapes), dtype, value.device)
        locations = reference + sampling_offsets / sizes[:, None, :]
    else:
        half_box = reference[..., 2:] * 0.5
        locations = reference[..., :2] + sampling_offsets / num_points * half_box
    weights = attention_logits.softmax(-1).unflatten(-1, (len(shapes), num_points))
    return ms_deform_attn(value, shapes, locations, weights)


def _pytorch_formulation(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """`ms_deform_attn` with one grid_sample per level."""
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


def _gather_formulation(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """`ms_deform_attn` with one gather of rows per corner, for exported programs."""
    batch, num_values, num_heads, dim = value.shape
    rows = value.to(locations.dtype).reshape(-1, dim)  # (B·S·M, D)
    image = torch.arange(batch, device=value.device)[:, None, None, None, None]
    head = torch.arange(num_heads, device=value.device)[:, None, None]
    # Integers: positions in a map of over 2048 values would be rounded in half precision, which
    # runtimes may choose for all floating-point numbers of a program.
    sizes = sizes_tensor([shape[::-1] for shape in shapes], torch.int64, value.device)
    width, height = sizes[:, :1], sizes[:, 1:]  # (L, 1)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    first = image * num_values + sizes_tensor([starts], torch.int64, value.device).view(-1, 1)
    locations = locations.nan_to_num(2.0, 2.0, -1.0).clamp(-1.0, 2.0)
    x, y = (locations * sizes[:, None].to(locations.dtype) - 0.5).unbind(-1)  # (B, Q, M, L, P)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    left, top = left.to(torch.int64), top.to(torch.int64)
    columns = ((left, 1 - right_share), (left + 1, right_share))
    out: Tensor | float = 0.0
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in columns:
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            nearest = torch.minimum(row.clamp(min=0), height - 1) * width
            nearest = nearest + torch.minimum(column.clamp(min=0), width - 1)
            index = (first + nearest) * num_heads + head
            corner = rows.index_select(0, index.flatten()).view(*index.shape, dim)
            weight = weights * row_share * column_share * inside
            out = out + (corner * weight[..., None]).sum((3, 4))
    assert isinstance(out, Tensor)
    return out.flatten(2).to(value.dtype)


def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn` in plain PyTorch on every device, under its original name."""
    shapes = _host_shapes(value_spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    dtype = _accumulate_dtype(value)
    return _pytorch_formulation(
        value, shapes, sampling_locations.to(dtype), attention_weights.to(dtype)
    )


class MSDeformAttnFunction:
    """The original call, ``MSDeformAttnFunction.apply(...)``; runs `ms_deform_attn`."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """See `ms_deform_attn`. ``value_level_start_index`` and ``im2col_step`` are not used: the
        starts follow from the shapes, and the kernels take a batch of any size at once.
        """
        del value_level_start_index, im2col_step
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections, under the original parameter names.

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
        # For subclasses that call `MSDeformAttnFunction.apply` as the original did.
        self.im2col_step = 128
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Spread the points in M directions, the p-th point p steps away."""
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
            reference_points: (B, Q, L, 2) or (B, Q, L, 4), see `ms_deform_attn_fused`; any of
                B, Q and L may be 1.
            input_flatten: (B, S, C), levels concatenated, each in row-major order.
            input_spatial_shapes: L pairs (height, width), as host integers or as an (L, 2) tensor.
                A tensor on a GPU costs a host sync.
            input_level_start_index: not used, the starts follow from the shapes.
            input_padding_mask: (B, S) or (1, S) bool, True at padding, where values count as zero.

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
        # Compute offsets and weights in full precision under autocast too: rounding to bfloat16
        # moves an offset of ten pixels by up to a thirtieth of a pixel.
        with torch.autocast(query.device.type, enabled=False):
            weight = getattr(self.sampling_offsets, "weight", None)
            # Quantised layers take full precision and have other weights, or a method of that name.
            if isinstance(weight, Tensor) and weight.is_floating_point():
                query = query.to(weight.dtype)
            offsets = self.sampling_offsets(query).unflatten(
                2, (self.n_heads, self.n_levels, self.n_points, 2)
            )
            logits = self.attention_weights(query).unflatten(2, (self.n_heads, -1))
        out = ms_deform_attn_fused(value, input_spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(out)
