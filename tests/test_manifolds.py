import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc.centers import mean_cosine
from memloc.manifolds import _frame, balanced, frame_geometry, manifold_geometry, simulated_capacity
from memloc.randomness import generator
from memloc.shapes import ball, simplex, sphere_points


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


def measured(offsets, *, kappa=0.0, count=20_000, seed=0):
    """The geometry of one manifold, given its offsets ``(D, M)``."""
    offsets = torch.as_tensor(offsets, dtype=torch.float64)[None]
    return frame_geometry(offsets, normal(1, offsets.shape[1] + 1, count, seed=seed), kappa=kappa)


def assert_within(value, expected, error, times=3.0):
    assert abs(value.item() - expected) < times * error.item() + 1e-9, (
        f"{value.item()} ± {error.item()}, not {expected}"
    )


@pytest.mark.parametrize("kappa", [0, 0.5, 2])
def test_points_have_the_capacity_of_gardner(kappa):
    found = measured(torch.zeros(3, 2), kappa=kappa)
    assert_within(found.capacity, ball(0, 1, kappa).capacity, found.capacity_error)
    assert (found.radius, found.dimension, found.rank) == (0, 0, 0)


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.6, 1, 2])
def test_segments_are_as_the_closed_form_says(radius):
    found = measured([[-radius, radius]])
    assert_within(found.capacity, 1 / (0.5 + 2 / math.pi * math.atan(radius)), found.capacity_error)
    assert_within(found.radius, ball(radius, 1).radius, found.radius_error)
    assert_within(found.dimension, 1, found.dimension_error)
    assert found.rank == 1


@pytest.mark.parametrize("kappa", [0, 0.5])
@pytest.mark.parametrize("radius", [0.3, 1])
def test_a_polygon_of_200_corners_is_a_disc(radius, kappa):
    angles = torch.arange(200) * (2 * math.pi / 200)
    found = measured(radius * torch.stack([angles.cos(), angles.sin()]), kappa=kappa, count=5000)
    expected = ball(radius, 2, kappa)
    assert_within(found.capacity, expected.capacity, found.capacity_error)
    assert_within(found.radius, expected.radius, found.radius_error)
    assert found.dimension.item() == pytest.approx(expected.dimension, abs=1e-3)  # its error is less
    assert found.kkt_residual < 1e-8


def test_a_simplex_has_the_least_capacity_that_points_can_have():
    points = 50
    unit = torch.eye(points, dtype=torch.float64) - 1 / points
    found = measured(unit * math.sqrt(points), count=2000)  # squared length of an offset M - 1
    expected = simplex(points)
    assert_within(found.capacity, expected.capacity, found.capacity_error)
    assert found.radius.item() == pytest.approx(expected.radius, rel=0.02)
    assert found.dimension.item() == pytest.approx(expected.dimension, rel=0.02)
    assert found.rank == points - 1


@pytest.mark.parametrize("dimension", [5, 20])
def test_points_on_a_sphere_come_nearer_to_the_ball_the_more_they_are(dimension):
    points = sphere_points(0.5, dimension, 400, generator(0, "test"))[0]
    expected = ball(0.5, dimension).capacity
    found = [measured(points[:, :count], count=300).capacity.item() for count in (25, 100, 400)]
    assert found[0] > found[1] > found[2] > expected


@pytest.mark.parametrize("radius", [0.01, 0.1, 5, 50])
def test_however_long_or_flat_the_optimality_conditions_hold(radius):
    offsets = torch.linalg.qr(normal(4, 60, 10))[0] @ (normal(4, 10, 50, seed=1) * 0.85 ** torch.arange(10)[:, None])
    offsets = offsets + 0.02 * normal(4, 60, 50, seed=2)
    offsets = offsets - offsets.mean(2, keepdim=True)
    found = frame_geometry(offsets * (radius / offsets.norm(dim=1).mean()), normal(4, 61, 50))
    assert found.kkt_residual < 1e-8


def recorded(name):
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    return np.load(Path(folder) / f"mftma_{name}.npz")


@pytest.mark.parametrize("name", ["structured", "iid"])
@pytest.mark.parametrize("kappa", ["0", "0.5"])
def test_frames_and_draws_of_the_reference_code_give_its_results(name, kappa):
    data = recorded(name)
    frames, draws = torch.from_numpy(data["sD1"]), torch.from_numpy(data["t_vecs"]).double()
    found = frame_geometry(frames[:, :-1], draws, kappa=float(kappa), reference=True)
    for value, key, tolerance in (
        (found.capacity, "alpha", 1e-8),
        (found.radius, "R", 1e-6),
        (found.dimension, "D", 1e-6),
    ):
        np.testing.assert_allclose(value.numpy(), data[f"{key}_k{kappa}"], rtol=tolerance)
    assert found.kkt_residual < 1e-12


@pytest.mark.parametrize("name", ["structured", "iid"])
def test_frames_are_those_of_the_reference_code_in_whatever_basis(name):
    data = recorded(name)
    clouds = torch.from_numpy(data["X"]).double().mT
    middle = clouds.mean((0, 1))
    for cloud, frame in zip(clouds, torch.from_numpy(data["sD1"][:, :-1]), strict=True):
        ours = _frame(cloud - middle, torch.from_numpy(data["V11"]).double())
        torch.testing.assert_close(ours @ ours.mT, frame.mT @ frame, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["structured", "iid"])
@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_whole_call_agrees_with_the_reference_code_within_its_errors(name, is_corrected):
    data = recorded(name)
    activations = torch.from_numpy(data["X"]).mT.reshape(-1, 500)
    labels = torch.arange(20).repeat_interleave(50)
    found = manifold_geometry(activations, labels, draws=200, remove_common=is_corrected, reference=True).mean()
    suffix = "k0" if is_corrected else "nocorr"
    for ours, theirs in (("radius", "R"), ("dimension", "D")):
        expected = data[f"{theirs}_{suffix}"].mean()
        assert found[ours] == pytest.approx(expected, abs=5 * found[f"{ours}_error"] + 0.01 * expected)
    expected = 1 / (1 / data[f"alpha_{suffix}"]).mean()
    assert found["capacity"] == pytest.approx(expected, abs=5 * found["capacity_error"] + 0.01 * expected)
    if not is_corrected:
        assert found["removed"] == 0


def clouds(count=6, points=12, features=40, spread=1.0, seed=0):
    centers = normal(count, 1, features, seed=seed)
    return (centers + spread * normal(count, points, features, seed=seed + 1)).flatten(0, 1), torch.arange(
        count
    ).repeat_interleave(points)


def test_neither_order_nor_scale_nor_shift_nor_rotation_nor_names_matter():
    activations, labels = clouds()
    rotation = torch.linalg.qr(normal(40, 40, seed=9)).Q
    plain = manifold_geometry(activations, labels)
    moved = manifold_geometry(100 * activations @ rotation + 7, labels * 3 + 4)
    interleaved = torch.arange(72).view(6, 12).T.flatten()
    mixed = manifold_geometry(activations[interleaved], labels[interleaved])
    assert moved.labels.tolist() == [4, 7, 10, 13, 16, 19]
    for other in (moved, mixed):
        for name in ("capacity", "radius", "dimension"):
            torch.testing.assert_close(getattr(other, name), getattr(plain, name), rtol=1e-6, atol=1e-8)


def test_the_same_draws_serve_every_layer():
    activations, labels = clouds()
    other = activations + 0.01 * normal(72, 40, seed=5)
    same = [manifold_geometry(each, labels, draws=50, remove_common=False).mean() for each in (activations, other)]
    assert abs(same[0]["capacity"] - same[1]["capacity"]) < 0.3 * same[0]["capacity_error"]
    again = manifold_geometry(
        activations, labels, draws=50, remove_common=False, generator=generator(1, "other")
    ).mean()
    assert again["capacity"] != same[0]["capacity"]


@pytest.mark.usefixtures("global_generator_untouched")
def test_errors_say_how_much_results_vary_over_draws():
    activations, labels = clouds()
    found = [
        manifold_geometry(activations, labels, draws=60, remove_common=False, generator=generator(seed, "draws")).mean()
        for seed in range(40)
    ]
    for name in ("capacity", "radius", "dimension"):
        spread = np.std([each[name] for each in found], ddof=1)
        stated = np.mean([each[f"{name}_error"] for each in found])
        assert 0.6 < spread / stated < 1.5, name


def test_tighter_classes_have_more_capacity_and_less_radius_and_dimension():
    wide, tight = (manifold_geometry(*clouds(spread=spread)).mean() for spread in (2.0, 0.2))
    assert tight["capacity"] > 2 * wide["capacity"]
    assert tight["radius"] < wide["radius"]
    assert tight["dimension"] < wide["dimension"]


def test_the_mean_capacity_is_harmonic():
    found = manifold_geometry(*clouds())
    assert found.mean()["capacity"] == pytest.approx(6 / (1 / found.capacity).sum().item())
    table = found.table()
    assert list(table.columns)[:4] == ["label", "capacity", "radius", "dimension"]
    assert len(table) == 6


def test_common_directions_are_removed_and_reported():
    activations, labels = clouds(count=12, features=80, spread=0.3)
    shared = normal(12, 1, seed=7).repeat_interleave(12, 0) * normal(1, 80, seed=8) * 2
    found = manifold_geometry(activations + shared, labels)
    centers = (activations + shared).view(12, 12, 80).mean(1)
    assert found.removed >= 1
    assert found.center_correlation == pytest.approx(mean_cosine(centers - centers.mean(0)))
    assert manifold_geometry(activations + shared, labels, remove_common=False).removed == 0


def test_a_class_that_has_collapsed_has_no_extent_and_the_others_are_as_before():
    activations, labels = clouds()
    collapsed = activations.clone()
    collapsed[:12] = collapsed[:12].mean(0)
    found = manifold_geometry(collapsed, labels, remove_common=False)
    assert (found.rank[0], found.radius[0], found.dimension[0]) == (0, 0, 0)
    assert_within(found.capacity[0], 2, found.capacity_error[0], times=4)
    whole = manifold_geometry(activations, labels, remove_common=False)
    torch.testing.assert_close(found.capacity[1:], whole.capacity[1:])


@pytest.mark.parametrize("count", [2, 3, 6, 10])
@pytest.mark.parametrize("points", [2, 5])
@pytest.mark.parametrize("reference", [False, True])
def test_few_classes_of_few_points_are_no_obstacle(count, points, reference):
    found = manifold_geometry(*clouds(count=count, points=points, features=30), reference=reference, draws=50)
    assert found.capacity.isfinite().all()
    assert found.kkt_residual < 1e-8
    assert (found.rank == points - 1).all()


@pytest.mark.parametrize("reference", [False, True])
def test_more_points_than_features_are_no_obstacle(reference):
    found = manifold_geometry(*clouds(points=40, features=8), reference=reference, draws=50)
    assert found.capacity.isfinite().all()
    assert found.kkt_residual < 1e-8
    assert (found.dimension <= 8).all()


def test_points_in_a_space_of_few_dimensions_are_projected_as_exactly_as_others():
    activations, labels = clouds(count=10, points=20, features=7)
    wide = torch.linalg.qr(normal(20, 7, seed=3)).Q
    found = manifold_geometry(activations @ wide.T, labels, remove_common=False)
    assert (found.rank == 7).all()
    assert found.kkt_residual < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_of_any_precision_and_shape_will_do(dtype):
    activations, labels = clouds(features=48)
    found = manifold_geometry(activations.to(dtype).view(-1, 3, 4, 4), labels).mean()
    exact = manifold_geometry(activations, labels).mean()
    assert found["capacity"] == pytest.approx(exact["capacity"], rel=0.01)


def test_what_cannot_be_measured_is_refused_in_one_line():
    activations, labels = clouds()
    with pytest.raises(ValueError, match="labels must hold at least two classes, got 1"):
        manifold_geometry(activations, torch.zeros_like(labels))
    with pytest.raises(
        ValueError, match="equally many examples of each class, got 11 to 12: choose them with balanced"
    ):
        manifold_geometry(activations[1:], labels[1:])
    with pytest.raises(ValueError, match="at least two examples of each class, got one"):
        manifold_geometry(activations[::12], labels[::12])
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(72,\)"):
        manifold_geometry(activations, labels.float())
    with pytest.raises(ValueError, match="activations must be finite"):
        manifold_geometry(activations / 0, labels)
    with pytest.raises(ValueError, match="draws must be at least 2"):
        manifold_geometry(activations, labels, draws=1)
    with pytest.raises(ValueError, match="draws must be at least 2, for an error to be known, got -1"):
        manifold_geometry(activations, labels, draws=-1)
    with pytest.raises(ValueError, match="kappa must be at least 0, got -1"):
        manifold_geometry(activations, labels, kappa=-1)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        manifold_geometry(activations, labels, repeats=0)
    with pytest.raises(ValueError, match=r"shapes \(P, D, M\) and \(P, D \+ 1, n\), got \(1, 2, 3\) and \(1, 2, 9\)"):
        frame_geometry(normal(1, 2, 3), normal(1, 2, 9))
    flat = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"each class must have a centre of its own, \[0, 1\] have theirs"):
        manifold_geometry(flat, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 5])
def test_a_centre_in_the_middle_up_to_rounding_is_no_centre(dtype, shift):
    half = torch.randint(-3, 4, (3, 6, 30), generator=generator(0, "points")).double() / 3
    half[2] = -half[1]  # so that the mean of all is that of the first class, which is symmetric
    points = torch.cat([half, torch.cat([-half[:1], half[1:]])], 1).flatten(0, 1) + shift
    labels = torch.arange(3).repeat_interleave(12)
    with pytest.raises(ValueError, match=r"each class must have a centre of its own, \[0\] have theirs"):
        manifold_geometry(points.to(dtype), labels)


def test_a_class_that_has_collapsed_has_no_dimension_in_the_reference_either():
    activations, labels = clouds(features=8)
    activations[:12] = activations[0].clone()
    found = manifold_geometry(activations, labels, reference=True)
    assert (found.rank[0], found.radius[0], found.dimension[0]) == (0, 0, 0)


def test_activations_may_have_one_number_each_and_a_history():
    activations, labels = clouds(features=1)
    expected = manifold_geometry(activations, labels).table()
    found = manifold_geometry(activations[:, 0].requires_grad_(), labels).table()
    np.testing.assert_array_equal(found, expected)


def test_simulated_capacity_asks_for_neither_scale_nor_place():
    points, labels = normal(10, 40), torch.arange(10)
    plain = simulated_capacity(points, labels, repeats=10)
    for other in (1e-12 * points, points.requires_grad_() + 1e3):
        assert simulated_capacity(other, labels, repeats=10) == plain


def test_a_balanced_choice_has_equally_many_of_each_class():
    labels = torch.tensor([0] * 9 + [2] * 5 + [5] * 7)[torch.randperm(21, generator=generator(0, "order"))]
    chosen = balanced(labels, 5, generator(0, "choice"))
    assert chosen.unique().shape == (15,)
    assert labels[chosen].tolist() == [0] * 5 + [2] * 5 + [5] * 5
    assert chosen.tolist() != balanced(labels, 5, generator(1, "choice")).tolist()
    for points in (0, 6):
        with pytest.raises(ValueError, match=f"no more than any class has, got {points}: class 2 has 5"):
            balanced(labels, points, generator(0, "choice"))


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.1, 1.0])
def test_simulated_capacity_of_segments_is_what_theory_says(radius):
    count, features = 60, 200
    centers = torch.nn.functional.normalize(normal(count, 1, features), dim=2)
    axes = torch.nn.functional.normalize(normal(count, 1, features, seed=1), dim=2) * radius
    activations = torch.cat([centers - axes, centers + axes], 1).flatten(0, 1)
    found = simulated_capacity(activations, torch.arange(count).repeat_interleave(2), repeats=50)
    expected = 1 / (0.5 + 2 / math.pi * math.atan(radius))
    assert found.capacity == pytest.approx(expected, rel=0.12)
    assert len(found.features) == len(found.separable) > 2


def test_what_no_plane_separates_has_no_simulated_capacity():
    points = torch.tensor([[-1.0], [1.0], [-0.5], [0.5]])
    with pytest.raises(ValueError, match=r"activations must be separable in all their 1 features, 0\.00 of"):
        simulated_capacity(points, torch.tensor([0, 0, 1, 1]), repeats=4)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(4,\)"):
        simulated_capacity(points, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="activations must be finite"):
        simulated_capacity(points / 0, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="labels must hold at least two classes"):
        simulated_capacity(points, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        simulated_capacity(points, torch.tensor([0, 0, 1, 1]), repeats=0)
