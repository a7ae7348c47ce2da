"""What is compiled, uploaded and launched, on a stub of a GPU."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from support.cases import BACKEND, CASES, Case
from support.marks import each_capturable, each_optimizer
from support.program import SCALARS
from support.stub_gpu import StubGpu, stub_gpu
from support.twins import Run, assert_untouched, run_both, snapshot

if BACKEND != "cpu":
    pytest.skip("needs CPU kernels, and Triton as a compiler", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from triton import knobs

from fused_optim import backends
from fused_optim.triton_kernels import launch, multi_tensor, tables


@pytest.fixture
def gpu() -> Iterator[StubGpu]:
    with stub_gpu() as stub:
        yield stub


def steps_with(run: Run, n_steps: int = 1) -> None:
    run.step(n_steps)
    assert run.opt.last_step.tensors == {
        "triton": sum(len(g["params"]) for g in run.opt.param_groups)
    }


@each_optimizer
def test_one_launch_for_all_groups_whatever_their_options(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    groups = [
        {"params": [torch.nn.Parameter(run.randn((3, 4))) for _ in range(3)], **options}
        for options in ({"lr": 0.5}, {"weight_decay": 0.3}, {"maximize": True}, {"eps": 1e-3})
    ]
    for group in groups:
        run.opt.add_param_group(group)
    steps_with(run, 2)
    late = torch.nn.Parameter(run.randn((1000, 9)))  # at another step, and first for SGD
    run.opt.add_param_group({"params": [late]})
    steps_with(run)
    assert gpu.names() == ["multi_tensor"] * 3
    assert gpu.compiled == ["multi_tensor"]


@each_optimizer
def test_nothing_is_compiled_again(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    steps_with(run, 2)
    for i in range(3):
        run.opt.param_groups[0]["lr"] = 0.5 / (i + 1)
        if "weight_decay" in run.opt.param_groups[0]:
            run.opt.param_groups[0]["weight_decay"] = float(i)
        run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((10**i, 7)))], "lr": 0.0})
        steps_with(run)
    # Slices that are not aligned, and one of a single element.
    flat = run.randn((100,))
    run.opt.add_param_group(
        {"params": [torch.nn.Parameter(flat[1:2]), torch.nn.Parameter(flat[3:])]}
    )
    steps_with(run)
    other = Run(case, case.fused, shapes=((5,),) * 40)
    steps_with(other, 2)
    assert gpu.compiled == ["multi_tensor"], "nor for another optimizer"


@each_capturable
def test_capturable_adds_one_launch_that_prepares(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused, extra={"capturable": True, "lr": torch.tensor(0.1)})
    for i in range(3):
        run.opt.param_groups[0]["lr"].fill_(0.1 * i)
        steps_with(run)
        run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((10**i, 7)))]})
    assert gpu.names() == ["prepare", "multi_tensor"] * 3
    assert sorted(gpu.compiled) == ["multi_tensor", "prepare"]


@each_optimizer
def test_all_in_one_pass_is_three_launches(gpu: StubGpu, case: Case) -> None:
    """Those of norm, finish and step; a fourth one prepares where the device alone knows the step."""
    run = Run(case, case.fused, extra={"max_grad_norm": 1.0, "zero_grads": True, "ema_decay": 0.9})
    steps_with(run, 2)
    assert gpu.names() == ["norm", "finish", "multi_tensor"] * 2
    gpu.launches.clear()
    run.opt.skip_nonfinite = True
    steps_with(run, 2)
    assert gpu.names() == ["norm", "finish", "prepare", "multi_tensor"] * 2
    gpu.launches.clear()
    run.opt.max_grad_norm, run.opt.skip_nonfinite = None, False
    steps_with(run)
    assert gpu.names() == ["prepare", "multi_tensor"], "nothing is measured"
    assert run.opt.grad_norm.dtype == torch.float64


def test_norm_takes_a_launch_for_each_dtype_of_grads(gpu: StubGpu) -> None:
    case = next(case for case in CASES if case.id == "Adam")
    run = Run(case, case.fused, extra={"max_grad_norm": 1.0}, shapes=((7,), (0,), (65537,)))
    half = [torch.nn.Parameter(run.randn((3,), torch.bfloat16))]
    run.opt.add_param_group({"params": half})
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((5,)))], "amsgrad": True})
    steps_with(run)
    assert gpu.names() == ["norm"] * 2 + ["finish"] + ["multi_tensor"] * 3
    (grads, chunks, _, n_partials, *_), (half_grads, *_) = (args for _, _, args in gpu.launches[:2])
    assert n_partials == 1 + 2 + 1 + 1
    assert [n_programs for _, n_programs, _ in gpu.launches[:3]] == [4, 1, 1]
    # Numbers of elements, and of the first chunk among those of all grads.
    assert grads.view(-1, 3)[:, ::2].tolist() == [[7, 0], [0, 1], [65537, 1], [5, 4]]
    assert half_grads.view(-1, 3)[:, ::2].tolist() == [[3, 3]]
    assert chunks.view(-1, 2).tolist() == [[0, 0], [2, 0], [2, 1], [3, 0]]


def test_one_pass_uploads_only_what_changed(gpu: StubGpu) -> None:
    case = next(case for case in CASES if case.id == "RMSprop")
    run = Run(case, case.fused, extra={"max_grad_norm": 1.0, "ema_decay": 0.9})
    run.set_grads()
    for _ in range(2):  # the first average copies
        run.opt.step()
    gpu.uploaded.clear()
    run.opt.step()
    assert gpu.uploaded == []
    run.opt.max_grad_norm = 2.0
    run.opt.step()
    assert gpu.uploaded == [(torch.float64, 1)]


def test_each_set_of_dtypes_and_states_is_a_launch(gpu: StubGpu) -> None:
    case = next(case for case in CASES if case.id == "Adam-amsgrad=True")
    run = Run(case, case.fused)
    half = [torch.nn.Parameter(run.randn((3, 4), torch.bfloat16)) for _ in range(3)]
    run.opt.add_param_group({"params": half})
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((3, 4)))], "amsgrad": False})
    steps_with(run, 2)
    assert gpu.names() == ["multi_tensor"] * 6
    assert len(gpu.compiled) == 3


@each_optimizer
def test_only_what_changed_is_uploaded(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    # Whatever varies is made beforehand, so that no address is reused by chance.
    run.set_grads()
    others = [run.randn(param) for param in run.params]

    def uploads() -> set[torch.dtype]:
        gpu.uploaded.clear()
        run.opt.step()
        return {dtype for dtype, _ in gpu.uploaded}

    assert uploads() == {torch.int64, torch.int32}
    assert uploads() == set()
    run.opt.param_groups[0]["lr"] = 0.123
    assert uploads() == set(), "one row of hypers is an argument"
    for param, grad in zip(run.params, others):
        param.grad = grad
    assert uploads() == {torch.int64}, "grads in other places"
    run.params[0].data = torch.zeros(7)
    assert uploads() == {torch.int64}
    run.params[1].grad = None
    assert uploads() == {torch.int64, torch.int32}, "a tensor less"


@each_optimizer
def test_rows_of_hypers_are_one_upload_where_they_change(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    option, *values = "lr", 0.5, 0.25
    if case.optimizer == "Rprop":  # whose lr is read once
        option, *values = "etas", (0.75, 1.5), (0.25, 2.0)
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((7,)))], option: values[0]})
    run.set_grads()
    for _ in range(2):  # SGD's variant is another one then
        run.opt.step()
    rows = (torch.int32, 2 * multi_tensor.ROW.value)
    depends_on_step = case.optimizer not in ("SGD", "Lion", "RMSprop", "Rprop", "Adadelta")
    for changed in (depends_on_step, True):
        gpu.uploaded.clear()
        run.opt.step()
        assert gpu.uploaded == [rows] * changed
        run.opt.param_groups[1][option] = values[1]


@each_optimizer
def test_tables_hold_what_the_kernel_reads(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused, shapes=((7,), (16_500,)))
    run.params.append(torch.nn.Parameter(run.randn((10,))[1:]))
    sign = -1 if run.opt.param_groups[0]["maximize"] else 1
    run.opt.add_param_group({"params": run.params[-1:], "maximize": sign == 1})
    steps_with(run)
    _, n_programs, (tensors, chunks, hypers, *scaling) = gpu.launches[0]
    assert scaling[:4] == [*[None] * 3, 1], "in the table"
    assert n_programs == 1 + 3 + 1
    assert chunks.view(-1, 2).tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0]]
    tensors, hypers = tensors.view(3, -1), hypers.view(-1, multi_tensor.ROW.value)
    assert tensors[:, 0].tolist() == [7, 16_500, -9], "the last is not aligned to 16 bytes"
    assert tensors[:, 1].tolist() == [0, 0, 1]
    signs = hypers.view(torch.float32)[:, multi_tensor.GRAD_SIGN.value]
    assert signs.tolist() == [sign, -sign]
    for row, param in zip(tensors.tolist(), run.params):
        assert row[2:4] == [param.data_ptr(), param.grad.data_ptr()]
        there = {
            state.data_ptr() for key, state in run.opt.state[param].items() if key not in SCALARS
        }
        assert there <= set(row[4:]) and set(row[4:]) <= there | {0}


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_row_is_the_arguments_that_would_be_in_the_table(
    gpu: StubGpu, case: Case, dtype: torch.dtype
) -> None:
    run = Run(case, case.fused, dtype=dtype, shapes=((7,), (3,)))
    steps_with(run)
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((7,), dtype))]})
    run.opt.param_groups[1]["maximize"] = not run.opt.param_groups[0]["maximize"]
    lone = Run(case, case.fused, dtype=dtype, shapes=((3,),))
    steps_with(lone)
    steps_with(run)
    steps_with(lone)
    in_table, *words = gpu.launches[-1][2][6 : 7 + multi_tensor.ROW.value]
    assert in_table == 0
    _, _, (_, _, hypers, *_) = gpu.launches[-2]
    assert hypers.dtype == (torch.int64 if dtype == torch.float64 else torch.int32)
    assert words == hypers.view(-1, multi_tensor.ROW.value)[0].tolist()


@each_optimizer
@pytest.mark.parametrize("stage", ["compile", "load"])
def test_failing_triton_leaves_the_step_to_stock(
    gpu: StubGpu, case: Case, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no C compiler")

    if stage == "compile":
        monkeypatch.setattr(launch.multi_tensor, "warmup", fail)
    else:
        gpu.utils.load_binary = fail
    with pytest.warns(RuntimeWarning, match="no C compiler") as caught:
        ours, _ = run_both(case, lambda run: run.step(3), tensors={"stock": 5})
    assert len(caught) == 1, "one warning, not one a step"
    assert {f.reason for f in ours.opt.last_step.fallbacks} == {
        "Triton failed: OSError: no C compiler"
    }
    assert gpu.launches == []


def test_what_failed_is_tried_again(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.id == "Adam")
    run, tries, errors = Run(case, case.fused), [], iter([])
    warmup = launch.multi_tensor.warmup

    def attempt(*args: object, **kwargs: object) -> object:
        tries.append(run.n_steps)
        for error in errors:
            raise error
        return warmup(*args, **kwargs)

    monkeypatch.setattr(launch.multi_tensor, "warmup", attempt)
    errors = iter([MemoryError("pinned"), *[OSError("no C compiler")] * 3])
    with pytest.warns(RuntimeWarning) as caught:
        run.step(112)
    assert tries == [0, 1, 11, 111], "0, 1, 11 and 111 steps after the first failure"
    assert [str(w.message).split(": ", 1)[1] for w in caught] == [
        "MemoryError: pinned",
        "OSError: no C compiler",
    ]
    assert run.opt.last_step.tensors == {"stock": 5}
    run.n_steps = 0
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((7,)))]})
    errors = iter([KeyboardInterrupt()])
    run.step(999)
    assert gpu.launches == []
    with pytest.raises(KeyboardInterrupt):
        run.step()
    steps_with(run)
    errors = iter([OSError("no C compiler")])
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((7,), torch.bfloat16))]})
    run.step()
    assert run.opt.last_step.tensors == {"stock": 7}
    steps_with(run)


def test_a_traceback_is_printed_once_if_asked_for(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(launch.multi_tensor, "warmup", fail)
    case = next(case for case in CASES if case.id == "Adam")
    printed = []
    for is_asked_for in (True, False):
        monkeypatch.setattr(backends, "debugging", lambda is_on=is_asked_for: is_on)
        with pytest.warns(RuntimeWarning, match="no C compiler"):
            Run(case, case.fused).step(3)
        printed.append(capsys.readouterr().err)
    assert printed[0].count("Traceback") == 1 and "in fail" in printed[0]
    assert printed[1] == ""


def test_hooks_of_profilers_see_each_launch(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    case = next(case for case in CASES if case.id == "Adam")
    run = Run(case, case.fused, extra={"max_grad_norm": 1.0})
    run.step()
    hooks = [knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook]
    for hook in hooks:
        hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    try:
        run.step()
    finally:
        for hook in hooks:
            hook.calls.clear()
    assert seen == [name for name in ("norm", "finish", "multi_tensor") for _ in hooks]
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: seen.append("exit"))
    run.step()
    monkeypatch.undo()
    run.step()
    assert seen[6:] == ["exit"] * 3


@each_optimizer
def test_refused_step_launches_nothing(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    steps_with(run)
    run.set_grads()
    run.params[3].grad = None
    run.opt.param_groups[0]["ema_decay"] = 1.0
    before, n_launches, launcher = snapshot(run.opt), len(gpu.launches), run.opt._plan[1]
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        run.opt.step()
    assert_untouched(run.opt, before)
    assert len(gpu.launches) == n_launches
    assert run.opt._plan[1] is launcher, "graphs that it has captured need its tables"


@each_optimizer
def test_nothing_is_taken_for_unchanged_after_a_step_that_raised(gpu: StubGpu, case: Case) -> None:
    run = Run(case, case.fused)
    steps_with(run)
    run.opt.param_groups[0]["ema_decay"] = 1.0
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        run.opt.step()
    del run.opt.param_groups[0]["ema_decay"]
    kept = [param.grad for param in run.params]  # so that the next ones lie elsewhere
    steps_with(run)
    tensors = gpu.launches[-1][2][0].view(len(run.params), -1)
    assert tensors[:, 3].tolist() == [param.grad.data_ptr() for param in run.params]
    assert len(kept) == len(run.params)


def test_a_launch_that_raises_leaves_no_step_half_done(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if case.id == "Adam")
    run = Run(case, case.fused)
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((4,), torch.bfloat16))]})
    once = launch._Launch.launch

    def interrupted(self: launch._Launch) -> None:
        monkeypatch.setattr(launch._Launch, "launch", once)
        once(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch._Launch, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert gpu.names() == ["multi_tensor"] * 2
    assert [state["step"].item() for state in run.opt.state.values()] == [1.0] * 6


def test_tables_of_a_captured_graph_come_from_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pinned memory can be had during a capture, and a replay reads it again."""
    pinned: list[torch.Tensor] = []
    empty = torch.empty

    def counted_empty(*size: int, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        tensor = empty(*size, **kwargs)
        if pin_memory:
            pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", counted_empty)
    copy = tables.DeviceCopy(torch.int64, torch.device("meta"))
    fills = []

    def bring(version: int, numel: int, capturing: bool) -> bool:
        return copy.bring(version, numel, fills.append, capturing)

    n = 1 + tables.N_SPARES
    assert not bring(1, 10, capturing=True), "nothing in reserve yet"
    assert bring(1, 10, capturing=False) and len(pinned) == n
    assert bring(1, 10, capturing=True) and len(fills) == 1, "unchanged: what is there will do"
    for version in range(2, 2 + tables.N_SPARES):
        assert bring(version, 10, capturing=True) and len(pinned) == n
    sources = {source.data_ptr() for _, source in copy._captured}
    assert sources == {spare.data_ptr() for spare in pinned[1:]}, "they stay for the replays"
    assert not bring(9, 10, capturing=True), "the reserve is used up"
    last = 1 + tables.N_SPARES
    assert bring(last, 10, capturing=False) and len(pinned) == 2 * n, "a capture copies nothing"
    assert not bring(10, 20, capturing=True), "too small a reserve"


def test_gpu_tensors_without_triton_warn_once() -> None:
    device = torch.device("cuda:0")
    backends.warn_unless_served.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.warn_unless_served(device)
        backends.warn_unless_served.cache_clear()
        patch.setattr(backends, "_load_triton", lambda: "No module named 'triton'")
        with pytest.warns(RuntimeWarning, match=r"torch.optim's own code .* cuda:0.* 'triton'"):
            backends.warn_unless_served(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.warn_unless_served(device)
    backends.warn_unless_served.cache_clear()
