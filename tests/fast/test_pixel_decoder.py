"""The fast pixel decoder: caches, feed-forward in chunks, what is saved for backward.

Shape letters: B batch, C channels, S values of all levels, L levels, H W pixels.
"""

import pytest
import torch
from small_parts import build_pixel_decoder, features, randomise
from torch import Tensor

from mask2former.fast import pixel_decoder
from mask2former.fast.pixel_decoder import _reference_points
from mask2former.modeling.layers import PositionEmbeddingSine
from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnTransformerEncoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
)
from mask2former.utils.twins import runs_fast


def test_position_encodings_are_cached(monkeypatch):
    computed = []
    kind = pixel_decoder.PositionEmbeddingSine
    monkeypatch.setattr(
        pixel_decoder, "PositionEmbeddingSine", lambda *args: computed.append(1) or kind(*args)
    )
    layer = PositionEmbeddingSine(4, temperature=37)
    assert runs_fast(layer)
    first = layer(torch.zeros(1, 1, 3, 5))
    expected = first.clone()
    first += 1  # callers may write to it
    again = layer(torch.zeros(4, 2, 3, 5))  # batch and channels do not matter
    other = PositionEmbeddingSine(4, temperature=37)(torch.zeros(1, 1, 3, 5))
    assert computed == [1]
    assert torch.equal(again, expected.expand(4, -1, -1, -1)) and torch.equal(other, expected)


def test_level_sizes_are_not_shared():
    module = MSDeformAttnTransformerEncoderOnly(8, 2, 1, 8, num_feature_levels=1)
    level = [torch.zeros(1, 8, 2, 3)]
    _, shapes, starts = module(level, level)
    shapes += 5
    starts += 5
    assert [x.tolist() for x in module(level, level)[1:]] == [[[2, 3]], [0]]


@pytest.mark.parametrize(
    "settings", [{"temperature": 20}, {"normalize": True}, {"normalize": True, "scale": 1.0}]
)
def test_cached_position_encodings_depend_on_the_settings(settings):
    x = torch.zeros(1, 1, 3, 5)
    default = PositionEmbeddingSine(4)(x)
    changed = PositionEmbeddingSine(4, **settings)
    assert not torch.allclose(changed(x), default)
    torch.testing.assert_close(changed(x), changed.encode(torch.ones(1, 3, 5, dtype=torch.bool)))
    # Attributes may also change after construction.
    layer = PositionEmbeddingSine(4)
    for name, value in settings.items():
        setattr(layer, name, value)
    assert torch.equal(layer(x), changed(x))


def test_reference_points_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        points = _reference_points(((7, 9),), torch.device("cpu"))
    assert not points.is_inference()
    expected = MSDeformAttnTransformerEncoder.get_reference_points([(7, 9)], None, "cpu")
    assert torch.equal(points, expected)


def test_level_sizes_may_be_integers():
    torch.manual_seed(0)
    layer = MSDeformAttnTransformerEncoderLayer(16, 32, 0.0, "relu", 1, 2, 2)
    randomise(layer)
    src, pos = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    reference = _reference_points(((2, 3),), torch.device("cpu"))
    expected = layer(src, pos, reference, torch.tensor([[2, 3]]), torch.tensor([0]))
    torch.testing.assert_close(layer(src, pos, reference, ((2, 3),)), expected)


def outputs_and_gradients(decoder, given, dtype=None) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in given.values()]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        mask_features, _, levels = decoder.forward_features(dict(zip(given, inputs, strict=True)))
    outputs = [mask_features, *levels]
    # Not symmetric, so that no gradient vanishes.
    loss = sum((x.float() * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *decoder.parameters()])]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", ["compiled", "pytorch"])
def test_checkpointing_changes_no_number(monkeypatch, dropout, dtype, backend):
    if backend == "pytorch":
        monkeypatch.setattr(pixel_decoder, "backend", lambda device: "pytorch")
    decoder, given = build_pixel_decoder(transformer_dropout=dropout), features()
    randomise(decoder)
    checkpointed = outputs_and_gradients(decoder, given, dtype)
    monkeypatch.setattr(pixel_decoder, "checkpointed", lambda module, f, *args, **options: f(*args))
    for a, b in zip(checkpointed, outputs_and_gradients(decoder, given, dtype), strict=True):
        assert torch.equal(a, b)


def test_feed_forward_in_chunks_changes_nothing(monkeypatch):
    decoder, given = build_pixel_decoder(), features()
    expected = outputs_and_gradients(decoder, given)
    monkeypatch.setattr(pixel_decoder, "_FFN_CHUNK", 7)
    for a, b in zip(outputs_and_gradients(decoder, given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_large_results_are_not_saved_for_backward():
    """Neither hidden activations nor queries nor intermediate results of the FPN level."""
    decoder, given = build_pixel_decoder(), features(256, 256)
    parameters = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    backbone = {x.untyped_storage().data_ptr() for x in given.values()}
    sizes = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        decoder.forward_features(given)
    stream = 4 * 2 * (8**2 + 16**2 + 32**2) * 32  # of a (B, S, C) tensor
    saved = sorted(size for k, size in sizes.items() if k not in parameters | backbone)
    # For each of two layers: input, sum after attention, sum after the network, and the sampled
    # values that selective checkpointing saves; three more for the projections.
    assert sum(saved) <= (2 * 4 + 3) * stream
    assert max(saved) <= stream
