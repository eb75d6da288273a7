import json
import math
import os
from pathlib import Path

import pytest
import torch

from memloc.good_bad_ugly import regression, truth


def recorded():
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    return json.loads((Path(folder) / "mat_good_bad_ugly.json").read_text())


def test_the_curve_is_the_papers():
    for x in (-1.5, -0.1, 0.0, 0.7, 1.5):
        expected = math.tanh(x) + 0.5 * math.tanh(-5 * x)
        assert truth(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-15)


def test_points_and_curve_are_the_recorded_ones():
    data, run = regression(1e-3, seed=0), recorded()["0.001"]
    torch.testing.assert_close(data.inputs[:, 0], torch.tensor(run["x_train"]), atol=1e-5, rtol=0)
    nearest = torch.searchsorted(data.curve_inputs[:, 0].contiguous(), torch.tensor(run["x"]) - 0.0015)
    torch.testing.assert_close(data.curve[nearest], torch.tensor(run["truth"]), atol=1e-4, rtol=0)


def test_there_are_twenty_points_and_thirty_noise_coordinates():
    data = regression(1e-3, seed=0)
    assert data.inputs.shape == (20, 31)
    assert data.targets.shape == data.positions.shape == (20,)
    assert data.curve_inputs.shape == (1000, 31)
    assert data.positions.tolist() == [index * 999 // 19 for index in range(20)]
    assert (data.curve_inputs[0, 0].item(), data.curve_inputs[-1, 0].item()) == (-1.5, 1.5)
    steps = data.curve_inputs[:, 0].diff()
    torch.testing.assert_close(steps, torch.full((999,), 3 / 999), atol=1e-6, rtol=0)


def test_noise_coordinates_are_zero_except_at_the_training_points():
    data = regression(0.1, seed=0)
    assert (data.curve_inputs[:, 1:] == 0).all()
    assert (data.inputs[:, 1:] != 0).all()
    assert torch.equal(data.clean_inputs[:, 0], data.inputs[:, 0])
    assert (data.clean_inputs[:, 1:] == 0).all()


def test_mixed_inputs_are_the_curves_with_the_training_points_in_their_places():
    data = regression(0.1, seed=0)
    rest = torch.ones(1000, dtype=torch.bool)
    rest[data.positions] = False
    assert torch.equal(data.mixed_inputs[data.positions], data.inputs)
    assert torch.equal(data.mixed_inputs[rest], data.curve_inputs[rest])
    assert (data.curve_inputs[:, 1:] == 0).all()


def test_both_noises_have_the_deviation_asked_for():
    data = regression(1e-3, seed=0, points=1000)
    assert data.inputs[:, 1:].std().item() == pytest.approx(1e-3, rel=0.02)
    assert (data.targets - data.curve).std().item() == pytest.approx(0.08, rel=0.12)
    assert regression(0.0, seed=0, label_noise=0.0).targets.equal(data.curve[regression(0.0, seed=0).positions])


def test_another_noise_scales_the_same_draws_and_leaves_the_targets():
    good, bad, ugly = (regression(noise, seed=3) for noise in (1e-4, 1e-3, 0.0))
    assert torch.equal(good.targets, bad.targets)
    assert torch.equal(good.targets, ugly.targets)
    torch.testing.assert_close(10 * good.inputs[:, 1:], bad.inputs[:, 1:])
    assert torch.equal(ugly.inputs, ugly.clean_inputs)


def test_the_draws_are_the_seeds_alone(global_generator_untouched):
    one, again, other = (regression(1e-3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.targets, again.targets)
    assert not torch.equal(one.inputs, other.inputs)
    assert not torch.equal(one.targets, other.targets)


def test_moving_to_a_device_takes_everything_along():
    moved = regression(1e-3, seed=0).to("meta")
    tensors = moved.inputs, moved.targets, moved.positions, moved.curve_inputs, moved.curve
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": 1}, "points must be from 2 to 1000 and dimensions at least 0, got 1 and 30"),
        ({"points": 1001}, "points must be from 2 to 1000"),
        ({"dimensions": -1}, "dimensions at least 0, got 20 and -1"),
        ({"noise": -1.0}, "noise and label_noise must be at least 0, got -1.0 and 0.08"),
        ({"label_noise": math.nan}, "noise and label_noise must be at least 0"),
    ],
)
def test_data_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        regression(**{"noise": 1e-3, "seed": 0} | changes)
