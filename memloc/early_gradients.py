"""Split a gradient into the part that depends on the labels and the part that does not."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc.evaluation import autocast
from memloc.models import evaluation_mode, layer_groups
from memloc.randomness import seeded

__all__ = ["BATCH_NORM", "GradientParts", "covariance_norm", "gradient_parts", "permuted_norm"]

BATCH_NORM = ("running", "batch")
"""Which statistics batch-norm takes: its running ones, so that every example has a gradient of its own, or the
batch's, as in a step of training, through which the examples of a batch have a part in each other's gradients."""


@dataclass(frozen=True, eq=False)
class GradientParts:
    """The gradient of the mean cross-entropy over N examples, and the part of it that depends on their labels.

    Attributes:
        groups: Names of parameters by layer group.
        dependent: The label-dependent part by parameter's name. Float64, of the parameter's shape.
        total: The whole gradient. Float64, of the parameter's shape.
        examples: N.
    """

    groups: Mapping[str, list[str]]
    dependent: Mapping[str, Tensor]
    total: Mapping[str, Tensor]
    examples: int

    @property
    def independent(self) -> dict[str, Tensor]:
        """The label-independent part by parameter's name: what the whole has beside the label-dependent one."""
        return {name: whole - self.dependent[name] for name, whole in self.total.items()}

    def table(self) -> pd.DataFrame:
        """Return one row a layer group: Euclidean norms of both parts and of their sum, and the parts' cosine.

        The cosine is from -1 (they cancel) to 1, and NaN where a part is zero. The squares of the norms of all layer
        groups add up to the square of the whole network's.
        """
        return pd.DataFrame([{"layer_group": group, **self._measures(names)} for group, names in self.groups.items()])

    def _measures(self, names: list[str]) -> dict[str, float]:
        dependent, total = (
            torch.cat([part[name].flatten() for name in names]) for part in (self.dependent, self.total)
        )
        independent = total - dependent
        norms = torch.stack([dependent.norm(), independent.norm(), total.norm()])
        cosine = (dependent @ independent / (norms[0] * norms[1])).clamp(-1, 1)
        columns = ["dependent_norm", "independent_norm", "total_norm", "cosine"]
        return dict(zip(columns, [*norms.tolist(), cosine.item()], strict=True))


def gradient_parts(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    centered: bool = False,
    batch_norm: str = "running",
    batch_size: int = 500,
    precision: str = "fp32",
    channels_last: bool = False,
) -> GradientParts:
    """Compute both parts of the gradient of the mean cross-entropy over a set of examples.

    With logits ``f_k`` and probabilities ``p_k``, the gradient over N examples is the sum of a part that depends on the
    labels, ``-(1/N) Σ_i ∇f_{y_i}(x_i)``, and one that does not, ``(1/N) Σ_i Σ_k p_k(x_i) ∇f_k(x_i)``. Their sum and the
    first are propagated back through one forward pass; the second is the difference, so that the sum is exact where
    the parts cancel.

    The split is not unique: what is added to *all* logits of an example changes no probability, but moves a gradient
    from one part to the other. With ``centered`` every ``f_k`` is taken less the mean logit ``(1/K) Σ_j f_j``.

    The network is in evaluation mode, except for batch-norm on demand. It stays as it is, bit for bit, and so do its
    ``.grad`` and torch's global generators. Parameters that are frozen have gradients here as well.

    Args:
        model: Any network that gives logits of shape ``(B, K)``, on the device of the images.
        images: The examples' images. Shape ``(N, …)``.
        labels: The labels to compute the loss with. Int64, shape ``(N,)``, from 0 to ``K - 1``.
        centered: Whether to take the logits less their mean over the classes.
        batch_norm: One of :data:`BATCH_NORM`. With ``"running"`` the gradient of a set is the mean of its examples'
            gradients, as the definition has it, and does not depend on ``batch_size``.
        batch_size: Images at a time, at most; batches are as equal as can be.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Returns:
        Both vectors by parameter, and the layer groups that :meth:`GradientParts.table` measures.

    Raises:
        ValueError: If there is no example, images and labels do not fit each other or the network, an argument is out
            of range, or batch-norm finds a single value in a batch.

    Source:
        Stephenson et al. (2021), appendix on the gradient; centred logits are ours.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> gradient_parts(model, images, labels).dependent["weight"]
        tensor([[-0.5000,  0.0000],
                [ 0.0000, -0.5000]], dtype=torch.float64)
    """
    _check_set(images, labels, batch_norm, batch_size)
    memory_format = torch.channels_last if channels_last and images.ndim == 4 else torch.contiguous_format
    count = math.ceil(len(images) / batch_size)
    with torch.inference_mode(False), torch.enable_grad(), _norms_in_mode(model, batch_norm), seeded(0, "parts"):
        parameters = {
            name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.dtype.is_floating_point
        }
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch-norm may write into them
        sums = [{name: torch.zeros_like(p).detach().double() for name, p in parameters.items()} for _ in range(2)]
        for batch, own in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
            with autocast(batch.device, precision):
                logits = _run(model, parameters | buffers, batch.clone(memory_format=memory_format))
            _check_logits(logits, own)
            _add_gradients(sums, parameters, logits, _slopes(logits.detach(), own, centered))
        # Divided at the end, because fp16 loses gradients that are small.
        dependent, total = ({name: vector / len(images) for name, vector in each.items()} for each in sums)
    groups = {group: [name for name in names if name in total] for group, names in layer_groups(model).items()}
    return GradientParts({group: names for group, names in groups.items() if names}, dependent, total, len(images))


def permuted_norm(features: Tensor, num_classes: int, examples: int) -> float:
    """Predict the norm of the gradient of examples whose labels are random, for a linear head that starts at zero.

    Logits are ``W h`` with ``W = 0``; each label is drawn uniformly and independently of the features. Then
    ``E‖∇‖² = (1 - 1/K) E‖h‖² / m`` for m examples: the norm falls like ``m ** -0.5``. For centred features the
    label-dependent part alone does the same; with centred logits, for any features.

    Args:
        features: Inputs of the head, one row an example. Shape ``(N, D)``.
        num_classes: The number of classes ``K``.
        examples: How many examples ``m`` the gradient is a mean over.

    Returns:
        The square root of the expected squared Frobenius norm.

    Raises:
        ValueError: If ``features`` are not ``(N, D)`` with at least one row, or a number is below one.

    Source:
        The finite-sample form of Stephenson et al. (2021), equation 25, which is about infinitely many examples.

    Example:
        >>> permuted_norm(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]), num_classes=2, examples=50)
        0.5
    """
    _check_features(features)
    if num_classes < 1 or examples < 1:
        raise ValueError(f"num_classes and examples must be at least 1, got {num_classes} and {examples}")
    return math.sqrt((1 - 1 / num_classes) * float(features.double().square().sum(1).mean()) / examples)


def covariance_norm(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """Compute ``‖Cov(y, h)‖``, to which the norm of such a gradient tends when the labels are not random.

    Args:
        features: Inputs of the head, one row an example. Shape ``(N, D)``.
        labels: Their classes, of which ``y`` are the indicators. Int64, shape ``(N,)``.
        num_classes: The number of classes ``K``.

    Returns:
        The Frobenius norm of the covariance, shape ``(K, D)``, of the classes' indicators and the features.

    Raises:
        ValueError: If ``features`` are not ``(N, D)`` with at least one row, or labels do not fit them.

    Source:
        Stephenson et al. (2021), appendix on the gradient: it is not zero for true labels.

    Example:
        >>> covariance_norm(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), num_classes=2)
        0.7071067811865476
    """
    _check_features(features)
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        expected = f"int64 of shape ({len(features)},)"
        raise ValueError(f"labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    indicators = F.one_hot(labels, num_classes).double()
    centred = features.double() - features.double().mean(0)
    return float((indicators.T @ centred / len(features)).norm())


@contextmanager
def _norms_in_mode(model: nn.Module, batch_norm: str) -> Iterator[None]:
    """Put a network in evaluation mode inside the block, its batch-norms in training mode if they take the batch's."""
    with evaluation_mode(model):
        for module in model.modules():
            if batch_norm == "batch" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = True
        yield


def _run(model: nn.Module, state: dict[str, Tensor], batch: Tensor) -> Tensor:
    """Compute the logits with these parameters and buffers, in single precision at least."""
    try:
        logits = torch.func.functional_call(model, state, (batch,))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch_norm='batch' needs more than one value per channel, got batches of {len(batch)} ({error}): use more"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits of shape ({len(batch)}, K), got {got}")
    if not logits.requires_grad:
        raise ValueError(f"model must give logits that depend on parameters, got a {type(model).__name__} without any")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _slopes(logits: Tensor, labels: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """Differentiate the label-dependent part of the summed loss, and the whole, by the logits. Shape ``(B, K)`` each.

    In double precision, because ``p - 1`` is all that is left of an example that the network is sure of.
    """
    targets = F.one_hot(labels, logits.shape[1]).double()
    shift = 1 / logits.shape[1] if centered else 0.0
    whole = logits.double().softmax(1) - targets
    return (shift - targets).to(logits.dtype), whole.to(logits.dtype)


def _add_gradients(
    sums: Sequence[dict[str, Tensor]], parameters: dict[str, Tensor], logits: Tensor, slopes: Sequence[Tensor]
) -> None:
    """Propagate every slope back through the one graph of the logits, and add what arrives to its sum."""
    for number, (each, slope) in enumerate(zip(sums, slopes, strict=True)):
        is_last = number == len(slopes) - 1
        found = torch.autograd.grad(
            logits, list(parameters.values()), slope, retain_graph=not is_last, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                each[name] += gradient


def _check_set(images: Tensor, labels: Tensor, batch_norm: str, batch_size: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        expected = f"int64 ({len(images)},), one per image"
        raise ValueError(f"labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    if not len(images):
        raise ValueError("images must hold at least one example, got none: the mean over an empty set has no gradient")
    if batch_norm not in BATCH_NORM:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        expected = f"from 0 to {logits.shape[1] - 1}, the outputs of the network"
        raise ValueError(f"labels must be {expected}, got {low} to {high}")


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must have shape (N, D) with N of 1 and more, got {tuple(features.shape)}")
