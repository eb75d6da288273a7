import pytest
import torch

from memloc import models, observers
from memloc.recipes import Settings
from memloc.training import train


@pytest.fixture
def watched(tiny):
    """A network trained for two epochs under both observers: its weights before and after, and its history."""
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictions, checkpoints = observers.Predictions(), observers.Checkpoints([0, 2])
    history = train(model, tiny, Settings(epochs=2), observers=[predictions, checkpoints])
    after = {name: value.cpu() for name, value in model.state_dict().items()}
    return before, after, history, predictions, checkpoints


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_predictions_are_the_answers_after_each_epoch(watched, tiny):
    _, _, history, predictions, _ = watched
    table = predictions.table()["predictions"]
    assert table.shape == (3, 64)
    clean = ~tiny.train.noise_mask.cpu()
    right = (table == tiny.train.labels.cpu())[:, clean].double().mean(1)
    assert right.tolist() == pytest.approx(list(history.clean_accuracy))


def test_checkpoints_are_the_weights_of_the_epochs_that_were_asked_for(watched):
    before, after, _, _, checkpoints = watched
    assert list(checkpoints.states) == [0, 2]
    assert same(checkpoints.states[0], before)
    assert same(checkpoints.states[2], after)


def test_what_an_observer_left_can_be_taken_up_by_another(watched):
    _, _, _, predictions, checkpoints = watched
    other_predictions, other_checkpoints = observers.Predictions(), observers.Checkpoints()
    other_predictions.restore(predictions.table())
    other_checkpoints.restore(checkpoints.table())
    assert same(other_predictions.table(), predictions.table())
    assert all(same(other_checkpoints.states[epoch], state) for epoch, state in checkpoints.states.items())


def test_an_observer_of_another_training_forgets_the_first(tiny):
    predictions, checkpoints = observers.Predictions(), observers.Checkpoints()
    for epochs in (2, 1):
        model = models.build("mlp", in_channels=1, size=8, num_classes=10, width=4, seed=0)
        train(model, tiny, Settings(epochs=epochs), observers=[predictions, checkpoints])
    assert len(predictions.table()["predictions"]) == 2
    assert list(checkpoints.states) == [0, 1]


def test_an_observer_without_a_table_of_its_own_says_so():
    with pytest.raises(NotImplementedError):
        observers.Observer().table()
