"""The arguments of `codegen`, and what it does with them."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EXIT_UNHEALTHY = 1
EXIT_USAGE = 2


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `codegen` and its arguments."""
    codegen = commands.add_parser(
        "codegen",
        help="compile the GPU kernels, without a GPU, and check their machine code",
        description="Compiles every Triton kernel ahead of time. Exit status 1 when a check fails.",
    )
    codegen.set_defaults(run=run, refuse=codegen.error)
    codegen.add_argument(
        "--target", nargs="+", metavar="ARCH", help="default: sm_80 sm_90 sm_100 gfx942"
    )
    codegen.add_argument("--rule", nargs="+", metavar="NAME", help="such as: adam sgd")
    codegen.add_argument("--json", type=Path, metavar="FILE", help="save everything")


def run(args: argparse.Namespace) -> int:
    """Check all that could fail late, compile, print and save."""
    if importlib.util.find_spec("triton") is None:
        print("codegen needs triton: pip install 'fused-optim[triton]'", file=sys.stderr)
        return EXIT_USAGE

    from fused_optim.codegen import compilation
    from fused_optim.codegen.kernels import select

    refuse: Callable[[str], NoReturn] = args.refuse
    try:
        kernels, targets = select(args.rule, args.target)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.touch()
    except (ValueError, OSError) as error:
        refuse(str(error))
    return 0 if compilation.run(kernels, targets, args.json) else EXIT_UNHEALTHY
