"""Sources of panoptic data: objects, and label maps of what is around them."""

from pathlib import Path

import numpy as np
import own_data
from dataset_trees import HEIGHT, WIDTH, save


def write_source(root: Path) -> None:
    """Writes images/{a,b,c}.jpg, instances.json, labels/*.png and classes.txt.

    Every image has the cup and the plate of `own_data`, which cover 32 and 16 of the 96 pixels. In
    the label maps the left two thirds are table, except the row at the bottom, which is cup; the
    right third is wall, except its last pixel, which is 255.
    """
    own_data.instances(root)
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 8:], labels[-1, :8], labels[-1, -1] = 1, 2, 255
    for stem in own_data.STEMS:
        save(root / "labels" / f"{stem}.png", labels)
    (root / "classes.txt").write_text("table\nwall\ncup\n")
