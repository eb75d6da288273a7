"""The recipe for Slurm, run: a real Slurm of two nodes on this machine, and the batch script of the book."""

import csv
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from memloc import cells, grids, runs

pytest.importorskip("ray", reason="Ray, the extra memloc[sweep], is not installed")

SCRIPT = Path(__file__).parents[1] / "book" / "recipes" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path="/usr/sbin:" + os.environ["PATH"]) is None]
TRAINING = {"model": "mlp", "width": 32, "epochs": 100, "batch_size": 32, "noise_rate": 0.1}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may start the daemons of Slurm"),
]


def configuration(folder: Path) -> str:
    """Two nodes of one CPU each on this machine, with ports, keys and state of their own."""
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    nodes = "\n".join(
        f"NodeName=n{number} NodeAddr=127.0.0.1 NodeHostname={platform.node().split('.')[0]} Port={port} "
        "CPUs=1 RealMemory=3000 State=UNKNOWN"
        for number, port in enumerate(ports[1:], 1)
    )
    return f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=2500
ReturnToService=2
MpiDefault=none
KillWait=5
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def run(*words: str, **options) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_until(is_true, seconds: float, what) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment in which sbatch reaches the Slurm of this test; its daemons end with it."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    (folder / "slurm.conf").write_text(configuration(folder))
    path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_CONF": f"{folder}/slurm.conf"}
    munge = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
    commands = [["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge]]
    commands += [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = []
    try:
        for command in commands:
            with (folder / "out").open("a") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_until(
            lambda: run(*idle, env=environment).strip() == "2",
            60,
            lambda: (folder / "out").read_text(),
        )
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


class Job:
    """A sweep of two trainings, submitted with the batch script of the book."""

    def __init__(self, slurm: Mapping[str, str], root: Path, *options: str) -> None:
        self.environment, self.root = slurm | {"MEMLOC_RUNS": str(runs.root())}, root
        spec = root / "grid.yaml"
        spec.write_text(json.dumps({"cells": [{"training": TRAINING, "grid": {"seed": [0, 1]}, "memory_gb": 1}]}))
        self.addresses = [cell.address for cell in grids.read_spec(spec, root)]
        words = ["sbatch", "--parsable", *options, str(SCRIPT), "grid.yaml"]
        self.number = run(*words, cwd=root, env=self.environment).strip()

    def log(self) -> str:
        path = self.root / f"memloc-sweep-{self.number}.log"
        return path.read_text() if path.is_file() else ""

    def state(self) -> str:
        show = run("scontrol", "show", "job", self.number, env=self.environment)
        return show.split("JobState=")[1].split()[0]

    def wait(self) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.state() in ended, 300, lambda: self.state() + self.log())

    def table(self) -> dict[str, str]:
        rows = csv.DictReader((cells.folder() / "grid.csv").read_text().splitlines())
        return {row["seed"]: row["status"] for row in rows}


def test_the_batch_script_runs_a_sweep_on_all_nodes_of_its_job(slurm, small_book):
    job = Job(slurm, small_book.root, "--nodes=2")
    job.wait()
    assert job.state() == "COMPLETED", job.log()
    assert "2 done, 0 failed" in job.log()
    assert job.table() == {"0": "done", "1": "done"}
    assert not list(runs.root().glob(".ray-token*")), "the token is gone with the job"


def test_a_job_that_comes_to_its_time_limit_queues_itself_again_and_goes_on_where_it_was(slurm, small_book, history):
    job = Job(slurm, small_book.root, "--nodes=1")
    first, second = job.addresses
    wait_until(lambda: len(history(first)) > 20, 200, job.log)
    before = history(first)[:15]
    run("scancel", "--batch", "--signal=USR1", job.number, env=job.environment)  # as two minutes before its time limit
    wait_until(lambda: job.state() == "PENDING", 60, job.log)
    run("scontrol", "update", f"JobId={job.number}", "StartTime=now", env=job.environment)
    job.wait()
    assert job.state() == "COMPLETED", job.log()
    assert job.table() == {"0": "done", "1": "done"}
    assert len(history(first)) == len(history(second)) == TRAINING["epochs"] + 1
    assert history(first)[:15] == before, "seconds and all: these epochs were not trained again"
