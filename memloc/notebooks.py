"""Chapters as notebooks for readers: to run on their own machine, on Colab or Binder, or to read after a download."""

import copy
import re
from pathlib import Path
from typing import Any

from memloc import chapters, staging

_INSTALL = """\
import importlib.util

if importlib.util.find_spec("memloc") is None:
    %pip install -q "memloc @ git+{url}"\
"""

_FIGURE = re.compile(r"^(`{3,}|:{3,})\{glue:figure\}.*\n(?::.*\n)*\s*((?:.*\n)*?)\1 *$", re.MULTILINE)
_NUMBER = re.compile(r"\{glue:text\}`([\w-]+)(?::\w+)?`")


def write(root: Path, *, preset: str | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Write every chapter as a notebook that has not been executed and that stock papermill can run.

    Args:
        root: The folder with ``_toc.yml``.
        preset: The name of a file in ``book/presets/<chapter>``, whose values are put into a cell after the settings,
            as papermill would. Without it the settings stay as written.
        folder: Where to write; by default ``_build/notebooks``.

    Returns:
        The notebook of each chapter. Where ``repository.url`` is set in ``_config.yml``, and no preset is given, its
        first cell installs the package from there if it is missing.

    Raises:
        ProjectError: If a chapter has no such preset.
        ParameterError: If the preset does not fit its chapter.
    """
    import nbformat
    from papermill.parameterize import parameterize_notebook

    folder = folder or root / "_build" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    url = staging.repository(root)
    written = {}
    for name, chapter in chapters.find(root).items():
        notebook = chapters.read_notebook(chapter.path)
        if preset:
            values = chapters.check(chapter, chapters.read_preset(root, name, preset))
            notebook.metadata["papermill"] = {}  # papermill notes the values there
            notebook = parameterize_notebook(notebook, values)
        elif url:
            install = nbformat.v4.new_code_cell(_INSTALL.format(url=url), id="install", metadata={"tags": []})
            notebook.cells.insert(0, install)
        written[name] = folder / f"{name}.ipynb"
        partial = folder / f"{name}.partial"
        partial.write_text(nbformat.writes(notebook))
        partial.replace(written[name])
    return written


def readable(notebook: dict[str, Any]) -> dict[str, Any]:
    """Turn an executed chapter into a notebook that reads well outside the book.

    A figure that the page shows further down is shown under the cell that drew it, and a number stands in the sentence
    that quotes it.

    Args:
        notebook: The executed notebook as JSON.

    Returns:
        A copy, without the outputs and directives that only the book understands.
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
        if cell["cell_type"] == "code":
            cell["outputs"] = shown
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = _FIGURE.sub(lambda found: f"*{found[2].strip()}*", "".join(cell["source"]))
            cell["source"] = _NUMBER.sub(lambda found: quoted.get(found[1], found[0]), text)
    return notebook
