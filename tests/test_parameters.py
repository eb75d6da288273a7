import dataclasses
import typing

import pytest

from memloc import (
    datasets,
    evaluation,
    fairdropout,
    labelnoise,
    models,
    parameters,
    recipes,
    rewinding,
    spurious_images,
)
from memloc.parameters import PARAMETERS, ParameterError

KNOWN = {"epochs": 20, "dataset": "digits", "noise_rate": 0.1, "examples": None, "augment": False}


def refusal(**values: object) -> str:
    with pytest.raises(ParameterError) as refused:
        parameters.check("rewinding", KNOWN, values)
    return str(refused.value)


def test_values_that_are_not_given_are_the_chapters_own():
    assert parameters.check("rewinding", KNOWN, {}) == KNOWN


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("epochs", "3", 3),
        ("noise_rate", "0.25", 0.25),
        ("noise_rate", "1", 1.0),
        ("noise_rate", 0, 0.0),
        ("noise_rate", "1e-1", 0.1),
        ("examples", "none", None),
        ("examples", None, None),
        ("augment", "True", True),
        ("augment", False, False),
        ("dataset", "cifar10", "cifar10"),
    ],
)
def test_words_and_typed_values_become_the_parameters_type(name, word, value):
    checked = parameters.check("rewinding", KNOWN, {name: word})[name]
    assert checked == value
    assert type(checked) is type(value)


def test_an_unknown_name_is_refused_with_the_nearest():
    assert refusal(epocs=3) == (
        "unknown parameter 'epocs' of chapter 'rewinding': did you mean 'epochs'? (memloc list shows all)"
    )


def test_an_unknown_name_like_no_other_is_refused_without_a_guess():
    assert refusal(zzz=3) == "unknown parameter 'zzz' of chapter 'rewinding' (memloc list shows all)"


def test_an_unknown_choice_is_refused_with_the_nearest():
    message = refusal(dataset="cifar11")
    assert message.startswith("dataset 'cifar11' is not one of digits, mnist, ")
    assert message.endswith("; did you mean 'cifar10'?")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "many", "epochs must be an int, got 'many'"),
        ("epochs", "3.5", "epochs must be an int, got '3.5'"),
        ("epochs", 3.0, "epochs must be an int, got 3.0"),
        ("epochs", True, "epochs must be an int, got True"),
        ("epochs", None, "epochs must be an int, got None"),
        ("epochs", "none", "epochs must be an int, got 'none'"),
        ("epochs", [3], "epochs must be an int, got [3]"),
        ("epochs", "-1", "epochs must be at least 1, got -1"),
        ("examples", "x", "examples must be an int or none, got 'x'"),
        ("noise_rate", "1.5", "noise_rate must be between 0 and 1, got 1.5"),
        ("noise_rate", "nan", "noise_rate must be a finite float, got 'nan'"),
        ("noise_rate", "x", "noise_rate must be a finite float, got 'x'"),
        ("noise_rate", True, "noise_rate must be a finite float, got True"),
        ("augment", "yes", "augment must be true or false, got 'yes'"),
        ("augment", 1, "augment must be true or false, got 1"),
        ("dataset", 3, "dataset must be a word, got 3"),
    ],
)
def test_a_wrong_type_or_range_is_refused_in_one_line(name, value, message):
    assert refusal(**{name: value}) == message


@pytest.mark.parametrize("value", [None, "", "0.1", "0.1,0.30, 1"])
def test_several_numbers_are_one_text(value):
    assert PARAMETERS["grid_p_gen"].parse(value) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grid_p_gen", "0.1,abc", "grid_p_gen must be a finite float, got 'abc'"),
        ("grid_p_mem", "0.1,none", "grid_p_mem must be a finite float, got 'none'"),
        ("grid_noise_rates", "2", "grid_noise_rates must be between 0 and 1, got 2.0"),
        ("grid_p_gen", "0.1,0.10", "grid_p_gen must be different values, got '0.1,0.10'"),
        ("widths", "", "widths must be at least one value, got ''"),
        ("widths", "4,0", "widths must be at least 1, got 0"),
        ("widths", "4,8.5", "widths must be an int, got '8.5'"),
        ("grid_p_gen", 0.1, "grid_p_gen must be a word or none, got 0.1"),
        ("baselines", "fixed,foo", "baselines 'foo' is not one of standard, fixed, smaller"),
        ("baselines", "fxed", "baselines 'fxed' is not one of standard, fixed, smaller; did you mean 'fixed'?"),
    ],
)
def test_one_wrong_value_of_several_is_refused_in_one_line(name, value, message):
    with pytest.raises(ParameterError) as refused:
        PARAMETERS[name].parse(value)
    assert str(refused.value) == message


def test_defaults_are_read_in_order_without_running_the_cell():
    cell = (
        '# how long\nepochs: int = 20  # passes\nnoise: str = "flip"  # kind – of noise\n\nsize: int = None  # pixels'
    )
    assert list(parameters.defaults(cell, "training").items()) == [("epochs", 20), ("noise", "flip"), ("size", None)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("epochs = 20  # passes", "expected 'name: type = literal  # comment'"),
        ("import torch", "expected 'name: type = literal  # comment'"),
        ("epocs: int = 20  # passes", "'epocs' is not in memloc.parameters.PARAMETERS; did you mean 'epochs'?"),
        ("epochs: float = 20.0  # passes", "epochs must be annotated int"),
        ("size: int | None = None  # pixels", "size must be annotated int"),
        ("epochs: int = 20", "epochs needs a trailing comment"),
        ("epochs: int = 20  # as in n = 20", "epochs needs a trailing comment without '='"),
        ("epochs: int = 4 * 5  # passes", "epochs must have a literal default"),
        ("epochs: int = -1  # passes", "epochs must be at least 1"),
        ("epochs: int", "epochs needs a trailing comment"),
        ("epochs: int  # passes", "epochs must be an int, got None"),
        ("epochs: int = (", "is not Python"),
    ],
)
def test_a_parameters_cell_of_anything_but_typed_literals_is_refused(line, complaint):
    with pytest.raises(ParameterError, match="the parameters cell of chapter 'training'") as refused:
        parameters.defaults(line, "training")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("dataset", datasets.NAMES),
        ("noise", labelnoise.KINDS),
        ("dropout", fairdropout.KINDS),
        ("model", models.NAMES),
        ("other_model", models.NAMES),
        ("schedule", recipes.SCHEDULES),
        ("precision", evaluation.PRECISIONS),
        ("batch_norm", rewinding.BATCH_NORM),
        ("photographs", spurious_images.PHOTOGRAPHS),
        ("attribute", ("none", *spurious_images.ATTRIBUTES)),
        ("loss", recipes.LOSSES),
    ],
)
def test_the_choices_are_those_of_the_package(name, choices):
    assert PARAMETERS[name].choices == tuple(choices)


def test_every_field_of_a_recipe_is_a_parameter_of_the_same_type():
    types = typing.get_type_hints(recipes.Recipe)
    for field in dataclasses.fields(recipes.Recipe):
        parameter = PARAMETERS[field.name]
        assert types[field.name] == (parameter.type | None if parameter.optional else parameter.type)
