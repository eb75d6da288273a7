"""Twenty noisy points of a curve, each with noise coordinates of its own: memorization that is good, bad or ugly."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from memloc.copies import Copies, Descent, Optimizer, make_copies
from memloc.randomness import generator

__all__ = ["Fits", "Regression", "fit_curves", "regression", "truth"]

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


@dataclass(frozen=True, eq=False)
class Fits:
    """Networks that were fitted to training points, one for each of S sets of them.

    Attributes:
        networks: S of them, after their last step.
        steps: How many each took. Int64, shape ``(S,)``.
        errors: Mean squared error at the training points, shape ``(S,)``.
        clean_errors: The same with all noise coordinates 0: what is left when the means to tell points apart are gone.
        curves: Predictions along the curve with all noise coordinates 0. Shape ``(S, 1000)``.
        mixed_curves: The same with the noise of the training points in their places. Shape ``(S, 1000)``.
        truth: The curve, shape ``(1000,)``.
    """

    networks: Copies
    steps: Tensor
    errors: Tensor
    clean_errors: Tensor
    curves: Tensor
    mixed_curves: Tensor
    truth: Tensor

    def table(self) -> pd.DataFrame:
        """Return one row a network.

        Returns:
            Columns ``seed``, ``steps``, ``error`` and ``clean_error`` (mean squared, against the noisy targets),
            ``curve_error`` (mean squared, of the noiseless predictions against the true curve), ``largest_error`` (of
            these, in absolute value).
        """
        wrong = self.curves - self.truth
        return pd.DataFrame(
            {
                "seed": self.networks.seeds,
                "steps": self.steps.tolist(),
                "error": self.errors.tolist(),
                "clean_error": self.clean_errors.tolist(),
                "curve_error": wrong.square().mean(1).tolist(),
                "largest_error": wrong.abs().amax(1).tolist(),
            }
        )


def fit_curves(
    data: Sequence[Regression],
    *,
    seeds: Sequence[int],
    width: int = 300,
    learning_rate: float = 1e-3,
    tolerance: float = 1e-6,
    steps: int = 100_000,
) -> Fits:
    """Fit a network to each of several sets of training points, all at once, until it reproduces them.

    The networks have two hidden layers of tanh units. All points are in each step of Adam. A network that is good
    enough takes no further steps, as if it were alone.

    Args:
        data: One set of points for each network, of the same sizes.
        seeds: One for each network, which decides its initial weights.
        width: Units of each hidden layer.
        learning_rate: Of Adam, constant.
        tolerance: Mean squared error below which a network is good enough.
        steps: How many it takes at most.

    Returns:
        The networks, how far they got, and the curves that they draw.

    Raises:
        ValueError: If there is not one seed for each set of points, or the tolerance is not above 0.

    Source:
        Bayat et al. (2025), reference code of figure 3.

    Example:
        >>> data = [regression(noise, seed=0) for noise in (1e-3, 0.0)]
        >>> fits = fit_curves(data, seeds=[0, 0], width=20, learning_rate=0.01, tolerance=0.01)
        >>> bool((fits.errors < 0.01).all()), bool(fits.clean_errors[1] == fits.errors[1])
        (True, True)
    """
    if not len(data) or len(data) != len(seeds):
        raise ValueError(f"seeds must be one for each set of points, at least one, got {len(seeds)} for {len(data)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    inputs, targets, clean, curve, mixed = (
        torch.stack([getattr(each, name) for each in data])
        for name in ("inputs", "targets", "clean_inputs", "curve_inputs", "mixed_inputs")
    )
    networks = make_copies(inputs.shape[2], 1, seeds, hidden=[width, width], activation=nn.Tanh(), device=inputs.device)
    descent = Descent(steps=steps, learning_rate=learning_rate, optimizer="adam")
    networks, taken = _train(networks, inputs, targets, descent, tolerance)
    errors, clean_errors = ((networks.logits(each)[..., 0] - targets).square().mean(1) for each in (inputs, clean))
    curves, mixed_curves = (networks.logits(each)[..., 0] for each in (curve, mixed))
    return Fits(networks, taken, errors, clean_errors, curves, mixed_curves, data[0].curve)


def _train(
    networks: Copies, inputs: Tensor, targets: Tensor, descent: Descent, tolerance: float
) -> tuple[Copies, Tensor]:
    """Train every network until its error is below the tolerance, and say after how many steps that was."""
    trained = networks.clone()
    taken = torch.full((len(networks),), descent.steps, device=inputs.device)
    left = torch.arange(len(networks), device=inputs.device)
    networks = networks.clone(trainable=True)
    optimizer = Optimizer(networks.parameters, descent)
    for step in range(descent.steps + 1):
        errors = (networks(inputs)[..., 0] - targets).square().mean(1)
        is_done = (errors < tolerance) | (step == descent.steps)
        if is_done.any():
            for whole, part in zip(trained.parameters, networks.parameters, strict=True):
                whole[left[is_done]] = part.detach()[is_done]
            taken[left[is_done]] = step
            left, inputs, targets = left[~is_done], inputs[~is_done], targets[~is_done]
            if not len(left):
                break
            networks = networks.only(~is_done).clone(trainable=True)
            optimizer = optimizer.only(~is_done, networks.parameters)
            errors = (networks(inputs)[..., 0] - targets).square().mean(1)
        optimizer.step(errors.sum())
    return trained, taken
