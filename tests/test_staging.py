"""What Sphinx reads: generated tables stand where the pages ask for them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SmallBook
from test_book import write_chapter

from memloc import chapters, staging

ROOT = Path(__file__).parents[1]


def test_recorded_results_stand_beside_this_build_and_say_when_the_method_changed(
    small_book: SmallBook, executed_with: Callable[[str], Path]
) -> None:
    write_chapter(small_book, "training", 0.7)
    result = {
        "metrics": {"verdict": "partly"},
        "tables": {},
        "parameters": {"dataset": "cifar10", "examples": 10_000, "model": "resnet9", "width": 16, "seeds": 3},
        "module_sha256": "of another time",
    }
    folder = small_book.root / "book" / "results" / "training"
    folder.mkdir(parents=True)
    (folder / "cifar10.json").write_text(json.dumps(result))
    table = staging.scoreboard(small_book.root, {"training": executed_with("holds")})
    assert "**holds**: digits, 1 seed" in table
    assert "**partly**: cifar10, 10,000 examples, resnet9, width 16, 3 seeds (the method has changed since)" in table
    result["parameters"] = {"drawn_examples": 1000, "seeds": 20}
    (folder / "cifar10.json").write_text(json.dumps(result))
    table = staging.scoreboard(small_book.root, {"training": executed_with("holds")})
    assert "**partly**: generated data, 1,000 examples, 20 seeds (the method has changed since)" in table


@pytest.fixture
def executed_with(tmp_path: Path) -> Callable[[str], Path]:
    """Make the executed notebook of a chapter that recorded a verdict."""

    def write(verdict: str) -> Path:
        record = {"metrics": {"claim": "It is so.", "paper": "it is so", "verdict": verdict}}
        prefix = "application/papermill.record/"
        output = {
            "output_type": "display_data",
            "metadata": {"scrapbook": {"name": "record", "mime_prefix": prefix}},
            "data": {prefix + "application/json": json.dumps(record)},
        }
        path = tmp_path / "executed.ipynb"
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [output]}], "metadata": {}}))
        return path

    return write


def test_every_public_module_is_in_the_reference(small_book: SmallBook) -> None:
    public = {path.stem for path in (ROOT / "memloc").glob("*.py") if not path.stem.startswith("_")}
    text = staging.modules(small_book.root, {})
    assert set(re.findall(r"automodule:: memloc\.(\w+)", text)) == public
    assert set(re.findall(r"\(api-(\w+)\)=", text)) == public


def test_every_marker_of_the_pages_is_filled_in() -> None:
    markers = {
        page: set(re.findall(r"<!-- (\w+) -->", (ROOT / f"{page}.md").read_text())) for page in chapters.pages(ROOT)
    }
    assert set().union(*markers.values()) == set(staging.TABLES), markers


def test_timings_stand_with_the_machine_and_the_commit_they_come_from(small_book: SmallBook) -> None:
    assert staging.benchmarks(small_book.root, {}) == "None was kept yet."
    folder = small_book.root / "benchmarks" / "results"
    folder.mkdir(parents=True)
    kept = {
        "ratios": {"step_over_plain": 1.646},
        "machine": "EPYC, one thread",
        "date": "2026-11-21",
        "commit": "0123456789",
    }
    (folder / "gradients.json").write_text(json.dumps(kept))
    row = "| gradients | `step_over_plain` | 1.646 | EPYC, one thread | 2026-11-21 | 0123456 |"
    assert row in staging.benchmarks(small_book.root, {})
