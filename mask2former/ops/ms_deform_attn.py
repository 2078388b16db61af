"""Multi-scale deformable attention (Deformable DETR, equation 3) as a function and as a module.

Every query looks at a few points around its reference point, on every level, in every head. Values
are sampled as grid_sample does with bilinear interpolation, zeros outside and
``align_corners=False``.

Two levels: `ms_deform_attn` takes sampling locations and normalised weights, the classic
signature; `ms_deform_attn_fused` takes what the projections give and does the rest.

Shape letters: B batch, S values of all levels together, Q queries, M heads, D channels of a head,
L levels, P points per level and head.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SpatialShapes = Sequence[Sequence[int]] | Tensor


def _host_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """Level sizes as host integers; a tensor on a GPU costs a synchronisation."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    return [(int(height), int(width)) for height, width in spatial_shapes]


def _check(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    """Raise ValueError where the arguments do not fit together."""
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), got {tuple(value.shape)}")
    if locations.dim() != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"sampling locations must be (B, Q, M, L, P, 2), got {tuple(locations.shape)}"
        )
    batch, num_values, num_heads, _ = value.shape
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
    total = sum(height * width for height, width in shapes)
    if total != num_values:
        raise ValueError(
            f"spatial shapes {shapes} hold {total} locations, but value has {num_values}"
        )


def _check_fused(
    shapes: list[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor
) -> None:
    """Raise ValueError where what `ms_deform_attn_fused` adds to `_check` does not fit together."""
    levels = len(shapes)
    if offsets.dim() != 6 or offsets.shape[3] != levels or offsets.shape[-1] != 2:
        raise ValueError(
            f"sampling offsets must be (B, Q, M, {levels}, P, 2) with {levels} levels, got "
            f"{tuple(offsets.shape)}"
        )
    batch, num_queries, num_heads, _, num_points, _ = offsets.shape
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
        (B, Q, M·D).

    Raises:
        ValueError: the shapes do not fit together.
    """
    shapes = _host_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    return _pytorch_formulation(value, shapes, sampling_locations, attention_weights)


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
            x, y, width, height; offsets are then in units of P-ths of half a box.
        sampling_offsets: (B, Q, M, L, P, 2), in pixels of each level.
        attention_logits: (B, Q, M, L·P).

    Returns:
        (B, Q, M·D).

    Raises:
        ValueError: the shapes do not fit together.
    """
    shapes = _host_shapes(spatial_shapes)
    _check_fused(shapes, reference_points, sampling_offsets, attention_logits)
    num_points = sampling_offsets.shape[4]
    reference = reference_points[:, :, None, :, None, :]  # (B, Q, 1, L, 1, 2 or 4)
    if reference_points.shape[-1] == 2:
        width_height = [(width, height) for height, width in shapes]
        size = torch.tensor(width_height, device=value.device, dtype=sampling_offsets.dtype)
        locations = reference + sampling_offsets / size[:, None, :]
    else:
        half_box = reference[..., 2:] * 0.5
        locations = reference[..., :2] + sampling_offsets / num_points * half_box
    weights = attention_logits.softmax(-1).unflatten(-1, (len(shapes), num_points))
    _check(value, shapes, locations, weights)
    return _pytorch_formulation(value, shapes, locations, weights)


def _pytorch_formulation(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The op in terms of grid_sample, one call per level; arguments as `ms_deform_attn`."""
    batch, _, num_heads, dim = value.shape
    _, num_queries, _, _, num_points, _ = locations.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, L, P, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, 1, Q, L, P)
    out = value.new_zeros((batch * num_heads, dim, num_queries))
    levels = value.split([height * width for height, width in shapes], dim=1)
    for level, ((height, width), values) in enumerate(zip(shapes, levels, strict=True)):
        if height * width == 0:
            continue
        # (B, H·W, M, D) → (B·M, D, H, W)
        image = values.permute(0, 2, 3, 1).reshape(batch * num_heads, dim, height, width)
        sampled = F.grid_sample(
            image,
            grids[:, :, level].to(image.dtype),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (B·M, D, Q, P)
        out = out + (sampled * weights[:, :, :, level]).sum(-1)
    out = out.view(batch, num_heads * dim, num_queries).transpose(1, 2)
    assert out.shape == (batch, num_queries, num_heads * dim), (out.shape, num_points)
    return out.contiguous()


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
        offsets = self.sampling_offsets(query).unflatten(
            2, (self.n_heads, self.n_levels, self.n_points, 2)
        )
        logits = self.attention_weights(query).unflatten(2, (self.n_heads, -1))  # (B, Q, M, L·P)
        out = ms_deform_attn_fused(value, input_spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(out)
