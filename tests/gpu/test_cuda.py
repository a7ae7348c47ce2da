"""What only a GPU can show: graphs, streams, no waiting, several devices, sizes beyond 2^31.

With FUSED_OPTIM_TEST_DEVICE=cuda all other tests run on the GPU too; these need it.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import backends, cli
from support.cases import CAPTURABLE, DEVICE, Case
from support.marks import GIB, each_capturable, each_optimizer, few_cases
from support.twins import Run, assert_close, assert_same_run

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Once called, an operation that waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_triton(run: Run) -> None:
    n_tensors = sum(len(group["params"]) for group in run.opt.param_groups)
    assert run.opt.last_step.tensors == {"triton": n_tensors}, run.opt.last_step


@few_cases
@pytest.mark.parametrize("extra", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_a_step_waits_for_nothing(case: Case, extra: dict, no_waiting: Callable[[], None]) -> None:
    if not extra.keys() <= case.fused([torch.zeros(1, device=DEVICE)]).defaults.keys():
        return
    run = Run(case, case.fused, extra=extra)
    grads = [[run.randn(param) for param in run.params] for _ in range(4)]
    torch.cuda.synchronize()
    no_waiting()
    for now in grads:  # the first step, which creates states and compiles, too
        for param, grad in zip(run.params, now):
            param.grad = grad
        run.opt.step()
        run.opt.param_groups[0]["lr"] *= 0.5
    on_triton(run)


@few_cases
def test_scaled_steps_wait_for_nothing(case: Case, no_waiting: Callable[[], None]) -> None:
    run = Run(case, case.fused)
    run.opt._step_supports_amp_scaling = True
    run.set_grads()
    run.opt.grad_scale = torch.full((), 1024.0, device=DEVICE)
    run.opt.found_inf = torch.zeros((), device=DEVICE)
    torch.cuda.synchronize()
    no_waiting()
    for _ in range(3):
        run.opt.step()
    on_triton(run)


ALL = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "zero_grads": True,
    "ema_decay": 0.9,
    "ema_warmup": True,
}


@each_optimizer
def test_all_in_one_pass_waits_for_nothing(case: Case, no_waiting: Callable[[], None]) -> None:
    run = Run(case, case.fused, extra=ALL)
    unused = torch.nn.Parameter(torch.ones(3, device=DEVICE))  # averaged beside the kernels
    run.opt.add_param_group({"params": [unused]})
    grads = [[run.randn(param) for param in run.params] for _ in range(4)]
    grads[2][1][3, 2] = float("inf")
    torch.cuda.synchronize()
    no_waiting()
    norms = []
    for now in grads:
        for param, grad in zip(run.params, now):
            param.grad = grad
        run.opt.step()
        norms.append(run.opt.grad_norm)
    skipped = run.opt.skipped_steps
    torch.cuda.set_sync_debug_mode("default")
    assert run.opt.last_step.tensors == {"triton": len(run.params)}
    assert [norm.isfinite().item() for norm in norms] == [True, True, False, True]
    assert norms[0].device == skipped.device == run.params[0].device and skipped.item() == 1
    assert not any(param.grad.any() for param in run.params)
    assert {entry["n_averaged"] for entry in run.opt.state_dict()["ema"].values()} == {3}


@each_capturable
def test_captured_steps_with_all_in_one_pass(case: Case) -> None:
    captured = Run(case, case.fused, extra={"capturable": True, **ALL})
    eager = Run(case, case.fused, extra=ALL)
    inputs = [torch.zeros_like(param) for param in captured.params]
    grads = [[eager.randn(param) * 3 for param in inputs] for _ in range(5)]
    grads[3][0][0] = float("nan")

    def step() -> None:
        for param, value in zip(captured.params, inputs):
            param.grad = value * 1.0
        captured.opt.step()

    graph = torch.cuda.CUDAGraph()
    for i, now in enumerate(grads):
        for param, value, grad in zip(eager.params, inputs, now):
            value.copy_(grad)
            param.grad = grad.clone()
        eager.opt.step()
        if i == 0:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                step()
        else:
            graph.replay()
        assert torch.equal(captured.opt.grad_norm, eager.opt.grad_norm) or i in (0, 3)
    assert captured.opt.skipped_steps.item() == eager.opt.skipped_steps.item() == 1
    averages = zip(captured.opt.ema_params(), eager.opt.ema_params())
    for left, right in [*zip(captured.params, eager.params), *averages]:
        assert torch.equal(left, right)


@each_capturable
@pytest.mark.parametrize("new_grads", [False, True])
def test_captured_steps_with_a_scheduled_lr(case: Case, new_grads: bool) -> None:
    """lr changes between replays; grads stay in place, or come from the graph's own memory."""
    lrs = [0.125, 0.0625, 0.25, 0.0, 0.09375]  # exact in float32
    lr = torch.tensor(0.125, device=DEVICE)
    ours = Run(case, case.fused, extra={"capturable": True, "lr": lr})
    stock = Run(case, case.stock, extra={"lr": 0.125})
    inputs = [torch.zeros_like(param) for param in ours.params]

    def step() -> None:
        if new_grads:
            for param, value in zip(ours.params, inputs):
                param.grad = value * 1.0
        ours.opt.step()

    for param, value in zip(ours.params, inputs):
        param.grad = value
    draw = Run(case, case.stock)

    def next_grads() -> None:
        values = [draw.randn(value) for value in inputs]
        for param, value, drawn in zip(stock.params, inputs, values):
            value.copy_(drawn)
            param.grad = drawn.clone()

    side = torch.cuda.Stream()
    for _ in range(2):
        next_grads()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        stock.opt.step()
    graph = torch.cuda.CUDAGraph()
    next_grads()
    with torch.cuda.graph(graph):
        step()
    on_triton(ours)
    for lr in lrs:
        ours.opt.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        stock.opt.param_groups[0]["lr"] = lr
        stock.opt.step()
        next_grads()
    # Steps outside the graph between its replays: tables change, those of the graph stay.
    torch.cuda.empty_cache()
    added = [torch.nn.Parameter(torch.ones(1000, 9, device=DEVICE)) for _ in range(2)]
    for run, param in zip((ours, stock), added):
        run.opt.add_param_group({"params": [param], "lr": run.opt.param_groups[0]["lr"]})
        param.grad = torch.ones_like(param)
    for param, value in zip(ours.params, inputs):
        param.grad = value
    for run in (ours, stock):
        run.opt.step()
    next_grads()
    graph.replay()
    added[1].grad = None
    stock.opt.step()
    torch.cuda.synchronize()
    for param, reference in zip([*ours.params, added[0]], [*stock.params, added[1]]):
        assert_close(param, reference, 2 + len(lrs) + 2, "param")
        for key, state in stock.opt.state[reference].items():
            ours_state = ours.opt.state[param][key]
            assert_close(ours_state.cpu(), state.cpu(), 2 + len(lrs) + 2, key)


@each_optimizer
def test_capture_of_what_cannot_be_replayed_raises_as_stock(case: Case) -> None:
    if case.optimizer not in CAPTURABLE:
        return
    errors = []
    for build in (case.fused, case.stock):
        run = Run(case, build)
        run.step()
        run.set_grads()
        with pytest.raises(RuntimeError) as error, torch.cuda.graph(torch.cuda.CUDAGraph()):
            run.opt.step()
        errors.append(str(error.value))
    assert errors[0].replace("fused_optim", "torch") == errors[1]


@few_cases
def test_side_streams(case: Case) -> None:
    """Each step on another stream, behind the one before; memory of earlier tables is reused."""
    ours, stock = Run(case, case.fused), Run(case, case.stock)
    streams = [torch.cuda.Stream() for _ in range(3)]
    before = torch.cuda.current_stream()
    for stream in itertools.islice(itertools.cycle(streams), 7):
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(200):  # of the tables' size: where those of earlier steps lay
                torch.full((64,), float("nan"), device=DEVICE)
            ours.step()
        before = stream
        torch.cuda.current_stream().wait_stream(stream)
        stock.step()
    torch.cuda.synchronize()
    on_triton(ours)
    assert_same_run(ours, stock)


@few_cases
def test_many_steps_in_the_queue(case: Case) -> None:
    """The host is far ahead: tables must not be overwritten before they have been copied."""
    ours, stock = Run(case, case.fused), Run(case, case.stock)
    grads = [[ours.randn(param) for param in ours.params] for _ in range(20)]
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    for i, now in enumerate(grads):
        for run in (ours, stock):
            run.opt.param_groups[0]["lr"] = 0.1 / (1 + i)
            for param, grad in zip(run.params, now):
                param.grad = grad.clone()
            run.step_as_is()
    on_triton(ours)
    assert_same_run(ours, stock)


def scaled_programs(run: Run, scales_itself: bool) -> list[Tensor]:
    """Steps of which the first, one in the middle and the last overflow."""
    amp = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=3)
    if scales_itself:
        run.opt._step_supports_amp_scaling = True
    for i in range(7):
        run.opt.zero_grad()
        loss = sum((param * run.randn(param)).sum() for param in run.params)
        amp.scale(loss).backward()
        if i in (0, 3, 6):
            run.params[1].grad[0, 0] = float("inf")
        amp.step(run.opt)
        amp.update()
        run.n_steps += 1
    return [param.detach() for param in run.params]


@few_cases
@pytest.mark.parametrize("extra", [{}, {"fused": True}], ids=str)
def test_grad_scaler_skips_the_first_step_and_others(case: Case, extra: dict) -> None:
    if not extra.keys() <= case.fused([torch.zeros(1, device=DEVICE)]).defaults.keys():
        return
    ours = Run(case, case.fused, extra=extra)
    stock = Run(case, case.stock)
    for left, right in zip(scaled_programs(ours, True), scaled_programs(stock, False)):
        assert_close(left, right, 7, "param")
    for param, reference in zip(ours.params, stock.params):
        state, expected = ours.opt.state[param], stock.opt.state[reference]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(state[key].cpu(), value.cpu(), 7, key)


@each_optimizer
def test_steps_move_to_the_device_once_the_host_cannot_know(
    case: Case, no_waiting: Callable[[], None]
) -> None:
    ours, stock = Run(case, case.fused), Run(case, case.stock)
    for run in (ours, stock):
        run.step(2)
    ours.set_grads()
    for param, reference in zip(ours.params, stock.params):
        reference.grad = param.grad.clone()
    found_inf = [torch.full((), value, device=DEVICE) for value in (1.0, 0.0)]
    torch.cuda.synchronize()
    no_waiting()
    for flag in found_inf:
        ours.opt.found_inf = flag
        ours.opt.step()
    del ours.opt.found_inf
    ours.opt.step()
    torch.cuda.set_sync_debug_mode("default")
    stock.opt.step()
    stock.opt.step()
    on_triton(ours)
    for param, reference in zip(ours.params, stock.params):
        assert_close(param, reference, 4, "param")
        for key, value in stock.opt.state[reference].items():
            assert_close(ours.opt.state[param][key].cpu(), value.cpu(), 4, key)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@few_cases
def test_one_optimizer_over_two_gpus(case: Case) -> None:
    ours, stock = Run(case, case.fused), Run(case, case.stock)
    for run in (ours, stock):
        other = [torch.nn.Parameter(p.detach().to("cuda:1")) for p in run.params]
        run.opt.add_param_group({"params": other})
        run.params = [*run.params, *other]
        for _ in range(3):
            for param in run.params:
                param.grad = run.randn(param).to(param.device)
            run.step_as_is()
    on_triton(ours)
    assert_same_run(ours, stock)


@few_cases
def test_cpu_and_gpu_params_in_one_optimizer(case: Case) -> None:
    ours, stock = Run(case, case.fused), Run(case, case.stock)
    for run in (ours, stock):
        other = [torch.nn.Parameter(p.detach().cpu()) for p in run.params]
        run.opt.add_param_group({"params": other})
        run.params = [*run.params, *other]
        for _ in range(3):
            for param in run.params:
                param.grad = run.randn(param).to(param.device)
            run.step_as_is()
    assert ours.opt.last_step.tensors == {"cpu": 5, "triton": 5}
    assert_same_run(ours, stock)


def test_one_norm_over_cpu_and_gpu_params() -> None:
    params = [torch.zeros(3, device=device) for device in ("cpu", DEVICE)]
    opt = fused_optim.SGD(params, lr=1.0, max_grad_norm=1.0, skip_nonfinite=True, ema_decay=0.5)
    for value, skipped in ((1.0, 0), (float("inf"), 1)):
        params[0].grad = torch.full((3,), 1.0)
        params[1].grad = torch.full((3,), value, device=DEVICE)
        opt.step()
        assert opt.skipped_steps.item() == skipped
        for param in params:
            torch.testing.assert_close(param.cpu(), torch.full((3,), -(6**-0.5)))
    assert opt.last_step.tensors in ({}, {"cpu": 1, "triton": 1})


@pytest.mark.skipif(
    torch.cuda.mem_get_info()[0] < 20 * GIB, reason="needs 20 GiB of available memory"
)
def test_more_than_2_to_the_31_elements_with_state() -> None:
    numel = 2**31 + 17
    param = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    param.grad = torch.full_like(param, 0.5)
    opt = fused_optim.SGD([param], lr=1.0, momentum=0.5)
    for expected in (-0.5, -1.25):
        opt.step()
        assert opt.last_step.tensors == {"triton": 1}
        assert param.min().item() == param.max().item() == expected


@each_optimizer
def test_a_launch_costs_little_on_the_host(case: Case) -> None:
    """Not a time, but what makes it: one launch a step, whatever the number of tensors.

    One more where torch.optim keeps the step on the device, as ASGD does.
    """
    run = Run(case, case.fused, shapes=((16,),) * 300)
    run.step(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.opt.step()
        torch.cuda.synchronize()
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels = [name for name in on_device if "Memcpy" not in name]
    step = run.opt.state[run.params[0]].get("step")
    prepares = step is not None and step.device.type != "cpu"
    assert kernels == ["prepare"] * prepares + ["multi_tensor"]


@pytest.mark.parametrize("offload_gradients", [False, True])
def test_torchao_offloads_to_it(offload_gradients: bool) -> None:
    """A host optimizer for each large tensor, one on the device for the small ones."""
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    runs = []
    for cls, extra in ((fused_optim.AdamW, {}), (torch.optim.AdamW, {"foreach": False})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128)).to(DEVICE)
        opt = offload(
            model.parameters(), cls, offload_gradients=offload_gradients,
            lr=0.01, weight_decay=0.1, **extra,
        )  # fmt: skip
        for _ in range(3):
            model(torch.randn(16, 128, device=DEVICE)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        runs.append((model, opt))
    (model, opt), (twin, _) = runs
    assert [each.last_step.tensors for each in opt.optim_dict.values()] == [{"cpu": 1}] * 2
    for param, expected in zip(model.parameters(), twin.parameters()):
        assert_close(param, expected, 3)


def test_config_names_the_backend() -> None:
    assert fused_optim.config()["backends"][f"cuda:{torch.cuda.current_device()}"] == "triton"
    assert backends.device_types() != 0


def test_doctor_finds_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor"])
    said = capsys.readouterr().out
    assert status == 0 and "cuda:0" in said, said
