"""One training step: Detectron2's, without its host syncs.

Detectron2 reads each loss behind the backward pass, so that the host queues no work for a GPU until
that has finished. Here the losses of an iteration are copied together, and written in the next one,
when the copy has long arrived. `Trainer` decides in which iterations something reads them, such as
a writer or a checkpoint; those are written at once.

A batch that is too large for memory is accumulated from micro-batches (SOLVER.
NUM_ACCUMULATION_STEPS): gradients and losses are those of the batch.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .modeling.matcher import NonFiniteCosts, images_from, tolerate_non_finite_costs
from .utils.host_copy import HostCopy

if TYPE_CHECKING:
    from .non_finite import NonFiniteWatch

GRADIENT_NORM = "grad_norm"
# What scipy says of costs that are not finite, in matchers of other projects.
_INVALID_COSTS = "invalid numeric entries"


class SkippedIteration(Exception):
    """Ends an iteration between the backward pass and the update."""


class _Pending(NamedTuple):
    """Losses and metrics of an iteration that are not written yet.

    Attributes:
        values: of the losses, of the metrics, and lastly whether the losses of some rank are not
            finite.
        late: the norm of the gradients, if the optimiser computes it.
    """

    names: list[str]
    num_losses: int
    values: HostCopy
    data_time: float
    prefix: str
    iteration: int
    batch: Any
    late: HostCopy | None = None

    def losses(self) -> dict[str, Tensor]:
        names = self.names[: self.num_losses]
        return dict(zip(names, self.values.read()[: self.num_losses], strict=True))

    def metrics(self) -> dict[str, float]:
        names = self.names[self.num_losses :]
        values = dict(zip(names, self.values.read()[self.num_losses : -1].tolist(), strict=True))
        return values if self.late is None else values | {GRADIENT_NORM: self.late.read().item()}

    def is_finite_on_all_ranks(self) -> bool:
        return self.values.read()[-1].item() == 0


class DelayedMetrics(SimpleTrainer):
    """Writes losses one iteration late, with the number of their own iteration.

    A loss that is not finite raises Detectron2's FloatingPointError one iteration late as well,
    which names the iteration of the loss; an optimiser that can leaves out its update meanwhile, on
    all ranks. So does a norm of the gradients that is not finite, where it is known: see
    `optimizer.py`, and `logs_gradient_norm`.

    Attributes:
        cudnn_benchmark: let cuDNN time its algorithms, within training steps only: evaluation has
            images of many sizes.
        watch: captures iterations that are not finite, and may skip them.
        num_accumulation_steps: micro-batches into which each batch is split. With more than one,
            the model has a context manager `accumulating`, see `MaskFormer`.
        skipped: whether the last iteration was skipped.
        logs_gradient_norm: write the norm of all gradients before clipping also if clipping does
            not compute it (`optimizer.py`).
        weights: weight of each loss, to write those of the last prediction layer without it too.
        observers: called with the iteration and this rank's losses when they are written.
    """

    num_accumulation_steps = 1
    watch: "NonFiniteWatch | None" = None
    skipped = False
    logs_gradient_norm = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cudnn_benchmark = False
        self._is_read: Callable[[int], bool] = lambda iteration: True
        self._pending: _Pending | None = None
        self._batch: Any = None
        self._buffers: dict[str, Tensor] = {}
        self._written: Mapping[str, Tensor] = {}
        self._bad_costs: list[int] = []
        self.weights: Mapping[str, float] = {}
        self.observers: list[Callable[[int, Mapping[str, Tensor]], None]] = []

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        return map(self._remember, super()._data_loader_iter)

    def _remember(self, batch: Any) -> Any:
        self._batch = batch
        return batch

    def delay_metrics(self, is_read: Callable[[int], bool]) -> None:
        """Begin to delay.

        Args:
            is_read: whether something reads the losses right after an iteration; they are then
                written in it. The same on all ranks, because writing gathers from them.
        """
        self._is_read = is_read

    def flush(self, *, late: bool = True) -> None:
        """Write what has been delayed; all ranks together.

        Args:
            late: whether the update of that iteration has been made.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            losses, metrics = self._checked(pending, late=late)
            self._write_now(losses, metrics, pending.data_time, pending.prefix, pending.iteration)

    def _checked(
        self, pending: _Pending, *, late: bool
    ) -> tuple[Mapping[str, Tensor], dict[str, float]]:
        """Losses and metrics of an iteration, read.

        Raises:
            FloatingPointError: losses or gradients are not finite. Only a rank with such losses
                captures them: gradients are those of all ranks.
        """
        iteration, batch = pending.iteration, pending.batch
        losses = self._finite(pending.losses(), iteration, batch, late=late)
        if not pending.is_finite_on_all_ranks():
            raise FloatingPointError(
                f"Loss became infinite or NaN at iteration={iteration} on another rank!"
            )
        metrics = pending.metrics()
        self._check_gradients(metrics, losses, iteration, batch, late=late)
        return losses, metrics

    def _check_gradients(
        self,
        metrics: Mapping[str, float],
        losses: Mapping[str, Tensor],
        iteration: int,
        batch: Any,
        *,
        late: bool,
    ) -> None:
        if self._scales_gradients() or math.isfinite(metrics.get(GRADIENT_NORM, 0.0)):
            return
        numbers = {name: loss.item() for name, loss in losses.items()}
        raise self._not_finite(iteration, batch, numbers, late=late, what="Norm of gradients")

    def discard(self) -> None:
        """Forget what has been delayed."""
        self._pending = None

    def run_step(self) -> None:
        cudnn_benchmark = torch.backends.cudnn.benchmark
        if self.cudnn_benchmark:
            torch.backends.cudnn.benchmark = True
        self.skipped = False
        skips = self.watch is not None and self.watch.skips
        # The forward pass may already have changed them, such as the statistics of BatchNorm.
        buffers = self.model.named_buffers() if skips else ()
        self._buffers = {name: buffer.clone() for name, buffer in buffers}
        try:
            with ExitStack() as stack:
                tolerates = tolerate_non_finite_costs
                self._bad_costs = stack.enter_context(tolerates()) if skips else []
                if self.num_accumulation_steps == 1:
                    super().run_step()
                else:
                    self._accumulate()
            self._write_clipped_norm()
        except SkippedIteration:
            self.skipped = True
            self.optimizer.zero_grad()
        except FloatingPointError:
            raise
        except Exception as error:
            self._raise_if_not_finite(error)
            raise
        finally:
            self._batch, self._buffers = None, {}
            if hasattr(self.optimizer, "found_inf"):
                del self.optimizer.found_inf
            if self.cudnn_benchmark:
                torch.backends.cudnn.benchmark = cudnn_benchmark

    def restore_buffers(self) -> None:
        """Undo what the forward pass of an iteration to skip did to the model's buffers."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])

    def _accumulate(self) -> None:
        """What `run_step` does, with forward and backward pass of one micro-batch at a time."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size, rest = divmod(len(data), self.num_accumulation_steps)
        if rest or not size:
            raise ValueError(
                f"the training loader gave {len(data)} images, which cannot be split into "
                f"SOLVER.NUM_ACCUMULATION_STEPS, {self.num_accumulation_steps}, equal parts"
            )
        distributed = isinstance(self.model, DistributedDataParallel)
        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        with (self.model.module if distributed else self.model).accumulating(data):
            for first in range(0, len(data), size):
                is_last = first + size == len(data)
                # Gradients of the ranks are averaged once, in the last backward pass.
                no_sync = self.model.no_sync if distributed and not is_last else nullcontext
                with images_from(first), no_sync():
                    losses = self._losses(data[first : first + size])
                    self._scaled(torch.stack([*losses.values()]).sum()).backward()
                for name, loss in losses.items():
                    totals[name] = totals[name] + loss.detach() if name in totals else loss.detach()
        self.after_backward()
        self._write_metrics(totals, data_time)
        self._update()

    def _losses(self, data: list) -> dict[str, Tensor]:
        losses = self.model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss

    def _update(self) -> None:
        self.optimizer.step()

    def _raise_if_not_finite(self, error: Exception) -> None:
        """Name the cause of an error: a loss of the iteration before, or matching costs."""
        if self._pending is not None:
            try:
                # Without the other ranks, which may not be here.
                self._checked(self._pending, late=True)
            except FloatingPointError as cause:
                self.discard()
                raise cause from error
            except RuntimeError:  # the device may be out of order
                pass
        is_cost = isinstance(error, ValueError) and _INVALID_COSTS in str(error)
        if self.watch is not None and (is_cost or isinstance(error, NonFiniteCosts)):
            note = self.watch.capture(self.iter, self._batch, {}, str(error))
            raise NonFiniteCosts(f"Iteration {self.iter}: {error}.\n{note}") from error

    def _finite(
        self, losses: Mapping[str, Tensor], iteration: int, batch: Any, *, late: bool
    ) -> Mapping[str, Tensor]:
        """Losses on the host, on each rank checked: Detectron2 knows their means on the first."""
        losses = {name: loss.detach().cpu() for name, loss in losses.items()}
        numbers = {name: loss.item() for name, loss in losses.items()}
        if not math.isfinite(sum(numbers.values())):
            raise self._not_finite(iteration, batch, numbers, late=late)
        return losses

    def _not_finite(
        self,
        iteration: int,
        batch: Any,
        losses: dict[str, float],
        *,
        late: bool,
        what: str = "Loss",
    ) -> FloatingPointError:
        """Capture an iteration that is not finite. Returns Detectron2's error for it."""
        text = f"{what} became infinite or NaN at iteration={iteration}!\nloss_dict = {losses}"
        if self.watch is not None:
            are = self._weights_after_update() if late else "those before the update"
            text += "\n" + self.watch.capture(iteration, batch, losses, text, are)
        return FloatingPointError(text)

    def _weights_after_update(self) -> str:
        """Which weights are left when an iteration is found not to be finite after its update."""
        if self._guards_update():
            return "those before the update"
        return "those after the update, because the loss or the gradients were read later"

    def _scales_gradients(self) -> bool:
        """Whether gradients that are not finite are a matter of their scale."""
        return False

    def _guards_update(self) -> bool:
        """Whether the optimiser leaves out an update on the device if told to (`found_inf`)."""
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def _device_metrics(self) -> dict[str, Tensor]:
        """Scalars on the device to write in addition to the losses."""
        return {}

    def _write_metrics(
        self,
        loss_dict: Mapping[str, Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        self.flush()
        iteration = self.iter if iter is None else iter
        if self.watch is not None and self.watch.skips:
            # One copy each, as writing them would make.
            loss_dict = {name: loss.detach().cpu() for name, loss in loss_dict.items()}
            numbers = {name: loss.item() for name, loss in loss_dict.items()}
            norm = 0.0 if self._scales_gradients() else float(self._gradient_norm())
            self.watch.check(iteration, self._batch, numbers, self._bad_costs, norm)
        metrics = self._device_metrics()
        if self.logs_gradient_norm and not hasattr(self.optimizer, "total_norm"):
            metrics[GRADIENT_NORM] = self._gradient_norm()
        values = [*loss_dict.values(), *metrics.values()]
        if not _can_be_stacked(values):
            loss_dict = self._finite(loss_dict, iteration, self._batch, late=False)
            self._write_now(loss_dict, metrics, data_time, prefix, iteration)
            return
        is_read = self._is_read(iteration)
        with torch.no_grad():
            stacked = torch.stack(values)
            is_bad = (~stacked[: len(loss_dict)].isfinite().all()).float()
            if comm.get_world_size() > 1:
                # The gradients of all ranks are, and so their updates must be. No host sync.
                torch.distributed.all_reduce(is_bad, torch.distributed.ReduceOp.MAX)
            copied = HostCopy(torch.stack([*values, is_bad]))
            if self._guards_update():
                # So that the weights stay those of this iteration until its losses are read. The
                # gradient scaler of float16 puts its own in place, which is as good.
                if GRADIENT_NORM in metrics:
                    is_bad = is_bad.maximum((~metrics[GRADIENT_NORM].isfinite()).float())
                self.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        names = [*loss_dict, *metrics]
        pending = (names, len(loss_dict), copied, data_time, prefix, iteration, self._batch)
        self._pending = _Pending(*pending)
        if is_read:
            self.flush(late=False)

    def _gradient_norm(self) -> Tensor:
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm([p.grad for p in parameters]).float()

    def _write_clipped_norm(self) -> None:
        """Write the norm that the optimiser has just clipped, with the losses of its iteration."""
        norm = getattr(self.optimizer, "total_norm", None)
        if norm is None:
            return
        self.optimizer.total_norm = None  # the gradient scaler may skip the next step
        if self._pending is not None:
            self._pending = self._pending._replace(late=HostCopy(norm))
        else:
            metrics = {GRADIENT_NORM: float(norm)}
            self._check_gradients(metrics, self._written, self.iter, self._batch, late=True)
            self._put_metrics(metrics, self.iter)

    def _write_now(
        self,
        losses: Mapping[str, Tensor],
        metrics: Mapping[str, Tensor | float],
        data_time: float,
        prefix: str,
        iteration: int,
    ) -> None:
        self._written = losses
        super()._write_metrics(losses, data_time, prefix, iteration)
        self._put_metrics(metrics, iteration)
        for name, value in unweighted_losses(losses, self.weights, prefix, iteration).items():
            get_event_storage().put_scalar(name, value, cur_iter=iteration)
        for observer in self.observers:
            observer(iteration, losses)

    @staticmethod
    def _put_metrics(metrics: Mapping[str, Tensor | float], iteration: int) -> None:
        for name, value in metrics.items():
            number = float(value)
            # The gradient scaler skips steps whose gradients are not finite.
            if name != GRADIENT_NORM or math.isfinite(number):
                get_event_storage().put_scalar(name, number, cur_iter=iteration)


def is_of_last_layer(name: str) -> bool:
    """Whether a loss is of the last prediction layer; those of others end in their number."""
    return not name.rpartition("_")[2].isdigit()


def unweighted_losses(
    names: Iterable[str], weights: Mapping[str, float], prefix: str, iteration: int
) -> dict[str, float]:
    """Losses of the last prediction layer divided by their weights, from the event storage.

    Args:
        names: of the losses written.
        weights: by name of the loss. Losses of weight 0 cannot be recovered and are left out.
        prefix: of the names in the storage.
        iteration: that the losses must be of.

    Returns:
        Averages over the ranks by name, "unweighted/ce" for loss_ce: "loss" in a name would add it
        to the terminal's line. Empty on ranks that do not write.
    """
    latest = get_event_storage().latest()
    result = {}
    for name in names:
        value, written = latest.get(f"{prefix}{name}", (0.0, None))
        if written == iteration and is_of_last_layer(name) and weights.get(name):
            short = name.removeprefix("loss_")
            result[f"{prefix}unweighted/{short}"] = value / weights[name]
    return result


def _can_be_stacked(values: list[Any]) -> bool:
    """Whether these are floating-point scalars on one device."""
    return all(
        isinstance(value, Tensor)
        and value.dim() == 0
        and value.is_floating_point()
        and value.device == values[0].device
        for value in values
    )


class Step(DelayedMetrics):
    """A step in the precision of the parameters."""


class MixedPrecisionStep(DelayedMetrics, AMPTrainer):
    """A step in float16, with scaled gradients, or in bfloat16, which needs no scaling.

    Args:
        dtype: torch.float16 or torch.bfloat16.
    """

    def __init__(self, *args: Any, dtype: torch.dtype, **kwargs: Any) -> None:
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        super().__init__(*args, grad_scaler=scaler, precision=dtype, **kwargs)

    def _losses(self, data: list) -> dict[str, Tensor]:
        with torch.autocast("cuda", dtype=self.precision):
            return super()._losses(data)

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.grad_scaler.scale(loss)

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _scales_gradients(self) -> bool:
        return self.grad_scaler.is_enabled()

    def _device_metrics(self) -> dict[str, Tensor]:
        if not self.grad_scaler.is_enabled():
            return {}
        # `get_scale` would sync.
        one = torch.ones((), device=next(self.model.parameters()).device)
        return {"[metric]grad_scaler": self.grad_scaler.scale(one)}

    def _weights_after_update(self) -> str:
        if self.grad_scaler.is_enabled():
            return "those before the update, unless its gradients were finite"
        return super()._weights_after_update()

    def _gradient_norm(self) -> Tensor:
        norm = super()._gradient_norm()
        if not self.grad_scaler.is_enabled():
            return norm
        return norm / self.grad_scaler.scale(torch.ones_like(norm))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Runs in other precisions save no state of the scaler, or an empty one.
        scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict(state_dict | {"grad_scaler": scaler})
