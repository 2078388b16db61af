"""Plain parts and their fast twins: which of the two runs.

A twin is a function with the arguments and results of a plain method, in less time and memory.
`fast/table.py` registers one for methods marked `has_fast_twin`. It runs only if the part is not
subclassed, patched, replaced or hooked, see `why_plain`; otherwise the plain method runs, and one
log line says why. `run_plain` sets the flag `_always_plain` on modules.
"""

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

_logger = logging.getLogger(__name__)

_CALL = nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Twin:
    """A row of the table in `mask2former/fast/table.py`.

    Attributes:
        plain: the class whose method has the twin.
        method: name of the method, marked `has_fast_twin`.
        fast: the twin; called as the method is, with the module first.
        stands_for: names of the plain methods that the twin does not call: of the module itself, or
            dotted, of a module in `parts`, besides its `forward`.
        functions: names of functions, in the Python module of the plain class, that it does not
            call either.
        parts: submodules (dotted names) that the twin does not call as modules, and their types.
        condition: returns a further reason to run plain, or None.
    """

    plain: type[nn.Module]
    method: str
    fast: Callable[..., Any]
    stands_for: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    parts: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    condition: Callable[[Any], str | None] | None = None
    # Set on creation: by part, the plain methods before any patch; and the marked method.
    originals: dict[str, dict[str, Any]] = field(init=False)
    dispatcher: Any = field(init=False)
    namespace: ModuleType = field(init=False)
    original_functions: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        owned: dict[str, dict[str, Any]] = {"": {}}
        owned.update({path: {"forward": kind.forward} for path, kind in self.parts.items()})
        for name in self.stands_for:
            path, _, method = name.rpartition(".")
            owner = self.parts[path] if path else self.plain
            owned[path][method] = getattr(owner, method)
        object.__setattr__(self, "originals", owned)
        object.__setattr__(self, "dispatcher", self.plain.__dict__[self.method])
        namespace = sys.modules[self.plain.__module__]
        functions = {name: getattr(namespace, name) for name in self.functions}
        object.__setattr__(self, "namespace", namespace)
        object.__setattr__(self, "original_functions", functions)


_twins: dict[tuple[type[nn.Module], str], Twin] = {}
_told: set[str] = set()


def register_twin(twin: Twin) -> None:
    """Let a twin run for its plain method."""
    _twins[twin.plain, twin.method] = twin


def has_fast_twin(method: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: mark a method of an nn.Module for which a fast twin may run."""
    name = method.__name__

    @functools.wraps(method)
    def dispatch(self, *args, **kwargs):
        twin = _twins.get((type(self), name))
        if twin is not None:
            reason = why_plain(self, twin)
        else:
            reason = "" if "_always_plain" in self.__dict__ else "it is a subclass"
        run = twin.fast if twin is not None and reason is None else method
        if reason and not torch.compiler.is_compiling():
            _tell_once(f"{type(self).__name__}.{name} runs as written, not fast: {reason}")
        if "_recompute_whole" in self.__dict__ and torch.is_grad_enabled():
            return checkpoint(run, self, *args, use_reentrant=False, **kwargs)
        return run(self, *args, **kwargs)

    return dispatch


def why_plain(module: nn.Module, twin: Twin) -> str | None:
    """Why a module must run as written, or None if its twin may run.

    The twin may run if the module's type is exactly the plain class and nothing that the twin
    replaces is patched (on class or instance), replaced by another module, or hooked.
    """
    if "_always_plain" in module.__dict__:
        return ""  # MODEL.FAST False: nothing to explain in the log
    for path, originals in twin.originals.items():
        part = module
        for name in path.split(".") if path else ():
            part = getattr(part, name, None)
        reason = why_touched(part, twin.parts[path] if path else twin.plain, originals)
        if reason is None and path:
            reason = why_hooked(part)
        if reason is not None:
            return f"{path}: {reason}" if path else reason
    for name, original in twin.original_functions.items():
        if getattr(twin.namespace, name) is not original:
            return f"{twin.namespace.__name__}.{name} is replaced"
    return twin.condition(module) if twin.condition is not None else None


def why_touched(module: Any, expected: type[nn.Module], originals: Mapping[str, Any]) -> str | None:
    """Why a module is not exactly an `expected` with its original methods, or None if it is."""
    if type(module) is not expected:
        return f"a {type(module).__name__} replaces {expected.__name__}"
    for name, original in originals.items():
        if name in module.__dict__:
            return f"{name} is replaced on the instance"
        if getattr(expected, name) is not original:
            return f"{expected.__name__}.{name} is replaced on the class"
    return None


def why_hooked(module: nn.Module) -> str | None:
    """Which hooks would miss that a module is not called, or None if no hook is registered."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    # torch.export replaces it too.
    if not torch.compiler.is_compiling() and type(module).__call__ is not _CALL:
        return "its __call__ is replaced"
    return "there are global module hooks" if _has_any_global_hook() else None


def runs_fast(module: nn.Module, method: str = "forward") -> bool:
    """Whether calling the method would run its fast twin."""
    twin = _twins.get((type(module), method))
    forward = type(module).__dict__.get(method)
    return (
        twin is not None
        and method not in module.__dict__
        and forward is twin.dispatcher
        and why_plain(module, twin) is None
    )


def run_plain(model: nn.Module) -> nn.Module:
    """Make all parts of a model run as written (config key MODEL.FAST False). Returns the model."""
    for module in model.modules():
        vars(module)["_always_plain"] = True
    return model


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        _logger.info(text)
