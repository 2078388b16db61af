"""What a training logs besides Detectron2's metrics: hooks, and their place among the others.

`train_step.py` writes losses without weights and the norm of the gradients, `pictures.py` draws,
`experiment_trackers.py` writes to Weights & Biases and MLflow.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from torch import nn

from .pictures import HardExamples, Pictures
from .train_step import DelayedMetrics
from .utils.memory import peak_resident_bytes


class PeakMemory(HookBase):
    """Writes `max_mem`, the most memory used so far in MiB, as Detectron2 prints it.

    On a GPU what torch allocated there, else the resident memory of the process. It is written with
    the rows of metrics.json only.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between rows.
        """
        self._period = period

    def after_step(self) -> None:
        trainer = self.trainer
        done = trainer.iter + 1
        if done % self._period and done != trainer.max_iter:
            return
        device = next((p.device for p in trainer.model.parameters()), torch.device("cpu"))
        on_gpu = device.type == "cuda"
        # Neither waits for the GPU.
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes()
        trainer.storage.put_scalar("max_mem", peak / 2**20, smoothing_hint=False)


def with_logging_hooks(cfg: CfgNode, inherited: Sequence[HookBase | None]) -> list[HookBase | None]:
    """Add the hooks of this module and of `pictures.py` between evaluation and writers.

    Args:
        cfg: the config. A project with its own copy of `add_maskformer2_config` lacks LOGGING and
            gets no pictures.
        inherited: the other hooks; only the main process has writers among them.
    """
    writers = [hook for hook in inherited if isinstance(hook, hooks.PeriodicWriter)]
    # Right after the evaluation, on all ranks: drawing ends in a barrier, and early stopping, which
    # comes last, would keep some ranks from it.
    evaluating = hooks.EvalHook | hooks.BestCheckpointer
    places = [i + 1 for i, hook in enumerate(inherited) if isinstance(hook, evaluating)]
    places = places or [i for i, hook in enumerate(inherited) if hook in writers]
    place = places[-1] if places else len(inherited)
    added: list[HookBase] = [PeakMemory(hook._period) for hook in writers[:1]]
    logging = cfg.get("LOGGING", {})
    if logging.get("PICTURES") or logging.get("HARD_EXAMPLES"):
        hard_examples = HardExamples(logging.HARD_EXAMPLES, cfg.TEST.EVAL_PERIOD)
        added += [hard_examples, Pictures(cfg, hard_examples)]
    return [*inherited[:place], *added, *inherited[place:]]


def configure_step(cfg: CfgNode, step: DelayedMetrics, model: nn.Module) -> None:
    """Tell a step what to write besides the losses."""
    weights = getattr(getattr(model, "criterion", None), "weight_dict", None)
    if isinstance(weights, Mapping):
        step.weights = weights
    step.logs_gradient_norm = cfg.get("LOGGING", {}).get("GRADIENT_NORM", False)
