"""The model in the published order of steps: the same weights and answers, by the longer way.

A reference for benchmarks, written from the paper and from what the parts are documented to do. The
differences to ours:

- deformable attention samples all levels, keeps the samples, and weights and sums them then; the
  pixel decoder works in fp32 under autocast;
- the decoder multiplies out full-size masks after every layer, resizes them for the next one and
  repeats them for every head; attention returns its weights too;
- the criterion goes layer by layer, the matcher image by image, on stacked float masks;
- post-processing upsamples the masks of all queries twice, then does the three inferences, asking
  the device for the areas of every segment.

Shape letters: B batch, Q queries, K classes, C channels, M heads, L levels, T targets of an image,
N matched masks, P points, H W pixels.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from detectron2.structures import Boxes, ImageList, Instances
from op_backends import BACKENDS, Inputs
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mask2former import MaskFormer
from mask2former.modeling.backbone.frozen_norm import ConvWithFrozenNorm
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoderLayer,
)
from mask2former.modeling.transformer_decoder.layers import CrossAttentionLayer, SelfAttentionLayer
from mask2former.modeling.transformer_decoder.mask2former_transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
)
from mask2former.ops import MSDeformAttn
from mask2former.optimizer import parameter_groups
from mask2former.utils.misc import nested_tensor_from_tensor_list

Targets = list[dict[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]


class PublishedAttention(MSDeformAttn):
    """Locations and weights in PyTorch, then `op`, one of `op_backends.BACKENDS`."""

    op = "pytorch-stacked"

    def forward(
        self, query, reference_points, input_flatten, input_spatial_shapes, *unused, **also_unused
    ) -> Tensor:
        shapes = [(int(height), int(width)) for height, width in input_spatial_shapes]
        value = self.value_proj(input_flatten).unflatten(2, (self.n_heads, -1))
        points = (self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).unflatten(2, (self.n_heads, *points, 2))
        logits = self.attention_weights(query).unflatten(2, (self.n_heads, -1))
        size = torch.tensor(shapes, device=query.device)
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


class PublishedPixelDecoder(MSDeformAttnPixelDecoder):
    """In fp32 whatever the precision of the rest."""

    def forward_features(self, features):
        device = next(iter(features.values())).device.type
        with torch.autocast(device, enabled=False):
            return super().forward_features({k: v.float() for k, v in features.items()})


class PublishedEncoderLayer(MSDeformAttnTransformerEncoderLayer):
    """All positions at once, and everything is kept for backward."""

    def forward(self, src, pos, *where) -> Tensor:
        query = src if pos is None else src + pos
        attended = self.self_attn(query, where[0], src, *where[1:])
        return self.norm2(self._norm_and_network(src + self.dropout1(attended)))


class PublishedSelfAttention(SelfAttentionLayer):
    def forward(self, tgt, tgt_mask=None, tgt_key_padding_mask=None, query_pos=None):
        x = self.norm(tgt) if self.normalize_before else tgt
        query = self.with_pos_embed(x, query_pos)
        attended, _ = self.self_attn(
            query, query, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask
        )
        out = tgt + self.dropout(attended)
        return out if self.normalize_before else self.norm(out)


class PublishedCrossAttention(CrossAttentionLayer):
    def forward(
        self, tgt, memory, memory_mask=None, memory_key_padding_mask=None, pos=None, query_pos=None
    ):
        x = self.norm(tgt) if self.normalize_before else tgt
        attended, _ = self.multihead_attn(
            self.with_pos_embed(x, query_pos),
            self.with_pos_embed(memory, pos),
            memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
        )
        out = tgt + self.dropout(attended)
        return out if self.normalize_before else self.norm(out)


class PublishedDecoder(MultiScaleMaskedTransformerDecoder):
    """Full-size masks after every layer, resized, one for each head."""

    def forward(
        self, x: list[Tensor], mask_features: Tensor, mask: Tensor | None = None
    ) -> dict[str, Any]:
        memory, positions = [], []
        for level, features in enumerate(x):
            positions.append(self.pe_layer(features).flatten(2).permute(2, 0, 1))
            projected = self.input_proj[level](features).flatten(2)
            projected = projected + self.level_embed.weight[level][None, :, None]
            memory.append(projected.permute(2, 0, 1))
        batch, sizes = mask_features.shape[0], [features.shape[-2:] for features in x]
        query_pos = self.query_embed.weight[:, None].repeat(1, batch, 1)
        output = self.query_feat.weight[:, None].repeat(1, batch, 1)

        all_logits, all_masks = [], []
        for layer in range(self.num_layers + 1):
            level = layer % self.num_feature_levels
            logits, masks, blocked = self.forward_prediction_heads(
                output, mask_features, sizes[level]
            )
            all_logits.append(logits)
            all_masks.append(masks)
            if layer == self.num_layers:
                break
            # A query whose mask is empty attends everywhere. Which ones, the host has to ask.
            blocked[torch.where(blocked.sum(-1) == blocked.shape[-1])] = False
            output = self.transformer_cross_attention_layers[layer](
                output,
                memory[level],
                memory_mask=blocked,
                pos=positions[level],
                query_pos=query_pos,
            )
            output = self.transformer_self_attention_layers[layer](output, query_pos=query_pos)
            output = self.transformer_ffn_layers[layer](output)
        earlier = [
            {"pred_logits": logits, "pred_masks": masks}
            for logits, masks in zip(all_logits[:-1], all_masks[:-1], strict=True)
        ]
        return {"pred_logits": logits, "pred_masks": masks, "aux_outputs": earlier}

    def forward_prediction_heads(self, output, mask_features, attn_mask_target_size):
        output = self.decoder_norm(output).transpose(0, 1)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(output), mask_features)
        resized = F.interpolate(masks, attn_mask_target_size, mode="bilinear", align_corners=False)
        foreground = resized.sigmoid().flatten(2)[:, None].repeat(1, self.num_heads, 1, 1)
        return self.class_embed(output), masks, (foreground.flatten(0, 1) < 0.5).detach()


class PublishedMatcher(HungarianMatcher):
    """One layer, image by image."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
        indices = []
        for logits, masks, target in zip(
            outputs["pred_logits"], outputs["pred_masks"], targets, strict=True
        ):
            points = torch.rand(1, self.num_points, 2, device=masks.device)
            predicted, wanted = (
                point_sample(
                    x[:, None].to(masks), points.expand(len(x), -1, -1), align_corners=False
                )[:, 0].float()
                for x in (masks, target["masks"])
            )
            with torch.autocast(masks.device.type, enabled=False):
                costs = (
                    self.cost_mask * _pairwise_ce(predicted, wanted)
                    - self.cost_class * logits.softmax(-1)[:, target["labels"]]
                    + self.cost_dice * _pairwise_dice(predicted, wanted)
                )
            pairs = linear_sum_assignment(costs.float().cpu())
            indices.append(tuple(torch.as_tensor(x, dtype=torch.int64) for x in pairs))
        return indices


def _pairwise_ce(predicted: Tensor, wanted: Tensor) -> Tensor:
    """(Q, P) and (T, P) → (Q, T), from the losses for the labels 1 and 0."""
    ones, zeros = torch.ones_like(predicted), torch.zeros_like(predicted)
    is_object = F.binary_cross_entropy_with_logits(predicted, ones, reduction="none")
    is_none = F.binary_cross_entropy_with_logits(predicted, zeros, reduction="none")
    product = torch.einsum("qp,tp->qt", is_object, wanted)
    return (product + torch.einsum("qp,tp->qt", is_none, 1 - wanted)) / predicted.shape[1]


def _pairwise_dice(predicted: Tensor, wanted: Tensor) -> Tensor:
    """(Q, P) and (T, P) → (Q, T)."""
    predicted = predicted.sigmoid()
    overlap = 2 * torch.einsum("qp,tp->qt", predicted, wanted)
    total = predicted.sum(-1)[:, None] + wanted.sum(-1)[None]
    return 1 - (overlap + 1) / (total + 1)


class PublishedCriterion(SetCriterion):
    """Layer by layer."""

    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        count = sum(len(target["labels"]) for target in targets)
        device = outputs["pred_logits"].device
        num_masks = torch.as_tensor([count], dtype=torch.float, device=device).clamp(min=1).item()
        losses = {}
        for number, layer in enumerate([outputs, *outputs.get("aux_outputs", [])]):
            indices = self.matcher(layer, targets)
            own = self.loss_labels(layer, targets, indices, num_masks)
            own |= self.loss_masks(layer, targets, indices, num_masks)
            suffix = f"_{number - 1}" if number else ""
            losses |= {name + suffix: loss for name, loss in own.items()}
        return losses

    def loss_labels(self, outputs, targets, indices, num_masks):
        logits = outputs["pred_logits"].float()
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        found = [t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]
        classes[self._get_src_permutation_idx(indices)] = torch.cat(found)
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)}

    def loss_masks(self, outputs, targets, indices, num_masks):
        masks = outputs["pred_masks"]
        stacked, _ = nested_tensor_from_tensor_list([t["masks"] for t in targets]).decompose()
        wanted = stacked.to(masks)[self._get_tgt_permutation_idx(indices)][:, None]
        masks = masks[self._get_src_permutation_idx(indices)][:, None]  # (N, 1, H, W)
        with torch.no_grad():
            points = get_uncertain_point_coords_with_randomness(
                masks,
                lambda logits: -logits.abs(),
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            labels = point_sample(wanted, points, align_corners=False)[:, 0]
        logits = point_sample(masks, points, align_corners=False)[:, 0]  # (N, P)
        ce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        probabilities = logits.sigmoid()
        overlap = 2 * (probabilities * labels).sum(-1)
        dice = 1 - (overlap + 1) / (probabilities.sum(-1) + labels.sum(-1) + 1)
        return {"loss_mask": ce.sum() / num_masks, "loss_dice": dice.sum() / num_masks}


class PublishedMaskFormer(MaskFormer):
    """Upsample everything, then the three inferences."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        pixels = [x["image"].to(self.device) for x in batched_inputs]
        pixels = [(x - self.pixel_mean) / self.pixel_std for x in pixels]
        images = ImageList.from_tensors(pixels, self.size_divisibility)
        outputs = self._network(images.tensor)
        if self.training:
            instances = [x["instances"].to(self.device) for x in batched_inputs]
            weights = self.criterion.weight_dict
            losses = self.criterion(outputs, self.prepare_targets(instances, images))
            return {k: loss * weights[k] for k, loss in losses.items() if k in weights}

        masks = F.interpolate(
            outputs["pred_masks"], images.tensor.shape[-2:], mode="bilinear", align_corners=False
        )
        results = []
        for mask_cls, mask_pred, inputs, image_size in zip(
            outputs["pred_logits"], masks, batched_inputs, images.image_sizes, strict=True
        ):
            size = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
            result = {}
            if self.sem_seg_postprocess_before_inference:
                mask_pred = sem_seg_postprocess(mask_pred, image_size, *size)
                mask_cls = mask_cls.to(mask_pred)
            if self.semantic_on:
                scores = self.semantic_inference(mask_cls, mask_pred)
                if not self.sem_seg_postprocess_before_inference:
                    scores = sem_seg_postprocess(scores, image_size, *size)
                result["sem_seg"] = scores
            if self.panoptic_on:
                result["panoptic_seg"] = self.panoptic_inference(mask_cls, mask_pred)
            if self.instance_on:
                result["instances"] = self.instance_inference(mask_cls, mask_pred)
            results.append(result)
        return results

    def _arranged(self, images: Tensor) -> Tensor:
        return images

    def semantic_inference(self, mask_cls, mask_pred):
        probabilities = mask_cls.softmax(-1)[:, :-1]
        return torch.einsum("qk,qhw->khw", probabilities, mask_pred.sigmoid())

    def panoptic_inference(self, mask_cls, mask_pred):
        scores, labels = mask_cls.softmax(-1).max(-1)
        masks = mask_pred.sigmoid()
        keep = labels.ne(mask_cls.shape[-1] - 1) & (scores > self.object_mask_threshold)
        labels, masks = labels[keep], masks[keep]
        ids = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
        segments: list[dict[str, Any]] = []
        if len(masks) == 0:
            return ids, segments
        winner = (scores[keep][:, None, None] * masks).argmax(0)
        thing_ids = set(self.metadata.thing_dataset_id_to_contiguous_id.values())
        stuff: dict[int, int] = {}
        for query, mask in enumerate(masks):
            category = labels[query].item()
            won, original = (winner == query).sum().item(), (mask >= 0.5).sum().item()
            visible = (winner == query) & (mask >= 0.5)
            if not (won and original and visible.sum().item()):
                continue
            if won / original < self.overlap_threshold:
                continue
            if category in stuff:
                ids[visible] = stuff[category]
                continue
            segment = len(segments) + 1
            if category not in thing_ids:
                stuff[category] = segment
            ids[visible] = segment
            is_thing = category in thing_ids
            segments.append({"id": segment, "isthing": is_thing, "category_id": category})
        return ids, segments

    def instance_inference(self, mask_cls, mask_pred):
        scores = mask_cls.softmax(-1)[:, :-1]
        num_queries, num_classes = scores.shape
        labels = torch.arange(num_classes, device=scores.device).repeat(num_queries)
        count = min(self.test_topk_per_image, scores.numel())
        scores, pairs = scores.flatten().topk(count, sorted=False)
        labels, masks = labels[pairs], mask_pred[pairs // num_classes]
        if self.panoptic_on:
            thing_ids = set(self.metadata.thing_dataset_id_to_contiguous_id.values())
            keep = torch.zeros_like(scores, dtype=torch.bool)
            for row, label in enumerate(labels):
                keep[row] = label.item() in thing_ids
            scores, labels, masks = scores[keep], labels[keep], masks[keep]
        result = Instances(tuple(masks.shape[-2:]))
        result.pred_masks = (masks > 0).float()
        result.pred_boxes = Boxes(torch.zeros(len(masks), 4))
        foreground = result.pred_masks.flatten(1)
        means = (masks.sigmoid().flatten(1) * foreground).sum(1) / (foreground.sum(1) + 1e-6)
        result.scores = scores * means
        result.pred_classes = labels
        return result


_PUBLISHED: dict[type[nn.Module], type[nn.Module]] = {
    MaskFormer: PublishedMaskFormer,
    MSDeformAttn: PublishedAttention,
    ConvWithFrozenNorm: Conv2d,
    MSDeformAttnPixelDecoder: PublishedPixelDecoder,
    MSDeformAttnTransformerEncoderLayer: PublishedEncoderLayer,
    MultiScaleMaskedTransformerDecoder: PublishedDecoder,
    SelfAttentionLayer: PublishedSelfAttention,
    CrossAttentionLayer: PublishedCrossAttention,
    SetCriterion: PublishedCriterion,
    HungarianMatcher: PublishedMatcher,
}


def as_published(model: nn.Module, op: str = PublishedAttention.op) -> nn.Module:
    """A copy of a model whose parts, where known, take the published steps.

    Args:
        model: a `MaskFormer`, or a part of one.
        op: deformable attention, one of `op_backends.BACKENDS`.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        # The parts differ in what they do, not in what they hold.
        if type(module) in _PUBLISHED:
            module.__class__ = _PUBLISHED[type(module)]
        if isinstance(module, PublishedAttention):
            module.op = op
    return model


def published_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a group for each parameter and no fused update, clipping all gradients together.

    Raises:
        ValueError: the config asks for another optimiser.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if cfg.SOLVER.OPTIMIZER != "ADAMW" or (clip.ENABLED and clip.CLIP_TYPE != "full_model"):
        raise ValueError("published steps are known of AdamW with CLIP_TYPE full_model only")
    groups = [
        {**group, "params": [parameter]}
        for group in parameter_groups(cfg, model)
        for parameter in group["params"]
    ]
    optimizer = torch.optim.AdamW(groups, cfg.SOLVER.BASE_LR)
    if clip.ENABLED and clip.CLIP_VALUE > 0:
        parameters = [group["params"][0] for group in groups]

        def limit_gradients(*_) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(limit_gradients)
    return optimizer
