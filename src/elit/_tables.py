"""Tables and numbers as text."""

import math
from collections.abc import Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under their names, the first to the left, the others to the right; None as "-"."""
    lines = [["-" if cell is None else str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def with_error(value: float, error: float | None) -> tuple[str, str]:
    """A signed value and its standard error, both to the error's second significant digit.

    Without an error, or with none above 0, the value has three digits: 0.00002, 0.000012 ->
    ('+0.000020', '0.000012').
    """
    if not error or not math.isfinite(error):
        return f"{value:+.3g}", "-" if error is None else f"{error:.3g}"
    error_text = f"{error:.1e}"  # rounded first: 0.0996 has its second digit where 0.10 has
    digits = 1 - int(error_text.partition("e")[2])
    if digits > 8:
        return f"{value:+.1e}", error_text
    digits = max(digits, 0)
    return f"{value:+.{digits}f}", f"{error:.{digits}f}"


def counted(number: int, noun: str) -> str:
    """1 -> '1 step', 4 -> '4 steps'; of a noun that takes an s, or es behind one."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def in_units(value: float, unit: str) -> str:
    """2.08e12, 'FLOPs' -> '2.08 TFLOPs': four digits, prefixes up to E."""
    steps = 0 if value <= 0 else min(max(math.floor(math.log10(value) / 3), 0), 6)
    return f"{value / 1000**steps:.4g} {' kMGTPE'[steps].strip()}{unit}"


def duration(seconds: float) -> str:
    """5e-7 -> '0.0005 ms', 90 -> '90 s', 3e5 -> '83.3 hours (3.5 days)': three digits."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    hours = seconds / 3600
    return f"{hours:.3g} hours" + (f" ({hours / 24:.1f} days)" if hours > 48 else "")
