"""Writers of a training's metrics: Detectron2's, with errors that name the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)

from .utils.files import explained_write_errors, make_folder


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Build the writers of Detectron2's `default_writers`: terminal, metrics.json, TensorBoard.

    Args:
        output_dir: created if missing.
        max_iter: number of iterations, to estimate the remaining time.

    Raises:
        WriteError: a file cannot be written.
    """
    make_folder(output_dir)
    return [
        CommonMetricPrinter(max_iter),
        MetricsWriter(os.path.join(output_dir, "metrics.json")),
        EventsWriter(output_dir),
    ]


class MetricsWriter(JSONWriter):
    """Appends whole lines only, to a file that must still exist."""

    _file_handle: IO[str]
    _last_write: int

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: extended if it exists.
            window_size: metrics are medians over this number of iterations.

        Raises:
            WriteError: the file cannot be written.
        """
        with explained_write_errors(json_file):
            super().__init__(json_file, window_size)
            # Opened for each `write`.
            self._file_handle.close()
            _cut_torn_line(json_file)
        self._path = json_file

    def write(self) -> None:
        last_write = self._last_write
        try:
            with explained_write_errors(self._path), _append_or_undo(self._path) as file:
                self._file_handle = file
                super().write()
        except BaseException:
            self._last_write = last_write
            raise


class EventsWriter(TensorboardXWriter):
    """Writes events at once: errors show up here, and a killed run loses none."""

    def __init__(self, log_dir: str, window_size: int = 20) -> None:
        """
        Args:
            log_dir: folder of the events.
            window_size: metrics are medians over this number of iterations.
        """
        super().__init__(log_dir, window_size)
        self._path = os.path.join(log_dir, "events.out.tfevents.*")

    def write(self) -> None:
        with explained_write_errors(self._path):
            super().write()
            self._writer.flush()

    def close(self) -> None:
        with explained_write_errors(self._path):
            super().close()


def _cut_torn_line(path: str) -> None:
    """Remove what follows the last line break: a run was killed while it wrote this."""
    with open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


@contextmanager
def _append_or_undo(path: str) -> Iterator[IO[str]]:
    """Append to an existing file what the block writes, all of it or nothing."""
    # Unlike "a", does not create a file that was deleted.
    file = open(path, "r+")
    size = file.seek(0, os.SEEK_END)
    try:
        with file:
            yield file
    except BaseException:
        with suppress(OSError):
            os.truncate(path, size)
        raise
