"""What several seeds say together: mean and confidence interval."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Interval", "interval"]


@dataclass(frozen=True)
class Interval:
    """A mean over independent seeds and its 95 % confidence interval.

    Attributes:
        mean: Their mean.
        half_width: Half the width of the interval, by Student's t; NaN for one seed.
        n: How many seeds.
    """

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        """Write it as a page shows it, e.g. ``0.951 ± 0.004``."""
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.3f}"
        return f"{self.mean:.3f}{spread}"


def interval(values: Iterable[float]) -> Interval:
    """Compute the mean of a number over seeds and its 95 % confidence interval.

    Args:
        values: One number a seed.

    Returns:
        Mean, half the width of the interval, and how many.

    Raises:
        ValueError: If there is no number.

    Example:
        >>> str(interval([0.95, 0.97, 0.96]))
        '0.960 ± 0.025'
    """
    found = np.asarray(list(values), dtype=float)
    if not len(found):
        raise ValueError("values must hold at least one number, got none")
    if len(found) == 1:
        return Interval(float(found[0]), math.nan, 1)
    error = found.std(ddof=1) / math.sqrt(len(found))
    return Interval(float(found.mean()), float(stats.t.ppf(0.975, len(found) - 1) * error), len(found))
