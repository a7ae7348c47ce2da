"""The update rules in float64 numpy, read off the papers, for clarity alone.

Each function takes one parameter's values, one grad, the state before the step (a dict of arrays,
empty before the first step) and the number of this step, counted from 1; it returns the parameter
and the state after the step. Nothing is modified in place.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = dict[str, Array]


def sgd(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Sutskever et al. 2013, with the learning rate outside the buffer, as torch documents."""
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    if momentum == 0:
        return param - lr * grad, {}
    if "momentum_buffer" in state:
        momentum_buffer = momentum * state["momentum_buffer"] + (1 - dampening) * grad
    else:
        momentum_buffer = grad
    direction = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * direction, {"momentum_buffer": momentum_buffer}


def lion(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2."""
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    exp_avg = state.get("exp_avg", 0.0)
    direction = np.sign(beta1 * exp_avg + (1 - beta1) * grad)
    after = beta2 * exp_avg + (1 - beta2) * grad
    return param - lr * (direction + weight_decay * param), {"exp_avg": after}


def asgd(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Polyak, Juditsky 1992; the learning rate: Bottou 2012, section 4.2; late by a step, as torch's is."""
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    eta, mu = state.get("eta", lr), state.get("mu", 1.0)
    param = param - eta * (lambd * param + grad)
    ax = state.get("ax", 0.0)
    after = {
        "ax": ax + mu * (param - ax),
        "eta": np.float64(lr / (1 + lambd * lr * step) ** alpha),
        "mu": np.float64(1 / max(1, step - t0)),
    }
    return param, after


def adagrad(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    initial_accumulator_value: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Duchi, Hazan, Singer 2011, diagonal form."""
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    total = state.get("sum", initial_accumulator_value) + grad**2
    decayed_lr = lr / (1 + (step - 1) * lr_decay)
    return param - decayed_lr * grad / (np.sqrt(total) + eps), {"sum": total}


def adadelta(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Zeiler 2012, algorithm 1; lr as torch has it."""
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    square_avg = rho * state.get("square_avg", 0.0) + (1 - rho) * grad**2
    acc_delta = state.get("acc_delta", 0.0)
    delta = np.sqrt((acc_delta + eps) / (square_avg + eps)) * grad
    acc_delta = rho * acc_delta + (1 - rho) * delta**2
    return param - lr * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


def rmsprop(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Hinton's lecture 6e (2012); centered, momentum as Graves 2013, eps outside the root."""
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    after = {"square_avg": alpha * state.get("square_avg", 0.0) + (1 - alpha) * grad**2}
    variance = after["square_avg"]
    if centered:
        after["grad_avg"] = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * grad
        variance = variance - after["grad_avg"] ** 2
    direction = grad / (np.sqrt(variance) + eps)
    if momentum > 0:
        direction = momentum * state.get("momentum_buffer", 0.0) + direction
        after["momentum_buffer"] = direction
    return param - lr * direction, after


def rprop(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    etas: tuple[float, float],
    step_sizes: tuple[float, float],
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Riedmiller, Braun 1993, without weight backtracking: a step size is kept for the next step."""
    if maximize:
        grad = -grad
    change = grad * state.get("prev", 0.0)
    factor = np.select([change > 0, change < 0], [etas[1], etas[0]], 1.0)
    step_size = np.clip(state.get("step_size", lr) * factor, *step_sizes)
    grad = np.where(change < 0, 0.0, grad)
    return param - step_size * np.sign(grad), {"prev": grad, "step_size": step_size}


def adamax(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Kingma, Ba 2015, algorithm 2; eps as torch has it."""
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    grad = grad + weight_decay * param
    exp_avg = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * grad
    exp_inf = np.maximum(beta2 * state.get("exp_inf", 0.0), np.abs(grad) + eps)
    after = {"exp_avg": exp_avg, "exp_inf": exp_inf}
    return param - lr / (1 - beta1**step) * exp_avg / exp_inf, after


def adam(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Kingma, Ba 2015, algorithm 1; decoupled: Loshchilov, Hutter 2019, algorithm 2.

    amsgrad: Reddi, Kale, Kumar 2018, with the bias corrected after the maximum, as torch does.
    """
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    if decoupled_weight_decay:
        param = param - lr * weight_decay * param
    else:
        grad = grad + weight_decay * param
    after = {
        "exp_avg": beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad**2,
    }
    second_moment = after["exp_avg_sq"]
    if amsgrad:
        second_moment = np.maximum(state.get("max_exp_avg_sq", 0.0), second_moment)
        after["max_exp_avg_sq"] = second_moment
    exp_avg_hat = after["exp_avg"] / (1 - beta1**step)
    second_moment_hat = second_moment / (1 - beta2**step)
    return param - lr * exp_avg_hat / (np.sqrt(second_moment_hat) + eps), after


def radam(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Liu et al. 2020, algorithm 2; rectified if rho > 5, as in the authors' code."""
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    if decoupled_weight_decay:
        param = param - lr * weight_decay * param
    else:
        grad = grad + weight_decay * param
    exp_avg = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad**2
    exp_avg_hat = exp_avg / (1 - beta1**step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if rho <= 5:
        return param - lr * exp_avg_hat, after
    r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    adaptive = np.sqrt(1 - beta2**step) / (np.sqrt(exp_avg_sq) + eps)
    return param - lr * r * exp_avg_hat * adaptive, after


def nadam(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Dozat 2016, algorithm 2, with the schedule of its section 3.3; decoupled as in AdamW."""
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    if decoupled_weight_decay:
        param = param - lr * weight_decay * param
    else:
        grad = grad + weight_decay * param
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    mu_product = state.get("mu_product", 1.0) * mu
    exp_avg = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * grad
    exp_avg_sq = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad**2
    direction = (1 - mu) * grad / (1 - mu_product) + mu_next * exp_avg / (1 - mu_product * mu_next)
    denom = np.sqrt(exp_avg_sq / (1 - beta2**step)) + eps
    after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": np.float64(mu_product)}
    return param - lr * direction / denom, after


def ademamix(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
    alpha_warmup: float,
    beta3_warmup: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Pagliardini et al. 2024, algorithm 1, and the schedules of its section 3."""
    beta1, beta2, beta3 = betas
    if maximize:
        grad = -grad
    if step < alpha_warmup:
        alpha = alpha * step / alpha_warmup
    if step < beta3_warmup and beta1 > 0:
        log1, log3, share = np.log(beta1), np.log(beta3), step / beta3_warmup
        beta3 = min(np.exp(log1 * log3 / ((1 - share) * log3 + share * log1)), beta3)
    elif step < beta3_warmup:  # the limit
        beta3 = beta3 ** (beta3_warmup / step)
    fast = beta1 * state.get("exp_avg_fast", 0.0) + (1 - beta1) * grad
    slow = beta3 * state.get("exp_avg_slow", 0.0) + (1 - beta3) * grad
    square = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad**2
    denom = np.sqrt(square / (1 - beta2**step)) + eps
    direction = (fast / (1 - beta1**step) + alpha * slow) / denom
    after = {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": square}
    return param - lr * (direction + weight_decay * param), after


def adamw_schedule_free(
    param: Array,
    grad: Array,
    state: State,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: float,
    r: float,
    weight_lr_power: float,
    maximize: bool,
    **_: Any,
) -> tuple[Array, State]:
    """Defazio et al. 2024, algorithm 1, by way of x; weights and eps as the authors' code has them."""
    beta1, beta2 = betas
    if maximize:
        grad = -grad
    y, z = param, state.get("z", param)
    x = (y - (1 - beta1) * z) / beta1
    lr = lr * min(1.0, step / warmup_steps) if warmup_steps else lr
    lr_max = np.maximum(state.get("lr_max", 0.0), lr)
    weight = step**r * lr_max**weight_lr_power
    weight_sum = state.get("weight_sum", 0.0) + weight
    share = weight / weight_sum
    square = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad**2
    direction = grad / (np.sqrt(square / (1 - beta2**step)) + eps)
    z = z - lr * direction - lr * weight_decay * y
    x = (1 - share) * x + share * z
    after = {"z": z, "exp_avg_sq": square}
    after |= {"lr_max": np.float64(lr_max), "weight_sum": np.float64(weight_sum)}
    return (1 - beta1) * z + beta1 * x, after


ORACLES: dict[str, Callable[..., tuple[Array, State]]] = {
    "SGD": sgd,
    "Lion": lion,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adam,
    "ASGD": asgd,
    "Adadelta": adadelta,
    "Rprop": rprop,
    "Adamax": adamax,
    "RAdam": radam,
    "NAdam": nadam,
    "AdEMAMix": ademamix,
    "AdamWScheduleFree": adamw_schedule_free,
}
