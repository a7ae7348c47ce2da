"""Who would step each param, and with which states: the step's own checks, without the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_optim import backends, ema, formats, sharding, tracing

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

States = dict[str, Any]


@dataclass
class ParamOutlook:
    """One param in the next step.

    Attributes:
        tensor: the param or, if it has no grad, an alias with one.
        states: as they will be.
        average: its EMA, as it will be.
        backend, reason: as in :class:`fused_optim.explain.ExplainedRow`.
        moved: bytes that its kernel reads and writes.
        averages: whether its kernel averages too.
        is_strided: whether param, grad and states lie in several orders.
    """

    tensor: Tensor
    states: States
    average: Tensor | None = None
    backend: str | None = None
    reason: str | None = "no grad"
    moved: int = 0
    averages: bool = False
    is_strided: bool = False


class Outlook:
    """All params of an optimizer, group by group, in the next step.

    For what is missing stands memory that nobody reads or writes: the system gives a CPU none of it.

    Attributes:
        n_assumed_grads, n_assumed_states: of params that have none.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._by_id: dict[int, ParamOutlook] = {}
        self._state: dict[Tensor, Any] = {}
        self._emas: ema.Emas = {}
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
                    self._create(param.tensor, group)
                if param.average is None and group.get("ema_decay") is not None:
                    self._create_ema(param.tensor, group)
        self.n_assumed_states = len(self._made)

    def _add(self, param: Tensor, group: dict[str, Any]) -> ParamOutlook:
        tensor = self._with_grad(param)
        states = self._optimizer.state.get(param)
        if states is not None:
            self._state[tensor] = states
        seen = ParamOutlook(tensor, states if isinstance(states, dict) else {})
        entry = self._optimizer.__dict__.get("_emas", {}).get(param)
        if entry is not None and group.get("ema_decay") is not None:
            self._emas[tensor] = entry
            seen.average = entry[0]
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
        optimizer, one_pass = self._optimizer, self._optimizer._one_pass
        kernels, why_all = backends.cpu_kernels(), None
        if kernels is None or tracing.n_dispatch_modes():
            why_all = "no kernels in use" if kernels is None else tracing.WATCHED
        else:
            device_types = backends.device_types()
            served, fallbacks = kernels.Plan(optimizer._rule).explain(
                [
                    {**group, "params": [param.tensor for param in params]}
                    for group, params in zip(optimizer.param_groups, self.groups)
                ],
                self._state,
                self._create,
                self._convert,
                sharding.place_of,
                backends.launcher(optimizer._rule) if device_types else None,
                device_types,
                one_pass is not None and one_pass.write_clipped_grads,
                one_pass is not None and one_pass.zero_grads,
                self._emas,
                self._create_ema,
            )
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

    def _create(self, tensor: Tensor, group: dict[str, Any]) -> States:
        """The first states of a param, as FusedOptimizer._create_packed makes them."""
        seen = self._by_id[id(tensor)]
        # Where fused=True puts a step makes no difference here.
        like = formats.on_meta(tensor)
        created = self._optimizer._create_state(like, {**group, "fused": False})
        created = {key: _as_real(key, value, tensor) for key, value in created.items()}
        if formats.applies(tensor, group):
            created = self._convert(tensor, group, {**seen.states, **created})
        seen.states = {**seen.states, **created}
        if created:
            self._made.add(id(tensor))
        return created

    def _convert(self, tensor: Tensor, group: dict[str, Any], states: States) -> States:
        """These states in the formats of the group, as formats.encode_states makes them."""
        rule = self._optimizer._description()
        converted = {key: value for key, value in states.items() if key != formats.REMAINDER}
        for s, name in enumerate(rule["states"]):
            if not isinstance(states.get(name), Tensor):
                continue
            converted.pop(f"{name}_scale", None)
            wanted = formats.of_state(tensor, group, bool(rule["squares"] >> s & 1))
            converted[name] = torch.empty_like(tensor, dtype=wanted.dtype, requires_grad=False)
            if wanted.storage in ("signed8", "root8"):
                n_scales = (sharding.part_of(tensor).numel() + formats.GROUP - 1) // formats.GROUP
                converted[f"{name}_scale"] = torch.empty(
                    n_scales, dtype=torch.bfloat16, device=tensor.device
                )
        remainder = formats.SPLITS.get(formats.master_of(tensor, group) or "")
        if remainder is not None:
            converted[formats.REMAINDER] = torch.empty_like(
                tensor, dtype=remainder, requires_grad=False
            )
        if formats.counts_steps(tensor, group):
            converted.setdefault("step", torch.tensor(0.0, dtype=torch.float32, device="cpu"))
        self._by_id[id(tensor)].states = converted
        return converted

    def _create_ema(self, tensor: Tensor, group: dict[str, Any], _: Any = None) -> ema.Entry:
        dtype = ema.dtype_of(tensor, group)
        average = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
        self._by_id[id(tensor)].average = average
        return [average, 0]


def _as_real(key: str, value: Tensor, param: Tensor) -> Tensor:
    """On the param's device, and sharded as it is, what is on the meta device; steps have a value."""
    device = param.device
    if key == "step":
        return torch.zeros_like(value, device=device if value.is_meta else value.device)
    real = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return sharding.rebuilt(real, param)
