"""The command line: python -m fused_optim info | doctor | run | bench | codegen; or fused-optim ..."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_optim
from fused_optim.cli import bench_command, run_command

# Exit statuses; argparse itself ends with 2 on a bad command line.
EXIT_UNHEALTHY = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        argv: arguments without the program's name; default: those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.command == "info":
        fused_optim.show_config()
        return 0
    if args.command == "doctor":
        from fused_optim.cli import doctor  # `run` imports no more than it needs before the script

        return 0 if doctor.run() else EXIT_UNHEALTHY
    if args.command == "run":
        return run_command.run_command(args)
    if args.command == "codegen":
        return _codegen(parser, args)
    return bench_command.run(args)


def _parser() -> argparse.ArgumentParser:
    is_script = Path(sys.argv[0]).stem == "fused-optim"
    prog = "fused-optim" if is_script else "python -m fused_optim"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, instruction set, threads and backends")
    commands.add_parser(
        "doctor",
        help="step every optimizer on every device, and say what would help",
        description="Compares every optimizer with torch.optim on every device that kernels can serve. "
        "Exit status 1 when one is not stepped by a kernel, or computes something else.",
    )
    run_command.add_parser(commands)
    bench_command.add_parser(commands)
    codegen = commands.add_parser(
        "codegen",
        help="compile the GPU kernels, without a GPU, and check their machine code",
        description="Compiles every Triton kernel ahead of time. Exit status 1 when a check fails.",
    )
    codegen.add_argument(
        "--target", nargs="+", metavar="ARCH", help="default: sm_80 sm_90 sm_100 gfx942"
    )
    codegen.add_argument("--rule", nargs="+", metavar="NAME", help="such as: adam sgd")
    codegen.add_argument("--json", type=Path, metavar="FILE", help="save everything")
    return parser


def _codegen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Check all that could fail late, compile, print and save."""
    if importlib.util.find_spec("triton") is None:
        print("codegen needs triton: pip install 'fused-optim[triton]'", file=sys.stderr)
        return EXIT_USAGE

    from fused_optim.cli import codegen
    from fused_optim.cli.kernels import select

    try:
        kernels, targets = select(args.rule, args.target)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.touch()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if codegen.run(kernels, targets, args.json) else EXIT_UNHEALTHY
