"""Pictures of a training: ground truth beside prediction, and the batches with the largest losses.

Drawn by the main process at every evaluation, for TensorBoard and other writers and as
OUTPUT_DIR/pictures/ITERATION/*.png. Neither changes what is trained: predictions are one more
forward pass per image, and losses are those that are written anyway.

H, W: image size in pixels.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .data.class_counts import class_names
from .data.formats.bands import as_colours, image_format_of
from .data.formats.images import read_colours
from .data.loader import Draw, ResumableBatchSampler, evaluates_tiles
from .train_step import DelayedMetrics, is_of_last_layer
from .utils.files import WriteError, make_folder
from .utils.seeding import isolated_rng
from .utils.visualization import (
    TASKS,
    contact_sheet,
    draw_gt,
    draw_prediction,
    enabled_tasks,
    make_visualizer,
    shrink,
)

_logger = logging.getLogger(__name__)

# Longest sides of drawings in pixels.
_DRAWING_SIZE, _SAMPLE_SIZE = 400, 240
# Images drawn of one batch, at most.
_MAX_SAMPLES = 8
_HARD_EXAMPLES = "hard_examples"
_BLANK = np.full((1, 1, 3), 255, np.uint8)


class NotDrawableError(ValueError):
    """Samples or records have no picture, or have it in a form of their own."""


class HardExamples(HookBase):
    """Remembers the main process's batches with the largest losses since the last evaluation.

    The loss is the sum of the weighted losses of the last prediction layer, of the whole batch of
    this process: the criterion sums over images. A batch is remembered by the draws of its samples,
    from which the loader makes the same samples again.
    """

    def __init__(self, number: int, period: int) -> None:
        """
        Args:
            number: of batches; 0: none.
            period: iterations between evaluations; 0: only after the last iteration.
        """
        self._number = number
        self._period = period
        self._worst: list[tuple[float, int, list[Draw]]] = []
        self._sampler: ResumableBatchSampler | None = None

    def before_train(self) -> None:
        step = self.trainer._trainer
        sampler = getattr(getattr(step, "data_loader", None), "batch_sampler", None)
        if not (self._number and comm.is_main_process()):
            return
        if isinstance(step, DelayedMetrics) and isinstance(sampler, ResumableBatchSampler):
            self._sampler = sampler
            step.observers.append(self.observe)
        else:
            _logger.info(
                "Hard examples are not drawn: the training loader or the step is not this project's"
            )

    def observe(self, iteration: int, losses: Mapping[str, Tensor]) -> None:
        """Remember a batch if its loss is among the largest."""
        loss = sum(float(value) for name, value in losses.items() if is_of_last_layer(name))
        # A checkpoint saved just before an evaluation has those that the evaluation has drawn.
        first = iteration - iteration % self._period if self._period else 0
        self._worst = [entry for entry in self._worst if entry[1] >= first]
        if len(self._worst) == self._number and loss <= self._worst[-1][0]:
            return
        assert self._sampler is not None
        self._worst.append((loss, iteration, self._sampler.draws(iteration)))
        self._worst = sorted(self._worst, key=lambda entry: (-entry[0], entry[1]))[: self._number]

    def take(self) -> list[tuple[float, int, list[Draw]]]:
        """Loss, iteration and draws of the batches, largest loss first; forgets them."""
        worst, self._worst = self._worst, []
        return worst

    def state_dict(self) -> dict[str, Any]:
        # Plain numbers, which checkpoints may contain.
        worst = [(loss, i, [tuple(draw) for draw in draws]) for loss, i, draws in self._worst]
        return {"worst": worst}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._worst = [
            (loss, iteration, [Draw(*draw) for draw in draws])
            for loss, iteration, draws in state_dict["worst"]
        ][: self._number]


class Pictures(EvalHook):
    """Draws at every evaluation, after it.

    An error, such as of records in an unusual format, is logged and turns these pictures off: they
    must not end a training. A file that cannot be written is an error, as everywhere.
    """

    def __init__(self, cfg: CfgNode, hard_examples: HardExamples) -> None:
        """
        Args:
            cfg: reads LOGGING.PICTURES, DATASETS and what inference reads.
            hard_examples: the batches to draw.
        """
        super().__init__(cfg.TEST.EVAL_PERIOD, self._draw)
        self._cfg = cfg
        self._hard_examples = hard_examples
        self._off: set[str] = set()
        self._chosen: dict[str, list[tuple[dict, dict]]] = {}

    def _draw(self) -> None:
        if not comm.is_main_process():
            return
        for name in self._cfg.DATASETS.TEST if self._cfg.LOGGING.PICTURES else ():
            self._try(name, partial(self._draw_predictions, name))
        self._try(_HARD_EXAMPLES, self._draw_hard_examples)

    def _try(self, name: str, draw: Callable[[], None]) -> None:
        if name in self._off:
            return
        try:
            draw()
        except WriteError:
            raise
        except NotDrawableError as error:
            self._off.add(name)
            _logger.info(f"No pictures of {name}: {error}")
        # Mappers, models and records of other projects can raise anything.
        except Exception:
            self._off.add(name)
            _logger.exception(f"No pictures of {name} from here on, because drawing failed:")

    def _draw_predictions(self, name: str) -> None:
        if evaluates_tiles(self._cfg):
            raise NotDrawableError("its images are evaluated in tiles (TEST.TILES), not drawn")
        if name not in self._chosen:
            loader = self.trainer.build_test_loader(self._cfg, name)
            self._chosen[name] = choose_samples(loader, name, self._cfg.LOGGING.PICTURES)
        model, tasks = self.trainer.model, enabled_tasks(self._cfg)
        num_classes = self._cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if isinstance(model, DistributedDataParallel):
            model = model.module  # the other ranks do not take part
        rows = [
            predictions_row(model, sample, record, described(name, num_classes), tasks)
            for sample, record in self._chosen[name]
        ]
        titles = ["image", *(title for task in tasks for title in (f"{task} gt", "prediction"))]
        if rows:
            self._show(name, rows, titles)

    def _draw_hard_examples(self) -> None:
        worst = self._hard_examples.take()
        if not worst:
            return
        samples = self.trainer.data_loader.dataset
        names = self._cfg.DATASETS.TRAIN
        metadata = described(names[0], self._cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        rows = []
        for loss, iteration, draws in worst:
            cells = [
                sample_cell(samples[draw], metadata, image_format_of(self._cfg))
                for draw in draws[:_MAX_SAMPLES]
            ]
            caption = f"loss {loss:.4g}", f"iteration {iteration}"
            rows.append([_text_cell(caption), *cells])
        length = max(len(row) for row in rows)
        rows = [row + [_BLANK] * (length - len(row)) for row in rows]
        self._show(_HARD_EXAMPLES, rows, ())

    def _show(self, name: str, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> None:
        folder = os.path.join(self._cfg.OUTPUT_DIR, "pictures", f"{self.trainer.iter:07d}")
        make_folder(folder)
        file_name = f"{re.sub(r'[^-.0-9A-Za-z]', '_', name)}.png"
        sheet = contact_sheet(rows, os.path.join(folder, file_name), titles)
        self.trainer.storage.put_image(f"pictures/{name}", sheet.transpose(2, 0, 1))


def choose_samples(loader: DataLoader, name: str, number: int) -> list[tuple[dict, dict]]:
    """Choose images of a data set, the same in every run.

    Args:
        loader: for inference on the data set.
        name: of the data set.
        number: of images, at most.

    Returns:
        The model's input and the record of each.

    Raises:
        NotDrawableError: the loader has other images than the data set, or records have no file.
    """
    records = DatasetCatalog.get(name)
    dataset: Any = loader.dataset
    if len(dataset) != len(records):
        raise NotDrawableError(f"the loader of {name} has {len(dataset)} of {len(records)} images")
    order = np.random.default_rng(0).permutation(len(records))[:number]
    chosen = []
    for i in sorted(order.tolist()):
        sample, record = dataset[i], records[i]
        if "file_name" not in record or sample.get("file_name") != record["file_name"]:
            raise NotDrawableError(
                f"image {i} of {name} is {record.get('file_name')!r} in the data set and "
                f"{sample.get('file_name')!r} in its loader"
            )
        chosen.append((sample, record))
    return chosen


def described(name: str, num_classes: int) -> Metadata:
    """Metadata with names for every task, though the data set may have them for one only.

    Args:
        name: of the data set.
        num_classes: of the model.

    Returns:
        Its metadata with `thing_classes`, `stuff_classes`, and `model_classes`, the names by the
        model's class.
    """
    stored = MetadataCatalog.get(name).as_dict()
    known = class_names(name) or stored.get("stuff_classes") or stored.get("thing_classes")
    classes = list(known or map(str, range(num_classes)))
    names = {key: stored.get(key) or classes for key in ("thing_classes", "stuff_classes")}
    return Metadata(**stored | names | {"model_classes": classes})


def predictions_row(
    model: nn.Module, sample: dict, record: dict, metadata: Metadata, tasks: Iterable[str]
) -> list[np.ndarray]:
    """An image, and ground truth and prediction of each task, (H, W, 3) each.

    The model predicts at the size of the drawing.

    Args:
        model: in any mode, which stays.
        sample: its input.
        record: of the data set.
        metadata: of the data set, see `described`.
        tasks: of TASKS, which the model's outputs contain.
    """
    original = read_colours(record["file_name"])
    record = record | {"height": original.shape[0], "width": original.shape[1]}
    image = shrink(original, _DRAWING_SIZE, enlarge=True)
    height, width = image.shape[:2]
    was_training = model.training
    try:
        with torch.no_grad():
            (outputs,) = model.eval()([sample | {"height": height, "width": width}])
    finally:
        # Detectron2's `inference_context` leaves it in evaluation after an error.
        model.train(was_training)
    row = [image]
    for task in tasks:
        row.append(_draw_any_gt(image, record, metadata, task))
        row.append(draw_prediction(image, outputs, metadata, task))
    return row


def _draw_any_gt(image: np.ndarray, record: dict, metadata: Metadata, task: str) -> np.ndarray:
    """The ground truth of a task, or else of another one; blank if there is none."""
    if task == "instance" and record.get("pan_seg_file_name") and "annotations" not in record:
        task = "panoptic"
        things = [s for s in record["segments_info"] if s.get("isthing", True)]
        record = record | {"segments_info": things}
    ignore_label = metadata.get("ignore_label", 255)
    for kind in (task, *TASKS):
        with isolated_rng(0):  # the visualizer picks random colours
            drawing = draw_gt(
                image,
                record,
                metadata,
                kind,
                classes=metadata.model_classes,
                ignore_label=ignore_label,
            )
        if drawing is not None:
            return drawing
    return _BLANK


def sample_cell(sample: dict, metadata: Metadata, image_format: str) -> np.ndarray:
    """A training sample as the model sees it, beside its targets, and the name of its file.

    Args:
        sample: `image` (C, H, W), and `instances` with `gt_classes` (T,) and `gt_masks`.
        metadata: see `described`.
        image_format: INPUT.FORMAT.

    Returns:
        (h, w, 3), smaller than the image.

    Raises:
        NotDrawableError: the sample has another form.
    """
    stored = sample.get("image")
    if "instances" not in sample or not isinstance(stored, Tensor) or stored.dim() != 3:
        raise NotDrawableError("a training sample is no image with instances")
    stored = stored.numpy().transpose(1, 2, 0)
    image = np.ascontiguousarray(as_colours(stored, image_format))
    image = shrink(image, _SAMPLE_SIZE, enlarge=True)
    height, width = image.shape[:2]
    instances = sample["instances"]
    masks = instances.gt_masks if len(instances) else torch.zeros(0, 1, 1)
    masks = torch.as_tensor(getattr(masks, "tensor", masks))
    rows = torch.arange(height) * masks.shape[1] // height
    columns = torch.arange(width) * masks.shape[2] // width
    masks = masks[:, rows[:, None], columns] > 0  # (T, h, w)
    seen = masks.flatten(1).any(1).nonzero()[:, 0].tolist()
    visualizer = make_visualizer(image, metadata)
    if seen:
        labels, classes = instances.gt_classes.tolist(), metadata.model_classes
        names = [classes[labels[i]] if labels[i] < len(classes) else str(labels[i]) for i in seen]
        with isolated_rng(0):
            visualizer.overlay_instances(masks=masks[seen].numpy(), labels=names)
    pair = np.concatenate([image, visualizer.output.get_image()], axis=1)
    file_name = os.path.basename(str(sample.get("file_name", "")))
    return np.concatenate([_text_cell([file_name], 2 * width), pair])


def _text_cell(lines: Sequence[str], width: int = 120) -> np.ndarray:
    font, height = ImageFont.load_default(size=13), 18
    cell = Image.new("RGB", (width, height * len(lines)), "white")
    draw = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        draw.text((0, i * height), line, fill="black", font=font)
    return np.asarray(cell)
