"""Find the examples that a spurious attribute misleads, without knowing it: twins that predict for each other (XRM)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from memloc.copies import (
    Copies,
    Descent,
    Optimizer,
    balancing_weights,
    check_examples,
    cross_entropies,
    make_copies,
    take,
)
from memloc.evaluation import classes as predicted_classes
from memloc.randomness import derive, generator

__all__ = ["Twins", "flip_probability", "train_twins"]

_DRAWN = 1 << 16  # random numbers for flips that are drawn together, a pair


@dataclass(frozen=True, eq=False)
class Twins:
    """S pairs of networks, each pair trained on two random halves of the same examples.

    Attributes:
        networks: 2 S of them; twins A and B of pair s are 2 s and 2 s + 1.
        seeds: Of each pair, length S.
        learning_rates: Of each pair, shape ``(S,)``.
        labels: The original ones. Int64, shape ``(S, N)``.
        assignment: Whether twin A was trained on the example, else B. Bool, shape ``(S, N)``.
        flipped_labels: The labels after all flips. Int64, shape ``(S, N)``.
        held_out: Logits of the twin that was not trained on the example, after the last step. Shape ``(S, N, K)``.
        mistakes: Cross-mistakes on the training examples (:meth:`cross_mistakes`). Bool, shape ``(S, N)``.
        is_degenerate: Whether, in training or validation, all examples of a class or none are mistakes. Bool,
            shape ``(S,)``.
    """

    networks: Copies
    seeds: tuple[int, ...]
    learning_rates: Tensor
    labels: Tensor
    assignment: Tensor
    flipped_labels: Tensor
    held_out: Tensor
    mistakes: Tensor
    is_degenerate: Tensor

    @property
    def flip_rate(self) -> Tensor:
        """The share of labels that are flipped at the end; 0 for degenerate pairs. Shape ``(S,)``.

        Hyper-parameters are chosen by the largest, which needs neither attributes nor groups.
        """
        return (self.flipped_labels != self.labels).float().mean(1) * ~self.is_degenerate

    @property
    def environments(self) -> Tensor:
        """The inferred group of each training example, ``2·label + mistake``. Int64, shape ``(S, N)``."""
        return 2 * self.labels + self.mistakes

    def cross_mistakes(self, features: Tensor, labels: Tensor) -> Tensor:
        """Say which examples of any split at least one twin of each pair gets wrong.

        Args:
            features: Shape ``(N, D)``, or ``(S, N, D)``.
            labels: Int64, shape ``(N,)`` or ``(S, N)``.

        Returns:
            Bool, shape ``(S, N)``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        check_examples(features, labels, len(self.seeds))
        return _mistakes(self.networks.logits(features), labels)

    def infer(self, features: Tensor, labels: Tensor) -> Tensor:
        """Infer the group of each example of any split, ``2·label + mistake``. Int64, shape ``(S, N)``."""
        return 2 * labels + self.cross_mistakes(features, labels)

    def table(self) -> pd.DataFrame:
        """Return one row a pair; flip rate and mistakes are shares of the training examples."""
        return pd.DataFrame(
            {
                "pair": range(len(self.seeds)),
                "seed": self.seeds,
                "learning_rate": self.learning_rates.tolist(),
                "flip_rate": self.flip_rate.tolist(),
                "mistakes": self.mistakes.float().mean(1).tolist(),
                "is_degenerate": self.is_degenerate.tolist(),
            }
        )


def flip_probability(held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the probability that an example takes over the class that its held-out twin predicts.

    Args:
        held_out: Logits of the twin that is not trained on the example, shape ``(…, N, K)``.

    Returns:
        Probability, ``(p - 1/K)·K/(K - 1)`` for the predicted class's share p, from 0 for a twin that knows nothing to
        1 for one that is sure, and that class; both of shape ``(…, N)``.

    Source:
        Pezeshki et al. (2024).

    Example:
        >>> flip_probability(torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
        (tensor([0., 1.]), tensor([0, 1]))
    """
    classes = held_out.shape[-1]
    most, predicted = held_out.mT.softmax(-2).max(-2)  # as networks lay them out, many times faster
    return (most - 1 / classes) * classes / (classes - 1), predicted


def train_twins(
    features: Tensor,
    labels: Tensor,
    descent: Descent,
    *,
    seeds: Sequence[int] = (0,),
    classes: int | None = None,
    hidden: Sequence[int] = (),
    bias: bool = True,
    zero: bool | None = None,
    balanced: bool = True,
    flips: bool | Tensor = True,
    assignment: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Twins:
    """Train pairs of twins by cross-risk minimization, all seeds and learning rates at once.

    Each example is assigned to one twin of a pair at random. Both learn from their own halves, and what one predicts
    for the other's examples replaces their labels with a probability that grows with its confidence. So both come to
    rely on what is easy and frequent, a spurious attribute if there is one, and the examples that they get wrong are
    those for which it does not hold.

    Args:
        features: Of the training examples, shape ``(N, D)``, or ``(S, N, D)`` for a set of its own for each pair.
        labels: Int64, shape ``(N,)`` or ``(S, N)``, from 0 to ``K - 1``.
        descent: How to train; both twins of a pair have its learning rate. Minibatches go through the examples in a
            new random order each time. ``every`` is not used.
        seeds: One for each pair; the same seed may come with several learning rates.
        classes: How many there are (K); None takes those of the labels.
        hidden: Widths of the hidden layers; none for linear twins.
        bias: Whether layers have biases.
        zero: Whether the last layer starts from zero; None lets linear twins do so.
        balanced: Whether every class counts alike in the loss, or every example.
        flips: Whether labels are flipped; without, held-out predictions are those of plain two-fold training. Recorded
            flips, bool of shape ``(steps, S, N)``, are repeated: the labels that took over the prediction.
        assignment: Which examples twin A is trained on, bool of shape ``(S, N)``; None draws them evenly.
        validation: Features and labels of other examples, on which a pair may be degenerate as well.

    Returns:
        The twins, their held-out predictions and mistakes.

    Raises:
        ValueError: If shapes do not fit or there are fewer than two classes.

    Source:
        Pezeshki et al. (2024), as the reference code of Bayat et al. (2025) has it, for networks of fully connected
        layers. There the whole pair has one optimiser, as here.

    Example:
        Of 200 examples one feature is right about all and a stronger one about 180.

        >>> draw = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(200) % 2
        >>> signs = 2 * labels - 1
        >>> features = torch.stack([signs, 5 * torch.where(torch.arange(200) < 20, -signs, signs)], 1).float()
        >>> features = torch.cat([features, torch.randn(200, 20, generator=draw)], 1)
        >>> twins = train_twins(features, labels, Descent(steps=300, learning_rate=0.01), seeds=[0, 1])
        >>> twins.mistakes[:, :20].sum(1), twins.mistakes[:, 20:].sum(1)
        (tensor([20, 20]), tensor([0, 0]))
    """
    pairs, size = len(seeds), features.shape[-2]
    classes = _check(features, labels, classes, pairs)
    if validation is not None:
        check_examples(*validation, pairs, "validation labels")
    labels = labels.expand(pairs, size)
    half = _given("assignment", assignment, (pairs, size), labels) if assignment is not None else _halves(seeds, labels)
    recorded = flips if isinstance(flips, bool) else _given("flips", flips, (descent.steps, pairs, size), labels)
    networks = make_copies(
        features.shape[-1],
        classes,
        [derive(seed, "twin", twin) for seed in seeds for twin in "AB"],
        hidden=hidden,
        bias=bias,
        zero=not hidden if zero is None else zero,
        device=features.device,
    ).clone(trainable=True)
    if validation is not None:
        networks.check(validation[0])
    rates = descent.rates(pairs)
    optimizer = Optimizer(networks.parameters, replace(descent, learning_rate=rates.repeat_interleave(2).tolist()))
    flipped = labels.clone()
    for step, (indices, uniform) in zip(range(descent.steps), _visits(seeds, labels, descent), strict=False):
        target = take(flipped, indices, 1)
        held_in, held_out = _by_half(networks(take(features, indices, 2)), take(half, indices, 1))
        weights = balancing_weights(target, classes) if balanced else 1 / target.shape[1]
        optimizer.step((cross_entropies(held_in, target) * weights).sum())
        if recorded is False:
            continue
        probability, predicted = flip_probability(held_out.detach())
        is_flipped = uniform < probability if recorded is True else take(recorded[step], indices, 1)
        target = torch.where(is_flipped, predicted, target)
        flipped = target if indices is None else flipped.scatter(1, indices, target)
    logits = networks.logits(features)
    mistakes = _mistakes(logits, labels)
    is_degenerate = _is_degenerate(labels, mistakes)
    if validation is not None:
        is_degenerate |= _is_degenerate(validation[1], _mistakes(networks.logits(validation[0]), validation[1]))
    return Twins(
        networks=networks.clone(),
        seeds=tuple(seeds),
        learning_rates=rates,
        labels=labels,
        assignment=half,
        flipped_labels=flipped,
        held_out=_by_half(logits, half)[1],
        mistakes=mistakes,
        is_degenerate=is_degenerate,
    )


def _by_half(logits: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits, shape ``(2 S, N, K)``, into those of the twin that learns from an example and of the other."""
    a, b = logits.unflatten(0, (-1, 2)).unbind(1)
    return torch.where(half[..., None], a, b), torch.where(half[..., None], b, a)


def _mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """Say which examples at least one twin of each pair gets wrong, shape ``(S, N)``."""
    return (predicted_classes(logits).unflatten(0, (-1, 2)) != labels[..., None, :]).any(1)


def _halves(seeds: Sequence[int], labels: Tensor) -> Tensor:
    """Draw which examples each twin A learns from."""
    size = labels.shape[1]
    return torch.stack([torch.rand(size, generator=generator(seed, "twins")) < 0.5 for seed in seeds]).to(labels.device)


def _visits(seeds: Sequence[int], labels: Tensor, descent: Descent) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Give each step's examples of each pair (None for all) and a uniform random number for each of them, forever."""
    size, device = labels.shape[1], labels.device
    orders, draws = ([generator(seed, purpose) for seed in seeds] for purpose in ("order", "flips"))
    passes = max(1, _DRAWN // size)
    while True:
        numbers = torch.stack([torch.rand(passes, size, generator=draw) for draw in draws], 1).to(device)
        for uniform in numbers:
            if descent.batch_size is None:
                yield None, uniform
                continue
            order = torch.stack([torch.randperm(size, generator=draw) for draw in orders]).to(device)
            for indices in order.split(descent.batch_size, 1):
                yield indices, uniform.gather(1, indices)


def _is_degenerate(labels: Tensor, mistakes: Tensor) -> Tensor:
    """Say for each pair whether all examples of a class are mistakes, or none; shape ``(S,)``."""
    labels = labels.expand_as(mistakes)
    found = torch.zeros(len(mistakes), dtype=torch.bool, device=mistakes.device)
    for each in labels.unique():
        member = labels == each
        wrong, all_of_them = (member & mistakes).sum(1), member.sum(1)
        found |= (all_of_them > 0) & ((wrong == 0) | (wrong == all_of_them))
    return found


def _check(features: Tensor, labels: Tensor, classes: int | None, pairs: int) -> int:
    """Check shapes and find the number of classes."""
    if not pairs:
        raise ValueError("seeds must hold one for each pair, got none")
    check_examples(features, labels, pairs)
    found = int(labels.max()) + 1
    if classes is None:
        classes = found
    if classes < max(2, found):
        raise ValueError(
            f"classes must be at least 2 and more than any label, got {classes} with labels to {found - 1}"
        )
    return classes


def _given(name: str, values: Tensor, shape: tuple[int, ...], labels: Tensor) -> Tensor:
    """Check what was recorded."""
    if values.dtype != torch.bool or values.shape != shape:
        raise ValueError(f"{name} must be bool of shape {shape}, got {values.dtype} {tuple(values.shape)}")
    return values.to(labels.device)
