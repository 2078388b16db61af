"""Mean IoU by Detectron2's evaluator, from label images or from panoptic annotations."""

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image

_IGNORE = 255


def build_semantic_evaluator(dataset_name: str, output_folder: str | None) -> SemSegEvaluator:
    """Mean IoU on a data set whose records have `sem_seg_file_name` or panoptic annotations."""
    records = DatasetCatalog.get(dataset_name)
    if all("sem_seg_file_name" in record for record in records):
        loading_fn = LabelReader(MetadataCatalog.get(dataset_name))
    else:
        loading_fn = PanopticToSemantic(records)
        dataset_name = _register_semantic_view(dataset_name, records)
    return SemSegEvaluator(
        dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=loading_fn
    )


def load_label_map(file_name: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read a label image (H, W), one class id a pixel."""
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


class LabelReader:
    """Reads label images and checks them."""

    def __init__(self, metadata: Metadata) -> None:
        """
        Args:
            metadata: of the data set: `stuff_classes` and `ignore_label` are read.
        """
        self._num_classes = len(metadata.stuff_classes)
        self._ignore_label = metadata.ignore_label

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """The label map (H, W) of a file.

        Raises:
            ValueError: it is no label image, or has labels that are no class.
        """
        labels = load_label_map(file_name, dtype)
        if labels.ndim != 2:
            raise ValueError(
                f"{file_name} has shape {labels.shape}: a label image has one channel."
            )
        strange = (labels < 0) | (labels >= self._num_classes)
        strange &= labels != self._ignore_label
        if strange.any():
            raise ValueError(
                f"{file_name} has labels {np.unique(labels[strange])[:5].tolist()}, but the "
                f"classes are 0 to {self._num_classes - 1}, and {self._ignore_label} is ignored."
            )
        return labels


class PanopticToSemantic:
    """Reads semantic truth out of panoptic PNGs: each segment's class, 255 where there is none."""

    def __init__(self, records: list[dict]) -> None:
        """
        Args:
            records: with `pan_seg_file_name` and `segments_info` in contiguous class ids.
        """
        self._classes = {
            record["pan_seg_file_name"]: {
                s["id"]: s["category_id"] for s in record["segments_info"]
            }
            for record in records
        }

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """The label map (H, W) of a panoptic PNG."""
        segment_ids = rgb2id(load_label_map(file_name))
        semantic = np.full(segment_ids.shape, _IGNORE, dtype=dtype)
        for segment_id, class_id in self._classes[file_name].items():
            semantic[segment_ids == segment_id] = class_id
        return semantic


def _register_semantic_view(dataset_name: str, records: list[dict]) -> str:
    """Register the panoptic data set under a second name, as the semantic evaluator wants it.

    Raises:
        ValueError: thing and stuff classes overlap, or `stuff_classes` does not name all classes.
    """
    view = f"{dataset_name}/semantic_from_panoptic"
    if view in DatasetCatalog.list():
        return view
    metadata: Metadata = MetadataCatalog.get(dataset_name)
    to_contiguous = {
        **metadata.stuff_dataset_id_to_contiguous_id,
        **metadata.thing_dataset_id_to_contiguous_id,
    }
    num_classes = len(metadata.stuff_classes)
    if sorted(to_contiguous.values()) != list(range(num_classes)):
        raise ValueError(
            f"Semantic segmentation cannot be evaluated on {dataset_name}: it has no "
            "sem_seg_file_name, and its panoptic classes do not match its metadata: stuff_classes "
            f"has {num_classes} names, the contiguous ids are {sorted(to_contiguous.values())}."
        )
    keys = {"file_name": "file_name", "sem_seg_file_name": "pan_seg_file_name"}
    view_records = [{new: record[old] for new, old in keys.items()} for record in records]
    DatasetCatalog.register(view, lambda: view_records)
    MetadataCatalog.get(view).set(
        stuff_classes=metadata.stuff_classes,
        stuff_dataset_id_to_contiguous_id=to_contiguous,
        ignore_label=_IGNORE,
    )
    return view
