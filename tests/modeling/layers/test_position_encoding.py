"""Sine position encoding against its formula, plain and fast.

Shape letters: B batch, D channels of one axis, H W height and width of the map.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from mask2former.modeling.layers import PositionEmbeddingSine
from mask2former.modeling.transformer_decoder import position_encoding


def formula(rows: Tensor, columns: Tensor, num_feats: int, temperature: float) -> Tensor:
    """Encoding of the given positions (B, H, W), value by value."""
    batch, height, width = rows.shape
    out = torch.zeros(batch, 2 * num_feats, height, width, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                for axis, positions in enumerate((rows, columns)):
                    for d in range(num_feats):
                        wavelength = temperature ** (2 * (d // 2) / num_feats)
                        phase = positions[b, y, x].item() / wavelength
                        wave = math.sin(phase) if d % 2 == 0 else math.cos(phase)
                        out[b, axis * num_feats + d, y, x] = wave
    return out.float()


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(1, height + 1).double()[:, None].expand(height, width)
    columns = torch.arange(1, width + 1).double()[None].expand(height, width)
    return rows[None], columns[None]


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5, 1)])
def test_formula(mode, size):
    rows, columns = grid(*size)
    layer = mode(PositionEmbeddingSine(4, temperature=100))
    out = layer(torch.zeros(2, 7, *size))
    assert out.shape == (2, 8, *size) and out.dtype == torch.float32
    expected = formula(rows, columns, 4, 100)
    torch.testing.assert_close(out, expected.expand(2, -1, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_formula_normalised(mode, scale):
    rows, columns = grid(2, 3)
    layer = mode(PositionEmbeddingSine(6, normalize=True, scale=scale))
    length = 2 * math.pi if scale is None else scale
    # The last row and column are at the full length.
    expected = formula(rows / 2 * length, columns / 3 * length, 6, 10000)
    torch.testing.assert_close(layer(torch.zeros(1, 1, 2, 3)), expected, atol=2e-5, rtol=0)


def test_by_hand(mode):
    # One frequency: sine and cosine of the row in {π, 2π}, then of the column, 2π.
    out = mode(PositionEmbeddingSine(2, normalize=True))(torch.zeros(1, 1, 2, 1))
    expected = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(out[0, :, :, 0], expected, atol=2e-5, rtol=0)


def test_mask_counts_real_pixels_only(mode):
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2:] = True
    mask[1, :, 3:] = True
    layer = mode(PositionEmbeddingSine(4, normalize=True))
    out = layer(torch.zeros(2, 1, 3, 4), mask)
    # An image without padding is encoded like one without a mask, the other like its real part.
    torch.testing.assert_close(out[0], layer(torch.zeros(1, 1, 3, 4))[0])
    torch.testing.assert_close(out[1, :, :2, :3], layer(torch.zeros(1, 1, 2, 3))[0])


def test_encodings_do_not_depend_on_earlier_calls(mode):
    layer = mode(PositionEmbeddingSine(4, normalize=True))
    layer(torch.zeros(1, 1, 5, 3))
    for size in ((3, 5), (5, 3)):
        fresh = mode(PositionEmbeddingSine(4, normalize=True))(torch.zeros(1, 1, *size))
        assert torch.equal(layer(torch.zeros(1, 1, *size)), fresh)


def test_used_in_inference_mode_then_trained(mode):
    layer = mode(PositionEmbeddingSine(4))
    with torch.inference_mode():
        layer(torch.zeros(1, 1, 2, 3))
    x = torch.ones(1, 8, 2, 3, requires_grad=True)
    (x * layer(x)).sum().backward()
    torch.testing.assert_close(x.grad, layer(x))


def test_encoding_is_float32_under_autocast_and_for_doubles(mode):
    expected = mode(PositionEmbeddingSine(4))(torch.zeros(1, 1, 2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mode(PositionEmbeddingSine(4))(torch.zeros(1, 1, 2, 3, dtype=torch.bfloat16))
    assert torch.equal(out, expected)
    assert mode(PositionEmbeddingSine(4))(torch.zeros(1, 1, 2, 3).double()).dtype == torch.float32


def test_copies_and_empty_state_dict(mode):
    layer = mode(PositionEmbeddingSine(4))
    expected = layer(torch.zeros(1, 1, 2, 3))
    assert not layer.state_dict() and not list(layer.parameters())
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate(torch.zeros(1, 1, 2, 3)), expected)


def test_bad_arguments():
    with pytest.raises(ValueError, match="scale=2.0 has no effect unless normalize=True"):
        PositionEmbeddingSine(4, scale=2.0)


def test_old_import_path():
    assert position_encoding.PositionEmbeddingSine is PositionEmbeddingSine
