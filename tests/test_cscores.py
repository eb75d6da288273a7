import hashlib
import io
import itertools

import numpy as np
import pytest
import torch

from memloc import cscores, datasets, labelnoise, sources


def npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def shuffle(values: np.ndarray) -> np.ndarray:
    """The order of tensorflow-datasets, by its rule."""
    keys = {hashlib.md5(("train" + str(index)).encode()).hexdigest(): index for index in range(len(values))}
    return np.array([values[keys[key]] for key in sorted(keys)])


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write a file of C-scores below the root and have its checksum taken for the official one."""
    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path))

    def write(file: str, content: bytes) -> None:
        path = tmp_path / "cscores" / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found = hashlib.md5(content).hexdigest()
        if file == "mnist-cscores-orig-order.npz":
            monkeypatch.setattr(cscores, "_MNIST_CONVERTED_MD5", found)
        else:
            monkeypatch.setitem(sources._PLAIN_MD5["cscores"], file, found)

    return write


@pytest.fixture
def scores():
    return np.linspace(0.1, 0.9, 12)


@pytest.fixture
def labels():
    return np.arange(12) % 10


@pytest.mark.parametrize("examples", [None, 12, 5])
def test_scores_of_cifar10_are_those_of_the_first_examples(publish, scores, labels, examples):
    publish("cifar10-cscores-orig-order.npz", npz(scores=scores, labels=labels))
    found = cscores.consistency_scores("cifar10", examples, labels=torch.from_numpy(labels[:examples]))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(scores[:examples]).float())


def test_scores_of_mnist_come_in_the_order_of_the_official_files(publish, scores):
    publish("mnist-cscores.npy", npy(shuffle(scores)))
    assert torch.equal(cscores.consistency_scores("mnist"), torch.from_numpy(scores).float())


def test_scores_of_mnist_that_are_in_order_already_stay_so(publish, scores, labels):
    publish("mnist-cscores-orig-order.npz", npz(scores=scores, labels=labels))
    assert torch.equal(cscores.consistency_scores("mnist"), torch.from_numpy(scores).float())


def test_the_published_file_goes_before_the_converted_one(publish, scores, labels):
    publish("mnist-cscores.npy", npy(shuffle(scores)))
    publish("mnist-cscores-orig-order.npz", npz(scores=1 - scores, labels=labels))
    assert torch.equal(cscores.consistency_scores("mnist"), torch.from_numpy(scores).float())


@pytest.mark.parametrize(
    ("count", "shape"), [(1, ()), (7, ()), (100, (3,)), (1000, ())], ids=["one", "few", "rows", "many"]
)
def test_undoing_the_shuffle_is_the_inverse_of_the_shuffle(count, shape):
    values = np.random.default_rng(0).normal(size=(count, *shape))
    assert np.array_equal(cscores.undo_tfds_shuffle(shuffle(values)), values)


@pytest.mark.parametrize("file", ["mnist-cscores.npy", "cifar10-cscores-orig-order.npz"])
def test_a_missing_file_is_named_with_the_command(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing: run `memloc data get cscores`"):
        cscores.consistency_scores(file.split("-")[0], root=tmp_path)


@pytest.mark.parametrize(
    ("file", "dataset"),
    [
        ("cifar10-cscores-orig-order.npz", "cifar10"),
        ("mnist-cscores.npy", "mnist"),
        ("mnist-cscores-orig-order.npz", "mnist"),
    ],
)
def test_an_altered_file_is_refused(publish, tmp_path, scores, labels, file, dataset):
    publish(file, npz(scores=scores, labels=labels))
    path = tmp_path / "cscores" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is truncated or altered"):
        cscores.consistency_scores(dataset)


def test_a_file_with_a_pickle_is_refused_even_with_the_right_checksum(publish):
    publish("mnist-cscores.npy", npy(np.array([object()]), allow_pickle=True))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        cscores.consistency_scores("mnist")


@pytest.mark.parametrize("wrong", [[0] * 12, [0, 1, 2]], ids=["others", "too few"])
def test_scores_of_other_examples_are_refused_in_one_line(publish, scores, labels, wrong):
    publish("cifar10-cscores-orig-order.npz", npz(scores=scores, labels=labels))
    with pytest.raises(ValueError, match="labels must be the true ones of the first 12 training images") as refusal:
        cscores.consistency_scores("cifar10", labels=torch.tensor(wrong))
    assert "\n" not in str(refusal.value)


def test_data_without_published_scores_are_refused_with_what_to_do_instead(tmp_path):
    with pytest.raises(ValueError, match=r"cifar10, mnist, got 'digits': .*estimate\(images, labels\)"):
        cscores.consistency_scores("digits", root=tmp_path)


@pytest.mark.parametrize("examples", [0, -1, 13])
def test_a_number_of_examples_that_there_are_not_is_refused(publish, scores, labels, examples):
    publish("cifar10-cscores-orig-order.npz", npz(scores=scores, labels=labels))
    with pytest.raises(ValueError, match=f"examples must be from 1 to 12, all that cifar10 has, got {examples}"):
        cscores.consistency_scores("cifar10", examples)


def enumerated(points: torch.Tensor, labels: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """The definition, over every part of the other examples that is not empty."""
    scores = []
    for target in range(len(points)):
        others = [index for index in range(len(points)) if index != target]
        right = total = 0.0
        for share in shares:
            for size in range(1, len(others) + 1):
                for part in itertools.combinations(others, size):
                    probability = share**size * (1 - share) ** (len(others) - size)
                    nearest = min(part, key=lambda index: float((points[index] - points[target]).norm()))
                    right += probability * float(labels[nearest] == labels[target])
                    total += probability
        scores.append(right / total)
    return torch.tensor(scores)


@pytest.mark.parametrize("shares", [[0.5], [0.1, 0.9], [1.0]], ids=str)
def test_an_estimate_is_the_expectation_over_all_parts_of_the_other_examples(shares, device):
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(8, 2, 3, generator=rng).to(device)
    labels = torch.randint(0, 3, (8,), generator=rng).to(device)
    found = cscores.estimate(points, labels, shares=shares, batch_size=3)
    assert torch.allclose(found.cpu(), enumerated(points.cpu(), labels.cpu(), shares), atol=1e-6)


def test_votes_are_shares_of_the_classes_by_the_same_definition(device):
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]], device=device)
    votes = cscores.held_out_votes(points, torch.tensor([0, 3, 1, 1], device=device), shares=[0.5], batch_size=2)
    # The first one's neighbours are 3, 1, 1 in this order, with weights 1/2, 1/4, 1/8 out of 7/8.
    assert torch.allclose(votes[0].cpu(), torch.tensor([0, 3 / 7, 0, 4 / 7]))
    assert torch.allclose(votes.sum(1).cpu(), torch.ones(4))


def test_wrong_labels_have_low_scores_and_true_ones_high(device, global_generator_untouched):
    data = labelnoise.apply(datasets.load("digits", device=device), "flip", 0.1, seed=0)
    scores = cscores.estimate(data.train.images, data.train.labels)
    noisy = data.train.noise_mask
    assert scores[noisy].mean() < 0.1
    assert scores[~noisy].mean() > 0.85
    assert torch.equal(scores, cscores.estimate(data.train.images, data.train.labels, batch_size=200))


def test_an_example_between_two_classes_has_a_lower_score_than_one_within():
    left, right = torch.linspace(-2, -1, 20), torch.linspace(1, 2, 20)
    points = torch.cat([left, right, torch.tensor([0.01])])[:, None]
    labels = torch.tensor([0] * 20 + [1] * 21)
    scores = cscores.estimate(points, labels)
    assert scores[0] > 0.95
    assert scores[20 + 19] > 0.95
    assert scores[40] < scores[:40].min()


@pytest.mark.parametrize(
    ("images", "labels"),
    [(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))],
    ids=["unequal", "one example"],
)
def test_examples_that_do_not_fit_are_refused(images, labels):
    with pytest.raises(ValueError, match="images and labels must be of the same N ≥ 2 examples"):
        cscores.estimate(images, labels)


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.tensor([0, -1, 2])], ids=["fractions", "negative"])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be integers from 0 up, got torch"):
        cscores.estimate(torch.zeros(3, 2), labels)


@pytest.mark.parametrize("shares", [[], [0.0], [0.5, 1.1]], ids=str)
def test_parts_of_no_size_are_refused(shares):
    with pytest.raises(ValueError, match="shares must be fractions above 0 and up to 1"):
        cscores.estimate(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), shares=shares)


def test_data_have_the_published_scores_where_there_are_any_and_else_an_estimate(
    publish, scores, labels, tmp_path, monkeypatch
):
    publish("cifar10-cscores-orig-order.npz", npz(scores=scores, labels=labels))
    images = np.random.default_rng(0).normal(size=(5, 3, 2, 2))
    data = datasets.from_arrays(images, labels[:5], images, labels[:5], name="cifar10", classes=list("abcdefghij"))
    assert torch.equal(cscores.of(data), torch.from_numpy(scores[:5]).float())
    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path / "elsewhere"))
    assert torch.equal(cscores.of(data, tmp_path), torch.from_numpy(scores[:5]).float())
    monkeypatch.setenv("MEMLOC_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="labels must be the true ones"):
        cscores.of(datasets.from_arrays(images, labels[4:9], images, labels[:5], name="cifar10"))

    unknown = datasets.from_arrays(images, labels[:5] % 2, images, labels[:5] % 2, name="mine")
    wrong = unknown.with_labels(1 - unknown.train.labels)
    assert torch.equal(cscores.of(wrong), cscores.estimate(wrong.train.images, wrong.train.true_labels))


@pytest.mark.slow
def test_the_order_of_mnist_is_such_that_shuffling_it_gives_the_published_file_byte_for_byte(real_data):
    converted = real_data / cscores._MNIST_CONVERTED
    if not converted.is_file():
        pytest.skip(f"MEMLOC_DATA has no {cscores._MNIST_CONVERTED}: this test needs the converted scores")
    with np.load(converted, allow_pickle=False) as arrays:
        published = npy(shuffle(arrays["scores"]))
        assert np.array_equal(cscores.undo_tfds_shuffle(shuffle(arrays["scores"])), arrays["scores"])
    assert hashlib.md5(published).hexdigest() == sources._PLAIN_MD5["cscores"]["mnist-cscores.npy"]


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "low"), [("cifar10", 4838), ("mnist", 1098)])
def test_published_scores_belong_to_the_labels_of_the_data(real_data, dataset, low):
    if not (real_data / "cscores").is_dir():
        pytest.skip("MEMLOC_DATA has no folder cscores: this test needs the published scores")
    data = datasets.load(dataset, root=real_data)
    assert (cscores.of(data, real_data) < cscores.THRESHOLD).sum().item() == low


@pytest.mark.slow
def test_on_mnist_the_estimate_ranks_examples_as_the_published_scores_do(real_data):
    if not (real_data / "cscores").is_dir():
        pytest.skip("MEMLOC_DATA has no folder cscores: this test needs the published scores")
    data = datasets.load("mnist", examples=4000, root=real_data)
    own = cscores.estimate(data.train.images, data.train.true_labels)
    published = cscores.of(data, real_data)
    ranks = torch.stack([values.argsort().argsort().float() for values in (own, published)])
    assert torch.corrcoef(ranks)[0, 1] > 0.4
    lowest = published < cscores.THRESHOLD
    assert own[lowest].mean() < own[~lowest].mean() - 0.3
