"""Draws predictions and ground truth on images.

Used by the tools that draw, the data set check and the pictures of training. H, W: image size in
pixels. Images are RGB, uint8.
"""

import os
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
from panopticapi.utils import rgb2id
from PIL import Image, ImageDraw, ImageFont

from ..data.formats.images import read_image, read_panoptic_png
from ..data.targets import rasterise, read_annotations
from .files import atomic_write
from .seeding import isolated_rng

TASKS = ("panoptic", "instance", "semantic")
_OUTPUTS = {"panoptic": "panoptic_seg", "instance": "instances", "semantic": "sem_seg"}


def enabled_tasks(cfg: CfgNode) -> list[str]:
    """Returns the tasks that the config turns on for inference, in the order of TASKS."""
    test = cfg.MODEL.MASK_FORMER.TEST
    return [task for task in TASKS if test[f"{task.upper()}_ON"]]


def make_visualizer(image: np.ndarray, metadata: Metadata, **options) -> Visualizer:
    """Returns Detectron2's visualizer for an image (H, W, 3), several times faster.

    Matplotlib extends the data limits of the axes by each polygon, which takes most of the time of
    drawing masks of many parts. The limits of what is shown are those of the image.
    """
    visualizer = Visualizer(image, metadata, **options)
    visualizer.output.ax.add_patch = visualizer.output.ax.add_artist
    return visualizer


def draw_prediction(
    image: np.ndarray,
    outputs: dict,
    metadata: Metadata,
    task: str,
    *,
    confidence_threshold: float = 0.5,
    scale: float = 1.0,
) -> np.ndarray:
    """Draws the output of one task on its image.

    Args:
        image: (H, W, 3).
        outputs: the model's outputs for this image, at its size; `sem_seg` may be labels (H, W).
        metadata: class names and colours.
        task: one of TASKS.
        confidence_threshold: minimum score of the instances drawn; ignored by other tasks.
        scale: magnification of the result.

    Returns:
        The drawing, (scale * H, scale * W, 3). Colours are deterministic.

    Raises:
        ValueError: the outputs lack this task.
    """
    if task not in TASKS or _OUTPUTS[task] not in outputs:
        raise ValueError(f"no output for task {task!r}; the model returned {sorted(outputs)}")
    with isolated_rng(0):  # the visualizer jitters colours
        return _draw(
            make_visualizer(
                image, _by_contiguous_id(metadata), scale=scale, instance_mode=ColorMode.IMAGE
            ),
            outputs[_OUTPUTS[task]],
            task,
            confidence_threshold,
        ).get_image()


def _by_contiguous_id(metadata: Metadata) -> Metadata:
    """Metadata whose thing names are indexed by contiguous id, as the visualizer expects.

    In the original release, ADE20K panoptic lists the names of its 100 things only, but the ids of
    things are among those of all 150 classes.
    """
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    if max(contiguous.values(), default=-1) < len(metadata.get("thing_classes", ())):
        return metadata
    all_classes = {
        "thing_classes": metadata.stuff_classes,
        "thing_colors": metadata.get("stuff_colors"),
    }
    return Metadata(**metadata.as_dict() | all_classes)


def _draw(visualizer: Visualizer, output, task: str, confidence_threshold: float) -> VisImage:
    if task == "panoptic":
        panoptic_map, segments_info = output
        return visualizer.draw_panoptic_seg(panoptic_map.cpu(), segments_info)
    if task == "semantic":
        labels = output if output.dim() == 2 else output.argmax(dim=0)
        return visualizer.draw_sem_seg(labels.cpu())
    output = output.to("cpu")
    output = output[output.scores >= confidence_threshold]
    # Inference leaves boxes empty; without boxes, labels are placed at the masks.
    drawn = Instances(
        output.image_size,
        scores=output.scores,
        pred_classes=output.pred_classes,
        pred_masks=output.pred_masks > 0.5,
    )
    return visualizer.draw_instance_predictions(drawn)


def draw_panoptic_gt(
    image: np.ndarray, dataset_dict: dict, metadata: Metadata, *, scale: float = 1.0
) -> np.ndarray:
    """Draws the panoptic ground truth of an image.

    Args:
        image: (H, W, 3).
        dataset_dict: an element of a panoptic data set: `pan_seg_file_name` and `segments_info`.
        metadata: class names and colours.
        scale: magnification of the result.

    Returns:
        The drawing, (scale * H, scale * W, 3).
    """
    panoptic_map = rgb2id(read_panoptic_png(dataset_dict["pan_seg_file_name"]))
    with isolated_rng(0):
        visualizer = make_visualizer(image, _by_contiguous_id(metadata), scale=scale)
        panoptic_map = torch.as_tensor(panoptic_map.astype(np.int64))
        drawn = visualizer.draw_panoptic_seg(panoptic_map, dataset_dict["segments_info"])
    return drawn.get_image()


# Earlier name.
draw_panoptic_truth = draw_panoptic_gt


def draw_gt(
    image: np.ndarray,
    record: dict,
    metadata: Metadata,
    task: str,
    *,
    classes: Sequence[str],
    ignore_label: int = 255,
) -> np.ndarray | None:
    """Draws the ground truth of one task on an image, which may be smaller than its file.

    Draws random colours for classes without one.

    Args:
        image: (H, W, 3).
        record: of a data set, in Detectron2's format, with contiguous category ids and the size of
            the file in `height` and `width`.
        metadata: class names and colours.
        task: one of TASKS.
        classes: names by contiguous id, for instances.
        ignore_label: label of pixels without a class, which are not drawn.

    Returns:
        The drawing, (H, W, 3); None if the record has no ground truth of this task.
    """
    size = image.shape[:2]
    visualizer = make_visualizer(image, _by_contiguous_id(metadata))
    if task == "instance" and record.get("annotations") is not None:
        drawn = _draw_annotations(visualizer, record, classes, size)
    elif task == "panoptic" and record.get("pan_seg_file_name"):
        ids = rgb2id(resize_labels(read_panoptic_png(record["pan_seg_file_name"]), size))
        shown = set(np.unique(ids).tolist())
        # The visualizer fails on segments without pixels, as small ones may be at this size, and on
        # several ids without segment.
        segments = [
            {"isthing": True} | segment
            for segment in record["segments_info"]
            if segment["id"] in shown
        ]
        ids[~np.isin(ids, [segment["id"] for segment in segments])] = 0
        drawn = visualizer.draw_panoptic_seg(torch.from_numpy(ids.astype(np.int64)), segments)
    elif task == "semantic" and record.get("sem_seg_file_name"):
        labels = resize_labels(read_image(record["sem_seg_file_name"]), size).astype(np.int64)
        labels[labels == ignore_label] = len(classes)  # not drawn
        drawn = visualizer.draw_sem_seg(labels)
    else:
        return None
    return drawn.get_image()


def _draw_annotations(
    visualizer: Visualizer, record: dict, classes: Sequence[str], size: tuple[int, int]
) -> VisImage:
    image_size = record["height"], record["width"]
    masks, names = [], []
    for annotation in record["annotations"]:
        # Draw crowds too; the class is in the label.
        plain = annotation | {"category_id": 0, "iscrowd": 0}
        _, shapes = read_annotations([plain], image_size, record["file_name"])
        mask = resize_labels(rasterise(shapes, image_size)[0].numpy().astype(np.uint8), size)
        if mask.any():
            masks.append(mask)
            crowd = " crowd" * annotation.get("iscrowd", 0)
            names.append(f"{classes[annotation['category_id']]}{crowd}")
    return visualizer.overlay_instances(masks=masks, labels=names) if masks else visualizer.output


def shrink(image: np.ndarray, longest: int, *, enlarge: bool = False) -> np.ndarray:
    """Returns an image (H, W, 3), at most `longest` pixels high and wide, in its proportions.

    Args:
        image: (H, W, 3).
        longest: in pixels.
        enlarge: whether a smaller image gets that size too.
    """
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if not enlarge:
        scale = min(1.0, scale)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize of integers (h, w) or (h, w, 3) to `size` (H, W)."""
    rows = np.arange(size[0]) * labels.shape[0] // size[0]
    columns = np.arange(size[1]) * labels.shape[1] // size[1]
    return labels[rows[:, None], columns]


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    path: str | os.PathLike,
    titles: Sequence[str] = (),
    *,
    margin: int = 8,
) -> np.ndarray:
    """Writes a table of images as one PNG, each column as wide as its widest image.

    Args:
        rows: images of any size, (H, W, 3); the same number in each row.
        path: file to write, atomically.
        titles: one per column, or none.
        margin: pixels between images.

    Returns:
        The table, (height, width, 3).

    Raises:
        ValueError: no images, rows of different lengths, or a wrong number of titles.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"rows need the same number of images, not {sorted(lengths)}")
    if titles and {len(titles)} != lengths:
        raise ValueError(f"{len(titles)} titles for {lengths.pop()} columns")
    widths = [max(image.shape[1] for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.shape[0] for image in row) for row in rows]
    header = 24 if titles else 0
    size = (
        sum(widths) + margin * (len(widths) + 1),
        sum(heights) + margin * (len(heights) + 1) + header,
    )
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    y = margin + header
    for row, height in zip(rows, heights, strict=True):
        x = margin
        for image, width in zip(row, widths, strict=True):
            sheet.paste(Image.fromarray(image), (x, y))
            x += width + margin
        y += height + margin
    x = margin
    for title, width in zip(titles, widths, strict=False):
        draw.text((x, margin // 2), title, fill="black", font=font)
        x += width + margin
    with atomic_write(os.fspath(path), "wb") as file:
        sheet.save(file, format="PNG")
    return np.asarray(sheet)


def magnify(image: np.ndarray, scale: float) -> np.ndarray:
    """Returns the image at `scale` times its size, the size of drawings with that `scale`."""
    size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
