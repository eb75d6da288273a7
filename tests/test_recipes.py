import math
from dataclasses import asdict, fields

import pytest

from memloc import recipes, runs
from memloc.recipes import VERSION, Recipe, Settings


def test_the_schedules_rise_and_fall_as_the_reference_code_has_them():
    cosine = [recipes.learning_rate(Settings(learning_rate=1), t) for t in (0, 0.05, 0.1, 0.325, 0.55, 1)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.8535534, 0.5, 0])
    triangle = Settings(learning_rate=1, schedule="triangle", epochs=25)
    assert [recipes.learning_rate(triangle, epoch / 25) for epoch in (0, 5, 10, 17.5, 25)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    short = Settings(learning_rate=1, schedule="triangle", epochs=5)
    assert recipes.learning_rate(short, 0.4) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "epochs must be an integer ≥ 0, got -1"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number ≥ 0, got nan"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"schedule": "linear"}, "schedule must be one of cosine, triangle, got 'linear'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"dataset": "cifar11"}, "dataset must be one of digits, .*, got 'cifar11'"),
        ({"noise": "salt"}, "noise must be one of flip, .*, got 'salt'"),
        ({"noise_rate": 1.5}, "noise_rate must be a fraction from 0 to 1, got 1.5"),
        ({"model": "vgg"}, "model must be one of small_cnn, .*, got 'vgg'"),
        ({"dropout": "spatial"}, "dropout must be one of none, .*, got 'spatial'"),
        ({"dropout_places": None}, "dropout_places must be a text such as 'all', got None"),
        ({"p_gen": 20}, "p_gen must be a fraction from 0 to 1, got 20"),
        ({"width": 0}, "width must be an integer ≥ 1, got 0"),
        ({"examples": True}, "examples must be an integer ≥ 1, got True"),
        ({"seed": -1}, "seed must be an integer ≥ 0, got -1"),
        ({"seed": 1.0}, "seed must be an integer ≥ 0, got 1.0"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a finite number ≥ 0, got '1e-3'"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number ≥ 0, got inf"),
        ({"noise_rate": True}, "noise_rate must be a fraction from 0 to 1, got True"),
        ({"augment": "no"}, "augment must be True or False, got 'no'"),
        ({"channels_last": 1}, "channels_last must be True or False, got 1"),
        ({"compile": None}, "compile must be True or False, got None"),
        ({"attribute": "color"}, "attribute must be one of none, colour, samples, cifar10, got 'color'"),
        ({"correlation": 95}, "correlation must be a fraction from 0 to 1, got 95"),
        ({"opacity": -0.5}, "opacity must be a fraction from 0 to 1, got -0.5"),
        ({"attribute": "colour"}, "noise_rate must be 0 and noise 'flip' for coloured digits, .*, got 0.1 and 'flip'"),
        ({"loss": "MAT"}, "loss must be one of cross_entropy, xrm, mat, got 'MAT'"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": -1}, "temperature must be a finite number above 0, got -1"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"label_smoothing": 10}, "label_smoothing must be a fraction from 0 to 1, got 10"),
        (
            {"loss": "mat", "label_smoothing": 0.1},
            "label_smoothing must be 0 for any loss but 'cross_entropy', got 0.1 with 'mat'",
        ),
        (
            {"attribute": "colour", "noise_rate": 0, "noise": "human-worse"},
            "noise_rate must be 0 and noise 'flip' for coloured digits, .*, got 0.0 and 'human-worse'",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_what_decides_a_training_decides_its_address():
    data = {"dataset": "mnist", "size": 16, "examples": 5, "noise": "permute", "noise_rate": 0.2}
    network = {"model": "mlp", "width": 3}
    optimizer = {"learning_rate": 0.5, "schedule": "triangle", "momentum": 0.5, "weight_decay": 0.0}
    loop = {"epochs": 1, "batch_size": 1, "augment": True, "seed": 7}
    numerics = {"precision": "bf16", "channels_last": True, "compile": True, "processes": 2}
    dropout = {"dropout": "tied", "dropout_places": "after0", "p_gen": 0.5, "p_mem": 0.5, "dropout_rate": 0.1}
    spurious = {"attribute": "samples", "correlation": 0.8, "opacity": 0.5}
    loss = {"loss": "mat", "temperature": 0.01, "label_smoothing": 0.1}
    other = data | network | optimizer | loop | numerics | dropout | spurious | loss
    assert set(other) == {field.name for field in fields(Recipe)}
    addresses = {Recipe(**{name: value}).address for name, value in other.items()} | {Recipe().address}
    assert len(addresses) == len(other) + 1


def test_a_number_has_one_address_however_it_is_written():
    assert Recipe(noise_rate=1, learning_rate=1).address == Recipe(noise_rate=1.0, learning_rate=1.0).address


def test_the_defaults_are_part_of_what_every_address_means():
    # An address leaves out what has its default value: a change here changes what old runs mean, so raise VERSION.
    assert VERSION == 1
    assert asdict(Recipe()) == {
        "dataset": "digits", "size": None, "examples": None, "noise": "flip", "noise_rate": 0.1, "model": "small_cnn",
        "width": None, "epochs": 50, "batch_size": 512, "learning_rate": 0.01, "schedule": "cosine", "momentum": 0.9,
        "weight_decay": 5e-4, "augment": False, "precision": "fp32", "channels_last": False, "compile": False,
        "seed": 0, "dropout": "none", "dropout_places": "all", "p_gen": 0.2, "p_mem": 0.1, "dropout_rate": 0.5,
        "attribute": "none", "correlation": 0.95, "opacity": 1.0,
        "loss": "cross_entropy", "temperature": 0.1, "label_smoothing": 0.0, "processes": 1,
    }  # fmt: skip


def test_fields_with_their_default_leave_the_address_alone():
    assert Recipe(seed=1, epochs=50).address == runs.address({"seed": 1}, VERSION)


def test_addresses_of_old_recipes_are_what_they_were():
    # Runs on disk and recorded results are found by them.
    assert Recipe().address == "7674a781fc38e94c"
    assert Recipe(dataset="cifar10", model="resnet9", noise_rate=0.25, seed=4).address == "8b2fc401293fbc45"


def test_the_version_of_the_loop_is_part_of_the_address(monkeypatch):
    before = Recipe().address
    monkeypatch.setattr(recipes, "VERSION", recipes.VERSION + 1)
    assert Recipe().address != before
