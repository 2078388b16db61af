"""A cache for tensors that depend on shapes only: position encodings, reference points, masks.

    @cached_by_shape(maxsize=16)
    def reference_points(shapes: Shapes, device: torch.device) -> Tensor: ...

Computing such a tensor costs little, but on a GPU it costs many small kernels and often a host sync
in every forward pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def sizes_tensor(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Sizes as a tensor, (number of shapes, numbers per shape).

    Symbolic sizes stay symbolic in an exported program: torch.tensor would make them constants.
    """
    if not torch.compiler.is_exporting():
        return torch.tensor(shapes, dtype=dtype).to(device)
    numbers = [torch.full((), size, dtype=dtype, device=device) for row in shapes for size in row]
    return torch.stack(numbers).unflatten(0, (len(shapes), -1))


def cached_by_shape(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator: keep the `maxsize` most recently used results of a function.

    Results are shared by all callers: do not write to them. Multi-scale training visits many
    shapes, so `maxsize` should hold the shapes of a few batches only.

    The function must depend only on its arguments and on the default dtype. Arguments must be
    hashable: integers, tuples, dtypes, devices. While a compiler or an exporter traces, nothing is
    cached: sizes are symbolic and tensors are fake.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize)
        def compute(default_dtype: torch.dtype, *args) -> T:
            # A tensor made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False), torch.no_grad():
                return function(*args)

        @functools.wraps(function)
        def cached(*args) -> T:
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                return function(*args)
            return compute(torch.get_default_dtype(), *args)

        return cached

    return decorate
