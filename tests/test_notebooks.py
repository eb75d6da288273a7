"""Chapters as notebooks for readers."""

import json
import shutil
from pathlib import Path

from conftest import SmallBook
from test_book import write_chapter

from memloc import notebooks

ROOT = Path(__file__).parents[1]


def test_notebooks_for_readers_are_not_executed_and_keep_their_tags(small_book: SmallBook) -> None:
    write_chapter(small_book, "training", 0.7)
    shutil.copy(ROOT / "_config.yml", small_book.root)
    notebook = json.loads(notebooks.write(small_book.root)["training"].read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "%pip" not in json.dumps(notebook)


def test_notebooks_are_the_same_each_time_they_are_written(small_book: SmallBook) -> None:
    write_chapter(small_book, "training", 0.7)
    shutil.copy(ROOT / "_config.yml", small_book.root)
    first = notebooks.write(small_book.root)["training"].read_text()
    assert notebooks.write(small_book.root)["training"].read_text() == first


def test_a_preset_is_put_into_the_notebook_after_the_settings(small_book: SmallBook) -> None:
    write_chapter(small_book, "training", 0.7)
    shutil.copy(ROOT / "_config.yml", small_book.root)
    path = notebooks.write(small_book.root, preset="smallest", folder=small_book.root / "presets")["training"]
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code[1]["metadata"]["tags"] == ["injected-parameters"]
    assert "seed = 3" in "".join(code[1]["source"])
