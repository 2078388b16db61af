"""The state of training in a checkpoint: what does not fit is named before it is used."""

import copy
import logging

import pytest
import torch
import toy_training as toy
from torch import nn

from mask2former.optimizer import build_optimizer

OPTIMIZER = ("_trainer", "optimizer")
ENTRY = (*OPTIMIZER, "state", 0)
GROUP = (*OPTIMIZER, "param_groups", 0)
SCHEDULER = ("hooks", "LRScheduler")
WEIGHT = r"backbone\.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer after two iterations, and its state."""
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path_factory.mktemp("run"), "SOLVER.MAX_ITER", "2"))
    trainer.train()
    path = trainer.checkpointer.get_checkpoint_file()
    return trainer, torch.load(path)


class Remove:
    pass


def changed(checkpoint, keys, value):
    result = copy.deepcopy(checkpoint)
    node = result["trainer"]
    for key in keys[:-1]:
        node = node[key]
    if value is Remove:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return result


LAUGHS: list = [0]
for _ in range(20):
    LAUGHS = [LAUGHS] * 9

BAD = [
    (("iteration",), LAUGHS, r"trainer\.iteration is a list"),
    ((*SCHEDULER, "base_lrs"), LAUGHS, "base_lrs is a list"),
    ((*SCHEDULER, "power"), LAUGHS, "power is a list"),
    (("hooks", "MetricWindow"), {"loss": LAUGHS}, "MetricWindow.loss holds a list"),
    ((*GROUP, "lr"), LAUGHS, "has lr a list"),
    ((*GROUP, "betas"), LAUGHS, "has betas a list"),
    ((*ENTRY, "step"), LAUGHS, f"step of {WEIGHT} is a list"),
    ((*ENTRY, "exp_avg"), LAUGHS, f"exp_avg of {WEIGHT} is a list"),
    (ENTRY, LAUGHS, f"state of {WEIGHT} is no dict"),
    (("iteration",), Remove, r"trainer\.iteration is None; allowed: integers"),
    (("iteration",), -1, r"trainer\.iteration is -1"),
    (("iteration",), 1.5, r"trainer\.iteration is 1\.5"),
    (("iteration",), True, r"trainer\.iteration is True"),
    (("iteration",), "1", r"trainer\.iteration is '1'"),
    (("iteration",), 2**64, r"trainer\.iteration is 18446744073709551616"),
    (("solver",), [], r"trainer\.solver is a list"),
    (("solver",), {"SOLVER.BASE_LR": LAUGHS}, r"trainer\.solver\.SOLVER\.BASE_LR is a list"),
    (("seed",), "x", r"trainer\.seed is 'x'"),
    (("seed",), -3, r"trainer\.seed is -3"),
    (("earlier_files",), {"log.txt": (1, 2)}, r"trainer\.earlier_files has 'log.txt'"),
    (("earlier_files",), {"metrics.json": (-1, 2)}, r"allowed: size and time of metrics.json,"),
    (("_trainer",), Remove, r"trainer\._trainer is a NoneType, not a dict"),
    (("_trainer",), [1], r"trainer\._trainer is a list"),
    (("_trainer", "iteration"), None, r"trainer\._trainer\.iteration is None"),
    (("_trainer", "grad_scaler"), 3, r"grad_scaler is a int, not a dict"),
    (("_trainer", "grad_scaler"), {"scale": float("nan")}, r"grad_scaler\.scale is nan"),
    (("_trainer", "grad_scaler"), {"scale": 1.0, "growth_factor": 0.5}, r"growth_factor is 0\.5"),
    (("hooks",), [], r"trainer\.hooks is a list"),
    ((*SCHEDULER,), 3, r"hooks\.LRScheduler is a int"),
    ((*SCHEDULER, "last_epoch"), Remove, "LRScheduler lacks last_epoch"),
    ((*SCHEDULER, "last_epoch"), -1, r"last_epoch is -1; allowed"),
    ((*SCHEDULER, "last_epoch"), float("inf"), "last_epoch is inf"),
    ((*SCHEDULER, "last_epoch"), "2", "last_epoch is '2'"),
    ((*SCHEDULER, "base_lrs"), "abc", "base_lrs is 'abc'"),
    ((*SCHEDULER, "base_lrs"), ["abc"], r"base_lrs is \['abc'\]"),
    ((*SCHEDULER, "base_lrs"), [float("nan"), 1.0], "base_lrs is"),
    ((*SCHEDULER, "base_lrs"), [-1.0, 1.0], "base_lrs is"),
    ((*SCHEDULER, "power"), "high", "power is 'high'"),
    ((*SCHEDULER, "step"), 3, "has an entry 'step', which is not a state"),
    ((*SCHEDULER, "optimizer"), 3, "has an entry 'optimizer'"),
    ((*SCHEDULER, 3), 3, "has an entry 3"),
    (("hooks", "MetricWindow"), {"loss": 3}, "MetricWindow.loss holds None"),
    (("hooks", "MetricWindow"), {"loss": [3]}, "MetricWindow.loss holds 3; allowed: pairs"),
    (("hooks", "MetricWindow"), {"loss": [("a", 1)]}, "MetricWindow.loss holds"),
    (("hooks", "MetricWindow"), {"loss": [(1.0, -1)]}, "MetricWindow.loss holds"),
    (OPTIMIZER, Remove, r"trainer\._trainer\.optimizer is a NoneType"),
    ((*OPTIMIZER, "state"), Remove, "lacks 'param_groups' or 'state'"),
    ((*OPTIMIZER, "state"), [], "lacks 'param_groups' or 'state'"),
    ((*OPTIMIZER, "param_groups"), {}, "lacks 'param_groups' or 'state'"),
    ((*OPTIMIZER, "param_groups"), [], "different number of parameter groups"),
    (GROUP, 3, "group 0 of the optimiser's parameters has no list 'params'"),
    ((*GROUP, "params"), Remove, "has no list 'params'"),
    ((*GROUP, "params"), ["a", "b"], "has no list 'params'"),
    ((*GROUP, "params"), [0], "different number"),
    ((*GROUP, "params"), [0, 0], "name a parameter twice"),
    ((*GROUP, "lr"), float("nan"), "group 0 .* has lr nan; allowed: a finite number"),
    ((*GROUP, "lr"), -1.0, r"has lr -1\.0"),
    ((*GROUP, "lr"), "1", "has lr '1'"),
    ((*GROUP, "lr"), torch.ones(2), "has lr a Tensor"),
    ((*GROUP, "eps"), Remove, "has no eps: another optimiser than"),
    ((*GROUP, "betas"), 0.9, r"has betas 0\.9; allowed: 2 numbers below 1"),
    ((*GROUP, "betas"), (0.9,), "has betas"),
    ((*GROUP, "betas"), (0.9, 1.5), "has betas"),
    ((*GROUP, "betas"), ("a", "b"), "has betas"),
    ((*GROUP, "amsgrad"), "no", "has amsgrad 'no'"),
    (ENTRY, 3, f"state of {WEIGHT} is no dict"),
    (ENTRY, {1: 2}, f"state of {WEIGHT} is no dict"),
    ((*ENTRY, "exp_avg"), torch.zeros(3), rf"exp_avg of {WEIGHT} has shape \(3,\), .* \(8, 4\)"),
    ((*ENTRY, "exp_avg"), torch.zeros(4, 8), rf"exp_avg of {WEIGHT} has shape \(4, 8\)"),
    ((*ENTRY, "exp_avg"), torch.zeros(()), rf"exp_avg of {WEIGHT} has shape \(\)"),
    ((*ENTRY, "exp_avg"), torch.zeros(8, 4, dtype=torch.int64), rf"{WEIGHT} is torch\.int64"),
    ((*ENTRY, "exp_avg"), torch.zeros(8, 4, dtype=torch.complex64), rf"{WEIGHT} is torch\.complex"),
    ((*ENTRY, "exp_avg"), "zeros", f"exp_avg of {WEIGHT} is a str, not a tensor"),
    ((*ENTRY, "exp_avg"), [0.0], f"exp_avg of {WEIGHT} is a list"),
    ((*ENTRY, "exp_avg"), Remove, f"{WEIGHT} lacks exp_avg"),
    ((*ENTRY, "exp_avg_sq"), torch.full((8, 4), float("nan")), rf"\({WEIGHT}, \.\.\.\) holds NaN"),
    ((*ENTRY, "exp_avg_sq"), torch.full((8, 4), float("inf")), rf"\({WEIGHT}, \.\.\.\) holds NaN"),
    ((*ENTRY, "step"), Remove, f"{WEIGHT} lacks step"),
    ((*ENTRY, "step"), torch.tensor(float("nan")), f"step of {WEIGHT} is"),
    ((*ENTRY, "step"), torch.tensor(-1.0), f"step of {WEIGHT} is"),
    ((*ENTRY, "step"), torch.ones(1), f"step of {WEIGHT} is"),
    ((*ENTRY, "step"), torch.ones(8, 4), f"step of {WEIGHT} is"),
    ((*ENTRY, "step"), "2", f"step of {WEIGHT} is"),
    ((*ENTRY, "step"), None, f"step of {WEIGHT} is"),
]


def test_bad_state_is_named(saved, tmp_path):
    trainer, checkpoint = saved
    path = str(tmp_path / "model_final.pth")
    for keys, value, message in BAD:
        torch.save(changed(checkpoint, keys, value), path)
        with pytest.raises(ValueError, match=rf"model_final\.pth: the state of tr.*{message}"):
            trainer.checkpointer.load(path)


def test_good_state_is_accepted(saved, tmp_path):
    trainer, checkpoint = saved
    path = str(tmp_path / "model_final.pth")
    for keys, value in [
        (("seed",), Remove),
        (("hooks",), Remove),
        (("hooks", "Foreign"), {"a": 1}),
        ((*SCHEDULER, "verbose"), False),
        ((*GROUP, "fused"), Remove),
        ((*GROUP, "initial_lr"), Remove),
        ((*ENTRY, "step"), 2),
        (("_trainer", "grad_scaler"), {}),
    ]:
        torch.save(changed(checkpoint, keys, value), path)
        trainer.checkpointer.load(path)
    torch.save(checkpoint, path)
    trainer.checkpointer.load(path)
    state = trainer._trainer.optimizer.state_dict()
    expected = checkpoint["trainer"]["_trainer"]["optimizer"]
    assert state["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert all(torch.equal(state["state"][index][key], value) for key, value in entry.items())


def step(optimizer, model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_state_gets_the_layout_of_its_parameter(tmp_path):
    """Fused kernels walk through memory; an expanded or transposed moment would mislead them."""
    cfg = toy.toy_config(tmp_path)
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = build_optimizer(cfg, model)
    step(optimizer, model)
    state = copy.deepcopy(optimizer.state_dict())
    entry = state["state"][0]
    values = torch.arange(6.0).reshape(2, 3)
    entry["exp_avg"] = values.t().contiguous().t()
    entry["exp_avg_sq"] = torch.ones(1).expand(2, 3)
    optimizer.load_state_dict(state)
    loaded = optimizer.state[model[0].weight]
    assert torch.equal(loaded["exp_avg"], values)
    assert loaded["exp_avg"].is_contiguous() and loaded["exp_avg_sq"].is_contiguous()
    assert loaded["exp_avg_sq"].untyped_storage().nbytes() == 24
    step(optimizer, model)


def test_parameters_without_state_start_anew(tmp_path, caplog):
    """As those that had no gradient yet."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = build_optimizer(toy.toy_config(tmp_path), model)
    step(optimizer, model)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(state)
    assert "state of 1 parameters (0.bias, ...) is not in the checkpoint" in caplog.text
    step(optimizer, model)
    assert optimizer.state[model[0].bias]["step"] == 1


def test_another_optimizer_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    states = {}
    for name in ("ADAMW", "SGD"):
        optimizer = build_optimizer(toy.toy_config(tmp_path, "SOLVER.OPTIMIZER", name), model)
        step(optimizer, model)
        states[name] = optimizer, optimizer.state_dict()
    with pytest.raises(ValueError, match=r"has no betas: another optimiser than \S*AdamW|Clipping"):
        states["ADAMW"][0].load_state_dict(states["SGD"][1])
    with pytest.raises(ValueError, match="has no momentum: another optimiser"):
        states["SGD"][0].load_state_dict(states["ADAMW"][1])


@pytest.mark.parametrize(("first", "second"), [("ADAMW", "SGD"), ("SGD", "ADAMW")])
def test_another_optimiser(tmp_path, first, second):
    options = ("SOLVER.MAX_ITER", "1", "SOLVER.OPTIMIZER")
    toy.ToyTrainer(toy.toy_config(tmp_path, *options, first)).train()
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path, *options, second))
    with pytest.raises(ValueError, match=r"model_final\.pth.* another optimiser than .*OPTIMIZER"):
        trainer.resume_or_load()
