"""The pages of the book on disk: which there are, which of them are chapters, and their presets."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memloc
from memloc import parameters
from memloc.parameters import Value, did_you_mean

_CODE_CELL = re.compile(
    r"^(?P<fence>`{3,})\{code-cell\}[^\n]*\n(?P<body>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)


class ProjectError(ValueError):
    """A book, chapter or preset that is not there or cannot be read; the message is one line."""


@dataclass(frozen=True)
class Chapter:
    """One executable page of the book.

    Attributes:
        name: The name of its file, which is also that of its module, presets and results.
        path: Its MyST source.
        title: Its first heading.
        parameters: Name and default of each parameter, in the order of its parameters cell.
        reads: Patterns of files that it reads besides its own results, such as ``book/results/*/*.json``: the list
            ``reads`` under ``memloc`` in its header.
    """

    name: str
    path: Path
    title: str
    parameters: Mapping[str, Value]
    reads: tuple[str, ...] = ()


def project_root(start: Path | None = None) -> Path:
    """Find the folder with ``_toc.yml``, which every path of the book starts from.

    Args:
        start: Where to look first, upward; by default the working folder, then the installed package.

    Returns:
        The folder, absolute.

    Raises:
        ProjectError: If no folder above has one.
    """
    starts = [start] if start else [Path.cwd(), Path(memloc.__file__).parent]
    for folder in (above.resolve() for one in starts for above in (one, *one.resolve().parents)):
        if (folder / "_toc.yml").is_file():
            return folder
    raise ProjectError(f"no _toc.yml in {starts[0]} or above: run this inside a clone of memloc")


def pages(root: Path) -> list[str]:
    """List every page of ``_toc.yml`` in order, without a suffix.

    Args:
        root: The folder with ``_toc.yml``.

    Returns:
        Paths relative to ``root``, such as ``"book/intro"``.

    Raises:
        ProjectError: If the file is not a table of contents.
    """
    toc = _yaml_mapping((root / "_toc.yml").read_text(), "_toc.yml")
    if not isinstance(toc.get("root"), str):
        raise ProjectError("_toc.yml names no root page")

    def walk(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            if "file" in node:
                yield str(node["file"])
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    return [toc["root"], *walk(toc)]


def find(root: Path) -> dict[str, Chapter]:
    """Find the chapters of a book without importing or executing anything of theirs.

    Args:
        root: The folder with ``_toc.yml``.

    Returns:
        Each chapter by name, in the order of the table of contents.

    Raises:
        ProjectError: If a page is not there or its header cannot be read.
        ParameterError: If a parameters cell is not as :func:`memloc.parameters.defaults` expects.
    """
    found = {}
    for page in pages(root):
        path = root / f"{page}.md"
        if not path.is_file():
            raise ProjectError(f"{page}.md is in _toc.yml but not in {root}")
        text = path.read_text()
        header = _header(text, path.name)
        if "kernelspec" in header:
            title = re.search(r"^# +(.+?)\s*$", _CODE_CELL.sub("", text), re.MULTILINE)
            cells = [code for tags, code in _code_cells(text, path.name) if "parameters" in tags]
            if len(cells) > 1:
                raise ProjectError(f"{page}.md has {len(cells)} cells tagged parameters, expected one")
            known = parameters.defaults(cells[0], path.stem) if cells else {}
            reads = tuple((header.get("memloc") or {}).get("reads", ()))
            found[path.stem] = Chapter(path.stem, path, title[1] if title else path.stem, known, reads)
    return found


def get(root: Path, name: str) -> Chapter:
    """Find one chapter by name.

    Args:
        root: The folder with ``_toc.yml``.
        name: The chapter's name.

    Returns:
        The chapter.

    Raises:
        ProjectError: If no chapter has this name.
    """
    chapters = find(root)
    if name not in chapters:
        near = did_you_mean(name, chapters, ": ")
        raise ProjectError(f"unknown chapter {name!r}{near} (memloc list shows all)")
    return chapters[name]


def _yaml_mapping(text: str, source: str) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProjectError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ProjectError(f"{source} must hold 'name: value' lines, got {type(content).__name__}")
    return content


def _header(text: str, source: str) -> dict[Any, Any]:
    header = re.match(r"---\n(.*?\n)---\s*\n", text, re.DOTALL)
    return _yaml_mapping(header[1], f"the header of {source}") if header else {}


def _code_cells(text: str, source: str) -> Iterator[tuple[list[str], str]]:
    """Yield tags and source of each code cell of a MyST page."""
    for cell in _CODE_CELL.finditer(text):
        body = cell["body"]
        block = re.match(r"---\n(.*?\n)---\n", body, re.DOTALL)
        short = re.match(r"(:[\w-]+:[^\n]*\n)+", body)
        if block:
            options, code = block[1], body[block.end() :]
        elif short:
            options, code = re.sub(r"^:", "", short[0], flags=re.MULTILINE), body[short.end() :]
        else:
            options, code = "{}", body
        tags = _yaml_mapping(options, f"a cell's header in {source}").get("tags") or []
        yield tags, code


def read_preset(root: Path, chapter: str, preset: str) -> dict[str, object]:
    """Read the values of a preset, unchecked.

    Args:
        root: The folder with ``_toc.yml``.
        chapter: The chapter's name.
        preset: The name of a file in ``book/presets/<chapter>``, or a path to a YAML file.

    Returns:
        Values by name.

    Raises:
        ProjectError: If there is no such file or it is not a mapping.
    """
    folder = root / "book" / "presets" / chapter
    is_path = os.sep in preset or preset.endswith((".yaml", ".yml"))
    path = Path(preset) if is_path else folder / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        hint = did_you_mean(preset, names) or f"; there are: {', '.join(names) or 'none'}"
        raise ProjectError(f"no preset {preset!r} of chapter {chapter!r}{hint}")
    return _yaml_mapping(path.read_text(), f"preset {preset}")
