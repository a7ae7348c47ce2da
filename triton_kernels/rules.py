"""Every update rule, simplest first: csrc/rules.h's, in the same order with the same names.

A rule is arithmetic on one block of elements of one tensor; grad is already unscaled and, if
maximizing, negated. It takes ``(param, grad, states, hypers, THERE)`` and returns ``(param, states)``.
THERE says of each state whether there is one, known when the kernel is compiled (without it, the state is
any number and comes back as it was). All other choices are hypers, which are the same for a whole tensor:
tensors with other options need no other kernel.

Nothing here may round otherwise than the C++ does: no fused multiply-add, correctly rounded roots and
quotients, the same order of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import triton
import triton.language as tl

from fused_optim import _C


@triton.jit
def square_root(x):
    """Correctly rounded; tl.sqrt_rn is for float32 alone, and tl.sqrt approximates there."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(x, y):
    """Correctly rounded; tl.div_rn is for float32 alone, and / approximates there."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def lerp(start, end, weight):
    """torch.lerp: measured from the nearer end, so that weight == 1 gives end."""
    near_start = weight < 0.5
    factor = tl.where(near_start, weight, weight - 1)
    return tl.where(near_start, start, end) + factor * (end - start)


@triton.jit
def maximum(a, b):
    """torch.maximum: a NaN on either side stays."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def sign(x):
    """torch.sign: 0 for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def sgd(param, grad, states, hypers, THERE: tl.constexpr):
    """Sutskever et al. 2013, in torch.optim's form: the learning rate multiplies the buffer."""
    momentum_buffer = states[0]
    lr, momentum, dampening_comp, weight_decay, nesterov, first_step = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    if THERE[0]:
        if first_step != 0:
            momentum_buffer = grad
        else:
            momentum_buffer = momentum * momentum_buffer + dampening_comp * grad
        if nesterov != 0:
            grad = grad + momentum * momentum_buffer
        else:
            grad = momentum_buffer
    param = param - lr * grad
    return param, (momentum_buffer,)


@triton.jit
def lion(param, grad, states, hypers, THERE: tl.constexpr):
    """Chen et al. 2023, algorithm 2, in the order of the authors' PyTorch code."""
    exp_avg = states[0]
    lr, beta1, beta1_comp, beta2, beta2_comp, param_decay = hypers
    param = param * param_decay
    direction = beta1 * exp_avg + beta1_comp * grad
    param = param - lr * sign(direction)
    exp_avg = beta2 * exp_avg + beta2_comp * grad
    return param, (exp_avg,)


@triton.jit
def asgd(param, grad, states, hypers, THERE: tl.constexpr):
    """Polyak, Juditsky 1992, in torch.optim's form: eta and mu are the step before's."""
    ax = states[0]
    eta, param_decay, mu, weight_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    param = param * param_decay - eta * grad
    ax = tl.where(mu == 1, param, ax + (param - ax) * mu)
    return param, (ax,)


@triton.jit
def adagrad(param, grad, states, hypers, THERE: tl.constexpr):
    """Duchi, Hazan, Singer 2011, diagonal form."""
    sum = states[0]
    decayed_lr, eps, weight_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    sum = sum + grad * grad
    param = param - divide(decayed_lr * grad, square_root(sum) + eps)
    return param, (sum,)


@triton.jit
def adadelta(param, grad, states, hypers, THERE: tl.constexpr):
    """Zeiler 2012, algorithm 1."""
    square_avg, acc_delta = states
    lr, rho, rho_comp, eps, weight_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    square_avg = rho * square_avg + rho_comp * grad * grad
    delta = divide(square_root(acc_delta + eps), square_root(square_avg + eps)) * grad
    acc_delta = rho * acc_delta + rho_comp * delta * delta
    param = param - lr * delta
    return param, (square_avg, acc_delta)


@triton.jit
def rmsprop(param, grad, states, hypers, THERE: tl.constexpr):
    """Hinton's lecture 6e (2012); centered as in Graves 2013; eps is added after the square root."""
    square_avg, momentum_buffer, grad_avg = states
    lr, alpha, alpha_comp, eps, weight_decay, momentum = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    square_avg = alpha * square_avg + alpha_comp * grad * grad
    variance = square_avg
    if THERE[2]:
        grad_avg = lerp(grad_avg, grad, alpha_comp)
        variance = square_avg - grad_avg * grad_avg
    denom = square_root(variance) + eps
    if THERE[1]:
        momentum_buffer = momentum * momentum_buffer + divide(grad, denom)
        param = param - lr * momentum_buffer
    else:
        param = param - divide(lr * grad, denom)
    return param, (square_avg, momentum_buffer, grad_avg)


@triton.jit
def rprop(param, grad, states, hypers, THERE: tl.constexpr):
    """Riedmiller, Braun 1993, without weight backtracking, in torch.optim's form."""
    prev, step_size = states
    etaminus, etaplus, smallest, largest = hypers
    change = grad * prev
    step_size = step_size * tl.where(change > 0, etaplus, tl.where(change < 0, etaminus, 1.0))
    # torch.clamp: a NaN stays, and the upper end counts if they cross.
    step_size = tl.where(step_size < smallest, smallest, step_size)
    step_size = tl.where(step_size > largest, largest, step_size)
    prev = tl.where(change < 0, 0.0, grad)
    param = param - sign(prev) * step_size
    return param, (prev, step_size)


@triton.jit
def adamax(param, grad, states, hypers, THERE: tl.constexpr):
    """Kingma, Ba 2015, algorithm 2, with eps as in torch.optim."""
    exp_avg, exp_inf = states
    step_size, beta1_comp, beta2, eps, weight_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    exp_avg = lerp(exp_avg, grad, beta1_comp)
    exp_inf = maximum(beta2 * exp_inf, tl.abs(grad) + eps)
    param = param - divide(step_size * exp_avg, exp_inf)
    return param, (exp_avg, exp_inf)


@triton.jit
def adam(param, grad, states, hypers, THERE: tl.constexpr):
    """Kingma, Ba 2015, with the bias corrections folded into step_size and eps; with param_decay AdamW.

    Loshchilov, Hutter 2019, algorithm 2; amsgrad: Reddi, Kale, Kumar 2018.
    """
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    step_size, beta1_comp, beta2, beta2_comp, eps_hat, weight_decay, param_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    elif param_decay != 1:
        param = param * param_decay
    exp_avg = lerp(exp_avg, grad, beta1_comp)
    exp_avg_sq = beta2 * exp_avg_sq + beta2_comp * grad * grad
    second_moment = exp_avg_sq
    if THERE[2]:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    param = param - divide(step_size * exp_avg, square_root(second_moment) + eps_hat)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def radam(param, grad, states, hypers, THERE: tl.constexpr):
    """Liu et al. 2020, algorithm 2."""
    exp_avg, exp_avg_sq = states
    step_size, beta1_comp, beta2, beta2_comp, eps, weight_decay, param_decay, rectified = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    param = param * param_decay
    exp_avg = lerp(exp_avg, grad, beta1_comp)
    exp_avg_sq = beta2 * exp_avg_sq + beta2_comp * grad * grad
    denom = tl.where(rectified != 0, square_root(exp_avg_sq) + eps, 1.0)
    param = param - divide(step_size * exp_avg, denom)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def nadam(param, grad, states, hypers, THERE: tl.constexpr):
    """Dozat 2016, algorithm 2 with its schedule of the momentum; folded, with one division."""
    exp_avg, exp_avg_sq = states
    grad_size, avg_size, beta1_comp, beta2, beta2_comp, eps_hat, weight_decay, param_decay = hypers
    if weight_decay != 0:
        grad = grad + weight_decay * param
    param = param * param_decay
    exp_avg = lerp(exp_avg, grad, beta1_comp)
    exp_avg_sq = beta2 * exp_avg_sq + beta2_comp * grad * grad
    direction = grad_size * grad + avg_size * exp_avg
    param = param - divide(direction, square_root(exp_avg_sq) + eps_hat)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def ademamix(param, grad, states, hypers, THERE: tl.constexpr):
    """Pagliardini, Ablin, Grangier 2024, algorithm 1, folded as Adam is."""
    exp_avg_fast, exp_avg_slow, exp_avg_sq = states
    fast_size, slow_size, beta1_comp, beta3_comp, beta2, beta2_comp, eps_hat, param_decay = hypers
    param = param * param_decay
    exp_avg_fast = lerp(exp_avg_fast, grad, beta1_comp)
    exp_avg_slow = lerp(exp_avg_slow, grad, beta3_comp)
    exp_avg_sq = beta2 * exp_avg_sq + beta2_comp * grad * grad
    direction = fast_size * exp_avg_fast + slow_size * exp_avg_slow
    param = param - divide(direction, square_root(exp_avg_sq) + eps_hat)
    return param, (exp_avg_fast, exp_avg_slow, exp_avg_sq)


@triton.jit
def adamw_schedule_free(param, grad, states, hypers, THERE: tl.constexpr):
    """Defazio et al. 2024, algorithm 1, in the authors' form, folded as Adam is."""
    z, exp_avg_sq = states
    grad_size, beta2, beta2_comp, eps_hat, weight_decay, z_weight, y_size, lr = hypers
    exp_avg_sq = beta2 * exp_avg_sq + beta2_comp * grad * grad
    direction = divide(grad_size * grad, square_root(exp_avg_sq) + eps_hat)
    if weight_decay != 0:
        direction = direction + weight_decay * param
    param = lerp(param, z, z_weight) + y_size * direction
    z = z - lr * direction
    return param, (z, exp_avg_sq)


@dataclass(frozen=True)
class Rule:
    """A rule, as the tables and the kernel have to know it.

    Attributes:
        update: the function above.
        options, states, scalars, hypers: csrc/rules.h's names, in the order in which functions take them;
            "betas.0" is an item of group["betas"].
        kinds: "signed", "square" or "exact" for each state.
        optional: bit i: options decide whether there is state i.
        prepares_before: `prepare` takes the scalars before the step, not those after it.
    """

    update: Callable[..., Any]
    options: list[str]
    states: list[str]
    scalars: list[str]
    hypers: list[str]
    kinds: list[str]
    optional: int
    prepares_before: bool

    @property
    def optional_states(self) -> list[str]:
        return [state for s, state in enumerate(self.states) if self.optional >> s & 1]


_FACTS = [field.name for field in fields(Rule)[1:]]
# A rule's functions here and in prepare.py have its name.
RULES = {
    name: Rule(globals()[name], *(facts[key] for key in _FACTS))
    for name, facts in _C.rules().items()
}
