"""`bench --from script.py:make_model`: the parameters of the user's own model."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fused_optim.bench.models import Model

# What the benchmark can fill with random numbers, and an optimizer could step.
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128
)  # fmt: skip


def load(spec: str) -> Model:
    """Call the factory and note its parameters' shapes and dtypes; values and model are dropped.

    Args:
        spec: "path/to/script.py:name" or "package.module:name". The name may have dots.

    Raises:
        ValueError: there is no such file, module or name, the code raises, or what it returns has no
            parameters that require grad.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"--from {spec!r} names no callable; write script.py:make_model or package.module:make_model"
        )
    factory: Any = _module(spec, place)
    for part in name.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"--from {spec!r}: {place} has no {name!r}{_instead(factory)}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"--from {spec!r}: {name} is not callable but of {type(factory)}")
    made = _guarded(spec, name, factory)
    params = _trained(spec, made)
    what = type(made).__name__ if isinstance(made, nn.Module) else "parameters"
    return Model(
        name,
        f"{what} of {Path(place).name}:{name}",
        [tuple(param.shape) for param in params],
        tuple(param.dtype for param in params),
    )


def _module(spec: str, place: str) -> ModuleType:
    """The script, run as a module that is not __main__, or the module imported by its name."""
    path = Path(place)
    if path.suffix != ".py" and path.name == place and not path.exists():
        # As `python -m` would: what lies in the current folder is found.
        sys.path.insert(0, str(Path.cwd()))
        return _guarded(spec, place, lambda: importlib.import_module(place))
    if not path.is_file():
        raise ValueError(f"--from {spec!r}: there is no file {place}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ValueError(f"--from {spec!r}: {place} is not a Python file")
    module = importlib.util.module_from_spec(found)
    # The script finds its neighbours, and pickles and dataclasses find the module.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    loader = found.loader
    _guarded(spec, place, lambda: loader.exec_module(module))
    return module


def _guarded(spec: str, what: str, call: Any) -> Any:
    """Call the user's code: what it raises becomes a message that says where.

    A script's sys.argv is its own; a parse_args() outside of the factory would read ours.
    """
    argv, sys.argv = sys.argv, [spec.rpartition(":")[0]]
    try:
        return call()
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--from {spec!r}: {what} raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
    finally:
        sys.argv = argv


def _instead(holder: Any) -> str:
    """What else is there to call."""
    names = [
        name
        for name, value in vars(holder).items()
        if callable(value) and getattr(value, "__module__", None) == getattr(holder, "__name__", "")
    ]
    return f"; it has: {', '.join(names)}" if names else ""


def _trained(spec: str, made: Any) -> list[torch.Tensor]:
    """The parameters that require grad, each once."""
    if isinstance(made, nn.Module):
        made = made.parameters()
    if isinstance(made, torch.Tensor) or not isinstance(made, Iterable):
        raise ValueError(
            f"--from {spec!r} returned {type(made)}; a torch.nn.Module or an iterable of parameters "
            "is needed"
        )
    params: dict[int, torch.Tensor] = {}
    for index, param in enumerate(_guarded(spec, "the iterable", lambda: list(made))):
        if not isinstance(param, torch.Tensor):
            raise ValueError(
                f"--from {spec!r} returned an iterable whose item {index} is no parameter but of "
                f"{type(param)}"
            )
        if torch.nn.parameter.is_lazy(param):
            raise ValueError(
                f"--from {spec!r}: parameter {index} has no shape yet; run the lazy model once before "
                "returning it"
            )
        if param.requires_grad and param.dtype not in DTYPES:
            raise ValueError(
                f"--from {spec!r}: parameter {index} is {param.dtype}, which no optimizer here steps"
            )
        if param.requires_grad:
            params[id(param)] = param
    if not params:
        raise ValueError(f"--from {spec!r}: there are no parameters that require grad")
    return list(params.values())
