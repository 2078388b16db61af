"""Sources of panoptic data: two cups that overlap, and label maps of a table and a wall."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
from dataset_trees import HEIGHT, WIDTH, save, write_json


@pytest.fixture
def source(tmp_path) -> Path:
    """Writes images/{a,b,c}.jpg, instances.json, labels/*.png and classes.txt.

    Every image has the cup and the plate of `own_data`, which cover 32 and 16 of the 96 pixels. In
    the label maps the left two thirds are table, except the row at the bottom, which is cup; the
    right third is wall, except its last pixel, which is 255.
    """
    own_data.instances(tmp_path)
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 8:], labels[-1, :8], labels[-1, -1] = 1, 2, 255
    for stem in own_data.STEMS:
        save(tmp_path / "labels" / f"{stem}.png", labels)
    (tmp_path / "classes.txt").write_text("table\nwall\ncup\n")
    return tmp_path


@pytest.fixture
def edit(source):
    """Function that changes the content of instances.json."""

    def apply(change) -> None:
        path = source / "instances.json"
        content: dict[str, Any] = json.loads(path.read_text())
        change(content)
        write_json(path, content)

    return apply
