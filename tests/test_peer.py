"""Peer test: the `transformers` package's Mask2Former, with the same random weights, agrees.

It is an independent implementation of the same model, so a mistake goes unnoticed only if both make
it. Models are small; every parameter is random, including those that start at zero or one (sampling
offsets, norms, embeddings).

Shape letters: B batch, Q queries, K classes, M heads, L locations of a scale.
"""

from collections.abc import Sequence

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from load_script import load_script
from small_models import (
    NUM_CLASSES,
    NUM_HEADS,
    NUM_PREDICTIONS,
    NUM_QUERIES,
    randomise,
    small_config,
)
from torch import nn

from mask2former.fast.mask_factors import MaskFactors
from mask2former.utils.twins import run_plain

pytest.importorskip("transformers", reason="the peer implementation is in the transformers package")

TOLERANCE = 1e-4
peer_model = load_script("tools/benchmark/peer.py")


def _our_model(backbone: str, pre_norm: bool) -> nn.Module:
    return build_model(small_config(backbone, pre_norm))


def _peer_model(backbone: str, pre_norm: bool) -> nn.Module:
    return peer_model.build_peer(small_config(backbone, pre_norm))


def _pair(backbone: str, seed: int = 0, pre_norm: bool = False) -> tuple[nn.Module, nn.Module]:
    """Our model and the peer's with the same random weights, both in evaluation mode."""
    ours, peer = _our_model(backbone, pre_norm), _peer_model(backbone, pre_norm)
    randomise(ours, seed)
    peer_model.load_weights(peer, ours)
    return ours.eval(), peer.eval()


def _record_attention_masks(ours: nn.Module, peer: nn.Module) -> tuple[list, list]:
    """Lists that fill with the mask of every cross-attention, (B, Q, L), True where blocked.

    Both hand (B·M, Q, L) to the layer, equal for all heads.
    """
    our_masks, peer_masks = [], []
    for layer in ours.sem_seg_head.predictor.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: our_masks.append(kwargs["memory_mask"][::NUM_HEADS]),
            with_kwargs=True,
        )
    for layer in peer.model.transformer_module.decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: peer_masks.append(
                kwargs["encoder_attention_mask"][::NUM_HEADS]
            ),
            with_kwargs=True,
        )
    return our_masks, peer_masks


def _assert_close(ours: torch.Tensor, peer: torch.Tensor) -> None:
    torch.testing.assert_close(ours, peer, atol=TOLERANCE, rtol=0)


def _targets(height: int, width: int, seed: int, counts=(4, 2)) -> list[dict[str, torch.Tensor]]:
    """Rectangles with random classes, for each image as many as ``counts`` says."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        masks = torch.zeros(count, height, width)
        for mask in masks:
            top, left = (int(torch.randint(n // 2, (), generator=generator)) for n in mask.shape)
            mask[top : top + height // 2, left : left + width // 3] = 1
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        targets.append({"labels": labels, "masks": masks})
    return targets


@pytest.mark.parametrize(
    ("backbone", "size", "pre_norm"),
    [
        ("swin", (96, 128), False),
        # Odd maps: 25 x 33, 13 x 17, 7 x 9, 4 x 5.
        ("swin", (100, 132), True),
        ("resnet", (96, 128), True),
        ("resnet", (100, 132), False),
    ],
)
def test_all_predictions_and_attention_masks(backbone, size, pre_norm):
    ours, peer = _pair(backbone, pre_norm=pre_norm)
    our_masks, peer_masks = _record_attention_masks(ours, peer)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = ours.sem_seg_head(ours.backbone(images))
        expected = peer(pixel_values=images, output_auxiliary_logits=True)

    ours_by_layer = [*outputs["aux_outputs"], outputs]
    peer_by_layer = [*expected.auxiliary_logits, expected]
    assert len(ours_by_layer) == len(peer_by_layer) == NUM_PREDICTIONS
    for prediction, other in zip(ours_by_layer, peer_by_layer, strict=True):
        # Large enough that closeness means something.
        assert other["masks_queries_logits"].std() > 0.3
        assert other["class_queries_logits"].std() > 0.3
        _assert_close(prediction["pred_logits"], other["class_queries_logits"])
        _assert_close(prediction["pred_masks"], other["masks_queries_logits"])

    assert len(our_masks) == len(peer_masks) == NUM_PREDICTIONS - 1
    for mask, other in zip(our_masks, peer_masks, strict=True):
        assert torch.equal(mask, other)
    blocked_somewhere = torch.stack([mask.any(-1).float() for mask in our_masks])
    assert blocked_somewhere.mean() > 0.5


def test_queries_with_empty_masks_attend_everywhere():
    ours, peer = _pair("swin", seed=2)
    our_masks, peer_masks = _record_attention_masks(ours, peer)
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 4), (6, 8), (12, 16)]
    features = [torch.randn(2, 64, *size, generator=generator) for size in sizes]
    mask_features = torch.randn(2, 32, 24, 32, generator=generator)
    # One dominant channel: masks are all foreground or all background.
    mask_features[:, 0] = 100
    before = []
    peer.model.transformer_module.decoder.mask_predictor.register_forward_hook(
        lambda _, args, output: before.append(output[1])
    )
    with torch.no_grad():
        outputs = ours.sem_seg_head.predictor(features, mask_features)
        expected = peer.model.transformer_module(features, mask_features)
    empty = torch.stack([mask.all(-1).float().mean() for mask in before])
    assert (empty > 0).any() and (empty < 1).any()
    for mask, other in zip(our_masks, peer_masks, strict=True):
        assert torch.equal(mask, other)
        assert not mask.all(-1).any()
    # Masks are in the hundreds here.
    torch.testing.assert_close(
        outputs["pred_masks"], expected.masks_queries_logits[-1], atol=1e-3, rtol=1e-5
    )


class SharedDraws:
    """Gives the peer the random points that our fast model drew, in the order in which it draws.

    Ours draws matching points once for all images and layers, then the candidates and the other
    points of each image, by layer. The peer, like our plain model, goes layer by layer: matching
    points of every image, candidates of all images, other points of all images.
    """

    def __init__(self, monkeypatch, num_layers: int, counts: Sequence[int]):
        self._patch, self._draws = monkeypatch, []
        self._num_layers, self._counts = num_layers, [min(n, NUM_QUERIES) for n in counts]
        self._rand = torch.rand
        monkeypatch.setattr(torch, "rand", self._record)

    def _record(self, *size, **kwargs):
        self._draws.append(self._rand(*size, **kwargs))
        return self._draws[-1]

    def replay(self, dtype: torch.dtype = torch.float32) -> None:
        matching, *rest = self._draws
        assert len(rest) == 2 * len(self._counts)
        rest = [draw.chunk(self._num_layers) for draw in rest]
        order = []
        for layer in range(self._num_layers):
            order += [points[None] for points in matching]
            for kind in (0, 1):
                order.append(
                    torch.cat([
                        draws[layer]
                        for draws, count in zip(rest[kind::2], self._counts, strict=True)
                        if count
                    ] or [rest[kind][0]])
                )  # fmt: skip

        def next_draw(*size, **kwargs):
            draw = order.pop(0)
            assert draw.shape == size
            return draw.to(dtype)

        self._patch.setattr(torch, "rand", next_draw)


@pytest.mark.parametrize("form", ["factors", "dense", "plain"])
@pytest.mark.parametrize("counts", [(4, 2), (0, 3), (0, 0), (NUM_QUERIES + 2, 1)])
def test_losses_at_the_same_points(form, counts, monkeypatch):
    ours, peer = _our_model("swin", False).criterion, _peer_model("swin", False).criterion
    if form == "plain":
        run_plain(ours)
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(2, 8, 24, 32, generator=generator)
    layers = [
        (
            torch.randn(2, NUM_QUERIES, NUM_CLASSES + 1, generator=generator),
            torch.randn(2, NUM_QUERIES, 8, generator=generator),
        )
        for _ in range(3)
    ]
    predictions, others = [], []
    for logits, embed in layers:
        masks = MaskFactors(embed, features)
        others.append({"class_queries_logits": logits, "masks_queries_logits": masks.full()})
        pred_masks = masks if form == "factors" else masks.full()
        predictions.append({"pred_logits": logits, "pred_masks": pred_masks})
    predictions[-1]["aux_outputs"] = predictions[:-1]
    targets = _targets(96, 128, seed=5, counts=counts)

    torch.manual_seed(6)
    if form == "plain":  # it draws in the order of the peer
        losses = ours(predictions[-1], targets)
        torch.manual_seed(6)
    else:
        draws = SharedDraws(monkeypatch, len(layers), counts)
        losses = ours(predictions[-1], targets)
        draws.replay()
    expected = peer(
        **others[-1],
        mask_labels=[t["masks"] for t in targets],
        class_labels=[t["labels"] for t in targets],
        auxiliary_predictions=others[:-1],
    )
    expected = {k.replace("cross_entropy", "ce"): v for k, v in expected.items()}
    assert losses.keys() == expected.keys()
    assert len(losses) == 9
    for name, loss in losses.items():
        has_masks = sum(counts) > 0
        assert (loss > 0.05) == (has_masks or "loss_ce" in name)
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_training_step_has_the_same_loss_and_gradients(backbone, monkeypatch):
    """In float64, where rounding does not move an activation over the kink of a ReLU."""
    ours, peer = (model.double() for model in _pair(backbone, seed=7))
    ours.train().criterion.float()  # Our losses are always in float32.
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator)
    targets = _targets(96, 128, seed=9)
    batched_inputs = []
    for image, target in zip(images, targets, strict=True):
        instances = Instances((96, 128))
        instances.gt_classes = target["labels"]
        instances.gt_masks = target["masks"].bool()
        batched_inputs.append({"image": image, "instances": instances})

    torch.manual_seed(10)
    draws = SharedDraws(monkeypatch, NUM_PREDICTIONS, [len(t["labels"]) for t in targets])
    losses = ours(batched_inputs)
    draws.replay(torch.float64)
    expected = peer(
        pixel_values=(images - ours.pixel_mean) / ours.pixel_std,
        mask_labels=[t["masks"].double() for t in targets],
        class_labels=[t["labels"] for t in targets],
    )
    assert len(losses) == 3 * NUM_PREDICTIONS
    total = sum(losses.values())
    assert total.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    total.backward()
    expected.loss.backward()
    gradients = peer_model.to_peer({k: p.grad for k, p in ours.named_parameters()})
    peer_gradients = {k: p.grad for k, p in peer.named_parameters() if p.grad is not None}
    if backbone == "resnet":  # Only our norms are frozen.
        peer_gradients = {k: g for k, g in peer_gradients.items() if "normalization" not in k}
    assert gradients.keys() == peer_gradients.keys()
    differences = {}
    for name, gradient in gradients.items():
        scale = peer_gradients[name].norm()
        # The key bias of an attention has no effect, up to rounding.
        assert scale > 1e-4 or "k_proj.bias" in name, name
        differences[name] = ((gradient - peer_gradients[name]).norm() / (scale + 1e-2)).item()
    assert max(differences.values()) < 1e-5, max(differences, key=differences.get)
