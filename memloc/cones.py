"""Project many points on convex cones at once: non-negative least squares from Gram matrices alone."""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

__all__ = ["ConeProjection", "project"]

ITERATIONS = (40, 60, 150, 400)  # of the first-order method before each attempt to finish exactly
PIVOTS = 12  # most changes of the active set in each attempt
PROGRESS = 0.25  # share of the problems that an attempt must finish to be worth another
TOLERANCE = 1e-11  # of the optimality conditions, relative to the largest entry of the targets
ENTRIES = 2**24  # of the matrices that are factorized at a time


@dataclass(frozen=True)
class ConeProjection:
    """The points of P cones that are nearest to n targets each.

    Attributes:
        coefficients: Of the M generators, not negative. Float64, shape ``(P, M, n)``.
        residual: The worst violation of the optimality conditions, relative to the scale of its target: the gradient
            where a coefficient is positive, its negative part where it is zero.
        left_over: Problems that neither first-order method nor active sets finished, and that went to scipy.
    """

    coefficients: Tensor
    residual: float
    left_over: int


def project(gram: Tensor, targets: Tensor) -> ConeProjection:
    """Find a ≥ 0 that minimises ½ aᵀGa − bᵀa, for P matrices G and n targets b each.

    With generators S as columns, G = SᵀS and b = Sᵀt, that is the projection of t on the cone of the generators. An
    accelerated gradient method runs on all problems together until the set of positive coefficients can be guessed; the
    system on that set is solved exactly, the set is changed where a coefficient or a gradient has the wrong sign, and
    the optimality conditions are checked. What is still wrong takes more steps, and in the end Lawson and Hanson's
    method, one problem at a time; where scipy's stops too early, ours.

    Args:
        gram: Positive semi-definite, diagonal positive. Float64, shape ``(P, M, M)``.
        targets: Float64, shape ``(P, M, n)``.

    Returns:
        The coefficients, with how well they meet the optimality conditions. Where generators are linearly dependent
        other coefficients may give the same point.

    Raises:
        ValueError: If shapes or types do not fit, or a number is not finite or a diagonal entry not positive.

    Source:
        Beck and Teboulle (2009) with O'Donoghue and Candès' restart (2015); Lawson and Hanson (1974).

    Example:
        >>> project(torch.eye(2, dtype=torch.float64)[None], torch.tensor([[[1.0], [-2.0]]]).double()).coefficients
        tensor([[[1.],
                 [0.]]], dtype=torch.float64)
    """
    _check(gram, targets)
    size, count = gram.shape[1], targets.shape[2]
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    gram = gram / (length[:, :, None] * length[:, None, :])
    # One row a problem: its cone, its target, and where the first-order method is.
    goal = (targets / length[:, :, None]).transpose(1, 2).reshape(-1, size).contiguous()
    goal /= (scale := goal.abs().amax(1, keepdim=True).clamp(min=torch.finfo(goal.dtype).tiny))
    found = torch.zeros_like(goal)
    waiting = (goal > 0).any(1).nonzero()[:, 0]
    cone = torch.arange(len(gram), device=gram.device).repeat_interleave(count)
    state = None
    values = torch.linalg.eigvalsh(gram)
    steps = 1 / values[:, -1]
    ranks = (values > values[:, -1:] * size * torch.finfo(values.dtype).eps).sum(1)
    for iterations in ITERATIONS:
        before = len(waiting)
        if not before:
            break
        state = _descend(gram, steps, cone[waiting], goal[waiting], state, iterations)
        # A basis holds no more generators than the rank: with more, the guess is not one yet.
        hopeful = ((state > 0).sum(1) <= ranks[cone[waiting]]).nonzero()[:, 0]
        tried = waiting[hopeful]
        guess, is_exact = _finish(gram, cone[tried], goal[tried], state[hopeful] > 0)
        found[tried[is_exact]] = guess[is_exact]
        is_left = torch.ones(before, dtype=torch.bool, device=gram.device)
        is_left[hopeful[is_exact]] = False
        waiting, state = waiting[is_left], state[is_left]
        if gram.device.type == "cpu" and before - len(waiting) < PROGRESS * before:
            break  # one by one is faster there
    if len(waiting):
        found[waiting] = _one_by_one(gram, cone[waiting], goal[waiting])
    residual = _residual(gram, cone, goal, found)
    found *= scale
    coefficients = found.view(len(gram), count, size).transpose(1, 2) / length[:, :, None]
    return ConeProjection(coefficients, residual, len(waiting))


def _check(gram: Tensor, targets: Tensor) -> None:
    fits = gram.ndim == targets.ndim == 3 and gram.shape[:2] == targets.shape[:2] and gram.shape[1] == gram.shape[2]
    if not fits:
        shapes = f"{tuple(gram.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"gram and targets must have shapes (P, M, M) and (P, M, n), got {shapes}")
    if gram.dtype != torch.float64 or targets.dtype != torch.float64:
        raise ValueError(f"gram and targets must be float64, got {gram.dtype} and {targets.dtype}")
    if not (gram.isfinite().all() and targets.isfinite().all()):
        raise ValueError("gram and targets must be finite, got nan or infinity")
    if not (gram.diagonal(dim1=1, dim2=2) > 0).all():
        raise ValueError("gram must have a positive diagonal, got a generator of length 0: leave it out")


def _descend(gram: Tensor, steps: Tensor, cone: Tensor, goal: Tensor, state: Tensor | None, iterations: int) -> Tensor:
    """Run the accelerated gradient method in single precision, one problem a row, and return where it is."""
    # Problems of one cone are columns of one product; cones with fewer of them are filled up.
    per_cone = cone.bincount(minlength=len(gram))
    cones = per_cone.nonzero()[:, 0]
    column = torch.arange(len(cone), device=cone.device) - (per_cone.cumsum(0) - per_cone)[cone]
    row = torch.searchsorted(cones, cone)
    shape = (len(cones), int(per_cone.max()), gram.shape[1])
    b = goal.new_zeros(shape, dtype=torch.float32)
    b[row, column] = goal.float()
    a = torch.zeros_like(b)
    if state is not None:
        a[row, column] = state
    step = steps[cones].float()[:, None, None]
    matrices, b = gram[cones].float() * -step, b * step
    ahead, momentum = a.clone(), a.new_ones((*shape[:2], 1))
    for _ in range(iterations):
        new = torch.baddbmm(b, ahead, matrices).add_(ahead).clamp_(min=0)
        change = new - a
        # O'Donoghue and Candès: forget the momentum where it points uphill.
        uphill = torch.linalg.vecdot(ahead.sub_(new), change)[..., None] > 0
        momentum.masked_fill_(uphill, 1)
        larger = (1 + (1 + 4 * momentum * momentum).sqrt()) / 2
        ahead = torch.addcmul(new, (momentum - 1) / larger, change)
        a, momentum = new, larger
    return a[row, column]


def _finish(gram: Tensor, cone: Tensor, goal: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Solve exactly on guessed active sets, change them where signs are wrong, and say which are optimal."""
    found, is_exact = torch.zeros_like(goal), torch.zeros(len(goal), dtype=torch.bool, device=goal.device)
    waiting = torch.arange(len(goal), device=goal.device)
    for pivot in range(PIVOTS):
        some, known = cone[waiting], goal[waiting]
        rows = max(1, ENTRIES // gram.shape[1] ** 2)
        parts = zip(some.split(rows), known.split(rows), active.split(rows), strict=True)
        solved = torch.cat([_solve(gram, *part) for part in parts])
        gradient = known - _times(gram, some, solved)
        negative = active & ~(solved >= 0)  # NaN, from a singular system, counts as wrong
        missing = ~active & (gradient > TOLERANCE)
        slack = torch.where(active, gradient.abs(), gradient.clamp(min=0)).amax(1)
        is_right = ~(negative | missing).any(1) & (slack <= TOLERANCE)
        found[waiting[is_right]] = solved[is_right]
        is_exact[waiting[is_right]] = True
        waiting, active, negative, missing = (each[~is_right] for each in (waiting, active, negative, missing))
        if not len(waiting) or is_right.float().mean() < PROGRESS / 5:
            break
        if pivot >= PIVOTS // 2:  # one change at a time, the first wrong one: slower, and it cannot go in circles
            wrong = negative | missing
            first = wrong & (wrong.cumsum(1) == 1)
            active = active ^ first
        else:
            active = active & ~negative | missing & ~negative.any(1, keepdim=True)
    return found, is_exact


def _solve(gram: Tensor, cone: Tensor, goal: Tensor, active: Tensor) -> Tensor:
    """Solve G a = b on active sets, one problem a row; NaN where that is singular, 0 outside."""
    size = int(active.sum(1).max()) if len(active) else 0
    if size == 0:
        return torch.zeros_like(goal)
    is_used, index = active.to(torch.uint8).topk(size, dim=1)
    is_used = is_used.bool()
    both = is_used[:, :, None] & is_used[:, None, :]
    small = gram[cone[:, None, None], index[:, :, None], index[:, None, :]]
    small = torch.where(both, small, torch.eye(size, dtype=gram.dtype, device=gram.device))
    factor, failed = torch.linalg.cholesky_ex(small)
    right = goal.gather(1, index).masked_fill(~is_used, 0)
    values = torch.cholesky_solve(right[..., None], factor)[..., 0]
    values.masked_fill_((failed > 0)[:, None] & is_used, torch.nan)
    return torch.zeros_like(goal).scatter(1, index, values.masked_fill(~is_used, 0))


def _times(gram: Tensor, cone: Tensor, rows: Tensor) -> Tensor:
    """Multiply each row by the matrix of its cone; rows of one cone lie together."""
    if not len(rows):
        return rows
    counts = cone.bincount(minlength=len(gram)).tolist()
    parts = [part @ matrix for part, matrix in zip(rows.split(counts), gram, strict=True)]
    return torch.cat(parts)


def _one_by_one(gram: Tensor, cone: Tensor, goal: Tensor) -> Tensor:
    """Solve the few problems that are left, exactly, by Lawson and Hanson's method on a square root of the matrix."""
    roots: dict[int, tuple[Tensor, Tensor]] = {}
    found = []
    for number, target in zip(cone.tolist(), goal.cpu(), strict=True):
        if number not in roots:
            values, vectors = torch.linalg.eigh(gram[number].cpu())
            kept = values > 0  # however small: what is left out is lost, and a rounding error does no harm
            root = values[kept].sqrt()
            roots[number] = (root[:, None] * vectors[:, kept].T, vectors[:, kept] / root)
        generators, inverse = roots[number]
        columns, point = generators.numpy(), (inverse.T @ target).numpy()
        solution, _ = scipy.optimize.nnls(columns, point, maxiter=100 * len(target))
        slope = columns.T @ (point - columns @ solution)
        if max(abs(slope[solution > 0]).max(initial=0), slope.max()) > 100 * TOLERANCE:
            solution = _one_at_a_time(columns, point)  # scipy 1.17 stops too early where columns are nearly dependent
        found.append(torch.from_numpy(solution))
    return torch.stack(found).to(goal)


def _one_at_a_time(columns: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Solve one problem by Lawson and Hanson's method as it is written, slowly."""
    active = np.zeros(columns.shape[1], dtype=bool)
    found = np.zeros(columns.shape[1])
    for _ in range(100 * len(found)):  # it ends long before: the distance falls with every change of the active set
        slope = np.where(active, 0, columns.T @ (point - columns @ found))
        if slope.max() <= TOLERANCE:
            break
        active[slope.argmax()] = True
        while True:
            best = np.zeros(len(found))
            best[active] = np.linalg.lstsq(columns[:, active], point)[0]
            falling = active & (best <= 0)
            if not falling.any():
                break
            share = (found[falling] / (found[falling] - best[falling])).min()
            found += share * (best - found)
            active &= found > np.finfo(found.dtype).eps * found.max()
            found[~active] = 0
        found = best
    return found


def _residual(gram: Tensor, cone: Tensor, goal: Tensor, found: Tensor) -> float:
    """Compute the worst violation of the optimality conditions."""
    gradient = goal - _times(gram, cone, found)
    return torch.where(found > 0, gradient.abs(), gradient.clamp(min=0)).max().item() if len(goal) else 0.0
