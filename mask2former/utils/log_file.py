"""The log file of a run: it holds the warnings of the checks that come before it, too.

If it cannot be written, the run ends with an error that names it.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .files import explained_write_errors

_LOGGERS = ("detectron2", "fvcore", "mask2former")
# Detectron2's, of rank 0; others append theirs.
_FILE = "log.txt"


@contextlib.contextmanager
def checked_log_file() -> Iterator[None]:
    """Set up Detectron2's loggers in the block; their file's errors are raised from its end on.

    Detectron2's handlers print a traceback for each line that cannot be written, and one more when
    the process ends, after the error that ended the run.

    Raises:
        WriteError: lines of the block cannot be written.
    """
    try:
        yield
    finally:
        for logger in map(logging.getLogger, _LOGGERS):
            for handler in logger.handlers[:]:
                if type(handler) is logging.StreamHandler and _is_log_file(handler.stream):
                    checked = _CheckedHandler(handler.stream)
                    checked.setLevel(handler.level)
                    checked.setFormatter(handler.formatter)
                    logger.removeHandler(handler)
                    logger.addHandler(checked)
                    checked.flush()


@contextlib.contextmanager
def kept_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect the warnings of the block, which comes before the log file is set up.

    So are lines of loggers of a lower level of their own, such as what a data set of yours has.
    They are printed as well. For `write_to_log_file`, also in a process spawned later; none if
    there is a log file already.
    """
    logger = logging.getLogger("mask2former")
    if _log_files():
        yield []
        return
    collector = _Collector(logging.lastResort if not logger.hasHandlers() else None)
    logger.addHandler(collector)
    try:
        yield collector.records
    finally:
        logger.removeHandler(collector)


def write_to_log_file(records: Iterable[logging.LogRecord]) -> None:
    """Write records to the log file only, if there is one.

    Raises:
        WriteError: it cannot be written.
    """
    for handler in _log_files():
        for record in records:
            handler.handle(record)


def _log_files() -> list[logging.Handler]:
    return [
        handler
        for handler in logging.getLogger("mask2former").handlers
        if isinstance(handler, logging.StreamHandler) and _is_log_file(handler.stream)
    ]


class _Collector(logging.Handler):
    def __init__(self, printer: logging.Handler | None) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []
        self._printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        # Arguments may be anything, which spawned processes cannot get.
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)
        if self._printer is not None:
            self._printer.handle(record)


def _is_log_file(stream: Any) -> bool:
    name = getattr(stream, "name", None)
    return isinstance(name, str) and os.path.basename(name).startswith(_FILE)


class _CheckedHandler(logging.StreamHandler):
    def flush(self) -> None:
        if self.stream.closed:
            return
        with explained_write_errors(self.stream.name):
            try:
                super().flush()
            except OSError:
                # Else what is buffered would be tried again at the end of the process.
                self.stream.buffer.raw.close()
                raise

    def emit(self, record: logging.LogRecord) -> None:
        # After an error, which has been raised.
        if not self.stream.closed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        # A record of an exception comes before that exception.
        elif record.exc_info is None:
            raise error
