import pytest
import torch
from torch import nn

from memloc import datasets, dropout, evaluation, models, vision
from memloc.recipes import Settings
from memloc.training import train


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def layers_of_kind(model, *kinds):
    return [(name, module) for name, module in model.named_children() if isinstance(module, kinds)]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((3, 10), 15_253_578),
        ((3, 100), 15_299_748),
        ((1, 10), 15_252_426),
        ((1, 10, 8), 240_450),
        ((3, 100, 8), 246_444),
        ((3, 10, 64, 64), 15_253_578 + 3 * 512 * 512),
    ],
)
def test_it_has_the_known_number_of_parameters(arguments, count):
    with torch.device("meta"):
        assert size_of(models.vgg16(*arguments)) == count


def test_its_groups_are_its_convolutions_and_linear_layers_in_the_order_of_execution():
    model, executed = models.vgg16(width=1), []
    for name, module in layers_of_kind(model, nn.Conv2d, nn.Linear):
        module.register_forward_hook(lambda module, inputs, output, name=name: executed.append(name))
    model(torch.zeros(2, 3, 32, 32))
    groups = models.layer_groups(model)
    assert list(groups) == executed == [*(f"conv{i}" for i in range(13)), *(f"linear{i}" for i in range(3))]
    assert groups["conv12"] == ["conv12.weight", "conv12.bias", "norm12.weight", "norm12.bias"]
    assert groups["linear2"] == ["linear2.weight", "linear2.bias"]


def test_its_convolutions_are_torchvisions():
    vgg = vision.torchvision().models.vgg
    theirs = vgg.make_layers(vgg.cfgs["D"], batch_norm=True).eval()  # what vgg16_bn is made of
    model = models.vgg16()
    ours = model[: list(dict(model.named_children())).index("flatten")].eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def test_its_convolutions_are_drawn_as_torchvisions_are():
    for name, conv in layers_of_kind(models.vgg16(width=16), nn.Conv2d):
        spread = (2 / (9 * conv.out_channels)) ** 0.5  # keeps the size of what flows backwards
        assert conv.weight.std().item() == pytest.approx(spread, rel=0.1), name
        assert not conv.bias.any()


def test_its_head_is_two_hidden_layers_and_one_for_the_classes():
    model = models.vgg16(width=2).eval()
    features = torch.randn(4, 16, 1, 1)
    head = model[list(dict(model.named_children())).index("flatten") :]
    hidden = (features.flatten(1) @ model.linear0.weight.T + model.linear0.bias).clamp(min=0)
    hidden = (hidden @ model.linear1.weight.T + model.linear1.bias).clamp(min=0)
    torch.testing.assert_close(head(features), hidden @ model.linear2.weight.T + model.linear2.bias)


@pytest.mark.parametrize("width", [1, 6])
def test_all_its_layers_scale_with_its_width(width):
    whole, scaled = (models.channels(models.vgg16(width=w)) for w in (64, width))
    assert scaled.pop("linear2") == whole.pop("linear2") == 10
    assert scaled == {name: count * width // 64 for name, count in whole.items()}


@pytest.mark.parametrize("size", [32, 33, 64])
def test_it_takes_32_pixels_and_more_and_one_image(size):
    model = models.build("vgg16", in_channels=1, size=size, num_classes=3, width=1, seed=0).eval()
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 3)


def test_images_that_are_too_small_are_refused_with_the_size_that_they_need():
    with pytest.raises(ValueError, match="size must be at least 32 pixels for VGG-16, got 28: resize the images"):
        models.build("vgg16", in_channels=1, size=28, num_classes=10, width=1, seed=0)


def test_images_of_another_size_than_it_was_built_for_are_refused_by_name():
    with pytest.raises(ValueError, match=r"images of shape \(3, 64, 64\) do not fit VGG16"):
        models.check_images(models.vgg16(width=1), torch.zeros(1, 3, 64, 64))


def test_what_a_hook_keeps_of_a_layer_is_not_changed_by_the_next():
    model, kept = models.vgg16(width=1), {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: (output, output.clone())})
        )
    model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(after, before) for after, before in kept.values())


def test_the_narrowest_trains_in_low_precision_and_another_layout(device):
    data = datasets.load("digits", examples=48, size=32, device=device)
    model = models.build("vgg16", in_channels=1, size=32, num_classes=10, width=2, seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    train(model, data, Settings(epochs=1, batch_size=24, learning_rate=0.1, precision="bf16", channels_last=True))
    still = [name for name, value in model.named_parameters() if torch.equal(value.cpu(), before[name])]
    assert still == []


def test_the_layout_does_not_change_the_logits_and_bf16_hardly():
    model = models.build("vgg16", in_channels=3, size=32, num_classes=10, width=4, seed=0)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = evaluation.predict(model, images)
    torch.testing.assert_close(evaluation.predict(model, images, channels_last=True), logits)
    low = evaluation.predict(model, images, precision="bf16")
    assert not torch.equal(low, logits)
    torch.testing.assert_close(low, logits, atol=0.05, rtol=0.05)


def test_its_places_for_dropout_are_behind_its_hidden_linear_layers():
    assert dropout.slots(models.vgg16(width=4)) == {"after0": (32,), "after1": (32,)}
    model = dropout.insert(models.vgg16(width=4), "tied", count=2)
    with dropout.examples(model, torch.tensor([1, 0])):
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
