"""Measure how separable the classes are in a layer: capacity, radius and dimension of their point clouds."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.optimize
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from memloc.centers import common_directions
from memloc.cones import project
from memloc.randomness import generator as make_generator

__all__ = [
    "ManifoldGeometry",
    "SimulatedCapacity",
    "balanced",
    "frame_geometry",
    "manifold_geometry",
    "simulated_capacity",
]

_TINY = 1e-300
_COLLAPSED = 1e-24  # squared extent, in units of the centre's norm, below which a class is a point


@dataclass(frozen=True)
class ManifoldGeometry:
    """The geometry of P manifolds of M points each; tensors have shape ``(P,)`` and are float64.

    Attributes:
        labels: The class of each manifold.
        capacity: How many such manifolds a linear readout can tell apart per feature, whatever their labels: 2 for
            points, about 2/M for M points without any structure. Larger is easier.
        radius: Root mean square extent of the points that matter for separation, in units of the centre's norm.
        dimension: In how many directions they extend.
        capacity_error: Monte Carlo standard error, from the draws.
        radius_error: The same.
        dimension_error: The same.
        rank: Dimension of the span of the points about their centre; 0 for a class that has collapsed to a point.
        center_correlation: Mean absolute cosine between two different centres, before any direction is removed.
        removed: Directions common to the centres that were removed (K).
        kkt_residual: Worst violation of the optimality conditions over all projections.
    """

    labels: Tensor
    capacity: Tensor
    radius: Tensor
    dimension: Tensor
    capacity_error: Tensor
    radius_error: Tensor
    dimension_error: Tensor
    rank: Tensor
    center_correlation: float
    removed: int
    kkt_residual: float

    def table(self) -> pd.DataFrame:
        """Return one row a manifold, by class."""
        names = ("capacity", "radius", "dimension", "capacity_error", "radius_error", "dimension_error", "rank")
        columns = {"label": self.labels} | {name: getattr(self, name) for name in names}
        return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})

    def mean(self) -> dict[str, float]:
        """Return the means over manifolds, harmonic for the capacity, with Monte Carlo standard errors."""
        count, harmonic = len(self.labels), 1 / (1 / self.capacity).mean()
        # 1/C is the mean of 1/c, whose error is that of c over c².
        errors = (harmonic**2 * self.capacity_error / self.capacity**2, self.radius_error, self.dimension_error)
        capacity, radius, dimension = ((error.square().sum().sqrt() / count).item() for error in errors)
        return {
            "capacity": harmonic.item(),
            "radius": self.radius.mean().item(),
            "dimension": self.dimension.mean().item(),
            "capacity_error": capacity,
            "radius_error": radius,
            "dimension_error": dimension,
            "center_correlation": self.center_correlation,
            "removed": self.removed,
            "kkt_residual": self.kkt_residual,
        }


def balanced(labels: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Draw equally many examples of each class, because only manifolds of equally many points can be compared.

    Args:
        labels: Int64, shape ``(N,)``.
        points: How many of each class (M).
        generator: Of the CPU.

    Returns:
        Indices, class after class. Int64, shape ``(P·M,)``, on the device of the labels.

    Raises:
        ValueError: If a class has fewer.

    Example:
        >>> balanced(torch.tensor([0, 1, 1, 0, 1]), 2, torch.Generator()).shape
        torch.Size([4])
    """
    classes, counts = labels.unique(return_counts=True)
    if points < 1 or (counts < points).any():
        fewest = (
            f"class {classes[counts.argmin()].item()} has {counts.min().item()}" if len(counts) else "there are none"
        )
        raise ValueError(f"points must be at least 1 and no more than any class has, got {points}: {fewest}")
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return torch.cat([order[labels[order] == each][:points] for each in classes])


def manifold_geometry(
    activations: Tensor,
    labels: Tensor,
    *,
    kappa: float = 0.0,
    draws: int = 300,
    generator: torch.Generator | None = None,
    remove_common: bool = True,
    repeats: int = 1,
    reference: bool = False,
) -> ManifoldGeometry:
    """Estimate capacity, radius and dimension of the manifolds that the examples of each class form.

    Each class is a cloud of M points. Directions that the class centres share are removed; then offsets from the
    centre are measured in units of its norm, which gives the frame S with columns (s_i, 1). For Gaussian t, the squared
    length F(t) of the projection of t on the cone of S says how much of a random dichotomy the manifold takes up:
    1/capacity = E F. The projection, scaled to the height 1 of the points, is the anchor, the point of the hull that
    matters for t. The radius is the root mean square of the anchors about their mean, and the dimension the
    rank times the squared mean cosine between t and anchor.

    Only inner products enter, so the number of features costs little, and t is drawn in coordinates that belong to the
    points: the same generator gives the same draws for the same examples in any layer, at any epoch, and differences
    between layers have much smaller errors than the layers themselves.

    Args:
        activations: Of any shape ``(N, …)``; flattened to ``(N, D)``.
        labels: The class of each example, equally many of each (:func:`balanced`). Int64, shape ``(N,)``.
        kappa: Margin with which manifolds are to be separated, in the reference's units.
        draws: Gaussian vectors for each manifold.
        generator: Of the CPU; None makes one from seed 0.
        remove_common: Whether to remove the directions that the centres share.
        repeats: Minimizations for each number of removed directions.
        reference: Whether to keep the conventions of the reference code: frames have M dimensions, although
            offsets from a mean span one less, which lowers the dimension of manifolds of few points; and at
            least one direction is removed.

    Returns:
        The geometry of each class, in ascending order of the classes.

    Raises:
        ValueError: If there are fewer than two classes or two points, classes are not equally large, a number is not
            finite, or a class has its centre where the mean of all is.

    Source:
        Chung, Lee and Sompolinsky (2018); the centres' correlation after Cohen et al. (2020); Stephenson et al. (2021).
        The margin is a shift of t by κ along the centre, and F a projection on a cone, so non-negative least squares
        solves it. Draws inside the polar cone, where F = 0, have the point farthest along t for an anchor, as in the
        reference code.

    Example:
        >>> points = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        >>> found = manifold_geometry(points, torch.arange(60) % 6)
        >>> 0.15 < found.mean()["capacity"] < 0.3
        True
    """
    clouds = _by_class(activations, labels)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, for an error to be known, got {draws}")
    draw = make_generator(0, "manifolds") if generator is None else generator
    count, points, features = clouds.shape
    gaussians = torch.randn(count, points + 1, draws, generator=draw, dtype=torch.float64)
    middle = clouds.mean((0, 1), dtype=torch.float64)
    centers = clouds.mean(1, dtype=torch.float64) - middle
    shared = common_directions(centers - centers.mean(0), generator=draw, repeats=repeats, at_least=int(reference))
    directions = shared.directions if remove_common else shared.directions[:, :0]
    rounding = torch.finfo(clouds.dtype).eps * math.sqrt(features) * torch.linalg.vector_norm(clouds, math.inf).item()
    frames = torch.stack([_frame(cloud.double() - middle, directions, rounding) for cloud in clouds])
    _check_centers(frames)
    frames = _root(frames @ frames.mT) if features > points or not reference else frames.mT
    found = frame_geometry(frames, gaussians[:, -frames.shape[1] - 1 :].to(frames), kappa=kappa, reference=reference)
    return replace(
        found,
        labels=labels.unique(),
        center_correlation=shared.correlations[0],
        removed=directions.shape[1],
    )


def frame_geometry(offsets: Tensor, draws: Tensor, *, kappa: float = 0.0, reference: bool = False) -> ManifoldGeometry:
    """Estimate the geometry of manifolds that are given by their offsets from the centre, with draws that are given.

    Args:
        offsets: Of the points from their centre, in units of its norm, in any orthonormal coordinates. Float64, shape
            ``(P, D, M)``.
        draws: Gaussian vectors: D coordinates and, last, the one along the centre. Float64, shape ``(P, D + 1, n)``.
        kappa: Margin.
        reference: Whether all D coordinates count as the manifold's, rather than the span of the offsets.

    Returns:
        The geometry, classes numbered from 0; the correlation of centres, which are not given, is NaN.

    Raises:
        ValueError: If shapes do not fit, there are less than two draws, or kappa is negative.

    Source:
        As :func:`manifold_geometry`.

    Example:
        A segment from -1 to 1 has capacity 1.

        >>> draws = torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = frame_geometry(torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64), draws)
        >>> abs(found.capacity.item() - 1) < 3 * found.capacity_error.item()
        True
    """
    _check_frames(offsets, draws, kappa)
    gram = offsets.mT @ offsets
    transverse = offsets.mT @ draws[:, :-1]
    targets = transverse + (draws[:, -1] + kappa)[:, None]
    projection = project(gram + 1, targets)
    taken = (projection.coefficients * targets).sum(1)
    total = projection.coefficients.sum(1, keepdim=True)
    farthest = one_hot(transverse.argmax(1), offsets.shape[2]).mT.to(offsets)
    weights = torch.where(total > 0, projection.coefficients / total.clamp(min=_TINY), farthest)

    pulled = gram @ weights
    squares = (weights * pulled).sum(1).clamp(min=0)
    middle = weights.mean(2, keepdim=True)
    spread = (squares - 2 * (middle * pulled).sum(1) + (middle * (gram @ middle)).sum(1)).clamp(min=0)
    values, vectors = torch.linalg.eigh(gram)
    is_spanned = _is_spanned(values)
    rank = is_spanned.sum(1)
    if reference:
        size, lengths = torch.full_like(rank, offsets.shape[1]), draws[:, :-1].square().sum(1)
    else:
        inverse = torch.where(is_spanned, 1 / values.clamp(min=_TINY), 0)[..., None]
        size, lengths = rank, ((vectors.mT @ transverse).square() * inverse).sum(1)
    lengths = (lengths * squares).sqrt()
    cosines = torch.where((lengths > 0) & (rank > 0)[:, None], (weights * transverse).sum(1) / lengths, 0)

    capacity, cosine = 1 / taken.mean(1), cosines.mean(1)
    radius = torch.where(rank > 0, spread.mean(1).sqrt(), 0)
    return ManifoldGeometry(
        labels=torch.arange(len(offsets), device=offsets.device),
        capacity=capacity,
        radius=radius,
        dimension=size * cosine.square(),
        capacity_error=capacity.square() * _error(taken),
        radius_error=_error(spread) / (2 * radius).clamp(min=_TINY),
        dimension_error=2 * size * cosine.abs() * _error(cosines),
        rank=rank,
        center_correlation=math.nan,
        removed=0,
        kkt_residual=projection.residual,
    )


def _error(values: Tensor) -> Tensor:
    """Compute the standard error of the mean of each row."""
    return values.std(1) / math.sqrt(values.shape[1])


def _frame(cloud: Tensor, directions: Tensor, rounding: float = 0.0) -> Tensor:
    """Compute a cloud's offsets from its centre in units of the centre's norm, without some directions, ``(M, D)``.

    NaN where that norm is no more than a rounding error.
    """
    cloud = cloud - (cloud @ directions) @ directions.T
    center = cloud.mean(0)
    norm = center.norm()
    return (cloud - center) / torch.where(norm > rounding, norm, torch.nan)


def _root(gram: Tensor) -> Tensor:
    """Compute symmetric square roots: the points in coordinates that belong to the points."""
    values, vectors = torch.linalg.eigh(gram)
    spanned = torch.where(_is_spanned(values), values, 0)  # the root of a rounding error is no longer small
    return (vectors * spanned.sqrt()[:, None]) @ vectors.mT


def _is_spanned(values: Tensor) -> Tensor:
    """Say which eigenvalues of Gram matrices, ascending in each row, are more than rounding errors."""
    size = values.shape[1]
    return values > (values[:, -1:] * size * torch.finfo(values.dtype).eps).clamp(min=_COLLAPSED)


def _by_class(activations: Tensor, labels: Tensor) -> Tensor:
    """Sort examples by class, shape ``(P, M, D)``, after checking that they can be compared."""
    flat = _flat(activations, labels)
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(classes)}")
    if (counts != counts[0]).any():
        few, many = counts.min().item(), counts.max().item()
        raise ValueError(
            f"labels must hold equally many examples of each class, got {few} to {many}: choose them with balanced()"
        )
    if counts[0] < 2:
        raise ValueError("labels must hold at least two examples of each class, got one")
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return flat[labels.to(flat.device).argsort(stable=True)].unflatten(0, (len(classes), -1))


def _flat(activations: Tensor, labels: Tensor) -> Tensor:
    """Give activations as rows without a history, shape ``(N, D)``, after checking that labels belong to them."""
    if labels.shape != activations.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({len(activations)},), one an example, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if not activations.isfinite().all():
        raise ValueError("activations must be finite, got nan or infinity")
    return activations.detach()[:, None].flatten(1)


def _check_frames(offsets: Tensor, draws: Tensor, kappa: float) -> None:
    fits = offsets.ndim == draws.ndim == 3 and draws.shape[:2] == (len(offsets), offsets.shape[1] + 1)
    if not fits:
        shapes = f"{tuple(offsets.shape)} and {tuple(draws.shape)}"
        raise ValueError(f"offsets and draws must have shapes (P, D, M) and (P, D + 1, n), got {shapes}")
    if draws.shape[2] < 2:
        raise ValueError(f"draws must be at least 2, for an error to be known, got {draws.shape[2]}")
    if not (math.isfinite(kappa) and kappa >= 0):
        raise ValueError(f"kappa must be at least 0, got {kappa}")
    _check_centers(offsets)


def _check_centers(offsets: Tensor) -> None:
    is_bad = ~offsets.isfinite().all(2).all(1)
    if is_bad.any():
        which = is_bad.nonzero()[:5, 0].tolist()
        raise ValueError(f"each class must have a centre of its own, {which} have theirs where the mean of all is")


@dataclass(frozen=True)
class SimulatedCapacity:
    """At how many random features a random dichotomy of P manifolds is linearly separable half the time.

    Attributes:
        capacity: P over that number.
        features: How many random features were tried, in order.
        separable: The share of dichotomies that were separable with so many.
    """

    capacity: float
    features: tuple[int, ...]
    separable: tuple[float, ...]


def simulated_capacity(
    activations: Tensor,
    labels: Tensor,
    *,
    repeats: int = 40,
    tolerance: float = 0.05,
    generator: torch.Generator | None = None,
) -> SimulatedCapacity:
    """Measure capacity without any theory: by trying whether random dichotomies can be separated.

    Half of the classes are labelled +1 and the others -1, all points are projected on n random features, and a linear
    programme says whether a plane with an offset separates them. Bisection finds the n at which half the dichotomies
    are separable, by linear interpolation between the nearest n on either side.

    Args:
        activations: Of any shape ``(N, …)``.
        labels: The class of each example, any number of each. Int64, shape ``(N,)``.
        repeats: Dichotomies, each with features of its own, for each n.
        tolerance: How near to a half a share ends the search.
        generator: Of the CPU; None makes one from seed 0.

    Returns:
        The capacity, and every n that was tried.

    Raises:
        ValueError: If labels do not fit, a number is not finite, there are less than two classes, or they cannot be
            separated with all features.

    Source:
        Cohen et al. (2020), Wakhloo et al. (2023): a linear programme in place of a quadratic one, which answers the
        same question.

    Example:
        >>> points = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
        >>> 1.4 < simulated_capacity(points, torch.arange(20), repeats=20).capacity < 2.6
        True
    """
    points = _flat(activations, labels).double().cpu()
    classes, which = labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(classes)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    draw = make_generator(0, "simulated capacity") if generator is None else generator
    points = points - points.mean(0)  # the programme's tolerances are absolute
    points = points / points.abs().max()
    tried: dict[int, float] = {}

    def share(count: int) -> float:
        if count not in tried:
            right = 0
            for _ in range(repeats):
                side = torch.ones(len(classes))
                side[torch.randperm(len(classes), generator=draw)[: len(classes) // 2]] = -1
                features = torch.randn(points.shape[1], count, generator=draw, dtype=torch.float64)
                right += _is_separable(points @ (features / features.norm(dim=0)), side[which].double())
            tried[count] = right / repeats
        return tried[count]

    low, high = 0, points.shape[1]
    if share(high) < 0.5:
        raise ValueError(
            f"activations must be separable in all their {high} features, "
            f"{tried[high]:.2f} of the dichotomies are: take more features or less points"
        )
    while high - low > 1:
        count = (low + high) // 2
        low, high = (low, count) if share(count) >= 0.5 else (count, high)
        if abs(tried[count] - 0.5) <= tolerance:
            break
    below = max((n for n in tried if tried[n] < 0.5), default=0)
    above = min(n for n in tried if tried[n] >= 0.5)
    start = tried.get(below, 0.0)
    critical = below + (above - below) * (0.5 - start) / (tried[above] - start)
    return SimulatedCapacity(len(classes) / critical, tuple(tried), tuple(tried.values()))


def _is_separable(points: Tensor, side: Tensor) -> bool:
    """Say whether a plane with an offset has all points of either side on its own side."""
    rows = torch.cat([points, torch.ones(len(points), 1, dtype=points.dtype)], 1) * side[:, None]
    found = scipy.optimize.linprog(
        np.zeros(rows.shape[1]), A_ub=-rows.numpy(), b_ub=-np.ones(len(rows)), bounds=(None, None), method="highs"
    )
    return bool(found.status == 0)
