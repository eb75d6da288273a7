"""Remove the directions in which the centres of classes are correlated."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CommonDirections", "common_directions", "mean_cosine"]

STEPS = 60  # most steps of one minimization: more change the fourth digit of the correlations
TOLERANCE = 1e-6  # of the gradient's norm, relative to the objective


@dataclass(frozen=True)
class CommonDirections:
    """Directions that P centres share.

    Attributes:
        directions: Orthonormal, in the space of the features. Float64, shape ``(D, K)``.
        correlations: Mean absolute cosine between two different centres after 0, 1, … directions were removed.
    """

    directions: Tensor
    correlations: tuple[float, ...]


def mean_cosine(centers: Tensor) -> float:
    """Compute the mean absolute cosine between two different centres; 0 for a single one.

    Args:
        centers: Shape ``(P, D)``.

    Example:
        >>> round(mean_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])), 4)
        0.4714
    """
    count = len(centers)
    if count < 2:
        return 0.0
    unit = torch.nn.functional.normalize(centers, dim=1, eps=torch.finfo(centers.dtype).tiny)
    cosines = (unit @ unit.T).abs()
    return ((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))).item()


def common_directions(
    centers: Tensor, *, generator: torch.Generator, repeats: int = 1, at_least: int = 0
) -> CommonDirections:
    """Find the K directions whose removal leaves the centres of P classes least correlated.

    For each k the directions V minimise J(V) = ½ Σ A_pq² / (A_pp A_qq), where A holds the inner products of the
    centres' residuals, over all orthonormal V; then K is the k with the least mean absolute cosine. The search goes on
    until that has risen three times in a row and k > 4.

    Args:
        centers: Of the classes, their mean taken off. Float64, shape ``(P, D)``.
        generator: Of the CPU; draws where the minimizations start.
        repeats: How many minimizations for each k; the one is kept that leaves the smallest centre the longest.
        at_least: Least K (where P allows one).

    Returns:
        The directions, and the correlation for each k that was tried.

    Source:
        Cohen et al. (2020), and the reference code. Ours: the gradient in closed form; k = 0 may win; k stays below the
        rank of the centres, beyond which nothing is left of them.

    Example:
        >>> shared = torch.eye(6, 8, dtype=torch.float64) + 3 * torch.eye(8, dtype=torch.float64)[7]
        >>> found = common_directions(shared - shared.mean(0), generator=torch.Generator())
        >>> found.directions.shape
        torch.Size([8, 0])
    """
    values, vectors = torch.linalg.eigh(centers @ centers.T)
    order = values.argsort(descending=True)
    values = values[order].clamp(min=0)
    rank = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum()) if values[0] > 0 else 0
    values, vectors = values[:rank], vectors[:, order[:rank]]
    coordinates = vectors * values.sqrt()  # of the centres in an orthonormal basis of their span, (P, rank)
    basis = (vectors / values.sqrt()).T @ centers  # that basis, (rank, D)
    shares = values.cumsum(0) / values.sum()
    largest = min(int((shares < 0.95).sum()) - 1 + 11, rank - 1)
    found = [coordinates.new_zeros(rank, 0)]
    correlations = [mean_cosine(coordinates)]
    for k in range(1, largest + 1):
        found.append(_least_correlated(coordinates, k, repeats, generator))
        correlations.append(mean_cosine(coordinates - coordinates @ found[k] @ found[k].T))
        if k > 4 and correlations[k] > correlations[k - 1] > correlations[k - 2] > correlations[k - 3]:
            break
    first = min(at_least, len(found) - 1)
    best = min(range(first, len(found)), key=correlations.__getitem__)
    return CommonDirections(basis.T @ found[best], tuple(correlations))


def _least_correlated(coordinates: Tensor, k: int, repeats: int, generator: torch.Generator) -> Tensor:
    """Minimise J over k orthonormal directions from random starts; keep what leaves the smallest centre the longest."""
    start = torch.randn(repeats, coordinates.shape[1], k, generator=generator, dtype=coordinates.dtype)
    candidates = _minimize(coordinates, torch.linalg.qr(start.to(coordinates.device)).Q)
    residuals = coordinates - coordinates @ candidates @ candidates.mT
    lengths = (residuals.norm(dim=2) / coordinates.norm(dim=1)).amin(1)
    return candidates[lengths.argmax()]


def _objective(coordinates: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute J and its gradient for each of several sets of directions, shapes ``(R,)`` and ``(R, rank, k)``."""
    projected = coordinates @ directions
    inner = coordinates @ coordinates.T - projected @ projected.mT
    scale = inner.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(inner.dtype).tiny).rsqrt()[:, :, None]
    cosines = inner * scale * scale.mT
    shares = cosines.square().sum(2, keepdim=True)
    gradient = scale.square() * shares * projected - scale * (cosines @ (scale * projected))
    return shares.sum((1, 2)) / 2, 2 * coordinates.T @ gradient


def _minimize(coordinates: Tensor, directions: Tensor) -> Tensor:
    """Descend along the sphere of orthonormal directions with Barzilai and Borwein's steps, all starts together."""
    value, gradient = _objective(coordinates, directions)
    gradient = _tangent(directions, gradient)
    norm = gradient.flatten(1).norm(dim=1)
    step = 0.1 / norm.clamp(min=1e-300)
    worst = value.clone()  # the running mean that a step must not exceed, after Zhang and Hager
    weight = 1.0
    for _ in range(STEPS):
        moves = norm > TOLERANCE * value
        if not moves.any():
            break
        for _ in range(30):
            moved = torch.linalg.qr(directions - step[:, None, None] * gradient).Q
            new_value, new_gradient = _objective(coordinates, moved)
            too_far = moves & ~(new_value <= worst - 1e-4 * step * norm.square())
            if not too_far.any():
                break
            step = torch.where(too_far, step / 4, step)
        new_gradient = _tangent(moved, new_gradient)
        shift, bend = moved - directions, new_gradient - gradient
        product = (shift * bend).sum((1, 2)).abs()
        step = torch.where(product > 0, (shift * shift).sum((1, 2)) / product.clamp(min=1e-300), step)
        directions, value, gradient = moved, new_value, new_gradient
        norm = gradient.flatten(1).norm(dim=1)
        worst = (0.85 * weight * worst + value) / (0.85 * weight + 1)
        weight = 0.85 * weight + 1
    return directions


def _tangent(directions: Tensor, gradient: Tensor) -> Tensor:
    """Take from a gradient what only rotates the directions among themselves, which changes nothing."""
    return gradient - directions @ (directions.mT @ gradient)
