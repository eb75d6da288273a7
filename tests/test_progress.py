import json
import queue
from pathlib import Path

import pytest

from memloc import progress, runs


def write_history(store: Path, folder: str, epoch: int, epochs: int = 10) -> None:
    rows = [{"epoch": number, "seconds": 3.0} for number in range(epoch + 1)]
    path = store / folder / "history.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"epochs": epochs, "rows": rows}))
    partial.replace(path)


@pytest.mark.parametrize(
    ("seconds", "left"), [([1.0], "about 9 s"), ([100.0, 10.0, 12.0], "about 84 s"), ([60.0], "about 9 min")]
)
def test_the_time_left_is_the_median_epoch_times_the_epochs_left(seconds, left):
    rows = [{"epoch": number, "seconds": value} for number, value in enumerate([0.1, *seconds])]
    line = progress.epoch_line("1a2b3c4d5e6f", {"epochs": 10, "rows": rows})
    assert line == f"training 1a2b3c4d: epoch {len(seconds)}/10, {left} left"


def test_epochs_finished_meanwhile_are_told_once_and_old_ones_never(own_run_store, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.01)
    told: queue.Queue[str] = queue.Queue()
    write_history(own_run_store, "aaaaaaaaaa.partial", 3)
    with progress.following(told.put):
        write_history(own_run_store, "bbbbbbbbbb.partial", 1)
        assert told.get(timeout=5) == "training bbbbbbbb: epoch 1/10, about 27 s left"
        (own_run_store / "bbbbbbbbbb.partial").rename(own_run_store / "bbbbbbbbbb")
        write_history(own_run_store, "aaaaaaaaaa.partial", 4)
        assert told.get(timeout=5) == "training aaaaaaaa: epoch 4/10, about 18 s left"
    write_history(own_run_store, "aaaaaaaaaa.partial", 5)
    assert told.empty()


def test_the_row_before_training_is_no_news(own_run_store, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.01)
    told: queue.Queue[str] = queue.Queue()
    with progress.following(told.put):
        write_history(own_run_store, "a.partial", 0)
        write_history(own_run_store, "b.partial", 1)
        assert told.get(timeout=5).startswith("training b")
    assert told.empty()


def test_nothing_is_followed_when_nobody_listens(own_run_store):
    with progress.following(None):
        write_history(own_run_store, "a", 1)


def test_the_store_is_that_of_the_runs(own_run_store, monkeypatch):
    assert progress.store() == runs.root() == own_run_store
    monkeypatch.delenv("MEMLOC_RUNS")
    assert progress.store() == runs.root()
