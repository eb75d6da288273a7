import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from memloc import groups
from memloc.group_folders import celeba, waterbirds

WATERBIRDS = "waterbird_complete95_forest2water2"
SPLITS = ("train", "validation", "test")


def shade(index):
    """The grey of an image's central square, which tells images apart."""
    return 10 + 15 * index


def draw(path, index, width=20, height=12):
    """Write an image whose central square has one grey, with black beside it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = shade(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)  # the format is in the file, not in its name


@pytest.fixture
def birds(tmp_path):
    """Eleven birds: every group in training, fewer in validation and testing."""
    folder = tmp_path / "data" / WATERBIRDS
    rows = [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
        (1, 1, 0),
        (0, 0, 0),
        (1, 0, 1),
        (0, 1, 1),
        (0, 0, 2),
        (1, 0, 2),
    ]
    rows.insert(2, (1, 1, 2))  # the splits are not in blocks
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for index, (label, place, split) in enumerate(rows):
            name = f"{index % 3:03}.Some_bird/bird_{index}.jpg"
            draw(folder / name, index)
            table.writerow([index + 1, name, label, split, place, "/o/ocean/1.jpg"])
    return folder, rows


@pytest.fixture
def faces(tmp_path):
    """Nine faces with four attributes, in the form of their authors and in that of Kaggle."""
    folder = tmp_path / "data" / "celeba"
    names = [f"{index + 1:06}.jpg" for index in range(9)]
    titles = ["Bald", "Blond_Hair", "Male", "Young"]
    values = np.random.default_rng(0).choice([-1, 1], (9, 4))
    partition = [0, 0, 0, 0, 0, 1, 1, 2, 2]
    for index, name in enumerate(names):
        draw(folder / "img_align_celeba" / name, index, 10, 14)
    lines = ["9", " ".join(titles) + " "]
    lines += [f"{name} " + " ".join(f"{value:2}" for value in row) for name, row in zip(names, values, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    pairs = list(zip(names, partition, strict=True))
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in pairs))

    kaggle = tmp_path / "kaggle" / "celebA" / "data"
    shutil.copytree(folder / "img_align_celeba", kaggle / "img_align_celeba" / "img_align_celeba")
    rows = [",".join([name, *map(str, row)]) for name, row in zip(names, values.tolist(), strict=True)]
    (kaggle / "list_attr_celeba.csv").write_text("\n".join([",".join(["image_id", *titles]), *rows]))
    (kaggle / "list_eval_partition.csv").write_text(
        "\n".join(["image_id,partition", *(f"{name},{part}" for name, part in pairs)])
    )
    return folder, kaggle, values, partition


def shades(split):
    """The grey that each image of a split has everywhere."""
    pixels = (split.images + 1) * 127.5
    assert (pixels.amax((1, 2, 3)) - pixels.amin((1, 2, 3))).abs().max() < 1e-3
    return pixels[:, 0, 0, 0].round().long().tolist()


def test_waterbirds_are_read_with_their_splits_labels_and_places(birds, device):
    folder, rows = birds
    data = waterbirds(folder.parent, size=8, device=device)
    for number, name in enumerate(SPLITS):
        split, wanted = getattr(data, name), [(index, row) for index, row in enumerate(rows) if row[2] == number]
        assert split.images.shape == (len(wanted), 3, 8, 8)
        assert split.images.device.type == split.labels.device.type == split.attributes.device.type == device.type
        assert shades(split) == [shade(index) for index, _ in wanted]
        assert split.labels.tolist() == [row[0] for _, row in wanted]
        assert split.attributes.tolist() == [row[1] for _, row in wanted]
    assert data.group_names == ("land bird, land", "land bird, water", "water bird, land", "water bird, water")
    assert data.table().train.tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize("place", [f"waterbirds/{WATERBIRDS}", f"cub/data/{WATERBIRDS}", "waterbirds", "."])
def test_waterbirds_are_found_in_every_usual_place(birds, tmp_path, place):
    target = tmp_path / "elsewhere" / place
    shutil.copytree(birds[0], target)
    found, expected = waterbirds(tmp_path / "elsewhere", size=4), waterbirds(birds[0].parent, size=4)
    assert torch.equal(found.train.images, expected.train.images)


def test_by_default_the_folder_is_that_of_the_data_sets(birds, monkeypatch):
    monkeypatch.setenv("MEMLOC_DATA", str(birds[0].parent))
    assert len(waterbirds(size=4).train) == 6


def test_celeba_is_read_alike_from_its_authors_files_and_from_kaggles(faces):
    folder, kaggle, values, partition = faces
    authors, other = celeba(folder.parent, size=6), celeba(kaggle.parent.parent, size=6)
    for number, name in enumerate(SPLITS):
        chosen = [index for index, part in enumerate(partition) if part == number]
        for split in (getattr(authors, name), getattr(other, name)):
            assert shades(split) == [shade(index) for index in chosen]
            assert split.labels.tolist() == [int(values[index, 1] > 0) for index in chosen]
            assert split.attributes.tolist() == [int(values[index, 2] > 0) for index in chosen]
    assert authors.classes == ("no blond hair", "blond hair")
    assert authors.attribute_names == ("no male", "male")


def test_any_two_attributes_of_celeba_can_be_label_and_attribute(faces):
    folder, _, values, _ = faces
    data = celeba(folder, label="Young", attribute="Bald", size=2)
    assert data.train.labels.tolist() == [int(value > 0) for value in values[:5, 3]]
    assert data.train.attributes.tolist() == [int(value > 0) for value in values[:5, 0]]
    assert data.group_names[1] == "no young, bald"


def test_the_rows_of_celebas_tables_belong_together_by_name(faces):
    folder, *_ = faces
    path = folder / "list_eval_partition.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert shades(celeba(folder, size=2).test) == [shade(7), shade(8)]


def test_images_are_scaled_like_all_others_and_made_smaller_by_averaging(tmp_path, birds):
    folder, _ = birds
    checkered = np.zeros((16, 16, 3), np.uint8)
    checkered[::2, ::2] = checkered[1::2, 1::2] = 255
    Image.fromarray(checkered).save(folder / "000.Some_bird" / "x.png")
    (folder / "000.Some_bird" / "x.png").replace(folder / "000.Some_bird" / "bird_0.jpg")
    image = waterbirds(folder, size=4).train.images[0]
    assert image.abs().max() < 0.1  # the mean of black and white; picking pixels would give -1 or 1
    same = waterbirds(folder, size=16).train.images[0]
    assert torch.equal(same[0], torch.from_numpy(checkered[..., 0] / 127.5 - 1).float())


def test_grey_images_get_three_channels(birds):
    folder, _ = birds
    path = folder / "000.Some_bird" / "bird_0.jpg"
    Image.new("L", (5, 5), 99).save(path)
    image = waterbirds(folder, size=5).train.images[0]
    assert image.shape == (3, 5, 5)
    assert torch.equal(image[0], image[2])


def test_encoding_keeps_features_instead_of_images(birds, monkeypatch):
    monkeypatch.setattr("memloc.group_folders._BATCH", 4)
    sizes = []

    def encode(images):
        assert not torch.is_grad_enabled()
        sizes.append(len(images))
        return images.flatten(1)[:, :2].double()

    plain, encoded = waterbirds(birds[0], size=4), waterbirds(birds[0], size=4, encode=encode)
    assert sizes == [4, 2, 3, 2]
    assert encoded.train.images.dtype == torch.float32
    for name in SPLITS:
        assert torch.equal(getattr(encoded, name).images, getattr(plain, name).images.flatten(1)[:, :2])


def test_an_encoding_of_another_length_is_refused(birds):
    with pytest.raises(ValueError, match=r"encode must give one row per image, 6, got \(1, 4\)"):
        waterbirds(birds[0], size=2, encode=lambda images: images.new_zeros(1, 4))


def test_examples_takes_the_first_of_each_split(birds):
    few, everything = waterbirds(birds[0], size=4, examples=1), waterbirds(birds[0], size=4, examples=100)
    for name in SPLITS:
        assert torch.equal(getattr(few, name).images, getattr(everything, name).images[:1])
    assert groups.group_counts(few.train.groups, 4).sum() == 1


def refusal(error, message, function, *arguments, **options):
    with pytest.raises(error, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_missing_data_are_named_with_their_address_place_and_terms(tmp_path):
    message = rf"{WATERBIRDS}/metadata.csv is missing: download https://nlp.stanford.edu.*non-commercial.*{tmp_path}"
    refusal(FileNotFoundError, message, waterbirds, tmp_path)
    message = rf"celeba/list_attr_celeba.txt is missing: download .*CelebA.html \(for non-commercial.*{tmp_path}"
    refusal(FileNotFoundError, message, celeba, tmp_path)


def test_a_missing_partition_is_named(faces):
    folder, kaggle, *_ = faces
    for path in (folder / "list_eval_partition.txt", kaggle / "list_eval_partition.csv"):
        path.unlink()
        refusal(FileNotFoundError, rf"{path} is missing: download", celeba, path.parent, size=2)


def test_a_missing_image_is_named(birds):
    path = birds[0] / "000.Some_bird" / "bird_0.jpg"
    path.unlink()
    refusal(FileNotFoundError, f"{path} is missing though its table names it", waterbirds, birds[0], size=2)


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_what_is_no_image_is_named(birds, content):
    path = birds[0] / "000.Some_bird" / "bird_0.jpg"
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    refusal(ValueError, f"{path} must be an image", waterbirds, birds[0], size=2)


@pytest.mark.parametrize("content", [b"", b'"a\n\xff\xfe"', b"a,b\n1,2,3,4\n1\n5,6,7,8,9\n"])
def test_what_is_no_table_is_named(birds, content):
    path = birds[0] / "metadata.csv"
    path.write_bytes(content)
    refusal(ValueError, f"{path} must be a table", waterbirds, birds[0], size=2)


def test_absent_columns_are_named(birds, faces):
    path = birds[0] / "metadata.csv"
    path.write_text(path.read_text().replace("place,", "where,"))
    message = rf"{path} must have the columns img_filename, y, place, split, lacks place, has img_id, img_filename"
    refusal(ValueError, message, waterbirds, birds[0], size=2)
    message = r"must have the columns Blond, Male, lacks Blond, has Bald, Blond_Hair, Male, Young"
    refusal(ValueError, message, celeba, faces[0], label="Blond", size=2)


def test_values_out_of_range_are_named(birds, faces):
    folder, _ = birds
    text = (folder / "metadata.csv").read_text()
    for old, new, name in (
        (",1,0,0,", ",2,0,0,", "label"),
        (",1,0,0,", ",1,0,7,", "attribute"),
        (",1,0,0,", ",1,5,0,", "split"),
    ):
        (folder / "metadata.csv").write_text(text.replace(old, new, 1))
        refusal(ValueError, f"must give every image a {name} from 0 to", waterbirds, folder, size=2)
    path = faces[0] / "list_eval_partition.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    refusal(ValueError, f"{path} must give every image a split from 0 to 2", celeba, faces[0], size=2)


def test_a_split_without_images_is_named(birds):
    path = birds[0] / "metadata.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *(row for row in rows if row.split(",")[3] != "1")]))
    refusal(ValueError, r"must have validation images \(split 1\), got none", waterbirds, birds[0], size=2)


@pytest.mark.parametrize("changes", [{"size": 0}, {"examples": 0}, {"examples": -1}])
def test_sizes_below_one_are_refused(birds, changes):
    refusal(ValueError, "size and examples must be at least 1, got", waterbirds, birds[0], **{"size": 2} | changes)
