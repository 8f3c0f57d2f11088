"""A run on the nodes of a Ray cluster: the bytes of one machine, whatever dies. The nodes are processes here."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
import slow_ray
import torch
from click.testing import CliRunner
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from lox_stream import DataError, InUseError, LoxError, Options, extrapolate, files, on_ray
from lox_stream.cli import commands
from lox_stream.journal import replay
from lox_stream.output_rules import MANIFEST
from lox_stream.sharing import folder_of_part
from lox_stream.spreading import part_of, parts_of, plan_spread, require_seen
from lox_stream.synthetic import llama_shapes, write_pair

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
COUNT = 5  # files of the output
SOON_S = 60.0
pytestmark = [  # files and processes of nodes that were killed, which Ray does not close
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, aligned = write_pair(folder, llama_shapes(64, 96, 4, 256, 32), aligned_shards=COUNT)
    (aligned / "tokenizer.json").write_text("{}")
    return base, aligned


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    return outputs(extrapolate(*pair, tmp_path_factory.mktemp("whole") / "out").out)


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, of which the first stays, and a connection for all tests, so that processes are warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        for _ in range(2):
            found.add_node(**NODE)
        ray.init(found.address, log_to_driver=False, logging_level=logging.ERROR)
        yield found
        ray.shutdown()
        found.shutdown()
        del found
        gc.collect()


@pytest.fixture
def slow(monkeypatch):
    """Nodes take their time."""
    monkeypatch.setattr(on_ray, "carry_out", slow_ray.slowly)


def outputs(folder: Path) -> dict[str, object]:
    """All files of an output; of its manifest what does not tell of times."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, object] = {name: path.read_bytes() for name, path in names.items() if name != MANIFEST}
    said = json.loads((folder / MANIFEST).read_text())
    del said["times"], said["seal"]
    for row in said["tensors"].values():
        del row["elapsed_s"]
    return found | {MANIFEST: said}


def spread(pair, out: Path, address: str, **how: object):
    """A run on all nodes; what `--ray ADDRESS` does."""
    wholes = plan_spread(*pair, [(out, Options())], resume=bool(how.get("resume")))
    (summary,) = on_ray.execute_on_ray(wholes, address, **how)
    return summary


def lox(*words: object):
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


def given(pair, out: Path) -> list[object]:
    return ["--base", pair[0], "--aligned", pair[1], "--out", out]


def until(happens) -> None:
    deadline = time.monotonic() + SOON_S
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def journaled(out: Path) -> set[str]:
    """What the parts' journals call finished; a finished part has none any more."""
    states = [replay(place) for place in out.glob("part-*")]
    return {name for state in states if state is not None for name in state.finished}


def disturbed(out: Path, disturb) -> tuple[threading.Thread, set[str]]:
    """Waits for tensors that journals call finished, then calls `disturb()`; the names that were there before."""
    before: set[str] = set()

    def wait() -> None:
        until(lambda: len(journaled(out)) >= 6)
        before.update(journaled(out))
        disturb()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, before


def require_little_lost(out: Path, kept: set[str], most: int) -> None:
    """What was in a journal is not made again, and of the rest only what was in work."""
    times = Counter(name for _, name in slow_ray.made(out.parent))
    assert kept, "something was finished by then"
    assert {name: times[name] for name in kept if times[name] != 1} == {}
    assert sum(times.values()) - len(times) <= most
    assert len(times) == 38


def test_a_run_on_three_nodes_is_that_of_one_machine(cluster, pair, right, tmp_path):
    reaches = []
    summary = spread(pair, tmp_path / "out", cluster.address, progress=reaches.append)
    assert outputs(tmp_path / "out") == right
    assert summary.totals.extrapolated == 29
    assert summary.written_bytes == summary.totals.n_bytes
    done = [reach.done_bytes for reach in reaches]
    assert done == sorted(done)
    assert (reaches[-1].done_bytes, reaches[-1].done_tensors) == (reaches[-1].total_bytes, 38)


def test_several_outputs_and_the_command(cluster, pair, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--alpha", "0.5,1.25", "--ray", cluster.address, "--json"]
    ran = lox("run", *given(pair, "out-{alpha}"), *words)
    assert ran.exit_code == 0, ran.output
    assert [one["totals"]["extrapolated"] for one in json.loads(ran.stdout)["outputs"]] == [29, 29]
    weights = [name for name in right if name.endswith(".safetensors")]
    assert {name: outputs(tmp_path / "out-1.25")[name] for name in weights} == {name: right[name] for name in weights}
    again = lox("run", *given(pair, "out-{alpha}"), *words, "--resume")
    assert again.exit_code == 1
    assert "holds a finished run" in again.stderr


@pytest.mark.torture
@pytest.mark.parametrize("count", [1, 2], ids=["one of three", "all but one"])
def test_nodes_that_are_killed_cost_what_they_had_in_hand(count, cluster, pair, right, tmp_path, slow):
    out = tmp_path / "out"
    nodes = [*cluster.worker_nodes][:count]

    def kill() -> None:
        for node in nodes:
            cluster.remove_node(node, allow_graceful=False)

    thread, kept = disturbed(out, kill)
    try:
        spread(pair, out, cluster.address)
    finally:
        thread.join()
        for _ in nodes:
            cluster.add_node(**NODE)
    assert outputs(out) == right
    require_little_lost(out, kept, 4 * count)


@pytest.mark.torture
def test_a_process_that_is_killed_costs_what_it_had_in_hand(cluster, pair, right, tmp_path, slow):
    out = tmp_path / "out"
    thread, kept = disturbed(out, lambda: os.kill(slow_ray.made(tmp_path)[-1][0], signal.SIGKILL))
    spread(pair, out, cluster.address)
    thread.join()
    assert outputs(out) == right
    require_little_lost(out, kept, 4)


def test_what_is_wrong_is_said_once_and_not_tried_again(cluster, pair, right, tmp_path):
    broken = tmp_path / "aligned"
    broken.mkdir()
    for path in pair[1].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    file = sorted(broken.glob("*.safetensors"))[2]
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    ran = lox("run", *given((pair[0], broken), out), "--ray", cluster.address)
    assert ran.exit_code == 1
    assert ran.stderr.count("error: ") == ran.stderr.count(f"{name}: aligned has nan") == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    (part,) = (place for place in out.iterdir() if (place / f"{file.name}.partial").exists())
    assert len(replay(part).sessions) == 1
    ran = lox("run", *given((pair[0], broken), out), "--ray", cluster.address, "--resume", "--on-nonfinite", "copy")
    assert ran.exit_code == 0, ran.output


@pytest.mark.torture
def test_a_driver_that_is_killed_is_gone_on_with(cluster, pair, right, tmp_path, slow):
    out = tmp_path / "out"
    driver = start(pair, out, "--ray", cluster.address)
    until(lambda: len(journaled(out)) >= 4)
    driver.kill()
    driver.wait()
    kept = journaled(out)
    refused = lox("run", *given(pair, out), "--ray", cluster.address)
    assert refused.exit_code == 1
    assert "--ray with --resume" in " ".join(refused.stderr.split())
    other = lox("run", *given(pair, out), "--ray", cluster.address, "--resume", "--alpha", "1")
    assert other.exit_code == 1
    assert "--alpha is 1.0, the run began with 1.25" in other.stderr
    ran = lox("run", *given(pair, out), "--ray", cluster.address, "--resume")
    assert ran.exit_code == 0, ran.output
    assert outputs(out) == right
    require_little_lost(out, kept, 5)


@pytest.mark.torture
def test_a_signal_ends_a_cluster_of_its_own_and_another_number_of_nodes_goes_on(cluster, pair, right, tmp_path):
    out = tmp_path / "out"
    driver = start(pair, out, "--ray", "--threads", "1")
    until(lambda: len(journaled(out)) >= 2)
    started = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=SOON_S)
    assert driver.returncode == 143
    assert time.monotonic() - started < 4.0
    assert f"{out} keeps what is finished and synced. Go on with:" in said
    assert said.rstrip().endswith("--ray --threads 1 --resume")
    until(lambda: not alive({pid for pid, _ in slow_ray.made(tmp_path)}))
    summary = spread(pair, out, cluster.address, resume=True)
    assert outputs(out) == right
    assert 0 < summary.written_bytes < summary.totals.n_bytes


def start(pair, out: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, whose nodes take their time."""
    command = [sys.executable, slow_ray.__file__, "run", *map(str, given(pair, out)), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


@pytest.mark.parametrize("state", ["parts", "half put together", "finished"])
def test_a_driver_that_is_killed_at_the_end_is_gone_on_with(state, cluster, pair, right, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (whole,) = plan_spread(*pair, [(out, Options())])
    for part in parts_of([whole]):
        extrapolate(*pair, out, options=Options(part=part))
    if state != "parts":
        with monkeypatch.context() as patch:
            stopped = "execute" if state == "half put together" else "_remove"
            patch.setattr(f"lox_stream.finishing.{stopped}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                on_ray.finish_whole(out, *pair, Options())
    spread(pair, out, cluster.address, resume=True)
    assert outputs(out) == right


def interrupt(*given: object, **how: object) -> None:
    raise KeyboardInterrupt


def test_a_model_of_one_file_is_one_part(cluster, pair, tmp_path):
    single = pair[1].parent / "base"
    whole = outputs(extrapolate(pair[1], single, tmp_path / "whole" / "out").out)
    spread((pair[1], single), tmp_path / "out", cluster.address)
    assert outputs(tmp_path / "out") == whole


@pytest.mark.torture
def test_processes_that_always_die_end_the_run(cluster, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "carry_out", slow_ray.dying)
    monkeypatch.setattr(on_ray, "RETRIES", 1)
    with pytest.raises(LoxError, match=r"was given up after 1 tries, as its processes or nodes died(.|\n)*--resume"):
        spread(pair, tmp_path / "out", cluster.address)


def test_a_node_that_does_not_see_the_output_says_so(cluster, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "make_folder", lambda path: None)
    with pytest.raises(LoxError, match=r"node \S+ does not see \S+part-\d-of-5; expected inputs and --out on paths"):
        spread(pair, tmp_path / "out", cluster.address)


def test_a_node_that_does_not_see_the_inputs_says_so(pair, tmp_path):
    (whole,) = plan_spread(*pair, [(tmp_path / "out", Options())])
    made = part_of(whole, "2/5")
    made.out.mkdir(parents=True)
    require_seen(made, "here")
    (moved,) = pair[0].glob("*.safetensors")
    moved.rename(tmp_path / "away")
    try:
        with pytest.raises(LoxError, match=r"node here does not see \S+base\S+\.safetensors; expected"):
            require_seen(made, "here")
    finally:
        (tmp_path / "away").rename(moved)


def test_the_lock_of_a_process_that_lingers_is_waited_for(pair, tmp_path):
    (whole,) = plan_spread(*pair, [(tmp_path / "out", Options())])
    folder_of_part(whole.out, "1/5").mkdir(parents=True)
    fd, _ = files.lock_folder(folder_of_part(whole.out, "1/5"))
    task = [whole], "1/5", Deaf()
    assert isinstance(on_ray.outcome(on_ray.carry_out, 0.0, *task), InUseError)
    timer = threading.Timer(0.5, files.close, (fd,))
    timer.start()
    (summary,) = on_ray.outcome(on_ray.carry_out, SOON_S, *task)
    timer.join()
    assert summary.out == folder_of_part(whole.out, "1/5")


class Deaf:
    """A board that nobody reads."""

    class tell:
        @staticmethod
        def remote(part: str, reach: object) -> None: ...


def test_an_error_comes_back_as_it_is():
    def fails() -> None:
        raise DataError("a file was cut")

    found = on_ray.outcome(fails, 0.0)
    assert (type(found), str(found)) == (DataError, "a file was cut")


def test_without_ray_the_error_names_the_extra(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = lox("run", *given(pair, tmp_path / "out"), "--ray")
    assert ran.exit_code == 1
    assert "ray is not installed" in ran.stderr
    assert "the extra [ray]: pip install 'ray" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_cluster(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = lox("run", *given(pair, tmp_path / "out"), "--ray", "--dry-run")
    assert ran.exit_code == 0, ran.output
    assert "Nothing was written" in ran.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "1/3"], "--ray and --part are both given, expected one"),
        (["--overwrite"], "--ray and --overwrite are both given"),
        (["--resume", "--repair"], "--ray and --repair are both given"),
        (["--resume", "--dry-run"], "--ray and --dry-run with --resume are both given"),
        (["--save-factors", "factors"], "--ray is given for an adapter, expected a model"),
    ],
    ids=str,
)
def test_what_cannot_be_spread_is_refused(words, said, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = lox("run", *given(pair, "out"), "--ray", *words)
    assert ran.exit_code == 2
    assert said in " ".join(ran.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda:1"}, "--device is cuda:1, and with --ray expected cuda"),
        ({"device": "cuda"}, "no node of the Ray cluster has a CPU and a GPU"),
        ({"threads": 9}, "--threads is 9, and the largest node has 4 CPUs"),
    ],
    ids=str,
)
def test_what_no_node_has_is_refused(options, said):
    asked = Options(**options)
    with pytest.raises(LoxError, match=said):
        on_ray._threads([{"CPU": 4.0}, {"CPU": 2.0}, {}], asked, on_ray._gpus(asked.device))


def test_a_part_takes_the_largest_node_or_its_share_of_one_with_gpus():
    nodes = [{"CPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}]
    assert on_ray._threads(nodes, Options(), 0) == 16
    assert on_ray._threads(nodes, Options(device="cuda"), 1) == 2
    assert on_ray._threads(nodes, Options(threads=3), 0) == 3


def test_a_cluster_that_is_not_there_is_an_error(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    ran = lox("run", *given(pair, tmp_path / "out"), "--ray", "127.0.0.1:1")
    assert ran.exit_code == 1
    assert "--ray 127.0.0.1:1: no Ray cluster can be reached there" in ran.stderr
    assert not (tmp_path / "out").exists()
