"""`train`: a training step, its parts, its peak memory, its host syncs and operator calls.

A step is network, criterion, backward and optimiser; syncs are counted in all but the optimiser.
Images and targets start on the host, as the loader gives them, so uploads count. In fp16 the loss
is scaled as in training; unscaling belongs to the optimiser.

Contenders: `mask2former`, `upstream steps` (with its criterion and optimiser) and, on request,
`transformers`: our network with that package's criterion; `none` and `blocks`: ours with that value
of MODEL.CHECKPOINTING. Losses at the same points are compared before anything is timed.

On a GPU each part ends with a sync, so that the parts are timed separately.
"""

import argparse
import contextlib
import copy
import functools
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from checks import require_equal, try_each
from contenders import (
    CONTENDERS,
    TOLERANCE,
    Batch,
    add_model_options,
    build,
    check_model_options,
    note_upstream_op,
    place,
    precision,
    random_images,
    upstream_model,
    upstream_op,
)
from detectron2.config import CfgNode
from detectron2.structures import Instances
from options import (
    CHECKPOINTING,
    OURS,
    PEER,
    UPSTREAM,
    add_common_options,
    add_device_options,
    add_model_runtime_options,
    check_model_runtime_options,
    positive,
    runs_alone,
    size_text,
)
from peer import PeerCriterion, build_peer
from processes import Task, peak_in_process, take_turns_alone
from report import Report, failure, table_row
from timing import (
    Call,
    Row,
    Times,
    cpu_seconds,
    interleave,
    peak_cuda_bytes,
    set_threads,
    synchronize,
    timed_rows,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from upstream_steps import upstream_optimizer

from mask2former.fast.checkpointing import set_checkpointing
from mask2former.optimizer import build_optimizer

PARTS = ("network", "criterion", "backward", "optimiser", "step")
FULL = {"sizes": [(512, 512)], "batches": [2], "targets": 20, "points": 12544, "rounds": 5}
QUICK = {"sizes": [(128, 128)], "batches": [2], "targets": 5, "points": 1024, "rounds": 2}

SYNC_WARNING = "called a synchronizing"
# Steps of a warm-up: more overflow with NaN only.
_MAX_WARM_UP = 20


# ---- host syncs and operator calls ----


class CountSyncs(TorchDispatchMode):
    """Counts on a CPU what would be a host sync with a GPU: reading values, copies to the host.

    Only reads and copies (`Tensor.cpu`) of floating-point values count, since sizes and indices
    usually come from the host. Uploads are not counted.
    """

    _READS = ("nonzero", "masked_select", "unique", "_unique2", "equal")
    _INDEXING = ("index", "index_put", "index_put_")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __enter__(self) -> "CountSyncs":
        self._cpu = Tensor.cpu

        @functools.wraps(self._cpu)
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.number += tensor.is_floating_point()
            return self._cpu(tensor, *args, **kwargs)

        Tensor.cpu = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.cpu = self._cpu
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in self._INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_value = name == "_local_scalar_dense" and args[0].is_floating_point()
        self.number += name in self._READS or by_mask or by_value
        return function(*args, **(kwargs or {}))


class CountCalls(TorchDispatchMode):
    """Counts operator calls, the backward's too."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def count_syncs(run: Call, device: str) -> int:
    """Number of host syncs during a call."""
    if device == "cpu":
        with CountSyncs() as counter:
            run()
        return counter.number
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    # Torch also warns, once, that this mode is a prototype.
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)


# ---- contenders ----


def make_batch(size: tuple[int, int], batch: int, targets: int, classes: int, device: str) -> Batch:
    """Images with ellipses as targets, which may overlap; on the host, pinned for a GPU."""
    generator = torch.Generator().manual_seed(1)
    inputs = random_images(size, batch, "cpu")
    y, x = (torch.arange(n)[:, None] / n for n in size)

    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if device == "cuda" else tensor

    for item in inputs:
        centre = torch.rand(targets, 2, 1, 1, generator=generator)
        radius = 0.05 + 0.2 * torch.rand(targets, 2, 1, 1, generator=generator)
        distance = ((y - centre[:, 0]) / radius[:, 0]).square()
        distance = distance + ((x.T - centre[:, 1]) / radius[:, 1]).square()
        instances = Instances(size)
        instances.gt_classes = pin(torch.randint(classes, (targets,), generator=generator))
        instances.gt_masks = pin(distance < 1)
        item["image"], item["instances"] = pin(item["image"]), instances
    return inputs


class Step:
    """A training step of one contender.

    Args:
        name: of the contender.
        cfg: of the model.
        model: ours, on the CPU; it is copied.
        options: `upstream_op` is read.
        device: "cpu" or "cuda".
        inputs: the batch.
        autocast: name of the precision.
    """

    def __init__(
        self,
        name: str,
        cfg: CfgNode,
        model: nn.Module,
        options: argparse.Namespace,
        device: str,
        inputs: Batch,
        autocast: str,
    ):
        if name == UPSTREAM:
            model = upstream_model(cfg, model, upstream_op(options, device)).to(device)
        else:
            model = place(cfg, copy.deepcopy(model), device)
        if name in CHECKPOINTING:
            set_checkpointing(model, CHECKPOINTING[name])
        if name == PEER:
            peer = PeerCriterion(build_peer(cfg), model.criterion.weight_dict)
            model.criterion = peer.to(device)
        self.model = model.train()
        make_optimizer = upstream_optimizer if name == UPSTREAM else build_optimizer
        self.optimizer = make_optimizer(cfg, self.model)
        self._inputs, self._device = inputs, device
        self.set_precision(autocast)
        self._mark: Callable[[], None] = lambda: None
        prepare_targets = self.model.prepare_targets

        def mark_end_of_network(*args) -> list[dict[str, Tensor]]:
            targets = prepare_targets(*args)
            self._mark()
            return targets

        # A hook on the criterion would make it run plain.
        self.model.prepare_targets = mark_end_of_network

    def set_precision(self, autocast: str) -> None:
        self._autocast = autocast
        self._scaler = torch.amp.GradScaler(self._device, enabled=autocast == "fp16")

    def warm_up(self) -> None:
        """Run steps until the optimiser skips none: the initial scale of the loss is too large."""
        for _ in range(_MAX_WARM_UP):
            scale = self._scaler.get_scale()
            self.run()
            if self._scaler.get_scale() >= scale:
                break

    def losses(self) -> dict[str, Tensor]:
        with precision(self._autocast, self._device):
            return self.model(self._inputs)

    def gradients(self) -> None:
        """A step without the optimiser, whose counters are on the host."""
        self.optimizer.zero_grad()
        total = sum(self.losses().values())
        self._mark()
        self._scaler.scale(total).backward()

    def update(self) -> None:
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def run(self) -> None:
        """One step, from the batch to new weights."""
        self.gradients()
        self._mark()
        self.update()
        self._mark()

    def measure(self) -> Times:
        """Seconds of each part by each clock, {"part clock": seconds}."""
        marks = []

        def mark() -> None:
            synchronize(self._device)
            marks.append((time.perf_counter(), cpu_seconds()))

        mark()
        self._mark = mark
        self.run()
        self._mark = lambda: None
        assert len(marks) == len(PARTS)
        times = {}
        for part, start, end in zip(PARTS, marks, marks[1:], strict=False):
            for clock, before, after in zip(("wall", "cpu"), start, end, strict=True):
                times[f"{part} {clock}"] = after - before
        for index, clock in enumerate(("wall", "cpu")):
            times[f"step {clock}"] = marks[-1][index] - marks[0][index]
        return times


@contextlib.contextmanager
def same_points() -> Iterator[None]:
    """Make drawn points depend on their number only, not on the order of the draws."""
    rand = torch.rand

    def draw(*shape: int, device: torch.device | str | None = None, **_: Any) -> Tensor:
        generator = torch.Generator().manual_seed(shape[-2])
        return rand(*shape[-2:], generator=generator).to(device).expand(shape).clone()

    torch.rand = draw
    try:
        yield
    finally:
        torch.rand = rand


def check_losses(step: Step, ours: Step) -> None:
    """Raise WrongNumbers unless all losses equal ours."""
    with torch.no_grad(), same_points():
        actual, expected = step.losses(), ours.losses()
    errors = {
        name: abs(actual[name].item() - loss.item()) / max(abs(loss.item()), 1e-6)
        if name in actual
        else float("inf")
        for name, loss in expected.items()
    }
    require_equal(errors, TOLERANCE, OURS)


# ---- the run ----


def _build(options: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    return build(options, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", options.points)


def run(options: argparse.Namespace) -> int:
    """Measure all cases; returns the exit status, see `Report.finish`."""
    set_threads(options.threads)
    cfg, model = _build(options)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cases = list(product(options.devices, options.sizes, options.batches))
    columns = {
        "syncs": lambda row: str(row.get("host_syncs", "")),
        "calls": lambda row: str(row.get("operator_calls", "")),
    }
    labels = ("device", "size", "batch", "precision", "part")
    row_of = table_row(labels, (UPSTREAM, PEER, *CHECKPOINTING), columns)
    total = len(cases) * len(options.precisions) * options.rounds
    head = {key: getattr(options, key) for key in ("threads", "allocator", "targets", "points")}
    head["tolerance"] = TOLERANCE
    report = Report("train", options, row_of, total, ("transformers",), head=head)
    note_upstream_op(report, options)
    for device, size, batch in cases:
        inputs = make_batch(size, batch, options.targets, classes, device)
        case = {"device": device, "size": size_text(size), "batch": batch}
        exact = {}
        absent = {}
        for name in options.contenders:
            try:
                exact[name] = Step(name, cfg, model, options, device, inputs, "fp32")
            except (ImportError, ValueError) as error:
                if name == OURS:
                    raise
                absent[name] = str(error)
        report.absent(device, absent)

        def compare(name, exact=exact) -> None:
            check_losses(exact[name], exact[OURS])

        usable, failed = try_each([name for name in exact if name != OURS], compare)
        for autocast in options.precisions:
            steps = {name: exact[name] for name in (OURS, *usable)}
            for step in steps.values():
                step.set_precision(autocast)
            labels = case | {"precision": autocast}
            report.add(_rows(labels, steps, options, report))
            report.add(
                labels | {"part": "step", "contender": name} | failure(error, name == UPSTREAM)
                for name, error in failed.items()
            )
            report.save()
        del exact, steps
        gc.collect()
    return report.finish()


def _rows(
    labels: Row, steps: dict[str, Step], options: argparse.Namespace, report: Report
) -> list[Row]:
    """Rows of all parts of one case."""
    device = labels["device"]
    counts: dict[str, Row] = {}

    def warm_up(name: str) -> None:
        steps[name].warm_up()
        with CountCalls() as calls:
            syncs = count_syncs(steps[name].gradients, device)
            steps[name].update()
        counts[name] = {"host_syncs": syncs, "operator_calls": calls.number}

    # A contender may need more memory than there is.
    usable, failed = try_each(list(steps), warm_up)
    steps = {name: steps[name] for name in usable}
    rows = [
        labels | {"part": "step", "contender": name} | failure(error, name == OURS)
        for name, error in failed.items()
    ]
    if not steps:
        return rows
    requests = {name: _request(name, labels, options) for name in steps}
    if runs_alone(options, device):
        samples = take_turns_alone("train", requests, options, report.round)
    else:
        samples = interleave(
            list(steps),
            lambda name: steps[name].measure(),
            options.rounds,
            options.max_seconds,
            on_round=report.round,
        )
    for part in PARTS:
        part_samples = {
            name: [{clock: times[f"{part} {clock}"] for clock in ("wall", "cpu")} for times in own]
            for name, own in samples.items()
        }
        rows += timed_rows(labels | {"part": part}, part_samples, (UPSTREAM, PEER))
    for row in rows[-len(steps) :]:
        name = row["contender"]
        row |= counts[name]
        row["peak_bytes"] = None
        if device == "cuda":
            steps[name].optimizer.zero_grad()
            row["peak_bytes"] = peak_cuda_bytes(steps[name].run)
        elif options.memory:
            row["peak_bytes"] = peak_in_process("train", requests[name], options.threads)
    return rows


def _request(name: str, labels: Row, options: argparse.Namespace) -> Row:
    """Arguments of `tasks_alone` for a contender and a case."""
    keys = ("config", "weights", "upstream_op", "targets", "points")
    request = {key: getattr(options, key) for key in keys} | {"contender": name}
    height, width = labels["size"].split("x")
    request |= {"size": [int(height), int(width)], "batch": labels["batch"]}
    return request | {"precision": labels["precision"]}


def tasks_alone(arguments: Row) -> Iterator[Task]:
    """The tasks of a process: a warm-up on tiny images, then a step.

    Gradients and optimiser state count as memory of the step, so those of the warm-up are freed.
    """
    options = argparse.Namespace(**arguments)
    cfg, model = _build(options)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for size, batch in (((64, 64), 1), (tuple(options.size), options.batch)):
        inputs = make_batch(size, batch, options.targets, classes, "cpu")
        step = Step(options.contender, cfg, model, options, "cpu", inputs, options.precision)
        gc.collect()
        yield Task(step.run, step.measure)
        del step


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(
        parser,
        "128x128, 5 targets, 1024 points, 2 rounds, unless given",
    )
    add_device_options(parser)
    add_model_runtime_options(parser)
    add_model_options(parser, (OURS, UPSTREAM), (*CONTENDERS, *CHECKPOINTING))
    parser.add_argument("--targets", type=positive, help="target masks per image [20]")
    parser.add_argument("--points", type=positive, help="points per mask in criterion [12544]")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_model_runtime_options(parser, options)
    check_model_options(parser, options)
