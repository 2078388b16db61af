"""Windows by gathers are the windows by views."""

import pytest
import torch
import torch.nn.functional as F

from mask2former.modeling.backbone.swin_export import window_indices
from mask2former.modeling.backbone.swin_layers import (
    _shifted_window_mask,
    padded_size,
    region_mask,
    window_partition,
)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 7), (3, 13)])
def test_windows_are_those_of_views(size, shift):
    height, width = size
    x = torch.randn(2, height * width, 3)
    indices = window_indices(height, width, 4, shift, x.device)
    windows = indices.partition(x)

    padded = padded_size(height, width, 4)
    maps = F.pad(
        x.view(2, height, width, 3), (0, 0, 0, padded[1] - width, 0, padded[0] - height)
    ).roll((-shift, -shift), (1, 2))
    assert torch.equal(windows, window_partition(maps, 4).flatten(1, 2))
    assert torch.equal(indices.reverse(windows, 2), x)
    if shift:
        mask = _shifted_window_mask(*padded, 4, shift, x.device)
        assert torch.equal(region_mask(indices.regions), mask)
