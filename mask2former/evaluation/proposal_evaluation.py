"""Average recall of the queries of a decoder layer, taken as class-agnostic proposals.

Layer 0 predicts from the learnable queries before the decoder, the last layer makes the model's
prediction. Figure 3 of the paper shows AR@100 of layers 0, 3, 6 and 9.
"""

import contextlib
import io
import itertools
import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from torch import Tensor, nn

from .ground_truth import read_coco
from .mask_ap import evaluate_masks
from .mask_encoding import encode_masks

_SIZES = {"all": "", "small": "s", "medium": "m", "large": "l"}


def layer_proposals(outputs: dict[str, Any], layer: int) -> dict[str, Tensor]:
    """Reduce the predictions of one layer to two classes: object and no object.

    Args:
        outputs: head outputs: ``pred_logits`` (B, Q, K+1), ``pred_masks`` (B, Q, H, W) and
            ``aux_outputs`` of the layers before the last.
        layer: from 0.

    Returns:
        ``pred_logits`` (B, Q, 2), where object has the total probability of the K classes, and
        ``pred_masks``.

    Raises:
        ValueError: the layer does not exist.
    """
    layers = [*outputs.get("aux_outputs", []), outputs]
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is {layer}, but the decoder predicts at 0 to {len(layers) - 1}")
    logits = layers[layer]["pred_logits"]
    any_class = logits[..., :-1].logsumexp(dim=-1)
    return {
        "pred_logits": torch.stack((any_class, logits[..., -1]), dim=-1),
        "pred_masks": layers[layer]["pred_masks"],
    }


class LayerProposals(nn.Module):
    """Predicts the proposals of a layer: instances of class 0, one per query."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        """
        Args:
            model: a `MaskFormer` with only INSTANCE_ON. TEST.DETECTIONS_PER_IMAGE is the number of
                proposals.
            layer: decoder layer, from 0.
        """
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # The model post-processes the outputs of its head, so replace those.
        head: nn.Module = self.model.get_submodule("sem_seg_head")
        hook = head.register_forward_hook(
            lambda head, args, outputs: layer_proposals(outputs, self.layer)
        )
        try:
            return self.model(batched_inputs)
        finally:
            hook.remove()


class ProposalEvaluator(DatasetEvaluator):
    """Class-agnostic average recall of masks by the official COCO rules.

    All classes are pooled into one; recall is averaged over IoU from 0.5 to 0.95.
    """

    def __init__(
        self, dataset_name: str, num_proposals: int = 100, *, use_fast_impl: bool = True
    ) -> None:
        """
        Args:
            dataset_name: registered name; its metadata has the COCO `json_file`.
            num_proposals: number of top-scoring proposals per image.
            use_fast_impl: False uses pycocotools, which gives the same digits.

        Raises:
            ValueError: the data set has no COCO annotation file.
        """
        metadata = MetadataCatalog.get(dataset_name)
        json_file = metadata.get("json_file")
        if not json_file:
            raise ValueError(
                f"Proposals cannot be evaluated on {dataset_name}: its metadata has no COCO "
                "json_file."
            )
        with contextlib.redirect_stdout(io.StringIO()):
            self._gt = read_coco(json_file, metadata.get("image_root", ""), dataset_name)
        self._num_proposals = num_proposals
        self._use_fast_impl = use_fast_impl
        self._logger = logging.getLogger(__name__)

    def reset(self) -> None:
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with `image_id`.
            outputs: with `instances`; their classes are ignored.
        """
        # The official code pools only known classes, so use one.
        category = self._gt.getCatIds()[0]
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            encoded = encode_masks(instances.pred_masks)
            for score, mask in zip(instances.scores.tolist(), encoded, strict=True):
                self._predictions.append(
                    {
                        "image_id": image["image_id"],
                        "category_id": category,
                        "score": score,
                        "segmentation": mask,
                    }
                )

    def evaluate(self) -> OrderedDict | None:
        """Return {"proposals": {"AR@100", "ARs@100", "ARm@100", "ARl@100"}} on the main worker.

        Values are in percent, NaN for sizes without any object.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = list(itertools.chain(*gathered))
        recalls = self._recalls(predictions) if predictions else {}
        results = {
            f"AR{suffix}@{self._num_proposals}": recalls.get(size, 0.0)
            for size, suffix in _SIZES.items()
        }
        self._logger.info("Class-agnostic average recall:\n" + create_small_table(results))
        return OrderedDict(proposals=results)

    def _recalls(self, predictions: list[dict]) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = evaluate_masks(
                self._gt,
                predictions,
                max_dets=[self._num_proposals],
                use_cats=False,
                use_fast_impl=self._use_fast_impl,
            )
        recall = evaluation.eval["recall"][:, 0, :, 0]  # (IoU thresholds, sizes)
        values = {}
        for size, recalls in zip(evaluation.params.areaRngLbl, recall.T, strict=True):
            known = recalls[recalls > -1]
            values[size] = 100 * float(np.mean(known)) if len(known) else float("nan")
        return values
