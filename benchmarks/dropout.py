"""Time example-tied dropout beside the least that any mask can cost, and beside the reference code's masks.

The floor is ``X * 2``: read the activations once, write them once. Beside it, forward only, on the activations of
ResNet-9 (width 64, batch 512, fp32) at its six places for dropout:

- *own*: the layer with its table of bits, in mode ``own``;
- *on the fly*: the layer without a table, which computes the masks;
- *reference*: what the published code does after its first epoch, a float mask of the activations' full size gathered
  by index (from 2,048 examples here: 60,000 would take 48.6 GiB at the six places).

Then the training step of ResNet-9 with six tied layers beside the plain step (batch 64, fp32). One thread; CPU time,
which depends little on what else the machine does; rows in turn, many times, and the minimum of each. Prints a table,
then one line of JSON.
"""

import json
import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from memloc import datasets, dropout, models, training
from memloc.dropout import ExampleTiedDropout
from memloc.observers import Batch
from memloc.randomness import generator
from memloc.recipes import Settings

BATCH, STEP_BATCH, EXAMPLES, IN_MEMORY = 512, 64, 60_000, 2_048
REPEATS, SLOW_REPEATS, STEP_REPEATS = 60, 5, 9
PLACES = {
    "conv0": (64, 32, 32),
    "conv1": (128, 16, 16),
    "sum1": (128, 16, 16),
    "conv4": (256, 16, 16),
    "sum2": (256, 8, 8),
    "conv7": (128, 6, 6),
}


def fastest(rows: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Take rows in turn, and the least CPU time of each in seconds."""
    best = dict.fromkeys(rows, float("inf"))
    for run in rows.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, run in rows.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def layer_times(shape: tuple[int, int, int]) -> tuple[dict[str, float], int]:
    """Time the forward at one place; also give the bytes of the layer's table."""
    rng = generator(0, "activations")
    activations = torch.randn((BATCH, *shape), generator=rng).relu_()
    indices = torch.randint(0, IN_MEMORY, (BATCH,), generator=rng)
    layer, unbounded = ExampleTiedDropout(shape[0], EXAMPLES), ExampleTiedDropout(shape[0])
    with torch.no_grad(), dropout.examples(nn.ModuleList([layer, unbounded]), indices):
        rows = {"floor": lambda: activations * 2, "own": lambda: layer(activations)}
        found = fastest(rows, REPEATS)
        found |= fastest({"on the fly": lambda: unbounded(activations)}, SLOW_REPEATS)
        cached = layer.masks_of(torch.arange(IN_MEMORY)).float()[:, :, None, None].repeat(1, 1, *shape[1:])
        found |= fastest({"reference": lambda: activations * cached[indices]}, SLOW_REPEATS)
    assert layer.masks is not None
    return found, layer.masks.nbytes


def step_times() -> dict[str, float]:
    """Time a training step of ResNet-9 without and with six tied layers."""
    rng = generator(0, "images")
    images = torch.randint(0, 256, (STEP_BATCH, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, 10, (STEP_BATCH,), generator=rng)
    data = datasets.from_arrays(images, labels, images, labels)
    rows = {}
    for kind in ("none", "tied"):
        model = models.build("resnet9", in_channels=3, size=32, num_classes=10, seed=0)
        dropout.insert(model, kind, count=EXAMPLES)
        rows[kind] = stepping(training._Loop(model.train(), data, Settings(), training.cross_entropy, []))
    return fastest(rows, STEP_REPEATS)


def stepping(loop: training._Loop) -> Callable[[], None]:
    """Give a function that takes one step on the whole data."""
    train = loop.data.train
    batch = Batch(train.images, train.labels, train.noise_mask, train.indices)
    return lambda: loop.step(batch, 0.01)


def print_row(place: str, shape: tuple[int, ...], times: Mapping[str, float]) -> None:
    """Print milliseconds, and what the layer and the reference code's mask cost beside the floor."""
    milliseconds = {name: 1e3 * seconds for name, seconds in times.items()}
    floor, own = milliseconds["floor"], milliseconds["own"]
    cells = [milliseconds[name] for name in ("floor", "own", "on the fly", "reference")]
    cells += [own / floor, own - floor, milliseconds["reference"] / floor]
    print(f"{place:<8}{'×'.join(map(str, shape)):<12}" + "".join(f"{cell:>12.3f}" for cell in cells))


def main() -> None:
    """Time every place and the step, and print the comparison."""
    torch.set_num_threads(1)
    header = ("floor ms", "own ms", "on the fly", "reference", "own/floor", "own-floor", "ref/floor")
    print(f"{'place':<8}{'shape':<12}" + "".join(f"{name:>12}" for name in header))
    times: dict[str, dict[str, float]] = {}
    table_bytes = 0
    for place, shape in PLACES.items():
        times[place], nbytes = layer_times(shape)
        table_bytes += nbytes
        print_row(place, shape, times[place])
    together = {name: sum(each[name] for each in times.values()) for name in times["conv0"]}
    print_row("all six", (), together)
    step = step_times()
    print(f"training step, batch {STEP_BATCH}: plain {step['none']:.3f} s, tied {step['tied']:.3f} s")
    large = [each["own"] / each["floor"] for each in times.values() if each["floor"] >= 1e-3]
    small = [each["own"] - each["floor"] for each in times.values() if each["floor"] < 1e-3]
    print(
        json.dumps(
            {
                "mask_over_floor_sum": round(together["own"] / together["floor"], 3),
                "mask_over_floor_max": round(max(large), 3),
                "step_over_plain": round(step["tied"] / step["none"], 3),
                "table_bytes_60000": table_bytes,
                "small_difference_ms": round(1e3 * max(small, default=0.0), 3),
                "reference_over_floor_sum": round(together["reference"] / together["floor"], 2),
                "load_average": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
