"""Time the training loop beside its ceiling and beside the usual loop over a DataLoader.

All three train the small network on 28×28 images with bf16 autocast, channels_last and batches of 512, on one thread:

- *bare*: forward, backward and step on one batch that is there already, over and over: the ceiling;
- *ours*: an epoch of ``memloc.training``, evaluation apart;
- *usual*: a ``DataLoader`` with two worker processes over PIL images with torchvision's transforms.

CPU time of all processes is what counts: it depends little on what else the machine does. The rows are taken in turn,
several times, and the medians compared. Prints a table, then one line of JSON.
"""

import json
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc import datasets, models, training, vision
from memloc.randomness import generator
from memloc.recipes import Settings

EXAMPLES, BATCH, REPEATS = 10_240, 512, 5
SETTINGS = Settings(epochs=1000, batch_size=BATCH, precision="bf16", channels_last=True)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def make_data() -> datasets.Data:
    """Make random images of 28×28 pixels: their content does not matter for time."""
    images = torch.randint(0, 256, (EXAMPLES, 28, 28), dtype=torch.uint8, generator=generator(0, "images"))
    labels = torch.randint(0, 10, (EXAMPLES,), generator=generator(0, "labels"))
    return datasets.from_arrays(images, labels, images[:512], labels[:512])


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the network of every row, and the optimizer of the two loops that are not ours."""
    model = models.build("small_cnn", in_channels=1, size=28, num_classes=10, seed=0)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Take one step."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()


def bare(data: datasets.Data) -> Callable[[], None]:
    """The ceiling: one resident batch."""
    model, optimizer = make_model()
    images = data.train.images[:BATCH].contiguous(memory_format=torch.channels_last)
    labels = data.train.labels[:BATCH]

    def epoch() -> None:
        for _ in range(EXAMPLES // BATCH):
            step(model, optimizer, images, labels)

    return epoch


def ours(data: datasets.Data) -> Callable[[], None]:
    """The steps of an epoch of our loop."""
    model, _ = make_model()
    loop = training._Loop(model, data, SETTINGS, training.cross_entropy, [])
    return lambda: loop.train_epoch(1)


def evaluation(data: datasets.Data) -> Callable[[], None]:
    """What our loop does after the steps: evaluate on all the data."""
    model, _ = make_model()
    loop = training._Loop(model, data, SETTINGS, training.cross_entropy, [])

    def epoch() -> None:
        loop.evaluate(1)

    return epoch


def usual(data: datasets.Data) -> Callable[[], None]:
    """The loop that most code has: PIL images, torchvision's transforms, two workers."""
    torchvision = vision.torchvision()
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.5,), (0.5,))]
    )
    pixels = ((data.train.images * 0.5 + 0.5) * 255).round().to(torch.uint8)[:, 0].numpy()

    class Images(torch.utils.data.Dataset):
        """What torchvision's MNIST does for one example."""

        def __len__(self) -> int:
            return EXAMPLES

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            from PIL import Image

            return transform(Image.fromarray(pixels[index], mode="L")), int(data.train.labels[index])

    loader = torch.utils.data.DataLoader(Images(), BATCH, shuffle=True, num_workers=2)
    model, optimizer = make_model()

    def epoch() -> None:
        model.train()
        for images, labels in loader:
            step(model, optimizer, images.contiguous(memory_format=torch.channels_last), labels)

    return epoch


def main() -> None:
    """Time every row in turn and print the comparison."""
    torch.set_num_threads(1)
    data = make_data()
    rows = {"bare": bare(data), "ours": ours(data), "usual": usual(data), "evaluation": evaluation(data)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for epoch in rows.values():
        epoch()  # warm-up
    for _ in range(REPEATS):
        for name, epoch in rows.items():
            start = cpu_seconds()
            epoch()
            seconds[name].append(cpu_seconds() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"{'row':<12}{'images / CPU s':>16}{'of bare':>10}   ({EXAMPLES} images, median of {REPEATS})")
    for name, median in medians.items():
        print(f"{name:<12}{EXAMPLES / median:>16,.0f}{medians['bare'] / median:>10.2f}")
    print(
        json.dumps(
            {
                "loop_over_bare": round(medians["bare"] / medians["ours"], 3),
                "speedup_over_dataloader": round(medians["usual"] / medians["ours"], 3),
                "images_per_cpu_second": {name: round(EXAMPLES / median) for name, median in medians.items()},
                "load_average": round(os.getloadavg()[0], 1),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
