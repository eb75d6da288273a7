"""Follow trainings from outside the process that trains, by the histories they leave on disk."""

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_INTERVAL_S = 1.0


def store() -> Path:
    """Return :func:`memloc.runs.root`, without importing torch for it."""
    import platformdirs

    return Path(os.environ.get("MEMLOC_RUNS") or platformdirs.user_cache_path("memloc") / "runs").expanduser()


def epoch_line(address: str, history: dict[str, Any]) -> str:
    """Say how far a training is.

    Args:
        address: The run's address.
        history: Its ``history.json``: ``epochs``, and ``rows`` with ``epoch`` and its ``seconds``. Row 0, before
            training, does not count.

    Returns:
        One line; the time left is the median of the last five epochs times the epochs left.

    Example:
        >>> rows = [{"epoch": epoch, "seconds": 10.0} for epoch in range(3)]
        >>> epoch_line("1a2b3c4d5e6f", {"epochs": 6, "rows": rows})
        'training 1a2b3c4d: epoch 2/6, about 40 s left'
    """
    epoch, epochs = history["rows"][-1]["epoch"], history["epochs"]
    left_s = (epochs - epoch) * statistics.median(row["seconds"] for row in history["rows"][1:][-5:])
    amount = f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min"
    return f"training {address[:8]}: epoch {epoch}/{epochs}, about {amount} left"


@contextmanager
def following(tell: Callable[[str], None] | None) -> Iterator[None]:
    """Tell of every epoch that any training on this machine finishes while the block runs.

    Args:
        tell: Called from another thread with one line per news; ``None`` follows nothing.
    """
    if tell is None:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(tell, store(), over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(tell: Callable[[str], None], folder: Path, over: threading.Event) -> None:
    # By address: a finished run's folder loses its suffix, and an epoch is news once.
    seen = dict.fromkeys((_address(path) for path in folder.glob("*/history.json")), time.time_ns())
    while not over.wait(_INTERVAL_S):
        for path in folder.glob("*/history.json"):
            try:
                changed, text = path.stat().st_mtime_ns, path.read_text()
            except FileNotFoundError:  # renamed or deleted since it was listed
                continue
            if changed > seen.get(_address(path), 0):
                seen[_address(path)] = changed
                history = json.loads(text)
                if len(history["rows"]) > 1:
                    tell(epoch_line(_address(path), history))


def _address(history: Path) -> str:
    return history.parent.name.removesuffix(".partial")
