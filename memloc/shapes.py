"""Manifolds whose capacity, radius and dimension are known in closed form: what an estimate has to agree with."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi, norm
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["ClosedForm", "ball", "simplex", "sphere_points"]

_HEIGHTS = np.linspace(-12, 12, 2401)[None]  # of its part along the centre


@dataclass(frozen=True)
class ClosedForm:
    """What :func:`memloc.manifolds.manifold_geometry` estimates, exactly.

    Attributes:
        capacity: Of manifolds of this shape, per feature.
        radius: Root mean square extent of the anchors, in units of the centre's norm.
        dimension: In how many directions they extend.
    """

    capacity: float
    radius: float
    dimension: float


def ball(radius: float, dimension: int, kappa: float = 0.0) -> ClosedForm:
    """Compute the geometry of a full ball: a segment in one dimension, a disc in two, a point if it has no radius.

    The draw t has a part of length r in the ball's directions, chi-distributed, and a part x along the centre. Below
    the cone over the ball it costs nothing, above its polar the whole of t, and otherwise its distance from the plane
    in between; all are averaged by numerical integration.

    Args:
        radius: In units of the centre's norm, 0 or more.
        dimension: Of the ball, 1 or more.
        kappa: Margin, 0 or more.

    Returns:
        The geometry, exact to one in a thousand or better.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Chung, Lee and Sompolinsky (2018), equations for balls; a point is Gardner's (1988) problem. Without a margin
        a segment has the capacity 1/(1/2 + (2/π) atan R).

    Example:
        >>> round(ball(1.0, 1).capacity, 3), round(ball(0.0, 1).capacity, 3)
        (1.0, 2.0)
    """
    if not (math.isfinite(radius) and radius >= 0 and kappa >= 0 and dimension >= 1):
        raise ValueError(
            f"radius and kappa must be at least 0 and dimension at least 1, got {radius}, {kappa} and {dimension}"
        )
    if radius == 0:
        taken = (1 + kappa**2) * norm.cdf(kappa) + kappa * norm.pdf(kappa)
        return ClosedForm(float(1 / taken), 0.0, 0.0)
    middle = math.sqrt(dimension)
    r, x = np.linspace(max(0, middle - 6), middle + 12, 601)[:, None], _HEIGHTS + kappa
    touches, is_far = x > -radius * r, x > r / radius
    taken = np.where(is_far, r**2 + x**2, touches * (radius * r + x) ** 2 / (1 + radius**2))
    extent = np.where(is_far, (r / np.where(is_far, x, 1)) ** 2, radius**2)
    weight = chi.pdf(r, dimension) * norm.pdf(_HEIGHTS)

    def mean(values: np.ndarray) -> float:
        inner = np.trapezoid(values * weight, _HEIGHTS[0], axis=1)
        return float(np.trapezoid(inner, r[:, 0]))

    return ClosedForm(1 / mean(taken), math.sqrt(mean(extent)), float(dimension))


def simplex(points: int) -> ClosedForm:
    """Compute the geometry of M points without any structure: nothing can be harder to separate.

    Args:
        points: How many (M). In many more features than points, independent random points are such a manifold.

    Returns:
        The geometry: exact for the capacity 2/M, and for many points for radius and dimension.

    Raises:
        ValueError: If there are less than two points.

    Source:
        With orthogonal frame columns the projection keeps the positive coordinates: F is a sum of M squares of
        rectified Gaussians, each 1/2 on average, and the squared length of the anchor tends to π.

    Example:
        >>> simplex(50).capacity
        0.04
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    return ClosedForm(2 / points, math.sqrt(math.pi - 1), math.pi / 2 / (math.pi - 1) * points)


def sphere_points(radius: float, dimension: int, points: int, generator: torch.Generator) -> Tensor:
    """Draw points on a sphere, evenly, as offsets for :func:`memloc.manifolds.frame_geometry`.

    Args:
        radius: In units of the centre's norm.
        dimension: Of the space around it; 2 gives a circle, 1 a pair of points.
        points: How many (M).
        generator: Of the CPU.

    Returns:
        Float64, shape ``(1, dimension, points)``.

    Example:
        >>> sphere_points(0.5, 3, 4, torch.Generator()).norm(dim=1)
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    drawn = torch.randn(1, dimension, points, generator=generator, dtype=torch.float64)
    return radius * normalize(drawn, dim=1)
