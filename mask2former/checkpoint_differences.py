"""How the weights of a checkpoint differ from those of a model: the causes, and what to do."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .architecture import (
    CLASSES,
    MASKED_DECODER,
    PARTS,
    QUERIES,
    SETTINGS,
    STANDARD_DECODER,
    Setting,
    Shape,
    Shapes,
    describe_parts,
    foreign_format,
    is_known,
)

# Class numbers of published checkpoints.
_DATA_SETS = {
    8: "Cityscapes instances",
    19: "Cityscapes",
    40: "YouTube-VIS, by the video model",
    65: "Mapillary Vistas",
    80: "COCO instances",
    100: "ADE20K instances",
    133: "COCO panoptic",
    150: "ADE20K",
    1203: "LVIS",
}
# What is as wide as the backbone's features.
_TAKES_FEATURES = re.compile(
    r"sem_seg_head\.(pixel_decoder\.(input_proj|adapter_\d|layer_\d)|predictor\.input_proj)\..*"
)
_USE_ITS_CONFIG = "Use the config file that the checkpoint was trained with."


def first_names(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@dataclass(frozen=True)
class Differences:
    """How a state dict differs from that of a model, by cause.

    Args:
        parts: the kind in the file and in the model of each part that both have.
        absent: parts that the file lacks.
        settings: values of the file and of the model.
        missing: other names that only the model has.
        unexpected: other names that only the file has.
        misshapen: other names with the shape in the file and that in the model.
        num_fitting, num_names: tensors of the model that the file provides, of how many.
        mostly_differs: these are less than half.
        foreign: the other project that wrote the file and what to do, if it is a known one.
    """

    parts: dict[str, tuple[str, str]]
    absent: list[str]
    settings: dict[Setting, tuple[int, int]]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[tuple[str, Shape, Shape]]
    num_fitting: int
    num_names: int
    mostly_differs: bool
    foreign: str | None

    @property
    def is_predecessor(self) -> bool:
        return self.parts.get("transformer decoder") == (STANDARD_DECODER, MASKED_DECODER)

    @property
    def has_other_backbone(self) -> bool:
        """Whether both backbones are known, and of different kinds."""
        return "backbone" in self.parts and all(map(is_known, self.parts["backbone"]))


def compare(
    model: Shapes,
    missing: list[str],
    unexpected: Shapes,
    misshapen: list[tuple[str, Shape, Shape]],
) -> Differences:
    """Find the causes of differences between a state dict and a model.

    Args:
        model: of all parameters and buffers of the model.
        missing: names that only the model has.
        unexpected: of the names that only the file has.
        misshapen: names with the shape in the file and that in the model.
    """
    others = {name: in_file for name, in_file, _ in misshapen}
    not_fitting = {*others, *missing}
    fitting = {name: shape for name, shape in model.items() if name not in not_fitting}
    file = {**fitting, **others, **unexpected}
    in_file, in_model = describe_parts(file), describe_parts(model)
    absent = [part for part in in_model if part not in in_file]
    parts = {
        part: (kind, in_model[part])
        for part, kind in in_file.items()
        if in_model.get(part, kind) != kind and (is_known(kind) or is_known(in_model[part]))
    }
    explained = [re.compile(re.escape(PARTS[part][0]) + ".*") for part in [*absent, *parts]]
    if "backbone" in parts:
        explained.append(_TAKES_FEATURES)
    settings = {}
    for setting in SETTINGS:
        pair = setting.value(file), setting.value(model)
        if None not in pair and pair[0] != pair[1] and setting.part not in {*absent, *parts}:
            settings[setting] = pair
    explained += [setting.decides for setting in settings]

    mostly_differs = 2 * len(fitting) < len(model)

    def is_left(name: str) -> bool:
        return not any(pattern.fullmatch(name) for pattern in explained)

    return Differences(
        parts,
        absent,
        settings,
        [name for name in missing if is_left(name) and name not in others],
        [name for name in unexpected if is_left(name)],
        [item for item in misshapen if is_left(item[0])],
        len(fitting),
        len(model),
        mostly_differs,
        foreign_format(unexpected) if mostly_differs else None,
    )


def other_parts(differences: Differences) -> str:
    return ", ".join(
        f"{part} {in_file} instead of {in_model}"
        for part, (in_file, in_model) in differences.parts.items()
    )


def other_setting(setting: Setting, in_file: int, in_model: int) -> str:
    """A phrase with both values of a setting."""
    data_set = _DATA_SETS.get(in_file) if setting is CLASSES else None
    hint = f" (as for {data_set})" if data_set else ""
    return f"another {setting.what}: {in_file} in the file{hint}, {in_model} in the config"


def explain(differences: Differences, buffers: set[str]) -> str:
    """Say what differs and what to do, a sentence or two for each cause.

    Args:
        differences: from `compare`.
        buffers: names of the model's buffers; its other names are parameters.
    """
    if differences.foreign:
        return f"its names are those of {differences.foreign}."
    problems = []
    if differences.parts or _is_another_model(differences):
        kinds = f": {other_parts(differences)}" if differences.parts else ""
        problems.append(f"another architecture{kinds}. {_USE_ITS_CONFIG}")
    if differences.is_predecessor:
        problems.append("The file is of MaskFormer, the predecessor of Mask2Former.")
    if differences.absent:
        problems.append(_absent_parts(differences))
    for setting, (in_file, in_model) in differences.settings.items():
        remedy = f"Set {setting.key} to {in_file}."
        if setting.key.endswith("IN_FEATURES"):
            remedy = f"Name {in_file} features in {setting.key}."
        problems.append(f"{other_setting(setting, in_file, in_model)}. {remedy}")
    only_numbers = differences.settings and not (differences.parts or differences.absent)
    if only_numbers and differences.settings.keys() <= {QUERIES, CLASSES}:
        problems.append(
            "A new training that starts from this file, as MODEL.WEIGHTS, may change the numbers "
            "of queries and classes."
        )
    problems += _single_names(differences, buffers)
    return " ".join(problems)


def _is_another_model(differences: Differences) -> bool:
    """Whether the names differ too much for a model of unknown parts."""
    return differences.mostly_differs and not (differences.absent or differences.settings)


def _absent_parts(differences: Differences) -> str:
    text = f"no {' and no '.join(differences.absent)} in the file."
    if "backbone" not in differences.absent:
        return f"{text} It is incomplete: it can only start a training, as MODEL.WEIGHTS."
    return (
        f"{text} Use a checkpoint of a whole model; to start a training from a backbone whose "
        "names lack the prefix 'backbone.', append ?matching_heuristics=True to the path."
    )


def _single_names(differences: Differences, buffers: set[str]) -> list[str]:
    """What no other cause explains."""
    problems = []
    for what, names in {
        "parameters": [name for name in differences.missing if name not in buffers],
        "buffers": [name for name in differences.missing if name in buffers],
    }.items():
        if names:
            problems.append(
                f"{len(names)} {what} missing in the file ({first_names(names)}). It is "
                "incomplete, or the config adds modules: use a complete file, or its config file."
            )
    if differences.unexpected:
        problems.append(
            f"{len(differences.unexpected)} unknown to the model "
            f"({first_names(differences.unexpected)}). Use the config file and code that wrote "
            "them, or remove them from the file."
        )
    if differences.misshapen:
        shapes = [f"{name} {old} instead of {new}" for name, old, new in differences.misshapen]
        problems.append(
            f"{len(shapes)} of another shape ({first_names(shapes)}). {_USE_ITS_CONFIG}"
        )
    return problems
