"""The arguments of `run`, and what it does with them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import fused_optim
from fused_optim.cli.recorder import SERVED
from fused_optim.cli.run import Program, run

# Of patch(), by the names that they have here.
OPTIONS = ("state_dtype", "max_grad_norm", "ema_decay", "skip_nonfinite")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `run` and its arguments."""
    parser = commands.add_parser(
        "run",
        usage="%(prog)s [OPTIONS] (PROGRAM | -m MODULE | -c CODE) [ARGS ...]",
        help="run a program, unmodified, with these optimizers in place of torch.optim's",
        description="Runs a script as `python script.py args` would, a module as `python -m`, or code as "
        f"`python -c`. Wherever it makes an {SERVED} of torch.optim, it gets "
        "ours. When it ends, each of its processes that took steps prints to stderr how many, how long "
        "they took, and which tensors no kernel could serve. The exit status is the program's.",
    )
    parser.set_defaults(run=run_command, refuse=parser.error)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="count and print nothing")
    how.add_argument(
        "--compare",
        action="store_true",
        help="run the program twice, first with torch.optim as it is, and print both times and how far the "
        "final params are apart",
    )
    parser.add_argument(
        "--state-dtype",
        choices=["float32", "bfloat16", "int8"],
        help="how all optimizers keep their states; default: as torch.optim does. A checkpoint with int8 "
        "states is not one that torch.optim loads: it refuses it. state_dict_for_stock() gives one that it "
        "loads",
    )
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="X",
        help="all optimizers clip their grads to this norm",
    )
    parser.add_argument(
        "--ema-decay", type=float, metavar="X", help="all optimizers average their params"
    )
    parser.add_argument(
        "--skip-nonfinite",
        action="store_true",
        default=None,
        help="all optimizers skip a step in which a grad has a NaN or an Inf",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "-m", dest="is_module", action="store_true", help="PROGRAM is a module's name"
    )
    kind.add_argument("-c", dest="is_code", action="store_true", help="PROGRAM is Python code")
    parser.add_argument(
        "program", metavar="PROGRAM", nargs="?", help="a script, or a folder with a __main__.py"
    )
    parser.add_argument(
        "args", metavar="ARGS", nargs=argparse.REMAINDER, help="the program's own arguments"
    )


def run_command(args: argparse.Namespace) -> int:
    """Check all that could be wrong before the program starts, and run it."""
    refuse: Callable[[str], NoReturn] = args.refuse
    kind = "module" if args.is_module else "code" if args.is_code else "path"
    if args.program is None:
        missing = {
            "path": "what to run is missing: a script or a folder, -m MODULE or -c CODE",
            "module": "-m needs the name of a module",
            "code": "-c needs the code to run",
        }
        refuse(missing[kind])
    if kind == "path" and not Path(args.program).is_dir():
        try:
            Path(args.program).open("rb").close()
        except OSError as error:
            refuse(str(error))
    given = {name: getattr(args, name) for name in OPTIONS}
    options: Any = {name: value for name, value in given.items() if value is not None}
    try:
        with fused_optim.patched(**options):
            pass
    except ValueError as error:
        refuse(str(error))
    program = Program(kind, args.program, args.args)
    if args.compare:
        # Only now: this module is the main one of the processes that it starts.
        from fused_optim.cli.compare import compare

        return compare(program, options)
    return run(program, quiet=args.quiet, options=options)
