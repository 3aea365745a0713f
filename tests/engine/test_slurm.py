"""docs/ray_on_slurm.sh: Ray on the nodes of a Slurm job, which are processes of this machine here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "ray_on_slurm.sh"
TWO_NODES = (
    "KBIT_TEST_TWO_NODES"  # set to 1, the sweep is a real one: half a minute and more, most of it two Rays' start
)

# srun runs a command here, whatever the node, and notes its options.
SRUN = """\
options=()
while [[ $1 == --* ]]; do
  options+=("$1"); [[ $1 == --nodelist ]] && { options+=("$2"); shift; }; shift
done
echo "${options[*]}" >>srun.log
exec "$@"
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": "[[ $* == 'show hostnames node-[a-b]' ]] && printf 'node-a\\nnode-b\\n'\n",
}
# What `ray start --block` and `kbit run` do, but for the work. The first ends when it is told to.
WITHOUT_WORK = {
    "hostname": "echo fe80::1 127.0.1.1 10.0.0.1 10.0.0.2\n",
    "ray": 'echo "$RAY_AUTH_TOKEN $RAY_worker_niceness $*" >>ray.log\n'
    "trap 'echo ended >>ended.log; exit' TERM\nwhile :; do sleep 0.1; done\n",
    "python": "while [[ $(cat ray.log 2>/dev/null | wc -l) != 2 ]]; do sleep 0.1; done\n"
    'echo "$*" >python.log; cat >program.py\n',
    "kbit": 'printf "%s\\n" "$@" >kbit.log; exit 3\n',
}
JOB = {
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_JOB_ID": "1230042",
    "SLURM_CPUS_PER_TASK": "1",
    "HF_HUB_OFFLINE": "1",
}


def submit(folder: Path, commands: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder, with stand-ins for commands."""
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder, env=os.environ | JOB | {"PATH": path}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def test_ray_starts_on_each_node_and_ends_with_the_sweep(tmp_path: Path) -> None:
    from ray.scripts.scripts import start

    done = submit(tmp_path, STAND_INS | WITHOUT_WORK, "+sweeps=nano/quick", "results=a b")
    assert (done.returncode, done.stderr) == (3, "")  # that of kbit
    calls = [line.split(maxsplit=2) for line in (tmp_path / "ray.log").read_text().splitlines()]
    ((token, niceness),) = {(token, niceness) for token, niceness, _ in calls}
    assert (len(token), niceness) == (64, "0")
    parsed = [start.make_context("start", arguments.split()[1:]).params for *_, arguments in calls]
    head, other = sorted(parsed, key=lambda options: not options["head"])
    assert (head["node_ip_address"], head["port"], other["address"]) == ("10.0.0.1", 20042, "10.0.0.1:20042")
    for options in (head, other):
        assert (options["num_cpus"], options["num_gpus"], options["block"]) == (1, 0, True)
    on_each = "--nodes=1 --ntasks=1 --cpus-per-task=1 --nodelist"
    asked = sorted((tmp_path / "srun.log").read_text().splitlines())
    assert asked == [
        f"{on_each} node-a",
        f"{on_each} node-a",
        f"{on_each} node-b",
    ]  # the first is asked for its address
    assert (tmp_path / "python.log").read_text() == "- 10.0.0.1:20042 2\n"
    compile((tmp_path / "program.py").read_text(), "program.py", "exec")
    arguments = (tmp_path / "kbit.log").read_text().splitlines()
    assert arguments == ["run", "-m", "ray.address=10.0.0.1:20042", "+sweeps=nano/quick", "results=a b"]
    assert (tmp_path / "ended.log").read_text() == "ended\n" * 2


def test_a_first_node_without_an_address_for_others_is_said(tmp_path: Path) -> None:
    done = submit(tmp_path, STAND_INS | WITHOUT_WORK | {"hostname": "echo ::1 127.0.1.1\n"})
    assert done.returncode == 1
    assert done.stderr == "node-a knows no address of itself that other nodes reach: set ip= in this script\n"
    assert not (tmp_path / "ray.log").exists()


@pytest.mark.skipif(os.environ.get(TWO_NODES) != "1", reason=f"takes a minute: {TWO_NODES}=1 runs it")
def test_a_sweep_runs_on_two_nodes(tmp_path: Path) -> None:
    """Each node has one CPU, so that two workers need both."""
    small = ("quant.bits=3,4", "eval.tasks=[]", "eval.perplexity_windows=1")
    done = submit(tmp_path, STAND_INS, *small, "ray.num_workers=2", "ray.cpus_per_worker=1")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 asked results are in" in done.stdout
    assert "starting 2 workers" in done.stderr
