"""Train a linear classifier with all its examples, and again without each of some: leave-one-out, all at once."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from memloc.copies import Descent, check_examples

__all__ = ["LeaveOneOut", "leave_one_out"]


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """A linear classifier trained with all examples, and again without each of some.

    Attributes:
        logits: After the training with all, less those of the last class, which changes no probability. Shape
            ``(S, N, K)``.
        weights: How much each example counted in the last step of that training, 1 on average. Shape ``(S, N)``.
        left_out: The examples left out. Int64, shape ``(S, M)``.
        probabilities: Of their labels, trained with all, without the shift. Shape ``(S, M)``.
        without: The same, trained without the example. Shape ``(S, M)``.
        is_right: Whether the network that was trained without the example gets it right. Bool, shape ``(S, M)``.
    """

    logits: Tensor
    weights: Tensor
    left_out: Tensor
    probabilities: Tensor
    without: Tensor
    is_right: Tensor

    @property
    def drops(self) -> Tensor:
        """By how much the probability of the label falls without the example, shape ``(S, M)``."""
        return self.probabilities - self.without

    def table(self) -> pd.DataFrame:
        """Return one row a copy and example: ``probability``, ``without``, ``drop`` and ``is_right`` (without it)."""
        copies = torch.arange(len(self.left_out))[:, None].expand(self.left_out.shape)
        found = {"copy": copies, "example": self.left_out, "probability": self.probabilities, "without": self.without}
        found |= {"drop": self.drops, "is_right": self.is_right}
        return pd.DataFrame({name: values.flatten().cpu().numpy() for name, values in found.items()})


@torch.no_grad()
def leave_one_out(
    features: Tensor,
    labels: Tensor,
    left_out: Tensor,
    descent: Descent,
    *,
    start: Tensor,
    shift: Tensor | None = None,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    group_rate: float | None = None,
) -> LeaveOneOut:
    """Train a linear classifier by gradient descent with all examples, and again without each of some.

    All trainings are one batch. A step moves the logits by the features' inner products times what each example
    pulls, so that weights need not exist: where there are more features than examples, a step is one product with the
    ``(N, N)`` matrix of inner products. Up to rounding this is :func:`memloc.ensembles.train_copies` for every
    training, with the mean loss over the examples that are there.

    Args:
        features: Shape ``(N, D)``, or ``(S, N, D)`` for S sets. A bias is a feature that is 1.
        labels: Int64, shape ``(N,)`` or ``(S, N)``.
        left_out: Examples to leave out, one at a time. Int64, shape ``(M,)`` or ``(S, M)``.
        descent: Plain gradient descent on all examples, with or without momentum and weight decay.
        start: Logits of the initial weights, which say what K and S are. Shape ``(N, K)`` or ``(S, N, K)``.
        shift: Added to the logits in training alone. Shape ``(N, K)`` or ``(S, N, K)``.
        weights: How much each example counts, in any unit. Shape ``(N,)`` or ``(S, N)``.
        groups: For ``group_rate``. Int64 from 0, shape ``(N,)`` or ``(S, N)``.
        group_rate: Step size of GroupDRO, as in :func:`memloc.ensembles.train_copies`; None for none.

    Returns:
        The logits with all examples, and the probabilities of the labels with and without each example left out.

    Raises:
        ValueError: If shapes do not fit, an example does not exist, or training is not plain gradient descent.

    Source:
        Leaving out one example is the definition behind memorization scores (Feldman and Zhang 2020), in which
        the drop is that of the accuracy over many trainings.

    Example:
        Two examples share a feature, the third has one of its own: without it, nothing says what its label is.

        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> labels, descent = torch.tensor([0, 0, 1]), Descent(steps=100, learning_rate=0.5)
        >>> found = leave_one_out(features, labels, torch.tensor([0, 2]), descent, start=torch.zeros(3, 2))
        >>> found.without.round(decimals=2)
        tensor([[0.9800, 0.5000]])
    """
    start = start[None] if start.ndim == 2 else start
    sets, size, classes = start.shape
    _check_shapes(features, labels, left_out, start, shift, weights, groups)
    _check_training(descent, weights, groups, group_rate)
    left_out, labels = left_out.expand(sets, -1), labels.expand(sets, size)
    margins = _margins(start)[:, None].repeat(1, left_out.shape[1] + 1, 1, 1)  # (S, M + 1, K - 1, N)
    offset = torch.zeros_like(margins[:, :1]) if shift is None else _margins(shift.expand_as(start))[:, None]
    target = F.one_hot(labels, classes).to(margins).mT[:, None, :-1]
    is_kept = margins.new_ones(*margins.shape[:2], size)
    is_kept[:, 1:].scatter_(2, left_out[..., None], 0.0)
    shares = is_kept if weights is None else is_kept * weights.expand(sets, size)[:, None]
    shares = F.normalize(shares, p=1, dim=2)
    priorities = None if groups is None or group_rate is None else _Priorities(groups, is_kept, group_rate)
    spread = _spreader(features.to(margins))
    rates = descent.rates(sets).to(margins).view(-1, 1, 1, 1)
    velocity = torch.zeros_like(margins)
    for _ in range(descent.steps):
        shifted = margins + offset
        if priorities is not None:
            shares = priorities.shares(_losses(shifted, labels))
        pull = (_probabilities(shifted) - target) * shares[:, :, None]
        pull += pull.sum(2, keepdim=True)  # less what the last class is pulled by, minus the sum of the others
        moved = spread(pull.flatten(1, 2)).view_as(margins)
        if descent.weight_decay:
            moved += descent.weight_decay * margins
        velocity = velocity.mul_(descent.momentum).add_(moved) if descent.momentum else moved
        margins.addcmul_(velocity, rates, value=-1)
    return _compare(margins, labels, left_out, shares[:, 0] * size)


def _spreader(features: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the function that multiplies rows, shape ``(S, R, N)``, by the examples' inner products."""
    if features.shape[-1] < features.shape[-2]:
        return lambda rows: (rows @ features) @ features.mT
    products = features @ features.mT
    return lambda rows: rows @ products


def _compare(margins: Tensor, labels: Tensor, left_out: Tensor, weights: Tensor) -> LeaveOneOut:
    """Look the left-out examples up in the trainings with all, the first, and without each."""
    logits = F.pad(margins, (0, 0, 0, 1))  # the last class's are 0
    place = left_out[..., None, None].expand(-1, -1, logits.shape[2], 1)
    theirs = labels.gather(1, left_out)
    full, without = (
        each.expand(-1, left_out.shape[1], -1, -1).gather(3, place)[..., 0] for each in (logits[:, :1], logits[:, 1:])
    )
    before, after = (each.softmax(2).gather(2, theirs[..., None])[..., 0] for each in (full, without))
    return LeaveOneOut(logits[:, 0].mT, weights, left_out, before, after, without.argmax(2) == theirs)


class _Priorities:
    """GroupDRO's weights of groups, for every training; a left-out example belongs to no group."""

    def __init__(self, groups: Tensor, is_kept: Tensor, rate: float) -> None:
        groups = groups.expand(len(is_kept), -1)
        self.member = F.one_hot(groups).to(is_kept)
        self.is_kept, self.rate = is_kept, rate
        self.count = is_kept @ self.member
        self.priority = F.normalize((self.count > 0).to(is_kept), p=1, dim=2)

    def shares(self, losses: Tensor) -> Tensor:
        """Move the weights and give the share of each example, shape ``(S, M + 1, N)``."""
        count = self.count.clamp(min=1)
        mean = (losses * self.is_kept) @ self.member / count
        self.priority = F.normalize(self.priority * (self.rate * mean).exp(), p=1, dim=2)
        return (self.priority / count) @ self.member.mT * self.is_kept


def _margins(logits: Tensor) -> Tensor:
    """Take logits less the last class's, shape ``(…, K - 1, N)``."""
    return (logits[..., :-1] - logits[..., -1:]).mT


def _probabilities(margins: Tensor) -> Tensor:
    """Compute the probabilities of all classes but the last, from margins of shape ``(S, M, K - 1, N)``."""
    return margins.sigmoid() if margins.shape[2] == 1 else F.pad(margins, (0, 0, 0, 1)).softmax(2)[:, :, :-1]


def _losses(margins: Tensor, labels: Tensor) -> Tensor:
    """Compute cross-entropies, shape ``(S, M, N)``."""
    found = F.pad(margins, (0, 0, 0, 1)).log_softmax(2)
    return -found.gather(2, labels[:, None, None].expand(-1, found.shape[1], 1, -1))[:, :, 0]


def _check_shapes(
    features: Tensor,
    labels: Tensor,
    left_out: Tensor,
    start: Tensor,
    shift: Tensor | None,
    weights: Tensor | None,
    groups: Tensor | None,
) -> None:
    """Refuse what does not fit together."""
    sets, size, classes = start.shape
    check_examples(features, labels, sets)
    if groups is not None:
        check_examples(features, groups, sets, "groups")
    if features.shape[-2] != size or labels.max() >= classes:
        expected = f"a row for each of {features.shape[-2]} examples and more than {labels.max()} classes"
        raise ValueError(f"start must have {expected}, got {tuple(start.shape)}")
    for name, values, shape in (("shift", shift, (size, classes)), ("weights", weights, (size,))):
        if values is not None and values.shape not in (shape, (sets, *shape)):
            raise ValueError(f"{name} must have shape {shape} or {(sets, *shape)}, got {tuple(values.shape)}")
    fits = left_out.dtype == torch.int64 and left_out.ndim in (1, 2) and left_out.shape[:-1] in ((), (sets,))
    if not fits or not ((left_out >= 0) & (left_out < size)).all():
        got = f"{left_out.dtype} {tuple(left_out.shape)}"
        raise ValueError(f"left_out must be int64 (M,) or ({sets}, M), positions from 0 to {size - 1}, got {got}")


def _check_training(descent: Descent, weights: Tensor | None, groups: Tensor | None, group_rate: float | None) -> None:
    """Refuse trainings that cannot be followed by their logits alone."""
    if descent.optimizer != "sgd" or descent.batch_size is not None:
        got = f"{descent.optimizer} with batch_size {descent.batch_size}"
        raise ValueError(f"descent must be sgd on all examples at once, batch_size None, got {got}")
    if group_rate is not None and (weights is not None or groups is None or not group_rate >= 0):
        raise ValueError("group_rate must be at least 0 and come with groups and without weights")
