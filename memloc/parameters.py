"""The parameters of all chapters: one table, one meaning per name, and the check of what is asked for."""

import ast
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

Value = bool | int | float | str | None
_Type = type  # which a field of that name hides


class ParameterError(ValueError):
    """A parameter that no chapter can run with; the message is one line that says what to write instead."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, with the same meaning in every chapter that has it.

    Attributes:
        name: Its name in the chapters' parameters cells and on the command line.
        type: ``bool``, ``int``, ``float`` or ``str``.
        meaning: What it decides, with its unit.
        choices: The values allowed, if they can be counted.
        minimum: The smallest value allowed.
        maximum: The largest value allowed.
        optional: Whether ``None`` is allowed; ``meaning`` says what it stands for.
        each: Of which type each of several values is, which are one ``str`` with commas between them; None for one
            value. Choices, minimum and maximum are then those of each.
    """

    name: str
    type: type
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False
    each: _Type | None = None

    def parse(self, value: object) -> Value:
        """Turn a word from the command line, or a value from YAML or Python, into a value of this parameter.

        Args:
            value: A string such as ``"20"``, or a value that has the type already.

        Returns:
            The value, in the parameter's type.

        Raises:
            ParameterError: If it has another type, is out of range or is not one of the choices.

        Example:
            >>> PARAMETERS["epochs"].parse("20")
            20
            >>> PARAMETERS["epochs"].parse("many")
            Traceback (most recent call last):
            memloc.parameters.ParameterError: epochs must be an int, got 'many'
        """
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and self.optional):
            if self.optional:
                return None
            raise ParameterError(f"{self.name} must be {_A[self.type]}, got None")
        typed = _READERS[self.type](value)
        if typed is None:
            raise ParameterError(f"{self.name} must be {_A[self.type]}{' or none' * self.optional}, got {value!r}")
        if self.each is None:
            self._check_range(typed)
        else:
            one = replace(self, type=self.each, each=None, optional=False)
            values = [one.parse(word) for word in str(typed).split(",") if word]
            if not values and not self.optional:
                raise ParameterError(f"{self.name} must be at least one value, got {value!r}")
            if len(set(values)) < len(values):
                raise ParameterError(f"{self.name} must be different values, got {value!r}")
        return typed

    def _check_range(self, value: bool | int | float | str) -> None:
        if self.choices and value not in self.choices:
            raise ParameterError(
                f"{self.name} {value!r} is not one of {', '.join(self.choices)}{did_you_mean(str(value), self.choices)}"
            )
        if isinstance(value, str):
            return
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            expected = f"at least {low:g}" if high is None else f"between {low or 0:g} and {high:g}"
            raise ParameterError(f"{self.name} must be {expected}, got {value!r}")


def _read_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def _read_int(value: object) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _read_str(value: object) -> str | None:
    return value if isinstance(value, str) else None


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
_A = {bool: "true or false", int: "an int", float: "a finite float", str: "a word"}

# The choices repeat the names that datasets, labelnoise, models and training know, so that a chapter can be
# listed and checked without importing torch; a test compares them.
_MODELS = ("small_cnn", "mlp", "resnet9", "resnet18", "resnet50", "vit_small", "vgg16")
PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "dataset",
            str,
            "the images",
            ("digits", "mnist", "fashionmnist", "kmnist", "cifar10", "cifar100", "svhn"),
        ),
        Parameter(
            "size",
            int,
            "height and width in pixels; none: as they are",
            minimum=4,
            maximum=512,
            optional=True,
        ),
        Parameter("examples", int, "training examples, from the first; none: all", minimum=1, optional=True),
        Parameter("image_examples", int, "training images beside other data; none: all", minimum=1, optional=True),
        Parameter("left_out", int, "minority examples, and as many others, to train a last layer without", minimum=1),
        Parameter("retrained", int, "minority examples to train a whole network without", minimum=1),
        Parameter(
            "noise",
            str,
            "how labels are made wrong",
            (
                "flip",
                "parity",
                "permute",
                "confuse",
                "human-aggregate",
                "human-random1",
                "human-random2",
                "human-random3",
                "human-worse",
            ),
        ),
        Parameter("noise_rate", float, "share of the labels that are made wrong", minimum=0, maximum=1),
        Parameter("input_noise", float, "standard deviation of each noise coordinate of the inputs", minimum=0),
        Parameter("other_input_noise", float, "another standard deviation to compare with", minimum=0),
        Parameter("label_noise", float, "standard deviation of the noise on the targets", minimum=0),
        Parameter("drawn_examples", int, "training examples to draw, of generated data", minimum=1),
        Parameter("dimensions", int, "noise coordinates of the inputs", minimum=1),
        Parameter("gamma", float, "factor of the spurious feature", minimum=0),
        Parameter("attribute", str, "what goes along with the label", ("none", "colour", "samples", "cifar10")),
        Parameter("correlation", float, "share of the examples whose attribute is the label", minimum=0, maximum=1),
        Parameter("model", str, "the network", _MODELS),
        Parameter("width", int, "scale of the network; none: its own", minimum=1, optional=True),
        Parameter("units", int, "units of each hidden layer", minimum=1),
        Parameter("other_model", str, "the network to compare with", _MODELS),
        Parameter("other_width", int, "scale of the other network; none: its own", minimum=1, optional=True),
        Parameter(
            "other_size",
            int,
            "height and width in pixels for the other network; none: as they are",
            minimum=4,
            maximum=512,
            optional=True,
        ),
        Parameter("other_learning_rate", float, "peak learning rate of the other network", minimum=0),
        Parameter("noiseless_learning_rate", float, "learning rate where inputs have no noise", minimum=0),
        Parameter("widths", str, "widths to compare, commas between them", minimum=1, each=int),
        Parameter("layer", str, "the module whose output is measured, by its name in the network"),
        Parameter(
            "dropout", str, "dropout in the network", ("none", "tied", "tied-parity", "standard", "fixed", "fair")
        ),
        Parameter("dropout_places", str, "where it is: names with commas between them; all: everywhere", each=str),
        Parameter("p_gen", float, "share of generalization channels", minimum=0, maximum=1),
        Parameter("p_mem", float, "probability of a memorization channel", minimum=0, maximum=1),
        Parameter("dropout_rate", float, "share that standard or fixed dropout switches off", minimum=0, maximum=1),
        Parameter(
            "baselines",
            str,
            "other dropouts to compare with, commas between them; none: none",
            ("standard", "fixed", "smaller"),
            optional=True,
            each=str,
        ),
        *(
            Parameter(name, str, meaning, minimum=0, maximum=1, optional=True, each=float)
            for name, meaning in (
                ("grid_p_gen", "values of p_gen of a grid, commas between them; none: no grid"),
                ("grid_p_mem", "values of p_mem of a grid, commas between them; none: no grid"),
                ("grid_noise_rates", "noise rates to compare, commas between them; none: none"),
            )
        ),
        Parameter("grid_seeds", int, "how many seeds in a grid", minimum=1),
        Parameter("grid_epochs", int, "passes over the training set in a grid", minimum=1),
        Parameter("epochs", int, "passes over the training set", minimum=1),
        Parameter("selected_epochs", int, "evenly spaced epochs to choose from", minimum=1),
        Parameter("validated", int, "validation examples to choose by; none: all", minimum=1, optional=True),
        Parameter("steps", int, "steps of gradient descent, at most", minimum=1),
        Parameter("network_steps", int, "steps of Adam for a network on images", minimum=1),
        Parameter("network_learning_rate", float, "learning rate of these", minimum=0),
        Parameter("head_learning_rate", float, "learning rate of a last layer on features of mean square 1", minimum=0),
        Parameter("tolerance", float, "mean squared error below which a training stops", minimum=0),
        Parameter("loss", str, "what is minimized", ("cross_entropy", "xrm", "mat")),
        Parameter("label_smoothing", float, "share of each label spread over all classes", minimum=0, maximum=1),
        Parameter("temperature", float, "of held-out predictions in memorization-aware training", minimum=0),
        Parameter("trials", int, "learning rates to choose from", minimum=1),
        Parameter("upweight", float, "how much more the mistakes of a first training count in JTT", minimum=0),
        Parameter(
            "photographs",
            str,
            "where backgrounds are from; none: no photographs",
            ("samples", "cifar10"),
            optional=True,
        ),
        Parameter("opacity", float, "of digits on photographs", minimum=0, maximum=1),
        Parameter("batch_size", int, "examples per step", minimum=1),
        Parameter("learning_rate", float, "peak learning rate", minimum=0),
        Parameter("schedule", str, "course of the learning rate", ("cosine", "triangle")),
        Parameter("momentum", float, "momentum of SGD", minimum=0, maximum=1),
        Parameter("weight_decay", float, "weight decay of SGD", minimum=0),
        Parameter("augment", bool, "random crops and flips in training"),
        Parameter("precision", str, "number format in training", ("fp32", "bf16", "fp16")),
        Parameter("channels_last", bool, "memory layout that is faster for convolutions"),
        Parameter("compile", bool, "compile the model before training"),
        Parameter("batch_norm", str, "batch-norm buffers of rewound layers", ("keep", "rewind", "recalibrate")),
        Parameter("rewound_epochs", int, "evenly spaced epochs to rewind to, besides the best one", minimum=0),
        Parameter("calibration", int, "training images to compute batch-norm statistics from", minimum=1),
        Parameter("retrain_epochs", int, "epochs of retraining at most", minimum=1),
        Parameter("retrain_learning_rate", float, "peak learning rate of retraining", minimum=0),
        Parameter(
            "per_kind", int, "examples of each kind to compute gradients of; none: all", minimum=1, optional=True
        ),
        Parameter("points", int, "examples of each class in a manifold", minimum=2),
        Parameter("draws", int, "Gaussian vectors for each manifold", minimum=2),
        Parameter("targets", int, "examples to flip, of either kind, clean and noisy", minimum=1),
        Parameter(
            "evaluated",
            int,
            "training and test examples to measure an edited network on; none: all",
            minimum=1,
            optional=True,
        ),
        Parameter("gpu_counts", str, "numbers of GPUs to estimate for, commas between them", minimum=1, each=int),
        Parameter("gpu_speedup", float, "CPU cores that one GPU is taken to replace", minimum=1),
        Parameter("seed", int, "the first random seed", minimum=0),
        Parameter("seeds", int, "how many seeds, from the first", minimum=1),
        Parameter("processes", int, "processes that train one network together, under torchrun", minimum=1),
        Parameter("device", str, "where to compute; auto: cuda, else cpu", ("auto", "cpu", "cuda")),
    )
}


def as_word(value: object) -> str:
    """Write a value as it can be given on the command line.

    Args:
        value: Of a parameter.

    Example:
        >>> as_word(None), as_word(True), as_word(0.1)
        ('none', 'true', '0.1')
    """
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def did_you_mean(word: str, words: Iterable[str], before: str = "; ") -> str:
    """Suggest the word that was probably meant.

    Args:
        word: What was written.
        words: What can be written.
        before: What joins the suggestion to the message.

    Returns:
        The end of a sentence with the nearest word, or nothing when none is near.

    Example:
        >>> did_you_mean("epocs", ["epochs", "seed"], before=": ")
        ": did you mean 'epochs'?"
    """
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"{before}did you mean {near[0]!r}?" if near else ""


def defaults(code: str, chapter: str) -> dict[str, Value]:
    """Read the names and defaults of a parameters cell without running it.

    Each line is a typed literal with a comment, ``epochs: int = 20  # passes over the training set``. The type
    is a plain name and the comment holds no ``=``, because papermill reads both with a regular expression; a
    parameter that may be ``None`` says ``size: int = None``.

    Args:
        code: The source of the cell.
        chapter: The chapter's name, for the messages.

    Returns:
        The default of each parameter, in the order of the cell.

    Raises:
        ParameterError: If a line is anything else, or its name, type or default is not as in ``PARAMETERS``.

    Example:
        >>> defaults("epochs: int = 20  # passes over the training set", "training")
        {'epochs': 20}
    """
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell of chapter {chapter!r} is not Python: {error.msg}") from error
    found: dict[str, Value] = {}
    for statement in statements:
        line = code.splitlines()[statement.lineno - 1]
        try:
            name, value = _default(statement, line)
        except ParameterError as error:
            raise ParameterError(f"the parameters cell of chapter {chapter!r}: {error}") from error
        found[name] = value
    return found


def _default(statement: ast.stmt, line: str) -> tuple[str, Value]:
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        raise ParameterError(f"expected 'name: type = literal  # comment', got {line.strip()!r}")
    name = statement.target.id
    if name not in PARAMETERS:
        raise ParameterError(f"{name!r} is not in memloc.parameters.PARAMETERS{did_you_mean(name, PARAMETERS)}")
    expected = PARAMETERS[name].type.__name__
    if ast.unparse(statement.annotation) != expected:
        raise ParameterError(f"{name} must be annotated {expected}, got {line.strip()!r}")
    comment = line.encode()[statement.end_col_offset :].decode().strip()
    if not comment.startswith("#") or "=" in comment:
        raise ParameterError(f"{name} needs a trailing comment without '=', got {line.strip()!r}")
    try:
        value = ast.literal_eval(statement.value) if statement.value else None
    except ValueError as error:
        raise ParameterError(f"{name} must have a literal default, got {line.strip()!r}") from error
    return name, PARAMETERS[name].parse(value)


def check(chapter: str, known: Mapping[str, Value], values: Mapping[str, object]) -> dict[str, Value]:
    """Check the values asked for and fill up with the chapter's own.

    Args:
        chapter: The chapter's name, for the messages.
        known: The chapter's parameters and their defaults.
        values: Words from the command line, or typed values from YAML or Python.

    Returns:
        Every parameter of the chapter, typed, in the chapter's order.

    Raises:
        ParameterError: If a name is not the chapter's, or a value not the parameter's.

    Example:
        >>> check("rewinding", {"epochs": 20, "seed": 0}, {"epochs": "3"})
        {'epochs': 3, 'seed': 0}
    """
    for name in values:
        if name not in known:
            raise ParameterError(
                f"unknown parameter {name!r} of chapter {chapter!r}{did_you_mean(str(name), known, ': ')}"
                " (memloc list shows all)"
            )
    return {**known, **{name: PARAMETERS[name].parse(value) for name, value in values.items()}}
