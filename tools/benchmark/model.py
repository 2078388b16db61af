"""`model`: inference of a whole model, by stages and end to end.

Contenders, see `contenders.py`: `mask2former`, `upstream steps` and, for the stage `forward` only,
`transformers`, whose post-processing differs. Results are compared in fp32 before anything is
timed, and in float64 if rounding makes them differ.

With random weights no query would be confident. So the class weights are scaled until about 20 are,
and panoptic segments may overlap.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from checks import try_each
from contenders import (
    CONTENDERS,
    EXACT,
    PRECISIONS,
    TOLERANCE,
    Batch,
    Forward,
    Match,
    add_model_options,
    build,
    check_model_options,
    check_results,
    forward_of,
    make_models,
    normalized,
    note_upstream_op,
    precision,
    random_images,
    sharpen,
    with_outputs,
)
from detectron2.config import CfgNode
from options import (
    OURS,
    PEER,
    UPSTREAM,
    add_choices,
    add_common_options,
    add_device_options,
    add_model_runtime_options,
    check_model_runtime_options,
    runs_alone,
    size_text,
)
from processes import Task, cpu_task, peak_in_process, take_turns_alone
from report import Report, failure, milliseconds, table_row
from timing import (
    Call,
    Row,
    Times,
    main_clock,
    peak_cuda_bytes,
    ratios,
    set_threads,
    summarize,
    take_turns,
    time_call,
    timed_rows,
)
from torch import Tensor, nn

from mask2former.fast.decoder import decode_to_factors
from mask2former.utils.twins import runs_fast

# For the multiply-adds: a program one folder up.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from analyze_model import count

MODES = ("eager", "compiled")
STAGES = (
    "backbone",
    "pixel decoder",
    "transformer decoder",
    "forward",
    "post-processing",
    "end to end",
)
FULL = {"sizes": [(512, 512), (800, 1216)], "batches": [1], "rounds": 5}
QUICK = {"sizes": [(256, 256)], "batches": [1], "rounds": 3}
# Largest side of the square matrices whose product measures the machine's speed, and how long the
# product may take.
_GEMM = {"cpu": 1024, "cuda": 8192}
_GEMM_SECONDS = 0.1
_ARITHMETIC = "arithmetic"
_WARM_CALLS = 10


def _baselines(options: argparse.Namespace) -> tuple[str, ...]:
    """Contenders that others are compared with; includes ours if both modes are timed."""
    both = set(options.modes) == set(MODES)
    return (UPSTREAM, PEER, OURS) if both else (UPSTREAM, PEER)


def stage_calls(model: nn.Module, images: Batch) -> dict[str, Call]:
    """The call of each stage of our model, fast or plain, with inputs computed once."""
    head, pixels = model.sem_seg_head, normalized(model, images)
    arrange, decode = nn.Identity(), head.predictor
    # The twin of the network does not call these as modules do.
    if runs_fast(model, "forward_network"):
        decode = partial(_last_prediction, head.predictor)
        arrange = partial(Tensor.contiguous, memory_format=torch.channels_last)
    features = model.backbone(arrange(pixels))
    mask_features, _, scales = head.pixel_decoder.forward_features(features)
    outputs = decode(scales, mask_features)
    last = {key: outputs[key] for key in ("pred_logits", "pred_masks")}
    del outputs
    post_processing = with_outputs(model, last)
    return {
        "backbone": lambda: model.backbone(arrange(pixels)),
        "pixel decoder": lambda: head.pixel_decoder.forward_features(features),
        "transformer decoder": lambda: decode(scales, mask_features),
        "forward": partial(Forward(model), pixels),
        "post-processing": lambda: post_processing(images),
        "end to end": lambda: model(images),
    }


def _last_prediction(
    decoder: nn.Module, scales: list[Tensor], mask_features: Tensor
) -> dict[str, Tensor]:
    """The decoder as it runs in the twin of the network: masks of the last layer only."""
    prediction = decode_to_factors(decoder, scales, mask_features)[-1]
    return prediction | {"pred_masks": prediction["pred_masks"].full()}


@functools.cache
def _gemm_size(device: str, dtype: torch.dtype) -> int:
    """The largest side of square matrices that are multiplied in time, see _GEMM."""
    size = 128
    # Twice the side takes eight times as long. Half precision is very slow on some CPUs.
    while (
        size < _GEMM[device] and 8 * _seconds(_gemm(device, dtype, size), device) <= _GEMM_SECONDS
    ):
        size *= 2
    return size


def _seconds(call: Call, device: str) -> float:
    call()  # warm-up
    return time_call(call, device)["wall"]


def _gemm(device: str, dtype: torch.dtype, size: int) -> Call:
    x = torch.randn(size, size, device=device, dtype=dtype)
    return partial(torch.matmul, x, x)


def _timed(call: Call, labels: Row) -> Call:
    def run() -> None:
        with torch.no_grad(), precision(labels["precision"], labels["device"]):
            call()

    return run


def _with_arithmetic(
    labels: Row,
    multiply_adds: int | None,
    race: Callable[[dict[str, Call]], dict[str, list[Times]]],
    baselines: tuple[str, ...],
) -> list[Row]:
    """Rows of one stage.

    Args:
        labels: entries common to all rows.
        multiply_adds: of the stage; None if they are not counted.
        race: lets contenders take turns with the calls it is given: here a matrix product, which
            measures how long the arithmetic takes at the machine's current speed.
        baselines: contenders that others are compared with.
    """
    device, clock = labels["device"], main_clock(labels["device"])
    beside: dict[str, Call] = {}
    if multiply_adds is not None:
        dtype = PRECISIONS[labels["precision"]]
        gemm_size = _gemm_size(device, dtype)
        beside[_ARITHMETIC] = _timed(_gemm(device, dtype, gemm_size), labels)
    samples = race(beside)
    speed = samples.pop(_ARITHMETIC, None)
    rows = timed_rows(labels, samples, baselines, clock)
    for row in rows:
        row["multiply_adds"] = multiply_adds
        if speed is None:
            continue
        seconds = [times[clock] * multiply_adds / gemm_size**3 for times in speed]
        stage_seconds = [times[clock] for times in samples[row["contender"]]]
        row["gemm_size"] = gemm_size
        row["arithmetic_seconds"] = summarize(seconds)
        row["times_arithmetic"] = ratios(stage_seconds, seconds)
    return rows


def _build(options: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """The config and our model; `sharpen` it if no weights are given."""
    overlaps = [] if options.weights else ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0]
    cfg, model = build(options, *overlaps)
    return cfg, model.eval()


def _multiply_adds(model: nn.Module, size: tuple[int, int], batch: int) -> dict[str, int]:
    """Multiply-adds of each stage, without post-processing."""
    counts = count(model, *size)
    result = {
        stage: batch * sum(n for (part, _), n in counts.multiply_adds.items() if part == stage)
        for stage in ("backbone", "pixel decoder", "transformer decoder")
    }
    return result | dict.fromkeys(("forward", "end to end"), batch * counts.executed())


def run(options: argparse.Namespace) -> int:
    """Measure all cases; returns the exit status, see `Report.finish`."""
    set_threads(options.threads)
    cfg, ours = _build(options)
    cases = list(product(options.devices, options.sizes, options.batches))
    rounds = options.rounds * len(options.precisions)
    stages = len(options.stages) if "eager" in options.modes else 1
    baselines = _baselines(options)
    columns = {
        "arithmetic ms": lambda row: (
            milliseconds(row["arithmetic_seconds"]["median"]) if "arithmetic_seconds" in row else ""
        ),
        "times the arithmetic": lambda row: (
            f"{row['times_arithmetic']['median']:.2f}" if "times_arithmetic" in row else ""
        ),
    }
    labels = ("device", "size", "batch", "precision", "part")
    row_of = table_row(labels, baselines, columns)
    head = {
        "threads": options.threads,
        "allocator": options.allocator,
        "tolerance": TOLERANCE,
        "tolerance_float64": EXACT,
    }
    total = len(cases) * rounds * stages
    report = Report("model", options, row_of, total, ("transformers",), head=head)
    note_upstream_op(report, options)
    is_sharp = options.weights is not None
    for device, image_size, batch in cases:
        images = random_images(image_size, batch, "cpu")
        if not is_sharp:
            with torch.no_grad():
                sharpen(ours, images)
            is_sharp = True
        multiply_adds = _multiply_adds(ours, image_size, batch)
        models, absent = make_models(options, cfg, ours, device)
        report.absent(device, absent)
        images = random_images(image_size, batch, device)
        case = {"device": device, "size": size_text(image_size), "batch": batch}
        matches: dict[str, Match] = {}

        def compare(name, models=models, images=images, matches=matches) -> None:
            matches[name] = check_results(name, models, images)

        usable, failed = try_each([name for name in models if name != OURS], compare)
        case_text = f"({device}, {case['size']}, batch {batch})"
        for name, (pixels, rounding) in matches.items():
            if rounding:
                text = f"Compared in float64: {name} {case_text}. In fp32 rounding decides bits of"
                report.note(f"{text} attention masks: {rounding}")
            if pixels is not None:
                total = batch * image_size[0] * image_size[1]
                report.note(f"Panoptic pixels that differ, {name}: {pixels} of {total} {case_text}")
        models = {name: models[name] for name in (OURS, *usable)}
        for name in options.precisions:
            labels = case | {"precision": name}
            report.add(_rows(labels, models, images, multiply_adds, options, report))
            report.add(
                labels | {"part": "forward", "contender": name} | failure(error, name == UPSTREAM)
                for name, error in failed.items()
            )
            report.save()
        del models
        gc.collect()
    return report.finish()


def _rows(
    labels: Row,
    models: dict[str, nn.Module],
    images: Batch,
    multiply_adds: dict[str, int],
    options: argparse.Namespace,
    report: Report,
) -> list[Row]:
    """Rows of all stages of one case."""
    device, size = labels["device"], images[0]["image"].shape[-2:]
    alone = runs_alone(options, device)
    keys = ("config", "weights", "upstream_op")
    common = {key: getattr(options, key) for key in keys}
    common |= {"size": list(size), "batch": labels["batch"], "precision": labels["precision"]}
    calls: dict[str, dict[str, Call]] = {}
    if not alone:
        with torch.no_grad(), precision(labels["precision"], device):
            for name, model in models.items():
                for mode in options.modes:
                    calls[_label(name, mode)] = _calls(name, model, models[OURS], images, mode)
    rows = []
    for stage in options.stages:
        requests = {
            _label(name, mode): common | {"contender": name, "mode": mode, "stage": stage}
            for name in models
            for mode in MODES[::-1]
            if mode in options.modes and (stage == "forward" or (name != PEER and mode == "eager"))
        }
        if not requests:
            continue

        def race(beside: dict[str, Call], stage=stage, requests=requests):
            if alone:
                warm = {key: partial(_time_warm, call) for key, call in beside.items()}
                return take_turns_alone("model", requests, options, report.round, warm)
            timed = {name: _timed(calls[name][stage], labels) for name in requests}
            prepared = {name: lambda call=call: call for name, call in (timed | beside).items()}
            return take_turns(prepared, device, options, report.round)[0]

        part = labels | {"part": stage}
        stage_rows = _with_arithmetic(part, multiply_adds.get(stage), race, _baselines(options))
        for row in stage_rows:
            name = row["contender"]
            if device == "cuda":
                row["peak_bytes"] = peak_cuda_bytes(_timed(calls[name][stage], labels))
            elif options.memory and name in models and stage in _WITH_MEMORY:
                row["peak_bytes"] = peak_in_process("model", requests[name], options.threads)
        rows += stage_rows
    return rows


def _time_warm(call: Call) -> Times:
    """Times of a call after a warm-up: this process was idle while others took their turns."""
    time_call(call, "cpu", _WARM_CALLS)
    return time_call(call, "cpu", _WARM_CALLS)


def _label(name: str, mode: str) -> str:
    return name if mode == "eager" else f"{name} {mode}"


def _calls(
    name: str, model: nn.Module, ours: nn.Module, images: Batch, mode: str
) -> dict[str, Call]:
    """The call of each stage that a contender takes part in."""
    forward, pixels = forward_of(name, model), normalized(ours, images)
    if mode == "compiled":
        on_gpu = pixels.is_cuda
        forward = torch.compile(forward, mode="reduce-overhead" if on_gpu else None)
    if mode == "compiled" or name == PEER:
        return {"forward": partial(forward, pixels)}
    return stage_calls(model, images)


# Stages whose memory is measured.
_WITH_MEMORY = ("forward", "post-processing", "end to end")


def tasks_alone(arguments: Row) -> Iterator[Task]:
    """The tasks of a process: a warm-up on tiny images, then the stage itself.

    Compiled contenders skip the warm-up: a second size would make them compile for any size.
    """
    name, mode, stage = (arguments.pop(key) for key in ("contender", "mode", "stage"))
    size, batch = tuple(arguments.pop("size")), arguments.pop("batch")
    labels = {"device": "cpu", "precision": arguments.pop("precision")}
    options = argparse.Namespace(**arguments, contenders=[name])
    cfg, ours = _build(options)
    with torch.no_grad():
        if options.weights is None:
            sharpen(ours, random_images(size, 1, "cpu"))
        model = make_models(options, cfg, ours, "cpu")[0][name]
        with precision(labels["precision"], "cpu"):
            for case in (((64, 64), 1), (size, batch))[mode == "compiled" :]:
                images = random_images(*case, "cpu")
                yield cpu_task(_timed(_calls(name, model, ours, images, mode)[stage], labels))


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, "256x256, batch 1, 3 rounds, unless given")
    add_device_options(parser)
    add_model_runtime_options(parser)
    add_model_options(parser, CONTENDERS)
    add_choices(
        parser,
        "modes",
        "mode",
        MODES,
        ["eager"],
        "compiled: the forward alone, by torch.compile, as CUDA graphs on a GPU [eager]",
    )
    add_choices(parser, "stages", "stage", STAGES, STAGES, "what is timed [all]")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_model_runtime_options(parser, options)
    check_model_options(parser, options)
    if "compiled" in options.modes and "forward" not in options.stages:
        parser.error("--modes compiled times the stage forward, which is not among --stages")
