"""`benchmark.py postprocess`: from class logits and mask factors to the three kinds of output.

Masks are blobs, so that there are segments: 20 of 100 queries are confident, and neighbours touch.
`mask2former` is `MaskFormer`'s inference after the network, `published` that of
`published_steps.py`. Masks are multiplied out within the measured time.

Shape letters: Q queries, C mask channels, H W pixels of the input.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from benchmark_contenders import TOLERANCE, different_pixels, fresh, result_errors, with_outputs
from benchmark_options import (
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
from benchmark_processes import Task, cpu_task, peak_in_process, take_turns_alone
from benchmark_runner import (
    OURS,
    PUBLISHED,
    Call,
    Report,
    Row,
    WrongNumbers,
    failure,
    main_clock,
    require_equal,
    set_threads,
    table_row,
    take_turns,
    timed_rows,
    try_each,
)
from detectron2.data import Metadata
from published_steps import as_published
from torch import Tensor, nn

from mask2former import MaskFormer
from mask2former.modeling.mask_predictions import MaskLogits, MaskPredictions
from mask2former.utils import benchmark

TASKS = ("panoptic", "instance", "semantic", "all")
FULL = {"sizes": [(512, 512), (800, 1216)], "outputs": ["same", (427, 640)], "rounds": 7}
QUICK = {"sizes": [(512, 512)], "outputs": ["same"], "rounds": 3}
NUM_QUERIES, NUM_CLASSES, NUM_THINGS, MASK_DIM = 100, 133, 80, 256
_CONFIDENT = 20
_GRID = 15  # blobs along a side; with a constant they are the channels of the masks
# Scores hardly tie; where they do, roundings decide. Of all pixels:
_MAX_DIFFERENT = 1e-4


def make_outputs(size: tuple[int, int], device: str) -> MaskPredictions:
    """What the decoder would give for one image of a size, the same for the same size."""
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
        # Confident queries side by side, the others anywhere.
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
    return MaskPredictions(
        pred_logits=logits.to(device),
        pred_masks=MaskLogits(embed.to(device), features.to(device)),
    )


def make_models(task: str, outputs: MaskPredictions) -> dict[str, nn.Module]:
    """Both contenders, without a network, as a recipe for the task configures them."""
    ids = {index: index for index in range(NUM_THINGS)}
    ours = MaskFormer(
        backbone=nn.Identity(),
        sem_seg_head=nn.Identity(),
        criterion=nn.Identity(),
        num_queries=NUM_QUERIES,
        object_mask_threshold=0.8,
        overlap_threshold=0.8,
        metadata=Metadata(name="benchmark", thing_dataset_id_to_contiguous_id=ids),
        size_divisibility=32,
        sem_seg_postprocess_before_inference=task != "semantic",
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        semantic_on=task in ("semantic", "all"),
        panoptic_on=task in ("panoptic", "all"),
        instance_on=task in ("instance", "all"),
        test_topk_per_image=100,
    )
    ours = ours.eval().to(outputs["pred_logits"].device)
    models = {OURS: ours, PUBLISHED: as_published(ours)}
    return {name: with_outputs(model, partial(fresh, outputs)) for name, model in models.items()}


def make_calls(
    task: str, size: tuple[int, int], output: str | tuple[int, int], device: str
) -> dict[str, Call]:
    """What each contender does with an image of a size."""
    height, width = size if output == "same" else output
    image = torch.zeros(3, *size, dtype=torch.uint8, device=device)
    inputs = [{"image": image, "height": height, "width": width}]
    models = make_models(task, make_outputs(size, device))
    return {name: partial(_predict, model, inputs) for name, model in models.items()}


@torch.no_grad()
def _predict(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Row:
    return model(inputs)[0]


def check(calls: dict[str, Call]) -> int | None:
    """Compare the published steps with ours.

    Returns:
        how many panoptic pixels differ.

    Raises:
        WrongNumbers: more than roundings explain.
    """
    actual, expected = calls[PUBLISHED](), calls[OURS]()
    require_equal(result_errors(actual, expected), TOLERANCE, OURS)
    if "panoptic_seg" not in expected:
        return None
    pixels, total = different_pixels(actual, expected), expected["panoptic_seg"][0].numel()
    if pixels > _MAX_DIFFERENT * total:
        raise WrongNumbers(f"{pixels} of {total} panoptic pixels are not those of {OURS}")
    return pixels


def run(options: argparse.Namespace) -> int:
    """Measures all cases; returns the exit status, see `Report.finish`."""
    set_threads(options.threads)
    cases = list(product(options.devices, options.sizes, options.outputs))
    row_of = table_row(("device", "size", "output", "part"), (PUBLISHED,))
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

            usable, failed = try_each([PUBLISHED], compare)
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
            rows = timed_rows(labels, samples, (PUBLISHED,), main_clock(device))
            for row in rows:
                name = row["contender"]
                if device == "cuda":
                    row["peak_bytes"] = benchmark.peak_cuda_bytes(calls[name])
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
    """What a process of its own does: a warm-up, then the task itself."""
    name, task, size, output = (arguments[key] for key in ("contender", "task", "size", "output"))
    output = output if output == "same" else tuple(output)
    for case in (((64, 64), "same"), (tuple(size), output)):
        yield cpu_task(make_calls(task, *case, "cpu")[name])


def _output(text: str) -> str | tuple[int, int]:
    if text == "same":
        return text
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError("must be HEIGHTxWIDTH, or same")
    return sides


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, "512x512, 3 rounds, where these are not given")
    add_device_options(parser)
    add_model_runtime_options(parser)
    parser.add_argument(
        "--sizes", type=list_of(size, "size"), help="of the network's input [512x512,800x1216]"
    )
    parser.add_argument(
        "--outputs",
        type=list_of(_output, "output size"),
        help="HxW of what is wanted, or same: the input's [same,427x640]",
    )
    add_choices(parser, "tasks", "task", TASKS, TASKS, "what is predicted [all four]")


check_options = check_model_runtime_options
