"""How often the host waits for the device in the forward of a training step and in inference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("counted_device.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_few_in_training_and_inference(tiny_cfg, tmp_path):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON = test.PANOPTIC_ON = test.INSTANCE_ON = True
    test.OBJECT_MASK_THRESHOLD = 0.0  # so that there are segments
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump())
    command = [sys.executable, "-W", "ignore", PROGRAM, path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["known"] == {"waits": 4, "uploads": 1}
    training = counts["training"]
    # The matching costs of all layers and images; targets are on the device already.
    assert len(training["waits"]) == 1 and "_match" in training["waits"][0], training
    # What the host decides, the matched pairs, travels without a wait.
    assert training["uploads"] == []
    # For each image: the queries of its segments and of its instances, classes and areas of
    # segments. Which classes are things, and the segment of each pixel's query, are sent.
    inference = counts["inference"]
    assert len(inference["waits"]) <= 3 * 5, inference
    assert len(inference["uploads"]) <= 3 * 2, inference
