"""Same numbers first: compare contenders, and keep those that fail out of the timing."""

from collections.abc import Callable, Sequence

import torch


class WrongNumbers(ValueError):
    """A contender's results differ from those of the reference."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(difference) / norm(expected), 0 if both are empty or zero."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (actual.to(wide) - expected.to(wide)).norm().item()
    return difference and difference / max(expected.to(wide).norm().item(), 1e-30)


def require_equal(errors: dict[str, float], tolerance: float, reference: str) -> None:
    """Raise WrongNumbers unless all errors are within the tolerance."""
    # Not "error > tolerance": NaN fails.
    wrong = [f"{key} {error:.1e}" for key, error in errors.items() if not error <= tolerance]
    if wrong:
        raise WrongNumbers(f"relative error against {reference}: {', '.join(wrong)}")


def try_each(
    names: Sequence[str], attempt: Callable[[str], object]
) -> tuple[list[str], dict[str, Exception]]:
    """Try every contender.

    Returns:
        names of the contenders that work, and {name: error} of the others.
    """
    usable, failed = [], {}
    for name in names:
        try:
            attempt(name)
            usable.append(name)
        # Third-party contenders may raise anything. The error is reported like a time.
        except Exception as error:
            # Its traceback would keep tensors alive.
            failed[name] = error.with_traceback(None)
    return usable, failed
