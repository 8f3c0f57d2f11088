"""The whole engine on small pairs: the bytes do not depend on how the work is done, and nothing is half-published."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from exactly import extrapolated
from folders import write
from safetensors.torch import load_file, save_file

import lox_stream
from lox_stream import (
    Cancelled,
    DataError,
    DeviceError,
    LoxError,
    MemoryBudgetError,
    OptionError,
    Options,
    ResumeError,
    pipeline,
)
from lox_stream.synthetic import llama_shapes, write_pair

MIB = 1 << 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small Llama pair, base in one file and aligned in three shards."""
    shapes = llama_shapes(208, 216, 3, 512, 32)
    return write_pair(tmp_path_factory.mktemp("pair"), shapes, base_shards=1, aligned_shards=3)


@pytest.fixture(scope="module")
def reference(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    lox_stream.extrapolate(*pair, out)
    return weights(out)


def weights(folder):
    """The weight files' bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def loaded(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("host", [1, 4])
@pytest.mark.parametrize("memory", [64 * MIB, 4096 * MIB])
def test_the_bytes_depend_on_neither_threads_nor_memory_nor_the_hosts_torch(
    pair, reference, tmp_path, threads, host, memory
):
    before = torch.get_num_threads()
    torch.set_num_threads(host)
    try:
        lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(threads=threads, memory_bytes=memory))
        assert torch.get_num_threads() == host
    finally:
        torch.set_num_threads(before)
    assert weights(tmp_path / "out") == reference


def test_the_bytes_do_not_depend_on_sharding(pair, reference, tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    save_file(loaded(pair[1]), single / "model.safetensors", metadata={"format": "pt"})
    (single / "config.json").write_bytes((pair[1] / "config.json").read_bytes())
    lox_stream.extrapolate(pair[0], single, tmp_path / "out")
    sharded = lox_stream.stream(*pair)
    together = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, together[name]) for name, tensor in sharded)


def test_a_stream_gives_the_bytes_of_the_files_in_their_order(pair, reference, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out")
    files = loaded(tmp_path / "out")
    streamed = list(lox_stream.stream(*pair, options=Options(threads=3)))
    plan = lox_stream.plan(*pair)
    assert [name for name, _ in streamed] == [step.name for step in plan.steps]
    for name, tensor in streamed:
        assert tensor.dtype == files[name].dtype
        assert torch.equal(tensor, files[name])


def test_closing_a_stream_leaves_no_thread(pair):
    stream = lox_stream.stream(*pair)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lox-")]


def test_a_stream_holds_no_more_than_its_budget(pair, monkeypatch):
    """With a budget of one tensor, the work waits for the caller."""
    started = []
    real = pipeline.process

    def process(steps, *args):
        started.extend(steps)
        return real(steps, *args)

    monkeypatch.setattr(pipeline, "process", process)
    stream = lox_stream.stream(*pair, options=Options(threads=2, memory_bytes=6 * MIB))
    next(stream)
    assert len(started) <= 4
    stream.close()


def test_the_inputs_are_opened_read_only_and_never_touched(pair, tmp_path):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for root in pair for path in root.iterdir()}
    lox_stream.extrapolate(*pair, tmp_path / "out")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for root in pair for path in root.iterdir()}


def test_progress_counts_up_to_the_whole(pair, tmp_path):
    seen = []
    lox_stream.extrapolate(*pair, tmp_path / "out", progress=seen.append)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[-1].done_tensors == seen[-1].total_tensors


def test_a_run_that_is_cancelled_is_resumed_to_the_same_bytes(pair, reference, tmp_path):
    out, cancel = tmp_path / "out", threading.Event()

    def progress(state):
        if state.done_tensors >= 5:
            cancel.set()

    with pytest.raises(Cancelled):
        lox_stream.extrapolate(*pair, out, progress=progress, cancel=cancel, options=Options(threads=1))
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("*.safetensors"))
    summary = lox_stream.extrapolate(*pair, out, resume=True, options=Options(threads=2))
    assert weights(out) == reference
    assert summary.written_bytes < summary.totals.n_bytes


def test_an_error_while_computing_leaves_nothing_published_and_is_resumable(pair, reference, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", pipeline.process, []

    def process(steps, *args):
        calls.append(steps)
        if len(calls) == 8:
            raise OSError(5, "Input/output error")
        return real(steps, *args)

    monkeypatch.setattr(pipeline, "process", process)
    with pytest.raises((OSError, LoxError)):
        lox_stream.extrapolate(*pair, out)
    assert not list(out.glob("*.safetensors"))
    assert not (out / "lox_stream.json").exists()
    monkeypatch.undo()
    lox_stream.extrapolate(*pair, out, resume=True)
    assert weights(out) == reference


def test_alpha_zero_is_a_byte_copy(pair, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(alpha=0.0))
    assert weights(tmp_path / "out") == weights(pair[1])


def test_rank_zero_is_task_arithmetic_in_float32(pair, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(rank=0, alpha=0.5))
    base, aligned, out = (loaded(folder) for folder in (*pair, tmp_path / "out"))
    for name, w1 in aligned.items():
        expected = w1 if w1.ndim < 2 else (w1.float() + 0.5 * (w1.float() - base[name].float())).to(w1.dtype)
        assert torch.equal(out[name], expected), name


def test_what_is_skipped_is_copied_and_the_rest_is_as_without(pair, reference, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(skip=("model.embed_tokens.weight",)))
    out, aligned = loaded(tmp_path / "out"), loaded(pair[1])
    assert torch.equal(out["model.embed_tokens.weight"], aligned["model.embed_tokens.weight"])
    streamed = dict(lox_stream.stream(*pair))
    assert all(torch.equal(out[name], streamed[name]) for name in out if name != "model.embed_tokens.weight")


def test_only_limits_the_work_to_what_it_names(pair, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(only=("*.q_proj.weight",)))
    out, aligned = loaded(tmp_path / "out"), loaded(pair[1])
    changed = {name for name in out if not torch.equal(out[name], aligned[name])}
    assert changed == {name for name in out if name.endswith("q_proj.weight")}


def test_stacks_convolutions_vectors_and_integers(tmp_path):
    """Three dimensions are a stack of matrices, four one flattened matrix; the rest is copied."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "experts": torch.randn(3, 40, 30, generator=generator),
        "conv": torch.randn(20, 5, 3, 3, generator=generator),
        "norm": torch.randn(40, generator=generator),
        "ids": torch.arange(12).reshape(3, 4),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "empty": torch.zeros(0, 7),
    }
    aligned = {
        name: t + 0.01 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in base.items()
    }
    write(tmp_path / "base", base)
    write(tmp_path / "aligned", aligned)
    out = dict(lox_stream.stream(tmp_path / "base", tmp_path / "aligned", options=Options(rank=2, alpha=1.0)))

    for i in range(3):
        right = extrapolated(aligned["experts"][i], base["experts"][i], 2, 1.0)
        assert torch.allclose(out["experts"][i].double(), right, atol=1e-5)
    flat = extrapolated(aligned["conv"].reshape(20, 45), base["conv"].reshape(20, 45), 2, 1.0).reshape(20, 5, 3, 3)
    assert torch.allclose(out["conv"].double(), flat, atol=1e-5)
    for name in ("norm", "ids", "mask", "empty"):
        assert torch.equal(out[name], aligned[name])


def test_a_stack_with_one_unchanged_matrix_is_written_whole(tmp_path):
    base = torch.randn(3, 20, 20)
    aligned = base + 0.01 * torch.randn(3, 20, 20)
    aligned[1] = base[1]
    write(tmp_path / "base", {"experts": base})
    write(tmp_path / "aligned", {"experts": aligned})
    lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    out = loaded(tmp_path / "out")["experts"]
    assert torch.equal(out[1], aligned[1])
    assert not torch.equal(out[0], aligned[0])
    assert not torch.equal(out[2], aligned[2])


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)]
)
def test_the_sides_may_differ_in_dtype_and_the_output_has_aligneds(tmp_path, dtypes):
    w0 = torch.randn(50, 40, dtype=torch.float64)
    w1 = w0 + 0.1 * torch.randn(50, 40, dtype=torch.float64)
    write(tmp_path / "base", {"w": w0.to(dtypes[0])})
    write(tmp_path / "aligned", {"w": w1.to(dtypes[1])})
    out = dict(lox_stream.stream(tmp_path / "base", tmp_path / "aligned"))["w"]
    assert out.dtype == dtypes[1]
    delta = w1.to(dtypes[1]).double() - w0.to(dtypes[0]).double()
    u, s, vh = torch.linalg.svd(delta)
    exact = w1.to(dtypes[1]).double() + 1.25 * (u[:, :6] * s[:6]) @ vh[:6]
    assert torch.allclose(out.double(), exact, rtol=2 * torch.finfo(dtypes[1]).eps, atol=1e-3)


def test_identical_tensors_are_copied_and_counted(tmp_path):
    w = torch.randn(30, 30)
    write(tmp_path / "base", {"a": w, "b": w.clone()})
    write(tmp_path / "aligned", {"a": w, "b": w + 0.01 * torch.randn(30, 30)})
    summary = lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    assert summary.totals.identical == 1
    assert summary.totals.extrapolated == 1
    assert torch.equal(loaded(tmp_path / "out")["a"], w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stops_the_run_with_name_index_and_way_out(tmp_path, bad):
    w0 = torch.randn(30, 20)
    w1 = w0 + 0.01
    w1[4, 5] = bad
    write(tmp_path / "base", {"w": w0})
    write(tmp_path / "aligned", {"w": w1})
    with pytest.raises(DataError, match=rf"w: aligned has {bad} at \[4, 5\].*--on-nonfinite copy.*--skip 'w'"):
        lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    options = Options(on_nonfinite="copy")
    summary = lox_stream.extrapolate(
        tmp_path / "base", tmp_path / "aligned", tmp_path / "out", options=options, resume=True
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "aligned" / "model.safetensors"
    ).read_bytes()
    assert any("copied and not extrapolated" in warning for warning in summary.warnings)


def test_an_output_that_overflows_is_copied_when_asked(tmp_path):
    """Found only after tiles were written: the tensor is written anew."""
    w0 = torch.full((700, 800), 60000.0, dtype=torch.float16)
    w1 = w0.clone()
    w1[-1] = 65000.0
    write(tmp_path / "base", {"w": w0})
    write(tmp_path / "aligned", {"w": w1})
    with pytest.raises(DataError, match="beyond the range of float16"):
        lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    options = Options(on_nonfinite="copy")
    lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "copied", options=options)
    assert torch.equal(loaded(tmp_path / "copied")["w"], w1)


def test_a_base_that_is_not_the_base_brings_a_warning(tmp_path):
    write(tmp_path / "base", {"w": torch.randn(40, 40)})
    write(tmp_path / "aligned", {"w": torch.randn(40, 40)})
    summary = lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    assert any("right base" in warning for warning in summary.warnings)


def test_low_retention_is_said_with_its_way_out(tmp_path):
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(200, 200, generator=generator).bfloat16()
    w1 = (
        w0.float() + 2e-4 * torch.randn(200, 1, generator=generator) * torch.randn(1, 200, generator=generator)
    ).bfloat16()
    write(tmp_path / "base", {"w": w0})
    write(tmp_path / "aligned", {"w": w1})
    options = Options(alpha=0.05)
    summary = lox_stream.extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out", options=options)
    assert summary.totals.retention < 0.6
    assert any("--rounding stochastic" in warning for warning in summary.warnings)


def test_a_file_that_is_cut_while_it_is_used_gives_an_error_and_no_bytes(pair, tmp_path):
    aligned = shutil.copytree(pair[1], tmp_path / "aligned")
    plan = lox_stream.plan(pair[0], aligned, tmp_path / "out")
    shard = max(aligned.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    with pytest.raises(DataError, match="was cut while it was in use"):
        lox_stream.execute(plan)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_exact_refuses_beforehand_what_does_not_fit(pair, tmp_path):
    with pytest.raises(MemoryBudgetError, match="--memory"):
        lox_stream.plan(*pair, tmp_path / "out", options=Options(svd="exact", memory_bytes=1 << 16))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_an_error_and_writes_nothing(pair, tmp_path):
    with pytest.raises(DeviceError, match="--device cpu"):
        lox_stream.extrapolate(*pair, tmp_path / "out", options=Options(device="cuda"))
    with pytest.raises(DeviceError):
        lox_stream.stream(*pair, options=Options(device="cuda:1"))
    assert not (tmp_path / "out").exists()


def test_stochastic_bytes_depend_on_the_seed_alone(pair, tmp_path):
    def run(name, **more):
        options = Options(rounding="stochastic", **more)
        lox_stream.extrapolate(*pair, tmp_path / name, options=options)
        return weights(tmp_path / name)

    first = run("a", threads=1)
    assert first == run("b", threads=3, memory_bytes=64 * MIB)
    assert first != run("c", seed=1)


def test_a_tolerance_that_is_not_reached_is_counted(pair, tmp_path):
    summary = lox_stream.extrapolate(
        *pair, tmp_path / "out", options=Options(tolerance=1e-9, only=("*.q_proj.weight",))
    )
    assert len(summary.totals.not_converged) == 3
    assert any("did not reach the tolerance" in warning for warning in summary.warnings)


def test_the_manifest_knows_every_tensor(pair, tmp_path):
    lox_stream.extrapolate(*pair, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "lox_stream.json").read_text())
    assert set(manifest["tensors"]) == set(loaded(pair[1]))
    q = manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    (matrix,) = q["matrices"]
    assert len(matrix["singular_values"]) == len(matrix["radius"]) == 6
    assert 0 < matrix["energy"] <= 1
    assert matrix["method"] == "krylov"
    assert matrix["passes"] >= 4
    assert matrix["converged"]
    assert matrix["unique"]
    (narrow,) = manifest["tensors"]["model.layers.0.self_attn.k_proj.weight"]["matrices"]
    assert (narrow["method"], narrow["passes"]) == ("gram", 0)


@pytest.mark.parametrize("name", ["Options", "extrapolate", "plan", "stream", "LoxError", "truncated_svd"])
def test_names_of_the_library_are_found(name):
    assert name in lox_stream.__all__
    assert getattr(lox_stream, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lox_stream.nothing  # noqa: B018


def test_the_callers_event_is_read_and_never_set(pair):
    cancel = threading.Event()
    stream = lox_stream.stream(*pair, cancel=cancel)
    next(stream)
    stream.close()
    assert not cancel.is_set()
    assert len(list(lox_stream.stream(*pair, cancel=cancel))) == len(lox_stream.plan(*pair).steps)


def test_a_plan_without_a_folder_cannot_be_executed(pair, tmp_path):
    with pytest.raises(OptionError, match="no output folder"):
        lox_stream.execute(lox_stream.plan(*pair))
    with pytest.raises(OptionError, match="--resume and --overwrite"):
        lox_stream.execute(lox_stream.plan(*pair, tmp_path / "out"), resume=True, overwrite=True)


def test_a_torch_that_rounds_products_further_is_refused(pair):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(DeviceError, match="set_float32_matmul_precision"):
            lox_stream.stream(*pair)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_errors_travel_between_processes(tmp_path):
    with pytest.raises(lox_stream.CheckpointError) as caught:
        lox_stream.plan(tmp_path / "no", tmp_path / "where")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_the_public_names_are_listed():
    assert set(lox_stream.__all__) <= set(dir(lox_stream))


def test_other_weights_of_the_same_shape_are_not_resumed(pair, tmp_path):
    """All fine-tunes of one model have the same header."""
    out, cancel = tmp_path / "out", threading.Event()
    with pytest.raises(Cancelled):
        lox_stream.extrapolate(*pair, out, progress=lambda state: cancel.set(), cancel=cancel)
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    for path in other.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        path.write_bytes(data)
    with pytest.raises(ResumeError, match="not the file that the run began with"):
        lox_stream.extrapolate(pair[0], other, out, resume=True)


def test_an_input_that_changes_during_the_run_is_named(pair, tmp_path):
    aligned = tmp_path / "aligned"
    shutil.copytree(pair[1], aligned)
    shard = min(aligned.glob("*.safetensors"))

    def touch(state):
        os.utime(shard, ns=(1, 1))

    summary = lox_stream.extrapolate(pair[0], aligned, tmp_path / "out", progress=touch)
    assert any(shard.name in warning and "modified" in warning for warning in summary.warnings)


def test_the_same_model_twice_brings_a_warning(pair, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(pair[1], again)
    summary = lox_stream.extrapolate(again, pair[1], tmp_path / "out")
    assert any("wrong model" in warning for warning in summary.warnings)
