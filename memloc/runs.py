"""Where a training lives on disk: one folder a run, written so that nothing half-done is ever taken for whole.

A run's folder is named after its address, a hash of the recipe. While it trains, the folder ends in ``.partial`` and
holds what is needed to go on after an interruption; when it is whole, it is renamed. Weights and tables are
safetensors and the rest is JSON, so nothing in a run can execute code, and every tensor file is checked against the
SHA-256 that was noted when it was written.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import filelock
import pandas as pd
import platformdirs
import safetensors.torch
from torch import Tensor

__all__ = ["Run", "RunInfo", "address", "addresses", "delete", "find", "listing", "locked", "root"]


Read = TypeVar("Read")


def root() -> Path:
    """Return the folder of all runs: ``$MEMLOC_RUNS``, else one in the platform's cache folder."""
    return Path(os.environ.get("MEMLOC_RUNS") or platformdirs.user_cache_path("memloc") / "runs").expanduser()


def address(recipe: Mapping[str, Any], version: int) -> str:
    """Compute the name under which a training is kept.

    Args:
        recipe: What decides the training and differs from the defaults, as JSON values. (So a new field whose default
            is the old behaviour leaves old addresses alone.)
        version: Version of the training loop.

    Returns:
        16 hexadecimal digits of the SHA-256 of both.

    Example:
        >>> address({"seed": 1}, 1) == address({"seed": 2}, 1)
        False
    """
    return hashlib.sha256(json.dumps([version, recipe], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A finished training on disk.

    Attributes:
        folder: Where it lives.
        recipe: The recipe it was trained from.
        provenance: How it was trained: device, seconds, versions.
    """

    folder: Path
    recipe: Any
    provenance: dict[str, Any]
    _hashes: dict[str, str] = field(repr=False)

    @property
    def address(self) -> str:
        """The name under which the run is kept."""
        return self.folder.name

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch, from 0 (the initial weights), with loss, accuracies (fractions) and seconds."""
        rows = _patiently(lambda: _read_json(self.folder / "history.json", "rows"))["rows"]
        return pd.DataFrame(rows).astype(float).astype({"epoch": int})  # JSON has null for NaN

    @property
    def epochs(self) -> list[int]:
        """The epochs whose weights were kept, ascending."""
        return _saved_epochs(self._hashes)

    @property
    def tables(self) -> list[str]:
        """The names of the observers whose tables were kept."""
        return [name.removesuffix(".safetensors") for name in self._hashes if not name.startswith("epoch_")]

    def checkpoint(self, epoch: int) -> dict[str, Tensor]:
        """Read the weights and buffers after one epoch.

        Args:
            epoch: 0 for the initial weights.

        Returns:
            The state dict, on the CPU.

        Raises:
            KeyError: If that epoch was not kept.
            OSError: If the file is not what was written.
        """
        if epoch not in self.epochs:
            raise KeyError(f"epoch {epoch} of run {self.address} was not kept, epochs {self.epochs} were")
        return _patiently(lambda: _read_tensors(self.folder, _checkpoint_name(epoch), self._hashes))

    def table(self, name: str) -> dict[str, Tensor]:
        """Read what an observer of the training left.

        Args:
            name: The observer's name, e.g. ``"predictions"``.

        Returns:
            Its tensors, on the CPU.

        Raises:
            KeyError: If no observer of that name watched the training.
            OSError: If the file is not what was written.
        """
        if f"{name}.safetensors" not in self._hashes:
            raise KeyError(f"run {self.address} has no table {name!r}: pass the observer to fit()")
        return _patiently(lambda: _read_tensors(self.folder, f"{name}.safetensors", self._hashes))


@dataclass(frozen=True)
class RunInfo:
    """One line of the list of runs, finished or not.

    Attributes:
        address: The name under which it is kept.
        recipe: The recipe, as JSON values.
        epochs_done: Epochs trained so far.
        epochs: Epochs it was asked for.
        is_whole: Whether the training has ended.
        size_bytes: Size of its folder.
        modified: When it was last written, in seconds since 1970.
    """

    address: str
    recipe: dict[str, Any]
    epochs_done: int
    epochs: int
    is_whole: bool
    size_bytes: int
    modified: float


def listing() -> list[RunInfo]:
    """List the runs on disk, the newest first.

    Raises:
        OSError: If a run is damaged; the message says how to delete it.
    """
    infos = []
    for folder in _folders():
        try:
            infos.append(_info(folder))
        except OSError:
            if (folder / "history.json").exists():
                raise  # else its first epoch is not over, or it was renamed or deleted since it was found
    return sorted(infos, key=lambda info: -info.modified)


def addresses() -> list[str]:
    """List the names of all runs on disk, finished or not, damaged ones too."""
    return sorted({folder.name.removesuffix(".partial") for folder in _folders()})


def _folders() -> list[Path]:
    """Find the folders of runs; whatever else lies in the store is none of ours."""
    folders = {path.parent for name in ("recipe.json", "history.json") for path in root().glob(f"*/{name}")}
    return [folder for folder in folders if folder.name.removesuffix(".partial").isalnum()]


def _info(folder: Path) -> RunInfo:
    history = _read_json(folder / "history.json", "rows", "epochs")
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a training replaces its files while we look
            files.append(path.stat())
    return RunInfo(
        address=folder.name.removesuffix(".partial"),
        recipe=_read_json(folder / "recipe.json"),
        epochs_done=len(history["rows"]) - 1,
        epochs=history["epochs"],
        is_whole=folder.suffix != ".partial",
        size_bytes=sum(file.st_size for file in files),
        modified=max(file.st_mtime for file in files),
    )


def delete(address: str) -> int:
    """Delete a run, finished or not, damaged or not.

    Args:
        address: Its name, as :func:`addresses` gives it.

    Returns:
        Bytes that were freed.

    Raises:
        KeyError: If there is no such run.
        BlockingIOError: If a process is training it now.
    """
    folders = [root() / f"{address}{suffix}" for suffix in ("", ".partial", ".old")]
    if not address.isalnum() or not any(folder.is_dir() for folder in folders):
        raise KeyError(f"no run {address!r} in {root()}: memloc runs lists them")
    try:
        with locked(address, wait=False):
            size_bytes = sum(path.stat().st_size for folder in folders for path in folder.glob("*"))
            for folder in folders:
                _remove(folder)
    except filelock.Timeout as error:
        raise BlockingIOError(f"run {address} is being trained by a process: end that first") from error
    return size_bytes


@contextmanager
def locked(address: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a run against all other processes; whoever comes second waits. A killed process lets go.

    A store that this process cannot write is read without a lock.
    """
    if root().is_dir() and not os.access(root(), os.W_OK):
        yield
        return
    folder = root() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / address, blocking=wait):
        yield


def find(address: str, recipe: Any) -> Run | None:
    """Find a finished run.

    Args:
        address: Its name.
        recipe: The recipe it was trained from, kept in the result.

    Returns:
        The run, or None where there is none.

    Raises:
        OSError: If the run is there and cannot be read.
    """
    folder = root() / address
    if not (folder / "done").exists():
        return None
    done = _read_json(folder / "done", "files", "provenance")
    return Run(folder, recipe, done["provenance"], done["files"])


class Writer:
    """An unfinished run on disk: kept epoch by epoch, taken up again, finished.

    Every file is written under a temporary name and renamed. ``progress.json`` comes last in each epoch and names the
    files that belong to it with their hashes, so a kill at any moment leaves the epoch before it whole.

    Args:
        address: Name under which the run will be kept.
        recipe: The recipe, a dataclass of JSON values with a field ``epochs``.
    """

    def __init__(self, address: str, recipe: Any):
        self._final = root() / address
        self._folder = root() / f"{address}.partial"
        self._old = root() / f"{address}.old"
        self._recipe = recipe
        self._files: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def resume(self, tables: set[str], epochs: set[int]) -> dict[str, Tensor] | None:
        """Take up what an interrupted training left.

        Args:
            tables: Names of the observers' tables that the finished run must have.
            epochs: Epochs whose weights the finished run must have.

        Returns:
            The tensors given to the last :meth:`keep`, or None where there is nothing that serves: then whatever was
            there is gone and the training starts anew.

        Raises:
            OSError: If what is there is not what was written.
        """
        for path in self._folder.glob(".*"):
            path.unlink()  # what a process was writing when it was killed
        state = self._read(tables, epochs)
        if state is None:
            _remove(self._folder)
            _remove(self._old)
            self._folder.mkdir(parents=True)
            _write(self._folder / "recipe.json", _json(asdict(self._recipe)))
        return state

    def _read(self, tables: set[str], epochs: set[int]) -> dict[str, Tensor] | None:
        """Read what an interrupted training left, if it serves."""
        if (self._folder / "progress.json").exists():
            progress = _read_json(self._folder / "progress.json", "files", "rows", "tables")
            reached = progress["rows"][-1]["epoch"]
            saved = set(_saved_epochs(progress["files"]))
            if tables <= set(progress["tables"]) and {e for e in epochs if e <= reached} <= saved:
                self._files, self.rows = progress["files"], progress["rows"]
                return _read_tensors(self._folder, f"resume_{reached:03d}.safetensors", self._files)
        return None

    def keep(
        self,
        row: dict[str, Any],
        resume: dict[str, Tensor],
        tables: set[str],
        checkpoint: dict[str, Tensor] | None = None,
    ) -> None:
        """Keep one more epoch.

        Args:
            row: The epoch's line of the history; ``row["epoch"]`` numbers it.
            resume: All that the next epoch needs.
            tables: Names of the observers whose tables ``resume`` carries.
            checkpoint: Weights and buffers, if this epoch's are wanted.
        """
        epoch = row["epoch"]
        stale = [name for name in self._files if name.startswith("resume_")]
        self.rows.append({name: value if math.isfinite(value) else None for name, value in row.items()})
        self._add(f"resume_{epoch:03d}.safetensors", resume)
        if checkpoint is not None:
            self._add(_checkpoint_name(epoch), checkpoint)
        for name in stale:
            del self._files[name]
        progress = {"files": self._files, "rows": self.rows, "tables": sorted(tables)}
        _write(self._folder / "history.json", _json({"epochs": self._recipe.epochs, "rows": self.rows}))
        _write(self._folder / "progress.json", _json(progress))
        for name in stale:
            (self._folder / name).unlink(missing_ok=True)

    def finish(self, tables: Mapping[str, dict[str, Tensor]], provenance: dict[str, Any]) -> Run:
        """Write the observers' tables and let the run take its final name.

        Args:
            tables: Tensors by observer's name.
            provenance: How the run was trained, as JSON values; the seconds are added.

        Returns:
            The run.
        """
        for name, tensors in tables.items():
            self._add(f"{name}.safetensors", tensors)
        kept = {name: digest for name, digest in self._files.items() if not name.startswith("resume_")}
        provenance = provenance | {"seconds": sum(row["seconds"] for row in self.rows)}
        _write(self._folder / "done", _json({"files": kept, "provenance": provenance}))
        if self._final.is_dir():  # set aside first: a process that reads it is without it for a moment only
            self._final.rename(self._old)
        self._folder.rename(self._final)
        _remove(self._old)
        for path in [*self._final.glob("resume_*"), self._final / "progress.json"]:
            path.unlink(missing_ok=True)
        return Run(self._final, self._recipe, provenance, kept)

    def _add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        # Copies, because safetensors refuses tensors that share memory, as tied weights do.
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        content = safetensors.torch.save(copies, {"order": json.dumps(list(copies))})
        _write(self._folder / name, content)
        self._files[name] = hashlib.sha256(content).hexdigest()


class Follower(Writer):
    """The same for a process that trains along with the one that writes: it reads, and leaves every file alone.

    Each of its methods is to be called when that of the writer has returned.
    """

    def resume(self, tables: set[str], epochs: set[int]) -> dict[str, Tensor] | None:
        """Take up the same.

        Raises:
            OSError: If the writer's files cannot be seen from here.
        """
        if not self._folder.is_dir():
            raise self._unseen(self._folder)
        return self._read(tables, epochs)

    def keep(
        self,
        row: dict[str, Any],
        resume: dict[str, Tensor],
        tables: set[str],
        checkpoint: dict[str, Tensor] | None = None,
    ) -> None:
        """Leave it to the writer."""

    def finish(self, tables: Mapping[str, dict[str, Tensor]], provenance: dict[str, Any]) -> Run:
        """Find what the writer has finished.

        Raises:
            OSError: If the writer's files cannot be seen from here.
        """
        run = find(self._final.name, self._recipe)
        if run is None:
            raise self._unseen(self._final)
        return run

    def _unseen(self, folder: Path) -> OSError:
        return OSError(f"{folder} is not there: let $MEMLOC_RUNS be one folder that all processes of a training share")


def _checkpoint_name(epoch: int) -> str:
    return f"epoch_{epoch:03d}.safetensors"


def _saved_epochs(files: Mapping[str, str]) -> list[int]:
    """Read the epochs off the names of a run's files."""
    names = (name.removesuffix(".safetensors") for name in files if name.startswith("epoch_"))
    return sorted(int(name.removeprefix("epoch_")) for name in names)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(
            f"{path} could not be written ({error.strerror}): make room for it, then train again; what was kept is used"
        ) from error


def _remove(folder: Path) -> None:
    """Remove a run's folder; ``done`` goes first, so that a kill on the way leaves no run behind."""
    if folder.is_dir():
        (folder / "done").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _damaged(path: Path, reason: str) -> OSError:
    run = path.parent.name.removesuffix(".partial")
    return OSError(f"{path} {reason}: run `memloc runs delete {run}`, then train again")


def _patiently(read: Callable[[], Read]) -> Read:
    """Read a file of a finished run, which may be about to be replaced: it was trained again, with more observers."""
    for _ in range(10):
        with suppress(OSError):
            return read()
        time.sleep(0.05)
    return read()


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that must have these keys."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(path, "is missing or damaged") from error
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise _damaged(path, "is missing or damaged")
    return value


def _read_tensors(folder: Path, name: str, hashes: Mapping[str, str]) -> dict[str, Tensor]:
    """Read a tensor file of a run, after checking that it is what was written."""
    path = folder / name
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != hashes.get(name):
        raise _damaged(path, "is missing or damaged (its SHA-256 is not the one noted when it was written)")
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise _damaged(path, "is not a safetensors file") from error
    return {name: tensors[name] for name in _order(content) or sorted(tensors)}


def _order(content: bytes) -> list[str]:
    """Read in which order the tensors of a file were given; safetensors itself gives them in any."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    order: list[str] = json.loads(header.get("__metadata__", {}).get("order", "[]"))
    return order
