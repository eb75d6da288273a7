"""Activations of any layers: right, lazily computed, within bounded memory, and the network stays as it was."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from memloc import activations, models
from memloc.activations import features
from memloc.models import evaluation_mode
from memloc.randomness import generator


@pytest.fixture
def images(device):
    return torch.randn(11, 1, 8, 8, generator=generator(0, "images")).to(device)


@pytest.fixture
def model(device):
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0).to(device)
    model(torch.randn(50, 1, 8, 8, device=device))  # its batch-norms have statistics
    return model


def state(model):
    """All that a pass must not change."""
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    return copy.deepcopy((dict(model.state_dict()), modes, hooks, gradients))


def same(one, other):
    return str(one[1:]) == str(other[1:]) and all(torch.equal(one[0][name], other[0][name]) for name in other[0])


def one_by_one(model, images, names):
    """Activations from hooks, one image at a time."""
    found = {name: [] for name in names}

    def keep(name):
        return lambda module, inputs, output: found[name].append(output.clone().flatten())

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad(), evaluation_mode(model):
        for image in images:
            model(image[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("channels_last", [False, True])
def test_agrees_with_hooks_on_one_image_at_a_time(model, images, batch_size, channels_last):
    found = dict(features(model, images, batch_size=batch_size, channels_last=channels_last))
    expected = one_by_one(model, images, ["conv0.0", "conv1.0", "conv2.0", "conv3.0", "linear"])
    assert list(found) == ["input", *expected]
    assert torch.equal(found["input"], images.flatten(1))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, atol=1e-5, rtol=1e-5)


def test_layers_come_in_the_order_in_which_they_are_named(model, images):
    names = ["linear", "input", "conv1", "after0"]
    found = dict(features(model, images, names))
    assert list(found) == names
    expected = one_by_one(model, images, ["conv1"])["conv1"]
    torch.testing.assert_close(found["conv1"], expected, atol=1e-5, rtol=1e-5)


class Backwards(nn.Module):
    """Calls its layers in the opposite order, and one of them never."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.unused = nn.Linear(4, 3), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.first(x))


def test_the_default_is_the_order_of_execution(device):
    found = dict(features(Backwards().to(device), torch.ones(2, 6, device=device)))
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "input": (2, 6),
        "first": (2, 4),
        "last": (2, 3),
    }
    assert list(found) == ["input", "first", "last"]


@pytest.mark.parametrize("memory", [1, 4 * 11 * 300, 900_000_000])
def test_little_memory_changes_groups_and_portions_but_no_number(model, images, memory, monkeypatch):
    expected = dict(features(model, images, batch_size=2, projected=20))
    monkeypatch.setattr(activations, "MEMORY_BYTES", memory)
    for name, each in features(model, images, batch_size=2, projected=20):
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=1e-6)


def test_an_activation_in_place_does_not_overwrite_what_came_before_it(device):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 7), nn.ReLU(inplace=True)).to(device)
    images = torch.randn(6, 5, generator=generator(0, "images")).to(device)
    before = images.clone()
    found = dict(features(model, images, ["input", "1", "2"]))
    assert torch.equal(images, before)
    assert torch.equal(found["input"], before)
    assert found["1"].amin() < 0
    assert torch.equal(found["2"], found["1"].relu())


def matrix(size, name="", projected=13, **keywords):
    """The whole matrix, of which the images of an identity show every column."""
    return dict(features(nn.Identity(), torch.eye(size), [name], projected=projected, **keywords))[name].T


@pytest.mark.parametrize("columns", [7, 40, 1024])
def test_projection_is_one_gaussian_matrix_with_rows_of_unit_norm(columns, monkeypatch):
    monkeypatch.setattr(activations, "COLUMNS", columns)
    whole = matrix(40, "input")
    assert whole.shape == (13, 40)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(13))
    images = torch.randn(6, 40, generator=generator(0, "images"))
    found = dict(features(nn.Identity(), images, ["input"], projected=13))["input"]
    torch.testing.assert_close(found, images @ whole.T, atol=1e-5, rtol=1e-5)
    draw = torch.cat(list(blocks("input", 40, 13, columns))).T
    torch.testing.assert_close(whole, draw / draw.norm(dim=1, keepdim=True))


def blocks(name, size, projected, columns):
    seed = int(torch.randint(2**62, (), generator=generator(0, "features")))
    draw = generator(seed, "projection", name)
    for start in range(0, size, columns):
        yield torch.randn(min(columns, size - start), projected, generator=draw)


def test_entries_of_the_projection_are_independent_and_gaussian():
    whole = matrix(900, "input", projected=400) * 30
    assert abs(whole.mean()) < 0.01
    assert abs(whole.pow(4).mean() - 3) < 0.05
    assert (whole @ whole.T / 900 - torch.eye(400)).abs().max() < 0.2


def test_projection_nearly_keeps_angles():
    points = torch.randn(8, 6000, generator=generator(0, "points")) + 1
    found = dict(features(nn.Identity(), points, ["input"], projected=5000))["input"]
    before, after = (nn.functional.normalize(each, dim=1) for each in (points, found))
    assert (before @ before.T - after @ after.T).abs().max() < 0.06
    assert abs(found.norm() / points.norm() / (5000 / 6000) ** 0.5 - 1) < 0.03


def test_each_layer_has_a_matrix_of_its_own_that_the_generator_decides():
    assert torch.equal(matrix(20, "input"), matrix(20, "input"))
    assert not torch.equal(matrix(20, "input"), matrix(20, ""))
    assert torch.equal(matrix(20, "input"), matrix(20, "input", generator=generator(0, "features")))
    assert not torch.equal(matrix(20, "input"), matrix(20, "input", generator=generator(1, "features")))


def test_none_keeps_all_features_and_few_features_stay_as_they_are(model, images):
    assert dict(features(model, images, ["conv0.0"], projected=None))["conv0.0"].shape == (11, 256)
    kept, cut = (dict(features(model, images, ["conv0.0"], projected=size))["conv0.0"] for size in (256, 255))
    assert torch.equal(kept, dict(features(model, images, ["conv0.0"], projected=None))["conv0.0"])
    assert cut.shape == (11, 255)


def test_bf16_gives_float32_near_that_of_fp32(model, images):
    exact, rough = (dict(features(model, images, projected=50, precision=each)) for each in ("fp32", "bf16"))
    assert torch.equal(exact["input"], rough["input"])
    for name, each in rough.items():
        assert each.dtype == torch.float32
        assert (each - exact[name]).norm() < 0.03 * exact[name].norm()
    assert not torch.equal(exact["linear"], rough["linear"])


def test_projection_is_in_float32_inside_autocast_too(device):
    images = torch.randn(6, 40, generator=generator(0, "images")).to(device)
    expected = dict(features(nn.Identity(), images, projected=13))["input"]
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(dict(features(nn.Identity(), images, projected=13))["input"], expected)


def test_the_network_is_as_it_was_between_any_two_layers(model, images, monkeypatch, global_generator_untouched):
    monkeypatch.setattr(activations, "MEMORY_BYTES", 1)  # a group a layer
    model.train()
    model.conv1.eval()
    before = state(model)
    for name, each in features(model, images.requires_grad_(), batch_size=4):
        assert same(state(model), before), name
        assert not each.requires_grad
        assert torch.is_grad_enabled()


class Fails(nn.Module):
    def forward(self, x):
        if len(x) > 1:
            raise RuntimeError("no")
        return x


def test_the_network_is_as_it_was_after_an_exception(model, images):
    broken = nn.Sequential(model, Fails())
    before = state(broken)
    with pytest.raises(RuntimeError, match="no"):
        dict(features(broken, images, ["1"]))
    assert same(state(broken), before)


class Counts(nn.Module):
    """Counts its batches and drops at random in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        self.seen = self.seen + 1
        self.seen += 1
        return self.linear(nn.functional.dropout(x, training=True))


def test_buffers_and_the_global_generator_are_as_they_were(device):
    model = Counts().to(device)
    buffer, generator_before = model.seen, torch.get_rng_state()
    found = [dict(features(model, torch.ones(4, 5, device=device), batch_size=3))["linear"] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert model.seen is buffer
    assert buffer == 0
    assert torch.equal(*found)


def test_example_tied_dropout_drops(device):
    model = models.build("resnet9", in_channels=1, size=16, num_classes=10, width=8, seed=0)
    activations.dropout.insert(model, "tied", count=20)
    model.to(device)
    found = dict(features(model, torch.ones(3, 1, 16, 16, device=device), ["after.conv0", "linear"]))
    assert (found["after.conv0"].view(3, 8, -1).amax(2) == 0).any(1).all()


def test_passes_end_behind_the_last_layer_that_is_wanted(model, images):
    calls = []
    model.conv2.register_forward_hook(lambda *each: calls.append(1))
    stream = features(model, images, ["conv1"])
    calls.clear()  # of the look at one image
    assert len(next(stream)[1]) == 11
    assert not calls


def test_nothing_is_computed_before_it_is_wanted(model, images, monkeypatch):
    monkeypatch.setattr(activations, "MEMORY_BYTES", 1)
    stream = features(model, images)
    assert next(stream)[0] == "input"
    model.conv0.register_forward_hook(lambda *each: pytest.fail("a layer was run that nobody wanted"))


def test_no_images_give_no_rows(model, images):
    found = dict(features(model, images[:0], projected=100))
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "input": (0, 64), "conv0.0": (0, 100), "conv1.0": (0, 100), "conv2.0": (0, 100), "conv3.0": (0, 64),
        "linear": (0, 10),
    }  # fmt: skip


class Odd(nn.Module):
    """Layers that cannot be used."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair, self.mean, self.sometimes = Pair(), Mean(), nn.Identity()

    def forward(self, x):
        self.pair(x)
        self.mean(x)
        x = self.twice(self.twice(x))
        return self.sometimes(x) if len(x) == 1 else x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["twice"]}, "layers must be called once in a forward pass, 'twice' is called 2 times"),
        ({}, "'twice' is called 2 times"),
        ({"layers": ["never"]}, "'never' is called 0 times"),
        ({"layers": ["pair"]}, "layers must return a tensor with a row for each image, 'pair' gives tuple"),
        ({"layers": ["mean"]}, "'mean' gives shape \\(\\) for one image"),
        ({"layers": ["pear"]}, "layers must name modules of the network .*, got 'pear'"),
        ({"layers": ["mean", "mean"]}, "layers must name each layer once, got 'mean', 'mean'"),
        ({"projected": 0}, "projected must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        features(Odd(), torch.ones(3, 4), **arguments)


def test_a_layer_that_is_called_only_in_some_passes_is_refused():
    with pytest.raises(ValueError, match="'sometimes' is called only in some"):
        dict(features(Odd(), torch.ones(3, 4), ["sometimes"]))


class Constant(nn.Module):
    """Returns the same row whatever the images, as an embedding of positions does."""

    def forward(self, images):
        return torch.ones(1, 5)


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.constant, self.linear = Constant(), nn.Linear(5, 2)

    def forward(self, images):
        return self.linear(images + self.constant(images))


def test_a_layer_without_a_row_for_each_image_is_refused():
    with pytest.raises(ValueError, match="layers must return a row for each image, 'constant' gives 1 for 3"):
        dict(features(Adds(), torch.ones(3, 5), ["constant"]))


class Nothing(nn.Module):
    def forward(self, images):
        return images[:, :0]


def test_a_layer_without_features_has_none():
    found = dict(features(nn.Sequential(Nothing()), torch.ones(3, 4), ["0"]))
    assert found["0"].shape == (3, 0)


def test_a_module_called_input_is_not_mistaken_for_the_images():
    model = nn.Sequential()
    model.add_module("input", nn.Linear(4, 2))
    with pytest.raises(ValueError, match="layers must leave 'input' out"):
        features(model, torch.ones(3, 4))
    assert dict(features(model, torch.ones(3, 4), [""]))[""].shape == (3, 2)


VGG = """
import resource, torch
from memloc import activations, models
torch.set_num_threads(1)
activations.MEMORY_BYTES = 50_000_000
model = models.build("vgg16", in_channels=3, size=32, num_classes=10, width=8, seed=0)
images = torch.randn({images}, 3, 32, 32)
count = sum(1 for _ in activations.features(model, images, projected=100, batch_size=32))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_the_layers_of_vgg16_stay_within_the_memory_that_is_stated():
    """An eighth of the width and 2,000 images: 270 MB of activations, of which 50 MB are there at a time."""

    def used(images):
        command = [sys.executable, "-c", VGG.format(images=images)]
        count, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert count == 17
        return peak

    assert used(2000) - used(32) < 50e6 + 2000 * 3 * 32 * 32 * 4 + 60e6
