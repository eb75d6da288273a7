"""Run the cells of a grid on one machine or on a Ray cluster, so that faults cost as little as possible.

Ray only decides what runs where. What is done lies in the store of the trainings: a cell with a result is never run
again, and one that was cut off goes on from its last checkpoint, whatever became of the process that started it.
"""

import csv
import json
import os
import platform
import signal
import socket
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import memloc
from memloc import cells as cells_
from memloc import records
from memloc.grids import Cell
from memloc.progress import store
from memloc.recipes import Recipe

__all__ = [
    "RAY_SETTINGS",
    "Estimate",
    "Outcome",
    "Status",
    "SweepError",
    "done",
    "estimate",
    "keep",
    "sweep",
    "write_table",
]

RAY_SETTINGS: Mapping[str, str] = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
"""What Ray reads from the environment when it is imported and when it starts. Without the first its processes listen on
every interface, whatever address a node has; its own niceness of 15 starves cells beside any other work."""

_RETRIES = 3  # of a cell whose worker or node was lost
_CONNECT_S = 10  # until a cluster has to have answered
_PROBE_S = 120  # until a node has to have said what it sees
_SHARE_OF_GPU = 0.25
_LOST = ("WorkerCrashedError", "NodeDiedError", "ObjectLostError", "OwnerDiedError")


class SweepError(RuntimeError):
    """A sweep that cannot start or go on; the message is one line."""


@dataclass(frozen=True)
class Status:
    """How far a sweep is.

    Attributes:
        done: Cells with a result.
        running: Those at work: the cell's name, its node, and since when in seconds.
        failed: Cells that failed.
        waiting: The others.
        left_s: Seconds left, guessed from the cells of the same chapter that are done; None where none is done yet.
    """

    done: int
    running: list[tuple[str, str, float]]
    failed: int
    waiting: int
    left_s: float | None


@dataclass
class Outcome:
    """What became of every cell.

    Attributes:
        results: By address, what :func:`memloc.cells.run` gave.
        failures: By address, ``error`` (one line) and ``details`` (the traceback).
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def take(self, cell: Cell, answer: dict[str, Any]) -> None:
        """Take what :func:`memloc.cells.attempt` gave for a cell."""
        if "result" in answer:
            self.results[cell.address] = answer["result"]
        else:
            self.failures[cell.address] = answer


@dataclass(frozen=True)
class Estimate:
    """What there is to do.

    Attributes:
        done: Cells that have a result.
        todo: Cells that have none.
        seconds: Of all cells to do one after the other, as far as cells like them have been run; None if none has.
        unknown: Cells to do of which no like has been run.
    """

    done: int
    todo: int
    seconds: float | None
    unknown: int


def estimate(cells: Sequence[Cell]) -> Estimate:
    """Say how much of a sweep is done and how long the rest takes.

    A cell is like another if it differs in the seed alone; where there is none, in anything but the chapter.

    Args:
        cells: The sweep.

    Returns:
        The estimate.
    """
    alike, same_chapter = _durations()
    todo = [cell for cell in cells if cells_.find(cell) is None]
    known = [alike.get(_likeness(cell.chapter, cell.full)) or same_chapter.get(cell.chapter) for cell in todo]
    found = [statistics.median(seconds) for seconds in known if seconds]
    return Estimate(len(cells) - len(todo), len(todo), sum(found) if found else None, len(todo) - len(found))


def _likeness(chapter: str | None, parameters: Mapping[str, Any]) -> str:
    if chapter is None:
        parameters = asdict(Recipe(**parameters))  # whether typed or left at their defaults
    return json.dumps([chapter, {name: value for name, value in parameters.items() if name != "seed"}], sort_keys=True)


def _durations() -> tuple[dict[str, list[float]], dict[str | None, list[float]]]:
    """Read how long earlier cells took, by what makes them alike and by chapter."""
    alike: dict[str, list[float]] = {}
    same_chapter: dict[str | None, list[float]] = {}
    for path in cells_.folder().glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            content = json.loads(path.read_bytes())
            likeness, seconds = _likeness(content["chapter"], content["parameters"]), float(content["seconds"])
            same_chapter.setdefault(content["chapter"], []).append(seconds)
            alike.setdefault(likeness, []).append(seconds)
    return alike, same_chapter


def done(cells: Sequence[Cell]) -> Outcome:
    """Read what there is of a sweep, without running anything."""
    found = {cell.address: cells_.find(cell) for cell in cells}
    return Outcome({address: result for address, result in found.items() if result is not None})


def sweep(
    cells: Sequence[Cell],
    *,
    root: Path,
    address: str | None = None,
    workers: int | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> Outcome:
    """Run every cell that has no result yet.

    Args:
        cells: From :func:`memloc.grids.read_spec` or :func:`memloc.grids.from_words`.
        root: The folder with ``_toc.yml``, at the same path on all nodes.
        address: Of a Ray cluster; None starts Ray on this machine alone, listening on the loopback interface.
        workers: CPUs to use of this machine; None takes all. Not with ``address``.
        show: Called about every second.

    Returns:
        Results and failures; a failing cell does not stop the others.

    Raises:
        SweepError: If Ray is not there, a node does not see the same store or package, a cell needs more than any node
            has, or the store is lost.
    """
    outcome = done(cells)
    todo = [cell for cell in cells if cell.address not in outcome.results]
    if not todo:
        return outcome
    where = {"MEMLOC_RUNS": str(store().absolute())}
    if "MEMLOC_DATA" in os.environ:
        where["MEMLOC_DATA"] = str(Path(os.environ["MEMLOC_DATA"]).expanduser().absolute())
    data = sorted({str(cell.full.get("dataset", "digits")) for cell in todo} - {"digits"})  # which comes with memloc
    with _same_store() as token, _cluster(address, workers) as ray:
        _check_nodes(ray, token, where, data)
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        needs = [_needs(cell, has_gpu) for cell in todo]
        _check_room(ray, todo, needs)
        task = ray.remote(_work)
        pending = {
            task.options(**need, max_retries=_RETRIES).remote(cell.to_json(), str(root), where): cell
            for cell, need in zip(todo, needs, strict=True)
        }
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=1.0)  # all that end in a second
            if not token.is_file():
                raise SweepError(f"the store {store()} is gone: bring it back and start the sweep again")
            for reference in ready:
                outcome.take(pending.pop(reference), _answer(ray, reference))
            show(_status(cells, outcome))
    return outcome


def _work(content: Mapping[str, Any], root: str, where: Mapping[str, str]) -> dict[str, Any]:
    """Run one cell in a worker of Ray, which repeats lost workers alone."""
    os.environ |= where
    if not Path(where["MEMLOC_RUNS"]).is_dir():
        return {"error": f"the store {where['MEMLOC_RUNS']} is not there", "details": ""}
    return cells_.attempt(Cell.from_json(content), Path(root))


def _answer(ray: Any, reference: Any) -> dict[str, Any]:
    """Take what a task says."""
    try:
        answer: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        lost = type(error).__name__ in _LOST
        why = f"its worker was lost {_RETRIES + 1} times" if lost else " ".join(str(error).split())
        return {"error": why, "details": str(error)}
    return answer


@contextmanager
def _same_store() -> Iterator[Path]:
    """Put a file into the store that every node has to see."""
    cells_.folder().mkdir(parents=True, exist_ok=True)
    token = cells_.folder().absolute() / f".sweep-{uuid.uuid4().hex}"
    token.write_text(memloc.__version__)
    try:
        yield token
    finally:
        with suppress(OSError):
            token.unlink(missing_ok=True)


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """Connect to a cluster, or start Ray on this machine; what was started is ended."""
    if address is not None:
        _check_address(address)
    os.environ |= RAY_SETTINGS
    try:
        import ray
    except ImportError as error:
        raise SweepError("sweeps need Ray, the extra memloc[sweep]: pip install -e '.[sweep]' in the clone") from error
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            here: dict[str, Any] = {
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                "object_store_memory": 100_000_000,
            }
            ray.init("local", num_cpus=workers, **here, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        hint = " (a cluster that asks for a token needs RAY_AUTH_MODE=token here)" if address else ""
        raise SweepError(f"Ray could not be started or reached: {' '.join(str(error).split())}{hint}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # in place of Ray's own, which dumps its stack
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse at once what Ray would wait for."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or not host or "/" in host or not port.isdecimal():
        raise SweepError(f"--address must be HOST:PORT of a Ray cluster, or auto on one of its nodes, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise SweepError(f"nothing answers at {address} ({error}): start Ray there, or look at its address") from error


def _probe(token: str, version: str, where: Mapping[str, str], data: Sequence[str]) -> str | None:
    """Say what is wrong with this node, if anything."""
    os.environ |= where
    if not Path(token).is_file():
        return f"does not see the store {Path(token).parents[1]}: put it on a file system that all nodes share"
    if memloc.__version__ != version:
        return f"has memloc {memloc.__version__}, not {version}: install the same on all nodes"
    for name in data:
        from memloc import datasets

        try:
            datasets.read(name)
        except (OSError, ValueError) as error:
            return f"cannot read its data: {error}"
    return None


def _check_nodes(ray: Any, token: Path, where: Mapping[str, str], data: Sequence[str]) -> None:
    """Ask every node whether it sees the store and the data and has the same package."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked = ray.remote(_probe), {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"scheduling_strategy": there, "num_cpus": 0}
            asked[task.options(**options).remote(str(token), memloc.__version__, where, data)] = node
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_S)
    problems = [(asked[reference], "does not answer: look at its log") for reference in late]
    for reference in ready:
        try:
            problem = ray.get(reference)
        except ray.exceptions.RayError as error:
            problem = f"cannot run memloc ({str(error).strip().splitlines()[-1]}): install it there"
        if problem:
            problems.append((asked[reference], problem))
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for node, problem in problems:
        if node["NodeID"] not in alive:  # it died, and Ray has noticed since
            continue
        raise SweepError(f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) {problem}")


def _needs(cell: Cell, has_gpu: bool) -> dict[str, float]:
    """Say what a cell needs, in Ray's words."""
    gpus = cell.resources.gpus
    if gpus is None:
        gpus = _SHARE_OF_GPU if has_gpu and cell.device in ("auto", "cuda") else 0
    return {"num_cpus": cell.resources.cpus, "num_gpus": gpus, "memory": int(1e9 * cell.resources.memory_gb)}


def _check_room(ray: Any, cells: Sequence[Cell], needs: Sequence[Mapping[str, float]]) -> None:
    """Refuse a cell that would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    units = {"num_cpus": ("CPU", "cpus", 1.0), "num_gpus": ("GPU", "gpus", 1.0), "memory": ("memory", "memory_gb", 1e9)}
    for cell, need in zip(cells, needs, strict=True):
        if any(all(need[key] <= node.get(name, 0) for key, (name, _, _) in units.items()) for node in nodes):
            continue
        wanted = ", ".join(f"{label} {need[key] / unit:g}" for key, (_, label, unit) in units.items())
        most = "; ".join(
            ", ".join(f"{label} {node.get(name, 0) / unit:.3g}" for name, label, unit in units.values())
            for node in nodes
        )
        raise SweepError(f"no node has room for a cell of {cell.name} with {wanted}: the nodes have {most}")


def _status(cells: Sequence[Cell], outcome: Outcome) -> Status:
    """Count; what runs is read from the marks that cells leave in the store."""
    import psutil

    seconds: dict[str, list[float]] = {}
    left = {}
    for cell in cells:
        if cell.address in outcome.results:
            seconds.setdefault(cell.name, []).append(outcome.results[cell.address]["seconds"])
        elif cell.address not in outcome.failures:
            left[cell.address] = cell.name
    running = []
    for path in cells_.folder().glob("*.running"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            mark = json.loads(path.read_text())
            is_left = mark["node"] == platform.node() and not psutil.pid_exists(mark["pid"])  # by one that was killed
            if path.stem in left and not is_left:
                running.append((left[path.stem], mark["node"], max(0.0, time.time() - mark["since"])))
    usual = {name: statistics.median(each) for name, each in seconds.items()}
    other = statistics.median(usual.values()) if usual else 0.0
    one_by_one = sum(usual.get(name, other) for name in left.values())
    left_s = one_by_one / max(1, len(running)) if usual else None
    return Status(len(outcome.results), running, len(outcome.failures), len(left) - len(running), left_s)


def keep(root: Path, name: str, cells: Sequence[Cell], outcome: Outcome, command: str) -> Path:
    """Write what a sweep found to ``book/results/sweeps/<name>.json``.

    Args:
        root: The folder with ``_toc.yml``, a git checkout.
        name: The grid's name.
        cells: The sweep.
        outcome: What became of it.
        command: What was typed.

    Returns:
        The file: ``command``, ``commit`` and ``date`` of the record; ``missing``, the number of cells without a result;
        ``cells``, of each that has one its parameters, on which commit, device and with what it ran, its
        ``seconds`` and ``metrics``.

    Raises:
        ValueError: If the folder is not a git checkout.
    """
    rows = []
    for cell in cells:
        if cell.address in outcome.results:
            result = outcome.results[cell.address]
            about = {name: result.get(name) for name in ("commit", "device", "threads", "versions", "seconds")}
            metrics = {name: value for name, value in result["metrics"].items() if name not in ("claim", "paper")}
            rows.append(
                {"chapter": cell.name, "preset": cell.preset, "parameters": cell.full, **about} | {"metrics": metrics}
            )
    content = {
        "command": command,
        "commit": records.commit(root),
        "date": datetime.now(UTC).date().isoformat(),
        "missing": len(cells) - len(rows),
        "cells": rows,
    }
    return records.write_result(root, "sweeps", name, content)


def write_table(path: Path, cells: Sequence[Cell], outcome: Outcome) -> None:
    """Write one tidy table of a sweep: a row for each cell and metric, and one for a cell without result or metrics.

    Columns are ``address``, ``chapter`` (``training`` for a training), ``preset``, each parameter that is not the same
    in all cells that have it, ``status`` (``done``, ``failed`` or ``waiting``), ``metric``, ``value``.

    Args:
        path: A CSV file; it is written under another name and renamed.
        cells: The sweep.
        outcome: What became of it.

    Raises:
        OSError: If it cannot be written.
    """
    seen: dict[str, set[str]] = {}
    for cell in cells:
        for name, value in cell.full.items():
            seen.setdefault(name, set()).add(json.dumps(value))
    counts = Counter(name for cell in cells for name in cell.full)
    varied = [name for name, values in seen.items() if len(values) > 1 or counts[name] < len(cells)]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["address", "chapter", "preset", *varied, "status", "metric", "value"])
            for cell in cells:
                result = outcome.results.get(cell.address)
                status = "done" if result else "failed" if cell.address in outcome.failures else "waiting"
                start = [cell.address, cell.name, cell.preset, *(cell.full.get(name) for name in varied), status]
                for metric, value in ((result or {}).get("metrics") or {None: None}).items():
                    writer.writerow([*start, metric, value])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
