"""Inference with a trained model: `Predictor(cfg)`, or from a folder that holds all it needs.

    from mask2former import PredictionFilter, Predictor

    predictor = Predictor.from_pretrained("output/model_final")
    result = predictor.predict("image.jpg", filter=PredictionFilter(min_score=0.5))
    print(result.names, result.scores)
    result.save("predictions")

H W pixels, C channels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import Mask2FormerCheckpointer
from .config import ExtendConfig
from .config_checks import check_config, check_once, check_parts
from .data.augmentations import ResizeShortestEdge
from .data.class_labels import class_names_of
from .data.formats.bands import as_colours, image_format_of
from .data.formats.images import read_image
from .data.formats.windows import from_array, open_image
from .fast.setup import apply_config
from .inference.filters import PredictionFilter
from .inference.input_images import KINDS, ChannelOrder, InputImage, is_single, read_input
from .inference.pretrained import find_pretrained
from .inference.result import Result
from .inference.tiles import predict_in_tiles, tile_overlap
from .preflight import check_device

# Batches after which an image no longer waits for others of its size.
_WAITING_BATCHES = 4


class Predictor(DefaultPredictor):
    """Detectron2's predictor, but checkpoints are checked and cannot execute code.

    Called with a BGR image, uint8 (H, W, 3), it returns the model's outputs: a dict with those of
    `sem_seg`, `panoptic_seg` and `instances` that the config turns on. With INPUT.FORMAT L or
    BANDS the image has the channels that `read` gives. `predict` takes images of any kind and
    returns `Result`s.

    Attributes:
        cfg: the config.
        model: in evaluation mode.
        metadata: class names, colours and ids of the data set.
        class_names: K names, by label.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: `MODEL.WEIGHTS` names the checkpoint, `DATASETS.TEST` the data set whose class
                names and colours become `metadata`.

        Raises:
            FileNotFoundError: the checkpoint does not exist.
            ValueError: no data set or no checkpoint is named, the checkpoint does not fit, or
                MODEL.DEVICE does not exist on this machine.
        """
        # Detectron2's __init__ is not called: it unpickles the checkpoint.
        check_once(cfg, "device", check_device)
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: name the data set whose classes to predict.")
        self._set_up(cfg, build_model(cfg), MetadataCatalog.get(cfg.DATASETS.TEST[0]))
        Mask2FormerCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        cfg: CfgNode,
        metadata: Metadata,
        class_names: Sequence[str] | None = None,
    ) -> "Predictor":
        """A predictor of a model that is built and has its weights.

        Args:
            model: takes and returns what `MaskFormer` does.
            cfg: the config that describes it.
            metadata: of the data set whose classes it predicts.
            class_names: K names; default: those of the metadata.
        """
        predictor = cls.__new__(cls)
        predictor._set_up(cfg, model, metadata, class_names)
        return predictor

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        device: str | None = None,
        opts: Sequence[Any] = (),
        extend_config: ExtendConfig | None = None,
    ) -> "Predictor":
        """Load a trained model with its config, class names and colours.

        Args:
            path: a folder that training wrote, OUTPUT_DIR/model_final or model_best; OUTPUT_DIR
                itself, for the best of them; a checkpoint with its config.yaml beside it; or a
                Mask2Former of the transformers package. See `inference/pretrained.py`.
            device: such as "cuda" or "cpu"; default: MODEL.DEVICE of `opts`, else a GPU if there
                is one.
            opts: overrides of the config, `KEY1 VALUE1 KEY2 VALUE2 ...`, such as
                `("INPUT.MIN_SIZE_TEST", 640)`.
            extend_config: adds config keys of another project in place, see `load_config`.

        Raises:
            FileNotFoundError: there is no model.
            ValueError: it is damaged, incomplete or of a newer version, an override is wrong, or
                the device does not exist.
        """
        saved = find_pretrained(os.path.expanduser(os.fspath(path)), opts, extend_config)
        cfg = saved.cfg
        cfg.MODEL.WEIGHTS = saved.path
        if device is not None or "MODEL.DEVICE" not in opts[::2]:
            cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_once(cfg, "config", check_config)
        check_once(cfg, "device", check_device)
        check_once(cfg, "parts", check_parts)
        model = build_model(cfg)
        if hasattr(model, "metadata"):
            # The data set itself need not exist here.
            model.metadata = saved.metadata
        predictor = cls.from_model(model, cfg, saved.metadata, saved.class_names)
        checkpointer = Mask2FormerCheckpointer(predictor.model)
        if saved.weights is None:
            checkpointer.load(saved.path)
        else:
            checkpointer.load_weights(saved.weights, saved.path)
        return predictor

    def _set_up(
        self,
        cfg: CfgNode,
        model: nn.Module,
        metadata: Metadata,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.cfg = cfg.clone()
        self.metadata = metadata
        if class_names is None:
            # DATASETS.TEST may name the things only of a model that predicts stuff too.
            trained = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN[:1]]
            num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            class_names = class_names_of([metadata, *trained], num_classes)
        self.class_names = tuple(class_names)
        self.model = model.eval()
        apply_config(self.cfg, self.model)
        self.aug = ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self.input_format = cfg.INPUT.FORMAT

    @property
    def _is_colour(self) -> bool:
        return self.input_format in ("RGB", "BGR")

    @property
    def image_format(self) -> str:
        """The format of `read_image` that this predictor is called with."""
        return "BGR" if self._is_colour else image_format_of(self.cfg)

    def read(self, file_name: str) -> np.ndarray:
        """Read an image as this predictor is called with it.

        Raises:
            FileNotFoundError, ValueError: see `read_image`.
        """
        return read_image(file_name, self.image_format)

    def colours(self, image: np.ndarray) -> np.ndarray:
        """The RGB image (H, W, 3) on which to draw the predictions for an image of `read`."""
        return as_colours(image, "BGR" if self._is_colour else self.input_format)

    def predict(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        filter: PredictionFilter | None = None,
        keep_image: bool = True,
        order: ChannelOrder = "RGB",
        tile_size: int | None = None,
        overlap: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Predict for one image or several.

        Args:
            source: an image, or an iterable of images. An image is a path; an image of Pillow of
                any mode; an array (H, W, 3) or, grey, (H, W); or a tensor (3, H, W). Arrays and
                tensors hold colours from 0 to 255 (uint8) or to 65535 (uint16) in `order`.
            batch_size: images that run together. Only images of one size at the model's input do,
                so that no padding changes what is predicted.
            filter: what to remove, see `PredictionFilter`; default: nothing.
            keep_image: whether results keep the image, to draw on.
            order: of the colours in arrays and tensors; "BGR" for images of OpenCV.
            tile_size: predict for each image in tiles of this height and width in pixels, for
                large images and crowds; each tile is resized as an image of its size would be.
                `batch_size` is then of tiles.
            overlap: pixels that neighbouring tiles share, see `predict_tiles`; default: a quarter
                of `tile_size`.
            progress: show a progress bar of the tiles of each image.

        Returns:
            A `Result`, or a list of them in the order of the images.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read; names the image.
        """
        options: dict[str, Any] = {"filter": filter, "keep_image": keep_image, "order": order}
        if tile_size is not None:
            overlap = tile_overlap(tile_size, overlap)
            options |= {"batch_size": batch_size, "progress": progress}
            options |= {"tile_size": tile_size, "overlap": overlap}
            self._check(source, batch_size, filter)
            if is_single(source):
                return self._predict_tiled(source, **options)
            return [self._predict_tiled(one, i, **options) for i, one in enumerate(source)]
        if overlap is not None or progress:
            raise ValueError("overlap and progress are of tiles: set tile_size too")
        if is_single(source):
            (result,) = self.stream([source], batch_size=batch_size, **options)
            return result
        return list(self.stream(source, batch_size=batch_size, **options))

    def stream(
        self,
        sources: Iterable[Any],
        *,
        batch_size: int = 1,
        filter: PredictionFilter | None = None,
        keep_image: bool = True,
        order: ChannelOrder = "RGB",
    ) -> Iterator[Result]:
        """Yield results one by one, in the order of the images, with few images in memory.

        Args, Raises: as of `predict`, which returns them as a list.
        """
        self._check(sources, batch_size, filter)
        if is_single(sources):
            sources = [sources]
        return self._stream(sources, batch_size, filter, keep_image, order)

    def _check(self, source: Any, batch_size: int, filter: PredictionFilter | None) -> None:
        """Check what does not depend on the images, before the first.

        Raises:
            ValueError: it is wrong.
        """
        if not is_single(source) and not isinstance(source, Iterable):
            raise ValueError(f"{type(source).__name__} is no image; allowed: {KINDS}, or several")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; allowed: whole numbers from 1 on")
        if filter is not None:
            if not isinstance(filter, PredictionFilter):
                raise ValueError(f"filter is {filter!r}; allowed: a PredictionFilter")
            filter.check(self.class_names)

    def _stream(
        self,
        sources: Iterable[Any],
        batch_size: int,
        filter: PredictionFilter | None,
        keep_image: bool,
        order: ChannelOrder,
    ) -> Iterator[Result]:
        waiting: dict[tuple[int, ...], list[tuple[int, InputImage, dict]]] = {}
        done: dict[int, Result] = {}
        next_index, longest_wait = 0, _WAITING_BATCHES * batch_size

        def run(size: tuple[int, ...]) -> None:
            batch = waiting.pop(size)
            for i, result in zip(
                [i for i, *_ in batch], self._predict_batch(batch, keep_image), strict=True
            ):
                done[i] = result if filter is None else result.filter(filter)

        for i, source in enumerate(sources):
            with _naming(i, source):
                image = read_input(source, self.image_format, order)
            inputs = self._inputs(image.pixels)
            size = tuple(inputs["image"].shape)
            waiting.setdefault(size, []).append((i, image, inputs))
            if len(waiting[size]) == batch_size:
                run(size)
            # What has waited longest, so that the results after it can be yielded.
            while waiting and i - min(x[0][0] for x in waiting.values()) >= longest_wait:
                run(min(waiting, key=lambda size: waiting[size][0][0]))
            while next_index in done:
                yield done.pop(next_index)
                next_index += 1
        for size in list(waiting):
            run(size)
        for i in sorted(done):
            yield done[i]

    def _predict_tiled(
        self,
        source: Any,
        number: int = 0,
        *,
        filter: PredictionFilter | None,
        keep_image: bool,
        order: ChannelOrder,
        **options: Any,
    ) -> Result:
        if filter is not None:
            # Unsure instances of all tiles together may not fit into memory.
            options["min_score"] = filter.least_score(self.class_names)
        with ExitStack() as stack:
            with _naming(number, source):
                if isinstance(source, str | os.PathLike):
                    name: str | None = os.fspath(source)
                    image = stack.enter_context(open_image(os.fspath(source), self.image_format))
                else:
                    pixels, name = read_input(source, self.image_format, order)
                    image = from_array(pixels)
            result = predict_in_tiles(self, image, file_name=name, keep_image=keep_image, **options)
        return result if filter is None else result.filter(filter)

    def outputs(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        """The model's outputs for images (H, W, C) of `read`, of one size; segments have scores."""
        with torch.inference_mode(), _segment_scores(self.model):
            return self.model([self._inputs(image) for image in images])

    def _inputs(self, image: np.ndarray) -> dict[str, Any]:
        """What the model takes for an image (H, W, C) of `read`."""
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    def _predict_batch(
        self, batch: list[tuple[int, InputImage, dict]], keep_image: bool
    ) -> Iterator[Result]:
        with torch.inference_mode(), _segment_scores(self.model):
            outputs = self.model([inputs for *_, inputs in batch])
        for (_, image, _), output in zip(batch, outputs, strict=True):
            yield Result.from_outputs(
                output,
                self.metadata,
                class_names=self.class_names,
                file_name=image.file_name,
                image=np.ascontiguousarray(self.colours(image.pixels)) if keep_image else None,
            )


@contextmanager
def _naming(number: int, source: Any) -> Iterator[None]:
    """In this context errors of reading name the image by its number too."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Image {number}: {error}") from error
    except ValueError as error:
        raise ValueError(f"Image {number}{_named(source)}: {error}") from error


@contextmanager
def _segment_scores(model: Any) -> Iterator[None]:
    """In this context panoptic segments of a `MaskFormer` have scores; otherwise as upstream."""
    before = getattr(model, "segment_scores", False)
    model.segment_scores = True
    try:
        yield
    finally:
        model.segment_scores = before


def _named(source: Any) -> str:
    """The file of an image, for errors that may not name it."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "filename", "")
    return f" ({os.fspath(name)})" if name else ""
