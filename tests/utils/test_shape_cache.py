import torch

from mask2former.utils.shape_cache import cached_by_shape


def counted(maxsize=2):
    calls = []

    @cached_by_shape(maxsize)
    def zeros(height, width):
        calls.append((height, width))
        return torch.zeros(height, width)

    return zeros, calls


def test_equal_arguments_give_the_same_tensor():
    zeros, calls = counted()
    assert zeros(2, 3) is zeros(2, 3)
    assert calls == [(2, 3)]


def test_only_the_most_recent_results_are_kept():
    zeros, calls = counted(maxsize=2)
    zeros(1, 1), zeros(2, 2), zeros(1, 1), zeros(3, 3)
    calls.clear()
    zeros(1, 1), zeros(2, 2)
    assert calls == [(2, 2)]


def test_results_of_inference_mode_are_usable_in_training():
    zeros, _ = counted()
    with torch.inference_mode():
        zeros(2, 2)
    assert not zeros(2, 2).is_inference()
    weight = torch.ones(2, 2, requires_grad=True)
    (weight * zeros(2, 2)).sum().backward()


def test_nothing_is_cached_while_exporting():
    zeros, calls = counted()

    class Add(torch.nn.Module):
        def forward(self, x):
            return x + zeros(*x.shape)

    torch.export.export(Add(), (torch.ones(2, 3),))
    calls.clear()
    # A cached result would be a fake tensor of the exporter.
    assert torch.equal(zeros(2, 3), torch.zeros(2, 3))
    assert calls == [(2, 3)]


def test_results_depend_on_the_default_dtype():
    zeros, _ = counted()
    assert zeros(2, 3).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert zeros(2, 3).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert zeros(2, 3).dtype == torch.float32
