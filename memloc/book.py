"""From executed chapters to the book: fill in what the build knows, render strictly, check what came out.

Chapters are executed by papermill (:mod:`memloc.chapters`). Sphinx is given the executed notebooks in the place of
their sources, in a tree of its own under ``_build/stage``, so that it starts no kernel and reads nothing else.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from html.parser import HTMLParser
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from memloc import chapters, records

MATHJAX_USED = ("tex-chtml.js", "output/chtml/fonts/")  # of the 24 MB that sphinx-mathjax-offline copies
PACKAGE = Path(__file__).parent
DIGEST = "book.sha256"  # beside the pages: what they were made from

_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # the package has no __main__
_REPOSITORY = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


class BookError(RuntimeError):
    """The book could not be built.

    Args:
        message: One line that names the page and the cause.
        details: Every cause, one line each, where there is more than one.
    """

    def __init__(self, message: str, details: Iterable[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


def build(root: Path, *, jobs: int = 2, progress: Callable[[str], None] | None = None) -> Path:
    """Build the whole book: execute what changed, render it with warnings as errors, and check every page.

    Nothing is executed, and nothing rendered, when nothing changed. A build that fails leaves no book behind that could
    be taken for the new one.

    Args:
        root: The project's folder, which holds ``_toc.yml`` and ``_config.yml``.
        jobs: How many chapters are executed side by side, each on one thread.
        progress: Called with one line whenever a step is done.

    Returns:
        The page to open, ``_build/html/index.html``.

    Raises:
        BookError: If a page of ``_toc.yml`` is missing, a chapter fails, Sphinx warns, or a figure has no sentence as its
            alt text.
    """
    root = root.resolve()
    tell = progress or (lambda line: None)
    html = root / "_build" / "html"
    html.parent.mkdir(exist_ok=True)
    with FileLock(html.parent / "book.lock"):
        _require_pages(root)
        executed = execute(root, jobs=jobs, progress=tell)
        notebooks(root)
        files = stage(root, executed)
        digest = _digest(files)
        stamp = html / DIGEST
        if stamp.is_file() and stamp.read_text() == digest and not missing(html, chapters.pages(root)):
            tell("the book is up to date")
        else:
            shutil.rmtree(html, ignore_errors=True)
            rendered = _render(root, files)
            (rendered / DIGEST).write_text(digest)
            os.replace(rendered, html)
            tell("the book is rendered")
    return html / "index.html"


def execute(root: Path, *, jobs: int = 2, progress: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Execute every chapter as written, several at a time; an unchanged one comes out of the cache.

    Args:
        root: The project's folder.
        jobs: How many chapters run side by side.
        progress: Called with one line whenever a chapter is done.

    Returns:
        The executed notebook of each chapter, in the order of the table of contents.

    Raises:
        BookError: If a chapter fails; the others are executed all the same, and every failure is in ``details``.
    """
    names = list(chapters.find(root))
    done: dict[str, Path] = {}
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_execute_one, root, name): name for name in names}
        for future in as_completed(running):
            name = running[future]
            path, cause = future.result()
            if path is None:
                failed[name] = f"book/{name}.md: {cause}"
            else:
                done[name] = path
            progress(f"{name}: {'failed' if path is None else 'done'} ({len(done) + len(failed)} of {len(names)})")
    if failed:
        details = [failed[name] for name in names if name in failed]
        raise BookError(_summary("chapters failed", details), details)
    return {name: done[name] for name in names}


def _execute_one(root: Path, name: str) -> tuple[Path | None, str]:
    """Execute one chapter in a process of its own; errors come back as text, for not every one of them can be pickled."""
    try:
        return chapters.execute(chapters.get(root, name), {}, root=root), ""
    except chapters.ChapterError as error:
        return None, f"{error}\n{error.traceback}"


def notebooks(root: Path, *, preset: str | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Write every chapter as a notebook that was not executed, for readers and for stock papermill.

    Args:
        root: The project's folder.
        preset: Name of a file in ``book/presets/<chapter>``, whose values are put into a cell after the settings, as
            papermill does. Without it the settings stay as written.
        folder: Where to write; ``_build/notebooks`` by default.

    Returns:
        The notebook of each chapter. Where ``repository.url`` is set in ``_config.yml`` its first cell installs the
        package from there if it is missing.
    """
    import nbformat
    from papermill.parameterize import parameterize_notebook

    folder = folder or root / "_build" / "notebooks"
    url = "" if preset else repository(root)
    written = {}
    for name, chapter in chapters.find(root).items():
        notebook = chapters.read_notebook(chapter.path)
        if preset:
            values = chapters.check(chapter, chapters.read_preset(root, name, preset))
            notebook = parameterize_notebook(notebook, values)
        if url:
            notebook.cells.insert(0, nbformat.v4.new_code_cell(_SETUP.format(url=url), metadata={"tags": []}))
        for number, cell in enumerate(notebook.cells):
            cell.id = f"{name}-{number}"  # jupytext's are random: every publication would change every notebook
        written[name] = folder / f"{name}.ipynb"
        _write(written[name], nbformat.writes(notebook).encode())
    return written


_SETUP = """\
import importlib.util

if importlib.util.find_spec("memloc") is None:
    %pip install -q "memloc @ git+{url}"\
"""


def repository(root: Path) -> str:
    """Read the address that the book is published from: ``repository.url`` of ``_config.yml``.

    Returns:
        The address without a trailing slash, or an empty string.

    Raises:
        BookError: If it is not of the form ``https://github.com/OWNER/NAME``, which Colab and Binder need.
    """
    config = yaml.safe_load((root / "_config.yml").read_text())
    url = str(config.get("repository", {}).get("url") or "").rstrip("/")
    if url and not _REPOSITORY.fullmatch(url):
        raise BookError(f"_config.yml: repository.url must be https://github.com/OWNER/NAME or empty, got {url!r}")
    return url


def stage(root: Path, executed: Mapping[str, Path]) -> dict[str, bytes]:
    """Put together what Sphinx reads: pages, with executed notebooks for the chapters and the build's own tables filled in.

    Args:
        root: The project's folder.
        executed: The executed notebook of each chapter.

    Returns:
        The content of each file, by its path relative to the stage.
    """
    found = chapters.find(root)
    notebook_of = {found[name].path: notebook for name, notebook in executed.items()}
    files = {"_toc.yml": (root / "_toc.yml").read_bytes(), "_config.yml": _config(root)}
    for page in chapters.pages(root):
        source = root / f"{page}.md"
        text = notebook_of.get(source, source).read_text()
        for marker, fill in (("scoreboard", scoreboard), ("status", status), ("modules", modules)):
            if f"<!-- {marker} -->" in text:
                text = text.replace(f"<!-- {marker} -->", fill(root, executed))
        text = re.sub(rf"\]\(({'|'.join(found)})\.md\b", r"](\1.ipynb", text)  # links to chapters, as staged
        files[page + (".ipynb" if source in notebook_of else ".md")] = text.encode()
    for path in [root / "book" / "references.bib", *(root / "book" / "_static").rglob("*")]:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files


def _config(root: Path) -> bytes:
    """The book's settings as Sphinx gets them: buttons only where there is a repository for them to open."""
    config = yaml.safe_load((root / "_config.yml").read_text())
    url = repository(root)
    config["repository"]["url"] = url
    config.setdefault("html", {})["use_repository_button"] = bool(url)
    if not url:
        del config["launch_buttons"]
    return yaml.safe_dump(config).encode()


def _require_pages(root: Path) -> None:
    absent = [f"{page}.md" for page in chapters.pages(root) if not (root / f"{page}.md").is_file()]
    if absent:
        raise BookError(f"_toc.yml names {', '.join(absent)}, but there is no such file: write it or take it out")


def _digest(files: Mapping[str, bytes]) -> str:
    """What the pages depend on: the staged files, the package that the API page describes, and the tools' versions."""
    tools = sorted(f"{tool.name}=={tool.version}" for tool in metadata.distributions())
    package = sorted(PACKAGE.glob("*.py"))
    parts = [*(name.encode() + content for name, content in sorted(files.items()))]
    parts += [source.read_bytes() for source in package] + ["\n".join(tools).encode()]
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _summary(what: str, details: list[str]) -> str:
    first = details[0].splitlines()[0]
    return first if len(details) == 1 else f"{len(details)} {what}; the first: {first}"


def _render(root: Path, files: Mapping[str, bytes]) -> Path:
    """Run Sphinx on a fresh stage and return the folder with the pages, checked."""
    tree, output = root / "_build" / "stage", root / "_build" / "sphinx"
    for folder in (tree, output):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        _write(tree / name, content)
    options = ["--path-output", str(output), "-W", "-n", "--keep-going"]
    process = subprocess.run(
        [sys.executable, "-c", _JUPYTER_BOOK, "build", str(tree), *options],
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    html = output / "_build" / "html"
    problems = _warnings(process.stdout, tree)
    if process.returncode and not problems:
        problems = ["Sphinx failed: " + (process.stdout.strip().splitlines() or ["without a word"])[-1]]
    problems += [f"{page}.md has no page in the book" for page in missing(html, chapters.pages(root))]
    if not problems:
        problems = [line for page in chapters.pages(root) for line in figures_without_a_sentence(html, page)]
    if problems:
        raise BookError(_summary("problems in the book", problems), problems)
    _prune_mathjax(html)
    for notebook in (html / "_sources").rglob("*.ipynb"):
        _write(notebook, json.dumps(readable(json.loads(notebook.read_text())), indent=1).encode())
    return html


def _warnings(output: str, tree: Path) -> list[str]:
    """Sphinx's warnings, each with the source that the author edits."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = [line.strip() for line in plain.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    named = (line.replace(f"{tree}/", "").replace(f"{PACKAGE.parent}/", "") for line in lines)
    return list(dict.fromkeys(re.sub(r"\.ipynb(?::(\d+))?", _source_of, line) for line in named))


def _source_of(found: re.Match[str]) -> str:
    """The MyST source of a staged notebook; myst-nb counts 10,000 lines for each cell."""
    if not found[1]:
        return ".md"
    cell, line = divmod(int(found[1]), 10_000)
    return f".md, cell {cell}, line {line}"


def missing(html: Path, pages: Iterable[str]) -> list[str]:
    """List the pages that have no HTML file under ``html``."""
    return [page for page in [*pages, "index"] if not (html / f"{page}.html").is_file()]


class _Figures(HTMLParser):
    """Collects the images of a page's text, each with the name of its figure and its alt text."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.name = ""
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "article":
            self.inside = True
        elif tag == "figure":
            self.name = values.get("id") or ""
        elif tag == "img" and self.inside:
            self.found.append((self.name or values.get("src") or "", values.get("alt") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self.inside = False
        elif tag == "figure":
            self.name = ""


def figures_without_a_sentence(html: Path, page: str) -> list[str]:
    """List the figures of a page that a reader who cannot see them is told nothing about.

    Args:
        html: The folder with the built pages.
        page: A page of ``_toc.yml``.

    Returns:
        One line for each image whose alt text has fewer than four words; the default, a file path, has one.
    """
    parser = _Figures()
    parser.feed((html / f"{page}.html").read_text())
    return [
        f"{page}.md: the figure {name} has no sentence as its alt text (got {alt!r}): add `:alt: …` to its directive"
        for name, alt in parser.found
        if len(alt.split()) < 4
    ]


def _prune_mathjax(html: Path) -> None:
    folder = html / "_static" / "mathjax"
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folder that holds them
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif not path.relative_to(folder).as_posix().startswith(MATHJAX_USED):
            path.unlink()


def scoreboard(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the table of claims: what the paper says, what this build found, and what runs on real data found.

    A chapter is in the table when its record has a ``verdict``; it then has to record ``claim`` and ``paper`` too.

    Args:
        root: The project's folder.
        executed: The executed notebook of each chapter.

    Returns:
        A Markdown table, one row for each claim.

    Raises:
        BookError: If a chapter records a verdict without saying on what.
    """
    rows = []
    for name, chapter in chapters.find(root).items():
        metrics = _recorded(executed[name])["metrics"]
        if "verdict" not in metrics:
            continue
        if absent := {"claim", "paper"} - metrics.keys():
            raise BookError(f"book/{name}.md: record {' and '.join(sorted(absent))} beside the verdict")
        real = [
            _verdict(result.metrics, result.provenance) + " (the method changed since)" * result.is_stale
            for result in chapters.results(name, root)
        ]
        here = _verdict(metrics, {"parameters": chapter.parameters})
        claim = f"{metrics['claim']} [{chapter.title}]({name}.md)"
        rows.append([claim, metrics["paper"], here, "<br>".join(real) or "not run yet"])
    return _table(["Claim", "The paper says", "This build", "Real data"], rows)


def _verdict(metrics: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """A verdict with what it was found on: data, number of examples, network, seeds."""
    parameters = provenance["parameters"]
    parts = [parameters.get("dataset")]
    if "examples" in parameters:
        parts.append("all examples" if parameters["examples"] is None else f"{parameters['examples']:,} examples")
    parts.append(parameters.get("model"))
    if parameters.get("width"):
        parts.append(f"width {parameters['width']}")
    seeds = parameters.get("seeds", 1)
    parts.append("1 seed" if seeds == 1 else f"{seeds} seeds")
    return f"**{metrics.get('verdict', 'no verdict')}**: " + ", ".join(part for part in parts if part)


def status(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the tables of the status page out of what the executed notebooks say about their execution.

    Args:
        root: The project's folder.
        executed: The executed notebook of each chapter.

    Returns:
        Markdown: seconds, device and date of each chapter, and the versions of what computed and rendered the book.
    """
    rows, versions = [], {"jupyter-book": metadata.version("jupyter-book")}
    for name, chapter in chapters.find(root).items():
        about = _read_json(executed[name])["metadata"]["memloc"]
        device = _recorded(executed[name])["device"]
        rows.append([f"[{chapter.title}]({name}.md)", f"{about['seconds']:.1f}", device, about["date"]])
        versions |= about["versions"]
    measured = _table(["Chapter", "Seconds", "Device", "Executed on"], rows)
    return measured + "\n\n" + _table(["", "Version"], [[tool, versions[tool]] for tool in sorted(versions)])


def _recorded(notebook: Path) -> dict[str, Any]:
    return records.recorded(_read_json(notebook)) or {"metrics": {}, "device": "cpu"}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def modules(root: Path, executed: Mapping[str, Path]) -> str:
    """Make the reference of the package: every public module with its docstrings, and a table to find it by.

    Args:
        root: The project's folder; not used.
        executed: The executed notebook of each chapter; not used.

    Returns:
        Markdown, one section for each module.
    """
    sources = [path for path in sorted(PACKAGE.glob("*.py")) if not path.name.startswith("_")]
    rows, sections = [], []
    for path in sources:
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        rows.append([f"[memloc.{path.stem}](api-{path.stem})", summary])
        directive = f"```{{eval-rst}}\n.. automodule:: memloc.{path.stem}\n```"
        sections.append(f"(api-{path.stem})=\n## memloc.{path.stem}\n\n{directive}")
    return "\n\n".join([_table(["Module", "What it does"], rows), *sections])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def readable(notebook: dict[str, Any]) -> dict[str, Any]:
    """Turn an executed notebook into one that reads well outside the book, for the download button.

    Figures that the page shows elsewhere are shown under the cell that drew them, and numbers stand in the sentences
    that quote them.

    Args:
        notebook: The executed notebook as JSON.

    Returns:
        A copy without glued outputs that are not figures, and without the directives that place them.
    """
    notebook = copy.deepcopy(notebook)
    quoted = {}
    for cell in notebook["cells"]:
        shown = []
        for output in cell.get("outputs", []):
            glued = output.get("metadata", {}).get("scrapbook")
            if glued is None:
                shown.append(output)
                continue
            data = {mime.removeprefix(glued["mime_prefix"]): content for mime, content in output["data"].items()}
            quoted[glued["name"]] = "".join(data.get("text/plain", "")).strip("'\"")
            if any(mime.startswith("image/") for mime in data):
                shown.append({**output, "data": data, "metadata": {}})
        if "outputs" in cell:
            cell["outputs"] = shown
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = _FIGURE.sub(r"*\2*", "".join(cell["source"]))
            cell["source"] = _NUMBER.sub(lambda found: quoted.get(found[1], found[0]), text)
    return notebook


_FIGURE = re.compile(r"^(`{3,}|:{3,})\{glue:figure\}.*\n(?::.*\n)*\s*((?:.*\n)*?)\1 *$", re.MULTILINE)
_NUMBER = re.compile(r"\{glue:text\}`([\w-]+)(?::\w+)?`")
