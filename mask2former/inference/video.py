"""Video files and cameras in, video files out, by OpenCV; sound by ffmpeg where it is installed.

H, W: size of a frame in pixels. Frames are RGB, uint8.

OpenCV writes a constant frame rate and no sound. Its wheels contain no H.264 encoder: the codecs
below are those that every wheel can write. Browsers play `.webm`, not MPEG-4 in the others.
"""

import logging
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from ..utils.files import WriteError, explained_write_errors

# Container → codec.
CODECS = {
    ".mp4": "mp4v",
    ".m4v": "mp4v",
    ".mov": "mp4v",
    ".mkv": "mp4v",
    ".avi": "XVID",
    ".webm": "VP80",
}
# Frames per second where the source does not say.
DEFAULT_FPS = 30.0
# Containers without an index estimate the number of frames from the duration.
_FRAME_TOLERANCE = 0.02

_logger = logging.getLogger(__name__)


class VideoReader:
    """The frames of a video file or camera, as shown: rotated as a phone's video says.

    Attributes:
        name: of the source, for messages.
        size: (H, W).
        fps: frames per second; `DEFAULT_FPS` if the source does not say.
        num_frames: what the container says; None for cameras and where it does not say.
    """

    def __init__(self, source: str | os.PathLike | int) -> None:
        """
        Args:
            source: a local file, or the index of a camera.

        Raises:
            FileNotFoundError: the file or camera does not exist.
            ValueError: it is no video, or has no frame.
        """
        if isinstance(source, int):
            self.name = f"camera {source}"
            self._capture = cv2.VideoCapture(source)
            if not self._capture.isOpened():
                self._capture.release()
                raise FileNotFoundError(
                    f"{self.name} cannot be opened: no such camera, no permission, or another "
                    "program uses it. --webcam takes another index."
                )
        else:
            self.name = os.fspath(source)
            if not os.path.isfile(self.name):
                raise FileNotFoundError(f"{self.name} does not exist or is not a file")
            # Other backends would take a name with % for a sequence of images.
            self._capture = cv2.VideoCapture(self.name, cv2.CAP_FFMPEG)
            if not self._capture.isOpened():
                self._capture.release()
                raise ValueError(
                    f"{self.name} cannot be read as a video: it is damaged, not a video, or of a "
                    "codec that this OpenCV lacks"
                )
        self._next = self._read()
        if self._next is None:
            self.close()
            raise ValueError(f"{self.name} has no frame that can be decoded")
        self.size = self._next.shape[:2]
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self._knows_fps = math.isfinite(fps) and fps > 0
        self.fps = fps if self._knows_fps else DEFAULT_FPS
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        is_file = not isinstance(source, int)
        self.num_frames = int(count) if is_file and 0 < count < 2**31 else None
        if is_file and not self._knows_fps:
            _logger.warning(f"{self.name} does not say its frame rate: {DEFAULT_FPS:g} is assumed")

    def _read(self) -> np.ndarray | None:
        is_read, frame = self._capture.read()
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if is_read else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames (H, W, 3) that are left.

        Logs a warning if decoding ends clearly before what the container says.

        Raises:
            ValueError: the size of a frame differs.
        """
        number = 0
        while self._next is not None:
            frame, self._next = self._next, None
            if frame.shape[:2] != self.size:
                raise ValueError(
                    f"{self.name}: frame {number} has (height, width) {frame.shape[:2]}, those "
                    f"before {self.size}"
                )
            number += 1
            yield frame
            self._next = self._read()
        expected = self.num_frames or 0
        if expected - number > max(1, _FRAME_TOLERANCE * expected):
            _logger.warning(
                f"{self.name}: {number} frames could be decoded, its container says {expected}. "
                "The file may be damaged."
            )

    def close(self) -> None:
        self._capture.release()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoWriter:
    """Writes a video; it appears under its name only when it is complete.

    Codecs need an even height and width: the last row or column of odd frames is written twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int],
        fps: float,
        *,
        audio_from: str | os.PathLike | None = None,
    ) -> None:
        """
        Args:
            path: the file, its suffix one of `CODECS`; an existing one is replaced.
            size: (H, W) of the frames.
            fps: frames per second.
            audio_from: a video whose sound is kept, from its start.

        Raises:
            ValueError: another suffix, or OpenCV cannot write it.
            WriteError: the file cannot be written.
        """
        self.path = Path(path)
        require_container(self.path)
        self.size, self.fps, self.num_frames = size, fps, 0
        self._audio_from = audio_from
        self._temporary = self.path.with_name(f"{self.path.stem}.tmp{self.path.suffix}")
        try:
            with explained_write_errors(str(self.path)):
                # OpenCV does not tell why it cannot open or fill a file.
                self._temporary.write_bytes(bytes(2**16))
        except WriteError:
            self.discard()
            raise
        codec = CODECS[self.path.suffix.lower()]
        self._padding = size[0] % 2, size[1] % 2
        height, width = (length + odd for length, odd in zip(size, self._padding, strict=True))
        if any(self._padding):
            _logger.warning(
                f"{self.path} has frames of {width} x {height} instead of {size[1]} x {size[0]}: "
                "video codecs need even sizes"
            )
        self._writer = cv2.VideoWriter(
            str(self._temporary),
            cv2.CAP_FFMPEG,
            cv2.VideoWriter.fourcc(*codec),
            fps,
            (width, height),
        )
        if not self._writer.isOpened():
            self.discard()
            raise ValueError(
                f"OpenCV cannot write {self.path} with the codec {codec} at {fps:g} frames per "
                f"second: choose another of {', '.join(CODECS)}."
            )

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3)."""
        assert frame.shape == (*self.size, 3), (frame.shape, self.size)
        if any(self._padding):
            frame = np.pad(frame, [(0, self._padding[0]), (0, self._padding[1]), (0, 0)], "edge")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.num_frames += 1

    def finish(self) -> None:
        """Complete the file, with sound if there is any, and give it its name.

        Raises:
            WriteError: OpenCV has not written what it was given, such as on a full disk.
        """
        self._writer.release()
        try:
            self._require_complete()
            if self._audio_from is not None:
                add_audio(self._temporary, self._audio_from, seconds=self.num_frames / self.fps)
                self._require_complete()
            with explained_write_errors(str(self.path)):
                os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise

    def _require_complete(self) -> None:
        # OpenCV reports no error of writing.
        capture = cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG)
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT) if capture.isOpened() else 0
        capture.release()
        if count < self.num_frames - 1:  # estimated in some containers
            raise WriteError(
                f"Cannot write {self.path}: the video is incomplete, perhaps for lack of space. "
                "Free space there, or choose another folder."
            )

    def discard(self) -> None:
        """Remove what was written; nothing appears under the file's name."""
        writer = getattr(self, "_writer", None)
        if writer is not None:
            writer.release()
        with suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def require_container(path: Path) -> None:
    """
    Raises:
        ValueError: the suffix is not one of `CODECS`.
    """
    if path.suffix.lower() not in CODECS:
        raise ValueError(f"{path}: a video is written as one of {', '.join(CODECS)}")


def can_show_windows() -> bool:
    """Whether this OpenCV was built with windows, which the headless packages are not."""
    gui = re.search(r"^\s*GUI:\s*(\S+)", cv2.getBuildInformation(), re.M)
    return gui is not None and gui[1] != "NONE"


# ---- sound ----


def add_audio(video: Path, source: str | os.PathLike, *, seconds: float) -> bool:
    """Add the sound of another video, by ffmpeg; one log line says if that is not possible.

    The sound is copied, or encoded anew where the container does not take its codec.

    Args:
        video: the file to add it to, replaced when all went well.
        source: the video with the sound.
        seconds: of sound, from the start.

    Returns:
        Whether the file has sound now.
    """
    if shutil.which("ffmpeg") is None:
        _logger.warning(
            "The video is written without sound: ffmpeg is not installed. With ffmpeg on the PATH "
            "the sound of the input, if any, is kept."
        )
        return False
    source = os.path.abspath(source)
    if not _has_audio(source):
        return False
    target = video.with_name(f"{video.stem}.audio{video.suffix}")
    # file: — a name such as a:b.mp4 would be taken for a protocol.
    command = ["ffmpeg", "-nostdin", "-y", "-loglevel", "error", "-i", f"file:{video.absolute()}"]
    command += ["-t", f"{seconds:.6f}", "-i", f"file:{source}", "-map", "0:v:0", "-map", "1:a"]
    problem = ""
    try:
        for codecs in (["-c", "copy"], ["-c:v", "copy"]):
            result = subprocess.run(
                [*command, *codecs, f"file:{target.absolute()}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            if result.returncode == 0:
                os.replace(target, video)
                return True
            lines = result.stderr.decode(errors="replace").strip().splitlines()
            problem = lines[-1] if lines else f"status {result.returncode}"
    finally:
        with suppress(OSError):
            target.unlink()
    _logger.warning(
        f"The video is written without sound: ffmpeg cannot add that of {source}: {problem}"
    )
    return False


def _has_audio(path: str) -> bool:
    # Without output file ffmpeg describes the input and fails.
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-i", f"file:{path}"]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return re.search(rb"^\s*Stream #.*: Audio:", result.stderr, re.M) is not None
