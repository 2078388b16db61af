#!/usr/bin/env python
"""Panoptic quality of a semantic model: all pixels of a class in an image form one segment.

    python tools/evaluate_pq_for_semantic_segmentation.py --dataset-name ade20k_sem_seg_val \
        --json-file OUTPUT_DIR/inference/sem_seg_predictions.json

A semantic segmentation evaluation writes the predictions to OUTPUT_DIR/inference; the ground truth
comes from the registered data set. The table is printed and, with --output-dir, also written to
semantic_pq.md and semantic_pq.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util
from tqdm import tqdm

from mask2former.data.formats.coco_results import read_semantic_results
from mask2former.data.loader import explained_dataset_errors
from mask2former.evaluation import SemanticPQ, results_table, write_results
from mask2former.evaluation.semantic_evaluation import LabelReader
from mask2former.utils.files import WriteError, require_writable
from mask2former.utils.interrupts import run_program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Panoptic quality of a semantic model.")
    parser.add_argument(
        "--dataset-name",
        default="ade20k_sem_seg_val",
        help="a registered data set with semantic labels (default: %(default)s)",
    )
    parser.add_argument(
        "--json-file", required=True, metavar="FILE", help="sem_seg_predictions.json"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="folder to also write the table to")
    return parser.parse_args(argv)


def label_map(masks: list[dict], to_class: dict[int, int]) -> np.ndarray:
    """Paint the masks of one image into a label map (H, W), -1 for uncovered pixels.

    Args:
        masks: with `segmentation` and `category_id`.
        to_class: {category id: class}.
    """
    labels = np.full(masks[0]["segmentation"]["size"], -1)
    for mask in masks:
        labels[mask_util.decode(mask["segmentation"]) == 1] = to_class[mask["category_id"]]
    return labels


def evaluate(dataset_name: str, json_file: str) -> dict[str, float]:
    """Return PQ, SQ, RQ and mIoU in percent.

    Raises:
        ValueError: the data set is unknown, or the predictions do not match it.
        FileNotFoundError: a file does not exist.
    """
    with explained_dataset_errors([dataset_name]):
        records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if not all("sem_seg_file_name" in record for record in records):
        raise ValueError(f"data set {dataset_name} has no semantic labels (sem_seg_file_name)")
    for key in ("stuff_classes", "ignore_label"):
        if metadata.get(key) is None:
            raise ValueError(f"the metadata of data set {dataset_name} has no {key}")
    names = metadata.stuff_classes
    to_class = metadata.get("stuff_dataset_id_to_contiguous_id")
    if to_class is None:
        to_class = {class_id: class_id for class_id in range(len(names))}
    images = [Path(record["file_name"]).stem for record in records]
    predictions = read_semantic_results(json_file, images, to_class.keys(), dataset_name)
    read = LabelReader(metadata)
    quality = SemanticPQ(names, metadata.ignore_label)
    for image, record in zip(tqdm(images, unit="image"), records, strict=True):
        try:
            prediction = label_map(predictions[image], to_class)
            quality.add(read(record["sem_seg_file_name"]), prediction)
        except ValueError as error:
            raise ValueError(f"image {image}: {error}") from error
    return quality.results()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.output_dir:
            require_writable(args.output_dir)
        metrics = evaluate(args.dataset_name, args.json_file)
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")
    results = {args.dataset_name: {"semantic_pq": metrics}}
    print(results_table(results))
    if args.output_dir:
        write_results(args.output_dir, results, "semantic_pq")


if __name__ == "__main__":
    run_program(main)
