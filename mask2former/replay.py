"""Run a captured iteration again and find where it stops being finite.

    capture → model as trained: not finite again?
            → model as written (MODEL.FAST False), with hooks → first module → tensors, parameters
            → each image alone → image
            → backward pass, if the losses are finite → first gradient

Weights, batch and random numbers are those of the run; the device may be another one.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Instances
from torch import Tensor, nn

from .capture import Capture
from .checkpoint_weights import non_finite
from .config import add_maskformer2_config
from .fast.setup import apply_config
from .modeling.matcher import NonFiniteCosts, images_from
from .utils.seeding import MODEL, seed_all

# The largest finite number of float16.
HALF_MAX = 65504.0


class Outcome(NamedTuple):
    """One forward pass.

    Attributes:
        losses: weighted, by name.
        error: why the pass ended without losses.
        tensors: the losses, for a backward pass.
    """

    losses: dict[str, float]
    error: str | None
    tensors: dict[str, Tensor]

    @property
    def is_finite(self) -> bool:
        return self.error is None and math.isfinite(sum(self.losses.values()))

    def bad_losses(self) -> list[str]:
        return [name for name, value in self.losses.items() if not math.isfinite(value)]


def replayed_config(capture: Capture, opts: list[str]) -> CfgNode:
    """The run's config with overrides; its data sets need not be registered.

    Args:
        capture: the iteration.
        opts: `KEY VALUE ...`, such as `MODEL.DEVICE cpu`.

    Raises:
        ValueError: the config cannot be read, or an override does not fit.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    # Keys of other projects.
    cfg.set_new_allowed(True)
    try:
        cfg.merge_from_other_cfg(CfgNode.load_cfg(capture.config))
        cfg.set_new_allowed(False)
        cfg.merge_from_list(opts)
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError) as error:
        raise ValueError(f"the config of the capture, or an override: {error}") from error
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"the run was on {cfg.MODEL.DEVICE!r}, and this machine has no usable CUDA GPU; add "
            "`MODEL.DEVICE cpu` to replay it on the CPU."
        )
    return cfg


def restored_model(capture: Capture, cfg: CfgNode, *, plain: bool) -> nn.Module:
    """The model with the captured weights, in training mode.

    Args:
        capture: the iteration.
        cfg: of `replayed_config`.
        plain: run every part as written and without activation checkpointing, so that hooks see all
            modules.

    Raises:
        ValueError: the weights do not fit the model that the config describes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    if plain:
        cfg.MODEL.FAST, cfg.MODEL.CHECKPOINTING = False, "none"
    if cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        for name, value in capture.metadata.items():
            if metadata.get(name) is None:
                metadata.set(**{name: value})
    try:
        model = build_model(cfg)
    except KeyError as error:
        raise ValueError(
            f"{error} If it is a part of your own project, name its module with --import."
        ) from error
    apply_config(cfg, model)
    try:
        model.load_state_dict(capture.weights)
    except RuntimeError as error:
        raise ValueError(f"the captured weights do not fit the model: {error}") from error
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        _replace_sync_norms(model)
    return model.train()


def _replace_sync_norms(model: nn.Module) -> None:
    """SyncBatchNorm runs on GPUs only; in one process it is BatchNorm."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                norm = nn.BatchNorm2d(
                    child.num_features,
                    child.eps,
                    child.momentum,
                    child.affine,
                    child.track_running_stats,
                )
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)


def run_forward(
    model: nn.Module, capture: Capture, batch: list[Any], dtype: str, num_parts: int = 1
) -> Outcome:
    """Forward pass with the random numbers of the iteration.

    Args:
        model: of `restored_model`.
        capture: gives the seed.
        batch: the samples, all or some.
        dtype: of autocast; "float32": none.
        num_parts: micro-batches of the batch, as in SOLVER.NUM_ACCUMULATION_STEPS.
    """
    seed_all(capture.seed, MODEL, capture.iteration, capture.rank)
    device = next(model.parameters()).device.type
    half = dtype != "float32"
    try:
        with torch.autocast(device, dtype=getattr(torch, dtype)) if half else nullcontext():
            losses = model(batch) if num_parts == 1 else _accumulated(model, batch, num_parts)
    except NonFiniteCosts as error:
        return Outcome({}, str(error), {})
    except ValueError as error:
        # What scipy says in matchers of other projects.
        if "invalid numeric entries" not in str(error):
            raise
        return Outcome({}, f"matching costs are not finite: {error}", {})
    losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
    numbers = {name: loss.detach().item() for name, loss in losses.items()}
    return Outcome(numbers, None, losses)


def _accumulated(model: Any, batch: list[Any], num_parts: int) -> dict[str, Tensor]:
    """Losses of a batch, summed over its micro-batches."""
    size = len(batch) // num_parts
    totals: dict[str, Tensor] = {}
    with model.accumulating(batch):
        for first in range(0, len(batch), size):
            with images_from(first):
                losses = model(batch[first : first + size])
            for name, loss in losses.items():
                totals[name] = totals[name] + loss if name in totals else loss
    return totals


class TensorStats(NamedTuple):
    """Range of a floating-point tensor.

    Attributes:
        name: its place in the arguments or results.
        low, high: of the finite elements; NaN if there is none.
        num_bad: elements that are NaN or infinite.
        first_bad: index of the first one, in order of memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    num_bad: int
    first_bad: tuple[int, ...] | None


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        name: dotted; empty: the model itself.
        inputs, outputs: tensors among arguments and results; outputs are None if it did not return.
        parameters: its own, not those of its children.
    """

    name: str
    kind: str
    inputs: list[TensorStats]
    outputs: list[TensorStats] | None
    parameters: list[TensorStats]

    def has_finite_inputs(self) -> bool:
        return not any(stats.num_bad for stats in self.inputs)

    def bad_outputs(self) -> list[TensorStats]:
        return [stats for stats in self.outputs or [] if stats.num_bad]


def stats_of(name: str, tensor: Tensor) -> TensorStats:
    tensor = tensor.detach()
    finite = tensor.isfinite()
    num_bad = tensor.numel() - int(finite.sum())
    low = high = math.nan
    if num_bad < tensor.numel():
        values = tensor[finite] if num_bad else tensor
        low, high = (float(x) for x in values.float().aminmax())
    first = None
    if num_bad:
        first = tuple(int(i) for i in (~finite).nonzero()[0])
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorStats(name, tuple(tensor.shape), dtype, low, high, num_bad, first)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested containers, instances and boxes, with their places."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
    elif isinstance(value, Instances):
        yield from _tensors(value.get_fields(), name)
    elif isinstance(getattr(value, "tensor", None), Tensor):  # boxes, padded images
        yield from _tensors(value.tensor, name)


class Trace:
    """Records the calls of all modules of a model, in the order in which they return.

    Attributes:
        calls: the calls that have returned.
        gradients: gradients of module outputs, in the order of the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[ModuleCall] = []
        self.gradients: list[TensorStats] = []
        self._entered: list[tuple[str, nn.Module, list[TensorStats]]] = []
        self._handles = []
        for name, module in model.named_modules():
            enter, leave = self._hooks(name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Before the call, which may change them in place.
            inputs = [stats_of(*pair) for pair in _tensors([*args, *kwargs.values()])]
            self._entered.append((name, module, inputs))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, _, inputs = self._entered.pop()
            outputs = []
            for place, tensor in _tensors(output):
                outputs.append(stats_of(place, tensor))
                if tensor.requires_grad:
                    self._watch(f"{name} {place}".strip(), tensor)
            self.calls.append(_call(name, module, inputs, outputs))

        return enter, leave

    def _watch(self, name: str, tensor: Tensor) -> None:
        tensor.register_hook(lambda grad: self.gradients.append(stats_of(name, grad)))

    def culprit(self) -> ModuleCall | None:
        """The first call with finite inputs and without finite outputs; None: there is none."""
        for call in self.calls:
            if call.has_finite_inputs() and call.bad_outputs():
                return call
        # The innermost call that did not return.
        for name, module, inputs in reversed(self._entered):
            if not any(stats.num_bad for stats in inputs):
                return _call(name, module, inputs, None)
        return None

    def largest(self, number: int = 5) -> list[tuple[str, str, float]]:
        """Modules with the largest finite outputs beyond half of float16's range."""
        peaks: dict[str, tuple[str, str, float]] = {}
        for call in self.calls:
            for stats in call.outputs or []:
                peak = max(abs(stats.low), abs(stats.high))
                if peak > HALF_MAX / 2 and peak > peaks.get(call.name, ("", "", 0.0))[2]:
                    peaks[call.name] = (call.name, call.kind, peak)
        return sorted(peaks.values(), key=lambda item: -item[2])[:number]


def _call(
    name: str, module: nn.Module, inputs: list[TensorStats], outputs: list[TensorStats] | None
) -> ModuleCall:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    parameters = [stats_of(key, value) for key, value in own if value.is_floating_point()]
    return ModuleCall(name, type(module).__name__, inputs, outputs, parameters)


class Gradients(NamedTuple):
    """A backward pass.

    Attributes:
        function: what torch's anomaly detection says of the first operator whose gradient is NaN.
        first: gradient of the first module output that is not finite.
        last_finite: gradient of the module output before it.
        losses: the losses whose own gradient is not finite.
        parameters: names of those whose gradient is not finite.
    """

    function: str = ""
    first: TensorStats | None = None
    last_finite: TensorStats | None = None
    losses: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def is_finite(self) -> bool:
        return self.first is None and not self.parameters


def find_gradients(
    model: nn.Module,
    capture: Capture,
    batch: list[Any],
    dtype: str,
    scale: float,
    num_parts: int = 1,
) -> Gradients:
    """Backward pass of a batch whose losses are finite.

    Args:
        model: of `restored_model`, plain.
        capture, batch, dtype, num_parts: see `run_forward`.
        scale: factor on the loss.
    """
    with Trace(model) as trace:
        losses = run_forward(model, capture, batch, dtype, num_parts).tensors
    parameters = _bad_gradients(model, list(losses.values()), scale)
    first = next((i for i, stats in enumerate(trace.gradients) if stats.num_bad), None)
    if first is None and not parameters:
        return Gradients()
    bad_losses = [name for name, loss in losses.items() if _bad_gradients(model, [loss], scale)]
    function = ""
    with warnings.catch_warnings():
        # That it is slow, and the traceback of the forward pass.
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            losses = run_forward(model, capture, batch, dtype, num_parts).tensors
            try:
                _bad_gradients(model, list(losses.values()), scale)
            except RuntimeError as error:
                function = str(error).splitlines()[0]
    return Gradients(
        function,
        None if first is None else trace.gradients[first],
        trace.gradients[first - 1] if first else None,
        tuple(bad_losses),
        tuple(parameters),
    )


def _bad_gradients(model: nn.Module, losses: list[Tensor], scale: float) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    model.zero_grad()
    total = torch.stack([loss.sum() for loss in losses]).sum() * scale
    if total.requires_grad:
        total.backward(retain_graph=True)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = non_finite(gradients)
    return [name for name in gradients if name in bad]


def suspicious_inputs(batch: list[Any], num_classes: int | None) -> list[str]:
    """What is unusual about the images and targets of a batch, in words."""
    notes = []
    for i, sample in enumerate(batch):
        if not isinstance(sample, dict):
            continue
        image = sample.get("image")
        if isinstance(image, Tensor) and image.numel():
            notes += [f"image {i}: {text}" for text in _image_notes(image)]
        instances = sample.get("instances")
        if isinstance(instances, Instances):
            notes += [f"image {i}: {text}" for text in _target_notes(instances, num_classes)]
        elif instances is None and "image" in sample:
            notes.append(f"image {i}: no instances")
    return notes


def _image_notes(image: Tensor) -> Iterator[str]:
    stats = stats_of("image", image)
    if stats.num_bad:
        yield f"{stats.num_bad} pixel values are NaN or infinite, the first at {stats.first_bad}"
    if stats.low == stats.high:
        yield f"all pixels are {stats.low:g}"
    if image.dim() == 3 and min(image.shape[1:]) < 32:
        yield f"only {image.shape[1]} x {image.shape[2]} pixels"
    if max(abs(stats.low), abs(stats.high)) > 1e5:
        yield f"pixel values from {stats.low:g} to {stats.high:g}"


def _target_notes(instances: Instances, num_classes: int | None) -> Iterator[str]:
    if len(instances) == 0:
        yield "no targets"
        return
    if instances.has("gt_classes"):
        classes = instances.gt_classes
        if num_classes is not None and bool(((classes < 0) | (classes >= num_classes)).any()):
            yield f"classes {sorted(set(classes.tolist()))}, but the model has {num_classes}"
    masks = instances.gt_masks if instances.has("gt_masks") else None
    masks = getattr(masks, "tensor", masks)
    if isinstance(masks, Tensor) and masks.dim() == 3:
        if masks.is_floating_point() and not bool(masks.isfinite().all()):
            yield "masks with NaN or infinite values"
        areas = (masks != 0).flatten(1).sum(1)
        if empty := (areas == 0).nonzero()[:, 0].tolist():
            yield f"masks {empty} of {len(masks)} are empty"
        if whole := (areas == masks[0].numel()).nonzero()[:, 0].tolist():
            yield f"masks {whole} of {len(masks)} cover the whole image"
