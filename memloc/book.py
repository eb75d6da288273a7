"""Build the book: execute what changed, render it with warnings as errors, and check what came out.

Chapters are executed by papermill (:mod:`memloc.chapters`). Sphinx is given the executed notebooks in a tree of its own
(:mod:`memloc.staging`), so that it starts no kernel and reads nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from html.parser import HTMLParser
from importlib import metadata, util
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock

from memloc import chapters, notebooks, staging
from memloc.staging import BookError

__all__ = ["STAMP", "BookError", "build", "execute", "figures_without_a_sentence", "missing"]

STAMP = "book.sha256"
"""Name of the file beside ``index.html`` that is written last, with a hash of what the pages were made from."""

_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # the package has no __main__
_MATHJAX_USED = ("tex-chtml.js", "output/chtml/fonts/")  # of the 24 MB that sphinx-mathjax-offline copies


def build(root: Path, *, jobs: int = 2, progress: Callable[[str], None] | None = None) -> Path:
    """Build the book.

    Nothing is executed, and nothing rendered, when nothing has changed. A build that fails leaves no book behind that
    could be taken for the new one.

    Args:
        root: The folder with ``_toc.yml`` and ``_config.yml``.
        jobs: How many chapters are executed side by side, each on one thread.
        progress: Called with one line when a step is done.

    Returns:
        The page to open, ``_build/html/index.html``.

    Raises:
        BookError: If a chapter fails, Sphinx warns, a page is missing, or a figure has no sentence as its alt text.
        ProjectError: If ``_toc.yml`` names a page that is not there.
    """
    if util.find_spec("jupyter_book") is None:
        raise BookError("the packages that build the book are not installed: pip install -e '.[book]'")
    root = root.resolve()
    tell = progress or (lambda line: None)
    html = root / "_build" / "html"
    html.parent.mkdir(exist_ok=True)
    with FileLock(html.parent / "book.lock"):
        try:
            _bring_up_to_date(root, html, jobs, tell)
        except BookError:
            shutil.rmtree(html, ignore_errors=True)
            raise
    return html / "index.html"


def _bring_up_to_date(root: Path, html: Path, jobs: int, tell: Callable[[str], None]) -> None:
    executed = execute(root, jobs=jobs, progress=tell)
    notebooks.write(root)
    files = staging.stage(root, executed)
    digest = _digest(files)
    if _is_current(html, digest, chapters.pages(root)):
        tell("book: nothing has changed")
        return
    rendered = _render(root, files)
    (rendered / STAMP).write_text(digest)
    shutil.rmtree(html, ignore_errors=True)
    rendered.replace(html)
    tell("book: rendered")


def execute(root: Path, *, jobs: int = 2, progress: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Execute every chapter as written, several at a time; one that has not changed comes out of the cache.

    Args:
        root: The folder with ``_toc.yml``.
        jobs: How many chapters are executed side by side.
        progress: Called with one line when a chapter is done.

    Returns:
        The executed notebook of each chapter, in the order of the table of contents.

    Raises:
        BookError: If a chapter fails. The others are executed all the same, and ``details`` has every traceback.
    """
    names = list(chapters.find(root))
    todo = names[::-1]
    running: dict[Future[str], str] = {}
    done: dict[str, Path] = {}
    failed: dict[str, tuple[str, str]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while todo or running:
            while todo and len(running) < jobs:  # no more than run at once: after Ctrl-C nothing more is started
                name = todo.pop()
                running[pool.submit(_execute_one, root, name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    done[name] = Path(future.result())
                except _Failed as error:
                    failed[name] = error.args
                except BrokenProcessPool as error:
                    raise BookError(f"book/{name}.md: its process was killed: out of memory?") from error
                progress(f"{name}: {'failed' if name in failed else 'done'} ({len(done) + len(failed)}/{len(names)})")
    if failed:
        causes = [f"book/{name}.md: {failed[name][0]}" for name in names if name in failed]
        raise BookError(_headline(causes, "chapters failed"), [traceback for _, traceback in failed.values()])
    return {name: done[name] for name in names}


class _Failed(Exception):
    """A chapter's error on its way between processes: only its texts, for not every error can be pickled."""


def _execute_one(root: Path, name: str) -> str:
    try:
        return str(chapters.execute(chapters.get(root, name), {}, root=root))
    except chapters.ChapterError as error:
        raise _Failed(str(error), error.traceback) from None


def _headline(causes: list[str], what: str) -> str:
    return causes[0] if len(causes) == 1 else f"{len(causes)} {what}; the first: {causes[0]}"


def _digest(files: Mapping[str, bytes]) -> str:
    """Hash what the pages depend on: the stage, the package that the reference describes, and every tool's version."""
    parts = [part for name, content in sorted(files.items()) for part in (name.encode(), content)]
    parts += [path.read_bytes() for path in sorted(staging.PACKAGE.glob("*.py"))]
    parts += sorted(f"{tool.name}=={tool.version}".encode() for tool in metadata.distributions())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _is_current(html: Path, digest: str, pages: Iterable[str]) -> bool:
    stamp = html / STAMP
    return stamp.is_file() and stamp.read_text() == digest and not missing(html, pages)


def _render(root: Path, files: Mapping[str, bytes]) -> Path:
    """Run Sphinx on a fresh stage, check the pages, and return their folder."""
    tree, output = root / "_build" / "stage", root / "_build" / "sphinx"
    for folder in (tree, output):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    sphinx = subprocess.run(
        [sys.executable, "-c", _JUPYTER_BOOK, "build", tree, "--path-output", output, "-W", "-n", "--keep-going"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    html, pages = output / "_build" / "html", chapters.pages(root)
    problems = _warnings(sphinx.stdout, tree)
    if sphinx.returncode and not problems:
        raise BookError(f"Sphinx failed with status {sphinx.returncode}", [sphinx.stdout])
    problems += [f"{page}.md: Sphinx made no page of it" for page in missing(html, pages)]
    problems += [line for page in pages for line in figures_without_a_sentence(html, page)]
    if problems:
        raise BookError(_headline(problems, "problems in the book"), problems)
    _prune_mathjax(html / "_static" / "mathjax")
    index = html / "index.html"  # sends the reader on; without an (empty) icon the browser asks the server for one
    index.write_text(f'<link rel="icon" href="data:,">\n{index.read_text()}')
    for path in html.glob("_sources/**/*.ipynb"):
        path.write_text(json.dumps(notebooks.readable(json.loads(path.read_text())), indent=1))
    return html


def _warnings(output: str, tree: Path) -> list[str]:
    """Sphinx's warnings, each with the source that its author edits."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = [line.strip() for line in plain.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    named = [line.replace(f"{tree}/", "").replace(f"{staging.PACKAGE.parent}/", "") for line in lines]
    return list(dict.fromkeys(re.sub(r"\.ipynb(?::(\d+))?", _place_in_source, line) for line in named))


def _place_in_source(found: re.Match[str]) -> str:
    """The place in a MyST source that a place in its notebook stands for; myst-nb counts 10,000 lines a cell."""
    return f".md (cell {int(found[1]) // 10_000})" if found[1] else ".md"


def missing(html: Path, pages: Iterable[str]) -> list[str]:
    """List the pages that were not rendered.

    Args:
        html: The folder with the built pages.
        pages: Pages of ``_toc.yml``, without a suffix.

    Returns:
        Those without a file, and ``index`` if it is not there.
    """
    return [page for page in [*pages, "index"] if not (html / f"{page}.html").is_file()]


class _Figures(HTMLParser):
    """Collects the images of an article, each with the name of its figure and its alt text."""

    def __init__(self) -> None:
        super().__init__()
        self.is_inside = False
        self.figure = ""
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "article":
            self.is_inside = True
        elif tag == "figure":
            self.figure = values.get("id") or ""
        elif tag == "img" and self.is_inside:
            self.found.append((self.figure or values.get("src") or "", values.get("alt") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self.is_inside = False
        elif tag == "figure":
            self.figure = ""


def figures_without_a_sentence(html: Path, page: str) -> list[str]:
    """List the figures of a page of which somebody who cannot see them is told nothing.

    Args:
        html: The folder with the built pages.
        page: A page of ``_toc.yml``, without a suffix.

    Returns:
        One line for each image whose alt text has fewer than four words; the default, a file's path, has one. Nothing
        if there is no such page.
    """
    path = html / f"{page}.html"
    if not path.is_file():
        return []
    parser = _Figures()
    parser.feed(path.read_text())
    return [
        f"{page}.md: figure {name} needs a sentence as its alt text, got {alt!r}: write `:alt: …` in its directive"
        for name, alt in parser.found
        if len(alt.split()) < 4
    ]


def _prune_mathjax(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif not path.relative_to(folder).as_posix().startswith(_MATHJAX_USED):
            path.unlink()
