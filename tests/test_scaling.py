"""The grids of the papers, and the recipe for Kubernetes as far as it can be checked without a cluster."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from memloc import chapters, cli, datasets, grids, models, pages
from memloc.recipes import Settings
from memloc.training import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "scaling.md").read_text()
SPECS = sorted((ROOT / "book" / "presets" / "sweeps").glob("*.yaml"))


def test_each_paper_has_a_grid_at_its_size_and_one_for_cpus() -> None:
    papers = ("maini2023", "mat2024", "stephenson2021")
    assert [path.stem for path in SPECS] == [f"{paper}{size}" for paper in papers for size in ("-cpu", "")]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_cell_of_a_paper_s_grid_is_checked_and_says_what_it_may_use(path: Path) -> None:
    cells = grids.read_spec(path, ROOT)
    assert len({cell.address for cell in cells}) == len(cells) >= 18
    for cell in cells:
        if path.stem.endswith("-cpu"):
            assert cell.resources.gpus is None
            assert cell.resources.memory_gb <= 4
        else:
            assert cell.device == "auto"
            assert 0 < cell.resources.gpus <= 1


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_grid_covers_the_seeds_of_a_preset_one_by_one(path: Path) -> None:
    """After the sweep the chapter with its preset finds every training done."""
    cells = grids.read_spec(path, ROOT)
    known = pages.find(ROOT)
    have = {(cell.chapter, tuple(sorted({**cell.full, "device": None}.items()))) for cell in cells}
    for chapter, preset in {(cell.chapter, cell.preset) for cell in cells if "epochs" in cell.full}:
        full = chapters.check(known[chapter], pages.read_preset(ROOT, chapter, preset))
        if chapter == "early_gradients" and preset == "cifar10-quarter":  # lends its other values to a larger network
            continue
        wanted = full | {"seeds": 1, "device": None}
        seeds = range(full["seed"], full["seed"] + full["seeds"])
        if chapter == "dropout":  # the presets run their grids at the first seed alone
            seeds = seeds[:1]
        for seed in seeds:
            assert (chapter, tuple(sorted((wanted | {"seed": seed}).items()))) in have


def test_the_work_of_a_training_is_counted_as_it_is_done() -> None:
    """Each image in a step counts three times, one forward and the work of two backward, and once in an evaluation."""
    data, seen = datasets.load("digits", examples=64), []
    model = models.build("mlp", width=8, seed=0, in_channels=1, size=8, num_classes=10)
    model.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0]) * (3 if module.training else 1)))
    train(model, data, Settings(epochs=3, batch_size=24))
    work = sum(seen[1:])  # before training the network is tried on one image
    with FlopCounterMode(display=False) as counter:
        model.eval()(data.train.images[:1])

    (cell,) = re.findall(r"```\{code-cell\} ipython3\n:tags: [^\n]*\n\n(SHAPES .*?)```", PAGE, re.DOTALL)
    digits = f'"digits": (1_000, {len(data.test.labels)}, 1, 8, 10),'
    full = {"dataset": "digits", "examples": 64, "model": "mlp", "width": 8, "epochs": 3}
    known = {"trainings": [{"source": "recipes", "key": "", "chapter": "training", "full": full}], "training_s": 1.0}
    found = known | {"pd": pd, "torch": torch, "models": models, "FlopCounterMode": FlopCounterMode}
    exec(cell.replace("SHAPES = {", "SHAPES = {" + digits), found)
    assert found["core_flops_s"] == work * counter.get_total_flops()


def test_the_page_tells_how_to_get_all_the_data_that_its_grids_on_maini_take() -> None:
    words = re.search(r"Get the data first.*?\n\n", PAGE, re.DOTALL)[0]
    told = {word.removeprefix("memloc data get ") for word in re.findall("`([^`]+)`", words)}
    cells = [cell for path in SPECS if path.stem.startswith("maini") for cell in grids.read_spec(path, ROOT)]
    wanted = {cell.full["dataset"] for cell in cells}
    assert told & datasets.SOURCES.keys() == wanted | {"cscores", "cifar-10n"}


def test_the_batch_script_is_bash_and_asks_for_a_token_before_ray_starts() -> None:
    script = ROOT / "book" / "recipes" / "slurm.sbatch"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert 0 < text.index("export RAY_AUTH_MODE=token") < text.index("umask 077") < text.index("ray start --head")


# What the reference of KubeRay's API and the types that it is made from document, as far as the recipe uses it: the
# fields of each kind, those without which it is refused marked with an exclamation mark.
FIELDS = {
    "job": "entrypoint shutdownAfterJobFinishes backoffLimit rayClusterSpec activeDeadlineSeconds submissionMode",
    "cluster": "headGroupSpec! workerGroupSpecs rayVersion authOptions enableInTreeAutoscaling",
    "head": "template! rayStartParams serviceType",
    "workers": "groupName! template! minReplicas! maxReplicas! replicas rayStartParams",
    "claim": "accessModes storageClassName resources",
}


def check_fields(kind: str, content: dict) -> dict:
    documented = {name.rstrip("!"): name.endswith("!") for name in FIELDS[kind].split()}
    assert content.keys() <= documented.keys()
    assert {name for name, required in documented.items() if required} <= content.keys()
    return content


@pytest.fixture
def manifest() -> tuple[dict, dict]:
    documents = yaml.safe_load_all((ROOT / "book" / "recipes" / "kuberay.yaml").read_text())
    claim, job = documents
    return claim, job


def test_the_manifest_has_the_documented_structure(manifest) -> None:
    claim, job = manifest
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert check_fields("claim", claim["spec"])["accessModes"] == ["ReadWriteMany"]
    cluster = check_fields("cluster", check_fields("job", job["spec"])["rayClusterSpec"])
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [check_fields("head", cluster["headGroupSpec"])]
    groups += [check_fields("workers", group) for group in cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert all(isinstance(value, str) for value in environment.values())
        assert mounts == {"/store": claim["metadata"]["name"]}
        assert environment["MEMLOC_RUNS"].startswith("/store/")
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert "0.0.0.0" not in str(group)


def test_the_manifest_runs_a_sweep_that_is_there_with_the_ray_that_is_asked_for(manifest) -> None:
    _, job = manifest
    command, *words = shlex.split(job["spec"]["entrypoint"])
    options = cli._parser().parse_args(words)
    assert command == "memloc"
    assert options.address == "auto"
    assert (ROOT / Path(options.grid).relative_to("/memloc")) in SPECS
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["sweep"]
    asked = next(word for word in extra if word.startswith("ray"))
    assert asked == "ray>=2.60,<3"
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert int(re.fullmatch(r"2\.(\d+)\.\d+", version)[1]) >= 60


RECORDED = sorted((ROOT / "book" / "results" / "sweeps").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_sweep_is_that_of_its_grid(path: Path) -> None:
    content = json.loads(path.read_text())
    cells = grids.read_spec(ROOT / "book" / "presets" / "sweeps" / path.name.replace(".json", ".yaml"), ROOT)
    assert len(cells) - len(content["cells"]) == content["missing"]
    for row in content["cells"]:
        alike = [cell for cell in cells if (cell.chapter, cell.preset) == (row["chapter"], row["preset"])]
        assert any(cell.values.items() <= row["parameters"].items() for cell in alike)
    for commit in (content["commit"], *(row["commit"] for row in content["cells"])):
        assert re.fullmatch(r"[0-9a-f]{40}", commit), "recorded with changes that were not committed"
