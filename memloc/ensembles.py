"""Train many small networks at once, and choose their checkpoints by the accuracy of the worst group."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from memloc.copies import Copies, Descent, Optimizer, check_examples, cross_entropies, sum_by, take
from memloc.evaluation import classes
from memloc.randomness import generator
from memloc.recipes import check_one_of

__all__ = ["Grouped", "Shift", "Training", "train_copies"]

Shift = Tensor | Callable[[Tensor], Tensor]
"""What is added to logits during training: of each example, or a function of the positions of some."""

_CHUNK = 64  # steps whose random numbers are drawn together


@dataclass(frozen=True, eq=False)
class Grouped:
    """Examples with labels and groups, shared by all copies or one set for each of S copies.

    Attributes:
        features: Float32, shape ``(N, D)``, or ``(S, N, D)`` for a set of its own for each copy.
        labels: Int64, shape ``(N,)`` or ``(S, N)``, from 0 to ``K - 1``.
        groups: The group that each example is counted in, e.g. ``2·label + attribute``. Int64, shape ``(N,)`` or
            ``(S, N)``.

    Raises:
        ValueError: If the shapes do not fit, or labels or groups are not int64 from 0.

    Example:
        >>> len(Grouped(torch.zeros(3, 5), torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])))
        3
    """

    features: Tensor
    labels: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        self.check()

    def check(self, copies: int | None = None) -> None:
        """Refuse what does not fit together, or is not one set for all or for each of so many copies.

        Raises:
            ValueError: If it does not fit.
        """
        check_examples(self.features, self.labels, copies)
        check_examples(self.features, self.groups, copies, "groups")

    def __len__(self) -> int:
        return self.features.shape[-2]


@dataclass(frozen=True, eq=False)
class Training:
    """Copies after their training, and what they predicted during it.

    Attributes:
        copies: As they were after the last step.
        steps: After how many steps they were evaluated, from 0. Int64, shape ``(T,)``.
        predictions: Of each watched split, the predicted class at each evaluation, −1 where a logit is NaN. Int16,
            shape ``(T, S, N)``.
        watched: The splits.
        seconds: Of all copies together, evaluation included.
    """

    copies: Copies
    steps: Tensor
    predictions: dict[str, Tensor]
    watched: dict[str, Grouped]
    seconds: float

    def accuracies(self, split: str, groups: Tensor | None = None) -> Tensor:
        """Compute the accuracy of each group at each evaluation.

        Args:
            split: A name in ``watched``.
            groups: Other groups than the split's own, e.g. inferred ones, of the same shapes.

        Returns:
            Fractions, shape ``(T, S, G)``; NaN for a group without examples.

        Raises:
            ValueError: If the split was not watched, or the groups do not fit it.
        """
        right = self._right(split)
        data = self.watched[split]
        groups = data.groups if groups is None else groups
        check_examples(data.features, groups, len(self.copies), "groups")
        groups = groups.expand_as(right)
        return sum_by(groups, right) / sum_by(groups, torch.ones_like(right))

    def average_accuracy(self, split: str) -> Tensor:
        """Compute the share of examples that are right at each evaluation, shape ``(T, S)``."""
        return self._right(split).mean(2)

    def _right(self, split: str) -> Tensor:
        """Say which examples are right at each evaluation, 1 or 0, shape ``(T, S, N)``."""
        check_one_of("split", split, self.watched)
        return (self.predictions[split] == self.watched[split].labels).float()

    def worst_group_accuracy(self, split: str, groups: Tensor | None = None) -> Tensor:
        """Compute the least accuracy of a group that has examples, at each evaluation, shape ``(T, S)``."""
        return self.accuracies(split, groups).nan_to_num(nan=math.inf).amin(2)

    def selected(self, split: str, groups: Tensor | None = None) -> Tensor:
        """Choose the evaluation with the best worst-group accuracy for each copy; of equals, the last.

        Args:
            split: A name in ``watched``, not the one that the chosen copies are judged by.
            groups: Other groups than the split's own: with inferred ones nobody has to know the attributes.

        Returns:
            Positions in ``steps``. Int64, shape ``(S,)``.
        """
        scores = self.worst_group_accuracy(split, groups)
        return len(scores) - 1 - scores.flip(0).argmax(0)

    def table(self) -> pd.DataFrame:
        """Return one row for each split, evaluation, copy and group: its accuracy, a fraction."""
        tables = []
        for split in self.watched:
            found = self.accuracies(split).cpu()
            index = pd.MultiIndex.from_product(
                [self.steps.tolist(), range(found.shape[1]), range(found.shape[2])], names=["step", "copy", "group"]
            )
            table = pd.DataFrame({"accuracy": found.flatten().numpy()}, index).reset_index()
            table.insert(0, "split", split)
            tables.append(table)
        columns = ["split", "step", "copy", "group", "accuracy"]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def train_copies(
    copies: Copies,
    train: Grouped,
    descent: Descent,
    *,
    weights: Tensor | None = None,
    shift: Shift | None = None,
    group_rate: float | None = None,
    smoothing: float = 0.0,
    dropout: float = 0.0,
    watch: Mapping[str, Grouped] | None = None,
) -> Training:
    """Train all copies at once with cross-entropy, weighted by example or by group.

    Each copy is trained as if it were alone: results do not depend on the others, up to rounding.

    Args:
        copies: The networks before; they stay as they are.
        train: What to train on; its groups matter for ``group_rate`` alone.
        descent: How.
        weights: How much each example counts. In full batches a factor; in minibatches the probability to be drawn,
            with replacement. None counts all alike. Shape ``(N,)`` or ``(S, N)``, in any unit.
        shift: Added to the logits of each example during training alone (:func:`memloc.mat.logit_shift`). Shape
            ``(N, K)`` or ``(S, N, K)``; or a function of the positions of the examples of a step, ``(S, B)``, that
            gives their shift, ``(S, B, K)`` (:func:`memloc.mat.batch_shift`).
        group_rate: Step size η of GroupDRO: group g counts q_g, and after each batch q_g grows by the factor
            exp(η · mean loss of the group in the batch). None for none; 0 counts all groups alike.
        smoothing: Share of each label that is spread over all classes, from 0 to 1.
        dropout: Probability of each value that the last layer sees to be switched off in a step, from 0 to below 1;
            the others are divided by the rest. Of linear networks these values are the features.
        watch: Splits to evaluate, by name.

    Returns:
        The trained copies and what they predicted.

    Raises:
        ValueError: If shapes do not fit, a number is out of range, weights are negative or all 0 for a copy, or come
            with ``group_rate`` where all examples are taken, because only one of the two can say what counts.

    Source:
        GroupDRO: Sagawa et al. (2020), algorithm 1, with the mean loss of each group that is in the batch. The
        evaluation after every so many steps follows the reference code of Bayat et al. (2025). Weights by sampling in
        minibatches and by factors in full batches are ours; the expected gradient is the same.

    Example:
        >>> features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        >>> labels = (features[:, 0] > 0).long()
        >>> data = Grouped(features, labels, labels)
        >>> from memloc.copies import make_copies
        >>> copies = make_copies(5, 2, seeds=[0, 1], zero=True)
        >>> found = train_copies(copies, data, Descent(steps=100, learning_rate=(0.1, 1.0)), watch={"train": data})
        >>> found.worst_group_accuracy("train")[-1] > 0.9
        tensor([True, True])
    """
    watched = dict(watch or {})
    for split in (train, *watched.values()):
        split.check(len(copies))
    share = _shares(copies, train, weights, shift)
    if group_rate is not None and not 0 <= group_rate < math.inf:
        raise ValueError(f"group_rate must be a finite number at least 0, got {group_rate}")
    if not (0 <= smoothing <= 1 and 0 <= dropout < 1):
        raise ValueError(f"smoothing must be from 0 to 1 and dropout from 0 to below 1, got {smoothing} and {dropout}")
    if group_rate is not None and weights is not None and descent.batch_size is None:
        raise ValueError("weights must be None with group_rate in full batches, got both: choose one, or a batch_size")
    start, copies = time.perf_counter(), copies.clone(trainable=True)
    optimizer = Optimizer(copies.parameters, descent)
    labels, groups = (each.expand(len(copies), -1) for each in (train.labels, train.groups))
    priority = normalize((sum_by(groups, torch.ones_like(share)) > 0).float(), 1, 1)
    everything = torch.arange(len(train), device=share.device).expand_as(share)
    draws = [generator(seed, "dropout") for seed in copies.seeds] if dropout else []
    evaluated = {0: _predict(copies, watched)}
    for step, indices in enumerate(_drawn(share, descent, copies.seeds), 1):
        size = len(train) if indices is None else indices.shape[1]
        factors = _dropped(draws, (size, copies.weights[-1].shape[2]), dropout, share.device) if dropout else None
        logits = copies(take(train.features, indices, 2), factors)
        if isinstance(shift, Tensor):
            logits = logits + take(shift, indices, 2)
        elif shift is not None:
            logits = logits + _shift_of(shift, everything if indices is None else indices, logits.shape)
        losses = cross_entropies(logits, take(labels, indices, 1), smoothing)
        counts = share if indices is None else torch.full_like(losses, 1 / losses.shape[1])
        if group_rate is not None:
            priority, counts = _prioritise(priority, losses.detach(), take(groups, indices, 1), group_rate)
        optimizer.step((losses * counts).sum())
        if step % descent.every == 0 or step == descent.steps:
            evaluated[step] = _predict(copies, watched)
    predictions = {name: torch.stack([found[name] for found in evaluated.values()]) for name in watched}
    return Training(
        copies=copies.clone(),
        steps=torch.tensor(list(evaluated), device=share.device),
        predictions=predictions,
        watched=watched,
        seconds=time.perf_counter() - start,
    )


def _shift_of(shift: Callable[[Tensor], Tensor], indices: Tensor, shape: torch.Size) -> Tensor:
    """Ask for the shift of some examples, which must be one number for each logit, shape ``(S, B, K)``."""
    found = shift(indices)
    if found.shape != shape:
        raise ValueError(f"shift must give one number for each logit, shape {tuple(shape)}, got {tuple(found.shape)}")
    return found


def _prioritise(priority: Tensor, losses: Tensor, groups: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Move GroupDRO's weights of groups, ``(S, G)``, and give the factor of each example, ``(S, B)``."""
    count = sum_by(groups, torch.ones_like(losses), priority.shape[1])
    mean = sum_by(groups, losses, priority.shape[1]) / count.clamp(min=1)
    priority = (priority.log() + rate * mean).softmax(1)  # so that no power overflows; log 0 stays without weight
    return priority, (priority / count.clamp(min=1)).gather(1, groups)


def _dropped(draws: Sequence[torch.Generator], shape: tuple[int, int], rate: float, device: torch.device) -> Tensor:
    """Draw the factors of dropout, each copy by its own generator, shape ``(S, B, H)``."""
    kept = torch.stack([torch.rand(shape, generator=draw) >= rate for draw in draws])
    return kept.to(device) / (1 - rate)


def _predict(copies: Copies, watched: Mapping[str, Grouped]) -> dict[str, Tensor]:
    """Predict the class of every watched example."""
    return {name: classes(copies.logits(split.features)).to(torch.int16) for name, split in watched.items()}


def _shares(copies: Copies, train: Grouped, weights: Tensor | None, shift: Shift | None) -> Tensor:
    """Check what belongs to the examples, and give weights that add up to 1 for each copy, shape ``(S, N)``."""
    size, classes = len(train), copies.weights[-1].shape[1]
    if train.labels.max() >= classes:
        raise ValueError(f"labels must be below {classes}, the classes of the networks, got {int(train.labels.max())}")
    for name, values, shape in (("weights", weights, (size,)), ("shift", shift, (size, classes))):
        if isinstance(values, Tensor) and values.shape not in (shape, (len(copies), *shape)):
            got = tuple(values.shape)
            raise ValueError(f"{name} must have shape {shape} or {(len(copies), *shape)}, got {got}")
    share = torch.ones(size, device=train.features.device) if weights is None else weights.float()
    share = share.expand(len(copies), size)
    if not ((share >= 0) & (share < math.inf)).all() or not (share.sum(1) > 0).all():
        raise ValueError("weights must be finite, at least 0, and above 0 for an example of every copy: some are not")
    return normalize(share, 1, 1)


def _drawn(share: Tensor, descent: Descent, seeds: Sequence[int]) -> Iterator[Tensor | None]:
    """Draw the examples of each step for each copy, shape ``(S, B)``; None for all of them."""
    if descent.batch_size is None:
        yield from [None] * descent.steps
        return
    size, draws = descent.batch_size, [generator(seed, "batches") for seed in seeds]
    for first in range(0, descent.steps, _CHUNK):
        steps = min(_CHUNK, descent.steps - first)
        rows = [
            each.multinomial(steps * size, replacement=True, generator=draw)
            for each, draw in zip(share.cpu(), draws, strict=True)
        ]
        yield from torch.stack(rows).to(share.device).unflatten(1, (steps, size)).unbind(1)
