"""Original import path of the position encoding; its home is `modeling/layers`."""

from ..layers.position_encoding import PositionEmbeddingSine

__all__ = ["PositionEmbeddingSine"]
