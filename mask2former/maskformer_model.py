"""The meta-architecture: image → backbone → head → criterion (training) or post-processing.

Shape letters: B batch, Q queries, K classes, T targets of an image, H W pixels.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn

from .data.packed_masks import upload
from .fast.setup import apply_config, follow_parts
from .modeling.criterion import CRITERION_REGISTRY, SetCriterion
from .modeling.matcher import MATCHER_REGISTRY
from .modeling.postprocessing import instance_inference, panoptic_inference, semantic_inference
from .utils.registry import look_up, register_unless_taken
from .utils.twins import has_fast_twin


@register_unless_taken(META_ARCH_REGISTRY)
class MaskFormer(nn.Module):
    """Mask classification for semantic, instance and panoptic segmentation.

    Args:
        backbone: returns multi-scale features.
        sem_seg_head: predicts from them, see `MaskFormerHead`.
        criterion: the losses and, in `weight_dict`, their weights.
        num_queries: Q.
        object_mask_threshold: class probability above which a query takes part in panoptic
            inference.
        overlap_threshold: share of its own mask that a panoptic segment must keep.
        metadata: of the data set; panoptic inference takes the thing classes from it.
        size_divisibility: images are padded to a multiple of it; negative: to the backbone's own.
        sem_seg_postprocess_before_inference: resize masks to the output size before inference
            instead of resizing the semantic scores.
        pixel_mean: per channel, in the order of the input's channels.
        pixel_std: per channel, in the same order.
        semantic_on: return `sem_seg`.
        panoptic_on: return `panoptic_seg`; instances are then of thing classes only.
        instance_on: return `instances`.
        test_topk_per_image: instances per image.
        boxes_on: make the boxes of instances from their masks; otherwise they are zeros.

    Attributes:
        segment_scores: whether panoptic segments have a `score`, which the original release does
            not return.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    boxes_on = False
    segment_scores = False
    # Height and width to which training images are padded, within `accumulating`.
    _padded_size: tuple[int, int] | None = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: SetCriterion,
        num_queries: int,
        object_mask_threshold: float,
        overlap_threshold: float,
        metadata: Metadata,
        size_divisibility: int,
        sem_seg_postprocess_before_inference: bool,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        semantic_on: bool,
        panoptic_on: bool,
        instance_on: bool,
        test_topk_per_image: int,
        boxes_on: bool = False,
    ):
        super().__init__()
        if not semantic_on and not sem_seg_postprocess_before_inference:
            raise ValueError(
                "without semantic inference sem_seg_postprocess_before_inference must be True"
            )
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.num_queries = num_queries
        self.overlap_threshold = overlap_threshold
        self.object_mask_threshold = object_mask_threshold
        self.metadata = metadata
        self.size_divisibility = (
            size_divisibility if size_divisibility >= 0 else backbone.size_divisibility
        )
        self.sem_seg_postprocess_before_inference = sem_seg_postprocess_before_inference
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.semantic_on = semantic_on
        self.instance_on = instance_on
        self.panoptic_on = panoptic_on
        self.test_topk_per_image = test_topk_per_image
        self.boxes_on = boxes_on
        self._compiled_network: Callable[[Tensor], dict[str, Any]] | None = None
        follow_parts(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        sem_seg_head = build_sem_seg_head(cfg, backbone.output_shape())
        if not cfg.DATASETS.TRAIN:
            raise ValueError(
                "DATASETS.TRAIN is empty: the model takes its class metadata from the first "
                "training set, in inference too"
            )
        model = cfg.MODEL.MASK_FORMER
        # Configs made by another project's copy of `add_maskformer2_config` lack the new keys.
        matcher_name = model.get("MATCHER_NAME", "HungarianMatcher")
        matcher = look_up(MATCHER_REGISTRY, matcher_name, "MODEL.MASK_FORMER.MATCHER_NAME")(
            cost_class=model.CLASS_WEIGHT,
            cost_mask=model.MASK_WEIGHT,
            cost_dice=model.DICE_WEIGHT,
            num_points=model.TRAIN_NUM_POINTS,
        )
        extra_losses = {name: weight for name, weight in model.get("EXTRA_LOSSES", [])}
        weights = {
            "loss_ce": model.CLASS_WEIGHT,
            "loss_mask": model.MASK_WEIGHT,
            "loss_dice": model.DICE_WEIGHT,
            **{f"loss_{name}": weight for name, weight in extra_losses.items()},
        }
        weight_dict = dict(weights)
        if model.DEEP_SUPERVISION:
            for layer in range(model.DEC_LAYERS - 1):
                weight_dict.update({f"{k}_{layer}": weight for k, weight in weights.items()})
        name = model.get("CRITERION_NAME", "SetCriterion")
        make_criterion = look_up(CRITERION_REGISTRY, name, "MODEL.MASK_FORMER.CRITERION_NAME")
        criterion = make_criterion(
            num_classes=sem_seg_head.num_classes,
            matcher=matcher,
            weight_dict=weight_dict,
            eos_coef=model.NO_OBJECT_WEIGHT,
            losses=["labels", "masks", *extra_losses],
            num_points=model.TRAIN_NUM_POINTS,
            oversample_ratio=model.OVERSAMPLE_RATIO,
            importance_sample_ratio=model.IMPORTANCE_SAMPLE_RATIO,
        )
        apply_config(cfg, backbone, sem_seg_head, criterion)
        test = model.TEST
        return {
            "backbone": backbone,
            "sem_seg_head": sem_seg_head,
            "criterion": criterion,
            "num_queries": model.NUM_OBJECT_QUERIES,
            "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": test.OVERLAP_THRESHOLD,
            "metadata": MetadataCatalog.get(cfg.DATASETS.TRAIN[0]),
            "size_divisibility": model.SIZE_DIVISIBILITY,
            "sem_seg_postprocess_before_inference": (
                test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_on": test.SEMANTIC_ON,
            "instance_on": test.INSTANCE_ON,
            "panoptic_on": test.PANOPTIC_ON,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            # Constructors of other projects' subclasses do not have this argument.
            **({"boxes_on": True} if cfg.TEST.get("BOXES", False) else {}),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, predictions otherwise.

        Args:
            batched_inputs: for each image a dict with `image` (3, H, W) in the range of the pixel
                mean; in training `instances` with `gt_classes` (T,) and `gt_masks` (T, H, W), and
                optionally `ignored` (H, W) bool, the pixels without a label; in inference
                optionally `height` and `width` of the output.

        Returns:
            In training the weighted losses by name. Otherwise for each image a dict with, as
            turned on, `sem_seg` (K, H, W) scores, `panoptic_seg` a pair of (H, W) int32 ids and
            segment dicts, `instances` as `instance_inference` returns them.
        """
        images = [upload(x["image"], self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        if self._padded_size is None:
            images = ImageList.from_tensors(images, self.size_divisibility)
        else:
            images = _padded(images, self._padded_size, self.size_divisibility)

        if self.training:
            _require_targets(batched_inputs)
            # Before the network, which a blocking copy would otherwise wait for.
            instances = [upload(x["instances"], self.device) for x in batched_inputs]
            ignored = [upload(x["ignored"], self.device) for x in batched_inputs if "ignored" in x]
            outputs = self.forward_network(images.tensor)
            targets = self.prepare_targets(instances, images)
            if ignored:
                # Not in `prepare_targets`, which other projects override.
                targets = _with_ignored(targets, ignored, images)
            weight_dict = self.criterion.weight_dict
            # Without deep supervision no loss of an earlier layer ("loss_ce_0", …) has a weight.
            if not any(name.rpartition("_")[2].isdigit() for name in weight_dict):
                outputs.pop("aux_outputs", None)
            losses = self.criterion(outputs, targets)
            return {k: loss * weight_dict[k] for k, loss in losses.items() if k in weight_dict}

        network = self._compiled_network or self.forward_network
        return self.forward_inference(network(images.tensor), batched_inputs, images)

    @contextmanager
    def accumulating(self, batched_inputs: list[dict[str, Any]]) -> Iterator[None]:
        """In this context inputs are micro-batches, whose losses add up to those of the batch.

        Images are padded to the size of the batch, and losses are divided by its numbers of
        targets.

        Args:
            batched_inputs: of the batch, as in `forward`.
        """
        _require_targets(batched_inputs)
        labels = [upload(x["instances"].gt_classes, self.device) for x in batched_inputs]
        heights, widths = zip(*(x["image"].shape[-2:] for x in batched_inputs), strict=True)
        self._padded_size = max(heights), max(widths)
        try:
            with self.criterion.accumulating([{"labels": x} for x in labels]):
                yield
        finally:
            self._padded_size = None

    @has_fast_twin
    def forward_network(self, images: Tensor) -> dict[str, Any]:
        """Backbone and head: (B, 3, H, W) images → `pred_logits`, `pred_masks`, `aux_outputs`."""
        return self.sem_seg_head(self.backbone(images))

    @has_fast_twin
    def forward_inference(
        self, outputs: dict[str, Any], batched_inputs: list[dict[str, Any]], images: ImageList
    ) -> list[dict[str, Any]]:
        """Post-process the predictions of a batch, see `forward`."""
        # To the size of the padded batch.
        mask_pred_results = F.interpolate(
            outputs["pred_masks"],
            size=images.tensor.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        results = []
        for mask_cls, mask_pred, inputs, image_size in zip(
            outputs["pred_logits"],
            mask_pred_results,
            batched_inputs,
            images.image_sizes,
            strict=True,
        ):
            height = inputs.get("height", image_size[0])
            width = inputs.get("width", image_size[1])
            result: dict[str, Any] = {}
            if self.sem_seg_postprocess_before_inference:
                # Cut off the padding, resize to the output.
                mask_pred = retry_if_cuda_oom(sem_seg_postprocess)(
                    mask_pred, image_size, height, width
                )
                mask_cls = mask_cls.to(mask_pred)
            if self.semantic_on:
                sem_seg = retry_if_cuda_oom(self.semantic_inference)(mask_cls, mask_pred)
                if not self.sem_seg_postprocess_before_inference:
                    sem_seg = retry_if_cuda_oom(sem_seg_postprocess)(
                        sem_seg, image_size, height, width
                    )
                result["sem_seg"] = sem_seg
            if self.panoptic_on:
                result["panoptic_seg"] = retry_if_cuda_oom(self.panoptic_inference)(
                    mask_cls, mask_pred
                )
            if self.instance_on:
                result["instances"] = retry_if_cuda_oom(self.instance_inference)(
                    mask_cls, mask_pred
                )
            results.append(result)
        return results

    def prepare_targets(
        self, targets: list[Instances], images: ImageList
    ) -> list[dict[str, Tensor]]:
        """Pad target masks to the size of the padded batch.

        Returns:
            For each image `labels` (T,) int64 and `masks` (T, H, W) of the masks' own dtype.
        """
        height, width = images.tensor.shape[-2:]
        prepared = []
        for instances in targets:
            masks = instances.gt_masks
            pad = (0, width - masks.shape[2], 0, height - masks.shape[1])
            if min(pad) < 0:
                raise ValueError(
                    f"target masks of {tuple(masks.shape[1:])} pixels do not fit the batch of "
                    f"{(height, width)}"
                )
            if any(pad):
                masks = F.pad(masks, pad)
            prepared.append({"labels": instances.gt_classes, "masks": masks})
        return prepared

    def semantic_inference(self, mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
        """(Q, K+1) and (Q, H, W) logits → (K, H, W) scores, see `postprocessing`."""
        return semantic_inference(mask_cls, mask_pred)

    def panoptic_inference(
        self, mask_cls: Tensor, mask_pred: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """(Q, K+1) and (Q, H, W) logits → (H, W) ids and segments, see `postprocessing`."""
        # Other projects replace the function by the original, without this argument.
        options = {"with_scores": True} if self.segment_scores else {}
        return panoptic_inference(
            mask_cls,
            mask_pred,
            self._thing_ids(),
            self.object_mask_threshold,
            self.overlap_threshold,
            **options,
        )

    def instance_inference(self, mask_cls: Tensor, mask_pred: Tensor) -> Instances:
        """(Q, K+1) and (Q, H, W) logits → Instances, see `postprocessing`."""
        # A panoptic model's instances are of thing classes.
        thing_ids = self._thing_ids() if self.panoptic_on else None
        options = {"with_boxes": True} if self.boxes_on else {}
        return instance_inference(
            mask_cls, mask_pred, self.test_topk_per_image, thing_ids, **options
        )

    def _thing_ids(self) -> Collection[int]:
        """Contiguous ids of the thing classes."""
        mapping = getattr(self.metadata, "thing_dataset_id_to_contiguous_id", None)
        if mapping is None:
            raise ValueError(
                f"data set {self.metadata.get('name')!r} has no thing_dataset_id_to_contiguous_id "
                "in its metadata, so that things cannot be told from stuff: turn off "
                "MODEL.MASK_FORMER.TEST.PANOPTIC_ON, or name the data set the model was trained "
                "on in DATASETS.TRAIN"
            )
        return set(mapping.values())

    def compile_inference(self, **options: Any) -> None:
        """Compile backbone and head for inference; training and post-processing stay as they are.

        Numbers stay the same up to rounding. The first image of each size takes minutes.

        Args:
            options: of `torch.compile`; `mode="reduce-overhead"` uses CUDA graphs.
        """
        self._compiled_network = torch.compile(self.forward_network, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not compiled."""
        return {**self.__dict__, "_compiled_network": None}


def _with_ignored(
    targets: list[dict[str, Tensor]], ignored: list[Tensor], images: ImageList
) -> list[dict[str, Tensor]]:
    """Targets with `ignored` (H, W) of the padded batch; padding has no label either."""
    if len(ignored) < len(targets):
        raise ValueError(
            f"{len(ignored)} of {len(targets)} samples have 'ignored'; all or none must"
        )
    height, width = images.tensor.shape[-2:]
    padded = [
        F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=True) for x in ignored
    ]
    return [{**target, "ignored": x} for target, x in zip(targets, padded, strict=True)]


def _padded(images: list[Tensor], size: tuple[int, int], size_divisibility: int) -> ImageList:
    """`ImageList.from_tensors` with a minimum height and width."""
    height, width = size
    padded = [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images]
    batch = ImageList.from_tensors(padded, size_divisibility)
    return ImageList(batch.tensor, [(x.shape[-2], x.shape[-1]) for x in images])


def _require_targets(batched_inputs: list[dict[str, Any]]) -> None:
    without = [x for x in batched_inputs if "instances" not in x]
    if without:
        raise ValueError(
            f"training input {without[0].get('file_name', '')!r} has no 'instances': its record "
            "has no annotation, or INPUT.DATASET_MAPPER_NAME names a mapper that does not make "
            "targets"
        )
