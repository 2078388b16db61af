"""Writers for Weights & Biases and MLflow (LOGGING.WANDB, LOGGING.MLFLOW), off by default.

Both work without a network by default: Weights & Biases in its offline mode, into OUTPUT_DIR/wandb,
unless the environment variable WANDB_MODE says otherwise; MLflow into OUTPUT_DIR/mlruns, unless
MLFLOW_TRACKING_URI names a server or a database. They get what TensorBoard gets, and the config.

The number of a run is kept in OUTPUT_DIR, so that a resumed training continues its run. A tracker
that fails is turned off with a warning: it never ends a training.
"""

import importlib.util
import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from .best_checkpoint import Stopped
from .utils.files import atomic_write, make_folder

_logger = logging.getLogger(__name__)

# MLflow's limit for a request, and for a value.
_MAX_PARAMS, _MAX_METRICS, _MAX_TEXT = 100, 1000, 500


class TrackerWriter(EventWriter, ABC):
    """Sends scalars, pictures and the config to an experiment tracker.

    Pictures stay in the event storage for TensorBoard's writer, which removes them and must come
    after this one.
    """

    title: str
    key: str
    package: str

    def __init__(self, cfg: CfgNode, is_resumed: Callable[[], bool], window_size: int = 20) -> None:
        """
        Args:
            cfg: the config.
            is_resumed: whether training continues an earlier one; asked at the first write.
            window_size: metrics are medians over this number of iterations.
        """
        self._cfg = cfg
        self._is_resumed = is_resumed
        self._window_size = window_size
        self._last_write = -1
        self._last_picture = -1
        self._is_started = self._is_off = False

    def write(self) -> None:
        if self._is_off:
            return
        try:
            if not self._is_started:
                self._begin()
            self._write_scalars()
            self._write_pictures()
        # Packages of others, and networks, can raise anything.
        except Exception:
            self._turn_off("failed")

    def close(self) -> None:
        """End the run: finished, failed or killed, after the exception being handled."""
        if not self._is_started or self._is_off:
            return
        error = sys.exc_info()[1]
        if isinstance(error, Stopped):
            error = None
        try:
            self._end(error)
        except Exception:
            self._turn_off("could not end its run")
        self._is_off = True

    def _turn_off(self, what: str) -> None:
        self._is_off = True
        _logger.warning(
            f"{self.title} {what} and gets nothing from here on; training goes on, and metrics.json"
            f" and TensorBoard have everything. {self.key} False turns it off.",
            exc_info=True,
        )

    @property
    def _run_file(self) -> str:
        return os.path.join(self._cfg.OUTPUT_DIR, f"{self.package}_run_id.txt")

    def _begin(self) -> None:
        old = None
        if self._is_resumed() and os.path.exists(self._run_file):
            with open(self._run_file) as file:
                old = file.read().strip()
        make_folder(self._cfg.OUTPUT_DIR)
        run = self._start(old)
        self._is_started = True
        with atomic_write(self._run_file) as file:
            file.write(f"{run}\n")

    def _write_scalars(self) -> None:
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        for iteration in sorted(rows):
            self._put_scalars(rows[iteration], iteration)
            self._last_write = iteration

    def _write_pictures(self) -> None:
        # Detectron2 has no other access to them.
        waiting = get_event_storage()._vis_data
        for name, image, iteration in waiting:
            if iteration > self._last_picture:
                self._put_picture(name, np.asarray(image).transpose(1, 2, 0), iteration)
        self._last_picture = max([self._last_picture, *(entry[2] for entry in waiting)])

    @property
    def _run_name(self) -> str:
        return os.path.basename(os.path.abspath(self._cfg.OUTPUT_DIR))

    def _config(self) -> dict[str, Any]:
        return yaml.safe_load(self._cfg.dump())

    @abstractmethod
    def _start(self, old: str | None) -> str:
        """Start a run, or continue the one with the number `old`; returns its number."""

    @abstractmethod
    def _put_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """Send values by name."""

    @abstractmethod
    def _put_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """
        Args:
            name: of the series of pictures.
            image: (H, W, 3) RGB.
            iteration: when it was drawn.
        """

    @abstractmethod
    def _end(self, error: BaseException | None) -> None:
        """End the run: finished, or as failed or killed by the error."""


class WandbWriter(TrackerWriter):
    """Writes to Weights & Biases."""

    title, key, package = "Weights & Biases", "LOGGING.WANDB", "wandb"

    def _start(self, old: str | None) -> str:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # needs a network
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=self._cfg.LOGGING.PROJECT,
            name=self._run_name,
            id=old,
            resume="allow" if old else None,
            dir=self._cfg.OUTPUT_DIR,
            mode=mode,
            config=self._config(),
            # The log is in OUTPUT_DIR.
            settings=wandb.Settings(console="off", silent=True),
        )
        # A resumed run may repeat iterations, but W&B's own steps only grow.
        self._run.define_metric("*", step_metric="iteration")
        folder = os.path.dirname(self._run.dir)
        hint = f"; `wandb sync {folder}` uploads it" if mode == "offline" else ""
        _logger.info(f"Weights & Biases run {self._run.id}, mode {mode}{hint}")
        return self._run.id

    def _put_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars | {"iteration": iteration})

    def _put_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        self._run.log({name: self._wandb.Image(image), "iteration": iteration})

    def _end(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


class MlflowWriter(TrackerWriter):
    """Writes to MLflow, with mlflow or mlflow-skinny."""

    title, key, package = "MLflow", "LOGGING.MLFLOW", "mlflow"

    def _start(self, old: str | None) -> str:
        # Otherwise a server that does not answer stops training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"file:{os.path.abspath(os.path.join(self._cfg.OUTPUT_DIR, 'mlruns'))}"
            # MLflow prefers databases since version 3, but mlflow-skinny has none.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # needs a network
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        if old is not None:
            self._client.update_run(old, status="RUNNING")
            self._id = old
        else:
            project = self._cfg.LOGGING.PROJECT
            experiment = self._client.get_experiment_by_name(project)
            number = (
                self._client.create_experiment(project)
                if experiment is None
                else experiment.experiment_id
            )
            self._id = self._client.create_run(number, run_name=self._run_name).info.run_id
            # Parameters of a run cannot change: a resumed one keeps those of its start.
            params = [Param(k, str(v)[:_MAX_TEXT]) for k, v in flat(self._config())]
            for first in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + _MAX_PARAMS])
        self._client.log_text(self._id, self._cfg.dump(), "config.yaml")
        _logger.info(f"MLflow run {self._id} in {uri}")
        return self._id

    def _put_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        now = int(time.time() * 1000)
        metrics = [
            # MLflow refuses other characters, such as the brackets of "[metric]grad_scaler".
            self._metric(re.sub(r"[^-\w./ ]", "_", name), float(value), now, iteration)
            for name, value in scalars.items()
        ]
        for first in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MAX_METRICS])

    def _put_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        folder, _, rest = name.rpartition("/")
        path = f"{folder or 'pictures'}/{iteration:07d}/{re.sub(r'[^-.0-9A-Za-z]', '_', rest)}.png"
        self._client.log_image(self._id, image, artifact_file=path)

    def _end(self, error: BaseException | None) -> None:
        status = "FINISHED" if error is None else "FAILED"
        if isinstance(error, KeyboardInterrupt):
            status = "KILLED"
        self._client.set_terminated(self._id, status=status)


_WRITERS: tuple[tuple[type[TrackerWriter], str], ...] = (
    (WandbWriter, "wandb"),
    (MlflowWriter, "mlflow-skinny"),
)


def build_trackers(cfg: CfgNode, is_resumed: Callable[[], bool]) -> list[EventWriter]:
    """The writers that LOGGING turns on.

    Args:
        cfg: the config. A project with its own copy of `add_maskformer2_config` lacks LOGGING.
        is_resumed: see `TrackerWriter`.
    """
    return [writer(cfg, is_resumed) for writer, _ in _WRITERS if is_on(cfg, writer)]


def is_on(cfg: CfgNode, writer: type[TrackerWriter]) -> bool:
    """Whether the config turns a tracker on."""
    return cfg.get("LOGGING", {}).get(writer.key.rpartition(".")[2], False)


def check_trackers(cfg: CfgNode) -> None:
    """Check that the packages of the trackers that are on are installed.

    Raises:
        ValueError: one is not.
    """
    for writer, distribution in _WRITERS:
        # A folder of the same name, such as runs of Weights & Biases, is found but has no file.
        spec = importlib.util.find_spec(writer.package) if is_on(cfg, writer) else None
        if is_on(cfg, writer) and (spec is None or spec.origin is None):
            raise ValueError(
                f"{writer.key} is True, but the package {writer.package} is not installed: "
                f"`pip install {distribution}`, or set {writer.key} to False."
            )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
