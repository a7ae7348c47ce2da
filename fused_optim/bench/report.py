"""The tables, as text that is Markdown too."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fused_optim.bench import text
from fused_optim.bench.contestants import COPY, MATCHING, NEVER_ON, OURS, PROBE, STOCK_CALLS
from fused_optim.bench.results import Results, Row
from fused_optim.bench.timing import Quartiles
from fused_optim.bench.workloads import LINEAR_N_TENSORS, PARITY

# What a table needs when nobody says how wide the output is (a pipe, a log).
WIDTH_OF_A_FILE = 150

GPU_LEGEND = (
    "Times are the device's own, without waiting for the host, except in rows of host time: the call "
    "of step() alone, from an empty queue. of the copy = our bytes read and written per second / those "
    "of a large torch.Tensor.copy_ in the same rounds."
)

PHASE_LEGEND = (
    "Whole phase: unscale, clip, step, EMA, zero. Stock calls, each the fastest of its variants, and "
    "what each takes by itself:"
)


def print_results(found: Results) -> None:
    """Print everything to stdout: machine, tables, bandwidth, memory, fallbacks."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_A_FILE)
    for line in _header(found):
        console.print(line, markup=False)
    on_gpu = found.about["device"]["type"] != "cpu"
    linear_titles = {f"linear-{n}" for n in LINEAR_N_TENSORS}
    rows = [row for row in found.rows if row.workload.name not in linear_titles]
    linear_rows = [row for row in found.rows if row.workload.name in linear_titles]
    if rows:
        console.print(_main_table(rows, on_gpu))
        console.print(
            "Medians, [lower, upper quartile] over rounds; ratio = baseline / ours, paired per "
            f"round. A target of 1.0x asks for a lower quartile of {PARITY}, any other for the "
            "median.",
            markup=False,
        )
        if on_gpu:
            console.print(GPU_LEGEND, markup=False)
    if any(row.stock_calls for row in rows):
        console.print(PHASE_LEGEND, markup=False)
        for line in _stock_calls(rows):
            console.print(line, markup=False)
    no_others = (MATCHING, NEVER_ON, STOCK_CALLS)
    against_others = [
        row
        for row in found.rows
        if row.baseline not in no_others or {*row.samples_s} - {OURS, *no_others, PROBE, COPY}
    ]
    if against_others:
        console.print(_contestants_table(against_others))
        if absent := _absent(against_others):
            console.print(f"not measured: {absent}", markup=False)
    if linear_rows:
        console.print(_linear_table(linear_rows))
    for line in _footer(found):
        console.print(line, markup=False)


def _header(found: Results) -> list[str]:
    machine, versions = found.about["machine"], found.about["versions"]
    device = found.about["device"]
    lines = []
    if device["type"] != "cpu":
        lines.append(
            f"{device['name']}, {device['memory_nbytes'] / 2**30:.0f} GiB, L2 "
            f"{device['l2_nbytes'] / 2**20:.0f} MiB, driver {device['driver']}, "
            f"{'ROCm ' + device['hip'] if device['hip'] else 'CUDA ' + str(device['cuda'])}, "
            f"triton {versions['triton']}"
        )
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['os']}",
        f"fused_optim {versions['fused_optim']} ({versions['isa']}), torch {versions['torch']}, "
        f"Python {versions['python']}, {found.about['date']}",
    ]
    if found.about["settings"]["quick"]:
        lines.append("Quick run: few rounds; for numbers to quote omit --quick.")
    if found.interrupted:
        lines.append("Interrupted: only the rows finished by then.")
    return lines


def _main_table(rows: list[Row], on_gpu: bool) -> Table:
    roof = "of the copy" if on_gpu else "of probe"
    table = _table("work", "ours ms", "baseline ms", "ratio", "target", "met", "GB/s", roof)
    for row in rows:
        ours = row.seconds(OURS)
        bandwidth = row.nbytes / ours.median / 1e9
        roof_part = row.copy_part if on_gpu else row.probe_part
        table.add_row(
            escape(row.workload.title),
            _ms(ours),
            _baseline(row),
            text.ratio(row.ratio),
            text.wanted(row.workload.target),
            text.verdict(row),
            f"{bandwidth:.1f}" if row.shows_bandwidth else "",
            f"{roof_part.median:.0%}" if roof_part else "",
        )
    return table


def _stock_calls(rows: list[Row]) -> list[str]:
    """What the baselines of phases are made of, a line each."""
    lines = []
    for row in rows:
        calls = [
            f"{part}: {choice.variant} {text.number(choice.seconds[choice.variant] * 1e3)} ms"
            for part, choice in row.stock_calls.items()
        ]
        if calls:
            lines.append(f"  {row.workload.name}: {', '.join(calls)}")
    return lines


def _contestants_table(rows: list[Row]) -> Table:
    """The median of every contestant that has one anywhere, and the reason where it has none."""
    names = [name for name in _contestants(rows) if any(name in row.samples_s for row in rows)]
    table = _table("ms per step", *names)
    for row in rows:
        cells = []
        for name in names:
            if name in row.samples_s:
                cells.append(text.number(row.seconds(name).median * 1e3))
            else:
                cells.append(escape(text.shorten(row.not_measured.get(name, ""))))
        table.add_row(escape(row.workload.title), *cells)
    return table


def _contestants(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.contestants))


def _absent(rows: list[Row]) -> str:
    """Those that were measured nowhere, with all the reasons."""
    told = []
    for name in _contestants(rows):
        if not any(name in row.samples_s for row in rows):
            reasons = dict.fromkeys(
                row.not_measured[name] for row in rows if name in row.not_measured
            )
            told.append(f"{name} ({'; '.join(reasons)})")
    return ", ".join(told)


def _linear_table(rows: list[Row]) -> Table:
    table = _table(
        "linear in the tensors", "ours us", "us/tensor", "ns/param", "stock us/tensor", "ratio"
    )
    for row in rows:
        work = row.workload
        ours = row.seconds(OURS).median
        assert row.baseline is not None  # plain AdamW in float32
        stock = row.seconds(row.baseline).median
        table.add_row(
            work.title,
            text.number(ours * 1e6),
            f"{ours * 1e6 / work.n_tensors:.3f}",
            f"{ours * 1e9 / work.numel:.2f}",
            f"{stock * 1e6 / work.n_tensors:.2f} ({row.baseline})",
            text.ratio(row.ratio),
        )
    return table


def _footer(found: Results) -> list[str]:
    lines = []
    over_copy = [row.probe_over_copy.median for row in found.rows if row.probe_over_copy]
    if over_copy:
        lines.append(
            f"probe: {min(over_copy):.2f} to {max(over_copy):.2f} of the bandwidth of "
            f"torch.Tensor.copy_ in the same rounds (target 0.95: "
            f"{'met' if min(over_copy) >= 0.95 else 'NOT met'})"
        )
    elsewhere = [row.cpu_elsewhere for row in found.rows if row.cpu_elsewhere is not None]
    if elsewhere:
        lines.append(
            f"other processes took {min(elsewhere):.0%} to {max(elsewhere):.0%} of the CPU time"
            + (": THE MACHINE WAS BUSY, these are no numbers to quote" if found.was_busy else "")
        )
    if found.about["device"]["type"] != "cpu":
        faster = [
            f"{name} ({row.workload.name})" for row in found.rows for name in row.faster_peers
        ]
        lines.append(f"peers faster than ours (target: none): {', '.join(faster) or 'none'}")
    lines += [f"{name}: not measured: {reason}" for name, reason in found.skipped.items()]
    lines += [
        f"{name}: NOT MEASURED, ours and the baseline disagree: {difference}"
        for name, difference in found.disagreements.items()
    ]
    if found.memory:
        lines.append(text.memory_line(found.memory))
    if found.import_s is not None:
        lines.append(text.import_line(found.import_s))
    if found.fallbacks:
        lines.append("FELL BACK to torch.optim, so these rows do not measure fused_optim:")
        lines += [f"  {line}" for line in found.fallbacks]
    return lines


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _baseline(row: Row) -> str:
    if row.baseline is None:
        return "none"
    return f"{text.number(row.seconds(row.baseline).median * 1e3)} ({row.baseline})"


def _ms(seconds: Quartiles) -> str:
    low, mid, high = (
        text.number(value * 1e3) for value in (seconds.q1, seconds.median, seconds.q3)
    )
    return f"{mid} [{low}, {high}]"
