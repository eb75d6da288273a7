import pytest
import torch
from torch import nn

from memloc import datasets, dropout, evaluation, models, vision
from memloc.recipes import Settings
from memloc.training import train


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "count"),
    [((3, 10), 11_173_962), ((3, 100), 11_220_132), ((1, 10), 11_172_810), ((3, 10, 4), 44_622), ((1, 2, 1), 2_901)],
)
def test_it_has_the_literatures_number_of_parameters(arguments, count):
    with torch.device("meta"):
        assert size_of(models.resnet18(*arguments)) == count


def test_its_groups_are_the_stem_the_blocks_and_the_linear_layer():
    groups = models.layer_groups(models.resnet18(width=2))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert list(groups) == ["stem", *blocks, "fc"]
    assert groups["stem"] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert groups["fc"] == ["fc.weight", "fc.bias"]
    assert len(groups["layer1.0"]) == len(groups["layer2.1"]) == 6
    assert len(groups["layer2.0"]) == 9, "the convolution beside a block is in the block"


def test_it_is_torchvisions_with_a_stem_for_small_images():
    theirs = vision.torchvision().models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, images = models.resnet18().eval(), torch.randn(1, 3, 16, 12)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs.eval()(images))


def test_its_weights_are_drawn_as_torchvisions_are():
    theirs = vision.torchvision().models.resnet18(num_classes=10).state_dict()
    for name, value in models.resnet18().state_dict().items():
        if name != "conv1.weight" and value.numel() > 1000:  # of fewer, the spread is too uncertain
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


@pytest.mark.parametrize("width", [1, 6])
def test_all_its_layers_scale_with_its_width(width):
    whole, scaled = (models.channels(models.resnet18(width=w)) for w in (64, width))
    assert scaled.pop("fc") == whole.pop("fc") == 10
    assert scaled == {name: count * width // 64 for name, count in whole.items()}


def test_its_stages_halve_the_image_three_times():
    model, seen = models.resnet18(width=1), {}
    for name, stage in model.named_children():
        stage.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.shape[1:]}))
    model(torch.zeros(2, 3, 32, 32))
    assert [tuple(seen[f"layer{stage}"]) for stage in (1, 2, 3, 4)] == [(1, 32, 32), (2, 16, 16), (4, 8, 8), (8, 4, 4)]


@pytest.mark.parametrize("size", [1, 7, 33])
def test_any_size_will_do_and_one_image(size):
    model = models.build("resnet18", in_channels=1, size=size, num_classes=3, width=1, seed=0).eval()
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 3)


def test_the_narrowest_trains_in_low_precision_and_another_layout(device):
    data = datasets.load("digits", examples=48, device=device)
    model = models.build("resnet18", in_channels=1, size=8, num_classes=10, width=1, seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    train(model, data, Settings(epochs=1, batch_size=24, learning_rate=0.1, precision="bf16", channels_last=True))
    still = [name for name, value in model.named_parameters() if torch.equal(value.cpu(), before[name])]
    assert still == []


def test_the_layout_does_not_change_the_logits_and_bf16_hardly():
    model = models.build("resnet18", in_channels=3, size=16, num_classes=10, width=4, seed=0)
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = evaluation.predict(model, images)
    torch.testing.assert_close(evaluation.predict(model, images, channels_last=True), logits)
    low = evaluation.predict(model, images, precision="bf16")
    assert not torch.equal(low, logits)
    torch.testing.assert_close(low, logits, atol=0.05, rtol=0.05)


def test_its_places_for_dropout_are_behind_the_second_and_the_third_stage():
    model = models.resnet18(width=4).eval()
    assert dropout.slots(model) == {"after2": (8,), "after3": (16,)}
    images, behind = torch.randn(2, 3, 16, 16), {}
    for name in ("layer2", "after2", "layer3", "after3"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: behind.update({name: output})
        )
    model(images)
    assert behind["after2"] is behind["layer2"]
    assert behind["after3"] is behind["layer3"]
    with dropout.examples(dropout.insert(model, "tied", count=2), torch.tensor([1, 0])):
        assert model(images).shape == (2, 10)
