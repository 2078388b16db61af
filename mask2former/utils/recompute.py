"""Activation checkpointing of parts with batch norms and dropout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which backward computes again, as if it ran once.

    Random numbers are the same, and running statistics of batch norms move once. A plain call
    without gradients, or under a compiler.

    Args:
        module: what the function calls: its norms are looked after.
        function: computes from its arguments and the module.
        args: its arguments.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(module))
    )


@contextmanager
def _again(module: nn.Module) -> Iterator[None]:
    """Let norms update copies of their statistics, which the first pass has updated already.

    Copies instead of values to put back: the first pass has saved the statistics for backward.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.training]
    originals = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({k: v.clone() for k, v in norm._buffers.items() if v is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)
