"""Programs in a process of their own. Imports no torch: the environment of a program is set before."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import BuiltinImporter
from pathlib import Path

# Seconds after which what has not ended hangs: no machine is so busy that anything here takes as long.
HANG_S = 900

METHODS = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
# Programs fork from a process that has imported torch, and what torch.optim imports with the first
# optimizer: that takes seconds.
_context.set_forkserver_preload(["torch", "torch._dynamo"])


def _environment(changes: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    return {**os.environ, "PYTHONPATH": path, **changes}


def _run(program: str, environment: dict[str, str], outputs: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    # As with -c: torch.compile of torch 2.11 enters a function twice whose module has no loader.
    main.__loader__ = BuiltinImporter
    exec(compile(program, "<string>", "exec"), main.__dict__)


def python(program: str, **environment: str) -> subprocess.CompletedProcess:
    """`program` in an interpreter that has imported torch, and can import what the tests import.

    What malloc, OpenMP and triton read of `environment` they have read before: see `fresh_python`.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in outputs:
            file.touch()
        arguments = (program, _environment(environment), [str(file) for file in outputs])
        process = _context.Process(target=_run, args=arguments)
        process.start()
        process.join(HANG_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(program, HANG_S)
        stdout, stderr = (file.read_text() for file in outputs)
        return subprocess.CompletedProcess(program, process.exitcode, stdout, stderr)


def python_all(programs: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """All at the same time, each as by `python`."""
    with ThreadPoolExecutor(len(programs)) as pool:
        return list(pool.map(python, programs))


def fresh_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    """`program` in an interpreter that starts from nothing, and ends as interpreters do."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=_environment(environment),
        # Away from the repository, where the source tree would shadow an installed wheel.
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
