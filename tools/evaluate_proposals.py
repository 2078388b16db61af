#!/usr/bin/env python
"""Class-agnostic average recall of the proposals that decoder layers make (the paper's Figure 3).

    python tools/evaluate_proposals.py --config-file configs/... --layer 0,3,6,9 --num-gpus 8 \
        MODEL.WEIGHTS model.pth [KEY VALUE ...]

Layer 0 are the learnable queries before the decoder. Each query is a proposal; of more than
--num-proposals those most likely to be an object count. DATASETS.TEST must have COCO instance
annotations. OUTPUT_DIR receives proposals.md and proposals.json.
"""

import argparse
import sys

from detectron2.engine import default_argument_parser
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.evaluation import (
    LayerProposals,
    ProposalEvaluator,
    results_table,
    write_results,
)
from mask2former.launch import launch, setup
from mask2former.trainer import Trainer


def layer_numbers(text: str) -> list[int]:
    """Parses "0,3,6,9"."""
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
        "--num-proposals", type=int, default=100, help="of an image (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.num_proposals < 1:
        parser.error(f"--num-proposals is {args.num_proposals}, not at least 1")
    return args


def main(args: argparse.Namespace) -> dict:
    """Evaluates in this process; returns {data set: {"layer <n>": {metric: value}}}."""
    cfg = setup(args).clone()
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
        # From the last one, so that a layer that does not exist is noticed at once.
        for layer in sorted(set(args.layer), reverse=True):
            loader = Trainer.build_test_loader(cfg, dataset_name)
            found = inference_on_dataset(LayerProposals(model, layer), loader, evaluator)
            if comm.is_main_process():
                results[dataset_name][f"layer {layer}"] = found["proposals"]
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
