"""python -m fused_optim codegen: compiles every Triton kernel ahead of time, without a GPU, and checks it.

With codegen.kernels, which lists them, and fused_optim.backends the only importer of triton_kernels.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource, CompiledKernel

from fused_optim.codegen.kernels import Kernel, gpu_target
from fused_optim.codegen.machine_code import (
    Measured,
    complaints,
    measure_amd,
    measure_nvidia,
)

# Setuptools maps the folder into the package; pyright cannot know.
from fused_optim.triton_kernels import specialize  # pyright: ignore[reportMissingImports]
from fused_optim.triton_kernels.multi_tensor import (  # pyright: ignore[reportMissingImports]
    ROW,
    multi_tensor,
)
from fused_optim.triton_kernels.norm import (  # pyright: ignore[reportMissingImports]
    finish,
    norm,
)
from fused_optim.triton_kernels.prepare import prepare  # pyright: ignore[reportMissingImports]

# Compilers side by side; each takes about 400 MB.
MAX_PROCESSES = 8


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
        tables = {
            "steps": "*i64",
            "option_values": "*fp64",
            "addresses": "*i64",
            "hypers": "*i32",
        }
        others = {"n_tensors": "i32"}
    else:
        specialization = kernel.specialization(target)
        function, num_warps = multi_tensor, specialization.num_warps
        constants = specialization.constants()
        word = f"i{specialization.word.primitive_bitwidth}"
        tables = {"tensors": "*i64", "chunks": "*i32", "hypers": f"*{word}"}
        others = {"in_table": "i32", **{f"word{i}": word for i in range(ROW.value)}}
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
        f"{'div':>3} {'sqrt':>4} {'instr/el':>8} {'compile s':>9}"
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

    instructions = m.round and m.round.per_element(finding.kernel.needs(finding.target))
    per_element = "-" if instructions is None else f"{instructions:.1f}"

    def widths(accesses: dict[int, int]) -> str:
        return " ".join(f"{n}x{bits}" for bits, n in sorted(accesses.items(), reverse=True)) or "-"

    return (
        f"{m.registers:>4} {m.stack_nbytes:>5} {m.local_nbytes:>5} {m.shared_nbytes:>6} "
        f"{m.spills:>6}  {widths(m.loads):<11} {widths(m.stores):<11} {m.fused:>3} {m.flushing:>3} "
        f"{m.approximate:>6} {m.rounded_divisions:>3} {m.rounded_roots:>4} {per_element:>8} "
        f"{finding.compile_s:>9.2f}"
        f"{'' if not finding.complaints else '  <- complaints'}"
    )


def _jsonable(finding: Finding) -> dict[str, Any]:
    return {"name": finding.kernel.name, **asdict(finding)}
