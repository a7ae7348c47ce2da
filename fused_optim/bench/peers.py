"""Optimizers of other libraries, and which contestants a run has."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fused_optim
from fused_optim.bench.workloads import Workload
from fused_optim.optimizers import REPLACED

# Of torch.optim's classes: variant -> its arguments.
STOCK_FLAGS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
# torch.compile takes time for every tensor; with a list twice as long as GPT-2's, minutes.
MOST_COMPILED_TENSORS = 300

Factory = Callable[[Workload, Sequence[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    module: to be imported.
    package: what is to be installed.
    factories: our class name -> constructor call that means the same mathematics.
    compiles: whether it compiles itself for a list of tensors, which takes a minute for hundreds;
        so it does that for no phase and, unless it is asked for by name, only for plain float32 rows.
    formats: those whose states and params it keeps in about as many bits; its rows have no others.
        Empty: it keeps whole states.
    devices: types on which it does what its row says.
    """

    name: str
    module: str
    package: str
    factories: dict[str, Factory]
    compiles: bool = False
    formats: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_not(
        self, workload: Workload, *, quick: bool, device_type: str, by_name: bool = False
    ) -> str | None:
        """Why it cannot run this workload; None if it may.

        Args:
            by_name: whether the user has asked for it.
        """
        plain = workload.timed == "step" and workload.dtype == torch.float32
        too_long = workload.n_tensors > MOST_COMPILED_TENSORS or workload.phase or workload.offload
        others = workload.format not in self.formats and (workload.formats or self.formats)
        reasons = {
            f"not for {device_type.upper()} tensors": device_type not in self.devices,
            "workload too large": workload.is_huge and not by_name,
            "keeps other states": others,
            "compiles for too long": self.compiles
            and (too_long or (not by_name and (quick or not plain))),
            "not installed": importlib.util.find_spec(self.module.partition(".")[0]) is None,
            f"has no {workload.optimizer}": workload.optimizer not in self.factories,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def build(self, workload: Workload, params: Sequence[nn.Parameter]) -> Optimizer:
        return self.factories[workload.optimizer](workload, params)


_ADAM = ("lr", "betas", "eps", "weight_decay")
_LION = ("lr", "betas", "weight_decay")
_SGD = ("lr", "momentum")


def _of(module: str, name: str, hypers: Sequence[str] = _ADAM, **fixed: Any) -> Factory:
    """A library's class with our hypers, by the names that torch.optim and most others have for them."""

    def build(workload: Workload, params: Sequence[nn.Parameter]) -> Optimizer:
        ours = getattr(fused_optim, workload.optimizer)([torch.zeros(1)], **workload.options)
        given = {name: ours.defaults[name] for name in hypers}
        return getattr(importlib.import_module(module), name)(params, **given, **fixed)

    return build


def _schedule_free(workload: Workload, params: Sequence[nn.Parameter]) -> Optimizer:
    hypers = (*_ADAM, "warmup_steps", "r", "weight_lr_power")
    optimizer: Any = _of("schedulefree", "AdamWScheduleFree", hypers)(workload, params)
    optimizer.train()
    return optimizer


def _compiled(workload: Workload, params: Sequence[nn.Parameter]) -> Optimizer:
    optimizer = getattr(torch.optim, workload.optimizer)(params, foreach=True, **workload.options)
    torch.compiler.reset()  # after eight lists of tensors torch would give up
    optimizer.step = torch.compile(optimizer.step)
    # Compiled in the first step and, now that there is state, in the second.
    for _ in range(2):
        optimizer.step()
    return optimizer


# States in the params' dtype, as ours and stock's are; DeepSpeed's default is float32.
_deepspeed = partial(_of, "deepspeed.ops.adam", "DeepSpeedCPUAdam", fp32_optimizer_states=False)
# Kahan summation, optimi's default for 16-bit params, would add a stream that no other one has.
_optimi = partial(_of, "optimi", kahan_sum=False)
_torchao, _bitsandbytes = partial(_of, "torchao.optim"), partial(_of, "bitsandbytes.optim")
_flash = partial(_of, "flashoptim")  # 8-bit states, and 8 more bits for bfloat16 params
PEERS = (
    Peer(
        "DeepSpeedCPUAdam", "deepspeed.ops.adam", "deepspeed",
        {"Adam": _deepspeed(adamw_mode=False), "AdamW": _deepspeed(adamw_mode=True)},
        devices=("cpu",),
    ),
    Peer(
        "optimi", "optimi", "torch-optimi",
        {"Adam": _optimi("Adam"), "AdamW": _optimi("AdamW"), "Lion": _optimi("Lion", _LION),
         "SGD": _optimi("SGD", _SGD)},
    ),
    Peer("schedulefree", "schedulefree", "schedulefree", {"AdamWScheduleFree": _schedule_free}),
    Peer(
        "torch.compile", "torch", "torch", {stock.__name__: _compiled for stock in REPLACED},
        compiles=True,
    ),
    Peer(
        "torchao", "torchao.optim", "torchao",
        {"Adam": _torchao("Adam8bit"), "AdamW": _torchao("AdamW8bit")}, formats=("int8",),
    ),
    Peer(
        "bitsandbytes", "bitsandbytes.optim", "bitsandbytes",
        {"Adam": _bitsandbytes("Adam8bit"), "AdamW": _bitsandbytes("AdamW8bit"),
         "Lion": _bitsandbytes("Lion8bit", _LION)},
        formats=("int8",),
    ),
    # Without a GPU it keeps whole states.
    Peer(
        "FlashOptim", "flashoptim", "flashoptim",
        {"Adam": _flash("FlashAdam"), "AdamW": _flash("FlashAdamW"),
         "Lion": _flash("FlashLion", _LION), "SGD": _flash("FlashSGD", _SGD)},
        formats=("split8",), devices=("cuda",),
    ),
)  # fmt: skip
# Whom a run has on a CPU without being told: those that are not there say so in its table.
_ON_CPU = ("DeepSpeedCPUAdam", "optimi", "schedulefree")


@dataclass(frozen=True)
class Lineup:
    """Who is timed beside ours.

    variants: keys of STOCK_FLAGS; a row that torch.optim has none of them for has all it has.
    by_name: whether the user has asked for the peers.
    """

    peers: tuple[Peer, ...]
    variants: tuple[str, ...] = tuple(STOCK_FLAGS)
    by_name: bool = False


def lineup(names: Sequence[str] | None, device_type: str) -> Lineup:
    """The contestants that `bench --peers` names.

    Args:
        names: of peers, and of torch.optim's variants; "all"; "none", torch.optim alone. None: those
            that make sense on the device.

    Raises:
        ValueError: there is no such peer, it cannot be imported, or not on this device.
    """
    if names is None:
        on_device = [peer for peer in PEERS if device_type in peer.devices]
        if device_type == "cpu":
            on_device = [peer for peer in on_device if peer.name in _ON_CPU]
        return Lineup(tuple(on_device))
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in {*known, *STOCK_FLAGS, "all", "none"}:
            accepted = ", ".join([*STOCK_FLAGS, *known, "all", "none"])
            raise ValueError(f"--peers {name!r} is unknown; accepted: {accepted}")
    for word in ("all", "none"):
        if word in names and len(names) > 1:
            raise ValueError(f"--peers {word} cannot be combined with other names")
    if names == ["none"]:
        return Lineup(())
    if names == ["all"]:
        return Lineup(PEERS, by_name=True)
    asked = [known[name] for name in dict.fromkeys(names) if name in known]
    for peer in asked:
        if device_type not in peer.devices:
            raise ValueError(f"--peers {peer.name}: not for {device_type.upper()} tensors")
        _import(peer)
    variants = tuple(name for name in STOCK_FLAGS if name in names)
    return Lineup(tuple(asked), variants or tuple(STOCK_FLAGS), by_name=True)


def _import(peer: Peer) -> None:
    """Raise ValueError unless it can be imported; a library may fail in any way while it loads."""
    try:
        importlib.import_module(peer.module)
    except ModuleNotFoundError as error:
        if error.name != peer.module.partition(".")[0]:
            raise ValueError(f"--peers {peer.name} does not import: {error}") from error
        raise ValueError(
            f"--peers {peer.name} is not installed: pip install {peer.package}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"--peers {peer.name} does not import: {type(error).__name__}: {error}"
        ) from error


def versions() -> dict[str, str]:
    """Of the peers that are installed, beside torch; a fork has its own name."""
    installed = importlib.metadata.packages_distributions()
    roots = {p.name: p.module.partition(".")[0] for p in PEERS if p.name != "torch.compile"}
    return {
        name: importlib.metadata.version(installed[root][0])
        for name, root in roots.items()
        if root in installed
    }
