"""Gradient accounting: which part of a training's gradient comes from the noisy examples, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from memloc import models
from memloc.evaluation import Evaluation
from memloc.observers import Batch, Observer
from memloc.randomness import generator

__all__ = ["Accounting", "GradientAccounting", "random_control"]

_MEASURES = ("clean_norm", "noisy_norm", "total_norm", "cosine")


@dataclass(frozen=True)
class Accounting:
    """Aggregate gradients of a training, for L layer groups and T epochs.

    With ``G[w]`` the gradient of parameter tensor ``w``, summed over the steps of an epoch, a norm is the sum of
    ``‖G[w]‖ / √numel(w)`` over the tensors of the group, and the cosine the mean of that between ``G_clean[w]`` and
    ``G_noisy[w]`` over those for which neither is zero. Nothing is divided by the number of examples.

    Attributes:
        groups: Names of the layer groups, length L.
        clean_norm: Of the clean examples' part of the loss. Float64, shape ``(T, L)``.
        noisy_norm: Of the noisy examples' part. Float64, shape ``(T, L)``.
        total_norm: Of the whole loss. Float64, shape ``(T, L)``.
        cosine: Between the two parts, from -1 to 1; NaN where no tensor has both. Float64, shape ``(T, L)``.

    Source:
        Maini et al. (2023), gradient accounting, as in the reference code.
    """

    groups: tuple[str, ...]
    clean_norm: Tensor
    noisy_norm: Tensor
    total_norm: Tensor
    cosine: Tensor

    def table(self) -> pd.DataFrame:
        """Return one row an epoch, from 1, and layer group, in the order of the network."""
        columns = {name: getattr(self, name).flatten().tolist() for name in _MEASURES}
        epochs = len(self.total_norm)
        return pd.DataFrame(
            {
                "epoch": [epoch for epoch in range(1, epochs + 1) for _ in self.groups],
                "layer_group": list(self.groups) * epochs,
                **columns,
            }
        )


class GradientAccounting(Observer):
    """Splits the gradient of every step into the part of the noisy examples and that of the clean ones.

    The loss of a step is the mean over its batch, ``L = L_clean + L_noisy`` with ``L_noisy`` the sum over the noisy
    examples divided by the size of the *batch*. One forward pass serves both parts, so that they share the batch-norm
    statistics of the whole batch; ``L_noisy`` is propagated back first, the training itself propagates ``L`` back, and
    ``G_clean = G - G_noisy``. Weight decay is in neither. Parameters that are frozen count as zero gradients.

    A step whose gradients are not finite is left out, as the loss scaling of fp16 leaves it out.

    For a loop of your own, call :meth:`before_backward` after the forward pass; :meth:`after_backward` when
    ``parameter.grad`` holds the gradient of this step's mean loss and nothing else, before the optimiser's step; and
    :meth:`after_epoch` at the end of each epoch.

    Args:
        examples: Which training examples to set apart instead of the noisy ones: wherever this class says "noisy", they
            are meant, and "clean" is all the others. Bool, shape ``(N,)``; None takes each batch's ``noise_mask``.
        name: Under which a run keeps the table; give each a name of its own where several watch one training.

    Raises:
        ValueError: If ``examples`` is not a bool tensor of one dimension.

    Source:
        Maini et al. (2023), gradient accounting. Their code propagates back three times; twice is enough, because the
        parts sum up to the whole.

    Example:
        >>> from torch.nn import functional as F
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> noisy = torch.tensor([True, False, False])
        >>> batch = Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), noisy, torch.arange(3))
        >>> accounting = GradientAccounting()
        >>> losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        >>> accounting.before_backward(model, losses, batch)
        >>> losses.mean().backward()
        >>> accounting.after_backward(model, batch)
        >>> accounting.after_epoch(1, model)
        >>> accounting.result().table().columns.tolist()
        ['epoch', 'layer_group', 'clean_norm', 'noisy_norm', 'total_norm', 'cosine']
    """

    needs_graph = True

    def __init__(self, examples: Tensor | None = None, name: str = "gradients"):
        if examples is not None:
            _check_mask("examples", examples)
        self.name = name
        self._examples = examples
        self._step: dict[str, Tensor] | None = {}  # the noisy part of this step's gradient; None is all of it
        self._noisy: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def before_backward(self, model: nn.Module, losses: Tensor, batch: Batch) -> None:
        """Propagate the noisy examples' part of the loss back.

        Raises:
            ValueError: If ``losses`` are not one an example, or ``examples`` do not cover the batch's indices.
        """
        if losses.shape != batch.indices.shape:
            expected = tuple(batch.indices.shape)
            raise ValueError(f"losses must have shape {expected}, got {tuple(losses.shape)}: use reduction='none'")
        mask = self._set_apart(batch)
        count = int(mask.sum())
        if count == len(mask):
            self._step = None  # a second way back would only add rounding errors
        elif count == 0:
            self._step = {}
        else:
            parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
            # The sum, divided by the size of the batch afterwards: fp16 loses gradients that are small.
            found = torch.autograd.grad(
                losses[mask].sum(), list(parameters.values()), retain_graph=True, allow_unused=True
            )
            pairs = zip(parameters, found, strict=True)
            self._step = {name: gradient / len(mask) for name, gradient in pairs if gradient is not None}

    def after_backward(self, model: nn.Module, batch: Batch) -> None:
        """Add the gradients of the noisy part and of the whole loss to the epoch's."""
        parameters = dict(model.named_parameters())
        if not self._total:
            for sums in (self._noisy, self._total):
                sums |= {name: torch.zeros_like(p, dtype=_at_least_fp32(p)) for name, p in parameters.items()}
        # A parameter that is frozen may still hold the gradient of an earlier training.
        total = {name: p.grad for name, p in parameters.items() if p.requires_grad and p.grad is not None}
        noisy = total if self._step is None else self._step
        if _is_finite([*total.values(), *noisy.values()]):
            for sums, step in ((self._noisy, noisy), (self._total, total)):
                for name, gradient in step.items():
                    sums[name] += gradient
        self._step = {}

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the clean and the noisy gradient, summed over the steps of the epoch so far, by parameter's name."""
        return {name: (total - self._noisy[name], self._noisy[name].clone()) for name, total in self._total.items()}

    def after_epoch(self, epoch: int, model: nn.Module, evaluation: Evaluation | None = None) -> None:
        """Turn the sums of the epoch into norms and cosines, and begin anew; before training there are none."""
        if epoch == 0 and evaluation is not None:  # a training begins; a loop of your own may count from 0
            self.restore({})
        sums = self.gradients()
        for group, names in models.layer_groups(model).items():
            rows = self._rows.setdefault(group, [])
            if sums:
                norms, cosines = zip(*(_measure(*sums[name]) for name in names), strict=True)
                rows.append(torch.cat([torch.stack(norms).sum(0), torch.stack(cosines).nanmean(0, keepdim=True)]))
        self._noisy, self._total = {}, {}

    def result(self) -> Accounting:
        """Return what was found in the epochs that have ended.

        Raises:
            ValueError: If none has.
        """
        if not any(self._rows.values()):
            raise ValueError("no epoch has ended yet: call after_epoch at the end of each, or train for one at least")
        measures = torch.stack([torch.stack(rows) for rows in self._rows.values()], dim=1)  # (T, L, 4)
        return Accounting(tuple(self._rows), *measures.unbind(2))

    def table(self) -> dict[str, Tensor]:
        """Return the rows so far by layer group: float64, shape ``(T, 4)``, the columns of :class:`Accounting`."""
        return {group: torch.stack(rows) if rows else torch.zeros(0, 4).double() for group, rows in self._rows.items()}

    def restore(self, table: Mapping[str, Tensor]) -> None:
        """Take up earlier rows."""
        self._rows = {group: list(rows) for group, rows in table.items()}
        self._step, self._noisy, self._total = {}, {}, {}  # of an epoch that broke off and is trained again

    def _set_apart(self, batch: Batch) -> Tensor:
        """Say which examples of a batch are set apart. Bool, shape ``(B,)``."""
        if self._examples is None:
            return batch.noise_mask
        if int(batch.indices.max()) >= len(self._examples):
            got = f"{len(self._examples)} of them and index {int(batch.indices.max())}"
            raise ValueError(f"examples must cover the whole training set, got {got}")
        self._examples = self._examples.to(batch.indices.device)
        return self._examples[batch.indices]


def random_control(noise_mask: Tensor, seed: int) -> Tensor:
    """Draw as many clean examples as there are noisy ones: what :class:`GradientAccounting` compares them with.

    Args:
        noise_mask: Whether each training example is noisy. Bool, shape ``(N,)``.
        seed: Decides which clean examples are drawn.

    Returns:
        Whether each example was drawn; all clean ones where fewer than half are clean. Bool, shape ``(N,)``.

    Raises:
        ValueError: If ``noise_mask`` is not a bool tensor of one dimension.

    Source:
        Ours; the paper compares noisy examples, a tenth of the data, with all others.

    Example:
        >>> random_control(torch.tensor([True, False, False, True, False]), seed=0).sum().item()
        2
    """
    _check_mask("noise_mask", noise_mask)
    clean = (~noise_mask).nonzero().squeeze(1).cpu()
    drawn = clean[torch.randperm(len(clean), generator=generator(seed, "control"))[: int(noise_mask.sum())]]
    control = torch.zeros_like(noise_mask)
    control[drawn.to(control.device)] = True
    return control


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 1:
        raise ValueError(f"{name} must be a bool mask (N,) over the training set, got {mask.dtype} {tuple(mask.shape)}")


def _at_least_fp32(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _is_finite(gradients: list[Tensor]) -> bool:
    """Say whether no gradient holds an infinity or NaN, asking the device once."""
    return not gradients or bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


def _measure(clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the norms of the clean, noisy and total gradient of one tensor, and the cosine of the first two."""
    clean, noisy = clean.cpu().double(), noisy.cpu().double()
    lengths = torch.stack([clean.norm(), noisy.norm(), (clean + noisy).norm()])
    return lengths / clean.numel() ** 0.5, ((clean * noisy).sum() / (lengths[0] * lengths[1])).clamp(-1, 1)
