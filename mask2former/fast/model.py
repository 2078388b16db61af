"""The model's forward pass with mask logits as factors, and its streamed post-processing."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn

from ..maskformer_model import MaskFormer
from ..modeling.meta_arch.mask_former_head import MaskFormerHead
from ..modeling.transformer_decoder import (
    ConfigurableTransformerDecoder,
    MultiScaleMaskedTransformerDecoder,
)
from ..utils.twins import runs_fast, why_hooked, why_touched
from .decoder import decode_to_factors
from .frozen_norm import norms_together
from .postprocessing import (
    InstanceResult,
    PanopticResult,
    ResizedMasks,
    Result,
    SemanticResult,
    stream_rows,
)

_HEAD_METHODS = {"forward": MaskFormerHead.forward, "layers": MaskFormerHead.layers}
_DECODER_METHODS = {"_set_aux_loss": MultiScaleMaskedTransformerDecoder._set_aux_loss}
# Packages whose modules take feature maps of any layout.
_LAYOUT_AGNOSTIC = {"torch", "torchvision", "detectron2", "mask2former"}
_MODEL_METHODS = {"forward_inference": MaskFormer.forward_inference}


def network(model: MaskFormer, images: Tensor) -> dict[str, Any]:
    """Twin of `MaskFormer.forward_network`.

    In training `pred_masks` are `MaskFactors`, for the fast criterion. Inference returns no
    `aux_outputs`, because nothing reads them.
    """
    head: Any = model.sem_seg_head
    compiling = torch.compiler.is_compiling()
    backbone = [] if compiling else list(model.backbone.modules())
    parts = [] if compiling else [*backbone, *head.pixel_decoder.modules()]
    # On a GPU, and in inference on a CPU, convolutions are faster in this layout, and pass it on.
    # Hooks of training code, as for distillation, often expect contiguous features.
    faster = not (images.is_cpu and torch.is_grad_enabled())
    if faster and not _may_see_layout(parts, in_hooks=not images.is_cpu):
        images = images.contiguous(memory_format=torch.channels_last)
    with nullcontext() if compiling else norms_together(backbone):
        features = model.backbone(images)
    decoder: Any = head.predictor
    mask_features, _, multi_scale_features = head.pixel_decoder.forward_features(features)
    predictions = decode_to_factors(decoder, multi_scale_features, mask_features)
    outputs = dict(predictions[-1])
    if not model.training:
        return outputs | {"pred_masks": outputs["pred_masks"].full()}
    return outputs | {"aux_outputs": predictions[:-1]}


def why_not_factors(model: MaskFormer) -> str | None:
    """Who needs the full-size masks of all layers, or None: mask logits may stay factors."""
    head = model.sem_seg_head
    decoder = getattr(head, "predictor", None)
    variant = type(decoder) is ConfigurableTransformerDecoder
    expected = ConfigurableTransformerDecoder if variant else MultiScaleMaskedTransformerDecoder
    reason = (
        why_touched(head, MaskFormerHead, _HEAD_METHODS)
        or why_hooked(head)
        or why_touched(decoder, expected, _DECODER_METHODS)
        or why_hooked(decoder)
    )
    if reason is not None:
        return f"sem_seg_head: {reason}"
    if head.transformer_in_feature != "multi_scale_pixel_decoder":
        return f"sem_seg_head.transformer_in_feature is {head.transformer_in_feature}"
    if not runs_fast(decoder):
        return "sem_seg_head.predictor runs as written"
    if model.training and (not runs_fast(model.criterion) or why_hooked(model.criterion)):
        return "criterion runs as written"
    # A replaced `forward_inference` may read the predictions of all layers.
    return None if model.training else why_touched(model, MaskFormer, _MODEL_METHODS)


def _may_see_layout(parts: Iterable[nn.Module], in_hooks: bool) -> bool:
    """Whether any part, or a hook on it, may depend on how feature maps lie in memory."""
    return any(
        type(part).__module__.partition(".")[0] not in _LAYOUT_AGNOSTIC
        or "forward" in part.__dict__
        or (in_hooks and (part._forward_hooks or part._forward_pre_hooks))
        for part in parts
    )


def inference(
    model: MaskFormer,
    outputs: dict[str, Any],
    batched_inputs: list[dict[str, Any]],
    images: ImageList,
) -> list[dict[str, Any]]:
    """Twin of `MaskFormer.forward_inference`."""
    padded = tuple(images.tensor.shape[-2:])
    results = []
    for mask_cls, masks, inputs, image_size in zip(
        outputs["pred_logits"],
        outputs["pred_masks"],
        batched_inputs,
        images.image_sizes,
        strict=True,
    ):
        size = (inputs.get("height", image_size[0]), inputs.get("width", image_size[1]))
        predict = retry_if_cuda_oom(_predict)
        results.append(predict(model, mask_cls, masks, padded, tuple(image_size), size))
    return results


def _predict(
    model: MaskFormer,
    mask_cls: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    image_size: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, Any]:
    """Predictions of one image from (Q, K+1) and (Q, h, w) logits."""
    before = model.sem_seg_postprocess_before_inference
    sizes = (image_size, size) if before else (padded, padded)
    resized = ResizedMasks(masks, padded, *sizes)
    mask_cls = mask_cls.to(resized.dtype)
    shape = resized.shape
    # Semantic scores of the padding are not computed.
    scores_shape = shape if before else torch.Size((len(masks), *image_size))
    streamed: dict[str, Result] = {}
    if model.semantic_on:
        streamed["sem_seg"] = SemanticResult(mask_cls, scores_shape)
    if model.panoptic_on:
        thresholds = model.object_mask_threshold, model.overlap_threshold
        streamed["panoptic_seg"] = PanopticResult(
            mask_cls, shape, model._thing_ids(), *thresholds, with_scores=model.segment_scores
        )
    if model.instance_on:
        thing_ids = model._thing_ids() if model.panoptic_on else None
        streamed["instances"] = InstanceResult(
            mask_cls, shape, model.test_topk_per_image, thing_ids, with_boxes=model.boxes_on
        )
    with torch.autocast(masks.device.type, enabled=False):
        stream_rows(resized, streamed.values())
    predictions = {key: result.finish() for key, result in streamed.items()}
    if model.semantic_on and not before:
        scores = predictions["sem_seg"]
        if not scores.shape[1:] == image_size == size:
            predictions["sem_seg"] = sem_seg_postprocess(scores, image_size, *size)
    return predictions
