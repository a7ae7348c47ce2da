"""Options and scalars -> hypers on the device, for steps that the host cannot know.

csrc/rules.h's `advance` and `prepare`, in the same order with the same names and the same
bits: all in float64, by operations that every device rounds correctly. `prepare` is used where step, lr or
betas are tensors on the device (capturable, GradScaler's found_inf); elsewhere the host does the same.

Tables in device memory, beside those of `multi_tensor`:

steps          int64 [n_tensors, columns]: addresses of the rule's scalars, `step` first, in two columns
               at least, and of the number of steps that went into the EMA, or 0; the row of the next two
option_values  float64 [n_rows, OPTIONS_ROW]: at most MAX_OPTIONS options of the rule; the sign of the
               grad, the EMA's decay, whether that is warmed up, and the rule's scalars without an
               address, as its prepare takes them
addresses      int64 [n_rows, MAX_TENSORS]: of an option that is a tensor on the device, or 0; lr and the
               betas, which alone may be one, come first

An address is of a float32, or of a float64 where its lowest bit is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import EMA_WEIGHT, GRAD_SIGN, ROW, STEP

# The columns of `option_values` behind the options, and those of `addresses`, as csrc/kernel.h has them.
MAX_OPTIONS = tl.constexpr(9)
MAX_TENSORS = tl.constexpr(8)
SIGN = tl.constexpr(9)
EMA_DECAY = tl.constexpr(10)
EMA_WARMUP = tl.constexpr(11)
SCALARS = tl.constexpr(12)
OPTIONS_ROW = tl.constexpr(15)
NAN = tl.constexpr(0x7FF8000000000000)  # its bits


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
def bits_as_double(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def log2_of(x):
    """The binary logarithm of a positive normal number, by operations that are rounded alike everywhere.

    Infinity counts as 2^1024.
    """
    bits = x.to(tl.int64, bitcast=True)
    whole = ((bits >> 52) - 1023).to(tl.float64)
    fraction = bits_as_double((bits & 0xFFFFFFFFFFFFF) | (1023 << 52))
    is_high = fraction > 1.4142135623730951
    fraction = tl.where(is_high, fraction * 0.5, fraction)
    whole = tl.where(is_high, whole + 1, whole)
    s = (fraction - 1) / (fraction + 1)
    square = s * s
    sum = square * 0 + 1.0 / 27
    for i in tl.static_range(13):
        sum = sum * square + 1.0 / (25 - 2 * i)
    is_normal = x >= 2.2250738585072014e-308
    return tl.where(
        is_normal, whole + 2 * s * sum * 1.4426950408889634, bits_as_double(bits * 0 + NAN)
    )


@triton.jit
def exp2_of(x):
    """2^x, in the same way; x is clamped to +-1000."""
    clamped = tl.where(x > 1000, 1000.0, x)
    clamped = tl.where(clamped < -1000, -1000.0, clamped)
    clamped = tl.where(x == x, clamped, 0.0)
    nearest = (clamped + 1024.5).to(tl.int64) - 1024
    rest = (clamped - nearest.to(tl.float64)) * 0.6931471805599453
    sum = clamped * 0 + 1
    for i in tl.static_range(16):
        sum = 1 + sum * (rest * (1.0 / (16 - i)))
    return tl.where(
        x == x, sum * bits_as_double((nearest + 1023) << 52), bits_as_double(nearest * 0 + NAN)
    )


@triton.jit
def power(base, exponent):
    return exp2_of(log2_of(base) * exponent)


@triton.jit
def rounded(value, is_float32):
    """As a scalar is stored that is a float32, or a float64."""
    return tl.where(is_float32, value.to(tl.float32).to(tl.float64), value)


@triton.jit
def advance(options, scalars, step_is_float32, last_is_float32):
    return (scalars[0] + 1,)


@triton.jit
def sgd_advance(options, scalars, step_is_float32, last_is_float32):
    step, momentum_step = scalars
    return step + 1, momentum_step + 1


@triton.jit
def sgd(options, scalars):
    lr, momentum, dampening, weight_decay, nesterov = options
    step, momentum_step = scalars
    first_step = (momentum_step == 1).to(tl.float64)
    return lr, momentum, 1 - dampening, weight_decay, nesterov, first_step


@triton.jit
def param_decay_of(lr, weight_decay):
    """What weight decay leaves of a param. Without it 1, whatever lr is."""
    return tl.where(weight_decay != 0, 1 - lr * weight_decay, 1.0)


@triton.jit
def weight_decays(lr, weight_decay, is_decoupled):
    """The one that the grad takes, and what the other one leaves of a param."""
    of_param = tl.where(is_decoupled != 0, weight_decay, 0.0)
    return weight_decay - of_param, param_decay_of(lr, of_param)


@triton.jit
def lion(options, scalars):
    lr, beta1, beta2, weight_decay = options
    return lr, beta1, 1 - beta1, beta2, 1 - beta2, param_decay_of(lr, weight_decay)


@triton.jit
def asgd_advance(options, scalars, step_is_float32, last_is_float32):
    lr, lambd, alpha, t0, weight_decay = options
    step = scalars[0] + 1
    since = step - t0
    eta = rounded(lr / power(1 + lambd * lr * step, alpha), step_is_float32)
    return step, eta, rounded(1 / tl.where(since > 1, since, 1.0), step_is_float32)


@triton.jit
def asgd(options, scalars):
    lr, lambd, alpha, t0, weight_decay = options
    step, eta, mu = scalars
    return eta, 1 - lambd * eta, mu, weight_decay


@triton.jit
def adagrad(options, scalars):
    lr, lr_decay, eps, weight_decay = options
    return lr / (1 + (scalars[0] - 1) * lr_decay), eps, weight_decay


@triton.jit
def adadelta(options, scalars):
    lr, rho, eps, weight_decay = options
    return lr, rho, 1 - rho, eps, weight_decay


@triton.jit
def rmsprop(options, scalars):
    lr, alpha, eps, weight_decay, momentum, centered = options
    return lr, alpha, 1 - alpha, eps, weight_decay, momentum


@triton.jit
def rprop(options, scalars):
    lr, eta1, eta2, step_size1, step_size2 = options
    return eta1, eta2, step_size1, step_size2


@triton.jit
def adamax(options, scalars):
    lr, beta1, beta2, eps, weight_decay = options
    return lr / (1 - integer_power(beta1, scalars[0])), 1 - beta1, beta2, eps, weight_decay


@triton.jit
def adam(options, scalars):
    lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay = options
    of_grad, param_decay = weight_decays(lr, weight_decay, decoupled_weight_decay)
    bias_correction1 = 1 - integer_power(beta1, scalars[0])
    bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, scalars[0]))
    return (
        lr / bias_correction1 * bias_correction2_sqrt,
        1 - beta1,
        beta2,
        1 - beta2,
        eps * bias_correction2_sqrt,
        of_grad,
        param_decay,
    )


@triton.jit
def radam(options, scalars):
    lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay = options
    of_grad, param_decay = weight_decays(lr, weight_decay, decoupled_weight_decay)
    power2 = integer_power(beta2, scalars[0])
    bias_correction2 = 1 - power2
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * scalars[0] * power2 / bias_correction2
    step_size = lr / (1 - integer_power(beta1, scalars[0]))
    rectified = rho_t > 5
    rectification = (rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)
    factor = tl.sqrt(rectification) * tl.sqrt(bias_correction2)
    return (
        tl.where(rectified, step_size * factor, step_size),
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        of_grad,
        param_decay,
        rectified.to(tl.float64),
    )


@triton.jit
def mu_of(beta1, momentum_decay, step):
    return beta1 * (1 - 0.5 * power(step * 0 + 0.96, step * momentum_decay))


@triton.jit
def nadam_advance(options, scalars, step_is_float32, last_is_float32):
    lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay = options
    step, mu_product = scalars
    step = step + 1
    return step, mu_product * rounded(mu_of(beta1, momentum_decay, step), last_is_float32)


@triton.jit
def nadam(options, scalars):
    lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay = options
    step, mu_product = scalars
    of_grad, param_decay = weight_decays(lr, weight_decay, decoupled_weight_decay)
    bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, step))
    step_size = lr * bias_correction2_sqrt
    mu_next = mu_of(beta1, momentum_decay, step + 1)
    return (
        step_size * (1 - mu_of(beta1, momentum_decay, step)) / (1 - mu_product),
        step_size * mu_next / (1 - mu_product * mu_next),
        1 - beta1,
        beta2,
        1 - beta2,
        eps * bias_correction2_sqrt,
        of_grad,
        param_decay,
    )


@triton.jit
def half_life(beta):
    return tl.where(beta > 0, -1 / log2_of(beta), 0.0)


@triton.jit
def beta3_at(step, beta1, beta3, warmup):
    """Grows from beta1 on, the half-life in equal steps."""
    share = step / warmup
    grown = exp2_of(-1 / ((1 - share) * half_life(beta1) + share * half_life(beta3)))
    return tl.where(step < warmup, grown, beta3)


@triton.jit
def ademamix(options, scalars):
    lr, beta1, beta2, beta3, alpha, alpha_warmup, beta3_warmup, eps, weight_decay = options
    step = scalars[0]
    alpha = tl.where(step < alpha_warmup, step / alpha_warmup * alpha, alpha)
    bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, step))
    step_size = lr * bias_correction2_sqrt
    return (
        step_size / (1 - integer_power(beta1, step)),
        step_size * alpha,
        1 - beta1,
        1 - beta3_at(step, beta1, beta3, beta3_warmup),
        beta2,
        1 - beta2,
        eps * bias_correction2_sqrt,
        param_decay_of(lr, weight_decay),
    )


@triton.jit
def lr_at(step, lr, warmup_steps):
    return tl.where(step < warmup_steps, step / warmup_steps * lr, lr)


@triton.jit
def weight_of(step, lr_max, r, weight_lr_power):
    of_zero = tl.where(weight_lr_power > 0, 0.0, 1.0)
    return power(step, r) * tl.where(lr_max == 0, of_zero, power(lr_max, weight_lr_power))


@triton.jit
def adamw_schedule_free_advance(options, scalars, step_is_float32, last_is_float32):
    lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power = options
    step, lr_max, weight_sum = scalars
    step = step + 1
    lr = lr_at(step, lr, warmup_steps)
    lr_max = rounded(tl.where(lr_max > lr, lr_max, lr), last_is_float32)
    return step, lr_max, weight_sum + weight_of(step, lr_max, r, weight_lr_power)


@triton.jit
def adamw_schedule_free(options, scalars):
    lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power = options
    step, lr_max, weight_sum = scalars
    bias_correction2_sqrt = tl.sqrt(1 - integer_power(beta2, step))
    lr = lr_at(step, lr, warmup_steps)
    weight = weight_of(step, lr_max, r, weight_lr_power)
    z_weight = tl.where(weight_sum != 0, weight / weight_sum, 0.0)
    return (
        bias_correction2_sqrt,
        beta2,
        1 - beta2,
        eps * bias_correction2_sqrt,
        weight_decay,
        z_weight,
        lr * (beta1 * (1 - z_weight) - 1),
        lr,
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


@triton.jit
def as_stored(address, value):
    """A float32 counts to 2^24, as stock's does: the hypers are those of what is stored."""
    return rounded(value, (address & 1) == 0)


@triton.jit(do_not_specialize=["n_tensors"], do_not_specialize_on_alignment=["found_inf"])
def prepare(
    steps, option_values, addresses, hypers, found_inf, n_tensors,
    PREPARE: tl.constexpr, ADVANCE: tl.constexpr, PREPARES_BEFORE: tl.constexpr,
    N_OPTIONS: tl.constexpr, N_SCALARS: tl.constexpr, N_HYPERS: tl.constexpr,
    N_AVERAGED: tl.constexpr, AVERAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance the scalars, unless found_inf, and write one row of `hypers` per tensor.

    N_AVERAGED: the last but one column of `steps`.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < n_tensors
    tensor = tensor.to(tl.int64)
    if found_inf is not None:
        goes_on = tl.load(found_inf) == 0
    else:
        goes_on = True
    steps += (N_AVERAGED + 2) * tensor
    row = tl.load(steps + N_AVERAGED + 1, mask=mask, other=0)
    option_values += row * OPTIONS_ROW

    options = ()
    for o in tl.static_range(N_OPTIONS):
        value = tl.load(option_values + o, mask=mask, other=0.0)
        if o < MAX_TENSORS:
            address = tl.load(addresses + row * MAX_TENSORS + o, mask=mask, other=0)
            value = tl.where(address != 0, load_number(address, mask), value)
        options = options + (value,)
    grad_sign = tl.load(option_values + SIGN, mask=mask, other=0.0)

    places = ()
    known = ()
    before = ()
    for i in tl.static_range(N_SCALARS):
        address = tl.load(steps + i, mask=mask, other=0)
        value = tl.load(option_values + SCALARS + i, mask=mask, other=1.0)
        places = places + (address,)
        known = known + (value,)
        before = before + (tl.where(address != 0, load_number(address, mask), value),)
    step_is_float32 = (places[0] & 1) == 0
    advanced = ADVANCE(options, before, step_is_float32, (places[N_SCALARS - 1] & 1) == 0)
    after = ()
    for i in tl.static_range(N_SCALARS):
        value = as_stored(places[i], advanced[i])
        if goes_on:
            store_number(places[i], value, mask)
        if not PREPARES_BEFORE:
            value = tl.where(places[i] != 0, value, known[i])
        after = after + (value,)

    if PREPARES_BEFORE:
        prepared = PREPARE(options, before)
    else:
        prepared = PREPARE(options, after)
    hypers += tensor * ROW
    for i in tl.static_range(N_HYPERS):
        store_bits(hypers + i, prepared[i], mask)
    store_bits(hypers + GRAD_SIGN, grad_sign, mask)
    whole_step = after[0].to(tl.int64)
    store_word(hypers + STEP, whole_step & 0xFFFFFFFF, mask)
    store_word(hypers + STEP + 1, whole_step >> 32, mask)
    if AVERAGES:  # as csrc/averages.cpp
        address = tl.load(steps + N_AVERAGED, mask=mask, other=0)
        decay = tl.load(option_values + EMA_DECAY, mask=mask, other=0.0)
        warmup = tl.load(option_values + EMA_WARMUP, mask=mask, other=0.0)
        n_averaged = load_number(address, mask)
        warm = (1 + n_averaged) / (10 + n_averaged)
        decay = tl.where((warmup != 0) & (warm < decay), warm, decay)
        weight = tl.where(n_averaged == 0, 1.0, 1 - decay)
        store_bits(hypers + EMA_WEIGHT, weight, mask)
        if goes_on:
            store_number(address, n_averaged + 1, mask)
