"""Several machines: two torchruns meet on the loopback, one dies and comes back, and the run ends as if none had."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_faults import is_as, is_at_work, kill, launch, make_data, wait_for, wait_until, whole, workers_of

from dpo.files import run_in

pytestmark = pytest.mark.slow
WAY = "2 in shards"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    make_data(folder)
    return folder


def torchrun(folder: Path, output_dir: str, port: int, machine: int) -> subprocess.Popen:
    """The README's line; but on the loopback, where both are the host by name, it has to be said which one is; and one
    that is gone is noticed sooner."""
    conf = f"is_host={1 - machine},keep_alive_interval=1"
    meet = f"--rdzv_backend c10d --rdzv_endpoint localhost:{port} --rdzv_id job --rdzv_conf {conf}"
    line = f"--nnodes 2 --nproc_per_node 1 --max-restarts 3 {meet}"
    return launch(folder, output_dir, WAY, torchrun=line, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def wait_for_rows(path: Path, number: int, host: subprocess.Popen) -> None:
    """Until a run has so many metrics rows; it has not ended then."""
    metrics = path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= number, host)
    assert run_in(path)["status"] == "training" and host.poll() is None


def assert_ends_well(folder: Path, output_dir: str, *agents: subprocess.Popen) -> None:
    said = folder / f"{output_dir}.log"
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0], said.read_text()
    assert is_as(whole(folder, WAY), folder / output_dir)


def test_a_machine_dies_and_comes_back_and_dies_again(folder):
    """First its torchrun alone, whose worker then tells all to save and leave; then everything on it."""
    port = free_port()
    host, other = (torchrun(folder, "run", port, machine) for machine in (0, 1))
    wait_for_rows(folder / "run", 3, host)
    other.kill()
    other.wait()
    other = torchrun(folder, "run", port, 1)
    wait_for_rows(folder / "run", 7, host)
    kill(other)
    other = torchrun(folder, "run", port, 1)
    assert_ends_well(folder, "run", host, other)


def test_the_machine_where_all_meet_dies(folder):
    """The other one ends with it; the same lines again go on."""
    port = free_port()
    host, other = (torchrun(folder, "hosted", port, machine) for machine in (0, 1))
    wait_for_rows(folder / "hosted", 3, host)
    kill(host)
    assert other.wait(timeout=60) != 0
    host, other = (torchrun(folder, "hosted", port, machine) for machine in (0, 1))
    assert_ends_well(folder, "hosted", host, other)


def test_one_that_says_nothing_more_is_given_up(folder):
    """A machine that loses its power closes no connection; least of all may those wait that write a checkpoint."""
    job = launch(folder, "silent", WAY, more="--ddp_timeout 5")
    wait_for_rows(folder / "silent", 1, job)
    wait_for(lambda: list((folder / "silent").glob("*.unfinished")), job)
    time.sleep(0.2)  # by now the first one waits, in the background, for the share of the second, and trains on
    workers = workers_of(job)
    os.kill(workers[1], signal.SIGSTOP)
    try:
        wait_until(lambda: not is_at_work(workers[0]), 30)
    finally:
        kill(job)
