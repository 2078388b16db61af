#!/usr/bin/env python
"""Convert weights from and to other libraries.

    python tools/convert_weights.py output/model_best hub/model --to transformers
    python tools/convert_weights.py model_final.pkl hub/model --to transformers --config-file CONFIG
    python tools/convert_weights.py hub/model model.pth
    python tools/convert_weights.py resnet101-63fe2227.pth R-101.pkl
    python tools/convert_weights.py swin_small_patch4_window7_224.{pth,pkl}
    python tools/convert_weights.py efficientnet-lite0-57934424.pth tf_efficientnet_lite0.pth

- A trained model → a folder for `from_pretrained` of `Mask2FormerForUniversalSegmentation` and
  `AutoImageProcessor`: weights, config.json, preprocessor_config.json. INPUT is what
  `Predictor.from_pretrained` takes, or a checkpoint with --config-file, whose DATASETS.TEST names
  the data set with the class names.
- A folder of `transformers` (or its model.safetensors beside config.json) → a `.pth` and, beside
  it, a `.yaml` with our config. MODEL.WEIGHTS accepts the folder itself, too.
- ImageNet weights of a backbone: a ResNet of torchvision or timm, a Swin Transformer of its
  authors' release or timm, an EfficientNet (also Lite) of efficientnet-pytorch and
  efficientnet-lite-pytorch. ResNets and Swins become `.pkl` files of Detectron2; classifier weights
  are left out and listed. EfficientNets become `.pth` files of timm, whole, for `TimmBackbone`.

Files are told apart by their keys.
"""

import argparse
import logging
import sys

from mask2former.utils.interrupts import run_program
from mask2former.weights.backbones import (
    NAMES,
    convert_efficientnet,
    convert_resnet,
    convert_swin,
    identify,
)
from mask2former.weights.file_conversion import (
    convert,
    from_transformers,
    is_transformers_source,
    to_transformers,
)
from mask2former.weights.folders import CONFIG

__all__ = [
    "convert",
    "convert_efficientnet",
    "convert_resnet",
    "convert_swin",
    "from_transformers",
    "identify",
    "main",
    "to_transformers",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Convert weights from and to other libraries.",
        epilog=f"A folder of transformers has a {CONFIG}.",
    )
    parser.add_argument(
        "source",
        metavar="INPUT",
        help="a trained model, a folder of transformers, or ImageNet weights of a backbone",
    )
    parser.add_argument(
        "target", metavar="OUTPUT", help="the .pkl or .pth, or the folder, to write"
    )
    parser.add_argument(
        "--to", choices=("detectron2", "transformers"), default="detectron2", help="output format"
    )
    parser.add_argument(
        "--config-file", help="config of a checkpoint without one, for --to transformers"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing model of transformers or .pth"
    )
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, default=[], help="config overrides"
    )
    args = parser.parse_args(argv)
    is_model = is_transformers_source(args.source)
    if args.to == "detectron2" and (args.opts or args.config_file):
        parser.error("--config-file and --opts are for --to transformers.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        if args.to == "transformers":
            number = to_transformers(
                args.source, args.target, args.config_file, args.opts, args.overwrite
            )
            print(f"wrote {number} tensors for transformers to {args.target}")
            return
        if is_model:
            number, config_file, names = from_transformers(args.source, args.target, args.overwrite)
            print(f"wrote {number} tensors to {args.target} and their config to {config_file}")
            if names:
                print(f"name a data set with these classes in its DATASETS: {', '.join(names)}")
            return
        kind, number, left_out = convert(args.source, args.target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.source} is {NAMES[kind]}: wrote {number} tensors to {args.target}")
    if left_out:
        print(f"left out: {', '.join(left_out)}")


if __name__ == "__main__":
    run_program(main)
