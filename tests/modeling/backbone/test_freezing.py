"""MODEL.BACKBONE.FREEZE_AT: frozen parts, by backbone and by where the key is set."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from mask2former.config import load_config, without_added_defaults
from mask2former.modeling.backbone.freezing import freeze_at_of
from mask2former.modeling.backbone.swin import SwinTransformer
from mask2former.optimizer import build_optimizer

SWIN = Path(__file__).parents[3] / (
    "configs/ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k.yaml"
)
KEY = "MODEL.BACKBONE.FREEZE_AT"


def small_swin(**arguments) -> SwinTransformer:
    shape = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (3, 6, 12, 24)}
    return SwinTransformer(**shape, **arguments)


def trainable(module: nn.Module) -> set[str]:
    """The first parts of the names of the trainable parameters."""
    names = (name for name, p in module.named_parameters() if p.requires_grad)
    return {".".join(name.split(".")[: 2 if name.startswith("layers") else 1]) for name in names}


STAGES = ["layers.0", "layers.1", "layers.2", "layers.3"]
NORMS = ["norm0", "norm1", "norm2", "norm3"]


@pytest.mark.parametrize("freeze_at", range(6))
def test_stem_and_stages_of_swin(freeze_at):
    swin = small_swin(ape=True, drop_rate=0.1, drop_path_rate=0.5)
    assert swin.freeze(freeze_at).train() is swin
    stem = [] if freeze_at else ["patch_embed", "absolute_pos_embed"]
    num = max(freeze_at - 1, 0)
    assert trainable(swin) == {*stem, *STAGES[num:], *NORMS[num:]}
    frozen = [*([swin.patch_embed, swin.pos_drop] if freeze_at else []), *swin.layers[:num]]
    assert not any(part.training for module in frozen for part in module.modules())
    assert all(layer.training for layer in swin.layers[num:])


def test_frozen_stages_compute_the_same_in_training():
    """Neither dropout nor stochastic depth, and no graph."""
    swin = small_swin(drop_rate=0.3, drop_path_rate=0.5).freeze(5)
    image = torch.randn(1, 3, 32, 32)
    expected = swin.eval()(image)
    for name, map_ in swin.train()(image).items():
        assert torch.equal(map_, expected[name]) and not map_.requires_grad


def test_more_stages_than_there_are():
    with pytest.raises(ValueError, match=r"FREEZE_AT is 6; allowed: 0 to 5, .* 4 stages"):
        small_swin().freeze(6)


@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "D2SwinTransformer"])
@pytest.mark.parametrize("policy", ["selective", "blocks"])
def test_training_with_a_frozen_backbone(tiny_cfg, make_input, tmp_path, backbone, policy):
    """DDP finds no unused parameter, and the optimiser has none of the backbone."""
    tiny_cfg.MODEL.BACKBONE.NAME, tiny_cfg.MODEL.BACKBONE.FREEZE_AT = backbone, 5
    tiny_cfg.MODEL.RESNETS.NORM, tiny_cfg.MODEL.CHECKPOINTING = "BN", policy
    swin = tiny_cfg.MODEL.SWIN
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS = 16, [1] * 4, [1, 2, 4, 8]
    model = build_model(tiny_cfg).train()
    before = {name: x.clone() for name, x in model.backbone.state_dict().items()}
    optimizer = build_optimizer(tiny_cfg, model)
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in in_optimizer for p in model.backbone.parameters())
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            optimizer.zero_grad()
            sum(parallel([make_input(64, 64, [0, 2])]).values()).backward()
            optimizer.step()
    finally:
        destroy_process_group()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.sem_seg_head.parameters())
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_where_the_default_counts(tmp_path, caplog):
    """Detectron2's default is 2, which the original release does not read for Swin."""
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {SWIN}\nMODEL:\n  BACKBONE:\n    FREEZE_AT: 2\n")
    other = tmp_path / "other.yaml"
    other.write_text("_BASE_: own.yaml\n")
    # As the original release writes it.
    complete = tmp_path / "complete.yaml"
    original = without_added_defaults(load_config(str(SWIN)))
    original.MODEL.BACKBONE.FREEZE_AT = 2
    complete.write_text(original.dump())
    caplog.set_level("INFO")
    assert freeze_at_of(load_config(str(SWIN))) == 0
    assert freeze_at_of(load_config(str(SWIN), [KEY, "2"])) == 2
    assert freeze_at_of(load_config(str(SWIN), [KEY, "3"]).clone()) == 3
    assert freeze_at_of(load_config(str(SWIN), [KEY, "-1"])) == 0
    assert freeze_at_of(load_config(str(own))) == 2
    assert "nothing of D2SwinTransformer is frozen" not in caplog.text
    assert freeze_at_of(load_config(str(other))) == 0
    assert "nothing of D2SwinTransformer is frozen" in caplog.text
    assert freeze_at_of(load_config(str(complete))) == 0
    assert freeze_at_of(load_config(str(complete), [KEY, "2"])) == 2


@pytest.mark.parametrize("dump", [without_added_defaults, CfgNode.clone])
@pytest.mark.parametrize("backbone", ["D2SwinTransformer", "TimmBackbone", "TimmViTBackbone"])
def test_a_written_config_freezes_the_same(tmp_path, caplog, backbone, dump):
    """Whether 2 was chosen, in the file or by an override, or came from a base."""
    base = tmp_path / "base.yaml"
    base.write_text(
        f"_BASE_: {SWIN}\nMODEL:\n  BACKBONE:\n    NAME: {backbone}\n    FREEZE_AT: 2\n"
        "  TIMM:\n    NAME: test_convnext\n  VIT:\n    NAME: test_vit\n"
    )
    from_base = tmp_path / "from_base.yaml"
    from_base.write_text("_BASE_: base.yaml\n")
    written = tmp_path / "config.yaml"
    for path, options in ((base, []), (from_base, []), (from_base, [KEY, "2"])):
        cfg = load_config(str(path), options)
        expected = 0 if (path, options) == (from_base, []) else 2
        assert freeze_at_of(cfg) == expected
        written.write_text(dump(cfg).dump())
        caplog.clear()
        again = load_config(str(written))
        assert freeze_at_of(again) == expected
        assert all(again.MODEL[x] == cfg.MODEL[x] for x in ("BACKBONE", "SWIN", "TIMM", "VIT"))
        # All keys are set in the file, but by nobody.
        assert "Set but not read" not in caplog.text


def test_swin_reads_it_from_the_config(tiny_cfg):
    cfg = tiny_cfg
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    cfg.MODEL.SWIN.DEPTHS = [1, 1, 1, 1]
    cfg.MODEL.BACKBONE.FREEZE_AT = 2  # nobody's choice
    assert len(trainable(build_backbone(cfg))) == 9
    cfg.MODEL.BACKBONE.FREEZE_AT = 4
    assert trainable(build_backbone(cfg)) == {"layers.3", "norm3"}
    # Other architectures may read it in their own way.
    cfg.MODEL.META_ARCHITECTURE = "Another"
    assert len(trainable(build_backbone(cfg))) == 9
