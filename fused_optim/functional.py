"""The optimizers' steps on lists of tensors, as torch.optim's functional ones, by the CPU's kernels.

``from torch.optim.adamw import adamw`` becomes ``from fused_optim.functional import adamw``: the same
arguments in the same order, and some more. Engines that keep params, grads and states themselves call such
functions. A call may step any part of a model, from any thread, while others step other parts; the bits
are those of one call for the whole.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta as _adadelta
from torch.optim.adagrad import adagrad as _adagrad
from torch.optim.adam import adam as _adam
from torch.optim.adamax import adamax as _adamax
from torch.optim.adamw import adamw as _adamw
from torch.optim.asgd import asgd as _asgd
from torch.optim.nadam import nadam as _nadam
from torch.optim.radam import radam as _radam
from torch.optim.rmsprop import rmsprop as _rmsprop
from torch.optim.rprop import rprop as _rprop
from torch.optim.sgd import sgd as _sgd

from fused_optim import averages, backends, clipping, outputs, plain_lists
from fused_optim.tracing import left_to_the_interpreter, n_dispatch_modes

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adamw_schedule_free",
    "ademamix",
    "asgd",
    "grad_norm",
    "lion",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]

# Beside torch's arguments, keyword arguments of every function.
_MORE = {"grad_scale": None, "found_inf": None, "clip": 1.0, "outputs": None, "num_threads": None}
# Plans that are kept, one for each list of params: engines call once per tensor, bucket or model.
_MAX_PLANS = 1024

_plans: dict[tuple[str, int, int], Any] = {}
_lock = threading.Lock()


class _Function:
    """One rule on lists.

    Args:
        rule: key of _C.rules().
        stock: torch's function.
        states, scalars: those of the rule -> the argument that is the list of them.
        tuples: option of the rule -> the arguments that are its items.
        fixed: options that are no arguments, or not in all releases of torch.
        grads: the argument that is the list of grads.
    """

    def __init__(
        self,
        rule: str,
        stock: Callable[..., None],
        states: Mapping[str, str],
        scalars: Mapping[str, str | None],
        tuples: dict[str, tuple[str, ...]] | None = None,
        fixed: dict[str, Any] | None = None,
        grads: str = "grads",
    ) -> None:
        self.rule, self.stock, self.grads = rule, stock, grads
        self.states, self.scalars = states, scalars
        self.tuples, self.fixed = tuples or {}, fixed or {}
        torchs = inspect.signature(stock).parameters
        mores = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in _MORE.items()
            if name not in torchs
        ]
        self.signature = inspect.Signature([*torchs.values(), *mores])
        self.of_torch = frozenset(torchs)
        parameters = self.signature.parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.n_arguments = len(parameters)
        self.lists = (grads, *states.values(), *filter(None, scalars.values()))

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name. Raise TypeError as Python does for what does not fit the signature."""
        positional = dict(zip(self.names, args))
        given = self.defaults | positional | kwargs
        if (
            len(given) != self.n_arguments
            or len(positional) != len(args)
            or not positional.keys().isdisjoint(kwargs)
        ):
            self.signature.bind(*args, **kwargs)
        return given

    def group(self, given: dict[str, Any]) -> dict[str, Any]:
        """A param group with these options."""
        group = self.fixed | given
        for option, items in self.tuples.items():
            group[option] = tuple([given[item] for item in items])
        return group


class _Caller:
    """What a plan asks an optimizer for, and never changes."""

    state: dict[Tensor, Any] = {}  # noqa: RUF012
    _averages: averages.Averages = {}  # noqa: RUF012
    _outputs: tuple[Tensor | None, ...] | None

    def __init__(self, outputs: tuple[Tensor | None, ...] | None) -> None:
        self._outputs = outputs

    def _create_states(
        self, param: Tensor, group: dict[str, Any], may_be_skipped: bool
    ) -> dict[str, Tensor]:
        """SGD's first momentum, where the list has None."""
        return {"momentum_buffer": torch.empty_like(param, requires_grad=False)}


def _step(function: _Function, given: dict[str, Any]) -> None:
    n = _check_lists(function, given)
    found_inf, grad_scale = given["found_inf"], given["grad_scale"]
    scale = 0.0 if grad_scale is None else float(grad_scale)
    if grad_scale is not None and scale == 0.0:
        raise ValueError("grad_scale is 0, by which no grad can be divided")
    num_threads, clip = _threads(given["num_threads"]), float(given["clip"])
    if n == 0 or (found_inf is not None and float(found_inf) != 0):
        return
    params, written = given["params"], given["outputs"]
    kernels = backends.cpu_kernels()
    if kernels is None or n_dispatch_modes():
        pairs = zip(params, written or ())
        left = [(param, output, None) for param, output in pairs if output is not None]
        _check_left(function, given, left)
        _step_by_torch(function, given, range(n), scale, clip)
        averages.move(left)
        return
    key = function.rule, n, id(params[0])
    with _lock:
        plan = _plans.pop(key, None)
    plan = plan or kernels.Plan(function.rule)
    states = [given[name] for name in function.states.values()]
    # Tuples: another thread may shorten a list meanwhile.
    lists = (
        tuple(given[function.grads]),
        tuple(map(tuple, states)),
        tuple([name and tuple(given[name]) for name in function.scalars.values()]),
        tuple(states),
    )
    given["params"] = tuple(params)
    caller = _Caller(None if written is None else tuple(written))
    plan.gather(caller, [function.group(given)], None, 0, 0, lists)
    left = []
    try:
        fallbacks = plan.fallbacks()
        if written is not None:
            left = plan.averages_left()
            if left or fallbacks is not None:
                _check_left(function, given, left)
        if fallbacks is not None:
            _step_by_torch(function, given, [i for _, i, _ in fallbacks], scale, clip, fallbacks)
        plan.commit(clip, scale, num_threads)
    finally:
        plan.release()
    if left:
        averages.move(left)
    with _lock:
        _plans[key] = plan
        if len(_plans) > _MAX_PLANS:
            del _plans[next(iter(_plans))]


def _check_left(
    function: _Function, given: dict[str, Any], left: list[tuple[Tensor, Any, None]]
) -> None:
    """Raise the error for outputs that torch is to write, and for those that share memory."""
    if given["outputs"] is None:
        return
    numbered = enumerate(given["outputs"])
    written = {f"outputs[{i}]": output for i, output in numbered if output is not None}
    names = {id(output): name for name, output in written.items()}
    for param, output, _ in left:
        outputs.check_copied(names[id(output)], output, param)
    others = [*given["params"]]
    for name in function.states.values():
        others += [state for state in given[name] if isinstance(state, Tensor)]
    outputs.refuse_shared(written, others)


def _check_lists(function: _Function, given: dict[str, Any]) -> int:
    """Return the number of params; raise the error for lists of other lengths."""
    params = given["params"] = _as_list("params", given["params"])
    n = len(params)
    for name in function.lists:
        found = given[name] = _as_list(name, given[name])
        # Empty: of a state that is not used.
        if len(found) != n and (found or name not in function.states.values()):
            raise ValueError(f"{name} has {len(found)} tensors, params {n}")
    steps = function.scalars["step"]
    if steps is not None and n > 1 and len(set(map(id, given[steps]))) != n:
        first: dict[int, int] = {}
        for i, step in enumerate(given[steps]):
            if first.setdefault(id(step), i) != i:
                raise ValueError(f"{steps}[{i}] is {steps}[{first[id(step)]}], of another param")
    if given["outputs"] is not None:
        found = given["outputs"] = _as_list("outputs", given["outputs"])
        if len(found) != n:
            raise ValueError(f"outputs has {len(found)} tensors, params {n}")
        for i, output in enumerate(found):
            if output is not None:
                outputs.check(f"outputs[{i}]", output, params[i])
    return n


def _as_list(name: str, given: Any) -> list[Any]:
    if isinstance(given, list):
        return given
    if not isinstance(given, tuple) or (
        name == "momentum_buffer_list" and type(None) in map(type, given)
    ):
        raise TypeError(f"{name} must be a list of tensors, not {type(given).__name__}")
    return list(given)


def _threads(given: int | None) -> int:
    return backends.num_threads() if given is None else backends.check_num_threads(given)


def _step_by_torch(
    function: _Function,
    given: dict[str, Any],
    which: Sequence[int],
    scale: float,
    clip: float,
    fallbacks: Sequence[tuple[int, int, str]] = (),
) -> None:
    """Step these params by torch's own code.

    Args:
        fallbacks: (0, index, reason) of each, if kernels could have been used.
    """
    if fallbacks and backends.forced() == "cpu":
        _, i, reason = fallbacks[0]
        raise RuntimeError(f"FUSED_OPTIM_BACKEND=cpu, but params[{i}] needs stock: {reason}")
    _check_states(function, given, which)
    with torch.set_grad_enabled(bool(given.get("differentiable")) and torch.is_grad_enabled()):
        _call_torch(function, given, which, scale, clip)


def _check_states(function: _Function, given: dict[str, Any], which: Sequence[int]) -> None:
    """Raise the error for states that torch's code would find to be wrong when it has written others."""
    for name in (*function.states.values(), *filter(None, function.scalars.values())):
        of_param = name in function.states.values()
        for i in which if given[name] else ():
            state, param = given[name][i], given["params"][i]
            if state is None and name == "momentum_buffer_list":
                continue
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}[{i}] is not a tensor")
            if state.shape != param.shape if of_param else state.numel() != 1:
                raise RuntimeError(f"{name}[{i}] has shape {tuple(state.shape)}")
            if of_param and state.device != param.device:
                raise RuntimeError(f"{name}[{i}] is on another device than its param")


def _call_torch(
    function: _Function, given: dict[str, Any], which: Sequence[int], scale: float, clip: float
) -> None:
    params = [given["params"][i] for i in which]
    some = {name: value for name, value in given.items() if name in function.of_torch}
    some["params"] = params
    some[function.grads] = [
        _grad(given[function.grads][i], param, scale, clip) for i, param in zip(which, params)
    ]
    names = [*function.states.values(), *filter(None, function.scalars.values())]
    for name in names:
        some[name] = [given[name][i] for i in which] if given[name] else []
    for name in ("grad_scale", "found_inf"):
        if name in some:
            some[name] = None
    function.stock(**some)
    for name in names:
        for i, value in zip(which, some[name]):
            given[name][i] = value


def _grad(grad: Tensor, param: Tensor, scale: float, clip: float) -> Tensor:
    """In the param's dtype, which torch's code asks for; unscaled and clipped."""
    if grad.is_floating_point() and param.is_floating_point():
        grad = grad.to(param.dtype)
    if scale != 0:
        grad = grad / scale
    return grad if clip == 1 else grad * clip


def grad_norm(grads: Sequence[Tensor | None], *, num_threads: int | None = None) -> Tensor:
    """Take the 2-norm of all elements of all grads together, without copies of them.

    The squares are added in float64, in an order that does not depend on threads or instruction set.

    Args:
        grads: tensors of any shapes, of floating-point or complex dtypes, on any devices; the host waits for
            those that are not on the CPU. None stands for no grad.
        num_threads: default: :func:`fused_optim.set_num_threads`'s.

    Returns:
        A float64 tensor without dimensions, on the CPU.

    Raises:
        TypeError: `grads` is no list or tuple, or has something that is no grad.
        RuntimeError: a grad is larger than its storage.
        ValueError: num_threads is less than 1.
    """
    given = []
    for i, grad in enumerate(_as_list("grads", grads)):
        if grad is None:
            continue
        if not isinstance(grad, Tensor) or not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(f"grads[{i}] is no tensor of a floating-point or complex dtype")
        given.append(grad)
    threads = _threads(num_threads)
    squares, others, kernels = 0.0, given, backends.cpu_kernels()
    if kernels is not None and not n_dispatch_modes():
        squares, others = kernels.sum_of_squares(given, threads)
    more, _ = clipping.sum_of_squares(others)
    return torch.tensor(math.sqrt(squares + more), dtype=torch.float64, device="cpu")


_DOC = """{name}: one step of lists of tensors, in place.

    The arguments of ``{stock}``, and:

    Args:
        params, {grads}, the states' lists: as many tensors each, i-th of all belonging together. States have
            their param's shape; an optional one's list is empty where it is not used. Grads may have fewer
            bits than their param, bfloat16 beside float32 say, and are only read.
        grad_scale: a number or a tensor with one; the grads are divided by it.
        found_inf: the same; if it is not 0, the call does nothing.
        clip: a number or a tensor with one; the grads are multiplied by it, once unscaled.
        outputs: None, or for each param None or a tensor of its shape and a floating-point dtype, which gets
            the param's new values, rounded to nearest, in the same pass.
        num_threads: default: :func:`fused_optim.set_num_threads`'s.

    Raises:
        TypeError: an argument that does not fit the signature; something else than a tensor in a list.
        ValueError: lists of different lengths; an output of another shape or kind of dtype, or with addresses
            between those of another tensor; a grad_scale of 0; num_threads less than 1; one step tensor for
            two params.
        RuntimeError: a grad or state of another shape than its param, on another device, or without memory.

    Nothing has been written when one of these is raised; with another error of torch's, some tensors may have
    been stepped. torch's function steps what no kernel of the CPU serves: tensors on other devices, sparse,
    complex, with ``capturable`` or ``differentiable``.
    """


def _of(name: str, function: _Function) -> Callable[..., None]:
    """The public function."""

    def stepping(*args: Any, **kwargs: Any) -> None:
        _step(function, function.arguments(args, kwargs))

    module = function.stock.__module__
    stock = f"{module if module.startswith('torch.') else __name__}.{name}"
    stepping.__name__ = stepping.__qualname__ = name
    stepping.__module__ = __name__
    stepping.__signature__ = function.signature  # type: ignore[attr-defined]
    stepping.__doc__ = _DOC.format(name=name, grads=function.grads, stock=stock)
    return left_to_the_interpreter(stepping)


_STEP = {"step": "state_steps"}
_MOMENTS = {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}
_ADAM = {**_MOMENTS, "max_exp_avg_sq": "max_exp_avg_sqs"}
_BETAS = {"betas": ("beta1", "beta2")}

adam = _of(
    "adam", _Function("adam", _adam, _ADAM, _STEP, _BETAS, {"decoupled_weight_decay": False})
)
adamw = _of(
    "adamw", _Function("adam", _adamw, _ADAM, _STEP, _BETAS, {"decoupled_weight_decay": True})
)
nadam = _of(
    "nadam",
    _Function("nadam", _nadam, _MOMENTS, {**_STEP, "mu_product": "mu_products"}, _BETAS),
)
radam = _of("radam", _Function("radam", _radam, _MOMENTS, _STEP, _BETAS))
adamax = _of(
    "adamax",
    _Function("adamax", _adamax, {"exp_avg": "exp_avgs", "exp_inf": "exp_infs"}, _STEP, _BETAS),
)
sgd = _of(
    "sgd",
    _Function(
        "sgd",
        _sgd,
        {"momentum_buffer": "momentum_buffer_list"},
        {"step": None, "momentum_step": None},
        grads="d_p_list",
    ),
)
asgd = _of("asgd", _Function("asgd", _asgd, {"ax": "axs"}, {**_STEP, "eta": "etas", "mu": "mus"}))
rmsprop = _of(
    "rmsprop",
    _Function(
        "rmsprop",
        _rmsprop,
        {
            "square_avg": "square_avgs",
            "momentum_buffer": "momentum_buffer_list",
            "grad_avg": "grad_avgs",
        },
        _STEP,
    ),
)
rprop = _of(
    "rprop",
    _Function(
        "rprop",
        _rprop,
        {"prev": "prevs", "step_size": "step_sizes"},
        _STEP,
        {"etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")},
        {"lr": 0.0},  # only of the first step sizes
    ),
)
adagrad = _of("adagrad", _Function("adagrad", _adagrad, {"sum": "state_sums"}, _STEP))
adadelta = _of(
    "adadelta",
    _Function(
        "adadelta",
        _adadelta,
        {"square_avg": "square_avgs", "acc_delta": "acc_deltas"},
        _STEP,
    ),
)
lion = _of(
    "lion", _Function("lion", plain_lists.lion, {"exp_avg": "exp_avgs"}, {"step": None}, _BETAS)
)
ademamix = _of(
    "ademamix",
    _Function(
        "ademamix",
        plain_lists.ademamix,
        {
            "exp_avg_fast": "exp_avg_fasts",
            "exp_avg_slow": "exp_avg_slows",
            "exp_avg_sq": "exp_avg_sqs",
        },
        _STEP,
        {"betas": ("beta1", "beta2", "beta3")},
    ),
)
adamw_schedule_free = _of(
    "adamw_schedule_free",
    _Function(
        "adamw_schedule_free",
        plain_lists.adamw_schedule_free,
        {"z": "zs", "exp_avg_sq": "exp_avg_sqs"},
        {**_STEP, "lr_max": "lr_maxs", "weight_sum": "weight_sums"},
        _BETAS,
    ),
)
