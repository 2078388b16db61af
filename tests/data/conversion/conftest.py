"""Sources of panoptic data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_trees import write_json
from panoptic_source import write_source


@pytest.fixture
def source(tmp_path) -> Path:
    write_source(tmp_path)
    return tmp_path


@pytest.fixture
def edit(source) -> Callable[[Callable], None]:
    """Function that changes the content of instances.json."""

    def apply(change: Callable) -> None:
        path = source / "instances.json"
        content = json.loads(path.read_text())
        change(content)
        write_json(path, content)

    return apply
