"""Predicts the frames of a video or camera, and writes or shows drawings of them."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..predictor import Predictor
from .filters import PredictionFilter
from .result import Result
from .video import VideoReader, VideoWriter


def predict_video(
    predictor: Predictor,
    source: Path | int,
    tasks: Sequence[str],
    targets: Mapping[str, Path],
    *,
    draw: Callable[[Result, str], np.ndarray],
    show: Callable[[str, np.ndarray], bool],
    filter: PredictionFilter | None = None,
    max_frames: int | None = None,
    batch_size: int = 1,
    tile_size: int | None = None,
    overlap: int | None = None,
) -> dict[str, int]:
    """Predict frame by frame.

    A recording of a camera ends with Ctrl-C and is kept; other videos are then discarded.

    Args:
        predictor: of the model.
        source: file, or index of a camera.
        tasks: to draw.
        targets: task → video to write; without any, frames are shown.
        draw: (result, task) → RGB uint8 (H, W, 3) of the size of the frame.
        show: (title, drawing) → whether to go on.
        filter: what to remove of each result.
        max_frames: stop after so many frames.
        batch_size, tile_size, overlap: of `Predictor.predict`, which batches tiles of a frame.

    Returns:
        Task → number of frames written.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, WriteError: nothing is left of the targets.
    """
    is_camera = isinstance(source, int)
    with VideoReader(source) as reader, ExitStack() as stack:
        audio = None if isinstance(source, int) else source
        writers = {
            task: stack.enter_context(VideoWriter(path, reader.size, reader.fps, audio_from=audio))
            for task, path in targets.items()
        }
        total = min((n for n in (reader.num_frames, max_frames) if n), default=None)
        frames = itertools.islice(reader, max_frames)
        clock = _recording_clock(reader.fps) if is_camera else itertools.repeat(1)
        try:
            for frame in tqdm(frames, total=total, desc=Path(reader.name).name, unit="frame"):
                result = predictor.predict(
                    frame,
                    filter=filter,
                    batch_size=batch_size,
                    tile_size=tile_size,
                    overlap=overlap,
                )
                repeats = next(clock)
                for task in tasks:
                    drawing = draw(result, task)
                    if writers:
                        for _ in range(repeats):
                            writers[task].write(drawing)
                    elif not show(f"{reader.name} {task}", drawing):
                        return {}
        except KeyboardInterrupt:
            if not is_camera:
                raise
    return {task: writer.num_frames for task, writer in writers.items()}


def _recording_clock(fps: float) -> Iterator[int]:
    """How often to write each frame, so that the video is as long as the recording."""
    start, written = time.monotonic(), 0
    while True:
        number = max(0 if written else 1, round((time.monotonic() - start) * fps) - written)
        written += number
        yield number
