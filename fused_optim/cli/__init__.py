"""The command line: python -m fused_optim info | doctor | run | bench | codegen; or fused-optim ..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_optim
from fused_optim.bench import command as bench_command
from fused_optim.cli import run_command
from fused_optim.codegen import command as codegen_command

EXIT_UNHEALTHY = 1  # argparse itself ends with 2 on a bad command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        argv: arguments without the program's name; default: those of the process.
    """
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args.run(args)


def _info(_: argparse.Namespace) -> int:
    fused_optim.show_config()
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from fused_optim.cli import doctor  # `run` imports no more than it needs before the script

    return 0 if doctor.run() else EXIT_UNHEALTHY


def _parser() -> argparse.ArgumentParser:
    is_script = Path(sys.argv[0]).stem == "fused-optim"
    prog = "fused-optim" if is_script else "python -m fused_optim"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print versions, instruction set, threads and backends")
    info.set_defaults(run=_info)
    doctor = commands.add_parser(
        "doctor",
        help="step every optimizer on every device, and say what would help",
        description="Compares every optimizer with torch.optim on every device that kernels can serve. "
        "Exit status 1 when one is not stepped by a kernel, or computes something else.",
    )
    doctor.set_defaults(run=_doctor)
    for command in (run_command, bench_command, codegen_command):
        command.add_parser(commands)
    return parser
