import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc import datasets, labelnoise, sources

HUMAN = [kind for kind in labelnoise.KINDS if kind.startswith("human")]


@pytest.fixture
def labels(device):
    return (torch.arange(10_000) % 10).to(device)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write CIFAR-10N's file and have its checksum taken for the official one."""

    def write(arrays: object) -> Path:
        buffer = io.BytesIO()
        torch.save(arrays, buffer)
        path = tmp_path / "cifar-10n" / "CIFAR-10_human.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
        monkeypatch.setitem(sources._PLAIN_MD5, "cifar-10n", {path.name: hashlib.md5(buffer.getvalue()).hexdigest()})
        return path

    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path))
    return write


@pytest.fixture
def human_arrays():
    clean = np.arange(30) % 10
    arrays = {"clean_label": clean}
    for shift, array in enumerate(("aggre", "random_1", "random_2", "random_3", "worse")):
        name = array.replace("_", "_label") if "_" in array else f"{array}_label"
        arrays[name] = np.where(np.arange(30) <= shift, (clean + 1 + shift) % 10, clean)
    return arrays


@pytest.fixture
def tiny_cifar10(human_arrays):
    images, clean = np.zeros((30, 3, 4, 4), np.uint8), human_arrays["clean_label"]
    return datasets.from_arrays(images, clean, images, clean, name="cifar10")


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("noise_rate", [0.0, 0.05, 0.1, 0.33333, 1.0])
def test_exactly_the_share_asked_for_is_flipped_and_every_flip_is_wrong(labels, noise_rate, parity):
    noisy = labelnoise.flip_labels(labels, noise_rate, 10, seed=3, parity=parity)
    assert torch.equal(noisy.noise_mask, noisy.labels != labels)
    assert noisy.noise_mask.sum().item() == int(noise_rate * 10_000)
    assert noisy.labels.amin() >= 0
    assert noisy.labels.amax() <= 9


def test_the_number_of_flips_is_the_floor_of_the_floating_point_product():
    noisy = labelnoise.flip_labels(torch.zeros(100, dtype=torch.int64), 0.29, 10, seed=0)
    assert noisy.noise_mask.sum().item() == 28


@pytest.mark.parametrize("permute", [False, True])
def test_true_labels_are_neither_changed_nor_shared(labels, permute):
    before = labels.clone()
    for rate in (0.0, 0.5):
        if permute:
            noisy = labelnoise.permute_labels(labels, rate, seed=0)
        else:
            noisy = labelnoise.flip_labels(labels, rate, 10, seed=0)
        noisy.labels.zero_()
        assert torch.equal(labels, before)
        assert torch.equal(noisy.true_labels, before)


def test_flipped_labels_are_uniform_over_all_wrong_classes(labels):
    noisy = labelnoise.flip_labels(labels, 1.0, 10, seed=1)
    offsets = torch.bincount((noisy.labels - labels) % 10, minlength=10).cpu()
    assert offsets[0] == 0
    assert (offsets[1:] - 10_000 / 9).abs().max() < 5 * (10_000 / 9 * 8 / 9) ** 0.5


def test_flipped_places_are_uniform():
    hits = sum(
        labelnoise.flip_labels(torch.zeros(10, dtype=torch.int64), 0.3, 5, seed).noise_mask.int()
        for seed in range(1000)
    )
    assert (hits - 300).abs().max() < 5 * (1000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("parity", [False, True])
def test_flips_depend_on_the_seed_alone(labels, parity):
    one, again, other = (labelnoise.flip_labels(labels, 0.1, 10, seed, parity=parity).labels for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("seed", "num_classes"), [(0, 10), (1, 10), (2, 3), (3, 100)])
def test_parity_repeats_the_draws_of_the_reference_code(seed, num_classes):
    true = np.arange(777) % num_classes
    rng = np.random.default_rng(seed)
    expected = true.copy()
    places = rng.choice(np.arange(777), int(0.2 * 777), replace=False)
    for place, offset in zip(places, rng.choice(num_classes - 2, len(places)) + 1, strict=True):
        expected[place] = (true[place] + offset) % num_classes
    noisy = labelnoise.flip_labels(torch.from_numpy(true), 0.2, num_classes, seed, parity=True)
    assert noisy.labels.tolist() == expected.tolist()
    assert noisy.noise_mask.nonzero().flatten().tolist() == sorted(places)


def test_parity_never_takes_the_class_before_the_true_one(labels):
    noisy = labelnoise.flip_labels(labels, 1.0, 10, seed=0, parity=True)
    assert set(((noisy.labels - labels) % 10).tolist()) == set(range(1, 9))


def test_with_two_classes_every_flip_is_the_other_class():
    labels = torch.tensor([0, 1, 1, 0])
    assert labelnoise.flip_labels(labels, 1.0, 2, seed=0).labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("parity", [False, True])
def test_few_or_no_examples_are_no_special_case(parity):
    one, none = torch.tensor([2]), torch.empty(0, dtype=torch.int64)
    assert labelnoise.flip_labels(one, 0.9, 5, 0, parity=parity).labels.tolist() == [2]
    assert labelnoise.flip_labels(one, 1.0, 5, 0, parity=parity).noise_mask.tolist() == [True]
    assert len(labelnoise.flip_labels(none, 1.0, 5, 0, parity=parity).labels) == 0
    assert len(labelnoise.permute_labels(none, 1.0, 0).labels) == 0
    assert labelnoise.permute_labels(one, 1.0, 0).labels.tolist() == [2]
    zeros = torch.zeros(3, dtype=torch.int64)
    assert labelnoise.flip_labels(zeros, 0.0, 1, 0, parity=parity).labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("num_classes", "parity"), [(1, False), (1, True), (2, True)])
def test_too_few_classes_to_be_wrong_are_refused(num_classes, parity):
    with pytest.raises(ValueError, match=rf"num_classes must be at least \d.* got {num_classes}"):
        labelnoise.flip_labels(torch.zeros(4, dtype=torch.int64), 0.1, num_classes, 0, parity=parity)


@pytest.mark.parametrize("noise_rate", [-0.1, 1.0001, 10, float("nan")])
def test_a_rate_that_is_no_share_is_refused(noise_rate):
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="noise_rate must be from 0 to 1"):
        labelnoise.flip_labels(labels, noise_rate, 10, 0)
    with pytest.raises(ValueError, match="noise_rate must be from 0 to 1"):
        labelnoise.permute_labels(labels, noise_rate, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4), "int64"),
        (torch.zeros(4, 2, dtype=torch.int64), "int64"),
        (torch.tensor([0, 10]), "0 to 9"),
        (torch.tensor([-1, 0]), "0 to 9"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        labelnoise.flip_labels(labels, 0.1, 10, 0)


def test_permuting_keeps_the_number_of_examples_per_class_and_all_labels_outside_the_subset(labels):
    noisy = labelnoise.permute_labels(labels, 0.5, seed=0)
    assert noisy.noise_mask.sum().item() == 5000
    assert torch.equal(noisy.labels[~noisy.noise_mask], labels[~noisy.noise_mask])
    assert torch.equal(noisy.labels.bincount(), labels.bincount())


def test_about_one_permuted_label_in_ten_stays_right_and_counts_as_noisy(labels):
    noisy = labelnoise.permute_labels(labels, 0.5, seed=0)
    assert 0.08 < (noisy.labels == labels)[noisy.noise_mask].double().mean().item() < 0.12


def test_permutations_depend_on_the_seed_alone(labels):
    one, again, other = (labelnoise.permute_labels(labels, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(one.labels, again.labels)
    assert not torch.equal(one.noise_mask, other.noise_mask)


@pytest.fixture
def points():
    """100 points of each class on a line, of which the first ten of class 0 lie among class 1."""
    return torch.cat([torch.linspace(5, 6, 10), torch.linspace(0, 1, 90), torch.linspace(5, 6, 100)])[:, None]


@pytest.fixture
def two_classes():
    return torch.arange(200) // 100


def test_confusion_hits_what_looks_like_another_class(points, two_classes, device, global_generator_untouched):
    noisy = labelnoise.confuse_labels(points.to(device), two_classes.to(device), 0.05, 2, seed=1)
    assert noisy.labels.device == noisy.noise_mask.device == noisy.true_labels.device
    assert noisy.noise_mask.sum().item() == 10
    assert noisy.noise_mask[10:100].sum() == 0  # nothing lies near them
    assert noisy.noise_mask[:10].sum() >= 3  # of ten hits; without looking it would be half a hit
    assert torch.equal(noisy.noise_mask, noisy.labels != noisy.true_labels)


@pytest.mark.parametrize("count", [1, 3, 199, 200])
def test_confusion_replaces_exactly_so_many_labels(points, two_classes, count):
    noisy = labelnoise.confuse_labels(points, two_classes, (count + 0.5) / 200 if count < 200 else 1.0, 4, seed=1)
    assert (noisy.labels != two_classes).sum().item() == noisy.noise_mask.sum().item() == count
    assert noisy.labels.amax() < 4


def test_confused_labels_are_drawn_by_the_frequency_of_each_class():
    images = torch.cat([torch.zeros(1), torch.full((100,), 1.0), torch.full((100,), 1.1)])[:, None]
    labels = torch.tensor([0] + [1] * 100 + [2] * 100)
    drawn = [labelnoise.confuse_labels(images, labels, 1.0, 3, seed).labels[0].item() for seed in range(50)]
    assert drawn.count(1) == 50  # a hundred of class 1 are nearer than the first of class 2


def test_confusion_depends_on_the_seed_alone(points, two_classes):
    one, again, other = (labelnoise.confuse_labels(points, two_classes, 0.1, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one.labels, again.labels)
    assert not torch.equal(one.noise_mask, other.noise_mask)


def test_no_rate_confuses_nothing(points, two_classes):
    noisy = labelnoise.confuse_labels(points, two_classes, 0.0, 2, seed=0)
    assert torch.equal(noisy.labels, two_classes)
    assert not noisy.noise_mask.any()


def test_one_class_cannot_be_confused(points):
    with pytest.raises(ValueError, match="num_classes must be at least 2 to be confused, got 1"):
        labelnoise.confuse_labels(points, torch.zeros(200, dtype=torch.int64), 0.5, 1, seed=0)


@pytest.mark.parametrize("examples", [30, 7])
def test_human_labels_are_those_of_the_first_examples(publish, human_arrays, examples):
    publish(human_arrays)
    true_labels = torch.from_numpy(human_arrays["clean_label"][:examples])
    for flipped, kind in enumerate(HUMAN, start=1):
        noisy = labelnoise.human_labels(kind, true_labels)
        assert torch.equal(noisy.noise_mask, torch.arange(examples) < flipped)
        assert torch.equal(noisy.labels, torch.where(noisy.noise_mask, true_labels + flipped, true_labels) % 10)


@pytest.mark.parametrize(
    "true_labels", [torch.zeros(30, dtype=torch.int64), torch.arange(31) % 10], ids=["others", "too many"]
)
def test_human_labels_of_other_images_are_refused(publish, human_arrays, true_labels):
    publish(human_arrays)
    with pytest.raises(ValueError, match="true_labels must be those of the first training images of CIFAR-10"):
        labelnoise.human_labels("human-worse", true_labels)


def test_missing_human_labels_are_named_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10_human.pt is missing: run `memloc data get cifar-10n`"):
        labelnoise.human_labels("human-worse", torch.zeros(3, dtype=torch.int64), tmp_path)


def test_altered_human_labels_are_refused(publish, human_arrays):
    path = publish(human_arrays)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"CIFAR-10_human\.pt is truncated or altered"):
        labelnoise.human_labels("human-worse", torch.from_numpy(human_arrays["clean_label"]))


class Trap:
    """What unpickles to a call that leaves a file behind."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused_and_runs_nothing(publish, human_arrays, tmp_path):
    victim = tmp_path / "victim"
    path = publish(human_arrays | {"worse_label": Trap(victim)})
    with pytest.raises(ValueError, match="must be NumPy arrays and nothing else") as refusal:
        labelnoise.human_labels("human-worse", torch.from_numpy(human_arrays["clean_label"]))
    assert "\n" not in str(refusal.value)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the trap would not have worked"


@pytest.mark.parametrize("kind", labelnoise.KINDS)
def test_noise_goes_to_the_training_labels_and_nowhere_else(publish, human_arrays, tiny_cifar10, kind):
    publish(human_arrays)
    noisy = labelnoise.apply(tiny_cifar10, kind, 0.3, seed=0)
    assert noisy.train.noise_mask.any()
    assert torch.equal(noisy.train.labels[~noisy.train.noise_mask], tiny_cifar10.train.labels[~noisy.train.noise_mask])
    assert not torch.equal(noisy.train.labels, tiny_cifar10.train.labels)
    assert torch.equal(noisy.train.true_labels, tiny_cifar10.train.true_labels)
    assert noisy.train.images is tiny_cifar10.train.images
    assert noisy.test is tiny_cifar10.test


def test_flip_and_parity_differ_in_their_draws(tiny_cifar10):
    flip, parity = (labelnoise.apply(tiny_cifar10, kind, 0.5, 0).train.labels for kind in ("flip", "parity"))
    true = tiny_cifar10.train.true_labels
    assert torch.equal(flip, labelnoise.flip_labels(true, 0.5, 10, 0).labels)
    assert torch.equal(parity, labelnoise.flip_labels(true, 0.5, 10, 0, parity=True).labels)


def test_noise_on_noisy_data_starts_from_the_true_labels(tiny_cifar10):
    once = labelnoise.apply(tiny_cifar10, "flip", 0.3, seed=0)
    twice = labelnoise.apply(labelnoise.apply(tiny_cifar10, "permute", 1.0, seed=5), "flip", 0.3, seed=0)
    assert torch.equal(once.train.labels, twice.train.labels)
    assert torch.equal(once.train.noise_mask, twice.train.noise_mask)


def test_the_mask_of_permuted_data_is_the_subset(tiny_cifar10):
    train = labelnoise.apply(tiny_cifar10, "permute", 1.0, seed=0).train
    assert (train.labels == train.true_labels).any()
    assert train.noise_mask.all()


def test_human_labels_need_cifar10():
    with pytest.raises(ValueError, match="human-worse labels are of cifar10, got digits"):
        labelnoise.apply(datasets.load("digits", examples=5), "human-worse", 0.4, 0)


@pytest.mark.parametrize("kind", ["", "flips", "human"])
def test_an_unknown_kind_is_refused(tiny_cifar10, kind):
    with pytest.raises(ValueError, match="kind must be one of flip, parity, permute, confuse, human-aggregate"):
        labelnoise.apply(tiny_cifar10, kind, 0.1, 0)
    with pytest.raises(ValueError, match="kind must be one of human-aggregate"):
        labelnoise.human_labels(kind, tiny_cifar10.train.true_labels)


@pytest.mark.slow
def test_the_published_human_labels_differ_from_cifar10_as_often_as_their_authors_say(real_data):
    if not (real_data / "cifar-10n").is_dir():
        pytest.skip("MEMLOC_DATA has no folder cifar-10n: this test needs the published human labels")
    data = datasets.load("cifar10", root=real_data)
    percent = {
        kind: round(100 * labelnoise.apply(data, kind, 0.0, 0, real_data).train.noise_mask.double().mean().item(), 2)
        for kind in HUMAN
    }
    assert list(percent.values()) == [9.01, 17.23, 18.12, 17.64, 40.21]
