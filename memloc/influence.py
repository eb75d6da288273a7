"""Predict what each training example does for its own prediction, without training again: self-influence."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

__all__ = ["SelfInfluence", "implied_ridge", "self_influence"]

_MEMORY_BYTES = 400_000_000  # for the curvatures that exist at a time


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """What a linear classifier is predicted to lose at each example without that example.

    Attributes:
        scores: Self-influence in nats: by how much the example's own loss is predicted to rise, to first order.
            Float64, shape ``(…, N)``.
        leverages: How many of the classifier's parameters the example keeps busy, 0 to ``K - 1``. Float64, shape
            ``(…, N)``.
        probabilities: Of the example's label, of the network as it is, without the shift. Float64, shape ``(…, N)``.
        drops: By how much that probability is predicted to fall without the example, with its leverage. Float64, shape
            ``(…, N)``.
        first_order: The same without: too small for an example that has a high leverage. Float64, shape ``(…, N)``.
    """

    scores: Tensor
    leverages: Tensor
    probabilities: Tensor
    drops: Tensor
    first_order: Tensor

    def table(self) -> pd.DataFrame:
        """Return one row a copy and example: ``self_influence`` in nats, the other attributes in the singular."""
        size = self.scores.shape[-1]
        found = {"self_influence": self.scores, "leverage": self.leverages}
        found |= {"probability": self.probabilities, "drop": self.drops, "first_order": self.first_order}
        places = torch.arange(self.scores.numel())
        index = {"copy": places // size, "example": places % size}
        return pd.DataFrame({name: values.flatten().cpu().numpy() for name, values in (index | found).items()})


def implied_ridge(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    change: Tensor,
    *,
    shift: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ridge penalty under which trained weights come nearest to being a minimum.

    Weights W that were stopped early are no minimum of the summed loss L. But they may be near the minimum of
    ``L(V) + ridge / 2 ‖V - W₀‖²``, which pulls V towards the initial weights W₀: its gradient at W is
    ``∇L + ridge (W - W₀)``, and the ridge that makes it shortest is ``-⟨∇L, W - W₀⟩ / ‖W - W₀‖²``.

    Args:
        features: As for :func:`self_influence`.
        logits: The same, after training.
        labels: The same.
        change: How far training has moved the weights, ``W - W₀``. Shape ``(…, K, D)``.
        shift: As for :func:`self_influence`.
        weights: The same.

    Returns:
        The ridge for the *summed* loss, at least 0, and how well it explains the weights: the cosine of the angle
        between the gradient and the way back, 1 where W is exactly the minimum. Float64, both of shape ``(…)``.

    Raises:
        ValueError: If shapes do not fit.

    Source:
        Ours. That early stopping acts like a ridge is old; that its size can be read off the weights needs no theory.

    Example:
        Gradient descent from zero with weight decay 0.1 on the mean loss of 60 examples ends at a ridge of 6:

        >>> from memloc.copies import Descent, make_copies
        >>> from memloc.ensembles import Grouped, train_copies
        >>> features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        >>> labels = (features[:, 0] > 0).long()
        >>> descent = Descent(steps=400, learning_rate=0.5, weight_decay=0.1)
        >>> start = make_copies(5, 2, seeds=[0], bias=False, zero=True)
        >>> copies = train_copies(start, Grouped(features, labels, labels), descent).copies
        >>> ridge, alignment = implied_ridge(features, copies.logits(features), labels, copies.weights[0])
        >>> round(ridge.item(), 2), round(alignment.item(), 3)
        (6.0, 1.0)
    """
    features, logits, labels, shift, weights = _prepare(features, logits, labels, shift, weights)
    expected = (*logits.shape[:-2], logits.shape[-1], features.shape[-1])
    if change.shape != expected:
        raise ValueError(f"change must have shape {expected}, (…, K, D), got {tuple(change.shape)}")
    residuals, _ = _residuals(logits + shift, labels)
    gradient, way = (residuals * weights[..., None]).mT @ features, change.double()
    along = -(gradient * way).sum((-2, -1))
    squares = [each.square().sum((-2, -1)) for each in (way, gradient)]
    tiny = torch.finfo(torch.float64).tiny
    ridge = (along / squares[0].clamp(min=tiny)).clamp(min=0)
    return ridge, along / (squares[0] * squares[1]).sqrt().clamp(min=tiny)


def self_influence(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    ridge: float | Tensor,
    shift: Tensor | None = None,
    weights: Tensor | None = None,
) -> SelfInfluence:
    """Predict what a linear classifier would lose at each of its training examples without that example.

    With gᵢ the gradient of the loss of example i by all weights and ``H = Σ wⱼ Jⱼᵀ(diag pⱼ - pⱼ pⱼᵀ) Jⱼ + ridge`` the
    curvature of the summed loss, without example i the weights move by about ``wᵢ H⁻¹ gᵢ``, and its own loss rises by
    about ``wᵢ gᵢᵀ H⁻¹ gᵢ``: the score. For the predicted drop of the probability, H is taken without example i, which
    is what the correction by the leverage amounts to; the first order alone is far too small for an example that the
    classifier can fit alone. A common change of all logits of an example changes nothing, so that K classes
    need ``K - 1`` directions; and more features than examples are rotated into the N that the examples span. So no
    matrix is larger than ``(K - 1) min(N, D)`` squared.

    Args:
        features: What the linear layer sees, shape ``(N, D)``, or ``(…, N, D)`` for several classifiers. A bias is a
            feature that is 1: append it with ``torch.nn.functional.pad(features, (0, 1), value=1)``.
        logits: What it says, without the shift. Shape ``(N, K)``, or ``(…, N, K)``.
        labels: Those that it was trained on. Int64, shape ``(N,)``, or ``(…, N)``.
        ridge: Penalty on the squared weights, halved, for the *summed* loss; above 0, one for all or one for each
            classifier. Where training had none, see :func:`implied_ridge`.
        shift: What was added to the logits in training (:func:`memloc.mat.logit_shift`): gradient and curvature are
            those of the loss with it, probabilities and drops those without. Shape ``(N, K)`` or ``(…, N, K)``.
        weights: How much each example counts in the summed loss; None counts each as 1. Shape ``(N,)`` or ``(…, N)``.

    Returns:
        Scores, leverages, probabilities and predicted drops.

    Raises:
        ValueError: If shapes do not fit, labels are out of range, logits are not finite, weights are negative, or
            the ridge is not above 0.

    Source:
        Bayat et al. (2025), Figure 2, show histograms of self-influence; the estimator is ours, because their code
        lacks theirs. Koh and Liang (2017) for influence, Pregibon (1981) for the correction by leverage.

    Example:
        Of three examples of class 0 and one of class 1 at the same place, the single one depends on itself.

        >>> features = torch.ones(4, 1)
        >>> logits = torch.tensor([3.0, 1.0]).log().expand(4, 2)
        >>> found = self_influence(features, logits, torch.tensor([0, 0, 0, 1]), ridge=1.0)
        >>> found.scores.round(decimals=3)
        tensor([0.0500, 0.0500, 0.0500, 0.4500], dtype=torch.float64)
    """
    features, logits, labels, shift, weights = _prepare(features, logits, labels, shift, weights)
    penalty = torch.as_tensor(ridge, dtype=torch.float64, device=logits.device).expand(logits.shape[:-2])
    if not ((penalty > 0) & penalty.isfinite()).all():
        raise ValueError(f"ridge must be above 0, got {ridge}: without a ridge, take implied_ridge")
    if features.shape[-1] > features.shape[-2]:  # only the span of the examples matters
        features = torch.linalg.qr(features.mT, mode="r").R.mT
    lead, (size, classes) = logits.shape[:-2], logits.shape[-2:]
    features = features.expand(*lead, *features.shape[-2:])
    whole = (features, logits, labels, shift, weights, penalty)
    flat = [each.reshape(-1, *each.shape[len(lead) :]) for each in whole]
    needed = 16 * ((classes - 1) * features.shape[-1]) ** 2  # the curvature and its inverse
    portion = max(1, _MEMORY_BYTES // max(1, needed))
    parts = [_influences(*some) for some in zip(*(each.split(portion) for each in flat), strict=True)]
    return SelfInfluence(*(torch.cat(same).view(*lead, size) for same in zip(*parts, strict=True)))


def _influences(
    features: Tensor, logits: Tensor, labels: Tensor, shift: Tensor, weights: Tensor, ridge: Tensor
) -> tuple[Tensor, ...]:
    """Compute what :class:`SelfInfluence` holds, in its order, for S classifiers; shape ``(S, N)`` each."""
    residuals, shares = _residuals(logits + shift, labels)
    classes = shares.shape[-1]
    ones = torch.ones(1, classes, dtype=torch.float64, device=logits.device)
    basis = torch.linalg.svd(ones).Vh[1:]  # directions between classes, (K - 1, K)
    gradient, mean = residuals @ basis.mT, shares @ basis.mT
    spread = torch.einsum("ak,snk,bk->snab", basis, shares, basis) - mean[..., None] * mean[..., None, :]
    curvature = spread * weights[..., None, None]
    inverse = _inverse(features, curvature, ridge)
    own = _own_blocks(features, inverse)
    first = (own @ gradient[..., None])[..., 0] * weights[..., None]  # by what the example's logits move
    scores = (gradient * first).sum(-1)
    taken = curvature @ own
    leverages = taken.diagonal(dim1=-2, dim2=-1).sum(-1)
    # H without the example: own (1 - curvature own)⁻¹ gradient
    rest = torch.eye(classes - 1, dtype=torch.float64, device=logits.device) - taken
    step = (own @ torch.linalg.solve(rest, gradient[..., None]))[..., 0] * weights[..., None]
    before, after, almost = (
        each.softmax(-1).gather(-1, labels[..., None])[..., 0]
        for each in (logits, logits + step @ basis, logits + first @ basis)
    )
    return scores, leverages, before, before - after, before - almost


def _inverse(features: Tensor, curvature: Tensor, ridge: Tensor) -> Tensor:
    """Invert the curvature of the summed loss with its ridge, shape ``(S, K - 1, D, K - 1, D)``."""
    sets, size = features.shape[0], features.shape[-1]
    directions = curvature.shape[-1]
    whole = features.new_empty(sets, directions, size, directions, size)
    for row in range(directions):
        for column in range(row + 1):  # the lower half, which is all that is read
            whole[:, row, :, column] = (features * curvature[..., row, column, None]).mT @ features
    flat = whole.view(sets, directions * size, directions * size)
    flat.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    return torch.cholesky_inverse(torch.linalg.cholesky(flat)).view_as(whole)


def _own_blocks(features: Tensor, inverse: Tensor) -> Tensor:
    """Compute ``Jᵢ H⁻¹ Jᵢᵀ`` of every example, shape ``(S, N, K - 1, K - 1)``."""
    directions = inverse.shape[1]
    own = features.new_empty(*features.shape[:2], directions, directions)
    for row in range(directions):
        for column in range(row + 1):
            block = ((features @ inverse[:, row, :, column]) * features).sum(-1)
            own[..., row, column] = block
            own[..., column, row] = block
    return own


def _residuals(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute probabilities less the label's, exactly for those near 1 too, and probabilities; ``(…, N, K)`` each."""
    shares = logits.softmax(-1)
    where = labels[..., None]
    others = shares.scatter(-1, where, 0.0)
    return others.scatter(-1, where, -others.sum(-1, keepdim=True)), shares


def _prepare(
    features: Tensor, logits: Tensor, labels: Tensor, shift: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, ...]:
    """Check what belongs to the examples, and give it in float64 with the shape that logits have."""
    _check(features, logits, labels, shift, weights)
    size = logits.shape[:-1]
    shift = logits.new_zeros(()) if shift is None else shift.detach()
    weights = logits.new_ones(()) if weights is None else weights.detach()
    return (
        features.detach().double(),
        logits.detach().double(),
        labels.expand(size),
        shift.double().expand(logits.shape),
        weights.double().expand(size),
    )


def _check(features: Tensor, logits: Tensor, labels: Tensor, shift: Tensor | None, weights: Tensor | None) -> None:
    """Refuse what does not fit together."""
    if logits.ndim < 2 or not logits.shape[-2] or not logits.isfinite().all():
        got = f"{tuple(logits.shape)}" if logits.ndim < 2 or not logits.shape[-2] else "infinite values or NaN"
        raise ValueError(f"logits must be finite, (…, N, K) with an example, got {got}")
    *lead, size, classes = logits.shape
    shapes = {
        "features": (features, (size, features.shape[-1] if features.ndim else 0)),
        "labels": (labels, (size,)),
        "shift": (shift, (size, classes)),
        "weights": (weights, (size,)),
    }
    for name, (values, shape) in shapes.items():
        if values is not None and values.shape not in (shape, (*lead, *shape)):
            raise ValueError(f"{name} must have shape {shape} or {(*lead, *shape)}, got {tuple(values.shape)}")
    if labels.dtype != torch.int64 or not 0 <= labels.min() <= labels.max() < classes:
        got = f"{labels.dtype} from {labels.min()} to {labels.max()}"
        raise ValueError(f"labels must be int64 from 0 to {classes - 1}, got {got}")
    if weights is not None and not (weights >= 0).all():
        raise ValueError("weights must be at least 0: some are not")
