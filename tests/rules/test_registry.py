"""Table, classes, kernels and torch.optim list the same optimizers, options and states."""

import importlib
import inspect
import re

import pytest
import torch

import fused_optim
from fused_optim import _C
from fused_optim.optimizers import OPTIMIZERS, REPLACED
from support.cases import CASES, OF_TORCH, VARIANTS, Case, stock_class
from support.program import SCALARS

RULES = _C.rules()
every_optimizer = pytest.mark.parametrize("name", VARIANTS)

# Choose an implementation, not the arithmetic.
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
# Part of the arithmetic, but of no rule: the sign is put on the grad as it is loaded, and the
# accumulator's first value is written when its state is created; and whether it may step at all.
OUTSIDE_THE_RULE = {"maximize", "initial_accumulator_value", "train_mode"}


def cases_of(name: str) -> list[Case]:
    return [case for case in CASES if case.optimizer == name]


def fused_class(name: str) -> type:
    return getattr(fused_optim, name)


def test_table_package_and_kernels_list_the_same_optimizers() -> None:
    exported = {name: getattr(fused_optim, name) for name in fused_optim.__all__}
    classes = {
        name: item
        for name, item in exported.items()
        if isinstance(item, type) and issubclass(item, torch.optim.Optimizer)
    }
    assert classes.pop("FusedOptimizer") is fused_optim.FusedOptimizer
    assert classes == OPTIMIZERS
    assert OPTIMIZERS.keys() == VARIANTS.keys()
    assert {fused_class(name)._rule for name in VARIANTS} == RULES.keys()


def test_those_of_torch_optim_are_replaced() -> None:
    expected = {getattr(torch.optim, name): fused_class(name) for name in OF_TORCH}
    assert expected == REPLACED


@every_optimizer
def test_class_is_the_stock_class_with_another_step(name: str) -> None:
    ours, stock = fused_class(name), stock_class(name)
    assert issubclass(ours, stock) and ours.__name__ == stock.__name__
    assert ours.step is not stock.step
    assert issubclass(stock, ours._stock)


@every_optimizer
def test_options_of_the_rule_are_those_of_the_group(name: str) -> None:
    group = cases_of(name)[0].stock([torch.zeros(1)]).param_groups[0]
    flattened = set()
    for key in group.keys() - IMPLEMENTATION - OUTSIDE_THE_RULE:
        if isinstance(group[key], tuple):
            flattened |= {f"{key}.{i}" for i in range(len(group[key]))}
        else:
            flattened.add(key)
    options = RULES[fused_class(name)._rule]["options"]
    assert len(options) == len(set(options))
    assert set(options) == flattened


@every_optimizer
def test_states_of_the_rule_are_those_stock_creates(name: str) -> None:
    created = set()
    for case in cases_of(name):
        param = torch.zeros(3)
        param.grad = torch.ones(3)
        optimizer = case.stock([param])
        optimizer.step()
        created |= optimizer.state[param].keys()
    rule = RULES[fused_class(name)._rule]
    assert len(rule["states"]) == len(set(rule["states"]))
    assert set(rule["states"]) == created - SCALARS
    assert created & SCALARS <= {*rule["scalars"]}


def test_triton_takes_states_options_scalars_and_hypers_in_the_order_of_cpp() -> None:
    rules = pytest.importorskip("fused_optim.triton_kernels.rules", reason="needs triton")
    prepare = importlib.import_module("fused_optim.triton_kernels.prepare")
    assert list(rules.RULES) == list(RULES)
    for name, rule in rules.RULES.items():
        functions = [f for f in vars(prepare) if f == name or f.startswith(f"{name}_")]
        assert rule.update.fn.__name__ == name and name in functions
        sources = [inspect.getsource(getattr(prepare, function).fn) for function in functions]
        facts = {**RULES[name]}
        facts["options"] = [
            re.sub(r"s\.(\d)", lambda m: str(int(m[1]) + 1), o) for o in facts["options"]
        ]
        found = set()
        for source in (inspect.getsource(rule.update.fn), *sources):
            for names, whole in re.findall(r"^    ([\w, ]+) = (\w+)(?:\[0\])?$", source, re.M):
                if whole in facts:
                    assert names.split(", ") == facts[whole], (name, whole)
                    found.add(whole)
        assert found >= {"states", "options", "hypers"}, name


@every_optimizer
def test_table_has_every_option(name: str) -> None:
    constructor = inspect.signature(stock_class(name)).parameters
    tried = {key for case in cases_of(name) for key, _ in case.options}
    assert constructor.keys() - IMPLEMENTATION - tried == {"lr"} - tried
    assert any("lr" in case.tensor_options for case in cases_of(name))


def test_case_names_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
