"""Video files in and out: frames, size, rate, sound, and what is left after errors."""

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from mask2former.inference.video import (
    CODECS,
    VideoReader,
    VideoWriter,
    add_audio,
    can_show_windows,
)
from mask2former.utils.files import WriteError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
SIZE = 48, 64


def frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Red at the left, and the brighter the later at the right."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2, 0] = 200
    pixels[:, size[1] // 2 :] = 40 * number
    return pixels


def write_clip(path: Path, number: int = 5, fps: float = 12.5, size=SIZE) -> Path:
    with VideoWriter(path, size, fps) as writer:
        for i in range(number):
            writer.write(frame(i, size))
    return path


def streams(path: Path) -> list[str]:
    """Kinds of the streams of a file, by ffmpeg itself."""
    described = subprocess.run(["ffmpeg", "-hide_banner", "-i", path], capture_output=True)
    return re.findall(r"Stream #.*: (\w+): ", described.stderr.decode())


def add_tone(video: Path, target: Path, seconds: float = 0.4, codec: str = "aac") -> Path:
    tone = ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}"]
    command = ["ffmpeg", "-y", "-loglevel", "error", "-i", video, *tone, "-c:v", "copy"]
    subprocess.run([*command, "-c:a", codec, target], check=True)
    return target


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_size_and_rate_are_kept(tmp_path, suffix):
    path = write_clip(tmp_path / f"käse 100%d{suffix.upper()}")
    with VideoReader(path) as reader:
        assert (reader.size, reader.num_frames) == (SIZE, 5)
        assert reader.fps == pytest.approx(12.5)
        frames = list(reader)
    assert [one.shape for one in frames] == [(*SIZE, 3)] * 5
    for i, one in enumerate(frames):  # in order, RGB, up to compression
        assert np.abs(one.astype(int) - frame(i)).mean() < 8
    assert os.listdir(tmp_path) == [path.name]


def test_odd_size_is_padded_and_said(tmp_path, caplog):
    path = write_clip(tmp_path / "odd.mp4", size=(49, 65))
    assert "odd.mp4 has frames of 66 x 50 instead of 65 x 49" in caplog.text
    with VideoReader(path) as reader:
        assert reader.size == (50, 66)
        last = list(reader)[-1]
    assert np.abs(last[-1].astype(int) - last[-2]).mean() < 8


# ---- sound ----


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])  # copied; encoded anew
def test_sound_is_kept(tmp_path, suffix):
    source = add_tone(write_clip(tmp_path / "silent.mp4"), tmp_path / "-a:b 'c'.mp4")
    target = tmp_path / f"out{suffix}"
    with VideoReader(source) as reader:
        with VideoWriter(target, reader.size, reader.fps, audio_from=source) as writer:
            for one in reader:
                writer.write(one)
    assert streams(target) == ["Video", "Audio"]
    with VideoReader(target) as reader:
        assert (len(list(reader)), reader.size) == (5, SIZE)
    assert not list(tmp_path.glob("*.tmp*"))


@needs_ffmpeg
def test_video_without_sound_stays_as_it_is(tmp_path, caplog):
    source, target = write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "b.mp4")
    before = target.read_bytes()
    assert not add_audio(target, source, seconds=1)
    assert target.read_bytes() == before and not caplog.records


@needs_ffmpeg
def test_sound_that_cannot_be_added_is_said(tmp_path, caplog):
    source = add_tone(write_clip(tmp_path / "a.mp4"), tmp_path / "b.mp4")
    target = tmp_path / "damaged.mp4"
    target.write_bytes(b"no video")
    assert not add_audio(target, source, seconds=1)
    assert re.search(r"without sound: ffmpeg cannot add that of \S+b.mp4: .+", caplog.text)
    assert target.read_bytes() == b"no video"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4", "damaged.mp4"]


def test_missing_ffmpeg_is_said(tmp_path, caplog, monkeypatch):
    source = write_clip(tmp_path / "a.mp4")
    monkeypatch.setenv("PATH", str(tmp_path))
    with VideoWriter(tmp_path / "b.mp4", SIZE, 10, audio_from=source) as writer:
        writer.write(frame(0))
    assert "written without sound: ffmpeg is not installed" in caplog.text
    assert VideoReader(tmp_path / "b.mp4").num_frames == 1


# ---- errors ----


def test_broken_and_empty_videos(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    empty = tmp_path / "empty.avi"
    write_clip(empty, number=0)
    cut = tmp_path / "cut.mp4"  # its index is at the end
    cut.write_bytes(write_clip(tmp_path / "whole.mp4").read_bytes()[:-300])
    with pytest.raises(FileNotFoundError, match=r"none.mp4 does not exist"):
        VideoReader(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read as a video"):
        VideoReader(text)
    with pytest.raises(ValueError, match=r"cut.mp4 cannot be read as a video"):
        VideoReader(cut)
    with pytest.raises(ValueError, match=r"empty.avi (has no frame|cannot be read)"):
        VideoReader(empty)
    with pytest.raises(FileNotFoundError, match=r"camera 999 cannot be opened"):
        VideoReader(999)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8)


def test_early_end_is_said(tmp_path, caplog):
    path = tmp_path / "clip.avi"
    with VideoWriter(path, SIZE, 10) as writer:
        for i in range(50):
            writer.write(noise(i))
    damaged = bytearray(path.read_bytes())
    half, index = len(damaged) // 2, len(damaged) - 2000
    damaged[half:index] = bytes(index - half)
    path.write_bytes(damaged)
    with VideoReader(path) as reader:
        number = len(list(reader))
    assert 0 < number < 50
    assert f"{number} frames could be decoded, its container says 50" in caplog.text


def test_unknown_container(tmp_path):
    with pytest.raises(ValueError, match=r"a.wmv: a video is written as one of .mp4, .m4v"):
        VideoWriter(tmp_path / "a.wmv", SIZE, 10)
    assert os.listdir(tmp_path) == []


def test_interrupt_leaves_no_file_and_keeps_an_old_one(tmp_path):
    for name in ("old.mp4", "new.mp4"):
        if name == "old.mp4":
            (tmp_path / name).write_text("before")
        with pytest.raises(KeyboardInterrupt):
            with VideoWriter(tmp_path / name, SIZE, 10) as writer:
                writer.write(frame(0))
                raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_text() == "before"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk(tmp_path):
    (tmp_path / "a.tmp.mp4").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"Cannot write \S+a.mp4"):
        with VideoWriter(tmp_path / "a.mp4", SIZE, 10) as writer:
            for i in range(5):
                writer.write(frame(i))
    assert os.listdir(tmp_path) == []


def test_file_that_opencv_could_not_complete(tmp_path):
    """OpenCV itself says nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(WriteError, match=r"Cannot write \S+a.mp4: the video is incomplete"):
        with VideoWriter(tmp_path / "a.mp4", SIZE, 10) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                for i in range(30):
                    writer.write(noise(i))
                writer._writer.release()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_windows_are_known():
    """What OpenCV says of itself is what it does."""
    if can_show_windows():
        pytest.skip("this OpenCV has windows, and may not have a display")
    with pytest.raises(cv2.error, match="not implemented"):
        cv2.imshow("a", frame(0))
