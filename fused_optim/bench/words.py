"""What the numbers say, in words, for both reports."""

from collections import Counter

from fused_optim import units
from fused_optim.bench.contestants import MATCHING, NEVER_ON, OURS, PLAIN
from fused_optim.bench.results import (
    BUSY_ELSEWHERE,
    MEMORY_TARGET_NBYTES,
    MIN_ROUNDS_TO_JUDGE,
    PROBE_TARGET,
    Results,
    Row,
)
from fused_optim.bench.workloads import Target

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


def wanted(target: Target) -> str:
    """What a row has to reach; nothing if nothing is asked."""
    parts = [] if target.ratio is None else [f"{target.ratio:.3g}x"]
    parts += [f"{part:.0%}" for part in (target.probe, target.copy) if part is not None]
    return (" or " if target.either else ", ").join(parts)


def time_of(row: Row, name: str) -> str:
    """A contestant's median and quartiles; whoever was dropped after the first round has no quartiles."""
    time = row.seconds(name)
    low, middle, high = (units.seconds(value) for value in (time.q1, time.median, time.q3))
    return f"{middle} [{low}, {high}]" if len(row.samples_s[name]) > 1 else middle


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
    ours = units.seconds(row.seconds(OURS).median)
    begin = f"{row.workload.title}: a step of fused_optim takes {ours}"
    if row.ratio is None or row.baseline is None:
        return f"{begin}; there is nothing of torch.optim to compare it with."
    theirs = units.seconds(row.seconds(row.baseline).median)
    offers = "the fastest that torch.optim offers"
    who = "a plain loop" if row.baseline == PLAIN else f"{offers} ({row.baseline})"
    return f"{begin}, {who} {theirs}. Ratio {row.ratio}: {judge(row)}."


def notices(found: Results) -> list[str]:
    """What concerns the whole run, a line each."""
    told = {
        "Interrupted: only the rows finished by then are here.": found.interrupted,
        "A quick run: few rounds. For numbers to quote, omit --quick.": found.is_quick,
        "Some rows were not timed: ours and the baseline computed something else.": found.disagreements,
    }
    return [line for line, is_so in told.items() if is_so]


def facts(row: Row) -> str:
    """What was stepped, and how."""
    work = row.workload
    told = [
        f"{work.numel:,} parameters in {units.count(work.n_tensors, 'tensor')}, "
        f"{', '.join(work.dtype_names)}",
        f"{units.nbytes(row.nbytes)} to move in a step",
    ]
    if work.options or work.formats:
        options = {**work.options, **work.formats}.items()
        told.append(", ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options))
    if work.formats:
        told.append("torch.optim has float32 params and states")
    if work.target.is_set:
        word = {True: "met", False: "missed", None: "not judged"}[row.met]
        told.append(f"target {wanted(work.target)}: {word}")
    if work.cold:
        told.append("caches flushed before each step")
    told.append(f"{units.count(row.threads or 1, 'thread')}, {row.clock}'s clock")
    if row.cpu_elsewhere is not None:
        told.append(f"other processes took {row.cpu_elsewhere:.0%} of the CPU time")
    stepped = ", ".join(f"{count:,} by {backend}" for backend, count in row.backends.items())
    told.append(f"tensors stepped: {stepped}")
    told += [f"fell back to torch.optim: {reason}" for reason in row.fallbacks]
    return "; ".join(told) + "."


def beside(found: Results) -> list[str]:
    """What there is to tell beside the times of rows, a line each."""
    lines = []
    over_copy = [row.probe_over_copy.median for row in found.rows if row.probe_over_copy]
    if over_copy:
        met = "met" if min(over_copy) >= PROBE_TARGET else "NOT met"
        lines.append(
            f"probe: {min(over_copy):.2f} to {max(over_copy):.2f} of the bandwidth of torch.Tensor.copy_ "
            f"in the same rounds (target {PROBE_TARGET}: {met})"
        )
    elsewhere = [row.cpu_elsewhere for row in found.rows if row.cpu_elsewhere is not None]
    if elsewhere:
        busy = f": THE MACHINE WAS BUSY (more than {BUSY_ELSEWHERE:.0%}), these are no numbers to quote"
        lines.append(
            f"other processes took {min(elsewhere):.0%} to {max(elsewhere):.0%} of the CPU time"
            + busy * found.was_busy
        )
    if found.on_gpu:
        faster = [
            f"{name} ({row.workload.name})" for row in found.rows for name in row.faster_peers
        ]
        lines.append(f"peers faster than ours (target: none): {', '.join(faster) or 'none'}")
    lines += [f"{name}: not measured: {reason}" for name, reason in found.skipped.items()]
    lines += [
        f"{name}: NOT TIMED, ours and the baseline compute something else: {difference}"
        for name, difference in found.disagreements.items()
    ]
    if found.memory:
        growth = ", ".join(f"{k} {units.binary(v)}" for k, v in found.memory.growth_nbytes.items())
        lines.append(
            f"memory that one step adds at its peak, {found.memory.title}: {growth} (target "
            f"{units.binary(MEMORY_TARGET_NBYTES)}: {'met' if found.memory.met else 'NOT met'})"
        )
    if found.import_s is not None:
        taken = units.seconds(found.import_s)
        lines.append(f"import fused_optim, where torch is imported already: {taken}")
    if found.fallbacks:
        lines.append("FELL BACK to torch.optim, so these rows do not measure fused_optim:")
        lines += [f"  {line}" for line in found.fallbacks]
    return lines


def machine(found: Results) -> dict[str, str]:
    """What the numbers were measured on and with."""
    machine, versions, device = (found.about[key] for key in ("machine", "versions", "device"))
    told = {}
    if found.on_gpu:
        memory, cache = (units.binary(device[key]) for key in ("memory_nbytes", "l2_nbytes"))
        toolkit = f"ROCm {device['hip']}" if device["hip"] else f"CUDA {device['cuda']}"
        told["GPU"] = (
            f"{device['name']}, {memory}, L2 {cache}, driver {device['driver']}, {toolkit}"
        )
    return {
        **told,
        "CPU": f"{machine['cpu']}, {units.count(machine['cores'], 'core')}, "
        f"{units.count(machine['threads'], 'thread')}",
        "system": machine["os"],
        "fused_optim": f"{versions['fused_optim']} ({versions['isa']})",
        "torch": versions["torch"],
        "Triton": str(versions["triton"]),
        "Python": versions["python"],
        "date": found.about["date"],
        **found.about["peers"],
    }
