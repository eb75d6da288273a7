"""Random numbers from one seed and a purpose, without touching anybody else's."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Compute an independent seed for one purpose.

    Args:
        seed: The seed of the whole experiment.
        purpose: What the numbers are for, e.g. ``"order", 3`` for the order of the examples in epoch 3.

    Returns:
        The first 63 bits of the SHA-256 of seed and purpose, so that no two purposes share a sequence.

    Example:
        >>> derive(0, "order", 1) == derive(0, "order", 2)
        False
    """
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make a private CPU generator for one purpose.

    Args:
        seed: The seed of the whole experiment.
        purpose: What the numbers are for.

    Returns:
        A generator on the CPU, so that a GPU draws the same numbers as a laptop.

    Example:
        >>> torch.randperm(3, generator=generator(0, "order")).sum().item()
        3
    """
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block and put them back as they were afterwards.

    For code that offers no generator argument: the initialisation and the dropout of :mod:`torch.nn`.

    Args:
        seed: The seed of the whole experiment.
        purpose: What the numbers are for.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(0, "init"):
        ...     layer = torch.nn.Linear(2, 2)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    # Named one by one, because torch warns where it has to find several GPUs itself.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive(seed, *purpose))
        yield
