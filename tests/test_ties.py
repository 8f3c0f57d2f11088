"""Laws of tied weights: one weight gets the same bytes under both names, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path

import folders
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lox_stream import Options, extrapolate
from lox_stream.checkpoint import open_checkpoint
from lox_stream.inspecting import inspect_checkpoint
from lox_stream.planning import plan
from lox_stream.tables import SAMPLE_BYTES, SAMPLES, TensorInfo, read_here
from lox_stream.ties import look_at, tied_names

TIED = [  # an embedding and its head, as architectures call them
    ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ("transformer.word_embedding.weight", "lm_loss.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("input_embeds_layers.1.weight", "lm_heads.0.weight"),
    ("rows", "columns"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("shared.weight", "lm_head.weight"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def words(seed: int, rows: int = 600, width: int = 48) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def save(folder: Path, tensors: dict[str, Tensor], kind: str = "safetensors", **config: object) -> Path:
    if kind == "safetensors":
        return folders.write(folder, {name: tensor.clone() for name, tensor in tensors.items()}, **config)
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def told(base: Path, aligned: Path, **options: object) -> str:
    return "\n".join(plan(base, aligned, options=Options(rank=2, **options)).warnings)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}], ids=["says tied", "says nothing"])
@pytest.mark.parametrize(("embedding", "head"), TIED)
def test_equal_tables_are_one_weight_whatever_they_are_called(embedding, head, config, kind, tmp_path):
    config = {"vocab_size": 600, **config}
    w0, w1 = words(0), words(1)
    base = save(tmp_path / "base", {embedding: w0, head: w0}, kind, **config)
    aligned = save(tmp_path / "aligned", {embedding: w1, head: w1}, kind, **config)
    extrapolate(base, aligned, tmp_path / "out", options=Options(rank=2, rounding="stochastic"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out[embedding], out[head])
    assert not torch.equal(out[head], w1)


def test_a_tied_weight_that_base_stores_once_is_found_there(tmp_path):
    w0, w1, config = words(0), words(1), {"vocab_size": 600, "tie_word_embeddings": True}
    embedding, head = TIED[0]
    both = save(tmp_path / "both", {embedding: w1, head: w1}, **config)
    for name in (embedding, head):
        base = save(tmp_path / name, {name: w0}, **config)
        steps = plan(base, both).steps
        assert {step.base.name for step in steps} == {name}
        assert len({step.seed_name for step in steps}) == 1
    untied = save(tmp_path / "untied", {embedding: w1, head: words(2)}, vocab_size=600, tie_word_embeddings=False)
    assert {step.base.name for step in plan(tmp_path / embedding, untied).steps} == {embedding}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_config_that_says_untied_is_obeyed(kind, tmp_path):
    table = words(0)
    folder = save(tmp_path / "a", {EMBED: table, HEAD: table, "x": table}, kind, tie_word_embeddings=False)
    assert tied_names(open_checkpoint(folder)) == {}
    layers = {f"model.layers.{i}.mlp.up_proj.weight": table for i in range(2)}
    assert tied_names(open_checkpoint(save(tmp_path / "b", layers))) == {}, "matrices of layers are no tables"


def test_several_names_follow_one(tmp_path):
    table = words(0)
    names = ("model.embed_tokens.weight", "lm_head.weight", "a.embedding", "model.layers.9.embed_tokens.weight", "z")
    found = tied_names(
        open_checkpoint(
            save(tmp_path / "a", dict.fromkeys(names, table), tie_word_embeddings=True, text_config={"vocab_size": 600})
        )
    )
    assert len(found) == 4
    assert len(set(found.values())) == 1
    assert not set(found) & set(found.values())


@pytest.mark.parametrize(("embedding", "head"), [(EMBED, HEAD), TIED[0]])
def test_two_weights_that_the_config_ties_are_each_its_own_and_that_is_said(embedding, head, tmp_path):
    config = {"vocab_size": 600, "tie_word_embeddings": True}
    w0 = words(0)
    base = save(tmp_path / "base", {embedding: w0, head: w0}, **config)
    aligned = save(tmp_path / "aligned", {embedding: words(1), head: words(2)}, **config)
    said = told(base, aligned)
    assert f"ties {head} to {embedding}, but their numbers differ" in said
    assert "set tie_word_embeddings to false" in said
    assert any("numbers differ" in warning for warning in inspect_checkpoint(aligned).warnings)
    assert [step.seed_name for step in plan(base, aligned).steps] == [step.name for step in plan(base, aligned).steps]
    assert "differ" not in told(aligned, base)
    untied = save(tmp_path / "untied", {embedding: words(1), head: words(2)}, vocab_size=600, tie_word_embeddings=False)
    assert "differ" not in told(base, untied)


def test_holes_and_zeros_are_no_proof_of_a_tie(tmp_path):
    folder = save(tmp_path / "a", {"a.embedding": torch.zeros(600, 48), "a.head": torch.zeros(600, 48)}, vocab_size=600)
    assert tied_names(open_checkpoint(folder)) == {}


@pytest.mark.parametrize("equal", [True, False])
def test_of_large_tables_samples_are_read_and_of_others_the_first(equal, tmp_path):
    table = words(0, 4000, 512)
    other = table.clone() if equal else words(1, 4000, 512)
    folder = save(tmp_path / "a", {"a.embedding": table, "a.head": other, "a.small": words(1)}, vocab_size=4000)
    read = []

    def counting(tensor: TensorInfo, start: int, end: int) -> bytes:
        read.append((tensor.name, start, end))
        return read_here(tensor, start, end)

    look_at(open_checkpoint(folder), counting)
    n_bytes = sum(end - start for _, start, end in read)
    tails = 2 * 3 * SAMPLE_BYTES  # two reads at the end of each
    assert n_bytes <= 2 * SAMPLE_BYTES * (SAMPLES if equal else 1) + tails
    if equal:
        assert ("a.head", table.nbytes - SAMPLE_BYTES, table.nbytes) in read, "what was added to a vocabulary is last"
    assert tied_names(open_checkpoint(folder)) == ({"a.head": "a.embedding"} if equal else {})


def test_a_file_that_is_cut_meanwhile_is_said(tmp_path):
    opened = open_checkpoint(save(tmp_path / "a", {EMBED: words(0), HEAD: words(0)}))
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(Exception, match="has been cut meanwhile"):
        tied_names(opened)


def test_another_table_of_the_same_shape_is_not_paired_with_the_embedding(tmp_path):
    """An extra head that base lacks, beside an embedding that it ties."""
    embedding, _ = TIED[0]
    config = {"vocab_size": 600, "tie_word_embeddings": True}
    base = save(tmp_path / "base", {embedding: words(0)}, **config)
    aligned = save(tmp_path / "aligned", {embedding: words(1), "medusa_head.0.1.weight": words(2)}, **config)
    made = plan(base, aligned, options=Options(on_missing="copy"))
    assert [step.reason for step in made.steps if step.name.startswith("medusa")] == ["missing"]
