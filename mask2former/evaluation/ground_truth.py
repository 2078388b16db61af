"""The ground truth as evaluators read it, also read before a run, so that mistakes show up early.

check_ground_truth(cfg, name)   before the first iteration
read_coco, read_panoptic        in the evaluators
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..data.datasets.checks import is_loaded_coco
from ..data.datasets.loading import check_png, read_registered_instances
from ..data.evaluator_types import builders_of
from ..data.formats.coco_instances import read_instances
from ..data.formats.coco_panoptic import Panoptic, read_panoptic
from ..data.formats.coco_schemas import COCO_JSON, DETECTRON2_COCO_GT, LVIS_EVALUATION_JSON
from ..data.formats.findings import Findings
from ..data.formats.images import Header, is_panoptic_mode, read_header, wrong_panoptic_mode
from ..data.loader import explained_dataset_errors
from .semantic_evaluation import LabelReader

# Evaluator types whose instances are those of the COCO `json_file`, and whose panoptic annotations
# those of `panoptic_json`.
_COCO_INSTANCES = (
    "coco",
    "coco_panoptic_seg",
    "ade20k_panoptic_seg",
    "mapillary_vistas_panoptic_seg",
)
_COCO_PANOPTIC = (*_COCO_INSTANCES[1:], "cityscapes_panoptic_seg")
# Modes of more than one channel.
_COLOURS = ("RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# Images whose pixels are checked before a run.
_NUM_SAMPLES = 16
# Threads that read the headers of image files.
_NUM_THREADS = 8


def check_ground_truth(cfg: CfgNode, dataset_name: str) -> None:
    """Read the ground truth of a test set as its evaluators will, but few pixels.

    Args:
        cfg: reads MODEL.MASK_FORMER.TEST.
        dataset_name: registered name of known evaluator type.

    Raises:
        FileNotFoundError, ValueError: the ground truth cannot be used.
    """
    tasks = builders_of(cfg, dataset_name)
    with explained_dataset_errors([dataset_name]):
        records = DatasetCatalog.get(dataset_name)
        assert len(records), f"Dataset {dataset_name!r} is empty"
    metadata = MetadataCatalog.get(dataset_name)
    if "INSTANCE_ON" in tasks and metadata.evaluator_type in _COCO_INSTANCES:
        json_file = metadata.get("json_file")
        if json_file:
            read_coco(json_file, metadata.get("image_root", ""), dataset_name)
    if "INSTANCE_ON" in tasks and metadata.evaluator_type == "lvis":
        _check_lvis(metadata)
    if "PANOPTIC_ON" in tasks and metadata.evaluator_type in _COCO_PANOPTIC:
        read_panoptic_gt(metadata)
    if isinstance(records, list):
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for problem in pool.map(_file_problem, records):
                if problem is not None:
                    raise ValueError(f"Data set {dataset_name!r} cannot be evaluated: {problem}.")
        if metadata.evaluator_type in ("sem_seg", "cityscapes_sem_seg", *_COCO_INSTANCES):
            _check_samples(records, metadata, tasks)


def _check_lvis(metadata: Metadata) -> None:
    """Check that a LVIS JSON has what the official evaluation reads.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    findings = Findings()
    read_registered_instances(
        metadata.json_file, metadata.image_root, metadata, findings, LVIS_EVALUATION_JSON
    )
    findings.raise_first(metadata.name)


def _check_samples(records: list[dict[str, Any]], metadata: Metadata, tasks: Iterable[str]) -> None:
    """Check the values of a few label maps and panoptic PNGs, spread over the data set.

    Raises:
        ValueError: one has labels or segments that the data set does not list.
    """
    for record in records[:: max(1, len(records) // _NUM_SAMPLES)][:_NUM_SAMPLES]:
        if "PANOPTIC_ON" in tasks and PathManager.isfile(record.get("pan_seg_file_name", "")):
            check_png(record, metadata.panoptic_json)
        label_map = record.get("sem_seg_file_name", "")
        if "SEMANTIC_ON" in tasks and PathManager.isfile(label_map):
            LabelReader(metadata)(label_map)


def _file_problem(record: dict[str, Any]) -> str | None:
    """What the headers of the files of a record say against evaluating it."""
    headers: dict[str, Header] = {}
    for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
        file = record.get(key)
        # Loaders of other projects may keep images elsewhere; those here have checked that files
        # exist.
        if isinstance(file, str) and PathManager.isfile(file):
            try:
                headers[key] = read_header(file)
            except (OSError, ValueError) as error:
                return str(error)
    for key in ("pan_seg_file_name", "sem_seg_file_name"):
        if key not in headers:
            continue
        file, header = record[key], headers[key]
        image = headers.get("file_name", header)
        if header.size != image.size:
            return (
                f"{file} has (height, width) {header.size}, but its image {record['file_name']} "
                f"has {image.size}"
            )
        if key == "pan_seg_file_name" and not is_panoptic_mode(header.mode):
            return wrong_panoptic_mode(file, header.mode)
        if key == "sem_seg_file_name" and header.mode in _COLOURS:
            return (
                f"{file} is an image of mode {header.mode}: a label map has one channel (VALUE_MAP "
                "in DATASETS.CUSTOM maps colours)"
            )
    return None


def read_coco(json_file: str, image_root: str = "", name: str | None = None) -> COCO:
    """Read a COCO instance JSON for the evaluation with pycocotools or hotcoco.

    Args:
        json_file: the JSON.
        image_root: folder of the images, whose sizes are read if the JSON lacks them.
        name: of the data set, for errors. If Detectron2 loads it, unusable objects are left out.

    Returns:
        Its content with all optional keys filled in, see `formats/coco_instances.py`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    findings = Findings()
    file = PathManager.get_local_path(json_file)
    is_loaded = name is not None and is_loaded_coco(name)
    schema = DETECTRON2_COCO_GT if is_loaded else COCO_JSON
    data = read_instances(file, image_root, findings, needs_files=False, schema=schema)
    findings.raise_first(name)
    if is_loaded:  # the loaders of others have logged them
        findings.log(name)
    if not data.has_annotations:
        logging.getLogger(__name__).warning(
            f"{json_file} has no list 'annotations': its images are predicted, but not evaluated."
        )
    elif not any(data.annotations.values()):
        logging.getLogger(__name__).warning(
            f"{json_file} has no annotation: there is nothing to compare predictions with."
        )
    return data.as_coco()


def read_panoptic_gt(metadata: Metadata) -> Panoptic:
    """Read the COCO panoptic JSON of a data set for evaluation.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    findings = Findings()
    file = PathManager.get_local_path(metadata.panoptic_json)
    # The categories of the JSON are evaluated, where it has some.
    data = read_panoptic(file, findings, allow_repeated_ids=True)
    if data is not None and not data.categories:
        findings = Findings()
        ids = (
            *metadata.stuff_dataset_id_to_contiguous_id,
            *metadata.thing_dataset_id_to_contiguous_id,
        )
        data = read_panoptic(file, findings, category_ids=ids, allow_repeated_ids=True)
    findings.raise_first(metadata.name)
    return data
