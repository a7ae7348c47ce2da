"""optimizer.explain(): what it says of a step is what the step then does, and it changes nothing."""

import copy
import math

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim import backends, explain
from support.cases import DEVICE, SHAPES, STOCK_SHAPES, Case
from support.marks import each_optimizer, few_cases, needs_cpu_kernels, not_interpreted

NUMEL = 5000  # more than an 8-bit state needs, and no multiple of the 64 elements of a scale
N_SCALES = math.ceil(NUMEL / 64)


def state_nbytes(optimizer: torch.optim.Optimizer) -> int:
    """Of what is there, averages included."""
    states = [v for state in optimizer.state.values() for v in state.values()]
    averages = [entry[0] for entry in getattr(optimizer, "_averages", {}).values()]
    return sum(tensor.nbytes for tensor in states + averages)


def fallbacks(explanation: explain.Explanation) -> set[tuple[int, int, str]]:
    rows = [row for row in explanation.rows if row.backend == "stock"]
    return {(row.group, index, row.reason) for row in rows for index in row.indices}


def build(case: Case, shapes: list, **extra: object):
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(shape.param(torch.float32, generator)) for shape in shapes]
    grads = [shape.grad(torch.float32, generator) for shape in shapes]
    return case.fused(params, **extra), params, grads


@not_interpreted
@few_cases
def test_step_does_what_was_explained(case: Case) -> None:
    shapes = [*SHAPES, *(s for s in STOCK_SHAPES if s.id != "grad_sparse")]
    optimizer, params, grads = build(case, shapes)
    for param, grad in zip(params, grads):
        param.grad = grad
    before = optimizer.explain()
    optimizer.step()
    assert before.tensors == optimizer.last_step.tensors
    assert fallbacks(before) == {
        (f.group, f.index, f.reason) for f in optimizer.last_step.fallbacks
    }
    assert before.state_nbytes == state_nbytes(optimizer)
    after = optimizer.explain()
    assert after.rows == before.rows
    assert after.n_assumed_states == after.n_assumed_grads == 0
    assert sorted(i for row in after.rows for i in row.indices) == list(range(len(shapes)))
    assert sum(row.numel for row in after.rows) == sum(p.numel() for p in params)


@not_interpreted
@few_cases
def test_missing_grads_count_as_if_like_their_params(case: Case) -> None:
    shapes = [shape for shape in SHAPES if not shape.id.startswith("grad_")]
    optimizer, params, _ = build(case, shapes)
    without = optimizer.explain()
    assert without.n_assumed_grads == len(params)
    assert all(param.grad is None for param in params)
    for param in params:
        param.grad = torch.ones_like(param)
    assert optimizer.explain().rows == without.rows


FORMATS = [
    # dtype, options, bytes moved by AdamW for NUMEL elements
    (torch.float32, {}, NUMEL * (2 * 4 + 4 + 2 * 8)),
    (torch.bfloat16, {}, NUMEL * (2 * 2 + 2 + 2 * 4)),
    (torch.float64, {}, NUMEL * (2 * 8 + 8 + 2 * 16)),
    (torch.float32, {"zero_grads": True}, NUMEL * (2 * 4 + 2 * 4 + 2 * 8)),
    (torch.float32, {"write_clipped_grads": True}, NUMEL * (2 * 4 + 2 * 4 + 2 * 8)),
    (torch.float32, {"max_grad_norm": 1.0}, NUMEL * (2 * 4 + 2 * 4 + 2 * 8)),
    (torch.float32, {"skip_nonfinite": True}, NUMEL * (2 * 4 + 2 * 4 + 2 * 8)),
    (torch.float32, {"ema_decay": 0.5}, NUMEL * (2 * 4 + 4 + 2 * 8 + 2 * 4)),
    (
        torch.bfloat16,
        {"ema_decay": 0.5, "ema_dtype": torch.float32},
        NUMEL * (2 * 2 + 2 + 2 * 4 + 2 * 4),
    ),
    (torch.bfloat16, {"state_dtype": torch.float32}, NUMEL * (2 * 2 + 2 + 2 * 8)),
    (torch.float32, {"state_dtype": torch.bfloat16}, NUMEL * (2 * 4 + 4 + 2 * 4)),
    (torch.float32, {"state_dtype": "int8"}, NUMEL * (2 * 4 + 4 + 2 * 2) + N_SCALES * 2 * 2 * 2),
    (torch.bfloat16, {"master": "stochastic"}, NUMEL * (2 * 2 + 2 + 2 * 4)),
    (torch.bfloat16, {"master": "split8"}, NUMEL * (2 * 3 + 2 + 2 * 4)),
    (
        torch.float16,
        {"master": "split16", "state_dtype": "int8", "ema_decay": 0.5},
        NUMEL * (2 * 4 + 2 + 2 * 2 + 2 * 2) + N_SCALES * 2 * 2 * 2,
    ),
]


@needs_cpu_kernels
@pytest.mark.parametrize(("dtype", "options", "moved"), FORMATS, ids=str)
def test_formats_and_options_count_in_bytes(dtype: torch.dtype, options: dict, moved: int) -> None:
    param = torch.nn.Parameter(torch.ones(NUMEL, dtype=dtype))
    optimizer = fused_optim.AdamW([param], **options)
    param.grad = torch.ones_like(param)
    before = optimizer.explain()
    assert before.step_nbytes == moved
    assert not optimizer.state and not getattr(optimizer, "_averages", {})
    optimizer.step()
    assert before.state_nbytes == state_nbytes(optimizer)
    assert optimizer.explain().rows == before.rows


@needs_cpu_kernels
@each_optimizer
@pytest.mark.parametrize("master", [None, "split8"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, "int8"])
def test_every_optimizer_in_every_format(
    case: Case, master: str | None, state_dtype: torch.dtype | str | None
) -> None:
    params = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (NUMEL, 10)]
    optimizer = case.fused(params, master=master, state_dtype=state_dtype)
    for param in params:
        param.grad = torch.ones_like(param)
    before = optimizer.explain()
    optimizer.step()
    assert before.tensors == optimizer.last_step.tensors == {"cpu": 2}
    assert before.state_nbytes == state_nbytes(optimizer)
    assert optimizer.explain().rows == before.rows


@needs_cpu_kernels
def test_formats_switched_on_midway_count_as_they_will_be() -> None:
    param = torch.nn.Parameter(torch.ones(NUMEL))
    optimizer = fused_optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = "int8"
    before = optimizer.explain()
    assert "exp_avg_scale" not in optimizer.state[param]
    optimizer.step()
    assert before.state_nbytes == state_nbytes(optimizer)
    assert optimizer.explain().rows == before.rows


@not_interpreted
@each_optimizer
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "max_grad_norm": 1.0}], ids=str)
def test_nothing_changes(case: Case, options: dict) -> None:
    results = []
    for explains in (False, True):
        optimizer, params, grads = build(case, SHAPES, **options)

        def ask(optimizer: torch.optim.Optimizer = optimizer, explains: bool = explains) -> None:
            if not explains:
                return
            tensors = [p for g in optimizer.param_groups for p in g["params"]]
            tensors += [p.grad for p in tensors if p.grad is not None]
            tensors += [v for state in optimizer.state.values() for v in state.values()]
            versions = [tensor._version for tensor in tensors]
            saved, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
            inside = {key: id(value) for key, value in vars(optimizer).items()}
            states = {id(p): list(state) for p, state in optimizer.state.items()}
            str(optimizer.explain())
            assert [tensor._version for tensor in tensors] == versions
            assert {key: id(value) for key, value in vars(optimizer).items()} == inside
            assert {id(p): list(state) for p, state in optimizer.state.items()} == states
            assert torch.equal(torch.get_rng_state(), random)
            assert_same(optimizer.state_dict(), saved)

        ask()
        for _ in range(3):
            for param, grad in zip(params, grads):
                param.grad = grad.clone(memory_format=torch.preserve_format)
            ask()
            optimizer.step()
            for param in params:
                param.grad = None
            ask()
        results.append([optimizer.state_dict(), [p.detach() for p in params]])
    assert_same(*results)


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    else:
        assert a == b


class Subclass(Tensor):
    pass


@needs_cpu_kernels
def test_reasons_are_those_of_the_step() -> None:
    buffer = torch.ones(8)
    params = {
        "plain": torch.ones(3),
        "complex": torch.ones(3, dtype=torch.complex64),
        "shared": buffer[:5],
        "shared_too": buffer[3:],
        "subclass": torch.ones(3).as_subclass(Subclass),
        "frozen": torch.ones(3),
        "no_step": torch.ones(3),
    }
    for name, param in params.items():
        param.requires_grad_(name != "frozen")
    second = torch.ones(3, requires_grad=True)
    optimizer = fused_optim.SGD(
        [
            {"params": list(params.items()), "momentum": 0.5},
            {"params": [("traced", second)], "differentiable": True},
        ]
    )
    optimizer.state[params["no_step"]] = {"momentum_buffer": torch.ones(3).as_subclass(Subclass)}
    without = optimizer.explain()
    for name, param in params.items():
        if name != "frozen":
            param.grad = torch.ones_like(param)
    params["plain"].grad = params["plain"].grad.to_sparse()
    second.grad = torch.ones(3)
    explained = optimizer.explain()
    with torch.no_grad():
        optimizer.step()
    assert fallbacks(explained) == {
        (f.group, f.index, f.reason) for f in optimizer.last_step.fallbacks
    }
    assert len({reason for _, _, reason in fallbacks(explained)}) == 5
    assert explained.tensors == optimizer.last_step.tensors == {"stock": 7}
    # A dense grad is assumed where there is none; nothing else differs.
    assert fallbacks(without) == {f for f in fallbacks(explained) if f[:2] != (0, 0)}
    (frozen,) = [row for row in explained.rows if row.backend is None]
    assert (frozen.indices, frozen.names, frozen.reason) == ((5,), ("frozen",), "no grad")
    assert frozen.state_nbytes == frozen.step_nbytes == 0
    for row in explained.rows:
        assert (row.step_nbytes is None) == (row.backend == "stock")
        assert all(name in (*params, "traced") for name in row.names)


def test_without_kernels_everything_is_torch_optims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    optimizer = fused_optim.AdamW([torch.nn.Parameter(torch.ones(10))], ema_decay=0.5)
    explained = optimizer.explain(measure=True)
    assert fallbacks(explained) == {(0, 0, "no kernels in use")}
    assert explained.state_nbytes == 4 + 3 * 40
    assert explained.seconds is None and explained.bandwidths == {}


@not_interpreted
def test_time_follows_from_bytes_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_bandwidth", lambda device, n_threads: 2e9)
    params = [
        torch.nn.Parameter(torch.ones(1000, device=DEVICE, dtype=d))
        for d in (torch.float32, torch.float64)
    ]
    optimizer = fused_optim.AdamW(params)
    unmeasured, measured = optimizer.explain(), optimizer.explain(measure=True)
    assert unmeasured.seconds is None
    assert [row.seconds for row in unmeasured.rows] == [None, None]
    assert [row.seconds for row in measured.rows] == [28e3 / 2e9, 56e3 / 2e9]
    assert measured.seconds == pytest.approx(84e3 / 2e9)
    assert "Predicted: 0.042 ms a step" in str(measured)
    assert "2.0 GB/s" in str(measured)
    assert "Predicted" not in str(unmeasured)


@needs_cpu_kernels
def test_bandwidth_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "CPU_PROBE_NBYTES", 2**20)
    explain._bandwidth.cache_clear()
    optimizer = fused_optim.AdamW([torch.nn.Parameter(torch.ones(10))])
    try:
        first = optimizer.explain(measure=True).bandwidths
        assert 0 < first[torch.device("cpu")] < math.inf
        assert optimizer.explain(measure=True).bandwidths == first
        assert explain._bandwidth.cache_info().misses == 1
    finally:
        explain._bandwidth.cache_clear()


@not_interpreted
def test_errors_are_those_of_the_step() -> None:
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fused_optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = 1.0
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        optimizer.explain()
    del optimizer.param_groups[0]["ema_decay"]
    optimizer.state[param]["exp_avg"] = torch.ones(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="param 0 of group 0: state 'exp_avg' has shape"):
        optimizer.explain()


@needs_cpu_kernels
def test_table_names_what_falls_back() -> None:
    named = [
        (f"layer{i}", torch.ones(3, dtype=torch.complex64, requires_grad=True)) for i in range(12)
    ]
    named.append(("weight", torch.ones(3, requires_grad=True)))
    optimizer = fused_optim.AdamW(named)
    text = str(optimizer.explain())
    assert repr(optimizer.explain()) == text
    assert text.startswith("AdamW: 1 of 13 tensors on kernels, 12 by torch.optim's code\n")
    (line,) = [line for line in text.splitlines() if "a complex tensor" in line]
    assert "params 0 (layer0), 1 (layer1)" in line
    assert line.endswith("7 (layer7) and 4 more")
    assert "explain" not in repr(optimizer)
    assert "Assumed grads, like their params: 13." in text
    unnamed = fused_optim.AdamW([param for _, param in named])
    assert "params 0, 1, 2" in str(unnamed.explain())
