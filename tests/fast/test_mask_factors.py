"""Factored masks equal dense ones, and the output dict shows tensors however it is read.

Shape letters: B batch, Q queries, C channels, H W pixels, P points.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from mask2former.modeling.mask_predictions import (
    DenseMaskLogits,
    MaskLogits,
    MaskPredictions,
    mask_logits_of,
)


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 3, generator=generator),  # (B, Q, C)
        torch.randn(2, 3, 5, 6, generator=generator),  # (B, C, H, W)
    )


@pytest.fixture
def dense(factors) -> Tensor:
    embed, features = factors
    return (embed[:, :, :, None, None] * features[:, None]).sum(2)  # (B, Q, H, W)


def test_product_by_hand():
    embed = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    features = torch.tensor([[[[1.0, 0.0]], [[3.0, 5.0]]]])  # two channels of 1×2 pixels
    masks = MaskLogits(embed, features)
    assert masks.shape == (1, 2, 1, 2)
    assert masks._full is None  # shape alone computes nothing
    assert masks.full().tolist() == [[[[7.0, 10.0]], [[-3.0, -5.0]]]]
    assert masks.full() is masks.full()


def test_select(factors, dense):
    queries = [torch.tensor([3, 0]), torch.tensor([2])]
    expected = torch.stack([dense[0, 3], dense[0, 0], dense[1, 2]])
    masks = MaskLogits(*factors)
    torch.testing.assert_close(masks.select(queries), expected)
    assert masks._full is None
    masks.full()
    torch.testing.assert_close(masks.select(queries), expected)
    torch.testing.assert_close(DenseMaskLogits(dense).select(queries), expected)


def test_select_nothing(factors, dense):
    none = torch.empty(0, dtype=torch.int64)
    for masks in (MaskLogits(*factors), DenseMaskLogits(dense)):
        assert masks.select([none, none]).shape == (0, 5, 6)
        torch.testing.assert_close(masks.select([none, torch.tensor([1])]), dense[1, 1][None])


def test_select_needs_one_index_per_image(factors, dense):
    for masks in (MaskLogits(*factors), DenseMaskLogits(dense)):
        with pytest.raises(ValueError, match="zip"):
            masks.select([torch.tensor([0])])


def test_at_points_of_pixel_centres(factors, dense):
    # Centres of pixels (row 0, column 0), (4, 5) and (2, 3); the last point is well outside.
    points = torch.tensor([[0.5 / 6, 0.5 / 5], [5.5 / 6, 4.5 / 5], [3.5 / 6, 2.5 / 5], [3.0, 3.0]])
    pixels = torch.stack([dense[1, :, 0, 0], dense[1, :, 4, 5], dense[1, :, 2, 3]], 1)
    expected = torch.cat([pixels, torch.zeros(4, 1)], 1)  # (Q, P)
    masks = MaskLogits(*factors)
    torch.testing.assert_close(masks.at_points(1, points), expected)
    assert masks._full is None
    torch.testing.assert_close(DenseMaskLogits(dense).at_points(1, points), expected)


def test_at_points_between_pixels(factors, dense):
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        MaskLogits(*factors).at_points(0, points), DenseMaskLogits(dense).at_points(0, points)
    )


def test_at_points_is_float32_of_half(factors):
    embed, features = (x.bfloat16() for x in factors)
    out = MaskLogits(embed, features).at_points(0, torch.rand(7, 2))
    assert out.dtype == torch.float32


@pytest.fixture
def outputs(factors) -> MaskPredictions:
    aux = MaskPredictions(pred_logits=torch.ones(2, 4, 3), pred_masks=MaskLogits(*factors))
    return MaskPredictions(
        pred_logits=torch.zeros(2, 4, 3), pred_masks=MaskLogits(*factors), aux_outputs=[aux]
    )


READERS = {
    "key": lambda x: x["pred_masks"],
    "get": lambda x: x.get("pred_masks"),
    "get with default": lambda x: x.get("pred_masks", None),
    "items": lambda x: {k: v for k, v in x.items()}["pred_masks"],
    "items of a filter": lambda x: {k: v for k, v in x.items() if k != "aux_outputs"}["pred_masks"],
    "dict": lambda x: dict(x)["pred_masks"],
    "double star": lambda x: {**x}["pred_masks"],
    "call": lambda x: (lambda **kwargs: kwargs)(**x)["pred_masks"],
    "update": lambda x: _updated({}, x)["pred_masks"],
    "values": lambda x: list(x.values())[1],
    "pop": lambda x: x.pop("pred_masks"),
    "pop with default": lambda x: x.pop("pred_masks", None),
    "popitem": lambda x: (x.pop("aux_outputs"), x.popitem()[1])[1],
    "setdefault": lambda x: x.setdefault("pred_masks", None),
    "copy": lambda x: x.copy()["pred_masks"],
    "copy.copy": lambda x: copy.copy(x)["pred_masks"],
    "deepcopy": lambda x: copy.deepcopy(x)["pred_masks"],
    "pickle": lambda x: pickle.loads(pickle.dumps(x))["pred_masks"],
    "union": lambda x: (x | {"more": 1})["pred_masks"],
    "union from the right": lambda x: ({"more": 1} | x)["pred_masks"],
    "auxiliary": lambda x: x["aux_outputs"][0]["pred_masks"],
}


def _updated(target: dict, other: dict) -> dict:
    target.update(other)
    return target


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_way_of_reading_gives_a_tensor(reader, outputs, dense):
    masks = reader(outputs)
    assert isinstance(masks, Tensor)
    torch.testing.assert_close(masks, dense)


def test_dict_behaviour(outputs):
    assert list(outputs) == ["pred_logits", "pred_masks", "aux_outputs"]
    assert len(outputs) == 3 and "pred_masks" in outputs and "other" not in outputs
    assert outputs.get("other") is None and outputs.get("other", 3) == 3
    assert outputs.pop("other", 4) == 4
    with pytest.raises(KeyError, match="other"):
        outputs["other"]
    with pytest.raises(KeyError, match="other"):
        outputs.pop("other")
    outputs.pop("pred_masks")
    assert list(outputs) == ["pred_logits", "aux_outputs"]


def test_copy_keeps_factors(outputs):
    duplicate = outputs.copy()
    assert duplicate.mask_logits is outputs.mask_logits
    assert outputs.mask_logits._full is None
    del duplicate["pred_masks"]
    assert "pred_masks" in outputs


def test_reading_other_keys_computes_no_masks(outputs):
    outputs["pred_logits"]
    outputs.get("aux_outputs")
    outputs.pop("aux_outputs")
    list(outputs)
    assert outputs.mask_logits._full is None


def test_reassigned_masks_win(outputs):
    """A subclass that puts its own masks into the dict is obeyed."""
    masks = torch.ones(2, 4, 5, 6)
    outputs["pred_masks"] = masks
    assert outputs["pred_masks"] is masks
    assert mask_logits_of(outputs).full() is masks


def test_mask_logits_of(outputs, dense):
    assert mask_logits_of(outputs) is outputs.mask_logits
    assert mask_logits_of({"pred_masks": outputs.mask_logits}) is outputs.mask_logits
    wrapped = mask_logits_of({"pred_masks": dense})
    assert isinstance(wrapped, DenseMaskLogits) and wrapped.shape == (2, 4, 5, 6)
    assert wrapped.full() is dense


def test_gradient_flows_to_both_factors(factors):
    embed, features = (x.requires_grad_() for x in factors)
    MaskLogits(embed, features).select(
        [torch.tensor([1]), torch.tensor([], dtype=int)]
    ).sum().backward()
    # d/d embed of the sum of one mask is the sum of the features over pixels.
    torch.testing.assert_close(embed.grad[0, 1], features.detach()[0].sum((1, 2)))
    assert not embed.grad[0, [0, 2, 3]].any() and not embed.grad[1].any()
    assert features.grad[0].any() and not features.grad[1].any()


def test_masks_read_without_gradients_still_train_afterwards():
    embed = torch.randn(1, 2, 3, requires_grad=True)
    outputs = MaskPredictions(pred_masks=MaskLogits(embed, torch.randn(1, 3, 4, 4)))
    with torch.no_grad():  # as a matcher of another project does
        assert not outputs["pred_masks"].requires_grad
    assert outputs["pred_masks"].requires_grad
    assert outputs.mask_logits.select([torch.tensor([1])]).requires_grad


def test_an_edit_of_the_masks_is_seen_by_matching_and_loss():
    logits = MaskLogits(torch.randn(1, 2, 3), torch.randn(1, 3, 4, 4))
    outputs = MaskPredictions(pred_masks=logits)
    outputs["pred_masks"][:, 0] = 7.0
    torch.testing.assert_close(logits.select([torch.tensor([0])]), torch.full((1, 4, 4), 7.0))
    torch.testing.assert_close(
        logits.at_points(0, torch.tensor([[0.5, 0.5]]))[0], torch.tensor([7.0])
    )
