"""What torch.compile must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def left_to_the_interpreter(function: _Function) -> _Function:
    """Keep torch.compile out of it: tracing would only find an opaque extension, and warn.

    Does what torch.compiler.disable does, without its import time and its cost per call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    try:  # private, so that a release without it only loses the silence
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):
        pass
    return function
