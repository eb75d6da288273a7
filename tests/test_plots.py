import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from memloc import plots

mpl.use("agg")


@pytest.fixture(autouse=True)
def own_style():
    with mpl.rc_context():
        plots.set_style()
        yield
    plt.close("all")


@pytest.fixture
def curves():
    rows = [
        {"epoch": epoch, "seed": seed, "clean_accuracy": 0.1 * epoch + 0.02 * seed, "noisy_accuracy": 0.05 * epoch,
         "restored_accuracy": 0.3, "test_accuracy": 0.4}
        for epoch in range(6) for seed in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def rewound():
    rows = [
        {"batch_norm": batch_norm, "layer_group": group, "epoch": epoch, "seed": seed,
         "clean_accuracy": 0.9, "noisy_accuracy": 0.1 * epoch, "noisy_lost": 0.2 + 0.1 * seed, "clean_lost": 0.0}
        for batch_norm in ("keep", "rewind", "recalibrate")
        for group in ("stem", "body", "head") for epoch in (0, 5) for seed in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def accounts():
    rows = [
        {"epoch": epoch, "layer_group": group, "clean_norm": 0.1 * epoch, "noisy_norm": 0.2 + 0.1 * seed,
         "total_norm": 1.0, "cosine": -0.5 if group == "stem" else 0.1 * seed, "seed": seed}
        for seed in range(2) for epoch in range(1, 8) for group in ("stem", "body", "head")
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def retrained():
    rows = [
        {"layer_group": group, "whole": whole, "batch_norm": batch_norm, "epoch": epoch, "seed": seed,
         "clean_accuracy": 1.0, "noisy_accuracy": 0.2 * epoch + 0.1 * seed, "restored_accuracy": 0.5,
         "test_accuracy": 0.8}
        for group in ("stem", "body", "head", "end")
        for whole, batch_norm in ((False, "keep"), (False, "follow"), (True, "follow"))
        for seed in range(2) for epoch in range(4 - seed)  # the second stops early
    ]  # fmt: skip
    return pd.DataFrame(rows)


def drawn(axes):
    """The bytes of the figure: it can be drawn without a warning."""
    file = io.BytesIO()
    axes.figure.savefig(file)
    return file.getvalue()


def test_curves_are_means_over_seeds_with_the_range_as_a_band(curves):
    axes = plots.accuracy_curves(curves)
    clean = axes.get_lines()[0]
    assert clean.get_label() == "clean"
    assert list(clean.get_ydata()) == pytest.approx([0.1 * epoch + 0.02 for epoch in range(6)])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0, 0.54))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy (fraction)")


def test_no_two_curves_share_a_colour_a_line_style_or_a_marker(curves):
    lines = plots.accuracy_curves(curves).get_lines()
    for looks in ("get_color", "get_linestyle", "get_marker"):
        assert len({getattr(line, looks)() for line in lines}) == 4


def test_an_accuracy_that_does_not_exist_leaves_its_curve_empty(curves):
    axes = plots.accuracy_curves(curves.assign(noisy_accuracy=float("nan")))
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [6, 0, 6, 6]
    assert drawn(axes)


def test_panels_have_a_title_each_and_one_legend(curves):
    axes = plots.accuracy_panels({"mnist": curves, "cifar10": curves, "svhn": curves})
    assert [each.get_title() for each in axes[:3]] == ["mnist", "cifar10", "svhn"]
    assert len(axes[0].figure.legends) == 1
    assert drawn(axes[0])


PANELS = [
    plots.flipping_panels,
    plots.accuracy_panels,
    plots.treatment_panels,
    plots.rewinding_panels,
    plots.gradient_panels,
    plots.recovery_panels,
    plots.gradient_cosines,
]


@pytest.mark.parametrize("panels", PANELS)
def test_without_results_a_figure_says_so(panels):
    (axes,) = panels({})
    assert axes.texts[0].get_text() == "nothing to show yet"
    assert drawn(axes)


def test_the_histogram_shows_shares_of_each_kind():
    axes = plots.learned_histogram(torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4]), last_epoch=3)
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.25, 0.5, 0.25, 0, 0], [0, 0, 0, 0.5, 0.5]]


def test_gradient_norms_have_a_panel_for_every_window_with_means_and_ranges_over_seeds(accounts):
    axes = plots.gradient_norms(accounts)
    assert [each.get_title() for each in axes] == ["epochs 1–5", "epochs 6–7"]
    clean, noisy, total = axes[1].get_lines()
    assert [line.get_label() for line in (clean, noisy, total)] == ["clean", "noisy", "total"]
    assert list(clean.get_ydata()) == pytest.approx([0.65] * 3)
    assert list(noisy.get_ydata()) == pytest.approx([0.25] * 3)
    band = axes[1].collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.3))
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["stem", "body", "head"]
    assert len({each.get_ylim() for each in axes}) == 1
    assert drawn(axes[0])


def test_windows_of_single_epochs_and_more_than_a_row_of_them_can_be_drawn(accounts):
    axes = plots.gradient_norms(accounts, window=1)
    assert [each.get_title() for each in axes] == [f"epoch {epoch}" for epoch in range(1, 8)]
    assert drawn(axes[0])


def test_gradient_panels_average_over_all_epochs_and_call_the_parts_as_asked(accounts):
    (axes,) = plots.gradient_panels({"digits": accounts}, names=("others", "control"))
    assert [line.get_label() for line in axes.get_lines()] == ["others", "control", "total"]
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([0.4] * 3)
    assert axes.get_title() == "digits"
    assert drawn(axes)


def test_a_part_without_a_gradient_leaves_its_line_empty(accounts):
    (axes,) = plots.gradient_panels({"digits": accounts.assign(noisy_norm=0.0)})
    assert [bool(pd.isna(line.get_ydata()).all()) for line in axes.get_lines()] == [False, True, False]
    assert drawn(axes)


def test_cosines_are_means_over_seeds_by_epoch_and_layer_group_on_one_scale(accounts):
    undefined = accounts.assign(cosine=float("nan"))[accounts.epoch < 3]
    axes = plots.gradient_cosines({"noisy": accounts, "none": undefined})[:2]
    (mesh,), (empty,) = (each.collections for each in axes)
    assert mesh.get_array().shape == (7, 3)
    assert mesh.get_array()[0].tolist() == pytest.approx([-0.5, 0.05, 0.05])
    assert mesh.get_clim() == (-1, 1)
    assert empty.get_array().mask.all()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [str(epoch) for epoch in range(1, 8)]
    assert axes[0].yaxis_inverted()
    assert drawn(axes[0])


def test_parts_of_gradients_have_a_row_each_and_a_column_for_every_layer_group_on_logarithmic_scales():
    rows = [
        {"kind": kind, "epoch": epoch, "seed": seed, "layer_group": group, "dependent_norm": 10.0 ** (epoch + seed),
         "independent_norm": 2.0, "total_norm": 3.0}
        for kind in ("noisy", "clean") for seed in range(2) for epoch in (0, 1, 5) for group in ("stem", "head")
    ]  # fmt: skip
    axes = plots.gradient_parts(pd.DataFrame(rows))
    assert [each.get_title() for each in axes] == ["stem", "head", "", "", "", ""]
    assert [each.get_ylabel() for each in axes[::2]] == [
        f"norm,\n{part}" for part in ("label-dependent", "label-independent", "sum")
    ]
    assert [line.get_label() for line in axes[1].get_lines()] == ["noisy", "clean"]
    assert list(axes[1].get_lines()[0].get_ydata()) == pytest.approx([5.5, 55, 5.5e5])
    assert [each.get_lines()[0].get_ydata()[0] for each in axes[::2]] == pytest.approx([5.5, 2, 3])
    assert {(each.get_xscale(), each.get_yscale()) for each in axes} == {("symlog", "log")}
    assert len(axes[0].figure.legends) == 1
    assert drawn(axes[0])


def test_the_gallery_shows_every_image_once_in_its_colours():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    axes = plots.gallery(images, ["black", "grey", "white"], columns=2)
    assert [each.get_title() for each in axes] == ["black", "grey", "white"]
    assert [each.get_images()[0].get_array().mean() for each in axes] == pytest.approx([0, 0.5, 1])
    assert [each.get_title() for each in plots.gallery(images[:0], [])] == [""]
    assert drawn(plots.gallery(images[:1, :1], ["one channel"])[0])


def test_rewinding_has_a_line_for_every_epoch_and_the_groups_in_their_order(rewound):
    axes = plots.rewinding(rewound)
    assert [each.get_title() for each in axes[:3]] == [f"statistics: {t}" for t in ("keep", "rewind", "recalibrate")]
    clean, noisy = axes[0], axes[5]
    assert [line.get_label() for line in noisy.get_lines()] == ["0", "5"]
    assert [list(line.get_ydata()) for line in noisy.get_lines()] == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert [label.get_text() for label in noisy.get_xticklabels()] == ["stem", "body", "head"]
    assert drawn(clean)


def test_the_band_of_a_rewound_layer_spans_its_seeds(rewound):
    rows = rewound[rewound.batch_norm == "keep"].assign(
        noisy_accuracy=lambda table: 0.1 * table.epoch + 0.2 * table.seed
    )
    axes, other = plots.rewinding_panels({"cifar10": rows, "mnist": rows[rows.epoch == rows.epoch.max()]})
    assert axes.get_lines()[-1].get_color().tolist() == other.get_lines()[0].get_color().tolist()
    (legend,) = axes.figure.legends
    assert len(legend.get_texts()) == rows.epoch.nunique()
    band = axes.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.5, 0.7))
    assert drawn(axes)


@pytest.fixture
def rolled_back():
    rows = [
        {"rewound_to": role, "layer_group": group, "seed": seed, "test_accuracy": accuracy + 0.1 * seed,
         "final_accuracy": 0.2 + 0.1 * seed, "best_accuracy": 0.6 + 0.1 * seed}
        for role, accuracy in (("1/4", 0.3), ("1/2", 0.4), ("best", 0.5)) for group in ("last 2", "last 1")
        for seed in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_rollback_lies_between_lines_for_the_last_epoch_and_early_stopping(rolled_back):
    (axes,) = plots.rollback_panels({"vgg16": rolled_back})
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert list(lines) == ["1/4", "1/2", "best", "early stopping", "last epoch"]
    assert lines["best"] == pytest.approx([0.55, 0.55])
    assert (lines["early stopping"], lines["last epoch"]) == (pytest.approx([0.65] * 2), pytest.approx([0.25] * 2))
    assert axes.get_ylabel() == "test accuracy (fraction)"
    axes.figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["last 2", "last 1"]
    assert drawn(axes)


def test_the_band_of_a_rollback_spans_its_seeds(rolled_back):
    (axes,) = plots.rollback_panels({"vgg16": rolled_back})
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.3, 0.4))


def test_an_epoch_looks_the_same_in_every_panel_of_a_rollback(rolled_back):
    some, every = plots.rollback_panels({"some": rolled_back[rolled_back.rewound_to != "1/4"], "all": rolled_back})
    looks = [
        {line.get_label(): (to_hex(line.get_color()), line.get_marker()) for line in axes.get_lines()}
        for axes in (some, every)
    ]
    assert looks[0].items() <= looks[1].items()
    assert len(set(looks[1].values())) == 4  # three roles, and the two straight lines alike but for their dashes
    assert len(some.figure.legends[0].get_texts()) == 5


def test_rollbacks_in_a_row_share_their_scale_and_rows_do_not(rolled_back):
    higher = rolled_back.assign(test_accuracy=0.9)
    left, right, below, _ = plots.rollback_panels({"a": rolled_back, "b": higher, "c": rolled_back})
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[1] > 0.9 > below.get_ylim()[1]


def test_without_a_rollback_the_panel_says_so():
    (empty,) = plots.rollback_panels({})
    assert empty.texts[0].get_text() == "nothing to show yet"


def test_treatments_are_bars_of_means_with_a_dot_for_every_seed(rewound):
    noisy, clean = plots.treatments(rewound[rewound.epoch == 5])
    assert [container.get_label() for container in noisy.containers] == ["keep", "rewind", "recalibrate"]
    assert [bar.get_height() for bar in noisy.containers[0]] == pytest.approx([0.25] * 3)
    assert sorted(noisy.get_lines()[0].get_ydata()) == pytest.approx([0.2] * 3 + [0.3] * 3)
    assert noisy.get_ylim() == clean.get_ylim()
    assert drawn(noisy)


@pytest.fixture
def networks():
    rows = [
        {"network": network, "seed": seed, "clean_accuracy": 0.9, "noisy_accuracy": 0.2 + 0.1 * seed,
         "restored_accuracy": 0.3, "test_accuracy": float("nan") if network == "own" else 0.4}
        for seed in range(3) for network in ("plain", "own", "dropped")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_bars_are_means_of_the_four_accuracies_of_each_network_with_a_dot_for_every_seed(networks):
    axes = plots.accuracy_bars(networks)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["plain", "own", "dropped"]
    assert [container.get_label() for container in axes.containers] == ["clean", "noisy", "noisy, true label", "test"]
    noisy, test = axes.containers[1], axes.containers[3]
    assert [bar.get_height() for bar in noisy] == pytest.approx([0.3] * 3)
    assert [bar.get_height() for bar in test] == pytest.approx([0.4, float("nan"), 0.4], nan_ok=True)
    assert sorted(axes.get_lines()[1].get_ydata()) == pytest.approx([0.2] * 3 + [0.3] * 3 + [0.4] * 3)
    assert all(
        dot == pytest.approx(bar.get_center()[0])
        for dot, bar in zip(axes.get_lines()[1].get_xdata()[:3], noisy, strict=True)
    )
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 4
    assert len(axes.figure.legends) == 1
    assert drawn(axes)


def test_bars_of_several_runs_share_one_legend(networks):
    axes = plots.accuracy_bar_panels({"mnist": networks, "cifar10": networks})
    assert [each.get_title() for each in axes] == ["mnist", "cifar10"]
    assert len(axes[0].figure.legends) == 1
    assert drawn(axes[0])


def test_heat_maps_have_every_number_in_its_cell():
    table = pd.DataFrame({0.1: [0.0, 0.25], 0.3: [0.5, 1.0]}, index=pd.Index([0.2, 0.4], name="p_gen"))
    (axes,) = plots.heat_maps({"noisy": table.rename_axis(columns="p_mem")})
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("noisy", "p_mem", "p_gen")
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.00", (1, 0): "0.50", (0, 1): "0.25", (1, 1): "1.00"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.2", "0.4"]
    assert drawn(axes)


@pytest.fixture
def kinds():
    rows = [
        {"kind": kind, "seed": seed, "layer_group": group, "lost": 0.1 * place + 0.2 * seed + shift, "kept": 1 - shift}
        for shift, kind in enumerate(("flipped", "human", "rare"))
        for seed in range(2) for place, group in enumerate(("stem", "body", "head"))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_kinds_are_lines_of_means_with_a_band_over_seeds_and_the_groups_in_their_order(kinds):
    axes = plots.by_kind(kinds, "layer_group", "lost")
    assert [line.get_label() for line in axes.get_lines()] == ["flipped", "human", "rare"]
    assert list(axes.get_lines()[1].get_ydata()) == pytest.approx([1.1, 1.2, 1.3])
    band = axes.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((1.0, 1.4))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "body", "head"]
    assert axes.get_xlabel() == "layer group"
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]
    assert all(len(set(each)) == 3 for each in zip(*looks, strict=True))
    assert drawn(axes)


def test_kinds_side_by_side_have_a_measure_each_or_one_for_all(kinds):
    axes = plots.by_kind_panels({"a": kinds, "b": kinds}, "layer_group", ["lost", "kept"], "fraction")
    assert [each.get_title() for each in axes] == ["a", "b"]
    assert [each.get_ylabel() for each in axes] == ["fraction", "fraction"]
    assert list(axes[1].get_lines()[1].get_ydata()) == [0, 0, 0]
    assert len(axes[0].figure.legends) == 1
    same = plots.by_kind_panels({"a": kinds, "b": kinds}, "layer_group", "lost", "fraction")
    assert list(same[0].get_lines()[0].get_ydata()) == list(same[1].get_lines()[0].get_ydata())
    assert (same[0].get_xscale(), same[0].get_yscale()) == ("linear", "linear")
    (log,) = plots.by_kind_panels({"a": kinds.assign(seed=kinds.seed + 1)}, "seed", "kept", "fraction", ("log", "log"))
    assert (log.get_xscale(), log.get_yscale()) == ("log", "log")
    (named,) = plots.by_kind_panels({"a": kinds}, "layer_group", "kept", "fraction", ("linear", "log"))
    assert drawn(named)
    assert [label.get_text() for label in named.get_xticklabels()] == ["stem", "body", "head"]
    (empty,) = plots.by_kind_panels({}, "layer_group", "lost", "fraction")
    assert empty.texts[0].get_text() == "nothing to show yet"
    assert drawn(empty)


@pytest.fixture
def manifolds():
    rows = [
        {"kind": f"kind {kind}", "seed": seed, "layer": layer, "capacity": 0.1 + 0.1 * layer + 0.02 * seed,
         "radius": 1 + kind, "dimension": 10 - layer}
        for kind in range(5) for seed in range(2) for layer in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_geometry_has_a_row_a_table_a_column_a_measure_and_five_kinds_told_apart(manifolds):
    axes = plots.geometry({"a": manifolds, "b": manifolds}, "layer", "layer", ("linear", "log"))
    assert [each.get_title() for each in axes] == ["a", "a", "a", "b", "b", "b"]
    assert [each.get_ylabel().split()[0] for each in axes[:3]] == ["capacity", "radius", "dimension"]
    assert list(axes[3].get_lines()[0].get_ydata()) == pytest.approx([0.11, 0.21, 0.31])
    assert [each.get_yscale() for each in axes[:3]] == ["log", "linear", "linear"]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes[1].get_lines()]
    assert len(looks) == 5
    assert all(len({look[part] for look in looks}) == 5 for part in (0, 2))
    assert drawn(axes[0])
    (empty,) = plots.geometry({}, "layer", "layer")
    assert empty.texts[0].get_text() == "nothing to show yet"


def test_the_anchor_lies_where_the_projection_meets_the_manifold():
    corners = torch.tensor([[0.5, 0.0, -0.5, 0.0], [0.0, 0.5, 0.0, -0.5]])
    axes = plots.anchor(corners, torch.tensor([1.0, 0.2, 0.4]), torch.tensor([0.4, 0.0, 0.8]))
    lines = {line.get_label(): line.get_data_3d() for line in axes.get_lines()}
    assert [values[0] for values in lines["anchor"]] == pytest.approx([0.5, 0, 1])
    assert [values[1] for values in lines["projection"]] == pytest.approx([0.4, 0, 0.8])
    assert [values[0] for values in lines["rest"]] == pytest.approx([1.0, 0.2, 0.4])
    assert drawn(axes)


def test_clouds_have_a_panel_a_moment_and_a_marker_a_manifold():
    points = torch.arange(36.0).view(3, 4, 3)
    axes = plots.clouds({"early": points, "late": 2 * points})
    assert [each.get_title() for each in axes] == ["early", "late"]
    assert len({line.get_marker() for line in axes[0].get_lines()}) == 3
    assert list(axes[1].get_lines()[1].get_data_3d()[2]) == [28, 34, 40, 46]
    assert drawn(axes[0])


def test_retraining_has_a_panel_for_every_group_and_what_stopped_early_keeps_its_last_values(retrained):
    axes = plots.retraining(retrained[retrained.batch_norm == "keep"])
    assert [each.get_title() for each in axes] == ["stem", "body", "head", "end"]
    noisy = axes[1].get_lines()[1]
    assert list(noisy.get_ydata()) == pytest.approx([0.05, 0.25, 0.45, 0.55])
    assert drawn(axes[0])


def test_recovery_shows_the_reset_once_and_the_end_of_every_treatment(retrained):
    wrong, true = plots.recovery(retrained)
    assert [bars.get_label() for bars in wrong.containers] == ["after the reset", "keep", "follow", "whole network"]
    heights = [[bar.get_height() for bar in bars] for bars in wrong.containers]
    assert heights == [pytest.approx([height] * 4) for height in (0.05, 0.55, 0.55, 0.55)]
    assert sorted(wrong.get_lines()[0].get_ydata()) == pytest.approx([0.0] * 4 + [0.1] * 4)
    assert {bar.get_height() for bar in true.containers[1]} == {0.5}
    assert drawn(wrong)


def test_recovery_of_several_runs_has_a_panel_each(retrained):
    axes = plots.recovery_panels({"mnist": retrained, "cifar10": retrained[~retrained.whole]})
    assert [each.get_title() for each in axes[:2]] == ["mnist", "cifar10"]
    assert [len(each.containers) for each in axes[:2]] == [4, 3]
    assert drawn(axes[0])


def test_shares_are_bars_with_an_interval_and_a_line_where_all_are_equal(kinds):
    table = kinds.rename(columns={"kind": "method", "lost": "share"})
    axes = plots.method_shares({"digits": table})
    assert [each.get_title() for each in axes] == ["flipped", "human", "rare"]
    assert [bar.get_height() for bar in axes[0].patches] == pytest.approx([0.1, 0.2, 0.3])
    assert list(axes[0].get_lines()[-1].get_ydata()) == pytest.approx([1 / 3] * 2)
    low, high = axes[0].collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.1 - 12.706 * 0.1, 0.1 + 12.706 * 0.1), abs=1e-3)  # Student's t, two seeds
    assert [label.get_text() for label in axes[2].get_xticklabels()] == ["stem", "body", "head"]
    assert drawn(axes[0])


def test_shares_of_several_runs_stand_side_by_side_and_one_seed_has_no_interval(kinds):
    table = kinds[kinds.seed == 0].rename(columns={"kind": "method", "lost": "share"})
    axes = plots.method_shares({"mnist": table, "cifar10": table})
    assert [each.get_title() for each in axes[:3]] == ["mnist: flipped", "cifar10: flipped", "mnist: human"]
    assert plots.method_shares({})[0].texts[0].get_text() == "nothing to show yet"
    assert drawn(axes[0])


def test_methods_have_a_line_each_with_worst_group_interval_and_average():
    rows = [
        {
            "method": method,
            "seed": seed,
            "average_accuracy": 0.9,
            "worst_group_accuracy": 0.1 * (place + 1) + 0.1 * seed,
        }
        for place, method in enumerate(("plain", "mat"))
        for seed in range(2)
    ]
    one, two, three, empty = plots.method_dots(dict.fromkeys(("digits", "mnist", "both"), pd.DataFrame(rows)))
    assert [label.get_text() for label in one.get_yticklabels()] == ["plain", "mat"]
    worst, average = one.get_lines()
    assert list(worst.get_xdata()) == pytest.approx([0.15, 0.25])
    assert list(average.get_xdata()) == pytest.approx([0.9, 0.9])
    low, high = one.collections[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx(
        (0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05), abs=1e-3
    )  # Student's t, two seeds
    assert (two.get_title(), three.get_title()) == ("mnist", "both")
    assert not empty.axison
    assert one.get_ylim()[0] > one.get_ylim()[1], "the first method is above"
    single = pd.DataFrame(rows)[lambda table: table.seed == 0]
    assert drawn(plots.method_dots({"one seed": single})[0])
    assert plots.method_dots({})[0].texts[0].get_text() == "nothing to show yet"


def sized(noisy: bool) -> pd.DataFrame:
    rows = [
        {"parameters": 10**power, "kind": kind, "seed": seed, "test_accuracy": 0.1 * power + late, "radius": 1.0,
         "dimension": power + seed, "noisy_accuracy": 0.2 * power, "interpolates": power >= 3}
        for power in range(2, 5) for late, kind in enumerate(("best epoch", "last epoch")) for seed in range(2)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table if noisy else table.drop(columns=["noisy_accuracy", "interpolates"])


def test_double_descent_has_a_line_for_each_moment_over_sizes_and_marks_the_first_that_interpolates():
    axes = plots.double_descent({"digits": sized(noisy=True)})
    assert [each.get_ylabel().partition(" ")[0] for each in axes] == ["accuracy", "radius", "dimension"]
    assert [each.get_xscale() for each in axes] == ["log"] * 3
    best, last, noisy, threshold = axes[0].get_lines()
    assert [line.get_label() for line in (best, last, noisy)] == [
        "best epoch", "last epoch", "noisy labels, last epoch"
    ]  # fmt: skip
    assert list(last.get_ydata()) == pytest.approx([1.2, 1.3, 1.4])
    assert list(noisy.get_ydata()) == pytest.approx([0.4, 0.6, 0.8])
    assert [set(each.get_lines()[-1].get_xdata()) for each in axes] == [{1000}] * 3
    assert list(threshold.get_xdata()) == [1000, 1000]
    assert [len(each.get_lines()) for each in axes] == [4, 3, 3]
    assert list(axes[2].get_lines()[0].get_ydata()) == pytest.approx([2.5, 3.5, 4.5])
    assert drawn(axes[0])


def test_double_descent_draws_tables_that_know_less_and_names_every_line_once():
    axes = plots.double_descent({"published": sized(noisy=False), "mnist": sized(noisy=True)})
    assert [each.get_title() for each in axes] == ["published"] * 3 + ["mnist"] * 3
    assert [len(each.get_lines()) for each in axes] == [2, 2, 2, 4, 3, 3]
    (legend,) = axes[0].figure.legends
    assert len(legend.get_texts()) == 3
    none = sized(noisy=True).assign(interpolates=False)
    assert len(plots.double_descent({"digits": none})[1].get_lines()) == 2
    assert plots.double_descent({})[0].texts[0].get_text() == "nothing to show yet"
    assert drawn(axes[0])


def test_the_style_is_transparent_and_drawn_as_svg(curves):
    content = drawn(plots.accuracy_curves(curves))
    assert content.startswith(b"<?xml")
    assert mpl.rcParams["figure.facecolor"] == mpl.rcParams["axes.facecolor"] == "none"


@pytest.fixture
def flipped():
    rows = [("clean", 2, 0.9), ("clean", 4, 0.8), ("clean", 30, 0.4), ("noisy", 1, 1.0), ("noisy", 1, 0.9)]
    found = pd.DataFrame(rows, columns=["kind", "units", "clean_accuracy"])
    layers = pd.Categorical(["conv1", "conv0", "conv1", "conv1"], categories=["conv0", "conv1", "linear"])
    return found, pd.DataFrame({"kind": ["clean", "clean", "noisy", "noisy"], "layer_group": layers})


def test_flipping_shows_units_accuracy_left_and_layers_of_either_kind(flipped):
    units, left, layers = plots.flipping(*flipped)
    assert [bar.get_height() for bar in units.patches] == pytest.approx([1 / 3] * 3 + [1])
    assert [bar.get_x() + bar.get_width() / 2 for bar in units.patches] == pytest.approx([1.8, 3.8, 19.8, 1.2])
    assert [line.get_xdata()[0] for line in units.get_lines()] == [4, 1]  # medians
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(2)
    assert [bar.get_height() for bar in layers.patches] == pytest.approx([0.5, 0.5, 0, 0, 1, 0])
    assert [label.get_text() for label in layers.get_xticklabels()] == ["conv0", "conv1", "linear"]
    texts = units.figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["clean, N = 3", "noisy, N = 2"]
    assert drawn(units)


def test_kinds_of_targets_differ_in_colour_and_hatching(flipped):
    clean, *_, noisy = plots.flipping(*flipped)[0].patches
    assert clean.get_facecolor() != noisy.get_facecolor()
    assert clean.get_hatch() != noisy.get_hatch()


def test_panels_of_units_add_up_the_seeds():
    counts = pd.DataFrame({"seed": [0, 1, 1], "kind": "noisy", "units": [2, 2, 3], "targets": [4, 2, 2]})
    axes = plots.flipping_panels({"mnist": counts, "cifar10": counts})
    assert [bar.get_height() for bar in axes[0].patches] == pytest.approx([0.75, 0.25])
    assert drawn(axes[0])


def test_a_decision_map_lies_under_its_examples_with_a_line_between_the_classes():
    found = {"both": torch.tensor([[0.0, 0.2], [0.8, 1.0]]), "sure": torch.full((2, 2), 0.9)}
    points = pd.DataFrame({"x": [0.5, -1.0, 1.0], "y": [3.0, -4.0, 4.0], "label": [1, 0, 0]})
    both, sure = plots.decision_maps(found, dict.fromkeys(found, points), (-2, 2, -10, 10), ("core", "spurious"))[:2]
    assert both.images[0].get_array().tolist() == found["both"].tolist()
    assert both.images[0].origin == "lower"
    zeros, ones = both.get_lines()
    assert list(zip(*zeros.get_data(), strict=True)) == [(-1, -4), (1, 4)]
    assert list(zip(*ones.get_data(), strict=True)) == [(0.5, 3)]
    assert zeros.get_color() != ones.get_color()
    assert zeros.get_marker() != ones.get_marker()
    assert [len(each.collections) for each in (both, sure)] == [1, 0]  # the line
    (line,) = (path for collection in both.collections for path in collection.get_paths())
    assert -10 < line.vertices[:, 1].min() <= line.vertices[:, 1].max() < 10
    assert (both.get_xlim(), both.get_ylim()) == ((-2, 2), (-10, 10))
    assert (both.get_xlabel(), both.get_ylabel()) == ("core", "spurious")
    assert drawn(both)
    assert plots.decision_maps({}, {}, (0, 1, 0, 1), ("", ""))[0].texts[0].get_text() == "nothing to show yet"


def test_a_sweep_has_predictions_as_lines_and_simulations_as_markers_with_their_range():
    rows = [
        {"kind": kind, "noise": noise, "ratio": factor * noise**2, "seed": seed, "predicted": 1 - noise / 4,
         "minority_accuracy": 1 - noise / 4 + 0.1 * seed}
        for kind, factor in (("weak", 1), ("strong", 4)) for noise in (1, 2) for seed in range(2)
    ]  # fmt: skip
    by_noise, by_ratio = plots.ridge_sweep(pd.DataFrame(rows))
    predicted, simulated, strong, _, half = by_noise.get_lines()
    assert [predicted.get_label(), strong.get_label()] == ["weak", "strong"]
    assert list(predicted.get_xydata().flatten()) == pytest.approx([1, 0.75, 2, 0.5])
    assert list(simulated.get_ydata()) == pytest.approx([0.8, 0.55])
    assert simulated.get_linestyle() == "None"
    assert by_noise.collections[0].get_segments()[0][:, 1] == pytest.approx([0.75, 0.85])
    assert list(half.get_ydata()) == [0.5, 0.5]
    assert list(by_ratio.get_lines()[2].get_xdata()) == [4, 16]
    assert list(by_ratio.get_lines()[-1].get_xdata()) == [1, 1]
    assert {by_noise.get_xscale(), by_ratio.get_xscale()} == {"log"}
    assert [text.get_text() for text in by_noise.figure.legends[0].get_texts()] == ["weak", "strong"]
    assert drawn(by_noise)


def test_fitted_curves_are_drawn_with_the_true_one_and_the_points():
    curve = pd.DataFrame({"x": [0.0, 1.0], "truth": [0.0, 0.1], "clean": [0.2, 0.3], "mixed": [0.4, 0.5]})
    points = pd.DataFrame({"x": [0.5], "y": [0.9]})
    axes = plots.curve_fits({"good": curve, "bad": curve}, {"good": points, "bad": points})
    assert [each.get_title() for each in axes] == ["good", "bad"]
    found = {line.get_label(): list(line.get_ydata()) for line in axes[1].get_lines()}
    assert found == {
        "fit, noise of the points": [0.4, 0.5], "fit, no noise": [0.2, 0.3], "true curve": [0.0, 0.1],
        "training points": [0.9],
    }  # fmt: skip
    assert len(axes[0].figure.legends) == 1
    assert drawn(axes[0])


def test_errors_are_a_dot_for_each_seed_a_bar_for_the_median_and_a_cross_for_what_was_published():
    rows = [
        {"kind": kind, "seed": seed, "error": (seed + 1) * scale, "largest": 1.0}
        for kind, scale in (("good", 1), ("bad", 10)) for seed in (0, 1, 4)
    ]  # fmt: skip
    published = pd.DataFrame({"kind": ["bad", "other"], "error": [7.0, 1.0], "largest": [2.0, 1.0]})
    axes = plots.error_dots({"digits": pd.DataFrame(rows)}, {"error": "mean", "largest": "most"}, published)
    good, bad, cross = axes[0].get_lines()
    assert [sorted(line.get_ydata()) for line in (good, bad)] == [[1, 2, 5], [10, 20, 50]]
    assert list(good.get_xdata()) == pytest.approx([-0.15, 0, 0.15])
    assert [bars.get_segments()[0][0][1] for bars in axes[0].collections] == [2, 20]
    assert list(cross.get_xydata().flatten()) == [1, 7]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["good", "bad"]
    assert [each.get_ylabel() for each in axes] == ["mean", "most"]
    assert {each.get_yscale() for each in axes} == {"log"}
    assert drawn(axes[0])


@pytest.mark.parametrize(("least", "expected"), [(0.1, {0.1, 0.2, 0.5, 1}), (1e-4, {1e-4, 1e-3, 1e-2, 0.1, 1})])
def test_wide_logarithmic_scales_have_fewer_numbers(least, expected):
    table = pd.DataFrame({"kind": ["good", "bad"], "seed": [0, 0], "error": [least, 1.0]})
    (axes,) = plots.error_dots({"digits": table}, {"error": "mean"})
    low, high = axes.get_ylim()
    assert {round(tick, 9) for tick in axes.get_yticks() if low <= tick <= high} == expected


def test_errors_of_one_seed_stand_in_the_middle_and_none_say_so():
    table = pd.DataFrame({"kind": ["good"], "seed": [0], "error": [1.0]})
    (axes,) = plots.error_dots({"digits": table}, {"error": "mean"})
    assert list(axes.get_lines()[0].get_xdata()) == [0]
    assert plots.error_dots({}, {"error": "mean"})[0].texts[0].get_text() == "nothing to show yet"


def test_accuracies_of_groups_are_bars_of_means_with_a_dot_for_each_seed():
    rows = [
        {"network": network, "seed": seed, "worst": worst + seed / 10, "average": 0.9}
        for network, worst in (("plain", 0.2), ("fair", 0.4)) for seed in (0, 2)
    ]  # fmt: skip
    columns = {"worst": "worst group", "average": "mean of the groups"}
    axes = plots.group_bars({"digits": pd.DataFrame(rows), "more": pd.DataFrame(rows)}, columns)
    assert [each.get_title() for each in axes] == ["digits", "more"]
    assert [bar.get_height() for bar in axes[0].patches] == pytest.approx([0.3, 0.5, 0.9, 0.9])
    dots = axes[0].get_lines()[0]
    assert list(dots.get_ydata()) == pytest.approx([0.2, 0.4, 0.4, 0.6])
    assert list(dots.get_xdata()) == pytest.approx([-0.2, -0.2, 0.8, 0.8])
    assert len({bar.get_hatch() for bar in axes[0].patches}) == 2
    assert [text.get_text() for text in axes[0].get_figure().legends[0].texts] == list(columns.values())
    assert drawn(axes[0])
    assert plots.group_bars({}, columns)[0].texts[0].get_text() == "nothing to show yet"


@pytest.fixture
def scored():
    kinds = ["minority"] * 4 + ["majority"] * 5
    scores = [1e-9, 0.1, 0.2, 0.4, 1e-3, 2e-3, 2e-3, 4e-3, 8e-3]
    return pd.DataFrame({"kind": kinds, "score": scores})


def test_histograms_of_groups_are_shares_of_each_with_a_line_at_the_95_percent_quantile(scored):
    top, bottom = plots.group_histograms({"plain": scored, "other": scored}, "score", "score (nats)")
    assert [top.get_title(), bottom.get_title()] == ["plain", "other"]
    bars = [patch for patch in top.patches if patch.get_hatch() or isinstance(patch, mpl.patches.Rectangle)]
    minority, majority = bars[:30], bars[30:60]
    assert sum(bar.get_height() for bar in minority) == pytest.approx(1)
    assert sum(bar.get_height() for bar in majority) == pytest.approx(1)
    assert minority[0].get_height() == pytest.approx(1 / 4)  # what is too small
    assert [line.get_xdata()[0] for line in top.get_lines()] == pytest.approx([0.37, 0.0072])
    assert {top.get_xscale(), top.get_yscale()} == {"log"}
    assert (top.get_xlabel(), bottom.get_xlabel()) == ("", "score (nats)")
    assert drawn(top)


def test_groups_in_histograms_differ_in_colour_line_and_hatching(scored):
    (axes,) = plots.group_histograms({"plain": scored}, "score", "score (nats)")
    first, second = axes.get_lines()
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()
    assert len({bar.get_hatch() for bar in axes.patches if isinstance(bar, mpl.patches.Rectangle)}) == 2
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["minority", "majority"]
    assert plots.group_histograms({}, "score", "")[0].texts[0].get_text() == "nothing to show yet"


def test_a_scatter_has_each_group_and_a_line_where_prediction_and_truth_agree():
    table = pd.DataFrame({"kind": ["minority", "majority"], "predicted": [0.5, 0.0], "drop": [0.6, -0.1]})
    axes = plots.influence_scatter(dict.fromkeys("abcd", table))
    assert len(axes) == 4
    minority, majority, same = axes[3].get_lines()
    assert (list(minority.get_xdata()), list(minority.get_ydata())) == ([0.5], [0.6])
    assert (list(majority.get_xdata()), list(majority.get_ydata())) == ([0.0], [-0.1])
    assert list(same.get_xdata()) == list(same.get_ydata()) == [-0.1, 0.6]
    assert minority.get_marker() != majority.get_marker()
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("predicted drop", "exact drop")
    assert drawn(axes[0])
    assert plots.influence_scatter({})[0].texts[0].get_text() == "nothing to show yet"
