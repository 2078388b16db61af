"""A result in the formats of others: COCO, PNG files, supervision, Detectron2's outputs.

N instances, H W pixels of the image.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from panopticapi.utils import id2rgb
from PIL import Image

from ..data.class_labels import category_ids, colours_of
from ..utils.files import atomic_write, make_folder

if TYPE_CHECKING:
    from .result import PanopticResult, Result

# The ids that three bytes of a panoptic PNG hold.
_MAX_ID = 256**3


def to_coco(result: "Result", image_id: int | str = 0) -> dict[str, Any]:
    """See `Result.to_coco`."""
    ids = _CategoryIds(result)
    content: dict[str, Any] = {}
    if result.instances is not None:
        boxes = result.boxes.astype(float)
        boxes[:, 2:] -= boxes[:, :2]
        content["instances"] = [
            {
                "image_id": image_id,
                "category_id": ids[label],
                "segmentation": rle,
                "bbox": box,
                "score": score,
            }
            for label, rle, box, score in zip(
                result.labels.tolist(),
                result.masks.to_rle(),
                boxes.tolist(),
                result.scores.tolist(),
                strict=True,
            )
        ]
    if result.panoptic is not None:
        content["panoptic"] = {
            "image_id": image_id,
            "file_name": f"{_stem(result)}.png",
            "segments_info": [
                {
                    "id": segment.id,
                    "category_id": ids[segment.label],
                    "isthing": int(segment.is_thing),
                    "area": segment.area,
                    **({} if segment.score is None else {"score": segment.score}),
                }
                for segment in result.panoptic.segments
            ],
        }
    return content


def save(result: "Result", path: str | os.PathLike, image_id: int | str = 0) -> list[Path]:
    """See `Result.save`."""
    path = Path(path).expanduser()
    folder, stem = (path.parent, path.stem) if path.suffix == ".json" else (path, _stem(result))
    make_folder(str(folder))
    content = to_coco(result, image_id)
    written: list[Path] = []

    def write_json(name: str, value: Any) -> None:
        with atomic_write(str(folder / name)) as file:
            json.dump(value, file)
        written.append(folder / name)

    if "instances" in content:
        write_json(f"{stem}_instances.json", content["instances"])
    if result.panoptic is not None:
        png = folder / f"{stem}_panoptic.png"
        write_png(png, panoptic_png(result.panoptic))
        written.append(png)
        annotation = content["panoptic"] | {"file_name": png.name}
        write_json(f"{stem}_panoptic.json", {"annotations": [annotation]})
    if result.semantic is not None:
        png = folder / f"{stem}_semantic.png"
        write_png(png, semantic_png(result))
        written.append(png)
    return written


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image (H, W) or (H, W, 3) atomically, and its folder if missing."""
    make_folder(str(path.parent))
    with atomic_write(str(path), "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")


def panoptic_png(panoptic: "PanopticResult") -> np.ndarray:
    """The segment ids as colours, uint8 (H, W, 3)."""
    ids = panoptic.segment_ids
    if ids.max(initial=0) >= _MAX_ID:
        raise ValueError(f"segment id {ids.max()} does not fit a panoptic PNG, below {_MAX_ID}")
    return id2rgb(ids)


def _stem(result: "Result") -> str:
    return Path(result.file_name).stem if result.file_name else "prediction"


def semantic_png(result: "Result") -> np.ndarray:
    """(H, W) category ids, uint8 or uint16."""
    ids = _CategoryIds(result)
    labels = np.unique(result.semantic)
    lookup = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    lookup[labels] = [ids[label] for label in labels.tolist()]
    if lookup.max() >= 2**16:
        raise ValueError(f"category id {lookup.max()} does not fit a semantic PNG of 16 bits")
    return lookup.astype(np.uint8 if lookup.max() < 2**8 else np.uint16)[result.semantic]


class _CategoryIds:
    """Label → the data set's category id."""

    def __init__(self, result: "Result") -> None:
        self._ids = category_ids(result.metadata)
        self._names = result.class_names

    def __getitem__(self, label: int) -> int:
        if self._ids is None:
            return label
        if label not in self._ids:
            raise ValueError(
                f"class {label} ({self._names[label]!r}) has no category id in the metadata of the "
                "data set (thing_dataset_id_to_contiguous_id, stuff_dataset_id_to_contiguous_id)"
            )
        return self._ids[label]


def to_supervision(result: "Result", task: str | None = None) -> Any:
    """See `Result.to_supervision`."""
    try:
        import supervision
    except ImportError as error:
        raise ModuleNotFoundError(
            "to_supervision needs the package supervision: pip install supervision",
            name="supervision",
        ) from error
    if task is None:
        tasks = [t for t in ("instance", "panoptic") if t in result.tasks]
        if not tasks:
            raise ValueError("this result has neither instances nor panoptic segments")
        task = tasks[0]
    if task == "instance":
        masks, labels = result.masks.full(), result.labels
        scores, boxes = result.scores, result.boxes
    elif task == "panoptic" and result.panoptic is not None:
        segments = result.panoptic.segments
        crops = result.panoptic.masks()
        boxes, masks = crops.boxes(), crops.full()
        labels = np.array([s.label for s in segments], np.int64)
        known = all(s.score is not None for s in segments)
        scores = np.array([s.score for s in segments], np.float32) if known else None
    else:
        raise ValueError(f"task is {task!r}; allowed: those of 'instance', 'panoptic' it has")
    names = np.array([result.class_names[label] for label in labels.tolist()], dtype=str)
    return supervision.Detections(
        xyxy=boxes, mask=masks, confidence=scores, class_id=labels, data={"class_name": names}
    )


def to_outputs(result: "Result", task: str) -> dict[str, Any]:
    """What a model returns, for one task; a semantic map is labels (H, W) instead of scores."""
    if task == "instance":
        instances = Instances(result.image_size)
        instances.pred_masks = torch.from_numpy(result.masks.full())
        instances.scores = torch.from_numpy(result.scores)
        instances.pred_classes = torch.from_numpy(result.labels)
        return {"instances": instances}
    if task == "panoptic":
        segments = [
            {"id": s.id, "isthing": s.is_thing, "category_id": s.label}
            for s in result.panoptic.segments
        ]
        return {"panoptic_seg": (torch.from_numpy(result.panoptic.segment_ids), segments)}
    return {"sem_seg": torch.from_numpy(result.semantic.astype(np.int64))}


def drawing_metadata(result: "Result") -> Metadata:
    """Metadata for Detectron2's visualizer: names and colours of all classes, by label."""
    names = list(result.class_names)
    known = result.metadata or Metadata()
    colours = colours_of(known, len(names))
    drawn: dict[str, list] = {"thing_classes": names, "stuff_classes": names}
    if colours is not None:
        drawn |= {"thing_colors": colours, "stuff_colors": colours}
    return Metadata(name="drawn", **drawn)
