"""Whole models with the same weights: contenders of `model` and `train`.

`mask2former` is ours, `upstream steps` the plain model with the steps of `upstream_steps.py`, and
`transformers` the model of that package. Results are compared with ours before anything is timed.
"""

import argparse
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checks import WrongNumbers, relative_error, require_equal
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from op_backends import BACKENDS, Case
from options import ALIASES, OURS, PEER, UPSTREAM, add_choices, list_of, positive, size
from peer import build_peer, load_weights
from report import Report
from torch import Tensor, nn
from upstream_steps import UpstreamAttention, use_upstream_steps

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.fast.setup import apply_config

CONTENDERS = (OURS, UPSTREAM, PEER)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
R50 = (
    Path(__file__).resolve().parents[2]
    / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
)
TOLERANCE = 1e-4
# In float64. The peer keeps some constants in fp32.
EXACT = 1e-5
_CONFIDENT = 20

Batch = list[dict[str, Any]]


def add_model_options(
    parser: argparse.ArgumentParser,
    contenders: tuple[str, ...],
    choices: tuple[str, ...] = CONTENDERS,
) -> None:
    parser.add_argument("--config", default=str(R50), metavar="FILE", help="model [R50, COCO]")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint [random weights]")
    parser.add_argument("--sizes", type=list_of(size, "size"), help="image sizes HxW")
    parser.add_argument("--batches", type=list_of(positive, "batch size"), help="batch sizes")
    text = f"who takes turns, {OURS} always [{','.join(contenders)}]"
    add_choices(parser, "contenders", "contender", choices, contenders, text, ALIASES)
    text = "bf16 and fp16 are autocast [fp32]"
    add_choices(parser, "precisions", "precision", list(PRECISIONS), ["fp32"], text)
    parser.add_argument(
        "--upstream-op",
        "--published-op",
        choices=list(BACKENDS),
        metavar="BACKEND",
        help="deformable attention of the upstream steps, a backend of `op` [original if "
        "installed, otherwise pytorch-stacked]",
    )


def upstream_op(options: argparse.Namespace, device: str) -> str:
    """The deformable attention backend of the upstream steps on a device.

    Raises:
        ValueError: the requested one is not available.
    """
    case = Case("locations", device, "fp32", 32, 32, 1)
    if options.upstream_op is None:
        return "pytorch-stacked" if BACKENDS["original"].why_not(case) else "original"
    if reason := BACKENDS[options.upstream_op].why_not(case):
        raise ValueError(f"--upstream-op {options.upstream_op}: {reason}")
    return options.upstream_op


def note_upstream_op(report: Report, options: argparse.Namespace) -> None:
    """Note that backend in a report."""
    if UPSTREAM in options.contenders:
        for device in options.devices:
            name = upstream_op(options, device)
            report.note(f"Deformable attention of {UPSTREAM} on {device}: {name}")


def check_model_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if OURS not in options.contenders:
        parser.error(f"--contenders must include {OURS}, which the others are compared with")
    for path in (options.config, options.weights):
        if path is not None and not Path(path).is_file():
            parser.error(f"{path} is not a file")
    if UPSTREAM in options.contenders:
        for device in options.devices:
            try:
                upstream_op(options, device)
            except ValueError as error:
                parser.error(str(error))


def build(options: argparse.Namespace, *overrides: Any) -> tuple[CfgNode, nn.Module]:
    """The config with overrides (key, value, ...), and its model on the CPU."""
    cfg = load_config(options.config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    torch.manual_seed(0)
    model = build_model(cfg)
    if options.weights:
        Mask2FormerCheckpointer(model).load(options.weights)
    return cfg, model


def place(cfg: CfgNode, model: nn.Module, device: str) -> nn.Module:
    """Move our model of a config to a device, as if it had been built there."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    apply_config(cfg, model)
    return model.to(device)


def random_images(size: tuple[int, int], batch: int, device: str) -> Batch:
    """Smooth noise, the same for the same size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch, 3, size[0] // 16, size[1] // 16, generator=generator) * 255
    pixels = nn.functional.interpolate(noise, size, mode="bilinear", align_corners=False)
    return [{"image": x.to(device, torch.uint8)} for x in pixels]


def precision(name: str, device: str) -> contextlib.AbstractContextManager:
    if name == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, PRECISIONS[name])


def plain_model(cfg: CfgNode, ours: nn.Module) -> nn.Module:
    """The plain model of a config, with our weights and without activation checkpointing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FAST, cfg.MODEL.CHECKPOINTING = False, "none"
    model = build_model(cfg)
    model.load_state_dict(ours.state_dict())
    return model.train(ours.training)


def upstream_model(cfg: CfgNode, ours: nn.Module, op: str = UpstreamAttention.op) -> nn.Module:
    """The model of a config with the original's steps and our weights.

    Args:
        cfg: the config.
        ours: our model of that config.
        op: the backend of deformable attention, one of `op_backends.BACKENDS`.
    """
    return use_upstream_steps(plain_model(cfg, ours), op)


def make_models(
    options: argparse.Namespace, cfg: CfgNode, ours: nn.Module, device: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The contenders on a device, and {name: reason} of those that are not available."""
    models, absent = {}, {}
    for name in options.contenders:
        if name == OURS:
            models[name] = place(cfg, copy.deepcopy(ours), device)
        elif name == UPSTREAM:
            models[name] = upstream_model(cfg, ours, upstream_op(options, device))
        else:
            try:
                models[name] = build_peer(cfg)
            except (ImportError, ValueError) as error:
                absent[name] = str(error)
                continue
            load_weights(models[name], ours)
        models[name].eval().to(device)
    return models, absent


# ---- running them ----


class _Constant(nn.Module):
    """Replaces a part by its precomputed result."""

    def __init__(self, result: Any):
        super().__init__()
        self._result = result

    def forward(self, *_) -> Any:
        return self._result


def with_outputs(model: nn.Module, outputs: dict[str, Tensor]) -> nn.Module:
    """The model without its network: `outputs` stand in for those of the head."""
    stub = copy.copy(model)
    stub._modules = dict(model._modules)
    stub.backbone, stub.sem_seg_head = _Constant({}), _Constant(outputs)
    return stub


class Forward(nn.Module):
    """Normalised images (B, 3, H, W) → class logits and full-size mask logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.forward_network(pixels)
        return outputs["pred_logits"], outputs["pred_masks"]


class PeerForward(Forward):
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=pixels)
        return outputs.class_queries_logits, outputs.masks_queries_logits


def forward_of(name: str, model: nn.Module) -> nn.Module:
    return PeerForward(model) if name == PEER else Forward(model)


def normalized(model: nn.Module, images: Batch) -> Tensor:
    pixels = torch.stack([x["image"] for x in images])
    return (pixels - model.pixel_mean) / model.pixel_std


# ---- same results ----


def sharpen(model: nn.Module, images: Batch) -> None:
    """Scale the class weights of a randomly initialised model until some queries are confident.

    Their masks overlap: build the model with OVERLAP_THRESHOLD 0 to get panoptic segments.
    """
    logits = model.sem_seg_head(model.backbone(normalized(model, images[:1])))["pred_logits"][0]
    layer, mean = model.sem_seg_head.predictor.class_embed, logits.mean(0)
    scale = 1.0
    for _ in range(60):
        scores, labels = (scale * (logits - mean)).softmax(-1).max(-1)
        confident = (scores > model.object_mask_threshold) & (labels < logits.shape[-1] - 1)
        if confident.sum() >= _CONFIDENT:
            break
        scale *= 1.2
    with torch.no_grad():
        layer.weight *= scale
        layer.bias.sub_(mean).mul_(scale)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def result_errors(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative errors between two predictions for an image."""
    errors = {}
    if "sem_seg" in expected:
        errors["sem_seg"] = relative_error(actual["sem_seg"], expected["sem_seg"])
    if "instances" in expected:
        scores = [x["instances"].scores.sort().values for x in (actual, expected)]
        same = len(scores[0]) == len(scores[1])
        errors["scores"] = relative_error(*scores) if same else float("inf")
    return errors


def different_pixels(actual: dict[str, Any], expected: dict[str, Any]) -> int:
    """Number of pixels where two panoptic maps differ; all pixels if the segments differ."""
    (ids, segments), (other_ids, other_segments) = actual["panoptic_seg"], expected["panoptic_seg"]
    if segments != other_segments:
        return ids.numel()
    return int((ids != other_ids).sum())


class Match(NamedTuple):
    """How the results of a contender match ours.

    Attributes:
        panoptic_pixels: number of pixels that differ; None without panoptic results to compare.
        rounding: the fp32 error that made a comparison in float64 necessary; empty if none did.
    """

    panoptic_pixels: int | None
    rounding: str


def check_results(name: str, models: dict[str, nn.Module], images: Batch) -> Match:
    """Compare the results of a contender with ours.

    If a mask logit is 0 within rounding, the order of additions decides its bit of the next
    attention mask, and a single bit moves predictions by more than the tolerance. So results that
    differ in fp32 are compared again in float64.

    Raises:
        WrongNumbers: logits or predictions differ, in float64 too.
    """
    with torch.no_grad(), _full_precision():
        try:
            return Match(_compare(name, models, images, TOLERANCE), "")
        except WrongNumbers as error:
            exact = {key: copy.deepcopy(models[key]).double() for key in (OURS, name)}
            return Match(_compare(name, exact, images, EXACT), str(error))


def _compare(
    name: str, models: dict[str, nn.Module], images: Batch, tolerance: float
) -> int | None:
    """Number of panoptic pixels that differ, see `Match`; WrongNumbers if anything else does."""
    pixels = normalized(models[OURS], images)
    actual = forward_of(name, models[name])(pixels)
    expected = forward_of(OURS, models[OURS])(pixels)
    errors = {
        key: relative_error(x, y)
        for key, x, y in zip(("class logits", "mask logits"), actual, expected, strict=True)
    }
    require_equal(errors, tolerance, OURS)
    del actual, expected
    if name == PEER:
        return None
    pairs = list(zip(models[name](images), models[OURS](images), strict=True))
    for pair in pairs:
        require_equal(result_errors(*pair), tolerance, OURS)
    if any("panoptic_seg" not in expected for _, expected in pairs):
        return None
    return sum(different_pixels(*pair) for pair in pairs)
