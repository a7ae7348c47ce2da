"""Optimizers whose states and params may be stored in other formats."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_optim import backends, formats, sharding, tracing
from fused_optim.formats import FormatOptions
from fused_optim.one_pass import (
    GroupOption,
    OnePassOptimizer,
    OnePassOptions,
    refuse_in_group,
)
from fused_optim.tracing import left_to_the_interpreter
from fused_optim.wrappers import unwrapped


class KernelOptions(OnePassOptions, FormatOptions, total=False):
    """Keyword arguments of every optimizer of this package, beside torch.optim's."""


def _first_step(step: Tensor, param: Tensor, group: dict[str, Any]) -> Tensor:
    """As torch.optim makes it for the param, of one that it made on the meta device without fused."""
    if group.get("fused") and param.device.type != "cpu":
        return torch.zeros((), dtype=torch.float32, device=param.device)
    return torch.zeros_like(step, device=param.device) if step.is_meta else step


def _has_begun(states: dict[str, Any]) -> bool:
    numbers = [states["step"]] if "step" in states else states.values()
    return any(bool(n.any() if isinstance(n, Tensor) else n) for n in numbers)


class PackedOptimizer(OnePassOptimizer):
    """The options of :class:`FormatOptions` and what they offer; FusedOptimizer's step heeds them."""

    _rule: ClassVar[str]  # key of _C.rules()
    _format_options: dict[str, Any] | None = None  # what a new param group gets
    # Ids of params whose first step a device may have skipped; there once needed. One that is taken by
    # another param does no harm, and torch.utils.swap_tensors() refuses tensors with weak references.
    _unsure: set[int]

    state_dtype = GroupOption()
    master = GroupOption()
    rounding_seed = GroupOption()

    @left_to_the_interpreter
    def _take_options(self, options: KernelOptions) -> None:
        """Check and keep these arguments of the constructor; before torch.optim's begins."""
        given = {
            key: value
            for key, value in options.items()
            if key in formats.OPTIONS and value is not None
        }
        formats.check(given)
        if given:
            self._format_options = given
        rest = {key: value for key, value in options.items() if key not in formats.OPTIONS}
        self._take_one_pass(rest)  # type: ignore[arg-type]

    @left_to_the_interpreter
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; the options of one pass and of formats may differ by group."""
        if isinstance(param_group, dict):
            for key, value in (unwrapped(self)._format_options or {}).items():
                param_group.setdefault(key, value)
            formats.check({"differentiable": self.defaults.get("differentiable"), **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "state_dtype" in group:
            group["state_dtype"] = formats.state_dtype_of(group)
        ignoring = [g for g in self.param_groups if formats.ignores_master(g["params"], g)]
        if ignoring == [group]:  # else it is said already
            warnings.warn(
                f"master={group['master']!r} does nothing for float32 params: "
                "it is for bfloat16 and float16",
                UserWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = self._without_unstepped(super().__getstate__)
        return {**kept, "_format_options": self._format_options}

    def _without_unstepped(self, get: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Without states that only skipped steps have made, of params that are in no group any more.

        torch.optim has none there, and state_dict() raises KeyError if there are some. Waits for the device.
        """
        there = {id(param) for group in self.param_groups for param in group["params"]}
        gone, whole = self.__dict__.get("_unsure", set()) - there, self.state
        if not gone:
            return get()
        kept = {p: s for p, s in whole.items() if id(p) not in gone or _has_begun(s)}
        self.state = defaultdict(dict, kept)
        try:
            return get()
        finally:
            self.state = whole

    def _description(self) -> dict[str, Any]:
        codec = backends.codec()
        assert codec is not None
        return codec.rules()[self._rule]

    def _create_packed(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The first states of one param, in the formats of its group."""
        if not formats.applies(param, group):
            return self._create_state(param, group)
        # Those of another format are never made, and a step on a device is not waited for.
        created = self._create_state(formats.on_meta(param), {**group, "fused": False})
        if "step" in created:
            created["step"] = _first_step(created["step"], param, group)
        states = {**self.state.get(param, {}), **created}
        states = self._convert_first(param, group, states)
        return {key: value for key, value in states.items() if value is not None}

    def _create_unsure(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The first states of one param in a step that a device may skip without the host knowing."""
        if not self.state.get(param):
            self.__dict__.setdefault("_unsure", set()).add(id(param))
        return self._create_packed(param, group)

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _convert_first(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any]
    ) -> dict[str, Any]:
        """The first states in the formats of the group; of what torch.optim made, only the layout counts."""
        return formats.encode_states(param, group, states, self._description(), None)

    def _convert_state(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any]
    ) -> dict[str, Any]:
        """The same states in the formats of the group; None: there is no such state any more."""
        step = states.get("step")
        key = (group.get("rounding_seed", 0), formats.CONVERTING, 0 if step is None else int(step))
        return formats.encode_states(param, group, states, self._description(), key)

    @left_to_the_interpreter
    def master_params(self) -> list[Tensor]:
        """The params in float32, in order: with the bits that ``master="split8"`` or ``"split16"`` keeps.

        New tensors, of the params' shapes and on their devices, for saving float32 weights. Params of other
        dtypes than bfloat16 and float16 are copied as they are.
        """
        values = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.dtype in (torch.bfloat16, torch.float16):
                    values.append(formats.decode_param(param, self.state.get(param, {})))
                else:
                    values.append(param.detach().clone())
        return values

    @torch.no_grad()
    def load_master_params(self, values: Sequence[Tensor]) -> None:
        """Set the params, and the bits beside them, from what :meth:`master_params` gave.

        Args:
            values: one tensor for each param, in order and of its shape.

        Raises:
            ValueError: another number of tensors, or another shape; nothing was written.
        """
        targets = [(group, param) for group in self.param_groups for param in group["params"]]
        if len(values) != len(targets):
            raise ValueError(f"{len(values)} values for {len(targets)} params")
        for i, ((_, param), value) in enumerate(zip(targets, values)):
            if value.shape != param.shape:
                raise ValueError(
                    f"value {i} has shape {tuple(value.shape)}, its param {tuple(param.shape)}"
                )
        for number, ((group, param), value) in enumerate(zip(targets, values)):
            if formats.master_of(param, group) is None or not formats.applies(param, group):
                param.copy_(value)
                continue
            key = (group.get("rounding_seed", 0), number, 0)
            stream, rest = formats.encode_param(param, group, value, key)
            param.copy_(stream)
            if rest is not None:
                self.state[param] = {**self.state.get(param, {}), formats.REMAINDER: rest}

    @left_to_the_interpreter
    def state_dict_for_stock(self) -> dict[str, Any]:
        """A state_dict that torch.optim's class loads: states in float32, without what belongs to formats."""
        saved = formats.accept(self.state_dict())
        names = self._description()["states"]
        stock_step = self._description()["has_step"]
        saved["state"] = {
            index: {
                key: value
                for key, value in formats.decode_states(states, names).items()
                if key != "step" or stock_step
            }
            for index, states in saved["state"].items()
        }
        saved["state"] = {index: states for index, states in saved["state"].items() if states}
        saved["param_groups"] = [
            {key: value for key, value in group.items() if key not in formats.OPTIONS}
            for group in saved["param_groups"]
        ]
        return saved

    @left_to_the_interpreter
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with states as they are stored.

        torch.optim refuses to load 8-bit states, which it would take for numbers; it loads what
        :meth:`state_dict_for_stock` gives.

        8-bit states of sharded params (DTensors, FullyShardedDataParallel's), and all that
        torch.distributed.checkpoint asks for, are float32: codes of 64 elements mean nothing to a process
        that holds other ones. Loading finds the same codes again where the groups are the same.
        """
        return super().state_dict()

    def _saved(self) -> dict[str, Any]:
        saved = self._without_unstepped(super()._saved)
        if not any(key in group for group in self.param_groups for key in formats.OPTIONS):
            return saved
        # Groups of 64 elements lie elsewhere in other processes' parts.
        for_any = sharding.is_for_distributed_checkpoint()
        names = self._description()["states"]
        states = dict(saved["state"])
        for saved_group, group in zip(saved["param_groups"], self.param_groups):
            for index, param in zip(saved_group["params"], group["params"]):
                if (
                    index in states
                    and formats.applies(param, group)
                    and (for_any or sharding.is_sharded(param))
                ):
                    # Those that were made in the constructor are not in the formats yet.
                    converted = self._convert_state(param, group, states[index])
                    states[index] = {
                        key: value
                        for key, value in formats.decode_codes(converted, names).items()
                        if value is not None
                    }
        saved = {**saved, "state": states}
        if self._has_some_params:  # ZeroRedundancyOptimizer loads it by torch.optim's own code
            return saved
        return formats.refuse_stock(saved, self._description())

    @left_to_the_interpreter
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's; states in any format, torch.optim's too, for the formats in use.

        Options of formats that the saved groups lack, as torch.optim's do, stay what they are; those that
        they have come with them. States that are saved in other formats are converted.

        Raises:
            ValueError: as torch.optim's; or the saved states contradict themselves. Nothing was loaded.
        """
        super().load_state_dict(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        state_dict = formats.accept(state_dict)
        for saved_group in state_dict["param_groups"]:
            refuse_in_group(saved_group)
        converted = {}
        if backends.codec() is not None:
            for saved_group, group in zip(state_dict["param_groups"], self.param_groups):
                converted |= self._convert_saved(state_dict["state"], saved_group, group)
        before = [{key: g[key] for key in formats.OPTIONS if key in g} for g in self.param_groups]
        super()._load(state_dict)
        for group, options in zip(self.param_groups, before):
            for key, value in options.items():
                group.setdefault(key, value)
        for param, states in converted.items():
            # torch.optim has cast all of them but step to the param's dtype.
            step = {key: value for key, value in self.state[param].items() if key == "step"}
            self.state[param] = {**states, **step}

    def _convert_saved(
        self, saved: dict[Any, Any], saved_group: dict[str, Any], group: dict[str, Any]
    ) -> dict[Tensor, dict[str, Any]]:
        """The saved states of this group's params, in the formats that the group will then ask for."""
        formats.check({key: saved_group[key] for key in formats.OPTIONS if key in saved_group})
        names = self._description()["states"]
        wanted = {
            **{key: group[key] for key in formats.OPTIONS if key in group},
            **{key: value for key, value in saved_group.items() if key != "params"},
        }
        converted = {}
        for index, param in zip(saved_group["params"], group["params"]):
            states = saved.get(index)
            if not isinstance(states, dict) or not formats.applies(param, wanted):
                continue
            formats.check_saved(states, names, index, param)
            copies = {
                key: value.detach().to(param.device, copy=True)
                if isinstance(value, Tensor) and key != "step"
                else value
                for key, value in states.items()
            }
            copies = self._convert_state(param, wanted, copies)
            converted[param] = {key: value for key, value in copies.items() if value is not None}
        return converted

    def _share_memory_in_other_formats(self, fallbacks: list[tuple[int, int, str]]) -> bool:
        seen = set()
        for g, i, _ in fallbacks:
            group = self.param_groups[g]
            param = group["params"][i]
            if formats.applies(param, group):
                storage = sharding.part_of(param).untyped_storage().data_ptr()
                if storage in seen:
                    return True
                seen.add(storage)
        return False

    @contextlib.contextmanager
    def _in_float32(self, groups: list[dict[str, Any]], numbers: list[list[int]]) -> Iterator[None]:
        """For a while, float32 params with float32 states stand in for those in other formats.

        What torch.optim makes of them comes back at the end, if it ends well.

        Args:
            groups: copies of param groups with some of their params, into which the others are put.
            numbers: of each of these params, among all params.
        """
        replaced: list[tuple[Tensor, dict[str, Any], int, Tensor]] = []
        rule = self._description() if any(k in g for g in groups for k in formats.OPTIONS) else {}
        try:
            for group, group_numbers in zip(groups, numbers):
                params = group["params"]
                for i, (param, number) in enumerate(zip(params, group_numbers)):
                    if not formats.applies(param, group):
                        continue
                    tracing.refuse_formats()
                    states = self.state.get(param, {})
                    stand_in = nn.Parameter(formats.decode_param(param, states))
                    stand_in.grad = param.grad.to(torch.float32)
                    decoded = formats.decode_states(states, rule["states"])
                    if isinstance(decoded.get("step"), Tensor):
                        decoded["step"] = decoded["step"].clone()
                    if not rule["has_step"]:
                        decoded.pop("step", None)
                    if decoded:
                        self.state[stand_in] = {
                            key: value.clone() if isinstance(value, Tensor) else value
                            for key, value in decoded.items()
                        }
                    group["params"] = [*group["params"][:i], stand_in, *group["params"][i + 1 :]]
                    replaced.append((param, group, number, stand_in))
            yield
            # Nothing is written before all of it is there.
            for param, stream, entry in [self._encoded(*one, rule) for one in replaced]:
                with torch.no_grad():
                    param.copy_(stream)
                self.state[param] = entry
        finally:
            for _, _, _, stand_in in replaced:
                self.state.pop(stand_in, None)

    def _encoded(
        self,
        param: Tensor,
        group: dict[str, Any],
        number: int,
        stand_in: Tensor,
        rule: dict[str, Any],
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(param, what is to be written to it, its states), of what torch.optim has made of the stand-in."""
        states = {**self.state.get(param, {}), **self.state.get(stand_in, {})}
        for name in rule["states"]:
            states.pop(f"{name}_scale", None)
        if not rule["has_step"] and formats.counts_steps(param, group):
            states["step"] = states.get("step", torch.tensor(0.0, device="cpu")) + 1
        step = int(states["step"]) if "step" in states else 0
        key = (group.get("rounding_seed", 0), number, step)
        # As on a kernel: with random bits where the format has some.
        stream, rest = formats.encode_param(param, group, stand_in.detach(), key)
        states = formats.encode_states(param, group, states, rule, key)
        states[formats.REMAINDER] = rest
        return param, stream, {key: value for key, value in states.items() if value is not None}
