"""Options and step -> hypers on the device, for steps that the host cannot know.

csrc/rules.h's `prepare`, in the same order with the same names and the same bits: all in float64, by
operations that every device rounds correctly. `prepare` is used where step, lr or betas are tensors
on the device (capturable, GradScaler's found_inf); elsewhere the host does the same.

Tables in device memory, beside those of `multi_tensor`:

steps          int64 [n_tensors, 4]: address of the step, or 0; address of a float32 that says
               whether SGD's momentum has started, or 0 if it has; address of the number of steps that
               went into the EMA, or 0; the row of the next two
option_values  float64 [n_rows, OPTIONS_ROW]: the rule's options, the variant's bits, the sign of the
               grad, the EMA's decay, the step for tensors without an address of one, and whether the
               EMA's decay is warmed up
addresses      int64 [n_rows, MAX_HYPERS]: of an option that is a tensor on the device, or 0

An address is of a float32, or of a float64 where its lowest bit is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import EMA_WEIGHT, GRAD_SIGN, MAX_HYPERS, ROW, STEP, VARIANT
from .rules import FIRST_STEP

EMA_DECAY = tl.constexpr(10)
EMA_WARMUP = tl.constexpr(12)
OPTIONS_ROW = tl.constexpr(13)
STEPS_ROW = tl.constexpr(4)


@triton.jit
def integer_power(base, exponent):
    """Repeated squaring: no library's pow gives the same bits everywhere. exponent < 2^54."""
    result = tl.full(base.shape, 1.0, tl.float64)
    n = exponent.to(tl.int64)
    for _ in range(54):
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def sgd(options, step):
    lr, momentum, dampening, weight_decay, nesterov = options
    return lr, momentum, 1 - dampening, weight_decay


@triton.jit
def lion(options, step):
    lr, beta1, beta2, weight_decay = options
    return lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay


@triton.jit
def adagrad(options, step):
    lr, lr_decay, eps, weight_decay = options
    return lr / (1 + (step - 1) * lr_decay), eps, weight_decay


@triton.jit
def rmsprop(options, step):
    lr, alpha, eps, weight_decay, momentum, centered = options
    return lr, alpha, 1 - alpha, eps, weight_decay, momentum


@triton.jit
def adam(options, step):
    lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay = options
    bias_correction1 = 1 - integer_power(beta1, step)
    bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, step))
    return (
        lr / bias_correction1 * bias_correction2_sqrt,
        1 - beta1,
        beta2,
        1 - beta2,
        eps * bias_correction2_sqrt,
        weight_decay,
        1 - lr * weight_decay,
    )


@triton.jit
def load_number(address, mask):
    narrow = (address & ~1).to(tl.pointer_type(tl.float32))
    wide = (address & ~1).to(tl.pointer_type(tl.float64))
    is_wide = (address & 1) != 0
    there = mask & (address != 0)
    narrow_value = tl.load(narrow, mask=there & ~is_wide, other=0.0).to(tl.float64)
    wide_value = tl.load(wide, mask=there & is_wide, other=0.0)
    return tl.where(is_wide, wide_value, narrow_value)


@triton.jit
def store_number(address, value, mask):
    narrow = (address & ~1).to(tl.pointer_type(tl.float32))
    wide = (address & ~1).to(tl.pointer_type(tl.float64))
    is_wide = (address & 1) != 0
    there = mask & (address != 0)
    tl.store(narrow, value.to(tl.float32), mask=there & ~is_wide)
    tl.store(wide, value, mask=there & is_wide)


@triton.jit
def store_word(hypers, whole, mask):
    tl.store(hypers, whole.to(hypers.dtype.element_ty), mask=mask)


@triton.jit
def store_bits(hypers, value, mask):
    """Store a number of the compute type, which is as wide as the table's elements."""
    if hypers.dtype.element_ty == tl.int32:
        value = value.to(tl.float32)
    tl.store(hypers, value.to(hypers.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=["n_tensors"], do_not_specialize_on_alignment=["found_inf"])
def prepare(
    steps, option_values, addresses, hypers, found_inf, n_tensors,
    PREPARE: tl.constexpr, N_OPTIONS: tl.constexpr, N_HYPERS: tl.constexpr, AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance the steps, unless found_inf, and write one row of `hypers` per tensor."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < n_tensors
    tensor = tensor.to(tl.int64)
    if found_inf is not None:
        goes_on = tl.load(found_inf) == 0
    else:
        goes_on = True
    steps += STEPS_ROW * tensor
    step_address = tl.load(steps, mask=mask, other=0)
    started_address = tl.load(steps + 1, mask=mask, other=0)
    row = tl.load(steps + 3, mask=mask, other=0)

    values = ()
    for o in tl.static_range(N_OPTIONS):
        address = tl.load(addresses + row * MAX_HYPERS + o, mask=mask, other=0)
        value = tl.load(option_values + row * OPTIONS_ROW + o, mask=mask, other=0.0)
        values = values + (tl.where(address != 0, load_number(address, mask), value),)
    variant = tl.load(option_values + row * OPTIONS_ROW + VARIANT, mask=mask, other=0.0)
    grad_sign = tl.load(option_values + row * OPTIONS_ROW + GRAD_SIGN, mask=mask, other=0.0)
    known_step = tl.load(option_values + row * OPTIONS_ROW + STEP, mask=mask, other=1.0)

    advanced = load_number(step_address, mask) + 1
    # A float32 stays at 2^24, as stock's does: the hypers are those of what is stored.
    is_wide = (step_address & 1) != 0
    advanced = tl.where(is_wide, advanced, advanced.to(tl.float32).to(tl.float64))
    step = tl.where(step_address != 0, advanced, known_step)
    waiting = (started_address != 0) & (load_number(started_address, mask) == 0)
    variant = tl.where(waiting, variant + FIRST_STEP, variant)
    if goes_on:
        store_number(step_address, step, mask)
        store_number(started_address, tl.full(step.shape, 1.0, tl.float64), mask)

    prepared = PREPARE(values, step)
    hypers += tensor * ROW
    for i in tl.static_range(N_HYPERS):
        store_bits(hypers + i, prepared[i], mask)
    store_word(hypers + VARIANT, variant, mask)
    store_bits(hypers + GRAD_SIGN, grad_sign, mask)
    whole_step = step.to(tl.int64)
    store_word(hypers + STEP, whole_step & 0xFFFFFFFF, mask)
    store_word(hypers + STEP + 1, whole_step >> 32, mask)
    if AVERAGES:  # as csrc/averages.cpp
        n_address = tl.load(steps + 2, mask=mask, other=0)
        decay = tl.load(option_values + row * OPTIONS_ROW + EMA_DECAY, mask=mask, other=0.0)
        warmup = tl.load(option_values + row * OPTIONS_ROW + EMA_WARMUP, mask=mask, other=0.0)
        n_averaged = load_number(n_address, mask)
        warm = (1 + n_averaged) / (10 + n_averaged)
        decay = tl.where((warmup != 0) & (warm < decay), warm, decay)
        weight = tl.where(n_averaged == 0, 1.0, 1 - decay)
        store_bits(hypers + EMA_WEIGHT, weight, mask)
        if goes_on:
            store_number(n_address, n_averaged + 1, mask)
