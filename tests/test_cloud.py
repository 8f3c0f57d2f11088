"""Models in buckets and on web servers, against moto's S3 and servers on the loopback interface, with faults."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import lox_stream
from lox_stream import DataError, remote
from lox_stream.synthetic import llama_shapes, write_pair

pytestmark = [pytest.mark.examples, pytest.mark.filterwarnings("default")]
pytest.importorskip("obstore", reason="`make examples` has an environment with it")
boto3 = pytest.importorskip("boto3", reason="`make examples` has an environment with it")
moto = pytest.importorskip("moto.server", reason="`make examples` has an environment with it")

import small_web  # noqa: E402
from faulty import in_front_of  # noqa: E402

logging.getLogger("werkzeug").setLevel(logging.ERROR)
INPUTS = ["--base", "s3://models/base", "--aligned", "s3://models/aligned"]
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, aligned = write_pair(folder, llama_shapes(64, 96, 6, 2048, 32), aligned_shards=4)
    (aligned / "tokenizer.json").write_text("{}" * 1000)
    (aligned / "notes.gguf").write_bytes(bytes(100_000))
    return base, aligned


@pytest.fixture(scope="module")
def server():
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()
    running.stop()


@pytest.fixture(scope="module")
def client(server, pair):
    client = boto3.client(
        "s3",
        endpoint_url="http://{}:{}".format(*server),
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="models")
    for side, folder in zip(("base", "aligned"), pair, strict=True):
        for path in folder.iterdir():
            client.upload_file(str(path), "models", f"{side}/{path.name}")
    return client


@pytest.fixture
def proxy(server, client):
    for row in client.list_objects_v2(Bucket="models").get("Contents", []):
        if row["Key"].startswith("out"):
            client.delete_object(Bucket="models", Key=row["Key"])
    with in_front_of(*server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    """What a run writes whose inputs lie here."""
    folder = tmp_path_factory.mktemp("right")
    words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "out", "--quiet"]
    subprocess.run([sys.executable, "-P", "-m", "lox_stream", *words], cwd=folder, check=True, timeout=120)
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def environment(folder: Path, url: str, **more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(folder / "none")}
    return known | nowhere | KEYS | {"AWS_ENDPOINT_URL": url, "TMPDIR": str(folder)} | more


def lox(folder: Path, url: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lox_stream", *words]
    env = environment(folder, url, **more)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


def same(found: dict[str, bytes], right: dict[str, bytes]) -> bool:
    """All but what tells times and places."""
    told = {"README.md", "lox_stream.json"}
    assert found.keys() == right.keys()
    return all(found[name] == right[name] for name in right.keys() - told)


def there(client, prefix: str) -> dict[str, bytes]:
    rows = client.list_objects_v2(Bucket="models", Prefix=f"{prefix}/").get("Contents", [])
    return {
        row["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket="models", Key=row["Key"])["Body"].read()
        for row in rows
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pair_in_a_bucket_gives_the_bytes_of_one_on_the_disk(proxy, right, tmp_path):
    ran = lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "out", "--scratch", "scratch")
    assert ran.returncode == 0, ran.stderr
    assert same(files(tmp_path / "out"), right)
    assert list((tmp_path / "scratch").iterdir()) == []
    inputs = json.loads((tmp_path / "out" / "lox_stream.json").read_text())["inputs"]
    assert [inputs[side]["path"] for side in ("base", "aligned")] == ["s3://models/base", "s3://models/aligned"]
    assert not any("gguf" in path for _, path, n_bytes in proxy.log if n_bytes > 10_000)
    again = lox(tmp_path, proxy.url, "verify", "out")
    assert again.returncode == 0, again.stdout


def test_a_dry_run_and_inspect_read_headers_alone(proxy, pair, tmp_path):
    ran = lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "s3://models/out", "--dry-run", "--json")
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert (plan["base"], plan["aligned"], plan["out"]) == (*INPUTS[1::2], "s3://models/out")
    seen = lox(tmp_path, proxy.url, "inspect", "s3://models/aligned", "--json")
    assert json.loads(seen.stdout)["path"] == "s3://models/aligned"
    assert max(n_bytes for _, _, n_bytes in proxy.log) <= 1 << 16


def test_an_output_in_a_bucket_is_that_of_a_folder_with_the_index_and_manifest_last(proxy, client, right, tmp_path):
    ran = lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "s3://models/out", "--scratch", "scratch")
    assert ran.returncode == 0, ran.stderr
    assert same(there(client, "out"), right)
    puts = [path.partition("?")[0].rpartition("/")[2] for method, path, _ in proxy.log if method == "PUT"]
    assert puts[0] == "lox_stream.journal"
    assert puts[-2:] == ["model.safetensors.index.json", "lox_stream.json"]
    for name, data in there(client, "out").items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert lox(tmp_path, proxy.url, "verify", "back").returncode == 0, "the manifest tells every byte"


@pytest.mark.parametrize("fault", ["cut", "429", "503", "slow", "short", "wrong"])
def test_faults_of_reading_that_pass_change_nothing(fault, proxy, right, tmp_path):
    proxy.faults = [fault, "", fault]
    ran = lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "out", "--quiet")
    assert ran.returncode == 0, ran.stderr
    assert proxy.faults == []
    assert same(files(tmp_path / "out"), right)


@pytest.mark.parametrize("fault", ["429", "503", "cut", "slow"])
def test_faults_of_writing_that_pass_change_nothing(fault, proxy, pair, client, right, tmp_path):
    proxy.faults = [fault, "", fault]
    words = ["run", "--base", str(pair[0]), "--aligned", str(pair[1]), "--out", "s3://models/out", "--quiet"]
    ran = lox(tmp_path, proxy.url, *words)
    assert ran.returncode == 0, ran.stderr
    assert proxy.faults == []
    assert same(there(client, "out"), right)


def test_faults_that_stay_leave_no_half_model_and_the_run_goes_on(proxy, client, right, tmp_path):
    words = ["run", *INPUTS, "--out", "s3://models/out", "--scratch", "scratch", "--scratch-size", "2MB"]
    proxy.uploads_left = 2
    broken = lox(tmp_path, proxy.url, *words)
    assert broken.returncode == 1, broken.stdout
    assert "s3://models/" in broken.stderr
    assert "bug" not in broken.stderr
    left = there(client, "out")
    assert "lox_stream.journal" in left
    assert not {"lox_stream.json", "model.safetensors.index.json", "config.json"} & left.keys()
    arrived = [name for name in left if name.endswith(".safetensors")]
    assert 2 <= len(arrived) < 4
    proxy.uploads_left = None
    refused = lox(tmp_path, proxy.url, *words)
    assert refused.returncode == 1
    assert "go on with --resume" in refused.stderr.replace("\n", " ")
    other = lox(tmp_path, proxy.url, *words, "--resume", "--rank", "5")
    assert "this is another run" in other.stderr
    proxy.log = []
    ran = lox(tmp_path, proxy.url, *words, "--resume", "--json")
    assert ran.returncode == 0, ran.stderr
    assert same(there(client, "out"), right)
    sent = {path.partition("?")[0].rpartition("/")[2] for method, path, _ in proxy.log if method == "PUT"}
    assert not sent & {*arrived}, "what has arrived is not sent again"
    assert json.loads(ran.stdout)["written_bytes"] < sum(map(len, right.values()))


def test_a_killed_run_goes_on_from_another_scratch(proxy, client, right, tmp_path):
    words = ["run", *INPUTS, "--out", "s3://models/out", "--scratch-size", "2MB"]
    proxy.faults = ["", "", "", "slow", "slow", "slow", "slow", "slow", "slow"]
    command = [sys.executable, "-P", "-m", "lox_stream", *words, "--scratch", "one"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path, proxy.url))
    while not any(name.startswith("lox_stream.parts/") for name in there(client, "out")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "lox_stream.json" not in there(client, "out")
    proxy.faults = []
    ran = lox(tmp_path, proxy.url, *words, "--scratch", "another", "--resume", "--quiet")
    assert ran.returncode == 0, ran.stderr
    assert same(there(client, "out"), right)
    assert len(list((tmp_path / "one").iterdir())) == 1
    assert lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "out", "--scratch", "one", "--quiet").returncode == 0
    assert list((tmp_path / "one").iterdir()) == [], "what the killed run left was swept"


def test_a_model_that_changes_meanwhile_is_noticed(proxy, client, pair, tmp_path):
    for name in ("model.safetensors", "config.json"):
        client.upload_file(str(pair[0] / name), "models", f"changing/{name}")
    data = (pair[0] / "model.safetensors").read_bytes()
    words = ["run", "--base", "s3://models/changing", "--aligned", str(pair[1]), "--out", "out", "--overwrite"]
    proxy.faults = ["503"] * 2
    command = [sys.executable, "-P", "-m", "lox_stream", *words]
    env = environment(tmp_path, proxy.url)
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    while len(proxy.faults) == 2:
        time.sleep(0.01)
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=data[:-1] + b"\0")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1, said
    assert "was modified since the run looked at it" in said


def test_the_index_comes_last_where_one_part_is_all(proxy, client, pair, tmp_path):
    words = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--max-shard-size", "1GB", "--quiet"]
    assert lox(tmp_path, proxy.url, "run", *words, "--out", "s3://models/out").returncode == 0
    puts = [path.partition("?")[0].rpartition("/")[2] for method, path, _ in proxy.log if method == "PUT"]
    weights = [name for name in puts if name.endswith(".safetensors")]
    assert len(weights) == 1
    assert puts[-1] == "lox_stream.json"
    assert all(puts.index(name) > puts.index(weights[0]) for name in puts if name.endswith(".index.json"))


def test_objects_that_stand_for_folders_and_checkpoints_of_trainers_are_left_out(proxy, client, pair, right, tmp_path):
    for name in ("", "sub/", "checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"):
        client.put_object(Bucket="models", Key=f"trained/{name}", Body=b"" if not name or name[-1] == "/" else b"x" * 9)
    client.put_object(Bucket="models", Key="trained/sub/notes.json", Body=b"{}")
    for path in pair[1].iterdir():
        client.upload_file(str(path), "models", f"trained/{path.name}")
    words = ["run", "--base", str(pair[0]), "--aligned", "s3://models/trained", "--out", "out", "--quiet"]
    ran = lox(tmp_path, proxy.url, *words)
    assert ran.returncode == 0, ran.stderr
    assert not any("checkpoint-500" in path for _, path, _ in proxy.log)
    assert all(data == right[name] for name, data in files_of(tmp_path / "out").items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_run_that_is_stopped_leaves_no_scratch(proxy, tmp_path):
    proxy.faults = ["", "", "slow", "slow", "slow", "slow"]
    command = [sys.executable, "-P", "-m", "lox_stream", "run", *INPUTS, "--out", "out", "--scratch", "scratch"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path, proxy.url), stderr=subprocess.PIPE)
    while not (tmp_path / "out" / "lox_stream.journal").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_damaged_manifest_is_no_reason_not_to_replace_it(proxy, client, right, tmp_path):
    words = ["run", *INPUTS, "--out", "s3://models/out", "--quiet"]
    assert lox(tmp_path, proxy.url, *words).returncode == 0
    client.put_object(Bucket="models", Key="out/lox_stream.json", Body=b'{"shards": 3')
    ran = lox(tmp_path, proxy.url, *words, "--overwrite")
    assert ran.returncode == 0, ran.stderr
    assert same(there(client, "out"), right)


def test_several_alphas_are_shipped_from_one_solve(proxy, client, pair, tmp_path):
    words = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--alpha", "0.5,1.25", "--quiet"]
    assert lox(tmp_path, proxy.url, "run", *words, "--out", "s3://models/out-{alpha}").returncode == 0
    assert lox(tmp_path, proxy.url, "run", *words, "--out", "out-{alpha}").returncode == 0
    for alpha in ("0.5", "1.25"):
        assert same(there(client, f"out-{alpha}"), files(tmp_path / f"out-{alpha}"))


def test_an_adapter_goes_to_a_bucket_and_comes_back(proxy, client, right, pair, tmp_path):
    ran = lox(tmp_path, proxy.url, "adapter", *INPUTS, "--out", "s3://models/out-adapter", "--quiet")
    assert ran.returncode == 0, ran.stderr
    assert {"adapter_config.json", "adapter_model.safetensors", "lox_stream.json"} <= there(
        client, "out-adapter"
    ).keys()
    words = ["apply", "--adapter", "s3://models/out-adapter", "--aligned", "s3://models/aligned", "--out", "out"]
    ran = lox(tmp_path, proxy.url, *words)
    assert ran.returncode == 0, ran.stderr
    found = files(tmp_path / "out")
    assert all(found[name] == data for name, data in right.items() if name.endswith(".safetensors"))
    seen = lox(tmp_path, proxy.url, *words[:-1], "new", "--dry-run", "--json")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["aligned"] == "s3://models/out-adapter"


def test_weights_of_torch_are_refused_before_they_are_fetched(proxy, client, tmp_path):
    client.put_object(Bucket="models", Key="torch/pytorch_model.bin", Body=bytes(200_000))
    ran = lox(tmp_path, proxy.url, "run", "--base", "s3://models/torch", *INPUTS[2:], "--out", "out")
    assert ran.returncode == 1
    assert "its weights are in pytorch_model.bin, expected *.safetensors" in ran.stderr.replace("\n", " ")
    assert not any(n_bytes > 100_000 for _, _, n_bytes in proxy.log)


def test_what_is_in_the_way_is_refused_and_replaced_on_request(proxy, client, right, tmp_path):
    words = ["run", *INPUTS, "--out", "s3://models/out", "--quiet"]
    client.put_object(Bucket="models", Key="out/model-00009-of-00009.safetensors", Body=b"another model")
    for more, said in (([], "expected nothing"), (["--overwrite"], "holds weights of another model")):
        ran = lox(tmp_path, proxy.url, *words, *more)
        assert ran.returncode == 1
        assert said in ran.stderr.replace("\n", " ")
    client.delete_object(Bucket="models", Key="out/model-00009-of-00009.safetensors")
    assert lox(tmp_path, proxy.url, *words, "--max-shard-size", "90kB").returncode == 0
    assert len(there(client, "out")) > len(right)
    finished = lox(tmp_path, proxy.url, *words, "--max-shard-size", "90kB", "--resume")
    assert "there is nothing to resume" in finished.stderr
    assert lox(tmp_path, proxy.url, *words, "--overwrite").returncode == 0
    assert same(there(client, "out"), right), "the files of the other layout are gone"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "s3://models/nothing"], r"s3://models/nothing: nothing is there, .* expected model\.safetensors"),
        (["--base", "s3://no-such-bucket/x"], r"s3://no-such-bucket/x: there is no such bucket"),
        (["--out", "https://example.com/x"], r"nobody can write to; expected s3:// or a folder"),
        (["--out", "s3://models/aligned/lox", "--overwrite"], r"is where an input lies"),
        (["--base", "https://user:pw@localhost/x"], r"https://localhost/x: is no address .*without a password"),
        (["--out", "https://user:pw@localhost/x"], r"https://localhost/x, which nobody can write to"),
        (["--out", "gs://models/x"], r"gs://models/x, which nobody can write to"),
        (["--base", "S3://models/nothing"], r"s3://models/nothing: nothing is there"),
        (["--out", "s3://models/al%69gned", "--overwrite"], r"s3://models/al: is no address|is no address that can"),
        (["--out", "s3://models/x/../aligned", "--overwrite"], r"is no address that can be read"),
        (["--base", "https://host:abc/x"], r"https://host:abc/x: is no address"),
        (["--out", "s3://models/out", "--dry-run", "--resume"], r"--dry-run and --resume are both given"),
        (["--out", "s3://models/out", "--part", "1/2"], r"--part is given for an output in a bucket"),
        (["--out", "s3://models/out", "--scratch-size", "300kB"], r"scratch: "),
    ],
)
def test_what_cannot_be_is_said(words, said, proxy, tmp_path):
    ran = lox(tmp_path, proxy.url, "run", *INPUTS, "--out", "out", *words)
    assert ran.returncode in (1, 2), ran.stdout
    assert re.search(said, ran.stderr.replace("\n", " ")), ran.stderr
    assert "pw" not in ran.stderr
    assert "bug" not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_commands_that_need_a_folder_say_so(proxy, tmp_path):
    ran = lox(tmp_path, proxy.url, "bench", *INPUTS)
    assert ran.returncode == 1
    assert "s3://models/base: is an address" in ran.stderr


def test_keys_come_from_a_profile_where_the_environment_has_none(proxy, right, tmp_path):
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = ofaprofile\naws_secret_access_key = x\n")
    profile = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_PROFILE": "work"}
    env = environment(tmp_path, proxy.url, **profile)
    env = {name: value for name, value in env.items() if name not in KEYS} | {"AWS_REGION": "us-east-1"}
    command = [sys.executable, "-P", "-m", "lox_stream", "run", *INPUTS, "--out", "out", "--quiet"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert any("ofaprofile" in one for one in proxy.authorizations)


def test_a_pair_on_a_web_server(pair, right, tmp_path):
    with small_web.serving(pair[0].parent) as url:
        words = ["--base", f"{url}/base", "--aligned", f"{url}/aligned", "--out", "out"]
        ran = lox(tmp_path, "", "run", *words)
        assert ran.returncode == 0, ran.stderr
        one = lox(tmp_path, "", "inspect", f"{url}/base/model.safetensors", "--json")
        assert json.loads(one.stdout)["path"] == f"{url}/base/model.safetensors"
    assert same(files(tmp_path / "out"), right)


def test_a_web_server_without_ranges_is_said(pair, tmp_path):
    with small_web.serving(pair[0].parent, ranges=False) as url:
        ran = lox(tmp_path, "", "run", "--base", f"{url}/base", "--aligned", f"{url}/aligned", "--out", "out")
    assert ran.returncode == 1
    assert "range" in ran.stderr.lower()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of 127.0.0.1, in a folder with its key; a machine trusts it where SSL_CERT_FILE names it."""
    folder = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    names = ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*made, *names, *leaf], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.fixture
def web(pair, certificate):
    """A proxy in front of a web server, over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with small_web.serving(pair[0].parent) as url:
        where = urlsplit(url)
        with in_front_of(where.hostname, where.port, context) as proxy:
            yield proxy


def test_a_certificate_that_nobody_vouches_for_is_refused(web, tmp_path):
    ran = lox(tmp_path, "", "run", "--base", f"{web.url}/base", "--aligned", f"{web.url}/aligned", "--out", "out")
    assert ran.returncode == 1
    assert "certificate" in ran.stderr.lower()
    assert web.log == []


@pytest.mark.parametrize("fault", ["", "cut", "429", "503", "slow", "short"])
def test_faults_of_a_web_server_that_pass_change_nothing(fault, web, certificate, right, tmp_path, monkeypatch):
    """Over TLS that is trusted. Wrong bytes are not among them: a web server promises no checksum."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    web.faults = [fault, "", fault]
    lox_stream.extrapolate(f"{web.url}/base", f"{web.url}/aligned", tmp_path / "out", scratch=tmp_path / "scratch")
    assert web.faults == []
    assert same(files(tmp_path / "out"), right)


def test_a_run_from_the_web_that_broke_goes_on(web, certificate, right, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    pair_and_out = (f"{web.url}/base", f"{web.url}/aligned", tmp_path / "out")
    room = {"scratch": tmp_path / "scratch", "scratch_bytes": 950_000}  # base, and not all of aligned at once

    def breaks(reach) -> None:
        if reach.done_tensors >= 5 and not web.faults:
            web.faults += ["503"] * 1000

    with pytest.raises(DataError, match=r"127\.0\.0\.1(.|\n)*same command with --resume goes on"):
        lox_stream.extrapolate(*pair_and_out, **room, progress=breaks)
    assert not (tmp_path / "out" / "lox_stream.json").exists()
    web.faults.clear()
    summary = lox_stream.extrapolate(*pair_and_out, **room, resume=True)
    assert 0 < summary.written_bytes < summary.totals.n_bytes
    assert same(files(tmp_path / "out"), right)


def test_without_obstore_the_extra_is_named(tmp_path):
    (tmp_path / "obstore.py").write_text("raise ImportError\n")
    command = [sys.executable, "-m", "lox_stream", "run", *INPUTS, "--out", "out"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 1
    assert "which is the extra [cloud]: pip install 'obstore>=0.8' 'boto3>=1.34'" in ran.stderr.replace("\n", " ")


LIBRARY = """
import lox_stream
summary = lox_stream.extrapolate("s3://models/base", "s3://models/aligned", "s3://models/out", scratch="scratch")
assert summary.totals.extrapolated == 43, summary.totals
lox_stream.extrapolate("s3://models/base", "s3://models/aligned", "out", scratch_bytes=1 << 30)
try:
    lox_stream.open("s3://models/base", "s3://models/aligned")
except lox_stream.CheckpointError as error:
    assert "is an address" in str(error)
"""


def test_the_library_takes_addresses_too(proxy, client, right, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", LIBRARY],
        cwd=tmp_path,
        env=environment(tmp_path, proxy.url),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert same(there(client, "out"), right)
    assert same(files(tmp_path / "out"), right)
