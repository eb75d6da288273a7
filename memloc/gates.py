"""Switch single units of any network off, in each row of a batch its own, and score every unit against an objective."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from memloc import randomness
from memloc.evaluation import autocast
from memloc.models import check_images, evaluation_mode
from memloc.replay import Calls

__all__ = ["UNITS", "ZERO", "Gates", "Unit"]

UNITS = ("channels", "all")
"""Which units there are: filters of convolutions and outputs of hidden linear layers, each with its bias; or filters,
every weight and bias of a linear layer, and every scale and shift of a norm."""

ZERO = ("before norm", "after activation")
"""Where a filter (or a linear output) is switched off: at the layer's own output, so that a norm behind it turns the
zero into a constant; or behind the norm and the activation that directly follow it."""

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish,
)  # fmt: skip
_IN_CACHE = 2**19  # numbers, 2 MB in single precision
_Site = tuple[nn.Module, int]  # a module, and which of its calls in one forward pass, from 0


@dataclass(frozen=True)
class Unit:
    """One unit of a network.

    Attributes:
        path: Of the layer whose channel it is, as in ``named_modules``; or of the parameter whose entry it is.
        index: The channel, or the position in the flattened parameter.
    """

    path: str
    index: int


@dataclass(frozen=True, eq=False)
class _Block:
    """Units that contribute to the outputs of one module by one formula.

    Removing a unit takes its contribution from the output; its score is the product of contribution and gradient. A
    channel contributes all of the output, a shift or a bias itself, a scale the output less the shift, and a weight
    its product with the input.
    """

    module: nn.Module
    path: str
    kind: str  # "channel", "scale", "shift" or "weight"
    count: int
    first: int  # position of its first unit among all

    @property
    def scores_output(self) -> bool:
        """Whether the scores are computed from the values of the output, rather than of the input or none."""
        is_scale = self.kind == "scale" and not isinstance(self.module, _BATCH_NORMS)
        return self.kind == "channel" or is_scale

    @property
    def _units_come_last(self) -> bool:
        """Whether the last dimensions of the output are the units', rather than the one behind the rows."""
        return isinstance(self.module, nn.LayerNorm | nn.RMSNorm | nn.Linear)

    def at_the_end(self, tensor: Tensor) -> Tensor:
        """View a tensor with the dimension of the units last."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            return tensor.flatten(tensor.ndim - len(self.module.normalized_shape))
        return tensor if self._units_come_last else tensor.movedim(1, -1)

    def _lay_out(self, by_row: Tensor, like: Tensor) -> Tensor:
        """Give values for each row and unit, shape ``(B, units)``, the dimensions of an output."""
        if not self._units_come_last:
            return by_row.view(*by_row.shape, *[1] * (like.ndim - 2))
        shape = getattr(self.module, "normalized_shape", (self.count,))
        return by_row.view(len(by_row), *[1] * (like.ndim - 1 - len(shape)), *shape)

    def _parameter(self, name: str) -> Tensor:
        """Return a parameter of the module without gradient; 0 where it has none."""
        found = getattr(self.module, name, None)
        return torch.zeros(1, device=next(self.module.parameters()).device) if found is None else found.detach()

    def remove(self, given: Tensor, inputs: Tensor, owner: Tensor, removed: Tensor) -> Tensor:
        """Take the contributions of removed units, pairs of owner and unit, from an output."""
        owners, units = removed.unbind(1)
        if self.kind == "weight":
            weight = self._parameter("weight").flatten()[units]
            out, into = units // inputs.shape[-1], units % inputs.shape[-1]
            its_rows = (owner[:, None] == owners).unflatten(0, (-1, *[1] * (given.ndim - 2)))
            return given.index_add(-1, out, (inputs[..., into] * weight * its_rows).to(given.dtype), alpha=-1)
        mask = torch.zeros(int(max(owner.max(), owners.max())) + 1, self.count, dtype=given.dtype, device=given.device)
        mask[owners, units] = 1
        if self.kind != "shift":
            given = given * self._lay_out(1 - mask[owner], given)
        if self.kind != "channel":  # a scale leaves the shift behind
            shift = self._lay_out(mask[owner] * self._parameter("bias").flatten().to(given.dtype), given)
            given = given + (shift if self.kind == "scale" else -shift)
        return given

    def score(
        self,
        scores: Tensor,
        output: Tensor,
        inputs: Tensor,
        gradient: Tensor,
        owner: Tensor,
        sums: Callable[[], Tensor],
    ) -> None:
        """Add contribution × gradient, summed over an owner's rows, to ``scores`` of shape ``(owners, units)``.

        A scale and a shift share ``sums``, the gradient summed over positions.
        """
        if self.kind == "weight":
            weight = self._parameter("weight").float()
            sizes = owner.bincount(minlength=len(scores)).tolist()
            for mine, pull, seen in zip(scores, gradient.split(sizes), inputs.split(sizes), strict=True):
                mine += (pull.float().flatten(0, -2).T @ seen.float().flatten(0, -2) * weight).flatten()
            return
        gradient = self.at_the_end(gradient)
        shift = self._parameter("bias").flatten()
        if self.kind == "shift":
            products = sums() * shift
        elif self.kind == "channel":
            products = _row_dots(gradient, self.at_the_end(output))
        elif self.scores_output:
            products = _row_dots(gradient, self.at_the_end(output)) - sums() * shift
        else:  # from the input, because an activation in place may have written into the output
            mean, variance = self.module.get_buffer("running_mean"), self.module.get_buffer("running_var")
            scale = self._parameter("weight") / (variance + self.module.eps).sqrt()  # type: ignore[operator] # eps is a float
            products = (_row_dots(gradient, self.at_the_end(inputs)) - mean * sums()) * scale
        scores.index_add_(0, owner, products.float())


def _row_sums(tensor: Tensor) -> Tensor:
    """Sum over all but the first and the last dimension, in single precision."""
    return tensor.sum(tuple(range(1, tensor.ndim - 1)), dtype=torch.float32) if tensor.ndim > 2 else tensor


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Sum products as :func:`_row_sums` does, a few rows at a time, so that they stay in the processor's cache."""
    rows = max(1, _IN_CACHE // max(1, left[0].numel()))
    return torch.cat([_row_sums(a * b) for a, b in zip(left.split(rows), right.split(rows), strict=True)])


@dataclass(eq=False)
class _Pass:
    """One forward pass: whose rows are whose, what is removed, and where scores go."""

    owner: Tensor
    removed: dict[_Block, Tensor]
    scores: Tensor | None
    calls: Counter[nn.Module]


class Gates:
    """A network whose units can be switched off, in each row of a batch its own.

    Inside :meth:`attached` the network is in evaluation mode, its parameters have no gradient, and hooks edit and score
    the outputs of its layers. No weight is ever written; afterwards everything is as it was.

    Args:
        model: Any network. Units belong to convolutions, linear layers and norms that are called as modules.
        images: At least one image, float32, shape ``(N, C, H, W)``; one is traced to see in which order modules call.
        units: One of :data:`UNITS`. With ``"channels"`` the layer that is called last does not count if it gives the
            logits: its outputs are classes.
        zero: One of :data:`ZERO`.
        batch_size: Rows at a time that :meth:`scores` runs forward.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        channels_last: Whether to lay the images out as NHWC.

    Raises:
        ValueError: If a choice is unknown, there is no image, no unit, or a batch-norm without running statistics.

    Source:
        The gradient with respect to a gate at a layer's output equals the sum over the filter of weight × gradient.

    Example:
        >>> gates = Gates(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 2))
        >>> gates.unit(2)
        Unit(path='0', index=2)
        >>> with gates.attached():
        ...     gates.logits(torch.ones(4, 2), [[], [0, 1, 2]]).shape
        torch.Size([2, 4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        units: str = "channels",
        zero: str = "before norm",
        batch_size: int = 256,
        precision: str = "fp32",
        channels_last: bool = False,
    ):
        if units not in UNITS:
            raise ValueError(f"units must be one of {', '.join(UNITS)}, got {units!r}")
        if zero not in ZERO:
            raise ValueError(f"zero must be one of {', '.join(ZERO)}, got {zero!r}")
        if not len(images):
            raise ValueError("images must hold at least one image, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_images(model, images)
        self._model, self._precision, self._batch_size = model, precision, batch_size
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._pass: _Pass | None = None
        self.blocks: list[_Block] = []
        self._at: dict[_Site, list[_Block]] = {}
        self._sites_of: dict[_Block, list[_Site]] = {}
        trace = _Trace(model, images[:1])
        self.classes = trace.classes
        self._overwritten_inputs, self._overwritten_outputs = trace.overwritten()
        for path, module in model.named_modules():
            if trace.sites(module):
                self._add(path, module, trace, units, zero)
        if not self.blocks:
            raise ValueError("model must call a convolution or a hidden linear layer as a module, calls none")
        self.count = sum(block.count for block in self.blocks)

    def _add(self, path: str, module: nn.Module, trace: "_Trace", units: str, zero: str) -> None:
        """Make the blocks of one module."""
        for kind, name, count in _kinds(module, units, gives_logits=trace.gives_logits(module)):
            first = self.blocks[-1].first + self.blocks[-1].count if self.blocks else 0
            block = _Block(module, f"{path}.{name}".strip("."), kind, count, first)
            behind = zero == "after activation" and kind == "channel"
            for site in trace.sites(module):
                site = trace.behind(site) if behind else site
                self._at.setdefault(site, []).append(block)
                self._sites_of.setdefault(block, []).append(site)
            self.blocks.append(block)

    def unit(self, position: int) -> Unit:
        """Name the unit at a position among all units."""
        block = next(block for block in self.blocks if position < block.first + block.count)
        return Unit(block.path, position - block.first)

    def position(self, unit: Unit) -> int:
        """Find a unit's position among all units.

        Raises:
            ValueError: If the network has no such unit.
        """
        for block in self.blocks:
            if block.path == unit.path and 0 <= unit.index < block.count:
                return block.first + unit.index
        known = ", ".join(f"{block.path} (0 to {block.count - 1})" for block in self.blocks[:9])
        raise ValueError(f"units must be units of the network, such as {known}; got {unit}")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the network in evaluation mode and hook onto its layers inside the block."""
        learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(randomness.seeded(0, "gates"))  # some networks never stop dropping
            stack.enter_context(evaluation_mode(self._model))
            for module in {module for module, _ in self._at}:
                stack.callback(module.register_forward_hook(self._on_output).remove)
            try:
                for parameter in learning:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in learning:
                    parameter.requires_grad_(True)

    @contextmanager
    def removed(self, positions: Sequence[int]) -> Iterator[None]:
        """Let the network, called by anybody in any mode, compute without some units inside the block."""
        with ExitStack() as stack:
            for module in {module for module, _ in self._at}:
                stack.callback(module.register_forward_hook(self._on_output).remove)

            def begin(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                self._begin(next(iter([*inputs, *named.values()])), positions)

            stack.callback(self._model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(setattr, self, "_pass", None)
            yield

    def _begin(self, images: Tensor, positions: Sequence[int]) -> None:
        owner = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self._pass = _Pass(owner, self._by_block([positions], owner.device), None, Counter())

    def _by_block(self, removed: Sequence[Sequence[int]], device: torch.device) -> dict[_Block, Tensor]:
        """Sort pairs of owner and unit, int64 ``(n, 2)``, by the block of the unit."""
        pairs = torch.tensor([(row, at) for row, each in enumerate(removed) for at in each], device=device)
        found: dict[_Block, Tensor] = {}
        for block in self.blocks if len(pairs) else ():
            mine = pairs[(pairs[:, 1] >= block.first) & (pairs[:, 1] < block.first + block.count)]
            if len(mine):
                found[block] = mine - torch.tensor([0, block.first], device=device)
        return found

    def _on_output(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Remove what is removed here, and arrange for the rest to be scored."""
        run = self._pass
        if run is None:
            return None
        site = (module, run.calls[module])
        run.calls[module] += 1
        blocks = self._at.get(site, [])
        if blocks and len(output) != len(run.owner):
            raise ValueError(f"model must keep images apart along the first dimension, {blocks[0].path} does not")
        if run.scores is not None and not output.requires_grad:
            output = output.detach().requires_grad_()
        given = output
        for block in sorted(blocks, key=lambda block: block.kind == "channel"):  # a whole channel takes all with it
            if block in run.removed:
                given = block.remove(given, inputs[0], run.owner, run.removed[block])
        if run.scores is None:
            return None if given is output else given
        # What is written into afterwards must be neither a leaf nor a view, whose hooks would be lost, nor be needed.
        is_needed = output.is_leaf or output._is_view() or any(block.scores_output for block in blocks)
        if given is output and site in self._overwritten_outputs and is_needed:
            given = output.clone()
        seen, kept = inputs[0].detach(), output.detach()
        if site in self._overwritten_inputs and not all(block.scores_output for block in blocks):
            seen = seen.clone()
        scores, owner = run.scores, run.owner

        def add(gradient: Tensor) -> None:
            norm = next((block for block in blocks if block.kind != "channel"), blocks[0])
            sums = cache(lambda: _row_sums(norm.at_the_end(gradient)))
            for block in blocks:
                block.score(scores[:, block.first : block.first + block.count], kept, seen, gradient, owner, sums)

        given.register_hook(add)
        return given

    @contextmanager
    def _running(self, run: _Pass) -> Iterator[None]:
        self._pass = run
        try:
            with autocast(run.owner.device, self._precision):
                yield
        finally:
            self._pass = None

    def record(self, images: Tensor) -> tuple[Tensor, Calls]:
        """Compute the logits of the whole network, shape ``(B, K)``, and record its calls for :meth:`logits`."""
        calls = Calls(self._model)
        with torch.no_grad(), autocast(images.device, self._precision), calls.recorded():
            return self._model(images.contiguous(memory_format=self._memory_format)).float(), calls

    def logits(self, images: Tensor, removed: Sequence[Sequence[int]], calls: Calls | None = None) -> Tensor:
        """Compute the logits of several edited networks on the same images in one pass.

        Args:
            images: Shape ``(B, C, H, W)``.
            removed: Positions of the units that each of T networks lacks.
            calls: :meth:`record` of the same images: what lies before the first removed unit is not computed again.

        Returns:
            Float32, shape ``(T, B, K)``.
        """
        times, size = len(removed), len(images)
        rows = images if times == 1 else torch.cat([images] * times)
        if calls is None:
            return self.row_logits(rows, removed).unflatten(0, (times, size))
        with calls.replayed(before=self.start([at for each in removed for at in each], calls), times=times):
            return self.row_logits(rows, removed).unflatten(0, (times, size))

    def row_logits(self, images: Tensor, removed: Sequence[Sequence[int]]) -> Tensor:
        """Compute the logits of several edited networks, each on images of its own.

        Args:
            images: Equally many of each network, one network after the other. Shape ``(T·B, C, H, W)``.
            removed: Positions of the units that each of T networks lacks.

        Returns:
            Float32, shape ``(T·B, K)``.
        """
        owner = torch.arange(len(removed), device=images.device).repeat_interleave(len(images) // len(removed))
        run = _Pass(owner, self._by_block(removed, images.device), None, Counter())
        with torch.no_grad(), self._running(run):
            return self._model(images.contiguous(memory_format=self._memory_format)).float()

    def start(self, positions: Sequence[int], calls: Calls) -> float:
        """Find the moment from which on a network without some units differs from the whole one."""
        blocks = {block for block in self.blocks for at in positions if 0 <= at - block.first < block.count}
        # The edited module itself may be replayed: it is the hook on its output that edits.
        return min((calls.end(*site) + 1 for block in blocks for site in self._sites_of[block]), default=float("inf"))

    def scores(
        self,
        images: Tensor,
        owner: Tensor,
        removed: Sequence[Sequence[int]],
        pull: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute the first-order effect that removing each unit has on an objective: how much it would fall.

        Args:
            images: Rows of all networks. Shape ``(B, C, H, W)``.
            owner: Which network each row belongs to, in ascending order. Int64, shape ``(B,)``.
            removed: Positions of the units that each of T networks lacks already.
            pull: Gives the gradient of the objective with respect to the logits, shape ``(B, K)``.

        Returns:
            The sum over an owner's rows of contribution × gradient. Float32, shape ``(T, units)``; 0 if removed.
        """
        scores = torch.zeros(len(removed), self.count, device=images.device)
        if not len(images):
            return scores
        by_block, parts = self._by_block(removed, images.device), []
        for rows, mine in zip(images.split(self._batch_size), owner.split(self._batch_size), strict=True):
            with torch.enable_grad(), self._running(_Pass(mine, by_block, scores, Counter())):
                parts.append(self._model(rows.contiguous(memory_format=self._memory_format)))
        logits = torch.cat(parts)
        gradient = pull(logits.detach().float())
        if gradient.any():
            scale = gradient.abs().max()  # so that nothing underflows in half precision
            logits.backward((gradient / scale).to(logits.dtype))
            scores *= scale
        for mine, positions in zip(scores, removed, strict=True):
            mine[list(positions)] = 0
        return scores


def _kinds(module: nn.Module, units: str, *, gives_logits: bool) -> list[tuple[str, str, int]]:
    """List the units of a module: kind, name within the module, and how many."""
    if isinstance(module, _CONVOLUTIONS):
        return [] if gives_logits else [("channel", "", module.out_channels)]
    if isinstance(module, nn.Linear) and units == "channels":
        return [] if gives_logits else [("channel", "", module.out_features)]
    if units == "channels" or isinstance(module, _ACTIVATIONS):
        return []
    kinds = {"weight": "weight" if isinstance(module, nn.Linear) else "scale", "bias": "shift"}
    tensors = {name: getattr(module, name, None) for name in kinds}
    return [(kinds[name], name, tensor.numel()) for name, tensor in tensors.items() if tensor is not None]


class _Trace:
    """What one forward pass tells about the calls of convolutions, linear layers, norms and activations."""

    def __init__(self, model: nn.Module, images: Tensor):
        self._calls: list[tuple[_Site, Tensor, Tensor, int, int]] = []
        times: Counter[nn.Module] = Counter()

        def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                site = (module, times[module])
                self._calls.append((site, inputs[0], output, inputs[0]._version, output._version))
            times[module] += 1

        wanted = (_CONVOLUTIONS, nn.Linear, *_NORMS, *_ACTIVATIONS)
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, _BATCH_NORMS) and module.running_mean is None:
                    raise ValueError("model must have batch-norms with running statistics: without, images interact")
                if isinstance(module, wanted):
                    stack.callback(module.register_forward_hook(note).remove)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(randomness.seeded(0, "trace"))
            stack.enter_context(evaluation_mode(model))
            logits = model(images.clone())  # the versions of tensors of inference mode are not counted
        self.classes = logits.shape[1]
        last = next((call for call in reversed(self._calls) if isinstance(call[0][0], _CONVOLUTIONS | nn.Linear)), None)
        self._last = last[0][0] if last and last[2].shape == logits.shape else None

    def overwritten(self) -> tuple[set[_Site], set[_Site]]:
        """Find the calls into whose input, and into whose output, something has written since."""
        inputs = {site for site, given, _, version, _ in self._calls if given._version != version}
        outputs = {site for site, _, output, _, version in self._calls if output._version != version}
        return inputs, outputs

    def sites(self, module: nn.Module) -> list[_Site]:
        """List the calls of a module."""
        return [site for site, *_ in self._calls if site[0] is module]

    def gives_logits(self, module: nn.Module) -> bool:
        """Say whether a module is called last and gives an output a class."""
        return module is self._last

    def behind(self, site: _Site) -> _Site:
        """Find the activation, or else the norm, that the output of a call goes into directly."""
        sites = [call[0] for call in self._calls]
        at = sites.index(site)
        for kinds in (_NORMS, _ACTIVATIONS):
            output = self._calls[at][2]
            later = range(at + 1, len(self._calls))
            at = next((k for k in later if self._calls[k][1] is output and isinstance(sites[k][0], kinds)), at)
        return sites[at]
