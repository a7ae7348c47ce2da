"""The command line: python -m fused_optim info | run | bench | codegen; or fused-optim info | ..."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fused_optim
from fused_optim.packed import KernelOptions

# Exit statuses: argparse itself ends with 2 on a bad command line, a shell with 130 after Ctrl-C.
EXIT_FELL_BACK = 1
EXIT_DISAGREES = 1
EXIT_UNHEALTHY = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        argv: arguments without the program's name; default: those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        fused_optim.show_config()
        return 0
    if args.command == "run":
        return _run(args)
    if args.command == "codegen":
        return _codegen(parser, args)
    return _bench(parser, args)


def _parser() -> argparse.ArgumentParser:
    is_script = Path(sys.argv[0]).stem == "fused-optim"
    prog = "fused-optim" if is_script else "python -m fused_optim"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, instruction set, threads and backends")
    run = commands.add_parser(
        "run",
        help="run a program, unmodified, with these optimizers in place of torch.optim's",
        description="Runs a script as `python script.py args` would, or a module as `python -m` would. "
        "Wherever it makes an Adam, AdamW, SGD, RMSprop or Adagrad of torch.optim, it gets ours. When it "
        "ends, each of its processes that took steps prints to stderr how many, how long they took, and "
        "which tensors no kernel could serve. The exit status is the program's.",
    )
    run.set_defaults(refuse=run.error)
    run.add_argument("--quiet", action="store_true", help="count and print nothing")
    run.add_argument(
        "--state-dtype",
        choices=["float32", "bfloat16", "int8"],
        help="how all optimizers keep their states; default: as torch.optim does",
    )
    run.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module's name")
    run.add_argument("program", metavar="PROGRAM", help="a script, or a folder with a __main__.py")
    run.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    bench = commands.add_parser(
        "bench",
        help="time the optimizers against torch.optim and peers",
        description="Times every optimizer against the best of torch.optim's own variants, in one "
        "process and in alternation. Exit status 0 also when a target is missed, 1 when a tensor "
        "fell back to torch.optim, or when a phase and stock's calls do not compute the same.",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="save everything, raw samples too")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG charts into DIR")
    bench.add_argument(
        "--quick", action="store_true", help="under a minute: smaller models, fewer rounds"
    )
    bench.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (the default), cuda or cuda:N"
    )
    bench.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="default: torch's own choice; rows that name a number of threads are there for N instead",
    )
    bench.add_argument(
        "--only", nargs="+", metavar="NAME", help="rows to measure, such as: tiny gpt2-* linear-*"
    )
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


def _positive(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from fused_optim.cli.run import run

    options: KernelOptions = {}
    if args.state_dtype is not None:
        is_int8 = args.state_dtype == "int8"
        options["state_dtype"] = "int8" if is_int8 else getattr(torch, args.state_dtype)
    if not args.is_module and not Path(args.program).is_dir():
        try:
            Path(args.program).open("rb").close()
        except OSError as error:
            args.refuse(str(error))
    return run(args.program, args.args, is_module=args.is_module, quiet=args.quiet, options=options)


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Check all that could fail late, measure, then print, save and draw."""
    needed = ["rich"] + (["matplotlib"] if args.plot else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"bench needs {' and '.join(missing)}: pip install 'fused-optim[bench]'",
            file=sys.stderr,
        )
        return EXIT_USAGE

    # Imported here so that `info` works without the bench extra.
    from fused_optim.cli import bench, report
    from fused_optim.cli.device import find
    from fused_optim.cli.workloads import select

    try:
        device = find(args.device)
        workloads = select(
            args.only, quick=args.quick, device_type=device.type, threads=args.threads
        )
        for folder in filter(None, (args.json and args.json.parent, args.plot)):
            folder.mkdir(parents=True, exist_ok=True)
        if args.json:
            args.json.touch()
    except (ValueError, OSError) as error:
        parser.error(str(error))

    results = bench.run(workloads, quick=args.quick, threads=args.threads, device=device)
    report.print_results(results)
    if args.json:
        results.save(args.json)
    if args.plot:
        from fused_optim.cli import plot

        for path in plot.draw(results, args.plot):
            print(f"wrote {path}")
    if results.disagreements:
        return EXIT_DISAGREES
    if results.fallbacks:
        return EXIT_FELL_BACK
    return EXIT_INTERRUPTED if results.interrupted else 0


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
