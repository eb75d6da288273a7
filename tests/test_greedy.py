import pytest
import torch

from memloc.flipping import PARITY, critical_channels
from memloc.gates import Gates
from memloc.greedy import batch_problems


@pytest.fixture
def rows_scored(monkeypatch):
    """How many rows went forward and backward in each call."""
    rows, score = [], Gates.scores

    def count(self, images, *rest):
        rows.append(len(images))
        return score(self, images, *rest)

    monkeypatch.setattr(Gates, "scores", count)
    return rows


def test_rows_that_carry_the_left_out_share_do_not_run_backward(trained, tiny, rows_scored):
    critical_channels(trained, tiny.train.images, tiny.train.labels, torch.tensor([4]), reference=32, copies=2)
    first, *later = rows_scored
    assert first == 32  # the reference batch, once
    assert later[0] <= 3  # the copies, and the target itself if it is in the batch
    assert later
    assert max(later) < 34


def test_targets_that_share_a_batch_get_a_fresh_one_each_time(tiny):
    images, labels = tiny.train.images, tiny.train.labels
    problems = batch_problems(images, labels, torch.arange(4), 3, 1, "independent", 0.0, torch.Generator())
    first, last = ({int((images == row).flatten(1).all(1).nonzero()[0, 0]) for row in p.shared} for p in problems)
    assert first == {0, 1, 2}  # three targets, then one with two others
    assert 3 in last
    assert first != last


def test_targets_of_one_batch_share_their_first_step(trained, tiny, rows_scored):
    batch = torch.arange(16)
    options = {"reference": batch, "copies": 2, "max_units": 2, "noise_scale": 0.0, "batch_size": 32}
    critical_channels(trained, tiny.train.images, tiny.train.labels, batch[:3], **PARITY | options)
    assert rows_scored[:2] == [32, 2 * 2 * 2]  # all rows; the two copies of two targets and those of the first
    assert set(rows_scored[2:]) == {32}  # from the second step on one by one
