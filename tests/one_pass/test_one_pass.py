"""The options of one pass, against the same phase in stock's calls and against exact arithmetic."""

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_optim
from fused_optim import backends
from support.cases import BACKEND, CASES, DEVICE, ONE_EACH, STOCK_SHAPES, Case, Shape
from support.cases import SHAPES as LAYOUTS
from support.marks import (
    each_optimizer,
    every_dtype,
    few_cases,
    needs_cpu_kernels,
    plain_optimizers,
)
from support.phases import Phase, PhaseRun, run_phases
from support.twins import Run, assert_close, assert_untouched, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_ON = Phase({"max_grad_norm": 0.5, "skip_nonfinite": True, "zero_grads": True, "ema_decay": 0.9})
PHASES = [
    Phase({"max_grad_norm": 0.5}),
    Phase({"max_grad_norm": 1e6}),
    Phase({"max_grad_norm": 0.5, "write_clipped_grads": True}),
    Phase({"max_grad_norm": 0.5, "write_clipped_grads": True, "zero_grads": True}),
    Phase({"skip_nonfinite": True}),
    Phase({"zero_grads": True}),
    Phase({"ema_decay": 0.9}),
    Phase({"ema_decay": 0.99, "ema_warmup": True}),
    Phase({"ema_decay": 0.9, "ema_dtype": torch.float32}),
    Phase({"ema_decay": 0.0}),
    ALL_ON,
]
every_phase = pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_kernels", lambda: None)


@pytest.fixture(params=["kernels", "stock"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels, and without: everything then runs in torch's own calls."""
    if request.param == "stock":
        monkeypatch.setattr(backends, "cpu_kernels", lambda: None)


@every_phase
@each_optimizer
@pytest.mark.usefixtures("either_way")
def test_same_as_stocks_calls(case: Case, phase: Phase) -> None:
    def program(run: PhaseRun) -> None:
        run.step(2)
        run.set_grads()
        run.params[1].grad[3, 2] = math.inf if phase.skip_nonfinite else 1.0
        run.step_as_is()
        run.set_grads()
        run.params[0].grad = None
        run.step_as_is()

    ours, stock = run_phases(case, phase, program)
    assert ours.opt.skipped_steps.item() == len(stock.skipped) == bool(phase.skip_nonfinite)
    if phase.max_grad_norm is not None:
        # Stock's norm is summed up in float32: at most one rounding for each of the elements.
        numel = sum(param.numel() for param in stock.params)
        assert ours.opt.grad_norm.item() == pytest.approx(
            stock.norm, rel=numel * torch.finfo(torch.float32).eps
        )


@every_dtype
@plain_optimizers
def test_same_as_stocks_calls_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    phase = ALL_ON
    if dtype == torch.float16:
        # The squares of clipped grads are subnormal there, and stock's result is their rounding.
        phase = Phase({**ALL_ON.options, "max_grad_norm": 1e3})
    run_phases(case, phase, lambda run: run.step(3), dtype=dtype)


def squares(grads: list[Tensor]) -> float:
    return math.fsum(value * value for grad in grads for value in grad.double().flatten().tolist())


@every_dtype
def test_norm_is_exact_to_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [Shape(str(n), (n,)) for n in (65535, 65536, 65537, 200_001)]
    params = []
    for shape in [*LAYOUTS, *sizes]:
        params.append(shape.param(dtype, generator).requires_grad_())
        params[-1].grad = shape.grad(dtype, generator)
    opt = fused_optim.SGD(params, max_grad_norm=math.inf)
    opt.step()
    exact = math.sqrt(squares([param.grad for param in params]))
    # A square, at most 128 additions in a lane, 9 of the lanes, as many again for the chunks; halved by the
    # root.
    n_roundings = (1 + 128 + 9 + 1 + 9) / 2 + 1
    assert abs(opt.grad_norm.item() - exact) <= n_roundings * 2**-53 * exact
    assert opt.grad_norm.dtype == torch.float64 and opt.grad_norm.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_optimizer
def test_clipping_is_a_factor_on_the_grads(case: Case, dtype: torch.dtype) -> None:
    """The same bits as a plain step on grads that were multiplied before: test_numerics has the rest."""
    norm = 0.25
    clipping, plain = (Run(case, case.fused, dtype=dtype) for _ in range(2))
    clipping.opt = clipping.make(clipping.params, max_grad_norm=norm)
    for _ in range(3):
        clipping.set_grads()
        plain.set_grads()
        clipping.opt.step()
        coefficient = norm / (clipping.opt.grad_norm.item() + 1e-6)
        for param in plain.params:
            param.grad.mul_(torch.tensor(coefficient, dtype=dtype, device=DEVICE))
        plain.opt.step()
    params_and_states = [
        [part for i, part in enumerate(snapshot(run.opt)) if i % 3 != 1]
        for run in (clipping, plain)
    ]
    assert params_and_states[0] == params_and_states[1]


@needs_cpu_kernels
@every_dtype
def test_bits_do_not_depend_on_threads_or_isa(dtype: torch.dtype) -> None:
    from fused_optim import _C

    shapes = ((70_000,), (3, 5), (200, 300), (65_536,), ())
    case = next(case for case in CASES if case.optimizer == "AdamW")
    threads, isa = torch.get_num_threads(), _C.isa()
    seen = []
    try:
        for n_threads, name in [(1, isa), (2, isa), (3, isa), *((2, name) for name in _C.isas())]:
            torch.set_num_threads(n_threads)
            _C.set_isa(name)
            run = PhaseRun(case, case.fused, ALL_ON, shapes=shapes, dtype=dtype)
            run.step(3)
            seen.append(
                (run.opt.grad_norm.item(), snapshot(run.opt), [a.tolist() for a in run.averages()])
            )
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(isa)
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize(
    "phase", [PHASES[2], PHASES[5], PHASES[6], ALL_ON], ids=lambda phase: phase.id
)
@pytest.mark.parametrize("shape", LAYOUTS[12:], ids=lambda shape: shape.id)
def test_layouts(shape: Shape, phase: Phase) -> None:
    """A grad that lies otherwise than its param is measured, clipped and written where it lies."""
    case = ONE_EACH[0]
    values = []
    for lay in (shape, Shape("plain", shape.size)):
        generator = torch.Generator().manual_seed(0)
        param = lay.param(torch.float32, generator).requires_grad_()
        opt = case.fused([param], **phase.options)
        for _ in range(2):
            values_of_grad = shape.grad(torch.float32, generator)
            param.grad = values_of_grad if lay is shape else values_of_grad.contiguous()
            before = param.grad.clone()
            opt.step()
            norm = None if opt.grad_norm is None else opt.grad_norm.item()
            values.append((param.detach().clone(), param.grad.clone(), norm, before))
            if phase.ema_decay is not None:
                assert opt.ema_params()[0].shape == param.shape
    for (param, grad, norm, before), (other, other_grad, other_norm, _) in zip(
        values[:2], values[2:]
    ):
        # Norms of the same numbers in two orders: see test_norm_is_exact_to_float64.
        assert_close(param.contiguous(), other.contiguous(), 2)
        assert_close(grad.contiguous(), other_grad.contiguous(), 2)
        assert (norm is None) == (other_norm is None)
        assert norm is None or norm == pytest.approx(other_norm, rel=1e-13)
        if not (phase.zero_grads or phase.write_clipped_grads):
            assert torch.equal(grad, before)


@plain_optimizers
@pytest.mark.parametrize("shape", STOCK_SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize("write", [False, True])
def test_tensors_that_fall_back_are_measured_and_clipped(
    case: Case, shape: Shape, write: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [shape.param(torch.float32, generator), torch.ones(7, device=DEVICE)]
    grads = [shape.grad(torch.float32, generator), torch.full((7,), 3.0, device=DEVICE)]
    if grads[0].is_sparse and case.optimizer not in ("SGD", "Adagrad"):
        return  # stock's error, see test_grads
    dense = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
    norm = math.sqrt(sum(grad.to(torch.complex128).abs().square().sum().item() for grad in dense))
    results = []
    for clips in (True, False):
        params = [torch.nn.Parameter(value) for value in copy.deepcopy(start)]
        for param, grad in zip(params, grads):
            param.grad = grad.clone() if clips else grad * (0.5 / (norm + 1e-6))
        build = case.fused if clips else case.stock
        options = {"max_grad_norm": 0.5, "write_clipped_grads": write} if clips else {}
        opt = build(params, **options)
        opt.step()
        if clips:
            assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-12)
            assert opt.last_step.tensors == {BACKEND: 1, "stock": 1}
            factor = 0.5 / (norm + 1e-6) if write else 1.0
            for param, grad in zip(params, grads):
                written = param.grad.to_dense() if grad.is_sparse else param.grad
                whole = grad.to_dense() if grad.is_sparse else grad
                assert torch.allclose(written, whole * factor)
        results.append(params)
    for param, other in zip(*results):
        assert torch.allclose(param, other, rtol=1e-6, atol=1e-7)


@each_optimizer
@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fused_optim.GradScaler])
@pytest.mark.parametrize(
    "phase",
    [Phase({**phase.options, "skip_nonfinite": True}) for phase in (PHASES[0], PHASES[2], ALL_ON)],
    ids=lambda phase: phase.id,
)
def test_grad_scaler_in_either_order(
    case: Case, phase: Phase, scaler_class: type, unscales: bool
) -> None:
    """Unscaling by hand or not, torch's GradScaler or ours: as stock's unscale_, clip and step."""

    def program(run: PhaseRun) -> None:
        make = scaler_class if run.is_ours else torch.amp.GradScaler
        amp = make(DEVICE.type, init_scale=1024.0, growth_interval=2)
        for i in range(5):
            run.opt.zero_grad()
            loss = sum((param * run.randn(param)).sum() for param in run.params)
            amp.scale(loss).backward()
            if i == 3:
                run.params[1].grad[0, 0] = math.nan
            if unscales or not run.is_ours:
                amp.unscale_(run.opt)
            if run.is_ours:
                amp.step(run.opt)
                run.n_steps += 1
                if phase.max_grad_norm is not None:
                    assert run.opt.grad_norm.isfinite() == (i != 3)
            else:
                run.step_as_is()  # which skips by itself
            if i != 3:  # unscaled, and clipped or zeroed where that is asked for
                run.seen.extend(param.grad.clone() for param in run.params)
            amp.update()
            run.seen.append(amp.get_scale())

    ours, stock = run_phases(case, phase, program)
    assert ours.opt.skipped_steps.item() == len(stock.skipped) == 1


@pytest.mark.parametrize("falls_back", [False, True])
# GradScaler halves its scale down to 0 if all steps are skipped.
@pytest.mark.parametrize(("scale", "norm"), [(2.0, 6.0), (0.0, math.inf)])
@pytest.mark.usefixtures("either_way")
def test_a_step_that_found_inf_skips_measures(falls_back: bool, scale: float, norm: float) -> None:
    params = [torch.nn.Parameter(torch.zeros(2, device=DEVICE)) for _ in range(2)]
    opt = fused_optim.SGD(params, lr=1.0, momentum=0.5, max_grad_norm=1.0, zero_grads=True)
    params[0].grad = torch.tensor([4.0, 8.0], device=DEVICE)
    params[1].grad = torch.tensor([0.0, 8.0], device=DEVICE)
    if falls_back:
        params[1].grad = torch._neg_view(params[1].grad)
    opt.grad_scale = torch.tensor(scale, device=DEVICE)
    opt.found_inf = torch.tensor(1.0, device=DEVICE)
    opt.step()
    assert opt.grad_norm.item() == norm and opt.skipped_steps.item() == 1
    assert not any(param.any() or param.grad.any() for param in params)


@each_optimizer
@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.usefixtures("either_way")
def test_skipped_step_changes_nothing(case: Case, n_before: int, bad: float) -> None:
    run = PhaseRun(case, case.fused, Phase({"skip_nonfinite": True, "ema_decay": 0.5}))
    run.step(n_before)
    run.set_grads()
    run.params[1].grad[3, 2] = bad
    before, states = snapshot(run.opt), len(run.opt.state)
    averages = [average.clone() for average in run.averages()]
    counts = [entry[1] for entry in run.opt._averages.values()]
    run.opt.step()
    assert_untouched(run.opt, before)
    assert BACKEND == "triton" or len(run.opt.state) == states
    assert all(torch.equal(a, b) for a, b in zip(run.averages(), averages))
    assert [entry[1] for entry in run.opt._averages.values()] == counts
    assert run.opt.skipped_steps.item() == 1
    run.opt.zero_grads = True
    run.opt.step()
    assert all((param.grad == 0).all() for param in run.params)
    assert run.opt.skipped_steps.item() == 2


@each_optimizer
def test_a_param_that_leaves_after_skipped_steps_has_no_state(case: Case) -> None:
    """As in torch.optim, whose state_dict() raises KeyError for the states of a param in no group."""
    run = PhaseRun(case, case.fused, Phase({"skip_nonfinite": True}))
    if run.opt.state:  # made in the constructor
        return
    for bad in (math.nan, 0.0):
        run.set_grads()
        run.params[1].grad[3, 2] = bad
        if bad == 0:
            left = run.opt.param_groups[0]["params"].pop(0)
        run.opt.step()
        for opt in (run.opt, copy.deepcopy(run.opt), pickle.loads(pickle.dumps(run.opt))):
            states = opt.state_dict()["state"]
            assert all(value.isfinite().all() for s in states.values() for value in s.values())
    assert len(states) in (0, len(run.params) - 1)  # SGD without momentum has none
    if states:
        run.opt.param_groups[0]["params"].pop(0)
        with pytest.raises(KeyError):
            run.opt.state_dict()
    run.opt.add_param_group({"params": [left]})
    run.step()


def test_large_float64_grads_are_finite_although_their_squares_are_not() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    opt = fused_optim.SGD([param], lr=1e-200, skip_nonfinite=True)
    param.grad = torch.full_like(param, 1e200)
    opt.step()
    assert opt.skipped_steps.item() == 0 and opt.grad_norm.item() == math.inf
    assert torch.equal(param, torch.zeros_like(param))


def test_norm_of_no_grads_is_zero() -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    opt = fused_optim.SGD([param], max_grad_norm=1.0, ema_decay=0.5)
    assert opt.grad_norm is None
    opt.step()
    assert opt.grad_norm.item() == 0.0


@few_cases
@pytest.mark.parametrize("warms_up", [False, True])
def test_average_is_that_of_averaged_model(case: Case, warms_up: bool) -> None:
    """Every param: also the frozen one and those without a grad."""
    models = [torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(DEVICE)]
    models.append(copy.deepcopy(models[0]))
    ours = case.fused(models[0].parameters(), ema_decay=0.9, ema_warmup=warms_up)
    stock = case.stock(models[1].parameters())

    def warming_up(averages: list[Tensor], params: list[Tensor], n_averaged: Tensor) -> None:
        decay = min(0.9, (1 + n_averaged.item()) / (10 + n_averaged.item()))
        torch._foreach_lerp_(averages, params, 1 - decay)

    averaged = AveragedModel(
        models[1], multi_avg_fn=warming_up if warms_up else get_ema_multi_avg_fn(0.9)
    )
    n_steps = 6
    for i in range(n_steps):
        x = torch.randn(4, 7).to(DEVICE)
        for model, opt in zip(models, (ours, stock)):
            opt.zero_grad()
            model[0].bias.requires_grad_(i < 2)
            (model[0](x) if i == 3 else model(x)).square().mean().backward()
            opt.step()
        averaged.update_parameters(models[1])
    for average, other in zip(ours.ema_params(), averaged.parameters(), strict=True):
        # Params within 16 roundings of each other after each step, as in twins; an average adds 3.
        bound = n_steps * 19 * torch.finfo(torch.float32).eps * (1 + other.abs().max().item())
        assert (average - other).abs().max().item() <= bound
    with ours.swapped_ema():
        x = torch.randn(4, 7).to(DEVICE)
        assert torch.allclose(models[0](x), averaged(x), atol=1e-5)


def test_average_of_each_group() -> None:
    params = [torch.nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(4)]
    opt = fused_optim.SGD(
        [{"params": params[:1]}, {"params": params[1:2], "ema_decay": None}], lr=1.0, ema_decay=0.5
    )

    def step() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()

    step()
    step()
    opt.add_param_group({"params": params[2:3], "ema_decay": 0.75})
    opt.add_param_group({"params": params[3:]})
    step()
    step()
    # Each begins with its own first step.
    expected = [((0 + -1) / 2 + -2) / 2 / 2 + -3 / 2, 0 * 0.75 + -1 * 0.25, (0 + -1) / 2]
    assert [average[0].item() for average in opt.ema_params()] == expected
    opt.param_groups[0]["ema_decay"] = 0.0
    step()
    assert opt.ema_params()[0][0].item() == params[0][0].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_average_in_float32_keeps_what_the_param_cannot(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(5, dtype=dtype, device=DEVICE))
    opt = fused_optim.SGD([param], lr=1.0, ema_decay=0.9999, ema_dtype=torch.float32)
    for grad in (0.0, 0.5, 0.0):
        param.grad = torch.full_like(param, grad)
        opt.step()
    (average,) = opt.ema_params()
    assert average.dtype == torch.float32
    exact = 1 - 0.5 * (1 - 0.9999**2)
    assert (average - exact).abs().max().item() <= 4 * 2**-24
    assert opt.last_step.tensors == {BACKEND: 1}
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.ema_params()[0].dtype == torch.float32
    assert torch.equal(opt.ema_params()[0], average)


def test_swapped_average() -> None:
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    opt = fused_optim.SGD([param], lr=1.0, ema_decay=0.5)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        opt.step()
    own, average, memory = param.detach().clone(), opt.ema_params()[0].clone(), param.data_ptr()
    assert own[0].item() == -1 and average[0].item() == -0.5
    saved = opt.state_dict()

    class Stop(Exception):
        pass

    def use() -> None:
        with opt.swapped_ema():
            assert torch.equal(param, average) and param.data_ptr() == memory
            assert torch.is_grad_enabled()
            assert torch.equal(opt.state_dict()["ema"][0]["ema"], saved["ema"][0]["ema"])
            with pytest.raises(RuntimeError, match="within swapped_ema"):
                opt.step()
            with pytest.raises(RuntimeError, match="in use already"), opt.swapped_ema():
                pass
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            use()
        assert torch.equal(param, own)
        assert torch.equal(opt.ema_params()[0], average)
    opt.step()


@few_cases
def test_checkpoint_carries_the_averages_and_stock_loads_the_rest(case: Case) -> None:
    phase = Phase({"ema_decay": 0.9, "ema_warmup": True})

    def program(run: PhaseRun) -> None:
        run.step(3)
        file = io.BytesIO()
        torch.save(run.saved(), file)
        file.seek(0)
        run.step(2)
        run.load(torch.load(file, weights_only=True))
        run.step(2)

    run_phases(case, phase, program)

    run = PhaseRun(case, case.fused, phase)
    run.step(2)
    saved = run.opt.state_dict()
    assert len(saved["ema"]) == len(run.params)
    other = case.stock([param.detach().clone() for param in run.params])
    other.load_state_dict(copy.deepcopy(saved))
    for param in (param for group in other.param_groups for param in group["params"]):
        param.grad = torch.ones_like(param)
    other.step()
    assert "ema" not in other.state_dict()

    # Stock's says nothing of averages: they begin anew, and how they are made stays.
    stock_saved = {key: saved[key] for key in ("state", "param_groups")}
    for group in stock_saved["param_groups"]:
        for key in ("ema_decay", "ema_warmup"):
            del group[key]
    run.opt.load_state_dict(copy.deepcopy(stock_saved))
    assert all(group["ema_decay"] == 0.9 for group in run.opt.param_groups)
    run.step()
    assert all(torch.equal(a, p) for a, p in zip(run.opt.ema_params(), run.params))


@each_optimizer
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on_as_the_original(case: Case, copied: Callable) -> None:
    run = PhaseRun(case, case.fused, ALL_ON)
    run.step(2)
    opt, params = copied((run.opt, run.params))
    assert opt.max_grad_norm == 0.5 and opt.zero_grads and opt._step_supports_amp_scaling
    for one, these in ((run.opt, run.params), (opt, params)):
        for i, param in enumerate(these):
            param.grad = torch.full_like(param, i + 0.5)
        one.step()
    assert snapshot(run.opt) == snapshot(opt)
    assert all(torch.equal(a, b) for a, b in zip(run.opt.ema_params(), opt.ema_params()))


def test_a_checkpoint_leaves_the_programs_options_alone() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=DEVICE))]
    saved = fused_optim.SGD(params, max_grad_norm=1.0, zero_grads=True).state_dict()
    opt = fused_optim.SGD(params, max_grad_norm=2.0)
    opt.load_state_dict(saved)
    assert (opt.max_grad_norm, opt.zero_grads) == (2.0, False)
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["param_groups"][0]) == set(
        torch.optim.SGD(params).state_dict()["param_groups"][0]
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0; it must be > 0 or None"),
        ({"max_grad_norm": -1}, "Invalid max_grad_norm: -1;"),
        ({"max_grad_norm": math.nan}, "Invalid max_grad_norm: nan"),
        ({"ema_decay": 1.0}, r"Invalid ema_decay: 1.0; it must be in \[0, 1\) or None"),
        ({"ema_decay": -0.1}, "Invalid ema_decay: -0.1"),
        ({"ema_decay": math.nan}, "Invalid ema_decay: nan"),
        ({"ema_decay": 0.9, "ema_dtype": torch.int8}, "Invalid ema_dtype: torch.int8"),
    ],
)
@each_optimizer
def test_bad_options(case: Case, options: dict, text: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=DEVICE))]
    with pytest.raises(ValueError, match=text):
        case.fused(params, **options)
    opt = case.fused(params, max_grad_norm=1.0)
    if "max_grad_norm" in options:
        with pytest.raises(ValueError, match=text):
            opt.max_grad_norm = options["max_grad_norm"]
        assert opt.max_grad_norm == 1.0
    else:
        with pytest.raises(ValueError, match=text):
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **options})
        assert len(opt.param_groups) == 1


@each_optimizer
def test_refused_step_touches_nothing(case: Case) -> None:
    run = PhaseRun(case, case.fused, ALL_ON)
    run.step()
    averages = [average.clone() for average in run.averages()]
    wrong = ("lr", "0.1") if case.optimizer != "Rprop" else ("etas", ("0.1", 1.2))
    for key, value, error in ((*wrong, TypeError), ("ema_decay", 1.5, ValueError)):
        good = run.opt.param_groups[0][key]
        run.set_grads()
        run.opt.param_groups[0][key] = value
        before = snapshot(run.opt)
        with pytest.raises(error, match="param group 0"):
            run.opt.step()
        run.opt.param_groups[0][key] = good
        assert_untouched(run.opt, before)
        assert all(torch.equal(a, b) for a, b in zip(run.averages(), averages))


def test_bad_checkpoint_loads_nothing() -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=DEVICE))]
    opt = fused_optim.SGD(params, momentum=0.9, ema_decay=0.9)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["ema"][0]["ema"] = torch.ones(4)
    saved["state"][0]["momentum_buffer"] += 1
    before = snapshot(opt)
    with pytest.raises(
        ValueError, match=r"EMA of shape \(4,\) for param 0, which has shape \(3,\)"
    ):
        opt.load_state_dict(saved)
    assert_untouched(opt, before)


def test_differentiable_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    opt = fused_optim.SGD([param], differentiable=True, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="differentiable=True"):
        opt.step()


def test_averages_without_any() -> None:
    opt = fused_optim.SGD([torch.nn.Parameter(torch.ones(3, device=DEVICE))])
    with pytest.raises(RuntimeError, match="no param group has an ema_decay"):
        opt.ema_params()
    with pytest.raises(RuntimeError, match="no param group has an ema_decay"), opt.swapped_ema():
        pass


def test_written_grads_tell_autograd() -> None:
    """A graph that needs the grad's value later raises instead of using the written one."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    opt = fused_optim.SGD([param], zero_grads=True)
    param.grad = torch.ones_like(param)
    weight = torch.ones(3, requires_grad=True, device=DEVICE)
    product = (weight * param.grad).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_options_can_be_changed_between_two_steps() -> None:
    param = torch.nn.Parameter(torch.zeros(1, device=DEVICE))
    opt = fused_optim.SGD([param], lr=1.0)
    seen = []
    for norm in (None, 0.5, 0.25, None):
        opt.max_grad_norm = norm
        param.grad = torch.ones_like(param)
        opt.step()
        seen.append(-param.item())
    assert seen == pytest.approx([1, 1.5, 1.75, 2.75], abs=1e-5)


def test_other_params_after_grads_were_written() -> None:
    """What was written is remembered by tasks: other tasks, and freed grads, must not be taken for it."""
    params = [torch.nn.Parameter(torch.ones(64, device=DEVICE)) for _ in range(300)]
    opt = fused_optim.SGD(params, lr=0.1, zero_grads=True)
    for i in range(20):
        opt.zero_grads = i < 2
        some = params if i < 2 else params[i : i + 9]
        for param in some:
            param.grad = torch.ones_like(param)
        opt.step()
        opt.zero_grad()
        assert opt.last_step.tensors == {BACKEND: len(some)}


def test_infinite_norm_never_clips() -> None:
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2)]
    opt = fused_optim.SGD(params, lr=0.5, max_grad_norm=math.inf)
    params[0].grad = torch.tensor([math.inf, 1.0], device=DEVICE)
    params[1].grad = torch.ones_like(params[1])
    opt.step()
    assert params[0].tolist() == [-math.inf, 0.5] and params[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fused_optim.GradScaler])
def test_grad_scaler_with_an_option_set_later_and_without_grads(scaler_class: type) -> None:
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2)]
    opts = [fused_optim.SGD([param], lr=0.5) for param in params]
    amp = scaler_class(DEVICE.type, init_scale=4.0)
    for opt in opts:
        opt.zero_grads = True
    for i in range(2):
        amp.scale((params[0] * (math.inf if i == 0 else 1.0)).sum()).backward()
        for opt in opts:
            amp.step(opt)
        amp.update()
    assert opts[0].skipped_steps.item() == 1
    assert params[0].tolist() == [0.5, 0.5] and params[1].tolist() == [1.0, 1.0]
