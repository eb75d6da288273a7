"""Two networks of any architecture that are trained on halves of the data and predict for each other's (XRM)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc import models
from memloc.copies import balancing_weights
from memloc.evaluation import classes, predict
from memloc.observers import Batch
from memloc.randomness import generator
from memloc.twins import flip_probability

__all__ = ["Pair", "cross_mistakes", "environments", "held_out_logits"]


class Pair(nn.Module):
    """Two networks that are trained as one by cross-risk minimization: twins, for any architecture.

    Each example is assigned to one of the two at random. Both learn from their own halves, and what one predicts for
    the other's examples replaces their labels with a probability that grows with its confidence. So both come to rely
    on what is easy and frequent, a spurious attribute if there is one, and the examples that they get wrong are those
    for which it does not hold. :class:`memloc.twins.Twins` are many pairs of small networks at once.

    A pair is a network for :func:`memloc.training.train`, with :meth:`loss` for a loss. In training mode it gives the
    logits of both, shape ``(B, 2, K)``, in evaluation mode their mean, shape ``(B, K)``: what a history says is that of
    the mean, against the original labels. Assignment, flipped labels and the number of steps are part of its state
    dict, and random numbers depend on the seed and the step alone: a training that was interrupted goes on as if
    nothing had happened, and no global generator is used.

    Both networks see the whole batch, and batch-norm with them: through its statistics a network knows the images of
    the other half, not their labels.

    Args:
        first: Any network that gives logits of shape ``(B, K)``, in training as in evaluation mode.
        second: One of the same architecture, with initial weights of its own.
        labels: Of all training examples, the original ones. Int64, shape ``(N,)``.
        seed: Decides which examples the first network learns from, and which labels are flipped.

    Attributes:
        first: As given.
        second: As given.
        assignment: Whether the first network learns from the example, else the second. Bool, shape ``(N,)``.
        flipped_labels: The labels after all flips so far. Int64, shape ``(N,)``. Pezeshki et al. choose
            hyper-parameters by the largest share of them that are not the original ones.

    Raises:
        ValueError: If the labels are no int64 of one dimension, or the networks are one or differ in architecture.

    Source:
        Pezeshki et al. (2024), as the reference code of Bayat et al. (2025) has it.

    Example:
        >>> from memloc import datasets, recipes, training
        >>> data = datasets.load("digits", examples=64)
        >>> pair = Pair(models.mlp(64), models.mlp(64), data.train.labels)
        >>> settings = recipes.Settings(epochs=2, batch_size=16)
        >>> history = training.train(pair, data, settings, loss=pair.loss)
        >>> held_out_logits(pair, data.train.images).shape
        torch.Size([64, 10])
    """

    assignment: Tensor
    flipped_labels: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, labels: Tensor, seed: int = 0):
        super().__init__()
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"labels must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
        shapes = [[(name, p.shape) for name, p in network.named_parameters()] for network in (first, second)]
        is_shared = first is second or not {*first.parameters()}.isdisjoint(second.parameters())
        if is_shared or shapes[0] != shapes[1]:
            got = "the same one twice" if is_shared else f"parameters {_different(*shapes)}"
            raise ValueError(f"first and second must be two networks of one architecture, got {got}")
        self.first, self.second, self.seed = first, second, seed
        self._steps = 0
        half = torch.rand(len(labels), generator=generator(seed, "twins"), dtype=torch.float32, device="cpu") < 0.5
        self.register_buffer("assignment", half.to(labels.device))
        self.register_buffer("flipped_labels", labels.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of both in training mode, shape ``(B, 2, K)``, else their mean, shape ``(B, K)``."""
        # The first one gets a copy, because a network may write into its images.
        logits = torch.stack([self.first(images.clone()), self.second(images)], 1)
        return logits if self.training else logits.mean(1)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of each example, and flip labels for the next step.

        The loss that both networks follow is the cross-entropy of each example's own network, against the flipped
        labels, averaged over the examples of each class of the batch and summed over these classes. As :func:`train
        <memloc.training.train>` follows the mean of what it is given, each example's share of that sum is multiplied
        by the size of the batch; a class that a batch lacks counts nothing in it. So with K classes in a batch a step
        is about K times as long as one of the mean cross-entropy with the same learning rate.

        Then each example takes over the class that the other network predicts for it, in this step's forward pass, with
        the probability of :func:`memloc.twins.flip_probability`.

        Args:
            logits: Of both networks, shape ``(B, 2, K)``.
            batch: Its indices say whose labels are meant; its own labels are not used.

        Returns:
            In nats, shape ``(B,)``; float32 for logits of less precision.

        Raises:
            ValueError: If the logits are not those of both networks, or in the first step labels or indices are out of
                range.
        """
        if logits.ndim != 3 or logits.shape[1] != 2:
            got = f"{tuple(logits.shape)}: put the pair in training mode"
            raise ValueError(f"logits must be those of both networks, shape (B, 2, K), got {got}")
        if not self._steps:  # not in every step, because the answer makes a GPU wait
            self._check_range(logits.shape[2], batch.indices)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        held_in, held_out = _by_half(logits, self.assignment[batch.indices])
        labels = self.flipped_labels[batch.indices]
        weights = balancing_weights(labels, logits.shape[2])
        self._flip(held_out.detach(), labels, batch.indices)
        return len(labels) * weights * F.cross_entropy(held_in, labels, reduction="none")

    def _check_range(self, classes: int, indices: Tensor) -> None:
        """Refuse labels that are no class and examples that have no label."""
        low, high = self.flipped_labels.min().item(), self.flipped_labels.max().item()
        if classes < 2 or low < 0 or high >= classes:
            got = f"{low} to {high} with K = {classes}"
            raise ValueError(f"labels must be from 0 to K - 1, and K at least 2, got {got}")
        if not ((indices >= 0) & (indices < len(self.flipped_labels))).all():
            got = f"{indices.min().item()} to {indices.max().item()}"
            raise ValueError(
                f"indices must be below {len(self.flipped_labels)}, the labels of the pair, got {got}: give it them all"
            )

    def _flip(self, held_out: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Let some examples of a batch take over what the other network predicts."""
        probability, predicted = flip_probability(held_out)
        draw = generator(self.seed, "flips", self._steps)
        uniform = torch.rand(len(labels), generator=draw, dtype=torch.float32, device="cpu")
        is_flipped = uniform.to(probability.device) < probability
        self.flipped_labels[indices] = torch.where(is_flipped, predicted, labels)
        self._steps += 1

    def layer_groups(self) -> dict[str, list[str]]:
        """Return the layer groups of both networks, e.g. ``first.conv0``; see :func:`memloc.models.layer_groups`."""
        return {
            f"{twin}.{group}": [f"{twin}.{name}" for name in names]
            for twin in ("first", "second")
            for group, names in models.layer_groups(getattr(self, twin)).items()
        }

    def get_extra_state(self) -> Tensor:
        """Return the number of steps so far, which a buffer would keep where reading it makes a GPU wait."""
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the number of steps."""
        self._steps = int(state)


def held_out_logits(pair: nn.Module, images: Tensor, **numerics: Any) -> Tensor:
    """Compute what the network that did not learn from an example says of it, for all training examples.

    Args:
        pair: A trained :class:`Pair`, on the device of the images; each module's mode is as before afterwards.
        images: All training examples, in their order. Float32, shape ``(N, C, H, W)``.
        **numerics: ``batch_size``, ``precision``, ``channels_last`` and ``mode`` of :func:`memloc.evaluation.predict`.
            Example-tied dropout is in mode ``drop``, as for test examples, unless told otherwise.

    Returns:
        Logits in evaluation mode, float32, shape ``(N, K)``: what :class:`memloc.mat.MATLoss` takes.

    Raises:
        ValueError: If the network is no pair, or there are not as many images as it has examples.

    Source:
        Pezeshki et al. (2024).

    Example:
        >>> pair = Pair(models.mlp(64), models.mlp(64), torch.tensor([3, 1, 4]))
        >>> held_out_logits(pair, torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    assignment = _checked(pair).assignment
    if len(images) != len(assignment):
        raise ValueError(f"images must be all {len(assignment)} training examples, got {len(images)}")
    return _by_half(_both(pair, images, **numerics), assignment)[1]


def cross_mistakes(pair: nn.Module, images: Tensor, labels: Tensor, **numerics: Any) -> Tensor:
    """Say which examples of any split at least one of the two networks gets wrong.

    Args:
        pair: A trained :class:`Pair`, on the device of the images; each module's mode is as before afterwards.
        images: Float32, shape ``(N, C, H, W)``.
        labels: The original ones, not the flipped ones. Int64, shape ``(N,)``.
        **numerics: As for :func:`held_out_logits`.

    Returns:
        Bool, shape ``(N,)``. Where all or none of a class are mistakes, the pair tells nothing of it.

    Raises:
        ValueError: If the network is no pair, or there is not an int64 label for each image.

    Source:
        Pezeshki et al. (2024).

    Example:
        >>> pair = Pair(models.mlp(64), models.mlp(64), torch.tensor([3, 1, 4]))
        >>> cross_mistakes(pair, torch.zeros(2, 1, 8, 8), torch.tensor([-1, -1]))
        tensor([True, True])
    """
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        expected = f"int64 ({len(images)},), one per image"
        raise ValueError(f"labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    first, second = _both(pair, images, **numerics).unbind(1)
    return (classes(first) != labels) | (classes(second) != labels)


def environments(pair: nn.Module, images: Tensor, labels: Tensor, **numerics: Any) -> Tensor:
    """Infer the group of each example of any split, ``2·label + mistake``, without knowing its attribute.

    Args:
        pair: As for :func:`cross_mistakes`.
        images: The same.
        labels: The same.
        **numerics: The same.

    Returns:
        Int64, shape ``(N,)``, from 0 to ``2 K - 1``.

    Raises:
        ValueError: If the network is no pair, or there is not an int64 label for each image.

    Source:
        Pezeshki et al. (2024).

    Example:
        >>> pair = Pair(models.mlp(64), models.mlp(64), torch.tensor([3, 1, 4]))
        >>> environments(pair, torch.zeros(1, 1, 8, 8), torch.tensor([3])).item() in (6, 7)
        True
    """
    return 2 * labels + cross_mistakes(pair, images, labels, **numerics)


def _checked(network: nn.Module) -> Pair:
    """Refuse a network that is no pair."""
    if not isinstance(network, Pair):
        raise ValueError(f"pair must be a Pair, got {type(network).__name__}: fit a recipe with loss='xrm'")
    return network


def _both(network: nn.Module, images: Tensor, **numerics: Any) -> Tensor:
    """Compute the logits of both networks of a pair in evaluation mode, shape ``(N, 2, K)``."""
    pair = _checked(network)
    return torch.stack([predict(each, images, **numerics) for each in (pair.first, pair.second)], 1)


def _by_half(logits: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits of both, shape ``(B, 2, K)``, into the learning network's and the other's."""
    first, second = logits.unbind(1)
    return torch.where(is_first[:, None], first, second), torch.where(is_first[:, None], second, first)


def _different(first: list[Any], second: list[Any]) -> str:
    """Name the first parameter in which two lists of names and shapes differ."""
    for one, other in zip([*first, None], [*second, None], strict=False):
        if one != other:
            return " and ".join("none" if each is None else f"{each[0]} {tuple(each[1])}" for each in (one, other))
    return ""
