"""Compare ways to train where an attribute misleads: plain, weighted, subsampled, GroupDRO, MAT, JTT, DFR, controls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from memloc.copies import Descent, balancing_weights, check_examples, make_copies
from memloc.ensembles import Grouped, Shift, Training, train_copies
from memloc.randomness import generator
from memloc.recipes import check_one_of

__all__ = ["METHODS", "Comparison", "Method", "balanced_subset", "compare"]


@dataclass(frozen=True)
class Method:
    """How a method departs from plain training.

    Attributes:
        how: ``"plain"``; ``"weights"``, each group counts alike; ``"subset"``, a random subset with equally many of
            each group; ``"priority"``, GroupDRO; ``"shift"``, MAT; ``"mistakes"``, those of a short training count more
            (JTT); ``"head"``, the last layer is trained again, on validation examples whose groups count alike (DFR);
            ``"smoothing"`` and ``"dropout"``, controls that make memorizing harder and know of no groups.
        by: What the groups are: ``"class"``; ``"group"``, the true ones; ``"environment"``, inferred ones.
    """

    how: str = "plain"
    by: str = "class"


METHODS = {
    "erm": Method(),
    "label_smoothing": Method("smoothing"),
    "dropout": Method("dropout"),
    "class_weights": Method("weights", "class"),
    "group_weights": Method("weights", "group"),
    "class_subset": Method("subset", "class"),
    "group_subset": Method("subset", "group"),
    "groupdro_class": Method("priority", "class"),
    "groupdro": Method("priority", "group"),
    "groupdro_xrm": Method("priority", "environment"),
    "mat": Method("shift"),
    "jtt": Method("mistakes"),
    "dfr": Method("head", "group"),
}
"""The methods that :func:`compare` knows."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several methods on the same data.

    Attributes:
        trainings: Of each method, all copies; watched are ``"validation"`` and ``"test"``.
        learning_rates: Of each copy, shape ``(S,)``.
        inferred: Inferred groups of the validation examples, shape ``(N,)`` or ``(S, N)``; None if there are none.
    """

    trainings: dict[str, Training]
    learning_rates: Tensor
    inferred: Tensor | None

    def table(self) -> pd.DataFrame:
        """Return one row for each method, copy and selection of its checkpoint.

        The column ``selection`` says by what worst-group accuracy on the validation examples the checkpoint was chosen:
        of the ``"true"`` groups, of ``"inferred"`` ones, or ``"last"`` for none, the last checkpoint. Accuracies are
        fractions: ``score`` is what the selection saw, the others are of the test examples and their true groups.
        ``seconds`` is the time of all copies together over their number, the twins not included.
        """
        rows = []
        for method, training in self.trainings.items():
            average, worst = training.average_accuracy("test"), training.worst_group_accuracy("test")
            for selection in ("true", "inferred", "last"):
                groups = self.inferred if selection == "inferred" else None
                if selection == "inferred" and groups is None:
                    continue
                scores = training.worst_group_accuracy("validation", groups)
                chosen = training.selected("validation", groups)
                if selection == "last":
                    chosen = torch.full_like(chosen, len(scores) - 1)
                for copy, (index, seed) in enumerate(zip(chosen.tolist(), training.copies.seeds, strict=True)):
                    rows.append(
                        {
                            "method": method,
                            "selection": selection,
                            "copy": copy,
                            "seed": seed,
                            "learning_rate": self.learning_rates[copy].item(),
                            "step": training.steps[index].item(),
                            "score": scores[index, copy].item(),
                            "average_accuracy": average[index, copy].item(),
                            "worst_group_accuracy": worst[index, copy].item(),
                            "seconds": training.seconds / len(training.copies),
                        }
                    )
        return pd.DataFrame(rows)


def compare(
    train: Grouped,
    validation: Grouped,
    test: Grouped,
    descent: Descent,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] = ("erm", "groupdro", "groupdro_xrm", "mat"),
    hidden: Sequence[int] = (),
    environments: Tensor | None = None,
    inferred: Tensor | None = None,
    shift: Shift | None = None,
    group_rate: float = 0.01,
    first_steps: int = 100,
    upweight: float = 20.0,
    smoothing: float = 0.1,
    dropout: float = 0.5,
) -> Comparison:
    """Train all copies by each of several methods, from the same initial weights.

    Args:
        train: What to train on; the true groups are seen by methods with ``by="group"`` alone.
        validation: What checkpoints are chosen by, and what ``"dfr"`` trains the last layer on.
        test: What is reported.
        descent: How to train, the same for all methods.
        seeds: One for each copy.
        methods: Names in :data:`METHODS`.
        hidden: Widths of the hidden layers; none for linear networks, which start from zero.
        environments: Inferred groups of the training examples, for ``"groupdro_xrm"``
            (:attr:`memloc.twins.Twins.environments`). Int64, shape ``(N,)`` or ``(S, N)``.
        inferred: Inferred groups of the validation examples (:meth:`memloc.twins.Twins.infer`), for selection.
        shift: For ``"mat"`` (:func:`memloc.mat.logit_shift`, :func:`memloc.mat.batch_shift`). Shape ``(N, K)`` or
            ``(S, N, K)``, or a function.
        group_rate: Step size of GroupDRO.
        first_steps: Of the training whose mistakes ``"jtt"`` takes.
        upweight: How much more these count.
        smoothing: Of ``"label_smoothing"``, the share of each label that is spread over all classes.
        dropout: Of ``"dropout"``, the probability of what the last layer sees to be switched off.

    Returns:
        The trainings, with a table.

    Raises:
        ValueError: If a method is unknown, what it needs is missing or does not fit, or a number is out of range.

    Source:
        Bayat et al. (2025) for the pipeline and selection. Sagawa et al. (2020) for GroupDRO, Liu et al. (2021) for
        JTT, Kirichenko et al. (2023) for DFR, which average several subsets and penalise the weights where the last
        layer is trained once here, on all validation examples, weighted. Idrissi et al. (2022) for weights and subsets.

    Example:
        Where a strong feature is right about 9 of 10 training examples, and a weak one about all:

        >>> from memloc.mat import logit_shift
        >>> from memloc.twins import train_twins
        >>> def examples(count, misled, seed):
        ...     labels, order = torch.arange(count) % 2, torch.arange(count)
        ...     attributes = torch.where(order < misled, 1 - labels, labels)
        ...     signal = torch.stack([2 * labels - 1, 5 * (2 * attributes - 1)], 1)
        ...     noise = torch.randn(count, 300, generator=torch.Generator().manual_seed(seed))
        ...     return Grouped(torch.cat([signal, noise], 1), labels, 2 * labels + attributes)
        >>> train, validation, test = examples(200, 20, 0), examples(200, 100, 1), examples(1000, 500, 2)
        >>> descent = Descent(steps=300, learning_rate=0.01)
        >>> twins = train_twins(train.features, train.labels, descent, seeds=[0, 1])
        >>> shift = logit_shift(twins.held_out, train.labels)
        >>> found = compare(train, validation, test, descent, seeds=[0, 1], methods=["erm", "mat"], shift=shift).table()
        >>> worst = found[found.selection == "last"].groupby("method").worst_group_accuracy.mean()
        >>> bool(worst.mat > worst.erm + 0.2)
        True
    """
    for name in methods:
        check_one_of("methods", name, METHODS)
        if METHODS[name].by == "environment" and environments is None:
            raise ValueError(f"environments must be given for {name}, got None: infer them with train_twins")
        if METHODS[name].how == "shift" and shift is None:
            raise ValueError(f"shift must be given for {name}, got None: compute it with logit_shift")
    for split in (train, validation, test):
        split.check(len(seeds))
    if inferred is not None:  # needed only when all trainings are over
        check_examples(validation.features, inferred, len(seeds), "inferred groups")
    if first_steps < 1 or not 0 <= upweight < math.inf:
        got = f"{first_steps} and {upweight}"
        raise ValueError(f"first_steps must be at least 1 and upweight a finite number at least 0, got {got}")
    groupings = {"class": train.labels, "group": train.groups}
    if environments is not None:
        groupings["environment"] = environments
    watch = {"validation": validation, "test": test}
    classes = 1 + max(int(split.labels.max()) for split in (train, validation, test))
    device = train.features.device
    copies = make_copies(train.features.shape[-1], classes, seeds, hidden=hidden, zero=not hidden, device=device)

    def run(data: Grouped = train, **how: Any) -> Training:
        return train_copies(copies, data, descent, watch=watch, **how)

    def run_method(method: Method) -> Training:
        groups = groupings[method.by]
        if method.how == "weights":
            return run(weights=balancing_weights(groups))
        if method.how == "subset":
            return run(weights=balanced_subset(groups, seeds).float())
        if method.how == "priority":
            return run(replace(train, groups=groups), group_rate=group_rate)
        if method.how == "shift":
            return run(shift=shift)
        if method.how == "smoothing":
            return run(smoothing=smoothing)
        if method.how == "dropout":
            return run(dropout=dropout)
        if method.how == "mistakes":
            short = replace(descent, steps=first_steps, every=first_steps)
            first = train_copies(copies, train, short, watch={"train": train})
            wrong = first.predictions["train"][-1] != train.labels
            found = run(weights=1 + (upweight - 1) * wrong)
            return replace(found, seconds=found.seconds + first.seconds)
        if method.how == "head":
            return _retrain_head(run(), descent)
        return run()

    trainings = {name: run_method(METHODS[name]) for name in methods}
    return Comparison(trainings, descent.rates(len(seeds)), inferred)


def balanced_subset(groups: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw equally many examples of each group for each copy, as many as the smallest group has.

    Args:
        groups: Or labels. Int64 from 0, shape ``(N,)`` or ``(S, N)``; groups without examples do not count.
        seeds: One for each copy.

    Returns:
        Which are drawn. Bool, shape ``(S, N)``.

    Example:
        >>> groups = torch.tensor([0, 0, 0, 2, 2])
        >>> chosen = balanced_subset(groups, seeds=[0, 1, 2])
        >>> [groups[row].tolist() for row in chosen]
        [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]]
    """
    chosen = torch.zeros(len(seeds), groups.shape[-1], dtype=torch.bool, device=groups.device)
    for row, own, seed in zip(chosen, groups.expand_as(chosen), seeds, strict=True):
        order = torch.randperm(len(row), generator=generator(seed, "subset")).to(groups.device)
        classes, counts = own.unique(return_counts=True)
        for each in classes:
            row[order[own[order] == each][: counts.min()]] = True
    return chosen


def _retrain_head(base: Training, descent: Descent) -> Training:
    """Train the last layers from zero on what they see of validation examples, all groups of which count alike."""
    copies = base.copies
    heads = replace(
        copies,
        weights=tuple(torch.zeros_like(weight) for weight in copies.weights[-1:]),
        biases=tuple(torch.zeros_like(bias) for bias in copies.biases[-1:]),
    )
    seen = {name: replace(split, features=copies.hidden(split.features)) for name, split in base.watched.items()}
    validation = seen["validation"]
    found = train_copies(heads, validation, descent, weights=balancing_weights(validation.groups), watch=seen)
    return replace(found, seconds=found.seconds + base.seconds)
