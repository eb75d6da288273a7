import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from memloc import datasets
from memloc.spurious_images import COLOURINGS, Colouring, coloured_digits, digits_on_photographs, load

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    """The digits of each split, 14 pixels wide, and of 32."""
    small, large = (datasets.load("digits", size=size) for size in (14, 32))
    return {
        split: (data.images[part], large_data.images[part], data.true_labels[part])
        for split, data, large_data, part in (
            ("train", small.train, large.train, slice(0, 1080)),
            ("validation", small.train, large.train, slice(1080, None)),
            ("test", small.test, large.test, slice(None)),
        )
    }


@pytest.fixture(scope="module")
def coloured():
    return coloured_digits("digits", seed=0)


@pytest.fixture(scope="module")
def composed():
    return digits_on_photographs(seed=0)


def test_the_digit_is_in_the_channel_of_its_colour_and_the_other_is_black(coloured, digits):
    for name in SPLITS:
        split, (images, _, _) = getattr(coloured, name), digits[name]
        assert split.images.shape == (len(images), 2, 14, 14)
        for index in range(len(images)):
            colour = split.attributes[index]
            assert torch.equal(split.images[index, colour], images[index, 0])
            assert (split.images[index, 1 - colour] == -1).all()


def test_the_true_label_says_whether_the_digit_is_below_five(coloured, digits):
    for name in SPLITS:
        split = getattr(coloured, name)
        assert split.true_labels.tolist() == [int(digit < 5) for digit in digits[name][2]]
        assert torch.equal(split.noise_mask, split.labels != split.true_labels)


@pytest.mark.parametrize("variant", COLOURINGS)
def test_labels_and_colours_are_wrong_as_often_as_the_colouring_says(variant):
    colouring = COLOURINGS[variant]
    wrong = {"label": torch.zeros(3), "colour": torch.zeros(3)}
    drawn = torch.zeros(3)
    for seed in range(5):
        data = coloured_digits("digits", colouring, seed=seed, size=1)
        for part, split, chosen in (
            (0, data.train, slice(0, None, 2)),
            (1, data.train, slice(1, None, 2)),
            (0, data.validation, slice(0, None, 2)),
            (1, data.validation, slice(1, None, 2)),
            (2, data.test, slice(None)),
        ):
            wrong["label"][part] += split.noise_mask[chosen].sum()
            wrong["colour"][part] += (split.attributes != split.labels)[chosen].sum()
            drawn[part] += len(split.labels[chosen])
    for name, shares in (("label", colouring.label_noise), ("colour", colouring.colour_noise)):
        for part in range(3):
            deviation = math.sqrt(shares[part] * (1 - shares[part]) / drawn[part])
            assert wrong[name][part] / drawn[part] == pytest.approx(shares[part], abs=5 * deviation)


def test_the_published_colourings_are_those_of_the_description():
    assert COLOURINGS["color"] == Colouring((0.25,) * 3, (0.2, 0.1, 0.9))
    assert COLOURINGS["inverse"] == Colouring((0.15,) * 3, (0.2, 0.3, 0.9))
    assert COLOURINGS["mcolor"] == Colouring((0.2, 0.3, 0.9), (0.15,) * 3)
    assert COLOURINGS["v3"] == Colouring((0.2, 0.1, 0.9), (0.25,) * 3)


def test_labels_do_not_depend_on_colours_nor_colour_errors_on_labels(coloured):
    plain = coloured_digits("digits", Colouring((0.25,) * 3, (0.0,) * 3), seed=0)
    clean = coloured_digits("digits", Colouring((0.0,) * 3, (0.2, 0.1, 0.9)), seed=0)
    for name in SPLITS:
        one, other, third = (getattr(data, name) for data in (coloured, plain, clean))
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(other.attributes, other.labels)
        assert torch.equal(third.labels, third.true_labels)
        assert torch.equal(one.attributes ^ one.labels, third.attributes ^ third.labels)


def test_flipped_labels_and_wrong_colours_are_independent():
    split = coloured_digits("digits", Colouring((0.5,) * 3, (0.5,) * 3), seed=0, size=1).train
    both = torch.stack([split.noise_mask, split.attributes != split.labels]).float()
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / 1080**0.5


@pytest.mark.parametrize("make", [coloured_digits, digits_on_photographs])
def test_data_depend_on_the_seed_alone(make, global_generator_untouched):
    one, again, other = (make(seed=seed, size=8) for seed in (1, 1, 2))
    for name in SPLITS:
        first, second, third = (getattr(data, name) for data in (one, again, other))
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.groups, second.groups)
        assert not torch.equal(first.attributes, third.attributes)
        assert not torch.equal(first.images, third.images)


@pytest.mark.parametrize("make", [coloured_digits, digits_on_photographs])
def test_examples_takes_the_first_training_examples_and_nothing_from_the_others(make, digits):
    few = make(seed=0, examples=30)
    assert (len(few.train), len(few.validation), len(few.test)) == (30, 217, 500)
    assert few.train.true_labels.tolist() == [int(digit < 5) for digit in digits["train"][2][:30]]


def test_the_first_examples_are_coloured_alike_whatever_their_number(coloured):
    few = coloured_digits("digits", seed=0, examples=30).train
    assert torch.equal(few.images, coloured.train.images[:30])
    assert torch.equal(few.labels, coloured.train.labels[:30])


@pytest.mark.parametrize("make", [coloured_digits, digits_on_photographs])
@pytest.mark.parametrize("examples", [0, 1081, 1.5])
def test_a_number_of_examples_that_is_not_there_is_refused(make, examples):
    with pytest.raises(ValueError, match=f"examples must be from 1 to 1080, all that digits has .* got {examples}"):
        make(seed=0, examples=examples)


def test_data_that_are_no_grey_digits_are_refused(monkeypatch):
    images, labels = np.zeros((12, 3, 4, 4), np.uint8), np.arange(12) % 10
    colours = datasets.from_arrays(images, labels, images, labels)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: colours)
    with pytest.raises(ValueError, match="name must be of ten classes in grey, got cifar10: 10, 3 channels"):
        coloured_digits("cifar10", seed=0)


@pytest.mark.parametrize("shares", [(0.1, 0.2), (0.1, 0.2, 1.2), (-0.1, 0.2, 0.3), (0.1, math.nan, 0.3)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="label_noise must be three shares from 0 to 1"):
        Colouring(shares, (0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="colour_noise must be three shares from 0 to 1"):
        Colouring((0.1, 0.1, 0.1), shares)


def test_the_name_of_a_colouring_is_none():
    with pytest.raises(ValueError, match="colouring must be a Colouring, got 'color': take one from COLOURINGS"):
        coloured_digits("digits", "color", seed=0)


def test_colourings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        COLOURINGS["color"].label_noise = (0.0, 0.0, 0.0)


def test_the_kind_of_photograph_goes_along_with_the_label_in_training_alone(composed):
    for name, wrong in (("train", int((1 - 0.95) * 1080)), ("validation", 108), ("test", 250)):
        split = getattr(composed, name)
        assert (split.attributes != split.labels).sum() == wrong
        assert set(split.groups.tolist()) == {0, 1, 2, 3}


def test_labels_of_composed_images_are_those_of_the_digits(composed, digits):
    for name in SPLITS:
        split = getattr(composed, name)
        assert split.labels.tolist() == [int(digit < 5) for digit in digits[name][2]]
        assert not split.noise_mask.any()


def test_the_digit_is_white_and_around_it_the_photograph_is_dimmed(composed, digits):
    for name in SPLITS:
        split, brightness = getattr(composed, name), (digits[name][1] + 1).expand(-1, 3, -1, -1) / 2
        assert split.images.shape == brightness.shape
        torch.testing.assert_close(split.images[brightness == 1], torch.ones(int((brightness == 1).sum())))
        assert split.images[brightness == 0].amax() <= 0
        assert split.images.amin() >= -1


def test_a_faint_digit_is_mixed_with_its_photograph(composed, digits):
    faint = digits_on_photographs(seed=0, opacity=0.5).test
    brightness = (digits["test"][1] + 1) / 2
    photograph = (faint.images - 0.5 * brightness) / (1 - 0.5 * brightness)
    torch.testing.assert_close(composed.test.images, photograph * (1 - brightness) + brightness, atol=1e-5, rtol=0)
    assert torch.equal(faint.groups, composed.test.groups)


def test_cut_outs_are_of_the_stripes_of_their_split_and_of_the_photograph_of_their_kind(composed, digits):
    for kind, file in enumerate(("flower.jpg", "china.jpg")):
        pixels = load_sample_image(file)[::2, ::2].transpose(2, 0, 1) / 255 - 1
        for name, stripes in (("train", (0, 2, 4)), ("validation", (1,)), ("test", (3,))):
            split = getattr(composed, name)
            allowed = [pixels[:, :, 64 * stripe : 64 * (stripe + 1)].astype(np.float32) for stripe in stripes]
            for index in (split.attributes == kind).nonzero()[:5, 0].tolist():
                background = (digits[name][1][index, 0] == -1).numpy()
                image = split.images[index].numpy()
                assert any(contains(stripe, image, background) for stripe in allowed), (kind, name, index)


def contains(photograph, image, background):
    """Whether an image is a cut-out of a photograph, at thirty or so of the pixels that no digit covers."""
    rows, columns = np.argwhere(background)[:: background.sum() // 30].T
    windows = np.lib.stride_tricks.sliding_window_view(photograph, image.shape[1:], axis=(1, 2))
    differences = np.abs(windows[..., rows, columns] - image[:, None, None, rows, columns])
    return differences.max((0, 3)).min() < 1e-5


def test_cifar_backgrounds_are_the_images_of_their_kinds_classes_and_each_split_has_its_own(monkeypatch, digits):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    labels = np.arange(120) % 10
    images = np.broadcast_to(np.arange(120, dtype=np.uint8)[:, None, None, None], (120, 3, 32, 32))
    cifar = datasets.from_arrays(images, labels, images + 128, labels, name="cifar10", classes=names)
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, **options: cifar if name == "cifar10" else load(name, **options))
    data = digits_on_photographs("digits", "cifar10", seed=0)
    assert data.attribute_names == ("sky and sea", "land")
    for name, wanted, brighter in (
        ("train", slice(20), 0),
        ("validation", slice(20, None), 0),
        ("test", slice(None), 128),
    ):
        split = getattr(data, name)
        backgrounds = torch.where(digits[name][1] == -1, split.images, -2.0).amax((1, 2, 3))
        shades = ((backgrounds + 1) * 255).round().long()  # each image has one of its own
        for kind, classes in enumerate(((0, 8), (4, 6))):
            pool = [index for index in range(120) if index % 10 in classes][wanted]
            assert set(shades[split.attributes == kind].tolist()) == {index + brighter for index in pool}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opacity": 0.0}, "opacity must be above 0 and at most 1, got 0.0"),
        ({"opacity": 1.5}, "opacity must be above 0 and at most 1, got 1.5"),
        ({"correlation": 1.5}, "correlation must be from 0 to 1"),
        ({"size": 65}, "size must be at most 64 pixels with samples, got 65: take cifar10"),
        ({"photographs": "cifar"}, r"photographs must be one of samples, cifar10, got 'cifar' \(did you mean"),
        ({"name": "digit"}, "did you mean digits"),
    ],
)
def test_compositions_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        digits_on_photographs(**{"seed": 0} | changes)


def test_data_are_made_by_the_name_of_their_attribute(coloured):
    def same(one, other):
        assert (one.name, one.attribute_names) == (other.name, other.attribute_names)
        for split, twin in ((getattr(one, name), getattr(other, name)) for name in SPLITS):
            assert torch.equal(split.images, twin.images)
            assert torch.equal(split.groups, twin.groups)

    same(load("digits", "colour", seed=0), coloured)
    same(load("digits", "colour", seed=3, size=8), coloured_digits("digits", seed=3, size=8))
    chosen = {"seed": 3, "size": 16, "examples": 50, "correlation": 0.7, "opacity": 0.4}
    same(load("digits", "samples", **chosen), digits_on_photographs("digits", "samples", **chosen))
    assert load("digits", "samples", seed=0, examples=5).train.images.shape == (5, 3, 32, 32)
    with pytest.raises(ValueError, match=r"attribute must be one of colour, samples, cifar10, got 'color' .* colour"):
        load("digits", "color", seed=0)


def test_missing_photographs_are_one_line_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`memloc data get cifar10`") as refusal:
        digits_on_photographs("digits", "cifar10", seed=0, root=tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_coloured_mnist_has_the_published_sizes_and_pixels(real_data):
    data = coloured_digits("mnist", seed=0, root=real_data)
    assert [len(getattr(data, name)) for name in SPLITS] == [50_000, 10_000, 10_000]
    assert data.train.images.shape[1:] == (2, 14, 14)
    official = datasets.load("mnist", root=real_data)
    assert torch.equal(data.validation.images.amax(1), official.train.images[50_000:, 0, ::2, ::2])
    assert (data.train.attributes == data.train.labels).double().mean().item() == pytest.approx(0.85, abs=0.01)
    assert (data.test.attributes == data.test.labels).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert data.train.noise_mask.double().mean().item() == pytest.approx(0.25, abs=0.01)
    below_five = (official.test.labels < 5).long()
    assert torch.equal(data.test.true_labels, below_five)


@pytest.mark.slow
def test_mnist_on_cifar_has_photographs_of_its_own_for_each_split(real_data):
    data = digits_on_photographs("mnist", "cifar10", seed=0, examples=500, root=real_data)
    assert data.train.images.shape == (500, 3, 32, 32)
    assert (data.train.attributes != data.train.labels).sum() == 25
    assert (len(data.validation), len(data.test)) == (10_000, 10_000)
