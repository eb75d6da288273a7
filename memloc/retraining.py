"""Reset a layer group of a trained network, train it on clean examples only, and see which wrong labels return."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from memloc.datasets import Data
from memloc.evaluation import Accuracies
from memloc.models import layer_groups
from memloc.observers import Observer
from memloc.recipes import Settings, check_one_of
from memloc.training import train

__all__ = ["BATCH_NORM", "PAPER", "Retraining", "retrain"]

BATCH_NORM = ("keep", "follow")
"""What happens to the running statistics of frozen batch-norms; they stay those of the trained network, or follow the
batches, as in the reference code, where every batch-norm is in training mode."""

PAPER = Settings(epochs=20, batch_size=512, learning_rate=0.01, schedule="triangle")
"""The settings of the reference code."""


@dataclass(frozen=True)
class Retraining:
    """Accuracies while a layer group that was reset is trained on clean examples, after each of T epochs.

    Attributes:
        group: The layer group.
        whole: Whether all other layers were trained with it.
        batch_norm: What happened to the statistics of frozen layers, one of :data:`BATCH_NORM`; ``"follow"`` where
            nothing was frozen.
        accuracies: After each epoch, length T + 1; the first is right after the reset.
    """

    group: str
    whole: bool
    batch_norm: str
    accuracies: tuple[Accuracies, ...]

    def table(self) -> pd.DataFrame:
        """Return one row an epoch, from 0 (right after the reset); accuracies are fractions, in evaluation mode."""
        rows = []
        for epoch, found in enumerate(self.accuracies):
            row: dict[str, Any] = {"layer_group": self.group, "whole": self.whole, "batch_norm": self.batch_norm}
            rows.append(row | {"epoch": epoch} | {f"{name}_accuracy": value for name, value in asdict(found).items()})
        return pd.DataFrame(rows)


def retrain(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    group: str,
    data: Data,
    settings: Settings = PAPER,
    *,
    batch_norm: str = "keep",
    whole: bool = False,
    patience: int = 3,
    observers: Sequence[Observer] = (),
) -> Retraining:
    """Reset one layer group of a trained network and train it on clean examples alone.

    A wrong label that comes back although no noisy example was shown is not held by that layer alone: what the others
    hold brings it back. The network itself stays as it is, bit for bit; a copy is trained. Its noisy examples are
    evaluated, and never part of a step.

    Args:
        model: Any network, with its final weights.
        initial: State dict of the same network before training. Of it, the parameters of the group are taken; its
            running statistics are not.
        group: A name of :func:`memloc.models.layer_groups`.
        data: Training examples, of which the clean ones are trained on, and test examples, on one device.
        settings: How to train. If a batch of one example were left, all batches are larger by as little as helps.
        batch_norm: One of :data:`BATCH_NORM`. With ``"keep"`` nothing but the group changes: its parameters, and the
            statistics of its own batch-norms.
        whole: Whether to train the whole network after the reset, which freezes nothing.
        patience: Training ends early after so many epochs, not necessarily in a row, with every clean example right.
        observers: What watches the training, e.g. :class:`memloc.observers.Checkpoints` for the weights.

    Returns:
        The accuracies after the reset and after each epoch.

    Raises:
        ValueError: If the group is unknown, ``initial`` does not fit it, there are fewer than two clean examples, or an
            argument is out of range.

    Source:
        Maini et al. (2023), layer retraining, with ``batch_norm="follow"``. Their code says so, but does otherwise: it
        trains all layers, and on the noisy examples, because freezing is undone and a mask is inverted twice.
        ``whole=True`` trains all layers as well, but on the clean examples.

    Example:
        >>> from memloc import datasets, labelnoise, models
        >>> data = labelnoise.apply(datasets.load("digits", examples=64), "flip", 0.25, seed=0)
        >>> model = models.mlp(64)
        >>> initial = copy.deepcopy(model.state_dict())
        >>> history = train(model, data, Settings(epochs=20, batch_size=16, learning_rate=0.1))
        >>> retrain(model, initial, "linear1", data, Settings(epochs=2)).table()[["layer_group", "epoch"]]
          layer_group  epoch
        0     linear1      0
        1     linear1      1
        2     linear1      2
    """
    groups = layer_groups(model)
    check_one_of("group", group, groups)
    check_one_of("batch_norm", batch_norm, BATCH_NORM)
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    clean = ~data.train.noise_mask
    count = int(clean.sum())
    if count < 2:
        raise ValueError(f"data must have at least two clean examples to train on, got {count} of {len(data.train)}")

    def has_learned(rows: Sequence[Mapping[str, Any]]) -> bool:
        return sum(row["clean_accuracy"] == 1 for row in rows[1:]) >= patience

    history = train(
        _reset(model, initial, groups[group]),
        data,
        replace(settings, batch_size=_without_batch_of_one(settings.batch_size, count)),
        frozen=[] if whole else [name for name in groups if name != group],
        frozen_buffers=batch_norm == "keep",
        examples=clean,
        stop=has_learned,
        observers=observers,
        progress=False,
    )
    columns = [history[f"{name}_accuracy"] for name in ("clean", "noisy", "restored", "test")]
    found = tuple(Accuracies(*row) for row in zip(*columns, strict=True))
    return Retraining(group, whole, "follow" if whole else batch_norm, found)


def _reset(model: nn.Module, initial: Mapping[str, Tensor], names: Sequence[str]) -> nn.Module:
    """Copy a network and give some parameters of the copy their initial values."""
    model = copy.deepcopy(model)
    for name in names:
        parameter = model.get_parameter(name)
        if name not in initial or initial[name].shape != parameter.shape:
            got = tuple(initial[name].shape) if name in initial else "nothing"
            raise ValueError(f"initial must hold {name} of shape {tuple(parameter.shape)}, got {got}")
        with torch.no_grad():
            parameter.copy_(initial[name])
    return model


def _without_batch_of_one(batch_size: int, examples: int) -> int:
    """Find the next batch size that leaves no single example, which batch-norm may not take."""
    while examples % batch_size == 1:
        batch_size += 1
    return batch_size
