"""Keeps torch.compile out of functions, and finds modes and captures that cannot see what kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

# Bare, for its price: 80 ns, 0.6% of AdamW's step on 10 tensors of 10 elements (Intel Xeon). In a function of
# Python's it is 150 ns.
from torch._C import _len_torch_dispatch_stack as n_dispatch_modes

__all__ = [
    "WATCHED",
    "check_graph_capture",
    "left_to_the_interpreter",
    "n_dispatch_modes",
    "refuse_formats",
]

# The reason that torch.optim's code steps tensors then: a mode sees torch's work, not a kernel's.
WATCHED = "a dispatch mode is active"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def left_to_the_interpreter(function: _Function, *, with_callees: bool = True) -> _Function:
    """Keep torch.compile out of it: tracing would only find an opaque extension, and warn.

    Does what torch.compiler.disable does, without its import time and its cost per call.

    Args:
        with_callees: and out of what it calls.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    try:  # private, so that a release without it only loses the silence
        from torch._C._dynamo import eval_frame

        action = eval_frame._FrameAction
        callees = action.SKIP if with_callees else action.DEFAULT
        strategy = eval_frame._FrameExecStrategy(action.SKIP, callees)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):
        pass
    return function


def check_graph_capture(optimizer: Any) -> None:
    """Raise torch's error where a CUDA graph would capture a step that cannot be replayed."""
    if torch.cuda.is_initialized() and "capturable" in optimizer.defaults:
        name = "_accelerator_graph_capture_health_check"  # before torch 2.12: _cuda_...
        getattr(
            optimizer, name if hasattr(optimizer, name) else name.replace("accelerator", "cuda")
        )()


def refuse_formats() -> None:
    """Raise if a mode of torch is active that records operations or puts in fake tensors."""
    keys = torch._C._TorchDispatchModeKey
    for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL):
        mode = torch._C._get_dispatch_mode(key)
        if mode is not None:
            raise RuntimeError(
                f"state_dtype and master do not work under {type(mode).__name__}, which cannot see "
                "how values are packed and unpacked"
            )
