from collections.abc import Callable
from typing import Any

from torch import Tensor

class Plan:
    def __init__(self, rule: str) -> None: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        create_state: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
        convert_state: Callable[[Tensor, dict[str, Any], dict[str, Any]], dict[str, Any]],
        place_of: Callable[[Any], tuple[int, int]],
        run_stock: Callable[[list[tuple[int, int, str]]], None],
        launcher: Any,
        device_types: int,
        num_threads: int,
        grad_scale: float,
        scale_on_device: bool,
        skip_on_device: bool,
        resolve: Callable[[], float | None],
        measured: Callable[..., float | None] | None,
        writes_clipped: bool,
        zeroes: bool,
        emas: dict[Tensor, list[Any]],
        create_ema: Callable[[Tensor, dict[str, Any], list[Any] | None], list[Any]],
    ) -> tuple[int, int, list[tuple[int, int, str]] | None, list[tuple[Any, ...]] | None]: ...
    def explain(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        create_state: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
        convert_state: Callable[[Tensor, dict[str, Any], dict[str, Any]], dict[str, Any]],
        place_of: Callable[[Any], tuple[int, int]],
        launcher: Any,
        device_types: int,
        writes_clipped: bool,
        zeroes: bool,
        emas: dict[Tensor, list[Any]],
        create_ema: Callable[[Tensor, dict[str, Any], list[Any] | None], list[Any]],
    ) -> tuple[list[tuple[int, int, bool, int, bool, bool]], list[tuple[int, int, str]] | None]: ...

ODD_OPTIONS: str

def rules() -> dict[str, dict[str, Any]]: ...
def prepare(rule: str, options: list[float], step: float) -> list[float]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def chunks(numel: int) -> list[tuple[int, int]]: ...
def openmp_library() -> str: ...
def probe(streams: list[Tensor], num_threads: int) -> None: ...
def transcode(
    packs: bool,
    storage: str,
    dtype: str,
    stream: int,
    extra: int,
    values: int,
    numel: int,
    key: tuple[int, int, int, int],
    num_threads: int,
    offset: int,
) -> None: ...
