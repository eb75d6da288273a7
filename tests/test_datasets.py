import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from memloc import datasets
from memloc.vision import torchvision


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), np.uint8)


@pytest.fixture
def labels():
    return np.array([0, 1, 2, 0, 1, 2])


def test_digits_keep_their_order_and_are_scaled_to_plus_minus_one():
    data = datasets.load("digits")
    pixels, labels = load_digits(return_X_y=True)
    joined = torch.cat([data.train.images, data.test.images])
    assert torch.equal(joined, torch.from_numpy((pixels / 16 - 0.5) / 0.5).float().view(-1, 1, 8, 8))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == labels.tolist()
    assert (len(data.train), len(data.test), data.classes) == (1297, 500, tuple("0123456789"))
    assert set(data.test.labels.tolist()) == set(range(10))


def test_pixels_are_scaled_exactly_as_torchvisions_transforms_scale_them(images, labels):
    transforms = torchvision().transforms
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    data = datasets.from_arrays(images, labels, images, labels)
    for index, image in enumerate(images):
        assert torch.equal(data.train.images[index], scale(image.transpose(1, 2, 0)))


@pytest.mark.parametrize("size", [32, 12, 8, 5, 1])
def test_resizing_takes_the_nearest_pixel(size):
    small, resized = (datasets.load("digits", examples=3, size=side) for side in (None, size))
    for split in ("train", "test"):
        before, after = getattr(small, split).images, getattr(resized, split).images
        assert after.shape == (len(before), 1, size, size)
        for row in range(size):
            for column in range(size):
                assert torch.equal(after[:, :, row, column], before[:, :, row * 8 // size, column * 8 // size])


def test_examples_takes_the_first_training_examples_and_all_test_examples():
    few, all_of_them = datasets.load("digits", examples=7), datasets.load("digits")
    assert torch.equal(few.train.images, all_of_them.train.images[:7])
    assert few.train.indices.tolist() == list(range(7))
    assert len(few.test) == 500
    assert len(datasets.load("digits", examples=1297).train) == 1297


@pytest.mark.parametrize("examples", [0, -1, 1298])
def test_a_number_of_examples_that_is_not_there_is_refused(examples):
    with pytest.raises(ValueError, match=f"examples must be from 1 to 1297.* got {examples}"):
        datasets.load("digits", examples=examples)


def test_a_size_below_one_pixel_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        datasets.load("digits", size=0)


def test_an_unknown_data_set_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean cifar10"):
        datasets.load("cifar11")


def test_a_missing_data_set_is_one_line_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`memloc data get cifar10`.*MEMLOC_DATA") as refusal:
        datasets.load("cifar10", root=tmp_path)
    assert "\n" not in str(refusal.value)


def test_labels_are_true_until_they_are_replaced(images, labels):
    data = datasets.from_arrays(images, labels, images, labels)
    for split in (data.train, data.test):
        assert torch.equal(split.labels, split.true_labels)
        assert split.labels.dtype == torch.int64
        assert split.noise_mask.dtype == torch.bool
        assert not split.noise_mask.any()


def test_what_is_given_is_copied(images, labels):
    floats, numbers = torch.ones(6, 3, 5, 7), torch.from_numpy(labels.copy())
    before = floats.clone()
    data = datasets.from_arrays(floats, numbers, images, labels)
    data.train.images.zero_()
    data.train.labels.zero_()
    data.test.labels.zero_()
    assert torch.equal(floats, before)
    assert numbers.tolist() == labels.tolist() == data.train.true_labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_kept_as_they_are_given(dtype, labels):
    images = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = datasets.from_arrays(images, labels, images, labels)
    assert torch.equal(data.train.images, images.float())


def test_arrays_may_be_grey_strided_or_read_only(images, labels):
    grey = images[:, 0, ::-1]
    read_only = np.ascontiguousarray(grey)
    read_only.flags.writeable = False
    data = datasets.from_arrays(grey, labels.astype(np.uint8), read_only, labels.astype(np.int32))
    assert data.train.images.shape == (6, 1, 5, 7)
    assert torch.equal(data.train.images, data.test.images)
    strided = torch.from_numpy(images).transpose(2, 3)
    assert datasets.from_arrays(strided, labels, strided, labels).train.images.is_contiguous()


def test_classes_are_numbered_up_to_the_largest_label_unless_named(images, labels):
    few = datasets.from_arrays(images, np.zeros_like(labels), images, labels)
    assert few.classes == ("0", "1", "2")
    named = datasets.from_arrays(images, labels, images, labels, classes=["a", "b", "c", "d"], name="mine")
    assert (named.classes, named.num_classes, named.name) == (("a", "b", "c", "d"), 4, "mine")


def test_there_may_be_one_class_and_no_test_example(images):
    data = datasets.from_arrays(images, np.zeros(6, int), images[:0], np.zeros(0, int))
    assert (data.num_classes, len(data.train), len(data.test)) == (1, 6, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((6, 75))},
            r"images must be uint8 or float of shape .* got torch.float64 \(6, 75\)",
        ),
        ({"images": np.zeros((6, 3, 5, 7), int)}, "images must be uint8 or float"),
        ({"images": np.zeros((6, 5, 5, 3))}, "images must have channels first"),
        ({"images": np.zeros((0, 3, 5, 7)), "labels": np.zeros(0, int)}, "at least one example"),
        ({"test_images": np.zeros((6, 3, 5, 5))}, r"same \(C, H, W\), got \(3, 5, 7\) and \(3, 5, 5\)"),
        ({"labels": np.zeros(6)}, r"labels must be integers \(N,\), got torch.float64 \(6,\)"),
        ({"labels": np.zeros(6, bool)}, "labels must be integers .* got torch.bool"),
        ({"labels": np.zeros(6, complex)}, "labels must be integers .* got torch.complex128"),
        ({"labels": np.zeros(5, int)}, r"labels must be int64 \(6,\), one per image, got torch.int64 \(5,\)"),
        ({"labels": np.full(6, -1)}, r"labels must be from 0 to 2 \(3 classes\), got -1 to -1"),
        ({"test_labels": np.zeros((6, 1), int)}, "test_labels must be"),
        ({"test_labels": np.arange(6), "classes": "abc"}, "test_labels must be from 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, changes, message):
    arrays = {"images": images, "labels": labels, "test_images": images, "test_labels": labels} | changes
    with pytest.raises(ValueError, match=message) as refusal:
        datasets.from_arrays(**arrays)
    assert "\n" not in str(refusal.value)


def test_replaced_labels_count_as_noisy_where_they_are_wrong(images, labels):
    data = datasets.from_arrays(images, labels, images, labels)
    noisy = data.with_labels(torch.tensor([0, 1, 2, 1, 1, 0]))
    assert noisy.train.noise_mask.tolist() == [False, False, False, True, False, True]
    assert noisy.train.true_labels is data.train.true_labels
    assert noisy.train.images is data.train.images
    assert noisy.test is data.test
    assert data.train.labels.tolist() == labels.tolist()


def test_a_given_noise_mask_is_kept(images, labels):
    data = datasets.from_arrays(images, labels, images, labels)
    mask = torch.ones(6, dtype=torch.bool)
    assert torch.equal(data.with_labels(data.train.labels, mask).train.noise_mask, mask)


@pytest.mark.parametrize(
    ("replacement", "mask", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), None, r"labels must be int64 \(6,\)"),
        (torch.zeros(6), None, "labels must be int64"),
        (torch.full((6,), 3), None, "labels must be from 0 to 2"),
        (torch.zeros(6, dtype=torch.int64), torch.zeros(6), "noise_mask must be bool"),
        (torch.zeros(6, dtype=torch.int64), torch.zeros(5, dtype=torch.bool), "noise_mask must be bool"),
    ],
)
def test_labels_and_masks_that_do_not_fit_are_refused(images, labels, replacement, mask, message):
    data = datasets.from_arrays(images, labels, images, labels)
    with pytest.raises(ValueError, match=message):
        data.with_labels(replacement, mask)


def test_everything_moves_to_the_device(device):
    for data in (datasets.load("digits", examples=5, device=device), datasets.load("digits").to(device)):
        for split in (data.train, data.test):
            tensors = [*vars(split).values(), split.indices]
            assert len(tensors) == 5
            assert {tensor.device.type for tensor in tensors} == {device.type}


def test_data_cannot_be_reassigned():
    split = datasets.load("digits", examples=2).train
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.labels = split.labels + 1


def shifted_and_mirrored(image: np.ndarray, top: int, left: int, mirrored: bool, pad: tuple) -> np.ndarray:
    _, height, width = image.shape
    out = np.full_like(image, -1)
    for row in range(height):
        for column in range(width):
            source = row + top - pad[0], (width - 1 - column if mirrored else column) + left - pad[1]
            if 0 <= source[0] < height and 0 <= source[1] < width:
                out[:, row, column] = image[:, source[0], source[1]]
    return out


@pytest.mark.parametrize(
    "shape", [(9, 3, 32, 32), (7, 1, 28, 28), (5, 2, 8, 8), (3, 1, 16, 24), (2, 1, 4, 4), (0, 1, 8, 8)]
)
def test_augmenting_is_a_crop_of_the_padded_image_and_a_mirror(shape, device):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pad, rng = (shape[2] // 8, shape[3] // 8), torch.Generator().manual_seed(5)
    top, left = (torch.randint(2 * side + 1, (shape[0], 1), generator=rng) for side in pad)
    mirrored = torch.rand(shape[0], 1, generator=rng) < 0.5
    augmented = datasets.augment(images.to(device), torch.Generator().manual_seed(5)).cpu()
    assert augmented.shape == shape
    for index in range(shape[0]):
        place = top[index].item(), left[index].item(), mirrored[index].item()
        expected = shifted_and_mirrored(images[index].numpy(), *place, pad)
        assert np.array_equal(augmented[index].numpy(), expected)


def test_every_shift_of_up_to_four_pixels_at_32_occurs_mirrored_and_not():
    image = torch.full((1, 1, 32, 32), -1.0)
    image[0, 0, 15, 15] = 1
    augmented = datasets.augment(image.expand(5000, -1, -1, -1), torch.Generator().manual_seed(0))
    _, _, rows, columns = (augmented == 1).nonzero(as_tuple=True)
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == {(row, column) for row in range(11, 20) for column in range(11, 21)}  # mirrored: 12 to 20
    assert 0.04 < (columns == 11).double().mean().item() < 0.07  # 1 in 18


def test_half_of_the_images_are_mirrored():
    images = torch.tensor([[[[1.0, 0.0]]]]).expand(10_000, -1, 1, -1)  # too small to be shifted
    augmented = datasets.augment(images, torch.Generator().manual_seed(0))
    assert 0.48 < augmented[:, 0, 0, 1].mean().item() < 0.52


def test_augmenting_depends_on_the_generator_alone_and_leaves_its_input():
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    one, again, other = (datasets.augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_augmenting_keeps_the_type(dtype):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert datasets.augment(images, torch.Generator().manual_seed(0)).dtype == dtype


REAL = {"mnist": (60_000, 10_000, 10), "cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_data_are_what_torchvision_reads_scaled_as_in_the_paper(real_data, name):
    data = datasets.load(name, root=real_data)
    assert (len(data.train), len(data.test), data.num_classes) == REAL[name]
    transforms, channels = torchvision().transforms, data.train.images.shape[1]
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * channels, (0.5,) * channels)])
    reader = getattr(torchvision().datasets, {"mnist": "MNIST"}.get(name, name.upper()))
    for split, train in ((data.train, True), (data.test, False)):
        theirs = reader(real_data, train=train, transform=scale)
        assert split.labels.tolist() == torch.as_tensor(theirs.targets).tolist()
        for index in range(0, len(theirs), 997):
            assert torch.equal(split.images[index], theirs[index][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_5"),
        ("cifar100", "cifar-100-python/test"),
    ],
)
def test_a_real_file_without_its_last_byte_is_refused(real_data, tmp_path, name, file):
    folder = (tmp_path / file).parent
    folder.mkdir(parents=True)
    for path in (real_data / file).parent.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (tmp_path / file).unlink()
    shutil.copyfile(real_data / file, tmp_path / file)
    os.truncate(tmp_path / file, (real_data / file).stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{Path(file).name} is truncated or altered.*memloc data get {name}"):
        datasets.load(name, root=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(value):
    images, labels = torch.full((2, 1, 4, 4), value), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity"):
        datasets.from_arrays(images, labels, images[:0], labels[:0])


def test_data_are_shown_in_a_line_not_as_their_pixels():
    assert repr(datasets.load("digits", examples=3).train) == "Split(images (3, 1, 8, 8), 0 noisy, on cpu)"
