import pytest
import torch
import torch.distributed as dist

from mask2former.utils.misc import (
    NestedTensor,
    is_dist_avail_and_initialized,
    nested_tensor_from_tensor_list,
)


def test_pads_at_the_end_and_returns_the_mask():
    small = torch.ones(1, 1, 2)
    tall = torch.full((1, 2, 1), 5.0)
    tensors, mask = nested_tensor_from_tensor_list([small, tall]).decompose()
    assert tensors.tolist() == [[[[1, 1], [0, 0]]], [[[5, 0], [5, 0]]]]
    assert mask.tolist() == [[[False, False], [True, True]], [[False, True], [False, True]]]


def test_different_numbers_of_channels_including_zero():
    two = torch.ones(2, 3, 3, dtype=torch.bool)
    empty = torch.zeros(0, 2, 4, dtype=torch.bool)
    tensors, mask = nested_tensor_from_tensor_list([two, empty]).decompose()
    assert tensors.shape == (2, 2, 3, 4)
    assert tensors.dtype == torch.bool
    assert tensors.sum() == 2 * 9
    assert mask.shape == (2, 3, 4)
    assert (~mask).sum(dim=(1, 2)).tolist() == [9, 8]


def test_gradient_passes_through_the_padding():
    image = torch.ones(1, 2, 2, requires_grad=True)
    tensors, _ = nested_tensor_from_tensor_list([image, torch.zeros(1, 3, 3)]).decompose()
    (3 * tensors).sum().backward()
    assert image.grad.tolist() == [[[3, 3], [3, 3]]]


def test_to_moves_both_parts():
    moved = NestedTensor(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1).bool()).to("meta")
    assert moved.tensors.is_meta and moved.mask.is_meta
    assert NestedTensor(torch.zeros(1), None).to("meta").mask is None


def test_bad_lists():
    with pytest.raises(ValueError, match="empty list"):
        nested_tensor_from_tensor_list([])
    with pytest.raises(ValueError, match=r"Tensor 1 .*\(2, 3\)"):
        nested_tensor_from_tensor_list([torch.zeros(1, 2, 3), torch.zeros(2, 3)])


def test_process_group(tmp_path):
    assert not is_dist_avail_and_initialized()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert is_dist_avail_and_initialized()
    finally:
        dist.destroy_process_group()
