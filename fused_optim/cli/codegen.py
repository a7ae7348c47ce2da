"""python -m fused_optim codegen: compiles every Triton kernel ahead of time, without a GPU, and checks it.

Beside fused_optim.backends the only importer of triton_kernels.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends import backends as installed
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fused_optim.cli.machine_code import (
    WIDEST,
    Measured,
    Needs,
    complaints,
    measure_amd,
    measure_nvidia,
)

# Setuptools maps the folder into the package; pyright cannot know.
from fused_optim.triton_kernels import specialize  # pyright: ignore[reportMissingImports]
from fused_optim.triton_kernels.multi_tensor import (  # pyright: ignore[reportMissingImports]
    KEPT,
    UNSCALED,
    ZEROED,
    multi_tensor,
)
from fused_optim.triton_kernels.norm import (  # pyright: ignore[reportMissingImports]
    AHEAD,
    LANES,
    finish,
    norm,
)
from fused_optim.triton_kernels.prepare import prepare  # pyright: ignore[reportMissingImports]
from fused_optim.triton_kernels.rules import RULES  # pyright: ignore[reportMissingImports]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Storage types of param, grad and states.
DTYPES = {
    "float32": ("float32", "float32", "float32"),
    "float64": ("float64", "float64", "float64"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float16": ("float16", "float16", "float16"),
    "bfloat16, states float32": ("bfloat16", "bfloat16", "float32"),
    "float32, grad bfloat16": ("float32", "bfloat16", "float32"),
}
NBITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
# Elements of one thread: 128 bits of what it computes in, see Specialization.block.
ELEMENTS_PER_THREAD = {"float32": 4, "float64": 2}
# Of the 65,536 of a multiprocessor. With 64 per thread, 1,024 threads are resident, and the kernel with
# the fewest streams, SGD's param and grad, has 1,024 * 2 * 16 bytes = 32 KiB of loads in flight; an H100
# needs 3.35 TB/s * 1 us / 132 multiprocessors = 25 KB. In float64, 80 leave 768
# threads, and what takes as many has five streams: 768 * 5 * 16 bytes = 60 KiB.
MAX_REGISTERS = {"float32": 64, "float64": 80}
# Compilers side by side; each takes about 400 MB.
MAX_PROCESSES = 8


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile.

    Attributes:
        rule: key of RULES; or "norm" or "finish", the kernels that measure the grads.
        options: the deciding options, see triton_kernels/rules.py.
        dtypes: key of DTYPES; None: this is the rule's `prepare`, or `finish`.
        scaled: with grad_scale and found_inf (`prepare`: with found_inf, and an EMA).
        one_pass: clips, averages and leaves zeros in the grads; grad_scale is part of clipping then.
    """

    rule: str
    options: int
    dtypes: str | None
    scaled: bool
    one_pass: bool = False

    @property
    def name(self) -> str:
        if self.rule not in RULES:
            return " ".join(filter(None, (self.rule, self.dtypes)))
        if self.dtypes is None:
            return f"{self.rule} prepare{', found_inf' if self.scaled else ''}"
        rule = RULES[self.rule]
        optional = [not there for there in rule.states_with(0)]
        there = rule.states_with(self.options)
        extra = [s for s, o, t in zip(rule.states, optional, there) if o and t]
        words = [self.rule, *(f"+{state}" for state in extra), self.dtypes]
        name = " ".join(words) + (", scaled" if self.scaled else "")
        return name + (", one pass" if self.one_pass else "")

    def specialization(self, target: str) -> specialize.Specialization:
        """Raises KeyError for `prepare` and `finish`, which have none."""
        param, grad, state = DTYPES[self.dtypes or ""]
        there = RULES[self.rule].states_with(self.options)
        states = tuple(state if is_there else None for is_there in there)
        grad_write = ZEROED if self.one_pass else UNSCALED if self.scaled else KEPT
        return specialize.Specialization(
            self.rule,
            self.options,
            (param, grad, *states, param if self.one_pass else None),
            grad_write.value,
            gpu_target(target).warp_size,
        )

    def needs(self, target: str) -> Needs:
        # The tree over the lanes, in float64; Triton 3.6 pads a little.
        tree = 2 * LANES.value * 8
        if self.dtypes is None:
            return Needs(max_shared_nbytes=tree if self.rule == "finish" else 0)
        bounded = target.startswith("sm_")
        if self.rule == "norm":
            at_once = AHEAD.value * (2 if self.dtypes == "float64" else 1)
            bound = MAX_REGISTERS["float32"] if bounded else None
            return Needs({WIDEST: at_once}, {}, bound, tree)
        loads, stores = Counter[int](), Counter[int]()
        dtypes = self.specialization(target).dtypes
        compute = "float64" if "float64" in dtypes else "float32"
        for stream, dtype in enumerate(dtypes):
            if dtype is not None:
                nbits = NBITS[dtype] * ELEMENTS_PER_THREAD[compute]
                access = min(nbits, WIDEST)
                loads[access] += nbits // access
                # The grad is only written where it is unscaled.
                if stream != 1 or self.scaled:
                    stores[access] += nbits // access
        # With an EMA there are as many streams as in float64, so the same number will do.
        bound = MAX_REGISTERS["float64" if self.one_pass else compute] if bounded else None
        return Needs(dict(loads), dict(stores), bound)


@dataclass(frozen=True)
class Finding:
    """What became of one kernel for one target; `measured` is None if it does not compile.

    compile_s: CPU seconds, the assembler's included.
    """

    kernel: Kernel
    target: str
    compile_s: float
    measured: Measured | None
    complaints: list[str]


def select(
    rules: Sequence[str] | None, targets: Sequence[str] | None
) -> tuple[list[Kernel], list[str]]:
    """All kernels of the rules (None: of all), and the targets (None: TARGETS, if Triton can).

    Raises:
        ValueError: no such rule or target, or Triton is set up for its interpreter.
    """
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, which leaves nothing to compile")
    for rule in rules or ():
        if rule not in RULES:
            raise ValueError(f"--rule {rule!r}: there are {', '.join(RULES)}")
    for target in targets or ():
        if gpu_target(target).backend not in _backends():
            raise ValueError(f"--target {target!r}: not in Triton {triton.__version__}")
    targets = targets or [t for t in TARGETS if gpu_target(t).backend in _backends()]
    kernels = []
    for name in rules or RULES:
        deciding = RULES[name].deciding
        for dtypes, scaled in itertools.product(DTYPES, (False, True)):
            for chosen in itertools.product((False, True), repeat=len(deciding)):
                options = sum(option for option, is_chosen in zip(deciding, chosen) if is_chosen)
                kernels.append(Kernel(name, options, dtypes, scaled))
        kernels += [Kernel(name, 0, None, scaled) for scaled in (False, True)]
        kernels.append(Kernel(name, 0, "float32", True, one_pass=True))
    if rules is None:
        kernels += [Kernel("norm", 0, dtype, False) for dtype in specialize.DTYPES]
        kernels.append(Kernel("finish", 0, None, True))
    return kernels, list(targets)


def _backends() -> set[str]:
    return {{"nvidia": "cuda", "amd": "hip"}.get(name, name) for name in installed}


def gpu_target(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton wants it.

    Raises:
        ValueError: it is neither.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"--target {name!r} is neither like sm_90 nor like gfx942")


def source(kernel: Kernel, target: str) -> tuple[ASTSource, dict[str, Any]]:
    """What triton.compile wants: the source with its arguments' types as the launcher has them, options.

    The tables are aligned to 16 bytes; grad_scale, found_inf and the like are tensors of one element
    anywhere.
    """
    scalars = {"grad_scale": "*fp32", "found_inf": "*fp32", "clip": "*fp64"}
    absent = set[str]()
    if kernel.rule == "norm":
        assert kernel.dtypes is not None
        function = norm
        num_warps = specialize.norm_warps(kernel.dtypes, gpu_target(target).warp_size)
        constants = specialize.norm_constants(kernel.dtypes, False)
        tables = {"grads": "*i64", "chunks": "*i32", "partials": "*fp64"}
        others = {"n_partials": "i32"}
    elif kernel.rule == "finish":
        function, num_warps = finish, specialize.FINISH_WARPS
        constants = {"SKIPS_NONFINITE": True}
        tables = {"partials": "*fp64", "max_norm": "*fp64"}
        others = {"n_partials": "i32", "extra": "*fp64", "report": "*fp32", "result": "*fp64"}
        others["n_skipped"] = "*i64"
    elif kernel.dtypes is None:
        function, num_warps = prepare, specialize.PREPARE_BLOCK // 32
        constants = specialize.prepare_constants(kernel.rule, averages=kernel.scaled)
        tables = {"steps": "*i64", "option_values": "*fp64", "addresses": "*i64", "hypers": "*fp64"}
        others = {"n_tensors": "i32"}
    else:
        specialization = kernel.specialization(target)
        function, num_warps = multi_tensor, specialization.num_warps
        constants = specialization.constants()
        tables = {"tensors": "*i64", "chunks": "*i32", "hypers": "*fp64"}
        others = {}
        absent = {"grad_scale"} if kernel.one_pass else {"clip"}
    if not kernel.scaled:
        absent = set(scalars)
    others |= scalars
    constants |= dict.fromkeys(absent.intersection(function.arg_names))
    signature = {
        name: "constexpr" if name in constants else (tables | others)[name]
        for name in function.arg_names
    }
    index = function.arg_names.index
    return (
        ASTSource(
            function,
            signature,
            {(index(name),): value for name, value in constants.items()},
            {(index(name),): [["tt.divisibility", 16]] for name in tables},
        ),
        {"num_warps": num_warps, **specialize.COMPILE_OPTIONS},
    )


def examine(kernel: Kernel, target: str, disassemble: bool = True) -> Finding:
    """Compile, measure and judge one kernel.

    Args:
        disassemble: read the machine code too; takes longer than the compilation. NVIDIA only.
    """
    begin = _cpu_seconds()
    try:
        ast_source, options = source(kernel, target)
        begin = _cpu_seconds()
        compiled = triton.compile(ast_source, target=gpu_target(target), options=options)
    # Whatever the compilers raise is the finding.
    except Exception as error:
        seconds = _cpu_seconds() - begin
        why = f"does not compile: {type(error).__name__}: {error}"
        return Finding(kernel, target, seconds, None, [why])
    seconds = _cpu_seconds() - begin
    measured = _measure(compiled, disassemble)
    return Finding(kernel, target, seconds, measured, complaints(kernel.needs(target), measured))


def _cpu_seconds() -> float:
    """Of this process and the assemblers it has started: what others do meanwhile does not count."""
    return sum(os.times()[:4])


def _measure(compiled: CompiledKernel, disassemble: bool) -> Measured:
    if "amdgcn" in compiled.asm:
        return measure_amd(compiled.asm["ttir"], compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def output(tool: str, *options: str) -> str:
            command = [tool, *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        tools = knobs.nvidia
        usage = output(tools.cuobjdump.path, "-res-usage")
        # cuobjdump -sass prints the same, but follows the flow of data first.
        sass = output(tools.nvdisasm.path, "-ndf", "-c") if disassemble else None
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    return measure_nvidia(ttir, ptx, usage, sass, compiled.metadata.shared)


def examine_all(jobs: Sequence[tuple[Kernel, str, bool]]) -> Iterator[Finding]:
    """`examine` with each of the arguments, in processes side by side; results in the same order."""
    n_processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(n_processes, get_context("spawn"), use_cache, (cache,)) as pool,
    ):
        yield from pool.map(examine, *zip(*jobs))


def use_cache(folder: str) -> None:
    """Compile everything anew, and leave the user's own cache alone."""
    knobs.cache.dir = folder
    knobs.compilation.always_compile = True


def run(kernels: Sequence[Kernel], targets: Sequence[str], json_file: Path | None) -> bool:
    """Examine, print the table row by row and save; whether everything is healthy."""
    print(f"Triton {triton.__version__}")
    jobs = [(kernel, target, True) for target in targets for kernel in kernels]
    width = max(len(kernel.name) for kernel in kernels)
    columns = (
        f"{'target':<7} {'kernel':<{width}} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>6} "
        f"{'spills':>6}  {'loads':<11} {'stores':<11} {'fma':>3} {'ftz':>3} {'approx':>6} "
        f"{'div':>3} {'sqrt':>4} {'compile s':>9}"
    )
    print(columns)
    findings = []
    for finding in examine_all(jobs):
        findings.append(finding)
        print(f"{finding.target:<7} {finding.kernel.name:<{width}} {_row(finding)}", flush=True)
    unhealthy = [finding for finding in findings if finding.complaints]
    seconds = [finding.compile_s for finding in findings]
    print(
        f"{len(findings)} kernels compiled in {min(seconds):.2f} to {max(seconds):.2f} s each, "
        f"{len(unhealthy)} with complaints"
    )
    for finding in unhealthy:
        print(f"{finding.target} {finding.kernel.name}: {'; '.join(finding.complaints)}")
    if json_file is not None:
        saved = {"triton": triton.__version__, "kernels": [_jsonable(f) for f in findings]}
        json_file.write_text(json.dumps(saved, indent=1) + "\n")
    return not unhealthy


def _row(finding: Finding) -> str:
    m = finding.measured
    if m is None:
        return "does not compile"

    def widths(accesses: dict[int, int]) -> str:
        return " ".join(f"{n}x{bits}" for bits, n in sorted(accesses.items(), reverse=True)) or "-"

    return (
        f"{m.registers:>4} {m.stack_nbytes:>5} {m.local_nbytes:>5} {m.shared_nbytes:>6} "
        f"{m.spills:>6}  {widths(m.loads):<11} {widths(m.stores):<11} {m.fused:>3} {m.flushing:>3} "
        f"{m.approximate:>6} {m.rounded_divisions:>3} {m.rounded_roots:>4} {finding.compile_s:>9.2f}"
        f"{'' if not finding.complaints else '  <- complaints'}"
    )


def _jsonable(finding: Finding) -> dict[str, Any]:
    return {"name": finding.kernel.name, **asdict(finding)}
