"""Time a training step with gradient accounting beside a plain step and beside the reference's accounting step.

All three train the paper's ResNet-9 (width 64) on 32×32 images in fp32, a tenth of the labels wrong, on one thread:

- *plain*: a step of ``memloc.training``;
- *ours*: the same step watched by ``memloc.gradients.GradientAccounting``: two backward passes;
- *reference*: the step of the paper's code: one forward pass, three backward passes (clean, noisy, total), and a copy
  on the host of every gradient of each, added up there.

A backward pass costs about two forward passes, so that the limit of two is 5/3 of a plain step, and that of three 7/3.
CPU time is what counts: it depends little on what else the machine does. The rows are taken in turn, several times, and
the medians compared. Prints a table, then one line of JSON. With ``--batch 256`` the recorded costs stand beside them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc import datasets, labelnoise, models, training
from memloc.gradients import GradientAccounting
from memloc.observers import Batch, Observer
from memloc.randomness import generator
from memloc.recipes import Settings

REPEATS = 9
RECORDED_BATCH = 256
RECORDED = {"plain": 3.10, "reference": 7.22}  # CPU seconds a step at that batch, one AVX-512 server core


def make_data(batch: int) -> datasets.Data:
    """Make random images of 3×32×32 pixels: their content does not matter for time."""
    images = torch.rand((batch, 3, 32, 32), generator=generator(0, "images"))
    labels = torch.arange(batch) % 10
    data = datasets.from_arrays(images, labels, images[:16], labels[:16])
    return labelnoise.apply(data, "flip", 0.1, seed=0)


def make_loop(data: datasets.Data, observers: list[Observer]) -> tuple[training._Loop, Batch]:
    """Build the loop of every row, the network in training mode, and its one batch."""
    model = models.build("resnet9", in_channels=3, size=32, num_classes=10, seed=0)
    settings = Settings(epochs=1000, batch_size=len(data.train), learning_rate=0.01)
    loop = training._Loop(model.train(), data, settings, training.cross_entropy, observers)
    return loop, next(loop.batches(1))


def ours(data: datasets.Data, observers: list[Observer]) -> Callable[[], None]:
    """A step of our loop."""
    loop, batch = make_loop(data, observers)
    return lambda: loop.step(batch, 0.01)


def reference(data: datasets.Data) -> Callable[[], None]:
    """The step of the paper's code."""
    loop, batch = make_loop(data, [])
    model, optimizer = loop.model, loop.optimizer
    sums: dict[str, dict[str, Tensor]] = {part: {} for part in ("clean", "noisy", "total")}

    def keep(part: str, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            copy = parameter.grad.detach().clone().cpu()
            sums[part][name] = sums[part][name] + copy if name in sums[part] else copy

    def step() -> None:
        losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        noisy = batch.noise_mask
        for part, mask in (("clean", ~noisy), ("noisy", noisy)):
            optimizer.zero_grad()
            (mask.float().mean() * losses[mask].mean()).backward(retain_graph=True)
            keep(part, model)
        optimizer.zero_grad()
        losses.mean().backward()
        keep("total", model)
        optimizer.step()

    return step


def main() -> None:
    """Time every row in turn and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="steps of each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = make_data(arguments.batch)
    rows = {"plain": ours(data, []), "ours": ours(data, [GradientAccounting()]), "reference": reference(data)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for step in rows.values():
        step()  # warm-up
    for _ in range(arguments.repeats):
        for name, step in rows.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"{'row':<12}{'CPU s / step':>14}{'recorded':>10}{'of plain':>10}   (batch {arguments.batch}, median)")
    for name, median in medians.items():
        recorded = RECORDED.get(name, "") if arguments.batch == RECORDED_BATCH else ""
        print(f"{name:<12}{median:>14.3f}{recorded:>10}{median / medians['plain']:>10.2f}")
    print(
        json.dumps(
            {
                "step_over_plain": round(medians["ours"] / medians["plain"], 3),
                "reference_over_plain": round(medians["reference"] / medians["plain"], 3),
                "speedup_over_reference": round(medians["reference"] / medians["ours"], 3),
                "batch": arguments.batch,
                "seconds_per_step": {name: round(median, 3) for name, median in medians.items()},
                "load_average": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
