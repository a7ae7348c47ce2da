"""What a compiled kernel consists of, read from the compilers' text, and whether that is as it should be.

Knows no Triton and starts no process: text in, numbers and complaints out.
"""

import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

# One access moves at most so many bits of a thread.
WIDEST = 128


@dataclass(frozen=True)
class Needs:
    """What a kernel has to be.

    Attributes:
        loads: bits of one access -> how many of them a thread takes at least per whole block.
        stores: likewise.
        max_registers: per thread; None: any number.
        max_shared_nbytes: per program.
        elements: that a thread takes per whole block.
        max_instructions: per element, see Round; None: any number.
    """

    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    max_registers: int | None = None
    max_shared_nbytes: int = 0
    elements: int = 0
    max_instructions: float | None = None


@dataclass(frozen=True)
class Round:
    """The way around a kernel's loop over blocks that takes the fewest instructions: that of a whole block.

    Routines for what is rare (NaN, subnormal quotients) are on other ways.

    Attributes:
        instructions: of a thread.
        bits: of its widest accesses: stores, or loads where nothing is stored.
        accesses: how many of these there are on it.
        early_stores: stores to where a load is under way: nothing before them reads what it brings.
    """

    instructions: int
    bits: int
    accesses: int
    early_stores: int = 0

    def per_element(self, needs: Needs) -> float | None:
        """Instructions; a compiler may have unrolled the loop. None: its accesses are not those needed."""
        per_block = (needs.stores or needs.loads).get(self.bits)
        if per_block is None:
            return None
        return self.instructions / (needs.elements * self.accesses / per_block)


@dataclass(frozen=True)
class Measured:
    """What the compiled kernel is.

    Attributes:
        registers: per thread (AMD: vector registers).
        stack_nbytes, local_nbytes, shared_nbytes: per thread, per thread, per program.
        spills: instructions that move a register to memory or back (AMD: vector registers).
        loads, stores: bits of one access -> accesses without a mask in the machine code (AMD: with
            or without one, and the loop is unrolled).
        fused: multiplications fused into an addition, which saves a rounding.
        flushing: operations that replace subnormals by zero.
        approximate: quotients and square roots that are not correctly rounded.
        divides, takes_roots: whether the kernel asks for quotients and square roots.
        rounded_divisions, rounded_roots: correctly rounded ones in the code.
        operations: of Triton's own code, which the compilers start from: their time grows with these.
        round: None where the machine code was not read, or has no loop over blocks.
    """

    registers: int
    stack_nbytes: int
    local_nbytes: int
    shared_nbytes: int
    spills: int
    loads: dict[int, int]
    stores: dict[int, int]
    fused: int
    flushing: int
    approximate: int
    divides: bool
    takes_roots: bool
    rounded_divisions: int
    rounded_roots: int
    operations: int
    round: Round | None = None


def complaints(needs: Needs, measured: Measured) -> list[str]:
    """Why the kernel is not healthy, in words; empty if it is."""
    found = []
    for what, needed, there in (
        ("loads", needs.loads, measured.loads),
        ("stores", needs.stores, measured.stores),
    ):
        for bits, n in sorted(needed.items()):
            if there.get(bits, 0) < n:
                found.append(f"{there.get(bits, 0)} {what} of {bits} bits, not {n}")
    if needs.max_registers is not None and measured.registers > needs.max_registers:
        found.append(f"{measured.registers} registers, more than {needs.max_registers}")
    if needs.max_instructions is not None and measured.round is not None:
        per_element = measured.round.per_element(needs)
        if per_element is not None and per_element > needs.max_instructions:
            found.append(
                f"{per_element:.1f} instructions per element, more than {needs.max_instructions:.1f}"
            )
    for number, what in (
        (
            measured.round.early_stores if measured.round else 0,
            "stores to where a load is under way",
        ),
        (measured.stack_nbytes, "bytes of stack"),
        (measured.local_nbytes, "bytes of local memory"),
        (max(0, measured.shared_nbytes - needs.max_shared_nbytes), "bytes of shared memory"),
        (measured.spills, "spills"),
        (measured.fused, "multiplications fused into an addition"),
        (measured.flushing, "operations that flush subnormals"),
        (measured.approximate, "approximate quotients or square roots"),
    ):
        if number:
            found.append(f"{number} {what}")
    if measured.divides and not measured.rounded_divisions:
        found.append("no correctly rounded division")
    if measured.takes_roots and not measured.rounded_roots:
        found.append("no correctly rounded square root")
    return found


def measure_nvidia(
    ttir: str, ptx: str, usage: str, sass: str | None, dynamic_shared_nbytes: int = 0
) -> Measured:
    """Read a kernel for NVIDIA.

    Args:
        ttir: Triton's own intermediate code.
        usage: output of cuobjdump -res-usage.
        sass: the disassembly, by nvdisasm or cuobjdump; None: do without. Accesses are then those that
            the PTX asks for, a spill shows as stack alone, and what ptxas fuses by itself is missed.
        dynamic_shared_nbytes: what a launch asks for; `usage` has the rest.
    """
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if numbers is None:
        raise ValueError(f"cuobjdump reports no resource usage: {usage!r}")
    registers, stack, shared, local = map(int, numbers.groups())
    of_ptx = Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", ptx, re.MULTILINE))
    of_sass = Counter[str]()
    if sass is not None:
        line = r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)"
        of_sass.update(re.findall(line, sass))

    def accesses(ptx_name: str, sass_name: str) -> dict[int, int]:
        """Of a vector: ptxas can split none, and scalars are told apart in PTX alone."""
        vectors, scalars = Counter[int](), Counter[int]()
        for op, n in of_ptx.items():
            match = re.fullmatch(ptx_name + r"\.global[\w.:]*?(\.v\d)?\.b(\d+)", op)
            if match and match[1]:
                vectors[int(match[1][2:]) * int(match[2])] += n
            elif match:
                scalars[int(match[2])] += n
        if sass is None:
            return dict(vectors)
        return {
            bits: min(n, _total(of_sass, rf"{sass_name}\b.*\.{bits}\b.*") - scalars[bits])
            for bits, n in vectors.items()
        }

    fused = _total(of_ptx, r"fma\..*")
    if sass is not None:
        # Every product of the PTX is one in the machine code, or else part of a fused operation. (Those
        # with FTZ belong to the routines that divide and take roots.) Asking PTX is not enough: for
        # sm_100, ptxas 12.9 fuses mul.rn.f32x2 and add.rn.f32x2 into FFMA2 against --fmad=false.
        products = _total(of_ptx, r"mul\.(rn\.)?f(32|64)") + 2 * _total(of_ptx, r"mul\..*f32x2")
        there = _total(of_sass, r"[FD]MUL") + 2 * _total(of_sass, r"FMUL2")
        fused += max(0, products - there)
    return Measured(
        registers=registers,
        stack_nbytes=stack,
        local_nbytes=local,
        shared_nbytes=shared + dynamic_shared_nbytes,
        spills=_total(of_sass, r"(LDL|STL)\b.*"),
        loads=accesses("ld", "LDG"),
        stores=accesses("st", "STG"),
        fused=fused,
        flushing=_total(of_ptx, r".*\.ftz\b.*"),
        approximate=_total(of_ptx, r".*\.(approx|full)\b.*"),
        divides=_divides(ttir),
        takes_roots=_takes_roots(ttir),
        rounded_divisions=_total(of_ptx, r"div\.rn\.f(32|64)"),
        rounded_roots=_total(of_ptx, r"sqrt\.rn\.f(32|64)"),
        operations=_operations(ttir),
        round=None if sass is None else shortest_round(sass),
    )


def shortest_round(sass: str) -> Round | None:
    """Of the disassembly of one kernel."""
    instructions, text, labels = [], [], dict[str, int]()
    for line in sass.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)(.*);", line):
            text.append(line)
            target = re.search(r"\((\.L\w+)\)", match[3])
            instructions.append((match[2], match[1] is not None, target and target[1]))

    def following(i: int) -> list[int]:
        name, is_conditional, target = instructions[i]
        name = name.split(".")[0]
        if name == "CALL":
            return []
        there = [labels[target]] if name == "BRA" and target is not None else []
        if is_conditional or name not in ("BRA", "EXIT", "RET"):
            there.append(i + 1)
        return [j for j in there if j < len(instructions)]

    for name in ("STG", "LDG"):
        for bits in (128, 64):
            wide = {
                i
                for i, (op, is_conditional, _) in enumerate(instructions)
                if re.match(rf"{name}\b.*\.{bits}\b", op) and not is_conditional
            }
            ways = [way for i in sorted(wide) if (way := _way_around(i, following))]
            if ways:
                shortest = min(ways, key=len)
                early = _early_stores([text[i] for i in sorted(shortest)])
                return Round(len(shortest), bits, len(wide.intersection(shortest)), early)
    return None


def _early_stores(way: list[str]) -> int:
    """Stores of a block to the address, in the same registers, of a load that nothing has waited for."""
    under_way = dict[str, set[str]]()  # address -> registers
    n_early = 0
    for line in way:
        if match := re.search(r"\bLDG\S* R(\d+), (.*\])", line):
            under_way[match[2]] = {f"R{int(match[1]) + i}" for i in range(4)}
            continue
        operands = set(re.findall(r"\bR\d+\b", line.partition(",")[2]))
        under_way = {at: there for at, there in under_way.items() if not there & operands}
        match = re.search(r"\bSTG\S* (.*?\]), ", line)
        n_early += bool(match and match[1] in under_way)
    return n_early


def _way_around(start: int, following: Callable[[int], list[int]]) -> list[int]:
    """The fewest instructions from this one to itself; none if it is in no loop."""
    before = dict[int, int]()
    reached = deque([start])
    while reached:
        i = reached.popleft()
        for j in following(i):
            if j == start:
                way = [i]
                while i != start:
                    i = before[i]
                    way.append(i)
                return way
            if j not in before:
                before[j] = i
                reached.append(j)
    return []


# Fused operations by which LLVM's AMDGPU backend rounds one quotient or square root correctly or turns
# a float64 into an int64, by the instruction that only such a sequence has; v_rsq_f32 is Triton 3.6's.
AMD_SEQUENCES = {
    "v_div_fixup_f32": 5,
    "v_div_fixup_f64": 5,
    "v_sqrt_f32": 2,
    "v_rsq_f32": 5,
    "v_rsq_f64": 7,
    "v_floor_f64": 1,
}


def measure_amd(ttir: str, amdgcn: str) -> Measured:
    """Read a kernel for AMD from its assembly and the metadata at the end of it."""

    def metadata(name: str) -> int:
        match = re.search(rf"^\s*\.?{name}:?\s+(\d+)$", amdgcn, re.MULTILINE)
        if match is None:
            raise ValueError(f"no {name} in the assembly")
        return int(match[1])

    lines = re.findall(r"^\s+([bvsg]_?[a-z]\w*)", amdgcn, re.MULTILINE)
    ops = Counter(re.sub(r"_e(32|64)$", "", op) for op in lines)

    def accesses(name: str) -> dict[int, int]:
        widths = {WIDEST: "dwordx4", 64: "dwordx2", 32: "dword"}
        found = {
            b: ops[f"global_{name}_{w}"] + ops[f"buffer_{name}_{w}"] for b, w in widths.items()
        }
        return {bits: n for bits, n in found.items() if n}

    in_sequences = sum(n * ops[op] for op, n in AMD_SEQUENCES.items())
    fused = _total(ops, r"v_(fma|fmac|mad|mac|fmamk|fmaak)_f\d+")
    fused += 2 * _total(ops, r"v_pk_(fma|mad)_f\d+")
    # float16 operands in float32 arithmetic; a lone product adds -0, a lone sum multiplies by 1.
    mixed = re.findall(r"^\s+v_(?:fma|mad)_mix(.*)$", amdgcn, re.MULTILINE)
    fused += sum(not re.match(r"_f32 .*(neg\(0\)| 1\.0,)", line) for line in mixed)
    rounded_divisions = _total(ops, r"v_div_fixup_f\d+")
    return Measured(
        registers=metadata("vgpr_count"),
        stack_nbytes=metadata("private_segment_fixed_size"),
        local_nbytes=0,
        shared_nbytes=metadata("group_segment_fixed_size"),
        spills=metadata("vgpr_spill_count"),  # scalar registers are kept in vector registers
        loads=accesses("load"),
        stores=accesses("store"),
        fused=max(0, fused - in_sequences),
        # Mode 3 keeps subnormals of operands and results.
        flushing=sum(metadata(f"amdhsa_float_denorm_mode_{mode}") != 3 for mode in ("32", "16_64")),
        approximate=max(0, in_sequences - fused)
        + max(0, _total(ops, r"v_rcp_f\d+") - rounded_divisions),
        divides=_divides(ttir),
        takes_roots=_takes_roots(ttir),
        rounded_divisions=rounded_divisions,
        rounded_roots=_total(ops, r"v_(sqrt|rsq)_f\d+"),
        operations=_operations(ttir),
    )


def _total(ops: Counter[str], pattern: str) -> int:
    matches: Callable[[str], object] = re.compile(pattern).fullmatch
    return sum(n for op, n in ops.items() if matches(op))


def _operations(ttir: str) -> int:
    """Those with a result."""
    return len(re.findall(r"^ *%\S+ = ", ttir, re.MULTILINE))


def _divides(ttir: str) -> bool:
    return re.search(r"\b(arith\.|tt\.precise_)divf\b", ttir) is not None


def _takes_roots(ttir: str) -> bool:
    return re.search(r"\b(math\.|tt\.precise_)sqrt\b", ttir) is not None
