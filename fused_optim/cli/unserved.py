"""Optimizers of a program that are neither ours nor of a class that we replace."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from fused_optim.optimizer import FusedOptimizer
from fused_optim.optimizers import REPLACED
from fused_optim.tracing import left_to_the_interpreter

_SERVED = (FusedOptimizer, *REPLACED)  # with the classes that derive from them


class Unserved:
    """Counts those that are made from its start on: (name of the class, its package) -> how many."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def start(self) -> None:
        """Wrap the constructors of the classes that exist, and of those that will be derived.

        Not that of Optimizer alone: what it has made may yet be refused by the constructor of its class,
        as LBFGS and Muon do.
        """
        watch = self._watch

        @classmethod
        def init_subclass(cls: type[Optimizer], **options: Any) -> None:
            super(Optimizer, cls).__init_subclass__(**options)
            watch(cls)

        for cls in (Optimizer, *_derived_from(Optimizer)):
            watch(cls)
        Optimizer.__init_subclass__ = init_subclass  # type: ignore[assignment]

    def _watch(self, cls: type) -> None:
        if issubclass(cls, _SERVED) or "__init__" not in vars(cls):
            return
        original: Callable[..., None] = cls.__init__  # type: ignore[misc]

        @left_to_the_interpreter
        @functools.wraps(original)
        def constructor(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            made = type(optimizer)
            is_whole = made.__init__ is constructor  # else that of a derived class goes on
            if is_whole and not isinstance(optimizer, _SERVED) and not _holds_another(optimizer):
                self.counts[made.__qualname__, _package(made)] += 1

        cls.__init__ = constructor  # type: ignore[misc]


def _derived_from(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _derived_from(cls)


def _holds_another(optimizer: Any) -> bool:
    """Whether it is a wrapper: what it holds counts by itself."""
    for value in vars(optimizer).values():
        values = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(each, Optimizer) for each in values):
            return True
    return False


def _package(cls: type) -> str:
    if cls.__module__ == "__main__":
        return "the program"
    return (
        "torch.optim" if cls.__module__.startswith("torch.optim.") else cls.__module__.split(".")[0]
    )
