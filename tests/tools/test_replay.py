"""tools/replay.py: a failure built into a small training is narrowed to image, layer and tensor."""

import json
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from load_script import load_script
from small_resnet import SMALL_RESNET
from torch import nn

from mask2former.capture import read_capture
from mask2former.data.loader import build_train_loader
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.criterion import LOSS_REGISTRY
from mask2former.replay import Trace, find_gradients, suspicious_inputs
from mask2former.replay_report import prediction_layer
from mask2former.trainer import Trainer

tool = load_script("tools/replay.py")
DATASET = "replay_train"
# With SEED 3 in the second iteration.
BAD_IMAGE = 1
# Pixels of a mask of it.
SMALL_AREA = 7


def load_dataset() -> list[dict[str, Any]]:
    names = [f"images/{i}.png" for i in range(5)]
    return [{"image_id": i, "file_name": names[i], "width": 64, "height": 64} for i in range(5)]


def make_sample(record: dict[str, Any]) -> dict[str, Any]:
    """The mapper: a random image with two masks; the bad image is grey, with a small mask."""
    size = (record["height"], record["width"])
    instances = Instances(size)
    instances.gt_classes = torch.tensor([0, 2])
    instances.gt_masks = torch.rand(2, *size) > 0.5
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    if record["image_id"] == BAD_IMAGE:
        image[:] = 128
        instances.gt_masks[1] = False
        instances.gt_masks[1, 5, :SMALL_AREA] = True
    return {**record, "image": image, "instances": instances}


DatasetCatalog.register(DATASET, load_dataset)


class ToyTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, make_sample)


class Contrast(nn.Module):
    """Stretches the contrast of each image, without care for a constant one."""

    def forward(self, images):
        spread = images.amax((2, 3), True) - images.amin((2, 3), True)
        return images / spread


@META_ARCH_REGISTRY.register()
class ContrastMaskFormer(MaskFormer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.contrast = Contrast()

    def forward_network(self, images):
        return super().forward_network(self.contrast(images))


@pytest.fixture
def cfg(tiny_cfg, tmp_path) -> CfgNode:
    tiny_cfg.merge_from_list([part for pair in SMALL_RESNET.items() for part in pair])
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (DATASET,), ()
    tiny_cfg.DATALOADER.NUM_WORKERS = 0
    tiny_cfg.SEED = 3
    tiny_cfg.SOLVER.IMS_PER_BATCH = 2
    tiny_cfg.SOLVER.MAX_ITER = 6
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    tiny_cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    tiny_cfg.OUTPUT_DIR = str(tmp_path)
    return tiny_cfg


def fail(cfg, *hooks: HookBase, delay: bool = False):
    """Train until it fails. Returns the path of the capture."""
    torch.manual_seed(0)
    trainer = ToyTrainer(cfg, delay_metrics=delay)
    trainer.register_hooks(list(hooks))
    with pytest.raises((FloatingPointError, ValueError)) as error:
        trainer.train()
    (path,) = error.value.args[0].partition("replay.py ")[2].splitlines()[0:1]
    return path


def replay(path, *arguments: str, status: int = 0) -> dict[str, Any]:
    assert tool.main([str(path), *arguments]) == status
    stem = str(path).removesuffix(".pth")
    report = json.loads(open(f"{stem}_replay.json").read())
    page = open(f"{stem}_replay.md").read()
    assert all(finding in page for finding in report["findings"])
    return report


def finding(report: dict[str, Any], start: str) -> str:
    (text,) = [text for text in report["findings"] if text.startswith(start)]
    return text


@pytest.mark.parametrize(("delay", "num_parts"), [(False, 1), (True, 1), (False, 2)])
def test_a_loss_that_is_nan_for_one_mask(cfg, delay, num_parts, monkeypatch, capsys):
    """A loss of one's own: narrowed to the criterion, the loss and the image."""

    def spread(matched):
        area = matched.target_masks.flatten(1).sum(1)
        # Zero over zero for the small mask.
        ratio = (area - SMALL_AREA) / (area - SMALL_AREA)
        return ratio * matched.point_logits.mean(1).square()

    monkeypatch.setitem(LOSS_REGISTRY._obj_map, "spread", spread)
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["spread", 1.0]]
    cfg.SOLVER.NUM_ACCUMULATION_STEPS = num_parts
    path = fail(cfg, delay=delay)
    capture = read_capture(path)
    assert capture.iteration > 0
    report = replay(path)
    assert report["reproduced"] and report["layer"]["module"] == "criterion"
    # As it was, to the bit.
    assert report["as_trained"]["losses"] == {
        name: str(value) if value != value else value for name, value in capture.losses.items()
    }
    assert report["as_trained"]["not_finite"] == ["loss_spread", "loss_spread_0", "loss_spread_1"]
    text = finding(report, "Losses that are not finite")
    assert "loss_spread, the last prediction; loss_spread_0, the first prediction" in text
    assert [image["name"] for image in report["images"] if not image["finite"]] == [
        f"images/{BAD_IMAGE}.png"
    ]
    assert f"images/{BAD_IMAGE}.png" in finding(report, "Image:")
    assert "all pixels are 128" in finding(report, "Unusual inputs")
    assert report["weights"] == {"parameters": [], "buffers": []}
    out = capsys.readouterr().out
    assert "Not finite again." in out and f"images/{BAD_IMAGE}.png" in out


def test_a_module_that_divides_by_zero(cfg):
    """Matching fails first; the module before it is named."""
    cfg.MODEL.META_ARCHITECTURE = "ContrastMaskFormer"
    path = fail(cfg)
    report = replay(path)
    assert report["captured"]["losses"] == {}
    assert "costs" in report["as_written"]["error"]
    assert (report["layer"]["module"], report["layer"]["type"]) == ("contrast", "Contrast")
    assert report["layer"]["inputs"][0]["num_bad"] == 0
    assert finding(report, "Layer: contrast (Contrast)")
    assert f"images/{BAD_IMAGE}.png" in finding(report, "Image:")


def test_bad_costs_can_be_skipped(cfg):
    """Matching goes on, so that the forward pass ends; the update is left out."""
    cfg.MODEL.META_ARCHITECTURE = "ContrastMaskFormer"
    cfg.SOLVER.NON_FINITE.MAX_SKIPPED = 6
    torch.manual_seed(0)
    trainer = ToyTrainer(cfg)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    history = trainer.storage.histories()["num_skipped"].values()
    assert history[-1][0] == sum(BAD_IMAGE in batch for batch in first_batches(cfg, 6)) > 0
    name = "sem_seg_head.predictor.class_embed.weight"
    after = dict(trainer.model.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(after[name], before[name])


def first_batches(cfg, number: int) -> list[list[int]]:
    """Image ids of the first batches of a training."""
    loader = iter(ToyTrainer.build_train_loader(cfg))
    return [[sample["image_id"] for sample in next(loader)] for _ in range(number)]


class SetWeight(HookBase):
    """Makes an element of a weight NaN before an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                self.trainer.model.sem_seg_head.predictor.class_embed.weight[1, 2] = torch.nan


def test_a_weight_that_is_nan(cfg):
    path = fail(cfg, SetWeight(2))
    assert path.endswith("non_finite_2_rank0.pth")
    report = replay(path)
    name = "sem_seg_head.predictor.class_embed"
    assert report["weights"]["parameters"] == [f"{name}.weight"]
    assert report["layer"]["module"] == name
    assert "Its own weight is not finite" in finding(report, "Layer:")
    assert "every image alone fails" in finding(report, "Images:")
    assert [x["num_bad"] for x in report["layer"]["parameters"] if x["name"] == "weight"] == [1]


def test_a_loss_that_is_finite_here(cfg, monkeypatch, capsys):
    """With reasons; an override of the config counts."""
    monkeypatch.setitem(
        LOSS_REGISTRY._obj_map, "broken", lambda matched: matched.labels * torch.inf
    )
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["broken", 1.0]]
    path = fail(cfg)
    options = "--dtype", "float32", "MODEL.MASK_FORMER.EXTRA_LOSSES", "[]"
    report = replay(path, *options, status=tool.FINITE_HERE)
    assert not report["reproduced"] and report["images"] == []
    assert "finite here" in finding(report, "The losses are finite here")
    assert "Finite here." in capsys.readouterr().out


def test_files_and_configs_that_do_not_fit(cfg, tmp_path, monkeypatch, capsys):
    assert tool.main([str(tmp_path / "none.pth")]) == 2
    assert "error: " in capsys.readouterr().err
    monkeypatch.setitem(LOSS_REGISTRY._obj_map, "broken", lambda matched: matched.labels / 0)
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["broken", 1.0]]
    path = fail(cfg)
    for options, problem in (
        (["MODEL.MASK_FORMER.HIDDEN_DIM", "32"], "weights do not fit"),
        (["MODEL.NO_SUCH_KEY", "1"], "override"),
        (["MODEL.META_ARCHITECTURE", "Nobody"], "--import"),
        (["--import", "no_such_module"], "no_such_module"),
    ):
        assert tool.main([path, *options]) == 2
        assert problem in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([path, "MODEL.DEVICE", "cuda"]) == 2
    assert "MODEL.DEVICE cpu" in capsys.readouterr().err


# ---- parts ----


class Root(nn.Module):
    """The gradient of the root of 0 is infinite, and times 0 it is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, batch):
        x = self.before(batch[0]["image"])
        bad = self.after((x * 0).sqrt()).sum()
        return {"loss_good": x.square().sum(), "loss_bad_0": bad}


class Iteration:
    seed, iteration, rank = 0, 1, 0


def test_a_gradient_that_is_not_finite():
    model = Root()
    batch = [{"image": torch.ones(1, 2)}]
    found = find_gradients(model, Iteration(), batch, "float32", 1.0)
    assert not found.is_finite and "MulBackward0" in found.function
    assert found.losses == ("loss_bad_0",)
    assert set(found.parameters) == {"before.weight", "before.bias"}
    assert found.first.name == "before" and found.last_finite.name == "after"


def test_finite_gradients():
    model = Root()
    model.forward = lambda batch: {"loss": model.before(batch[0]["image"]).sum()}
    found = find_gradients(model, Iteration(), [{"image": torch.ones(1, 2)}], "float32", 1.0)
    assert found.is_finite and found.losses == () and found.function == ""


def test_the_module_that_raises_is_named():
    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Raises()))
    with Trace(model) as trace, pytest.raises(ValueError, match="broken"):
        model(torch.ones(1, 2))
    assert trace.culprit().name == "1.0" and trace.culprit().outputs is None
    assert not model[0]._forward_hooks


def test_changes_in_place_do_not_hide_the_input():
    class Breaks(nn.Module):
        def forward(self, x):
            return x.div_(0)

    model = nn.Sequential(nn.Identity(), Breaks(), nn.Identity())
    with Trace(model) as trace:
        model(torch.ones(1, 2))
    call = trace.culprit()
    assert call.name == "1" and call.inputs[0].num_bad == 0
    assert call.outputs[0].num_bad == 2 and call.outputs[0].first_bad == (0, 0)


def test_activations_beyond_float16():
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[1].weight, 1e6)
    with Trace(model) as trace:
        model(torch.ones(1, 1))
    assert [name for name, _, _ in trace.largest()] == ["1", ""]
    assert trace.culprit() is None


def test_unusual_inputs():
    def sample(image, classes=(), masks=None):
        instances = Instances(tuple(image.shape[-2:]))
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        instances.gt_masks = (
            torch.zeros(len(classes), *image.shape[-2:]) if masks is None else masks
        )
        return {"image": image, "instances": instances}

    usual = torch.rand(3, 40, 40)
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 0, 0] = True
    assert suspicious_inputs([sample(usual, [1], masks[:1]), "not a dict"], 3) == []
    cases = [
        (sample(usual), "no targets"),
        (sample(usual, [0, 1], masks), "masks [1] of 2 are empty"),
        (sample(usual, [0], ~masks[1:]), "masks [0] of 1 cover the whole image"),
        (sample(usual, [3], masks[:1]), "classes [3], but the model has 3"),
        (sample(usual.new_full((3, 40, 40), 7), [1], masks[:1]), "all pixels are 7"),
        (sample(usual * 1e9, [1], masks[:1]), "pixel values from"),
        (sample(usual[:, :1, :1], [1], masks[:1, :1, :1]), "only 1 x 1 pixels"),
        (sample(usual.log().log(), [1], masks[:1]), "pixel values are NaN or infinite"),
        ({"image": usual}, "no instances"),
    ]
    for inputs, problem in cases:
        assert any(problem in note for note in suspicious_inputs([inputs], 3)), problem


def test_prediction_layers():
    masked = "MultiScaleMaskedTransformerDecoder"
    assert prediction_layer("loss_ce", masked) == "the last prediction"
    assert prediction_layer("loss_ce_0", masked).startswith("the first prediction")
    assert prediction_layer("loss_ce_3", masked) == (
        "the prediction after decoder layer 3 (layers.2)"
    )
    assert prediction_layer("loss_ce_3", "StandardTransformerDecoder").startswith("auxiliary")
