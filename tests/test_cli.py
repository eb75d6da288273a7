import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import memloc
from memloc import cli, datasets, progress, runs, sources

PACKAGE = Path(memloc.__file__).parent.parent
COMMAND = [sys.executable, "-c", "import sys; from memloc.cli import main; sys.exit(main())"]
HEAVY = {"torch", "pandas", "numpy", "papermill", "jupytext", "nbformat", "IPython", "matplotlib"}


@pytest.fixture
def book(small_book, monkeypatch):
    """A book with one chapter, as the working folder."""
    small_book.chapter(
        "rewinding",
        "from memloc import chapters\nchapters.record({'noisy-accuracy': 0.25 * epochs, 'verdict': 'holds'})",
        parameters='dataset: str = "digits"  # images\nepochs: int = 2  # passes\nnoise_rate: float = 0.1  # share',
    )
    monkeypatch.chdir(small_book.root)
    return small_book


@pytest.fixture
def memloc_says(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: status, stdout, stderr."""

    def say(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return say


@pytest.fixture
def refused(memloc_says, monkeypatch) -> Callable[..., str]:
    """Run the command, expecting status 2, one line on stderr and no kernel; the line."""

    def no_kernel(*arguments: object, **options: object) -> None:
        raise AssertionError("a kernel was started")

    def refuse(*words: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("memloc.chapters._run", no_kernel)
            status, out, err = memloc_says(*words)
        assert (status, out) == (2, "")
        assert err.startswith("memloc: ")
        assert err.count("\n") == 1
        return err.removeprefix("memloc: ").strip()

    return refuse


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


@pytest.mark.parametrize("word", ["--help", "list"])
def test_help_and_list_answer_in_half_a_second_of_cpu(book, word):
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, word], check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(PACKAGE)})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < 0.5


@pytest.mark.parametrize("words", [["list"], ["run", "rewinding", "-p", "epocs=3"]])
def test_nothing_heavy_is_imported_to_list_or_refuse(book, words):
    code = f"import sys; from memloc.cli import main; main({words}); print(sorted({HEAVY} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_list_shows_each_parameter_with_type_default_and_meaning(book, memloc_says):
    status, out, _ = memloc_says("list")
    assert status == 0
    title, *rows = out.splitlines()
    assert title == "rewinding – The rewinding chapter (not executed here yet)"
    assert rows[0].split()[:3] == ["dataset", "str", "digits"]
    assert rows[0].endswith("the images (digits, mnist, fashionmnist, kmnist, cifar10, cifar100, svhn)")
    assert rows[1].split() == ["epochs", "int", "2", "passes", "over", "the", "training", "set"]


def test_a_reader_who_stops_reading_gets_no_complaint(book):
    script = f"{shlex.join([*COMMAND, 'list'])} | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_list_shows_the_measured_time(book, memloc_says):
    path = book.root / "_build" / "executed" / "rewinding-0123456789abcdef.ipynb"
    path.parent.mkdir(parents=True)
    about = {"parameters": {"dataset": "digits", "epochs": 2, "noise_rate": 0.1}, "seconds": 12.4}
    path.write_text(json.dumps({"metadata": {"memloc": about}}))
    assert memloc_says("list")[1].startswith("rewinding – The rewinding chapter (12 s)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "epocs=3"], "did you mean 'epochs'?"),
        (["-p", "epochs=many"], "epochs must be an int, got 'many'"),
        (["-p", "epochs=-1"], "epochs must be at least 1, got -1"),
        (["-p", "noise_rate=1.5"], "noise_rate must be between 0 and 1, got 1.5"),
        (["-p", "dataset=cifar11"], "did you mean 'cifar10'?"),
        (["-p", "epochs"], "-p takes NAME=VALUE, got 'epochs'"),
        (["-f", "bad"], "epochs must be an int, got 'lots'"),
        (["-f", "list"], "preset list must hold 'name: value' lines, got list"),
        (["-f", "mist"], "no preset 'mist' of chapter 'rewinding'; did you mean 'list'?"),
        (["-o", "nowhere/out.ipynb"], "-o takes the path of an .ipynb file in a folder that is there"),
        (["-o", "rewinding.md"], "-o takes the path of an .ipynb file in a folder that is there"),
        (["--threads", "0"], "expected a number from 1 up, got '0'"),
        (["--record"], "--record needs the name of a preset in book/presets/rewinding: add -f NAME"),
        (["--record", "-f", "good", "-p", "epochs=3"], "leave out -p, or change the preset"),
        (["--record", "-f", "good"], "is not a git checkout with a commit"),
        (["--recod"], "unrecognized arguments: --recod"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(book, refused, words, message):
    book.preset("rewinding", "bad", "epochs: lots\n")
    book.preset("rewinding", "list", "- 3\n")
    book.preset("rewinding", "good", "epochs: 3\n")
    assert message in refused("run", "rewinding", *words)


def test_an_unknown_chapter_is_refused_with_the_nearest(book, refused):
    assert refused("run", "rewindin").startswith("unknown chapter 'rewindin': did you mean 'rewinding'?")


def test_a_page_that_is_not_there_is_named_in_one_line(book, refused):
    (book.root / "book" / "intro.md").unlink()
    assert refused("list").startswith("book/intro.md is in _toc.yml but not in")


@pytest.mark.parametrize(
    "words", [[], ["run"], ["sing"], ["data"], ["data", "get"], ["runs", "show"], ["runs", "delete"]]
)
def test_an_unfinished_command_is_refused_in_one_line(refused, words):
    refused(*words)


@pytest.mark.slow
def test_a_recorded_run_leaves_a_result_a_notebook_and_a_table(book, memloc_says, tmp_path):
    book.preset("rewinding", "mnist", "dataset: mnist\nepochs: 3\n")
    git(book.root, "init", "-q")
    git(book.root, "add", "-A")
    git(book.root, "commit", "-qm", "x")
    out_path = tmp_path / "out.ipynb"
    status, out, err = memloc_says("run", "rewinding", "-f", "mnist", "--record", "-o", str(out_path), "--threads", "1")
    assert (status, err) == (0, "")
    result = book.root / "book" / "results" / "rewinding" / "mnist.json"
    assert out.splitlines() == ["noisy-accuracy  0.750", "verdict         holds", str(result), str(out_path)]
    kept = json.loads(result.read_text())
    assert (kept["parameters"]["epochs"], kept["dataset"]) == (3, "mnist")
    assert kept["command"] == "memloc run rewinding -f mnist --record"
    assert json.loads(out_path.read_text())["metadata"]["memloc"]["chapter"] == "rewinding"


def test_a_failing_cell_gives_its_traceback_and_status_one(book, memloc_says):
    book.chapter("rewinding", "epochs / 0", parameters="epochs: int = 2  # passes")
    status, out, err = memloc_says("run", "rewinding")
    assert (status, out) == (1, "")
    assert "ZeroDivisionError" in err
    assert "epochs / 0" in err
    assert "memloc: cell 2 of chapter 'rewinding' failed: ZeroDivisionError: division by zero" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_kernel_and_no_notebook(book, number):
    book.chapter("rewinding", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(100)")
    process = subprocess.Popen(
        [*COMMAND, "run", "rewinding"], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(PACKAGE)}
    )
    pid = book.root / "pid"
    until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "memloc: interrupted"
    until(lambda: not is_alive(int(pid.read_text())))
    assert not list((book.root / "_build" / "executed").glob("*[0-9a-f].ipynb"))


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_training_in_a_chapter_is_followed_on_stderr(book, memloc_says, own_run_store, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.05)
    history = json.dumps({"epochs": 50, "rows": [{"epoch": epoch, "seconds": 1.0} for epoch in range(13)]})
    book.chapter(
        "rewinding",
        "import pathlib, time, os\nfolder = pathlib.Path(os.environ['MEMLOC_RUNS']) / '1a2b3c4d5e.partial'\n"
        f"folder.mkdir(parents=True)\n(folder / 'history.json').write_text('''{history}''')\ntime.sleep(0.5)",
    )
    assert memloc_says("run", "rewinding")[2] == "training 1a2b3c4d: epoch 12/50, about 38 s left\n"


def make_run(store: Path, address: str, epoch: int) -> None:
    folder = store / address
    folder.mkdir(parents=True)
    rows = [{"epoch": number, "seconds": 1.0} for number in range(epoch + 1)]
    (folder / "history.json").write_text(json.dumps({"epochs": 10, "rows": rows}))
    (folder / "recipe.json").write_text(json.dumps({"dataset": "digits", "model": "mlp", "seed": 4, "augment": False}))


@pytest.fixture
def two_runs(own_run_store) -> Path:
    make_run(own_run_store, "aaaa000000000000", 10)
    make_run(own_run_store, "aabb000000000000.partial", 4)
    return own_run_store


def test_runs_are_listed_with_epochs_and_size(two_runs, memloc_says):
    for words in (["runs"], ["runs", "list"]):
        _, out, _ = memloc_says(*words)
        assert "aabb000000000000  4/10 epochs, unfinished" in out
        assert "aaaa000000000000  10/10 epochs  " in out
        assert out.splitlines()[-1].startswith("2 runs, ")


def test_a_run_is_shown_by_the_beginning_of_its_address(two_runs, memloc_says):
    assert memloc_says("runs", "show", "aaaa")[1].splitlines()[-1].split() == ["augment", "false"]


def test_an_ambiguous_or_unknown_address_is_refused_and_nothing_deleted(two_runs, refused):
    assert refused("runs", "delete", "aaaa", "aa").startswith("2 runs begin with 'aa'")
    assert refused("runs", "show", "c").startswith("0 runs begin with 'c'")
    assert refused("runs", "delete", "--all", "aaaa").startswith("runs delete takes addresses, or --all")
    assert len(runs.listing()) == 2


def test_runs_are_deleted_one_by_one_or_all(two_runs, memloc_says):
    assert memloc_says("runs", "delete", "aaaa")[1].startswith("deleted 1 runs, ")
    assert [info.address for info in runs.listing()] == ["aabb000000000000"]
    memloc_says("runs", "delete", "--all")
    assert runs.listing() == []


def test_a_damaged_run_can_be_deleted_as_its_message_says(two_runs, refused, memloc_says):
    (two_runs / "aaaa000000000000" / "history.json").write_text("{")
    assert "run `memloc runs delete aaaa000000000000`" in refused("runs")
    assert memloc_says("runs", "delete", "aaaa000000000000")[1].startswith("deleted 1 runs, ")
    assert [info.address for info in runs.listing()] == ["aabb000000000000"]


def test_a_whole_run_that_is_being_trained_again_is_one_run(two_runs, memloc_says):
    make_run(two_runs, "aabb000000000000", 10)
    assert memloc_says("runs", "show", "aabb")[1].splitlines()[-1].split() == ["augment", "false"]
    assert memloc_says("runs", "delete", "aabb")[1].startswith("deleted 1 runs, ")
    assert runs.addresses() == ["aaaa000000000000"]


def test_data_sets_are_listed_with_size_source_and_licence(memloc_says):
    _, out, _ = memloc_says("data", "list")
    (row,) = [line for line in out.splitlines() if line.startswith("fashionmnist")]
    source = datasets.SOURCES["fashionmnist"]
    assert "31 MB" in row
    assert source.url in row
    assert source.licence in row


def test_size_source_and_licence_come_before_a_download(memloc_says, monkeypatch, tmp_path, capsys):
    def get(name: str) -> Path:
        assert (
            "170 MB from https://www.cs.toronto.edu/~kriz/cifar.html, licence: none stated" in capsys.readouterr().out
        )
        return tmp_path

    monkeypatch.setattr(datasets, "get", get)
    assert memloc_says("data", "get", "cifar10")[:2] == (0, f"{tmp_path}\n")


@pytest.mark.parametrize(
    ("asked", "name", "terms"),
    [
        ("cifar-10n", "cifar-10n", "2 MB from https://github.com/UCSC-REAL/cifar-10-100n, licence: CC BY-NC 4.0"),
        ("cifar10n", "cifar-10n", "licence: CC BY-NC 4.0"),
        ("cscores", "cscores", "1 MB from https://pluskid.github.io/structural-regularity/, licence: none stated"),
        ("fashion-mnist", "fashionmnist", "licence: MIT"),
    ],
)
def test_hyphens_in_a_name_do_not_matter(memloc_says, monkeypatch, tmp_path, capsys, asked, name, terms):
    def get(found: str) -> Path:
        assert terms in capsys.readouterr().out
        return tmp_path / found

    monkeypatch.setattr(datasets, "get", get)
    assert memloc_says("data", "get", asked)[:2] == (0, f"{tmp_path / name}\n")


def test_a_download_that_fails_is_one_line(refused_get, monkeypatch):
    assert "could not be downloaded" in refused_get(OSError("cifar10 could not be downloaded (no network)"))


@pytest.fixture
def refused_get(memloc_says, monkeypatch) -> Callable[[Exception], str]:
    def get_with(error: Exception) -> str:
        def get(name: str) -> Path:
            raise error

        monkeypatch.setattr(datasets, "get", get)
        status, _, err = memloc_says("data", "get", "cifar10")
        assert (status, err.count("\n")) == (2, 1)
        return err

    return get_with


def test_an_unknown_data_set_is_refused_with_the_nearest(refused):
    assert refused("data", "get", "cifr10").startswith("unknown data set 'cifr10'; did you mean 'cifar10'?")


def test_the_folder_of_the_data_is_printed(memloc_says, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path))
    assert memloc_says("data", "path")[1] == f"{sources.root()}\n"


def test_a_command_whose_output_is_closed_says_nothing(book, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts after >&-
    assert cli.main(["list"]) == 0
