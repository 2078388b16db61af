"""Predicts many images, goes on after those that cannot be read, writes results and a report."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.class_counts import class_names
from ..data.class_labels import category_ids, colours_of
from ..data.datasets.colours import class_colours
from ..predictor import Predictor
from .filters import PredictionFilter
from .folder_results import FolderResults
from .html_report import HtmlReport
from .image_files import ImageFile
from .report_objects import UNITS, GroundTruth, predicted_objects
from .result import Result

# Instances of a lower score are not in the report, whose slider starts at a higher one.
_LEAST_SCORE = 0.1


class FolderRun:
    """One run over many images.

    Attributes:
        failed: images that could not be read or predicted, and why.
    """

    def __init__(
        self,
        predictor: Predictor,
        task: str,
        filter: PredictionFilter,
        *,
        batch_size: int = 1,
        tile_size: int | None = None,
        overlap: int | None = None,
        confidence_threshold: float = 0.5,
    ) -> None:
        """
        Args:
            predictor: of the model.
            task: of the report.
            filter: what to remove of each result.
            batch_size: images, or tiles, to predict at once.
            tile_size, overlap: of `Predictor.predict`.
            confidence_threshold: of instances, where the report's score filter stands at first.
        """
        self.failed: dict[Path, str] = {}
        self._predictor, self._task, self._filter = predictor, task, filter
        self._batch_size, self._threshold = batch_size, confidence_threshold
        self._tile_size, self._overlap = tile_size, overlap
        filter.check(predictor.class_names)  # before the first image
        self._gt: GroundTruth | None = None
        self._results: FolderResults | None = None
        self._report: HtmlReport | None = None
        self._notes: list[str] = []
        self._written: list[Path] = []

    def find_gt(self, dataset_name: str | None) -> None:
        """Look for ground truth.

        Args:
            dataset_name: registered; None: the first of DATASETS.TEST, which need not exist here.

        Raises:
            FileNotFoundError, ValueError: the data set that was named cannot be read, or has other
                classes than the model.
        """
        name = dataset_name or next(iter(self._predictor.cfg.DATASETS.TEST), None)
        if name is None:
            return
        try:
            gt = GroundTruth(name)
            self._require_classes(name)
        except (FileNotFoundError, ValueError) as error:
            if dataset_name is not None:
                raise
            self._notes.append(f"No ground truth: {error}")
            return
        self._gt = gt

    def _require_classes(self, name: str) -> None:
        classes = class_names(name)
        expected = self._predictor.class_names
        # Instance data may list the things only, which come first.
        if classes is not None and tuple(classes) != expected[: len(classes)]:
            raise ValueError(
                f"data set {name!r} has the classes {', '.join(classes[:5])}, ..., but the model "
                f"{', '.join(expected[:5])}, ..."
            )

    def save_results(self, folder: Path, kinds: Sequence[str]) -> None:
        """Write result files, see `FolderResults`, to a folder."""
        names, metadata = self._predictor.class_names, self._predictor.metadata
        things = metadata.get("thing_dataset_id_to_contiguous_id")
        all_things = range(len(names)) if metadata.get("stuff_classes") is None else ()
        self._results = FolderResults(
            folder,
            kinds,
            class_names=names,
            things=all_things if things is None else things.values(),
            category_ids=category_ids(metadata),
            known_image_ids=self._gt.image_ids() if self._gt else (),
        )

    @contextmanager
    def write_report(self, path: Path, title: str, num_images: int) -> Iterator[None]:
        """Write the HTML report of the images predicted in this context.

        Raises:
            WriteError: it cannot be written.
        """
        is_instance = self._task == "instance"
        notes = [f"Model: {self._predictor.cfg.MODEL.WEIGHTS}. Task: {self._task}."]
        if is_instance and self._least_score() > 0:
            notes.append(f"Instances with a score below {self._least_score():g} are left out.")
        names = self._predictor.class_names
        self._report = HtmlReport(
            path,
            title=title,
            classes=names,
            colours=self._colours(),
            num_images=num_images,
            score=self._threshold if is_instance else 0.0,
            unit=UNITS[self._task],
            notes=[*notes, *self._notes],
        )
        with self._report:
            yield
        self._written.append(path)

    def _least_score(self) -> float:
        return min(_LEAST_SCORE, self._threshold) if self._task == "instance" else 0.0

    def _colours(self) -> Sequence[Sequence[int]]:
        number = len(self._predictor.class_names)
        return colours_of(self._predictor.metadata, number) or class_colours(number)

    def results(
        self, images: Sequence[ImageFile], stems: Sequence[Path]
    ) -> Iterator[tuple[ImageFile, Result]]:
        """Predict, and write the results and the report.

        Args:
            images: to predict.
            stems: names of their files in the results, without suffix.

        Yields:
            Each image that could be predicted, with its result.

        Raises:
            WriteError: a file cannot be written.
        """
        counts = Counter(image.path.name for image in images)
        # Batches are of the tiles of one image, if there are tiles.
        size = self._batch_size if self._tile_size is None else 1
        with tqdm(total=len(images), desc="images", unit="image") as progress:
            for start in range(0, len(images), size):
                batch = images[start : start + size]
                outcomes = self._predict(batch)
                for image, stem, outcome in zip(
                    batch, stems[start : start + size], outcomes, strict=True
                ):
                    if isinstance(outcome, Result):
                        self._record(image, stem, outcome, counts[image.path.name] == 1)
                        yield image, outcome
                    else:
                        self._fail(image, outcome)
                progress.update(len(batch))

    def _predict(self, batch: Sequence[ImageFile]) -> list[Result | str]:
        try:
            return self._predictor.predict(
                [str(image.path) for image in batch],
                batch_size=self._batch_size,
                filter=self._filter,
                tile_size=self._tile_size,
                overlap=self._overlap,
                progress=self._tile_size is not None,
            )
        # Such as a damaged file, or too little memory for this image; the others may fit.
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            if len(batch) == 1:
                # The file is named beside the reason.
                reason = str(error).removeprefix(f"Image 0 ({batch[0].path}): ")
                return [reason.removeprefix("Image 0: ") or type(error).__name__]
        return [outcome for image in batch for outcome in self._predict([image])]

    def _fail(self, image: ImageFile, reason: str) -> None:
        self.failed[image.path] = reason
        if self._report is not None:
            self._report.add_broken(image.name.as_posix(), reason)

    def _record(self, image: ImageFile, stem: Path, result: Result, is_only: bool) -> None:
        record = self._gt.find(image.path, by_name=is_only) if self._gt else None
        if self._results is not None:
            image_id = None if record is None else record.get("image_id")
            self._results.add(stem, image.name.as_posix(), result, image_id)
        if self._report is not None:
            self._add_to_report(self._report, image, result, record)

    def _add_to_report(
        self, report: HtmlReport, image: ImageFile, result: Result, record: dict[str, Any] | None
    ) -> None:
        assert isinstance(result.image, np.ndarray)
        target = report.image_size(result.image_size)
        gt = None
        if self._gt is not None and record is not None:
            try:
                gt = self._gt.objects(record, self._task, result.image_size, target)
            except (OSError, ValueError) as error:
                report.add_broken(f"ground truth of {image.name.as_posix()}", str(error))
        predicted = predicted_objects(result, self._task, target, min_score=self._least_score())
        report.add(image.name.as_posix(), result.image, predicted, gt)

    def finish(self) -> list[Path]:
        """Write what is written at the end.

        Returns:
            The files and folders of results and report.

        Raises:
            WriteError: a file cannot be written.
        """
        results = self._results.finish() if self._results is not None else []
        return results + self._written
