"""What the backbones made of timm's models share: building them, depths of layers, freezing.

timm is imported when a model is built, because few configs need it. A model keeps timm's names of
parameters (`body.…`), so that its weights can be told from a file of timm (`timm_weights.py`).
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# How timm groups layers for layer-wise learning rates, for the models that do not say.
_GROUPS = {
    "stem": r"^stem",
    "blocks": [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))],
}
# What lets a model take images of any size; the first option that its class has.
_ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True}


def import_timm() -> ModuleType:
    """The package timm.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"this backbone needs the package timm, which cannot be imported ({error}): "
            "`pip install 'timm>=1.0.31'`."
        ) from error
    return timm


def check_name(name: str, key: str) -> None:
    """Check that timm has a model.

    Args:
        name: architecture, or architecture.weights, such as "convnext_tiny.fb_in22k_ft_in1k".
        key: the config key, for the error.

    Raises:
        ValueError: timm is missing, or has no such model; with the closest names.
    """
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{key} is {name!r}, which is no model of timm {timm.__version__}.{hint} "
            "`timm.list_models('*resnet*')` lists models."
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = ", ".join(f"{architecture}.{one}" for one in tags) or architecture
        raise ValueError(f"{key} is {name!r}, but timm has no such weights; allowed: {known}.")


def on_meta(name: str, **options: Any) -> Any:
    """A model of timm on the meta device: it takes no memory, and tells shapes only."""
    with torch.device("meta"):
        return import_timm().create_model(name, **options)


def options_for(name: str, key: str, in_channels: int, drop_path_rate: float) -> dict[str, Any]:
    """Arguments to create a model of timm without classifier, for images of any size if it can.

    Args:
        name: its name, see `check_name`.
        key: the config section of the backbone, for errors.
        in_channels: of the images.
        drop_path_rate: largest probability of stochastic depth.

    Raises:
        ValueError: timm has no such model, or it has no stochastic depth.
    """
    check_name(name, f"{key}.NAME")
    parameters = _constructor_options(type(on_meta(name)))
    options: dict[str, Any] = {"in_chans": in_channels, "num_classes": 0}
    for option, value in _ANY_SIZE.items():
        if option in parameters:
            options[option] = value
            break
    if drop_path_rate:
        if "drop_path_rate" not in parameters:
            raise ValueError(
                f"{key}.DROP_PATH_RATE is {drop_path_rate}; allowed: 0, because {name!r} "
                f"({key}.NAME) has no stochastic depth."
            )
        options["drop_path_rate"] = drop_path_rate
    return options


def _constructor_options(model_type: type) -> set[str]:
    """Names of the arguments of a class, with those that it passes on to the classes it extends."""
    names: set[str] = set()
    for base in model_type.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= parameters.keys()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Pad (B, C, H, W) with zeros, right and below, to multiples of a number of pixels."""
    height, width = images.shape[-2:]
    pad = (0, -width % divisor, 0, -height % divisor)
    return F.pad(images, pad) if any(pad) else images


def crop_to_stride(features: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Cut the padding of a map with this stride: ⌈H/stride⌉ × ⌈W/stride⌉ of an image (H, W)."""
    height, width = (-(-side // stride) for side in size)
    if tuple(features.shape[-2:]) == (height, width):
        return features
    return features[..., :height, :width].contiguous()


def layer_depths(model: Any) -> dict[str, int]:
    """The depth of each parameter of a timm model, as timm numbers layers for learning rates.

    Returns:
        Depth by name: 0 for the stem and embeddings, then blocks in their order without gaps.
    """
    from timm.models import group_parameters

    matcher: Any = _GROUPS
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=False)
    groups: dict[str, int] = group_parameters(model, matcher, reverse=True)
    rank = {depth: i for i, depth in enumerate(sorted(set(groups.values())))}
    return {name: rank[depth] for name, depth in groups.items()}


def last_depth_within(model: nn.Module, depths: dict[str, int], module_name: str) -> int:
    """The largest depth of the parameters from the input to the end of a module.

    Modules are registered in the order in which they run, which timm relies on too.
    """
    names = [name for name, _ in model.named_modules()]
    end = max(
        i
        for i, name in enumerate(names)
        if name == module_name or name.startswith(f"{module_name}.")
    )
    before = set(names[: end + 1])
    return max(depth for name, depth in depths.items() if name.rpartition(".")[0] in before)


class TimmParts(nn.Module):
    """Depths, freezing and activation checkpointing of a backbone around a timm model.

    A base class beside that of the backbone; `_set_up` ends the constructor.
    """

    num_depths: int
    # Whether it has batch norms and none of them is trained.
    has_frozen_norms = False

    def _set_up(
        self, name: str, prefix: str, depths: dict[str, int], freeze_depths: Sequence[int]
    ) -> None:
        """
        Args:
            name: of the timm model.
            prefix: of its parameters within the backbone, with the dot.
            depths: of its parameters, by timm's names.
            freeze_depths: the last depth that is frozen by freeze_at 1, 2, …
        """
        self.timm_name = name
        self.timm_prefix = prefix
        self._depths = depths
        self._freeze_depths = tuple(freeze_depths)
        self._frozen: frozenset[str] = frozenset()
        self.num_depths = max(depths.values()) + 1

    @property
    def timm_model(self) -> nn.Module:
        """The model of timm."""
        return self.get_submodule(self.timm_prefix.rstrip("."))

    def parameter_depth(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning rates.

        Args:
            name: within the backbone.

        Returns:
            0 for the stem and embeddings, then blocks in their order; num_depths - 1 is the last
            of the timm model, num_depths what is added to it.
        """
        if name.startswith(self.timm_prefix):
            return self._depths[name.removeprefix(self.timm_prefix)]
        return self.num_depths

    def freeze(self, freeze_at: int) -> "TimmParts":
        """Stop training the first parts. They stay in evaluation mode, so that statistics stay too.

        Args:
            freeze_at: as of Detectron2's ResNet: 0 nothing, 1 the stem, n also n - 1 stages
                (hierarchical models) or blocks (plain transformers).

        Raises:
            ValueError: there are not so many.
        """
        if freeze_at <= 0:
            return self
        if freeze_at > len(self._freeze_depths):
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; allowed with {self.timm_name!r}: 0 to "
                f"{len(self._freeze_depths)}."
            )
        limit = self._freeze_depths[freeze_at - 1]
        frozen, trained = set[str](), set[str]()
        for name, depth in self._depths.items():
            parts = name.split(".")
            paths = {".".join(parts[:i]) for i in range(1, len(parts))}
            (frozen if depth <= limit else trained).update(paths)
        model = self.timm_model
        for name, parameter in model.named_parameters():
            if self._depths[name] <= limit:
                parameter.requires_grad_(False)
        self._frozen = frozenset(frozen - trained)
        self._evaluate_frozen()
        return self

    def _evaluate_frozen(self) -> None:
        model = self.timm_model
        for name in self._frozen:
            model.get_submodule(name).eval()

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:
            self._evaluate_frozen()
        return self

    def set_checkpointing(self, enabled: bool) -> None:
        """Turn activation checkpointing of the blocks on or off.

        Raises:
            ValueError: the model has none, or it would move statistics of batch norms twice.
        """
        norms = [x for x in self.timm_model.modules() if isinstance(x, _BatchNorm) and x.training]
        if enabled and norms and any(x.weight is None or x.weight.requires_grad for x in norms):
            raise ValueError(
                f"MODEL.CHECKPOINTING is 'blocks', but timm would update the statistics of the "
                f"batch norms of {self.timm_name!r} twice: set MODEL.TIMM.NORM to FrozenBN, or "
                "MODEL.CHECKPOINTING to none, selective or auto."
            )
        set_checkpointing: Callable[[bool], None] | None
        set_checkpointing = getattr(self.timm_model, "set_grad_checkpointing", None)
        try:
            if set_checkpointing is not None:
                set_checkpointing(enabled)
            elif enabled:
                raise AssertionError
        except AssertionError as error:  # how timm says it
            raise ValueError(
                f"timm's {self.timm_name!r} has no activation checkpointing: set "
                "MODEL.CHECKPOINTING to none, selective or auto, or choose another backbone."
            ) from error
