"""Runs a program as python itself would, with torch.optim patched."""

import builtins
import functools
import io
import multiprocessing.spawn
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader
from importlib.machinery import BuiltinImporter, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple

import fused_optim
from fused_optim.cli.recorder import Recorder
from fused_optim.options import KernelOptions

# Where runpy's code is, frozen into Python or not; its frames are no news to who reads a traceback.
_NOT_THE_PROGRAMS = (__file__, "<frozen runpy>", runpy.__file__)


class Program(NamedTuple):
    """What to run, and its own arguments.

    kind: "path" of a script, or of a folder or zip file with a ``__main__.py``; "module"; or "code".
    what: the path, the module's name, or the code.
    """

    kind: str
    what: str
    args: Sequence[str]


def run(program: Program, *, quiet: bool, options: KernelOptions) -> int:
    """Run a program with our optimizers; its exceptions, SystemExit too, are for the interpreter.

    Args:
        quiet: nothing is counted and printed.
        options: of :func:`fused_optim.patch`.

    Returns:
        The exit status of a program that ended without exception.
    """
    arm(options, None if quiet else Recorder())
    return execute(program)


def execute(program: Program) -> int:
    """Run a program as python would, in this process as it is."""
    kind, what, args = program
    sys.argv = [{"path": what, "module": "-m", "code": "-c"}[kind], *args]
    try:
        if kind == "module":
            _replace_first_path(str(Path.cwd()))
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "code":
            _run_code(what)
        else:
            _run_path(str(Path(what).absolute()))
    except SystemExit:
        raise
    except BaseException as error:
        traceback = _of_program(error.__traceback__)
        if traceback is None and isinstance(error, ImportError):
            print(f"{sys.executable}: {error}", file=sys.stderr)
            return 1
        _show_only(traceback)
        raise
    return 0


def _replace_first_path(path: str) -> None:
    """Where Python has put the folder of what it was started with."""
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):  # else it has not
        sys.path[:1] = [path]


def _run_path(path: str) -> None:
    """As runpy.run_path, which would make sys.argv[0] absolute or leave __file__ relative.

    The module stays in sys.modules, for what runs after its end: threads, exit handlers, pickle.
    """
    finder = pkgutil.get_importer(path)
    if finder is None:
        _replace_first_path(str(Path(path).resolve().parent))
        module = ModuleType("__main__")
        module.__file__ = path
        module.__cached__ = None  # type: ignore[attr-defined]
        module.__loader__ = SourceFileLoader("__main__", path)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
    else:  # a folder or a zip file
        spec = finder.find_spec("__main__")
        if spec is None or not isinstance(spec.loader, InspectLoader):
            raise ImportError(f"can't find '__main__' module in {path!r}")
        _replace_first_path(path)
        module = module_from_spec(spec)
        code = spec.loader.get_code("__main__")
        assert code is not None  # which only a module of the C language has not
    _execute_as_main(module, code)


def _run_code(text: str) -> None:
    _replace_first_path("")
    module = ModuleType("__main__")
    module.__loader__ = BuiltinImporter
    _execute_as_main(module, compile(text, "<string>", "exec", dont_inherit=True))


def _execute_as_main(module: ModuleType, code: CodeType) -> None:
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback below our frames."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _NOT_THE_PROGRAMS:
        traceback = traceback.tb_next
    return traceback


def _show_only(traceback: TracebackType | None) -> None:
    """Of the exception that is about to end the process; the program may have a hook of its own."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = show


def arm(options: KernelOptions, recorder: Recorder | None) -> None:
    """Patch and count in this process, and in those that multiprocessing starts from it."""
    fused_optim.patch(**options)
    if recorder is not None:
        recorder.start()
        recorder.print_at_exit()
    original = multiprocessing.spawn.get_preparation_data

    # A spawned child unpickles this before it imports the program.
    @functools.wraps(original)
    def with_ours(name: str) -> dict[str, Any]:
        return {**original(name), "fused_optim": _InChild(recorder is None, options)}

    multiprocessing.spawn.get_preparation_data = with_ours


class _InChild:
    """What, when unpickled, arms the process."""

    def __init__(self, quiet: bool, options: KernelOptions) -> None:
        self._quiet, self._options = quiet, options

    def __reduce__(self) -> tuple[Any, ...]:
        return _arm_child, (self._quiet, self._options)


def _arm_child(quiet: bool, options: KernelOptions) -> None:
    arm(options, None if quiet else Recorder(is_child=True))
