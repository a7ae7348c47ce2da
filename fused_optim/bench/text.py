"""How numbers and verdicts are written, in the tables and in the report."""

from fused_optim.bench.results import MEMORY_TARGET_NBYTES, Memory, Row
from fused_optim.bench.timing import Quartiles
from fused_optim.bench.workloads import Target


def number(value: float) -> str:
    """Three digits, never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def seconds(value: float) -> str:
    """With the unit that leaves digits before the point."""
    unit, size = next(
        ((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if value >= size), ("µs", 1e-6)
    )
    return f"{number(value / size)} {unit}"


def nbytes(count: float) -> str:
    """With the unit, of powers of 1,000, that leaves digits before the point."""
    unit, size = next(
        ((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size),
        ("B", 1),
    )
    return f"{number(count / size)} {unit}"


def threads(count: int | None) -> str:
    """How many."""
    return f"{count} thread{'s' * (count != 1)}"


def ratio(value: Quartiles | None) -> str:
    """Median and quartiles; nothing for None."""
    return f"{value.median:.2f}x [{value.q1:.2f}, {value.q3:.2f}]" if value else ""


def times(row: Row, name: str) -> str:
    """A contestant's median and quartiles; whoever was dropped after the first round has none to speak of."""
    time = row.seconds(name)
    low, middle, high = (seconds(value) for value in (time.q1, time.median, time.q3))
    return f"{middle} [{low}, {high}]" if len(row.samples_s[name]) > 1 else middle


def wanted(target: Target) -> str:
    """What a row has to reach; nothing if nothing is asked."""
    parts = []
    if target.ratio is not None:
        parts.append(f"{target.ratio:.3g}x")
    parts += [f"{part:.0%}" for part in (target.probe, target.copy) if part is not None]
    return (" or " if target.either else ", ").join(parts)


def verdict(row: Row) -> str:
    """Whether it has; nothing without a target."""
    if not row.workload.target.is_set:
        return ""
    unsound = "busy" if row.was_busy else f"{row.n_rounds} rounds"
    return {True: "yes", False: "NO", None: unsound}[row.met]


def memory_line(memory: Memory) -> str:
    """What a step adds at its peak, of every contestant."""
    growth = ", ".join(f"{name} {mib(n)}" for name, n in memory.growth_nbytes.items())
    met = "met" if memory.met else "NOT met"
    return (
        f"memory that one step adds at its peak, {memory.title}: {growth} "
        f"(target {mib(MEMORY_TARGET_NBYTES)}: {met})"
    )


def import_line(seconds: float) -> str:
    """What the package adds to the start of a program."""
    return f"import fused_optim, where torch is imported already: {number(seconds * 1e3)} ms"


def mib(nbytes: int) -> str:
    """In MiB."""
    return f"{nbytes / 2**20:.2f} MiB"


def shorten(words: str, length: int = 40) -> str:
    """The beginning of what is longer."""
    return words if len(words) <= length else words[: length - 3] + "..."
