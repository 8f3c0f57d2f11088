"""Tensors for programs: in order or as finished, by name, on demand, for NumPy and by DLPack, in worker processes."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lox_stream
from lox_stream import Cancelled, OptionError, Options, extrapolate, stream
from lox_stream.synthetic import llama_shapes, write_pair

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), llama_shapes(64, 96, 3, 128, 32), aligned_shards=2)


@pytest.fixture(scope="module")
def right(pair, tmp_path_factory):
    """Every tensor as `extrapolate` writes it, in the order of the files."""
    out = extrapolate(*pair, tmp_path_factory.mktemp("out") / "out").out
    found = {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return {step.name: found[step.name] for step in lox_stream.plan(*pair).steps}


def same(tensors, right) -> bool:
    return tensors.keys() == right.keys() and all(torch.equal(tensors[name], right[name]) for name in right)


def test_as_finished_are_the_same_tensors_in_another_order(pair, right):
    finished = list(stream(*pair, ordered=False))
    assert same(dict(finished), right)
    assert [name for name, _ in finished] != list(right), "the smallest come first"
    assert [name for name, _ in stream(*pair)] == list(right)


def test_only_the_names_that_are_wanted_are_read(pair, right, monkeypatch):
    taken = []
    real = lox_stream.streaming._Memory.of.__func__
    monkeypatch.setattr(
        lox_stream.streaming._Memory, "of", classmethod(lambda cls, step: taken.append(step.name) or real(cls, step))
    )
    wanted = [name for name in right if "layers.1." in name] + [NORM]
    assert list(dict(stream(*pair, names=["*.layers.1.*", NORM]))) == wanted
    assert sorted(taken) == sorted(wanted)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.norm.wieght"], r"model\.norm\.wieght is no tensor of .*Did you mean 'model\.norm\.weight'"),
        ("model.norm.weight", r"is one string, 'model\.norm\.weight', expected several"),
    ],
)
def test_a_name_that_is_none_is_an_error_before_the_first_tensor(names, said, pair):
    with pytest.raises(OptionError, match=said):
        stream(*pair, names=names)


def test_a_mapping_computes_what_is_asked_for(pair, right, monkeypatch):
    computed = []
    real = lox_stream.streaming.tensors_of
    monkeypatch.setattr(
        lox_stream.streaming,
        "tensors_of",
        lambda plan, steps, *args: computed.append([step.name for step in steps]) or real(plan, steps, *args),
    )
    opened = lox_stream.open(*pair)
    assert (list(opened), len(opened)) == (list(right), len(right))
    assert EMBEDDING in opened
    assert computed == []
    for _ in range(2):
        assert torch.equal(opened[EMBEDDING], right[EMBEDDING])
    assert computed == [[EMBEDDING]], "the second time it was kept"
    assert same(dict(opened.items()), right)
    with pytest.raises(KeyError, match=r"no such tensor.*embed_tokens"):
        opened["model.embed_tokns.weight"]


def test_what_is_kept_stays_within_the_budget(pair, right):
    opened = lox_stream.open(*pair, cache_bytes=3 * right["model.layers.0.mlp.up_proj.weight"].nbytes)
    for name in right:
        opened[name]
        assert sum(tensor.nbytes for tensor in opened._kept.values()) <= opened._room
    assert len(opened._kept) > 1
    nothing = lox_stream.open(*pair, cache_bytes=0)
    assert torch.equal(nothing[NORM], right[NORM])
    assert not nothing._kept


def test_several_threads_may_ask(pair, right):
    opened = lox_stream.open(*pair)
    found, names = {}, list(right)

    def ask(part):
        for name in names[part::4]:
            found[name] = opened[name]

    threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(found, right)


WORKERS = """
import json, multiprocessing, sys, threading
import lox_stream


def sums(opened):
    return {name: tensor.double().sum().item() for name, tensor in opened.items()}, threading.active_count()


def streamed(pair):
    return {name: tensor.double().sum().item() for name, tensor in lox_stream.stream(*pair, names=["*.layers.0.*"])}


if __name__ == "__main__":
    opened = lox_stream.open(*sys.argv[1:], options=lox_stream.Options(threads=1))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(json.dumps([*pool.apply(sums, [opened]), pool.apply(streamed, [sys.argv[1:]])]))
"""


def test_it_works_in_spawned_workers(pair, right, tmp_path):
    """Each of which gets the mapping pickled, and opens the pair for itself."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    ran = subprocess.run([sys.executable, script, *pair], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    sums, threads, part = json.loads(ran.stdout)
    assert sums == {name: tensor.double().sum().item() for name, tensor in right.items()}
    assert part == {name: value for name, value in sums.items() if ".layers.0." in name}
    assert threads == 1
    opened = lox_stream.open(*pair)
    assert repr(pickle.loads(pickle.dumps(opened))) == repr(opened)


def test_no_thread_is_left_behind(pair):
    before = threading.active_count()
    with contextlib.closing(stream(*pair, ordered=False)) as tensors:
        next(tensors)
    lox_stream.open(*pair)[EMBEDDING]
    cancel = threading.Event()
    tensors = stream(*pair, cancel=cancel)
    next(tensors)
    cancel.set()
    require_threads(before)  # though nobody asks for another tensor
    with pytest.raises(Cancelled):
        for _ in tensors:
            pass
    opened = lox_stream.open(*pair, cancel=cancel)
    with pytest.raises(Cancelled):
        opened[EMBEDDING]
    require_threads(before)


def require_threads(count: int) -> None:
    """No more of them, soon."""
    deadline = time.monotonic() + 30
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == count


def test_numpy_gets_arrays_and_dlpack_shares_the_memory(pair, right):
    wide = Options(dtype="float32")
    for name, array in stream(*pair, options=wide, framework="numpy", names=[EMBEDDING, NORM]):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert array.shape == right[name].shape
    for _, tensor in stream(*pair, options=wide, names=[EMBEDDING]):
        taken = np.from_dlpack(tensor)
        assert taken.ctypes.data == tensor.data_ptr()


def test_numpy_has_bfloat16_from_ml_dtypes_or_says_so(pair, right, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(OptionError, match=r"no bfloat16 of its own, and ml_dtypes is not installed.*pip install"):
        stream(*pair, framework="numpy")
    stand_in = types.SimpleNamespace(bfloat16=np.dtype("V2"))  # two bytes that NumPy carries as they are
    monkeypatch.setitem(sys.modules, "ml_dtypes", stand_in)
    found = dict(stream(*pair, framework="numpy", names=[EMBEDDING]))
    assert found[EMBEDDING].tobytes() == right[EMBEDDING].view(torch.int16).numpy().tobytes()
    with pytest.raises(OptionError, match="framework is 'jax'"):
        stream(*pair, framework="jax")


@pytest.mark.examples
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_ml_dtypes_itself_has_the_same_numbers(dtype, pair, right):
    """And the same bits; FP8 of a tensor that is no weight of this pair."""
    known = pytest.importorskip("ml_dtypes", reason="`make examples` has an environment with it")
    if dtype == "bfloat16":
        array = dict(stream(*pair, framework="numpy", names=[EMBEDDING]))[EMBEDDING]
        tensor = right[EMBEDDING]
    else:
        tensor = right[EMBEDDING].to(getattr(torch, dtype))
        small = types.SimpleNamespace(dtype={"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[dtype])
        array = lox_stream.streaming._into("numpy", [small])(tensor)
    assert array.dtype == getattr(known, dtype)
    assert np.array_equal(array.astype(np.float32), tensor.float().numpy())
    bits = np.uint8 if tensor.itemsize == 1 else np.uint16
    assert np.array_equal(array.view(bits), tensor.view(getattr(torch, np.dtype(bits).name)).numpy())


def test_an_adapter_is_no_stream(pair):
    with pytest.raises(OptionError, match="an adapter is written by `extrapolate`"):
        stream(*pair, options=Options(form="peft"))


def test_names_may_be_any_iterable_and_are_names(pair, right):
    for names in (iter([NORM]), (name for name in [NORM]), {NORM}):
        assert list(dict(stream(*pair, names=names))) == [NORM]
    with pytest.raises(OptionError, match="names holds 3, expected names of tensors"):
        stream(*pair, names=[3])
    with pytest.raises(KeyError, match="no such tensor"):
        lox_stream.open(*pair)[3]
    for cache in (-1, "1GB"):
        with pytest.raises(OptionError, match="cache_bytes is"):
            lox_stream.open(*pair, cache_bytes=cache)


def test_the_names_that_import_star_brings_hide_no_builtin():
    assert "open" not in lox_stream.__all__
    assert lox_stream.open is lox_stream.Extrapolated
    assert "open" in dir(lox_stream)
