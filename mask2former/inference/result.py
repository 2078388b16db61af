"""What a model predicts for one image, as plain arrays: masks, scores, labels, maps.

    model outputs → Result.from_outputs → .filter(...) → .draw(), .save(), .to_coco(), ...

N instances, K classes, H W pixels of the image. A label is a class's contiguous id, an index of
`class_names`; files have the data set's category ids instead, where its metadata has them.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from scipy import ndimage
from torch import Tensor

from ..data.class_labels import class_names_of
from ..data.label_maps import count_ids
from ..utils.instance_masks import InstanceMasks
from ..utils.visualization import TASKS, draw_prediction
from .filters import PredictionFilter
from .result_files import drawing_metadata, save, to_coco, to_outputs, to_supervision


@dataclass
class InstanceResult:
    """Instances of an image, in descending order of their scores if a model predicted them.

    Attributes:
        masks: N of them.
        scores: (N,) float32, from 0 to 1.
        labels: (N,) int64.
    """

    masks: InstanceMasks
    scores: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, np.float32).reshape(-1)
        self.labels = np.asarray(self.labels, np.int64).reshape(-1)
        if not len(self.masks) == len(self.scores) == len(self.labels):
            raise ValueError(
                f"{len(self.masks)} masks, {len(self.scores)} scores and {len(self.labels)} labels "
                "are not of the same instances"
            )

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: Any) -> "InstanceResult":
        """The instances of an index, a slice, or an array of indices or booleans."""
        index = [index] if isinstance(index, int | np.integer) else index
        return InstanceResult(self.masks[index], self.scores[index], self.labels[index])


@dataclass
class Segment:
    """A segment of a panoptic map.

    Attributes:
        id: in the map, from 1.
        label: of its class.
        is_thing: whether it is one object; otherwise all of the image's stuff of this class.
        score: class probability, of the most probable query where several made a stuff segment;
            None if the model does not say.
        area: pixels.
    """

    id: int
    label: int
    is_thing: bool
    score: float | None
    area: int


@dataclass
class PanopticResult:
    """A panoptic segmentation.

    Attributes:
        segment_ids: (H, W) int32, 0 where no segment is.
        segments: one for each other id.
    """

    segment_ids: np.ndarray
    segments: list[Segment]

    def masks(self) -> InstanceMasks:
        """Of the segments, in their order."""
        places = ndimage.find_objects(self.segment_ids)
        crops, offsets = [], np.zeros((len(self.segments), 2), np.int64)
        for i, segment in enumerate(self.segments):
            place = places[segment.id - 1] if segment.id <= len(places) else None
            if place is None:  # no pixel
                crops.append(np.zeros((0, 0), bool))
                continue
            rows, columns = place
            crops.append(self.segment_ids[place] == segment.id)
            offsets[i] = columns.start, rows.start
        height, width = self.segment_ids.shape
        return InstanceMasks(crops, offsets, (height, width))


@dataclass(repr=False)
class Result:
    """What a model predicts for one image.

    Attributes:
        image_size: (H, W).
        class_names: K names, by label.
        instances, panoptic, semantic: of the tasks that the model has turned on, otherwise None.
            `semantic` is an (H, W) map of labels, of the smallest unsigned integers that hold them.
        file_name: of the image, if it came from a file.
        image: RGB uint8 (H, W, 3), unless it was not kept.
        metadata: of the data set, for colours and category ids; None: category ids are labels.
    """

    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    instances: InstanceResult | None = None
    panoptic: PanopticResult | None = None
    semantic: np.ndarray | None = None
    file_name: str | None = None
    image: np.ndarray | None = None
    metadata: Metadata | None = field(default=None, compare=False)

    @classmethod
    def from_outputs(
        cls,
        outputs: dict[str, Any],
        metadata: Metadata | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
        file_name: str | None = None,
        image: np.ndarray | None = None,
    ) -> "Result":
        """Make a result of what a model returns for one image.

        Args:
            outputs: Detectron2's dict with `instances`, `panoptic_seg` and `sem_seg`, or some of
                them, on any device.
            metadata: of the data set.
            class_names: K names; default: those of the metadata.
            file_name: of the image.
            image: RGB uint8 (H, W, 3), to draw on.

        Raises:
            ValueError: the outputs have none of the three tasks.
        """
        instances = panoptic = semantic = None
        if "instances" in outputs:
            predicted = outputs["instances"]
            scores = _array(predicted.scores).astype(np.float32)
            # Stable, so that equal scores keep the model's order.
            order = np.argsort(-scores, kind="stable")
            masks = InstanceMasks.from_full(predicted.pred_masks.detach())
            instances = InstanceResult(masks, scores, _array(predicted.pred_classes))[order]
            size = masks.image_size
        if "panoptic_seg" in outputs:
            panoptic = _panoptic(*outputs["panoptic_seg"])
            size = panoptic.segment_ids.shape
        if "sem_seg" in outputs:
            scores = outputs["sem_seg"]
            semantic = _array(scores.argmax(0)).astype(np.min_scalar_type(max(len(scores) - 1, 0)))
            size = semantic.shape
        if instances is panoptic is semantic is None:
            raise ValueError(
                f"the model returned {sorted(outputs)}, not instances, panoptic_seg or sem_seg: "
                "turn on a task in MODEL.MASK_FORMER.TEST"
            )
        if class_names is None:
            num_classes = len(outputs["sem_seg"]) if "sem_seg" in outputs else None
            class_names = class_names_of([metadata] if metadata else [], num_classes)
        return cls(
            (int(size[0]), int(size[1])),
            class_names,
            instances,
            panoptic,
            semantic,
            file_name,
            image,
            metadata,
        )

    @property
    def masks(self) -> InstanceMasks:
        """Of the instances."""
        return self._instances().masks

    @property
    def boxes(self) -> np.ndarray:
        """Of the instances, (N, 4) float32 x0 y0 x1 y1, made from their masks."""
        return self._instances().masks.boxes()

    @property
    def scores(self) -> np.ndarray:
        """Of the instances, (N,) float32."""
        return self._instances().scores

    @property
    def labels(self) -> np.ndarray:
        """Of the instances, (N,) int64."""
        return self._instances().labels

    @property
    def names(self) -> list[str]:
        """Class names of the instances."""
        return [self.class_names[label] for label in self._instances().labels.tolist()]

    def _instances(self) -> InstanceResult:
        if self.instances is None:
            raise ValueError(
                "this result has no instances: the model predicts them with "
                "MODEL.MASK_FORMER.TEST.INSTANCE_ON True"
            )
        return self.instances

    def filter(self, filter: PredictionFilter) -> "Result":
        """The result without what a filter removes; this one stays as it is."""
        return filter.apply(self)

    def to_coco(self, image_id: int | str = 0) -> dict[str, Any]:
        """The result in COCO's formats, with category ids of the data set.

        Args:
            image_id: of the image in its data set.

        Returns:
            A dict for JSON with, of the tasks of this result, `instances`: a list of COCO results
            (`segmentation` as compressed run lengths, `bbox` x y width height), and `panoptic`: an
            annotation of COCO panoptic results (`file_name` of the PNG, `segments_info`).
        """
        return to_coco(self, image_id)

    def save(self, path: str | os.PathLike, *, image_id: int | str = 0) -> list[Path]:
        """Write the result as files.

            NAME_instances.json   COCO results, such as `COCO.loadRes` reads
            NAME_panoptic.json    COCO panoptic results: `annotations` with one entry, and
            NAME_panoptic.png     the segment ids as colours
            NAME_semantic.png     category ids, 8 or 16 bits

        Each file appears when it is complete, and replaces an older one.

        Args:
            path: a folder, made if missing, in which NAME is that of the image's file, or
                "prediction"; or FOLDER/NAME.json.
            image_id: of the image in its data set.

        Returns:
            The files, those of the tasks of this result.

        Raises:
            WriteError: a file cannot be written.
        """
        return save(self, path, image_id)

    def to_supervision(self, task: str | None = None) -> Any:
        """`supervision.Detections`: masks, boxes, scores, labels, names as `data["class_name"]`.

        Masks are full-size: they take N · H · W bytes.

        Args:
            task: "instance" or "panoptic", whose segments become detections; default: instances if
                there are some.

        Raises:
            ModuleNotFoundError: the package is not installed.
            ValueError: this result does not have the task.
        """
        return to_supervision(self, task)

    def draw(
        self, task: str | None = None, *, image: np.ndarray | None = None, scale: float = 1.0
    ) -> np.ndarray:
        """Draw all of a task's predictions that this result has; `filter` it first.

        Args:
            task: "panoptic", "instance" or "semantic"; default: the first that there is.
            image: RGB uint8 (H, W, 3); default: the image that was kept.
            scale: magnification of the drawing.

        Returns:
            RGB uint8 (scale · H, scale · W, 3).

        Raises:
            ValueError: there is no such task, or no image.
        """
        image = self.image if image is None else image
        if image is None:
            raise ValueError("the image was not kept: predict with keep_image=True, or give image=")
        if image.shape != (*self.image_size, 3):
            raise ValueError(f"image has shape {image.shape}; allowed: {(*self.image_size, 3)}")
        if not scale > 0:
            raise ValueError(f"scale is {scale!r}; allowed: numbers above 0")
        tasks = self.tasks
        task = tasks[0] if task is None and tasks else task
        if task not in tasks:
            raise ValueError(f"task is {task!r}; this result has {', '.join(tasks) or 'none'}")
        return draw_prediction(
            image,
            to_outputs(self, task),
            drawing_metadata(self),
            task,
            confidence_threshold=0.0,
            scale=scale,
        )

    @property
    def tasks(self) -> list[str]:
        """The tasks of this result, in the order of `TASKS`."""
        values = zip(TASKS, (self.panoptic, self.instances, self.semantic), strict=True)
        return [task for task, value in values if value is not None]

    def __repr__(self) -> str:
        parts = [f"{self.image_size[0]} x {self.image_size[1]} pixels"]
        if self.instances is not None:
            parts.append(f"{len(self.instances)} instances")
        if self.panoptic is not None:
            parts.append(f"{len(self.panoptic.segments)} panoptic segments")
        if self.semantic is not None:
            parts.append(f"semantic map of {len(self.class_names)} classes")
        name = f"{self.file_name}: " if self.file_name else ""
        return f"Result({name}{', '.join(parts)})"


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _panoptic(segment_ids: Tensor, segments_info: list[dict[str, Any]]) -> PanopticResult:
    ids = _array(segment_ids).astype(np.int32, copy=False)
    areas = count_ids(ids, max((x["id"] for x in segments_info), default=0))
    segments = [
        Segment(
            int(x["id"]),
            int(x["category_id"]),
            bool(x["isthing"]),
            None if x.get("score") is None else float(x["score"]),
            int(areas[x["id"]]),
        )
        for x in segments_info
    ]
    return PanopticResult(ids, segments)
