"""Mask2Former of the `transformers` package, built from one of our configs, with our weights.

An independent implementation of the same model: tests compare numbers with it, benchmarks times.
"""

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from mask2former.weights.names import to_transformers
from mask2former.weights.transformers_config import model_config

# Names of the package's files → those of its modules, which version 5 has renamed.
_IN_MEMORY = [
    (r"(\.encoder)\.(encoder\.layers|embeddings)\.", r"\1.swin.\2."),
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.(relative\w+)", r".attention.relative_position_bias.\1"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]
# Unused, so without a counterpart: a norm after Swin's last stage, and counters.
_UNUSED = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias", "num_batches_tracked")


def to_peer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors (parameters or their gradients) to the peer's names.

    Raises:
        ValueError: one has no counterpart.
    """
    renamed, unknown = to_transformers(tensors)
    if unknown:
        raise ValueError(f"weights without a counterpart: {unknown[:3]} of ours")
    result = {}
    for name, tensor in renamed.items():
        for pattern, replacement in _IN_MEMORY:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def build_peer(cfg: CfgNode) -> nn.Module:
    """The peer's model of the architecture in a config, randomly initialised.

    Raises:
        ValueError: the peer has no such architecture.
    """
    import transformers

    names = [str(i) for i in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
    config = transformers.Mask2FormerConfig.from_dict(model_config(cfg, names, None))
    return transformers.Mask2FormerForUniversalSegmentation(config)


def load_weights(peer: nn.Module, ours: nn.Module) -> None:
    """Copy our weights to the peer.

    Raises:
        ValueError: a weight on one side has no counterpart on the other.
    """
    result = peer.load_state_dict(to_peer(ours.state_dict()), strict=False)
    missing = [k for k in result.missing_keys if not k.endswith(_UNUSED)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"weights without a counterpart: {missing[:3]} of transformers' model, "
            f"{result.unexpected_keys[:3]} of ours"
        )


class PeerCriterion(nn.Module):
    """The peer's criterion with our interface: same arguments, same losses.

    Args:
        peer: from `build_peer`.
        weight_dict: weight of each named loss.
    """

    def __init__(self, peer: nn.Module, weight_dict: dict[str, float]):
        super().__init__()
        self.peer = peer.criterion
        self.weight_dict = weight_dict

    def forward(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `SetCriterion.forward`, with full-size masks."""
        layers = [
            {
                "class_queries_logits": layer["pred_logits"],
                "masks_queries_logits": layer["pred_masks"],
            }
            for layer in (outputs, *outputs.get("aux_outputs", ()))
        ]
        losses = self.peer(
            **layers[0],
            mask_labels=[target["masks"].to(torch.float32) for target in targets],
            class_labels=[target["labels"] for target in targets],
            auxiliary_predictions=layers[1:] or None,
        )
        return {name.replace("cross_entropy", "ce"): loss for name, loss in losses.items()}
