"""Several processes that train one network: each computes its share of every batch, and all take the same step.

Start a script that calls :func:`memloc.training.fit` with torchrun, and give its recipe as many ``processes``. A script
that nobody started so is a group of one process, for which nothing here does anything.

A process in which a training fails has to end, which lets torchrun end the others at once. One that catches the error
and goes on leaves them waiting, for half an hour.

Torchrun itself listens on all network interfaces and asks nobody for a password: use it where the network is trusted.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta

import filelock
import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "agreed",
    "first_ahead",
    "gathered",
    "held_by_first",
    "join",
    "rank",
    "share",
    "size",
    "spread",
    "sum_gradients",
]

_TIMEOUT = timedelta(minutes=30)  # of a process that waits for others; torchrun ends it at once where one of them dies


def join() -> None:
    """Join the group of processes that torchrun started, through gloo and, where there are GPUs, NCCL.

    With GPUs, ``"cuda"`` is from now on that of this process, the one of its ``LOCAL_RANK``. A group that was joined
    before stays as it is. :func:`memloc.training.fit` and :func:`memloc.training.train` call this first.

    Raises:
        ValueError: If ``WORLD_SIZE`` in the environment is no number of processes, or the rest of what torchrun sets is
            not there.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"WORLD_SIZE must be a number of processes, as torchrun sets it, got {count!r}: unset it")
    if int(count) == 1 or dist.is_initialized():
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def size() -> int:
    """Count the processes of the group; 1 where there is none.

    Example:
        >>> size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Give the number of this process in the group, from 0, the first, which alone writes runs.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if size() > 1 else 0


def share(examples: Tensor) -> Tensor:
    """Take the part of this process: as many in a row as the others have, or one more in the first processes.

    Args:
        examples: All of them, the same in every process. Shape ``(B, …)``.

    Returns:
        A view, shape ``(⌊B / size⌋ or one more, …)``; without a row for the last processes where B is below the size.

    Example:
        >>> share(torch.tensor([3, 1, 4]))
        tensor([3, 1, 4])
    """
    return examples if size() == 1 else examples.tensor_split(size())[rank()]


def gathered(part: Tensor, count: int) -> Tensor:
    """Put the parts of all processes together again, as :func:`share` has split them.

    Args:
        part: What this process has computed for its share. Shape ``(B / size, …)``.
        count: B.

    Returns:
        The whole, the same in every process. Shape ``(B, …)``.

    Example:
        >>> gathered(torch.tensor([3, 1, 4]), 3)
        tensor([3, 1, 4])
    """
    if size() == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    share(whole).copy_(part)
    dist.all_reduce(whole)
    return whole


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace ``parameter.grad`` by its sum over all processes, in place.

    One that has no gradient in some process counts as zero there; one that has none in any process keeps none, so that
    the optimiser leaves it alone as in a training by one process. Infinities and NaN of one process reach all, so that
    the loss scaling of fp16 leaves out the same steps everywhere.

    Args:
        parameters: The same in every process, in the same order.
    """
    if size() == 1:
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    counts = torch.tensor([float(p.grad is not None) for p in parameters], device=gradients[0].device)
    flat = torch.cat([gradient.reshape(-1) for gradient in [*gradients, counts]])
    dist.all_reduce(flat)
    *sums, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, gradient, total, count in zip(parameters, gradients, sums, counts.tolist(), strict=True):
        parameter.grad = gradient.copy_(total.view_as(gradient)) if count else None


def spread(model: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first, in place."""
    if size() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        content = tensor.detach().clone(memory_format=torch.contiguous_format)
        content = content.view(-1).view(torch.uint8)  # as bytes, whatever the type
        dist.broadcast(content, 0)
        tensor.detach().copy_(content.view(tensor.dtype).view(tensor.shape))


def agreed(decision: bool) -> bool:
    """Give all processes the decision of the first.

    Example:
        >>> agreed(True)
        True
    """
    if size() == 1:
        return decision
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"  # for a group of somebody else's, of NCCL alone
    flag = torch.tensor(int(decision), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


@contextmanager
def held_by_first(hold: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold something in the first process alone, from before any process enters the block until all have left it.

    Args:
        hold: Gives what is to be held, such as a lock on a file, which the other processes of the group must not wait
            for. While entering it raises :class:`filelock.Timeout`, as somebody else holds it, it is asked for again.

    Example:
        >>> from contextlib import nullcontext
        >>> with held_by_first(nullcontext):
        ...     size()
        1
    """
    with ExitStack() as held:
        while not agreed(rank() > 0 or _is_entered(held, hold)):  # each time anew, so that no process times out
            time.sleep(0.1)
        yield
        _wait_for_all()


def _is_entered(held: ExitStack, hold: Callable[[], AbstractContextManager[None]]) -> bool:
    try:
        held.enter_context(hold())
    except filelock.Timeout:
        return False
    return True


@contextmanager
def first_ahead() -> Iterator[None]:
    """Let the other processes into the block when the first has been through it; all leave it together.

    Example:
        >>> with first_ahead():
        ...     rank()
        0
    """
    if rank() > 0:
        _wait_for_all()
    yield
    if rank() == 0:
        _wait_for_all()
    _wait_for_all()


def _wait_for_all() -> None:
    """Go on when every process of the group has come here; after an exception none does, and the others time out."""
    if size() > 1:
        dist.barrier()
