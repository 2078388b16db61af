#!/usr/bin/env python
"""Class-agnostic average recall of proposals from decoder layers (Figure 3 of the paper).

    python tools/evaluate_proposals.py --config-file configs/... --layer 0,3,6,9 --num-gpus 8 \
        MODEL.WEIGHTS model.pth [KEY VALUE ...]

Layer 0 predicts from the learnable queries before the decoder. Each query is a proposal; the
--num-proposals with the highest object probability are evaluated. DATASETS.TEST must have COCO
instance annotations. Writes proposals.md and proposals.json to OUTPUT_DIR.
"""

import argparse
import sys

import torch
from detectron2.engine import default_argument_parser
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.data.loader import evaluates_tiles
from mask2former.evaluation import (
    LayerProposals,
    ProposalEvaluator,
    results_table,
    write_results,
)
from mask2former.launch import launch, setup
from mask2former.trainer import Trainer
from mask2former.utils.memory import keep_freed_memory


def layer_numbers(text: str) -> list[int]:
    """Parse "0,3,6,9"."""
    return [int(number) for number in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--layer",
        type=layer_numbers,
        required=True,
        metavar="N[,N...]",
        help="decoder layers, 0 (the learnable queries) to the number of decoder layers",
    )
    parser.add_argument(
        "--num-proposals", type=int, default=100, help="per image (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.num_proposals < 1:
        parser.error(f"--num-proposals must be at least 1, got {args.num_proposals}")
    return args


def main(args: argparse.Namespace) -> dict:
    """Evaluate in this process; return {data set: {"layer <n>": {metric: value}}}."""
    cfg = setup(args).clone()
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        keep_freed_memory()
    if evaluates_tiles(cfg):
        raise ValueError(
            f"TEST.TILES.SIZE is {cfg.TEST.TILES.SIZE}, but proposals are evaluated on whole "
            "images: set it to 0"
        )
    cfg.defrost()
    test = cfg.MODEL.MASK_FORMER.TEST
    test.INSTANCE_ON, test.PANOPTIC_ON, test.SEMANTIC_ON = True, False, False
    cfg.TEST.DETECTIONS_PER_IMAGE = args.num_proposals
    cfg.freeze()
    model = Trainer.build_model(cfg)
    Mask2FormerCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS)
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        evaluator = ProposalEvaluator(dataset_name, args.num_proposals)
        results[dataset_name] = dict.fromkeys(f"layer {layer}" for layer in args.layer)
        # Start with the last layer, so that an invalid number fails at once.
        for layer in sorted(set(args.layer), reverse=True):
            loader = Trainer.build_test_loader(cfg, dataset_name)
            metrics = inference_on_dataset(LayerProposals(model, layer), loader, evaluator)
            if comm.is_main_process():
                results[dataset_name][f"layer {layer}"] = metrics["proposals"]
    if comm.is_main_process():
        print(results_table(results))
        write_results(cfg.OUTPUT_DIR, results, "proposals")
    return results


if __name__ == "__main__":
    arguments = parse_args()
    try:
        launch(main, arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
