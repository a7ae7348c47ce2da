"""The arguments of `bench`, and what it does with them."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Exit statuses; a shell's after Ctrl-C is 130.
EXIT_FELL_BACK = 1
EXIT_DISAGREES = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bench` and its arguments."""
    bench = commands.add_parser(
        "bench",
        help="time the optimizers against torch.optim and peers",
        description="Times our optimizers against the best of torch.optim's own variants, in one "
        "process and in alternation: a table of rows with targets, or, with --model, --from, --optimizer "
        "or --format, a row for each combination of these. Exit status 0 also when a target is missed, 1 "
        "when a tensor fell back to torch.optim, or when a phase and stock's calls do not compute the "
        "same.",
    )
    bench.set_defaults(run=run, refuse=bench.error)
    what = bench.add_argument_group("what is measured")
    what.add_argument(
        "--from",
        nargs="+",
        dest="factories",
        metavar="WHERE",
        help="your own model, such as train.py:make_model or package.module:make_model: called without "
        "arguments, it returns a torch.nn.Module or an iterable of parameters",
    )
    what.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="resnet50, gpt2, bert-large, vit-b, llama-8b-slice, many-small, tiny; default: gpt2",
    )
    what.add_argument(
        "--optimizer", nargs="+", metavar="NAME", help="such as: AdamW SGD; default: AdamW"
    )
    what.add_argument(
        "--format",
        nargs="+",
        metavar="NAME",
        help="how params and states are stored: own (as the model has them, the default), float32, bf16, "
        "fp16, int8, bf16-states, split16, split8",
    )
    what.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="rows of the table to measure, such as: tiny gpt2-* linear-*",
    )
    what.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="who is timed beside ours: DeepSpeedCPUAdam, optimi, schedulefree, torch.compile, torchao, "
        "bitsandbytes, FlashOptim; for-loop, foreach, fused for these variants of torch.optim alone; none "
        "of them; all. Default: those that are installed",
    )
    how = bench.add_argument_group("how")
    how.add_argument(
        "--quick", action="store_true", help="fewer rounds; of the table, smaller models too"
    )
    how.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (the default), cuda or cuda:N"
    )
    how.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="default: torch's own choice; rows that name a number of threads are there for N instead",
    )
    output = bench.add_argument_group("what is written beside the table")
    output.add_argument(
        "--html", type=Path, metavar="FILE", help="a report in one file, with everything in it"
    )
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="save everything, raw samples too"
    )
    output.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG charts into DIR")
    saved = bench.add_argument_group("instead of measuring, and alone")
    saved.add_argument(
        "--chart",
        nargs=2,
        type=Path,
        metavar=("RESULTS", "SVG"),
        help="draw what --json saved: some rows, each beside the best of torch.optim and the best peer",
    )


def _positive(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Check all that could fail late, measure, then print, save and draw."""
    refuse: Callable[[str], NoReturn] = args.refuse
    needed = ("jinja2", "matplotlib", "psutil", "rich")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        what = " and ".join(missing)
        print(f"bench needs {what}: pip install 'fused-optim[bench]'", file=sys.stderr)
        return EXIT_USAGE

    # Imported here so that `info` works without the bench extra.
    from fused_optim.bench import charts, choice, html, measure, peers, terminal, workloads
    from fused_optim.bench.device import find

    if args.chart:
        results, path = args.chart
        if len(args.argv) > len(["bench", "--chart", *args.chart]):
            refuse("--chart draws a saved run: it takes no other options")
        try:
            picture = charts.svg(charts.draw(charts.saved(results)), **charts.MARGIN)
            path.write_text(picture, encoding="utf-8")
        except (ValueError, OSError) as error:
            refuse(str(error))
        print(f"wrote {path}")
        return 0
    product = {
        "--from": args.factories,
        "--model": args.model,
        "--optimizer": args.optimizer,
        "--format": args.format,
    }
    chosen = [option for option, value in product.items() if value]
    try:
        if chosen and args.only:
            raise ValueError(
                f"--only chooses rows of the table, {chosen[0]} makes rows of its own: give one of them"
            )
        device = find(args.device)
        lineup = peers.lineup(args.peers, device.type)
        if chosen:
            rows = choice.product(args.model, args.factories, args.optimizer, args.format)
        else:
            rows = workloads.select(
                args.only, quick=args.quick, device_type=device.type, threads=args.threads
            )
        files = [path for path in (args.json, args.html) if path]
        for folder in [*(path.parent for path in files), *([args.plot] if args.plot else [])]:
            folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            path.touch()
    except (ValueError, OSError) as error:
        refuse(str(error))

    results = measure.run(
        rows,
        quick=args.quick,
        threads=args.threads,
        device=device,
        lineup=lineup,
        command=shlex.join(["python", "-m", "fused_optim", *args.argv]),
    )
    terminal.print_results(results)
    if args.json:
        results.save(args.json)
    if args.html:
        html.save(results, args.html)
        print(f"wrote {args.html}")
    if args.plot:
        for path in charts.save(results, args.plot):
            print(f"wrote {path}")
    if results.disagreements:
        return EXIT_DISAGREES
    if results.fallbacks:
        return EXIT_FELL_BACK
    return EXIT_INTERRUPTED if results.interrupted else 0
