"""Hypers prepared on the device are those that the host prepares, bit for bit."""

import pytest
import torch

from fused_optim import _C, averages
from support.cases import BACKEND, DEVICE

if BACKEND != "triton":
    pytest.skip("needs Triton: a GPU or its interpreter", allow_module_level=True)

from fused_optim.triton_kernels.multi_tensor import EMA_WEIGHT, GRAD_SIGN, ROW, STEP
from fused_optim.triton_kernels.prepare import (
    EMA_DECAY,
    EMA_WARMUP,
    MAX_TENSORS,
    OPTIONS_ROW,
    SCALARS,
    SIGN,
    prepare,
)
from fused_optim.triton_kernels.specialize import COMPILE_OPTIONS, PREPARE_BLOCK, prepare_constants

RULES = _C.rules()
# As float32 counts them (up to 2^24, where it stops) and as float64 does.
STEPS = [*range(1, 60), 999, 1000, 12345, 2**20 + 1, 2**24 - 1, 2**24, 2**31 + 7, 2**40 + 3]
WORDS = {torch.float32: torch.int32, torch.float64: torch.int64}
every_rule = pytest.mark.parametrize("rule", RULES)


def random_options(rule: str, generator: torch.Generator) -> list[float]:
    """Rates of any size, and betas from 0 to just below 1."""
    values = []
    for name in RULES[rule]["options"]:
        drawn = torch.rand((), dtype=torch.float64, generator=generator).item()
        if name.startswith("betas"):
            drawn = 1 - 10 ** (-6 * drawn)
        elif name in ("lr", "eps", "lr_decay"):
            drawn = 10 ** (-9 * drawn)
        elif name == "decoupled_weight_decay":
            drawn = round(drawn)
        values.append(drawn)
    return values


def numbers(tensor: torch.Tensor) -> list[int]:
    """Tagged addresses of all elements."""
    wide = tensor.dtype == torch.float64
    return [tensor.data_ptr() + i * tensor.element_size() | wide for i in range(tensor.numel())]


def run(
    rule: str,
    options: list[list[float]],
    addresses: list[list[int]],
    scalars: list[list[int]],
    rows: list[int],
    known: float = 0.0,
    found_inf: torch.Tensor | None = None,
    n_averaged: list[int] | None = None,
    decay: float = 0.0,
    warmup: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Rows of hypers' bits in this dtype, on the CPU.

    Args:
        scalars: addresses of each of the rule's scalars; those that are 0 are `known`.
    """
    n_options = len(RULES[rule]["options"])
    table = torch.zeros(len(options), OPTIONS_ROW.value, dtype=torch.float64)
    table[:, :n_options] = torch.tensor(options, dtype=torch.float64)
    table[:, SIGN.value], table[:, SCALARS.value :] = -1.0, known
    table[:, EMA_DECAY.value], table[:, EMA_WARMUP.value] = decay, float(warmup)
    tagged = torch.zeros(len(options), MAX_TENSORS.value, dtype=torch.int64)
    tagged[:, :n_options] = torch.tensor(addresses)[:, : MAX_TENSORS.value]
    hypers = torch.full((len(rows), ROW.value), 7, dtype=WORDS[dtype], device=DEVICE)
    constants = prepare_constants(rule, averages=n_averaged is not None)
    of_scalars = torch.zeros(len(rows), constants["N_AVERAGED"] + 2, dtype=torch.int64)
    for i, column in enumerate(scalars):
        of_scalars[:, i] = torch.tensor(column)
    of_scalars[:, -2] = torch.tensor(n_averaged or 0)
    of_scalars[:, -1] = torch.tensor(rows)
    prepare[((len(rows) + PREPARE_BLOCK - 1) // PREPARE_BLOCK,)](
        of_scalars.to(DEVICE), table.to(DEVICE), tagged.to(DEVICE), hypers, found_inf, len(rows),
        **constants,
        **({} if DEVICE.type == "cpu" else COMPILE_OPTIONS),
    )  # fmt: skip
    return hypers.cpu()


def assert_bits(
    hypers: torch.Tensor, rule: str, options: list[float], scalars: list[float]
) -> None:
    """Compare a row with what the host prepares of these scalars: as its prepare takes them."""
    expected = torch.tensor(_C.prepare(rule, options, scalars), dtype=torch.float64)
    if hypers.dtype == torch.int32:
        expected = expected.float()
    found = hypers[: len(expected)]
    assert torch.equal(found, expected.view(hypers.dtype)), (rule, options, scalars)


def values(hypers: torch.Tensor, column: int) -> torch.Tensor:
    return hypers.view(torch.float32 if hypers.dtype == torch.int32 else torch.float64)[:, column]


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_hypers", [torch.float32, torch.float64], ids=str)
def test_same_bits_and_steps_advanced(
    rule: str, dtype: torch.dtype, of_hypers: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    options = [random_options(rule, generator) for _ in range(7)]
    step = torch.tensor(STEPS, dtype=torch.float64).sub(1).to(dtype).repeat(3)
    n = len(step)
    others = torch.rand(len(RULES[rule]["scalars"]) - 1, n, dtype=dtype, generator=generator)
    if rule == "sgd":  # a count, too
        others[:] = step
    before = torch.cat([step[None], others])
    rows = [i % 7 for i in range(n)]
    nothing = [[0] * len(options[0])] * 7
    scalars = before.clone().to(DEVICE)
    hypers = run(rule, options, nothing, [numbers(s) for s in scalars], rows, dtype=of_hypers)
    advanced = [
        _C.advance(rule, options[row], now, in_float32=dtype == torch.float32)
        for row, now in zip(rows, before.double().t().tolist())
    ]
    # As the CPU rounds: float32 stays where it can count no further.
    after = torch.tensor(advanced, dtype=torch.float64).t().to(dtype)
    assert torch.equal(scalars.cpu(), after)
    taken = (before if RULES[rule]["prepares_before"] else after).double().t().tolist()
    for i in range(n):
        assert_bits(hypers[i], rule, options[rows[i]], taken[i])
    low, high = hypers[:, STEP.value].long(), hypers[:, STEP.value + 1].long()
    assert torch.equal((high << 32) + (low & 0xFFFFFFFF), after[0].long())
    assert (values(hypers, GRAD_SIGN.value) == -1).all()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options_that_are_tensors_are_read_where_they_lie(rule: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    options = random_options(rule, generator)
    on_device = torch.tensor(options, dtype=torch.float64).to(dtype).to(DEVICE)
    there = range(0, min(len(options), MAX_TENSORS.value), 2)
    addresses = [a if o in there else 0 for o, a in enumerate(numbers(on_device))]
    seen = [v if o in there else options[o] for o, v in enumerate(on_device.double().tolist())]
    hypers = run(rule, [options], [addresses], [], [0] * 3, known=5.0)
    for row in hypers:
        assert_bits(row, rule, seen, [5.0] * len(RULES[rule]["scalars"]))


@every_rule
def test_skipped_step_advances_nothing(rule: str) -> None:
    options = random_options(rule, torch.Generator().manual_seed(2))
    step = torch.arange(5.0, device=DEVICE)
    momentum_step = torch.tensor([0.0, 0.0, 1.0, 0.0, 7.0], device=DEVICE)
    scalars = [step, *(momentum_step.clone() for _ in RULES[rule]["scalars"][1:])]
    nothing = [[0] * len(options)]
    for found_inf, advanced in ((1.0, 0), (0.0, 1)):
        flag = torch.tensor(found_inf, device=DEVICE)
        before = [scalar.cpu().clone() for scalar in scalars]
        addresses = [numbers(scalar) for scalar in scalars]
        hypers = run(rule, [options], nothing, addresses, [0] * 5, found_inf=flag)
        numbers_now = torch.stack(before).t().tolist()
        after = [_C.advance(rule, options, now, in_float32=True) for now in numbers_now]
        expected = torch.tensor(after).t() if advanced else torch.stack(before)
        assert torch.equal(torch.stack(scalars).cpu(), expected)
        if rule == "sgd":
            first_step = values(hypers, RULES[rule]["hypers"].index("first_step"))
            assert torch.equal(first_step, (before[-1] == 0).double())


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warmed up"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_weight_of_an_average_is_the_host_s(decay: float, warmup: bool) -> None:
    count = torch.tensor([0.0, 1.0, 2.0, 7.0, 8889.0, 2.0**24 - 1], device=DEVICE)
    before, n = count.tolist(), len(count)
    options = random_options("sgd", torch.Generator().manual_seed(3))
    for skip in (1.0, 0.0):
        hypers = run(
            "sgd", [options], [[0] * len(options)], [], [0] * n, known=1.0,
            found_inf=torch.tensor(skip, device=DEVICE), n_averaged=numbers(count), decay=decay,
            warmup=warmup,
        )  # fmt: skip
        expected = [averages.weight(decay, warmup, int(n)) if n > 0 else 1.0 for n in before]
        assert values(hypers, EMA_WEIGHT.value).tolist() == expected
        assert count.tolist() == (before if skip else [averaged + 1 for averaged in before])
