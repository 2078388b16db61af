"""Activations by name, and the multi-layer perceptron."""

import pytest
import torch

from mask2former.modeling.layers import MLP
from mask2former.modeling.layers.mlp import _get_activation_fn


def test_activations():
    assert _get_activation_fn("relu")(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"activation='swish' is not one of \['gelu', 'glu', 're"):
        _get_activation_fn("swish")


def test_mlp():
    mlp = MLP(3, 5, 2, 3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    x = torch.randn(4, 3)
    expected = mlp.layers[2](mlp.layers[1](mlp.layers[0](x).relu()).relu())
    torch.testing.assert_close(mlp(x), expected)
