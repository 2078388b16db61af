"""Small inputs and parts that tests of the plain model and of its fast twins share.

Shape letters: B batch, C channels, T targets of an image, H W pixels.
"""

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 40}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def build_pixel_decoder(names=tuple(CHANNELS), **changes) -> MSDeformAttnPixelDecoder:
    torch.manual_seed(0)
    arguments = {
        "transformer_dropout": 0.0,
        "transformer_nheads": 4,
        "transformer_dim_feedforward": 48,
        "transformer_enc_layers": 2,
        "conv_dim": 32,
        "mask_dim": 12,
        "norm": "GN",
        "transformer_in_features": ["res3", "res4", "res5"],
        "common_stride": 4,
        **changes,
    }
    shapes = {k: ShapeSpec(channels=CHANNELS[k], stride=STRIDES[k]) for k in names}
    return MSDeformAttnPixelDecoder(shapes, **arguments)


def features(height=64, width=96, batch=2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            batch, channels, -(-height // stride), -(-width // stride), generator=generator
        )
        for (name, channels), stride in zip(CHANNELS.items(), STRIDES.values(), strict=True)
    }


def randomise(module: nn.Module) -> None:
    """Make sampling depend on the query, which it does not at first."""
    for name, parameter in module.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter, std=0.3)


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_block(*size: int, seed: int = 0) -> Tensor:
    """Boolean mask that blocks about half of the entries, but no complete row."""
    mask = rand(*size, seed=seed) > 0
    mask[..., 0] = False
    return mask


def random_targets(*labels: list[int], size=(32, 48)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.tensor(x, dtype=torch.int64),
            "masks": torch.rand(len(x), *size, generator=generator) > 0.6,
        }
        for x in labels
    ]
