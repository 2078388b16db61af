"""Capture files: what they keep of a batch, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from broken_training import train
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from mask2former.capture import pack, read_capture, unpack
from mask2former.data.packed_masks import PackedMasks, TargetInstances


def test_a_batch_survives_a_file(tmp_path):
    """Structures of Detectron2 and of this project; views without the rest of their storage."""
    planes = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    instances = TargetInstances((3, 4))
    instances.gt_classes = torch.tensor([2, 0, 1])
    instances.set("gt_masks", PackedMasks(planes, 3, overlapping=True))
    instances.gt_boxes = Boxes(torch.arange(12.0).view(3, 4))
    plain = Instances((3, 4))
    plain.gt_masks = BitMasks(torch.ones(1, 3, 4, dtype=torch.bool))
    plain.polygons = PolygonMasks([[np.array([0.0, 0, 1, 0, 1, 1])]])
    sample = {
        "image": torch.zeros(100, 100)[::2, :1].to(torch.uint8),
        "file_name": Path("a.png"),
        "image_id": np.int64(7),
        "size": torch.Size((3, 4)),
        "nested": [{"x": (1, 2.5, None, True)}],
        "array": np.arange(3),
        "instances": instances,
        "plain": plain,
        "other": object(),
    }
    torch.save(pack([sample]), tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 10_000
    (loaded,) = unpack(torch.load(tmp_path / "x.pth", weights_only=False))
    assert loaded["file_name"] == "a.png" and loaded["image_id"] == 7
    assert loaded["size"] == (3, 4) and loaded["nested"] == [{"x": (1, 2.5, None, True)}]
    assert loaded["array"].tolist() == [0, 1, 2] and loaded["other"] is None
    assert torch.equal(loaded["image"], sample["image"])
    assert type(loaded["instances"]) is TargetInstances
    assert type(loaded["instances"]._fields["gt_masks"]) is PackedMasks
    for name in ("gt_masks", "gt_classes"):
        assert torch.equal(loaded["instances"].get(name), instances.get(name))
    assert torch.equal(loaded["instances"].gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(loaded["plain"].gt_masks.tensor, plain.gt_masks.tensor)
    assert loaded["plain"].polygons.polygons[0][0].tolist() == [0, 0, 1, 0, 1, 1]


def test_files_that_are_no_captures(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_capture(tmp_path / "none.pth")
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        read_capture(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is not a capture"):
        read_capture(path)
    with pytest.raises(FloatingPointError):
        train(tmp_path / "run", "SOLVER.MAX_ITER", "5")
    content = torch.load(tmp_path / "run/non_finite_3_rank0.pth", weights_only=True)
    for change, problem in (
        ({"version": 2}, "version 2"),
        ({"seed": "3"}, "'seed' is missing or has the wrong type"),
        ({"batch": [{"__type__": "Thing"}]}, "unknown type 'Thing'"),
        ({"batch": [{"__type__": "Boxes"}]}, "Boxes that cannot be restored"),
    ):
        torch.save(content | change, path)
        with pytest.raises(ValueError, match=problem):
            read_capture(path)


def test_a_capture_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": Evil()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="was not loaded|cannot be read"):
        read_capture(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()
