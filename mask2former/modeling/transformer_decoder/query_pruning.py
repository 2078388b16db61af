"""Query pruning: in inference, later decoder layers run without queries that predict no object.

Images have far fewer segments than a model has queries, and a query that an early layer is sure to
be "no object" seldom becomes one. Such queries are dropped after a layer; what is left attends,
is classified and gets masks as before. The outputs then have fewer queries.

Shape letters: B batch, Q queries, N queries that are left, C hidden channels, M heads, K classes,
L locations.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY = "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES"


class QueryPruning(NamedTuple):
    """When queries are dropped, and which.

    Attributes:
        after: number of layers before queries are dropped, at least 1.
        threshold: a query is dropped if no-object is its most probable class, with a probability
            above this, in [0, 1].
    """

    after: int
    threshold: float

    def remaining(self, class_logits: Tensor) -> Tensor | None:
        """The queries that are left.

        All images of a batch keep as many queries as the image that keeps most: the others keep
        also those that are least probably no object. At least one is left.

        Args:
            class_logits: (B, Q, K+1), no-object last.

        Returns:
            (B, N) indices in ascending order; None if no query is dropped.

        Raises:
            ValueError: the model is being exported or traced, and the number of queries depends on
                the image.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise ValueError(
                f"{KEY}_AFTER is {self.after}: the number of queries then depends on the image, "
                "which an exported model cannot have: set it to 0"
            )
        probs = class_logits.softmax(-1)
        no_object = probs[..., -1]
        # Of equal probabilities a class wins.
        dropped = (no_object > probs[..., :-1].amax(-1)) & (no_object > self.threshold)
        number = max(int((~dropped).sum(1).max()), 1)
        if number == dropped.shape[1]:
            return None
        rank = no_object + 2 * dropped  # the dropped behind all others
        return rank.argsort(dim=1, stable=True)[:, :number].sort(1).values


def set_query_pruning(decoder: Any, after: int, threshold: float) -> None:
    """Turn on query pruning of a decoder.

    Args:
        decoder: a `MultiScaleMaskedTransformerDecoder` or a subclass with its `forward`.
        after: see `QueryPruning`; fewer than the decoder's layers.
        threshold: see `QueryPruning`.

    Raises:
        ValueError: another decoder, or a value out of range.
    """
    forward = type(decoder).forward
    if not hasattr(decoder, "query_pruning") or not forward.__module__.startswith(__package__):
        raise ValueError(
            f"{KEY}_AFTER is {after}, but {type(decoder).__name__} has a forward pass of its own, "
            "which does not drop queries: set it to 0, or choose "
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME MultiScaleMaskedTransformerDecoder"
        )
    check_after(after, decoder.num_layers)
    if not 0 <= threshold <= 1:
        raise ValueError(f"{KEY}_THRESHOLD is {threshold!r}; allowed: 0 to 1.")
    decoder.query_pruning = QueryPruning(after, threshold)


def check_after(after: int, num_layers: int) -> None:
    """Check the layer after which queries are dropped, unless it is 0: off.

    Raises:
        ValueError: it is not before the last of the decoder's layers.
    """
    if after and not 1 <= after < num_layers:
        allowed = f"0 (off) or 1 to {num_layers - 1}" if num_layers > 1 else "0 (off)"
        raise ValueError(
            f"{KEY}_AFTER is {after!r}; allowed: {allowed}, because the decoder has {num_layers} "
            f"layer{'s' * (num_layers != 1)}."
        )


def take_queries(x: Tensor, remaining: Tensor) -> Tensor:
    """Query features (Q, B, C) of the remaining queries (B, N): (N, B, C)."""
    index = remaining.transpose(0, 1).unsqueeze(-1)
    return x.gather(0, index.expand(-1, -1, x.shape[-1]))


def take_rows(x: Tensor, remaining: Tensor) -> Tensor:
    """Rows (B·M, Q, L) of the remaining queries (B, N), for any number M per image: (B·M, N, L)."""
    index = remaining.repeat_interleave(len(x) // len(remaining), 0).unsqueeze(-1)
    return x.gather(1, index.expand(-1, -1, x.shape[-1]))
