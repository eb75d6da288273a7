"""Memorization-aware training: take out of the labels what held-out predictions already say (MAT)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc.copies import take
from memloc.observers import Batch

__all__ = ["MATLoss", "batch_shift", "logit_shift"]


def logit_shift(held_out: Tensor, labels: Tensor, temperature: float = 0.1, batch_size: int | None = None) -> Tensor:
    """Compute the logs of calibrated held-out predictions, which MAT adds to the logits during training.

    Held-out logits h of an example come from a network that was not trained on it. With q = softmax(h / temperature),
    the joint frequencies J of held-out class k' and label k are the mean of q(k') over the examples, each counted at
    its label k; a row of J divided by its sum is p(label | held-out class), and averaged over q it is the calibrated
    prediction p of an example. The shift is log(p + 1e-6). A network trained with it has nothing to gain from what the
    held-out predictions know already, and has to find the rest.

    Args:
        held_out: Held-out logits, shape ``(N, K)``, or ``(S, N, K)`` for S copies.
        labels: The original labels, not the flipped ones. Int64, shape ``(N,)`` or ``(S, N)``.
        temperature: Below the differences of the logits the shift takes K values only: the logs of the rows of the
            held-out confusion matrix.
        batch_size: How many examples in a row are calibrated together, as in the reference code's minibatches; None
            takes all.

    Returns:
        The shift in nats, without gradient. Of the shape and dtype of ``held_out``, but at least float32. Classes that
        no label has are there too, with the shift log 1e-6.

    Raises:
        ValueError: If the shapes do not fit, labels are not from 0 to ``K - 1``, logits are not finite, or the
            temperature is not above 0.

    Source:
        Bayat et al. (2025), algorithm 1. Their code calibrates each minibatch by itself and drops the columns of
        classes that it lacks; a held-out class that no example has gives NaN there and has no effect here.

    Example:
        Held-out predictions that are right for three of four examples: p = 3/4 or 1/4.

        >>> held_out = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
        >>> logit_shift(held_out, torch.tensor([0, 0, 0, 1])).exp()
        tensor([[0.7500, 0.2500],
                [0.7500, 0.2500],
                [0.7500, 0.2500],
                [0.7500, 0.2500]])
    """
    _check(held_out, labels, temperature)
    size = held_out.shape[-2]
    if batch_size is None:
        batch_size = size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    held_out = held_out.detach().to(torch.promote_types(held_out.dtype, torch.float32))
    labels = labels.expand(held_out.shape[:-1])
    parts = zip(held_out.split(batch_size, -2), labels.split(batch_size, -1), strict=True)
    return torch.cat([_shift(some, theirs, temperature) for some, theirs in parts], -2)


def batch_shift(held_out: Tensor, labels: Tensor, temperature: float = 0.1) -> Callable[[Tensor], Tensor]:
    """Calibrate the examples of each step by themselves, as the reference code does.

    Args:
        held_out: As for :func:`logit_shift`.
        labels: The same.
        temperature: The same.

    Returns:
        A ``shift`` of :func:`memloc.ensembles.train_copies`: from positions of examples, shape ``(S, B)``, to their
        shift, shape ``(S, B, K)``.

    Raises:
        ValueError: As :func:`logit_shift`.

    Source:
        Bayat et al. (2025), reference code.

    Example:
        >>> shift = batch_shift(torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> shift(torch.tensor([[0, 1], [1, 2]])).exp()[:, 0].round(decimals=4)
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    _check(held_out, labels, temperature)
    labels = labels.expand(held_out.shape[:-1])

    def shift(indices: Tensor) -> Tensor:
        return logit_shift(take(held_out, indices, 2), take(labels, indices, 1), temperature)

    return shift


def _shift(held_out: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Calibrate some examples together."""
    predicted = (held_out / temperature).softmax(-1)
    joint = predicted.mT @ F.one_hot(labels, held_out.shape[-1]).to(predicted)
    total = joint.sum(-1, keepdim=True)
    calibrated = predicted @ (joint / total.clamp(min=torch.finfo(total.dtype).tiny))  # an empty row is not predicted
    return (calibrated + 1e-6).log()


def _check(held_out: Tensor, labels: Tensor, temperature: float) -> None:
    """Refuse what cannot be calibrated."""
    if held_out.ndim not in (2, 3) or labels.shape not in (held_out.shape[:-1], held_out.shape[-2:-1]):
        shapes = f"{tuple(held_out.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"held_out and labels must have shapes (N, K) or (S, N, K) and (N,) or (S, N), got {shapes}")
    classes = held_out.shape[-1]
    if labels.dtype != torch.int64 or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
        got = f"{labels.dtype}" + (f" from {labels.min()} to {labels.max()}" if labels.numel() else "")
        raise ValueError(f"labels must be int64 from 0 to {classes - 1}, got {got}")
    if not held_out.isfinite().all():
        raise ValueError("held_out must be finite, got infinite values or NaN: look at the training they come from")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}")


class MATLoss:
    """Cross-entropy of logits to which the logs of calibrated held-out predictions are added, one loss an example.

    An instance is a ``loss`` of :func:`memloc.training.train`. In a loop of your own call :meth:`losses` and follow the
    gradient of its mean. At test the network is used without the shift.

    Args:
        held_out: Held-out logits of all training examples. Shape ``(N, K)``.
        labels: Their original labels. Int64, shape ``(N,)``.
        temperature: Of :func:`logit_shift`.
        per_batch: Whether each batch is calibrated by itself, as in the reference code, or all examples together.

    Raises:
        ValueError: As :func:`logit_shift`.

    Source:
        Bayat et al. (2025), algorithm 1.

    Example:
        >>> from memloc import datasets, models, recipes, training
        >>> data = datasets.load("digits", examples=64)
        >>> loss = MATLoss(torch.zeros(64, 10), data.train.labels)
        >>> settings = recipes.Settings(epochs=1, batch_size=16)
        >>> history = training.train(models.mlp(64), data, settings, loss=loss)
        >>> loss.losses(torch.zeros(2, 10), data.train.labels[:2], torch.tensor([0, 1])).shape
        torch.Size([2])
    """

    def __init__(self, held_out: Tensor, labels: Tensor, temperature: float = 0.1, *, per_batch: bool = False) -> None:
        if held_out.ndim != 2:
            raise ValueError(f"held_out must have shape (N, K), got {tuple(held_out.shape)}")
        self.shift = logit_shift(held_out, labels, temperature)
        self._held_out, self._temperature, self._per_batch = held_out.detach(), temperature, per_batch

    def losses(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Compute the loss of each example of a batch.

        Args:
            logits: Shape ``(B, K)``.
            labels: Int64, shape ``(B,)``.
            indices: Positions of the examples among those that the loss was made for. Int64, shape ``(B,)``.

        Returns:
            In nats, shape ``(B,)``; float32 for logits of less precision.

        Raises:
            ValueError: If logits and held-out logits have different classes.
        """
        if logits.shape[1] != self.shift.shape[1]:
            raise ValueError(f"logits must have {self.shift.shape[1]} classes as held_out, got {logits.shape[1]}")
        where = indices.to(self.shift.device)
        if self._per_batch:
            shift = logit_shift(self._held_out[where], labels.to(where.device), self._temperature)
        else:
            shift = self.shift[where]
        return F.cross_entropy(logits + shift.to(logits.device), labels, reduction="none")

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of each example of a batch of :func:`memloc.training.train`, shape ``(B,)``."""
        return self.losses(logits, batch.labels, batch.indices)
