"""Number of host syncs and blocking uploads in training and in inference; inputs on the host."""

import json
import sys
from pathlib import Path

import forked
import pytest
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("counted_device.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_few_host_syncs(tiny_cfg, tmp_path):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON = test.PANOPTIC_ON = test.INSTANCE_ON = True
    test.OBJECT_MASK_THRESHOLD = 0.0  # so that segments exist
    tiny_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    tiny_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump())
    command = [sys.executable, "-W", "ignore", PROGRAM, path]
    result = forked.run(command)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["known"] == {"syncs": 4, "uploads": 1}
    # A step also computes gradients, clips, updates and logs.
    for training in (counts["training"], counts["step"]):
        # One copy of the matching costs of all layers and images.
        assert len(training["syncs"]) == 1 and "match_layers" in training["syncs"][0], training
        # Images, targets and matched pairs are uploaded without blocking.
        assert training["uploads"] == []
    # Of each micro-batch that has targets.
    accumulated = counts["accumulated"]
    assert len(accumulated["syncs"]) == 3, accumulated
    assert all("match_layers" in place for place in accumulated["syncs"])
    assert accumulated["uploads"] == []
    # Syncs per image: queries of segments and of instances, classes and areas of segments.
    # Uploads per image: which classes are things, and the segment of each pixel's query.
    inference = counts["inference"]
    assert len(inference["syncs"]) <= 3 * 5, inference
    assert len(inference["uploads"]) <= 3 * 2, inference
    for counted in (counts["training"], counts["step"], inference):
        assert counted["operators"] > 0
