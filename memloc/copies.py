"""Many small networks of one shape as one batch dimension: their parameters, and steps of gradient descent."""

import math
from collections.abc import Sequence
from copy import copy as shallow
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc.randomness import seeded
from memloc.recipes import check_one_of

__all__ = [
    "OPTIMIZERS",
    "Copies",
    "Descent",
    "Optimizer",
    "balancing_weights",
    "check_examples",
    "cross_entropies",
    "make_copies",
    "sum_by",
    "take",
]

OPTIMIZERS = ("sgd", "adam")

_EVALUATED = 1000  # examples that are evaluated together


@dataclass(frozen=True, eq=False)
class Copies:
    """S fully connected networks of one shape; without hidden layers they are linear.

    Attributes:
        seeds: Of each copy, which decide all that is random in its training; length S.
        weights: Of each layer. Float32, shape ``(S, outputs, inputs)``.
        biases: Of each layer, shape ``(S, outputs)``; empty for networks without.
        activation: Between two layers.
    """

    seeds: tuple[int, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    activation: nn.Module = field(default_factory=nn.ReLU)

    def __len__(self) -> int:
        return len(self.seeds)

    def clone(self, trainable: bool = False) -> "Copies":
        """Copy the parameters, as leaves that can be trained or as plain tensors."""
        weights, biases = (
            tuple(each.detach().clone().requires_grad_(trainable) for each in parameters)
            for parameters in (self.weights, self.biases)
        )
        return replace(self, weights=weights, biases=biases)

    def only(self, which: Tensor) -> "Copies":
        """Take some of the copies: those for which ``which``, bool of shape ``(S,)``, is true.

        Example:
            >>> make_copies(5, 2, seeds=[3, 4, 5]).only(torch.tensor([True, False, True])).seeds
            (3, 5)
        """
        seeds = tuple(seed for seed, is_taken in zip(self.seeds, which.tolist(), strict=True) if is_taken)
        weights, biases = (tuple(each[which] for each in parameters) for parameters in (self.weights, self.biases))
        return replace(self, seeds=seeds, weights=weights, biases=biases)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All weights, then all biases."""
        return self.weights + self.biases

    def __call__(self, features: Tensor, factors: Tensor | None = None) -> Tensor:
        """Compute logits.

        Args:
            features: Shape ``(N, D)``, or ``(F, N, D)`` for F sets of which each serves S / F copies in a row.
            factors: Multiply what the last layer sees, as dropout does; of linear networks that is the features.
                Shape ``(S, N, H)``; None for 1.

        Returns:
            Shape ``(S, N, K)``.

        Raises:
            ValueError: As :meth:`check`.
        """
        return self._run(features, len(self.weights), factors)

    def check(self, features: Tensor) -> None:
        """Refuse features that these networks cannot take.

        Raises:
            ValueError: If they are not float32 of shape ``(N, D)`` or ``(F, N, D)``, where F divides S.
        """
        first = self.weights[0]
        sets = 1 if features.ndim == 2 else len(features) if features.ndim == 3 else 0
        if features.dtype != first.dtype or features.shape[-1:] != first.shape[2:] or not sets or len(self) % sets:
            shape = f"(N, {first.shape[2]}) or (F, N, {first.shape[2]}) where F divides {len(self)}"
            raise ValueError(f"features must be {first.dtype} {shape}, got {features.dtype} {tuple(features.shape)}")

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Compute logits without gradients, a thousand examples at a time, shape ``(S, N, K)``."""
        return torch.cat([self(part) for part in features.split(_EVALUATED, -2)], 1)

    @torch.no_grad()
    def hidden(self, features: Tensor) -> Tensor:
        """Compute what the last layer sees, shape ``(S, N, H)``; for linear networks the features as they are."""
        parts = features.split(_EVALUATED, -2)
        return torch.cat([self._run(part, len(self.weights) - 1) for part in parts], -2)

    def _run(self, features: Tensor, layers: int, factors: Tensor | None = None) -> Tensor:
        """Apply the first layers; examples come last, so that copies that share inputs are one matrix product."""
        self.check(features)
        values = features.mT
        for layer, weight in enumerate(self.weights[:layers]):
            if layer:
                values = self.activation(values)
            if factors is not None and layer == len(self.weights) - 1:
                values = values * factors.mT
            copies, outputs, inputs = weight.shape
            sets = () if values.ndim == 2 else (len(values),)
            values = (weight.view(*sets, -1, inputs) @ values).view(copies, outputs, -1)
            if self.biases:
                values = values + self.biases[layer][..., None]
        is_cut = 0 < layers < len(self.weights)
        return (self.activation(values) if is_cut else values).mT

    def state(self, copy: int) -> dict[str, Tensor]:
        """Return the parameters of one copy under the names of a plain ``nn.Sequential``, e.g. ``0.weight``.

        Example:
            >>> copies = make_copies(5, 2, seeds=range(3), hidden=[4])
            >>> model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> model.load_state_dict(copies.state(2))
            <All keys matched successfully>
        """
        named = {f"{2 * layer}.weight": weight[copy] for layer, weight in enumerate(self.weights)}
        return named | {f"{2 * layer}.bias": bias[copy] for layer, bias in enumerate(self.biases)}


def make_copies(
    features: int,
    classes: int,
    seeds: Sequence[int],
    *,
    hidden: Sequence[int] = (),
    bias: bool = True,
    zero: bool = False,
    activation: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Copies:
    """Make one network for each seed, initialised as torch does.

    Args:
        features: Inputs (D).
        classes: Outputs (K).
        seeds: One for each copy; the same seed gives the same weights whatever the others are.
        hidden: Widths of the hidden layers; none for linear networks.
        bias: Whether layers have biases.
        zero: Whether the last layer starts from zero, as new heads in the reference code do.
        activation: Between two layers; None takes a ReLU.
        device: Where they go.

    Returns:
        The networks.

    Raises:
        ValueError: If there is no seed, or a size is below 1.

    Example:
        >>> copies = make_copies(5, 2, seeds=[0, 1, 2], hidden=[4])
        >>> copies(torch.zeros(7, 5)).shape
        torch.Size([3, 7, 2])
    """
    sizes = [features, *hidden, classes]
    if not len(seeds) or min(sizes) < 1:
        raise ValueError(f"there must be a seed, and sizes of at least 1, got {len(seeds)} seeds and sizes {sizes}")
    layers = []
    for seed in seeds:
        with seeded(seed, "init"):
            layers.append([nn.Linear(inputs, outputs, bias=bias) for inputs, outputs in pairwise(sizes)])
    weights = [torch.stack([layer.weight.detach() for layer in same]).to(device) for same in zip(*layers, strict=True)]
    biases = [
        torch.stack([layer.bias.detach() for layer in same]).to(device) for same in zip(*layers, strict=True) if bias
    ]
    for last in (*weights[-1:], *biases[-1:]) if zero else ():
        last.zero_()
    return Copies(tuple(seeds), tuple(weights), tuple(biases), nn.ReLU() if activation is None else activation)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How copies are trained.

    Attributes:
        steps: Of gradient descent.
        learning_rate: One for all copies, or one for each. Constant.
        batch_size: Examples a step; None takes all.
        optimizer: One of :data:`OPTIMIZERS`.
        momentum: Of ``"sgd"``.
        weight_decay: Added to the gradient as in torch's optimisers, times the weights.
        every: Steps between evaluations; before the first and after the last there is always one.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Descent(steps=100, learning_rate=(0.01, 0.1)).rates(2)
        tensor([0.0100, 0.1000])
    """

    steps: int = 1000
    learning_rate: float | Sequence[float] = 0.01
    batch_size: int | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    every: int = 50

    def __post_init__(self) -> None:
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("steps", "batch_size", "every"):
            value = getattr(self, name)
            if not (value is None and name == "batch_size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
        for name in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number ≥ 0, got {getattr(self, name)!r}")

    def rates(self, copies: int) -> Tensor:
        """Return the learning rate of each copy, shape ``(S,)``."""
        rates = torch.as_tensor(self.learning_rate, dtype=torch.float32)
        if rates.shape not in ((), (copies,)) or not (rates.isfinite() & (rates >= 0)).all():
            raise ValueError(
                f"learning_rate must be one finite number ≥ 0 or one for each of {copies} copies, "
                f"got {self.learning_rate!r}"
            )
        return rates.expand(copies)


class Optimizer:
    """SGD or Adam on stacked parameters, each copy with its own learning rate; steps in place, as torch's do.

    Args:
        parameters: Of all copies, leaves with a gradient, shape ``(S, …)`` each.
        descent: Which optimiser, its constants and the learning rates.

    Example:
        >>> copies = make_copies(3, 2, seeds=[0, 1], zero=True).clone(trainable=True)
        >>> optimizer = Optimizer(copies.parameters, Descent(learning_rate=(0.0, 1.0)))
        >>> optimizer.step(copies(torch.ones(1, 3))[..., 0].sum())
        >>> copies.biases[0].tolist()
        [[0.0, 0.0], [-1.0, 0.0]]
    """

    def __init__(self, parameters: Sequence[Tensor], descent: Descent) -> None:
        self.parameters, self.descent = parameters, descent
        rates = descent.rates(len(parameters[0]))
        self.rates = [rates.to(p.device).view(-1, *[1] * (p.ndim - 1)) for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters] if self._has_first() else []
        self.second = [torch.zeros_like(p) for p in parameters] if descent.optimizer == "adam" else []
        self.steps = 0

    def _has_first(self) -> bool:
        return self.descent.optimizer == "adam" or self.descent.momentum > 0

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Follow the gradient of a sum over copies, each of which depends on its own parameters alone."""
        gradients = torch.autograd.grad(loss, self.parameters)
        self.steps += 1
        for index, (parameter, gradient, rate) in enumerate(zip(self.parameters, gradients, self.rates, strict=True)):
            if self.descent.weight_decay:
                gradient = gradient + self.descent.weight_decay * parameter
            if self.descent.optimizer == "adam":
                gradient = self._adam(index, gradient)
            elif self.first:
                gradient = self.first[index].mul_(self.descent.momentum).add_(gradient)
            parameter.addcmul_(gradient, rate, value=-1)

    def only(self, which: Tensor, parameters: Sequence[Tensor]) -> "Optimizer":
        """Go on with some of the copies as if they had been alone.

        Args:
            which: Those that go on. Bool, shape ``(S,)``.
            parameters: Of these, leaves with a gradient (:meth:`Copies.only`, then :meth:`Copies.clone`).

        Returns:
            A new one with their rates and their moments; this one is not to be used again.
        """
        some = shallow(self)
        some.parameters = parameters
        some.rates, some.first, some.second = (
            [each[which] for each in kept] for kept in (self.rates, self.first, self.second)
        )
        return some

    def _adam(self, index: int, gradient: Tensor) -> Tensor:
        """Compute the direction of Kingma and Ba (2015), with their constants."""
        first = self.first[index].lerp_(gradient, 0.1)
        second = self.second[index].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        return first / scale.mul_(1 - 0.9**self.steps)


def take(values: Tensor, indices: Tensor | None, shared: int) -> Tensor:
    """Choose examples for each copy from values that all share or that are each copy's own.

    Args:
        values: Shape ``(N, …)`` where all share them, ``(S, N, …)`` where each has its own.
        indices: Positions. Int64, shape ``(S, B)``; None gives the values as they are.
        shared: Dimensions of values that all share, which tells the two apart.

    Returns:
        Shape ``(S, B, …)``.

    Example:
        >>> take(torch.tensor([5, 6, 7]), torch.tensor([[0, 2], [1, 1]]), shared=1)
        tensor([[5, 7],
                [6, 6]])
    """
    if indices is None:
        return values
    if values.ndim == shared:
        return values[indices]
    return values[torch.arange(len(indices), device=indices.device)[:, None], indices]


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each example of each copy.

    Args:
        logits: Shape ``(S, B, K)``.
        labels: Int64, shape ``(S, B)``.
        smoothing: Share of each label that is spread over all classes.

    Returns:
        In nats, shape ``(S, B)``.

    Example:
        >>> cross_entropies(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]))
        tensor([[0.6931, 0.6931]])
    """
    return F.cross_entropy(logits.mT, labels, reduction="none", label_smoothing=smoothing)


def sum_by(groups: Tensor, values: Tensor, count: int | None = None) -> Tensor:
    """Add up the values of each group.

    Args:
        groups: Int64 from 0, shape ``(…, N)``.
        values: Shape ``(…, N)``.
        count: How many groups there are (G); None takes those that occur.

    Returns:
        Shape ``(…, G)``.

    Example:
        >>> sum_by(torch.tensor([0, 2, 0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([4., 0., 2.])
    """
    sums = values.new_zeros(*groups.shape[:-1], int(groups.max()) + 1 if count is None else count)
    return sums.scatter_add(-1, groups, values)


def balancing_weights(groups: Tensor, count: int | None = None) -> Tensor:
    """Weigh examples so that every group counts alike: one over the number of examples in the same group.

    Args:
        groups: Or labels, to balance classes. Int64 from 0, shape ``(…, N)``.
        count: How many groups there are (G); None takes those that occur.

    Returns:
        Weights whose sum is the number of groups that have examples. Float32, shape ``(…, N)``.

    Example:
        >>> balancing_weights(torch.tensor([0, 1, 1, 0, 0]))
        tensor([0.3333, 0.5000, 0.5000, 0.3333, 0.3333])
    """
    counts = sum_by(groups, torch.ones(groups.shape, device=groups.device), count)
    return (1 / counts).gather(-1, groups)


def check_examples(features: Tensor, labels: Tensor, copies: int | None = None, name: str = "labels") -> None:
    """Refuse features and labels or groups that do not fit each other or the number of copies.

    Args:
        features: Shape ``(N, D)``, or ``(S, N, D)`` for a set of its own for each copy.
        labels: Int64, shape ``(N,)`` or ``(S, N)``, from 0.
        copies: How many there are (S); None takes any number.
        name: Of the labels, for the message.

    Raises:
        ValueError: If they do not fit, or there are none.

    Example:
        >>> check_examples(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    """
    own = {len(each) for each, shared in ((features, 2), (labels, 1)) if each.ndim == shared + 1}
    wanted = own if copies is None else own | {copies}
    if features.ndim not in (2, 3) or labels.ndim not in (1, 2) or len(wanted) > 1 or not features.shape[-2]:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        count = "S" if copies is None else f"S = {copies}"
        raise ValueError(
            f"features and {name} must have shapes (N, D) or (S, N, D) and (N,) or (S, N) with {count}, got {shapes}"
        )
    if labels.shape[-1] != features.shape[-2] or labels.dtype != torch.int64 or labels.min() < 0:
        expected = f"{features.shape[-2]} int64 from 0, as many as there are features"
        raise ValueError(f"{name} must be {expected}, got {labels.shape[-1]} {labels.dtype} from {labels.min().item()}")
