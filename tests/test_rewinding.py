import pytest
import torch
from torch import nn

from memloc import datasets, evaluation, models, vision
from memloc.observers import Checkpoints
from memloc.recipes import Settings
from memloc.rewinding import BATCH_NORM, last_groups, rewind, rewind_sweep
from memloc.training import train


@pytest.fixture(scope="module")
def trained(tiny):
    """A network trained for six epochs, and its weights after each."""
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    checkpoints = Checkpoints()
    train(model, tiny, Settings(epochs=6, batch_size=16, learning_rate=0.1), observers=[checkpoints])
    return model, checkpoints.states


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
def test_the_network_is_as_before_afterwards_to_the_bit(trained, tiny, batch_norm):
    model, states = trained
    before = weights(model)
    with pytest.raises(KeyError), rewind(model, states[0], "conv1", batch_norm=batch_norm, images=tiny.train.images):
        assert not same(before, model.state_dict())
        raise KeyError
    assert same(before, model.state_dict())
    assert model.training


def test_only_the_groups_parameters_change_and_they_are_the_checkpoints(trained):
    model, states = trained
    before = weights(model)
    with rewind(model, states[2], "conv1"):
        for name, value in model.state_dict().items():
            expected = states[2][name] if name in models.layer_groups(model)["conv1"] else before[name]
            assert torch.equal(value.cpu(), expected.cpu()), name


def test_batch_norm_statistics_go_back_with_their_group_when_asked(trained):
    model, states = trained
    before = weights(model)
    with rewind(model, states[2], "conv1", batch_norm="rewind"):
        for name, value in model.state_dict().items():
            expected = states[2][name] if name.startswith("conv1") else before[name]
            assert torch.equal(value.cpu(), expected.cpu()), name


def test_recalibrated_statistics_are_those_of_the_images_under_the_rewound_weights(trained, tiny):
    model, states = trained
    images = tiny.train.images[:32]
    with rewind(model, states[1], "conv1", batch_norm="recalibrate", images=images, batch_size=16):
        first = model.conv0[0](images)
        means = torch.stack([half.mean((0, 2, 3)) for half in first.split(16)]).mean(0)
        variances = torch.stack([half.var((0, 2, 3)) for half in first.split(16)]).mean(0)
        torch.testing.assert_close(model.conv0[1].running_mean, means)
        torch.testing.assert_close(model.conv0[1].running_var, variances)
        assert torch.equal(model.conv1[0].weight.cpu(), states[1]["conv1.0.weight"])


def test_all_groups_together_are_the_checkpoint(trained, tiny):
    model, states = trained
    other = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=9)
    other.load_state_dict(states[1])
    expected = evaluation.predict(other.to(tiny.train.images.device), tiny.train.images)
    with rewind(model, states[1], models.layer_groups(model), batch_norm="rewind"):
        assert torch.equal(evaluation.predict(model, tiny.train.images), expected)


def test_last_groups_are_nested_from_the_output_on(trained):
    assert last_groups(trained[0])["last 2"] == ["conv3", "linear"]
    assert last_groups(trained[0])["last 5"] == list(models.layer_groups(trained[0]))


@pytest.mark.parametrize(
    ("groups", "keywords", "message"),
    [
        ("conv9", {}, "groups must be among conv0, .*, got 'conv9'"),
        ("conv1", {"batch_norm": "reset"}, "batch_norm must be one of keep, rewind, recalibrate, got 'reset'"),
        ("conv1", {"batch_norm": "recalibrate"}, "batch_norm='recalibrate' needs images="),
    ],
)
def test_wrong_arguments_are_refused(trained, groups, keywords, message):
    model, states = trained
    with pytest.raises(ValueError, match=message), rewind(model, states[0], groups, **keywords):
        pass


def test_a_checkpoint_of_another_network_is_refused(trained):
    model, states = trained
    with pytest.raises(ValueError, match=r"earlier must hold linear.weight of shape \(10, 16\), got nothing"):
        rewind(model, {}, "linear").__enter__()
    wrong = states[0] | {"linear.weight": torch.zeros(10, 3)}
    with pytest.raises(ValueError, match=r"of shape \(10, 16\), got \(10, 3\)"):
        rewind(model, wrong, "linear").__enter__()


def by_hand(model, states, data, groups, batch_norm, calibration):
    """The sweep as an explicit loop."""
    rows = []
    for names in groups.values():
        for state in states.values():
            images = data.train.images[:calibration]
            with rewind(model, state, names, batch_norm=batch_norm, images=images, batch_size=16):
                rows.append(evaluation.evaluate(model, data).accuracies)
    return rows


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
def test_the_sweep_agrees_with_an_explicit_loop(trained, tiny, batch_norm):
    model, states = trained
    before = weights(model)
    sweep = rewind_sweep(model, states, tiny, batch_norm=batch_norm, calibration=40, batch_size=16)
    groups = {name: [name] for name in models.layer_groups(model)}
    assert [found for row in sweep.accuracies for found in row] == by_hand(model, states, tiny, groups, batch_norm, 40)
    assert same(before, model.state_dict())
    assert model.training
    assert model.conv1[1].momentum == 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sweep_runs_in_the_precision_and_layout_asked_for(tiny, precision):
    model, seen = models.small_cnn(3, width=2).to(tiny.train.images.device), set()
    images = torch.rand(4, 3, 8, 8)
    data = datasets.from_arrays(images, torch.arange(4), images, torch.arange(4), device=tiny.train.images.device)

    def look(module, inputs, output):
        seen.add((output.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last)))

    model.conv0[0].register_forward_hook(look)
    rewind_sweep(model, {0: model.state_dict()}, data, precision=precision, channels_last=True)
    assert seen == {(evaluation.PRECISIONS[precision], True)}


@pytest.mark.parametrize("batch_norm", ["keep", "rewind", "recalibrate"])
def test_rewinding_to_the_last_epoch_changes_nothing(trained, tiny, batch_norm):
    model, states = trained
    sweep = rewind_sweep(model, {6: states[6]}, tiny, batch_norm=batch_norm)
    assert all(row == (sweep.final,) for row in sweep.accuracies)
    assert (sweep.table().clean_lost == 0).all()
    if batch_norm != "recalibrate":
        assert sweep.final == evaluation.evaluate(model, tiny).accuracies


def test_the_table_has_a_row_for_every_choice_and_epoch(trained, tiny):
    model, states = trained
    table = rewind_sweep(model, {0: states[0], 3: states[3]}, tiny, groups=last_groups(model)).table()
    assert list(table.layer_group.unique()) == [f"last {k}" for k in range(1, 6)]
    assert list(table.epoch.unique()) == [0, 3]
    assert len(table) == 10
    assert table.noisy_accuracy.between(0, 1).all()


def test_what_is_lost_is_the_controls_accuracy_less_the_rewound_networks(trained, tiny):
    model, states = trained
    sweep = rewind_sweep(model, {0: states[0]}, tiny)
    table = sweep.table()
    assert table.clean_lost.max() > 0
    for name in ("clean", "noisy", "restored", "test"):
        lost = getattr(sweep.final, name) - table[f"{name}_accuracy"]
        assert list(table[f"{name}_lost"]) == pytest.approx(list(lost))


def test_checkpoints_may_come_in_any_order(trained, tiny):
    model, states = trained
    tables = [rewind_sweep(model, {e: states[e] for e in order}, tiny).table() for order in ((0, 4), (4, 0))]
    first, second = (table.sort_values(["layer_group", "epoch"]).reset_index(drop=True) for table in tables)
    assert first.equals(second)
    assert not first[first.epoch == 0].clean_accuracy.equals(first[first.epoch == 4].clean_accuracy)


def test_a_sweep_without_checkpoints_is_refused(trained, tiny):
    with pytest.raises(ValueError, match="checkpoints must map at least one epoch to a state dict, got dict"):
        rewind_sweep(trained[0], {}, tiny)


class Branching(nn.Module):
    """Calls a layer twice, ties weights, writes in place, and reads a weight without a call."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)
        self.tied = nn.Linear(4, 10)
        self.tied.weight = self.head.weight
        self.uncalled = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        y = self.twice(x)
        y += self.twice(y)
        z = (x + y).mean((2, 3)) * self.scale
        z = z @ self.uncalled.weight
        return self.head(z) + self.tied(z)


def any_network(name):
    if name == "branching":
        return Branching()
    if name == "mlp":
        return models.mlp(64, width=8)
    resnet = vision.torchvision().models.resnet18(num_classes=10)
    resnet.conv1 = nn.Conv2d(1, 64, 3, bias=False)
    return resnet


@pytest.mark.parametrize("name", ["branching", "mlp", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_any_network_can_be_swept(tiny, name):
    model, other = any_network(name), any_network(name)
    model, other = model.to(tiny.train.images.device), other.to(tiny.train.images.device)
    states, groups = {0: other.state_dict()}, {name: [name] for name in models.layer_groups(model)}
    sweep = rewind_sweep(model, states, tiny, batch_norm="rewind", batch_size=64)
    assert [row[0] for row in sweep.accuracies] == by_hand(model, states, tiny, groups, "rewind", 0)


def test_what_lies_before_the_rewound_layer_is_computed_once_a_batch(tiny):
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    model, calls = model.to(tiny.train.images.device), []
    model.conv0[0].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    states = {0: {name: torch.rand_like(value.float()) for name, value in model.state_dict().items()}}
    rewind_sweep(model, states, tiny, batch_size=64)
    batches = 1 + 8  # of 64 training and 500 test examples
    network_and_rewound_conv0, all_five_whole = 2, 5
    assert len(calls) == batches * network_and_rewound_conv0 + all_five_whole


def test_a_network_that_breaks_the_order_of_its_calls_is_swept_whole(tiny):
    class ReadsAhead(nn.Sequential):
        def forward(self, x):
            return super().forward(x + self[-1].bias.sum())

    model = ReadsAhead(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10)).to(tiny.train.images.device)
    states = {0: {name: 3 * value for name, value in model.state_dict().items()}}
    sweep = rewind_sweep(model, states, tiny, batch_size=64)
    groups = {name: [name] for name in models.layer_groups(model)}
    assert [row[0] for row in sweep.accuracies] == by_hand(model, states, tiny, groups, "keep", 0)


def test_rewinding_inside_an_autocast_is_seen_and_undone(trained, tiny):
    model, states = trained
    images = tiny.train.images
    with torch.autocast(images.device.type, torch.bfloat16), models.evaluation_mode(model):
        before = model(images)
        with rewind(model, states[0], "linear"):
            assert not torch.equal(model(images), before)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_of_a_norm_without_weights_go_back_with_the_layer_before_it(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Conv2d(4, 2, 3))
    earlier = {name: value + 1 for name, value in model.state_dict().items()}
    with rewind(model, earlier, "0", batch_norm="rewind"):
        changed = {name for name, value in model.state_dict().items() if torch.equal(value, earlier[name])}
    assert changed == {name for name in earlier if name.startswith(("0.", "1."))}


def test_statistics_before_the_first_weight_go_back_with_the_first_group():
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4), nn.Linear(4, 2))
    earlier = {name: value + 1 for name, value in model.state_dict().items()}
    for group, expected in (("1", {"0", "1"}), ("2", {"2"})):
        with rewind(model, earlier, group, batch_norm="rewind"):
            changed = {name for name, value in model.state_dict().items() if torch.equal(value, earlier[name])}
        assert {name[0] for name in changed} == expected


def test_buffers_outside_the_state_dict_are_restored_and_other_state_is_left_alone():
    class Remembers(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

        def get_extra_state(self):
            return {"not": "a tensor"}

        def set_extra_state(self, state):
            raise AssertionError

    model = nn.Sequential(Remembers())
    with rewind(model, model.state_dict(), "0", batch_norm="rewind"):
        model(torch.zeros(1, 4))
    assert model[0].seen == 0


def test_a_sweep_inside_inference_mode_agrees_with_one_outside(trained, tiny):
    model, states = trained
    expected = rewind_sweep(model, {0: states[0]}, tiny)
    with torch.inference_mode():
        assert rewind_sweep(model, {0: states[0]}, tiny) == expected


class CallsAgain(nn.Module):
    """Doubles its input, gives it to a second layer, and doubles once more what is large then."""

    def __init__(self, second):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.last = nn.Linear(1, 2)
        nn.init.constant_(self.first.weight, 2.0)
        nn.init.constant_(self.second.weight, second)
        self.last.load_state_dict({"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([30.0, 0.0])})

    def forward(self, x):
        x = self.second(self.first(x.flatten(1)))
        return self.last(self.first(x) if x.amax() > 5 else x)


def test_a_layer_that_only_the_rewound_network_calls_again_is_run_again(device):
    images, labels = torch.tensor([0.0, 0, 1, 1]).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 1])
    data = datasets.from_arrays(images, labels, images, labels, device=device)
    model, states = CallsAgain(1.0).to(device), {0: CallsAgain(10.0).state_dict()}
    sweep = rewind_sweep(model, states, data, groups={"second": ["second"]}, batch_size=2)
    assert (sweep.final.test, sweep.accuracies[0][0].test) == (0.5, 1.0)


def test_a_layer_whose_forward_was_replaced_keeps_it(tiny):
    model = models.mlp(64, width=4).to(tiny.train.images.device)
    model.linear0.forward = replaced = model.relu0.forward
    model.linear1 = nn.Linear(64, 4).to(tiny.train.images.device)
    rewind_sweep(model, {0: model.state_dict()}, tiny)
    assert vars(model.linear0)["forward"] is replaced
