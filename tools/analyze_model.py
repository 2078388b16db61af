#!/usr/bin/env python
"""Parameters, multiply-adds, activations and structure of the model of a config.

    python tools/analyze_model.py --tasks parameter flop --config-file configs/... [KEY VALUE ...]
    python tools/analyze_model.py --tasks flop --dataset coco_2017_val --config-file configs/...
    python tools/analyze_model.py --tasks fps --config-file configs/... [MODEL.WEIGHTS model.pth]

Multiply-adds cover the network from the image to class and mask logits. Post-processing, whose cost
depends on the predictions, is excluded. As usual, convolutions, matrix products, attention, and
deformable convolutions and attention with their sampling are counted, and elementwise operations
(norms, activation functions, resizing, softmax) are not. A multiply-add counts once.

The counts depend on the image size only, so the tool reads neither images nor weights and does not
execute the counted operators. Sizes are `COCO_SIZES` by default, or those of --dataset.

The paper counts the masks of every decoder layer, and its counter does not see the sampling of
deformable attention. Inference here computes full masks of the last layer only; both numbers are
printed.

Task "fps" runs the model on MODEL.DEVICE with random images, one at a time, post-processing
included. Set MODEL.WEIGHTS on the command line to time a trained model: what post-processing does
depends on the predictions.
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from fvcore.nn import parameter_count_table
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.data.formats.images import read_header
from mask2former.data.loader import check_dataset_names
from mask2former.preflight import check_device
from mask2former.utils.interrupts import run_program
from mask2former.utils.twins import runs_fast

# {(height, width): images out of 100}: COCO image shapes, similar ones grouped.
COCO_SIZES = {
    (480, 640): 36,
    (427, 640): 28,
    (640, 480): 13,
    (640, 427): 11,
    (600, 640): 8,
    (360, 640): 4,
}
# Per sampled value: four corners and the attention weight.
_PER_SAMPLE = 5
# {part of the model: path of its module}. The head without the transformer decoder inside it is the
# pixel decoder.
_PARTS = {
    "backbone": "backbone",
    "pixel decoder": "sem_seg_head",
    "transformer decoder": "sem_seg_head.predictor",
}
_EARLIER_MASKS = "masks of earlier layers"


def _convolution(args: tuple, out: Tensor) -> int:
    transposed = args[6]
    return (args[0] if transposed else out).numel() * args[1][0].numel()


def _attention(args: tuple, out: tuple[Tensor, ...]) -> int:
    query, key = args[:2]
    return (query.numel() + out[0].numel()) * key.shape[-2]


def _deformable_convolution(args: tuple, out: Tensor) -> int:
    """Count the convolution and the sampling of its inputs, `_PER_SAMPLE` with modulation."""
    value, weight = args[:2]
    out_positions, kernel_size = out.numel() // out.shape[1], weight[0, 0].numel()
    has_modulation = args[13]
    per_sample = _PER_SAMPLE if has_modulation else _PER_SAMPLE - 1
    samples = out_positions * kernel_size * value.shape[1]
    return out.numel() * weight[0].numel() + samples * per_sample


def _sampling(value: Tensor, locations: Tensor) -> int:
    """Count sampling of values (B, S, M, D) at locations (B, Q, M, L, P, 2)."""
    return locations.numel() // 2 * value.shape[-1] * _PER_SAMPLE


class _Operator(NamedTuple):
    """The label of an operator, and a function from (arguments, result) to multiply-adds."""

    label: str
    multiply_adds: Callable[[tuple, Any], int]


_OPERATORS = {
    "aten::convolution": _Operator("convolution", _convolution),
    "torchvision::deform_conv2d": _Operator("deformable convolution", _deformable_convolution),
    "aten::mm": _Operator("matrix product", lambda args, out: out.numel() * args[0].shape[-1]),
    "aten::bmm": _Operator("matrix product", lambda args, out: out.numel() * args[0].shape[-1]),
    "aten::addmm": _Operator("matrix product", lambda args, out: out.numel() * args[1].shape[-1]),
    "aten::baddbmm": _Operator("matrix product", lambda args, out: out.numel() * args[1].shape[-1]),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _Operator("attention", _attention),
    # The three implementations of deformable attention: one call, or one per level.
    "mask2former::ms_deform_attn_fused": _Operator(
        "deformable attention", lambda args, out: _sampling(args[0], args[3])
    ),
    "mask2former::ms_deform_attn": _Operator(
        "deformable attention", lambda args, out: _sampling(args[0], args[2])
    ),
    "aten::grid_sampler_2d": _Operator(
        "deformable attention", lambda args, out: out.numel() * _PER_SAMPLE
    ),
}
# Excluded from activations: the size of the result depends on the implementation.
_NO_ACTIVATIONS = "deformable attention"


class CountingMode(TorchDispatchMode):
    """Counts the operators above without running them.

    They return stand-ins: tensors of the right shape and strides whose memory is never touched.
    Results computed from a stand-in or a parameter are stand-ins too. Everything else, such as
    positional encodings, which depend on shapes only, is computed normally, so that caches never
    hold invalid values.

    Attributes:
        part: the running part of the model, used as a key of the counts.
        multiply_adds: {(part, operator): number}.
        activations: {(part, operator): number of values in the results}, for convolutions, matrix
            products and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.multiply_adds: Counter[tuple[str, str]] = Counter()
        self.activations: Counter[tuple[str, str]] = Counter()
        # Memory of stand-ins by dtype: the largest so far, and the smaller ones before it.
        self._memory: dict[torch.dtype, Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._addresses: set[int] = set()

    def stand_in(self, like: Tensor) -> Tensor:
        """Return a CPU tensor with the shape, strides and dtype of `like`, without values."""
        spans = zip(like.shape, like.stride(), strict=True)
        needed = 1 + sum(max(size - 1, 0) * stride for size, stride in spans)
        memory = self._memory.get(like.dtype)
        if memory is None or memory.numel() < needed:
            if memory is not None:
                self._outgrown.append(memory)
            # The system maps zero pages lazily, so untouched zeros take no memory.
            memory = torch.zeros(2 * needed, dtype=like.dtype)
            self._memory[like.dtype] = memory
            self._addresses.add(memory.data_ptr())
        return memory.as_strided(like.shape, like.stride())

    def _is_stand_in(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        is_host = tensor.device.type == "cpu"
        return is_host and tensor.untyped_storage().data_ptr() in self._addresses

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = _OPERATORS.get(func._schema.name)
        if operator is None:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if func.is_view or not any(map(self._is_stand_in, tensors)):
                return func(*args, **kwargs)
            if func._schema.is_mutable:
                # Writes to a stand-in can be dropped.
                return args[0] if self._is_stand_in(args[0]) else func(*args, **kwargs)
        meta_args, meta_kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        out = func(*meta_args, **meta_kwargs)
        if operator is not None:
            key = (self.part, operator.label)
            self.multiply_adds[key] += operator.multiply_adds(args, out)
            if operator.label != _NO_ACTIVATIONS:
                self.activations[key] += (out if isinstance(out, Tensor) else out[0]).numel()
        return tree_map_only(Tensor, self.stand_in, out)


@contextmanager
def _named_parts(model: nn.Module, mode: CountingMode):
    """Set `mode.part` to the running part of the model."""
    running = [mode.part]

    def enter(name: str) -> Callable:
        def hook(*_):
            running.append(name)
            mode.part = name

        return hook

    def leave(*_) -> None:
        running.pop()
        mode.part = running[-1]

    hooks = []
    for name, path in _PARTS.items():
        module = model.get_submodule(path)
        hooks += [
            module.register_forward_pre_hook(enter(name)),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Counts(NamedTuple):
    """Counts of one image: {(part, operator): number}."""

    multiply_adds: Counter[tuple[str, str]]
    activations: Counter[tuple[str, str]]

    def executed(self) -> int:
        """Multiply-adds of inference."""
        return sum(n for (part, _), n in self.multiply_adds.items() if part != _EARLIER_MASKS)

    def as_in_the_paper(self) -> int:
        """Multiply-adds with the masks of every layer, without deformable attention's sampling."""
        return sum(n for (_, label), n in self.multiply_adds.items() if label != _NO_ACTIVATIONS)


def count(model: nn.Module, height: int, width: int) -> Counts:
    """Count one image.

    Args:
        model: on the CPU, with `backbone` and `sem_seg_head`, as `MaskFormer`.
        height: of the padded image.
        width: of the padded image.

    Returns:
        The counts. They are valid only if no control flow depends on computed values.
    """
    # Asked before hooks are set, which make the model run as written.
    skips_earlier_masks = runs_fast(model, "forward_network")
    mode = CountingMode()
    with torch.no_grad(), _named_parts(model, mode), mode:
        image = mode.stand_in(torch.empty(1, 3, height, width, device="meta"))
        outputs = model.sem_seg_head(model.backbone(image))
    if skips_earlier_masks:
        num_values = sum(layer["pred_masks"].numel() for layer in outputs["aux_outputs"])
        per_value = model.sem_seg_head.pixel_decoder.mask_dim
        reads_masks = model.sem_seg_head.predictor.reads_masks
        for counter, number in (
            (mode.multiply_adds, num_values * per_value),
            (mode.activations, num_values),
        ):
            counter["transformer decoder", "matrix product"] -= number
            if reads_masks:  # otherwise the paper does not count them either (table 4c)
                counter[_EARLIER_MASKS, "matrix product"] += number
    return Counts(mode.multiply_adds, mode.activations)


def dataset_sizes(name: str, number: int) -> Counter[tuple[int, int]]:
    """Count the sizes of the first images of a data set.

    Raises:
        ValueError: the data set is not registered or has no image.
    """
    check_dataset_names([name])
    sizes: Counter[tuple[int, int]] = Counter()
    for record in DatasetCatalog.get(name)[:number]:
        if "height" in record and "width" in record:
            sizes[record["height"], record["width"]] += 1
        else:
            sizes[read_header(record["file_name"]).size] += 1
    if not sizes:
        raise ValueError(f"Data set {name!r} has no image.")
    return sizes


def fixed_size(cfg: CfgNode) -> tuple[int, int]:
    """Return the size of training images.

    Raises:
        ValueError: the config does not fix a size.
    """
    if cfg.INPUT.DATASET_MAPPER_NAME in ("coco_instance_lsj", "coco_panoptic_lsj"):
        return cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE
    crop = cfg.INPUT.CROP
    if not crop.ENABLED or crop.TYPE != "absolute":
        raise ValueError(
            f"--use-fixed-input-size needs crops of a fixed size, but INPUT.CROP.ENABLED is "
            f"{crop.ENABLED} and INPUT.CROP.TYPE is {crop.TYPE!r}."
        )
    height, width = crop.SIZE
    return int(height), int(width)


def padding_step(model: nn.Module) -> int:
    """Return the number of pixels to whose multiples a model pads images, at least 1."""
    # Meta-architectures of Detectron2, such as that of the per-pixel heads, ask the backbone.
    return max(getattr(model, "size_divisibility", model.backbone.size_divisibility), 1)


def padded_size(cfg: CfgNode, divisibility: int, height: int, width: int) -> tuple[int, int]:
    """Return the size of a test image after resizing and padding to multiples."""
    short = cfg.INPUT.MIN_SIZE_TEST
    if short:  # 0 turns resizing off
        height, width = ResizeShortestEdge.get_output_shape(
            height, width, short, cfg.INPUT.MAX_SIZE_TEST
        )
    step = max(divisibility, 1)
    return -(-height // step) * step, -(-width // step) * step


def count_all(
    cfg: CfgNode, model: nn.Module, sizes: dict[tuple[int, int], int], resize: bool
) -> list[Counts]:
    """Return the counts of every image, running each padded size once.

    Args:
        cfg: INPUT.{MIN,MAX}_SIZE_TEST are read.
        model: see `count`.
        sizes: {(height, width): number of images}.
        resize: whether to resize as at test time.
    """
    divisibility = padding_step(model)
    cache: dict[tuple[int, int], Counts] = {}
    images = []
    for (height, width), number in sizes.items():
        size = padded_size(cfg, divisibility, height, width) if resize else (height, width)
        if size not in cache:
            cache[size] = count(model, *size)
        images += [cache[size]] * number
    return images


def _table(images: list[Counts], index: int) -> str:
    """Format means over images, by part (index 0) or by operator (index 1)."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for column, field in enumerate(("multiply_adds", "activations")):
        for counts in images:
            for key, number in getattr(counts, field).items():
                if key[0] != _EARLIER_MASKS:
                    rows[key[index]][column] += number / len(images)
    rows["total"] = [sum(values) for values in zip(*rows.values(), strict=True)]
    header = ["operator" if index else "part", "multiply-adds (G)", "activations (M)"]
    lines = [[name, adds / 1e9, values / 1e6] for name, (adds, values) in rows.items()]
    return tabulate(lines, headers=header, floatfmt=".2f")


def _mean_and_deviation(values: list[int]) -> str:
    giga = [value / 1e9 for value in values]
    return f"{statistics.mean(giga):.1f} G (standard deviation {statistics.pstdev(giga):.1f})"


def report_counts(args: argparse.Namespace, cfg: CfgNode, model: nn.Module) -> None:
    """Print the tasks "flop" and "activation"."""
    sizes, source = image_sizes(args, cfg)
    images = count_all(cfg, model, sizes, resize=not args.use_fixed_input_size)
    listed = ", ".join(f"{n} of {h}x{w}" for (h, w), n in list(sizes.items())[:12])
    print(f"Means over {len(images)} images, {source}: {listed}{', ...' * (len(sizes) > 12)}")
    if not args.use_fixed_input_size:
        print(
            f"(height x width), resized to a short side of {cfg.INPUT.MIN_SIZE_TEST} and a long "
            f"side of at most {cfg.INPUT.MAX_SIZE_TEST}, padded to multiples of "
            f"{padding_step(model)}."
        )
    print(f"\n{_table(images, 0)}\n\n{_table(images, 1)}\n")
    print(f"Multiply-adds: {_mean_and_deviation([x.executed() for x in images])}")
    paper = _mean_and_deviation([x.as_in_the_paper() for x in images])
    print(
        "Multiply-adds with the masks of every layer and without sampling, as in the paper: "
        f"{paper}"
    )


def image_sizes(args: argparse.Namespace, cfg: CfgNode) -> tuple[dict[tuple[int, int], int], str]:
    """Return {(height, width): number of images} that the arguments choose, and their source."""
    if args.use_fixed_input_size:
        return {fixed_size(cfg): 1}, "the size of training images"
    if args.dataset:
        number = args.num_inputs or 100
        return dataset_sizes(args.dataset, number), f"the first images of {args.dataset}"
    return COCO_SIZES, "the usual sizes of COCO images"


def frames_per_second(
    cfg: CfgNode, model: nn.Module, sizes: dict[tuple[int, int], int], resize: bool
) -> float:
    """Time inference with batches of one image, post-processing included.

    Args:
        cfg: INPUT.{MIN,MAX}_SIZE_TEST are read.
        model: a meta-architecture of Detectron2, on any device.
        sizes: {(height, width): number of images}; a size with several images is timed three
            times.
        resize: whether to resize as at test time.

    Returns:
        Images per second, averaged over the images.
    """
    device = next(model.parameters()).device

    def seconds(inputs: list[dict[str, Any]]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            model(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    total = 0.0
    for (height, width), number in sizes.items():
        shape = padded_size(cfg, 1, height, width) if resize else (height, width)
        image = torch.randint(256, (3, *shape), dtype=torch.uint8)
        inputs = [{"image": image, "height": height, "width": width}]
        seconds(inputs)  # warm-up
        repeats = min(number, 3)
        total += number * statistics.mean(seconds(inputs) for _ in range(repeats))
    return sum(sizes.values()) / total


def report_speed(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Print the task "fps"."""
    model = build_model(cfg).eval()
    weights = "random weights"
    if "MODEL.WEIGHTS" in args.opts[::2]:
        Mask2FormerCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        weights = cfg.MODEL.WEIGHTS
    sizes, source = image_sizes(args, cfg)
    speed = frames_per_second(cfg, model, sizes, resize=not args.use_fixed_input_size)
    device = torch.device(cfg.MODEL.DEVICE)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"Images per second: {speed:.2f} ({name}, batch 1, {weights}, {source})")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Analyse the model of a config.")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--tasks",
        required=True,
        nargs="+",
        choices=["flop", "activation", "parameter", "structure", "fps"],
        help="what to print; flop and activation share a table; fps runs the model",
    )
    parser.add_argument("--dataset", metavar="NAME", help="take the image sizes from this data set")
    parser.add_argument(
        "-n", "--num-inputs", type=int, metavar="N", help="images of --dataset (default: 100)"
    )
    parser.add_argument(
        "--use-fixed-input-size", action="store_true", help="count the size of training images"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    if args.num_inputs is not None and (not args.dataset or args.num_inputs < 1):
        parser.error("--num-inputs is the number of images of --dataset, at least 1")
    if args.dataset and args.use_fixed_input_size:
        parser.error("--dataset and --use-fixed-input-size are mutually exclusive")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
        model = build_model(cfg).eval()
        if "parameter" in args.tasks:
            number = sum(parameter.numel() for parameter in model.parameters())
            print(parameter_count_table(model, max_depth=4))
            print(f"\nParameters: {number / 1e6:.2f} M")
        if {"flop", "activation"} & set(args.tasks):
            report_counts(args, cfg, model)
        if "structure" in args.tasks:
            print(model)
        if "fps" in args.tasks:
            cfg = load_config(args.config_file, args.opts)
            check_device(cfg)
            report_speed(args, cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
