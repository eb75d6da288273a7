import pytest
import torch
from torch import nn

from memloc import datasets, models, vision
from memloc.observers import Checkpoints
from memloc.recipes import Settings
from memloc.rewinding import rewind_sweep
from memloc.training import train


class Odd(nn.Module):
    """Free parameters, a dictionary of layers, and a layer that is called by its weight alone."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 5))
        self.conv = nn.Conv2d(3, 7, 3)
        self.parts = nn.ModuleDict({"x": nn.Linear(7, 5), "y": nn.LayerNorm((2, 5))})
        self.scale = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2)


def smallest_size(name):
    """12 pixels will do for all but the network with five poolings."""
    return 32 if name == "vgg16" else 12


def every_parameter_once(model):
    names = [name for group in models.layer_groups(model).values() for name in group]
    return sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("in_channels", "count"), [(3, 2_274_880), (1, 2_273_728)])
def test_resnet9_has_the_papers_number_of_parameters(in_channels, count):
    assert sum(p.numel() for p in models.resnet9(in_channels).parameters()) == count


def test_resnet9_has_the_papers_nine_layers_with_the_papers_sizes():
    model = models.resnet9()
    sizes = {
        group: sum(model.get_parameter(name).numel() for name in names)
        for group, names in models.layer_groups(model).items()
    }
    assert list(sizes) == [f"conv{i}" for i in range(8)] + ["linear"]
    assert list(sizes.values()) == [1856, 205056, 147712, 147712, 295424, 590336, 590336, 295168, 1280]


def test_resnet9_has_the_papers_shapes_inside():
    model, seen = models.resnet9(), {}

    def remember(name):
        def hook(module, inputs, output):
            seen[name] = tuple(output.shape[1:])

        return hook

    for name, block in model.named_children():
        block.register_forward_hook(remember(name))
    model(torch.zeros(2, 3, 32, 32))
    assert [seen[f"conv{i}"] for i in range(8)] == [
        (64, 32, 32), (128, 16, 16), (128, 16, 16), (128, 16, 16),
        (256, 16, 16), (256, 8, 8), (256, 8, 8), (128, 6, 6),
    ]  # fmt: skip


def test_resnet9_adds_what_it_skips_and_scales_its_logits():
    model, x = models.resnet9(width=4).eval(), torch.randn(2, 3, 16, 16)
    x1 = model.conv1(model.conv0(x))
    x2 = nn.functional.max_pool2d(model.conv4(x1 + model.conv3(model.conv2(x1))), 2)
    x3 = model.conv7(x2 + model.conv6(model.conv5(x2))).amax((2, 3))
    torch.testing.assert_close(model(x), 0.2 * (x3 @ model.linear.weight.T))


@pytest.mark.usefixtures("global_generator_untouched")
@pytest.mark.parametrize("name", models.NAMES)
def test_a_built_network_depends_on_its_seed_alone(name):
    first, again, other = (
        models.build(name, in_channels=1, size=smallest_size(name), num_classes=7, width=4, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    weight = next(key for key, value in first.items() if value.ndim > 1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[weight], other[weight])


@pytest.mark.parametrize("name", models.NAMES)
def test_every_network_gives_logits_for_its_classes_and_a_gradient_to_every_parameter(name):
    size = smallest_size(name)
    model = models.build(name, in_channels=2, size=size, num_classes=3, width=4, seed=0)
    logits = model(torch.randn(5, 2, size, size))
    assert logits.shape == (5, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", models.NAMES)
def test_every_network_has_every_parameter_in_one_group(name):
    size = smallest_size(name)
    assert every_parameter_once(models.build(name, in_channels=1, size=size, num_classes=3, width=4, seed=0))


@pytest.mark.parametrize("name", models.NAMES)
def test_every_network_can_be_trained_and_rewound(device, name):
    size = smallest_size(name)
    data = datasets.load("digits", examples=40, size=size, device=device)
    model = models.build(name, in_channels=1, size=size, num_classes=10, width=4, seed=0)
    checkpoints = Checkpoints([0])
    train(model, data, Settings(epochs=1, batch_size=32), observers=[checkpoints])
    sweep = rewind_sweep(model, checkpoints.states, data)
    assert sweep.groups == tuple(models.layer_groups(model))
    assert sweep.table().clean_accuracy.between(0, 1).all()


def test_a_size_that_does_not_fit_is_refused_in_one_line_that_names_it():
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\) do not fit ResNet9") as refused:
        models.build("resnet9", in_channels=3, size=8, num_classes=10, width=4, seed=0)
    assert "\n" not in str(refused.value)


def test_a_network_that_asserts_its_size_is_refused_in_the_same_way():
    vit = vision.torchvision().models.VisionTransformer(16, 8, 1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"do not fit VisionTransformer \(Wrong image height"):
        models.check_images(vit, torch.zeros(1, 3, 8, 8))


def test_a_network_without_logits_is_refused():
    with pytest.raises(ValueError, match=r"must give logits of shape \(B, K\), got \(1, 3, 8, 8\)"):
        models.check_images(nn.Identity(), torch.zeros(2, 3, 8, 8))


def test_an_unknown_network_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match="small_cnn, mlp, resnet9, resnet18, resnet50, vit_small, vgg16, got 'resnet10'"
    ):
        models.build("resnet10", in_channels=1, size=8, num_classes=10, seed=0)


def test_groups_of_an_odd_network_hold_every_parameter_once():
    groups = models.layer_groups(Odd())
    assert every_parameter_once(Odd())
    assert groups["conv"] == ["token", "scale", "conv.weight", "conv.bias"]
    assert groups["parts.x"] == ["parts.x.weight", "parts.x.bias", "parts.y.weight", "parts.y.bias"]
    assert list(groups) == ["conv", "parts.x", "attention", "attention.out_proj"]


@pytest.mark.parametrize(
    "model",
    [
        nn.LSTM(3, 4, num_layers=2),
        nn.LayerNorm((3, 3)),
        nn.Identity(),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        nn.TransformerEncoderLayer(8, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_groups_of_any_network_hold_every_parameter_once(model):
    assert every_parameter_once(model)


def test_a_layer_under_weight_norm_keeps_its_own_bias():
    def layer():
        return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    made_of = [f"parametrizations.weight.original{number}" for number in (0, 1)]
    assert models.layer_groups(nn.Sequential(layer(), layer())) == {
        path: [f"{path}.{name}" for name in ("bias", *made_of)] for path in "01"
    }


def test_groups_of_shared_weights_hold_them_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    assert every_parameter_once(model)


def test_groups_of_torchvisions_resnet18_are_its_convolutions_and_its_classifier():
    model = vision.torchvision().models.resnet18(num_classes=10)
    groups = models.layer_groups(model)
    assert every_parameter_once(model)
    assert len(groups) == 21
    assert groups["layer2.0.downsample.0"] == [f"layer2.0.downsample.{n}" for n in ("0.weight", "1.weight", "1.bias")]


def test_groups_that_a_network_declares_are_taken_and_checked():
    class Declares(nn.Linear):
        groups = {"all": ["weight", "bias"]}

        def layer_groups(self):
            return self.groups

    model = Declares(2, 2)
    assert models.layer_groups(model) == {"all": ["weight", "bias"]}
    for wrong, named in [
        ({"a": ["weight"]}, "bias"),
        ({"a": ["weight", "bias"], "b": ["bias"]}, "bias"),
        ({"a": ["weight", "bias", "c"]}, "c"),
    ]:
        model.groups = wrong
        with pytest.raises(ValueError, match=f"exactly once, does not for {named}"):
            models.layer_groups(model)


def test_a_wrapper_that_passes_on_its_networks_methods_has_groups_of_its_own():
    class Compiled(nn.Module):  # behaves as what torch.compile returns
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

    assert every_parameter_once(Compiled(models.resnet9(width=4)))


def test_channels_are_the_outputs_of_every_weight_layer():
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.Conv1d(6, 4, 1), nn.ReLU(), nn.Linear(4, 2))
    assert models.channels(model) == {"0": 6, "1": 4, "3": 2}


def test_evaluation_mode_restores_each_module_even_after_an_error():
    model = models.small_cnn()
    model.conv1.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), models.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
