"""What watches a training without changing it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memloc.evaluation import Evaluation

__all__ = ["Batch", "Checkpoints", "Observer", "Predictions"]


@dataclass(frozen=True)
class Batch:
    """The examples of one step, on the training's device.

    Attributes:
        images: Float32, shape ``(B, C, H, W)``.
        labels: What the network is trained on. Int64, shape ``(B,)``.
        noise_mask: Whether the label was replaced. Bool, shape ``(B,)``.
        indices: Positions in the training set. Int64, shape ``(B,)``.
    """

    images: Tensor
    labels: Tensor
    noise_mask: Tensor
    indices: Tensor


class Observer:
    """Watches a training without changing it: override what you need.

    Take random numbers from a generator of your own (:func:`memloc.randomness.generator`): torch's global ones belong
    to the network's dropout.

    Attributes:
        name: Under which :meth:`table` is kept in a run; a word such as ``predictions``.
        needs_graph: Whether it computes gradients itself, which a compiled network does not allow.
    """

    name: str
    needs_graph = False

    def before_backward(self, model: nn.Module, losses: Tensor, batch: Batch) -> None:
        """See each example's loss, shape ``(B,)``, its graph still alive, before the gradients are computed."""

    def after_backward(self, model: nn.Module, batch: Batch) -> None:
        """See the gradients of the mean loss in ``parameter.grad``, before the step is taken."""

    def after_epoch(self, epoch: int, model: nn.Module, evaluation: Evaluation) -> None:
        """See the network and its evaluation after an epoch; epoch 0 is before training, and forgets any other."""

    def table(self) -> dict[str, Tensor]:
        """Return all that was seen so far; a run keeps it."""
        raise NotImplementedError

    def restore(self, table: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`table` returned earlier, and forget all else."""
        raise NotImplementedError


class Predictions(Observer):
    """Remembers the predicted class of every training example after every epoch.

    The table holds ``predictions``: int16, shape ``(T + 1, N)``, row 0 before training.
    """

    name = "predictions"

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def after_epoch(self, epoch: int, model: nn.Module, evaluation: Evaluation) -> None:
        """Add a row; epoch 0 begins another training."""
        if epoch == 0:
            self._rows = []
        self._rows.append(evaluation.predictions.to("cpu", torch.int16))

    def table(self) -> dict[str, Tensor]:
        """Return the rows so far."""
        return {"predictions": torch.stack(self._rows)}

    def restore(self, table: Mapping[str, Tensor]) -> None:
        """Take up earlier rows."""
        self._rows = list(table["predictions"])


class Checkpoints(Observer):
    """Keeps weights and buffers in memory, for a training of your own that no run keeps.

    Args:
        epochs: Which epochs to keep, 0 for the initial weights; None keeps all.

    Attributes:
        states: State dicts by epoch, on the CPU.
    """

    name = "checkpoints"

    def __init__(self, epochs: Iterable[int] | None = None):
        self._wanted = None if epochs is None else set(epochs)
        self.states: dict[int, dict[str, Tensor]] = {}

    def after_epoch(self, epoch: int, model: nn.Module, evaluation: Evaluation) -> None:
        """Copy the state dict if it is wanted; epoch 0 begins another training."""
        if epoch == 0:
            self.states = {}
        if self._wanted is None or epoch in self._wanted:
            self.states[epoch] = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}

    def table(self) -> dict[str, Tensor]:
        """Return every tensor under ``epoch.name``."""
        return {f"{epoch}.{name}": value for epoch, state in self.states.items() for name, value in state.items()}

    def restore(self, table: Mapping[str, Tensor]) -> None:
        """Take up earlier states."""
        self.states = {}
        for key, value in table.items():
            epoch, _, name = key.partition(".")
            self.states.setdefault(int(epoch), {})[name] = value
