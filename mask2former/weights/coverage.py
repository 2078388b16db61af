"""How many tensors of each module of a model a checkpoint fills."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

# By the beginning of a name; the first that fits.
_MODULES = {
    "backbone.": "backbone",
    "sem_seg_head.pixel_decoder.": "pixel decoder",
    "sem_seg_head.predictor.": "transformer decoder",
    "criterion.": "criterion",
}
_OTHER = "other"


@dataclass
class Coverage:
    """Of one module.

    Args:
        num_loaded: tensors that the file provides.
        num_tensors: of all.
        from_config: of those that the file does not provide, how many the config determines.
    """

    num_loaded: int = 0
    num_tensors: int = 0
    from_config: int = 0

    def __str__(self) -> str:
        text = f"{self.num_loaded} of {self.num_tensors}"
        return f"{text} ({self.from_config} from the config)" if self.from_config else text


def module_of(name: str) -> str:
    """The module of a parameter or buffer, such as "pixel decoder"."""
    for beginning, module in _MODULES.items():
        if name.startswith(beginning):
            return module
    return _OTHER


def coverage_by_module(
    names: Iterable[str], loaded: Collection[str], from_config: Collection[str] = ()
) -> dict[str, Coverage]:
    """Count by module, in the order of the data flow.

    Args:
        names: of all tensors of the model's state dict.
        loaded: those that the file provides.
        from_config: those that the config determines.
    """
    modules: dict[str, Coverage] = {module: Coverage() for module in (*_MODULES.values(), _OTHER)}
    for name in names:
        coverage = modules[module_of(name)]
        coverage.num_tensors += 1
        if name in loaded:
            coverage.num_loaded += 1
        elif name in from_config:
            coverage.from_config += 1
    return {module: coverage for module, coverage in modules.items() if coverage.num_tensors}


def describe_coverage(coverage: dict[str, Coverage]) -> str:
    """One line, such as "backbone 265 of 265, pixel decoder 92 of 92"."""
    return ", ".join(f"{module} {counts}" for module, counts in coverage.items())
