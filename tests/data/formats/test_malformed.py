"""Generated mistakes in data: nothing crashes, every error names the file, and the check agrees.

Each case changes one value of a sound data set of three images. Training means: register, load, map
every record, and read the ground truth as the evaluators do before a run. It either accepts the
data or refuses it by one ValueError or FileNotFoundError; the check reports a problem if and only
if training refuses. Evaluation, which reads the test images and ground truth to the end, refuses
only what the check reports, in the same way.
"""

import copy
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pycocotools.mask as mask_util
import pytest
from dataset_trees import save, write_json
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic
from detectron2.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from mask2former.data import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import build_index
from mask2former.data.datasets.checks import drop_unusable_objects
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.datasets.loading import check_png
from mask2former.data.loader import InferenceMapper, _check_targets, explained_dataset_errors
from mask2former.evaluation.ground_truth import check_ground_truth
from mask2former.evaluation.semantic_evaluation import LabelReader

ABSENT = object()
VALUES = (
    *(ABSENT, None, True, -1, 0, 0.5, 3.0, 7, 1e9, 10**30, math.nan, math.inf),
    *("", "text", "\ud800", "a\0b", [], [[]], {}, [None], {"size": [8, 12], "counts": "x"}),
)

WHITE = np.full((8, 12), 255, np.uint8)
MAPPERS = {
    "instance": lambda: COCOInstanceNewBaselineDatasetMapper(
        True, tfm_gens=[], image_format="RGB", num_classes=2
    ),
    "panoptic": lambda: COCOPanopticNewBaselineDatasetMapper(
        True, tfm_gens=[], image_format="RGB", num_classes=3
    ),
    "semantic": lambda: MaskFormerSemanticDatasetMapper(
        *(True,),
        augmentations=[],
        image_format="RGB",
        ignore_label=255,
        size_divisibility=-1,
        num_classes=3,
    ),
}


# ---- cases ----


def changed(content: Any, path: tuple, value: Any) -> Any:
    """A copy with the value at a path of keys and indices replaced or removed."""
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values, lists beyond their first entry apart."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
    for key, entry in entries:
        if isinstance(entry, dict | list):
            yield from leaves(entry, (*path, key))
        else:
            yield (*path, key)


def json_cases(content: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """JSON files, each with a name."""
    for path, value in itertools.product(leaves(content), VALUES):
        name = f"{path} = {'absent' if value is ABSENT else repr(value)}"
        yield name, json.dumps(changed(content, path, value)).encode()
    text = json.dumps(content)
    for encoding in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le"):
        yield encoding, text.encode(encoding)
    for length in (0, 1, len(text) // 2, len(text) - 1):
        yield f"first {length} characters", text[:length].encode()
    yield "latin-1", text.replace("cup", "caf\u00e9").encode("latin-1")
    yield "deep", b'{"images": ' + b"[" * 100_000
    yield (
        "two images of one id",
        json.dumps(content | {"images": [content["images"][0]] * 2}).encode(),
    )


def mask_cases(content: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Polygons and RLEs."""
    mask = np.zeros((8, 12), np.uint8)
    mask[1:7, 2:9] = 1
    rle = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    random = np.random.default_rng(0)
    counts: list[Any] = [rle[:-n] for n in range(1, len(rle))]
    for _ in range(60):
        letters = list(rle)
        letters[random.integers(len(letters))] = chr(random.integers(1, 128))
        counts.append("".join(letters))
    counts += ["P" * 40, "o" * 3, "0" * 1000, "\u00e9"]
    counts += [[96], [95], [97], [-1, 97], [2**31, 2**31], [0.5], [10, 86, 0], [None], [True, 95]]
    shapes: list[Any] = [{"size": [8, 12], "counts": c} for c in counts]
    sizes = ([12, 8], [8], [8, 12, 1], [8.0, 12], [-8, -12], [0, 0], ["8", "12"], 96, [2**40, 1])
    shapes += [{"size": size, "counts": rle} for size in sizes]
    square = [0, 0, 4, 0, 4, 4, 0, 4]
    for value in (-1e9, 1e9, 1e300, 10**400, 30, 24, 27, -5, "3", None, True, math.nan, -math.inf):
        shapes.append([square[:2] + [value] + square[3:]])
    shapes += [
        [square, square[:7]],
        [],
        [square[:7]],
        [square[:4]],
        [square, []],
        square,
        [[square]],
    ]
    for shape in shapes:
        changed_content = changed(content, ("annotations", 0, "segmentation"), shape)
        yield f"segmentation {str(shape)[:60]}", json.dumps(changed_content).encode()


def file_cases(folder: str, is_label: bool) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of folder/a.*: images, label maps or panoptic PNGs."""

    def find(root: Path) -> Path:
        return next((root / folder).glob("a.*"))

    def write(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        return lambda root: find(root).write_bytes(data(find(root).read_bytes())) and None

    yield "removed", lambda root: find(root).unlink()
    yield "empty", write(lambda data: b"")
    yield "text", write(lambda data: b"no image")
    for share in (0.3, 0.6, 0.9):
        yield f"cut at {share}", write(lambda data, share=share: data[: int(share * len(data))])
    random = np.random.default_rng(0)
    for place in range(8, 60, 4):
        flipped = int(random.integers(1, 255))

        def flip(data: bytes, place: int = place, flipped: int = flipped) -> bytes:
            return data[:place] + bytes([data[place] ^ flipped]) + data[place + 1 :]

        yield f"byte {place} changed", write(flip)
    arrays = {
        "grey": WHITE,
        "colour": np.stack([WHITE] * 3, -1),
        "alpha": np.stack([WHITE] * 4, -1),
        "16 bits": WHITE.astype(np.uint16) * 100,
        "small": WHITE[:4],
    }
    for name, array in arrays.items():
        yield name, lambda root, array=array: Image.fromarray(array).save(find(root), format="PNG")
    for mode in ("1", "P", "LA", "I", "CMYK", "F"):
        file_format = "PNG" if mode in ("1", "P", "LA") else "TIFF"

        def convert(root: Path, mode: str = mode, file_format: str = file_format) -> None:
            image = Image.open(find(root))
            image.load()
            image.convert("L").convert(mode).save(find(root), format=file_format)

        yield f"mode {mode}", convert
    if is_label:
        for value in (3, 200, 255):
            yield (
                f"all {value}",
                lambda root, value=value: save(find(root), np.full((8, 12), value, np.uint8)),
            )
        for value in (1, 0.5, math.nan, math.inf, -1e30):
            array = np.full((8, 12), value, np.float32)
            array[4:] = 0
            yield (
                f"float {value}",
                lambda root, array=array: Image.fromarray(array).save(find(root), format="TIFF"),
            )


# ---- what is compared ----


@functools.cache
def mapper_of(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The mapper of training for a kind of data, or that of "inference"; they keep no state."""
    if kind != "inference":
        return MAPPERS[kind]()
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 16  # images are 8 pixels high
    return InferenceMapper(cfg)


def train(kind: str, root: Path) -> str | None:
    """None if training accepts the data, else why it refuses; other errors are raised."""
    file, name = FILES.get(kind, str(root)), NAMES[kind]
    try:
        REGISTER[kind](root)
        with explained_dataset_errors([name]):
            records = DatasetCatalog.get(name)
        drop_unusable_objects([name], records)
        _check_targets([name], records)
        check_ground_truth(CONFIG, name)
        mapper = mapper_of(kind)
        for record in records:
            mapper(copy.deepcopy(record))
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        kinds = (ValueError, FileNotFoundError, SizeMismatchError)
        assert type(error) in kinds and (file in text or str(root) in text), (
            f"a raw error, or without a file: {type(error).__name__}: {error}"
        )
        return text
    return None


def evaluate(kind: str, root: Path) -> str | None:
    """None if a test set can be read to its end, else why not; other errors are raised."""
    name = NAMES[kind]
    try:
        REGISTER[kind](root)
        check_ground_truth(CONFIG, name)
        mapper = mapper_of("inference")
        for record in DatasetCatalog.get(name):
            mapper(record)
            if "pan_seg_file_name" in record:
                check_png(record, MetadataCatalog.get(name).panoptic_json)
            elif "sem_seg_file_name" in record:
                LabelReader(MetadataCatalog.get(name))(record["sem_seg_file_name"])
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert str(root) in text, f"an error without a file: {type(error).__name__}: {error}"
        return text
    return None


def check(kind: str, root: Path) -> list[str]:
    """The problems that the check reports."""
    try:
        REGISTER[kind](root)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    index = build_index(NAMES[kind])
    reports = map(ItemChecker(index), index.items)
    problems = [*index.problems, *itertools.chain(*(report.problems for report in reports))]
    raw = [f for f in problems if "Error:" in f.why and "JSON" not in f.why]
    assert not raw, f"a raw error: {raw}"
    return [f"{finding.file}, {finding.id}: {finding.why}" for finding in problems]


CONFIG = CfgNode({"MODEL": {"MASK_FORMER": {"TEST": {}}}})
for _task in ("PANOPTIC", "INSTANCE", "SEMANTIC"):
    CONFIG.MODEL.MASK_FORMER.TEST[f"{_task}_ON"] = True


def outcome(kind: str, root: Path) -> str | None:
    """What is wrong with how a case is treated; None if nothing."""
    try:
        results = []
        for judge in (train, evaluate, check):
            for catalog in (DatasetCatalog, MetadataCatalog):
                catalog.pop(NAMES[kind], None)
            results.append(judge(kind, root))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    refused, unreadable, problems = results
    if unreadable is not None and not problems:
        return f"evaluation: {unreadable[:250]}; the check: nothing"
    if (refused is None) != (not problems):
        return f"training: {str(refused)[:250]}; the check: {str(problems)[:250]}"
    return None


# ---- kinds of data ----


def coco_metadata(categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Metadata of Detectron2 for categories of a COCO panoptic JSON."""
    ids = {c["id"]: i for i, c in enumerate(categories)}
    names = [category["name"] for category in categories]
    things = {c["id"] for c in categories if c["isthing"]}
    return {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_dataset_id_to_contiguous_id": {k: v for k, v in ids.items() if k in things},
        "stuff_dataset_id_to_contiguous_id": {k: v for k, v in ids.items() if k not in things},
    }


def lvis(root: Path) -> dict[str, Any]:
    """Writes instances of COCO classes as LVIS has them."""
    content = own_data.instances(root)
    ids = COCO["thing_dataset_id_to_contiguous_id"]
    content["categories"] = [
        {"id": i, "name": COCO["thing_classes"][c], "frequency": "c"} for i, c in ids.items()
    ]
    for image in content["images"]:
        image["coco_url"] = f"http://host/images/{image.pop('file_name')}"
        image |= {"neg_category_ids": [5], "not_exhaustive_category_ids": []}
    write_json(root / "instances.json", content)
    return content


def own(kind: str) -> Callable[[Path], None]:
    return lambda root: register_entries([own_data.entry(kind, root)])


COCO = get_lvis_instances_meta("cocofied")
FILES = {"instance": "instances.json", "panoptic": "panoptic.json"}
FILES |= {"detectron2 instance": "instances.json", "lvis": "instances.json"}
FILES["detectron2 panoptic"] = "panoptic.json"
NAMES = dict.fromkeys((*FILES, "semantic"), "own_train") | {"lvis": "own_cocofied"}
WRITERS = {
    "instance": own_data.instances,
    "panoptic": own_data.panoptic,
    "semantic": own_data.semantic,
    "detectron2 instance": own_data.instances,
    "detectron2 panoptic": own_data.panoptic,
    "lvis": lvis,
}
REGISTER: dict[str, Callable[[Path], None]] = {
    **{kind: own(kind) for kind in ("instance", "panoptic", "semantic")},
    "detectron2 instance": lambda root: register_coco_instances(
        "own_train", {}, str(root / "instances.json"), str(root / "images")
    ),
    "lvis": lambda root: register_lvis_instances(
        "own_cocofied", COCO, str(root / "instances.json"), f"{root}/"
    ),
    "detectron2 panoptic": lambda root: register_coco_panoptic(
        "own_train",
        coco_metadata(own_data.CATEGORIES),
        *(str(root / name) for name in ("images", "panoptic", "panoptic.json")),
    ),
}
MAPPERS |= {
    "detectron2 instance": MAPPERS["instance"],
    "detectron2 panoptic": MAPPERS["panoptic"],
    "lvis": lambda: COCOInstanceNewBaselineDatasetMapper(
        True, tfm_gens=[], image_format="RGB", num_classes=80
    ),
}


def run_json(kind: str, root: Path) -> tuple[int, list[str]]:
    content = WRITERS[kind](root)
    file = root / FILES[kind]
    cases = list(json_cases(content))
    if kind in ("instance", "detectron2 instance", "lvis"):
        cases += mask_cases(content)
    wrong = []
    for name, data in cases:
        file.unlink()  # a file system may wait for the disk when a file is truncated
        file.write_bytes(data)
        result = outcome(kind, root)
        if result is not None:
            wrong.append(f"{name}: {result}")
    return len(cases), wrong


def run_files(kind: str, root: Path) -> tuple[int, list[str]]:
    folders = {"instance": ["images"], "panoptic": ["images", "panoptic"]}
    cases = [
        (folder, name, change)
        for folder in folders.get(kind, ["images", "labels"])
        for name, change in file_cases(folder, folder == "labels")
    ]
    wrong = []
    sound, damaged = root / "sound", root / "damaged"
    WRITERS[kind](sound)
    for folder, name, change in cases:
        shutil.copytree(sound, damaged)
        change(damaged)
        result = outcome(kind, damaged)
        shutil.rmtree(damaged)
        if result is not None:
            wrong.append(f"{folder}, {name}: {result}")
    return len(cases), wrong


@pytest.mark.parametrize(
    ("run", "kind", "least"),
    [
        (run_json, "instance", 500),
        (run_json, "panoptic", 400),
        (run_json, "detectron2 instance", 500),
        (run_json, "detectron2 panoptic", 400),
        (run_json, "lvis", 500),
        (run_files, "instance", 20),
        (run_files, "panoptic", 40),
        (run_files, "semantic", 40),
    ],
)
def test_no_crash_no_raw_error_and_agreement(run, kind, least, tmp_path):
    # A crash of native code must end this process, not that of the tests.
    with ProcessPoolExecutor(1) as pool:
        number, wrong = pool.submit(run, kind, tmp_path).result()
    assert number >= least
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong[:40])
