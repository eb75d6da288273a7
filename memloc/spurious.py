"""The Gaussian toy: a spurious attribute and noise to memorize by, and what least squares makes of them exactly."""

import math
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from memloc.groups import GroupedData, GroupedSplit, grouped
from memloc.randomness import generator

__all__ = ["LeastSquares", "correlated_attributes", "gaussian_toy", "least_squares"]


def correlated_attributes(labels: Tensor, correlation: float, generator: torch.Generator) -> Tensor:
    """Draw an attribute that equals the label in all but an exact number of examples, the minority.

    There are ``int((1 - correlation) * N)`` of these, drawn without replacement whatever their label. The product is
    the floating-point one: a correlation of 0.9 leaves 99 of 1,000, because ``1 - 0.9`` is a little below 0.1.

    Args:
        labels: Int64, shape ``(N,)``, 0 or 1.
        correlation: Share of examples whose attribute is the label, 0 to 1.
        generator: A generator on the CPU.

    Returns:
        Int64, shape ``(N,)``, 0 or 1, on the device of ``labels``.

    Raises:
        ValueError: If the labels are not 0 or 1, or the correlation is no share.

    Source:
        Bayat et al. (2025), reference code of figure 1.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> (correlated_attributes(labels, 0.75, torch.Generator()) != labels).sum()
        tensor(1)
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must be from 0 to 1, a share and not percent, got {correlation}")
    if labels.dtype != torch.int64 or labels.ndim != 1 or not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be int64 (N,), 0 or 1, got {labels.dtype} {tuple(labels.shape)}")
    chosen = torch.randperm(len(labels), generator=generator)[: int((1 - correlation) * len(labels))]
    attributes = labels.clone()
    attributes[chosen.to(labels.device)] ^= 1
    return attributes


def gaussian_toy(
    noise: float,
    *,
    seed: int,
    examples: int = 1000,
    test_examples: int = 1000,
    dimensions: int = 1798,
    gamma: float = 5.0,
    correlation: float = 0.9,
    spread: float = 0.12,
) -> GroupedData:
    """Draw the linear problem in which a spurious feature and memorization hurt together.

    An example is ``x = (x_y, gamma * x_a, e)``. The core feature ``x_y`` is normal around -1 (label 1, "left") or +1
    (label 0, "right"), the spurious feature ``x_a`` in the same way around the side of the attribute, and ``e`` is
    noise that is different for every example and says nothing about its label: with it an example can be memorized.
    The attribute is that of :func:`correlated_attributes`; validation and test have a correlation of 1/2.

    With one seed, another ``noise``, ``gamma`` or ``spread`` scales the same draws.

    Args:
        noise: Standard deviation of each noise coordinate, 0 or more.
        seed: Decides every draw.
        examples: Training examples ``N``.
        test_examples: Validation examples, and as many test examples.
        dimensions: Noise coordinates.
        gamma: Factor of the spurious feature, which makes it the faster one to learn.
        correlation: Share of the training examples whose attribute is the label, 0 to 1.
        spread: Standard deviation of both features around their means, 0 or more.

    Returns:
        The data; ``images`` are feature vectors of shape ``(N, 2 + dimensions)``.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Bayat et al. (2025), section 2 and the reference code of figure 1: as there the mean is -1 for label 1. Its
        panels have the noise 0.5, although their titles say 1; the draws are our own, and so is the validation set.

    Example:
        >>> data = gaussian_toy(0.5, seed=0)
        >>> tuple(data.train.images.shape), (data.train.attributes != data.train.labels).sum().item()
        ((1000, 1800), 99)
    """
    if min(examples, test_examples) < 1 or dimensions < 0:
        sizes = f"{examples}, {test_examples} and {dimensions}"
        raise ValueError(f"examples and test_examples must be at least 1 and dimensions at least 0, got {sizes}")
    if not (noise >= 0 and spread >= 0):
        raise ValueError(f"noise and spread must be at least 0, got {noise} and {spread}")

    def draw(name: str, count: int, share: float) -> GroupedSplit:
        labels = torch.randint(2, (count,), generator=generator(seed, "gaussian toy", name, "labels"))
        attributes = correlated_attributes(labels, share, generator(seed, "gaussian toy", name, "attributes"))
        signal = torch.randn(2, count, generator=generator(seed, "gaussian toy", name, "features")).mul_(spread)
        core, spurious = signal + 1 - 2 * torch.stack([labels, attributes])
        tail = torch.randn(count, dimensions, generator=generator(seed, "gaussian toy", name, "noise")).mul_(noise)
        return grouped(torch.cat([core[:, None], gamma * spurious[:, None], tail], 1), labels, attributes)

    train, validation, test = (
        draw("train", examples, correlation),
        draw("validation", test_examples, 0.5),
        draw("test", test_examples, 0.5),
    )
    return GroupedData("gaussian toy", ("right", "left"), train, test, validation, ("right", "left"))


@dataclass(frozen=True)
class LeastSquares:
    """What the shortest least-squares solution of the Gaussian toy does, in the limit of many examples.

    Attributes:
        core_weight: Weight of the core feature, in the direction of the label.
        spurious_weight: Weight of ``gamma * x_a``, in the direction of the attribute.
        ridge: The penalty λ on these two weights that the noise amounts to.
        critical_ridge: The penalty λ* from which a minority example is more often wrong than right; infinite if
            there is none.
        majority_accuracy: Share of test examples that are right among those whose attribute is the label.
        minority_accuracy: The same among the others.
    """

    core_weight: float
    spurious_weight: float
    ridge: float
    critical_ridge: float
    majority_accuracy: float
    minority_accuracy: float


def least_squares(
    noise: float,
    *,
    examples: int = 1000,
    dimensions: int = 1798,
    gamma: float = 5.0,
    correlation: float = 0.9,
    spread: float = 0.12,
) -> LeastSquares:
    """Compute weights and accuracies of the shortest linear fit to labels of ±1 that has no training error.

    Many noise coordinates act on the two features like a penalty ``λ = noise² (dimensions / examples - 1)`` on their
    squared weights, because whatever they leave over is fitted by the noise, and a long noise makes that cheap.

    Args:
        noise: Standard deviation of each noise coordinate, 0 or more. Without noise there is no penalty, and the fit is
            the ordinary one on two features.
        examples: Training examples.
        dimensions: Noise coordinates, more than examples.
        gamma: Factor of the spurious feature.
        correlation: Share of the training examples whose attribute is the label, 0 to 1.
        spread: Standard deviation of both features around their means, 0 or more.

    Returns:
        Weights, penalties and accuracies.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Ours, not the paper's theorem; with ``spread=0`` the critical penalty is ``γ²(1-ρ'²) / (γ²ρ'-1)`` with
        ``ρ' = 2 correlation - 1``.

    Example:
        >>> found = least_squares(0.5)
        >>> round(found.minority_accuracy, 3), found.ridge < found.critical_ridge
        (0.9, True)
    """
    if not (noise >= 0 and spread >= 0 and gamma > 0 and 0 <= correlation <= 1):
        got = f"{noise}, {spread}, {gamma} and {correlation}"
        raise ValueError(f"noise and spread must be at least 0, gamma above 0, correlation from 0 to 1, got {got}")
    if not dimensions > examples >= 1:
        raise ValueError(f"dimensions must be more than examples, {examples}, to fit all of them, got {dimensions}")
    rho, variance = 2 * correlation - 1, spread**2
    ridge = noise**2 * (dimensions / examples - 1)
    core_power, spurious_power, shared = 1 + variance, gamma**2 * (1 + variance), gamma * rho
    determinant = (core_power + ridge) * (spurious_power + ridge) - shared**2
    if determinant == 0:
        raise ValueError("noise and spread must not both be 0 with a correlation of 0 or 1: the features are the same")
    core = (spurious_power + ridge - shared**2) / determinant
    spurious = shared * (core_power + ridge - 1) / determinant
    explained = core_power * core**2 + spurious_power * spurious**2 + 2 * shared * core * spurious
    left = 1 - 2 * (core + shared * spurious) + explained
    memorized = left / (dimensions / examples - 1) if noise else 0.0
    deviation = math.sqrt(variance * (core**2 + gamma**2 * spurious**2) + memorized)
    slope = gamma**2 * rho - 1
    critical = max(spurious_power - shared**2 - variance * gamma**2 * rho, 0) / slope if slope > 0 else math.inf
    majority, minority = (
        float(norm.cdf(mean / deviation)) if deviation else float(mean > 0)
        for mean in (core + gamma * spurious, core - gamma * spurious)
    )
    return LeastSquares(core, spurious, ridge, critical, majority, minority)
