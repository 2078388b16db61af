"""When the fast twin runs, and when the plain method does: subclasses, patches, parts, hooks."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from mask2former.modeling.layers import SelfAttentionLayer
from mask2former.utils import twins
from mask2former.utils.twins import Twin, has_fast_twin, register_twin, run_plain, runs_fast


class Part(nn.Module):
    def forward(self, x):
        return x + 1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    @has_fast_twin
    def forward(self, x, scale=1):
        return "plain", self.step(self.part(x)) * scale

    def step(self, x):
        return 2 * x


@pytest.fixture(autouse=True)
def twin(monkeypatch):
    monkeypatch.setattr(twins, "_twins", dict(twins._twins))
    monkeypatch.setattr(twins, "_told", set())
    register_twin(
        Twin(
            Plain,
            "forward",
            lambda module, x, scale=1: ("fast", 2 * (x + 1) * scale),
            stands_for=("step", "part.forward"),
            parts={"part": Part},
        )
    )


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="mask2former.utils.twins")
    return lambda: [record.message for record in caplog.records]


def test_fast_by_default(told):
    assert Plain()(3) == ("fast", 8)
    assert Plain()(3, scale=2) == ("fast", 16)
    assert runs_fast(Plain())
    assert told() == []


def test_plain_keeps_its_name_and_docs():
    assert Plain.forward.__name__ == "forward"
    assert Plain.forward.__wrapped__(Plain(), 3) == ("plain", 8)


def test_a_subclass_runs_plain(told):
    class Derived(Plain):
        pass

    assert Derived()(3) == Derived()(1, scale=2) == ("plain", 8)
    assert not runs_fast(Derived())
    assert told() == ["Derived.forward runs as written, not fast: it is a subclass"]  # said once


def test_an_overriding_subclass_may_call_the_plain_method():
    class Derived(Plain):
        def forward(self, x):
            return "derived", *super().forward(x)

    assert Derived()(3) == ("derived", "plain", 8)


def test_a_method_patched_on_the_class(monkeypatch, told):
    module = Plain()
    monkeypatch.setattr(Plain, "step", lambda self, x: 10 * x)
    assert module(3) == ("plain", 40)
    assert told() == [
        "Plain.forward runs as written, not fast: Plain.step is replaced on the class"
    ]
    monkeypatch.undo()


def test_a_patch_that_is_taken_back():
    original, module = Plain.step, Plain()
    Plain.step = lambda self, x: 0
    assert module(3) == ("plain", 0)
    Plain.step = original
    assert module(3) == ("fast", 8)


def test_a_method_patched_on_the_instance():
    module = Plain()
    module.step = lambda x: 10 * x
    assert module(3) == ("plain", 40)
    assert Plain()(3) == ("fast", 8)
    del module.step
    assert module(3) == ("fast", 8)


def test_forward_replaced_or_wrapped(monkeypatch):
    module = Plain()
    module.forward = lambda x: "own"
    assert module(3) == "own" and not runs_fast(module)
    original = Plain.forward
    monkeypatch.setattr(Plain, "forward", lambda self, x: ("wrapped", *original(self, x)))
    assert not runs_fast(Plain())
    assert Plain()(3) == ("wrapped", "fast", 8)  # what it stands for is untouched


def test_a_part_of_another_type():
    class Other(Part):
        def forward(self, x):
            return x + 100

    module = Plain()
    module.part = Other()
    assert module(3) == ("plain", 206)
    del module.part
    module.part = lambda x: x
    assert module(3) == ("plain", 6)


def test_a_part_patched_on_class_and_instance(monkeypatch):
    module = Plain()
    module.part.forward = lambda x: x
    assert module(3) == ("plain", 6)
    monkeypatch.setattr(Part, "forward", lambda self, x: x - 1)
    assert Plain()(3) == ("plain", 4)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_hook_on_a_part(register):
    module, seen = Plain(), []
    handle = getattr(module.part, register)(lambda *args: seen.append(args[0]))
    x = torch.ones(1, requires_grad=True)
    kind, value = module(x)
    value.sum().backward()
    assert kind == "plain" and seen == [module.part]
    handle.remove()
    assert module(3) == ("fast", 8)


def test_a_hook_on_the_module_itself_fires_either_way():
    module, seen = Plain(), []
    module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    module(3)
    assert seen == ["fast"]


def test_a_global_hook():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        assert Plain()(3) == ("plain", 8)
    finally:
        handle.remove()
    assert seen == [Part, Plain]


def test_the_config_switch(told):
    module = nn.Sequential(Plain())
    assert run_plain(module) is module
    assert module(3) == ("plain", 8)
    assert copy.deepcopy(module)(3) == ("plain", 8)
    assert told() == []


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_run_fast(duplicate):
    assert runs_fast(duplicate(SelfAttentionLayer(8, 2)))


def test_a_condition(told):
    register_twin(Twin(Plain, "forward", lambda module, x: "fast", condition=lambda m: "no reason"))
    assert Plain()(3) == ("plain", 8)
    assert told() == ["Plain.forward runs as written, not fast: no reason"]
