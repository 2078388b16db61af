#!/usr/bin/env python
"""Train or evaluate a model.

    python tools/train_net.py --config-file configs/... --num-gpus 8 [KEY VALUE ...]
    python tools/train_net.py --config-file configs/... --resume
    python tools/train_net.py --config-file configs/... --eval-only MODEL.WEIGHTS model.pth
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/...

Without a GPU add `MODEL.DEVICE cpu`. OUTPUT_DIR receives checkpoints, metrics.json, log.txt and,
after an evaluation, evaluation.json.
"""

import argparse

from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.launch import launch, setup
from mask2former.trainer import Trainer


def main(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Mask2FormerCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    print("Command Line Args:", arguments)
    launch(main, arguments)
