"""The kernels for aarch64: cross-compiled, run in an emulator and disassembled. `make aarch64` starts it.

It needs aarch64-linux-gnu-g++ and qemu-aarch64-static. Compared are the hashes that driver.cpp prints on this
machine, for each of its instruction sets, and on an emulated aarch64.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import setuptools

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/aarch64"
CROSS = "aarch64-linux-gnu-"
# What has nothing to do with Python.
SOURCES = ["dispatch.cpp", "norm.cpp", "parallel.cpp", "layout.cpp", "isa/baseline.cpp"]
DRIVER = Path(__file__).parent / "driver.cpp"

FUSED = {"fmadd", "fmsub", "fnmadd", "fnmsub", "fmla", "fmls", "fcmla"}
ARITHMETIC = {"fadd", "fsub", "fmul", "fdiv", "fsqrt"}
# Scalar float32 operations that a kernel has before its loop: a grad's sign times its clip, 1 less of the
# average's weight and of at most two of a rule's (AdEMAMix), and Lion's lr times 0. The shortest rule, SGD
# without a momentum, has 5 in its loop.
BEFORE_THE_LOOP = 4


def wheel_flags() -> list[str]:
    """The flags that setup.py gives the compiler."""
    with mock.patch.object(setuptools, "setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = setup.call_args.kwargs["ext_modules"]
    return extension.extra_compile_args


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-8000:]}")
    if done.stderr:
        sys.exit(f"{' '.join(map(str, command))} warns:\n{done.stderr[-8000:]}")
    return done.stdout


def build(compiler: str, sources: list[Path], folder: Path, flags: list[str]) -> Path:
    """Compile what is older than its source, the headers or the flags, and link the driver."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.h"), ROOT / "csrc/apply.inl"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        newest = max(path.stat().st_mtime for path in (*shared, source))
        if not target.exists() or target.stat().st_mtime < newest:
            run(compiler, *flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    run(compiler, "-fopenmp", *objects, "-o", folder / "driver")
    return folder / "driver"


def hashes(output: str) -> dict[str, dict[str, str]]:
    """By instruction set and case."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        isa, rest = line.split(" ", 1)
        case, digest = rest.rsplit(" ", 1)
        found.setdefault(isa, {})[case] = digest
    return found


def compare(native: dict[str, dict[str, str]], emulated: dict[str, str]) -> Iterator[str]:
    for isa, found in native.items():
        if found.keys() != emulated.keys():
            yield f"{isa} and neon have other cases"
            continue
        wrong = [case for case, digest in found.items() if digest != emulated[case]]
        print(f"{len(found) - len(wrong)} of {len(found)} cases: the same bits with {isa} and neon")
        if wrong:
            yield f"{len(wrong)} cases differ between {isa} and neon, such as {'; '.join(wrong[:5])}"


def functions(listing: str) -> Iterator[tuple[str, Counter[str]]]:
    """Each function's name and how often it has each operation: `fmul v` is one on a vector."""
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        operations = re.findall(r"^ +[0-9a-f]+:\t(\w+)\t([vsdh])?", body, re.MULTILINE)
        yield name, Counter(f"{operation} {operand}" for operation, operand in operations)


def look_at(listing: str) -> Iterator[str]:
    """What is wrong with the machine code."""
    whole: Counter[str] = Counter()
    n_kernels = 0
    fused, scalar_loops = [], []
    for name, counts in functions(listing.replace("fused_optim::(anonymous namespace)::", "")):
        whole += counts
        if any(operation.split()[0] in FUSED for operation in counts):
            fused.append(name)
        kernel = re.search(r"\bapply<\w+, \d+u, (.*)>\(", name)
        if kernel is None or "double" in kernel[1]:
            continue
        n_kernels += 1
        scalar = sum(counts[f"{operation} s"] for operation in ARITHMETIC)
        vector = sum(counts[f"{operation} v"] for operation in ARITHMETIC)
        if scalar > BEFORE_THE_LOOP or counts["fdiv s"] or counts["fsqrt s"] or vector == 0:
            scalar_loops.append(f"{name} has {scalar} scalar and {vector} vector operations")
    for kind, operand in (("vector", "v"), ("scalar float32", "s"), ("scalar float64", "d")):
        print(f"{kind}: {sum(whole[f'{operation} {operand}'] for operation in ARITHMETIC)}")
    n_fused = sum(n for operation, n in whole.items() if operation.split()[0] in FUSED)
    print(f"fused: {n_fused}; float32 kernels: {n_kernels}")
    if n_kernels == 0:
        yield "the listing has no kernels"
    if fused:
        yield f"fused operations in {some(fused)} (is -ffp-contract=off among the flags?)"
    if scalar_loops:
        yield f"not vectorised: {some(scalar_loops)}"


def some(found: list[str]) -> str:
    return f"{len(found)} functions, such as\n  " + "\n  ".join(found[:3])


def main() -> None:
    os.chdir(ROOT)
    flags = wheel_flags()
    sources = [DRIVER, *(ROOT / "csrc" / name for name in SOURCES)]
    others = [ROOT / "csrc/isa" / f"{name}.cpp" for name in ("avx2", "avx512")]
    crossed = build(f"{CROSS}g++", sources, BUILD / "neon", flags)
    on_x86 = os.uname().machine == "x86_64"
    here = build("g++", sources + others * on_x86, BUILD / "native", flags)
    emulator = shutil.which("qemu-aarch64-static") or "qemu-aarch64"
    with ThreadPoolExecutor() as pool:
        native, emulated = pool.map(
            lambda command: hashes(run(*command)),
            [(here,), (emulator, "-L", f"/usr/{CROSS.rstrip('-')}", crossed)],
        )
    wrong = list(compare(native, emulated["neon"]))
    objects = BUILD / "neon/baseline.o"
    wrong += look_at(run(f"{CROSS}objdump", "-dC", "--no-show-raw-insn", objects))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
