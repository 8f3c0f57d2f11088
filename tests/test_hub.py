"""Models on the hub, held against a small one on the loopback interface: planned from headers, then downloaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file

import lox_stream
from lox_stream import CheckpointError, hub_cache, remote
from lox_stream import hub as lox_hub
from lox_stream.checkpoint import open_checkpoint
from lox_stream.for_compressed_tensors import LoxConverter
from lox_stream.remote import FIRST_BYTES
from lox_stream.synthetic import llama_shapes, write_pair

pytestmark = [pytest.mark.examples, pytest.mark.filterwarnings("default")]
pytest.importorskip("huggingface_hub", reason="`make examples` has an environment with it")

import huggingface_hub.constants  # noqa: E402
import huggingface_hub.file_download  # noqa: E402
from faulty import in_front_of  # noqa: E402
from small_hub import Hub, serving  # noqa: E402

RUN = ["run", "--base", "org/base", "--aligned", "org/aligned@v1", "--out", "out"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, aligned = write_pair(folder, llama_shapes(64, 96, 2, 512, 32), aligned_shards=2)
    (aligned / "tokenizer.json").write_text("{}" * 1000)
    (aligned / "model.gguf").write_bytes(bytes(100_000))
    (aligned / "pytorch_model.bin").write_bytes(bytes(100_000))
    return base, aligned


@pytest.fixture
def hub(pair):
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]})) as hub:
        yield hub


def lox(hub: Hub, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process whose huggingface_hub knows that hub alone."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"} | more
    command = [sys.executable, "-P", "-m", "lox_stream", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def looked_at(pair) -> int:
    """Most bytes of weights that a plan looks at: the tables of a vocabulary, and once more their ends."""
    return sum(
        2 * tensor.n_bytes
        for folder in pair
        for tensor in open_checkpoint(folder).tensors.values()
        if len(tensor.shape) == 2 and ".layers." not in tensor.name
    )


def test_a_pair_on_the_hub_gives_the_bytes_of_one_on_the_disk(hub, pair, tmp_path):
    ran = lox(hub, tmp_path, *RUN)
    assert ran.returncode == 0, ran.stderr
    assert "fetching org/base and org/aligned@v1 from the hub" in ran.stderr
    here = lox(hub, tmp_path, "run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "here", "--quiet")
    assert here.returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "here")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert hub.sent("gguf") == hub.sent("pytorch_model.bin") == 0, "other formats of the weights are not downloaded"
    assert "org/aligned" in (tmp_path / "out" / "README.md").read_text()
    sent = hub.sent("safetensors")
    assert lox(hub, tmp_path, *RUN, "--overwrite").returncode == 0
    planned = 4 * FIRST_BYTES + looked_at(pair)
    assert hub.sent("safetensors") <= sent + planned, "the second time the weights are in the cache"


def test_a_dry_run_and_inspect_read_headers_alone(hub, pair, tmp_path):
    ran = lox(hub, tmp_path, *RUN, "--dry-run", "--json")
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert (plan["base"], plan["aligned"]) == ("org/base", "org/aligned@v1")
    assert plan["totals"]["extrapolated_tensors"] == 15
    seen = lox(hub, tmp_path, "inspect", "org/aligned", "--json")
    assert seen.returncode == 0, seen.stderr
    assert "org/aligned" in seen.stdout
    whole = sum(path.stat().st_size for folder in pair for path in folder.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in pair[1].glob("*.safetensors"))
    assert hub.sent("safetensors") <= max(4 * (1 << 16), headers) * 2 + 2 * looked_at(pair)
    assert not list((tmp_path / "hf").rglob("*.safetensors")), "nothing was put into the cache"
    assert whole > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hf") == []


def test_what_is_wrong_is_said_before_the_weights_are_fetched(hub, pair, tmp_path):
    other = tmp_path / "other"
    write_pair(other, llama_shapes(32, 96, 2, 512, 32))
    hub.models["org/other"] = other / "base"
    ran = lox(hub, tmp_path, "run", "--base", "org/other", "--aligned", "org/aligned", "--out", "out")
    assert ran.returncode == 1
    assert "expected the same shape" in ran.stderr
    assert "lox-stream-headers" not in ran.stderr, "no temporary folder is named"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--base", "org/nothing"],
            r"org/nothing: no such model on http.*Check the name, or log in with `hf auth login`",
        ),
        (["--base", "org/base@v9"], "org/base: has no revision 'v9', expected a branch, tag or commit"),
    ],
)
def test_names_that_are_none_are_said(words, said, hub, tmp_path):
    ran = lox(hub, tmp_path, *RUN[:1], *words, *RUN[3:])
    assert ran.returncode == 1, ran.stdout
    assert re.search(said, ran.stderr, re.DOTALL), ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_gated_model_says_how_to_get_access(pair, tmp_path):
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]}, gated=("org/base",))) as hub:
        ran = lox(hub, tmp_path, *RUN)
    assert ran.returncode == 1
    assert "org/base: is gated: this account may not read it. Ask for access at" in ran.stderr


def test_a_cut_connection_is_gone_on_with(pair, tmp_path):
    """By huggingface_hub, which resumes; the weights are those of the hub."""
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]}, cut=2)) as hub:
        ran = lox(hub, tmp_path, *RUN)
        again = ran if ran.returncode == 0 else lox(hub, tmp_path, *RUN)
    assert again.returncode == 0, again.stderr
    here = lox(hub, tmp_path, "run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "here", "--quiet")
    assert here.returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "here")


def test_offline_takes_what_is_in_the_cache(hub, pair, tmp_path):
    words = ["run", "--base", "org/base", "--aligned", "org/aligned", "--out", "out"]
    nothing = lox(hub, tmp_path, *words, HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1
    assert "no folder of that name is here, nor a model in the cache" in nothing.stderr
    assert lox(hub, tmp_path, *words).returncode == 0
    right = weights(tmp_path / "out")
    again = lox(hub, tmp_path, *words[:-1], "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "again") == right


def test_a_folder_of_that_name_is_taken_before_the_hub(hub, pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "org" / "base")
    shutil.copytree(pair[1], tmp_path / "org" / "aligned")
    words = ["run", "--base", "org/base", "--aligned", "org/aligned", "--out", "out"]
    assert lox(hub, tmp_path, *words).returncode == 0
    assert hub.log == []


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("org/name", "meta-llama/Llama-3.1-8B", "org/name@v1.0", "org/name@refs/pr/1"):
        assert lox_hub.is_hub_id(text), text
    for text in ("name", "./org/name", "/org/name", "a/b/c", "org/", "../x/y", "~/x"):
        assert not lox_hub.is_hub_id(text), text


TOKEN = {"HF_TOKEN": "hf_" + "x" * 34}


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed_as_a_private_model_in_one_commit(hub, pair, tmp_path):
    words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "out", "--push-to", "me/lox"]
    ran = lox(hub, tmp_path, *words, **TOKEN)
    assert ran.returncode == 0, ran.stderr
    assert f"pushed to {hub.url}/me/lox" in ran.stderr
    assert hub.private == {"me/lox": True}
    assert hub.pushed["me/lox"] == outputs(tmp_path / "out")
    hub.pushed["me/lox"]["model-00009-of-00009.safetensors"] = b"of an earlier layout"
    again = lox(hub, tmp_path, "push", "out", "me/lox", **TOKEN)
    assert again.returncode == 0, again.stderr
    assert hub.pushed["me/lox"] == outputs(tmp_path / "out")


def test_an_upload_that_breaks_leaves_no_half_model_and_goes_on(pair, tmp_path):
    with serving(Hub({}, cut=1)) as hub:
        words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "out", "--push-to", "me/lox"]
        broken = lox(hub, tmp_path, *words, **TOKEN)
        assert broken.returncode == 1
        assert "The output itself is finished. Push it with: lox-stream push out me/lox" in broken.stderr.replace(
            "\n ", ""
        )
        assert hub.pushed["me/lox"] == {}
        assert lox(hub, tmp_path, "push", "out", "me/lox", **TOKEN).returncode == 0
        assert hub.pushed["me/lox"] == outputs(tmp_path / "out")


def test_no_right_to_write_is_said_before_the_work(hub, pair, tmp_path):
    words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "out", "--push-to"]
    ran = lox(hub, tmp_path, *words, "forbidden/lox", **TOKEN)
    assert ran.returncode == 1
    assert "forbidden/lox: the hub, or the way to it, failed" in ran.stderr
    assert not (tmp_path / "out").exists()
    named = lox(hub, tmp_path, *words, "me/lox@v1", **TOKEN)
    assert "names a revision, expected org/name" in named.stderr
    several = lox(hub, tmp_path, *words, "me/lox", "--save-factors", "factors", **TOKEN)
    assert several.returncode == 2
    nothing = lox(hub, tmp_path, "push", "nowhere", "me/lox", **TOKEN)
    assert nothing.returncode == 1
    assert "is not a finished output of lox-stream" in nothing.stderr


def test_no_network_is_said(pair, tmp_path):
    with serving(Hub({})) as gone:
        pass
    ran = lox(gone, tmp_path, *RUN)
    assert ran.returncode == 1
    assert "org/base: no folder of that name is here, so it is taken for a model on the hub" in ran.stderr
    assert "bug" not in ran.stderr


LIBRARY = """
import sys
import lox_stream
lox_stream.extrapolate("org/base", "org/aligned@v1", "out")
names = dict(lox_stream.stream("org/base", "org/aligned@v1", names=["*norm*"]))
opened = lox_stream.open("org/base", "org/aligned@v1")
assert all(opened[name].equal(tensor) for name, tensor in names.items())
"""


def test_the_library_takes_names_of_the_hub_too(hub, pair, tmp_path):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", LIBRARY], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    here = lox(hub, tmp_path, "run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "here", "--quiet")
    assert here.returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "here")


def test_a_server_that_is_busy_is_asked_again(pair, tmp_path):
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]}, busy=2)) as hub:
        ran = lox(hub, tmp_path, *RUN, "--dry-run", "--json")
    assert ran.returncode == 0, ran.stderr
    assert hub.busy == 0
    assert json.loads(ran.stdout)["totals"]["extrapolated_tensors"] == 15


THROUGH = [*RUN, "--scratch", "scratch"]


def test_a_pair_on_the_hub_passes_through_a_scratch(hub, pair, tmp_path):
    ran = lox(hub, tmp_path, *THROUGH, "--scratch-size", "1MB")
    assert ran.returncode == 0, ran.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors")), "and not through the cache"
    assert list((tmp_path / "scratch").iterdir()) == []
    here = lox(hub, tmp_path, "run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "here", "--quiet")
    assert here.returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "here")
    assert "org/aligned" in (tmp_path / "out" / "README.md").read_text()
    inputs = json.loads((tmp_path / "out" / "lox_stream.json").read_text())["inputs"]
    assert [inputs[side]["path"] for side in ("base", "aligned")] == ["org/base", "org/aligned@v1"]


def test_wrong_bytes_that_stay_are_refused_and_the_run_goes_on(pair, tmp_path):
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]}, wrong=99)) as hub:
        ran = lox(hub, tmp_path, *THROUGH)
        assert ran.returncode == 1
        assert "its bytes are not what was promised" in ran.stderr
        assert weights(tmp_path / "out") == {}
        hub.wrong = 0
        assert lox(hub, tmp_path, *THROUGH, "--resume").returncode == 0
    assert lox(hub, tmp_path, "verify", "out").returncode == 0


def test_a_gated_model_says_so_through_a_scratch_too(pair, tmp_path):
    with serving(Hub({"org/base": pair[0], "org/aligned": pair[1]}, gated=("org/base",))) as hub:
        ran = lox(hub, tmp_path, *THROUGH)
    assert ran.returncode == 1
    assert "org/base: is gated: this account may not read it. Ask for access at" in ran.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    return weights(lox_stream.extrapolate(*pair, tmp_path_factory.mktemp("right") / "out").out)


@pytest.fixture
def know(monkeypatch, tmp_path):
    """Makes a hub, or what is in front of it, the only one that huggingface_hub knows in this process."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(lox_hub, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.chdir(tmp_path)

    def known(url: str) -> None:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        for module in (constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)

    return known


@pytest.fixture
def proxy(hub, know):
    where = urlsplit(hub.url)
    with in_front_of(where.hostname, where.port) as proxy:
        know(proxy.url)
        yield proxy


FAULTS = ["cut", "429", "503", "short", "slow", "wrong"]


@pytest.mark.parametrize("scratch", [None, "scratch"], ids=["cache", "scratch"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_change_nothing(fault, scratch, proxy, right, tmp_path, capfd):
    proxy.faults = [fault, "", fault]
    lox_stream.extrapolate("org/base", "org/aligned@v1", tmp_path / "out", scratch=scratch)
    assert proxy.faults == []
    assert weights(tmp_path / "out") == right
    if scratch is None:
        assert capfd.readouterr() == ("", ""), "the library prints nothing, and lets nothing print"


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_is_busy_when_it_is_asked_for_names_is_asked_again(status, hub, know, monkeypatch):
    real, asked = huggingface_hub.HfApi.model_info, []

    def busy(*given, **how):
        asked.append(given)
        if len(asked) == 1:
            error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
            error.response = type("Answer", (), {"status_code": status})()
            raise error
        return real(*given, **how)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", busy)
    know(hub.url)
    assert {file.name for file in lox_hub.files_of("org/aligned")} >= {"config.json"}
    assert len(asked) == 2


def test_wrong_bytes_that_stay_are_an_error_and_the_next_command_heals_the_cache(hub, know, right, tmp_path):
    know(hub.url)
    hub.wrong = 99
    with pytest.raises(CheckpointError, match=r"org/base: model\.safetensors: the bytes are not .*second download did"):
        lox_stream.extrapolate("org/base", "org/aligned", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.wrong = 0
    lox_stream.extrapolate("org/base", "org/aligned", tmp_path / "out")
    assert weights(tmp_path / "out") == right


def flip(path: Path) -> None:
    """One bit, with the times of the file put back."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1000] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_in_the_cache_is_read_once_until_somebody_touches_it(hub, know, pair, tmp_path, monkeypatch):
    know(hub.url)
    real, read = hub_cache.hashlib.file_digest, []
    monkeypatch.setattr(hub_cache.hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind))
    folder = lox_hub.downloaded("org/aligned")
    assert len(read) == 2
    sent = hub.sent("safetensors")
    assert lox_hub.downloaded("org/aligned") == folder
    assert (len(read), hub.sent("safetensors")) == (2, sent)
    shard = next(folder.glob("*.safetensors"))
    flip(shard)
    assert lox_hub.downloaded("org/aligned") == folder
    assert shard.read_bytes() == (pair[1] / shard.name).read_bytes(), "it was downloaded again"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(read)
    assert lox_hub.downloaded("org/aligned") == folder
    small = len(read) - count  # which this hub calls by their sha256, too
    lox_hub.downloaded("org/aligned")
    assert len(read) == count + small
    flip(shard)
    with pytest.raises(CheckpointError, match=rf"org/aligned: {shard.name}: the bytes are not .*Run once with a conn"):
        lox_hub.downloaded("org/aligned")


def test_a_cache_that_takes_no_note_is_read_each_time(hub, know, monkeypatch):
    know(hub.url)
    folder = lox_hub.downloaded("org/aligned")
    note = folder.parents[1] / hub_cache.NOTE
    note.unlink()
    note.mkdir()
    flip(next(folder.glob("*.safetensors")))
    sent = hub.sent("safetensors")
    lox_hub.downloaded("org/aligned")
    assert hub.sent("safetensors") > sent


@pytest.mark.parametrize("scratch", [None, "scratch"], ids=["cache", "scratch"])
def test_a_run_that_was_stopped_goes_on(scratch, hub, know, right, tmp_path):
    know(hub.url)
    pair_and_out = ("org/base", "org/aligned@v1", tmp_path / "out")

    def stop(reach) -> None:
        if reach.done_tensors >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lox_stream.extrapolate(*pair_and_out, scratch=scratch, progress=stop)
    sent = hub.sent("safetensors")
    summary = lox_stream.extrapolate(*pair_and_out, scratch=scratch, resume=True)
    assert 0 < summary.written_bytes < summary.totals.n_bytes
    assert weights(tmp_path / "out") == right
    if scratch is None:
        assert hub.sent("safetensors") == sent, "what is in the cache is not fetched again"


def test_the_converter_takes_names_of_the_hub(hub, know, pair, right, tmp_path):
    know(hub.url)
    converter = LoxConverter("org/base", "org/aligned@v1")
    for name, data in right.items():
        (tmp_path / name).write_bytes(data)
        made, expected = converter.process(load_file(pair[1] / name)), load_file(tmp_path / name)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[one], expected[one]) for one in made)


@pytest.mark.parametrize("quiet", [["--quiet"], []], ids=["quiet", "loud"])
def test_quiet_is_quiet_and_else_there_are_bars(quiet, hub, tmp_path):
    """With a variable of huggingface_hub that shows bars where there is no terminal."""
    ran = lox(hub, tmp_path, *RUN, *quiet, TQDM_POSITION="-1")
    assert ran.returncode == 0, ran.stderr
    assert ("files" in ran.stderr, ran.stderr == "") == (not quiet, bool(quiet))
