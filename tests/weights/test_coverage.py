"""How much of each module a checkpoint fills."""

from mask2former.weights.coverage import coverage_by_module, describe_coverage

NAMES = [
    "backbone.stem.conv1.weight",
    "backbone.stem.conv1.norm.weight",
    "sem_seg_head.pixel_decoder.mask_features.weight",
    "sem_seg_head.predictor.query_feat.weight",
    "criterion.empty_weight",
]


def test_counts_by_module():
    coverage = coverage_by_module(NAMES, {NAMES[0], NAMES[2], "unknown"}, {NAMES[4]})
    assert describe_coverage(coverage) == (
        "backbone 1 of 2, pixel decoder 1 of 1, transformer decoder 0 of 1, "
        "criterion 0 of 1 (1 from the config)"
    )


def test_modules_of_other_models():
    assert describe_coverage(coverage_by_module(["linear.weight"], ["linear.weight"])) == (
        "other 1 of 1"
    )
