"""Time twins (XRM) and memorization-aware training (MAT), many seeds at once, beside a plain loop a seed.

The rows, each for XRM and for MAT:

- *linear*: 800 examples of 40 features, linear networks, full batches, SGD, 20 seeds. The published loop took 2.1 ms a
  step of XRM for one seed;
- *ColorMNIST*: examples of the size of its images (two channels of 14×14 pixels; what is on them does not matter for
  the time of a step), networks 392–390–390–2, batches of 64, Adam, 10 seeds.

*Plain* is one seed in a loop over steps, as the reference code is described: two modules and one optimiser, the loss of
each class in turn, flips by Bernoulli draws; for MAT the calibration of each batch. *Ours* is a step of all seeds. The
speed-up is seeds × plain / ours; what comes before and after the steps is left out on both sides.

One thread; CPU time, which depends little on what else the machine does; both in turn, and the median of each.
Prints a table, then one line of JSON.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from memloc.copies import Descent, make_copies
from memloc.ensembles import Grouped, train_copies
from memloc.mat import logit_shift
from memloc.randomness import generator, seeded
from memloc.twins import train_twins

RECORDED_MS = 2.1  # a step of XRM on the linear set, the reference code
REPEATS = 3


class Case(NamedTuple):
    """How many seeds, which networks, how they are trained, and how many steps are timed."""

    seeds: int
    hidden: tuple[int, ...]
    descent: Descent


LINEAR = Case(20, (), Descent(steps=500, learning_rate=0.01))
COLOR_MNIST = Case(10, (390, 390), Descent(steps=20, learning_rate=1e-3, optimizer="adam", batch_size=64))


def make_linear(count: int = 800, noise: int = 38, share: float = 0.083) -> tuple[Tensor, Tensor, Tensor]:
    """Make examples with a weak feature that is right, a strong one that misleads about some, and say about which."""
    draw = generator(0, "linear")
    labels = torch.randint(0, 2, (count,), generator=draw)
    is_misled = torch.rand(count, generator=draw) < share
    signs = torch.stack([2 * labels - 1, torch.where(is_misled, 1 - 2 * labels, 2 * labels - 1)], 1)
    signal = torch.tensor([1.0, 2.0]) * (signs + 0.3 * torch.randn(count, 2, generator=draw))
    return torch.cat([signal, 0.5 * torch.randn(count, noise, generator=draw)], 1), labels, is_misled


def make_colored(count: int = 5_000) -> tuple[Tensor, Tensor]:
    """Make examples of the size of ColorMNIST's."""
    draw = generator(0, "colored")
    return torch.rand(count, 392, generator=draw), torch.randint(0, 2, (count,), generator=draw)


def build(features: int, hidden: tuple[int, ...], seed: int) -> nn.Sequential:
    """Build one network; linear ones start from zero."""
    sizes = [features, *hidden, 2]
    with seeded(seed, "plain"):
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    if not hidden:
        nn.init.zeros_(layers[0].weight)
        nn.init.zeros_(layers[0].bias)
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def optimizer_of(parameters: list[nn.Parameter], descent: Descent) -> torch.optim.Optimizer:
    """Choose torch's own optimiser."""
    kind = torch.optim.Adam if descent.optimizer == "adam" else torch.optim.SGD
    return kind(parameters, lr=float(descent.rates(1)))


def batch_of(count: int, descent: Descent, draw: torch.Generator) -> Tensor | slice:
    """Draw the examples of a step."""
    if descent.batch_size is None:
        return slice(None)
    return torch.randint(0, count, (descent.batch_size,), generator=draw)


def plain_twins(features: Tensor, labels: Tensor, case: Case, seed: int = 0) -> Tensor:
    """Train one pair, step by step, and say which examples a twin gets wrong."""
    draw, classes = generator(seed, "plain"), 2
    first, second = (build(features.shape[1], case.hidden, seed + twin) for twin in (0, 1))
    optimizer = optimizer_of([*first.parameters(), *second.parameters()], case.descent)
    assignment = torch.randint(0, 2, (len(labels), 1), generator=draw)
    flipped = labels.clone()
    for _ in range(case.descent.steps):
        some = batch_of(len(labels), case.descent, draw)
        images, targets, own = features[some], flipped[some], assignment[some]
        a, b = first(images), second(images)
        held_in, held_out = a * own + b * (1 - own), a * (1 - own) + b * own
        losses = cross_entropy(held_in, targets, reduction="none")
        loss = sum(losses[targets == label].mean() for label in range(classes) if (targets == label).any())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            most, predicted = held_out.softmax(1).max(1)
            flip = torch.bernoulli((most - 1 / classes) * classes / (classes - 1), generator=draw).long()
            flipped[some] = flip * predicted + (1 - flip) * targets
    with torch.no_grad():
        return (first(features).argmax(1) != labels) | (second(features).argmax(1) != labels)


def plain_shift(held_out: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Calibrate the held-out predictions of a batch."""
    predicted = (held_out / temperature).softmax(1)
    joint = predicted.T @ one_hot(labels, 2).float() / len(labels)
    return (predicted @ (joint / joint.sum(1, keepdim=True)) + 1e-6).log()


def plain_mat(features: Tensor, labels: Tensor, held_out: Tensor, case: Case, seed: int = 0) -> nn.Module:
    """Train one network, step by step, each batch calibrated by itself."""
    draw, network = generator(seed, "plain"), build(features.shape[1], case.hidden, seed)
    optimizer = optimizer_of(list(network.parameters()), case.descent)
    for _ in range(case.descent.steps):
        some = batch_of(len(labels), case.descent, draw)
        with torch.no_grad():
            shift = plain_shift(held_out[some], labels[some])
        loss = cross_entropy(network(features[some]) + shift, labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def step_ms(work: Callable[[Case], object], case: Case) -> float:
    """Time a step: trainings of two lengths, so that what comes before and after the steps drops out."""
    seconds = []
    for steps in (1, case.descent.steps):
        start = time.process_time()
        work(case._replace(descent=replace(case.descent, steps=steps)))
        seconds.append(time.process_time() - start)
    return 1e3 * (seconds[1] - seconds[0]) / (case.descent.steps - 1)


def measure(case: Case, features: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Time a plain step of one seed and one of ours of all seeds, in turn, of XRM and of MAT."""
    held_out = torch.randn(case.seeds, len(labels), 2, generator=generator(0, "held-out"))
    shift, data, seeds = logit_shift(held_out, labels), Grouped(features, labels, labels), range(case.seeds)
    copies = make_copies(features.shape[1], 2, seeds, hidden=case.hidden, zero=not case.hidden)
    works: dict[str, tuple[Callable[[Case], object], Callable[[Case], object]]] = {
        "XRM": (
            lambda case: plain_twins(features, labels, case),
            lambda case: train_twins(features, labels, case.descent, seeds=seeds, hidden=case.hidden),
        ),
        "MAT": (
            lambda case: plain_mat(features, labels, held_out[0], case),
            lambda case: train_copies(copies, data, case.descent, shift=shift),
        ),
    }
    found = {}
    for name, (plain, ours) in works.items():
        times = [(step_ms(plain, case), step_ms(ours, case)) for _ in range(REPEATS + 1)][1:]
        found[name] = (statistics.median(each[0] for each in times), statistics.median(each[1] for each in times))
    return found


def main() -> None:
    """Time every row, check that both sides find the misled, and print the comparison."""
    torch.set_num_threads(1)
    features, labels, is_misled = make_linear()
    long = LINEAR._replace(descent=replace(LINEAR.descent, steps=1500))
    ours = train_twins(features, labels, long.descent, seeds=range(LINEAR.seeds)).mistakes
    theirs = plain_twins(features, labels, long)
    print(f"{int(is_misled.sum())} misled; found by plain twins {int((theirs & is_misled).sum())} and")
    print(f"{int((theirs & ~is_misled).sum())} others, by ours, mean of the seeds, ", end="")
    print(f"{(ours & is_misled).sum(1).float().mean():.1f} and {(ours & ~is_misled).sum(1).float().mean():.1f}")

    names = ("seeds", "plain ms a seed", "recorded", "ours ms all seeds", "speed-up")
    print(f"{'':<16}" + "".join(f"{name:>19}" for name in names))
    ratios = {}
    for name, case, data in (("linear", LINEAR, (features, labels)), ("ColorMNIST", COLOR_MNIST, make_colored())):
        for method, (plain, batched) in measure(case, *data).items():
            ratio = ratios[name, method] = case.seeds * plain / batched
            recorded = RECORDED_MS if (name, method) == ("linear", "XRM") else "–"
            cells = (case.seeds, f"{plain:.3f}", recorded, f"{batched:.3f}", f"{ratio:.1f}")
            print(f"{name + ' ' + method:<16}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
            if recorded == RECORDED_MS:
                plain_ms = plain
    print(
        json.dumps(
            {
                "speedup_20_seeds": round(ratios["linear", "XRM"], 1),
                "speedup_mat_20_seeds": round(ratios["linear", "MAT"], 1),
                "speedup_colormnist": round(ratios["ColorMNIST", "XRM"], 2),
                "speedup_mat_colormnist": round(ratios["ColorMNIST", "MAT"], 2),
                "plain_ms": round(plain_ms, 3),
                "recorded_ms": RECORDED_MS,
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
