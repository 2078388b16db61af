"""A scene with exact gt, and a "model" that predicts the gt of each tile."""

import numpy as np
import torch
from detectron2.structures import Instances

SIZE = 256
SKY, GRASS = 4, 5  # stuff; classes below are things
# Class and window (rows, columns) of each object. Tiles of 96 with an overlap of 32 meet at 74,
# 128 and 182: starts are 0, 53, 106, 160.
OBJECTS = [
    (0, slice(100, 160), slice(20, 40)),  # cut by two tiles, down
    (1, slice(60, 100), slice(60, 100)),  # cut by four
    (2, slice(200, 220), slice(60, 74)),  # two of one class that touch, both cut by a seam
    (2, slice(200, 220), slice(74, 130)),
    (3, slice(170, 190), slice(10, 250)),  # longer than a tile
    (0, slice(5, 8), slice(5, 8)),  # small, in one tile
    (1, slice(240, 244), slice(122, 134)),  # small, in the overlap
]


def make_scene(objects=OBJECTS, size=SIZE):
    """Gt maps (H, W): object numbers from 1, 0 for stuff, and classes."""
    numbers = np.zeros((size, size), np.int32)
    classes = np.full((size, size), SKY, np.uint8)
    classes[size // 2 :] = GRASS
    for i, (label, rows, columns) in enumerate(objects, start=1):
        numbers[rows, columns], classes[rows, columns] = i, label
    return numbers, classes


class ExactModel:
    """Predicts the gt of a tile, whose "pixels" are its object numbers and classes."""

    def __init__(self, erase=None):
        self.erase = erase  # changes the gt of a tile before it is predicted
        self.sizes = []

    def __call__(self, tiles):
        self.sizes.append([tile.shape[:2] for tile in tiles])
        return [self.predict(*np.moveaxis(tile, 2, 0)) for tile in tiles]

    def predict(self, numbers, classes):
        if self.erase is not None:
            numbers, classes = self.erase(numbers.copy(), classes.copy())
        ids = np.zeros(numbers.shape, np.int32)
        segments = []
        # In an order of its own in each tile, as queries are.
        for number in np.unique(numbers[numbers > 0])[::-1]:
            mask = numbers == number
            segments.append(self.segment(ids, mask, classes, True))
        for label in (SKY, GRASS):
            mask = (classes == label) & (numbers == 0)
            if mask.any():
                segments.append(self.segment(ids, mask, classes, False))
        things = [s for s in segments if s["isthing"]]
        masks = torch.from_numpy(np.array([ids == s["id"] for s in things]).reshape(-1, *ids.shape))
        return {
            "panoptic_seg": (torch.from_numpy(ids), segments),
            "sem_seg": torch.nn.functional.one_hot(torch.from_numpy(classes).long(), 6)
            .permute(2, 0, 1)
            .float(),
            "instances": Instances(
                ids.shape,
                pred_masks=masks.float(),
                pred_classes=torch.tensor([s["category_id"] for s in things], dtype=torch.int64),
                scores=torch.full((len(things),), 0.5),
            ),
        }

    @staticmethod
    def segment(ids, mask, classes, isthing):
        ids[mask] = ids.max() + 1
        label = int(np.unique(classes[mask])[0])
        return {"id": int(ids.max()), "category_id": label, "isthing": isthing, "score": 0.5}
