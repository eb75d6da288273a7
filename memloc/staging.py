"""What Sphinx reads: the pages, executed notebooks in the place of the chapters, and the tables that a build makes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from memloc import chapters, records

PACKAGE = Path(__file__).parent

# Modules that run the book; the reference has them after those that a reader imports.
_MACHINERY = {"book", "chapters", "cli", "notebooks", "pages", "parameters", "progress", "records", "staging"}
_REPOSITORY = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


class BookError(RuntimeError):
    """A book that cannot be built.

    The message is one line that names a page and what is wrong with it. ``details`` holds every cause, if there are
    more, or more to say about it.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def stage(root: Path, executed: Mapping[str, Path]) -> dict[str, bytes]:
    """Put together what Sphinx reads.

    Args:
        root: The folder with ``_toc.yml``.
        executed: The executed notebook of each chapter.

    Returns:
        The content of each file, by its path in the stage. Where a page has a marker such as ``<!-- status -->``, the
        table of that name stands instead, and links to a chapter's source lead to its notebook.

    Raises:
        BookError: If ``repository.url`` is not an address on GitHub, or a chapter's record cannot be shown.
    """
    found = chapters.find(root)
    notebook_of = {found[name].path: _for_sphinx(notebook) for name, notebook in executed.items()}
    links = re.compile(rf"\]\(({'|'.join(map(re.escape, found))})\.md\b")
    files = {"_toc.yml": (root / "_toc.yml").read_bytes(), "_config.yml": _config(root)}
    for page in chapters.pages(root):
        source = root / f"{page}.md"
        text = notebook_of[source] if source in notebook_of else source.read_text()
        for marker, table in TABLES.items():
            if f"<!-- {marker} -->" in text:
                text = text.replace(f"<!-- {marker} -->", table(root, executed))
        suffix = ".ipynb" if source in notebook_of else ".md"
        files[page + suffix] = links.sub(r"](\1.ipynb", text).encode()
    beside = [path for name in ("_static", "recipes") for path in (root / "book" / name).rglob("*")]
    for path in [root / "book" / "references.bib", *beside]:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files


def _for_sphinx(notebook: Path) -> str:
    return json.dumps(records.hide_glued(json.loads(notebook.read_text())))


def repository(root: Path) -> str:
    """Read the address that the book is published from, ``repository.url`` in ``_config.yml``.

    Args:
        root: The folder with ``_config.yml``.

    Returns:
        The address without a slash at its end; empty while none is set.

    Raises:
        BookError: If it is not of the form ``https://github.com/OWNER/NAME``, which Colab and Binder need.
    """
    config = yaml.safe_load((root / "_config.yml").read_text())
    url = str(config["repository"]["url"] or "").rstrip("/")
    if url and not _REPOSITORY.fullmatch(url):
        raise BookError(f"_config.yml: repository.url must be https://github.com/OWNER/NAME or empty, got {url!r}")
    return url


def _config(root: Path) -> bytes:
    """The settings as Sphinx gets them: buttons only where there is a repository that they can open."""
    config = yaml.safe_load((root / "_config.yml").read_text())
    url = config["repository"]["url"] = repository(root)
    config["html"]["use_repository_button"] = bool(url)
    if not url:
        del config["launch_buttons"]
    return yaml.safe_dump(config).encode()


def scoreboard(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the table of claims: what the paper says, what this build found, and what runs on real data found.

    A chapter is in it when it recorded a ``verdict``; then it has to have recorded ``claim`` and ``paper`` as well.

    Args:
        root: The folder with ``_toc.yml``.
        executed: The executed notebook of each chapter.

    Returns:
        A Markdown table, one row for each claim.

    Raises:
        BookError: If a chapter recorded a verdict and does not say on what.
    """
    rows = []
    for name, chapter in chapters.find(root).items():
        metrics = recorded_metrics(executed[name])
        if "verdict" not in metrics:
            continue
        absent = [key for key in ("claim", "paper") if key not in metrics]
        if absent:
            raise BookError(f"book/{name}.md records a verdict but no {' and no '.join(absent)}: add it to record(…)")
        real = [
            _verdict(result.metrics, result.provenance["parameters"])
            + " (the method has changed since)" * result.is_stale
            for result in chapters.results(name, root)
        ]
        rows.append(
            [
                f"{metrics['claim']} [{chapter.title}]({name}.md)",
                _verdict(metrics, chapter.parameters),
                "<br>".join(real) or "not run yet",
                str(metrics["paper"]),
            ]
        )
    return _table(["Claim", "This build", "Recorded runs", "The paper says"], rows)


def _verdict(metrics: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """A verdict and what it was found on: data, number of examples, network, seeds."""
    parts = [parameters.get("dataset", "generated data")]
    if "examples" in parameters:
        parts.append(f"{parameters['examples']:,} examples" if parameters["examples"] else "all examples")
    if "drawn_examples" in parameters:
        parts.append(f"{parameters['drawn_examples']:,} examples")
    parts.append(parameters.get("model"))
    if parameters.get("width"):
        parts.append(f"width {parameters['width']}")
    seeds = parameters.get("seeds", 1)
    parts.append("1 seed" if seeds == 1 else f"{seeds} seeds")
    return f"**{metrics.get('verdict', 'no verdict')}**: " + ", ".join(part for part in parts if part)


def status(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the tables of the status page out of what the executed notebooks say about their execution.

    Args:
        root: The folder with ``_toc.yml``.
        executed: The executed notebook of each chapter.

    Returns:
        Markdown: seconds, device and day of each chapter, and the versions of what computed and rendered the book.
    """
    rows, versions = [], {"jupyter-book": metadata.version("jupyter-book")}
    for name, chapter in chapters.find(root).items():
        about = json.loads(executed[name].read_text())["metadata"]["memloc"]
        rows.append([f"[{chapter.title}]({name}.md)", f"{about['seconds']:.1f}", about["device"], about["date"]])
        versions |= about["versions"]
    return "\n\n".join(
        [
            _table(["Chapter", "Seconds", "Device", "Executed on"], rows),
            _table(["Made with", "Version"], [[tool, versions[tool]] for tool in sorted(versions)]),
        ]
    )


def benchmarks(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the table of the timings that ``benchmarks/record.py`` has kept.

    Args:
        root: The folder with ``_toc.yml``.
        executed: Not used.

    Returns:
        A Markdown table, one row for each ratio, or a sentence where nothing has been kept.
    """
    rows = []
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text())
        where = [found["machine"], found["date"], found["commit"][:7]]
        rows += [[path.stem, f"`{name}`", f"{value:g}", *where] for name, value in found["ratios"].items()]
    return _table(["Benchmark", "Ratio", "Value", "Machine", "Date", "Commit"], rows) if rows else "None was kept yet."


def modules(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the reference of the package: a table of its public modules, and the docstrings of each.

    Args:
        root: Not used: the reference is that of the package which runs.
        executed: Not used.

    Returns:
        Markdown, one section for each module whose name has no underscore in front.
    """
    rows, sections = [], []
    for path in sorted(PACKAGE.glob("[!_]*.py"), key=lambda path: (path.stem in _MACHINERY, path.stem)):
        summary, _, _ = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")
        rows.append([f"[memloc.{path.stem}](api-{path.stem})", summary.replace("\n", " ")])
        directive = f"```{{eval-rst}}\n.. automodule:: memloc.{path.stem}\n```"
        sections.append(f"(api-{path.stem})=\n## memloc.{path.stem}\n\n{directive}")
    return "\n\n".join([_table(["Module", "What it is for"], rows), *sections])


TABLES = {"scoreboard": scoreboard, "status": status, "benchmarks": benchmarks, "modules": modules}
"""What stands in the place of a marker such as ``<!-- status -->`` on a page."""


def recorded_metrics(notebook: Path) -> dict[str, Any]:
    """Read the metrics that a chapter recorded.

    Args:
        notebook: Its executed notebook.

    Returns:
        Numbers and words by name; none when it recorded nothing.
    """
    found = records.recorded(json.loads(notebook.read_text()))
    return found["metrics"] if found else {}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
