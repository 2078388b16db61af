"""The plain model: the same weights and results, step by step as in the paper.

Reimplemented from the paper and from the documented behaviour of the parts. Unlike the package:

- the decoder computes full-size masks after every layer, resizes them for the next one and repeats
  them per head; attention returns its weights too;
- the criterion goes layer by layer, the matcher image by image, on stacked float masks;
- post-processing upsamples the masks of all queries twice, then runs the three inferences, with
  several device syncs per segment.

Shape letters: B batch, Q queries, K classes, C channels, M heads, L levels, T targets of an image,
N matched masks, P points, H W pixels.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from detectron2.structures import Boxes, ImageList, Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mask2former import MaskFormer
from mask2former.modeling.backbone.frozen_norm import ConvWithFrozenNorm
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnTransformerEncoderLayer,
)
from mask2former.modeling.transformer_decoder.layers import CrossAttentionLayer, SelfAttentionLayer
from mask2former.modeling.transformer_decoder.mask2former_transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
)
from mask2former.utils.misc import nested_tensor_from_tensor_list

Targets = list[dict[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]


class PlainEncoderLayer(MSDeformAttnTransformerEncoderLayer):
    """All positions at once; all activations are saved for backward."""

    def forward(self, src, pos, *where) -> Tensor:
        query = src if pos is None else src + pos
        attended = self.self_attn(query, where[0], src, *where[1:])
        return self.norm2(self._norm_and_network(src + self.dropout1(attended)))


class PlainSelfAttention(SelfAttentionLayer):
    def forward(self, tgt, tgt_mask=None, tgt_key_padding_mask=None, query_pos=None):
        x = self.norm(tgt) if self.normalize_before else tgt
        query = self.with_pos_embed(x, query_pos)
        attended, _ = self.self_attn(
            query, query, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask
        )
        out = tgt + self.dropout(attended)
        return out if self.normalize_before else self.norm(out)


class PlainCrossAttention(CrossAttentionLayer):
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


class PlainDecoder(MultiScaleMaskedTransformerDecoder):
    """Full-size masks after every layer, resized and repeated per head."""

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
            # A query with an empty mask attends everywhere. Finding these queries syncs.
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


class PlainMatcher(HungarianMatcher):
    """Image by image, for one layer."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
        indices = []
        for logits, masks, target in zip(
            outputs["pred_logits"], outputs["pred_masks"], targets, strict=True
        ):
            points = torch.rand(1, self.num_points, 2, device=masks.device)
            mask_logits, mask_labels = (
                point_sample(
                    x[:, None].to(masks), points.expand(len(x), -1, -1), align_corners=False
                )[:, 0].float()
                for x in (masks, target["masks"])
            )
            with torch.autocast(masks.device.type, enabled=False):
                costs = (
                    self.cost_mask * _pairwise_ce(mask_logits, mask_labels)
                    - self.cost_class * logits.softmax(-1)[:, target["labels"]]
                    + self.cost_dice * _pairwise_dice(mask_logits, mask_labels)
                )
            pairs = linear_sum_assignment(costs.float().cpu())
            indices.append(tuple(torch.as_tensor(x, dtype=torch.int64) for x in pairs))
        return indices


def _pairwise_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """(Q, P) logits and (T, P) labels → (Q, T), from the losses for the labels 1 and 0."""
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    positive = F.binary_cross_entropy_with_logits(logits, ones, reduction="none")
    negative = F.binary_cross_entropy_with_logits(logits, zeros, reduction="none")
    product = torch.einsum("qp,tp->qt", positive, labels)
    return (product + torch.einsum("qp,tp->qt", negative, 1 - labels)) / logits.shape[1]


def _pairwise_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """(Q, P) logits and (T, P) labels → (Q, T)."""
    probabilities = logits.sigmoid()
    overlap = 2 * torch.einsum("qp,tp->qt", probabilities, labels)
    total = probabilities.sum(-1)[:, None] + labels.sum(-1)[None]
    return 1 - (overlap + 1) / (total + 1)


class PlainCriterion(SetCriterion):
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
        matched = [t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]
        classes[self._get_src_permutation_idx(indices)] = torch.cat(matched)
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)}

    def loss_masks(self, outputs, targets, indices, num_masks):
        masks = outputs["pred_masks"]
        stacked, _ = nested_tensor_from_tensor_list([t["masks"] for t in targets]).decompose()
        target_masks = stacked.to(masks)[self._get_tgt_permutation_idx(indices)][:, None]
        masks = masks[self._get_src_permutation_idx(indices)][:, None]  # (N, 1, H, W)
        with torch.no_grad():
            points = get_uncertain_point_coords_with_randomness(
                masks,
                lambda logits: -logits.abs(),
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            labels = point_sample(target_masks, points, align_corners=False)[:, 0]
        logits = point_sample(masks, points, align_corners=False)[:, 0]  # (N, P)
        ce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        probabilities = logits.sigmoid()
        overlap = 2 * (probabilities * labels).sum(-1)
        dice = 1 - (overlap + 1) / (probabilities.sum(-1) + labels.sum(-1) + 1)
        return {"loss_mask": ce.sum() / num_masks, "loss_dice": dice.sum() / num_masks}


class PlainMaskFormer(MaskFormer):
    """Upsamples all masks, then runs the three inferences."""

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


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    MaskFormer: PlainMaskFormer,
    ConvWithFrozenNorm: Conv2d,
    MSDeformAttnTransformerEncoderLayer: PlainEncoderLayer,
    MultiScaleMaskedTransformerDecoder: PlainDecoder,
    SelfAttentionLayer: PlainSelfAttention,
    CrossAttentionLayer: PlainCrossAttention,
    SetCriterion: PlainCriterion,
    HungarianMatcher: PlainMatcher,
}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a `MaskFormer`, or of a part of one, that takes the plain steps."""
    model = copy.deepcopy(model)
    for module in model.modules():
        # These classes differ in their steps only, not in their state.
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return model
