"""What a chapter measured: shown on its page, carried by its executed notebook, kept as JSON."""

import base64
import copy
import dataclasses
import hashlib
import io
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import memloc

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("holds", "partly", "does not hold", "not tested")

HIDDEN = "application/papermill.record/"  # myst-nb's: an output that is hidden until the text asks for it
_RECORD = "record"
_KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

Scalar = bool | int | float | str | None


class Training(Protocol):
    """A :class:`memloc.runs.Run` as :func:`record` sees it."""

    @property
    def recipe(self) -> Any:
        """The dataclass of all that decided the training."""

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was trained; ``device`` of it is read."""


def glue(key: str, value: object) -> None:
    """Give a value a name by which the text of the chapter shows it: ``{glue:text}`key```.

    The output is that of ``myst_nb.glue(key, value, display=False)``, without myst_nb; that of a figure is shown under
    its cell as well, for who runs the notebook (the book shows it once, where the text asks for it). A figure is
    drawn in the format ``matplotlib.rcParams["savefig.format"]`` (png or svg), the same bytes each time, and
    then closed. Outside a notebook kernel nothing is shown.

    Args:
        key: Lower-case letters, digits and single dashes, once per chapter.
        value: A string, a figure, a table, or anything that a notebook can display.

    Raises:
        ValueError: If the key has other characters.

    Example:
        >>> glue("Noisy accuracy", "0.95")
        Traceback (most recent call last):
        ValueError: key must be lower-case letters, digits and dashes, got 'Noisy accuracy'
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"key must be lower-case letters, digits and dashes, got {key!r}")
    is_figure = "matplotlib.figure" in sys.modules and isinstance(value, sys.modules["matplotlib.figure"].Figure)
    if _in_a_kernel():
        if is_figure:
            _publish(key, _drawn(value, key), {}, prefix="")
        else:
            from IPython.core.formatters import format_display_data

            _publish(key, *format_display_data(value))
    if is_figure:
        sys.modules["matplotlib.pyplot"].close(value)


def _in_a_kernel() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def _publish(key: str, bundle: dict[str, Any], metadata: dict[str, Any], prefix: str = HIDDEN) -> None:
    from IPython.display import display

    metadata["scrapbook"] = {"name": key, "mime_prefix": prefix}
    display({prefix + mime: content for mime, content in bundle.items()}, raw=True, metadata=metadata)


def _drawn(figure: Any, key: str) -> dict[str, str]:
    import matplotlib as mpl

    form = mpl.rcParams["savefig.format"]
    if form not in ("png", "svg"):
        raise ValueError(f'rcParams["savefig.format"] must be png or svg for a page, got {form!r}')
    file = io.BytesIO()
    # Neither a date nor random ids, so that the same figure is the same bytes.
    with mpl.rc_context({"svg.hashsalt": key}):
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, bbox_inches="tight", metadata=metadata)
    if form == "svg":
        return {"image/svg+xml": file.getvalue().decode(), "text/plain": repr(figure)}
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": repr(figure)}


def record(
    metrics: Mapping[str, object],
    tables: Mapping[str, "pd.DataFrame"] | None = None,
    runs: Sequence[Training] = (),
    device: object = "cpu",
) -> None:
    """Show a chapter's numbers on its page and hand them to whoever runs it.

    Every metric is glued as text under its name: floats with three decimals, truth as yes and no, strings as
    they are. All of it also lies in one hidden output, from which ``memloc run … --record`` writes the JSON
    file under ``book/results``. Call it once, in the chapter's last cell.

    Args:
        metrics: Numbers (also numpy's and torch's), words or ``None`` by name (letters, digits, dashes).
            ``verdict`` is one of ``VERDICTS``. A float that is not finite is kept as null.
        tables: Tables by name; their index is left out unless it is named.
        runs: The trainings that the numbers come from.
        device: Where the chapter computed what is in no run, as torch names it.

    Raises:
        ValueError: If a name or the verdict is not allowed.
        TypeError: If a metric is not a scalar.

    Example:
        >>> record({"noisy-accuracy": 0.9512, "verdict": "maybe"})
        Traceback (most recent call last):
        ValueError: verdict must be one of 'holds', 'partly', 'does not hold', 'not tested', got 'maybe'
    """
    plain = {key: _scalar(key, value) for key, value in metrics.items()}
    if plain.get("verdict", VERDICTS[0]) not in VERDICTS:
        raise ValueError(f"verdict must be one of {str(VERDICTS)[1:-1]}, got {plain['verdict']!r}")
    for key, value in plain.items():
        glue(key, text(value))
    payload = {
        "metrics": _finite(plain),
        "tables": {name: _table(table) for name, table in (tables or {}).items()},
        "recipes": _finite([dataclasses.asdict(run.recipe) for run in runs]),
        "device": _device([*(run.provenance["device"] for run in runs), device]),
    }
    if _in_a_kernel():
        _publish(_RECORD, {"application/json": json.dumps(payload, allow_nan=False)}, {})


def _scalar(key: str, value: Any) -> Scalar:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"metric {key!r} must be a number, a word or None, got {type(value).__name__}")


def text(value: Scalar) -> str:
    """Write a metric as the page shows it: three decimals, yes or no, a dash for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else str(value)


def _table(table: "pd.DataFrame") -> dict[str, Any]:
    flat = table.reset_index() if any(table.index.names) else table
    rows = [
        {str(column): _scalar(str(column), value) for column, value in row.items()} for row in flat.to_dict("records")
    ]
    return {"columns": [str(column) for column in flat.columns], "records": _finite(rows)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device(used: Sequence[object]) -> str:
    """Name the device that a chapter ran on, a GPU if it used one: the kind, and the GPU's model."""
    if not any(str(device).startswith("cuda") for device in used):
        return "cpu"
    torch = sys.modules.get("torch")
    return f"cuda ({torch.cuda.get_device_name()})" if torch and torch.cuda.is_available() else "cuda"


def recorded(notebook: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what :func:`record` emitted from an executed notebook.

    Args:
        notebook: The notebook as JSON.

    Returns:
        ``metrics``, ``tables``, ``recipes`` and ``device``, or ``None`` when the chapter records nothing.
    """
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == _RECORD:
                payload: dict[str, Any] = json.loads("".join(output["data"][HIDDEN + "application/json"]))
                return payload
    return None


def hide_glued(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """Hide the figures of an executed chapter under their cells, because its page shows them where the text asks.

    Args:
        notebook: The executed notebook as JSON.

    Returns:
        A copy in which every glued output is hidden as :func:`glue` hides numbers.
    """
    hidden = copy.deepcopy(dict(notebook))
    for cell in hidden["cells"]:
        for output in cell.get("outputs", []):
            glued = output.get("metadata", {}).get("scrapbook")
            if glued and not glued["mime_prefix"]:
                glued["mime_prefix"] = HIDDEN
                output["data"] = {HIDDEN + mime: content for mime, content in output["data"].items()}
    return hidden


@dataclass(frozen=True, eq=False)
class Result:
    """What one run of a chapter measured, as its JSON file keeps it.

    Attributes:
        preset: The preset's name.
        metrics: Numbers and words by name.
        tables: Tables by name.
        provenance: Everything else in the file: parameters, recipes, dataset, examples, n_seeds, seconds,
            device, versions, commit, module_sha256, date, command.
        is_stale: Whether the method's module has changed since.
    """

    preset: str
    metrics: dict[str, Scalar]
    tables: dict[str, "pd.DataFrame"]
    provenance: dict[str, Any]
    is_stale: bool


def read(folder: Path, module_sha256: str | None) -> list[Result]:
    """Read the recorded results of one chapter.

    Args:
        folder: ``book/results/<chapter>``; it need not be there.
        module_sha256: Hash of the method's module as it is now.

    Returns:
        One result per preset, by name.

    Raises:
        ValueError: If a file is not a result.
    """
    import pandas as pd

    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            metrics, tables = content.pop("metrics"), content.pop("tables")
            frames = {name: pd.DataFrame(table["records"], columns=table["columns"]) for name, table in tables.items()}
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a recorded result ({error!r}): record it again with memloc run") from error
        stale = content.get("module_sha256") != module_sha256
        found.append(Result(path.stem, metrics, frames, content, stale))
    return found


def code_folder(root: Path) -> Path:
    """Return the package that a kernel started in ``root`` imports."""
    own = root / "memloc"
    return own if own.is_dir() else Path(memloc.__file__).parent


def module_sha256(root: Path, chapter: str) -> str | None:
    """Hash the module that a chapter is named after, or return ``None`` when it has none."""
    module = code_folder(root) / f"{chapter}.py"
    return hashlib.sha256(module.read_bytes()).hexdigest() if module.is_file() else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a chapter's numbers."""
    packages = ("torch", "torchvision", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "memloc": memloc.__version__,
    }


def cpu() -> str:
    """Name this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def commit(root: Path) -> str:
    """Name the commit that a result comes from.

    Args:
        root: The folder with ``_toc.yml``.

    Returns:
        The hash of HEAD, with ``-dirty`` when tracked files other than recorded results differ from it.

    Raises:
        ValueError: If the folder is not a git checkout with a commit.
    """
    head = _git(root, "rev-parse", "HEAD").strip()
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!book/results")
    return f"{head}-dirty" if changed else head


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{root} is not a git checkout with a commit, so a result has no origin") from error
    return done.stdout


def keep(root: Path, executed: Path, preset: str, command: str) -> Path:
    """Write what an executed chapter recorded to ``book/results/<chapter>/<preset>.json``.

    Args:
        root: The folder with ``_toc.yml``, a git checkout.
        executed: The executed notebook.
        preset: The name of the preset it was executed with.
        command: What was typed.

    Returns:
        The file. It is written under another name and renamed.

    Raises:
        ValueError: If the chapter records nothing, or the folder is not a git checkout.
    """
    notebook = json.loads(executed.read_text())
    about, content = notebook["metadata"]["memloc"], recorded(notebook)
    chapter, values = about["chapter"], about["parameters"]
    if content is None:
        raise ValueError(f"chapter {chapter!r} records nothing: it never calls memloc.chapters.record")
    metrics = content["metrics"]
    result = {
        "chapter": chapter,
        "preset": preset,
        "parameters": values,
        "metrics": metrics,
        "tables": content["tables"],
        "recipes": content["recipes"],
        "dataset": values.get("dataset"),
        "examples": metrics.get("examples", values.get("examples")),
        "n_seeds": values.get("seeds", 1),
        "seconds": about["seconds"],
        "training_seconds": _training_seconds(content["recipes"]),
        "device": about["device"],
        "threads": about["threads"],
        "versions": about["versions"],
        "commit": commit(root),
        "module_sha256": module_sha256(root, chapter),
        "date": about["date"],
        "command": command,
    }
    return write_result(root, chapter, preset, result)


def write_result(root: Path, folder: str, name: str, content: Mapping[str, Any]) -> Path:
    """Write ``book/results/<folder>/<name>.json``, a line for each of its names, floats to six significant digits.

    Args:
        root: The folder with ``_toc.yml``.
        folder: The chapter, or ``sweeps``.
        name: The preset, or the grid.
        content: What to write.

    Returns:
        The file. It is written under another name and renamed.
    """
    path = root / "book" / "results" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{json.dumps(key)}: {json.dumps(_rounded(value), ensure_ascii=False)}" for key, value in content.items()]
    partial = path.with_suffix(".partial")
    partial.write_text("{" + ",\n ".join(rows) + "}\n")
    partial.replace(path)
    return path


def _training_seconds(recipes: Sequence[dict[str, Any]]) -> float:
    """Add up how long the trainings took that this machine keeps, whenever that was."""
    from memloc import runs
    from memloc.recipes import Recipe

    found = [runs.find(address, None) for address in {Recipe(**recipe).address for recipe in recipes}]
    return sum(run.provenance["seconds"] for run in found if run is not None)


def _rounded(value: Any) -> Any:
    """Round every float to six significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
