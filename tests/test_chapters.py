import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import papermill
import pytest
from conftest import SmallBook

import memloc
from memloc import chapters, records
from memloc.chapters import ChapterError, ParameterError

PACKAGE = Path(memloc.__file__).parent.parent

MEASURE = """\
import os
import matplotlib.pyplot as plt
import myst_nb
import pandas as pd
from memloc import chapters

words = "in words"
table = pd.DataFrame({"epoch": [1, 2]})
for key, value in {"words": words, "table": table, "number": 3}.items():
    chapters.glue(f"{key}-ours", value)
    myst_nb.glue(f"{key}-theirs", value, display=False)

figure, axes = plt.subplots()
axes.plot([0, epochs])
plt.rcParams["savefig.format"] = "svg"
chapters.glue("curve", figure)
chapters.record({"epochs": epochs, "accuracy": 0.5, "threads": int(os.environ["OMP_NUM_THREADS"])})
print(sorted({1, 2}))
"""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallBook, Path]:
    """A book, and its one chapter executed with epochs=3."""
    book = SmallBook(tmp_path_factory.mktemp("measured"))
    book.chapter("measure", MEASURE, parameters="epochs: int = 2  # passes\nseed: int = 0  # first seed")
    return book, run(book, "measure", threads=3, epochs=3)


def run(book: SmallBook, name: str, threads: int = 1, **values: object) -> Path:
    return chapters.execute(chapters.get(book.root, name), values, root=book.root, threads=threads)


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", refuse)


def test_parameters_are_injected_and_measured_with(measured):
    content = records.recorded(read(measured[1]))
    assert content["metrics"] == {"epochs": 3, "accuracy": 0.5, "threads": 3}


def test_only_what_differs_from_the_chapter_is_injected(measured):
    (injected,) = [cell for cell in read(measured[1])["cells"] if "injected-parameters" in cell["metadata"]["tags"]]
    assert injected["source"] == ["# Parameters\n", "epochs = 3\n"]


def test_the_notebook_says_what_it_was_executed_with(measured):
    about = read(measured[1])["metadata"]["memloc"]
    assert about["parameters"] == {"epochs": 3, "seed": 0}
    assert about["chapter"] == "measure"
    assert about["versions"]["numpy"]
    assert 0 < about["seconds"] < 60


def test_an_executed_notebook_holds_no_path_of_this_machine(measured):
    book, executed = measured
    text = executed.read_text()
    assert str(book.root) not in text
    assert str(Path.home()) not in text
    assert sys.prefix not in text


def test_a_glued_value_is_the_output_that_myst_nb_makes(measured):
    glued = {
        output["metadata"]["scrapbook"]["name"]: output for output in outputs(read(measured[1])) if "data" in output
    }
    for key in ("words", "table", "number"):
        ours, theirs = glued[f"{key}-ours"], glued[f"{key}-theirs"]
        ours["metadata"]["scrapbook"]["name"] = theirs["metadata"]["scrapbook"]["name"]
        assert ours == theirs


def test_a_glued_figure_is_shown_once_under_its_cell_and_can_be_glued_by_myst_nb(measured):
    (curve,) = [output for output in outputs(read(measured[1])) if "image/svg+xml" in output.get("data", {})]
    assert curve["metadata"]["scrapbook"] == {"name": "curve", "mime_prefix": ""}
    assert not [output for output in outputs(read(measured[1])) if "image/png" in output.get("data", {})]


def test_the_books_page_does_not_show_a_glued_figure_under_its_cell(measured):
    before = read(measured[1])
    shown = {mime for output in outputs(records.hide_glued(before)) for mime in output.get("data", {})}
    assert "application/papermill.record/image/svg+xml" in shown
    assert "image/svg+xml" not in shown
    assert before == read(measured[1])


def test_an_unchanged_chapter_is_not_executed_again(measured, no_kernel):
    book, executed = measured
    assert run(book, "measure", epochs="3") == executed


def test_other_parameters_are_another_execution(measured, no_kernel):
    with pytest.raises(AssertionError, match="a kernel was started"):
        run(measured[0], "measure", epochs=4)


def test_refused_parameters_start_no_kernel(measured, no_kernel):
    with pytest.raises(ParameterError, match="unknown parameter 'epocs'"):
        run(measured[0], "measure", epocs=4)


def test_the_measured_time_is_that_of_the_chapter_as_written(measured):
    book, executed = measured
    chapter = chapters.get(book.root, "measure")
    assert chapters.last_executed(book.root, chapter) is None
    as_written = executed.with_name("measure-0123456789abcdef.ipynb")
    about = {"parameters": {"epochs": 2, "seed": 0}, "seconds": 7.0}
    as_written.write_text(json.dumps({"metadata": {"memloc": about}}))
    assert chapters.last_executed(book.root, chapter) == about
    as_written.unlink()


@pytest.mark.slow
def test_the_same_execution_gives_the_same_notebook(measured):
    book, executed = measured
    first = read(executed)
    executed.unlink()
    again = read(run(book, "measure", threads=3, epochs=3))
    for notebook in (first, again):
        del notebook["metadata"]["memloc"]["seconds"]
    assert again == first


@pytest.mark.parametrize("part", ["text", "code", "result", "versions"])
def test_a_change_of_anything_it_depends_on_is_another_execution(small_book, monkeypatch, part):
    text = small_book.chapter("training")
    code = small_book.root / "memloc" / "deep" / "training.py"
    result = small_book.root / "book" / "results" / "training" / "mnist.json"
    for path in (code, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(chapters, "_run", lambda chapter, whole, about, root: whole.write_text("{}"))
    before = run(small_book, "training")
    assert run(small_book, "training") == before
    if part == "versions":
        monkeypatch.setattr(chapters, "versions", lambda: {"torch": "0"})
    else:
        path = {"text": text, "code": code, "result": result}[part]
        path.write_text(path.read_text() + " ")
    assert run(small_book, "training") != before


def test_a_change_of_a_file_that_the_header_names_is_another_execution(small_book, monkeypatch):
    page = small_book.chapter("training")
    page.write_text(page.read_text().replace("---\n\n", "memloc:\n  reads: [benchmarks/*.json]\n---\n\n", 1))
    monkeypatch.setattr(chapters, "_run", lambda chapter, whole, about, root: whole.write_text("{}"))
    before = run(small_book, "training")
    timing = small_book.root / "benchmarks" / "sweeps.json"
    timing.parent.mkdir()
    timing.with_name("notes.txt").write_text("")
    assert run(small_book, "training") == before
    timing.write_text("1")
    assert run(small_book, "training") != before


def test_executions_that_nobody_asked_for_in_a_week_are_deleted(small_book, monkeypatch):
    monkeypatch.setattr(chapters, "_run", lambda chapter, whole, about, root: whole.write_text("{}"))
    small_book.chapter("training")
    old, wanted = run(small_book, "training", seed=1), run(small_book, "training", seed=2)
    for path in (old, wanted):
        os.utime(path, (time.time() - 8 * 24 * 3600,) * 2)
    (old.parent / "renamed").symlink_to("gone")  # as if by another process, between a look and the next
    assert run(small_book, "training", seed=2) == wanted
    assert wanted.exists()
    assert not old.exists()


def test_a_failing_cell_is_reported_and_never_taken_for_a_result(small_book):
    small_book.chapter("training", "print('so far')", "epochs = 1 / seed")
    with pytest.raises(ChapterError, match="cell 3 of chapter 'training' failed: ZeroDivisionError") as failure:
        run(small_book, "training")
    error = failure.value
    assert (error.chapter, error.cell) == ("training", 3)
    assert "epochs = 1 / seed" in error.traceback
    assert "\x1b" not in error.traceback
    assert error.notebook.name == "training.failed.ipynb"
    assert "so far" in error.notebook.read_text()
    assert not list(error.notebook.parent.glob("training-*.ipynb"))


def test_a_kernel_that_dies_is_reported(small_book):
    small_book.chapter("training", "import os\nos._exit(9)")
    with pytest.raises(ChapterError, match="chapter 'training' failed: Kernel died: out of memory"):
        run(small_book, "training")


def test_a_kernel_that_does_not_start_is_reported(small_book, monkeypatch):
    small_book.chapter("training", "print('never')")
    monkeypatch.setenv("PYTHONHOME", "nowhere")
    with pytest.raises(ChapterError, match="failed: Kernel died before replying") as failed:
        run(small_book, "training")
    assert failed.value.notebook.is_file()


@pytest.mark.slow
def test_two_processes_that_ask_for_the_same_execute_it_once(small_book):
    small_book.chapter("training", "import time\nopen('started', 'a').write('x')\ntime.sleep(0.5)")
    code = (
        "import pathlib, sys; from memloc import chapters; root = pathlib.Path(sys.argv[1]);"
        "print(chapters.execute(chapters.get(root, 'training'), {}, root=root).name)"
    )
    command = [sys.executable, "-c", code, str(small_book.root)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    names = {process.communicate(timeout=60)[0] for process in both}
    assert len(names) == 1
    assert (small_book.root / "started").read_text() == "x"


def test_what_a_chapter_writes_to_stderr_is_found(tmp_path):
    streams = [("stdout", ["fine\n"]), ("stderr", ["careless ", "warning\n"]), ("stderr", "more\n")]
    cells = [{"outputs": [{"output_type": "stream", "name": name, "text": text}]} for name, text in streams]
    path = tmp_path / "executed.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, *cells]}))
    assert chapters.stderr_of(path) == "careless warning\nmore\n"


def test_results_of_a_chapter_without_any_are_none(small_book):
    assert chapters.results("training", small_book.root) == []


def test_results_are_none_where_there_is_no_clone(tmp_path, monkeypatch):
    def nowhere() -> Path:
        raise chapters.ProjectError("no _toc.yml")

    monkeypatch.setattr(chapters, "project_root", nowhere)
    assert chapters.results("training") == []
    assert chapters.published("training") == {}


def test_published_numbers_are_tables_by_name_and_belong_to_what_an_execution_depends_on(small_book):
    small_book.chapter("training", "1 + 1")
    chapter = chapters.find(small_book.root)["training"]
    assert chapters.published("training", small_book.root) == {}
    before = chapters._key(chapter, {}, small_book.root)
    path = small_book.root / "book" / "published" / "training.json"
    path.parent.mkdir()
    table = {"columns": ["layer", "capacity"], "records": [[0, 0.04], [1, 0.1]]}
    path.write_text(json.dumps({"source": "a figure", "tables": {"layers": table}}))
    assert chapters.published("training", small_book.root)["layers"].capacity.tolist() == [0.04, 0.1]
    assert chapters._key(chapter, {}, small_book.root) != before


def test_a_source_becomes_a_notebook_with_tags_and_a_kernel(small_book):
    path = small_book.chapter("training", "1 + 1")
    notebook = json.loads(chapters.MystHandler.read(f"myst://{path}"))
    assert [cell["metadata"]["tags"] for cell in notebook["cells"]] == [[], ["parameters"], []]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook == json.loads(chapters.MystHandler.read(f"myst://{path}"))


def test_papermill_cannot_overwrite_a_source(small_book):
    path = small_book.chapter("training")
    with pytest.raises(PermissionError, match=r"write the executed notebook to an .ipynb"):
        chapters.MystHandler.write("{}", f"myst://{path}")


@pytest.mark.slow
def test_stock_papermill_runs_a_source_from_another_folder(small_book, tmp_path):
    path = small_book.chapter("training", "print(seed + 1)")
    papermill_script = Path(sys.executable).with_name("papermill")
    command = [papermill_script, f"myst://{path}", "out.ipynb", "-p", "seed", "3", "--no-progress-bar"]
    subprocess.run(
        command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE)}, capture_output=True
    )
    assert ["4\n"] in [output.get("text") for output in outputs(read(tmp_path / "out.ipynb"))]
