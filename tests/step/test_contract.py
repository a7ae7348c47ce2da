"""Behaviour of torch.optim.Optimizer that a subclass with its own step() could lose."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fused_optim
from support.cases import BACKEND, CASES, DEVICE, OF_TORCH, VARIANTS, Case, stock_class
from support.marks import all_cases, each_optimizer, few_cases, not_interpreted
from support.processes import python
from support.twins import SHAPES, Run, run_both

# Values that some constructor refuses, by the name of its argument.
REFUSED = {
    "lr": (-1.0, torch.ones(2), float("nan")),
    "betas": ((1.0, 0.9), (0.9, -0.1), (0.9, torch.tensor(0.9))),
    "eps": (-1.0,),
    "weight_decay": (-1.0,),
    "momentum": (-0.5,),
    "alpha": (-0.5,),
    "lr_decay": (-0.5,),
    "initial_accumulator_value": (-0.5,),
    "nesterov": (True,),
    "no_such_option": (1,),
}


def fused_class(case: Case) -> type:
    return getattr(fused_optim, case.optimizer)


@each_optimizer
def test_is_the_stock_class_with_the_same_signatures_and_one_pass(case: Case) -> None:
    stock, fused = stock_class(case.optimizer), fused_class(case)
    assert issubclass(fused, stock)
    assert fused.__name__ == stock.__name__
    *arguments, one_pass = inspect.signature(fused).parameters.values()
    found = [(a.name, a.kind, a.default) for a in arguments]
    expected = inspect.signature(stock).parameters.values()
    assert found == [(a.name, a.kind, a.default) for a in expected]
    assert one_pass.kind is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        fused([torch.zeros(1)], learning_rate=1)
    assert list(inspect.signature(fused.step).parameters) == ["self", "closure"]


@each_optimizer
def test_calls_of_step_that_do_not_fit_raise_as_stocks(case: Case) -> None:
    for args, kwargs in (((), {"clousure": None}), ((None, None), {}), ((), {"foo": 1, "bar": 2})):
        texts = []
        for optimizer_class in (fused_class(case), stock_class(case.optimizer)):
            with pytest.raises(TypeError) as raised:
                optimizer_class([torch.nn.Parameter(torch.zeros(2))]).step(*args, **kwargs)
            texts.append(str(raised.value))
        assert texts[0] == texts[1]


@each_optimizer
@pytest.mark.parametrize("key", REFUSED)
def test_constructor_raises_as_stock(case: Case, key: str) -> None:
    for value in REFUSED[key]:
        results = []
        for optimizer_class in (fused_class(case), stock_class(case.optimizer)):
            try:
                optimizer_class([torch.zeros(2)], **{key: value})
                results.append(None)
            except (ValueError, TypeError, RuntimeError) as error:
                # Python 3.13 adds what is near the name, where it knows all names: not to ours.
                results.append((type(error), str(error).partition(". Did you mean")[0]))
        assert results[0] == results[1], value


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {*OF_TORCH}))
def test_constructor_of_what_torch_lacks_refuses_what_torch_would(name: str) -> None:
    constructor = inspect.signature(stock_class(name)).parameters
    most = (0.9,) * (len(constructor["betas"].default) - 1)
    refused = {**REFUSED, "betas": ((1.0, *most), (*most, -0.1), most, (*most, 0.9, 0.9))}
    for key in constructor.keys() & refused.keys():
        for value in refused[key]:
            with pytest.raises(ValueError, match=r"Invalid|1-element"):
                getattr(fused_optim, name)([torch.zeros(2)], **{key: value})


@each_optimizer
@pytest.mark.parametrize(
    "params",
    [
        lambda: torch.zeros(2),
        lambda: [],
        lambda: [torch.zeros(2, requires_grad=True) * 2],
        lambda: ["a string"],
        lambda: [{"params": {torch.zeros(2)}}],
        lambda: [{"params": [p := torch.zeros(1)]}, {"params": [p]}],
        lambda: [("a", torch.zeros(1)), torch.zeros(2)],
    ],
    ids=["tensor", "empty", "non-leaf", "string", "set", "twice", "half-named"],
)
def test_bad_params_raise_as_stock(case: Case, params) -> None:
    with pytest.raises(Exception) as stock_error:  # noqa: PT011
        stock_class(case.optimizer)(params())
    with pytest.raises(stock_error.type) as fused_error:
        fused_class(case)(params())
    assert str(fused_error.value) == str(stock_error.value)


@each_optimizer
@pytest.mark.parametrize(
    "flags",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"fused": False},
        {"foreach": True, "fused": True},
        {"fused": True, "differentiable": True},
        pytest.param({"capturable": True}, marks=not_interpreted),
        {"foreach": True, "lr": torch.tensor(0.01)},
    ],
    ids=str,
)
def test_implementation_flags_are_accepted_or_refused_as_stock(case: Case, flags: dict) -> None:
    errors = []
    for optimizer_class in (fused_class(case), stock_class(case.optimizer)):
        param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        param.grad = torch.ones_like(param)
        try:
            opt = optimizer_class([param], **flags)
            opt.step()
            errors.append(None)
            if optimizer_class is fused_class(case):
                assert opt.last_step.tensors == {BACKEND: 1}
        except Exception as error:
            errors.append((type(error), str(error)))
    if DEVICE.type != "cpu" and "`fused=True` requires" in str(errors[1]):
        # Stock has fused code for some optimizers only; ours takes the flag whatever the optimizer.
        errors[1] = None
    assert errors[0] == errors[1]


@all_cases
def test_ten_steps(case: Case) -> None:
    run_both(case, lambda run: run.step(10), tensors={case.backend: len(SHAPES)})


@each_optimizer
def test_repr(case: Case) -> None:
    # The table builds its stock optimizers with foreach=False; ours gets the same here.
    params = [{"params": [torch.zeros(2)], "lr": 0.5}, {"params": [torch.zeros(1)]}]
    assert repr(case.fused(params, foreach=False)) == repr(case.stock(params))


@few_cases
def test_closure(case: Case) -> None:
    def program(run: Run) -> None:
        def closure() -> Tensor:
            run.seen.append(torch.is_grad_enabled())
            run.opt.zero_grad()
            loss = sum((param**2).sum() for param in run.params)
            loss.backward()
            return loss

        for _ in range(3):
            with torch.no_grad():
                run.seen.append(run.opt.step(closure))
                run.n_steps += 1
                run.seen.append(torch.is_grad_enabled())
        run.seen.append(run.opt.step())

    ours, _ = run_both(case, program)
    assert ours.seen.count(True) == 3


@few_cases
def test_closure_that_raises_leaves_everything_as_it_was(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()

        def closure() -> Tensor:
            raise KeyError("from the closure")

        with pytest.raises(KeyError, match="from the closure"):
            run.opt.step(closure)

    run_both(case, program)


def fired_hooks(run: Run) -> list[str]:
    fired = []

    def note(name: str):
        return lambda opt, args, kwargs: fired.append(name)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    run.opt.register_step_pre_hook(note("local pre"))
    run.opt.register_step_post_hook(note("local post"))
    run.opt._optimizer_step_code = lambda: fired.append("step code")
    try:
        run.step()
    finally:
        for handle in handles:
            handle.remove()
    return fired


@few_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_hooks_fire_once_in_stocks_order(case: Case, dtype: torch.dtype) -> None:
    # A complex parameter takes stock's code, which must not bring its hooks along.
    def program(run: Run) -> None:
        run.seen.extend(fired_hooks(run))

    ours, _ = run_both(case, program, dtype=dtype)
    assert ours.seen == ["global pre", "local pre", "step code", "local post", "global post"]


@few_cases
def test_pre_hook_replaces_the_arguments(case: Case) -> None:
    def program(run: Run) -> None:
        def replace(opt, args, kwargs):
            return (args[0], lambda: 42.0), {}

        run.opt.register_step_pre_hook(replace)
        run.seen.append(run.opt.step())

    ours, _ = run_both(case, program)
    assert ours.seen == [42.0]


@few_cases
def test_pre_hook_that_returns_nonsense_raises(case: Case) -> None:
    def program(run: Run) -> None:
        run.opt.register_step_pre_hook(lambda opt, args, kwargs: 1)
        run.step()

    ours, _ = run_both(case, program)
    assert isinstance(ours.error, RuntimeError)


@few_cases
def test_pre_hook_may_change_grads_and_hypers(case: Case) -> None:
    def program(run: Run) -> None:
        def change(opt, args, kwargs):
            run.params[0].grad = run.randn(run.params[0])
            run.params[1].grad = None
            opt.param_groups[0]["lr"] = 0.03

        run.opt.register_step_pre_hook(change)
        run.step(3)

    run_both(case, program)


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_profiler_labels_appear_once(case: Case, dtype: torch.dtype) -> None:
    def program(run: Run) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run.step()
            run.opt.zero_grad()
        names = [event.name for event in profile.events()]
        run.seen.append([name for name in names if name.startswith("Optimizer.")])

    ours, _ = run_both(case, program, dtype=dtype)
    assert ours.seen == [
        [f"Optimizer.{method}#{case.optimizer}.{method}" for method in ("step", "zero_grad")]
    ]


@few_cases
def test_step_bumps_the_version_of_what_it_writes(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        run.params[0].grad = None
        before = [param._version for param in run.params]
        run.step_as_is()
        run.seen.append([param._version > v for param, v in zip(run.params, before)])

    ours, _ = run_both(case, program)
    assert ours.seen == [[False] + [True] * (len(SHAPES) - 1)]


@each_optimizer
def test_backward_after_step_raises_autograds_error(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        loss = (run.params[1] ** 2).sum()
        run.opt.step()
        loss.backward()

    ours, _ = run_both(case, program)
    assert "modified by an inplace operation" in str(ours.error)


@few_cases
def test_grads_are_never_written(case: Case) -> None:
    run = Run(case, case.fused)
    for _ in range(2):
        run.set_grads()
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in run.params]
        run.opt.step()
        for param, (grad, value, version) in zip(run.params, before):
            assert param.grad is grad and torch.equal(grad, value) and grad._version == version


@few_cases
def test_add_param_group(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        added = [torch.nn.Parameter(run.randn((3, 4))), torch.nn.Parameter(run.randn((5,)))]
        run.opt.add_param_group({"params": added, "lr": 0.02, "weight_decay": 0.25})
        run.params += added
        run.step(3)

    run_both(case, program, tensors={case.backend: len(SHAPES) + 2})


def test_adagrad_does_not_rely_on_what_torch_2_13_added() -> None:
    """Before, its constructor alone made states, and fused=True was neither for GPUs nor GradScaler."""
    stock = torch.optim.Adagrad
    construct, init_group = stock.__init__, stock._init_group

    def construct_as_before(opt: stock, *arguments: object, **options: object) -> None:
        construct(opt, *arguments, **options)
        opt.__dict__.pop("_step_supports_amp_scaling", None)

    def init_group_as_before(opt: stock, group: dict, *lists: list) -> tuple[bool, bool]:
        assert not group["fused"]
        assert all(opt.state[p] for p in group["params"] if p.grad is not None), "stock's KeyError"
        return init_group(opt, group, *lists)

    def program(run: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if run.is_ours:
                patch.setattr(stock, "__init__", construct_as_before)
                patch.setattr(stock, "_init_group", init_group_as_before)
                run.opt = run.make(run.params, fused=True)
                assert run.opt._step_supports_amp_scaling
            run.step()
            added = [torch.nn.Parameter(run.randn((4,), t)) for t in (torch.float32, torch.cfloat)]
            run.opt.add_param_group({"params": added, "initial_accumulator_value": 2.0})
            run.params += added
            run.step(2)

    case = max((c for c in CASES if c.optimizer == "Adagrad"), key=lambda c: len(c.options))
    run_both(case, program, tensors={case.backend: len(SHAPES) + 1, "stock": 1})


@each_optimizer
def test_named_parameters(case: Case) -> None:
    def program(run: Run) -> None:
        opt = run.make([(f"p{i}", param) for i, param in enumerate(run.params)])
        run.opt = opt
        run.step(2)
        run.seen.append(opt.state_dict()["param_groups"][0]["param_names"])

    ours, _ = run_both(case, program)
    assert ours.seen == [[f"p{i}" for i in range(len(SHAPES))]]


@few_cases
def test_params_need_not_require_grad_nor_be_parameters(case: Case) -> None:
    def program(run: Run) -> None:
        run.params = [param.detach() for param in run.params]
        run.opt = run.make(run.params)
        run.step(3)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_empty_groups_and_no_grads(case: Case) -> None:
    def program(run: Run) -> None:
        run.opt.step()
        run.opt.add_param_group({"params": []})
        run.opt.step()
        run.opt.step()
        run.step()

    run_both(case, program)


@few_cases
def test_last_step_reports(case: Case) -> None:
    run = Run(case, case.fused)
    assert run.opt.last_step is None
    run.opt.step()
    assert run.opt.last_step.tensors == {}
    run.set_grads()
    run.params[0].grad = None
    run.opt.step()
    assert run.opt.last_step.tensors == {case.backend: len(SHAPES) - 1}
    assert run.opt.last_step.fallbacks == []


@few_cases
def test_last_step_names_what_fell_back(case: Case) -> None:
    run = Run(case, case.fused)
    run.params += [torch.nn.Parameter(run.randn((3,), torch.complex64))]
    run.opt.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(2, device=DEVICE)), run.params[-1]]}
    )
    run.step()
    report = run.opt.last_step
    assert report.tensors == {case.backend: len(SHAPES) + 1, "stock": 1}
    assert [(f.group, f.index) for f in report.fallbacks] == [(1, 1)]
    assert "complex" in report.fallbacks[0].reason


@each_optimizer
def test_zero_grad(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        run.opt.zero_grad(set_to_none=False)
        run.step_as_is()
        run.opt.zero_grad()
        run.seen.extend(param.grad is None for param in run.params)
        run.step_as_is()

    run_both(case, program)


@each_optimizer
def test_user_subclass_that_calls_super(case: Case) -> None:
    def program(run: Run) -> None:
        class Counting(type(run.opt)):
            n_calls = 0

            def step(self, closure=None):
                self.n_calls += 1
                return super().step(closure)

        run.opt = Counting(run.params, lr=0.03)
        run.step(3)
        run.seen.append(run.opt.n_calls)

    ours, _ = run_both(case, program)
    assert ours.opt.last_step.tensors == {case.backend: len(SHAPES)}


@each_optimizer
def test_inside_inference_mode_and_no_grad(case: Case) -> None:
    def program(run: Run) -> None:
        with torch.no_grad():
            run.step(2)
        run.seen.append(all(param.requires_grad for param in run.params))
        with torch.inference_mode():
            run.step(1)

    run_both(case, program)


COMPILED = """
import sys, warnings
import torch
import fused_optim
from support.cases import BACKEND, DEVICE, VARIANTS, stock_class
from torch._dynamo.utils import counters
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on newer Pythons
warnings.filterwarnings("ignore", "Guards may run slower")  # torch's own, on Python 3.13.0

def trained(optimizer_class, compiled):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).to(DEVICE)
    opt = optimizer_class(model.parameters(), lr=1e-2)
    batch = torch.randn(4, 8).to(DEVICE)

    def train():
        opt.zero_grad()
        model(batch).square().sum().backward()
        opt.step()

    if compiled:
        counters.clear()
        train = torch.compile(train, backend="eager")
    for _ in range(3):
        train()
    if isinstance(opt, fused_optim.FusedOptimizer):
        assert opt.last_step.tensors == {BACKEND: 2}
    if compiled:
        left = (".zero_grad at", ".step at")
        breaks = [why for why in counters["graph_break"] if any(name in why for name in left)]
        assert len(breaks) == len(left), breaks
        assert all(method in reason for method, reason in zip(left, breaks)), breaks
        assert all(counters["graph_break"][reason] == 1 for reason in breaks), "compiled anew"
    return model.weight.detach()

for name in VARIANTS:
    torch._dynamo.reset()  # it gives up after 8 optimizers
    ours = trained(getattr(fused_optim, name), compiled=True)
    assert torch.equal(ours, trained(getattr(fused_optim, name), compiled=False)), name
    torch.testing.assert_close(ours, trained(stock_class(name), compiled=False))
print("same")
"""


def test_step_in_compiled_code_is_left_alone_without_a_warning() -> None:
    done = python(COMPILED)
    assert done.stdout.split() == ["same"], done.stderr
