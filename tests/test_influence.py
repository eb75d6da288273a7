import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from memloc.activations import features as activations
from memloc.copies import Descent
from memloc.influence import implied_ridge, self_influence
from memloc.leave_one_out import leave_one_out


def some(size=9, features=4, classes=3, lead=(), seed=0):
    """Features, weights, labels, shifts and weights of examples, in float64."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*lead, size, features, generator=draw, dtype=torch.float64)
    matrix = torch.randn(*lead, classes, features, generator=draw, dtype=torch.float64)
    labels = torch.randint(classes, (*lead, size), generator=draw)
    shift = torch.randn(*lead, size, classes, generator=draw, dtype=torch.float64)
    weights = torch.rand(*lead, size, generator=draw, dtype=torch.float64)
    return inputs, matrix, labels, shift, weights


def loss(matrix, inputs, labels, shift, weights):
    return (weights * F.cross_entropy(inputs @ matrix.T + shift, labels, reduction="none")).sum()


def by_autograd(inputs, matrix, labels, shift, weights, ridge):
    """Scores and predicted drops from the Hessian that autograd makes, example by example."""

    def hessian(keep):
        found = torch.autograd.functional.hessian(lambda m: loss(m, inputs, labels, shift, keep), matrix)
        return found.reshape(matrix.numel(), -1) + ridge * torch.eye(matrix.numel(), dtype=torch.float64)

    scores, drops = [], {"first": [], "leverage": []}
    for index, label in enumerate(labels):
        alone = torch.zeros_like(weights).index_fill(0, torch.tensor([index]), 1.0) * weights
        point = matrix.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(point, inputs, labels, shift, alone), point)[0].flatten()
        scores.append(gradient @ torch.linalg.solve(hessian(weights), gradient) / weights[index].clamp(min=1e-300))
        before = (inputs[index] @ matrix.T).softmax(0)[label]
        for name, keep in (("first", weights), ("leverage", weights - alone)):
            moved = matrix + torch.linalg.solve(hessian(keep), gradient).view_as(matrix)
            drops[name].append(before - (inputs[index] @ moved.T).softmax(0)[label])
    return torch.stack(scores), torch.stack(drops["leverage"]), torch.stack(drops["first"])


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("features", [1, 4, 20])
def test_scores_and_drops_are_those_of_the_hessian_that_autograd_makes(features, classes, ridge):
    inputs, matrix, labels, shift, weights = some(features=features, classes=classes)
    found = self_influence(inputs, inputs @ matrix.T, labels, ridge=ridge, shift=shift, weights=weights)
    scores, drops, first_order = by_autograd(inputs, matrix, labels, shift, weights, ridge)
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.drops, drops)
    torch.testing.assert_close(found.first_order, first_order)
    own = (inputs @ matrix.T).softmax(1)[torch.arange(9), labels]
    torch.testing.assert_close(found.probabilities, own)


def test_leverages_add_up_to_the_parameters_that_the_ridge_leaves_free():
    inputs, matrix, labels, shift, weights = some()
    hessian = torch.autograd.functional.hessian(lambda m: loss(m, inputs, labels, shift, weights), matrix)
    values = torch.linalg.eigvalsh(hessian.reshape(12, 12))
    found = self_influence(inputs, inputs @ matrix.T, labels, ridge=0.3, shift=shift, weights=weights)
    torch.testing.assert_close(found.leverages.sum(), (values / (values + 0.3)).sum())
    assert ((found.leverages > 0) & (found.leverages < 2)).all()


def test_without_shift_and_weights_every_example_counts_one():
    inputs, matrix, labels, _, _ = some()
    logits = inputs @ matrix.T
    plain = self_influence(inputs, logits, labels, ridge=0.5)
    spelled = self_influence(inputs, logits, labels, ridge=0.5, shift=torch.zeros(9, 3), weights=torch.ones(9))
    torch.testing.assert_close(plain.scores, spelled.scores)
    torch.testing.assert_close(plain.drops, spelled.drops)


@pytest.mark.parametrize("memory", [1, 10**9])
def test_several_classifiers_are_each_as_if_alone(memory, monkeypatch):
    monkeypatch.setattr("memloc.influence._MEMORY_BYTES", memory)
    inputs, matrix, labels, shift, weights = some(lead=(2, 3))
    ridge = torch.linspace(0.1, 1, 6).view(2, 3)
    logits = inputs @ matrix.mT
    together = self_influence(inputs, logits, labels, ridge=ridge, shift=shift, weights=weights)
    for place in np.ndindex(2, 3):
        given = {"ridge": ridge[place].item(), "shift": shift[place], "weights": weights[place]}
        alone = self_influence(inputs[place], logits[place], labels[place], **given)
        torch.testing.assert_close(together.scores[place], alone.scores, rtol=1e-5, atol=0)
        torch.testing.assert_close(together.leverages[place], alone.leverages, rtol=1e-5, atol=0)
        torch.testing.assert_close(together.drops[place], alone.drops, rtol=1e-5, atol=1e-9)


def test_classifiers_can_share_features_and_labels():
    inputs, matrix, labels, _, _ = some(features=20)
    logits = torch.stack([inputs @ matrix.T, -inputs @ matrix.T])
    found = self_influence(inputs, logits, labels, ridge=0.5)
    for copy in range(2):
        torch.testing.assert_close(found.scores[copy], self_influence(inputs, logits[copy], labels, ridge=0.5).scores)


def test_a_common_change_of_all_logits_changes_nothing():
    inputs, matrix, labels, _, _ = some()
    logits = inputs @ matrix.T
    first, second = (self_influence(inputs, each, labels, ridge=0.5) for each in (logits, logits + 7))
    torch.testing.assert_close(first.scores, second.scores)


def test_an_example_that_the_network_is_sure_of_has_a_small_score_and_not_a_rounding_error():
    logits = torch.tensor([[60.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = self_influence(torch.eye(2, dtype=torch.float64), logits, torch.tensor([0, 1]), ridge=1.0)
    assert found.scores[0].item() == pytest.approx(2 * math.exp(-120), rel=1e-6, abs=0)


def test_one_example_one_class_and_a_class_without_examples():
    alone = self_influence(torch.ones(1, 1), torch.zeros(1, 2), torch.tensor([0]), ridge=1.0)
    assert alone.scores.item() == pytest.approx(0.5 / 1.5)
    sure = self_influence(torch.ones(2, 3), torch.zeros(2, 1), torch.tensor([0, 0]), ridge=1.0)
    assert sure.scores.tolist() == sure.drops.tolist() == [0, 0]
    inputs, matrix, _, _, _ = some()
    found = self_influence(inputs, inputs @ matrix.T, torch.zeros(9, dtype=torch.int64), ridge=0.1)
    assert (found.scores > 0).all()


def test_at_a_minimum_the_predicted_drop_is_that_of_training_without_the_example():
    inputs, _, _, _, _ = some(size=60, features=5, classes=2)
    labels = (inputs[:, 0] + inputs[:, 1] > 0.3).long()
    labels[:6] = 1 - labels[:6]
    descent = Descent(steps=600, learning_rate=0.5, weight_decay=0.02)
    exact = leave_one_out(inputs, labels, torch.arange(60), descent, start=torch.zeros(60, 2, dtype=torch.float64))
    found = self_influence(inputs, exact.logits[0], labels, ridge=0.02 * 60)
    torch.testing.assert_close(found.drops, exact.drops[0], rtol=0.1, atol=1e-3)
    assert spearmanr(found.drops, exact.drops[0]).statistic > 0.99


def test_stopped_early_the_implied_ridge_predicts_drops_that_first_order_cannot():
    """Where every example has coordinates of its own, as in the toy: what is left out is nearly all that it had."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 120, generator=draw, dtype=torch.float64) / 4
    labels = torch.arange(40) % 2
    inputs[:, 0] = torch.where(torch.arange(40) < 8, -1.0, 1.0) * (2.0 * labels - 1)
    descent = Descent(steps=400, learning_rate=0.1)
    exact = leave_one_out(inputs, labels, torch.arange(40), descent, start=torch.zeros(40, 2, dtype=torch.float64))
    margins = exact.logits[0, :, 0] / 2
    towards = torch.linalg.lstsq(inputs, margins[:, None], driver="gelsd").solution[:, 0]
    change = torch.stack([towards, -towards])
    ridge, alignment = implied_ridge(inputs, exact.logits[0], labels, change)
    assert 0 < ridge < 40 / (400 * 0.1)
    assert alignment > 0.9
    found = self_influence(inputs, exact.logits[0], labels, ridge=ridge)
    assert (found.drops - exact.drops[0]).abs().mean() < 0.05
    minority = exact.drops[0][:8].mean()
    assert found.drops[:8].mean().item() == pytest.approx(minority.item(), abs=0.1)
    assert found.first_order[:8].mean() < 0.5 * minority


def test_the_implied_ridge_of_weights_that_went_nowhere_is_zero():
    inputs, matrix, labels, _, _ = some()
    ridge, alignment = implied_ridge(inputs, inputs @ matrix.T, labels, torch.zeros(3, 4))
    assert (ridge.item(), alignment.item()) == (0, 0)


def test_the_implied_ridge_of_weights_that_went_the_wrong_way_is_zero():
    inputs, labels = torch.ones(2, 1), torch.tensor([0, 0])
    ridge, alignment = implied_ridge(inputs, torch.zeros(2, 2), labels, torch.tensor([[-1.0], [1.0]]))
    assert (ridge.item(), alignment.item()) == pytest.approx((0, -1))


@pytest.mark.parametrize(("size", "features", "largest"), [(9, 50, 18), (9, 4, 8)])
def test_no_matrix_is_larger_than_the_span_of_the_examples_needs(size, features, largest, monkeypatch):
    seen, inverted = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: seen.append(matrix.shape[-1]) or inverted(matrix))
    inputs, matrix, labels, _, _ = some(size=size, features=features)
    self_influence(inputs, inputs @ matrix.T, labels, ridge=1.0)
    assert seen == [largest]


def test_the_implied_ridge_minimises_the_gradient_with_the_penalty():
    inputs, matrix, labels, shift, weights = some()
    change = 0.1 * matrix
    point = matrix.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(point, inputs, labels, shift, weights), point)[0]
    if (gradient * change).sum() > 0:
        change = -change
    ridge, alignment = implied_ridge(inputs, inputs @ matrix.T, labels, change, shift=shift, weights=weights)
    norms = {each: (gradient + each * ridge * change).norm() for each in (0.99, 1.0, 1.01)}
    assert min(norms, key=norms.__getitem__) == 1.0
    expected = F.cosine_similarity(-gradient.flatten(), change.flatten(), dim=0)
    torch.testing.assert_close(alignment, expected)


def test_the_last_layer_of_any_network_can_be_taken():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    images, labels = torch.randn(10, 6), torch.arange(10) % 3
    hidden = dict(activations(nn.Sequential(model[0], model[1], nn.Identity(), model[2]), images, ["2"]))["2"]
    seen = F.pad(hidden, (0, 1), value=1.0)
    found = self_influence(seen, model(images), labels, ridge=1.0)
    matrix = torch.cat([model[2].weight, model[2].bias[:, None]], 1).detach().double()
    nothing = torch.zeros(10, 3, dtype=torch.float64)
    scores, _, _ = by_autograd(seen.double(), matrix, labels, nothing, torch.ones(10, dtype=torch.float64), 1.0)
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-7)


def test_the_table_has_a_row_for_each_copy_and_example():
    inputs, matrix, labels, _, _ = some(lead=(2,))
    found = self_influence(inputs, inputs @ matrix.mT, labels, ridge=1.0)
    table = found.table()
    assert list(table.columns) == [
        "copy",
        "example",
        "self_influence",
        "leverage",
        "probability",
        "drop",
        "first_order",
    ]
    assert list(table["copy"]) == [0] * 9 + [1] * 9
    assert list(table.example) == [*range(9), *range(9)]
    assert table.self_influence[10] == found.scores[1, 1].item()
    assert len(self_influence(inputs[0], inputs[0] @ matrix[0].T, labels[0], ridge=1.0).table()) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": 0.0}, "ridge must be above 0, got 0.0: without a ridge, take implied_ridge"),
        ({"ridge": math.nan}, "ridge must be above 0"),
        ({"labels": torch.full((9,), 3)}, "labels must be int64 from 0 to 2, got torch.int64 from 3 to 3"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, r"labels must have shape \(9,\) or \(9,\), got \(8,\)"),
        ({"features": torch.zeros(8, 4)}, r"features must have shape \(9, 4\)"),
        ({"shift": torch.zeros(9, 2)}, r"shift must have shape \(9, 3\)"),
        ({"weights": torch.full((9,), -1.0)}, "weights must be at least 0"),
        ({"logits": torch.full((9, 3), math.inf)}, "logits must be finite"),
        ({"logits": torch.zeros(3)}, r"logits must be finite, \(…, N, K\) with an example, got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    inputs, matrix, labels, _, _ = some()
    given = {"features": inputs, "logits": inputs @ matrix.T, "labels": labels, "ridge": 1.0}
    with pytest.raises(ValueError, match=message):
        self_influence(**given | changes)


def test_a_change_of_another_shape_is_refused():
    inputs, matrix, labels, _, _ = some()
    with pytest.raises(ValueError, match=r"change must have shape \(3, 4\), \(…, K, D\), got \(4, 3\)"):
        implied_ridge(inputs, inputs @ matrix.T, labels, matrix.T)
