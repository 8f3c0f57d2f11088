"""Laws of padding: rows that stand for no word are not taken for rows that both sides have."""

from __future__ import annotations

import exactly
import folders
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lox_stream import Options, extrapolate
from lox_stream.checkpoint import open_checkpoint
from lox_stream.planning import plan, plan_summary
from lox_stream.recomputing import compare_all
from lox_stream.sampling import choose_sample
from lox_stream.tables import padding_rows

EMBED = "model.embed_tokens.weight"
OVERLAP = Options(rank=2, on_shape_mismatch="overlap")


def rows(count: int, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


PADDING = {  # what lies behind 64 rows of words, what config.json says, how many rows are padding
    "zeros": (torch.zeros(16, 32), {}, 16),
    "few zeros": (torch.zeros(3, 32), {}, 3),
    "equal": (rows(1).expand(16, 32), {}, 16),
    "few that are equal": (rows(1).expand(15, 32), {}, 0),
    "many zeros": (torch.zeros(3000, 32), {}, 3000),
    "by the config": (rows(16), {"vocab_size": 64}, 16),
    "by the config in it": (rows(16), {"text_config": {"vocab_size": 64}}, 16),
    "by both": (torch.zeros(24, 32), {"vocab_size": 70}, 24),
    "none": (rows(16), {"vocab_size": 80}, 0),
    "a config that means nothing": (rows(16), {"vocab_size": True, "other_vocab_size": [64]}, 0),
}


@pytest.mark.parametrize(("tail", "config", "count"), PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("name", [EMBED, "head"])
def test_padding_is_zeros_or_equal_rows_or_beyond_the_vocabulary(name, tail, config, count, tmp_path):
    opened = open_checkpoint(folders.write(tmp_path / "a", {name: torch.cat([rows(64), tail])}, **config))
    assert padding_rows(opened.tensors[name], opened) == count


def test_what_is_no_table_or_nothing_else_has_no_padding(tmp_path):
    tensors = {"model.layers.0.up.weight": rows(8), "a.pos_embed": rows(80), "a": torch.zeros(9, 4), "b": rows(2, 1)}
    tensors["model.layers.0.up.weight"][-1] = 0
    opened = open_checkpoint(folders.write(tmp_path / "a", tensors, vocab_size=64))
    assert {name: padding_rows(tensor, opened) for name, tensor in opened.tensors.items()} == dict.fromkeys(tensors, 0)


@pytest.mark.parametrize("tail", [torch.zeros(16, 32), rows(1).expand(16, 32), rows(16)], ids=["zeros", "equal", "any"])
@pytest.mark.parametrize("grown", [96, 72])
def test_in_overlap_padding_of_base_counts_as_absent(grown, tail, tmp_path):
    w0, d = 0.1 * rows(64), 0.01 * rows(64, 2) @ rows(2)
    w1 = torch.cat([w0 + d, 0.1 * rows(grown - 64)])
    base = folders.write(tmp_path / "base", {EMBED: torch.cat([w0, tail])}, vocab_size=64)
    aligned = folders.write(tmp_path / "aligned", {EMBED: w1}, vocab_size=grown)
    planned = plan(base, aligned, options=OVERLAP)
    assert planned.steps[0].m == 64
    assert any("the last 16 of base's 80 rows are padding" in warning for warning in planned.warnings)
    assert plan_summary(planned) == plan_summary(plan(base, aligned, options=OVERLAP))
    extrapolate(base, aligned, tmp_path / "out", options=OVERLAP)
    out = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    assert torch.allclose(out[:64].double(), exactly.extrapolated(w1[:64], w0, 2, 1.25), atol=1e-5)
    assert torch.equal(out[64:], w1[64:])
    assert [one.ok for one in compare_all(choose_sample(tmp_path / "out", base, aligned, count=1))] == [True]
