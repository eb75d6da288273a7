"""Twenty noisy points of a curve, each with noise coordinates of its own: memorization that is good, bad or ugly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.randomness import generator

__all__ = ["Regression", "regression", "truth"]

_GRID = 1000  # equidistant values of x that the curve is drawn on
_LIMIT = 1.5


@dataclass(frozen=True, eq=False)
class Regression:
    """Points to fit a curve through, and the curve itself.

    Attributes:
        inputs: The training points: x, then the noise coordinates. Float32, shape ``(N, 1 + D)``.
        targets: The curve at these points plus label noise. Float32, shape ``(N,)``.
        positions: Where the training points lie among those of the curve. Int64, shape ``(N,)``.
        curve_inputs: Equidistant x with all noise coordinates 0. Float32, shape ``(1000, 1 + D)``.
        curve: The curve at these, :func:`truth`. Float32, shape ``(1000,)``.

    Example:
        >>> data = regression(1e-3, seed=0)
        >>> data
        Regression(20 points, 30 noise coordinates, on cpu)
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    curve_inputs: Tensor
    curve: Tensor

    def __repr__(self) -> str:
        points, features = self.inputs.shape
        return f"Regression({points} points, {features - 1} noise coordinates, on {self.inputs.device})"

    @property
    def clean_inputs(self) -> Tensor:
        """The training points with all noise coordinates 0. Float32, shape ``(N, 1 + D)``."""
        return self.curve_inputs[self.positions]

    @property
    def mixed_inputs(self) -> Tensor:
        """The inputs of the curve, the noise of the training points included. Float32, shape ``(1000, 1 + D)``."""
        return self.curve_inputs.index_copy(0, self.positions, self.inputs)

    def to(self, device: torch.device | str) -> "Regression":
        """Copy all five tensors to a device; what is there already is shared."""
        tensors = self.inputs, self.targets, self.positions, self.curve_inputs, self.curve
        return Regression(*(tensor.to(device) for tensor in tensors))


def truth(x: Tensor) -> Tensor:
    """Compute the curve that is to be learned, ``tanh(x) + 0.5 tanh(-5x)``.

    Args:
        x: Float, any shape.

    Returns:
        Of the same type and shape.

    Source:
        Bayat et al. (2025), reference code of figure 3.

    Example:
        >>> truth(torch.tensor([0.0, 10.0]))
        tensor([0.0000, 0.5000])
    """
    return torch.tanh(x) + 0.5 * torch.tanh(-5 * x)


def regression(
    noise: float, *, seed: int, points: int = 20, dimensions: int = 30, label_noise: float = 0.08
) -> Regression:
    """Draw noisy points of a curve, with noise coordinates that tell them apart.

    The points are equidistant among 1,000 equidistant x from -1.5 to 1.5 (to the whole index below). With one seed,
    another ``noise`` scales the same noise coordinates and leaves the targets as they are.

    Args:
        noise: Standard deviation of each noise coordinate, 0 or more. The paper's kinds of memorization: 1e-4 is good,
            because the noise coordinates take up the label noise alone; 1e-3 is bad, because they take up everything;
            0 is ugly, because the curve itself has to bend.
        seed: Decides both kinds of noise.
        points: Training points ``N``, from 2 to 1,000.
        dimensions: Noise coordinates ``D``.
        label_noise: Standard deviation of the noise on the targets, 0 or more.

    Returns:
        The training points and the curve.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Bayat et al. (2025), reference code of figure 3; the draws are our own.

    Example:
        >>> data = regression(1e-3, seed=0)
        >>> data.inputs.shape, round(data.inputs[1, 0].item(), 4)
        (torch.Size([20, 31]), -1.3438)
    """
    if not (2 <= points <= _GRID and dimensions >= 0):
        raise ValueError(f"points must be from 2 to {_GRID} and dimensions at least 0, got {points} and {dimensions}")
    if not (noise >= 0 and label_noise >= 0):
        raise ValueError(f"noise and label_noise must be at least 0, got {noise} and {label_noise}")
    x = torch.linspace(-_LIMIT, _LIMIT, _GRID, dtype=torch.float64)
    positions = torch.arange(points) * (_GRID - 1) // (points - 1)
    curve = truth(x)
    errors = torch.randn(points, generator=generator(seed, "regression", "targets"), dtype=torch.float64)
    own = torch.randn(points, dimensions, generator=generator(seed, "regression", "noise"))
    curve_inputs = torch.cat([x.float()[:, None], torch.zeros(_GRID, dimensions)], 1)
    inputs = torch.cat([curve_inputs[positions, :1], noise * own], 1)
    targets = curve[positions] + label_noise * errors
    return Regression(inputs, targets.float(), positions, curve_inputs, curve.float())
