"""Query pruning in inference, plain and fast: which queries are left, and what comes of them.

Shape letters: B batch, Q queries, C channels, K classes, H W pixels.
"""

import warnings

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask2former.config_checks import check_config
from mask2former.modeling.transformer_decoder import (
    ConfigurableTransformerDecoder,
    MultiScaleMaskedTransformerDecoder,
)
from mask2former.modeling.transformer_decoder.query_pruning import (
    QueryPruning,
    set_query_pruning,
    take_queries,
    take_rows,
)

Q, C, K = 8, 16, 3
DECODERS = [MultiScaleMaskedTransformerDecoder, ConfigurableTransformerDecoder]
LOG = {0.2: -1.6094379, 0.5: -0.6931472}


def build(cls=MultiScaleMaskedTransformerDecoder, **changes):
    torch.manual_seed(0)
    arguments = {
        "num_classes": K,
        "hidden_dim": C,
        "num_queries": Q,
        "nheads": 4,
        "dim_feedforward": 24,
        "dec_layers": 4,
        "pre_norm": False,
        "mask_dim": 6,
        "enforce_input_project": False,
    }
    decoder = cls(C, **arguments | changes).eval()
    # Predictions vary more than they do at first, so that masks and classes matter.
    nn.init.normal_(decoder.mask_embed.layers[-1].weight, std=0.5)
    torch.manual_seed(5)
    nn.init.normal_(decoder.class_embed.weight, std=1.0)
    nn.init.constant_(decoder.class_embed.bias[K:], 4.0)  # no-object wins in about half of them
    return decoder


def inputs(batch: int = 1, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3), (4, 6), (8, 12))
    scales = [torch.randn(batch, C, *size, generator=generator) for size in sizes]
    return scales, torch.randn(batch, 6, 16, 24, generator=generator)


def layers_of(outputs) -> list[dict[str, Tensor]]:
    return [*outputs["aux_outputs"], outputs]


def is_dropped(logits: Tensor, threshold: float) -> Tensor:
    probs = logits.softmax(-1)
    return (probs.argmax(-1) == K) & (probs[..., K] > threshold)


def by_hand(decoder, scales, mask_features, after: int, threshold: float):
    """One image, layer by layer: final logits, masks and the queries that are left."""
    levels = decoder.project_features(scales)
    output = decoder.query_feat.weight[:, None]
    embed = decoder.query_embed.weight[:, None]
    left = list(range(Q))
    for i in range(decoder.num_layers + 1):
        size = levels[i % len(levels)].mask_size
        logits, masks, blocked = decoder.forward_prediction_heads(output, mask_features, size)
        if i == decoder.num_layers:
            return logits, masks, left
        if i == after:
            keep = [n for n in range(Q) if not is_dropped(logits, threshold)[0, n]]
            left, output, embed, blocked = keep, output[keep], embed[keep], blocked[:, keep]
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        output = decoder.forward_layer(i, output, embed, levels[i % len(levels)], blocked)


@pytest.mark.parametrize("cls", DECODERS)
@pytest.mark.parametrize("after", [1, 2])
def test_equals_queries_removed_by_hand(mode, cls, after):
    decoder = mode(build(cls))
    with torch.no_grad():
        logits, masks, left = by_hand(decoder, *inputs(seed=3), after, 0.3)
        assert 1 < len(left) < Q
        full = decoder(*inputs(seed=3))
        set_query_pruning(decoder, after, 0.3)
        outputs = decoder(*inputs(seed=3))
    torch.testing.assert_close(outputs["pred_logits"], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"], masks, atol=1e-5, rtol=1e-5)
    # It does matter: the dropped queries took part in self-attention.
    assert not torch.allclose(full["pred_logits"][:, left], logits, atol=1e-3)
    numbers = [layer["pred_logits"].shape[1] for layer in layers_of(outputs)]
    assert numbers == [Q] * (after + 1) + [len(left)] * (4 - after)
    assert [layer["pred_masks"].shape[1] for layer in layers_of(outputs)] == numbers


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_off_or_nothing_dropped_changes_nothing(mode, threshold):
    decoder = mode(build())
    with torch.no_grad():
        expected = decoder(*inputs(2))
        if threshold is not None:
            set_query_pruning(decoder, 2, threshold)
        outputs = decoder(*inputs(2))
    for layer, target in zip(layers_of(outputs), layers_of(expected), strict=True):
        assert torch.equal(layer["pred_logits"], target["pred_logits"])
        assert torch.equal(layer["pred_masks"], target["pred_masks"])


def test_off_in_training(mode):
    decoder = mode(build())
    set_query_pruning(decoder, 1, 0.0)
    assert decoder.train()(*inputs())["pred_logits"].shape[1] == Q
    assert decoder.eval()(*inputs())["pred_logits"].shape[1] < Q


def test_one_query_is_left_where_all_are_dropped(mode):
    decoder = mode(build())
    nn.init.zeros_(decoder.class_embed.weight)
    decoder.class_embed.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0])
    set_query_pruning(decoder, 1, 0.5)
    outputs = decoder(*inputs(2))
    assert outputs["pred_logits"].shape == (2, 1, K + 1)
    assert outputs["pred_masks"].shape == (2, 1, 16, 24)


def test_images_of_a_batch_keep_different_queries(mode):
    """The image that keeps most comes out as alone, exactly its own queries."""
    decoder = mode(build())
    set_query_pruning(decoder, 2, 0.3)
    scales, mask_features = inputs(2, seed=3)
    with torch.no_grad():
        alone = [decoder([x[i : i + 1] for x in scales], mask_features[i : i + 1]) for i in (0, 1)]
        outputs = decoder(scales, mask_features)
    numbers = [one["pred_logits"].shape[1] for one in alone]
    assert numbers[0] != numbers[1] and max(numbers) < Q
    most = max((0, 1), key=lambda i: numbers[i])
    for key in ("pred_logits", "pred_masks"):
        assert outputs[key].shape[1] == max(numbers)
        torch.testing.assert_close(outputs[key][most], alone[most][key][0], atol=1e-5, rtol=1e-5)


def test_remaining_of_two_images():
    """Worked by hand: logits are log probabilities of two classes and no-object, last."""
    a, b = LOG[0.5], LOG[0.2]
    lost, hardly_lost = [-9.0, -9.0, 0.0], [b - 0.3, b - 0.3, a]  # no-object: 1.0 and 0.62
    kept, tie = [a, b, b], [a, -9.0, a]
    logits = torch.tensor([[kept, lost, hardly_lost, lost], [kept, kept, lost, kept]])
    # Image 0 keeps query 0, and fills up with the least sure ones in the order of the queries.
    remaining = QueryPruning(1, 0.6).remaining(logits)
    assert remaining.tolist() == [[0, 1, 2], [0, 1, 3]]
    assert QueryPruning(1, 0.6).remaining(logits[:1]).tolist() == [[0]]
    # Its threshold keeps a query whose most probable class is no-object.
    assert QueryPruning(1, 0.7).remaining(logits[:1]).tolist() == [[0, 2]]
    # A class that is as probable as no-object wins; the last query alone is not dropped either.
    assert QueryPruning(1, 0.1).remaining(torch.tensor([[lost, tie]])).tolist() == [[1]]
    assert QueryPruning(1, 0.1).remaining(torch.tensor([[kept, tie]])) is None


def test_taking_queries_and_rows():
    remaining = torch.tensor([[0, 2], [1, 2]])
    x = torch.arange(12).view(3, 2, 2)  # (Q, B, C)
    assert take_queries(x, remaining).tolist() == [[[0, 1], [6, 7]], [[8, 9], [10, 11]]]
    rows = torch.arange(12).view(4, 3, 1)  # (B·M, Q, L), two heads
    assert take_rows(rows, remaining).flatten(1).tolist() == [[0, 2], [3, 5], [7, 8], [10, 11]]


class OwnLoop(MultiScaleMaskedTransformerDecoder):
    def forward(self, x, mask_features, mask=None):
        return super().forward(x, mask_features, mask)


@pytest.mark.parametrize(
    ("decoder", "after", "threshold", "message"),
    [
        (build(OwnLoop), 1, 0.9, "OwnLoop has a forward pass of its own"),
        (nn.Linear(1, 1), 1, 0.9, "Linear has a forward pass of its own"),
        (build(), 4, 0.9, "AFTER is 4; allowed: 0 .off. or 1 to 3, because .* 4 layers"),
        (build(dec_layers=1), 1, 0.9, r"AFTER is 1; allowed: 0 .off., because .* 1 layer\."),
        (build(), 1, 1.5, "THRESHOLD is 1.5; allowed: 0 to 1"),
    ],
)
def test_what_cannot_prune_says_so(decoder, after, threshold, message):
    with pytest.raises(ValueError, match=message):
        set_query_pruning(decoder, after, threshold)


def test_exported_only_without_pruning():
    decoder = build(dec_layers=2)
    program = torch.export.export(decoder, inputs())
    torch.testing.assert_close(program.module()(*inputs()), decoder(*inputs()))
    set_query_pruning(decoder, 1, 0.9)
    with pytest.raises(ValueError, match="PRUNE_QUERIES_AFTER is 1: .* set it to 0"):
        torch.export.export(decoder, inputs())
    with pytest.raises(ValueError, match="PRUNE_QUERIES_AFTER is 1"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, that it is deprecated
        torch.jit.trace(decoder, inputs())


@pytest.mark.parametrize("before", [False, True])
def test_model_from_config(tiny_cfg, mode, before):
    """All three post-processings of two images with fewer queries than instances asked for."""
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PRUNE_QUERIES_AFTER, test.PRUNE_QUERIES_THRESHOLD = 2, 0.0
    test.PANOPTIC_ON = test.INSTANCE_ON = before
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 100
    check_config(tiny_cfg)
    model = mode(build_model(tiny_cfg).eval())
    decoder = model.sem_seg_head.predictor
    assert decoder.query_pruning == QueryPruning(2, 0.0)
    nn.init.zeros_(decoder.class_embed.weight)
    decoder.class_embed.bias.data = torch.tensor([2.0, 1.0, 0.0, 3.0])
    images = [{"image": torch.full((3, 64, 96), 90.0 + 50 * i)} for i in (0, 1)]
    with torch.no_grad():
        results = model(images)
    for result in results:
        assert result["sem_seg"].shape == (3, 64, 96) and result["sem_seg"].isfinite().all()
        if before:
            assert result["panoptic_seg"][0].shape == (64, 96)
            assert len(result["instances"]) == 2  # one query, two thing classes


def test_other_decoder_in_a_config(tiny_cfg):
    tiny_cfg.MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER = 1
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "StandardTransformerDecoder"
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    with pytest.raises(ValueError, match="AFTER is 1; allowed: 0 .off. with StandardTransformer"):
        check_config(tiny_cfg)
    with pytest.raises(ValueError, match="StandardTransformerDecoder has a forward pass"):
        build_model(tiny_cfg)


def test_config_of_another_project(tiny_cfg):
    """Their list of keys lacks the new ones."""
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    del test["PRUNE_QUERIES_AFTER"], test["PRUNE_QUERIES_THRESHOLD"]
    check_config(tiny_cfg)
    assert build_model(tiny_cfg).sem_seg_head.predictor.query_pruning is None
