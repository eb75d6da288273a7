"""The greedy search behind :mod:`memloc.flipping`: what each edited network sees, and one step after the other."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc.evaluation import classes
from memloc.gates import Gates

__all__ = ["COPIED", "NOISE", "OBJECTIVES", "Problem", "Search", "batch_problems", "margins_of", "target_problems"]

NOISE = ("independent", "accumulated")
"""How the copies of an image are disturbed: each by a noise of its own, their logits averaged; or copy t by the sum of
t noises, their gradients averaged and the last copy deciding whether the prediction has flipped."""

COPIED = ("target", "batch")
"""What is copied with noise: the target alone, beside a reference batch as it is; or the whole batch with it."""

OBJECTIVES = ("loss", "margin")
"""What the removal shall raise: the target's loss, or the largest other logit above that of its label."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What the networks of some targets, each with units of its own removed, are looked at with.

    Every network sees R rows: those that all share, then its own. Each row is a copy of one of M examples; the
    gradient of J at an example's loss is its weight: 1/B, −1 for the target (always the last own or its place in the
    batch), and 0 for an example that does not count.
    """

    shared: Tensor  # rows for all, (S, C, H, W)
    own: Tensor  # rows of each target, (T, R - S, C, H, W)
    example: Tensor  # which example each row is a copy of, int64 (R,)
    labels: Tensor  # of the examples, int64 (T, M)
    weights: Tensor  # float32 (T, M)
    place: Tensor  # the example that is the target, int64 (T,)


def _disturbed(images: Tensor, copies: int, noise: str, scale: float, draw: torch.Generator, *, each: bool) -> Tensor:
    """Make noisy copies, shape ``(copies, B, C, H, W)``; a noise's norm is that of each image or of all, scaled."""
    drawn = torch.randn(copies, *images.shape, generator=draw).to(images)
    over = tuple(range(2 if each else 1, drawn.ndim))
    size = images[None].square().sum(over, keepdim=True).sqrt()
    drawn *= scale * size / drawn.square().sum(over, keepdim=True).sqrt()
    return images + (drawn.cumsum(0) if noise == "accumulated" else drawn)


def batch_problems(
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    reference: int | Tensor,
    copies: int,
    noise: str,
    scale: float,
    draw: torch.Generator,
) -> Iterator[Problem]:
    """Put up to B targets at a time into a batch of their own, of which all is copied."""
    size = min(len(images), reference if isinstance(reference, int) else len(reference))
    for group in targets.split(size):
        if isinstance(reference, int):
            others = torch.randperm(len(images), generator=draw)
            batch = torch.cat([group, others[~torch.isin(others, group)]])[:size]
        else:
            batch = reference.cpu()
        found = group[:, None] == batch
        if not found.any(1).all():
            missing = group[~found.any(1)].tolist()
            raise ValueError(f"reference must hold the targets when the batch is copied, lacks {missing[:5]}")
        place = found.int().argmax(1)
        weights = torch.full((len(group), size), 1 / size)
        weights[torch.arange(len(group)), place] = -1
        batch, to = batch.to(images.device), images.device
        shared = _disturbed(images[batch], copies, noise, scale, draw, each=False).flatten(0, 1)
        own = images.new_empty(len(group), 0, *images.shape[1:])
        example = torch.arange(size, device=to).repeat(copies)
        yield Problem(shared, own, example, labels[batch].expand(len(group), -1), weights.to(to), place.to(to))


def target_problems(
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    reference: int | Tensor,
    copies: int,
    noise: str,
    scale: float,
    draw: torch.Generator,
) -> Iterator[Problem]:
    """Put one reference batch as it is beside the copies of each target."""
    if isinstance(reference, int):
        reference = torch.randperm(len(images), generator=draw)[:reference]
    to, size, count = images.device, len(reference), len(targets)
    weights = torch.full((count, size + 1), 1 / size)
    weights[:, :-1][targets[:, None] == reference.cpu()] = 0
    weights[:, -1] = -1
    reference, targets = reference.to(to), targets.to(to)
    own = _disturbed(images[targets], copies, noise, scale, draw, each=True).transpose(0, 1)
    example = torch.cat([torch.arange(size), torch.full((copies,), size)]).to(to)
    known = torch.cat([labels[reference].expand(count, -1), labels[targets, None]], 1)
    yield Problem(images[reference], own, example, known, weights.to(to), torch.full((count,), size, device=to))


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the logit of the label less the largest other one; infinite for one class. Shape ``(T,)``."""
    other = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    return logits.gather(1, labels[:, None])[:, 0] - other


class Search:
    """The greedy search for the targets of one problem, whose numbers T are used for targets."""

    def __init__(
        self,
        gates: Gates,
        problem: Problem,
        objective: str,
        noise: str,
        skipped: float,
        max_units: int,
        batch_size: int,
    ):
        self._gates, self._problem = gates, problem
        self._objective, self._noise = objective, noise
        self._skipped, self._max_units = skipped, max_units
        self._batch_size = batch_size
        count = len(problem.own)
        self._shares_all = problem.own.shape[1] == 0
        its_rows = (problem.example == problem.place[:, None]).nonzero()[:, 1]
        self._copies = problem.shared[its_rows].unflatten(0, (count, -1)) if self._shares_all else problem.own
        self.removed: list[list[int]] = [[] for _ in range(count)]
        self.margins: list[list[float]] = [[] for _ in range(count)]
        self.flipped = [False] * count
        self._own: dict[int, Tensor] = {}  # logits of the copies of those that go on

    def run(self) -> None:
        """Take steps until every target's search has ended."""
        rows, is_sparing = len(self._problem.example), self._skipped > 0 and not self._shares_all
        if is_sparing:
            self._record_reference()
        active = list(range(len(self.removed)))
        while active:
            active = self._by_parts(self._look, active, self._copies.shape[1])
            if self._shares_all and active and not self.removed[active[0]]:
                active = self._shared_step(active)
            elif is_sparing:  # networks that begin to differ at about the same depth go together
                active.sort(key=lambda t: self._gates.start(self.removed[t], self._calls))
                active = self._by_parts(self._sparing_step, active, rows)
            else:
                active = self._by_parts(self._whole_step, active, rows)

    def _by_parts(self, step: Callable[[list[int]], list[int]], active: list[int], rows: int) -> list[int]:
        """Do something with as many targets at a time as the batch size allows; return those it says are to go on."""
        size = max(1, self._batch_size // rows)
        return [t for start in range(0, len(active), size) for t in step(active[start : start + size])]

    def _see(self, some: Sequence[int], logits: Tensor) -> list[int]:
        """Note the margins of targets, shape ``(T, K)``, and say which are to go on (by their position)."""
        labels = self._problem.labels[list(some)].gather(1, self._problem.place[list(some), None])[:, 0]
        right = (classes(logits) == labels).tolist()
        go_on = []
        for position, (t, margin) in enumerate(zip(some, margins_of(logits, labels).tolist(), strict=True)):
            self.margins[t].append(margin)
            self.flipped[t] = not right[position]
            if right[position] and len(self.removed[t]) < self._max_units:
                go_on.append(position)
        return go_on

    def _remove_best(self, some: Sequence[int], scores: Tensor) -> list[int]:
        """Remove the best unit of each target, and say which targets had one."""
        best, units = scores.max(1)
        left = []
        for t, score, unit in zip(some, best.tolist(), units.tolist(), strict=True):
            if score > 0:
                self.removed[t].append(unit)
                left.append(t)
        return left

    def _shared_step(self, some: list[int]) -> list[int]:
        """Take the first step of targets that share all rows: their gradients differ at their own copies only."""
        shared = self._problem.shared
        differences = []

        def pull(logits: Tensor) -> Tensor:
            gradient = self._gradient(some, logits.expand(len(some), -1, -1))
            differences.append(gradient - gradient[0])
            return gradient[0]

        whole = torch.zeros(len(shared), dtype=torch.int64, device=shared.device)
        scores = self._gates.scores(shared, whole, [[]], pull)
        owner, row = differences[0].any(2).nonzero(as_tuple=True)
        pulls = differences[0][owner, row]
        scores = scores + self._gates.scores(shared[row], owner, [[] for _ in some], lambda logits: pulls)
        return self._remove_best(some, scores)

    def _whole_step(self, some: list[int]) -> list[int]:
        """Run all rows of some targets forward and backward."""
        problem = self._problem
        rows = torch.cat([problem.shared.expand(len(some), *problem.shared.shape), problem.own[some]], 1)
        owner = torch.arange(len(some), device=rows.device).repeat_interleave(rows.shape[1])

        def pull(logits: Tensor) -> Tensor:
            return self._gradient(some, logits.unflatten(0, (len(some), -1))).flatten(0, 1)

        scores = self._gates.scores(rows.flatten(0, 1), owner, [self.removed[t] for t in some], pull)
        return self._remove_best(some, scores)

    def _record_reference(self) -> None:
        """Run the reference batch through the whole network, and score the units with its part of J."""
        problem = self._problem
        size = len(problem.shared)
        self._logits, self._calls = self._gates.record(problem.shared)
        self._base = (self._logits.softmax(1) - self._one_hot(problem.labels[0, :size])) / size
        owner = torch.zeros(size, dtype=torch.int64, device=self._base.device)
        self._base_scores = self._gates.scores(problem.shared, owner, [[]], lambda logits: self._base)

    def _look(self, some: list[int]) -> list[int]:
        """Run the copies of some targets forward, and return those whose search goes on."""
        rows = self._copies[some].flatten(0, 1)
        own = self._gates.row_logits(rows, [self.removed[t] for t in some]).unflatten(0, (len(some), -1))
        go_on = self._see(some, own[:, -1] if self._noise == "accumulated" else own.mean(1))
        self._own |= {some[position]: own[position] for position in go_on}
        return [some[position] for position in go_on]

    def _sparing_step(self, some: list[int]) -> list[int]:
        """Run the reference batch forward, and backward only what matters."""
        problem, size = self._problem, len(self._problem.shared)
        removed, is_first = [self.removed[t] for t in some], not self.removed[some[0]]
        if is_first:
            shared = self._logits.expand(len(some), -1, -1)
        else:
            shared = self._gates.logits(problem.shared, removed, self._calls)
        own = torch.stack([self._own[t] for t in some])
        gradient = self._gradient(some, torch.cat([shared, own], 1))
        if is_first:
            gradient[:, :size] -= self._base
        owner, row = self._needed(gradient)
        own_row = problem.own[torch.tensor(some, device=row.device)[owner], (row - size).clamp(min=0)]
        shared_row = problem.shared[row.clamp(max=size - 1)]
        images = torch.where((row >= size).view(-1, *[1] * (own_row.ndim - 1)), own_row, shared_row)
        scores = self._gates.scores(images, owner, removed, lambda logits: gradient[owner, row])
        return self._remove_best(some, scores + self._base_scores if is_first else scores)

    def _needed(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Find the rows of each target, shape ``(T, R)``, that carry all but ``skipped`` of the gradient."""
        mass, order = gradient.abs().sum(2).sort(1)
        is_needed = torch.zeros_like(mass, dtype=torch.bool)
        is_needed.scatter_(1, order, mass.cumsum(1) > self._skipped * mass.sum(1, keepdim=True))
        owner, row = is_needed.nonzero(as_tuple=True)
        return owner, row

    def _one_hot(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self._logits.shape[-1]).float()

    def _gradient(self, some: Sequence[int], logits: Tensor) -> Tensor:
        """Compute the gradient of J with respect to the logits of all rows of some targets."""
        problem = self._problem
        labels, weights, place = problem.labels[some], problem.weights[some], problem.place[some]
        copies = problem.example.bincount().to(logits)
        if self._noise == "independent":
            totals = logits.new_zeros(*labels.shape, logits.shape[2])
            seen = totals.index_add(1, problem.example, logits) / copies[:, None]
            example = torch.arange(len(copies), device=logits.device)
        else:
            seen, example = logits, problem.example
        labels = labels[:, example]
        pull = seen.softmax(2) - F.one_hot(labels, seen.shape[2]).to(seen)
        if self._objective == "margin":
            label = F.one_hot(labels, seen.shape[2]).to(seen)
            runner_up = seen.masked_fill(label > 0, -math.inf).argmax(2)
            is_target = (example == place[:, None])[..., None]
            pull = torch.where(is_target, F.one_hot(runner_up, seen.shape[2]).to(seen) - label, pull)
        pull = pull * (weights / copies)[:, example, None]
        return pull[:, problem.example] if self._noise == "independent" else pull
