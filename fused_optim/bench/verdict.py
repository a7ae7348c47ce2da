"""What the numbers say, in words."""

from collections import Counter

from fused_optim.bench import text
from fused_optim.bench.contestants import MATCHING, NEVER_ON, OURS, PLAIN
from fused_optim.bench.results import MIN_ROUNDS_TO_JUDGE, Results, Row

FASTER, SLOWER = "faster", "slower"
# What stands beside a verdict, and what it means.
MARKS = {
    "busy": "Other processes took so much of the CPU time that these are no numbers to quote. Measure "
    "again when nothing else runs.",
    "missed": "The row has less than the benchmark asks for: a ratio, a part of the roof, or both.",
    "fell back": "Some tensors were stepped by torch.optim's code, so the row does not measure fused_optim "
    "alone.",
    "peer faster": "One of the peers was faster than fused_optim.",
}


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


def marks(row: Row) -> list[str]:
    """Those of MARKS that the row has."""
    has = (row.was_busy, row.met is False, bool(row.fallbacks), bool(row.faster_peers))
    return [mark for mark, it_has in zip(MARKS, has, strict=True) if it_has]


def headline(rows: list[Row]) -> str:
    """What came out, in a sentence."""
    if not rows:
        return "Nothing was measured."
    if len(rows) > 1:
        words = Counter(judge(row) for row in rows)
        counts = ", ".join(f"{word} in {count}" for word, count in words.most_common())
        own = any(row.baseline in (MATCHING, NEVER_ON) for row in rows)
        beside = "the fastest of torch.optim" + ", in some rows our own other step" * own
        is_plain = [row.baseline == PLAIN for row in rows]
        if all(is_plain):
            beside = "a plain loop"
        elif any(is_plain):
            beside += ", of what it lacks a plain loop"
        return f"Steps of {len(rows)} works beside {beside}: {counts}."
    [row] = rows
    ours = text.seconds(row.seconds(OURS).median)
    begin = f"{row.workload.title}: a step of fused_optim takes {ours}"
    if row.ratio is None or row.baseline is None:
        return f"{begin}; there is nothing of torch.optim to compare it with."
    theirs = text.seconds(row.seconds(row.baseline).median)
    offers = "the fastest that torch.optim offers"
    who = "a plain loop" if row.baseline == PLAIN else f"{offers} ({row.baseline})"
    return f"{begin}, {who} {theirs}. Ratio {text.ratio(row.ratio)}: {judge(row)}."


def notices(found: Results) -> list[str]:
    """What concerns the whole run, a line each."""
    quick = found.about["settings"]["quick"]
    told = {
        "Interrupted: only the rows finished by then are here.": found.interrupted,
        "A quick run: few rounds. For numbers to quote, omit --quick.": quick,
        "Some rows were not timed: ours and the baseline computed something else.": found.disagreements,
    }
    return [line for line, is_so in told.items() if is_so]


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
    if work.target.is_set:
        word = {True: "met", False: "missed", None: "not judged"}[row.met]
        told.append(f"target {text.wanted(work.target)}: {word}")
    if work.cold:
        told.append("caches flushed before each step")
    told.append(f"{text.threads(row.threads)}, {row.clock}'s clock")
    if row.cpu_elsewhere is not None:
        told.append(f"other processes took {row.cpu_elsewhere:.0%} of the CPU time")
    stepped = ", ".join(f"{count:,} by {backend}" for backend, count in row.backends.items())
    told.append(f"tensors stepped: {stepped}")
    told += [f"fell back to torch.optim: {reason}" for reason in row.fallbacks]
    return "; ".join(told) + "."
