"""Empty catalogues for a test, and the scripts that prepare data sets."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

SCRIPTS = Path(__file__).resolve().parents[3] / "datasets"


@pytest.fixture
def empty_catalogs(monkeypatch) -> None:
    """Empty the catalogues of data sets during the test."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})


@pytest.fixture
def prepare(monkeypatch, tmp_path) -> Callable[[str], None]:
    """Function (script name) that runs the script on the data sets below `tmp_path`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str) -> None:
        importlib.import_module(name).main(["--root", str(tmp_path), "--workers", "1"])

    return run
