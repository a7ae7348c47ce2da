"""torch.amp.GradScaler, with stock's for-loop as the reference for both ways of unscaling."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import Tensor

import fused_optim
from support.cases import BACKEND, CASES, DEVICE, FEW_CASES, Case
from support.marks import each_optimizer, few_cases, over
from support.twins import SHAPES, Run, assert_untouched, run_both, snapshot

# Powers of 2, so that scaling and unscaling are exact.
SCALE = 2.0**10

# The interpreter is slow; what the numbers do in its kernels is proven in test_triton_bits.
interpreted = BACKEND == "triton" and DEVICE.type == "cpu"
all_cases = over(FEW_CASES if interpreted else CASES)
either_way = pytest.mark.parametrize("scales_itself", [False, True])


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE.type, init_scale=SCALE, growth_interval=2)


def on_device(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def backward(run: Run, amp: torch.amp.GradScaler, factor: float = 1.0) -> None:
    """Grads of a loss that is linear in the params: normal numbers times the scale."""
    run.opt.zero_grad()
    loss = sum((param * run.randn(param)).sum() for param in run.params)
    amp.scale(loss * factor).backward()


def let_scale(run: Run, scales_itself: bool) -> None:
    """Stock's for-loop cannot take grad_scale, so the reference always lets the scaler unscale."""
    if run.is_ours and scales_itself:
        run.opt._step_supports_amp_scaling = True


@each_optimizer
@either_way
def test_scaled_steps(case: Case, scales_itself: bool) -> None:
    def program(run: Run) -> None:
        let_scale(run, scales_itself)
        amp = scaler()
        for _ in range(5):
            backward(run, amp)
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1
            run.seen.append(amp.get_scale())
            # Written back unscaled.
            run.seen.extend(param.grad.clone() for param in run.params)
        assert not hasattr(run.opt, "grad_scale") and not hasattr(run.opt, "found_inf")

    ours, _ = run_both(case, program, tensors={case.backend: len(SHAPES)})
    assert ours.seen[-len(SHAPES) - 1] > SCALE


@few_cases
@either_way
def test_unscale_then_clip(case: Case, scales_itself: bool) -> None:
    def program(run: Run) -> None:
        let_scale(run, scales_itself)
        amp = scaler()
        for _ in range(3):
            backward(run, amp)
            amp.unscale_(run.opt)
            run.seen.append(torch.nn.utils.clip_grad_norm_(run.params, 1.0))
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
@either_way
# The kernels see found_inf alone, and never what has set it.
@pytest.mark.parametrize(("bad", "n_before"), [(float("nan"), 0), (float("inf"), 2)])
def test_overflow_skips_the_step(
    case: Case, scales_itself: bool, bad: float, n_before: int
) -> None:
    def program(run: Run) -> None:
        let_scale(run, scales_itself)
        amp = scaler()
        for i in range(n_before + 3):
            backward(run, amp)
            before = None
            if i == n_before:
                run.params[1].grad[3, 2] = bad
                before = [_without_grads(run), run.params]
            amp.step(run.opt)
            if before:
                assert _without_grads(run) == before[0]
            amp.update()
            run.seen.append(amp.get_scale())
            run.n_steps += 1

    run_both(case, program, tensors={case.backend: len(SHAPES)})


def _without_grads(run: Run) -> list:
    return _seen(run, [0, 2])


def _seen(run: Run, parts: list[int]) -> list:
    """Of a snapshot (param, grad, state of each), these parts."""
    return [part for i, part in enumerate(snapshot(run.opt)) if i % 3 in parts]


@few_cases
@either_way
def test_grad_that_arrives_late(case: Case, scales_itself: bool) -> None:
    def program(run: Run) -> None:
        let_scale(run, scales_itself)
        amp = scaler()
        for i in range(4):
            backward(run, amp)
            if i < 2:
                run.params[1].grad = None
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_scaling_reaches_what_falls_back_to_stock(case: Case) -> None:
    # Split storage of a complex param: the scaler's own unscaling knows complex grads too.
    def program(run: Run) -> None:
        let_scale(run, True)
        overlapping = torch.nn.Parameter(run.randn((8,)).as_strided((5, 4), (1, 1)))
        run.params = [*run.params, overlapping]
        run.opt = run.make(run.params)
        let_scale(run, True)
        amp = scaler()
        for _ in range(3):
            backward(run, amp)
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1
            run.seen.extend(param.grad.clone() for param in run.params)

    run_both(case, program, tensors={case.backend: len(SHAPES), "stock": 1})


@few_cases
@pytest.mark.parametrize("lay", ["transposed", "expanded"])
def test_scaled_grad_in_another_layout_is_written_back(case: Case, lay: str) -> None:
    def program(run: Run) -> None:
        let_scale(run, True)
        amp = scaler()
        for _ in range(2):
            backward(run, amp)
            grad = run.params[1].grad
            if lay == "transposed":
                run.params[1].grad = grad.t().contiguous().t()
            else:
                # In-place division of an expanded tensor is an error in torch itself.
                run.params[1].grad = torch.stack([grad, grad], -1)[..., 0]
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1
            run.seen.append(run.params[1].grad.clone())

    run_both(case, program, tensors={case.backend: len(SHAPES)})


def supports(opt: torch.optim.Optimizer) -> bool:
    return getattr(opt, "_step_supports_amp_scaling", False)


@each_optimizer
def test_amp_flag_is_set_by_fused_alone_and_survives_pickling(case: Case) -> None:
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE))]
    assert not supports(case.fused(params))
    if "fused" not in case.fused(params).defaults:
        return
    assert not supports(case.fused(params, fused=False))
    opt = case.fused(params, fused=True)
    assert supports(opt)
    assert supports(copy.deepcopy(opt)) and supports(pickle.loads(pickle.dumps(opt)))
    plain = case.fused(params)
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not supports(plain), "a checkpoint's flag must not change what GradScaler does"
    assert not supports(pickle.loads(pickle.dumps(plain)))


@each_optimizer
def test_fused_true_scales_itself(case: Case) -> None:
    if "fused" not in Run(case, case.fused).opt.defaults:
        return

    def program(run: Run) -> None:
        if run.is_ours:
            run.opt = run.make(run.params, fused=True)
        amp = scaler()
        for _ in range(3):
            backward(run, amp)
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_attributes_set_by_hand(case: Case) -> None:
    """What GradScaler does, without it: a scale divides, found_inf skips, None does neither."""

    def program(run: Run) -> None:
        def step(grad_scale: float | None, found_inf: float | None) -> None:
            run.set_grads()
            if not run.is_ours:
                if not found_inf:
                    run.step_as_is()
                else:
                    run.n_steps += 1
                return
            for param in run.params:
                param.grad.mul_(grad_scale or 1.0)
            run.opt.grad_scale = None if grad_scale is None else on_device(grad_scale)
            run.opt.found_inf = None if found_inf is None else on_device(found_inf)
            run.step_as_is()

        step(SCALE, 0.0)
        step(None, 0.0)
        step(SCALE, None)
        step(None, None)
        step(SCALE, 1.0)
        step(0.5, 0.0)

    run_both(case, program)


@few_cases
def test_found_inf_before_the_first_step_leaves_no_trace(case: Case) -> None:
    run = Run(case, case.fused)
    run.set_grads()
    before, n_states = _seen(run, [0, 1, 2]), len(run.opt.state_dict()["state"])
    run.opt.grad_scale, run.opt.found_inf = on_device(SCALE), on_device(1.0)
    run.opt.step()
    assert _seen(run, [0, 1, 2]) == before
    assert BACKEND == "triton" or len(run.opt.state) == n_states


@few_cases
def test_refused_step_does_not_unscale(case: Case) -> None:
    run = Run(case, case.fused)
    run.step()
    run.set_grads()
    run.opt.param_groups[0]["ema_decay"] = 1.0
    run.opt.grad_scale, run.opt.found_inf = on_device(SCALE), on_device(0.0)
    before = snapshot(run.opt)
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        run.opt.step()
    assert_untouched(run.opt, before)


@few_cases
def test_autocast_training_in_bfloat16(case: Case) -> None:
    def program(run: Run) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        model.to(DEVICE)
        run.params = list(model.parameters())
        run.opt = run.make(run.params)
        amp = scaler()

        def loss() -> Tensor:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                return model(run.randn((4, 8))).float().square().mean()

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            amp.scale(loss()).backward()
            amp.step(run.opt)
            amp.update()
        run.n_steps += 1

    run_both(case, program, tensors={case.backend: 4})


def test_scaler_has_torchs_signature_but_for_the_default_device() -> None:
    ours, torchs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values()]
        for cls in (fused_optim.GradScaler, torch.amp.GradScaler)
    )
    assert ours[0] == ("device", None, torchs[0][2]) and torchs[0][0] == "device"
    assert ours[1:] == torchs[1:]


def test_scaler_scales_on_the_cpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    amp = fused_optim.GradScaler(init_scale=SCALE)
    assert amp.scale(torch.ones(())) == SCALE
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), SCALE)
    amp.step(torch.optim.SGD([param], lr=0.5))
    assert param.tolist() == [0.5] * 3
    amp.update(torch.tensor(2.0))  # which takes a scale from the scaler's own device alone


def test_scaler_is_cudas_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    amp = fused_optim.GradScaler()
    amp.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="new_scale"):
        amp.update(torch.tensor(2.0))


def test_device_that_is_given_is_torchs_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="CUDA is not available"):
        assert not fused_optim.GradScaler("cuda").is_enabled()
