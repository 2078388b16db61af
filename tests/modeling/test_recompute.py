"""Recomputation in backward: same gradients, less kept, and nothing where it has no place."""

import pytest
import torch
from torch import Tensor

from mask2former.modeling.recompute import recomputed


def kept_bytes(run) -> int:
    """Bytes that autograd keeps for backward, each storage once, of what `run` computes."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    assert result.requires_grad
    return sum(storages.values())


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 8, generator=generator).requires_grad_()
    narrow = torch.randn(8, 64, generator=generator).requires_grad_()
    return wide, narrow


@pytest.mark.parametrize("keep", [(), [torch.ops.aten.mm.default]])
def test_same_gradients(weights, keep):
    wide, narrow = weights

    def function(x: Tensor) -> Tensor:
        return (x @ wide.T).sigmoid() @ narrow.T

    x = torch.randn(5, 8, requires_grad=True)
    expected = torch.autograd.grad(function(x).square().sum(), (x, wide, narrow))
    loss = recomputed(function, x, keep=keep).square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, (x, wide, narrow)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_keeps_the_arguments_only(weights):
    wide, narrow = weights
    x = torch.randn(100, 8, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ wide.T).sigmoid() @ narrow.T

    hidden = 100 * 64 * 4
    assert kept_bytes(lambda: function(x)) >= hidden
    assert kept_bytes(lambda: recomputed(function, x)) == x.untyped_storage().nbytes()


def test_what_is_kept_is_not_computed_again(weights):
    wide, _ = weights
    seen = []

    def function(x: Tensor) -> Tensor:
        hidden = x @ wide.T
        seen.append(hidden.untyped_storage().data_ptr())
        return hidden.sigmoid().square()

    x = torch.randn(5, 8, requires_grad=True)
    recomputed(function, x, keep=[torch.ops.aten.mm.default]).sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_random_numbers_are_drawn_alike():
    x = torch.ones(1000, requires_grad=True)
    out = recomputed(lambda x: torch.dropout(x, 0.5, True).square(), x, random=True)
    out.sum().backward()
    # d/dx of (2x)^2 is 8 where x was kept, and out is 4 there.
    assert torch.equal(x.grad, 2 * out)


def test_plain_call_without_gradients_and_for_a_compiler(weights, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("recomputes")

    monkeypatch.setattr("mask2former.modeling.recompute.checkpoint", refuse)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(recomputed(lambda x: x + 1, x), torch.full((3,), 2.0))
    with pytest.raises(AssertionError, match="recomputes"):
        recomputed(lambda x: x + 1, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert recomputed(lambda x: x + 1, x).requires_grad
