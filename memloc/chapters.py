"""Chapters as notebooks: find, check and execute them, and read what they recorded.

A chapter is a page of ``_toc.yml`` with a kernelspec in its header. It calls ``glue``, ``record`` and
``results`` itself; the rest runs it.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import parameters, records
from memloc.pages import Chapter, ProjectError, find, get, pages, project_root, read_preset
from memloc.parameters import PARAMETERS, Parameter, ParameterError, Value
from memloc.progress import following
from memloc.records import Result, code_folder, glue, module_sha256, record, versions

if TYPE_CHECKING:
    import nbformat
    import pandas as pd

__all__ = [
    "PARAMETERS",
    "Chapter",
    "ChapterError",
    "MystHandler",
    "Parameter",
    "ParameterError",
    "ProjectError",
    "Result",
    "check",
    "execute",
    "find",
    "get",
    "glue",
    "last_executed",
    "pages",
    "plain",
    "project_root",
    "published",
    "read_notebook",
    "read_preset",
    "record",
    "results",
    "stderr_of",
]

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_KEPT_UNUSED_S = 7 * 24 * 3600.0  # an executed notebook that nobody asked for in so long is deleted


class ChapterError(RuntimeError):
    """A chapter whose cell failed.

    Attributes:
        chapter: The chapter's name.
        cell: The number of the cell, as in ``In [5]``; ``None`` when the kernel died.
        traceback: What Python said, without colours.
        notebook: The notebook as far as it came, for inspection.
    """

    def __init__(self, chapter: str, cell: int | None, traceback: str, notebook: Path) -> None:
        place = f"cell {cell} of chapter" if cell else "chapter"
        super().__init__(f"{place} {chapter!r} failed: {traceback.splitlines()[-1]}")
        self.chapter, self.cell, self.traceback, self.notebook = chapter, cell, traceback, notebook


def check(chapter: Chapter, values: Mapping[str, object]) -> dict[str, Value]:
    """Check values for a chapter before a kernel starts, and fill up with the chapter's own.

    Args:
        chapter: The chapter.
        values: Words from the command line, or typed values from YAML or Python.

    Returns:
        Every parameter of the chapter, typed.

    Raises:
        ParameterError: If a name is unknown or a value has the wrong type or range; one line, with the
            nearest name.
    """
    return parameters.check(chapter.name, chapter.parameters, values)


def results(name: str, root: Path | None = None) -> list[Result]:
    """Read what paper-size runs of a chapter measured.

    Args:
        name: The chapter's name.
        root: The folder with ``_toc.yml``; by default :func:`memloc.pages.project_root`.

    Returns:
        One result per file of ``book/results/<name>``; none where there is no clone of the book, as on Colab.
    """
    try:
        root = root or project_root()
    except ProjectError:
        return []
    return records.read(root / "book" / "results" / name, module_sha256(root, name))


def published(name: str, root: Path | None = None) -> "dict[str, pd.DataFrame]":
    """Read the numbers of a published figure that a chapter draws beside its own.

    Args:
        name: The chapter's name.
        root: The folder with ``_toc.yml``; by default :func:`memloc.pages.project_root`.

    Returns:
        The tables of ``book/published/<name>.json`` by name, whose ``source`` says where they come from; none where
        there is no clone of the book, as on Colab.
    """
    import pandas as pd

    try:
        path = (root or project_root()) / "book" / "published" / f"{name}.json"
    except ProjectError:
        return {}
    tables = json.loads(path.read_text())["tables"] if path.is_file() else {}
    return {key: pd.DataFrame(table["records"], columns=table["columns"]) for key, table in tables.items()}


def _key(chapter: Chapter, values: Mapping[str, Value], root: Path) -> str:
    """Hash all that an executed chapter depends on."""
    digest = hashlib.sha256(chapter.path.read_bytes())
    digest.update(json.dumps([dict(values), versions()]).encode())
    code = code_folder(root)
    for folder, files in (
        (code, sorted(code.rglob("*.py"))),
        (root, sorted((root / "book" / "results" / chapter.name).glob("*.json"))),
        (root, sorted((root / "book" / "published").glob(f"{chapter.name}.json"))),
        *((root, sorted(root.glob(pattern))) for pattern in chapter.reads),
    ):
        for file in files:
            digest.update(b"\0" + file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def read_notebook(path: Path) -> "nbformat.NotebookNode":
    """Read a chapter's MyST source as a notebook that papermill can run.

    Args:
        path: The source.

    Returns:
        The notebook: every cell with its tags and a number as its id, and the kernel's name.
    """
    import jupytext

    notebook = jupytext.read(path, fmt="md:myst")
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    return _numbered(notebook)


def _numbered(notebook: "nbformat.NotebookNode") -> "nbformat.NotebookNode":
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(
    chapter: Chapter,
    values: Mapping[str, object],
    *,
    root: Path,
    threads: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Execute a chapter in a kernel of its own, or find the notebook of an execution that is still true.

    The notebook is whole and true: it is written under another name and renamed, and its name holds a hash of
    the chapter's text, every parameter, the package's code, the recorded results and the versions. Two
    processes that ask for the same do it once.

    Args:
        chapter: The chapter.
        values: Parameters that differ from the chapter's own; checked before anything starts.
        root: The folder with ``_toc.yml``; the kernel works there.
        threads: Threads for OpenMP and MKL in the kernel.
        progress: Called, from another thread, with one line when a training has finished an epoch.

    Returns:
        The executed notebook, without machine paths or timestamps.

    Raises:
        ParameterError: If a value is refused.
        ChapterError: If a cell fails; its ``notebook`` shows how far it came.
    """
    from filelock import FileLock

    full = check(chapter, values)
    key = _key(chapter, full, root)
    whole = _executed_folder(root) / f"{chapter.name}-{key[:16]}.ipynb"
    whole.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(whole.with_suffix(".lock")):
        if not whole.is_file():
            about = {"chapter": chapter.name, "key": key, "parameters": full, "threads": threads}
            with following(progress):
                _run(chapter, whole, about | {"versions": versions()}, root)
        os.utime(whole)
    for old in whole.parent.iterdir():
        with suppress(FileNotFoundError):  # another process has renamed or deleted it
            if time.time() - old.stat().st_mtime > _KEPT_UNUSED_S:
                old.unlink()
    return whole


def _executed_folder(root: Path) -> Path:
    return root / "_build" / "executed"


def _run(chapter: Chapter, whole: Path, about: dict[str, Any], root: Path) -> None:
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    partial = whole.with_suffix(".partial.ipynb")
    failed = whole.with_name(f"{chapter.name}.failed.ipynb")
    changed = {name: value for name, value in about["parameters"].items() if value != chapter.parameters[name]}
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="memloc-") as sockets:
            notebook = papermill.execute_notebook(
                read_notebook(chapter.path),
                partial,
                changed,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=180,
                iopub_timeout=60,
                shutdown_kernel="immediate",
                kernel_manager_class=_kernel_manager(about["threads"], sockets),
                resources={"metadata": {"path": str(root)}},  # its cwd argument would move this whole process
            )
    except PapermillExecutionError as error:
        partial.replace(failed)
        text = plain("\n".join(error.traceback)) or f"{error.ename}: {error.evalue}"
        raise ChapterError(chapter.name, error.exec_count, text, failed) from error
    except RuntimeError as error:  # a DeadKernelError, or one that did not start
        partial.replace(failed)
        raise ChapterError(chapter.name, None, f"{error}: out of memory?", failed) from error
    device = (records.recorded(notebook) or {"device": "cpu"})["device"]
    notebook.metadata["memloc"] = about | {
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"cpu ({records.cpu()})" if device == "cpu" else device,
    }
    nbformat.write(_without_traces(notebook), partial)
    partial.replace(whole)


def plain(text: str) -> str:
    """Leave out colours, cursor movements and other control codes, which a terminal would obey.

    Args:
        text: Such as what a process wrote.

    Example:
        >>> plain("\x1b[31mred\x1b[0m\x1b[2J\x07")
        'red'
    """
    return _CONTROL.sub("", text)


def _kernel_manager(threads: int, sockets: str) -> type:
    """Make the class of a kernel that is this Python, listens on no network port and has so many threads."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    class Kernel(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # Without folders to search: a kernelspec python3 in the reader's home may be another Python.
            own_python = KernelSpecManager(kernel_dirs=[])
            super().__init__(transport="ipc", ip=f"{sockets}/kernel", kernel_spec_manager=own_python, **options)

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # declared a callable
            limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
            await super().start_kernel(env=os.environ | limits, **options)

    return Kernel


def _without_traces(notebook: "nbformat.NotebookNode") -> "nbformat.NotebookNode":
    """Remove paths, times and random ids, so that the same execution gives the same notebook."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for added in ("papermill", "execution"):
            cell.metadata.pop(added, None)
    return _numbered(notebook)


def last_executed(root: Path, chapter: Chapter) -> dict[str, Any] | None:
    """Return ``metadata.memloc`` of the chapter's newest execution as written, for its measured time.

    Args:
        root: The folder with ``_toc.yml``.
        chapter: The chapter.

    Returns:
        Chapter, key, parameters, threads, versions, seconds, date and device; ``None`` when it was not executed.
    """
    pattern = f"{chapter.name}-{'[0-9a-f]' * 16}.ipynb"
    for path in sorted(_executed_folder(root).glob(pattern), key=lambda path: -path.stat().st_mtime):
        about: dict[str, Any] = json.loads(path.read_text())["metadata"]["memloc"]
        if about["parameters"] == chapter.parameters:
            return about
    return None


def stderr_of(notebook: Path) -> str:
    """Return all that an executed chapter wrote to stderr; a good chapter writes nothing.

    Args:
        notebook: The executed notebook.

    Returns:
        The text of all cells together.
    """
    return "".join(
        "".join(output["text"])
        for cell in json.loads(notebook.read_text())["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stderr"
    )


class MystHandler:
    """Let stock papermill read a chapter: ``papermill myst://book/rewinding.md out.ipynb -p epochs 20``."""

    @staticmethod
    def read(path: str) -> str:
        """Return the chapter at ``myst://PATH`` as the JSON of a notebook."""
        import nbformat

        text: str = nbformat.writes(read_notebook(Path(path.removeprefix("myst://"))))
        return text

    @staticmethod
    def listdir(path: str) -> list[str]:
        """List the chapters in the folder at ``myst://PATH``."""
        return [f"myst://{file}" for file in sorted(Path(path.removeprefix("myst://")).glob("*.md"))]

    @staticmethod
    def write(buf: str, path: str) -> None:
        """Refuse: a chapter is a source."""
        raise PermissionError(f"{path} is a chapter's source: write the executed notebook to an .ipynb file")

    @staticmethod
    def pretty_path(path: str) -> str:
        """Return the path as it is shown in messages."""
        return path
