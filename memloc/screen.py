"""What the ``memloc`` command shows: tables, sizes and times as a person writes them, lines that are written anew."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memloc.sweeps import Status

__all__ = ["Line", "Progress", "duration", "print_table", "size"]


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows with their columns below each other.

    Args:
        rows: As many words in each.

    Example:
        >>> print_table([("epochs", "30"), ("seed", "0")])
        epochs  30
        seed    0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(size_bytes: float) -> str:
    """Write a number of bytes as a person would.

    Example:
        >>> size(12_345_678)
        '12 MB'
    """
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def duration(seconds: float) -> str:
    """Write a time as a person would say it.

    Example:
        >>> duration(100), duration(8000)
        ('100 s', '2 h')
    """
    for unit, unit_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


class Line:
    """One line on stderr that is written anew; where stderr is no terminal, at most one line in ten seconds."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = -10.0

    def show(self, text: str) -> None:
        """Write this in place of what is there."""
        if self._is_terminal:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave an empty line."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Progress:
    """A few lines on stderr that are written anew; where stderr is no terminal, at most one line in ten seconds."""

    def __init__(self) -> None:
        self._line, self._lines, self._is_terminal = Line(), 0, sys.stderr.isatty()

    def show(self, status: "Status") -> None:
        """Write how far a sweep is in place of what is there."""
        left = "" if status.left_s is None else f", about {duration(status.left_s)} left"
        counts = f"{status.done} done, {len(status.running)} running, {status.failed} failed, {status.waiting} waiting"
        if not self._is_terminal:
            self._line.show(counts + left)
            return
        lines = [counts + left]
        lines += [f"  {name} on {node}, {duration(seconds)}" for name, node, seconds in status.running[:10]]
        width = shutil.get_terminal_size().columns - 1
        lines = [line[:width] for line in lines]  # a longer one would be two
        up = f"\033[{self._lines}A" if self._lines else ""
        print(up + "".join(f"\r{line}\033[K\n" for line in lines) + "\033[J", end="", file=sys.stderr, flush=True)
        self._lines = len(lines)

    def end(self) -> None:
        """Leave the last lines as they are."""
        self._line.end()
