"""States whose first step a device may have skipped, which GradScaler's found_inf tells the device alone.

torch.optim has no states before the first step that is not skipped; here they are made before the device
decides.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer


class Unsure:
    """What the host does not know of one optimizer's states; true while some number counts their steps.

    Attributes:
        params: ids of params whose first step may have been skipped. One that another param takes over does
            no harm, and torch.utils.swap_tensors() refuses tensors with weak references.
    """

    def __init__(self) -> None:
        self.params: set[int] = set()
        # Momentum buffer -> a float32 on its device: its steps so far.
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._asked: tuple[list[Tensor], Tensor, torch.cuda.Event | None] | None = None
        self._lock = threading.Lock()  # of the two above: two threads may step
        self._captured: list[Tensor] = []  # what CUDA graphs need as long as they are replayed

    def __bool__(self) -> bool:
        return len(self._numbers) > 0

    def number_of(self, state: Tensor, create: bool) -> Tensor | None:
        """The number of steps of this state, float32 on its device; None: at least one, surely."""
        with self._lock:
            number = self._numbers.get(state)
            if number is None and create:
                number = torch.zeros((), dtype=torch.float32, device=state.device)
                self._numbers[state] = number
        if number is not None and _capturing():
            self._captured.append(number)
        return number

    def begin_step(self) -> bool:
        """Forget states that have been stepped, and return whether there are others.

        Nothing is waited for: the numbers were asked for in an earlier step.
        """
        with self._lock:
            if self and not _capturing():
                self._learn()
            return bool(self)

    def _learn(self) -> None:
        if self._asked is None:
            device = next(iter(self._numbers.values())).device
            asked = [(state, n) for state, n in self._numbers.items() if n.device == device]
            numbers = torch.stack([number for _, number in asked])
            event = None
            if device.type != "cpu":
                on_host = torch.empty(
                    len(asked), dtype=torch.float32, device="cpu", pin_memory=True
                )
                numbers = on_host.copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
            self._asked = [state for state, _ in asked], numbers, event
            return
        states, numbers, event = self._asked
        if event is None or event.query():
            self._asked = None
            for state, number in zip(states, numbers.tolist()):
                if number:
                    self._numbers.pop(state, None)

    def is_unstepped(self, state: Tensor) -> bool:
        """Whether no step has reached this state yet. Waits for the device."""
        number = self._numbers.get(state)
        return number is not None and number.item() == 0

    def hand_over(self, states: dict[str, Any], name: str) -> None:
        """Have torch.optim's code make a state anew that no step has reached."""
        state = states.get(name)
        if state is not None:
            if self.is_unstepped(state):
                states[name] = None
            with self._lock:
                self._numbers.pop(state, None)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def only_stepped(optimizer: FusedOptimizer) -> Iterator[None]:
    """Hide, for a while, states that only skipped steps have made. Waits for the device.

    torch.optim has no states there. Those of params that have left the groups would make
    state_dict() raise KeyError, and momentum without a step would count as begun.
    """
    unsure = optimizer._unsure
    there = {id(param) for group in optimizer.param_groups for param in group["params"]}
    gone = unsure.params - there
    if not gone and not unsure:
        yield
        return
    whole = optimizer.state
    (name, *_) = optimizer._description()["states"]

    def is_stepped(param: Tensor, states: dict[str, Any]) -> bool:
        if id(param) in gone and not _has_begun(states):
            return False
        state = states.get(name)
        return state is None or not unsure.is_unstepped(state)

    optimizer.state = defaultdict(dict, {p: s for p, s in whole.items() if is_stepped(p, s)})
    try:
        yield
    finally:
        optimizer.state = whole


def _has_begun(states: dict[str, Any]) -> bool:
    numbers = [states["step"]] if "step" in states else states.values()
    return any(bool(n.any() if isinstance(n, Tensor) else n) for n in numbers)
