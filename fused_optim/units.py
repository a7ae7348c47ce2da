"""How numbers are written for a reader."""

from collections.abc import Callable


def number(value: float) -> str:
    """Three digits, never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def _scaled(value: float, units: dict[str, float], digits: Callable[[float], str]) -> str:
    """With the first unit that leaves digits before the point."""
    unit = next((unit for unit, size in units.items() if value >= size), [*units][-1])
    return f"{digits(value / units[unit])} {unit}"


def seconds(value: float) -> str:
    """In s, ms or µs."""
    return _scaled(value, {"s": 1.0, "ms": 1e-3, "µs": 1e-6}, number)


def nbytes(value: float) -> str:
    """In powers of 1,000."""
    return _scaled(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}, number)


def binary(value: float) -> str:
    """Bytes in powers of 1,024, four digits."""
    return _scaled(
        value, {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}, "{:.4g}".format
    )


def count(n: int, noun: str) -> str:
    """So many of what the noun says."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def shorten(words: str, length: int = 40) -> str:
    """The beginning of what is longer."""
    return words if len(words) <= length else words[: length - 3] + "..."
