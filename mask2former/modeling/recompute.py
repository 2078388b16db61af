"""Less memory in training: what is large and cheap is computed again in backward, not kept.

Gradients are those of the same arithmetic on the same numbers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def recomputed(
    function: Callable[..., Any],
    *args: Any,
    keep: Sequence[torch._ops.OpOverload] = (),
    random: bool = False,
) -> Any:
    """``function(*args)``, of which backward keeps only the arguments and what ``keep`` names.

    Without gradients it is a plain call, and so it is for a compiler, which decides for itself.

    Args:
        function: computes from its arguments and from parameters; it is called again in backward.
        args: its arguments.
        keep: operators whose results are kept, as they take long.
        random: whether the function draws random numbers; they are then drawn alike again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    options: dict[str, Any] = {}
    if keep:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(keep))
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **options)
