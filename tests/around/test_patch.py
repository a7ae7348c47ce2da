"""fused_optim.patch(): torch.optim's own names make our optimizers, and unpatch() leaves no trace."""

import copy
import inspect
import io
import pickle
import sys
from collections.abc import Iterator

import pytest
import torch

import fused_optim
from support.cases import DEVICE, OF_TORCH

NAMES = OF_TORCH
# torch.optim wraps a class's step when its first optimizer is made.
for name in NAMES:
    getattr(torch.optim, name)([torch.zeros(1)])
INITS = {name: getattr(torch.optim, name).__init__ for name in NAMES}
EARLY = {name: getattr(torch.optim, name) for name in NAMES}  # as a module imported before has them


@pytest.fixture(autouse=True)
def not_patched() -> Iterator[None]:
    # Another test's torch.compile may have changed the classes since they were imported.
    before = {name: dict(vars(getattr(torch.optim, name))) for name in NAMES}
    yield
    fused_optim.unpatch()
    for name in NAMES:
        assert dict(vars(getattr(torch.optim, name))) == before[name]
        assert getattr(torch.optim, name).__init__ is INITS[name]


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(5, device=DEVICE))]


def is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, fused_optim.FusedOptimizer)


def step(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter]) -> None:
    for p in ps:
        p.grad = torch.linspace(-1, 1, 5, device=DEVICE)
    optimizer.step()


class Shared(torch.optim.Adam):
    """What a program may derive from torch.optim's class, here before patching."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.seen = 0

    def step(self, closure=None):
        self.seen += 1
        return super().step(closure)


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_makes_ours(name: str) -> None:
    fused_optim.patch()
    module = sys.modules[EARLY[name].__module__]
    for reference in (EARLY[name], getattr(torch.optim, name), getattr(module, name)):
        ps = params()
        optimizer = reference(ps, lr=0.5)
        assert type(optimizer) is getattr(fused_optim, name)
        assert optimizer.defaults["lr"] == 0.5
        step(optimizer, ps)
        assert "stock" not in optimizer.last_step.tensors


@pytest.mark.parametrize("name", NAMES)
def test_isinstance_holds_both_ways(name: str) -> None:
    stock = getattr(torch.optim, name)
    before = stock(params())
    fused_optim.patch()
    for optimizer in (before, stock(params()), getattr(fused_optim, name)(params())):
        assert isinstance(optimizer, stock)
        assert isinstance(optimizer, torch.optim.Adam) == (name in ("Adam", "AdamW"))
    assert not is_ours(before)


@pytest.mark.parametrize("name", NAMES)
def test_signature_stays(name: str) -> None:
    stock = getattr(torch.optim, name)
    before = inspect.signature(stock)
    fused_optim.patch()
    assert inspect.signature(stock) == before


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_the_constructor_stay(name: str) -> None:
    stock = getattr(torch.optim, name)

    def errors() -> list[tuple[type, str]]:
        found = []
        for args, kwargs in (
            ((), {}),
            ((params(),), {"lr": -1}),
            ((params(),), {"typo": 1}),
            (([],), {}),
        ):
            with pytest.raises((TypeError, ValueError)) as caught:
                stock(*args, **kwargs)
            found.append((caught.type, str(caught.value)))
        return found

    before = errors()
    fused_optim.patch()
    assert errors() == before


def test_implementation_flags_are_taken() -> None:
    fused_optim.patch()
    for flags in ({"foreach": True}, {"fused": True}, {"differentiable": True}):
        optimizer = torch.optim.AdamW(params(), **flags)
        assert is_ours(optimizer)
        assert optimizer.param_groups[0][next(iter(flags))] is True
    with pytest.raises(RuntimeError, match="`fused` and `foreach`"):
        torch.optim.AdamW(params(), foreach=True, fused=True)


def test_derived_classes_keep_their_step() -> None:
    fused_optim.patch()

    class Late(torch.optim.SGD):
        pass

    for optimizer_class in (Shared, Late):
        ps = params()
        optimizer = optimizer_class(ps, lr=0.1)
        assert type(optimizer) is optimizer_class and not is_ours(optimizer)
        step(optimizer, ps)
        assert (ps[0] != 1).any()
    assert {Shared, Late} <= fused_optim.patching.derived


def test_a_class_derived_from_ours_stays_ours() -> None:
    fused_optim.patch()

    class Mine(fused_optim.AdamW):
        pass

    assert type(Mine(params())) is Mine
    assert Mine not in fused_optim.patching.derived


def test_copies_and_pickles_keep_their_class() -> None:
    ps = params()
    before = torch.optim.AdamW(ps)
    step(before, ps)
    fused_optim.patch()
    after = torch.optim.AdamW(ps)
    step(after, ps)
    for optimizer in (before, after):
        saved = io.BytesIO()
        torch.save(optimizer, saved)
        saved.seek(0)
        copies = (
            copy.deepcopy(optimizer),
            pickle.loads(pickle.dumps(optimizer)),
            torch.load(saved, weights_only=False),
        )
        fused_optim.unpatch()  # which must not matter to what exists
        for clone in copies:
            assert type(clone) is type(optimizer)
            clone_params = clone.param_groups[0]["params"]
            step(clone, clone_params)
            assert clone.state[clone_params[0]]["step"] == 2
        fused_optim.patch()


def test_patching_twice_is_patching_once() -> None:
    fused_optim.patch()
    inits = [getattr(torch.optim, name).__init__ for name in NAMES]
    fused_optim.patch()
    assert inits == [getattr(torch.optim, name).__init__ for name in NAMES]
    assert is_ours(torch.optim.SGD(params()))
    fused_optim.unpatch()
    fused_optim.unpatch()
    assert type(torch.optim.SGD(params())) is torch.optim.SGD


def test_unpatching_leaves_what_others_have_wrapped() -> None:
    fused_optim.patch()
    ours = torch.optim.SGD.__init__
    calls = []

    def theirs(self, *args, **kwargs):
        calls.append(type(self))
        ours(self, *args, **kwargs)

    original = INITS["SGD"]
    try:
        torch.optim.SGD.__init__ = theirs
        fused_optim.unpatch()
        assert torch.optim.SGD.__init__ is theirs
        assert type(torch.optim.SGD(params())) is torch.optim.SGD
        fused_optim.patch()
        assert is_ours(torch.optim.SGD(params()))
        fused_optim.unpatch()
        assert torch.optim.SGD.__init__ is theirs
        assert len(calls) == 2
    finally:
        torch.optim.SGD.__init__ = original


def test_patched_gives_back_what_was() -> None:
    with fused_optim.patched():
        inside = torch.optim.Adam(params())
    assert is_ours(inside)
    assert type(torch.optim.Adam(params())) is torch.optim.Adam
    fused_optim.patch(max_grad_norm=2.0)
    with fused_optim.patched(max_grad_norm=1.0):
        assert torch.optim.Adam(params()).max_grad_norm == 1.0
        with pytest.raises(KeyError), fused_optim.patched():
            raise KeyError
        assert torch.optim.Adam(params()).max_grad_norm == 1.0
    assert torch.optim.Adam(params()).max_grad_norm == 2.0


def test_options_reach_every_optimizer_unless_the_program_gives_its_own() -> None:
    fused_optim.patch(zero_grads=True, ema_decay=0.5)
    for name in NAMES:
        optimizer = getattr(torch.optim, name)(params())
        assert optimizer.zero_grads is True
        assert optimizer.param_groups[0]["ema_decay"] == 0.5
    assert torch.optim.SGD(params(), zero_grads=False).zero_grads is False
    fused_optim.patch()
    assert torch.optim.SGD(params()).zero_grads is False


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 0.1}, TypeError),
        ({"max_grad_norm": -1.0}, ValueError),
        ({"state_dtype": "int4"}, ValueError),
    ],
)
def test_bad_options_patch_nothing(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        fused_optim.patch(**options)
    assert type(torch.optim.SGD(params())) is torch.optim.SGD


def test_patching_leaves_step_alone() -> None:
    before = fused_optim.FusedOptimizer.step
    fused_optim.patch()
    assert fused_optim.FusedOptimizer.step is before


def test_same_results_as_unpatched_ours() -> None:
    results = []
    for build in (fused_optim.AdamW, torch.optim.AdamW):
        with fused_optim.patched():
            ps = params()
            optimizer = build(ps, lr=0.1)
        for _ in range(3):
            step(optimizer, ps)
        results.append(ps[0].detach())
    assert torch.equal(*results)
