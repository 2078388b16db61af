"""`postprocess`: from class and mask logits to the three kinds of output.

Masks are blobs: 20 of 100 queries are confident, and neighbours touch, which gives segments. The
contenders `mask2former` and `upstream steps` run their inference after the network.

Shape letters: Q queries, C mask channels, H W pixels of the input.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from checks import WrongNumbers, require_equal, try_each
from contenders import (
    R50,
    TOLERANCE,
    different_pixels,
    result_errors,
    upstream_model,
    with_outputs,
)
from detectron2.modeling import build_model
from options import (
    OURS,
    UPSTREAM,
    add_choices,
    add_common_options,
    add_device_options,
    add_model_runtime_options,
    check_model_runtime_options,
    list_of,
    runs_alone,
    size,
    size_text,
)
from processes import Task, cpu_task, peak_in_process, take_turns_alone
from report import Report, failure, table_row
from timing import (
    Call,
    Row,
    main_clock,
    peak_cuda_bytes,
    set_threads,
    take_turns,
    timed_rows,
)
from torch import Tensor, nn

from mask2former.config import load_config

TASKS = ("panoptic", "instance", "semantic", "all")
FULL = {"sizes": [(512, 512), (800, 1216)], "outputs": ["same", (427, 640)], "rounds": 7}
QUICK = {"sizes": [(512, 512)], "outputs": ["same"], "rounds": 3}
NUM_QUERIES, NUM_CLASSES, MASK_DIM = 100, 133, 256
_CONFIDENT = 20
_GRID = 15  # blobs along a side; with a constant they are the channels of the masks
# Share of panoptic pixels that may differ: rounding decides ties between scores.
_MAX_DIFFERENT = 1e-4
# The network is replaced by its outputs, so a small one is built.
_SMALL_NETWORK = (
    ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    + ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
    + ["MODEL.RESNETS.WIDTH_PER_GROUP", 8]
    + ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1]
    + ["MODEL.MASK_FORMER.DEC_LAYERS", 2]
)


def make_outputs(size: tuple[int, int], device: str) -> dict[str, Tensor]:
    """Decoder outputs for an image of a size, the same for the same size."""
    generator = torch.Generator().manual_seed(0)
    height, width = size[0] // 4, size[1] // 4
    centres = (torch.arange(_GRID) + 0.5) / _GRID
    bumps = [
        (-((torch.arange(n)[:, None] + 0.5) / n - centres).square() * _GRID**2).exp()
        for n in (height, width)
    ]  # (H/4, grid), (W/4, grid)
    blobs = torch.einsum("yi,xj->ijyx", *bumps).flatten(0, 1)  # (C - 31, H/4, W/4)
    features = torch.zeros(1, MASK_DIM, height, width)
    features[0, 0], features[0, 1 : 1 + len(blobs)] = 1, blobs
    embed = torch.zeros(1, NUM_QUERIES, MASK_DIM)
    embed[0, :, 0] = -4
    for query in range(NUM_QUERIES):
        # Confident queries form a grid, the others are anywhere.
        if query < _CONFIDENT:
            row, column = 1 + query // 5 * 4, 1 + query % 5 * 3
        else:
            row, column = torch.randint(1, _GRID - 1, (2,), generator=generator).tolist()
        for dy, dx in product((-1, 0, 1), repeat=2):
            channel = 1 + min(row + dy, _GRID - 1) * _GRID + column + dx
            embed[0, query, channel] = 6 + 2 * torch.rand((), generator=generator)
    logits = torch.randn(1, NUM_QUERIES, NUM_CLASSES + 1, generator=generator)
    classes = torch.randint(NUM_CLASSES, (_CONFIDENT,), generator=generator)
    logits[0, torch.arange(_CONFIDENT), classes] += 12
    logits[0, _CONFIDENT:, -1] += 6
    masks = torch.einsum("bqc,bchw->bqhw", embed, features)
    return {"pred_logits": logits.to(device), "pred_masks": masks.to(device)}


def make_models(task: str, outputs: dict[str, Tensor]) -> dict[str, nn.Module]:
    """Both contenders with given outputs of the network, configured as the recipe of a task."""
    switches = {
        f"MODEL.MASK_FORMER.TEST.{name.upper()}_ON": task in (name, "all") for name in TASKS[:-1]
    }
    overrides = [x for switch in switches.items() for x in switch]
    device = str(outputs["pred_logits"].device)
    cfg = load_config(
        str(R50), ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *_SMALL_NETWORK, *overrides]
    )
    ours = build_model(cfg).eval()
    models = {OURS: ours, UPSTREAM: upstream_model(cfg, ours)}
    return {name: with_outputs(model, outputs) for name, model in models.items()}


def make_calls(
    task: str, size: tuple[int, int], output: str | tuple[int, int], device: str
) -> dict[str, Call]:
    """The call of each contender for an image of a size."""
    height, width = size if output == "same" else output
    image = torch.zeros(3, *size, dtype=torch.uint8, device=device)
    inputs = [{"image": image, "height": height, "width": width}]
    models = make_models(task, make_outputs(size, device))
    return {name: partial(_predict, model, inputs) for name, model in models.items()}


@torch.no_grad()
def _predict(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Row:
    return model(inputs)[0]


def check(calls: dict[str, Call]) -> int | None:
    """Compare the results of the upstream steps with ours.

    Returns:
        the number of panoptic pixels that differ; None without panoptic results.

    Raises:
        WrongNumbers: the results differ by more than rounding.
    """
    actual, expected = calls[UPSTREAM](), calls[OURS]()
    require_equal(result_errors(actual, expected), TOLERANCE, OURS)
    if "panoptic_seg" not in expected:
        return None
    pixels, total = different_pixels(actual, expected), expected["panoptic_seg"][0].numel()
    if pixels > _MAX_DIFFERENT * total:
        raise WrongNumbers(f"{pixels} of {total} panoptic pixels differ from {OURS}")
    return pixels


def run(options: argparse.Namespace) -> int:
    """Measure all cases; returns the exit status, see `Report.finish`."""
    set_threads(options.threads)
    cases = list(product(options.devices, options.sizes, options.outputs))
    row_of = table_row(("device", "size", "output", "part"), (UPSTREAM,))
    total = len(cases) * len(options.tasks) * options.rounds
    head = {"threads": options.threads, "allocator": options.allocator, "tolerance": TOLERANCE}
    report = Report("postprocess", options, row_of, total, head=head)
    for device, image_size, output in cases:
        output_text = size_text(image_size if output == "same" else output)
        case = {"device": device, "size": size_text(image_size), "output": output_text}
        for task in options.tasks:
            labels = case | {"part": task}
            calls = make_calls(task, image_size, output, device)
            different: list[int | None] = []

            def compare(_, calls=calls, different=different) -> None:
                different.append(check(calls))

            usable, failed = try_each([UPSTREAM], compare)
            for pixels in different:
                if pixels:
                    report.note(
                        f"Panoptic pixels that differ ({', '.join(labels.values())}): {pixels}"
                    )
            requests = {
                name: {"contender": name, "task": task, "size": image_size, "output": output}
                for name in (OURS, *usable)
            }
            if runs_alone(options, device):
                samples = take_turns_alone("postprocess", requests, options, report.round)
            else:
                prepared = {name: lambda call=calls[name]: call for name in requests}
                samples, _ = take_turns(prepared, device, options, report.round)
            rows = timed_rows(labels, samples, (UPSTREAM,), main_clock(device))
            for row in rows:
                name = row["contender"]
                if device == "cuda":
                    row["peak_bytes"] = peak_cuda_bytes(calls[name])
                elif options.memory:
                    row["peak_bytes"] = peak_in_process(
                        "postprocess", requests[name], options.threads
                    )
            report.add(rows)
            report.add(
                labels | {"contender": name} | failure(error, True)
                for name, error in failed.items()
            )
        report.save()
    return report.finish()


def tasks_alone(arguments: Row) -> Iterator[Task]:
    """The tasks of a process: a warm-up, then the task itself."""
    name, task, size, output = (arguments[key] for key in ("contender", "task", "size", "output"))
    output = output if output == "same" else tuple(output)
    for case in (((64, 64), "same"), (tuple(size), output)):
        yield cpu_task(make_calls(task, *case, "cpu")[name])


def _output(text: str) -> str | tuple[int, int]:
    if text == "same":
        return text
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError("must be HEIGHTxWIDTH or same")
    return sides


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, "512x512, 3 rounds, unless given")
    add_device_options(parser)
    add_model_runtime_options(parser)
    parser.add_argument(
        "--sizes", type=list_of(size, "size"), help="of the network's input [512x512,800x1216]"
    )
    parser.add_argument(
        "--outputs",
        type=list_of(_output, "output size"),
        help="HxW of the outputs, or same: as the input [same,427x640]",
    )
    add_choices(parser, "tasks", "task", TASKS, TASKS, "what is predicted [all four]")


check_options = check_model_runtime_options
