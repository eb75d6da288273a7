"""Time the geometry of manifolds beside one quadratic programme at a time.

Three sizes of P manifolds of M points in N features, n Gaussian draws each. In the first and the last each manifold has
ten main axes of decaying extent and a little noise, its radius about the norm of its centre; the second is the example
in the reference code's README, points without structure. The rows:

- *cvxopt*: for each draw, ``min ‖v - t‖²`` such that ``Sᵀv ≤ 0``, by cvxopt's interior points to 12 digits, with the
  frame S in M coordinates, as the reference code does (recorded: 0.81 ms a draw for M = 50 and 5.10 ms for M = 200 on
  manifolds like these). A sample of the draws is solved, some of every manifold;
- *ours*: Gram matrices from the same frames, and all draws of all manifolds as one projection on cones;
- *call*: all of ``manifold_geometry``, directions common to the centres included, 10 repeats of their search as in that
  example, which took the reference code 22 CPU seconds where cvxopt took 0.81 ms a draw: that is scaled by what cvxopt
  takes here for the structured manifolds of M = 50.

A figure of the paper is 20 layers × 4 groups of examples × 2 epochs, with P = 100, M = 50, N = 5,000, n = 300: 160
calls with 1 repeat, 65 CPU minutes with the reference code. Three are timed (points without structure, as in an early
layer; radius 1; radius 0.3, as in a late layer that tells classes apart), and 160 times their mean is what is printed.

One thread; CPU time, which depends little on what else the machine does; rows in turn, and the median of each. Accuracy
is the largest difference of the squared lengths F from cvxopt's, relative to F, or to 1 % of its mean where F is less.
Prints a table, then one line of JSON.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl
import torch
from cvxopt import matrix, solvers
from torch import Tensor

from memloc.cones import project
from memloc.manifolds import manifold_geometry
from memloc.randomness import generator

AXES, REPEATS, SAMPLE = 10, 3, 10  # SAMPLE: draws of each manifold that cvxopt solves, all repeats together
RECORDED_MS = {50: 0.81, 200: 5.10}  # a draw, the reference code with cvxopt
README_S, FIGURE_CALLS = 22.0, 20 * 4 * 2
PRECISE = {"show_progress": False, "abstol": 1e-12, "reltol": 1e-12, "feastol": 1e-12}


class Size(NamedTuple):
    """How many manifolds, points, features and draws, and the radius; None for points without structure."""

    manifolds: int
    points: int
    features: int
    draws: int
    radius: float | None


SIZES = (Size(20, 50, 500, 200, 1.0), Size(100, 50, 5000, 200, None), Size(20, 200, 500, 200, 1.0))
FIGURE = tuple(Size(100, 50, 5000, 300, radius) for radius in (None, 1.0, 0.3))


def make_points(size: Size) -> Tensor:
    """Make the points of each manifold around a centre of norm 1, float32 ``(P, M, N)``."""
    count, points, features, _, radius = size
    draw = generator(0, "manifolds", *size[:3])
    if radius is None:
        return torch.randn(count, points, features, generator=draw)
    centers = torch.randn(count, 1, features, generator=draw) / features**0.5
    axes = torch.randn(count, AXES, features, generator=draw) / features**0.5
    offsets = (torch.randn(count, points, AXES, generator=draw) * 0.85 ** torch.arange(AXES)) @ axes
    offsets += 0.02 * torch.randn(count, points, features, generator=draw) / features**0.5
    return centers + offsets * (radius / offsets.norm(dim=2).mean())


def make_frames(points: Tensor) -> Tensor:
    """Compute frames in M coordinates and, last, ones. Float64, ``(P, M + 1, M)``."""
    clouds = points.double() - points.mean((0, 1), dtype=torch.float64)
    centers = clouds.mean(1, keepdim=True)
    offsets = torch.linalg.qr(((clouds - centers) / centers.norm(dim=2, keepdim=True)).mT).R
    return torch.cat([offsets, torch.ones_like(offsets[:, :1])], 1)


def squared_lengths(frames: Tensor, draws: Tensor) -> tuple[Tensor, float]:
    """Solve all draws, ``(P, M + 1, n)``, together; also give the worst violation of the optimality conditions."""
    targets = frames.mT @ draws
    found = project(frames.mT @ frames, targets)
    return (found.coefficients * targets).sum(1), found.residual


def cvxopt_squared_lengths(frames: Tensor, draws: Tensor) -> Tensor:
    """Solve one programme at a time, as the reference code does."""
    identity = matrix(np.eye(frames.shape[1]))
    found = []
    for frame, its_draws in zip(frames.numpy(), draws.mT.numpy(), strict=True):
        constraints, bounds = matrix(frame.T.copy()), matrix(np.zeros(frame.shape[1]))
        for t in its_draws:
            solution = solvers.qp(identity, matrix(-t), constraints, bounds, options=PRECISE)
            found.append(np.square(np.array(solution["x"])[:, 0] - t).sum())
    return torch.tensor(found).view(len(frames), -1)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time one call."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def geometry(points: Tensor, size: Size, repeats: int) -> tuple[float, float]:
    """Time the whole call; also give the worst violation of the optimality conditions."""
    labels = torch.arange(size.manifolds).repeat_interleave(size.points)
    used, found = cpu_seconds(
        lambda: manifold_geometry(points.flatten(0, 1), labels, draws=size.draws, repeats=repeats)
    )
    return used, found.kkt_residual


def measure(size: Size) -> dict[str, float]:
    """Time the solve both ways and the whole call, in turn: milliseconds a draw, seconds, and how exact it is."""
    points = make_points(size)
    frames = make_frames(points)
    draw = generator(0, "draws")
    draws = torch.randn(size.manifolds, size.points + 1, size.draws, generator=draw, dtype=torch.float64)
    each = max(1, 20 * SAMPLE // size.manifolds // REPEATS)
    theirs, ours, calls, residuals, differences = [], [], [], [], []
    for repeat in range(REPEATS):
        some = slice(repeat * each, (repeat + 1) * each)
        used, expected = cpu_seconds(lambda some=some: cvxopt_squared_lengths(frames, draws[:, :, some]))
        theirs.append(1e3 * used / expected.numel())
        used, (found, residual) = cpu_seconds(lambda: squared_lengths(frames, draws))
        ours.append(1e3 * used / found.numel())
        scale = expected.clamp(min=0.01 * expected.mean().item())
        differences.append(((found[:, some] - expected).abs() / scale).max().item())
        used, call_residual = geometry(points, size, repeats=10)
        calls.append(used)
        residuals += [residual, call_residual]
    return {
        "cvxopt_ms": statistics.median(theirs),
        "ours_ms": statistics.median(ours),
        "call_s": statistics.median(calls),
        "kkt": max(residuals),
        "difference": max(differences),
    }


def main() -> None:
    """Time every size and the figure, and print the comparison."""
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)  # cvxopt and scipy bring linear algebra of their own
    names = ("cvxopt ms", "recorded", "ours ms", "speed-up", "call s", "worst KKT", "difference")
    print(f"{'P, M, N, n':<20}" + "".join(f"{name:>12}" for name in names))
    found = {}
    for size in SIZES:
        row = found[size] = measure(size)
        recorded = f"{RECORDED_MS[size.points]:.2f}" if size.radius else "–"
        cells = f"{row['cvxopt_ms']:>12.3f}{recorded:>12}{row['ours_ms']:>12.4f}"
        cells += f"{row['cvxopt_ms'] / row['ours_ms']:>12.1f}{row['call_s']:>12.2f}"
        print(f"{', '.join(map(str, size[:4])):<20}{cells}{row['kkt']:>12.1e}{row['difference']:>12.1e}", flush=True)
    small, readme, large = found.values()
    reference_s = README_S * small["cvxopt_ms"] / RECORDED_MS[50]
    print(f"the example of the reference code: {reference_s:.1f} s by its own, {readme['call_s']:.2f} s by ours")
    calls = [geometry(make_points(size), size, repeats=1) for size in FIGURE]
    minutes = FIGURE_CALLS * statistics.mean(used for used, _ in calls) / 60
    each = ", ".join(f"{used:.2f}" for used, _ in calls)
    print(f"a figure: {each} s a call (early, middle, late layer); {FIGURE_CALLS} calls in {minutes:.1f} CPU minutes")
    print(
        json.dumps(
            {
                "solve_speedup_m50": round(small["cvxopt_ms"] / small["ours_ms"], 1),
                "solve_speedup_m200": round(large["cvxopt_ms"] / large["ours_ms"], 1),
                "call_speedup": round(reference_s / readme["call_s"], 1),
                "max_kkt": max([row["kkt"] for row in found.values()] + [residual for _, residual in calls]),
                "max_difference": max(row["difference"] for row in found.values()),
                "figure_cpu_minutes": round(minutes, 2),
                "cvxopt_ms_m50": round(small["cvxopt_ms"], 3),
                "recorded_ms_m50": RECORDED_MS[50],
                "cvxopt_ms_m200": round(large["cvxopt_ms"], 3),
                "recorded_ms_m200": RECORDED_MS[200],
                "load_average": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
