#!/usr/bin/env python
"""Train or evaluate a model.

    python tools/train_net.py --config-file configs/... --num-gpus 8 [KEY VALUE ...]
    python tools/train_net.py --config-file configs/... --resume
    python tools/train_net.py --config-file configs/... --eval-only MODEL.WEIGHTS model.pth
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/...

Without a GPU add `MODEL.DEVICE cpu`. OUTPUT_DIR receives checkpoints, metrics.json, log.txt and,
after an evaluation, evaluation.json and evaluation.md.
"""

from mask2former.launch import main, run, setup
from mask2former.trainer import Trainer

__all__ = ["Trainer", "main", "setup"]

if __name__ == "__main__":
    run()
