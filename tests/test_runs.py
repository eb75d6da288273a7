import errno
import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from memloc import progress, runs


@dataclass(frozen=True)
class Recipe:
    epochs: int = 2


def tensors(value):
    return {"weight": torch.full((2, 3), float(value)), "count": torch.tensor(value)}


def write(address="abc", epochs=2, wanted=(0, 2), finish=True):
    writer = runs.Writer(address, Recipe(epochs))
    assert writer.resume({"seen"}, set(wanted)) is None
    for epoch in range(epochs + 1):
        checkpoint = tensors(epoch) if epoch in wanted else None
        writer.keep(
            {"epoch": epoch, "loss": 1 / (epoch + 1), "seconds": 0.5}, tensors(10 + epoch), {"seen"}, checkpoint
        )
    return writer.finish({"seen": {"indices": torch.arange(3)}}, {"device": "cpu"}) if finish else writer


def test_a_finished_run_gives_back_what_was_written():
    write()
    run = runs.find("abc", Recipe())
    assert run.epochs == [0, 2]
    assert torch.equal(run.checkpoint(2)["weight"], torch.full((2, 3), 2.0))
    assert run.table("seen")["indices"].tolist() == [0, 1, 2]
    assert run.tables == ["seen"]
    assert list(run.history.loss) == [1, 1 / 2, 1 / 3]
    assert run.provenance == {"device": "cpu", "seconds": 1.5}
    assert run.recipe == Recipe()


def test_a_finished_run_holds_data_only_and_nothing_temporary(own_run_store):
    write()
    names = {path.name for path in (own_run_store / "abc").iterdir()}
    assert names == {
        "recipe.json", "history.json", "done", "seen.safetensors", "epoch_000.safetensors", "epoch_002.safetensors",
    }  # fmt: skip


def test_tied_and_channels_last_weights_can_be_kept():
    shared = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    writer = runs.Writer("tied", Recipe())
    writer.resume(set(), {0})
    writer.keep({"epoch": 0, "seconds": 0.0}, {}, set(), {"a": shared, "b": shared, "empty": torch.zeros(0)})
    state = writer.finish({}, {}).checkpoint(0)
    assert torch.equal(state["a"], shared)
    assert torch.equal(state["b"], shared)


def test_tensors_come_back_in_the_order_in_which_they_were_given():
    names = ["stem", "layer2", "layer10", "count", "fc"]
    given = {name: torch.zeros(2, dtype=torch.int64 if name == "count" else torch.float32) for name in names}
    writer = runs.Writer("abc", Recipe(0))
    writer.resume({"seen"}, {0})
    writer.keep({"epoch": 0, "loss": 1.0, "seconds": 0.5}, given, {"seen"}, given)
    assert list(runs.Writer("abc", Recipe(0)).resume({"seen"}, {0})) == names
    run = writer.finish({"seen": given}, {"device": "cpu"})
    assert list(run.table("seen")) == list(run.checkpoint(0)) == names


def test_a_file_without_an_order_of_its_own_is_read_in_that_of_the_names():
    run = write()
    content = safetensors.torch.save({f"conv{number}": torch.ones(1) for number in (7, 1, 3, 0, 2, 5, 4, 6)})
    (run.folder / "seen.safetensors").write_bytes(content)
    done = json.loads((run.folder / "done").read_text())
    done["files"]["seen.safetensors"] = hashlib.sha256(content).hexdigest()
    (run.folder / "done").write_text(json.dumps(done))
    assert list(runs.find("abc", Recipe()).table("seen")) == [f"conv{number}" for number in range(8)]


def test_an_epoch_or_a_table_that_was_not_kept_is_refused_by_name():
    run = write()
    with pytest.raises(KeyError, match=r"epoch 1 of run abc was not kept, epochs \[0, 2\] were"):
        run.checkpoint(1)
    with pytest.raises(KeyError, match="run abc has no table 'forgotten'"):
        run.table("forgotten")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_refused_with_the_command_that_helps(damage):
    run = write()
    path = run.folder / "epoch_002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "altered":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(OSError, match=r"epoch_002\.safetensors is missing or damaged .*`memloc runs delete abc`"):
        run.checkpoint(2)
    assert torch.equal(run.checkpoint(0)["weight"], torch.zeros(2, 3))


def test_a_damaged_list_of_files_is_refused(own_run_store):
    write()
    (own_run_store / "abc" / "done").write_text("{")
    with pytest.raises(OSError, match="done is missing or damaged: run `memloc runs delete abc`"):
        runs.find("abc", Recipe())


def test_an_unfinished_run_keeps_the_state_of_its_last_epoch_only(own_run_store):
    write(finish=False)
    folder = own_run_store / "abc.partial"
    assert [path.name for path in folder.glob("resume_*")] == ["resume_002.safetensors"]
    listed = json.loads((folder / "progress.json").read_text())["files"]
    assert sorted(listed) == ["epoch_000.safetensors", "epoch_002.safetensors", "resume_002.safetensors"]


def test_an_unfinished_run_is_not_found_but_taken_up():
    write(finish=False)
    assert runs.find("abc", Recipe()) is None
    writer = runs.Writer("abc", Recipe())
    state = writer.resume({"seen"}, {0, 2})
    assert state["count"].item() == 12
    assert [row["epoch"] for row in writer.rows] == [0, 1, 2]


@pytest.mark.parametrize(("tables", "epochs"), [({"other"}, {0, 2}), ({"seen"}, {1})])
def test_an_unfinished_run_without_what_is_wanted_starts_anew(own_run_store, tables, epochs):
    write(finish=False)
    assert runs.Writer("abc", Recipe()).resume(tables, epochs) is None
    assert [path.name for path in (own_run_store / "abc.partial").iterdir()] == ["recipe.json"]


def test_a_damaged_unfinished_run_is_refused_not_silently_dropped(own_run_store):
    write(finish=False)
    path = own_run_store / "abc.partial" / "resume_002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="`memloc runs delete abc`"):
        runs.Writer("abc", Recipe()).resume({"seen"}, {0})
    runs.delete("abc")
    assert runs.Writer("abc", Recipe()).resume({"seen"}, {0}) is None


def test_a_kill_between_any_two_writes_leaves_the_last_epoch_whole(monkeypatch, own_run_store):
    original, allowed = runs._write, [0]

    def write_some(path, content):
        if allowed[0] == 0:
            raise KeyboardInterrupt
        allowed[0] -= 1
        original(path, content)

    monkeypatch.setattr(runs, "_write", write_some)
    seen = set()
    for count in range(1, 16):
        allowed[0] = count
        try:
            write()
        except KeyboardInterrupt:
            allowed[0] = 1
            writer = runs.Writer("abc", Recipe())
            state = writer.resume({"seen"}, {0, 2})
            seen.add(None if state is None else state["count"].item())
            assert state is None or state["count"].item() == 10 + writer.rows[-1]["epoch"]
        allowed[0] = 100
        if runs.listing():
            runs.delete("abc")
    assert seen == {None, 10, 11, 12}


def test_a_newer_run_takes_the_place_of_an_older_one_at_the_same_address():
    write(wanted=(0,))
    assert write(wanted=(1, 2)).epochs == [1, 2]
    assert runs.find("abc", Recipe()).epochs == [1, 2]


def test_a_run_that_is_just_being_replaced_is_read_when_it_is_there_again():
    run = write()
    aside = run.folder.rename(run.folder.with_suffix(".old"))  # the moment between the two renames of another process
    with ThreadPoolExecutor() as pool:
        reads = [pool.submit(run.checkpoint, 2), pool.submit(run.table, "seen"), pool.submit(lambda: run.history)]
        assert len(wait(reads, timeout=0.1).not_done) == 3
        aside.rename(run.folder)
    assert torch.equal(reads[0].result()["weight"], tensors(2)["weight"])
    assert reads[1].result().keys() == {"indices"}
    assert list(reads[2].result().epoch) == [0, 1, 2]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_a_run_is_replaced_loses_nothing(monkeypatch, own_run_store, renames):
    write()
    writer, rename, done = write(finish=False), Path.rename, []

    def killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(path, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda folder: killed(folder, folder))
        writer.finish({}, {})
    if renames == 1:
        writer = runs.Writer("abc", Recipe())
        writer.resume({"seen"}, {0, 2})
        writer.finish({}, {})
    assert torch.equal(runs.find("abc", Recipe()).checkpoint(2)["weight"], tensors(2)["weight"])
    runs.delete("abc")
    assert [path.name for path in own_run_store.iterdir()] == [".locks"]


def test_the_list_tells_whole_runs_from_unfinished_ones():
    write("first")
    write("second", epochs=4, finish=False)
    second, first = runs.listing()
    assert (first.address, first.is_whole, first.epochs_done, first.epochs) == ("first", True, 2, 2)
    assert (second.address, second.is_whole, second.epochs_done, second.epochs) == ("second", False, 4, 4)
    assert first.recipe == {"epochs": 2}
    assert first.size_bytes > 100


def test_the_list_of_an_empty_store_is_empty():
    assert runs.listing() == []
    assert runs.addresses() == []


def test_whatever_else_lies_in_the_store_is_not_listed(own_run_store):
    write()
    for folder in ("my notes", "..hidden", "empty"):
        (own_run_store / folder).mkdir()
    (own_run_store / "my notes" / "history.json").write_text("[1,")
    (own_run_store / "file").write_text("")
    assert [info.address for info in runs.listing()] == runs.addresses() == ["abc"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
@pytest.mark.parametrize("name", ["history.json", "done"])
def test_a_damaged_run_is_named_with_the_command_that_helps_and_can_be_deleted(name, content):
    (write().folder / name).write_text(content)
    with pytest.raises(OSError, match=rf"{name} is missing or damaged: run `memloc runs delete abc`"):
        _ = runs.find("abc", Recipe()).history
    assert runs.addresses() == ["abc"]
    assert runs.delete("abc") > 100
    assert runs.listing() == []


def test_a_damaged_recipe_is_refused_by_the_list():
    (write().folder / "recipe.json").write_text("[]")
    with pytest.raises(OSError, match=r"recipe\.json is missing or damaged: run `memloc runs delete abc`"):
        runs.listing()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_progress_is_named_with_the_command_that_helps(own_run_store, content):
    write(finish=False)
    (own_run_store / "abc.partial" / "progress.json").write_text(content)
    with pytest.raises(OSError, match=r"progress\.json is missing or damaged: run `memloc runs delete abc`"):
        runs.Writer("abc", Recipe()).resume({"seen"}, {0})


def test_the_list_passes_over_files_and_runs_that_go_away_meanwhile(monkeypatch, own_run_store):
    write("gone", finish=False)
    write("stays", finish=False)
    original = Path.iterdir

    def iterdir(folder):
        names = list(original(folder))
        if folder.name == "gone.partial":
            folder.rename(own_run_store / "gone")
        else:
            (folder / "resume_002.safetensors").unlink()
        return iter(names)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [info.address for info in runs.listing()] == ["stays"]


def test_a_run_that_is_being_trained_is_not_deleted(own_run_store):
    write(finish=False)
    with runs.locked("abc"), pytest.raises(BlockingIOError, match="run abc is being trained by a process: end that"):
        runs.delete("abc")
    assert runs.Writer("abc", Recipe()).resume({"seen"}, {0}) is not None


def test_a_full_disk_is_told_with_what_to_do_and_leaves_nothing_half_written(monkeypatch, own_run_store):
    def write_half(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = write(finish=False)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): make room") as refused:
        writer.keep({"epoch": 3, "seconds": 0.0}, tensors(3), set())
    assert "\n" not in str(refused.value)
    assert not list((own_run_store / "abc.partial").glob(".*"))
    assert runs.Writer("abc", Recipe()).resume({"seen"}, {0})["count"].item() == 12


def test_a_store_that_cannot_be_written_is_read_without_a_lock(monkeypatch, own_run_store):
    write()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with runs.locked("abc"):
        assert runs.find("abc", Recipe()).epochs == [0, 2]
    assert not (own_run_store / ".locks").exists()


def test_what_a_killed_process_was_writing_is_cleared_away(own_run_store):
    write(finish=False)
    (own_run_store / "abc.partial" / ".epoch_002.safetensors.4711").write_bytes(b"half")
    writer = runs.Writer("abc", Recipe())
    writer.resume({"seen"}, {0})
    assert not list(writer.finish({}, {}).folder.glob(".*"))


@pytest.mark.parametrize("address", ["nothing", "../abc", ".locks", "", "."])
def test_only_a_run_can_be_deleted(own_run_store, address):
    write()
    with pytest.raises(KeyError, match="no run"):
        runs.delete(address)
    assert (own_run_store / "abc" / "done").exists()


def test_deleting_removes_finished_and_unfinished_alike(own_run_store):
    write()
    write(finish=False)
    runs.delete("abc")
    assert [path.name for path in own_run_store.iterdir()] == [".locks"]


def test_what_cannot_be_deleted_is_an_error(monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError("not yours")

    write()
    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        runs.delete("abc")


class Trap:
    """Makes a folder when a pickle of it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_planted_pickle_is_refused_and_never_run(tmp_path):
    run, trap = write(), tmp_path / "trap"
    content = pickle.dumps(Trap(trap))
    (run.folder / "epoch_002.safetensors").write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        run.checkpoint(2)

    done = json.loads((run.folder / "done").read_text())  # an attacker would put the right hash beside it
    done["files"]["epoch_002.safetensors"] = hashlib.sha256(content).hexdigest()
    (run.folder / "done").write_text(json.dumps(done))
    with pytest.raises(OSError, match="is not a safetensors file"):
        runs.find("abc", Recipe()).checkpoint(2)
    assert not trap.exists()


def test_the_store_is_where_the_environment_says_else_in_the_platforms_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLOC_RUNS", str(tmp_path))
    assert runs.root() == progress.store() == tmp_path
    monkeypatch.setenv("MEMLOC_RUNS", "~/runs")
    assert runs.root() == progress.store() == Path.home() / "runs"
    monkeypatch.delenv("MEMLOC_RUNS")
    assert runs.root() == progress.store()
    assert runs.root().parts[-2:] == ("memloc", "runs")
