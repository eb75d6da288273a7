"""Sweeps on a real Ray cluster of two nodes, and what becomes of them when something breaks."""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from memloc import cells, cli, grids, runs, sweeps
from memloc.grids import Resources

ray = pytest.importorskip("ray", reason="Ray, the extra memloc[sweep], is not installed")

COMMAND = [sys.executable, "-c", "import sys; from memloc.cli import main; sys.exit(main())"]
LOG = "import os, time\nopen('log', 'a').write(f'{seed}\\n')"
RECORD = "from memloc import chapters\nchapters.record({'twice': 2 * seed, 'verdict': 'holds'})"
SLOW_TRAINING = {"model": "mlp", "width": 32, "epochs": 200, "batch_size": 32, "noise_rate": 0.1}

# One cluster for all; on other cores other tests go on.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each on this machine; further ones can be added and removed."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in sweeps.RAY_SETTINGS.items():
            patch.setenv(name, value)
        found = Cluster()
        for _ in range(2):
            found.add_node(num_cpus=1, object_store_memory=80_000_000, memory=8_000_000_000)
        yield found
        found.shutdown()


@pytest.fixture
def book(small_book, monkeypatch):
    monkeypatch.chdir(small_book.root)
    return small_book


def log(book) -> list[str]:
    return sorted((book.root / "log").read_text().split())


def wait_until(is_true, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def start(book, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "sweep", *words], cwd=book.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_many_cells_that_end_at_once_are_taken_at_once(book, cluster, monkeypatch):
    def work(content, root, where):
        return {"error": "no", "details": ""}

    monkeypatch.setattr(sweeps, "_work", work)
    book.chapter("work", RECORD)
    todo = grids.from_words("work", ["seed=" + ",".join(map(str, range(100)))], book.root, Resources(memory_gb=1))
    shown: list[sweeps.Status] = []
    outcome = sweeps.sweep(todo, root=book.root, address=cluster.address, show=shown.append)
    assert len(outcome.failures) == 100
    assert len(shown) < 50, "about once a second"


def training_spec(book, **changes) -> Path:
    import yaml

    path = book.root / "grid.yaml"
    path.write_text(yaml.safe_dump({"cells": [{"training": SLOW_TRAINING, "grid": {"seed": [0, 1]}, **changes}]}))
    return path


def test_cells_run_side_by_side_once_and_come_as_one_table(book, cluster):
    book.chapter("work", LOG + "\ntime.sleep(0.5)", RECORD)
    words = ["work", "-p", "seed=0,1,2,3", "--memory-gb", "1", "--address", cluster.address]
    status, out, err = end(start(book, *words))
    assert status == 0, out + err
    assert log(book) == ["0", "1", "2", "3"]
    assert "4 cells: 0 done already, 4 to do (time unknown)" in out
    rows = list(csv.DictReader((cells.folder() / "work.csv").read_text().splitlines()))
    twice = {row["seed"]: row["value"] for row in rows if row["metric"] == "twice"}
    assert twice == {"0": "0", "1": "2", "2": "4", "3": "6"}
    assert {row["status"] for row in rows} == {"done"}
    status, out, _ = end(start(book, *words, "-o", "again.csv"))
    assert (status, log(book)) == (0, ["0", "1", "2", "3"])
    assert "4 done already, 0 to do\n" in out
    assert (book.root / "again.csv").read_text() == (cells.folder() / "work.csv").read_text()


def test_a_failing_cell_and_one_without_memory_leave_the_others_alone(book, cluster):
    code = LOG + "\nif seed == 1:\n    raise RuntimeError('no way')\nkept = bytearray(900_000_000 * (seed == 2))"
    book.chapter("work", code + "\ntime.sleep(2 * (seed == 2))", RECORD)
    words = ["work", "-p", "seed=0,1,2,3", "--memory-gb", "0.6", "--address", cluster.address]
    status, out, err = end(start(book, *words))
    assert (status, err.count("Traceback")) == (1, 0), out + err
    assert "2 done, 2 failed" in out
    assert "RuntimeError: no way" in out
    assert "memory_gb must cover what the cell takes" in out
    assert "alone: memloc run work -p seed=1" in out
    statuses = {
        row["seed"]: row["status"] for row in csv.DictReader((cells.folder() / "work.csv").read_text().splitlines())
    }
    assert statuses == {"0": "done", "1": "failed", "2": "failed", "3": "done"}
    end(start(book, *words))
    assert log(book) == ["0", "1", "1", "2", "2", "3"], "what failed is tried again, what is done is not"


def worker_of(address: str) -> psutil.Process:
    """The worker of Ray that runs a cell."""
    return psutil.Process(json.loads((cells.folder() / f"{address}.running").read_text())["pid"])


def addresses(book) -> list[str]:
    return [cell.address for cell in grids.read_spec(book.root / "grid.yaml", book.root)]


def test_a_killed_worker_s_training_goes_on_from_its_last_checkpoint(book, cluster, history):
    training_spec(book, memory_gb=1)
    first, second = addresses(book)
    driver = start(book, "grid.yaml", "--address", cluster.address)
    wait_until(lambda: len(history(first)) > 20)
    before = history(first)[:15]
    worker_of(first).kill()
    status, out, err = end(driver)
    assert status == 0, out + err
    assert len(history(first)) == len(history(second)) == SLOW_TRAINING["epochs"] + 1
    assert history(first)[:15] == before, "seconds and all: these epochs were not trained again"


def test_a_killed_driver_starts_again_where_it_was(book, cluster, history):
    training_spec(book, memory_gb=1)
    first, second = addresses(book)
    driver = start(book, "grid.yaml", "--address", cluster.address)
    wait_until(lambda: min(len(history(first)), len(history(second))) > 20)
    before = {address: history(address)[:15] for address in (first, second)}
    driver.kill()
    driver.communicate()
    again = start(book, "grid.yaml", "--address", cluster.address)
    rival = start(book, "grid.yaml", "--address", cluster.address)
    for process in (again, rival):
        status, out, err = end(process)
        assert status == 0, out + err
        assert "2 done, 0 failed" in out
    for address in (first, second):
        assert history(address)[:15] == before[address]
        assert len(history(address)) == SLOW_TRAINING["epochs"] + 1


def test_a_removed_node_s_cells_go_on_elsewhere(book, cluster):
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000, memory=8_000_000_000)
    book.chapter("work", LOG + "\ntime.sleep(4)", RECORD)
    driver = start(book, "work", "-p", "seed=0,1,2,3", "--memory-gb", "1", "--address", cluster.address)
    wait_until(lambda: len(list(cells.folder().glob("*.running"))) == 3)
    cluster.remove_node(node, allow_graceful=False)
    book.chapter("other", RECORD)
    at_once = start(book, "other", "--memory-gb", "1", "--address", cluster.address)
    for process, done in ((driver, 4), (at_once, 1)):
        status, out, err = end(process)
        assert status == 0, out + err
        assert f"{done} done, 0 failed" in out
    assert set(log(book)) == {"0", "1", "2", "3"}


def test_a_store_that_is_lost_or_not_seen_is_an_error_at_once(book, cluster, monkeypatch):
    book.chapter("work", LOG + "\ntime.sleep(30)", RECORD)
    driver = start(book, "work", "-p", "seed=0,1", "--memory-gb", "1", "--address", cluster.address)
    wait_until(lambda: (book.root / "log").exists())
    shutil.rmtree(runs.root(), ignore_errors=True)
    status, out, err = end(driver)
    assert status == 2
    assert f"the store {runs.root()} is gone" in err
    assert "Traceback" not in out + err
    assert "does not see the store" in sweeps._probe(str(book.root / "cells" / ".sweep-1"), "0", {}, [])


def test_a_node_without_the_data_is_an_error_before_anything_starts(book, cluster, monkeypatch):
    monkeypatch.setenv("MEMLOC_DATA", "nowhere")
    spec = training_spec(book)
    spec.write_text(spec.read_text().replace("model: mlp", "dataset: mnist"))
    status, out, err = end(start(book, "grid.yaml", "--address", cluster.address))
    assert (status, err.count("\n")) == (2, 1), out + err
    assert "cannot read its data" in err
    assert f"{book.root}/nowhere" in err
    assert "memloc data get mnist" in err


def test_a_cell_that_no_node_has_room_for_is_refused(book, cluster):
    book.chapter("work", RECORD)
    status, _, err = end(start(book, "work", "--gpus", "1", "--address", cluster.address))
    assert status == 2
    assert "no node has room for a cell of work with cpus 1, gpus 1, memory_gb 4: the nodes have cpus 1" in err


def test_a_sweep_that_is_killed_three_times_ends_with_the_table_of_one_that_is_not(book, monkeypatch, tmp_path):
    for name in ("one", "two"):
        book.chapter(name, LOG + "\ntime.sleep(0.3)", RECORD)
    spec = book.root / "grid.yaml"
    block = {"grid": {"seed": list(range(12))}, "memory_gb": 1}
    spec.write_text(json.dumps({"cells": [{"chapter": name} | block for name in ("one", "two")]}))
    words = ["grid.yaml", "--workers", "2", "-o", "killed.csv"]
    for done in (3, 9, 15):
        driver = start(book, *words)
        wait_until(lambda done=done: len(list(cells.folder().glob("*.json"))) >= done)
        driver.kill()
        driver.communicate()
    status, out, err = end(start(book, *words))
    assert (status, "24 done, 0 failed" in out) == (0, True), out + err
    seeds = log(book)
    assert 24 <= len(seeds) <= 24 + 3 * 2, "at most what was running was run again"
    monkeypatch.setenv("MEMLOC_RUNS", str(tmp_path / "other"))
    shutil.rmtree(book.root / "_build")
    status, out, err = end(start(book, *words[:-1], "undisturbed.csv"))
    assert (status, len(log(book)) - len(seeds)) == (0, 24), out + err
    assert (book.root / "killed.csv").read_text() == (book.root / "undisturbed.csv").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk to fill")
def test_a_full_disk_fails_cells_and_leaves_nothing_half_written(book, cluster, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        monkeypatch.setenv("MEMLOC_RUNS", str(disk))
        training_spec(book, memory_gb=1)
        status, out, err = end(start(book, "grid.yaml", "--address", cluster.address))
        assert status == 1, out + err
        assert "make room for it" in out
        assert not list((disk / "cells").glob("*.json"))
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        spec = training_spec(book, memory_gb=1)
        spec.write_text(spec.read_text().replace("epochs: 200", "epochs: 5"))
        status, out, err = end(start(book, "grid.yaml", "--address", cluster.address))
        assert status == 0, out + err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_ray_on_this_machine_listens_on_the_loopback_alone_and_ends_when_told(book):
    book.chapter("work", LOG + "\ntime.sleep(8)", RECORD)
    driver = start(book, "work", "--memory-gb", "1", "--workers", "1")
    wait_until(lambda: (book.root / "log").exists())
    listening, commands = set(), []
    for each in psutil.Process(driver.pid).children(recursive=True):
        try:
            commands.append(" ".join(each.cmdline()))
            sockets = each.net_connections("inet")
            listening |= {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended
            continue
    assert any("gcs_server" in command for command in commands), "these are Ray's processes"
    assert listening, "Ray listens somewhere"
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    dashboards = [command for command in commands if "dashboard/dashboard.py" in command]
    assert all("--disable-frontend" in command for command in dashboards), dashboards
    driver.terminate()
    status, _, err = end(driver)
    assert (status, err.splitlines()[-1]) == (130, "memloc: interrupted"), "as after Ctrl-C, though Ray takes SIGTERM"
    assert "SIGTERM" not in err


def test_without_ray_the_command_says_what_to_install(book, monkeypatch, capsys):
    book.chapter("work", RECORD)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", "work"]) == 2
    assert (
        capsys.readouterr().err
        == "memloc: sweeps need Ray, the extra memloc[sweep]: pip install -e '.[sweep]' in the clone\n"
    )
    assert cli.main(["sweep", "work", "--dry-run"]) == 0


@pytest.mark.parametrize("address", ["local", "ray://localhost:1", "10.0.0.1", ":1", "localhost:1", "localhost:99999"])
def test_an_address_where_no_cluster_is_gets_one_line_at_once(book, capsys, address):
    book.chapter("work", RECORD)
    begin = time.monotonic()
    assert cli.main(["sweep", "work", "--address", address]) == 2
    assert time.monotonic() - begin < 5
    said = capsys.readouterr().err
    assert (address in said, said.count("\n")) == (True, 1)


def test_an_estimate_takes_cells_that_differ_in_the_seed_or_in_anything_but_the_chapter(book):
    book.chapter("work", RECORD, parameters="seed: int = 0  # first\nepochs: int = 1  # passes")
    done = grids.from_words("work", ["seed=0,1"], book.root, Resources())
    for cell, seconds in zip(done, (10.0, 20.0), strict=True):
        content = {"address": cell.address, "chapter": "work", "parameters": cell.full, "metrics": {}}
        cells._write(cells.result_file(cell), content | {"seconds": seconds})
    same = sweeps.estimate(grids.from_words("work", ["seed=0,1,2"], book.root))
    assert (same.done, same.todo, same.seconds, same.unknown) == (2, 1, 15.0, 0)
    typed, left_out = (grids.read_spec(training_spec(book, training=each), book.root) for each in ({"epochs": 50}, {}))
    cells._write(cells.result_file(typed[0]), {"chapter": None, "parameters": typed[0].full, "seconds": 7.0})
    assert sweeps.estimate(left_out).seconds == 14.0, "fifty epochs are the default"
    other = sweeps.estimate(grids.from_words("work", ["seed=0,1", "epochs=2"], book.root))
    assert (other.done, other.todo, other.seconds) == (0, 2, 30.0)
    book.chapter("other", RECORD)
    unknown = sweeps.estimate(grids.from_words("other", [], book.root))
    assert (unknown.seconds, unknown.unknown) == (None, 1)


def test_a_damaged_result_is_no_ground_for_an_estimate(book):
    book.chapter("work", RECORD)
    (cell,) = grids.from_words("work", [], book.root)
    damaged = {"chapter": "work", "parameters": cell.full, "metrics": {}}
    for number, seconds in enumerate((None, "long", [1], 10**400)):
        cells._write(cells.folder() / f"{number}.json", damaged | {"seconds": seconds})
    (cells.folder() / "deep.json").write_text("[" * 100_000)
    found = sweeps.estimate([cell])
    assert (found.todo, found.seconds, found.unknown) == (1, None, 1)


def test_a_table_has_a_row_for_a_cell_that_recorded_nothing_and_quotes_what_needs_it(book):
    book.chapter("work", RECORD)
    todo = grids.from_words("work", ["seed=0,1"], book.root)
    found = {todo[0].address: {"metrics": {}}, todo[1].address: {"metrics": {"a": 'x, "y"\nz', "b": None}}}
    sweeps.write_table(book.root / "t.csv", todo, sweeps.Outcome(found))
    with (book.root / "t.csv").open(newline="") as file:
        rows = [(row["seed"], row["status"], row["metric"], row["value"]) for row in csv.DictReader(file)]
    assert rows == [("0", "done", "", ""), ("1", "done", "a", 'x, "y"\nz'), ("1", "done", "b", "")]


def test_a_recorded_sweep_has_the_parameters_of_each_cell_and_what_it_found(book, capsys):
    book.chapter("work", RECORD)
    spec = Path("book/presets/sweeps/grid.yaml")
    spec.parent.mkdir(parents=True)
    spec.write_text("cells: [{chapter: work, grid: {seed: [0, 1]}}]")
    assert cli.main(["sweep", str(spec), "--record", "--dry-run"]) == 2
    assert "is not a git checkout" in capsys.readouterr().err
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], check=True)
    cell = grids.read_spec(spec, book.root)[1]
    assert cli.main(["sweep", str(spec), "--cell", cell.address, "--record"]) == 2
    assert "leave out --cell" in capsys.readouterr().err
    cells.run(cell, book.root)
    assert cli.main(["sweep", str(spec), "--record", "--dry-run"]) == 0
    path = book.root / "book" / "results" / "sweeps" / "grid.json"
    content = json.loads(path.read_text())
    (row,) = content["cells"]
    assert (content["command"], content["missing"]) == (f"memloc sweep {spec} --record --dry-run", 1)
    assert (row["chapter"], row["parameters"], row["metrics"]) == (
        "work",
        {"seed": 1},
        {"twice": 2, "verdict": "holds"},
    )
    assert len(row["commit"]) == 40
    assert cli.main(["sweep", "work", "--record"]) == 2
    assert "--record needs a file in book/presets/sweeps" in capsys.readouterr().err


def test_one_cell_alone_leaves_the_table_of_the_sweep(book, capsys):
    book.chapter("work", RECORD)
    cells.folder().mkdir(parents=True)
    (cells.folder() / "work.csv").write_text("whole")
    (cell,) = grids.from_words("work", ["seed=1"], book.root)
    assert cli.main(["sweep", "work", "-p", "seed=0,1", "--cell", cell.address]) == 0
    assert (cells.folder() / "work.csv").read_text() == "whole"
    assert cli.main(["sweep", "work", "-p", "seed=0,1", "--cell", cell.address, "-o", "one.csv"]) == 0
    assert len((book.root / "one.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grid.yaml", "--cpus", "2"], "--cpus belongs to a chapter"),
        (["grid.yaml", "--memory-gb", "2"], "--memory-gb belongs to a chapter"),
        (["work", "-p", "seed=0,1", "--cell", ""], "2 cells begin with ''"),
        (["work", "-o", "folder.csv"], "-o takes the path of a .csv file"),
    ],
)
def test_what_would_be_ignored_or_fail_at_the_end_is_refused_at_once(book, capsys, words, message):
    book.chapter("work", RECORD)
    training_spec(book)
    (book.root / "folder.csv").mkdir()
    assert cli.main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


def test_failures_are_listed_although_the_table_cannot_be_written(book, monkeypatch, capsys):
    book.chapter("work", "1 / seed")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweeps, "write_table", full)
    monkeypatch.setattr(cells, "run", full)
    assert cli.main(["sweep", "work", "--cell", "", "-o", "t.csv"]) == 2
    out, err = capsys.readouterr()
    assert "work: [Errno 28] No space left on device\n  alone: memloc run work" in out
    assert err == "memloc: [Errno 28] No space left on device\n"


def test_a_mark_that_is_damaged_or_left_by_a_killed_cell_is_not_shown_as_running(book):
    book.chapter("work", RECORD)
    todo = grids.from_words("work", ["seed=0,1,2"], book.root)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = {"node": platform.node(), "since": time.time()}
    marks = [here | {"pid": os.getpid()}, here | {"pid": ended.pid}, here | {"pid": "x", "since": None}]
    for cell, mark in zip(todo, marks, strict=True):
        cells._write(cells.folder() / f"{cell.address}.running", mark)
    status = sweeps._status(todo, sweeps.Outcome())
    assert (len(status.running), status.waiting, status.left_s) == (1, 2, None)


def test_the_time_left_goes_by_the_chapter_of_each_cell(book):
    for name in ("quick", "slow", "new"):
        book.chapter(name, RECORD)
    quick, slow, new = (grids.from_words(name, ["seed=0,1,2"], book.root) for name in ("quick", "slow", "new"))
    results = {cell.address: {"seconds": 1.0} for cell in quick} | {slow[0].address: {"seconds": 100.0}}
    outcome = sweeps.Outcome(results, {slow[1].address: {}})
    assert sweeps._status([*quick, *slow], outcome).left_s == 100
    assert sweeps._status([*quick, *slow, *new], outcome).left_s == 100 + 3 * 50.5, "between the others"
