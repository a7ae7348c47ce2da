"""The next step without its commit: who would step each param, and with which states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_optim import averages, backends, clipping, sharding, storage, tracing

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

States = dict[str, Any]


@dataclass
class DryParam:
    """One param in the next step.

    Attributes:
        tensor: the param or, if it has no grad, an alias with one.
        states: as they will be.
        average: its EMA, as it will be.
        backend, reason: as in :class:`fused_optim.explain.ExplainedRow`.
        moved: bytes that its kernel reads and writes.
        averages: True if its kernel averages too.
        is_strided: True if param, grad and states lie in several orders.
    """

    tensor: Tensor
    states: States
    average: Tensor | None = None
    backend: str | None = None
    reason: str | None = "no grad"
    moved: int = 0
    averages: bool = False
    is_strided: bool = False

    def format(self, group: dict[str, Any]) -> str:
        """The dtypes of its param, grad, states and average, and how they are stored."""
        tensor, grad = self.tensor, self.tensor.grad
        own = _dtype(tensor)
        if storage.applies(tensor, group) and storage.master_of(tensor, group) is not None:
            parts = [f"{own} {storage.master_of(tensor, group)}"]
        else:
            parts = [own]
        if storage.ignores_master([tensor], group):
            parts.append(f"master {group['master']!r} unused")
        if grad is not None and _dtype(grad) != own:
            parts.append(f"grad {_dtype(grad)}")
        states = [
            _dtype(value)
            for key, value in self.states.items()
            if isinstance(value, Tensor)
            and value.shape == tensor.shape
            and key not in ("step", storage.REMAINDER)
            and not key.endswith("_scale")
        ]
        if set(states) - {own}:
            parts.append(f"states {', '.join(dict.fromkeys(states))}")
        if self.average is not None:
            parts.append(f"EMA {_dtype(self.average)}")
        if self.is_strided:
            parts.append("in several orders")
        return "; ".join(parts)

    def numel(self) -> int:
        return sharding.part_of(self.tensor).numel()

    def state_nbytes(self) -> int:
        states = sum(_nbytes(value) for value in self.states.values() if isinstance(value, Tensor))
        return states + (0 if self.average is None else _nbytes(self.average))

    def step_nbytes(self, sums_up: bool) -> int:
        """Bytes that the kernel moves, and those of passes of their own.

        Args:
            sums_up: True if the step reads all grads for their norm first.
        """
        moved = self.moved
        if self.average is not None and not self.averages:
            moved += _nbytes(self.tensor) + 2 * _nbytes(self.average)
        if sums_up and self.tensor.grad is not None:
            moved += _nbytes(self.tensor.grad)
        return moved


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _nbytes(tensor: Tensor) -> int:
    part = sharding.part_of(tensor)
    if part.layout == torch.sparse_coo:
        return _nbytes(part._values()) + _nbytes(part._indices())
    return part.numel() * part.element_size()


class DryRun:
    """All params of an optimizer, group by group, in the next step.

    Untouched `torch.empty` tensors stand in for missing grads and states; the system never backs
    them with memory on a CPU.

    Attributes:
        n_assumed_grads, n_assumed_states: numbers of params that had none.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._by_id: dict[int, DryParam] = {}
        # A plan asks an optimizer for these and the methods below.
        self.state: dict[Tensor, Any] = {}
        self._averages: averages.Averages = {}
        self._outputs: dict[Tensor, Tensor] = {}
        self._made: set[int] = set()
        self.n_assumed_grads = 0
        self.groups = [
            [self._add(param, group) for param in group["params"]]
            for group in optimizer.param_groups
        ]
        self._ask_kernels()
        for group, params in zip(optimizer.param_groups, self.groups):
            for param in params:
                if param.backend == "stock" and not param.states:
                    self._create_states(param.tensor, group)
                if param.average is None and group.get("ema_decay") is not None:
                    self._create_average(param.tensor, group)
        self.n_assumed_states = len(self._made)

    def _add(self, param: Tensor, group: dict[str, Any]) -> DryParam:
        tensor = self._with_grad(param)
        states = self._optimizer.state.get(param)
        if states is not None:
            self.state[tensor] = states
        seen = DryParam(tensor, states if isinstance(states, dict) else {})
        entry = self._optimizer._averages.get(param)
        if entry is not None and group.get("ema_decay") is not None:
            self._averages[tensor] = entry
            seen.average = entry[0]
        output = (self._optimizer._outputs or {}).get(param)
        if output is not None:
            self._outputs[tensor] = output
        self._by_id[id(tensor)] = seen
        return seen

    def _with_grad(self, param: Tensor) -> Tensor:
        if param.grad is not None or not param.requires_grad:
            return param
        self.n_assumed_grads += 1
        if type(param) not in (Tensor, nn.Parameter):
            return param
        alias = param.detach()
        alias.grad = torch.empty_like(param, requires_grad=False)
        return alias

    def _ask_kernels(self) -> None:
        optimizer, why_all = self._optimizer, None
        one_pass = optimizer._clipping or clipping.OFF
        kernels = backends.cpu_kernels()
        if kernels is None or tracing.n_dispatch_modes():
            why_all = "no kernels in use" if kernels is None else tracing.WATCHED
        else:
            device_types = backends.device_types()
            plan = kernels.Plan(optimizer._rule)
            plan.gather(
                self,
                [
                    {**group, "params": [param.tensor for param in params]}
                    for group, params in zip(optimizer.param_groups, self.groups)
                ],
                backends.launcher(optimizer._rule) if device_types else None,
                device_types,
                kernels.DRY_RUN
                | kernels.WRITES_CLIPPED * one_pass.write_clipped_grads
                | kernels.ZEROES * one_pass.zero_grads,
            )
            served, fallbacks = plan.tasks(), plan.fallbacks()
            for g, i, on_device, moved, averages, is_strided in served:
                param = self.groups[g][i]
                param.backend, param.reason = "triton" if on_device else "cpu", None
                param.moved, param.averages, param.is_strided = moved, averages, is_strided
            for g, i, reason in fallbacks or ():
                self.groups[g][i].backend, self.groups[g][i].reason = "stock", reason
        for params in self.groups:
            for param in params:
                steps = param.tensor.grad is not None or param.tensor.requires_grad
                if param.backend is None and steps:
                    param.backend = "stock"
                    # Without a grad, the kernels say nothing about a subclass.
                    param.reason = why_all or "a tensor subclass"

    def _create_states(self, tensor: Tensor, group: dict[str, Any], _: Any = None) -> States:
        """The first states of a param, as FusedOptimizer._create_states makes them."""
        seen = self._by_id[id(tensor)]
        # fused=True would put step on the device, which makes no difference here.
        like = storage.on_meta(tensor)
        created = self._optimizer._create_state(like, {**group, "fused": False})
        first = self._optimizer._first_values(group)
        scalars = self._optimizer._scalars()
        created = {
            key: _scalar(value, first[key], tensor) if key in scalars else _as_real(value, tensor)
            for key, value in created.items()
        }
        if storage.applies(tensor, group):
            created = self._convert_states(tensor, group, {**seen.states, **created})
        seen.states = {**seen.states, **created}
        if created:
            self._made.add(id(tensor))
        return created

    def _convert_states(self, tensor: Tensor, group: dict[str, Any], states: States) -> States:
        """These states in the formats of the group, as storage.encode_states makes them."""
        rule = self._optimizer._description()
        converted = {key: value for key, value in states.items() if key != storage.REMAINDER}
        for s, name in enumerate(rule["states"]):
            if not isinstance(states.get(name), Tensor):
                continue
            converted.pop(f"{name}_scale", None)
            wanted = storage.of_state(tensor, group, rule["kinds"][s])
            converted[name] = torch.empty_like(tensor, dtype=wanted.dtype, requires_grad=False)
            if wanted.storage in ("signed8", "root8"):
                n_scales = storage.n_scales(sharding.part_of(tensor))
                converted[f"{name}_scale"] = torch.empty(
                    n_scales, dtype=torch.bfloat16, device=tensor.device
                )
        remainder = storage.SPLITS.get(storage.master_of(tensor, group) or "")
        if remainder is not None:
            converted[storage.REMAINDER] = torch.empty_like(
                tensor, dtype=remainder, requires_grad=False
            )
        if storage.counts_steps(tensor, group):
            converted.setdefault("step", torch.tensor(0.0, dtype=torch.float32, device="cpu"))
        self._by_id[id(tensor)].states = converted
        return converted

    def _create_average(
        self, tensor: Tensor, group: dict[str, Any], _: Any = None
    ) -> averages.Entry:
        dtype = averages.dtype_of(tensor, group)
        average = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
        self._by_id[id(tensor)].average = average
        return [average, 0]

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        self._optimizer._check_options(group, index)


def _scalar(made: Tensor, value: float, param: Tensor) -> Tensor:
    return torch.full_like(made, value, device=param.device if made.is_meta else made.device)


def _as_real(state: Tensor, param: Tensor) -> Tensor:
    """Move a state off the meta device, to the param's device and sharding."""
    real = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=param.device)
    return sharding.rebuilt(real, param)
