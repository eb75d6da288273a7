import math

import numpy as np
import pytest
import scipy.optimize
import torch

from memloc import cones
from memloc.cones import project
from memloc.randomness import generator


def problems(offsets, count, seed=0):
    """Gram matrices and targets of cones whose generators are points at height 1; the generators, too."""
    draw = generator(seed, "cones")
    generators = torch.cat([offsets, torch.ones(len(offsets), 1, offsets.shape[2], dtype=torch.float64)], 1)
    draws = torch.randn(len(offsets), offsets.shape[1] + 1, count, generator=draw, dtype=torch.float64)
    return generators.mT @ generators, generators.mT @ draws, generators, draws


def by_hand(generators, draws):
    """Squared lengths of the projections by scipy's solver, one problem at a time."""
    return torch.tensor(
        [
            [np.square(cone @ scipy.optimize.nnls(cone, draw, maxiter=10_000)[0]).sum() for draw in each.T]
            for cone, each in zip(generators.numpy(), draws.numpy(), strict=True)
        ]
    )


def squared_lengths(gram, coefficients):
    return (coefficients * (gram @ coefficients)).sum(1)


def clouds(radius, points, *, axes=10, features=60, count=3):
    """Ten main axes with decaying extent and a little noise, as in trained layers."""
    draw = generator(0, "clouds")
    main = torch.randn(count, features, axes, generator=draw, dtype=torch.float64) / math.sqrt(features)
    along = torch.randn(count, axes, points, generator=draw, dtype=torch.float64) * 0.85 ** torch.arange(axes)[:, None]
    noise = 0.02 * torch.randn(count, features, points, generator=draw, dtype=torch.float64) / math.sqrt(features)
    found = main @ along + noise
    found = found - found.mean(2, keepdim=True)
    return found * (radius / found.norm(dim=1).mean())


@pytest.mark.parametrize("points", [2, 7, 50])
@pytest.mark.parametrize("radius", [0.01, 0.1, 1, 5, 50])
def test_every_problem_is_solved_however_long_or_flat_the_cloud(radius, points):
    gram, targets, generators, draws = problems(clouds(radius, points), 20)
    found = project(gram, targets)
    assert found.residual < 1e-10
    assert (found.coefficients >= 0).all()
    torch.testing.assert_close(
        squared_lengths(gram, found.coefficients), by_hand(generators, draws), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("corners", [3, 12, 40, 200])
@pytest.mark.parametrize("radius", [0.3, 1.0])
def test_points_of_a_plane_however_many_are_no_obstacle(corners, radius):
    angles = torch.arange(corners, dtype=torch.float64) * (2 * math.pi / corners)
    gram, targets, generators, draws = problems(radius * torch.stack([angles.cos(), angles.sin()])[None], 100)
    found = project(gram, targets)
    assert found.residual < 1e-8
    torch.testing.assert_close(
        squared_lengths(gram, found.coefficients), by_hand(generators, draws), rtol=1e-7, atol=1e-9
    )


def test_the_same_point_twice_changes_no_projection():
    once = clouds(1, 10)
    gram, targets, _, draws = problems(once, 30)
    twice = torch.cat([once, once], 2)
    doubled = torch.cat([twice, torch.ones(3, 1, 20, dtype=torch.float64)], 1)
    found = project(doubled.mT @ doubled, doubled.mT @ draws)
    assert found.residual < 1e-8
    torch.testing.assert_close(
        squared_lengths(doubled.mT @ doubled, found.coefficients),
        squared_lengths(gram, project(gram, targets).coefficients),
    )


def test_a_target_in_the_polar_cone_projects_on_zero():
    gram = torch.eye(3, dtype=torch.float64)[None]
    found = project(gram, torch.tensor([[[-1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64))
    assert (found.coefficients == 0).all()
    assert found.residual == 0


def test_orthogonal_generators_take_the_positive_part():
    targets = torch.randn(2, 5, 40, generator=generator(0, "targets"), dtype=torch.float64)
    lengths = torch.tensor([0.1, 1, 2, 5, 9], dtype=torch.float64)
    found = project(torch.diag(lengths)[None].expand(2, -1, -1), targets)
    torch.testing.assert_close(found.coefficients, targets.clamp(min=0) / lengths[:, None])


@pytest.mark.parametrize("count", [1, 2])
def test_the_scale_of_a_target_does_not_matter(count):
    gram, targets, *_ = problems(clouds(1, 20), count)
    small, large = project(gram, targets * 1e-8), project(gram, targets * 1e8)
    torch.testing.assert_close(small.coefficients * 1e16, large.coefficients)
    assert max(small.residual, large.residual) < 1e-12


def test_cones_do_not_mix():
    gram, targets, *_ = problems(clouds(1, 20), 30)
    together = project(gram, targets).coefficients
    for each in range(3):
        torch.testing.assert_close(
            together[each], project(gram[each : each + 1], targets[each : each + 1]).coefficients[0]
        )


@pytest.mark.parametrize("progress", [0.0, 1.1])
def test_more_steps_and_one_by_one_come_to_the_same(monkeypatch, progress):
    gram, targets, *_ = problems(clouds(5, 40), 60)
    expected = squared_lengths(gram, project(gram, targets).coefficients)
    monkeypatch.setattr(cones, "PROGRESS", progress)
    found = project(gram, targets)
    assert found.left_over < 180 if progress == 0 else found.left_over > 0
    assert found.residual < 1e-10
    torch.testing.assert_close(squared_lengths(gram, found.coefficients), expected)


def test_without_a_method_that_converges_each_problem_is_solved_alone(monkeypatch):
    monkeypatch.setattr(cones, "ITERATIONS", ())
    gram, targets, generators, draws = problems(clouds(1, 20), 10)
    found = project(gram, targets)
    assert found.left_over == int((targets > 0).any(1).sum())
    torch.testing.assert_close(squared_lengths(gram, found.coefficients), by_hand(generators, draws))


def test_where_the_last_resort_stops_too_early_another_one_goes_on(monkeypatch):
    gram, targets, _, _ = problems(clouds(0.5, 12), 20)
    right = project(gram, targets)
    monkeypatch.setattr(cones, "ITERATIONS", ())
    monkeypatch.setattr(scipy.optimize, "nnls", lambda columns, point, **_: (np.zeros(columns.shape[1]), 0.0))
    found = project(gram, targets)
    assert found.left_over > 0
    assert found.residual < 1e-10
    torch.testing.assert_close(squared_lengths(gram, found.coefficients), squared_lengths(gram, right.coefficients))


@pytest.mark.parametrize("points", [50, 150])
@pytest.mark.parametrize("radius", [1e-4, 1e-6])
def test_classes_that_have_nearly_collapsed_are_projected_as_exactly(points, radius):
    offsets = torch.randn(2, points + 5, points, generator=generator(0, "offsets"), dtype=torch.float64)
    offsets = offsets - offsets.mean(2, keepdim=True)
    offsets *= radius / offsets.norm(dim=1).mean()
    gram, targets, *_ = problems(offsets, 20)
    assert project(gram, targets).residual < 1e-10


def test_few_matrices_are_in_memory_at_a_time_however_many_the_problems(monkeypatch):
    gram, targets, *_ = problems(clouds(1, 20), 30)
    expected = project(gram, targets).coefficients
    counts, solve = [], cones._solve
    monkeypatch.setattr(cones, "ENTRIES", 7 * 20**2)
    monkeypatch.setattr(cones, "_solve", lambda gram, cone, *rest: counts.append(len(cone)) or solve(gram, cone, *rest))
    torch.testing.assert_close(project(gram, targets).coefficients, expected)
    assert max(counts) == 7


def test_no_target_is_no_work():
    found = project(torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 2, 0, dtype=torch.float64))
    assert found.coefficients.shape == (1, 2, 0)


def test_what_cannot_be_projected_is_refused():
    gram, targets = torch.eye(2, dtype=torch.float64)[None], torch.ones(1, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shapes \(P, M, M\) and \(P, M, n\), got \(1, 2, 2\) and \(2, 3\)"):
        project(gram, targets[0])
    with pytest.raises(ValueError, match=r"must be float64, got torch\.float32"):
        project(gram.float(), targets)
    with pytest.raises(ValueError, match="must be finite"):
        project(gram, targets / 0)
    with pytest.raises(ValueError, match="positive diagonal, got a generator of length 0"):
        project(gram * torch.tensor([1.0, 0.0]), targets)
