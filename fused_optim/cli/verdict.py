"""What the numbers say, in words."""

from fused_optim.cli import text
from fused_optim.cli.contestants import MATCHING, NEVER_ON, OURS
from fused_optim.cli.results import MIN_ROUNDS_TO_JUDGE, Results, Row

FASTER, SLOWER = "faster", "slower"


def judge(row: Row) -> str:
    """In a word, how our step compares with the baseline."""
    if row.ratio is None:
        return "no baseline"
    if row.was_busy:
        return "not judged (busy)"
    if row.n_rounds < MIN_ROUNDS_TO_JUDGE:
        return f"not judged ({row.n_rounds} rounds)"
    if row.ratio.q1 > 1:
        return FASTER
    return SLOWER if row.ratio.q3 < 1 else "no difference"


def headline(rows: list[Row]) -> str:
    """What came out, in a sentence."""
    if not rows:
        return "Nothing was measured."
    if len(rows) > 1:
        words = [judge(row) for row in rows]
        counts = ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
        own = any(row.baseline in (MATCHING, NEVER_ON) for row in rows)
        beside = "the fastest of torch.optim" + ", in some rows our own other step" * own
        return f"Steps of {len(rows)} works beside {beside}: {counts}."
    [row] = rows
    ours = text.seconds(row.seconds(OURS).median)
    begin = f"{row.workload.title}: a step of fused_optim takes {ours}"
    if row.ratio is None or row.baseline is None:
        return f"{begin}; there is nothing of torch.optim to compare it with."
    theirs = text.seconds(row.seconds(row.baseline).median)
    return (
        f"{begin}, the fastest that torch.optim offers ({row.baseline}) {theirs}. "
        f"Ratio {text.ratio(row.ratio)}: {judge(row)}."
    )


def notices(found: Results) -> list[str]:
    """What a reader has to know before any number."""
    told = []
    if found.interrupted:
        told.append("Interrupted: only the rows finished by then are here.")
    busy = [row.workload.title for row in found.rows if row.was_busy]
    if busy:
        which = "all rows" if len(busy) == len(found.rows) else "; ".join(busy)
        told.append(
            "The machine was busy: other processes took so much of the CPU time that these are no "
            f"numbers to quote: {which}. Measure again when nothing else runs."
        )
    if found.about["settings"]["quick"]:
        told.append("A quick run: few rounds. For numbers to quote, omit --quick.")
    missed = [row for row in found.rows if row.met is False]
    if missed:
        names = "; ".join(
            f"{row.workload.title} (asked: {text.wanted(row.workload.target)}, "
            f"found: {text.ratio(row.ratio) or 'no ratio'})"
            for row in missed
        )
        told.append(f"Targets missed: {names}.")
    if found.fallbacks:
        told.append(
            "Some tensors fell back to torch.optim's code, so these rows do not measure fused_optim "
            f"alone: {'; '.join(found.fallbacks)}."
        )
    faster = [f"{name} ({row.workload.title})" for row in found.rows for name in row.faster_peers]
    if faster:
        told.append(f"Faster than fused_optim: {', '.join(faster)}.")
    if found.disagreements:
        told.append(
            "Some rows were not timed, because ours and the baseline computed something else."
        )
    return told


def facts(row: Row) -> str:
    """What was stepped, and how."""
    work = row.workload
    told = [
        f"{work.numel:,} parameters in {work.n_tensors:,} tensor{'s' * (work.n_tensors != 1)}, "
        f"{', '.join(work.dtype_names)}",
        f"{text.nbytes(row.nbytes)} to move in a step",
    ]
    if work.options or work.formats:
        options = {**work.options, **work.formats}.items()
        told.append(", ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options))
    if work.formats:
        told.append("torch.optim has float32 params and states")
    if work.cold:
        told.append("caches flushed before each step")
    told.append(f"{text.threads(row.threads)}, {row.clock}'s clock")
    if row.cpu_elsewhere is not None:
        told.append(f"other processes took {row.cpu_elsewhere:.0%} of the CPU time")
    stepped = ", ".join(f"{count:,} by {backend}" for backend, count in row.backends.items())
    told.append(f"tensors stepped: {stepped}")
    return "; ".join(told) + "."
