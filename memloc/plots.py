"""One function for each kind of figure: tables in, matplotlib axes out.

Colours are Okabe and Ito's, told apart by colour-blind readers, and each has a marker or line style of its own.
Backgrounds are transparent and text is dark, so that a page can turn the figure for its dark mode.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D
from torch import Tensor

from memloc.intervals import interval

__all__ = [
    "accuracy_bar_panels",
    "accuracy_bars",
    "accuracy_curves",
    "accuracy_panels",
    "anchor",
    "by_kind",
    "by_kind_panels",
    "clouds",
    "curve_fits",
    "decision_maps",
    "double_descent",
    "error_dots",
    "flipping",
    "flipping_panels",
    "gallery",
    "geometry",
    "gradient_cosines",
    "gradient_lines",
    "gradient_norms",
    "gradient_panels",
    "gradient_parts",
    "group_bars",
    "group_histograms",
    "heat_maps",
    "influence_scatter",
    "learned_histogram",
    "method_dots",
    "method_shares",
    "recovery",
    "recovery_panels",
    "retraining",
    "rewinding",
    "rewinding_lines",
    "rewinding_panels",
    "ridge_sweep",
    "rollback_lines",
    "rollback_panels",
    "set_style",
    "treatment_bars",
    "treatment_panels",
    "treatments",
    "unit_bars",
]

_CURVES = {  # column: what the reader sees, colour, line, marker
    "clean_accuracy": ("clean", "#009E73", "-", "o"),
    "noisy_accuracy": ("noisy", "#D55E00", "--", "s"),
    "restored_accuracy": ("noisy, true label", "#0072B2", "-.", "^"),
    "test_accuracy": ("test", "#555555", ":", "D"),
}
_HATCHES = ("", "///", "...", "xxx")  # of bars, in the order of the curves
_NORMS = {  # column: colour, line, marker
    "clean_norm": ("#009E73", "-", "o"),
    "noisy_norm": ("#D55E00", "--", "s"),
    "total_norm": ("#0072B2", "-.", "^"),
}
_KINDS = (  # of examples, in the order in which a table has them: colour, line, marker
    ("#D55E00", "--", "s"),
    ("#0072B2", "-", "o"),
    ("#CC79A7", "-.", "^"),
    ("#555555", ":", "D"),
    ("#009E73", "-", "v"),
)
_GEOMETRY = {  # column: its unit
    "capacity": "manifolds per feature",
    "radius": "norms of the centre",
    "dimension": "directions",
}
_PARTS = {  # of a gradient, column: what the reader sees
    "dependent_norm": "label-dependent",
    "independent_norm": "label-independent",
    "total_norm": "sum",
}
_SIZED = {  # measure of networks of several sizes, column: what the reader sees
    "test_accuracy": "accuracy (fraction)",
    "radius": "radius (norms of the centre)",
    "dimension": "dimension (directions)",
}
_TREATMENTS = {  # treatment of batch-norm: colour, hatching
    "keep": ("#D55E00", ""),
    "rewind": ("#0072B2", "///"),
    "recalibrate": ("#009E73", "..."),
}
_PHASES = {  # moment of a retraining, or its treatment of batch-norm: colour, hatching
    "after the reset": ("#999999", ""),
    "keep": ("#D55E00", ""),
    "follow": ("#0072B2", "///"),
    "whole network": ("#009E73", "..."),
}


def set_style() -> None:
    """Let every figure of this process look like the book's: transparent, frameless, drawn as SVG."""
    mpl.rcParams.update(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "savefig.format": "svg",
            "figure.constrained_layout.use": True,
            "figure.figsize": (6.4, 3.6),
            "font.size": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#000000",
            "grid.alpha": 0.12,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
        }
    )


def accuracy_curves(curves: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Draw accuracies over epochs: the mean over seeds, and the range from the lowest to the highest seed as a band.

    Args:
        curves: Histories of one or more seeds, one below the other, with a column ``seed``.
        axes: Where to draw; None makes a new figure.

    Returns:
        The axes.
    """
    axes = axes or plt.subplots()[1]
    for column, (label, color, line, marker) in _CURVES.items():
        by_epoch = curves.groupby("epoch")[column].agg(["mean", "min", "max"]).dropna()
        every = max(1, len(by_epoch) // 10)
        axes.plot(by_epoch.index, by_epoch["mean"], line, color=color, marker=marker, markevery=every, label=label)
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel="accuracy (fraction)", ylim=(-0.02, 1.02))
    return axes


def accuracy_panels(curves: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw :func:`accuracy_curves` of several runs side by side.

    Args:
        curves: Histories by the title of the panel; none gives a panel that says so.

    Returns:
        The axes, one a run.
    """
    axes = _panels(list(curves))
    for each, table in zip(axes, curves.values(), strict=False):
        accuracy_curves(table, each)
    _legend_below(axes[0])
    return axes


def learned_histogram(clean: Tensor, noisy: Tensor, last_epoch: int) -> Axes:
    """Draw the epochs from which clean and noisy examples are right until the end.

    Args:
        clean: :func:`memloc.training.learned_epoch` of the clean examples. Int64, shape ``(N,)``.
        noisy: The same of the noisy ones.
        last_epoch: T; examples beyond it were never learned.

    Returns:
        The axes.
    """
    axes = plt.subplots()[1]
    bins = np.arange(last_epoch + 3) - 0.5
    for column, epochs, hatch in (("clean_accuracy", clean, ""), ("noisy_accuracy", noisy, "///")):
        label, color, _, _ = _CURVES[column]
        weights = np.full(len(epochs), 1 / max(1, len(epochs)))
        axes.hist(
            epochs.cpu().numpy(), bins.tolist(), weights=weights, color=color, alpha=0.65, hatch=hatch,
            edgecolor="white", linewidth=0.3, label=f"{label}, N = {len(epochs)}",
        )  # fmt: skip
    axes.set(xlabel="epoch from which the example is right until the end", ylabel="share of the examples (fraction)")
    axes.legend()
    return axes


def gradient_norms(table: pd.DataFrame, window: int = 5) -> Sequence[Axes]:
    """Draw the norms of the clean, the noisy and the total gradient over the layer groups, as the training goes on.

    Args:
        table: Rows of :meth:`memloc.gradients.Accounting.table`, with a column ``seed``.
        window: Epochs over which a panel averages.

    Returns:
        One axes a window: the mean over seeds, the range over seeds as a band.

    Source:
        Maini et al. (2023), the figures of gradient accounting.
    """
    starts = (table.epoch - 1) // window * window + 1
    columns, count = 4, starts.nunique()
    rows = -(-count // columns)
    grid = plt.subplots(rows, columns, figsize=(9, 2.1 * rows + 0.6), squeeze=False, sharex=True, sharey=True)[1]
    axes = list(grid.flat)
    for each, (start, epochs) in zip(axes, table.groupby(starts), strict=False):
        gradient_lines(epochs, each)
        end = epochs.epoch.max()
        each.set_title(f"epochs {start}–{end}" if end > start else f"epoch {start}", fontsize=10)
        each.tick_params(axis="x", rotation=90)
    for number in range(count, len(axes)):
        axes[number].set_axis_off()
        axes[number - columns].tick_params(labelbottom=True)
    for first in grid[:, 0]:
        first.set_ylabel("norm / √size")
    _legend_below(axes[0])
    return axes[:count]


def gradient_panels(tables: Mapping[str, pd.DataFrame], names: Sequence[str] = ("clean", "noisy")) -> Sequence[Axes]:
    """Draw the norms of gradients over the layer groups, averaged over all epochs, of several trainings side by side.

    Args:
        tables: Tables as :func:`gradient_norms` takes them, by the title of the panel; none gives a panel that says so.
        names: What the two parts of the training set are called.

    Returns:
        The axes, one a table.

    Source:
        Maini et al. (2023), the combined figure of gradient accounting.
    """
    axes = _panels(list(tables))
    for each, table in zip(axes, tables.values(), strict=False):
        gradient_lines(table, each, names)
        each.tick_params(axis="x", rotation=45)
        each.set(xlabel="layer group", ylabel="norm / √size")
    _legend_below(axes[0])
    return axes


def gradient_lines(table: pd.DataFrame, axes: Axes, names: Sequence[str] = ("clean", "noisy")) -> Axes:
    """Draw one panel of :func:`gradient_norms` or :func:`gradient_panels`.

    Args:
        table: As :func:`gradient_norms` takes it.
        axes: Where to draw.
        names: As :func:`gradient_panels` takes them.

    Returns:
        The axes, with a logarithmic scale.
    """
    groups = list(table.layer_group.unique())
    seeds = table.groupby(["seed", "layer_group"])[list(_NORMS)].mean()
    for (column, (color, line, marker)), label in zip(_NORMS.items(), (*names, "total"), strict=True):
        found = seeds[column].groupby("layer_group").agg(["mean", "min", "max"]).loc[groups]
        found = found.where(found["mean"] > 0)  # a part without examples has no place on a logarithmic scale
        axes.plot(groups, found["mean"], line, color=color, marker=marker, label=label)
        axes.fill_between(groups, found["min"], found["max"], color=color, alpha=0.2, linewidth=0)
    _log_scale(axes)
    return axes


def gradient_cosines(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw the cosine between the gradients of two parts of the training set as a heat map of epoch and layer group.

    Args:
        tables: Tables with columns ``epoch``, ``layer_group`` and ``cosine``, of one or more seeds, by the title of the
            panel; none gives a panel that says so.

    Returns:
        The axes, one a table: means over seeds from −1 to 1, empty where there is no cosine.

    Source:
        Maini et al. (2023), the heat maps of gradient accounting.
    """
    axes = _panels(list(tables), sharey=False)
    for each, table in zip(axes, tables.values(), strict=False):
        groups = list(table.layer_group.unique())
        means = table.groupby(["epoch", "layer_group"]).cosine.mean().unstack()[groups]
        mesh = each.pcolormesh(means.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="face", linewidth=0.3)
        each.set_xticks(np.arange(len(groups)) + 0.5, groups, rotation=45)
        shown = np.arange(0, len(means), max(1, len(means) // 8))
        each.set_yticks(shown + 0.5, [str(epoch) for epoch in means.index[shown]])
        each.set(xlabel="layer group", ylabel="epoch")
        each.grid(False)
        each.invert_yaxis()
    if tables:
        axes[0].figure.colorbar(mesh, ax=axes, label="cosine")
    return axes


def gradient_parts(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw the norms of the label-dependent and the label-independent part of gradients, and of their sum, over epochs.

    Args:
        table: Rows of :meth:`memloc.early_gradients.GradientParts.table`, with columns ``kind`` (of examples),
            ``epoch`` and ``seed``.

    Returns:
        The axes row by row, one row a part and one column a layer group, drawn by :func:`by_kind` with a logarithmic
        scale of norms and one of epochs that begins with epoch 0.

    Source:
        Stephenson et al. (2021), Figure A.1.
    """
    groups = list(table.layer_group.unique())
    size = (1.2 + 1.6 * len(groups), 6.2)
    grid = plt.subplots(len(_PARTS), len(groups), sharex=True, sharey="col", squeeze=False, figsize=size)[1]
    for row, (column, label) in zip(grid, _PARTS.items(), strict=True):
        for axes, group in zip(row, groups, strict=True):
            by_kind(table[table.layer_group == group], "epoch", column, axes)
            axes.set(xlabel="", yscale="log")
            axes.set_xscale("symlog", linthresh=1)
        row[0].set_ylabel(f"norm,\n{label}")
    for top, bottom, group in zip(grid[0], grid[-1], groups, strict=True):
        top.set_title(group)
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_formatter("{x:g}")
    _legend_below(grid[0, 0])
    return list(grid.flat)


def gallery(images: Tensor, titles: Sequence[str], columns: int = 6) -> Sequence[Axes]:
    """Draw images with a title each.

    Args:
        images: Scaled to −1 … 1, one or three channels. Shape ``(B, C, H, W)``.
        titles: B short texts.
        columns: Images in a row.

    Returns:
        The axes, one an image; without images one that says so.
    """
    if not len(images):
        return _panels([])
    rows = max(1, -(-len(images) // columns))
    figure, grid = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.85 * rows), squeeze=False)
    figure.set_facecolor("white")
    for axes in grid.flat:
        axes.set_axis_off()
    used = list(grid.flat)[: len(images)]
    for axes, image, title in zip(used, images.cpu(), titles, strict=True):
        pixels = (image.permute(1, 2, 0).numpy() * 0.5 + 0.5).clip(0, 1)
        axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8)
    return used


def rewinding(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw what rewinding each layer group to each epoch leaves of the accuracy on clean and on noisy examples.

    Args:
        table: Rows of :meth:`memloc.rewinding.Rewinding.table`, with a column ``seed``.

    Returns:
        Two rows of axes, clean and noisy, with a column for each treatment of the batch-norm statistics, drawn by
        :func:`rewinding_lines`.

    Source:
        Maini et al. (2023), the figure of layer rewinding, for ``keep``.
    """
    found = list(table.batch_norm.unique())
    size = (1.2 + 3.2 * len(found), 6.4)
    grid = plt.subplots(2, len(found), sharex=True, sharey=True, figsize=size, squeeze=False)[1]
    for row, column in zip(grid, ("clean_accuracy", "noisy_accuracy"), strict=True):
        for each, treatment in zip(row, found, strict=True):
            rewinding_lines(table[table.batch_norm == treatment], column, each)
        row[0].set_ylabel(f"accuracy, {_CURVES[column][0]} (fraction)")
    for top, bottom, treatment in zip(*grid, found, strict=True):
        top.set_title(f"statistics: {treatment}")
        bottom.set_xlabel("layer group rewound")
    _legend_below(grid[0, 0], title="rewound to epoch")
    return list(grid.flat)


def rewinding_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw what rewinding each layer group to each epoch leaves of the accuracy on noisy examples, for several runs.

    Args:
        tables: Tables as :func:`rewinding` takes them, under one treatment, by the title of the panel; none gives a
            panel that says so.

    Returns:
        The axes, one a run.
    """
    axes = _panels(list(tables))
    epochs = sorted({epoch for table in tables.values() for epoch in table.epoch})
    for each, table in zip(axes, tables.values(), strict=False):
        rewinding_lines(table, "noisy_accuracy", each, epochs)
        each.set(xlabel="layer group rewound", ylabel="noisy accuracy (fraction)")
    _legend_below(max(axes, key=lambda each: len(each.get_lines())), title="rewound to epoch")
    return axes


def rewinding_lines(table: pd.DataFrame, column: str, axes: Axes, epochs: Sequence[int] | None = None) -> Axes:
    """Draw one panel of :func:`rewinding`.

    Args:
        table: As :func:`rewinding` takes it, under one treatment.
        column: What to draw, e.g. ``"noisy_accuracy"``.
        axes: Where to draw.
        epochs: What the colours stand for, where several panels share them; None takes those of the table.

    Returns:
        The axes: the mean over seeds by layer group, a line for each epoch (the later, the darker), and the range over
        seeds as a band.
    """
    groups, epochs = list(table.layer_group.unique()), sorted(table.epoch.unique()) if epochs is None else epochs
    ranges = table.groupby(["epoch", "layer_group"])[column].agg(["mean", "min", "max"])
    colors = dict(zip(epochs, mpl.colormaps["viridis_r"](np.linspace(0.45, 1, len(epochs))), strict=True))
    for epoch in sorted(table.epoch.unique()):
        color = colors[epoch]
        seen = ranges.loc[epoch].loc[groups]
        axes.plot(groups, seen["mean"], color=color, marker=_CURVES[column][3], label=str(epoch))
        axes.fill_between(groups, seen["min"], seen["max"], color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(axis="x", rotation=45)
    return axes


def rollback_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw the test accuracy after layer groups were put back to some epochs, between two lines to compare with.

    Args:
        tables: One row a choice of layer groups, epoch and, unless they are means already, seed: ``layer_group``,
            ``rewound_to`` (the role of the epoch in its training, such as ``"1/2"`` or ``"best"``), ``test_accuracy``,
            ``final_accuracy`` and ``best_accuracy`` (those of the last epoch and of early stopping), by the title of
            the panel. None gives a panel that says so.

    Returns:
        The axes, one a table and two in a row, which share a scale, drawn by :func:`rollback_lines`, with a dashed line
        for early stopping and a dotted one for the last epoch, both means over seeds.

    Source:
        Stephenson et al. (2021), layer rewinding.
    """
    axes = _panels(list(tables), sharey="row")
    roles = list(dict.fromkeys(role for table in tables.values() for role in table.rewound_to))
    for each, table in zip(axes, tables.values(), strict=False):
        rollback_lines(table, each, roles)
        each.axhline(table.best_accuracy.mean(), color="black", linestyle="--", label="early stopping")
        each.axhline(table.final_accuracy.mean(), color="black", linestyle=":", label="last epoch")
    _legend_below(max(axes, key=lambda each: len(each.get_lines())), title="rewound to epoch")
    return axes


def rollback_lines(table: pd.DataFrame, axes: Axes, roles: Sequence[str]) -> Axes:
    """Draw the lines of one panel of :func:`rollback_panels`.

    Args:
        table: As :func:`rollback_panels` takes it.
        axes: Where to draw.
        roles: The values of ``rewound_to`` in their order, which gives each its colour and marker.

    Returns:
        The axes: the mean over seeds by layer group, a line for each role, and the range over seeds as a band.
    """
    groups = list(table.layer_group.unique())
    ranges = table.groupby(["rewound_to", "layer_group"]).test_accuracy.agg(["mean", "min", "max"])
    colors = mpl.colormaps["viridis_r"](np.linspace(0.3, 1, len(roles)))
    for role, color, marker in zip(roles, colors, itertools.cycle("so^Dv"), strict=False):
        if role in ranges.index:
            seen = ranges.loc[role].loc[groups]
            axes.plot(groups, seen["mean"], color=color, marker=marker, label=role)
            axes.fill_between(groups, seen["min"], seen["max"], color=color, alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right", rotation_mode="anchor")
    axes.set(xlabel="layer groups rewound", ylabel="test accuracy (fraction)")
    return axes


def treatments(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw what each layer group costs under each treatment of the batch-norm statistics.

    Args:
        table: Rows of :meth:`memloc.rewinding.Rewinding.table` at one epoch a seed, with a column ``seed``.

    Returns:
        Two axes with the same scale, accuracy lost on noisy and, as the control, on clean examples: a bar for the mean
        over seeds, a dot for each seed.
    """
    axes = _panels(["noisy examples", "clean examples (control)"])
    for each, column in zip(axes, ("noisy_lost", "clean_lost"), strict=True):
        treatment_bars(table, column, each)
    _legend_below(axes[0], title="batch-norm statistics")
    return axes


def treatment_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw the accuracy lost on noisy examples of several runs side by side.

    Args:
        tables: Tables as :func:`treatments` takes them, by the title of the panel; none gives a panel that says so.

    Returns:
        The axes, one a run.
    """
    axes = _panels(list(tables))
    for each, table in zip(axes, tables.values(), strict=False):
        treatment_bars(table, "noisy_lost", each)
    _legend_below(axes[0], title="batch-norm statistics")
    return axes


def treatment_bars(table: pd.DataFrame, column: str, axes: Axes) -> Axes:
    """Draw one panel of :func:`treatments`.

    Args:
        table: As :func:`treatments` takes it.
        column: What is lost, e.g. ``"noisy_lost"``.
        axes: Where to draw.

    Returns:
        The axes.
    """
    _bars(table, column, "batch_norm", _TREATMENTS, axes)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("layer group rewound")
    axes.set_ylabel("accuracy lost (fraction)")
    return axes


def retraining(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw the accuracies while each layer group is trained on clean examples, after it was reset.

    Args:
        table: Rows of :meth:`memloc.retraining.Retraining.table` for one treatment, with a column ``seed``.

    Returns:
        The axes, one a layer group, drawn by :func:`accuracy_curves`; what ended early keeps its last values.

    Source:
        Maini et al. (2023), the figure of layer retraining.
    """
    groups, epochs = list(table.layer_group.unique()), range(table.epoch.max() + 1)
    rows = -(-len(groups) // 3)
    grid = plt.subplots(rows, 3, sharex=True, sharey=True, figsize=(8.6, 0.8 + 2.3 * rows), squeeze=False)[1]
    for number, (each, group) in enumerate(zip(grid.flat, groups, strict=False)):
        runs = table[table.layer_group == group].groupby("seed")
        whole = [run.set_index("epoch").reindex(epochs).ffill().reset_index() for _, run in runs]
        accuracy_curves(pd.concat(whole), each)
        has_one_below = number + 3 < len(groups)
        each.set(title=group, xlabel="" if has_one_below else "epoch of retraining")
        each.set_ylabel("" if number % 3 else "accuracy (fraction)")
        each.tick_params(labelbottom=not has_one_below)
    for empty in list(grid.flat)[len(groups) :]:
        empty.set_axis_off()
    _legend_below(grid[0, 0])
    return list(grid.flat)[: len(groups)]


def recovery(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw which labels the noisy examples get right after the reset of each layer group, and after retraining it.

    Args:
        table: Rows of :meth:`memloc.retraining.Retraining.table`, the first and the last epoch at least, with a column
            ``seed``.

    Returns:
        Two axes, wrong labels and true ones: a bar for the mean over seeds, a dot for each seed.
    """
    axes = _panels(["wrong labels", "true labels"])
    for each, column in zip(axes, ("noisy_accuracy", "restored_accuracy"), strict=True):
        _bars(_phases(table), column, "phase", _PHASES, each)
        each.set(xlabel="layer group", ylabel="noisy examples (fraction)", ylim=(0, 1.02))
    _legend_below(axes[0])
    return axes


def recovery_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw the wrong labels after reset and after retraining of several runs side by side.

    Args:
        tables: Tables as :func:`recovery` takes them, by the title of the panel; none gives a panel that says so.

    Returns:
        The axes, one a run.
    """
    axes = _panels(list(tables))
    for each, table in zip(axes, tables.values(), strict=False):
        _bars(_phases(table), "noisy_accuracy", "phase", _PHASES, each)
        each.set(xlabel="layer group", ylabel="accuracy on noisy examples (fraction)", ylim=(0, 1.02))
    _legend_below(axes[0])
    return axes


def by_kind(table: pd.DataFrame, x: str, y: str, axes: Axes | None = None) -> Axes:
    """Draw one measure of several kinds of examples: the mean over seeds, and the range over seeds as a band.

    Args:
        table: One row a kind, seed and place on the horizontal axis: columns ``kind``, ``seed``, ``x`` and ``y``.
        x: The column along the horizontal axis, numbers or names, e.g. ``"layer_group"``.
        y: The column of the measure.
        axes: Where to draw; None makes a new figure.

    Returns:
        The axes, with a line for each of up to five kinds.
    """
    axes = axes or plt.subplots()[1]
    for kind, (color, line, marker) in zip(table.kind.unique(), _KINDS, strict=False):
        rows = table[table.kind == kind].groupby(x, sort=False)[y].agg(["mean", "min", "max"])
        every = max(1, len(rows) // 10)
        axes.plot(rows.index, rows["mean"], line, color=color, marker=marker, markevery=every, label=kind)
        axes.fill_between(rows.index, rows["min"], rows["max"], color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(x.replace("_", " "))
    if isinstance(table[x].iloc[0], str):
        axes.tick_params(axis="x", rotation=45)
    return axes


def by_kind_panels(
    panels: Mapping[str, pd.DataFrame],
    x: str,
    y: str | Sequence[str],
    ylabel: str,
    scales: tuple[str, str] = ("linear", "linear"),
) -> Sequence[Axes]:
    """Draw :func:`by_kind` side by side.

    Args:
        panels: Tables by the title of the panel; none gives a panel that says so.
        x: The column along the horizontal axis.
        y: The column of the measure, or one for each panel.
        ylabel: What the vertical axes show, with its unit.
        scales: Of the horizontal and of the vertical axes, ``"linear"`` or ``"log"``.

    Returns:
        The axes, one a panel.
    """
    axes = _panels(list(panels))
    columns = [y] * len(panels) if isinstance(y, str) else y
    for each, table, column in zip(axes, panels.values(), columns, strict=False):
        by_kind(table, x, column, each)
        each.set_ylabel(ylabel)
        if scales[0] != "linear":  # setting it would undo an axis of names
            each.set_xscale(scales[0])
        if scales[1] == "log":
            _log_scale(each)
    _legend_below(axes[0])
    return axes


def geometry(
    tables: Mapping[str, pd.DataFrame], x: str, xlabel: str, scales: tuple[str, str] = ("linear", "linear")
) -> Sequence[Axes]:
    """Draw capacity, radius and dimension of several kinds of manifolds beside each other.

    Args:
        tables: Tables as :func:`by_kind` takes them, with columns ``capacity``, ``radius`` and ``dimension``, by the
            title of the row of panels; none gives a panel that says so.
        x: The column along the horizontal axes.
        xlabel: What it is, with its unit.
        scales: Of the horizontal axes and of the capacity, ``"linear"`` or ``"log"``.

    Returns:
        The axes, three a table, row by row; the three columns have a scale each.
    """
    if not tables:
        return _panels([])
    size = (9.6, 0.7 + 2.7 * len(tables))
    grid = plt.subplots(len(tables), 3, sharey="col", squeeze=False, figsize=size)[1]
    for row, (title, table) in zip(grid, tables.items(), strict=True):
        for axes, (column, unit) in zip(row, _GEOMETRY.items(), strict=True):
            by_kind(table, x, column, axes).set(xlabel=xlabel, ylabel=f"{column} ({unit})", xscale=scales[0])
            axes.set_title(title, fontsize=10)
        if scales[1] == "log":
            _log_scale(row[0])
    _legend_below(grid[0, 0])
    return list(grid.flat)


def anchor(corners: Tensor, draw: Tensor, projection: Tensor) -> Axes:
    """Draw, in three dimensions, how a manifold takes a random vector up: its cone, the projection and the anchor.

    Args:
        corners: Of a flat manifold about the point (0, 0, 1), in the order of its outline. Shape ``(2, M)``.
        draw: The random vector, shape ``(3,)``.
        projection: Its projection on the cone over the manifold, shape ``(3,)``.

    Returns:
        The axes.
    """
    axes: Axes3D = plt.subplots(figsize=(6.8, 4.4), subplot_kw={"projection": "3d"})[1]
    rim = np.vstack([corners.cpu().numpy(), np.ones(corners.shape[1])]).T
    faces = [[np.zeros(3), 1.6 * rim[i - 1], 1.6 * rim[i]] for i in range(len(rim))]
    axes.add_collection3d(Poly3DCollection(faces, color="#0072B2", alpha=0.08, linewidth=0))
    axes.add_collection3d(Poly3DCollection([rim], color="#0072B2", alpha=0.5))
    where = (projection / projection[2]).tolist()
    axes.plot(*zip((0, 0, 0), draw.tolist(), strict=True), "-", color="#D55E00", label="draw")
    axes.plot(*zip(draw.tolist(), projection.tolist(), strict=True), ":", color="#555555", label="rest")
    axes.plot(*zip((0, 0, 0), projection.tolist(), strict=True), "--", color="#009E73", label="projection")
    axes.plot(*([each] for each in (0, 0, 1)), "o", color="black", label="centre")
    axes.plot(*([each] for each in where), "D", color="#CC79A7", label="anchor")
    axes.set(xlabel="first direction", ylabel="second direction", zlabel="along the centre", zlim=(0, 1.6))
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    axes.set_box_aspect((1, 1, 0.7))
    axes.view_init(elev=14, azim=-70)
    axes.grid(visible=False)
    _legend_below(axes)
    return axes


def clouds(panels: Mapping[str, Tensor]) -> Sequence[Axes]:
    """Draw the points of a few manifolds in three dimensions.

    Args:
        panels: Coordinates by the title of the panel, up to five manifolds of M points, shape ``(P, M, 3)``.

    Returns:
        The axes, one a panel.
    """
    size = (4.6 * len(panels), 4.2)
    row = plt.subplots(1, len(panels), figsize=size, squeeze=False, subplot_kw={"projection": "3d"})[1][0]
    axes: Axes3D
    for axes, (title, manifolds) in zip(row, panels.items(), strict=True):
        for number, (points, (color, _, marker)) in enumerate(zip(manifolds, _KINDS, strict=False)):
            axes.plot(*points.T.tolist(), linestyle="", marker=marker, color=color, label=f"class {number}")
        axes.set(title=title, xlabel="axis 1", ylabel="axis 2", zlabel="axis 3")
        axes.tick_params(labelsize=8)
        axes.grid(visible=False)
    _legend_below(row[0])
    return list(row)


def accuracy_bars(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Draw the four accuracies of several networks, or of one network under several treatments, side by side.

    Args:
        table: A row for each network and seed: ``network`` (what the reader sees), ``seed``, and the four accuracies,
            NaN where there is none.
        axes: Where to draw; None makes a new figure.

    Returns:
        The axes: a bar for the mean over seeds, a dot for each seed.
    """
    new = plt.subplots(figsize=(8.4, 3.8))[1] if axes is None else axes
    _draw_bars(table, {column: (label, color) for column, (label, color, _, _) in _CURVES.items()}, new)
    if axes is None:
        _legend_below(new)
    return new


def accuracy_bar_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw :func:`accuracy_bars` of several runs one below the other.

    Args:
        tables: Tables as :func:`accuracy_bars` takes them, by the title of the panel; none gives a panel that says so.

    Returns:
        The axes, one a run.
    """
    if not tables:
        return _panels([])
    column = plt.subplots(len(tables), 1, figsize=(8.4, 0.6 + 3.2 * len(tables)), squeeze=False)[1][:, 0]
    for axes, (title, table) in zip(column, tables.items(), strict=True):
        accuracy_bars(table, axes).set_title(title)
    _legend_below(column[0])
    return list(column)


def heat_maps(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw shares over two parameters as coloured cells with their numbers.

    Args:
        tables: Fractions from 0 to 1 by the title of the panel; index and columns are the values of the parameters, and
            have their names. None gives a panel that says so.

    Returns:
        The axes, one a table.
    """
    axes = _panels(list(tables), sharey=False)
    for each, table in zip(axes, tables.values(), strict=False):
        each.imshow(table.to_numpy(dtype=float), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        each.set_xticks(range(table.shape[1]), [f"{value:g}" for value in table.columns])
        each.set_yticks(range(table.shape[0]), [f"{value:g}" for value in table.index])
        each.set(xlabel=table.columns.name, ylabel=table.index.name)
        each.grid(visible=False)
        for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
            color = "black" if value > 0.5 else "white"
            each.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    return axes[: max(1, len(tables))]


def flipping(found: pd.DataFrame, removed: pd.DataFrame) -> Sequence[Axes]:
    """Draw how many units had to be removed to flip clean and noisy examples, at what price, and where they lay.

    Args:
        found: One row a target: ``kind`` (``"clean"`` or ``"noisy"``), ``units``, and ``clean_accuracy`` of the edited
            network.
        removed: One row a removed unit: ``kind`` and ``layer_group``, which is drawn in the order of its categories.

    Returns:
        Three axes: units removed, accuracy left on the other clean training examples, layer groups of the units.

    Source:
        Maini et al. (2023), Figure 5.
    """
    axes = plt.subplots(1, 3, figsize=(11, 3.7))[1]
    counts = found.groupby(["kind", "units"]).size().rename("targets").reset_index()
    unit_bars(counts, axes[0])
    bins = np.linspace(0, 1, 21)
    groups = list(removed.layer_group.cat.categories)
    for number, kind in enumerate(("clean", "noisy")):
        _, color, _, _ = _CURVES[f"{kind}_accuracy"]
        look = {"color": color, "alpha": 0.65, "hatch": _HATCHES[number], "edgecolor": "white", "linewidth": 0.3}
        left = found[found.kind == kind].clean_accuracy
        axes[1].hist(left, bins.tolist(), weights=np.full(len(left), 1 / max(1, len(left))), **look)
        layers = removed[removed.kind == kind].layer_group
        shares = layers.value_counts(normalize=True).reindex(groups, fill_value=0)
        axes[2].bar(np.arange(len(groups)) + 0.4 * (number - 0.5), shares, 0.4, **look)
    axes[1].set(xlabel="accuracy left on the other clean examples", ylabel="share of the targets (fraction)")
    axes[2].set(xlabel="layer group of the unit", ylabel="share of the units (fraction)")
    axes[2].set_xticks(range(len(groups)), groups, rotation=45)
    _legend_below(axes[0])
    return list(axes)


def flipping_panels(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw :func:`unit_bars` of several runs side by side.

    Args:
        tables: Counts by the title of the panel; none gives a panel that says so.

    Returns:
        The axes, one a run.
    """
    axes = _panels(list(tables))
    for each, table in zip(axes, tables.values(), strict=False):
        unit_bars(table, each)
    _legend_below(axes[0])
    return axes


def unit_bars(counts: pd.DataFrame, axes: Axes, most: int = 20) -> Axes:
    """Draw which share of the clean and of the noisy targets needed how many units; the median as a line.

    Args:
        counts: How many ``targets`` of a ``kind`` needed so many ``units``; rows of several seeds add up.
        axes: Where to draw.
        most: What needed more is drawn here.

    Returns:
        The axes.
    """
    for number, kind in enumerate(("clean", "noisy")):
        label, color, line, _ = _CURVES[f"{kind}_accuracy"]
        rows = counts[counts.kind == kind]
        shares = rows.targets.groupby(rows.units.clip(upper=most)).sum() / max(1, rows.targets.sum())
        place = shares.index.to_numpy(float) + 0.4 * (number - 0.5)
        axes.bar(
            place, shares, 0.4, color=color, alpha=0.65, hatch=_HATCHES[number], edgecolor="white", linewidth=0.3,
            label=f"{label}, N = {rows.targets.sum()}",
        )  # fmt: skip
        if len(rows):
            median = float(np.median(np.repeat(rows.units.to_numpy(), rows.targets.to_numpy())))
            axes.axvline(min(median, most), color=color, linestyle=line, linewidth=1.4)
    axes.set(xlabel=f"units removed ({most}: or more)", ylabel="share of the targets (fraction)")
    return axes


def method_shares(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw which share of the memorization each method finds in each layer group.

    Args:
        tables: Columns ``method``, ``layer_group``, ``seed`` and ``share``, of the same methods in the same order, by
            the title of the column of panels; none gives a panel that says so.

    Returns:
        The axes, a row a method and a column a table, row by row: a bar for the mean over seeds with its 95 %
        confidence interval, and a line where every layer group has the same share.
    """
    if not tables:
        return _panels([])
    methods = list(next(iter(tables.values())).method.unique())
    size = (1.2 + 4.2 * len(tables), 0.8 + 1.5 * len(methods))
    grid = plt.subplots(len(methods), len(tables), sharex="col", sharey=True, squeeze=False, figsize=size)[1]
    for column, (title, table) in zip(grid.T, tables.items(), strict=True):
        groups = list(table.layer_group.unique())
        for axes, method in zip(column, methods, strict=True):
            rows = table[table.method == method].groupby("layer_group").share
            found = [interval(rows.get_group(group)) for group in groups]
            errors = np.nan_to_num([each.half_width for each in found])
            axes.bar(groups, [each.mean for each in found], yerr=errors, capsize=3, color="#0072B2", alpha=0.75)
            axes.axhline(1 / len(groups), color="black", linestyle=":", linewidth=1)
            axes.set_title(method if len(tables) == 1 else f"{title}: {method}", fontsize=10)
        column[-1].tick_params(axis="x", rotation=45)
        column[-1].set_xlabel("layer group")
    for axes in grid[:, 0]:
        axes.set_ylabel("share (fraction)")
        axes.set_ylim(bottom=0)
    return list(grid.flat)


def double_descent(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw accuracy, radius and dimension against the size of a network, as it was at one or several moments.

    Args:
        tables: One row a network, moment and seed, from the smallest network up: ``parameters`` (how many), ``kind``
            (which moment), ``seed``, ``test_accuracy``, ``radius`` and ``dimension``, by the title of the row of
            panels; none gives a panel that says so. Where there are columns ``noisy_accuracy`` and ``interpolates``
            (whether networks of this size fit their training set), they are drawn too.

    Returns:
        The axes, three a table, row by row: on the left the test accuracy at each moment and the noisy accuracy at the
        last of them. A vertical line stands at the smallest network that interpolates.

    Source:
        Stephenson et al. (2021), Figure 4C-E.
    """
    if not tables:
        return _panels([])
    size = (9.6, 0.7 + 2.7 * len(tables))
    grid = plt.subplots(len(tables), len(_SIZED), squeeze=False, figsize=size)[1]
    for row, (title, table) in zip(grid, tables.items(), strict=True):
        for axes, (column, label) in zip(row, _SIZED.items(), strict=True):
            shown = table
            if column == "test_accuracy" and "noisy_accuracy" in table:
                last = table[table.kind == table.kind.iloc[-1]]
                noisy = last.assign(kind=f"noisy labels, {last.kind.iloc[-1]}", test_accuracy=last.noisy_accuracy)
                shown = pd.concat([table, noisy])
            by_kind(shown, "parameters", column, axes).set(ylabel=label, xscale="log")
            axes.set_title(title, fontsize=10)
            if "interpolates" in table and table.interpolates.any():
                axes.axvline(table.parameters[table.interpolates].min(), color="black", linestyle=":", linewidth=1)
    with_most = max(grid[:, 0], key=lambda axes: len(axes.get_lines()))
    _legend_below(with_most)
    return list(grid.flat)


def decision_maps(
    maps: Mapping[str, Tensor],
    points: Mapping[str, pd.DataFrame],
    extent: tuple[float, float, float, float],
    labels: tuple[str, str],
) -> Sequence[Axes]:
    """Draw what a network with two classes says over two of its inputs, and examples.

    Args:
        maps: Probability of the second class by the title of the panel, shape ``(H, W)``: rows upwards, columns to the
            right.
        points: Examples for each panel, under the same titles: the two inputs ``x`` and ``y``, and ``label``, 0 or 1.
        extent: What the map spans: left, right, bottom, top.
        labels: Of the horizontal and of the vertical axes.

    Returns:
        The axes, one a map, with a black line where both classes are as probable.

    Source:
        Bayat et al. (2025), Figure 1, bottom.
    """
    axes = _panels(list(maps))
    for each, (title, found) in zip(axes, maps.items(), strict=False):
        shares = found.cpu().numpy()
        image = each.imshow(
            shares, cmap="RdBu_r", vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto", alpha=0.6
        )
        if shares.min() < 0.5 < shares.max():
            each.contour(shares, levels=[0.5], colors="black", linewidths=1.2, extent=extent)
        for label, (color, marker) in enumerate((("#0072B2", "o"), ("#D55E00", "s"))):
            own = points[title][points[title].label == label]
            (dots,) = each.plot(own.x, own.y, marker, color=color, label=f"label {label}", markersize=4.5)
            dots.set(markeredgecolor="white", markeredgewidth=0.4)
        each.set(xlabel=labels[0], ylabel=labels[1], xlim=extent[:2], ylim=extent[2:])
        each.grid(visible=False)
    if maps:
        axes[0].figure.colorbar(image, ax=axes, label="probability of label 1")
        _legend_below(axes[0])
    return axes


def ridge_sweep(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw the minority's accuracy against the noise, and against the penalty that the noise amounts to.

    Args:
        table: One row a problem, noise and seed: ``kind`` (of problem), ``noise``, ``ratio`` (the penalty over its
            critical value), ``seed``, ``minority_accuracy`` (simulated) and ``predicted``.

    Returns:
        Two axes, noise and ratio: predictions as lines, means over seeds of the simulations as markers with the range
        over seeds, and dotted lines where half of the minority is right and where the ratio is 1.
    """
    row = plt.subplots(1, 2, sharey=True, figsize=(9.2, 3.9))[1]
    for axes, column in zip(row, ("noise", "ratio"), strict=True):
        for kind, (color, line, marker) in zip(table.kind.unique(), _KINDS, strict=False):
            rows = table[table.kind == kind].groupby(column)
            seen = rows.minority_accuracy.agg(["mean", "min", "max"])
            axes.plot(seen.index, rows.predicted.mean(), line, color=color, label=kind)
            axes.plot(seen.index, seen["mean"], marker, color=color)
            axes.vlines(seen.index, seen["min"], seen["max"], color=color, alpha=0.4, linewidth=1)
        axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
        axes.set_xscale("log")
    row[0].set(xlabel="noise σ", ylabel="minority, test (fraction)", ylim=(-0.02, 1.02))
    row[1].axvline(1, color="black", linestyle=":", linewidth=1)
    row[1].set_xlabel("penalty over critical penalty, λ/λ*")
    _legend_below(row[0])
    return list(row)


def curve_fits(curves: Mapping[str, pd.DataFrame], points: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw curves that were fitted to noisy points of a true one.

    Args:
        curves: By the title of the panel, from left to right: ``x``, ``truth``, ``clean`` (the fit without noise
            coordinates) and ``mixed`` (with those of the points, at the points).
        points: For each panel, under the same titles: ``x`` and ``y``.

    Returns:
        The axes, side by side with the same scales.

    Source:
        Bayat et al. (2025), Figure 3.
    """
    row = plt.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False, figsize=(3.5 * len(curves), 3.6))[1][0]
    for axes, (title, table) in zip(row, curves.items(), strict=True):
        axes.plot(table.x, table.mixed, "-", color="#CC79A7", linewidth=0.9, label="fit, noise of the points")
        axes.plot(table.x, table.clean, "-", color="#0072B2", label="fit, no noise")
        axes.plot(table.x, table.truth, "--", color="black", label="true curve")
        axes.plot(points[title].x, points[title].y, "o", color="#D55E00", label="training points")
        axes.set(title=title, xlabel="x")
    row[0].set_ylabel("y")
    _legend_below(row[0])
    return list(row)


def error_dots(
    tables: Mapping[str, pd.DataFrame], columns: Mapping[str, str], published: pd.DataFrame | None = None
) -> Sequence[Axes]:
    """Draw errors of every seed and their median, for several kinds of data.

    Args:
        tables: One row a kind and seed: ``kind`` and the errors, by the title of the row of panels; none gives a panel
            that says so.
        columns: What each error is called, by its column.
        published: Published values: ``kind`` and the errors, one row a kind; None for none.

    Returns:
        The axes, a row a table and a column an error, with logarithmic scales; published values are crosses.
    """
    if not tables:
        return _panels([])
    size = (0.8 + 3.4 * len(columns), 0.7 + 2.8 * len(tables))
    grid = plt.subplots(len(tables), len(columns), sharex=True, sharey="col", squeeze=False, figsize=size)[1]
    for row, (title, table) in zip(grid, tables.items(), strict=True):
        kinds = list(table.kind.unique())
        for axes, (column, label) in zip(row, columns.items(), strict=True):
            for place, (kind, (color, _, marker)) in enumerate(zip(kinds, _KINDS, strict=False)):
                errors = table[column][table.kind == kind]
                beside = place + np.linspace(-0.15, 0.15, len(errors)) * (len(errors) > 1)
                axes.plot(beside, errors, marker, color=color, markersize=3.5, alpha=0.7)
                axes.hlines(errors.median(), place - 0.3, place + 0.3, color="black", linewidth=2)
            if published is not None:
                seen = published[published.kind.isin(kinds)]
                axes.plot([kinds.index(kind) for kind in seen.kind], seen[column], "x", color="black", markersize=8)
            axes.set_xticks(range(len(kinds)), kinds)
            axes.set(ylabel=label, xlim=(-0.6, len(kinds) - 0.4))
            axes.set_title(title, fontsize=10)
            _log_scale(axes)
    return list(grid.flat)


def method_dots(tables: Mapping[str, pd.DataFrame]) -> Sequence[Axes]:
    """Draw the accuracy of the worst group and the average of several methods.

    Args:
        tables: One row a method and seed: ``method``, ``average_accuracy`` and ``worst_group_accuracy`` (fractions), by
            the title of the panel; none gives a panel that says so.

    Returns:
        The axes, two in a row, a line for each method: means over seeds, and for the worst group 95 % intervals.
    """
    if not tables:
        return _panels([])
    rows = -(-len(tables) // 2)
    most = max(table.method.nunique() for table in tables.values())
    size = (10.0 if len(tables) > 1 else 6.0, (1.2 + 0.27 * most) * rows)
    grid = plt.subplots(rows, min(2, len(tables)), squeeze=False, figsize=size)[1]
    for axes, (title, table) in zip(grid.flat, tables.items(), strict=False):
        methods = list(table.method.unique())
        worst = [interval(table.worst_group_accuracy[table.method == method]) for method in methods]
        average = [table.average_accuracy[table.method == method].mean() for method in methods]
        places, widths = range(len(methods)), np.nan_to_num([each.half_width for each in worst])
        (color, _, marker), (other, _, hollow) = _KINDS[:2]
        axes.errorbar([each.mean for each in worst], places, xerr=widths, fmt=marker, color=color, label="worst group")
        axes.plot(average, places, hollow, color=other, markerfacecolor="none", label="average")
        axes.set_yticks(places, methods)
        axes.invert_yaxis()
        axes.grid(axis="y", alpha=0.3)
        axes.set(xlabel="accuracy (fraction)", xlim=(-0.03, 1.03), title=title)
    for empty in list(grid.flat)[len(tables) :]:
        empty.set_axis_off()
    _legend_below(grid[0, 0])
    return list(grid.flat)


def group_bars(tables: Mapping[str, pd.DataFrame], columns: Mapping[str, str]) -> Sequence[Axes]:
    """Draw accuracies of several networks, or of one network under several treatments, side by side.

    Args:
        tables: A row for each network and seed: ``network`` (what the reader sees), ``seed`` and the accuracies, by the
            title of the panel; none gives a panel that says so.
        columns: What each accuracy is called, by its column; four at most.

    Returns:
        The axes, one a table, one below the other: a bar for the mean over seeds, a dot for each seed.
    """
    if not tables:
        return _panels([])
    size = (8.4, 0.6 + 3.2 * len(tables))
    below = plt.subplots(len(tables), 1, figsize=size, squeeze=False)[1][:, 0]
    looks = {column: (label, color) for (column, label), (color, _, _) in zip(columns.items(), _KINDS, strict=False)}
    for axes, (title, table) in zip(below, tables.items(), strict=True):
        _draw_bars(table, looks, axes)
        axes.set_title(title)
    _legend_below(below[0])
    return list(below)


def _draw_bars(table: pd.DataFrame, looks: Mapping[str, tuple[str, str]], axes: Axes) -> None:
    """Draw for each network and each accuracy a bar for the mean over seeds and a dot for each seed."""
    networks = list(table.network.unique())
    width = 0.8 / len(looks)
    for number, ((column, (label, color)), hatch) in enumerate(zip(looks.items(), _HATCHES, strict=False)):
        place = np.arange(len(networks)) + (number - (len(looks) - 1) / 2) * width
        means = table.groupby("network")[column].mean().loc[networks]
        axes.bar(place, means, width, color=color, alpha=0.75, hatch=hatch, edgecolor="white", label=label)
        where = [place[networks.index(network)] for network in table.network]
        axes.plot(where, table[column], "o", color="black", markersize=2)
    axes.set_xticks(range(len(networks)), networks, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylabel="accuracy (fraction)", ylim=(0, 1.02))


def group_histograms(
    tables: Mapping[str, pd.DataFrame], column: str, label: str, smallest: float = 1e-6
) -> Sequence[Axes]:
    """Draw how a positive score is spread among the examples of each group, on logarithmic scales.

    Args:
        tables: One row an example: ``kind`` (its group) and the score, by the title of the panel, from top to bottom;
            none gives a panel that says so.
        column: The score.
        label: What it is called, with its unit.
        smallest: What is smaller is drawn here.

    Returns:
        The axes, one below the other with the same scale: for each group the share of its examples in each bin, filled
        and with an outline and a hatching of its own, and a vertical line at its 95 % quantile.

    Source:
        Bayat et al. (2025), Figure 2.
    """
    if not tables:
        return _panels([])
    size = (6.4, 0.9 + 1.7 * len(tables))
    stack = plt.subplots(len(tables), 1, sharex=True, sharey=True, squeeze=False, figsize=size)[1][:, 0]
    values = pd.concat([table[column] for table in tables.values()]).clip(lower=smallest)
    bins = np.geomspace(values.min() * 0.99, values.max() * 1.01, 31).tolist()
    for axes, (title, table) in zip(stack, tables.items(), strict=True):
        for number, (kind, (color, line, _)) in enumerate(zip(table.kind.unique(), _KINDS, strict=False)):
            scores = table[column][table.kind == kind].clip(lower=smallest)
            weights = np.full(len(scores), 1 / max(1, len(scores)))
            hatch = _HATCHES[1 - number % 2]
            axes.hist(scores, bins, weights=weights, color=color, alpha=0.3, hatch=hatch, label=kind)
            axes.hist(scores, bins, weights=weights, color=color, histtype="step", linestyle=line, linewidth=1.6)
            axes.axvline(scores.quantile(0.95), color=color, linestyle=line, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", ylabel="share (fraction)")
    stack[-1].set_xlabel(label)
    _legend_below(stack[0])
    return list(stack)


def influence_scatter(tables: Mapping[str, pd.DataFrame], columns: int = 3) -> Sequence[Axes]:
    """Draw the predicted drop of an example's probability against the exact one.

    Args:
        tables: One row an example: ``kind`` (its group), ``predicted`` and ``drop``, by the title of the panel; none
            gives a panel that says so.
        columns: Panels in a row.

    Returns:
        The axes, one a table, with a dotted line where both are the same.
    """
    if not tables:
        return _panels([])
    rows = -(-len(tables) // columns)
    grid = plt.subplots(rows, columns, squeeze=False, figsize=(3.2 * columns, 0.6 + 3.0 * rows))[1]
    axes = list(grid.flat)
    for each, (title, table) in zip(axes, tables.items(), strict=False):
        for kind, (color, _, marker) in zip(table.kind.unique(), _KINDS, strict=False):
            own = table[table.kind == kind]
            each.plot(own.predicted, own["drop"], marker, color=color, markersize=3.5, alpha=0.6, label=kind)
        low, high = table[["predicted", "drop"]].min().min(), table[["predicted", "drop"]].max().max()
        each.plot([low, high], [low, high], ":", color="black", linewidth=1)
        each.set_title(title, fontsize=10)
        each.set(xlabel="predicted drop", ylabel="exact drop")
    for empty in axes[len(tables) :]:
        empty.set_axis_off()
    _legend_below(axes[0])
    return axes[: len(tables)]


def _phases(table: pd.DataFrame) -> pd.DataFrame:
    """Take the rows right after the reset and after the last epoch, and say in a column ``phase`` which they are."""
    one = ["whole", "batch_norm", "layer_group", "seed"]
    last = table[table.epoch == table.groupby(one).epoch.transform("max")]
    reset = table[table.epoch == 0].drop_duplicates(["layer_group", "seed"])
    treatment = last.batch_norm.mask(last.whole, "whole network")
    return pd.concat([reset.assign(phase="after the reset"), last.assign(phase=treatment)])


def _bars(table: pd.DataFrame, column: str, by: str, looks: Mapping[str, tuple[str, str]], axes: Axes) -> None:
    """Draw a bar for the mean over seeds of each layer group and each value of another column, a dot for each seed."""
    groups, found = list(table.layer_group.unique()), list(table[by].unique())
    width = 0.8 / max(1, len(found))
    for number, value in enumerate(found):
        color, hatch = looks[value]
        rows = table[table[by] == value]
        place = np.arange(len(groups)) + (number - (len(found) - 1) / 2) * width
        means = rows.groupby("layer_group")[column].mean().reindex(groups)
        axes.bar(place, means, width, color=color, alpha=0.75, hatch=hatch, edgecolor="white", label=value)
        where = [place[groups.index(group)] for group in rows.layer_group]
        axes.plot(where, rows[column], "o", color="black", markersize=2.5)
    axes.set_xticks(range(len(groups)), groups, rotation=45)


def _panels(titles: Sequence[str], *, sharey: bool | Literal["row"] = True) -> list[Axes]:
    """Make one axes a title, two in a row; without titles, one that says that there is nothing."""
    rows = max(1, -(-len(titles) // 2))
    columns = min(2, max(1, len(titles)))
    grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.3 * rows), squeeze=False, sharey=sharey)[1]
    axes = list(grid.flat)
    for each, title in zip(axes, titles, strict=False):
        each.set_title(title)
    for empty in axes[len(titles) :]:
        empty.set_axis_off()
    if not titles:
        axes[0].text(0.5, 0.5, "nothing to show yet", ha="center", va="center", transform=axes[0].transAxes)
    return axes


def _log_scale(axes: Axes) -> None:
    """Give axes a logarithmic scale upwards, with plain numbers beside it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, title: str | None = None) -> None:
    """Put one legend for a whole figure below it, if there is anything to tell."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure(root=True)
    if handles and figure is not None:
        figure.legend(handles, labels, title=title, ncols=min(len(labels), 6), loc="outside lower center")
