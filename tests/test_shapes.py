import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from memloc.randomness import generator
from memloc.shapes import ball, simplex, sphere_points


@pytest.mark.parametrize("radius", [0.01, 0.3, 1, 5])
def test_a_ball_in_one_dimension_is_a_segment(radius):
    found = ball(radius, 1)
    assert found.capacity == pytest.approx(1 / (0.5 + 2 / math.pi * math.atan(radius)), rel=1e-5)
    assert found.dimension == 1


@pytest.mark.parametrize("kappa", [0, 0.5, 2])
def test_a_ball_without_radius_is_a_point(kappa):
    taken, _ = quad(lambda x: max(x + kappa, 0) ** 2 * norm.pdf(x), -12, 12)
    point = ball(0, 3, kappa)
    assert point.capacity == pytest.approx(1 / taken)
    assert (point.radius, point.dimension) == (0, 0)
    assert ball(1e-3, 3, kappa).capacity == pytest.approx(point.capacity, rel=0.01)


def test_larger_balls_of_more_dimensions_and_margins_are_harder_to_separate():
    for easy, hard in ((ball(0.3, 3), ball(0.6, 3)), (ball(0.3, 3), ball(0.3, 9)), (ball(0.3, 3), ball(0.3, 3, 0.5))):
        assert easy.capacity > 1.05 * hard.capacity
    assert ball(50, 4).capacity == pytest.approx(1 / 4.5, rel=0.05)  # all of its directions and half of the height


@pytest.mark.parametrize("dimension", [20, 150, 1000])
def test_balls_of_many_dimensions_are_averages_over_gaussians(dimension):
    draw = np.random.default_rng(0)
    r, x = np.sqrt(draw.chisquare(dimension, 100_000)), draw.standard_normal(100_000)
    taken = np.where(x > r / 0.5, r**2 + x**2, np.maximum(0.5 * r + x, 0) ** 2 / 1.25)
    assert ball(0.5, dimension).capacity == pytest.approx(1 / taken.mean(), rel=0.01)


def test_a_simplex_is_the_floor_for_so_many_points():
    assert simplex(2).capacity == 1
    assert simplex(50).radius == pytest.approx(1.4634, abs=1e-4)
    assert simplex(50).dimension == pytest.approx(36.67, abs=0.01)


def test_sphere_points_lie_on_the_sphere_and_belong_to_the_seed():
    points = sphere_points(0.5, 3, 40, generator(0, "test"))
    assert points.shape == (1, 3, 40)
    assert points.norm(dim=1).sub(0.5).abs().max() < 1e-12
    assert points.mean(2).abs().max() < 0.2
    assert points.equal(sphere_points(0.5, 3, 40, generator(0, "test")))


@pytest.mark.parametrize("arguments", [(-1, 2), (math.nan, 2), (1, 0), (1, 2, -0.5)])
def test_a_ball_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="radius and kappa must be at least 0 and dimension at least 1"):
        ball(*arguments)


def test_a_simplex_has_two_points_at_least():
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        simplex(1)
