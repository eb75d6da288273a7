import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from memloc import records


@dataclass(frozen=True)
class FakeRecipe:
    seed: int = 4
    dataset: str = "digits"


@dataclass(frozen=True)
class FakeRun:
    recipe: FakeRecipe = field(default_factory=FakeRecipe)
    provenance: dict[str, Any] = field(default_factory=lambda: {"device": "cpu"})


@pytest.fixture
def published(monkeypatch) -> dict[str, dict[str, Any]]:
    """What glue and record publish, by name, as if in a kernel."""
    seen: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(records, "_in_a_kernel", lambda: True)
    monkeypatch.setattr(records, "_publish", lambda key, bundle, metadata, prefix="": seen.__setitem__(key, bundle))
    return seen


def payload(published) -> dict[str, Any]:
    return json.loads(published["record"]["application/json"])


@pytest.mark.parametrize("key", ["Noisy", "noisy accuracy", "noisy_accuracy", "-a", "a-", "a--b", "", "é"])
def test_a_key_of_other_characters_is_refused(key):
    with pytest.raises(ValueError, match="key must be lower-case letters, digits and dashes"):
        records.glue(key, "x")


def test_outside_a_kernel_nothing_is_shown_and_figures_are_closed(capfd):
    figure, _ = plt.subplots()
    records.glue("curve", figure)
    records.record({"noisy-accuracy": 0.5, "verdict": "holds"})
    assert capfd.readouterr() == ("", "")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize(("form", "mime"), [("png", "image/png"), ("svg", "image/svg+xml")])
def test_a_figure_is_drawn_to_the_same_bytes_in_the_format_of_rcparams(published, form, mime):
    drawn = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [0, 1], clip_on=True)
        axes.scatter([0, 1], [1, 0], marker="o")
        with plt.rc_context({"savefig.format": form}):
            records.glue("curve", figure)
        drawn.append(published["curve"][mime])
        assert not plt.fignum_exists(figure.number)
    assert drawn[0] == drawn[1]
    assert "<dc:date>" not in drawn[0]


def test_a_figure_format_that_no_page_shows_is_refused(published):
    with plt.rc_context({"savefig.format": "pdf"}), pytest.raises(ValueError, match="png or svg"):
        records.glue("curve", plt.figure())
    plt.close("all")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.95123, "0.951"), (12, "12"), (True, "yes"), (False, "no"), (None, "–"), ("0.9 ± 0.1", "0.9 ± 0.1")],
)
def test_metrics_are_shown_as_text(published, value, text):
    records.record({"measured": value})
    assert published["measured"]["text/plain"] == repr(text)
    assert payload(published)["metrics"] == {"measured": value}


def test_numbers_of_numpy_and_torch_become_plain_ones(published):
    records.record({"a": np.float32(0.5), "b": torch.tensor(3), "c": np.bool_(True), "d": torch.tensor(float("nan"))})
    assert payload(published)["metrics"] == {"a": 0.5, "b": 3, "c": True, "d": None}


@pytest.mark.parametrize("value", [[1], {"a": 1}, object()])
def test_a_metric_that_is_no_scalar_is_refused(value):
    with pytest.raises(TypeError, match="metric 'measured' must be a number, a word or None, got"):
        records.record({"measured": value})


def test_a_verdict_of_other_words_is_refused():
    with pytest.raises(
        ValueError, match="verdict must be one of 'holds', 'partly', 'does not hold', 'not tested', got 'true'"
    ):
        records.record({"verdict": "true"})


def test_tables_keep_the_order_of_columns_and_a_named_index(published):
    table = pd.DataFrame({"noisy": [0.5, np.nan], "clean": [1.0, np.inf], "n": np.array([3, 4])})
    table.index.name = "epoch"
    records.record({}, {"sweep": table, "plain": table.reset_index(drop=True)})
    tables = payload(published)["tables"]
    assert tables["sweep"] == {
        "columns": ["epoch", "noisy", "clean", "n"],
        "records": [
            {"epoch": 0, "noisy": 0.5, "clean": 1.0, "n": 3},
            {"epoch": 1, "noisy": None, "clean": None, "n": 4},
        ],
    }
    assert tables["plain"]["columns"] == ["noisy", "clean", "n"]


def test_the_recipes_and_the_device_of_the_runs_are_kept(published):
    records.record({}, runs=[FakeRun(), FakeRun(FakeRecipe(seed=5))])
    kept = payload(published)
    assert kept["recipes"] == [{"seed": 4, "dataset": "digits"}, {"seed": 5, "dataset": "digits"}]
    assert kept["device"] == "cpu"
    records.record({}, runs=[FakeRun(provenance={"device": "cuda:0"})])
    assert payload(published)["device"].startswith("cuda")


def test_a_chapter_without_runs_says_where_it_computed(published):
    records.record({}, device=torch.device("cpu"))
    assert payload(published)["device"] == "cpu"
    records.record({}, device=torch.device("cuda"))
    assert payload(published)["device"].startswith("cuda")
    records.record({}, runs=[FakeRun(provenance={"device": "cuda"})], device="cpu")
    assert payload(published)["device"].startswith("cuda")


def executed(folder: Path, content: dict[str, Any] | None, **about: Any) -> Path:
    """An executed notebook as chapters.execute leaves it."""
    outputs = []
    if content is not None:
        data = {"application/papermill.record/application/json": [json.dumps(content)]}
        outputs = [{"data": data, "metadata": {"scrapbook": {"name": "record"}}}]
    known = {
        "chapter": "rewinding",
        "parameters": {"dataset": "mnist", "examples": None, "seeds": 3},
        "seconds": 12.3,
        "versions": {"python": "3.11"},
        "threads": 1,
        "date": "2026-01-02",
        "device": "cpu (x)",
    }
    notebook = {"metadata": {"memloc": known | about}, "cells": [{}, {"outputs": [{}, *outputs]}]}
    path = folder / "executed.ipynb"
    path.write_text(json.dumps(notebook))
    return path


CONTENT = {
    "metrics": {"noisy-accuracy": 0.123456789, "verdict": "holds"},
    "tables": {"sweep": {"columns": ["epoch", "noisy"], "records": [{"epoch": 1, "noisy": None}]}},
    "recipes": [{"seed": 4}],
    "device": "cpu",
}


@pytest.fixture
def clone(tmp_path) -> Path:
    root = tmp_path / "clone"
    (root / "memloc").mkdir(parents=True)
    (root / "memloc" / "rewinding.py").write_text("x = 1\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_a_kept_result_has_its_provenance_in_a_stable_order(clone, tmp_path):
    path = records.keep(clone, executed(tmp_path, CONTENT), "mnist", "memloc run rewinding -f mnist --record")
    assert path == clone / "book" / "results" / "rewinding" / "mnist.json"
    result = json.loads(path.read_text())
    assert " ".join(result) == (
        "chapter preset parameters metrics tables recipes dataset examples n_seeds seconds training_seconds device"
        " threads versions commit module_sha256 date command"
    )
    assert result["metrics"]["noisy-accuracy"] == 0.123457
    assert (result["dataset"], result["examples"], result["n_seeds"]) == ("mnist", None, 3)
    assert result["commit"] == git(clone, "rev-parse", "HEAD")
    assert [file.name for file in path.parent.iterdir()] == ["mnist.json"]


def test_a_commit_is_dirty_when_more_than_results_has_changed(clone, tmp_path):
    path = records.keep(clone, executed(tmp_path, CONTENT), "mnist", "")
    git(clone, "add", "-A")
    git(clone, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    path.write_text("{}")
    assert not records.commit(clone).endswith("-dirty")
    (clone / "memloc" / "rewinding.py").write_text("x = 2\n")
    assert records.commit(clone) == git(clone, "rev-parse", "HEAD") + "-dirty"


def test_a_folder_without_git_gives_no_origin(tmp_path):
    with pytest.raises(ValueError, match="is not a git checkout with a commit"):
        records.commit(tmp_path)


def test_a_chapter_that_records_nothing_cannot_be_kept(clone, tmp_path):
    with pytest.raises(ValueError, match="'rewinding' records nothing"):
        records.keep(clone, executed(tmp_path, None), "mnist", "")


def test_a_kept_result_is_read_back_and_stale_once_the_module_has_changed(clone, tmp_path):
    folder = records.keep(clone, executed(tmp_path, CONTENT), "mnist", "").parent
    (result,) = records.read(folder, records.module_sha256(clone, "rewinding"))
    assert (result.preset, result.metrics["verdict"], result.is_stale) == ("mnist", "holds", False)
    assert list(result.tables["sweep"].columns) == ["epoch", "noisy"]
    assert result.provenance["date"] == "2026-01-02"
    (clone / "memloc" / "rewinding.py").write_text("x = 2\n")
    (result,) = records.read(folder, records.module_sha256(clone, "rewinding"))
    assert result.is_stale


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metrics": {}, "tables": {"a": {}}}'])
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    (tmp_path / "mnist.json").write_text(text)
    with pytest.raises(ValueError, match=r"mnist.json is not a recorded result .*record it again"):
        records.read(tmp_path, None)
