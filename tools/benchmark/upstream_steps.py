"""Steps of the original release that the plain model does not take.

Reimplemented from the paper and from the documented behaviour of the parts:

- deformable attention keeps the samples of all levels, then weights and sums them;
- the pixel decoder works in fp32 under autocast;
- the optimiser has one parameter group per parameter.

Shape letters: B batch, S positions of all levels, M heads, L levels, P points per level and head.
"""

import torch
from detectron2.config import CfgNode
from op_backends import BACKENDS, Inputs
from torch import Tensor, nn

from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder
from mask2former.ops import MSDeformAttn
from mask2former.optimizer import parameter_groups


class UpstreamAttention(MSDeformAttn):
    """Locations and weights in PyTorch, then `op`, one of `op_backends.BACKENDS`."""

    op = "pytorch-stacked"

    def forward(
        self, query, reference_points, input_flatten, input_spatial_shapes, *unused, **also_unused
    ) -> Tensor:
        size = torch.as_tensor(input_spatial_shapes, device=query.device)
        # The original's kernels read the sizes on the device.
        shapes = [] if self.op == "original" else [(h, w) for h, w in size.tolist()]
        value = self.value_proj(input_flatten).unflatten(2, (self.n_heads, -1))
        points = (self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).unflatten(2, (self.n_heads, *points, 2))
        logits = self.attention_weights(query).unflatten(2, (self.n_heads, -1))  # (B, S, M, L·P)
        area = size.prod(1)
        x = Inputs(
            value,
            reference_points[:, :, None, :, None, :] + offsets / size.flip(-1)[:, None, :],
            logits.softmax(-1).unflatten(-1, points),
            None,
            shapes,
            size,
            area.cumsum(0) - area,
        )
        return self.output_proj(BACKENDS[self.op].call(x))


class UpstreamPixelDecoder(MSDeformAttnPixelDecoder):
    """Works in fp32 under autocast."""

    def forward_features(self, features):
        device = next(iter(features.values())).device.type
        with torch.autocast(device, enabled=False):
            return super().forward_features({k: v.float() for k, v in features.items()})


_UPSTREAM: dict[type[nn.Module], type[nn.Module]] = {
    MSDeformAttn: UpstreamAttention,
    MSDeformAttnPixelDecoder: UpstreamPixelDecoder,
}


def use_upstream_steps(model: nn.Module, op: str = UpstreamAttention.op) -> nn.Module:
    """Let the parts of a plain model take the original's steps, in place; returns the model.

    Args:
        model: a plain `MaskFormer`, or a part of one.
        op: the backend of deformable attention, one of `op_backends.BACKENDS`.
    """
    for module in model.modules():
        # These classes differ in their steps only, not in their state.
        if type(module) in _UPSTREAM:
            module.__class__ = _UPSTREAM[type(module)]
        if isinstance(module, UpstreamAttention):
            module.op = op
    return model


def upstream_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a group per parameter, no fused update, and full-model gradient clipping.

    Raises:
        ValueError: the config asks for another optimiser.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if cfg.SOLVER.OPTIMIZER != "ADAMW" or (clip.ENABLED and clip.CLIP_TYPE != "full_model"):
        raise ValueError(
            f"the upstream steps cover SOLVER.OPTIMIZER ADAMW with CLIP_TYPE full_model only, not "
            f"{cfg.SOLVER.OPTIMIZER} with {clip.CLIP_TYPE}"
        )
    groups = [
        {**group, "params": [parameter]}
        for group in parameter_groups(cfg, model)
        for parameter in group["params"]
    ]
    optimizer = torch.optim.AdamW(groups, cfg.SOLVER.BASE_LR)
    if clip.ENABLED and clip.CLIP_VALUE > 0:
        parameters = [group["params"][0] for group in groups]

        def clip_gradients(*_) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
    return optimizer
