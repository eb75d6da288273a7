"""One cell of a sweep: run it once, within its memory, and keep what it found as a file of JSON."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memloc import chapters, records
from memloc.grids import Cell, is_current
from memloc.progress import store

__all__ = ["CellError", "attempt", "find", "folder", "result_file", "run"]

_LOOK_S = 0.1  # between two looks at the memory of a cell


class CellError(RuntimeError):
    """A cell that failed.

    Attributes:
        details: The traceback of what failed, without colours.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def folder() -> Path:
    """Return the folder of all cells' results, in the store of the trainings."""
    return store() / "cells"


def result_file(cell: Cell) -> Path:
    """Return where the result of a cell lies, if there is one."""
    return folder() / f"{cell.address}.json"


def find(cell: Cell) -> dict[str, Any] | None:
    """Read the result of a cell.

    Args:
        cell: The cell.

    Returns:
        What :func:`run` wrote; None where there is nothing, or something that is not the result of this cell, which
        the next run replaces.
    """
    try:
        content = json.loads(result_file(cell).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("address") != cell.address:
        return None
    forms = {"metrics": dict, "parameters": dict, "seconds": int | float}
    return content if all(isinstance(content.get(name), form) for name, form in forms.items()) else None


def run(cell: Cell, root: Path) -> dict[str, Any]:
    """Run a cell, or find the result that is there already.

    Two processes that ask for the same cell run it once, the second waits; a cell that was killed goes on from the last
    epoch that its trainings kept.

    Args:
        cell: The cell.
        root: The folder with ``_toc.yml``; a chapter is executed there.

    Returns:
        The result: ``address``, ``chapter`` (None for a training), ``preset``, ``parameters``, ``metrics``, ``tables``
        and ``recipes`` as :func:`memloc.records.record` has them, ``seconds`` (wall clock), ``device``, ``threads``,
        ``versions``, ``commit`` (None outside a checkout), ``module_sha256``, ``date``, ``node``. It lies in
        :func:`result_file`.

    Raises:
        CellError: If it fails or takes more than its memory.
        OSError: If the result cannot be written.
    """
    from filelock import FileLock

    locks = folder() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / cell.address):
        found = find(cell)
        if found is not None:
            return found
        marker = folder() / f"{cell.address}.running"
        _write(marker, {"node": platform.node(), "pid": os.getpid(), "since": time.time()})
        try:
            start = time.perf_counter()
            with _limited(cell.resources.memory_gb) as limit:
                try:
                    content = _execute(cell, root) if cell.chapter else _train(cell)
                except CellError as error:
                    if limit.is_exceeded:
                        took = f"memory_gb must cover what the cell takes, {limit.most_gb:.1f} GB when it was ended"
                        raise CellError(f"{took}, got {cell.resources.memory_gb:g}", error.details) from error
                    raise
            result = _provenance(cell, root) | content | {"seconds": round(time.perf_counter() - start, 2)}
            _write(result_file(cell), result)
            return result
        finally:
            marker.unlink(missing_ok=True)


def attempt(cell: Cell, root: Path) -> dict[str, Any]:
    """Run a cell; whatever it raises is an answer, so that the others go on.

    Args:
        cell: The cell.
        root: As for :func:`run`.

    Returns:
        ``result``, what :func:`run` gave; or ``error``, one line, and ``details``, the traceback.
    """
    try:
        return {"result": run(cell, root)}
    except Exception as error:  # chapters and trainings are other people's code
        details = error.details if isinstance(error, CellError) else "".join(traceback.format_exception(error))
        return {"error": " ".join(str(error).split()) or type(error).__name__, "details": details}


def _execute(cell: Cell, root: Path) -> dict[str, Any]:
    """Execute a chapter, if it is the one that the cell's address stands for."""
    if not is_current(cell, root):
        why = "was edited after the sweep was started, or is another one on this node: start the sweep again"
        raise CellError(f"chapter {cell.chapter!r} {why}", "")
    try:
        executed = chapters.execute(
            chapters.get(root, str(cell.chapter)), cell.values, root=root, threads=cell.resources.cpus
        )
    except chapters.ChapterError as error:
        raise CellError(str(error), error.traceback) from error
    notebook = json.loads(executed.read_text())
    content = records.recorded(notebook) or {"metrics": {}, "tables": {}, "recipes": []}
    about = notebook["metadata"]["memloc"]
    return {name: content[name] for name in ("metrics", "tables", "recipes")} | {"device": about["device"]}


def _train(cell: Cell) -> dict[str, Any]:
    """Train in a process of its own, which can be ended without harm to this one."""
    with tempfile.TemporaryDirectory(prefix="memloc-") as scratch:
        out = Path(scratch) / "result.json"
        threads = {f"{library}_NUM_THREADS": str(cell.resources.cpus) for library in ("OMP", "MKL", "OPENBLAS")}
        done = subprocess.run(
            [sys.executable, "-m", "memloc.cells", str(out)],
            input=json.dumps(cell.values),
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | threads,
        )
        if done.returncode or not out.is_file():
            said = chapters.plain(done.stderr)
            lines = said.strip().splitlines() or [f"the training ended with status {done.returncode}"]
            raise CellError(f"the training failed: {lines[-1]}", said)
        content: dict[str, Any] = json.loads(out.read_text())
        return content


def _child(out: Path) -> None:
    """Train what stdin names and write the last epoch; ends when the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    from dataclasses import asdict

    from memloc.recipes import Recipe
    from memloc.training import fit

    recipe = Recipe(**json.load(sys.stdin))
    run = fit(recipe, device="auto", progress=False)
    last = run.history.iloc[-1].drop("seconds")
    metrics = {str(name).replace("_", "-"): None if value != value else float(value) for name, value in last.items()}
    device = str(run.provenance["device"])
    content = {"metrics": metrics, "tables": {}, "recipes": [asdict(recipe)], "device": device}
    out.write_text(json.dumps(content, allow_nan=False))


def _provenance(cell: Cell, root: Path) -> dict[str, Any]:
    try:
        commit = records.commit(root)
    except ValueError:
        commit = None
    return {
        "address": cell.address,
        "chapter": cell.chapter,
        "preset": cell.preset,
        "parameters": cell.full,
        "threads": cell.resources.cpus,
        "versions": records.versions(),
        "commit": commit,
        "module_sha256": records.module_sha256(root, cell.chapter) if cell.chapter else None,
        "date": datetime.now(UTC).date().isoformat(),
        "node": platform.node(),
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write under a name that no other process uses, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, allow_nan=False))
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class _Limit:
    """The memory of all processes that this one starts from now on."""

    def __init__(self, memory_gb: float) -> None:
        import psutil

        self.memory_gb, self.most_gb, self.is_exceeded = memory_gb, 0.0, False
        self.over = threading.Event()
        self.process = psutil.Process()
        self.others = set(self.process.children(recursive=True))  # none of the cell's

    def watch(self) -> None:
        """Look at it until told that it is over; end the processes if they take too much."""
        import psutil

        took_s = 0.0
        while not self.over.wait(max(_LOOK_S, 20 * took_s)):  # a twentieth of a CPU, however many processes there are
            start = time.perf_counter()
            children = [child for child in self.process.children(recursive=True) if child not in self.others]
            used = 0
            for child in children:
                with suppress(psutil.Error):
                    memory = child.memory_info()
                    used += memory.rss - getattr(memory, "shared", 0)
            self.most_gb = max(self.most_gb, used / 1e9)
            if used > 1e9 * self.memory_gb:
                self.is_exceeded = True
                for child in children:
                    with suppress(psutil.Error):
                        child.kill()
            took_s = time.perf_counter() - start


@contextmanager
def _limited(memory_gb: float) -> Iterator[_Limit]:
    """End every process that is started in the block when all together take more memory than this."""
    limit = _Limit(memory_gb)
    watcher = threading.Thread(target=limit.watch, daemon=True)
    watcher.start()
    try:
        yield limit
    finally:
        limit.over.set()
        watcher.join()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
