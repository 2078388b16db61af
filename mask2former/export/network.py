"""The part of a model that is exported, and the sizes it takes.

Shape letters: B batch, Q queries, K classes, H W image size in pixels, h w that of mask logits.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..maskformer_model import MaskFormer
from ..modeling.layers import PositionEmbeddingSine

INPUT = "images"
LOGITS = ("pred_logits", "pred_masks")


class ExportNetwork(nn.Module):
    """Backbone and head: normalised images (B, C, H, W) → class and mask logits, float32.

    Args:
        model: in evaluation mode.
        dtype: of weights and features.

    Raises:
        ValueError: the model is no MaskFormer.
    """

    outputs: tuple[str, ...] = LOGITS

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        require_exportable(model)
        assert isinstance(model, MaskFormer)
        self.backbone: Any = model.backbone
        self.sem_seg_head: Any = model.sem_seg_head
        self.dtype = dtype
        self.divisor = size_divisor(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict.

        Returns:
            class logits (B, Q, K+1), no-object last, and mask logits (B, Q, h, w).
        """
        if torch.compiler.is_exporting():
            # As products: the exporter then knows how sizes at each stride are related.
            sizes = [length // self.divisor * self.divisor for length in images.shape[2:]]
            images = images.view(images.shape[0], images.shape[1], *sizes)
        outputs = self.sem_seg_head(self.backbone(images.to(self.dtype)))
        return outputs["pred_logits"].float(), outputs["pred_masks"].float()


class _CastEncoding(nn.Module):
    """A position encoding in the precision of the features that it is added to."""

    def __init__(self, encoding: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.encoding, self.dtype = encoding, dtype

    def forward(self, *args: Any) -> Tensor:
        """The encoding (B, C, H, W) of what `PositionEmbeddingSine.forward` takes."""
        return self.encoding(*args).to(self.dtype)


def convert(network: ExportNetwork, dtype: torch.dtype) -> ExportNetwork:
    """Convert a network, in place. Sampling locations and their sums stay in fp32."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PositionEmbeddingSine):
                setattr(module, name, _CastEncoding(child, dtype))
    return network.to(dtype)


def require_exportable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model does not predict queries with class and mask logits.
    """
    if not isinstance(model, MaskFormer):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: only MODEL.META_ARCHITECTURE MaskFormer "
            "predicts the class and mask logits that an exported file returns. Per-pixel baselines "
            "(SemanticSegmentor) and test-time augmentation have other outputs."
        )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before exporting it")


def size_divisor(model: MaskFormer) -> int:
    """What heights and widths must be multiples of."""
    shapes = model.backbone.output_shape().values()
    own = getattr(model.backbone, "size_divisibility", 0)
    needed = [model.size_divisibility, own, *(shape.stride for shape in shapes)]
    return math.lcm(*(max(1, size) for size in needed))


def example_images(
    channels: int, size: tuple[int, int], batch: int, device: torch.device, seed: int = 0
) -> Tensor:
    """Normalised noise (B, C, H, W), the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator).to(device)
