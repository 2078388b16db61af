"""The whole model, small, from a config: training, inference, precision, copies.

Shape letters: B batch, Q queries, K classes, T targets, H W pixels.
"""

import copy
import itertools
import pickle

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from mask2former import MaskFormer
from mask2former.fast import criterion as fast_criterion
from mask2former.fast import postprocessing as fast_postprocessing
from mask2former.fast.mask_factors import MaskFactors
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.meta_arch import MaskFormerHead

NAMES = ["loss_ce", "loss_mask", "loss_dice"]


def build(cfg, **changes) -> MaskFormer:
    for key, value in changes.items():
        setattr(cfg.MODEL.MASK_FORMER, key, value)
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture(params=[False, True], ids=["plain", "fast"])
def both_cfg(request, tiny_cfg):
    """The config with MODEL.FAST off and on."""
    tiny_cfg.MODEL.FAST = request.param
    return tiny_cfg


def make_images(model: MaskFormer, *sizes: tuple[int, int]) -> ImageList:
    return ImageList.from_tensors([torch.zeros(3, *size) for size in sizes], 32)


@pytest.fixture
def batch(make_input) -> list[dict]:
    return [make_input(64, 96, [0, 2, 1], seed=1), make_input(50, 70, [2], seed=2)]


def test_from_config(tiny_cfg):
    tiny_cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 64
    model = build(tiny_cfg)
    assert isinstance(model, MaskFormer) and isinstance(model.sem_seg_head, MaskFormerHead)
    assert model.size_divisibility == 64
    assert model.num_queries == 7 and model.test_topk_per_image == 5
    assert model.criterion.weight_dict == {
        "loss_ce": 2.0,
        "loss_mask": 5.0,
        "loss_dice": 5.0,
        **{f"loss_ce_{i}": 2.0 for i in range(4)},
        **{f"loss_mask_{i}": 5.0 for i in range(4)},
        **{f"loss_dice_{i}": 5.0 for i in range(4)},
    }
    assert model.sem_seg_head.num_classes == 3
    matcher = model.criterion.matcher
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice) == (2.0, 5.0, 5.0)
    assert matcher.num_points == model.criterion.num_points == 64


def test_negative_size_divisibility_is_the_backbones(tiny_cfg):
    model = build(tiny_cfg, SIZE_DIVISIBILITY=-1)
    assert model.size_divisibility == model.backbone.size_divisibility


def test_training_losses(both_cfg, batch):
    losses = build(both_cfg)(batch)
    expected = [*NAMES, *(f"{name}_{layer}" for layer in range(4) for name in NAMES)]
    assert list(losses) == expected
    assert all(loss.dim() == 0 and torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_losses_are_weighted(both_cfg, batch):
    losses = []
    for weight in (1.0, 4.0):
        model = build(both_cfg)
        model.criterion.weight_dict = dict.fromkeys(model.criterion.weight_dict, weight)
        torch.manual_seed(1)
        losses.append(model(batch))
    for name in losses[0]:
        torch.testing.assert_close(losses[1][name], 4 * losses[0][name])


def ignore(item: dict, rows: slice, columns: slice) -> dict:
    """The input with a region without labels."""
    region = torch.zeros(item["image"].shape[1:], dtype=torch.bool)
    region[rows, columns] = True
    return item | {"ignored": region}


def test_unlabelled_pixels_are_left_out(both_cfg, batch):
    """Targets there, and in the padding of the batch, do not matter."""
    left_out = [
        ignore(batch[0], slice(16, 48), slice(0, 32)),
        ignore(batch[1], slice(0, 8), slice(0, 70)),
    ]
    model = build(both_cfg)

    def losses(inputs: list[dict]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return model(inputs)

    before, plain = losses(left_out), losses(batch)
    assert any(before[name] != plain[name] for name in before if "mask" in name)
    left_out[0]["instances"].gt_masks[:, 16:48, :32] ^= True
    left_out[1]["instances"].gt_masks[:, :8] ^= True
    after = losses(left_out)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_own_prepare_targets_with_unlabelled_pixels(both_cfg, batch):
    """Other projects make targets without calling ours."""

    class Own(MaskFormer):
        def prepare_targets(self, targets, images):
            return [{"labels": t.gt_classes, "masks": pad(t.gt_masks, images)} for t in targets]

    def pad(masks, images):
        height, width = images.tensor.shape[-2:]
        return nn.functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))

    inputs = [ignore(x, slice(0, 16), slice(0, 16)) for x in batch]
    losses = []
    for cls in (MaskFormer, Own):
        torch.manual_seed(0)
        model = cls(**MaskFormer.from_config(both_cfg))
        losses.append(model(inputs))
    assert losses[0] == losses[1]


def test_unlabelled_pixels_of_some_samples_only(both_cfg, batch):
    inputs = [batch[0], ignore(batch[1], slice(0, 8), slice(0, 8))]
    with pytest.raises(ValueError, match="1 of 2 samples have 'ignored'"):
        build(both_cfg)(inputs)


def test_training_reduces_the_loss(both_cfg, make_input):
    both_cfg.MODEL.BACKBONE.FREEZE_AT = 5  # to be quick
    model = build(both_cfg, DEC_LAYERS=2)
    batch = [make_input(32, 64, [0, 2])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]


def test_every_parameter_gets_a_gradient(both_cfg, batch):
    model = build(both_cfg)
    for name, parameter in model.named_parameters():
        # Initially these are zero, and the level embedding has no effect.
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.1)
    sum(model(batch).values()).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_no_full_masks_in_training(tiny_cfg, batch, monkeypatch):
    def fail(self):
        raise AssertionError("full-size masks of all queries were computed")

    monkeypatch.setattr(MaskFactors, "full", fail)
    sum(build(tiny_cfg)(batch).values()).backward()


def test_no_ground_truth_in_the_whole_batch(both_cfg, make_input):
    model = build(both_cfg)
    losses = model([make_input(64, 96, []), make_input(64, 64, [])])
    for name, loss in losses.items():
        assert torch.isfinite(loss)
        assert (loss > 0) == name.startswith("loss_ce")
    sum(losses.values()).backward()
    # Zeros, not None: distributed training waits for the gradient of every parameter.
    assert all(p.grad is not None for p in model.parameters())


def test_without_deep_supervision(both_cfg, batch, monkeypatch):
    """Only the last prediction is matched."""
    model = build(both_cfg, DEEP_SUPERVISION=False)
    layers, match = [], fast_criterion.match_layers

    def record(matcher, outputs, targets):
        layers.extend(outputs)
        return match(matcher, outputs, targets)

    monkeypatch.setattr(fast_criterion, "match_layers", record)
    if not both_cfg.MODEL.FAST:
        model.criterion.matcher.register_forward_hook(lambda _, args, out: layers.append(args[0]))
    assert list(model(batch)) == NAMES
    assert len(layers) == 1


def test_deep_supervision_of_masks_alone(both_cfg, batch):
    """A criterion without class loss, as in class-agnostic projects."""
    model = build(both_cfg)
    weights = {k: v for k, v in model.criterion.weight_dict.items() if "loss_ce" not in k}
    model.criterion = SetCriterion(
        3, model.criterion.matcher, weights, 0.1, ["masks"], 64, 3.0, 0.75
    )
    assert set(model(batch)) == set(weights)


def test_losses_without_a_weight_are_dropped(both_cfg, batch):
    model = build(both_cfg)
    del model.criterion.weight_dict["loss_dice_2"]
    losses = model(batch)
    assert "loss_dice_2" not in losses and "loss_mask_2" in losses


def test_training_needs_instances(both_cfg, batch):
    del batch[1]["instances"]
    with pytest.raises(ValueError, match="has no 'instances'.*DATASET_MAPPER_NAME"):
        build(both_cfg)(batch)


def test_prepare_targets_pads_below_and_right(tiny_cfg):
    model = build(tiny_cfg)
    instances = Instances((2, 3))
    instances.gt_classes = torch.tensor([2, 0])
    instances.gt_masks = torch.ones(2, 2, 3, dtype=torch.bool)
    empty = Instances((5, 4))
    empty.gt_classes = torch.empty(0, dtype=torch.int64)
    empty.gt_masks = torch.empty(0, 5, 4, dtype=torch.bool)
    targets = model.prepare_targets([instances, empty], make_images(model, (2, 3), (5, 4)))
    assert [set(t) for t in targets] == [{"labels", "masks"}] * 2
    assert targets[0]["labels"].tolist() == [2, 0]
    masks = targets[0]["masks"]
    assert masks.shape == (2, 32, 32) and masks.dtype == torch.bool
    assert masks[:, :2, :3].all() and masks.sum() == 2 * 2 * 3
    assert targets[1]["masks"].shape == (0, 32, 32)
    with pytest.raises(ValueError, match=r"masks of \(2, 3\) pixels do not fit.*\(1, 3\)"):
        small = ImageList.from_tensors([torch.zeros(3, 1, 3)], 0)
        model.prepare_targets([instances], small)


def test_overridden_prepare_targets_is_used(both_cfg, batch):
    class Subclass(MaskFormer):
        def prepare_targets(self, targets, images):
            self.seen = [len(t) for t in targets], images.tensor.shape
            return super().prepare_targets(targets, images)

    model = Subclass(both_cfg)
    model(batch)
    assert model.seen == ([3, 1], (2, 3, 64, 96))


def images_only(batch: list[dict]) -> list[dict]:
    return [{"image": x["image"]} for x in batch]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_on_a_cpu_in_inference_only(tiny_cfg, batch, norm, training):
    tiny_cfg.MODEL.RESNETS.NORM = norm
    model = build(tiny_cfg).train(training)
    seen = []
    model.backbone.register_forward_hook(lambda *args: seen.extend(args[-1].values()))
    with torch.set_grad_enabled(training):
        model(batch)
    layouts = {x.is_contiguous(memory_format=torch.channels_last) for x in seen}
    assert layouts == {not training}


def test_inference_of_different_sizes(both_cfg, batch):
    model = build(both_cfg).eval()
    inputs = images_only(batch)
    inputs[0].update(height=120, width=33)
    with torch.no_grad():
        results = model(inputs)
    assert len(results) == 2
    for result, size in zip(results, [(120, 33), (50, 70)], strict=True):
        assert set(result) == {"sem_seg", "panoptic_seg", "instances"}
        assert result["sem_seg"].shape == (3, *size)
        ids, segments = result["panoptic_seg"]
        assert ids.shape == size and ids.dtype == torch.int32
        assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
        assert result["instances"].image_size == size
        assert result["instances"].pred_masks.shape[1:] == size
        # Things only, as panoptic inference is on.
        assert set(result["instances"].pred_classes.tolist()) <= {0, 1}


def test_padding_does_not_change_a_prediction_much(both_cfg, batch):
    """Masks are cropped to the image before they are resized."""
    model = build(both_cfg).eval()
    inputs = images_only(batch)
    with torch.no_grad():
        together = model(inputs)[0]["sem_seg"]
        alone = model(inputs[:1])[0]["sem_seg"]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3))[1:])
def test_heads_on_and_off(both_cfg, batch, switches):
    semantic, panoptic, instance = switches
    test = both_cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON, test.PANOPTIC_ON, test.INSTANCE_ON = semantic, panoptic, instance
    with torch.no_grad():
        [result] = build(both_cfg).eval()(images_only(batch)[:1])
    expected = {"sem_seg": semantic, "panoptic_seg": panoptic, "instances": instance}
    assert set(result) == {name for name, on in expected.items() if on}


def test_all_classes_are_instances_without_panoptic(both_cfg, batch):
    both_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    both_cfg.TEST.DETECTIONS_PER_IMAGE = 1000
    with torch.no_grad():
        [result] = build(both_cfg).eval()(images_only(batch)[:1])
    assert len(result["instances"]) == 7 * 3
    assert set(result["instances"].pred_classes.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("before", [False, True])
def test_semantic_only(both_cfg, batch, before):
    test = both_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = False
    test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = before
    model = build(both_cfg).eval()
    assert model.sem_seg_postprocess_before_inference == before
    inputs = [{**images_only(batch)[0], "height": 100, "width": 200}]
    with torch.no_grad():
        [expected] = model(inputs)
    calls = []
    model.semantic_inference = lambda cls, masks: (
        calls.append(tuple(masks.shape)) or MaskFormer.semantic_inference(model, cls, masks)
    )
    with torch.no_grad():
        [result] = model(inputs)
    assert result["sem_seg"].shape == (3, 100, 200)
    torch.testing.assert_close(result["sem_seg"], expected["sem_seg"])
    # Masks are combined at the output size, or at the padded input size, then resized.
    assert calls == [(7, 100, 200) if before else (7, 64, 96)]


@pytest.mark.parametrize("size", [None, (30, 41), (100, 200)])
def test_scores_resized_after_inference(tiny_cfg, batch, size):
    """Of images in a padded batch; cropped only, if the output has the size of the image."""
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = False
    model = build(tiny_cfg).eval()
    inputs = images_only(batch)
    if size:
        inputs = [{**x, "height": size[0], "width": size[1]} for x in inputs]
    with torch.no_grad():
        results = model(inputs)
        # A patched method gets the padded masks; its scores are cropped and resized.
        model.semantic_inference = lambda *args: MaskFormer.semantic_inference(model, *args)
        expected = model(inputs)
    assert len({x["image"].shape for x in inputs}) > 1
    for x, result, other in zip(inputs, results, expected, strict=True):
        assert result["sem_seg"].shape[1:] == (size or x["image"].shape[1:])
        torch.testing.assert_close(result["sem_seg"], other["sem_seg"], atol=1e-5, rtol=0)


def test_inference_methods_of_a_subclass_are_called(tiny_cfg, batch):
    """With masks at output size; all results stay the same, whichever method is overridden."""
    inputs = [{**images_only(batch)[0], "height": 90, "width": 150}]
    model = build(tiny_cfg).eval()
    with torch.no_grad():
        [expected] = model(inputs)
    for names in (["panoptic"], ["semantic", "instance"], ["semantic", "panoptic", "instance"]):
        seen = []

        def overriding(name, seen=seen):
            def inference(self, mask_cls, mask_pred):
                seen.append((name, tuple(mask_pred.shape)))
                return getattr(MaskFormer, f"{name}_inference")(self, mask_cls, mask_pred)

            return inference

        methods = {f"{name}_inference": overriding(name) for name in names}
        model.__class__ = type("Sub", (MaskFormer,), methods)
        with torch.no_grad():
            [result] = model(inputs)
        assert sorted(seen) == sorted((name, (7, 90, 150)) for name in names)
        torch.testing.assert_close(result["sem_seg"], expected["sem_seg"])
        assert torch.equal(result["panoptic_seg"][0], expected["panoptic_seg"][0])
        assert result["panoptic_seg"][1] == expected["panoptic_seg"][1]
        one, other = result["instances"], expected["instances"]
        assert torch.equal(one.pred_masks, other.pred_masks)
        torch.testing.assert_close(one.scores, other.scores)


def test_last_prediction_is_the_one_used(both_cfg, batch):
    model = build(both_cfg).eval()
    with torch.no_grad():
        [result] = model(images_only(batch)[:1])
        image = (batch[0]["image"] - model.pixel_mean) / model.pixel_std
        outputs = model.sem_seg_head(model.backbone(image[None]))
    masks = nn.functional.interpolate(
        outputs["pred_masks"], (64, 96), mode="bilinear", align_corners=False
    )
    expected = model.semantic_inference(outputs["pred_logits"][0], masks[0])
    torch.testing.assert_close(result["sem_seg"], expected)


def test_panoptic_needs_thing_ids(both_cfg, batch):
    both_cfg.DATASETS.TRAIN = ("tests_tiny_without_things",)
    MetadataCatalog.get("tests_tiny_without_things")
    model = build(both_cfg).eval()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="'tests_tiny_without_things' has no thing_dataset_id"),
    ):
        model(images_only(batch))
    both_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    with torch.no_grad():
        assert len(build(both_cfg).eval()(images_only(batch))) == 2


def test_bad_configs(tiny_cfg):
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res7"
    with pytest.raises(ValueError, match="TRANSFORMER_IN_FEATURE='res7' is not one of"):
        build(tiny_cfg)
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    tiny_cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res6"]
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['res6'\]"):
        build(tiny_cfg)
    tiny_cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    tiny_cfg.MODEL.MASK_FORMER.MATCHER_NAME = "Greedy"
    with pytest.raises(ValueError, match="MATCHER_NAME is 'Greedy'.*Registered:.*HungarianMatcher"):
        build(tiny_cfg)
    tiny_cfg.MODEL.MASK_FORMER.MATCHER_NAME = "HungarianMatcher"
    tiny_cfg.MODEL.MASK_FORMER.CRITERION_NAME = "Boxes"
    with pytest.raises(ValueError, match="CRITERION_NAME is 'Boxes'.*Registered:.*SetCriterion"):
        build(tiny_cfg)
    tiny_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        build(tiny_cfg)


def test_keyword_construction(both_cfg, batch):
    """Panoptic masks that are not resized, which keywords allow and configs do not."""
    arguments = MaskFormer.from_config(both_cfg)
    assert arguments["sem_seg_postprocess_before_inference"]
    arguments["sem_seg_postprocess_before_inference"] = False
    inputs = [{**images_only(batch)[1], "height": 100, "width": 140}]
    with torch.no_grad():
        [result] = MaskFormer(**arguments).eval()(inputs)
    assert result["sem_seg"].shape == (3, 100, 140)
    assert result["panoptic_seg"][0].shape == (64, 96)  # the padded input, as in the original
    arguments["semantic_on"] = False
    with pytest.raises(ValueError, match="sem_seg_postprocess_before_inference must be True"):
        MaskFormer(**arguments)


def test_double(both_cfg, batch):
    model = build(both_cfg).eval()
    with torch.no_grad():
        expected = model(images_only(batch))
        results = model.double()(images_only(batch))
    for result, single in zip(results, expected, strict=True):
        assert result["sem_seg"].dtype == torch.float64
        torch.testing.assert_close(
            result["sem_seg"].float(), single["sem_seg"], atol=1e-3, rtol=1e-3
        )


def test_autocast_training_step(both_cfg, make_input):
    model = build(both_cfg)
    batch = [make_input(32, 64, [0, 2]), make_input(32, 32, [])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    torch.manual_seed(0)
    full = sum(build(both_cfg)(batch).values())
    assert sum(losses.values()).item() == pytest.approx(full.item(), rel=0.2)


def test_autocast_inference(both_cfg, batch):
    model = build(both_cfg).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for result in model(images_only(batch)):
            assert torch.isfinite(result["sem_seg"]).all()
            assert torch.isfinite(result["instances"].scores).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(both_cfg, batch, duplicate):
    model = build(both_cfg).eval()
    with torch.inference_mode():
        expected = model(images_only(batch))[0]["sem_seg"]
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():  # the copy shares nothing
            parameter.zero_()
        assert torch.equal(other(images_only(batch))[0]["sem_seg"], expected)
    other.train()
    sum(other(batch).values()).backward()


def test_state_dict_holds_no_caches(both_cfg, batch):
    model = build(both_cfg)
    before = list(model.state_dict())
    model(batch)
    assert list(model.state_dict()) == before
    assert not [k for k in before if "cache" in k or "pe_layer" in k or "pixel_mean" in k]
    assert "criterion.empty_weight" in before
    named = {k for k, _ in model.named_parameters()} | {k for k, _ in model.named_buffers()}
    assert set(before) == named - {"pixel_mean", "pixel_std"}


def test_head_renames_the_pixel_decoder_of_old_checkpoints(both_cfg):
    model = build(both_cfg)
    state = dict(model.state_dict())  # without a version
    old = {k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): v for k, v in state.items()}
    assert set(old) != set(state)
    other = build(both_cfg)
    nn.init.zeros_(other.sem_seg_head.pixel_decoder.mask_features.weight)
    assert other.load_state_dict(old).missing_keys == []
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    # Names of today load as well where the version is missing.
    other.load_state_dict(state)


def test_head_passes_the_configured_feature_to_the_decoder():
    class PixelDecoder(nn.Module):
        def forward_features(self, features):
            return "embedding", "encoded", ["scales"]

    class Decoder(nn.Module):
        def forward(self, x, mask_features, mask=None):
            return {"x": x, "mask_features": mask_features}

    expected = {
        "multi_scale_pixel_decoder": ["scales"],
        "transformer_encoder": "encoded",
        "pixel_embedding": "embedding",
        "res5": "five",
    }
    for name, feature in expected.items():
        head = MaskFormerHead(
            {},
            num_classes=3,
            pixel_decoder=PixelDecoder(),
            transformer_predictor=Decoder(),
            transformer_in_feature=name,
        )
        outputs = head({"res5": "five"})
        assert outputs == {"x": feature, "mask_features": "embedding"}


def test_device_follows_the_buffers(tiny_cfg):
    model = build(tiny_cfg)
    assert model.device == torch.device("cpu")
    assert isinstance(model.pixel_mean, Tensor) and model.pixel_mean.shape == (3, 1, 1)


def test_compiled_inference(both_cfg, batch):
    """One graph if fast, with the same results; copies and training are not compiled."""
    model = build(both_cfg).eval()
    with torch.no_grad():
        expected = model(images_only(batch)[:1])[0]
        model.compile_inference(backend="eager", fullgraph=both_cfg.MODEL.FAST)
        [result] = model(images_only(batch)[:1])
    torch.testing.assert_close(result["sem_seg"], expected["sem_seg"])
    assert torch.equal(result["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert copy.deepcopy(model)._compiled_network is None

    def fail(images):
        raise AssertionError("training was compiled")

    model._compiled_network = fail
    sum(model.train()(batch).values()).backward()


def outputs_of(model: MaskFormer, batch: list[dict]) -> list[dict]:
    with torch.no_grad():
        return model.eval()(images_only(batch))


def assert_same_results(results: list[dict], expected: list[dict]) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one["sem_seg"], other["sem_seg"], atol=1e-4, rtol=1e-4)
        assert torch.equal(one["panoptic_seg"][0], other["panoptic_seg"][0])
        assert one["panoptic_seg"][1] == other["panoptic_seg"][1]
        torch.testing.assert_close(one["instances"].scores, other["instances"].scores)


def test_plain_and_fast_have_the_same_results_and_state(tiny_cfg, batch):
    fast = build(tiny_cfg)
    tiny_cfg.MODEL.FAST = False
    plain = build(tiny_cfg)
    assert list(plain.state_dict()) == list(fast.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fast.state_dict()[name])
    assert_same_results(outputs_of(fast, batch), outputs_of(plain, batch))


def test_plain_model_uses_no_fast_twin(tiny_cfg, batch, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a fast twin ran")

    monkeypatch.setattr(fast_criterion, "MatchedPairs", fail)
    monkeypatch.setattr(fast_criterion, "_matching_costs", fail)
    monkeypatch.setattr(fast_postprocessing, "_axis_matrix", fail)
    monkeypatch.setattr(MaskFactors, "__init__", fail)
    with pytest.raises(AssertionError, match="a fast twin ran"):
        build(tiny_cfg)(batch)
    tiny_cfg.MODEL.FAST = False
    model = build(tiny_cfg)
    sum(model(batch).values()).backward()
    outputs_of(model, batch)


def test_losses_may_be_weighted_in_place(both_cfg, batch):
    """As the `forward` of other projects does."""

    class Subclass(MaskFormer):
        def forward(self, batched_inputs):
            images = [(x["image"] - self.pixel_mean) / self.pixel_std for x in batched_inputs]
            images = ImageList.from_tensors(images, self.size_divisibility)
            outputs = self.sem_seg_head(self.backbone(images.tensor))
            targets = self.prepare_targets([x["instances"] for x in batched_inputs], images)
            losses = self.criterion(outputs, targets)
            for k in list(losses.keys()):
                losses[k] *= self.criterion.weight_dict[k]
            return losses

    torch.manual_seed(0)
    model, reference = Subclass(both_cfg), build(both_cfg)
    torch.manual_seed(1)
    losses = model(batch)
    sum(losses.values()).backward()
    torch.manual_seed(1)
    expected = reference(batch)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "part, method",
    [
        ("sem_seg_head.predictor", "forward_prediction_heads"),
        ("criterion", "loss_masks"),
        ("criterion", "loss_labels"),
        ("criterion.matcher", "memory_efficient_forward"),
        ("criterion.matcher", "forward"),
        ("sem_seg_head", "layers"),
        ("sem_seg_head.pixel_decoder", "forward_features"),
    ],
)
@pytest.mark.parametrize("how", ["class", "instance"])
def test_patched_methods_are_called_in_training(tiny_cfg, batch, part, method, how, monkeypatch):
    model, calls = build(tiny_cfg), []
    owner = model.get_submodule(part)
    original = getattr(type(owner), method)

    def patched(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    if how == "class":
        monkeypatch.setattr(type(owner), method, patched)
    else:
        setattr(owner, method, patched.__get__(owner))
    sum(model(batch).values()).backward()
    assert calls
    calls.clear()
    results = outputs_of(model, batch)
    assert bool(calls) == (not part.startswith("criterion"))
    monkeypatch.undo()
    assert_same_results(results, outputs_of(build(tiny_cfg), batch))


@pytest.mark.parametrize("method", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("how", ["class", "instance"])
def test_patched_inference_methods_are_called(tiny_cfg, batch, method, how, monkeypatch):
    model, calls = build(tiny_cfg), []
    expected = outputs_of(model, batch)
    original = getattr(MaskFormer, f"{method}_inference")

    def patched(self, mask_cls, mask_pred):
        calls.append(tuple(mask_pred.shape))
        return original(self, mask_cls, mask_pred)

    if how == "class":
        monkeypatch.setattr(MaskFormer, f"{method}_inference", patched)
    else:
        setattr(model, f"{method}_inference", patched.__get__(model))
    assert_same_results(outputs_of(model, batch), expected)
    assert calls == [(7, 64, 96), (7, 50, 70)]


def test_hooks_see_the_outputs_of_the_head_in_training(tiny_cfg, batch):
    model, seen = build(tiny_cfg), []
    model.sem_seg_head.register_forward_hook(lambda module, args, out: seen.append(out))
    model(batch)
    [outputs] = seen
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_masks"].shape == (2, 7, 16, 24)
