"""Reuse what an edit of a network leaves as it is: the module calls that end before the first edited one."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["Calls"]


class Calls:
    """The module calls of one forward pass: when each began and ended, and what it returned.

    A module whose only call ended before any edited module was called gives the same output in the edited network, so
    it need not run again. (Unless a module reads another's weights without calling it, or is never called: who edits
    weights must compare once. Outputs that are edited by hooks have no such exception.)

    Args:
        model: Any network.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> calls, images = Calls(model), torch.ones(2, 1)
        >>> with calls.recorded():
        ...     logits = model(images)
        >>> with calls.replayed(before=calls.start([model[1]])):
        ...     bool((model(images) == logits).all())
        True
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._clock = itertools.count()
        self._starts: dict[nn.Module, list[int]] = {}
        self._ends: dict[nn.Module, list[int]] = {}
        self._results: dict[nn.Module, tuple[int, Tensor, int]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the calls that are made inside the block."""
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(self._note_start))
            handles.append(module.register_forward_hook(self._note_result))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_start(self, module: nn.Module, inputs: object) -> None:
        self._starts.setdefault(module, []).append(next(self._clock))

    def _note_result(self, module: nn.Module, inputs: object, result: object) -> None:
        end = next(self._clock)
        self._ends.setdefault(module, []).append(end)
        if isinstance(result, Tensor):
            self._results[module] = (end, result, result._version)

    def start(self, modules: Iterable[nn.Module]) -> float:
        """Find when the first of some modules was first called: −1 if one never was, infinity for none."""
        return min((self._starts.get(module, [-1])[0] for module in modules), default=math.inf)

    def end(self, module: nn.Module, call: int) -> int:
        """Find when a call of a module ended, the first being call 0."""
        return self._ends[module][call]

    @contextmanager
    def replayed(self, *, before: float, times: int = 1) -> Iterator[None]:
        """Let what ended before a moment return what it returned before.

        Args:
            before: As :meth:`start` or :meth:`end` give it.
            times: How often the recorded batch is repeated along the first dimension of the new one.
        """
        replayed = [
            module
            for module, (end, result, version) in self._results.items()
            if end < before
            and len(self._starts[module]) == 1
            and result._version == version  # nothing has written into it since, as an in-place ReLU does
            and "forward" not in vars(module)
        ]
        for module in replayed:
            module.forward = partial(self._replay, module, times)
        try:
            yield
        finally:
            for module in replayed:
                vars(module).pop("forward", None)

    def _replay(self, module: nn.Module, times: int, *inputs: object, **keywords: object) -> Tensor:
        del module.forward  # the edited network may call it once more, on something else
        result = self._results[module][1]
        return result if times == 1 else torch.cat([result] * times)
