"""python -m fused_optim doctor: whether the package works on this machine, and what would help.

Each optimizer steps small params on each device, beside the stock class in float64 on the same numbers: its
own roundings vanish beside ours. Nothing cancels, as grads have the sign that lets params grow, and weight
decay takes a sixth off a grad at most. So each rounding adds a relative half eps, and a bound counts them.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

import fused_optim
from fused_optim import FusedOptimizer, backends
from fused_optim.bench import choice
from fused_optim.optimizers import OPTIMIZERS

N_STEPS = 3
DTYPES = (torch.float32, torch.bfloat16)
# The last one is large enough for several threads, and does not end with a chunk.
SHAPES = ((), (37, 29), (70_001,))
# Powers of 2, which no dtype rounds. Params of 0.5 to 1 grow to at most 5 (RMSprop moves by 10 * lr).
LR, WEIGHT_DECAY = 2.0**-3, 2.0**-6
ADADELTA_LR = 2.0**5  # of an update of about 2^-8
# Roundings a step, of the rule that makes most (tests/support/bounds.py has them one by one). In float32,
# Adam with weight decay: 4 of exp_avg, half of 4 of exp_avg_sq, at most 15 of the update and 3 of the
# param. In the params' dtype: 1 of the param, 1 and a half of the states, and less than half that weight
# decay brings back.
COMPUTED, STORED = 24, 3
SERVED = ("cpu", "cuda")  # by kernels; ROCm answers to cuda
OLDEST_TRITON = "3.6"  # as in pyproject.toml
OPENMP = r"lib(?:gomp|omp|iomp5)\b"

NO_KERNEL, DIFFERS, RAISED = (
    "not stepped by a kernel",
    "not torch.optim's result",
    "raised an error",
)
COLUMNS = "{:<8} {:<10} {:<11} {:>8} {:>9}  {}"


@dataclass
class Row:
    """What became of one optimizer on one device.

    differences: the largest relative one of each dtype.
    verdict: None, NO_KERNEL, DIFFERS or RAISED; `problem` says more.
    """

    device: str
    optimizer: str
    by: str = "-"
    differences: dict[torch.dtype, float] = field(default_factory=dict)
    verdict: str | None = None
    problem: str = ""

    def __str__(self) -> str:
        numbers = [f"{self.differences[d]:.1e}" if d in self.differences else "-" for d in DTYPES]
        outcome = f"{self.verdict}: {self.problem}" if self.verdict else "ok"
        return COLUMNS.format(self.device, self.optimizer, self.by, *numbers, outcome)


def run() -> bool:
    """Print what works and what would help; whether all is well."""
    try:
        found = fused_optim.config()
    # A variable has a bad value: the error names it, and what is accepted.
    except (ValueError, RuntimeError) as error:
        print(f"Not well: {error}")
        return False
    print(
        f"fused_optim {found['version']}, torch {found['torch']}, Triton {found['triton']}, "
        f"{found['isa'] or 'no kernels'}, {found['threads']} threads\n\n"
        f"Largest relative difference from torch.optim after {N_STEPS} steps; roundings explain "
        f"{' and '.join(f'{bound(dtype):.1e} in {_name(dtype)}' for dtype in DTYPES)}:\n"
    )
    print(COLUMNS.format("device", "optimizer", "stepped by", *map(_name, DTYPES), "").rstrip())
    rows = []
    for device in (device for device in found["devices"] if device.startswith(SERVED)):
        for cls in OPTIMIZERS.values():
            rows.append(examine(cls, device))
            print(rows[-1], flush=True)
    maps = Path("/proc/self/maps")
    hints = (
        no_kernels(found),
        no_triton(found, rows),
        forced_backend(found),
        slower_isa(found),
        several_openmp(maps.read_text() if maps.exists() else "", found["openmp"]),
        unserved_device(found),
    )
    print()
    if any(hints):
        print("What would help:", *filter(None, hints), sep="\n- ", end="\n\n")
    verdicts = [row.verdict for row in rows if row.verdict]
    if verdicts:
        counts = [f"{verdicts.count(v)} of {len(rows)} {v}" for v in dict.fromkeys(verdicts)]
        print(f"Not well: {', '.join(counts)}.")
        return False
    print(f"All is well on {', '.join(dict.fromkeys(row.device for row in rows))}.")
    return True


def examine(cls: type[FusedOptimizer], device: str) -> Row:
    """Step it in each dtype, plain and as it is mostly used, until something is wrong."""
    row = Row(device, cls.__name__)
    decay = {"weight_decay": WEIGHT_DECAY} if "weight_decay" in signature(cls).parameters else {}
    usual = {**decay, **choice.OPTIONS.get(cls.__name__, {})}
    for dtype in DTYPES:
        for options in ({}, usual):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the row says the same
                    _compare(cls, options, dtype, row)
            # Whatever it raises is the finding.
            except Exception as error:
                first_line = str(error).strip().partition("\n")[0]
                row.verdict, row.problem = RAISED, f"{type(error).__name__}: {first_line}"
            if row.verdict:
                where = [_name(dtype), *(f"{key}={value}" for key, value in options.items())]
                row.problem += f" ({', '.join(where)})"
                return row
    return row


def lr_of(cls: type[FusedOptimizer]) -> float:
    return ADADELTA_LR if cls._stock is torch.optim.Adadelta else LR


def bound(dtype: torch.dtype) -> float:
    """The largest relative difference, of a param or state, that roundings explain."""
    computed, stored = (torch.finfo(d).eps / 2 for d in (torch.float32, dtype))
    return N_STEPS * (COMPUTED * computed + STORED * stored)


def _compare(cls: Any, options: dict[str, Any], dtype: torch.dtype, row: Row) -> None:
    """Put into the row who stepped, how far from stock, and what is wrong with that."""
    ours = _stepped(lambda params: cls(params, lr=lr_of(cls), **options), dtype, row.device, dtype)
    row.by = ", ".join(ours.last_step.tensors)
    if ours.last_step.fallbacks:
        row.verdict, row.problem = NO_KERNEL, ours.last_step.fallbacks[0].reason
        return
    # foreach=False implies fused=False, which not every class takes.
    options = {**options, "lr": lr_of(cls), "foreach": False}
    stock = _stepped(lambda params: cls._stock(params, **options), dtype, "cpu", torch.float64)
    errors = [
        ((values[key].detach().cpu().double() - true) / true).abs().flatten()
        for values, trues in zip(_values(ours), _values(stock), strict=True)
        for key, true in trues.items()
    ]
    worst = torch.cat(errors).max().item()
    row.differences[dtype] = max(worst, row.differences.get(dtype, 0.0))
    if not worst <= bound(dtype):  # a NaN is not
        row.verdict, row.problem = DIFFERS, f"{worst:.1e}, roundings explain {bound(dtype):.1e}"


def _stepped(
    make: Callable[[Sequence[nn.Parameter]], Any],
    dtype: torch.dtype,
    device: str,
    kept_in: torch.dtype,
) -> Any:
    """An optimizer after N_STEPS steps with numbers of `dtype`, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randn(shape, generator=generator) for shape in SHAPES]

    def drawn(sign: Tensor) -> Tensor:
        size = torch.empty_like(sign).uniform_(0.5, 1, generator=generator)
        return size.copysign(sign).to(dtype).to(device, kept_in)

    params = [nn.Parameter(drawn(sign)) for sign in signs]
    optimizer = make(params)
    for _ in range(N_STEPS):
        for param, sign in zip(params, signs):
            param.grad = drawn(-sign)
        optimizer.step()
    return optimizer


def _values(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Each param with its states."""
    params = optimizer.param_groups[0]["params"]
    return [{"param": param.detach(), **optimizer.state[param]} for param in params]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What would help, if it concerns this machine; `found` is fused_optim.config().


def no_kernels(found: dict[str, Any]) -> str | None:
    if found["cpu_kernels"]:
        return None
    folder = Path(fused_optim.__file__).parent.parent
    if (folder / "csrc").is_dir():
        return (
            f"Python imports the sources in {folder}, which have no kernels. If the package is installed, "
            "start Python elsewhere: cd /; if not, build them in place: "
            f"cd {folder} && python setup.py -q build_ext --inplace"
        )
    return (
        f"There are no kernels, which GPUs need too: {found['why_no_cpu_kernels']}. Mostly the installation "
        "found no C++17 compiler (apt-get install g++); in the folder of the sources, this says why: "
        "pip install -v --force-reinstall --no-deps ."
    )


def no_triton(found: dict[str, Any], rows: Sequence[Row]) -> str | None:
    if not any(device.startswith("cuda") for device in found["devices"]):
        return None
    version = found["triton"]
    if version is None or TorchVersion(version) < OLDEST_TRITON:
        what = "Triton is missing" if version is None else f"Triton {version} is too old"
        return f"{what}, so no kernel serves the GPU: pip install -U 'triton>={OLDEST_TRITON}'"
    loaded = backends._load_triton()
    if isinstance(loaded, str):
        return f"Triton cannot be imported: {loaded}: pip install -U --force-reinstall triton"
    if any("Triton failed" in row.problem for row in rows):
        return (
            "Triton cannot compile here. It needs a C compiler whenever it does (apt-get install gcc); the "
            "whole error: FUSED_OPTIM_DEBUG=1 python -m fused_optim doctor"
        )
    return None


def forced_backend(found: dict[str, Any]) -> str | None:
    backend = os.environ.get("FUSED_OPTIM_BACKEND")
    if not backend or (backend == "cpu" and found["devices"] == ["cpu"]):
        return None
    return f"FUSED_OPTIM_BACKEND={backend} keeps other kernels out: unset FUSED_OPTIM_BACKEND"


def slower_isa(found: dict[str, Any]) -> str | None:
    isa, available = found["isa"], found["isas_available"]
    if isa in available[:1] or not available:
        return None
    return f"FUSED_OPTIM_ISA={isa} is slower than {available[0]}: unset FUSED_OPTIM_ISA"


def several_openmp(maps: str, used: str | None) -> str | None:
    """Given /proc/self/maps, and the runtime that the kernels use."""
    files = sorted(set(re.findall(rf"/.*/{OPENMP}[^/\n]*$", maps, re.MULTILINE)))
    # One that is preloaded serves all, whatever else is loaded.
    if len(files) < 2 or re.search(OPENMP, os.environ.get("LD_PRELOAD", "")):
        return None
    folder = os.path.realpath(Path(torch.__file__).parent)
    of_torch = [file for file in files if file.startswith((f"{folder}/", f"{folder}.libs/"))]
    used = os.path.realpath(used or "")
    hint = f"Threads of several OpenMP runtimes disturb each other: {', '.join(files)}. Kernels use {used}"
    if not of_torch or used in of_torch:
        return hint
    return f"{hint}; to have them use torch's: export LD_PRELOAD={of_torch[0]}"


def unserved_device(found: dict[str, Any]) -> str | None:
    devices = [device for device in found["devices"] if not device.startswith(SERVED)]
    return f"No kernel serves {', '.join(devices)}: torch.optim's code does" if devices else None
