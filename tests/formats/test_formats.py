"""States and params in other formats: what a step makes of them, and what the rest of the world does."""

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import storage
from fused_optim._C import SMALLEST_INT8, storage_of
from support.cases import BACKEND, VARIANTS, fullest
from support.formats import (
    COMBINATIONS,
    EACH_FORMAT,
    MASTERS,
    SHAPES,
    STATE_DTYPES,
    each_combination,
    each_dtype,
    each_format,
    each_state_dtype,
    options_of,
    packed_states,
    run_of,
    without_cancelling,
)
from support.marks import each_name, needs_cpu_kernels
from support.program import assert_same_bits
from support.twins import Run

pytestmark = needs_cpu_kernels


def assert_next_step_is_decode_float32_step_encode(run: Run, name: str, change=None) -> None:
    """Between the formats stands the float32 kernel's arithmetic, and the codec's outside of a step.

    `change` is called with each grad.
    """
    group = run.opt.param_groups[0]
    rule = run.opt._description()
    plain = run_of(name, shapes=[(1,)])
    plain.params = [nn.Parameter(value) for value in run.opt.master_params()]
    plain.opt = fullest(name).fused(plain.params)
    for param, twin in zip(run.params, plain.params):
        states = (
            storage.decode_states(run.opt.state[param], rule["states"]) if param.numel() else {}
        )
        if not rule["has_step"]:
            states.pop("step", None)
        plain.opt.state[twin] = {key: value.clone() for key, value in states.items()}
        param.grad = run.randn(param.shape).to(param.dtype)
        if change is not None:
            change(param.grad)
        twin.grad = param.grad.float()
    run.opt.step()
    plain.opt.step()
    assert run.opt.last_step.tensors == {"cpu": len(run.params)}
    for number, (param, twin) in enumerate(zip(run.params, plain.params)):
        if param.numel() == 0:
            continue
        states = run.opt.state[param]
        key = (0, number, int(states.get("step", 0)))
        expected = dict(plain.opt.state[twin])
        expected_param, rest = storage.encode_param(param.detach(), group, twin.detach(), key)
        expected = storage.encode_states(expected_param, group, expected, rule, key)
        for key in rule["states"]:
            if f"{key}_scale" in states:
                assert_same_bits([states[f"{key}_scale"]], [expected[f"{key}_scale"]])
            if isinstance(states.get(key), Tensor):
                assert_same_bits([states[key]], [expected[key]])
        assert_same_bits([param.detach()], [expected_param])
        if "param_remainder" in states:
            assert_same_bits([states["param_remainder"]], [rest])


@each_name
@each_combination
def test_a_step_is_decode_float32_step_encode(name, dtype, state_dtype, master):
    run = run_of(name, dtype, **options_of(state_dtype, master))
    run.step(2)
    assert_next_step_is_decode_float32_step_encode(run, name)


@each_name
@pytest.mark.parametrize(
    ("dtype", "master"), [*((torch.bfloat16, m) for m in MASTERS), (torch.float32, None)], ids=str
)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"], ids=str)
def test_special_values_of_bfloat16_in_a_step(name, state_dtype, dtype, master, isas):
    """Beside one another, in every combination; what has a master has bits of another value there.

    In some blocks of codes, and read again by the step after it.
    """
    inf, nan, largest, smallest = torch.inf, torch.nan, torch.finfo(torch.bfloat16).max, 2.0**-133
    values = torch.tensor([0.0, -0.0, inf, -inf, nan, largest, -largest, smallest, -smallest, 1.0])
    for isa in isas:
        fused_optim.backends.codec().set_isa(isa)
        run = run_of(name, dtype, [(8200,)], **options_of(state_dtype, master))
        run.step(2)
        with torch.no_grad():
            run.params[0].view(-1, 10).copy_(values)
        assert_next_step_is_decode_float32_step_encode(
            run, name, lambda grad: grad[:8000].view(-1, 10, 10)[::3].copy_(values[:, None])
        )
        assert_next_step_is_decode_float32_step_encode(run, name)


@each_name
@each_format
def test_threads_and_instruction_sets_give_the_same_bits(name, dtype, state_dtype, master, isas):
    runs = []
    for isa, threads in [(isas[0], 1), *((isa, 2) for isa in isas)]:
        fused_optim.backends.codec().set_isa(isa)
        torch.set_num_threads(threads)
        run = run_of(name, dtype, **options_of(state_dtype, master))
        run.step(3)
        runs.append(run.harvest())
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@pytest.fixture
def isas():
    codec = fused_optim.backends.codec()
    threads, isa = torch.get_num_threads(), codec.isa()
    yield codec.isas()
    codec.set_isa(isa)
    torch.set_num_threads(threads)


# A format is saved alike for every optimizer: Adam has a state of each kind and a square.
@pytest.mark.parametrize(
    ("name", "dtype", "state_dtype", "master"),
    [
        *(pytest.param("Adam", *c.values, id=f"Adam-{c.id}") for c in COMBINATIONS),
        *((name, *a_format) for name in VARIANTS if name != "Adam" for a_format in EACH_FORMAT),
    ],
)
def test_resumes_bitwise(name, dtype, state_dtype, master):
    run = run_of(name, dtype, **options_of(state_dtype, master))
    run.step(2)
    file = io.BytesIO()
    torch.save({"opt": run.opt.state_dict(), "params": run.params}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = run_of(name, dtype, **options_of(state_dtype, master))
    for param, value in zip(resumed.params, saved["params"]):
        param.data.copy_(value)
    resumed.opt.load_state_dict(saved["opt"])
    resumed.generator.set_state(run.generator.get_state())
    assert_same_bits(run.harvest(), resumed.harvest())
    run.step(2)
    resumed.step(2)
    assert_same_bits(run.harvest(), resumed.harvest())


@each_name
def test_split16_trains_as_float32_does(name):
    """Over a whole training: the params are the float32 run's, rounded to nearest, ties away from zero."""
    half = run_of(name, torch.bfloat16, SHAPES[1:], state_dtype=torch.float32, master="split16")
    full = run_of(name, shapes=SHAPES[1:])
    for param, twin in zip(half.params, full.params):
        twin.data.copy_(param.data)
    for _ in range(200):
        for param, twin in zip(half.params, full.params):
            # As a model would give it: from the param as it is seen.
            noise = half.randn(param.shape)
            param.grad = (0.1 * param.detach().float() + noise).to(torch.bfloat16)
            twin.grad = param.grad.float()
        half.opt.step()
        full.opt.step()
    for param, twin, master in zip(half.params, full.params, half.opt.master_params()):
        assert torch.equal(master, twin.detach())
        bits = twin.detach().view(torch.int32) + 0x8000 & ~0xFFFF
        assert torch.equal(param.detach().float(), bits.view(torch.float32))


def test_split16_of_float16_is_exact_to_24_bits():
    half = run_of("AdamW", torch.float16, state_dtype=torch.float32, master="split16")
    full = run_of("AdamW")
    for param, twin in zip(half.params, full.params):
        value = param.data.sign() * param.data.abs().clamp(min=0.5)  # stays among normal numbers
        param.data.copy_(value)
        twin.data.copy_(value)
    for _ in range(20):
        for param, twin in zip(half.params, full.params):
            param.grad = half.randn(param.shape).to(torch.float16)
            twin.grad = param.grad.float()
        half.opt.step()
        full.opt.step()
    for twin, master in zip(full.params, half.opt.master_params()):
        assert torch.equal(master, twin.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", ["split8", "split16"])
def test_what_others_write_to_the_param_survives(dtype, master):
    run = run_of("SGD", dtype, shapes=[(70000,)], state_dtype=torch.float32, master=master)
    run.step(3)
    (param,) = run.params
    # Every value there is, with whatever remainder there is from another one.
    written = torch.arange(70000).to(torch.int16).view(dtype)
    param.data.copy_(written)
    run.opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    param.grad = torch.zeros_like(param)
    run.opt.state[param]["momentum_buffer"].zero_()
    run.opt.step()
    assert torch.equal(param.isnan(), written.isnan())
    there = ~written.isnan()
    assert torch.equal(param.detach()[there], written[there])


@each_name
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"])
def test_checkpoints_of_stock_load_and_go_back(name, state_dtype):
    shapes = [shape for shape in SHAPES if 0 not in shape]
    stock_run = run_of(name, shapes=shapes)
    stock = fullest(name).stock(stock_run.params)
    stock_run.opt = stock
    stock_run.step(3)
    run = run_of(name, shapes=shapes, state_dtype=state_dtype)
    run.opt.load_state_dict(stock.state_dict())
    assert run.opt.param_groups[0]["state_dtype"] == state_dtype
    rule = run.opt._description()
    for param in run.params:
        states = run.opt.state[param]
        for s, key in enumerate(rule["states"]):
            if isinstance(states.get(key), Tensor):
                wanted = storage.of_state(param, run.opt.param_groups[0], rule["kinds"][s])
                assert states[key].dtype == wanted.dtype
    run.step()
    assert run.opt.last_step.tensors == {"cpu": len(shapes)}
    back = fullest(name).stock([nn.Parameter(p.detach().clone()) for p in run.params])
    back.load_state_dict(run.opt.state_dict_for_stock())
    for mine, theirs in zip(run.params, back.param_groups[0]["params"]):
        states, decoded = (
            back.state[theirs],
            storage.decode_states(run.opt.state[mine], rule["states"]),
        )
        assert states.keys() == stock.state[stock_run.params[0]].keys()
        for key in rule["states"]:
            if isinstance(states.get(key), Tensor):
                assert states[key].dtype == torch.float32
                assert torch.equal(states[key], decoded[key])
        theirs.grad = torch.zeros_like(theirs)
    back.step()


@each_name
@each_format
def test_without_kernels_the_same_formats(name, dtype, state_dtype, master, monkeypatch):
    """torch.optim's code for float32, between decoding and encoding: rounding errors apart, the same."""
    options = {**options_of(state_dtype, master), **without_cancelling(name)}
    ours, other = (run_of(name, dtype, **options) for _ in range(2))
    ours.step(2)
    monkeypatch.setattr(fused_optim.backends, "cpu_kernels", lambda: None)
    other.step(2)
    assert other.opt.last_step.tensors == {"stock": len(SHAPES)}
    for a, b in zip(ours.params, other.params):
        mine, theirs = ours.state(a), other.state(b)
        assert {k: (v.dtype, v.shape) for k, v in mine.items()} == {
            k: (v.dtype, v.shape) for k, v in theirs.items()
        }
    # Where a rounding goes to the neighbour, it is by one quantum of the format: in a state, that is at most
    # what the group's largest makes of it. An lr of at most 0.01, times 10 in RMSprop, multiplies that.
    state_quantum = {torch.float32: 0.0, torch.bfloat16: 2**-7, "int8": 2 / 126}
    of_states = 0.4 * state_quantum.get(state_dtype, torch.finfo(dtype).eps)
    kept = {"split8": 2**-15, "split16": 2**-22}.get(master, torch.finfo(dtype).eps)
    seen = [param.detach().float() for param in ours.params]
    seen_by_other = [param.detach().float() for param in other.params]
    for bound, values, others in (
        (torch.finfo(dtype).eps, seen, seen_by_other),
        (kept, ours.opt.master_params(), other.opt.master_params()),
    ):
        for a, b in zip(values, others):
            assert ((a - b).abs() <= (2 * bound + of_states) * (1 + a.abs())).all()


def test_nan_and_inf_come_out_where_stock_has_them():
    for name, state_dtype in itertools.product(VARIANTS, [torch.bfloat16, "int8"]):
        run = run_of(name, shapes=[(8192,)], state_dtype=state_dtype)
        twin = run_of(name, shapes=[(8192,)])
        stock = fullest(name).stock(twin.params)
        bad = {3: torch.nan, 64: torch.inf, 127: -torch.inf, 8191: torch.nan, 4000: 1e18}
        for n in range(3):
            grad = run.randn((8192,))
            if n == 1:
                for i, value in bad.items():
                    grad[i] = value
            run.params[0].grad, twin.params[0].grad = grad, grad.clone()
            run.opt.step()
            stock.step()
        assert torch.equal(run.params[0].isnan(), twin.params[0].isnan()), name
        assert torch.equal(run.params[0].isinf(), twin.params[0].isinf()), name
        # No neighbour is worse off than by the quantum of its group.
        good = torch.ones(8192, dtype=torch.bool)
        good[list(bad)] = False
        error = (run.params[0] - twin.params[0]).detach().abs()[good]
        assert error.isfinite().all()


def test_small_states_and_other_params_stay_float32_or_stocks():
    run = run_of("AdamW", state_dtype="int8")
    run.step()
    for param in run.params:
        expected = torch.int8 if param.numel() >= SMALLEST_INT8 else torch.float32
        assert run.opt.state[param]["exp_avg"].dtype == expected
    double = run_of("AdamW", torch.float64, state_dtype="int8")
    double.step()
    assert all(s["exp_avg"].dtype == torch.float64 for s in double.opt.state.values())
    assert double.opt.last_step.tensors == {"cpu": len(SHAPES)}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_state_that_is_exact_is_never_rounded(state_dtype):
    assert storage_of(state_dtype, "exact", "bfloat16", 1 << 20) == ("plain", "float32")
    for kind in ("signed", "square"):
        stored = storage_of(state_dtype, kind, "bfloat16", 1 << 20)
        assert (stored == ("plain", "float32")) == (state_dtype == "float32")


def test_groups_have_formats_of_their_own():
    params = [nn.Parameter(torch.randn(4096)) for _ in range(3)]
    opt = fused_optim.Adam(
        [{"params": params[:1], "state_dtype": torch.bfloat16}, {"params": params[1:2]}],
        state_dtype="int8",
    )
    opt.add_param_group({"params": params[2:], "state_dtype": None})
    for param in params:
        param.grad = torch.randn(4096)
    opt.step()
    dtypes = [opt.state[param]["exp_avg"].dtype for param in params]
    assert dtypes == [torch.bfloat16, torch.int8, torch.float32]
    assert opt.last_step.tensors == {"cpu": 3}


@each_state_dtype
@pytest.mark.parametrize("before", STATE_DTYPES.values(), ids=STATE_DTYPES)
def test_a_format_may_be_changed_between_two_steps(before, state_dtype):
    run = run_of("AdamW", state_dtype=before)
    run.step(2)
    run.opt.param_groups[0]["state_dtype"] = state_dtype
    run.step()
    fresh = run_of("AdamW", state_dtype=state_dtype)
    fresh.step()
    for param, twin in zip(run.params, fresh.params):
        mine, theirs = run.state(param), fresh.state(twin)
        assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}


def test_sgd_counts_steps_only_where_random_bits_need_it():
    for dtype, options, expected in [
        (torch.bfloat16, {"master": "stochastic"}, True),
        (torch.bfloat16, {"master": "split8", "momentum": 0.0}, True),
        (torch.bfloat16, {"master": "split16"}, False),
        (torch.float32, {"state_dtype": "int8", "master": "split8"}, False),
    ]:
        run = run_of("SGD", dtype, **options)
        run.step(3)
        state = run.opt.state[run.params[0]]
        assert ("step" in state) == expected
        if expected:
            assert state["step"] == 3
        stock = torch.optim.SGD(
            [nn.Parameter(p.detach().clone()) for p in run.params], momentum=0.9
        )
        stock.load_state_dict(run.opt.state_dict_for_stock())
        assert all(set(s) <= {"momentum_buffer"} for s in stock.state.values())


@pytest.mark.parametrize("master", MASTERS[1:])
def test_master_params_load_what_they_gave(master):
    run = run_of("AdamW", torch.bfloat16, master=master)
    run.step(3)
    values = run.opt.master_params()
    assert all(value.dtype == torch.float32 for value in values)
    other = run_of("AdamW", torch.bfloat16, master=master)
    other.opt.load_master_params(values)
    for a, b in zip(run.params, other.params):
        assert torch.equal(a, b)
    assert_same_bits(values, other.opt.master_params())
    with pytest.raises(ValueError, match="values for"):
        other.opt.load_master_params(values[1:])
    with pytest.raises(ValueError, match="has shape"):
        other.opt.load_master_params([*values[1:], values[0]])


def test_stochastic_rounding_loses_no_small_updates():
    """A bfloat16 param at 1 moves in steps of 2^-7 upwards; 2^-12 a step is lost to the nearest one."""
    moved = {}
    n = 65536
    for master in (None, "stochastic"):
        param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        opt = fused_optim.SGD([param], lr=2**-12, master=master)
        for _ in range(32):
            param.grad = -torch.ones_like(param)
            opt.step()
        moved[master] = param.detach().float().mean().item() - 1
    assert moved[None] == 0
    # Of each step's rounding the variance is at most (2^-7)^2 / 4; 6 standard deviations of the mean.
    assert abs(moved["stochastic"] - 32 * 2**-12) < 6 * (32 / n) ** 0.5 * 2**-8


def test_other_seed_other_bits_same_seed_same_bits():
    def bits(**options):
        run = run_of("AdamW", torch.bfloat16, state_dtype="int8", master="split8", **options)
        run.step(2)
        return run.harvest()

    first = bits()
    assert_same_bits(first, bits(rounding_seed=0))
    other = bits(rounding_seed=1)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_params_do_not_share_random_bits():
    """Equal params with equal grads are rounded apart."""
    params = [nn.Parameter(torch.ones(8192, dtype=torch.bfloat16)) for _ in range(2)]
    opt = fused_optim.SGD(params, lr=2**-9, master="stochastic")
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    same = (params[0] == params[1]).float().mean().item()
    # Each goes down with probability 1/2 (steps below 1 are 2^-8): half of the pairs agree, +- 6 sigma.
    assert abs(same - 0.5) < 6 * 0.5 / 8192**0.5


@each_format
def test_released_gradients_step_alike(dtype, state_dtype, master):
    def train(released: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 96)).to(dtype)
        opt = fused_optim.AdamW(model.parameters(), lr=1e-2, **options_of(state_dtype, master))
        if released:
            fused_optim.release_gradients(model, opt)
        for _ in range(3):
            model(torch.randn(8, 96).to(dtype)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        return [
            *(param.detach() for param in model.parameters()),
            *(value for param in model.parameters() for value in opt.state[param].values()),
        ]

    assert_same_bits(train(False), train(True))


@packed_states
@each_dtype
def test_one_pass_options_go_with_formats(dtype, state_dtype):
    """The bits of the separate calls; averages are of the params as they are seen."""
    options = {"state_dtype": state_dtype, "master": None if dtype == torch.float32 else "split8"}
    whole = run_of("SGD", dtype, max_grad_norm=1.0, ema_decay=0.5, zero_grads=True, **options)
    by_hand = run_of("SGD", dtype, **options)
    averages = []
    for n in range(4):
        n_all = sum(param.numel() for param in whole.params)
        for param, twin in zip(whole.params, by_hand.params):
            sign = whole.randn(param.shape).sign().to(dtype)
            param.grad = sign.clone()
            twin.grad = sign
        whole.opt.step()
        norm = whole.opt.grad_norm.item()
        assert norm == pytest.approx(n_all**0.5, rel=1e-12)
        assert all((param.grad == 0).all() for param in whole.params)
        if (
            dtype == torch.float32
        ):  # 16-bit grads are clipped in float32, which nothing by hand can repeat
            for twin in by_hand.params:
                twin.grad.mul_(1.0 / (norm + 1e-6))
            by_hand.opt.step()
            assert_same_bits(
                [param.detach() for param in whole.params],
                [param.detach() for param in by_hand.params],
            )
        for i, param in enumerate(whole.params):
            if n == 0:
                averages.append(param.detach().clone())
            else:
                averages[i].lerp_(param.detach(), 0.5)
    assert_same_bits(averages, whole.opt.ema_params())


def test_layouts_go_to_the_kernels_or_around_them():
    values = torch.randn(2, 64, 8, 8)
    for layout in ("contiguous", "channels_last", "sliced", "grad"):
        param = nn.Parameter(values.clone())
        grad = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
        if layout == "channels_last":
            param = nn.Parameter(values.to(memory_format=torch.channels_last))
            grad = grad.to(memory_format=torch.channels_last)
        if layout == "sliced":
            param = nn.Parameter(torch.zeros(2, 64, 8, 9)[..., :8].copy_(values))
        if layout == "grad":
            grad = grad.to(memory_format=torch.channels_last)
        opt = fused_optim.AdamW([param], state_dtype="int8")
        for _ in range(3):
            param.grad = grad
            opt.step()
        served = "cpu" if layout in ("contiguous", "channels_last") else "stock"
        assert opt.last_step.tensors == {served: 1}, layout
        decoded = storage.decode_states(opt.state[param], ["exp_avg"])["exp_avg"]
        # Three steps of one grad: within a quantum of its group each.
        expected = grad * (1 - 0.9**3)
        assert (decoded - expected).abs().max() < 3 * 2 / 126 * grad.abs().max()


def test_states_in_memory_are_as_small_as_promised():
    n = 64 * 1024
    param = nn.Parameter(torch.randn(n, dtype=torch.bfloat16))
    opt = fused_optim.AdamW([param], state_dtype="int8", master="split8")
    param.grad = torch.randn(n, dtype=torch.bfloat16)
    opt.step()
    nbytes = param.nbytes + sum(v.nbytes for k, v in opt.state[param].items() if k != "step")
    assert nbytes / n == 2 + 1 + 2 * (1 + 2 / 64)  # 5.0625


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_dtype": "int4"}, "Invalid state_dtype"),
        ({"state_dtype": torch.float16}, "Invalid state_dtype"),
        ({"master": "exact"}, "Invalid master"),
        ({"master": True}, "Invalid master"),
        ({"state_dtype": "int8", "rounding_seed": -1}, "Invalid rounding_seed"),
        ({"state_dtype": "int8", "differentiable": True}, "differentiable"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fused_optim.AdamW([nn.Parameter(torch.ones(1))], **options)
    opt = fused_optim.AdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=words):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], **options})
    assert len(opt.param_groups) == 1


def test_options_that_become_bad_stop_the_step():
    run = run_of("AdamW", state_dtype="int8")
    run.step()
    before = run.harvest()
    for key, value in (("state_dtype", "int4"), ("master", "exact")):
        run.opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"Invalid {key} in param group 0"):
            run.step()
        del run.opt.param_groups[0][key]
    assert_same_bits(before, run.harvest())


def test_a_checkpoint_of_another_group_size_is_refused():
    run = run_of("AdamW", state_dtype="int8")
    run.step()
    saved = copy.deepcopy(run.opt.state_dict())
    saved["state"][0]["exp_avg_scale"] = torch.ones(3, dtype=torch.bfloat16)
    before = run.harvest()
    with pytest.raises(ValueError, match="one bfloat16 scale for each 64 elements"):
        run.opt.load_state_dict(saved)
    del saved["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="one bfloat16 scale for each 64 elements"):
        run.opt.load_state_dict(saved)
    assert_same_bits(before, run.harvest())


def test_copies_go_on_alike():
    run = run_of("AdamW", torch.bfloat16, state_dtype="int8", master="split8")
    run.step(2)
    twin = copy.deepcopy(run)
    run.step()
    twin.step()
    assert_same_bits(run.harvest(), twin.harvest())
    assert BACKEND in run.opt.last_step.tensors
