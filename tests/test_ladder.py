"""Models between base and aligned: each is base and the rank-k part, whatever others are made with it, and resumes."""

from __future__ import annotations

import threading

import pytest
import torch
from folders import write
from safetensors.torch import load_file

from lox_stream import Cancelled, CheckpointError, OptionError, Options, extrapolate
from lox_stream.ladder import RANKS, climb
from lox_stream.synthetic import llama_shapes, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """float32, so that nothing but the solver's error is between the result and the formula."""
    folder = tmp_path_factory.mktemp("pair")
    shapes = llama_shapes(48, 96, 2, 128, 16)
    base, aligned = write_pair(folder, shapes, aligned_shards=2)
    weights = [tensors_of(side) for side in (base, aligned)]
    weights[1]["few.weight"] = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    weights[0]["few.weight"] = weights[1]["few.weight"] * 0.99
    return tuple(
        write(folder / name, {key: tensor.float() for key, tensor in some.items()})
        for name, some in zip(("wide-base", "wide-aligned"), weights, strict=True)
    )


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_each_is_base_and_the_rank_k_part(pair, tmp_path):
    base, aligned = map(tensors_of, pair)
    climb(*pair, str(tmp_path / "rung-{k}"))
    for k in RANKS:
        found = tensors_of(tmp_path / f"rung-{k}")
        assert found.keys() == base.keys()
        for name, w0 in base.items():
            if w0.ndim < 2 or k == 0:
                assert torch.equal(found[name], w0)
                continue
            u, s, vh = torch.linalg.svd(aligned[name].double() - w0.double(), full_matrices=False)
            exact = w0.double() + (u[:, :k] * s[:k]) @ vh[:k]
            assert torch.linalg.matrix_norm(found[name] - exact) <= 3e-5 * s.norm(), (k, name)


def test_a_run_of_one_alone_and_a_ladder_that_was_stopped_have_the_same_bytes(pair, tmp_path):
    climb(*pair, str(tmp_path / "a-{k}"), (1, 3, 8))
    extrapolate(pair[1], pair[0], tmp_path / "b-3", options=Options(rank=3, alpha=-1.0))
    same = "model.safetensors"
    assert (tmp_path / "b-3" / same).read_bytes() == (tmp_path / "a-3" / same).read_bytes()
    stop = threading.Event()
    with pytest.raises(Cancelled):
        climb(
            *pair,
            str(tmp_path / "c-{k}"),
            (1, 3, 8),
            cancel=stop,
            progress=lambda at: at.done_tensors > 5 and stop.set(),
        )
    climb(*pair, str(tmp_path / "c-{k}"), (1, 3, 8), resume=True)
    for k in (1, 3, 8):
        assert (tmp_path / f"c-{k}" / same).read_bytes() == (tmp_path / f"a-{k}" / same).read_bytes()


def test_a_problem_is_told_of_the_side_that_has_it(pair, tmp_path):
    tensors = tensors_of(pair[1])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].contiguous()
    other = write(tmp_path / "other", tensors)
    with pytest.raises(
        CheckpointError, match=r"aligned is \(127, 48\), base is \(128, 48\)|base is \(128, 48\), aligned"
    ):
        climb(pair[0], other, str(tmp_path / "rung-{k}"), (1,))
    assert not any(path.name.startswith("rung") for path in tmp_path.iterdir())


def test_an_adapter_is_refused_and_no_rung_warns_of_its_alpha(pair, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(OptionError, match="is an adapter"):
        climb(pair[0], adapter, str(tmp_path / "rung-{k}"))
    summaries = climb(*pair, str(tmp_path / "rung-{k}"), (2,))
    assert summaries[0].warnings == ()
    assert "harder to remove" not in (tmp_path / "rung-2" / "README.md").read_text()


@pytest.mark.parametrize(
    ("out", "ranks", "options", "said"),
    [
        ("rung", (1,), Options(), r"expected \{k\} in it"),
        ("rung-{k}", (), Options(), "expected numbers from 0, each once"),
        ("rung-{k}", (1, 1), Options(), "each once"),
        ("rung-{k}", (-1,), Options(), "each once"),
        ("rung-{k}", (1,), Options(on_missing="copy"), "models of the same names and shapes"),
    ],
)
def test_what_is_no_ladder_is_refused(pair, tmp_path, out, ranks, options, said):
    with pytest.raises(OptionError, match=said):
        climb(*pair, str(tmp_path / out), ranks, options=options)
    assert list(tmp_path.iterdir()) == []
