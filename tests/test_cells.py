import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from memloc import cells, grids, runs
from memloc.grids import Cell, Resources

COMMAND = [sys.executable, "-c", "import sys; from memloc.cli import main; sys.exit(main())"]
TRAINING = {"model": "mlp", "width": 8, "examples": 64, "epochs": 2, "batch_size": 16}
RECORD = "from memloc import chapters\nchapters.record({'twice': 2 * seed, 'verdict': 'holds'})"


def chapter_cell(book, *code, words=(), resources=None) -> Cell:
    book.chapter("work", *code)
    (cell,) = grids.from_words("work", list(words), book.root, resources)
    return cell


def training_cell(**changes) -> Cell:
    (cell,) = grids._expand_training(TRAINING | changes, {}, Resources())
    return cell


def test_a_chapter_runs_once_and_its_numbers_are_kept_with_where_they_are_from(small_book):
    cell = chapter_cell(small_book, "open('log', 'a').write('ran\\n')", RECORD, words=["seed=3"])
    assert cells.find(cell) is None
    first, again = (cells.run(cell, small_book.root) for _ in range(2))
    assert first == again == cells.find(cell) == json.loads(cells.result_file(cell).read_text())
    assert (small_book.root / "log").read_text() == "ran\n"
    assert first["metrics"] == {"twice": 6, "verdict": "holds"}
    assert (first["chapter"], first["parameters"], first["commit"]) == ("work", {"seed": 3}, None)
    assert first["seconds"] > 0
    assert {"device", "threads", "versions", "date", "node", "recipes", "tables"} <= first.keys()
    assert {path.suffix for path in cells.folder().iterdir() if path.is_file()} == {".json"}, "no mark is left"


def test_a_training_is_the_run_that_fit_gives():
    cell = training_cell()
    result = cells.run(cell, cells.folder())
    from memloc.recipes import Recipe

    run = runs.find(cell.address, Recipe(**TRAINING))
    assert run is not None
    assert result["metrics"]["test-accuracy"] == pytest.approx(run.history.test_accuracy.iloc[-1])
    assert result["metrics"]["epoch"] == 2
    assert result["chapter"] is None


@pytest.mark.parametrize(
    "content", [b"", b'{"address": ', b"[]", b'{"address": "x"}', b"DAMAGED", pickle.dumps({"a": 1})]
)
def test_what_is_no_result_is_not_read_and_is_replaced(small_book, content):
    cell = chapter_cell(small_book, RECORD)
    cells.folder().mkdir(parents=True)
    damaged = {"address": cell.address, "metrics": [], "parameters": {}, "seconds": None}
    cells.result_file(cell).write_bytes(json.dumps(damaged).encode() if content == b"DAMAGED" else content)
    assert cells.find(cell) is None
    assert cells.run(cell, small_book.root)["metrics"]["twice"] == 0
    assert cells.find(cell) is not None


def test_a_planted_pickle_in_a_run_is_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    cell = training_cell()
    cells.run(cell, tmp_path)
    from memloc.recipes import Recipe

    run = runs.find(cell.address, Recipe(**TRAINING))
    (run.folder / "epoch_002.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(OSError, match="SHA-256"):
        run.checkpoint(2)
    assert not (tmp_path / "sprung").exists()


def test_a_chapter_that_was_edited_since_is_not_run_under_the_address_of_the_old_one(small_book):
    cell = chapter_cell(small_book, RECORD)
    small_book.chapter("work", RECORD.replace("2 *", "3 *"))
    with pytest.raises(cells.CellError, match=r"chapter 'work' was edited after the sweep was started"):
        cells.run(cell, small_book.root)
    assert cells.find(cell) is None
    assert not (small_book.root / "_build").exists(), "nothing was executed"


def test_a_failing_chapter_says_which_cell_and_leaves_nothing(small_book):
    cell = chapter_cell(small_book, "1 / seed")
    with pytest.raises(cells.CellError, match=r"cell 2 of chapter 'work' failed: ZeroDivisionError") as failed:
        cells.run(cell, small_book.root)
    assert "1 / seed" in failed.value.details
    answer = cells.attempt(cell, small_book.root)
    assert (answer["error"], answer["details"]) == (str(failed.value), failed.value.details)
    assert not [path for path in cells.folder().iterdir() if path.is_file()]


def test_a_failing_training_says_why(monkeypatch):
    monkeypatch.setenv("MEMLOC_DATA", "/nowhere")
    with pytest.raises(cells.CellError, match=r"the training failed: .*memloc data get"):
        cells.run(training_cell(dataset="mnist"), cells.folder())


def test_a_cell_that_takes_more_than_its_memory_is_ended(small_book):
    cell = chapter_cell(
        small_book,
        "import time\nkept = bytearray(900_000_000)\ntime.sleep(60)",
        resources=Resources(memory_gb=0.6),
    )
    start, other = time.monotonic(), subprocess.Popen(["sleep", "100"])
    with pytest.raises(cells.CellError, match=r"memory_gb must cover what the cell takes, \d\.\d GB .*got 0\.6"):
        cells.run(cell, small_book.root)
    assert time.monotonic() - start < 40
    assert other.poll() is None, "what was there before is not the cell's"
    other.kill()
    other.wait()


def test_a_machine_full_of_processes_is_looked_at_less_often(monkeypatch):
    looks = []
    with cells._limited(1.0) as limit:
        monkeypatch.setattr(limit.process, "children", lambda recursive: looks.append(time.sleep(0.02)) or [])
        time.sleep(1)
    assert 1 <= len(looks) <= 4, "ten a second where a look takes no time"


def test_of_two_that_ask_for_the_same_cell_one_runs_it(small_book):
    cell = chapter_cell(small_book, "import time; open('log', 'a').write('ran\\n'); time.sleep(1)", RECORD)
    command = [*COMMAND, "sweep", "work", "--cell", cell.address]
    both = [subprocess.Popen(command, cwd=small_book.root, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(90) for process in both] == [0, 0]
    assert (small_book.root / "log").read_text() == "ran\n"


def test_a_training_ends_with_the_process_that_asked_for_it(tmp_path):
    values = json.dumps(TRAINING | {"epochs": 100_000})
    command = f"[sys.executable, '-m', 'memloc.cells', {str(tmp_path / 'o')!r}]"
    code = f"import subprocess, sys; subprocess.run({command}, input={values!r}, text=True)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        import psutil

        deadline = time.monotonic() + 60
        while not runs.addresses() and time.monotonic() < deadline:
            time.sleep(0.2)
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        child.wait(20)
    finally:
        parent.kill()


def test_a_full_disk_is_an_error_and_leaves_no_half_result(small_book, monkeypatch):
    cell = chapter_cell(small_book, RECORD)

    def full(self, text, *words, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space left"):
            cells.run(cell, small_book.root)
    assert cells.find(cell) is None
    assert cells.run(cell, small_book.root)["metrics"]["twice"] == 0
