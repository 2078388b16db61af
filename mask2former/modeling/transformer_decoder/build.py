"""The registry of transformer decoders and the function that builds the configured one."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ...utils.registry import look_up
from .query_pruning import set_query_pruning

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Registry of transformer decoders: modules that turn pixel decoder features into query predictions.

A registered class (or function) is called as `decoder(cfg, in_channels, mask_classification)`.
Other projects register theirs here and name it in `MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`.
"""


def build_transformer_decoder(
    cfg: CfgNode, in_channels: int, mask_classification: bool = True
) -> nn.Module:
    """Build the decoder named by `MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`.

    Args:
        cfg: the full config.
        in_channels: channels of the feature maps the decoder attends to.
        mask_classification: whether the decoder predicts a class for each query as well.

    Raises:
        ValueError: no decoder is registered under that name, or the config asks for query pruning,
            which it lacks.
    """
    build = look_up(
        TRANSFORMER_DECODER_REGISTRY,
        cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME,
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
    )
    decoder = build(cfg, in_channels, mask_classification)
    test = cfg.MODEL.MASK_FORMER.TEST
    # Here and not an argument, which decoders of other projects would not take. Configs made by
    # another project's copy of `add_maskformer2_config` lack the keys.
    if after := test.get("PRUNE_QUERIES_AFTER", 0):
        set_query_pruning(decoder, after, test.PRUNE_QUERIES_THRESHOLD)
    return decoder
