"""The tables, as text that is Markdown too."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from fused_optim import units
from fused_optim.bench import tables, words
from fused_optim.bench.results import Results, Row
from fused_optim.bench.tables import Table

# What a table needs when nobody says how wide the output is (a pipe, a log).
WIDTH_OF_A_FILE = 160


def print_results(found: Results) -> None:
    """Print everything to stdout: machine, tables, bandwidth, memory, fallbacks."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_A_FILE)

    def show(*parts: str | Table | None) -> None:
        for part in parts:
            if isinstance(part, Table):
                console.print(_drawn(part))
            told = part.caption if isinstance(part, Table) else part or ""
            console.print(told, markup=False, soft_wrap=True)

    show("; ".join(f"{name} {value}" for name, value in words.machine(found).items()))
    show(*words.notices(found))
    if found.rows:
        show(tables.main(found), "", _everyone(found.rows), "")
    for row in found.rows:
        if (calls := tables.calls(row)) is not None:
            parts = ", ".join(f"{part}: {call} {time}" for part, call, time in calls.rows)
            show(f"{row.workload.name}, {calls.caption}: {parts}")
    if (linear := tables.linear(found)) is not None:
        show(linear, "")
    show(*words.beside(found))


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(box=box.MARKDOWN)
    for index, name in enumerate(table.columns):
        drawn.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    return drawn


def _everyone(rows: list[Row]) -> Table:
    """The median of each contestant that has one anywhere, or the reason; beneath it those that have none."""
    names = dict.fromkeys(name for row in rows for name in row.contestants)
    timed = [name for name in names if any(name in row.samples_s for row in rows)]
    absent = {
        name: "; ".join(
            dict.fromkeys(row.not_measured[name] for row in rows if name in row.not_measured)
        )
        for name in names
        if name not in timed
    }
    lines = [
        [
            row.workload.title,
            *(
                units.seconds(row.seconds(name).median)
                if name in row.samples_s
                else units.shorten(row.not_measured.get(name, ""))
                for name in timed
            ),
        ]
        for row in rows
    ]
    told = ", ".join(f"{name} ({reasons})" for name, reasons in absent.items())
    return Table(f"Not measured: {told}" if told else "", ["time of a step", *timed], lines)
