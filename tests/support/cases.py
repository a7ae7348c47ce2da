"""The table every test loops over: one row per optimizer with its variants; shapes and dtypes.

A `Case` builds the same optimizer twice, from torch.optim and from fused_optim. A `Shape` says how
a parameter and its grads lie in memory. Both name the backend that is expected to serve them.

The environment chooses what the tests run on; values are always drawn on the CPU, the same for all:

    (nothing)                                        CPU tensors, C++ kernels
    FUSED_OPTIM_TEST_DEVICE=cuda                     GPU tensors, Triton kernels
    FUSED_OPTIM_BACKEND=triton TRITON_INTERPRET=1    CPU tensors, the Triton kernels interpreted
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("FUSED_OPTIM_TEST_DEVICE") or "cpu")
# The backend that serves a tensor of the tests, unless a case or shape names another.
BACKEND = os.environ.get("FUSED_OPTIM_BACKEND") or ("cpu" if DEVICE.type == "cpu" else "triton")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def stock_class(name: str) -> type[torch.optim.Optimizer]:
    """torch.optim's class, or the package's own of an optimizer that torch.optim lacks."""
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)
    from fused_optim import plain

    return getattr(plain, name)


class Adagrad(torch.optim.Adagrad):
    """torch.optim's before torch 2.13, which makes states in its constructor alone, with later ones."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> tuple[bool, bool]:
        initial = self.defaults["initial_accumulator_value"]
        for param in group["params"]:
            if param.grad is not None and not self.state[param]:
                made = torch.optim.Adagrad([param], initial_accumulator_value=initial)
                self.state[param].update(made.state[param])
        return super()._init_group(group, *lists)


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options, buildable from torch.optim and from fused_optim.

    `tensor_options` names the options that are handed over as 0-dim tensors instead of numbers.
    """

    optimizer: str
    options: tuple[tuple[str, Any], ...] = ()
    tensor_options: tuple[str, ...] = ()
    backend: str = BACKEND

    @property
    def id(self) -> str:
        parts = [f"{key}={value}".replace(" ", "") for key, value in self.options]
        parts += [f"tensor_{key}" for key in self.tensor_options]
        return "-".join([self.optimizer, *parts])

    @property
    def tensor_dtype(self) -> torch.dtype:
        """Coarsest dtype among the hyperparameters: numbers are float64, an lr tensor float32."""
        return torch.float32 if "lr" in self.tensor_options else torch.float64

    def stock(self, params: Iterable, **extra: Any) -> torch.optim.Optimizer:
        """The torch.optim class, on its for-loop path: the reference behaviour."""
        optimizer_class = stock_class(self.optimizer)
        if optimizer_class is torch.optim.Adagrad and torch.__version__ < (2, 13):
            optimizer_class = Adagrad
        optimizer = optimizer_class(params, **{**self._arguments(), "foreach": False, **extra})
        for group in optimizer.param_groups:
            # fused=False cannot be passed to every class, but foreach=False already implies it.
            assert not group["foreach"] and not group.get("fused")
        return optimizer

    def fused(self, params: Iterable, **extra: Any) -> torch.optim.Optimizer:
        """The class of the same name from the package under test."""
        import fused_optim

        return getattr(fused_optim, self.optimizer)(params, **{**self._arguments(), **extra})

    def hypers(self) -> dict[str, Any]:
        """Every hyperparameter as plain numbers, defaults included, as torch.optim stores them."""
        group = self.stock([torch.zeros(1)]).param_groups[0]
        plain = {key: _plain(value) for key, value in group.items() if key != "params"}
        if "initial_accumulator_value" in dict(self.options):
            plain["initial_accumulator_value"] = dict(self.options)["initial_accumulator_value"]
        return plain

    def _arguments(self) -> dict[str, Any]:
        arguments = dict(self.options)
        for key in self.tensor_options:
            arguments[key] = _TENSOR_OPTIONS[key]()
        return arguments


# An lr tensor is float32, as torch.tensor(lr) makes it; 2^-9 needs no rounding.
# Betas are exact in every storage type, because stock casts a beta1 tensor to the param's dtype.
_TENSOR_OPTIONS: dict[str, Callable[[], Any]] = {
    "lr": lambda: torch.tensor(2.0**-9),
    "betas": lambda: tuple(torch.tensor(b, dtype=torch.float64) for b in (0.875, 0.96875)),
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, Tensor) else value


_ADAM_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"betas": (0.3, 0.9)},
    {"betas": (0.0, 0.999)},
    {"betas": (0.9, 0.3), "amsgrad": True},
    {"eps": 0.0},
    {"eps": 1e-3, "weight_decay": 0.01},
    {"tensor": ("lr",), "weight_decay": 0.1},
    {"tensor": ("lr", "betas")},
)

# Optimizer -> the options of each variant; "tensor" names options passed as 0-dim tensors.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "Adam": (
        *_ADAM_VARIANTS,
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    "AdamW": (*_ADAM_VARIANTS, {"weight_decay": 0.0}),
    "SGD": (
        {},
        {"lr": 0.1, "weight_decay": 0.1},
        {"maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"tensor": ("lr",), "momentum": 0.5},
    ),
    "Lion": (
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 1.0, "maximize": True},
        # Without weight decay: 2^-9 is half a unit of bfloat16 in [0.5, 1). There every update is a tie,
        # which a decay breaks for us alone, as stock has rounded it away before.
        {"tensor": ("lr",), "betas": (0.75, 0.9)},
    ),
    "AdEMAMix": (
        {},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {
            "betas": (0.3, 0.9, 0.99),
            "alpha": 2.0,
            "alpha_warmup": 3,
            "beta3_warmup": 2,
            "eps": 1e-3,
        },
        {"betas": (0.0, 0.9, 0.7), "beta3_warmup": 3, "weight_decay": 0.1},
        {"tensor": ("lr",), "weight_decay": 0.1},
    ),
    "AdamWScheduleFree": (
        {},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.3, 0.9), "warmup_steps": 2, "r": 0.5, "weight_lr_power": 1.0, "eps": 1e-3},
        {"tensor": ("lr",), "weight_decay": 0.1, "r": 2.0},
    ),
    "RMSprop": (
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"alpha": 0.5, "eps": 1e-3},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "alpha": 0.7},
        {"momentum": 0.9, "centered": True},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True},
        {"tensor": ("lr",), "momentum": 0.5},
    ),
    "NAdam": (
        {},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.3, 0.9), "eps": 1e-3, "momentum_decay": 0.3},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "momentum_decay": 0.1, "eps": 1e-6},
        {"tensor": ("lr",), "weight_decay": 0.1},
    ),
    "RAdam": (
        {},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.3, 0.95), "eps": 1e-3},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-6},
        {"tensor": ("lr",), "weight_decay": 0.1},
    ),
    "Adamax": (
        {},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.3, 0.5), "eps": 1e-2},
        {"tensor": ("lr",), "weight_decay": 0.1, "betas": (0.9, 0.7)},
    ),
    "ASGD": (
        {},
        {"lambd": 0.01, "alpha": 0.5, "t0": 0.0, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "t0": 1.5, "lambd": 0.1},
        {"tensor": ("lr",), "t0": 0.0},
    ),
    "Rprop": (
        {},
        {"maximize": True, "etas": (0.3, 1.5)},
        {"step_sizes": (0.004, 0.012), "lr": 0.005},
        {"tensor": ("lr",), "etas": (0.75, 1.25)},
    ),
    "Adadelta": (
        {},
        {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "rho": 0.0},
        {"tensor": ("lr",), "rho": 0.7},
    ),
    "Adagrad": (
        {},
        {"lr": 0.1, "lr_decay": 0.1},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"initial_accumulator_value": 0.5},
        {"eps": 1e-3},
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
        {"tensor": ("lr",), "lr_decay": 0.01},
    ),
}

OF_TORCH = sorted(name for name in VARIANTS if hasattr(torch.optim, name))
CAPTURABLE = [
    name for name in VARIANTS if "capturable" in inspect.signature(stock_class(name)).parameters
]

CASES = [
    Case(
        optimizer,
        tuple((key, value) for key, value in variant.items() if key != "tensor"),
        variant.get("tensor", ()),
    )
    for optimizer, variants in VARIANTS.items()
    for variant in variants
]
CASE_IDS = [case.id for case in CASES]


def fullest(optimizer: str) -> Case:
    """The case with the most options."""
    cases = [case for case in CASES if case.optimizer == optimizer]
    return max(cases, key=lambda case: len(case.options))


# Each optimizer with its defaults, and with the most options.
PLAIN = [next(case for case in CASES if case.optimizer == name) for name in VARIANTS]
ONE_EACH = [fullest(name) for name in VARIANTS]
# What the code around the rules can tell apart: states of zeros, those that options bring, none, buffers that
# the first step fills, values from a constructor and from options, numbers, copies of the param; and options
# that are tensors. The rules that are not there have states like one of these.
FEW_CASES = [
    *(case for case in PLAIN if case.optimizer in ("Adam", "SGD")),
    *map(fullest, ("AdamW", "SGD", "RMSprop", "Adagrad", "ASGD", "Rprop", "AdamWScheduleFree")),
    next(case for case in CASES if case.tensor_options == ("lr", "betas")),
]


def _kinds() -> list[Case]:
    """ONE_EACH, and one for each set of states and of options that are tensors."""
    chosen = {}
    for case in CASES:
        options = {key: value for key, value in case.options if value}
        deciding = options.keys() & {"amsgrad", "centered", "momentum", "nesterov"}
        chosen.setdefault((case.optimizer, frozenset(deciding), case.tensor_options), case)
    return list(dict.fromkeys((*ONE_EACH, *chosen.values())))


def n_steps_of_all(case: Case) -> int:
    """Steps that take all branches of a rule: the first, the later ones, those that states decide."""
    return {"RAdam": 6, "ASGD": 3, "AdEMAMix": 3}.get(case.optimizer, 2)


# Where numbers like lr and eps make no difference.
STATE_CASES = _kinds()


def _contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def _transposed(values: Tensor) -> Tensor:
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _sliced(values: Tensor) -> Tensor:
    """The first columns of a wider matrix: dense in no order."""
    wide = values.new_full((values.shape[0], values.shape[1] + 5), 7.0)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def _strided(values: Tensor) -> Tensor:
    """Every third element of a longer vector."""
    return torch.stack([values] * 3, dim=1)[:, 1]


def _shifted(values: Tensor) -> Tensor:
    """A slice of a flat buffer that starts one element after its (aligned) beginning."""
    flat = values.new_zeros(values.numel() + 1)
    flat[1:] = values.flatten()
    return flat[1:].view(values.shape)


def _expanded(values: Tensor) -> Tensor:
    """The first row repeated with stride 0."""
    return values[:1].expand_as(values)


def _overlapping(values: Tensor) -> Tensor:
    """Rows that share all but one element, which torch writes without complaint."""
    rows, columns = values.shape
    return values.flatten()[: rows + columns - 1].clone().as_strided((rows, columns), (1, 1))


def _complex(values: Tensor) -> Tensor:
    return torch.complex(values, values.flip(0))


def _sparse(values: Tensor) -> Tensor:
    kept = torch.arange(len(values), device=values.device) % 3 == 0
    return (values * kept[:, None]).to_sparse(1)


@dataclass(frozen=True)
class Shape:
    """How one parameter and its grads lie in memory, and the backend that should serve them."""

    id: str
    size: tuple[int, ...]
    lay_param: Callable[[Tensor], Tensor] = _contiguous
    lay_grad: Callable[[Tensor], Tensor] = _contiguous
    backend: str = BACKEND

    def param(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Parameter values: normal, of the size of trained weights and of 1."""
        values = torch.randn(self.size, dtype=torch.float64, generator=generator)
        return self.lay_param((values * 0.5).to(dtype).to(DEVICE))

    def grad(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Grad values: either sign, magnitudes spread evenly over powers of 2, never 0.

        float16 gets 2^-1 to 2^3, the others 2^-5 to 2^3. The least squared grad times 1 - beta2,
        even after a weight decay of 0.1 has been taken off, is then a normal number, of which one
        rounding is a relative error; in the other types some decayed grads nearly cancel.
        """
        lowest = -1 if dtype == torch.float16 else -5
        exponent = torch.rand(self.size, dtype=torch.float64, generator=generator)
        exponent = lowest + (3 - lowest) * exponent
        sign = torch.randint(0, 2, self.size, generator=generator) * 2 - 1
        return self.lay_grad((sign * torch.exp2(exponent)).to(dtype).to(DEVICE))


SHAPES = [
    Shape("scalar", ()),
    Shape("empty", (0,)),
    *(Shape(f"{n}", (n,)) for n in (1, 15, 16, 17, 31, 33, 1009)),
    *(Shape(f"{n}", (n,)) for n in (16383, 16384, 16385, 65537)),
    Shape("matrix", (37, 29)),
    Shape("transposed", (37, 29), _transposed, _transposed),
    Shape("channels_last", (4, 3, 7, 5), _channels_last, _channels_last),
    Shape("sliced", (41, 3), _sliced, _contiguous),
    Shape("strided", (101,), _strided, _strided),
    Shape("shifted", (1009,), _shifted, _shifted),
    Shape("grad_transposed", (37, 29), _contiguous, _transposed),
    Shape("grad_contiguous", (37, 29), _transposed, _contiguous),
    Shape("grad_channels_last", (4, 3, 7, 5), _contiguous, _channels_last),
    Shape("grad_not_channels_last", (4, 3, 7, 5), _channels_last, _contiguous),
    Shape("grad_sliced", (41, 3), _contiguous, _sliced),
    Shape("grad_expanded", (37, 29), _contiguous, _expanded),
    Shape("large_grad_transposed", (131, 257), _contiguous, _transposed),
]

# What no kernel serves: torch.optim's own code must run, for these tensors alone.
STOCK_SHAPES = [
    Shape("overlapping", (5, 4), _overlapping, _contiguous, "stock"),
    Shape("complex", (6, 3), _complex, _complex, "stock"),
    Shape("grad_sparse", (9, 4), _contiguous, _sparse, "stock"),
]


@functools.cache
def expected_backends(shapes: tuple[Shape, ...], case: Case) -> dict[str, int]:
    """`last_step.tensors` after a step over one parameter of each shape."""
    counts: dict[str, int] = {}
    for shape in shapes:
        backend = case.backend if shape.backend == BACKEND else shape.backend
        counts[backend] = counts.get(backend, 0) + 1
    return counts
