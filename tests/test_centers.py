import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc import centers
from memloc.centers import common_directions, mean_cosine
from memloc.randomness import generator


def planted(rank, classes=20, features=200, *, strength=3.0):
    """Centres with a few strong directions in common."""
    draw = generator(0, "centres")
    shared = torch.randn(classes, rank, generator=draw, dtype=torch.float64)
    common = torch.linalg.qr(torch.randn(features, rank, generator=draw, dtype=torch.float64)).Q
    own = torch.randn(classes, features, generator=draw, dtype=torch.float64) / features**0.5
    found = own + strength * shared @ common.T
    return found - found.mean(0), common


def objective(coordinates, directions):
    """The objective as it is defined, by loops."""
    left = coordinates - coordinates @ directions @ directions.T
    total = 0.0
    for p in left:
        for q in left:
            total = total + (p @ q) ** 2 / ((p @ p) * (q @ q)) / 2
    return total


def test_the_objective_and_its_gradient_are_those_of_the_definition():
    coordinates = torch.randn(6, 4, generator=generator(0, "x"), dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(3, 4, 2, generator=generator(1, "x"), dtype=torch.float64)).Q
    values, gradients = centers._objective(coordinates, directions)
    for each, value, gradient in zip(directions, values, gradients, strict=True):
        each.requires_grad_()
        expected = objective(coordinates, each)
        expected.backward()
        torch.testing.assert_close(value, expected.detach())
        tangent = centers._tangent(each.detach(), gradient)
        torch.testing.assert_close(tangent, centers._tangent(each.detach(), each.grad))


def test_the_mean_cosine_leaves_out_each_with_itself():
    vectors = torch.randn(4, 3, generator=generator(0, "x"), dtype=torch.float64)
    cosines = [
        abs(float(a @ b / (a.norm() * b.norm())))
        for i, a in enumerate(vectors)
        for j, b in enumerate(vectors)
        if i != j
    ]
    assert mean_cosine(vectors) == pytest.approx(sum(cosines) / 12)
    assert mean_cosine(vectors[:1]) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e30])
def test_the_scale_of_the_centres_does_not_matter(scale):
    points, _ = planted(2)
    plain, scaled = (common_directions(each, generator=generator(0, "start")) for each in (points, scale * points))
    assert scaled.correlations == pytest.approx(plain.correlations, rel=1e-4)
    assert scaled.directions.shape == plain.directions.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_planted_directions_are_found(rank):
    points, common = planted(rank)
    found = common_directions(points, generator=generator(0, "start"))
    assert found.directions.shape == (200, rank)
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(rank, dtype=torch.float64))
    assert (common.T @ found.directions).square().sum() > 0.95 * rank
    assert found.correlations[0] > 0.2
    assert found.correlations[rank] < 0.5 * found.correlations[0]
    left = points - points @ found.directions @ found.directions.T
    assert mean_cosine(left) == pytest.approx(found.correlations[rank])


def test_where_nothing_is_shared_nothing_is_removed_unless_asked():
    orthogonal = torch.eye(12, dtype=torch.float64) * torch.linspace(1, 2, 12, dtype=torch.float64)
    points = orthogonal - orthogonal.mean(0)
    assert common_directions(points, generator=generator(0, "start")).directions.shape == (12, 0)
    assert common_directions(points, generator=generator(0, "start"), at_least=1).directions.shape[1] >= 1


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_few_classes_keep_something_of_their_centres(classes):
    points, _ = planted(1, classes=classes)
    found = common_directions(points, generator=generator(0, "start"), at_least=1)
    assert found.directions.shape[1] <= classes - 2
    left = points - points @ found.directions @ found.directions.T
    assert (left.norm(dim=1) > 1e-6).all()


def test_centres_that_are_all_the_same_have_no_directions():
    found = common_directions(torch.zeros(4, 5, dtype=torch.float64), generator=generator(0, "start"))
    assert found.directions.shape == (5, 0)


@pytest.mark.parametrize("name", ["structured", "iid"])
def test_the_reference_code_ends_in_one_of_our_minima(name):
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    recorded = np.load(Path(folder) / f"mftma_{name}.npz")
    expected = json.loads((Path(folder) / "mftma_outputs.json").read_text())[name]
    points = torch.from_numpy(recorded["X"]).double()
    found = (points - points.mean((0, 2))[:, None]).mean(2)
    found = found - found.mean(0)
    directions = torch.from_numpy(recorded["V11"]).double()
    found_by_us = common_directions(found, generator=generator(0, "start"), repeats=10, at_least=1)
    assert found_by_us.directions.shape == directions.shape
    assert found_by_us.correlations[0] == pytest.approx(expected["res_coeff0"], abs=1e-12)
    value, gradient = centers._objective(found, directions[None])
    ours, _ = centers._objective(found, found_by_us.directions[None])
    assert centers._tangent(directions[None], gradient).norm() < 1e-5 * value  # theirs is a minimum, too
    assert ours == pytest.approx(value.item(), rel=2e-3)
    k = directions.shape[1]
    assert found_by_us.correlations[k] == pytest.approx(expected["res_coeff_by_K"][k - 1], abs=0.004)
