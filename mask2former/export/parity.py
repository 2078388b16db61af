"""How far an exported file is from the model in PyTorch.

Shape letters: B batch, H W image size in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .metadata import SizeRule
from .network import example_images


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of one output at one size.

    Attributes:
        shape: B, H and W of the images.
        output: its name.
        difference: of numbers; for labels, ids and masks the share of entries that differ.
        magnitude: largest absolute value of the model's output.
    """

    shape: tuple[int, int, int]
    output: str
    difference: float
    magnitude: float

    def is_within(self, tolerance: float) -> bool:
        """Whether it is small, for logits above 1 relative to their largest value."""
        return self.difference <= tolerance * max(1.0, self.magnitude)


def parity_shapes(rule: SizeRule, example: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Three (B, H, W) that a file takes, smaller and larger than the example; one if traced."""
    if rule.fixed is not None:
        return [(rule.batch or 1, *rule.fixed)]
    step = rule.divisor
    # Clearly larger: a size that the exporter took as a constant may hold for the next step.
    other = (example[0] + 3 * step, max(rule.smallest, example[1] - step))
    sizes = (example, other, (rule.smallest, rule.smallest + 2 * step))
    return [
        (batch, min(rule.largest, height), min(rule.largest, width))
        for batch, (height, width) in zip((1, 2, 3), sizes, strict=True)
    ]


@torch.inference_mode()
def measure(
    model: Callable[[Tensor], Sequence[Tensor]],
    exported: Callable[[Tensor], dict[str, Tensor]],
    shapes: Sequence[tuple[int, int, int]],
    channels: int,
    device: torch.device,
) -> list[Difference]:
    """Compare on normalised noise.

    Args:
        model: images (B, C, H, W) → outputs, in PyTorch, fp32.
        exported: the same images → outputs by name, in the same order.
        shapes: (B, H, W) of the batches.
        channels: C.
        device: of the model.

    Raises:
        ValueError: the file does not run for a size, or returns other shapes.
    """
    rows = []
    for seed, (batch, *size) in enumerate(shapes):
        images = example_images(channels, (size[0], size[1]), batch, device, seed)
        targets = model(images)
        try:
            preds = exported(images)
        except RuntimeError as error:
            raise ValueError(
                f"the file does not run for {batch} images of {size[0]} x {size[1]} pixels: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for (name, pred), target in zip(preds.items(), targets, strict=True):
            pred = pred.to(target.device)
            if pred.shape != target.shape:
                raise ValueError(
                    f"output {name} of the file is {tuple(pred.shape)}, the model's is "
                    f"{tuple(target.shape)}"
                )
            magnitude = 1.0
            if target.is_floating_point():
                difference = (pred.float() - target).abs().max().item()
                magnitude = target.float().abs().max().item()
            else:
                difference = (pred != target).float().mean().item()
            rows.append(Difference((batch, size[0], size[1]), name, difference, magnitude))
    return rows


def table(rows: Sequence[Difference], tolerance: float | None) -> str:
    """The differences as a Markdown table."""
    lines = [
        "| batch x height x width | output | max abs difference | max abs value | within |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "any" if tolerance is None else f"{tolerance:g}"
        if tolerance is not None and not row.is_within(tolerance):
            verdict = f"NOT {verdict}"
        size = " x ".join(map(str, row.shape))
        lines.append(
            f"| {size} | {row.output} | {row.difference:.2e} | {row.magnitude:.2f} | {verdict} |"
        )
    return "\n".join(lines)
