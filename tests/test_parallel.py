"""Groups of two processes on gloo. What starts with an underscore runs in each of them."""

import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import filelock
import pandas as pd
import pytest
import torch
from torch import distributed as dist
from torch import nn

from memloc import datasets, gradients, labelnoise, models, observers, pairs, parallel, runs, training
from memloc.recipes import Recipe, Settings
from memloc.training import fit, train

# Neither examples nor batches can be halved, and the last batch is one example: the second process has none.
PLAIN = Recipe(model="mlp", width=16, examples=64, batch_size=21, epochs=4, learning_rate=0.1, processes=2)
NORMED = replace(PLAIN, model="small_cnn", width=4, batch_size=24, epochs=3)


class Group:
    """Starts two processes that call a function as one group, and collects what each of them returns or raises."""

    def __init__(self, store: Path, folder: Path):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["memloc.training", "sklearn.datasets"])
        self.store, self.folder, self.started = store, folder, 0

    def __call__(self, function, *arguments):
        self.started += 1
        file, receivers = self.folder / f"group{self.started}", []
        for rank in range(2):
            receiver, sender = self.context.Pipe(duplex=False)
            arguments_ = (rank, file, self.store, sender, function, arguments)
            self.context.Process(target=_member, args=arguments_).start()
            sender.close()  # so that receiving from a process that has died fails
            receivers.append(receiver)
        return [receiver.recv() for receiver in receivers]


@pytest.fixture
def group(own_run_store, tmp_path):
    return Group(own_run_store, tmp_path)


def _member(rank, file, store, sender, function, arguments):
    os.environ |= {"MEMLOC_RUNS": str(store), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    how = {"init_method": f"file://{file}", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", **how)
    try:
        found = function(*arguments)
    except Exception as error:
        found = error.__class__(str(error))
    sender.send(found)


def _forbidden(*arguments, **keywords):
    raise AssertionError("a process that is not the first must not write")


def _found(run, epoch):
    """Take what a test compares out of a run, as what can be sent: tensors cannot."""
    checkpoint = {name: value.numpy() for name, value in run.checkpoint(epoch).items()}
    return run.history.drop(columns="seconds"), checkpoint


def _fitted(*recipes):
    if parallel.rank() == 1:
        runs._write = runs._remove = runs.filelock.FileLock = _forbidden
    found = []
    for recipe in recipes:
        watch = [observers.Predictions(), observers.Checkpoints([2])]
        run = fit(recipe, observers=watch)
        kept = {name: value.numpy() for name, value in watch[1].states[2].items()}
        found.append((*_found(run, recipe.epochs), watch[0].table()["predictions"].numpy(), kept))
    return found


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "tolerance"),
    [({"augment": True, "dropout": "tied"}, 1e-4), ({"loss": "mat"}, 1e-4), ({"precision": "fp16"}, 5e-3)],
    ids=str,
)
def test_two_processes_train_what_one_trains_and_only_the_first_writes(group, change, tolerance):
    recipe, watch = replace(PLAIN, **change), [observers.Predictions(), observers.Checkpoints([2])]
    alone = fit(replace(recipe, processes=1), observers=watch)
    both = group(_fitted, recipe)
    for ((history, checkpoint, predictions, kept),) in both:
        pd.testing.assert_frame_equal(history, alone.history.drop(columns="seconds"), rtol=0, atol=tolerance)
        close(checkpoint, alone.checkpoint(4), tolerance)
        close(kept, watch[1].states[2], tolerance)
        assert (predictions == watch[0].table()["predictions"].numpy()).mean() > 1 - tolerance
    moved = [(alone.checkpoint(4)[name] - value).abs().max() for name, value in alone.checkpoint(0).items()]
    assert max(moved) > 100 * tolerance or change == {"precision": "fp16"}
    (first,), (second,) = both
    assert all((first[3][name] == second[3][name]).all() for name in first[3])


@pytest.mark.slow
def test_a_whole_run_is_loaded_by_any_number_of_processes(group, monkeypatch):
    alone = fit(replace(PLAIN, processes=1), observers=[observers.Predictions(), observers.Checkpoints([2])])
    ((first, _),) = [[found[0] for found in group(_fitted, alone.recipe)]]
    pd.testing.assert_frame_equal(first[0], alone.history.drop(columns="seconds"), check_exact=True)
    both = group(_fitted, PLAIN)
    monkeypatch.delattr(training._Loop, "epoch")
    pd.testing.assert_frame_equal(fit(PLAIN).history.drop(columns="seconds"), both[1][0][0])


@pytest.mark.slow
def test_batch_norm_takes_the_statistics_of_a_share_and_its_running_ones_are_those_of_the_first(group):
    ((_, checkpoint, _, kept),), ((_, _, _, seen_by_second),) = group(_fitted, NORMED)
    assert all((kept[name] == seen_by_second[name]).all() for name in checkpoint)

    data = training.prepare(NORMED)
    twins = [models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0) for _ in range(2)]
    alone = replace(NORMED, processes=1)
    loop = training._Loop(models.small_cnn(width=4), data, alone, training.cross_entropy, [])
    how = {"momentum": NORMED.momentum, "weight_decay": NORMED.weight_decay}
    optimizers = [torch.optim.SGD(twin.parameters(), 0.1, **how) for twin in twins]
    for epoch in range(1, NORMED.epochs + 1):
        for step, batch in enumerate(loop.batches(epoch)):
            half = (len(batch.indices) + 1) // 2
            for twin, optimizer, own in zip(twins, optimizers, (slice(half), slice(half, None)), strict=True):
                optimizer.zero_grad()
                losses = nn.functional.cross_entropy(twin(batch.images[own]), batch.labels[own], reduction="none")
                (losses.sum() / len(batch.indices)).backward()
            for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
                a.grad += b.grad
                b.grad = a.grad
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = training.learning_rate(NORMED, (epoch - 1 + (step + 0.5) / 3) / 3)
                optimizer.step()
    close(checkpoint, twins[0].state_dict(), 1e-5)
    assert not torch.equal(twins[0].conv1[1].running_mean, twins[1].conv1[1].running_mean)


class Interrupted(Exception):
    pass


def _interrupted(store, last):
    whole = fit(NORMED, observers=[observers.Predictions()])
    os.environ["MEMLOC_RUNS"] = store
    original, trained = training._counted, []

    def cut(epochs, *_):
        for epoch in epochs:
            yield epoch
            if epoch == last:
                raise Interrupted

    def counted(epochs, *_):
        trained.extend(epochs)
        return epochs

    training._counted = cut
    try:
        fit(NORMED, observers=[observers.Predictions()])
    except Interrupted:
        training._counted = counted
    resumed = fit(NORMED, observers=[observers.Predictions()])
    training._counted = original
    same = all(
        torch.equal(value, resumed.checkpoint(epoch)[name])
        for epoch in whole.epochs
        for name, value in whole.checkpoint(epoch).items()
    )
    tables = [run.table("predictions")["predictions"] for run in (whole, resumed)]
    return trained, same, torch.equal(*tables), list(whole.history.loss) == list(resumed.history.loss)


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 1, 3])
def test_an_interrupted_training_of_two_processes_goes_on_and_ends_with_the_same_bits(group, tmp_path, last):
    both = group(_interrupted, str(tmp_path / "interrupted"), last)
    assert both == [(list(range(last + 1, 4)), True, True, True)] * 2


def _elsewhere(store, rank, is_whole):
    if is_whole:
        fit(PLAIN)
    if parallel.rank() == rank:
        os.environ["MEMLOC_RUNS"] = store
    fit(PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "is_whole"), [(1, False), (1, True), (0, True)])
def test_processes_that_do_not_see_one_store_are_told(group, tmp_path, rank, is_whole):
    first, second = group(_elsewhere, str(tmp_path / "elsewhere"), rank, is_whole)
    assert isinstance(second, OSError)
    assert "is not there: let $MEMLOC_RUNS be one folder that all processes of a training share" in str(second)
    assert isinstance(first, RuntimeError)  # the other one is gone


def _waiting():
    asked = []

    @contextmanager
    def hold():
        asked.append("refused" if len(asked) < 2 else "held")
        if asked[-1] == "refused":
            raise filelock.Timeout("somebody else holds it")
        yield
        asked.append("left")

    with parallel.held_by_first(hold):
        inside = list(asked)
    return inside, asked, parallel.agreed(parallel.rank() == 0)


@pytest.mark.slow
def test_a_group_waits_together_for_what_somebody_else_holds(group):
    """Else the others would time out where the first waits for another group that trains the same run for hours."""
    held = ["refused", "refused", "held"]
    assert group(_waiting) == [(held, [*held, "left"], True), ([], [], True)]


class Draws(nn.Linear):
    def forward(self, images):
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return super().forward(images.flatten(1))


def drawing():
    torch.manual_seed(parallel.rank())  # other initial weights in each process
    model = Draws(64, 10)
    model.drawn = []
    return model


def _drawn():
    data, model, size = training.prepare(PLAIN), drawing(), parallel.size()
    settings = Settings(epochs=4, batch_size=32, processes=size)
    # The second never wants to stop.
    history = train(model, data, settings, stop=lambda rows: parallel.rank() == 0 and len(rows) == 3)
    return model.drawn, len(history), model.weight.detach().numpy()


@pytest.mark.slow
def test_processes_draw_other_numbers_and_start_and_stop_as_the_first_does(group):
    alone, (first, second) = _drawn(), group(_drawn)
    assert first[0] == alone[0]
    assert len(set(first[0] + second[0])) == 8
    assert alone[1] == first[1] == second[1] == 3
    assert (first[2] == second[2]).all()
    torch.testing.assert_close(torch.as_tensor(first[2]), torch.as_tensor(alone[2]), rtol=0, atol=1e-5)


def _collectives():
    rank, parameters = parallel.rank(), [nn.Parameter(torch.zeros(2, 3)) for _ in range(4)]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    whole, second, _, infinite, short = parameters
    whole.grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    infinite.grad = torch.full((2, 3), torch.inf if rank == 0 else 1.0)
    short.grad = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    if rank == 1:
        second.grad = torch.full((2, 3), 7.0)
    parallel.sum_gradients(parameters)
    sums = [None if p.grad is None else p.grad.tolist() for p in parameters]

    model = nn.Conv2d(3, 2, 1).to(memory_format=torch.channels_last)
    buffers = torch.tensor([rank == 0, True]), torch.tensor(rank), torch.rand(0), torch.tensor([rank]).bfloat16()
    buffers = *buffers, torch.full((4,), rank)[::2]
    for number, buffer in enumerate(buffers):
        model.register_buffer(f"buffer{number}", buffer)
    parallel.spread(model)

    shares = [parallel.share(torch.arange(count)).tolist() for count in (5, 1)]
    rows = torch.tensor([[index, torch.nan] for index in shares[0]])
    together = [
        parallel.gathered(rows, 5).tolist(),
        parallel.gathered(torch.tensor(shares[1], dtype=torch.int64), 1).tolist(),
    ]
    return sums, [b.tolist() for b in model.buffers()], shares, str(together), parallel.agreed(rank == 0)


@pytest.mark.slow
def test_sums_parts_and_decisions_are_those_of_all_processes(group):
    for rank, (sums, buffers, shares, together, decision) in enumerate(group(_collectives)):
        infinite = [[torch.inf] * 3] * 2
        assert sums == [[[0, 3, 6], [9, 12, 15]], [[7.0] * 3] * 2, None, infinite, [1.0, 4.0]]
        assert buffers == [[True, True], 0, [], [0.0], [0, 0]]
        assert shares == [[[0, 1, 2], [0]], [[3, 4], []]][rank]
        assert together == str([[[float(index), torch.nan] for index in range(5)], [0]])
        assert decision is True


def _listening():
    fit(PLAIN)
    inodes = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]


def _is_open(descriptor):
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_listens_beyond_loopback_on_one_machine(group):
    for addresses in group(_listening):
        assert addresses
        assert set(addresses) <= {"0100007F", "0" * 24 + "01000000"}


SCRIPT = """
from dataclasses import replace
from memloc import parallel
from memloc.recipes import Recipe
from memloc.training import fit
recipe = {recipe!r}
fit(recipe)
if parallel.rank() == 1:
    raise SystemExit("the second process ends")
fit(replace(recipe, seed=1))
"""


def torchrun(folder, code):
    script = folder / "script.py"
    script.write_text(code)
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.usefixtures("own_run_store")
def test_the_script_of_the_page_on_scaling_trains_as_it_stands(tmp_path):
    page = (Path(__file__).parents[1] / "book" / "scaling.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    ended = torchrun(tmp_path, code)
    assert ended.returncode == 0, ended.stderr
    (info,) = runs.listing()
    assert (info.is_whole, info.recipe["processes"]) == (True, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("own_run_store")
def test_torchrun_trains_and_ends_all_processes_when_one_fails(tmp_path):
    ended = torchrun(tmp_path, SCRIPT.format(recipe=PLAIN))
    assert ended.returncode != 0
    assert "the second process ends" in ended.stderr
    trained, alone = fit(PLAIN), fit(replace(PLAIN, processes=1))
    assert [info.address for info in runs.listing() if info.is_whole] == [alone.address, trained.address]
    pd.testing.assert_frame_equal(trained.history, alone.history.assign(seconds=trained.history.seconds), atol=1e-4)


@pytest.mark.parametrize(("backends", "expected"), [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_a_decision_travels_on_a_device_that_the_group_can_send_from(monkeypatch, backends, expected):
    devices = []
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "broadcast", lambda flag, source: None)
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: devices.append(device) or torch.full((), value))
    assert parallel.agreed(True)
    assert devices == [expected]


# What several processes cannot do.


@pytest.fixture
def two(monkeypatch):
    """A second process that is never asked, because what follows is refused."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)


def data():
    return labelnoise.apply(datasets.load("digits", examples=64), "flip", 0.25, seed=0)


SHARED = Settings(epochs=1, batch_size=16, processes=2)


def test_settings_for_several_processes_are_refused_by_one():
    with pytest.raises(
        ValueError, match=r"processes must be .*, 1, got 2: start them with `torchrun --nproc-per-node=2`"
    ):
        train(models.mlp(64), data(), SHARED)


@pytest.mark.usefixtures("two")
def test_settings_for_one_process_are_refused_by_several():
    with pytest.raises(ValueError, match="processes must be the number of those that train, 2, got 1: set processes=2"):
        train(models.mlp(64), data(), replace(SHARED, processes=1))


@pytest.mark.usefixtures("two")
def test_batches_too_small_for_all_processes_are_refused():
    for change, examples in (({"batch_size": 1}, None), ({}, torch.arange(64) == 5)):
        with pytest.raises(ValueError, match="batch_size must give each of 2 processes an example, got 1"):
            train(models.mlp(64), data(), replace(SHARED, **change), examples=examples)


@pytest.mark.usefixtures("two")
def test_observers_that_look_at_batches_are_refused():
    watch = [observers.Predictions(), gradients.GradientAccounting()]
    with pytest.raises(
        ValueError, match=r"observers must leave batches alone that 2 processes share, got \['gradients"
    ):
        train(models.mlp(64), data(), SHARED, observers=watch)


@pytest.mark.usefixtures("two")
def test_pairs_are_refused():
    pair = pairs.Pair(models.mlp(64), models.mlp(64), data().train.labels)
    with pytest.raises(ValueError, match="a Pair weighs whole batches, and a process here sees 1/2 of them"):
        train(pair, data(), SHARED, loss=pair.loss)
    with pytest.raises(ValueError, match="processes must be 1 for loss 'xrm', which weighs whole batches, got 2"):
        Recipe(loss="xrm", processes=2)
    assert Recipe(loss="mat", processes=2).pair == Recipe(loss="xrm")


def test_an_environment_that_only_has_the_number_of_processes_is_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK"):
        parallel.join()
    for count in ("two", "", "0", "-1"):
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match=f"WORLD_SIZE must be a number of processes, .*, got '{count}': unset it"):
            fit(PLAIN)
