"""Random ground truth and predictions in every official format.

    python random_scenes.py FOLDER     evaluates FOLDER's predictions; under torchrun, one shard

Classes: 0 road (stuff), 1 car, 2 sky (stuff), 3 person, 4 bicycle; as Cityscapes names them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_util

from mask2former.evaluation import ProposalEvaluator, build_evaluator
from mask2former.launch import join_torchrun, started_by_torchrun

NAMES = ["road", "car", "sky", "person", "bicycle"]
DATASET_IDS = [7, 13, 2, 30, 31]
THINGS = [1, 3, 4]
CITYSCAPES_IDS = [7, 26, 23, 24, 33]
CITYSCAPES_TRAIN_IDS = [0, 13, 10, 11, 18]
NUM_IMAGES = 7
TYPES = {
    "scenes_panoptic": "coco_panoptic_seg",
    "scenes_lvis": "lvis",
    "scenes_cityscapes": "cityscapes_panoptic_seg",
}


def stem(image_id):
    return f"city_000000_{image_id:06d}"


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def random_segments(random, height, width, number):
    """Overlapping rectangles, later ones on top: a map of segment numbers and their classes."""
    numbers = np.zeros((height, width), dtype=int)
    for number_ in range(1, number + 1):
        top, left = random.integers(height - 12), random.integers(width - 12)
        high, wide = random.integers(12, height), random.integers(12, width)
        numbers[top : top + high, left : left + wide] = number_
    return numbers, random.integers(len(NAMES), size=number + 1)


def merge_stuff(numbers, classes):
    """Segments (class, mask); stuff is merged by class, as in panoptic annotations."""
    segments = {}
    for number in np.unique(numbers[numbers > 0]).tolist():
        class_id = int(classes[number])
        key = number if class_id in THINGS else -class_id - 1
        previous = segments[key][1] if key in segments else False
        segments[key] = (class_id, previous | (numbers == number))
    return list(segments.values())


def perturbed(random, segments):
    """Predict: move masks by up to 2 pixels, change some classes, drop some segments."""
    numbers = np.zeros(segments[0][1].shape, dtype=int)
    classes = [0]
    for class_id, mask in segments:
        if random.random() < 0.85:
            moved = np.roll(mask, random.integers(-2, 3, size=2), axis=(0, 1))
            numbers[moved] = len(classes)
            classes.append(class_id if random.random() < 0.9 else random.integers(len(NAMES)))
    return merge_stuff(numbers, classes)


def model_outputs(random, shape, segments):
    panoptic, infos = torch.zeros(shape, dtype=torch.int32), []
    scores = random.random((len(NAMES), *shape)).astype(np.float32)
    for number, (class_id, mask) in enumerate(segments, start=1):
        panoptic[torch.from_numpy(mask)] = number
        infos.append({"id": number, "isthing": class_id in THINGS, "category_id": class_id})
        scores[class_id][mask] += 0.9
    things = [(c, mask) for c, mask in segments if c in THINGS]
    return {
        "panoptic_seg": (panoptic, infos),
        "sem_seg": torch.from_numpy(scores),
        "classes": [c for c, _ in things],
        # Few values, so that ties occur: results must not depend on the order of workers.
        "scores": (random.integers(1, 6, size=len(things)) / 5).tolist(),
        "masks": torch.from_numpy(np.stack([m for _, m in things] or [np.zeros(shape)])),
    }


def write_scenes(folder, seed=0):
    """Write ground truth in the formats of COCO, LVIS and Cityscapes, and predictions.pt."""
    random = np.random.default_rng(seed)
    for name in ("panoptic", "semantic", "gt/city"):
        (folder / name).mkdir(parents=True)
    images, panoptic, instances, predictions = [], [], [], {}
    for image_id in range(1, NUM_IMAGES + 1):
        height, width = random.integers(50, 120, size=2).tolist()
        segments = merge_stuff(*random_segments(random, height, width, 9))
        image = {"id": image_id, "height": height, "width": width, "file_name": f"{image_id}.jpg"}
        present = sorted({DATASET_IDS[c] for c, _ in segments})
        absent = [i for i in DATASET_IDS if i not in present]
        images.append(
            image | {"neg_category_ids": absent[:1], "not_exhaustive_category_ids": present[:1]}
        )
        ids, semantic = np.zeros((height, width), dtype=int), np.full((height, width), 255)
        city_labels, city_instances = np.zeros((2, height, width), dtype=int)
        infos = []
        for number, (class_id, mask) in enumerate(segments, start=1):
            ids[mask], semantic[mask] = 250 * number, class_id
            iscrowd = int(class_id in THINGS and random.random() < 0.1)
            category_id, rle = DATASET_IDS[class_id], encode(mask)
            info = {"category_id": category_id, "iscrowd": iscrowd, "area": int(mask.sum())}
            infos.append(info | {"id": 250 * number})
            city_labels[mask] = city_instances[mask] = CITYSCAPES_IDS[class_id]
            if class_id in THINGS:
                info |= {"id": len(instances) + 1, "image_id": image_id, "segmentation": rle}
                instances.append(info | {"bbox": mask_util.toBbox(rle).tolist()})
                if not iscrowd:
                    city_instances[mask] = 1000 * CITYSCAPES_IDS[class_id] + number
        Image.fromarray(id2rgb(ids)).save(folder / "panoptic" / f"{image_id}.png")
        Image.fromarray(semantic.astype(np.uint8)).save(folder / "semantic" / f"{image_id}.png")
        gt_prefix = folder / "gt" / "city" / f"{stem(image_id)}_gtFine_"
        Image.fromarray(city_labels.astype(np.uint8)).save(f"{gt_prefix}labelIds.png")
        Image.fromarray(city_instances.astype(np.uint16)).save(f"{gt_prefix}instanceIds.png")
        panoptic.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
        )
        pred = perturbed(random, segments)
        predictions[image_id] = model_outputs(random, (height, width), pred)
    torch.save(predictions, folder / "predictions.pt")

    categories = [
        {"id": DATASET_IDS[c], "name": NAMES[c], "isthing": int(c in THINGS), "frequency": "rcf"[k]}
        for c, k in zip(range(5), (0, 1, 2, 2, 0), strict=True)
    ]
    things = [c for c in categories if c["isthing"]]
    for name, annotations, classes in (
        ("panoptic", panoptic, categories),
        ("instances", instances, things),
    ):
        content = {"info": {}, "images": images, "annotations": annotations, "categories": classes}
        (folder / f"{name}.json").write_text(json.dumps(content))


def register(folder):
    """Register the scenes under the names in TYPES."""
    images = json.loads((folder / "instances.json").read_text())["images"]
    annotations = json.loads((folder / "panoptic.json").read_text())["annotations"]
    records = [
        {
            "file_name": f"images/{stem(image['id'])}_leftImg8bit.png",
            "image_id": image["id"],
            "pan_seg_file_name": str(folder / "panoptic" / annotation["file_name"]),
            "sem_seg_file_name": str(folder / "semantic" / annotation["file_name"]),
        }
        for image, annotation in zip(images, annotations, strict=True)
    ]
    for name, evaluator_type in TYPES.items():
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            evaluator_type=evaluator_type,
            json_file=str(folder / "instances.json"),
            panoptic_json=str(folder / "panoptic.json"),
            panoptic_root=str(folder / "panoptic"),
            gt_dir=str(folder / "gt"),
            thing_classes=NAMES,
            stuff_classes=NAMES,
            thing_dataset_id_to_contiguous_id={DATASET_IDS[c]: c for c in THINGS},
            stuff_dataset_id_to_contiguous_id={k: c for c, k in enumerate(DATASET_IDS)},
            ignore_label=255,
        )
    return records


def unregister():
    for name in TYPES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def outputs_of(prediction, name):
    """Convert a prediction to the model outputs on a data set."""
    shape = tuple(prediction["panoptic_seg"][0].shape)
    number = len(prediction["classes"])
    instances = Instances(shape)
    instances.pred_masks = prediction["masks"][:number].float()
    instances.pred_boxes = Boxes(torch.zeros(number, 4))
    instances.scores = torch.tensor(prediction["scores"], dtype=torch.float64)
    instances.pred_classes = torch.tensor(prediction["classes"], dtype=torch.int64)
    segment_ids, infos = prediction["panoptic_seg"]
    semantic = prediction["sem_seg"]
    if name == "scenes_cityscapes":
        semantic = torch.zeros(19, *shape)
        semantic[CITYSCAPES_TRAIN_IDS] = prediction["sem_seg"]
    return {
        "panoptic_seg": (segment_ids, [dict(info) for info in infos]),
        "sem_seg": semantic,
        "instances": instances,
    }


def evaluate(folder, output_dir):
    """Evaluate this worker's shard with all evaluators; the main worker returns the results."""
    cfg = CfgNode({"OUTPUT_DIR": str(output_dir), "MODEL": {"MASK_FORMER": {"TEST": {}}}})
    for task in ("PANOPTIC_ON", "INSTANCE_ON", "SEMANTIC_ON"):
        cfg.MODEL.MASK_FORMER.TEST[task] = True
    predictions = torch.load(folder / "predictions.pt")
    results = {}
    for name in [*TYPES, "proposals"]:
        if name == "proposals":
            evaluator = ProposalEvaluator("scenes_panoptic")
        else:
            evaluator = build_evaluator(cfg, name)
        records = DatasetCatalog.get("scenes_panoptic")
        evaluator.reset()
        for index in InferenceSampler(len(records)):
            outputs = outputs_of(predictions[records[index]["image_id"]], name)
            evaluator.process([records[index]], [outputs])
        results[name] = evaluator.evaluate()
    return results if comm.is_main_process() else None


if __name__ == "__main__":
    if started_by_torchrun():
        join_torchrun(on_gpu=False)
    scenes = Path(sys.argv[1])
    register(scenes)
    metrics = evaluate(scenes, scenes / f"output_{comm.get_world_size()}")
    if metrics is not None:
        (scenes / f"results_{comm.get_world_size()}.json").write_text(json.dumps(metrics))
