"""Models of timm as the `transformers` package builds them: features only, with other names."""

from collections.abc import Sequence
from functools import cache

import torch

from ..modeling.backbone.timm import STRIDES
from ..modeling.backbone.timm_models import import_timm, on_meta

_SIZE = (64, 96)  # of a test image in pixels, multiples of 32 but of nothing larger


@cache
def feature_indices(name: str, in_channels: int = 3) -> tuple[int, ...]:
    """The numbers of the maps of strides 4, 8, 16 and 32.

    Args:
        name: of the model.
        in_channels: of the images.

    Raises:
        ValueError: `transformers` cannot use this model: its maps have other strides or another
            layout, or it takes only images of some sizes.
    """
    strides = [info["reduction"] for info in on_meta(name).feature_info]
    last = {stride: i for i, stride in enumerate(strides)}
    missing = [stride for stride in STRIDES.values() if stride not in last]
    problem = f"no maps of the strides {missing}" if missing else ""
    indices = [last[stride] for stride in STRIDES.values() if stride in last]
    if not missing:
        try:
            model = _features_only(name, in_channels, indices)
            maps = model(torch.empty(1, in_channels, *_SIZE, device="meta"))
            channels = model.feature_info.channels()
            shapes = [tuple(map_.shape[1:]) for map_ in maps]
            expected = [
                (num, _SIZE[0] // stride, _SIZE[1] // stride)
                for num, stride in zip(channels, STRIDES.values(), strict=True)
            ]
            if shapes != expected:
                problem = f"maps of {shapes} for an image of {_SIZE} pixels, not {expected}"
        # What a model raises for a size that it does not take is its own affair.
        except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
            problem = f"it does not take an image of {_SIZE} pixels ({error})"
    if problem:
        raise ValueError(
            f"transformers' Mask2Former cannot use MODEL.TIMM.NAME {name!r} as it wraps timm's "
            f"models: {problem}."
        )
    return tuple(indices)


@cache
def feature_names(name: str, in_channels: int = 3) -> tuple[str, ...]:
    """The names of all tensors of the features-only model, see `feature_indices`."""
    indices = feature_indices(name, in_channels)
    return tuple(_features_only(name, in_channels, indices).state_dict())


def _features_only(name: str, in_channels: int, indices: Sequence[int]):
    with torch.device("meta"):
        return import_timm().create_model(
            name, features_only=True, in_chans=in_channels, out_indices=indices
        )
