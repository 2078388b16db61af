"""Recomputation gives the same gradients, statistics and random numbers as one pass."""

import copy

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from mask2former.utils.recompute import recomputed


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NaiveSyncBatchNorm])
def test_statistics_move_once(norm):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.5))
    other, x = copy.deepcopy(block), torch.randn(2, 2, 8, 8)
    statistics = other[1].running_mean
    for step in range(2):  # statistics of the second pass start from those of the first
        torch.manual_seed(step)
        block(x).square().sum().backward()
        torch.manual_seed(step)
        loss = recomputed(other, other, x).square().sum()
        after_forward = {name: value.clone() for name, value in other[1].named_buffers()}
        loss.backward()
        for name, value in other[1].named_buffers():
            assert torch.equal(value, after_forward[name])
    for ours, expected in zip(other.parameters(), block.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)
    for name, value in block.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other[1].running_mean is statistics


def test_nothing_is_saved_without_gradients():
    block = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        assert not recomputed(block, block, torch.ones(1, 1, 2, 2)).requires_grad
