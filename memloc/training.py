"""Train a network: ``train`` is the loop over epochs, ``fit`` the same from a recipe, kept on disk and shared."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from memloc import datasets, dropout, fairdropout, labelnoise, models, parallel, runs, spurious_images
from memloc.datasets import Data
from memloc.evaluation import autocast, evaluate
from memloc.mat import MATLoss
from memloc.observers import Batch, Observer
from memloc.pairs import Pair, held_out_logits
from memloc.randomness import derive, generator, seeded
from memloc.recipes import VERSION, Recipe, Settings, check_one_of, learning_rate

__all__ = [
    "cross_entropy",
    "first_epoch",
    "fit",
    "learned_epoch",
    "load_model",
    "pick_device",
    "prepare",
    "train",
]


Loss = Callable[[Tensor, Batch], Tensor]
Stop = Callable[[Sequence[Mapping[str, Any]]], bool]


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each example in nats, shape ``(B,)``: the default loss of :func:`train`."""
    return F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)


class _Loop:
    """A training at some epoch: all that changes while it runs, and how to save and load it."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        loss: Loss,
        observers: Sequence[Observer],
        examples: Tensor | None = None,
        frozen_buffers: bool = False,
    ) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "gradients are off here and a training needs them: leave torch.no_grad() or inference_mode()"
            )
        self.device = data.train.images.device
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload] # torch's stub lacks it
        models.check_images(model, data.train.images, data.num_classes)
        graphs = [observer.name for observer in observers if observer.needs_graph]
        if settings.compile and graphs:
            raise ValueError(f"compile must be False for observers that compute gradients, got True with {graphs}")
        self.forward = torch.compile(model) if settings.compile else model
        self.data, self.settings, self.loss, self.observers = data, settings, loss, observers
        self.examples = data.train.indices if examples is None else _chosen(examples, data.train.noise_mask)
        _check_processes(self)
        parallel.spread(model)  # a network of your own may have other initial weights in each process
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.still = _owners_of_frozen_buffers(model) if frozen_buffers else []
        self.optimizer = torch.optim.SGD(
            list(self.parameters.values()),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def step(self, batch: Batch, rate: float) -> None:
        """Take one step of gradient descent, for which each process computes the gradient of its share of the batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        whole = len(batch.indices)
        batch = Batch(*(parallel.share(getattr(batch, field.name)) for field in fields(batch)))
        if len(batch.indices):  # the last batch of an epoch may be too small for all processes
            with autocast(self.device, self.settings.precision), dropout.examples(self.model, batch.indices):
                losses = self.loss(self.logits(batch), batch)
            for observer in self.observers:
                observer.before_backward(self.model, losses, batch)
            self.scaler.scale(losses.mean() * (len(batch.indices) / whole)).backward()
        parallel.sum_gradients(self.parameters.values())
        if self.observers:
            self.scaler.unscale_(self.optimizer)
        for observer in self.observers:
            observer.after_backward(self.model, batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def logits(self, batch: Batch) -> Tensor:
        """Run the network, and say so where batch-norm finds a single value in a batch of one example."""
        try:
            return self.forward(batch.images)
        except ValueError as error:
            if len(batch.images) > 1:
                raise
            many = f" in {parallel.size()} processes" if parallel.size() > 1 else ""
            got = f"{self.settings.batch_size} for {len(self.examples)} examples{many} ({error})"
            raise ValueError(f"batch_size must not leave a batch of one, got {got}: choose another") from error

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the examples to train on in an order that depends on the seed and the epoch alone."""
        train, seed = self.data.train, self.settings.seed
        order = torch.randperm(len(self.examples), generator=generator(seed, "order", epoch)).to(self.device)
        augmentation = generator(seed, "augment", epoch)
        for indices in self.examples[order].split(self.settings.batch_size):
            images = train.images[indices]
            if self.settings.augment:
                images = datasets.augment(images, augmentation)
            images = images.contiguous(memory_format=self.memory_format)
            yield Batch(images, train.labels[indices], train.noise_mask[indices], indices)

    def train_epoch(self, epoch: int) -> None:
        """Take all the steps of an epoch, counted from 1."""
        self.model.train()
        for module in self.still:
            module.training = False
        steps = math.ceil(len(self.examples) / self.settings.batch_size)
        for step, batch in enumerate(self.batches(epoch)):
            done = (epoch - 1 + (step + 0.5) / steps) / self.settings.epochs
            self.step(batch, learning_rate(self.settings, done))
        self.model.train()
        parallel.spread(self.model)

    def evaluate(self, epoch: int) -> dict[str, Any]:
        """Evaluate the network after an epoch, tell the observers, and return what the history says of it."""
        settings = self.settings
        evaluation = evaluate(
            self.model, self.data, precision=settings.precision, channels_last=settings.channels_last, together=True
        )
        for observer in self.observers:
            observer.after_epoch(epoch, self.model, evaluation)
        found = {f"{name}_accuracy": value for name, value in asdict(evaluation.accuracies).items()}
        return {"epoch": epoch, "loss": evaluation.loss, **found}

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch (none if it is 0), evaluate, and return the history's row."""
        start, rank = time.perf_counter(), parallel.rank()
        purpose = ("dropout", epoch, rank) if rank else ("dropout", epoch)
        with seeded(self.settings.seed, *purpose):  # evaluation too: some networks never stop dropping
            if epoch > 0:
                self.train_epoch(epoch)
            row = self.evaluate(epoch)
        return row | {"seconds": time.perf_counter() - start}

    def state(self) -> dict[str, Tensor]:
        """Return all that the next epoch needs."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"optimizer.{name}.{key}"] = value
        for key, value in self.scaler.state_dict().items():
            state[f"scaler.{key}"] = torch.tensor(value)
        for observer in self.observers:
            for key, value in observer.table().items():
                state[f"observer.{observer.name}.{key}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state that :meth:`state` returned."""
        self.model.load_state_dict(_under("model.", state))
        for name, parameter in self.parameters.items():
            for key, value in _under(f"optimizer.{name}.", state).items():
                self.optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({key: value.item() for key, value in _under("scaler.", state).items()})
        for observer in self.observers:
            observer.restore(_under(f"observer.{observer.name}.", state))


def _check_processes(loop: _Loop) -> None:
    """Refuse a training by another number of processes than its settings say, or one that cannot be shared."""
    count, wanted = parallel.size(), loop.settings.processes
    if count > 1 and isinstance(loop.model, Pair):
        raise ValueError(
            f"a Pair weighs whole batches, and a process here sees 1/{count} of them: "
            "train it in one alone (for loss 'mat' fit recipe.pair first, without torchrun)"
        )
    if wanted != count:
        how = f"start them with `torchrun --nproc-per-node={wanted}`" if count == 1 else f"set processes={count}"
        raise ValueError(f"processes must be the number of those that train, {count}, got {wanted}: {how}")
    fewest = min(loop.settings.batch_size, len(loop.examples))
    if fewest < count:
        raise ValueError(
            f"batch_size must give each of {count} processes an example, got {fewest}: choose a larger one"
        )
    steps = [getattr(Observer, name) for name in ("before_backward", "after_backward")]
    watching = [o.name for o in loop.observers if [type(o).before_backward, type(o).after_backward] != steps]
    if count > 1 and watching:
        raise ValueError(
            f"observers must leave batches alone that {count} processes share, got {watching}: use one process"
        )


def _chosen(examples: Tensor, mask: Tensor) -> Tensor:
    """Return the positions at which a mask of examples, as long as another, is true."""
    if examples.dtype != torch.bool or examples.shape != mask.shape or not examples.any():
        got = f"{examples.dtype} {tuple(examples.shape)} with {int(examples.sum())} of them"
        raise ValueError(f"examples must be bool {tuple(mask.shape)} and choose at least one, got {got}")
    return examples.nonzero()[:, 0].to(mask.device)


def _owners_of_frozen_buffers(model: nn.Module) -> list[nn.Module]:
    """List the modules that own buffers and train no parameter; one without parameters goes with what is before it."""
    is_trained, owners = next(model.parameters()).requires_grad, []
    for module in model.modules():
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        is_trained = any(own) if own else is_trained
        if not is_trained and any(True for _ in module.buffers(recurse=False)):
            owners.append(module)
    return owners


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    *,
    loss: Loss = cross_entropy,
    frozen: Iterable[str] = (),
    frozen_buffers: bool = False,
    examples: Tensor | None = None,
    stop: Stop | None = None,
    observers: Sequence[Observer] = (),
    progress: bool | None = None,
) -> pd.DataFrame:
    """Train a network in place.

    Neither observers nor evaluation change the result, and torch's global generators are as before afterwards.

    Under torchrun all processes train the network together (:mod:`memloc.parallel`): let each call this with the same
    arguments, and the data on its own device, which ``"cuda"`` is after :func:`memloc.parallel.join`. What the network
    or the loss remembers of single examples, outside of trained parameters, each process remembers for its share only,
    and of buffers those of the first are kept after each epoch.

    Args:
        model: Any network that gives logits of shape ``(B, K)``. It is moved to the device of the data.
        data: Training and test examples.
        settings: How to train; a :class:`memloc.recipes.Recipe` will do.
        loss: Gives the loss of each example, shape ``(B,)``, from logits and batch; the step follows their mean. With
            several processes it is given the share of one, so it must not look at the rest of the batch.
        frozen: Layer groups (:func:`memloc.models.layer_groups`) whose parameters stay as they are. Batch-norm
            statistics are buffers, not parameters, and move all the same, unless:
        frozen_buffers: Whether the buffers of frozen layer groups stay as well, because their modules are in evaluation
            mode while the others are trained.
        examples: Which training examples to train on, all the others being evaluated only. Bool, shape ``(N,)``; None
            takes all.
        stop: Asked after each epoch, given the rows of the history so far, whether to end the training early.
        observers: What watches the training. With several processes it can watch epochs, not batches.
        progress: Whether to show a bar with the time left; None shows it on a terminal only.

    Returns:
        The history, one row an epoch from 0 (before training): ``epoch``, ``loss`` (mean cross-entropy on the training
        set), ``clean_accuracy``, ``noisy_accuracy``, ``restored_accuracy``, ``test_accuracy`` (fractions, in
        evaluation mode; NaN where there are no such examples), ``seconds``.

    Raises:
        ValueError: If the network cannot take the images or the last batch, a frozen layer group is unknown, no
            parameter or no example is left to train, or ``settings.processes`` is not how many processes there are.
        RuntimeError: If gradients are switched off where it is called.

    Source:
        Maini et al. (2023), reference code, sections 1.4 and 2a of its description.

    Example:
        >>> data = labelnoise.apply(datasets.load("digits", examples=64), "flip", 0.25, seed=0)
        >>> history = train(models.mlp(64), data, Settings(epochs=2, batch_size=16, learning_rate=0.1))
        >>> list(history.epoch)
        [0, 1, 2]
    """
    parallel.join()
    with _freeze(model, frozen):
        loop = _Loop(model, data, settings, loss, observers, examples, frozen_buffers)
        rows: list[dict[str, Any]] = []
        for epoch in _counted(range(settings.epochs + 1), "training", progress):
            rows.append(loop.epoch(epoch))
            if stop is not None and parallel.agreed(stop(rows)):
                break
    return pd.DataFrame(rows)


@contextmanager
def _freeze(model: nn.Module, frozen: Iterable[str]) -> Iterator[None]:
    """Let the parameters of some layer groups have no gradient inside the block."""
    groups = models.layer_groups(model)
    names = list(frozen)
    for name in names:
        check_one_of("frozen", name, groups)
    still = [model.get_parameter(name) for group in names for name in groups[group]]
    still = [parameter for parameter in still if parameter.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model must have a parameter to train, got none: leave a layer group out of frozen")
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def _counted(epochs: Iterable[int], label: str, progress: bool | None) -> Iterable[int]:
    """Show a bar, unless told not to; with None, tqdm shows it on a terminal only."""
    hidden = None if progress is None else not progress
    return tqdm(epochs, desc=label, unit="epoch", disable=hidden if parallel.rank() == 0 else True)


def pick_device(name: str) -> torch.device:
    """Choose a device by name.

    Args:
        name: ``"auto"`` (a GPU where there is one, else the CPU), or a torch device such as ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: If the name is none, or there is no such device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ValueError(f"device must be one that this machine has, got {name!r}: choose 'auto' or 'cpu'") from error


def prepare(recipe: Recipe, device: str | torch.device = "cpu") -> Data:
    """Load the data of a recipe and replace its labels.

    Args:
        recipe: Says which data, and which noise.
        device: Where the tensors go; ``"auto"`` takes a GPU where there is one.

    Returns:
        Training examples with noisy labels, test examples as they are. A :class:`memloc.groups.GroupedData` where the
        recipe has an attribute.

    Raises:
        ValueError: If the data set can have no attribute, or not the noise.
        FileNotFoundError: If the data are not on this machine; the message has the command that gets them.
    """
    which: dict[str, Any] = {"size": recipe.size, "examples": recipe.examples, "device": pick_device(str(device))}
    if recipe.attribute == "none":
        data = datasets.load(recipe.dataset, **which)
    else:
        which |= {"seed": recipe.seed, "correlation": recipe.correlation, "opacity": recipe.opacity}
        data = spurious_images.load(recipe.dataset, recipe.attribute, **which)
        if recipe.attribute == "colour":
            return data  # its wrong labels are to stay, and noise would start from the true ones
    return labelnoise.apply(data, recipe.noise, recipe.noise_rate, recipe.seed)


def _build(recipe: Recipe, shape: Mapping[str, int], examples: int | None, labels: Tensor | None = None) -> nn.Module:
    """Build the network of a recipe, dropout included, for so many training examples; labels are for a new pair."""
    if recipe.loss == "xrm":
        alone = (replace(recipe, loss="cross_entropy", seed=derive(recipe.seed, "twin", twin)) for twin in "AB")
        first, second = (_build(twin, shape, examples) for twin in alone)
        return Pair(first, second, torch.zeros(examples or 0).long() if labels is None else labels, recipe.seed)
    model = models.build(recipe.model, width=recipe.width, seed=recipe.seed, **shape)
    places = list(dropout.slots(model)) if recipe.dropout_places == "all" else recipe.dropout_places.split(",")
    tied: dict[str, Any] = {"count": examples, "p_gen": recipe.p_gen, "p_mem": recipe.p_mem, "seed": recipe.seed}
    if recipe.dropout == "fair":
        for place in places:
            fairdropout.insert(model, place, **tied)
        return model
    return dropout.insert(model, recipe.dropout, places=places, rate=recipe.dropout_rate, **tied)


def _loss(recipe: Recipe, model: nn.Module, data: Data, progress: bool | None) -> Loss:
    """Choose the loss of a recipe; for memorization-aware training the pair is fitted first."""
    if isinstance(model, Pair):
        return model.loss
    if recipe.loss == "cross_entropy":
        return partial(cross_entropy, label_smoothing=recipe.label_smoothing)
    train, device = data.train, data.train.images.device
    # No two processes wait for each other: whoever holds the run of a pair never asks for another.
    pair = load_model(fit(recipe.pair, device=device, checkpoints=[], progress=progress), device=device)
    numerics: dict[str, Any] = {"precision": recipe.precision, "channels_last": recipe.channels_last}
    return MATLoss(held_out_logits(pair, train.images, **numerics), train.labels, recipe.temperature)


def load_model(run: runs.Run, epoch: int | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network of a run as it was after an epoch.

    Args:
        run: A finished run.
        epoch: One of ``run.epochs``; None takes the last.
        device: Where it goes.

    Returns:
        The network, in training mode; a :class:`memloc.pairs.Pair` where the recipe has the loss ``"xrm"``.

    Raises:
        KeyError: If the weights of that epoch were not kept.
        OSError: If the file is not what was written.
    """
    model = _build(run.recipe, run.provenance["shape"], run.provenance.get("examples"))
    model.load_state_dict(run.checkpoint(run.epochs[-1] if epoch is None else epoch))
    return model.to(pick_device(str(device)))


def fit(
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    checkpoints: Iterable[int] | None = None,
    observers: Sequence[Observer] = (),
    progress: bool | None = None,
) -> runs.Run:
    """Give the run of a recipe: load it if it is whole, resume it if it was interrupted, train it if it is new.

    Two processes that ask for the same run train it once; the second waits. A whole run that lacks a wanted epoch or
    observer is trained again with it, and keeps what it had. Where a recipe has the loss ``"mat"``, the run of its pair
    is given in the same way first (:attr:`memloc.recipes.Recipe.pair`).

    A recipe with several ``processes`` is trained by a script under torchrun, each of whose processes calls this. The
    first alone writes the run, and the others read it, so all must see one store. A run that is whole is loaded by any
    number of processes, one without torchrun too.

    Args:
        recipe: What to train.
        device: Where; ``"auto"`` takes a GPU where there is one, and under torchrun each process its own. Not part of
            the run's address.
        checkpoints: Epochs whose weights are wanted (0 for the initial ones); None keeps all. The last is always kept.
        observers: What watches the training; their tables lie in the run. When the run is loaded they are as if
            they had watched it.
        progress: Whether to show a bar with the time left; None shows it on a terminal only.

    Returns:
        The run.

    Raises:
        ValueError: If a wanted epoch is not in the training, two observers share a name, or a name is no word; or if
            the run is to be trained and ``recipe.processes`` is not how many processes there are.
        FileNotFoundError: If the data are not on this machine.
        OSError: If what is on disk is not what was written; the message says what to do.
    """
    parallel.join()
    device = pick_device(str(device))
    wanted = {recipe.epochs, *(range(recipe.epochs + 1) if checkpoints is None else checkpoints)}
    if not wanted <= set(range(recipe.epochs + 1)):
        raise ValueError(f"checkpoints must be epochs from 0 to {recipe.epochs}, got {sorted(wanted)}")
    watching = {observer.name: observer for observer in observers}
    if len(watching) < len(observers):
        raise ValueError(f"observers must have different names, got {[observer.name for observer in observers]}")
    for name in watching:
        if not name.isidentifier() or name.startswith(("epoch_", "resume_")):  # names of a run's own files
            raise ValueError(f"observers must have a word for a name, not epoch_… or resume_…, got {name!r}")

    with parallel.held_by_first(partial(runs.locked, recipe.address, wait=False)):
        old = runs.find(recipe.address, recipe)
        serves = old is not None and wanted <= set(old.epochs) and set(watching) <= set(old.tables)
        if parallel.agreed(serves):  # else a process that sees another store would train alone, and wait for the others
            run = old or runs.Follower(recipe.address, recipe).finish({}, {})
            for name, observer in watching.items():
                observer.restore(run.table(name))
            return run
        kept = {} if old is None else {name: old.table(name) for name in old.tables if name not in watching}
        if old is not None:
            wanted |= set(old.epochs)

        data = prepare(recipe, device)
        images = data.train.images
        shape = {"in_channels": images.shape[1], "size": images.shape[2], "num_classes": data.num_classes}
        model = _build(recipe, shape, len(images), data.train.labels)
        loop = _Loop(model, data, recipe, _loss(recipe, model, data, progress), observers)
        writer = (runs.Follower if parallel.rank() else runs.Writer)(recipe.address, recipe)
        with parallel.first_ahead():
            state = writer.resume(set(watching), wanted)
        if state is not None:
            loop.load(state)
        for epoch in _counted(range(len(writer.rows), recipe.epochs + 1), recipe.address, progress):
            row = loop.epoch(epoch)
            checkpoint = model.state_dict() if epoch in wanted else None
            writer.keep(row, loop.state(), set(watching), checkpoint)
        provenance = {
            "shape": shape,
            "examples": len(images),
            "version": VERSION,
            "torch": torch.__version__,
            "device": str(images.device),
        }
        with parallel.first_ahead():
            return writer.finish({name: observer.table() for name, observer in watching.items()} | kept, provenance)


def first_epoch(history: pd.DataFrame, accuracy: str, level: float) -> int:
    """Find the first epoch at which an accuracy reaches a level.

    Args:
        history: As :func:`train` returns it.
        accuracy: A column of it, e.g. ``"noisy_accuracy"``.
        level: A fraction from 0 to 1.

    Returns:
        The epoch; one more than the last if the level is never reached.

    Example:
        >>> first_epoch(pd.DataFrame({"epoch": [0, 1, 2], "clean_accuracy": [0.1, 0.8, 0.95]}), "clean_accuracy", 0.9)
        2
    """
    reached = history.epoch[history[accuracy] >= level]
    return int(history.epoch.iloc[-1]) + 1 if reached.empty else int(reached.iloc[0])


def learned_epoch(predictions: Tensor, labels: Tensor) -> Tensor:
    """Find the epoch from which each example is right until the end of the training.

    Args:
        predictions: Predicted class after each epoch, from 0 (:class:`memloc.observers.Predictions`). Integer, shape
            ``(T + 1, N)``.
        labels: What counts as right. Integer, shape ``(N,)``.

    Returns:
        The epoch; ``T + 1`` for an example that is wrong at the end. Int64, shape ``(N,)``.

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        Ours; the last epoch of Toneva et al. (2019)'s forgetting events, plus one.

    Example:
        >>> learned_epoch(torch.tensor([[1, 2, 0], [0, 2, 0], [1, 2, 1]]), torch.tensor([1, 2, 0]))
        tensor([2, 0, 3])
    """
    if predictions.ndim != 2 or labels.shape != predictions.shape[1:]:
        shapes = f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"predictions and labels must have shapes (T + 1, N) and (N,), got {shapes}")
    wrong = predictions != labels
    epochs = torch.arange(1, len(wrong) + 1, device=wrong.device)
    return (wrong * epochs[:, None]).amax(0)
