"""torch.optim's own names make our optimizers: for programs that cannot or should not be changed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fused_optim.optimizer import FusedOptimizer
from fused_optim.optimizers import REPLACED
from fused_optim.options import KernelOptions, check_all
from fused_optim.tracing import left_to_the_interpreter

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Constructor = Callable[..., None]

_originals: dict[type, _Constructor] = {}  # the stock classes' own; there while patched
_options: KernelOptions = {}  # of each new optimizer, unless the program gives others
# Classes of the program that derive from torch.optim's and whose optimizers were made while patched.
derived: set[type] = set()


def patch(**options: Unpack[KernelOptions]) -> None:
    """From now on ``torch.optim.AdamW(...)`` makes a ``fused_optim.AdamW``, in the whole process.

    The same for the other optimizers that both have. The classes of torch.optim stay what they are, and
    only their constructors are replaced. So it does not matter how or when a program has imported a class;
    ``isinstance(optimizer, torch.optim.AdamW)`` holds for all AdamW, made before or afterwards;
    ``type(optimizer) is torch.optim.AdamW`` does not. Optimizers that exist already, copies of them and
    what is unpickled keep their class. So do optimizers of classes that derive from torch.optim's: they
    may have a step of their own; derive them from fused_optim's to have the kernels.

    A second call replaces the options of the first.

    Args:
        options: arguments of every optimizer to be made: :class:`OnePassOptions`,
            :class:`FormatOptions`. What the program itself gives wins.

    Raises:
        TypeError: there is no such option. Nothing was patched.
        ValueError: an option outside its range. Nothing was patched.

    Example:
        >>> from torch.optim import AdamW
        >>> params = [torch.nn.Parameter(torch.ones(3))]
        >>> fused_optim.patch()
        >>> isinstance(AdamW(params), fused_optim.AdamW)
        True
        >>> fused_optim.unpatch()
        >>> isinstance(AdamW(params), fused_optim.AdamW)
        False
    """
    for key in options:
        if key not in KernelOptions.__annotations__:
            raise TypeError(f"patch() got an unexpected keyword argument {key!r}")
    check_all(options, FusedOptimizer)
    global _options
    _options = options
    for stock in REPLACED:
        if stock not in _originals:
            _originals[stock] = stock.__init__
            stock.__init__ = _make_ours(stock)


def unpatch() -> None:
    """Undo :func:`patch`: torch.optim's classes are as they were. Optimizers made meanwhile stay ours."""
    for stock, original in list(_originals.items()):
        # If others have wrapped it since, it stays beneath theirs, without effect.
        if getattr(stock.__init__, "_of_patch", False):
            stock.__init__ = original
        del _originals[stock]


@contextlib.contextmanager
def patched(**options: Unpack[KernelOptions]) -> Iterator[None]:
    """:func:`patch` within a context; afterwards everything is as it was before, patched or not.

    Example:
        >>> params = [torch.nn.Parameter(torch.ones(3))]
        >>> with fused_optim.patched(max_grad_norm=1.0):
        ...     optimizer = torch.optim.SGD(params)
        >>> optimizer.max_grad_norm
        1.0
        >>> type(torch.optim.SGD(params)) is torch.optim.SGD
        True
    """
    was_patched, before = bool(_originals), _options
    patch(**options)
    try:
        yield
    finally:
        if was_patched:
            patch(**before)
        else:
            unpatch()


def _make_ours(stock: type) -> _Constructor:
    original, ours = _originals[stock], REPLACED[stock]

    # With the signature of the original, which programs inspect: does it have `fused`?
    @left_to_the_interpreter
    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if stock not in _originals or isinstance(self, FusedOptimizer):
            original(self, *args, **kwargs)
        elif type(self) is stock:
            self.__class__ = ours
            self._is_patched = True
            ours.__init__(self, *args, **{**_options, **kwargs})
        else:
            derived.add(type(self))
            original(self, *args, **kwargs)

    constructor._of_patch = True  # type: ignore[attr-defined]
    return constructor
