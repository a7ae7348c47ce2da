"""How the benchmark measures, in sentences for its report. docs/benchmark.md says it at length."""

from fused_optim.bench.contestants import COPY, PROBE
from fused_optim.bench.results import BUSY_ELSEWHERE, MIN_ROUNDS_TO_JUDGE, Results
from fused_optim.bench.timing import CLEARLY_SLOWER
from fused_optim.bench.workloads import PARITY

ROOFS = {
    PROBE: "a plain pass over as many streams with next to no arithmetic (probe)",
    COPY: "a large torch.Tensor.copy_",
}


def told(found: Results) -> list[str]:
    """One sentence or two for each thing that a reader has to know to believe the numbers."""
    on_gpu = found.about["device"]["type"] != "cpu"
    lines = [
        "What is timed is optimizer.step() alone, with gradients that are there already: no model runs. "
        "Values are random and the same for all; each contestant has tensors and states of its own.",
        "All contestants run in one process and in turns: a round visits each of them several times, in a "
        "new order each time. What disturbs one disturbs the others.",
        "A contestant's time in a round is the median of its visits; the table has the median and the "
        "quartiles over the rounds. Ratios are taken within each round, then their median and quartiles.",
        "The baseline is the fastest of torch.optim's own variants (for-loop, foreach, fused) on this "
        "machine; of an optimizer that it lacks, a plain loop over torch's operations. Faster means that the "
        "lower quartile of the ratio is above 1, slower that the upper one is below; otherwise there is no "
        "difference that can be told.",
        f"A variant or peer more than {CLEARLY_SLOWER:g} times slower than the baseline after the first "
        "round is not measured further: it then has one round.",
        "Peers have our hyperparameters. Each that keeps whole states has first taken a few steps beside "
        "ours, with the same result up to rounding, or it is not timed. Those with 8-bit states stand "
        "beside our rows of such states alone.",
    ]
    if on_gpu:
        lines.append(
            "Times are the GPU's own, between two events in its queue, which is kept busy until the whole "
            "burst has been submitted; rows of host time measure the call of step(). Each contestant takes "
            "several sets of inputs in turn, so that none is found in the L2 cache."
        )
    else:
        lines.append(
            f"Busy: other processes took more than {BUSY_ELSEWHERE:.0%} of the machine's CPU time while a "
            f"row was measured. Such a row, and one of fewer than {MIN_ROUNDS_TO_JUDGE} rounds, has no "
            "verdict."
        )
    lines.append(
        "The roof is what memory allows. GB/s are the bytes that a step has to read and write (each param "
        "and state read and written, each grad read), divided by its time."
    )
    if any(row.workload.target.is_set for row in found.rows):
        lines.append(
            f"Targets are the benchmark's own. One of 1.0x asks for a lower quartile of {PARITY}, any other "
            "for the median; a percentage is the part of the roof."
        )
    return lines
