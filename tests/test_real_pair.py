"""The laws on a real pair: SmolLM2-135M before and after safety fine-tuning (`make test-real`).

The pair's folder is LOX_REAL_PAIR, by default build/real/pair, where `make demo-real` puts it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
PAIR = Path(os.environ.get("LOX_REAL_PAIR", ROOT / "build" / "real" / "pair")).resolve()
BASE, ALIGNED = PAIR / "base", PAIR / "aligned"
RANK, ALPHA = 6, 1.25

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (PAIR / "pair.json").exists(), reason=f"no real pair in {PAIR}: `make demo-real` builds it"),
]

SPEC = importlib.util.spec_from_file_location("lox_oracle", ROOT / "benchmarks" / "oracle.py")
oracle = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = oracle  # dataclasses look their module up
SPEC.loader.exec_module(oracle)


def command(out: Path, *options: str, base: Path = BASE, aligned: Path = ALIGNED) -> list[str]:
    paths = ["--base", str(base), "--aligned", str(aligned), "--out", str(out)]
    return [sys.executable, "-P", "-m", "lox_stream", "run", *paths, *options]


def run(out: Path, *options: str, **sides: Path) -> Path:
    done = subprocess.run(command(out, "--quiet", *options, **sides), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def weight_bytes(folder: Path) -> dict[str, bytes]:
    names = [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]
    return {path.name: path.read_bytes() for path in names}


def share(rows) -> float:
    return sum(row.same for row in rows) / sum(row.elements for row in rows)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """LAPACK on these small matrices is faster on one thread, and the oracle then gives the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return run(tmp_path_factory.mktemp("real") / "lox")


@pytest.fixture(scope="module")
def bf16_rows(output):
    return oracle.agreements(BASE, ALIGNED, output, RANK, ALPHA)


def in_fp16(folder: Path, out: Path) -> Path:
    """The checkpoint in `folder` as one float16 file."""
    out.mkdir()
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.to(torch.float16) for name, tensor in load_file(shard).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return out


def test_bf16_elements_are_those_of_the_float64_oracle(bf16_rows):
    assert sum(row.elements for row in bf16_rows) == 134_515_008
    assert share(bf16_rows) >= 0.9995
    assert [(row.name, row.share) for row in bf16_rows if row.gap >= 0.002 and row.share < 0.999] == []


def test_no_bf16_element_is_more_than_an_ulp_away(bf16_rows):
    assert [(row.name, row.worst_ulps) for row in bf16_rows if row.worst_ulps > 1] == []
    assert sum(row.beyond for row in bf16_rows) <= 1e-5 * sum(row.elements for row in bf16_rows)


def test_vectors_are_copied(bf16_rows):
    vectors = [row for row in bf16_rows if row.name.endswith("norm.weight")]
    assert len(vectors) == 61
    assert all(row.same == row.elements for row in vectors)


def test_fp16_elements_are_those_of_the_float64_oracle(tmp_path):
    base, aligned = in_fp16(BASE, tmp_path / "base"), in_fp16(ALIGNED, tmp_path / "aligned")
    out = run(tmp_path / "out", base=base, aligned=aligned)
    rows = oracle.agreements(base, aligned, out, RANK, ALPHA)
    assert share(rows) >= 0.996
    assert [(row.name, row.worst_ulps) for row in rows if row.worst_ulps > 1] == []


def test_rank_0_is_task_arithmetic_in_float32_with_one_rounding(tmp_path):
    result = oracle.Weights(run(tmp_path / "out", "--rank", "0", "--alpha", "0.7"))
    w0, w1 = oracle.Weights(BASE), oracle.Weights(ALIGNED)
    for name in w1:
        expected = w1[name]
        if expected.ndim > 1:
            expected = (expected.float() + 0.7 * (expected.float() - w0[name].float())).to(expected.dtype)
        assert oracle.same_bits(result[name], expected) == expected.numel(), name


def test_transformers_loads_it_without_a_warning_and_its_logits_are_finite(output):
    transformers = pytest.importorskip("transformers")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []
    assert {key: value for key, value in found.items() if value} == {}
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with torch.inference_mode():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


def interrupted(out: Path, stop: signal.Signals, elapsed_s: float) -> int:
    """Exit status of a run on one thread that got `stop` about `elapsed_s` after it had begun to write."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    process = subprocess.Popen(command(out, "--threads", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(elapsed_s)
    process.send_signal(stop)
    return process.wait(timeout=60)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_stopped_resumes_to_the_same_bytes(output, tmp_path, stop, status):
    elapsed_s = 2.0
    while interrupted(tmp_path / "out", stop, elapsed_s) != status:  # it was done before the signal: stop it earlier
        assert elapsed_s > 0.05
        elapsed_s /= 2
        shutil.rmtree(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    run(tmp_path / "out", "--resume")
    assert weight_bytes(tmp_path / "out") == weight_bytes(output)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_analyze_is_the_formulas_in_float64(output):
    """On every seventh matrix; the LoX model stands for what came after alignment."""
    from lox_stream import analyze

    found = analyze(BASE, ALIGNED, finetuned=output)
    base, aligned, later = map(oracle.Weights, (BASE, ALIGNED, output))
    chosen = found.findings[::7]
    assert len(chosen) > 20
    for one in chosen:
        w0, w1, w2 = (side[one.tensor].double() for side in (base, aligned, later))
        u, s, _ = torch.linalg.svd(w1 - w0, full_matrices=False)
        shares = s.square() / s.square().sum()
        assert one.spectrum.values == pytest.approx(s[:32].tolist(), rel=1e-6)
        assert one.spectrum.curve == pytest.approx(shares.cumsum(0)[:32].tolist(), rel=1e-6)
        assert one.entropy_rank[0] == pytest.approx(float((-(shares * shares.log()).nansum()).exp()), rel=1e-5)
        assert one.delta_norm / one.weight_norm == pytest.approx(float(s.norm() / w1.norm()), rel=1e-6)
        for delta, r in ((w1 - w0, one.ours.align), (w2 - w0, one.ours.finetuned)):
            assert r == pytest.approx(float((u[:, :RANK].T @ delta).norm() / delta.norm()), rel=1e-5)
        if one.reference is not None:
            first, second = w1.bfloat16() - w0.bfloat16(), w2.bfloat16() - w1.bfloat16()
            left = torch.linalg.svd(first.double(), full_matrices=False)[0][:, :100]
            for delta, r in ((first, one.reference.align), (first + second, one.reference.finetuned)):
                exact = float((left.T @ delta.double()).norm() / delta.double().norm())
                assert r == pytest.approx(exact, rel=1e-5)
    assert found.findings[0].ours.finetuned > found.findings[0].ours.align, "LoX adds to the leading directions"
