#!/usr/bin/env python
"""Convert annotations of any format to COCO instance JSON, to COCO panoptic, or to label maps.

    python tools/convert_dataset.py instances SOURCE OUTPUT.json
    python tools/convert_dataset.py panoptic SOURCE OUTPUT --labels FOLDER --classes classes.txt
    python tools/convert_dataset.py panoptic SOURCE OUTPUT --background table
    python tools/convert_dataset.py semantic panoptic.json OUTPUT --panoptic-root PNGS

SOURCE is a COCO instance JSON, or a folder or file of a labelling tool, whose format is recognised.
The result is read as training reads it, and checked (tools/check_dataset.py); the exit status is 1
if there is a problem. Prints the entry of DATASETS.CUSTOM that trains on it.

panoptic  things are the objects of SOURCE. Stuff comes from label maps (pixel values are classes,
          in files with the names of the images), from classes of SOURCE that --stuff names, or from
          --background. Where objects overlap, the smaller one is on top (--overlap area), or the
          one that SOURCE lists later (--overlap order).
semantic  label maps of panoptic data: things first, then stuff; 255 is void.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import yaml

from mask2former.data import register_instances, register_panoptic
from mask2former.data.conversion import output, panoptic, semantic, sources
from mask2former.data.conversion.label_files import read_label_classes
from mask2former.data.formats.annotated_images import ReadOptions
from mask2former.data.formats.annotation_formats import FORMATS
from mask2former.utils.interrupts import run_program

# Ids and names printed; `info` of the panoptic JSON has all.
_NUM_PRINTED = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], bool]):
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    instances = add("instances", "any format → COCO instance JSON", convert_instances)
    instances.add_argument("source", type=Path, help="folder or file of annotations")
    instances.add_argument("output", type=Path, help="JSON to write")
    pan = add("panoptic", "objects and stuff → COCO panoptic", convert_panoptic)
    pan.add_argument("source", type=Path, help="COCO instance JSON, or annotations of any format")
    pan.add_argument(
        "output", type=Path, help="folder for panoptic/, panoptic.json and instances.json"
    )
    for command in (instances, pan):
        command.add_argument(
            "--format", default=sources.AUTO, choices=(sources.AUTO, *FORMATS), help="of SOURCE"
        )
        command.add_argument("--split", help="part of SOURCE, such as train")
        command.add_argument(
            "--image-root", type=Path, metavar="DIR", help="folder of the images, if not found"
        )
        command.add_argument(
            "--mask-root", type=Path, metavar="DIR",
            help="folder of masks whose names begin with that of their image",
        )  # fmt: skip
        command.add_argument(
            "--class-names", nargs="+", metavar="NAME",
            help="of SOURCE, in the order of its labels, if its files hold none",
        )  # fmt: skip
        command.add_argument(
            "--class-attribute", metavar="NAME",
            help="attribute of the objects of SOURCE that holds the class, if there are several",
        )  # fmt: skip
        command.add_argument(
            "--boxes-as-masks", action="store_true",
            help="read data of rectangles only, each as a mask",
        )  # fmt: skip
    pan.add_argument("--labels", type=Path, metavar="DIR", help="folder of label maps")
    pan.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="classes of the label maps: one name a line, label 0 first; or YAML or JSON {label: "
        "name}. A class named like one of SOURCE is that thing",
    )  # fmt: skip
    pan.add_argument(
        "--ignore-labels", type=int, nargs="+", metavar="N",
        help="labels of pixels without a class; default: 255, unless it is the label of a class",
    )  # fmt: skip
    pan.add_argument(
        "--thing-pixels", default="void", choices=("void", "crowd"),
        help="what pixels of label maps with a thing's class become where no object is",
    )  # fmt: skip
    pan.add_argument(
        "--stuff", nargs="+", default=[], metavar="NAME", help="classes of SOURCE that are stuff"
    )
    pan.add_argument(
        "--background", metavar="NAME",
        help="stuff class of pixels without an object, if there are no label maps; default: void",
    )  # fmt: skip
    pan.add_argument(
        "--overlap", default="area", choices=("area", "order"),
        help="which object is on top: the smaller one, or the later one",
    )  # fmt: skip
    pan.add_argument(
        "--min-area", type=int, default=1, metavar="N",
        help="segments with fewer visible pixels become void",
    )  # fmt: skip
    sem = add("semantic", "COCO panoptic → label maps", convert_semantic)
    sem.add_argument("source", type=Path, help="COCO panoptic JSON")
    sem.add_argument("output", type=Path, help="folder for labels/ and classes.txt")
    sem.add_argument(
        "--panoptic-root", type=Path, metavar="DIR", help="folder of the PNGs; default: that with "
        "the name of SOURCE",
    )  # fmt: skip
    for command in (instances, pan):
        command.add_argument("--no-check", action="store_true", help="do not check the result")
    for command in (instances, pan, sem):
        command.add_argument("--overwrite", action="store_true", help="replace existing output")
        command.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="number of processes"
        )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.command == "panoptic" and args.min_area < 1:
        parser.error(f"--min-area must be at least 1, got {args.min_area}")
    return args


def convert_instances(args: argparse.Namespace) -> bool:
    """Returns whether the result has problems."""
    output.refuse_existing([args.output], args.overwrite)
    content, found = sources.read_annotations(args.source, args.format, _read_options(args))
    image_root = sources.folder_of_images(content, args.image_root)
    output.make_folder(str(args.output.parent))
    sources.write_instances(content, args.output, image_root)
    num_objects = sum(len(image.objects) for image in content.images)
    print(f"{args.source}: {found}")
    print(
        f"{args.output}: {len(content.images)} images, {num_objects} objects of "
        f"{len(content.classes)} classes: {_listed(content.classes)}"
    )
    keys = {"image_root": image_root, "instances_json": args.output}
    report = args.output.with_name(f"{args.output.stem}_check")
    return _finish(args, "instance", keys, register_instances, report)


def convert_panoptic(args: argparse.Namespace) -> bool:
    """Returns whether the result has problems."""
    options = panoptic.PanopticOptions(
        label_root=args.labels,
        classes=read_label_classes(args.classes) if args.classes else {},
        ignore_labels=None if args.ignore_labels is None else frozenset(args.ignore_labels),
        stuff=tuple(args.stuff),
        background=args.background,
        overlap=args.overlap,
        min_area=args.min_area,
        unassigned=args.thing_pixels,
    )
    output.refuse_existing([args.output / name for name in panoptic.OUTPUT], args.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        source = sources.as_instances(args.source, Path(folder), args.format, _read_options(args))
        print(f"{args.source}: {source.found}")
        summary = panoptic.convert_panoptic(
            source.json_file,
            source.image_root,
            args.output,
            options,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    print(
        f"{args.output}: {summary.num_images} images, {summary.num_segments} segments; things: "
        f"{_listed(summary.things)}; stuff: {_listed(summary.stuff)}"
    )
    _print_ids("cover no pixel", summary.empty)
    _print_ids("are hidden by others", summary.hidden)
    _print_ids(f"have fewer than {args.min_area} visible pixels", summary.small)
    for name, pixels in summary.unassigned.items():
        kind = "a crowd" if args.thing_pixels == "crowd" else "void (--thing-pixels crowd: a crowd)"
        print(f"  {pixels} pixels of {name!r} in the label maps belong to no object: {kind}")
    if summary.unused_label_maps:
        print(f"  {summary.unused_label_maps} label maps have no image in SOURCE: not used")
    keys = {
        "image_root": source.image_root,
        "panoptic_root": args.output / "panoptic",
        "panoptic_json": args.output / "panoptic.json",
        "instances_json": args.output / "instances.json",
    }
    return _finish(args, "panoptic", keys, register_panoptic, args.output / "check")


def convert_semantic(args: argparse.Namespace) -> bool:
    """Returns False: every pixel has been read."""
    root = args.panoptic_root or args.source.with_suffix("")
    classes, ignore_label = semantic.convert_semantic(
        args.source, root, args.output, workers=args.workers, overwrite=args.overwrite
    )
    print(f"{args.output}: label maps of {len(classes)} classes, void is {ignore_label}")
    return False


def _read_options(args: argparse.Namespace) -> ReadOptions:
    return ReadOptions(
        split=args.split,
        image_root=args.image_root,
        mask_root=args.mask_root,
        classes=tuple(args.class_names) if args.class_names else None,
        class_attribute=args.class_attribute,
        boxes_as_masks=args.boxes_as_masks,
    )


def _print_ids(what: str, ids: Sequence[int | str]) -> None:
    if ids:
        print(f"  {len(ids)} objects {what} and have no segment: annotations {_listed(ids)}")


def _listed(values: Sequence[int | str]) -> str:
    more = f", ... ({len(values)})" * (len(values) > _NUM_PRINTED)
    return (", ".join(map(str, values[:_NUM_PRINTED])) or "none") + more


def _finish(
    args: argparse.Namespace,
    kind: str,
    keys: dict[str, Path],
    register: Callable[..., None],
    report_folder: Path,
) -> bool:
    """Check the result, and print its entry of DATASETS.CUSTOM. Returns whether it has problems."""
    name = args.output.stem
    texts = {key: str(value) for key, value in keys.items()}
    entry = {"NAME": name, "TYPE": kind} | {key.upper(): text for key, text in texts.items()}
    print(yaml.safe_dump([entry], default_flow_style=None, sort_keys=False, width=10**6), end="")
    if args.no_check:
        return False
    return output.check_output(name, partial(register, **texts), report_folder, args.workers)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        has_problems = args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(has_problems)


if __name__ == "__main__":
    run_program(main)
