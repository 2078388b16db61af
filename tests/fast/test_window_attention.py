"""The bias of Swin's window attention as accelerators read it.

Shape letters: B batch, V windows per image, N tokens per window, A attention heads.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mask2former.fast.window_attention import _repeat_aligned
from mask2former.modeling.backbone.swin_layers import WindowAttention


def aligned(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 and all(stride % 16 == 0 for stride in x.stride()[:-1])


@pytest.mark.parametrize("window", [(3, 3), (4, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_bias_is_repeated_with_aligned_rows(window, shifted):
    module = WindowAttention(8, window, 2)
    nn.init.normal_(module.relative_position_bias_table)
    size = window[0] * window[1]
    mask = torch.randn(4, size, size) if shifted else None
    bias = module.attention_bias(mask, torch.float32)
    result, expected = _repeat_aligned(bias, 3), bias.repeat(3, 1, 1, 1)
    assert torch.equal(result, expected) and aligned(result)
    weights = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((x * weights).sum(), module.relative_position_bias_table)[0]
        for x in (result, module.attention_bias(mask, torch.float32).repeat(3, 1, 1, 1))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_accelerator_gets_an_aligned_bias(monkeypatch, shifted, training):
    seen = []
    attention = F.scaled_dot_product_attention

    def record(*args, attn_mask, **kwargs):
        seen.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, std: x)  # reads values
    with FakeTensorMode(), torch.device("cuda"), torch.set_grad_enabled(training):
        module = WindowAttention(8, (3, 3), 2)
        module(torch.zeros(2 * 4, 9, 8), torch.zeros(4, 9, 9) if shifted else None)
    assert [aligned(bias) for bias in seen] == [True]
    assert seen[0].shape == (8 if shifted else 1, 2, 9, 9)
