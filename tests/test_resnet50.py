import pytest
import torch

from memloc import dropout, models, vision


@pytest.mark.parametrize(("in_channels", "count"), [(3, 23_528_522), (1, 23_522_250)])
def test_it_has_the_papers_number_of_parameters(in_channels, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in models.resnet50(in_channels).parameters()) == count


def test_it_has_six_groups_and_the_convolution_beside_a_stage_is_in_the_stage():
    groups = models.layer_groups(models.resnet50(width=4))
    assert list(groups) == ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert groups["stem"] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"} <= set(groups["layer2"])


def test_it_is_torchvisions_with_another_linear_layer():
    theirs = vision.torchvision().models.resnet50(num_classes=10).eval()
    ours, images = models.resnet50().eval(), torch.randn(1, 3, 40, 32)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))


def test_its_weights_are_drawn_as_torchvisions_are():
    theirs = vision.torchvision().models.resnet50(num_classes=10).state_dict()
    for name, value in models.resnet50().state_dict().items():
        assert value.shape == theirs[name].shape
        if value.ndim and value.numel() > 1000:  # of fewer, the spread is too uncertain
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


@pytest.mark.parametrize("width", [4, 6])
def test_all_its_layers_scale_with_its_width(width):
    whole, scaled = (models.channels(models.resnet50(width=w, num_classes=10)) for w in (64, width))
    assert scaled.pop("fc") == whole.pop("fc") == 10
    assert scaled == {name: count * width // 64 for name, count in whole.items()}


def test_its_places_for_dropout_fit_what_comes_out_of_the_second_and_third_stage():
    model = dropout.insert(models.resnet50(width=4), "tied", count=2)
    images = torch.zeros(2, 3, 32, 32)
    with dropout.examples(model, torch.tensor([1, 0])):
        assert model(images).shape == (2, 10)
    assert list(dropout.slots(models.resnet50(width=4))) == ["after2", "after3"]
