"""Time the search for critical units beside the loop of the reference code.

ResNet-9 at full width, trained once on 1,024 images (ten prototypes and noise, one label in ten wrong); a reference
batch of 64 images, five copies; six noisy and six clean targets; one thread. The rows:

- *reference*: edits the weights of a copy of the network, one target at a time, and runs every copy of the batch
  forward and backward through everything, as the reference code does (recorded: 2.66 s a step on such a core);
- *parity*: the same objective and units through gates, channels_last: no weight has a gradient, targets of one batch
  share the first step, only a target's own copies are run to see whether it has flipped, and 32 images run at a time;
- *target copied*: the copies are of the target alone, the batch stays as it is;
- *bf16*: the same in bf16;
- *default*: and the first step shared, what lies before the first removed unit reused, and reference examples that
  carry 5 % of the gradient left out;
- *channels*: the same with channels for units.

A step of the reference is timed as the difference between a search of one step and one of none; what it would take for
a target is that times the steps that parity mode took for it, which removes the same units. CPU time counts: it depends
less on what else the machine does. Prints a table, then one line of JSON.
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc import datasets, labelnoise, models, training
from memloc.flipping import PARITY, CriticalChannels, critical_channels
from memloc.randomness import generator
from memloc.recipes import Settings

EXAMPLES, BATCH, COPIES, EACH, STEPS = 1024, 64, 5, 6, 1
RECORDED_S = 2.66  # a step of the reference code on a server core with AVX-512


def reference_units(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, tensor and partner of what holds units: a convolution's bias goes with its weight."""
    modules = dict(model.named_modules())
    for name, tensor in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        is_convolution = isinstance(modules[path], nn.Conv2d)
        if is_convolution and own_name == "bias":
            continue
        yield (path if is_convolution else name), tensor, modules[path].bias if is_convolution else None


def reference_search(
    model: nn.Module, copies: Tensor, labels: Tensor, position: int, *, noise: str, max_units: int = 200
) -> list[tuple[str, int]]:
    """Search as the reference code does: edit the weights of a copy of the network, for one target at a time.

    Args:
        model: The network, in evaluation mode; it is copied.
        copies: Disturbed copies of a batch. Shape ``(E, B, C, H, W)``.
        labels: Of the batch. Int64, shape ``(B,)``.
        position: The target's place in the batch.
        noise: ``"independent"`` averages logits, as the code's last version does; ``"accumulated"`` averages gradients
            and looks at the last copy's logits, as the version of the paper.
        max_units: Where to stop; the reference code never does.

    Returns:
        The units in the order in which they were removed.
    """
    model = copy.deepcopy(model)
    weights = torch.ones(len(labels))
    weights[position] = -len(labels)
    removed: list[tuple[str, int]] = []
    while True:
        model.zero_grad()
        logits = torch.stack([model(each) for each in copies])
        if noise == "independent":
            seen = logits.mean(0)
            objective = (weights * F.cross_entropy(seen, labels, reduction="none")).mean()
        else:
            seen = logits[-1]
            losses = [F.cross_entropy(each, labels, reduction="none") for each in logits]
            objective = sum((weights * each).mean() for each in losses) / len(logits)
        if seen[position].argmax() != labels[position] or len(removed) == max_units:
            return removed
        objective.backward()
        best, where = 0.0, None
        for name, tensor, bias in reference_units(model):
            scores = tensor.detach() * tensor.grad
            scores = scores.flatten(1).sum(1) if tensor.ndim == 4 else scores.flatten()
            if bias is not None:
                scores = scores + bias.detach() * bias.grad
            if scores.max() > best:
                best, where = scores.max().item(), (name, int(scores.argmax()), tensor, bias)
        if where is None:
            return removed
        name, index, tensor, bias = where
        with torch.no_grad():
            if tensor.ndim == 4:
                tensor[index] = 0
            else:
                tensor.view(-1)[index] = 0
            if bias is not None:
                bias[index] = 0
        removed.append((name, index))


def make_data() -> datasets.Data:
    """Make images around ten prototypes, one label in ten wrong."""
    draw = generator(0, "toy")
    prototypes = torch.randn(10, 3, 32, 32, generator=draw)
    labels = torch.randint(0, 10, (EXAMPLES,), generator=draw)
    images = (prototypes[labels] + 2 * torch.randn(EXAMPLES, 3, 32, 32, generator=draw)) / 4
    data = datasets.from_arrays(images, labels, images[:BATCH], labels[:BATCH])
    return labelnoise.apply(data, "flip", 0.1, seed=0)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time one call."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def time_reference(model: nn.Module, data: datasets.Data, batch: Tensor, position: int) -> tuple[float, float]:
    """Time a step of the reference and its last look, and check that parity mode removes the same units."""
    images, labels = data.train.images[batch], data.train.labels[batch]
    noise = torch.randn(COPIES, *images.shape, generator=generator(0, "noise"))
    noise *= 0.01 * images.norm() / noise.flatten(1).norm(dim=1)[:, None, None, None, None]

    def search(steps: int) -> list[tuple[str, int]]:
        return reference_search(model, images + noise, labels, position, noise="independent", max_units=steps)

    look, _ = cpu_seconds(lambda: search(0))
    whole, removed = cpu_seconds(lambda: search(STEPS))
    ours = ours_on(model, data, batch, batch[position : position + 1], **PARITY, max_units=STEPS)
    if [(unit.path, unit.index) for unit in ours.units[0]] != removed:
        raise RuntimeError(f"parity mode removed {ours.units[0]}, the reference {removed}")
    return (whole - look) / STEPS, look


def ours_on(model: nn.Module, data: datasets.Data, batch: Tensor, targets: Tensor, **choices: Any) -> CriticalChannels:
    """Search for targets of one batch."""
    train, draw = data.train, generator(0, "noise")
    choices = {"channels_last": True, "batch_size": 64} | choices
    return critical_channels(
        model, train.images, train.labels, targets, reference=batch, copies=COPIES, generator=draw, **choices
    )


def main() -> None:
    """Train, time every row and print the comparison."""
    torch.set_num_threads(1)
    data = make_data()
    model = models.build("resnet9", in_channels=3, size=32, num_classes=10, width=64, seed=0)
    settings = Settings(epochs=8, batch_size=128, learning_rate=0.1, precision="bf16", channels_last=True)
    history = training.train(model, data, settings, progress=False)
    print(f"trained: noisy {history.noisy_accuracy.iloc[-1]:.3f}, clean {history.clean_accuracy.iloc[-1]:.3f}")
    model.eval()
    noisy, clean = (mask.nonzero()[:, 0] for mask in (data.train.noise_mask, ~data.train.noise_mask))
    targets = torch.cat([noisy[:EACH], clean[:EACH]])
    batch = torch.cat([targets, clean[EACH : EACH + BATCH - len(targets)]])

    rows: dict[str, dict[str, Any]] = {
        "parity": PARITY | {"batch_size": 32},
        "target copied": {"skipped": 0.0},
        "bf16": {"skipped": 0.0, "precision": "bf16"},
        "default": {"precision": "bf16"},
        "channels": {"precision": "bf16", "units": "channels"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    counts: dict[str, list[int]] = {name: [] for name in rows}
    steps, looks = [], []

    def measure(name: str, some: Tensor) -> None:
        used, found = cpu_seconds(lambda: ours_on(model, data, batch, some, **rows[name]))
        seconds[name].append(used / len(some))
        counts[name] += found.table().units.tolist()

    pairs = list(zip(targets[:EACH], targets[EACH:], strict=True))  # noisy and clean
    for number, pair in enumerate(pairs):
        step, look = time_reference(model, data, batch, int((batch == pair[number % 2]).nonzero()[0, 0]))
        steps.append(step)
        looks.append(look)
        if number % 2:
            measure("parity", torch.stack(pairs[number - 1] + pair))
            measure("target copied", torch.stack(pair))
            measure("bf16", torch.stack(pair))
            measure("default", torch.stack(pairs[number - 1] + pair))
            measure("channels", torch.stack(pairs[number - 1] + pair))
    report(statistics.median(steps), statistics.median(looks), seconds, counts)


def report(step: float, look: float, seconds: dict[str, list[float]], counts: dict[str, list[int]]) -> None:
    """Print the table and the line of JSON."""
    a_target = {name: statistics.mean(each) for name, each in seconds.items()}
    a_unit = {name: a_target[name] / statistics.mean(counts[name]) for name in seconds}
    reference = statistics.mean(counts["parity"]) * step + look
    print(f"{'row':<15}{'CPU s / unit':>13}{'speed-up':>10}{'CPU s / target':>16}{'median units':>14}{'targets':>9}")
    print(f"{'reference':<15}{step:>13.3f}{1:>10.2f}{reference:>16.2f}   (recorded: {RECORDED_S} s a unit)")
    for name, found in counts.items():
        print(
            f"{name:<15}{a_unit[name]:>13.3f}{step / a_unit[name]:>10.2f}{a_target[name]:>16.2f}"
            f"{statistics.median(found):>14.1f}{len(found):>9}"
        )
    print(
        json.dumps(
            {
                "parity_speedup": round(reference / a_target["parity"], 2),
                "default_speedup": round(reference / a_target["default"], 2),
                "median_units_parity": statistics.median(counts["parity"]),
                "median_units_default": statistics.median(counts["default"]),
                "reference_s_a_step": round(step, 2),
                "recorded_s_a_step": RECORDED_S,
                "load_average": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
