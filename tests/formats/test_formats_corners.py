"""Formats where something else happens at the same time."""

import copy

import pytest
import torch
from torch import nn

import fused_optim
from fused_optim import checkpoint
from fused_optim._C import SMALLEST_INT8
from support.cases import OF_TORCH, fullest
from support.formats import (
    MASTERS,
    each_format,
    each_state_dtype,
    options_of,
    packed_states,
    run_of,
)
from support.marks import each_name, needs_cpu_kernels
from support.program import assert_same_bits

pytestmark = needs_cpu_kernels


@each_name
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_is_not_where_states_go(device, name):
    run = run_of(name, state_dtype="int8")
    torch.set_default_device(device)
    try:
        for param in run.params:
            param.grad = torch.ones_like(param)
        run.opt.step()
    finally:
        torch.set_default_device(None)
    assert all(value.device.type == "cpu" for s in run.opt.state.values() for value in s.values())


@pytest.mark.parametrize(
    "rest", [torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(7, dtype=torch.int16), 3]
)
def test_a_remainder_of_another_kind_is_refused(rest):
    run = run_of("AdamW", torch.bfloat16, shapes=[(64, 64)], master="split16")
    run.step()
    before = run.harvest()
    saved = copy.deepcopy(run.opt.state_dict())
    saved["state"][0]["param_remainder"] = rest
    with pytest.raises(ValueError, match="param_remainder must be"):
        run.opt.load_state_dict(saved)
    assert_same_bits(before, run.harvest())
    run.opt.state[run.params[0]]["param_remainder"] = rest
    with pytest.raises(ValueError, match="param_remainder must be"):
        run.opt.master_params()
    with pytest.raises(ValueError, match="param_remainder must be"):
        run.step()


@packed_states
def test_params_that_share_memory_get_both_updates(state_dtype):
    base = torch.zeros(5000)
    params = [nn.Parameter(base), nn.Parameter(base)]
    opt = fused_optim.SGD(params, lr=1.0, momentum=0.5, state_dtype=state_dtype)
    stock_base = torch.zeros(5000)
    stock_params = [nn.Parameter(stock_base), nn.Parameter(stock_base)]
    stock = torch.optim.SGD(stock_params, lr=1.0, momentum=0.5)
    for param, twin, value in zip(params, stock_params, (1.0, 2.0)):
        param.grad, twin.grad = torch.full((5000,), value), torch.full((5000,), value)
    opt.step()
    stock.step()
    torch.testing.assert_close(base, stock_base, rtol=2 / 126, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("before", "after"), [("split16", "split8"), ("split8", "split16")])
def test_another_number_of_bits_keeps_the_master(dtype, before, after):
    """To within a unit of the 8 bits; the params themselves stay."""
    run = run_of("SGD", dtype, shapes=[(200_000,)], master=before)
    run.step(2)
    masters, seen = run.opt.master_params()[0], run.params[0].detach().clone()
    group = run.opt.param_groups[0]
    group["master"] = after
    states = run.opt._convert_states(run.params[0], group, run.opt.state[run.params[0]])
    run.opt.state[run.params[0]] = states
    assert torch.equal(seen, run.params[0])
    unit = 2.0**-15 if dtype == torch.bfloat16 else 2.0**-18
    error = (run.opt.master_params()[0] - masters).abs()
    assert (error <= unit * masters.abs() + 2.0**-32).all()
    run.step()
    assert run.opt.last_step.tensors == {"cpu": 1}


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_loading_is_all_or_nothing(state_dtype):
    run = run_of("Adam", shapes=[(5000,), (70, 70)], state_dtype=state_dtype or torch.float32)
    run.step()
    source = run_of("Adam", shapes=[(5000,), (70, 70)], state_dtype=state_dtype)
    source.step()
    for shape in ((6000,), (1,)):
        saved = copy.deepcopy(source.opt.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        saved["state"][1]["exp_avg"] = torch.ones(shape)
        before = run.harvest()
        with pytest.raises(ValueError, match="which has shape"):
            run.opt.load_state_dict(saved)
        assert run.opt.param_groups[0]["lr"] != 0.5
        assert_same_bits(before, run.harvest())


def test_codes_that_stock_took_for_numbers_are_refused():
    run = run_of("Adam", shapes=[(5000,)], state_dtype="int8")
    run.step()
    stock = torch.optim.Adam([nn.Parameter(torch.zeros(5000))], amsgrad=True)
    stock.load_state_dict(checkpoint.accept(run.opt.state_dict()))  # saved by an older version
    with pytest.raises(ValueError, match="as if they were numbers"):
        run.opt.load_state_dict(stock.state_dict())


@pytest.mark.parametrize("name", [name for name in OF_TORCH if name != "ASGD"])  # which has none
def test_torch_optim_refuses_codes(name, tmp_path):
    run = run_of(name, shapes=[(70, 70), (5,)], state_dtype="int8")
    run.step(2)
    torch.save(run.opt.state_dict(), tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    params = [nn.Parameter(torch.zeros_like(param)) for param in run.params]
    stock = fullest(name).stock(params)
    counts = "step" in run.opt.state[run.params[0]]
    # Where stock reads no step, it has but one check, whose text is its own.
    match = r"state_dict_for_stock\(\)" if counts else "doesn't match the size of optimizer's group"
    with pytest.raises(ValueError, match=match):
        stock.load_state_dict(saved)
    assert checkpoint.NOT_FOR_STOCK in str(saved)
    stock = fullest(name).stock(params)
    stock.load_state_dict(run.opt.state_dict_for_stock())
    for saved_as in (saved, checkpoint.accept(saved)):  # of this version, and of older ones
        again = run_of(name, shapes=[(70, 70), (5,)], state_dtype="int8")
        again.opt.load_state_dict(copy.deepcopy(saved_as))
        for param, twin in zip(run.params, again.params):
            assert again.state(twin).keys() == run.state(param).keys()
            assert_same_bits([*run.state(param).values()], [*again.state(twin).values()])


def test_a_step_that_was_put_into_saved_codes_is_loaded():
    run = run_of("Adam", shapes=[(5000,)], state_dtype="int8")
    run.step(3)
    saved = run.opt.state_dict()
    saved["state"][0]["step"] = torch.tensor(1.0)
    run.opt.load_state_dict(saved)
    assert run.opt.state[run.params[0]]["step"] == 1
    assert checkpoint.SAVED_STEP not in run.opt.state[run.params[0]]


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_hooks_of_loading_see_and_change_what_is_loaded(state_dtype):
    options = {"state_dtype": state_dtype} if state_dtype else {}
    run = run_of("Adam", shapes=[(5000,)], **options)
    run.step()
    saved = {"opt": run.opt.state_dict()}
    other = run_of("Adam", shapes=[(5000,)], **options)
    other.opt.register_load_state_dict_pre_hook(lambda opt, saved: saved["opt"])
    seen = []
    other.opt.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[other.params[0]]["exp_avg"].dtype)
    )
    other.opt.load_state_dict(saved)
    assert seen == [torch.int8 if state_dtype else torch.float32]
    for key, value in run.state(run.params[0]).items():
        assert torch.equal(value, other.opt.state[other.params[0]][key])


@each_state_dtype
def test_sparse_grads(state_dtype):
    torch.manual_seed(0)
    model = nn.Embedding(500, 16, sparse=True)
    opt = fused_optim.SGD(model.parameters(), lr=0.1, momentum=0.9, state_dtype=state_dtype)
    twin = copy.deepcopy(model)
    stock = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        rows = torch.randint(500, (30,))
        for module, optimizer in ((model, opt), (twin, stock)):
            optimizer.zero_grad()
            module(rows).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=0.05, atol=0.05)
    assert opt.last_step.tensors == {"stock": 1}


def test_momentum_switched_on_midway_starts_then():
    options = {"momentum": 0.0, "weight_decay": 0.0, "maximize": False}
    run = run_of("SGD", shapes=[(5000,)], state_dtype=torch.float32, **options)
    twin = run_of("SGD", shapes=[(5000,)])
    stock = torch.optim.SGD(twin.params, lr=1e-3)
    for n in range(3):
        run.params[0].grad = run.randn((5000,))
        twin.params[0].grad = run.params[0].grad.clone()
        run.opt.step()
        stock.step()
        assert ("momentum_buffer" in run.opt.state.get(run.params[0], {})) == (n > 0)
        for optimizer in (run.opt, stock):
            optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
    torch.testing.assert_close(run.params[0], twin.params[0], rtol=1e-6, atol=1e-7)


def test_other_dtypes_keep_their_states_on_the_way_to_stock():
    params = [nn.Parameter(torch.ones(5000, dtype=d)) for d in (torch.float64, torch.complex64)]
    opt = fused_optim.Adam(params, state_dtype="int8")
    for param in params:
        param.grad = torch.rand_like(param)
    opt.step()
    states = opt.state_dict_for_stock()["state"]
    for index, param in enumerate(params):
        assert torch.equal(states[index]["exp_avg"], opt.state[param]["exp_avg"])


@each_name
@pytest.mark.parametrize("master", MASTERS[1:])
def test_every_change_of_formats_stays_on_the_kernels(name, master):
    run = run_of(name, torch.bfloat16, shapes=[(5000,)], state_dtype="int8", master=master)
    run.opt.load_master_params(run.opt.master_params())
    for state_dtype, other in [(torch.float32, None), (None, master), ("int8", None), (None, None)]:
        run.step()
        assert run.opt.last_step.tensors == {"cpu": 1}
        run.opt.param_groups[0].update(state_dtype=state_dtype, master=other)
    run.step()
    assert run.opt.last_step.tensors == {"cpu": 1}
    keys = run.opt.state[run.params[0]].keys()
    assert "param_remainder" not in keys
    assert not any(key.endswith("_scale") for key in keys)


def test_a_seed_is_for_groups_with_formats_of_their_own():
    def bits(seed):
        param = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
        opt = fused_optim.SGD([{"params": [param], "master": "stochastic"}], rounding_seed=seed)
        param.grad = torch.ones_like(param)
        opt.step()
        return param.detach()

    assert torch.equal(bits(1), bits(1))
    assert not torch.equal(bits(1), bits(2))


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5])
def test_a_seed_that_becomes_bad_stops_the_step(seed):
    run = run_of("AdamW", torch.bfloat16, master="stochastic")
    run.step()
    before = run.harvest()
    run.opt.param_groups[0]["rounding_seed"] = seed
    with pytest.raises(ValueError, match="Invalid rounding_seed in param group 0"):
        run.step()
    assert_same_bits(before, run.harvest())


def test_adagrad_starts_from_its_initial_value_unrounded():
    half = run_of(
        "Adagrad", torch.bfloat16, state_dtype=torch.float32, master="split16",
        initial_accumulator_value=0.1,
    )  # fmt: skip
    full = run_of("Adagrad", initial_accumulator_value=0.1)
    for param, twin in zip(half.params, full.params):
        twin.data.copy_(param.data)
        param.grad = half.randn(param.shape).to(torch.bfloat16)
        twin.grad = param.grad.float()
    half.opt.step()
    full.opt.step()
    for master, twin in zip(half.opt.master_params(), full.params):
        assert torch.equal(master, twin.detach())
    assert half.params[1].numel() < SMALLEST_INT8


def test_none_given_is_none_not_given():
    param = nn.Parameter(torch.ones(5000))
    opt = fused_optim.AdamW([param], state_dtype=None, master=None)
    assert opt.param_groups[0].keys() == torch.optim.AdamW([param]).param_groups[0].keys()


@each_format
def test_an_emptied_inner_dict_is_loaded_as_one(dtype, state_dtype, master):
    runs = [run_of("Adam", dtype, **options_of(state_dtype, master)) for _ in range(2)]
    for run in runs:
        run.step()
        run.opt.state[run.params[1]].clear()
    runs[0].opt.load_state_dict(runs[0].opt.state_dict())
    for run in runs:
        run.step()
    assert_same_bits(*(run.harvest() for run in runs))
