"""Laws of the demo, on a smaller pair than it makes for people."""

from __future__ import annotations

import tempfile

import pytest
from click.testing import CliRunner

from lox_stream import demo
from lox_stream.cli import commands
from lox_stream.synthetic import llama_shapes


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SHAPES", llama_shapes(64, 96, layers=2, vocabulary=128, kv=32))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_what_it_says_was_measured(tmp_path):
    pair, making_s = demo.timed_pair(tmp_path / "kept")
    seen = demo.run_demo(tmp_path / "kept", pair, making_s=making_s)
    assert 0 < seen.changed < 1
    assert seen.matrices == seen.summary.totals.extrapolated
    assert seen.comparison.ok
    assert seen.comparison.share > 0.99
    exact_values = seen.comparison.singular_values[:6]
    for value, radius, exact in zip(seen.facts.singular_values, seen.facts.radius, exact_values, strict=True):
        assert abs(value - exact) <= radius + 1e-6 * exact


def test_nothing_is_left_behind_unless_it_is_kept(tmp_path):
    result = CliRunner().invoke(commands, ["demo"])
    assert result.exit_code == 0, result.output
    assert "elements have the same bits" in result.stdout
    assert "verify" not in result.stdout, "no command for a folder that is gone"
    assert list((tmp_path / "temporary").iterdir()) == []
    kept = tmp_path / "kept"
    result = CliRunner().invoke(commands, ["demo", "--keep", str(kept)])
    assert result.exit_code == 0
    assert {path.name for path in kept.iterdir()} == {"base", "aligned", "out"}
    assert CliRunner().invoke(commands, ["verify", str(kept / "out")]).exit_code == 0


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(commands, ["demo", "--keep", str(tmp_path)])
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "base").exists()
