"""fused_optim.functional: torch.optim's functions on lists, by the kernels of the optimizers."""

import contextlib
import gc
import inspect
import itertools
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_optim
from fused_optim import _C, functional
from support.cases import CASE_IDS, CASES, OF_TORCH, Case, stock_class
from support.processes import python
from support.program import assert_same_bits, wild
from support.twins import Run, assert_close

FUNCTIONS = {"AdamWScheduleFree": "adamw_schedule_free"}
# The argument that is a list of states -> their key, where that is not its singular.
STATES = {"state_steps": "step", "momentum_buffer_list": "momentum_buffer", "state_sums": "sum"}
OPTIONS = {
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "beta3": ("betas", 2),
    "etaminus": ("etas", 0),
    "etaplus": ("etas", 1),
    "step_size_min": ("step_sizes", 0),
    "step_size_max": ("step_sizes", 1),
}


def function_of(optimizer: str) -> Callable[..., None]:
    return getattr(functional, FUNCTIONS.get(optimizer, optimizer.lower()))


def arguments(opt: torch.optim.Optimizer, params: list[Tensor], **more: Any) -> dict[str, Any]:
    """Those of the optimizer's function, from its first group and its states."""
    group, given = opt.param_groups[0], {}
    for name in inspect.signature(function_of(type(opt).__name__)).parameters:
        key = STATES.get(name, name.removesuffix("s"))
        if name == "params":
            given[name] = params
        elif name in ("grads", "d_p_list"):
            given[name] = [param.grad for param in params]
        elif name in OPTIONS:
            option, i = OPTIONS[name]
            given[name] = group[option][i]
        elif all(key in opt.state[param] for param in params) and key != "lr":
            given[name] = [opt.state[param][key] for param in params]
        elif name.endswith(("_sqs", "_avgs", "_list")):
            given[name] = []
        elif name in group and name not in ("foreach", "fused"):
            given[name] = group[name]
    return {**given, **more}


def begun(case: Case, dtype: torch.dtype = torch.float32, **extra: Any) -> Run:
    """A run that has made one step, with the grads of the next one."""
    run = Run(case, case.fused, dtype=dtype, extra=extra)
    run.step()
    run.set_grads()
    return run


def call(run: Run, **more: Any) -> None:
    function_of(run.case.optimizer)(**arguments(run.opt, run.params, **more))


ADAMW = Case("AdamW", (("weight_decay", 0.1), ("amsgrad", True)))


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_bits_of_the_optimizer(case: Case) -> None:
    run, other = Run(case, case.fused), Run(case, case.fused)
    run.step(4)
    other.step()
    for _ in range(3):
        other.set_grads()
        call(other)
    assert_same_bits(run.harvest(), other.harvest())


@pytest.mark.parametrize("name", OF_TORCH)
def test_arguments_are_torchs_and_more(name: str) -> None:
    ours = inspect.signature(function_of(name)).parameters
    module = inspect.getmodule(stock_class(name))
    torchs = inspect.signature(getattr(module, name.lower())).parameters
    assert [*map(str, ours.values())][: len(torchs)] == [*map(str, torchs.values())]
    more = {"grad_scale", "found_inf", "clip", "outputs", "num_threads"}
    assert set(ours) == set(torchs) | more


def test_states_and_scalars_come_in_the_order_of_the_rules() -> None:
    for name in functional.__all__:
        if name != "grad_norm":
            function = getattr(functional, name).__closure__[0].cell_contents
            rule = _C.rules()[function.rule]
            assert [*function.states] == rule["states"] and [*function.scalars] == rule["scalars"]


@pytest.mark.parametrize("first", ["none", "all", "some"])
def test_a_momentum_that_is_none_is_made(first: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "nesterov": False}
    options |= {"weight_decay": 0.1, "maximize": False}
    params, others = [[torch.arange(3.0 + i) for i in range(4)] for _ in range(2)]
    buffers: list[Tensor | None] = [
        torch.ones_like(param) if first == "all" or (first == "some" and i % 2) else None
        for i, param in enumerate(params)
    ]
    theirs = [buffer if buffer is None else buffer.clone() for buffer in buffers]
    for step in range(3):
        grads = [torch.cos(step + param) for param in params]
        functional.sgd(params, grads, buffers, **options)
        sgd(others, grads, theirs, foreach=False, fused=False, **options)
    for ours, stock in zip([*params, *buffers], [*others, *theirs]):
        assert_close(ours, stock, 3)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Rprop", "AdamWScheduleFree"])
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("numel", [5, 33, 70_001])
def test_grads_of_16_bits_outputs_scale_and_clip_in_one_pass(
    optimizer: str, output: torch.dtype, numel: int
) -> None:
    case = next(case for case in CASES if case.optimizer == optimizer)
    runs = []
    for in_one_pass in (True, False):
        run = Run(case, case.fused, shapes=((numel,), (3, 4), (0,)))
        run.step()
        run.set_grads()
        grads = [(param.grad * 8).bfloat16() for param in run.params]
        outputs = [torch.zeros_like(param, dtype=output) for param in run.params]
        more: dict[str, Any] = {"grad_scale": torch.tensor(8.0), "clip": torch.tensor(0.5)}
        if in_one_pass:
            more["outputs"] = [*outputs[:2], None]
        else:  # powers of two: the products are exact
            grads, more = [grad.float() / 16 for grad in grads], {}
        before = [grad.clone() for grad in grads]
        name = "d_p_list" if optimizer == "SGD" else "grads"
        call(run, **{name: grads}, **more)
        assert_same_bits(before, grads)
        runs.append(run)
        if in_one_pass:
            assert_same_bits(outputs, [param.to(output) for param in run.params])
    assert_same_bits(runs[0].harvest(), runs[1].harvest())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_of_every_instruction_set_number_of_threads_and_alignment(
    grad_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """With subnormals, infinities and NaN; outputs that go past the caches and such that do not."""
    numel, isa, found = 100_003, _C.isa(), []
    try:
        for name, threads, offset in itertools.product(_C.isas(), (1, 3), (0, 32, 1)):
            _C.set_isa(name)
            master = wild(numel, torch.float32, 0).clone()
            outputs = torch.zeros(numel + 64, dtype=dtype)[offset : offset + numel]
            states = [torch.zeros_like(master) for _ in range(2)]
            for step in range(2):
                grad = wild(numel, grad_dtype, step + 1)
                functional.adamw(
                    [master], [grad], [states[0]], [states[1]], [], [torch.tensor(float(step))],
                    beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.01, eps=1e-8, amsgrad=False,
                    maximize=False, outputs=[outputs], num_threads=threads,
                )  # fmt: skip
            assert_same_bits([outputs], [master.to(dtype)])
            found.append([master, *states, outputs])
    finally:
        _C.set_isa(isa)
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_pieces_from_several_threads_have_the_bits_of_the_whole() -> None:
    shapes = [(1000 + i,) for i in range(40)]
    whole, parts = (Run(ADAMW, ADAMW.fused, shapes=shapes) for _ in range(2))
    for run in (whole, parts):
        run.step()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            whole.set_grads()
            parts.set_grads()
            call(whole)
            pieces = [parts.params[i::8] for i in range(8)]
            list(pool.map(lambda p: functional.adamw(**arguments(parts.opt, p)), pieces))
    assert_same_bits(whole.harvest(), parts.harvest())


@pytest.mark.parametrize("kind", ["complex", "capturable", "differentiable", "shared", "watched"])
def test_what_no_kernel_serves_is_stepped_by_torch(kind: str) -> None:
    dtype = torch.complex64 if kind == "complex" else torch.float32
    more: dict[str, Any] = {"foreach": False, "fused": False}
    if kind in ("capturable", "differentiable"):
        more[kind] = True
    runs = [begun(ADAMW, dtype), begun(ADAMW, dtype)]
    outcomes = []
    for run, function in zip(runs, (functional.adamw, adamw)):
        given = arguments(run.opt, run.params, **more)
        if kind == "shared":
            given["params"] = [*run.params[:-1], run.params[-1].data[:, :, :2], run.params[-1].data]
            for name in ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
                given[name].insert(4, given[name][4][:, :, :2].clone())
            given["state_steps"].insert(4, torch.tensor(1.0))
        try:
            with torch.no_grad(), _Watching() if kind == "watched" else contextlib.nullcontext():
                function(**given)
            outcomes.append(None)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1] and (outcomes[0] is not None) == (kind == "capturable")
    for ours, stock in zip(runs[0].params, runs[1].params):
        assert_close(ours, stock, 2)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("found", [1.0, torch.tensor(1.0)], ids=str)
def test_found_inf_skips(found: object) -> None:
    run = begun(ADAMW)
    before, output = run.harvest(), torch.zeros(7, dtype=torch.bfloat16)
    call(run, found_inf=found, outputs=[output, None, None, None, None])
    assert_same_bits(before, run.harvest())
    assert not output.any()
    call(run, found_inf=0 * found)
    assert run.opt.state[run.params[0]]["step"] == 2


def _shorter(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda given: given[name].pop()


def _other(name: str, i: int, value: Callable[[Tensor], object]) -> Callable[[dict], None]:
    def change(given: dict[str, Any]) -> None:
        given[name] = list(given[name])
        given[name][i] = value(given[name][i])

    return change


def _outputs(i: int, value: Callable[[dict[str, Any]], object]) -> Callable[[dict], None]:
    def change(given: dict[str, Any]) -> None:
        given["outputs"] = [None] * 5
        given["outputs"][i] = value(given)

    return change


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def _set(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.update(values)


BAD = {
    "fewer grads": (_shorter("grads"), ValueError, "grads has 4 tensors, params 5"),
    "fewer states": (_shorter("exp_avgs"), ValueError, "exp_avgs has 4 tensors, params 5"),
    "fewer steps": (_shorter("state_steps"), ValueError, "state_steps has 4 tensors, params 5"),
    "no maxima": (
        lambda given: given["max_exp_avg_sqs"].clear(),
        TypeError,
        r"params\[0\]: state 'max_exp_avg_sq' is not a tensor",
    ),
    "no list": (_set(exp_avgs=3), TypeError, "exp_avgs must be a list of tensors, not int"),
    "grad": (
        _other("grads", 1, lambda t: None),
        TypeError,
        r"params\[1\]: its grad is not a tensor",
    ),
    "grad of another shape": (
        _other("grads", 1, lambda t: t[:-1]),
        RuntimeError,
        r"params\[1\]: the grad has shape \(32, 5\), the param \(33, 5\)",
    ),
    "grad elsewhere": (
        _other("grads", 1, lambda t: t.to("meta")),
        RuntimeError,
        r"params\[1\]: param and grad are on two devices",
    ),
    "state": (
        _other("exp_avgs", 4, lambda t: None),
        TypeError,
        r"params\[4\]: state 'exp_avg' is not a tensor",
    ),
    "state of another shape": (
        _other("exp_avg_sqs", 4, lambda t: t[0]),
        RuntimeError,
        r"params\[4\]: state 'exp_avg_sq' has shape",
    ),
    "param": (_other("params", 2, lambda t: 1.0), TypeError, r"params\[2\]: not a tensor"),
    "one step for two": (
        lambda given: given["state_steps"].__setitem__(3, given["state_steps"][1]),
        ValueError,
        r"state_steps\[3\] is state_steps\[1\], of another param",
    ),
    "fewer outputs": (_set(outputs=[None]), ValueError, "outputs has 1 tensors, params 5"),
    "output": (_outputs(0, lambda g: 3), TypeError, r"outputs\[0\] must be a tensor, not int"),
    "output of another shape": (
        _outputs(1, lambda g: torch.zeros(33, 1)),
        ValueError,
        r"outputs\[1\] has shape \(33, 1\), its param \(33, 5\)",
    ),
    "output of integers": (
        _outputs(0, lambda g: torch.zeros(7, dtype=torch.int8)),
        ValueError,
        r"outputs\[0\] has dtype torch.int8",
    ),
    "output in a param": (
        _outputs(1, lambda g: g["params"][1].data),
        ValueError,
        r"outputs\[1\] shares memory with another tensor",
    ),
    "output in another param": (
        _outputs(0, lambda g: g["params"][1].data[:7, 0]),
        ValueError,
        r"outputs\[0\] shares memory with another tensor",
    ),
    "output of float64 in a param": (
        _outputs(4, lambda g: g["params"][4].data.view(torch.float64).expand(2, 3, 4, 2)),
        ValueError,
        r"outputs\[4\] has shape",
    ),
    "output of float64 in a state": (
        _outputs(2, lambda g: g["exp_avgs"][4].view(-1).view(torch.float64)[3]),
        ValueError,
        r"outputs\[2\] shares memory with another tensor",
    ),
    "expanded output": (
        _outputs(1, lambda g: torch.zeros(1).expand(33, 5)),
        ValueError,
        r"elements of outputs\[1\] share memory",
    ),
    "sparse output": (
        _outputs(1, lambda g: torch.zeros(33, 5).to_sparse()),
        ValueError,
        r"outputs\[1\] is no strided tensor",
    ),
    "freed output": (
        _outputs(1, lambda g: _freed(torch.zeros(33, 5, dtype=torch.float64))),
        ValueError,
        r"outputs\[1\] is larger than its storage",
    ),
    "threads": (_set(num_threads=0), ValueError, "Invalid num_threads: 0"),
    "scale": (_set(grad_scale=0.0), ValueError, "grad_scale is 0"),
    "unknown argument": (_set(momentum=0.9), TypeError, "unexpected keyword argument 'momentum'"),
    "missing argument": (lambda given: given.pop("lr"), TypeError, "missing a required.*'lr'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named_and_writes_nothing(bad: str) -> None:
    change, error, words = BAD[bad]
    run = begun(ADAMW)
    before = run.harvest()
    given = arguments(run.opt, run.params)
    given |= {name: list(value) for name, value in given.items() if isinstance(value, list)}
    change(given)
    with pytest.raises(error, match=words):
        functional.adamw(**given)
    assert_same_bits(before, run.harvest())


@pytest.mark.parametrize(
    ("name", "i", "value", "error"),
    [
        ("exp_avgs", 1, lambda t: t[0], RuntimeError),
        ("exp_avg_sqs", 1, lambda t: None, TypeError),
        ("state_steps", 1, lambda t: torch.zeros(2), RuntimeError),
    ],
)
def test_states_that_torch_is_to_step_are_looked_at_before(
    name: str, i: int, value: Callable[[Tensor], object], error: type[Exception]
) -> None:
    run = begun(ADAMW, torch.complex64)
    before, given = run.harvest(), arguments(run.opt, run.params)
    given[name][i] = value(given[name][i])
    with pytest.raises(error, match=rf"{name}\[{i}\]"):
        functional.adamw(**given)
    assert_same_bits(before, run.harvest())


def test_a_list_that_gets_shorter_meanwhile() -> None:
    """A tensor lr is asked for its number, which lets other code run."""
    params, grads = [torch.ones(3) for _ in range(20)], [torch.ones(3) for _ in range(20)]
    lists = [params, grads, [torch.zeros(3) for _ in range(20)]]

    class Clearing(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            for found in lists:
                found.clear()
            return func(*args, **(kwargs or {}))

    options = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "maximize": False}
    kept, lr = list(params), torch.tensor(0.5)
    with Clearing():
        functional.lion(*lists, lr=lr, **options)
    assert not params and all(torch.equal(param, torch.full((3,), 0.5)) for param in kept)


def test_differentiable_carries_gradients() -> None:
    weight, grad = (torch.ones(4, requires_grad=True) for _ in range(2))
    param, states = weight * 1, [torch.zeros(4) for _ in range(2)]
    functional.adamw(
        [param], [grad], [states[0]], [states[1]], [], [torch.tensor(0.0)], differentiable=True,
        beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    slopes = torch.autograd.grad(param.sum(), [weight, grad])
    assert all(slope.isfinite().all() and slope.any() for slope in slopes[:1])


def test_outputs_under_a_dispatch_mode() -> None:
    run = begun(ADAMW)
    outputs = [torch.zeros_like(param, dtype=torch.bfloat16) for param in run.params]
    with _Watching():
        call(run, outputs=outputs)
        assert_same_bits(outputs, [param.bfloat16() for param in run.params])
        outputs[1] = run.params[1].data
        with pytest.raises(ValueError, match=r"outputs\[1\] shares memory"):
            call(run, outputs=outputs)


@pytest.mark.parametrize("optimizer", ["Lion", "AdEMAMix", "AdamWScheduleFree"])
def test_what_torch_lacks_without_kernels(optimizer: str) -> None:
    for case in (case for case in CASES if case.optimizer == optimizer):
        run, other = begun(case), begun(case)
        call(run)
        with torch.no_grad(), _Watching():
            call(other)
        for ours, expected in zip(run.harvest().items(), other.harvest().items(), strict=True):
            assert ours[0] == expected[0]
            assert_close(expected[1], ours[1], 2, ours[0])


def test_params_that_are_columns_of_one_tensor() -> None:
    both = torch.ones(4, 6)
    params, outputs = [both[:, :3], both[:, 3:]], [torch.zeros(4, 3) for _ in range(2)]
    grads, states = ([torch.ones(4, 3) for _ in range(2)] for _ in range(2))
    options = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "maximize": False}
    functional.lion(params, grads, states, lr=0.5, outputs=outputs, **options)
    assert_same_bits(outputs, params)
    assert torch.equal(both, torch.full((4, 6), 0.5))


def test_a_tuple_cannot_take_the_first_momentum() -> None:
    options = {"weight_decay": 0.0, "momentum": 0.9, "lr": 0.1, "dampening": 0.0}
    with pytest.raises(TypeError, match="momentum_buffer_list must be a list"):
        functional.sgd(
            (torch.ones(3),), (torch.ones(3),), (None,), nesterov=False, maximize=False, **options
        )


def test_a_backend_that_is_asked_for_is_no_other() -> None:
    done = python(
        """
import torch
from fused_optim.functional import lion
options = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.0, "maximize": False}
lion(*([torch.ones(3)] for _ in range(3)), **options)
try:
    lion(*([torch.ones(3, dtype=torch.complex64)] for _ in range(3)), **options)
except RuntimeError as error:
    print(error)
""",
        FUSED_OPTIM_BACKEND="cpu",
    )
    assert done.stdout.startswith("FUSED_OPTIM_BACKEND=cpu, but params[0] needs stock"), done.stderr


def test_an_argument_twice_or_too_many() -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'params'"):
        functional.sgd([], [], [], params=[])
    with pytest.raises(TypeError, match="too many positional arguments"):
        functional.sgd(*([],) * 9)


def test_no_tensors() -> None:
    functional.lion([], [], [], beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.0, maximize=False)


def test_other_tensors_in_the_same_lists() -> None:
    """Nothing of the last call is trusted, and nothing of it is kept."""
    runs = [Run(ADAMW, ADAMW.fused), Run(ADAMW, ADAMW.fused)]
    for run in runs:
        run.step(2)
    run, other = runs
    run.set_grads()
    other.set_grads()
    given = arguments(run.opt, run.params)
    functional.adamw(**given)
    for state in ("exp_avgs", "exp_avg_sqs"):
        given[state][:] = [value.clone() for value in given[state]]
    kept = [weakref.ref(value) for value in given["grads"]]
    run.set_grads()
    given["grads"][:] = [param.grad for param in run.params]
    functional.adamw(**given)
    other.step_as_is()
    other.step()
    for state, key in (("exp_avgs", "exp_avg"), ("exp_avg_sqs", "exp_avg_sq")):
        states = [other.opt.state[param][key] for param in other.params]
        assert_same_bits(given[state], states)
    assert_same_bits(run.params, other.params)
    gc.collect()
    assert all(grad() is None for grad in kept)


def test_plans_are_bounded() -> None:
    tensors = [torch.zeros(1) for _ in range(functional._MAX_PLANS + 5)]
    options = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.0, "maximize": False}
    for param in tensors:
        functional.lion([param], [torch.ones(1)], [torch.zeros(1)], **options)
    assert len(functional._plans) == functional._MAX_PLANS
    assert all(param.item() == pytest.approx(-0.1) for param in tensors)


def grads_of_all_kinds() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(5, 70_001, generator=generator, dtype=torch.float64)
    return [
        drawn[0].float(),
        drawn[1],
        drawn[2].bfloat16(),
        drawn[3, :70_000].reshape(250, 280).half().t(),
        drawn[:, ::7].float(),
        drawn[4, :10].to(torch.complex64),
        drawn[4, :10].float().to_sparse(),
        torch.zeros(0),
        torch.tensor(3.0),
    ]


def test_grad_norm_of_any_kinds_with_any_threads() -> None:
    grads = grads_of_all_kinds()
    norms = [functional.grad_norm([None, *grads], num_threads=n) for n in (None, 1, 2, 5)]
    assert len({norm.item() for norm in norms}) == 1
    assert norms[0].dtype == torch.float64 and norms[0].shape == ()
    oracle = sum((grad.to_dense().abs().to(torch.float64) ** 2).sum() for grad in grads)
    # Each of the additions rounds by at most half a unit.
    numel = sum(grad.numel() for grad in grads)
    torch.testing.assert_close(norms[0], oracle.sqrt(), rtol=numel * 2.0**-53, atol=0)


def test_grad_norm_is_the_optimizers() -> None:
    run = begun(Case("SGD"))
    run.opt.max_grad_norm = float("inf")
    run.opt.step()
    grads = [param.grad for param in run.params]
    assert torch.equal(functional.grad_norm(grads), run.opt.grad_norm)
    assert functional.grad_norm([]) == 0
    grads[1][0, 0] = float("nan")
    assert functional.grad_norm(grads).isnan()
    with pytest.raises(TypeError, match="grads must be a list of tensors, not Tensor"):
        functional.grad_norm(grads[0])
    with pytest.raises(ValueError, match="num_threads"):
        functional.grad_norm(grads, num_threads=1.5)
    for bad in (torch.ones(3, dtype=torch.int64), 3.0):
        with pytest.raises(TypeError, match=r"grads\[1\] is no tensor"):
            functional.grad_norm([grads[0], bad])
    shorter = torch.ones(64)
    shorter.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=r"grads\[0\] is larger than its storage"):
        functional.grad_norm([shorter])


def test_each_optimizer_has_its_function() -> None:
    assert set(functional.__all__) == {
        *(FUNCTIONS.get(name, name.lower()) for name in fused_optim.optimizers.__all__),
        "grad_norm",
    }
