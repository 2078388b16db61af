"""Activation checkpointing: same gradients, less saved, plain calls where it is off."""

import pytest
import torch
from detectron2.modeling import Backbone, build_model
from torch import Tensor, nn

from mask2former.fast.checkpointing import checkpointed, has_room, set_checkpointing

MODULE = nn.Identity()  # without a policy of its own


def saved_bytes(run) -> int:
    """Bytes that `run` saves for backward, each storage once."""
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
    loss = checkpointed(MODULE, function, x, keep=keep).square().sum()
    for grad, target in zip(torch.autograd.grad(loss, (x, wide, narrow)), expected, strict=True):
        assert torch.equal(grad, target)


def test_saves_only_the_arguments(weights):
    wide, narrow = weights
    x = torch.randn(100, 8, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ wide.T).sigmoid() @ narrow.T

    hidden = 100 * 64 * 4
    assert saved_bytes(lambda: function(x)) >= hidden
    assert saved_bytes(lambda: checkpointed(MODULE, function, x)) == x.untyped_storage().nbytes()


def test_saved_results_are_not_recomputed(weights):
    wide, _ = weights
    seen = []

    def function(x: Tensor) -> Tensor:
        hidden = x @ wide.T
        seen.append(hidden.untyped_storage().data_ptr())
        return hidden.sigmoid().square()

    x = torch.randn(5, 8, requires_grad=True)
    checkpointed(MODULE, function, x, keep=[torch.ops.aten.mm.default]).sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_random_numbers_are_drawn_alike_in_backward():
    x = torch.ones(1000, requires_grad=True)
    out = checkpointed(MODULE, lambda x: torch.dropout(x, 0.5, True).square(), x, random=True)
    out.sum().backward()
    # d/dx of (2x)^2 is 8 where x was kept, and out is 4 there.
    assert torch.equal(x.grad, 2 * out)


def test_plain_call_without_gradients_and_for_a_compiler(weights, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("checkpoints")

    monkeypatch.setattr("mask2former.fast.checkpointing.checkpoint", refuse)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(checkpointed(MODULE, lambda x: x + 1, x), torch.full((3,), 2.0))
    with pytest.raises(AssertionError, match="checkpoints"):
        checkpointed(MODULE, lambda x: x + 1, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert checkpointed(MODULE, lambda x: x + 1, x).requires_grad


def test_policy_none_saves_everything(weights):
    wide, narrow = weights
    x = torch.randn(100, 8, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ wide.T).sigmoid() @ narrow.T

    module = nn.Sequential(nn.Identity())
    everything = saved_bytes(lambda: function(x))
    set_checkpointing(module, "none")
    assert saved_bytes(lambda: checkpointed(module[0], function, x)) == everything
    set_checkpointing(module, "selective")
    assert saved_bytes(lambda: checkpointed(module[0], function, x)) < everything


def train(cfg, policy: str, backbone: str, batch: list[dict]) -> tuple[dict, dict, int]:
    """Losses, gradients and saved bytes of one training step."""
    cfg.MODEL.BACKBONE.NAME = backbone
    swin = cfg.MODEL.SWIN
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE = 16, [1] * 4, [1, 2, 4, 8], 4
    swin.DROP_PATH_RATE = 0.0
    cfg.MODEL.CHECKPOINTING = policy
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.manual_seed(1)
    losses = {}

    def forward() -> Tensor:
        losses.update(model(batch))
        return sum(losses.values())

    saved = saved_bytes(forward)
    losses_before = {name: loss.item() for name, loss in losses.items()}
    sum(losses.values()).backward()
    return losses_before, {k: p.grad for k, p in model.named_parameters()}, saved


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "D2SwinTransformer"])
def test_policies_save_less_and_change_no_number(tiny_cfg, make_input, backbone):
    batch = [make_input(64, 96, [0, 2, 1], seed=1), make_input(64, 96, [], seed=2)]
    losses, grads, everything = train(tiny_cfg, "none", backbone, batch)
    saved = [everything]
    assert train(tiny_cfg, "auto", backbone, batch)[2] < everything
    for policy in ("selective", "blocks"):
        other_losses, other_grads, num_bytes = train(tiny_cfg, policy, backbone, batch)
        saved.append(num_bytes)
        assert other_losses == losses
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, msg=f"{policy}: {name}")
    assert saved[0] > saved[1] > saved[2]


def test_a_policy_can_change_during_training(weights):
    """What "auto" does when memory is ample."""
    wide, narrow = weights
    x = torch.randn(100, 8, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ wide.T).sigmoid() @ narrow.T

    module = nn.Sequential(nn.Identity())
    set_checkpointing(module, "auto")
    few = saved_bytes(lambda: checkpointed(module[0], function, x))
    set_checkpointing(module, "none")
    assert saved_bytes(lambda: checkpointed(module[0], function, x)) > few


def test_room_for_all_activations():
    gib = 2**30
    assert has_room(peak=10 * gib, available=139 * gib)
    assert has_room(peak=9 * gib, available=24 * gib)
    assert not has_room(peak=10 * gib, available=24 * gib)
    assert not has_room(peak=10 * gib, available=11 * gib)


def test_blocks_of_other_backbones(caplog):
    """Those with the method are told, others save their activations, which is said."""

    class Plain(Backbone):
        def forward(self, x):
            return {}

    class Told(Plain):
        num_depths, enabled = 1, False

        def parameter_depth(self, name):
            return 0

        def set_checkpointing(self, enabled):
            self.enabled = enabled

    told, other = Told(), Plain()
    set_checkpointing(nn.Sequential(told, other), "selective")
    assert not told.enabled and not caplog.text
    set_checkpointing(nn.Sequential(told, other), "blocks")
    assert told.enabled
    assert "the backbone Plain has no method `set_checkpointing(enabled)`" in caplog.text
    assert "Told" not in caplog.text


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="MODEL.CHECKPOINTING is 'all'; allowed: none, selective"):
        set_checkpointing(MODULE, "all")
