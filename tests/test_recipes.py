"""Recipes: what they say of which tensors, what is wrong with them and where, and that a run can be repeated."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from exactly import extrapolated
from folders import write
from safetensors.torch import load_file

from lox_stream import Options, extrapolate, plan
from lox_stream.cli import commands
from lox_stream.errors import LoxError, OptionError
from lox_stream.options import Rule
from lox_stream.recipes import read_recipe

SHAPES = {
    "model.embed_tokens.weight": (60, 24),
    "model.layers.0.mlp.up.weight": (40, 24),
    "model.layers.0.attn.q.weight": (24, 24),
    "model.layers.1.mlp.up.weight": (40, 24),
    "model.layers.1.attn.q.weight": (24, 24),
    "model.norm.weight": (24,),
}
RECIPE = """# ours
rank = 2
alpha = 0.5

[[group]]
match = "*.mlp.*"
rank = 4
alpha = 2.0

[[group]]
match = "*embed*"
skip = true
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    aligned = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
    return write(root / "base", base), write(root / "aligned", aligned)


def test_a_recipe_says_dtype_and_size_and_the_manifest_says_them_again(pair, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('dtype = "bfloat16"\nmax-shard-size = "3 KB"\n')
    assert read_recipe(path) == {"dtype": "bfloat16", "max_shard_size": 3000, "recipe": ()}
    for out, recipe in (("one", path), ("two", tmp_path / "one" / "lox_stream.json")):
        sides = ["--base", pair[0], "--aligned", pair[1], "--out", tmp_path / out]
        assert lox("run", *sides, "--recipe", recipe, "--quiet").exit_code == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).glob("*.safetensors")} for out in ("one", "two"))
    assert len(one) > 2
    assert one == two
    path.write_text('max-shard-size = "large"\n')
    with pytest.raises(OptionError, match=r"line 1.*'large' is not a size"):
        read_recipe(path)


def exact(pair, name, rank, alpha):
    w0, w1 = (load_file(side / "model.safetensors")[name] for side in pair)
    return extrapolated(w1, w0, rank, alpha)


def lox(*words):
    return CliRunner().invoke(commands, [str(word) for word in words], prog_name="lox-stream")


def written(tmp_path, text, name="recipe.toml"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def refused(tmp_path, text):
    with pytest.raises(OptionError) as raised:
        read_recipe(written(tmp_path, text))
    return str(raised.value)


def test_each_group_gets_what_its_rule_says_and_the_rest_the_options(pair, tmp_path):
    file = written(tmp_path, RECIPE)
    ran = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out", "--recipe", file)
    assert ran.exit_code == 0, ran.output
    out, aligned = load_file(tmp_path / "out" / "model.safetensors"), load_file(pair[1] / "model.safetensors")
    for name in SHAPES:
        if "mlp" in name:
            right = exact(pair, name, 4, 2.0)
        elif "attn" in name:
            right = exact(pair, name, 2, 0.5)
        else:
            right = aligned[name].double()
        assert torch.allclose(out[name].double(), right, atol=1e-5), name


def test_what_is_typed_wins_over_the_recipes_options_and_not_over_its_groups(pair, tmp_path):
    file = written(tmp_path, RECIPE)
    paths = ["--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out", "--recipe", file]
    ran = lox("run", *paths, "--rank", 3, "--dry-run", "--json")
    document = json.loads(ran.stdout)
    assert (document["options"]["rank"], document["options"]["alpha"]) == (3, 0.5)
    ranks = {step["name"]: step["rank"] for step in document["steps"]}
    assert ranks["model.layers.0.mlp.up.weight"] == 4
    assert ranks["model.layers.0.attn.q.weight"] == 3
    assert ranks["model.embed_tokens.weight"] is None


def test_a_manifest_repeats_its_run(pair, tmp_path):
    file = written(tmp_path, RECIPE)
    paths = ["--base", pair[0], "--aligned", pair[1]]
    assert lox("run", *paths, "--out", tmp_path / "a", "--recipe", file, "--rank", 1).exit_code == 0
    assert lox("run", *paths, "--out", tmp_path / "b", "--recipe", tmp_path / "a" / "lox_stream.json").exit_code == 0
    files = [(tmp_path / side / "model.safetensors").read_bytes() for side in "ab"]
    assert files[0] == files[1]
    verified = lox("verify", tmp_path / "b", *paths, "--sample", 9)
    assert verified.exit_code == 0, verified.output


def test_a_manifest_that_was_edited_repeats_nothing(pair, tmp_path):
    paths = ["--base", pair[0], "--aligned", pair[1]]
    assert lox("run", *paths, "--out", tmp_path / "a").exit_code == 0
    manifest = tmp_path / "a" / "lox_stream.json"
    manifest.write_text(manifest.read_text().replace('"alpha": 1.25', '"alpha": 2.5'))
    result = lox("run", *paths, "--out", tmp_path / "b", "--recipe", manifest)
    assert result.exit_code == 2
    assert "was changed since its run wrote it" in result.stderr
    assert not (tmp_path / "b").exists()


def test_the_first_rule_that_matches_counts_and_skip_wins_over_all(pair):
    rules = (Rule("*.0.*", rank=1), Rule("*.mlp.*", rank=5, alpha=0.0), Rule("*", rounding="stochastic"))
    made = plan(*pair, options=Options(rank=3, recipe=rules, skip=("*embed*",)))
    found = {step.name: (step.reason, step.rank) for step in made.steps}
    assert found["model.layers.0.mlp.up.weight"] == ("matrix", 1)
    assert found["model.layers.1.mlp.up.weight"] == ("alpha 0", 0)
    assert found["model.layers.1.attn.q.weight"] == ("matrix", 3)
    assert found["model.embed_tokens.weight"] == ("skipped", 0)


def test_matrices_that_are_solved_together_may_have_factors_of_their_own(pair, tmp_path):
    extrapolate(*pair, tmp_path / "out", options=Options(rank=2, alpha=0.5, recipe=(Rule("*.0.*", alpha=2.0),)))
    out = load_file(tmp_path / "out" / "model.safetensors")
    for layer, alpha in ((0, 2.0), (1, 0.5)):
        for part in ("mlp.up", "attn.q"):
            name = f"model.layers.{layer}.{part}.weight"
            assert torch.allclose(out[name].double(), exact(pair, name, 2, alpha), atol=1e-5), name


def test_rounding_by_chance_is_for_the_tensors_that_a_rule_names(tmp_path):
    generator = torch.Generator().manual_seed(1)
    for side in ("base", "aligned"):
        write(tmp_path / side, {name: torch.randn(64, 32, generator=generator).bfloat16() for name in ("a", "b")})
    outs = []
    for number, recipe in enumerate([(), (Rule("a", rounding="stochastic"),)]):
        out = tmp_path / f"out{number}"
        extrapolate(tmp_path / "base", tmp_path / "aligned", out, options=Options(recipe=recipe))
        outs.append(load_file(out / "model.safetensors"))
    assert torch.equal(outs[0]["b"], outs[1]["b"])
    assert not torch.equal(outs[0]["a"], outs[1]["a"])


def test_tied_names_follow_the_one_that_holds_the_weights(tmp_path):
    generator = torch.Generator().manual_seed(2)
    for side in ("base", "aligned"):
        table = torch.randn(64, 32, generator=generator)
        tensors = {"lm_head.weight": table, "model.embed_tokens.weight": table.clone()}
        write(tmp_path / side, tensors, tie_word_embeddings=True)
    recipe = (Rule("lm_head.weight", rank=1), Rule("*embed*", rank=4, alpha=2.0))
    extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out", options=Options(recipe=recipe))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_inspect_shows_what_each_rule_hits(pair, tmp_path):
    file = written(tmp_path, RECIPE)
    document = json.loads(lox("inspect", pair[1], "--recipe", file, "--json").stdout)
    assert [(hit["match"], hit["says"], hit["tensors"], hit["matrices"]) for hit in document["rules"]] == [
        ("*.mlp.*", "rank 4, alpha 2.0", 2, 2),
        ("*embed*", "skip", 1, 1),
    ]
    assert "rank 4, alpha 2.0" in lox("inspect", pair[1], "--recipe", file).stdout


def test_a_rule_that_hits_nothing_is_an_error(pair):
    with pytest.raises(LoxError, match=r"rule 1: match '\*\.mlq\.\*' hits no tensor .*Did you mean"):
        plan(*pair, options=Options(recipe=(Rule("*.mlq.*", rank=2),)))
    with pytest.raises(LoxError, match=r"rule 2: .*Earlier rules match all of its tensors"):
        plan(*pair, options=Options(recipe=(Rule("*", rank=2), Rule("*.mlp.*", rank=3))))


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_rule_that_hits_nothing_is_told_with_its_file_and_line(pair, tmp_path, command):
    file = written(tmp_path, '[[group]]\nmatch = "*.mlp.*"\nrank = 1\n\n[[group]]\nrank = 2\nmatch = "*.mlq.*"\n')
    sides = ["--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out"] if command == "run" else [pair[1]]
    ran = lox(command, *sides, "--recipe", file)
    assert ran.exit_code != 0
    assert f"--recipe {file}, line 7: match '*.mlq.*' hits no tensor" in ran.stderr


def test_where_a_rule_stood_is_no_part_of_the_run(pair, tmp_path):
    """A comment that was put above a rule, or a manifest instead of the file, changes no manifest and no resume."""
    file = written(tmp_path, RECIPE)
    paths = ["--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out"]
    assert lox("run", *paths, "--recipe", file).exit_code == 0
    manifest = tmp_path / "out" / "lox_stream.json"
    assert all("at" not in rule for rule in json.loads(manifest.read_text())["options"]["recipe"])
    assert [rule.at for rule in read_recipe(file)["recipe"]] == [f"--recipe {file}, line {n}" for n in (6, 11)]
    assert read_recipe(manifest)["recipe"][1].at == f"--recipe {manifest}, rule 2"
    assert read_recipe(manifest)["recipe"] == read_recipe(file)["recipe"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank = 6\nrnak = 3\n", "line 2: rnak is nothing that a recipe says here, expected one of rank, alpha"),
        ("rank = \n", "is no TOML"),
        ("[[group]]\nmatch = '*'\n", "line 1: it says nothing, expected rank, alpha, rounding, split_fused or skip"),
        ("[[group]]\nmatch = '*'\nrank = -1\n", "line 3: rank is -1, expected a whole number"),
        ("[[group]]\nmatch = '*'\nrank = 1\n\n[[group]]\nmatch = 'a'\nalpha = 'x'\n", "line 7: alpha is 'x'"),
        ("[[group]]\nrank = 1\n", "line 1: match is '', expected a tensor's name or a glob"),
        ("[[group]]\nmatch = '*'\nskip = true\nrank = 1\n", "line 3: skip is true, and there is more beside it"),
        ("[[group]]\nmatch = '*'\nskip = 1\n", "line 3: skip is 1, expected true or false"),
        ("[[group]]\nmatch = '*'\nrounding = 'up'\n", "line 3: rounding is 'up', expected nearest or stochastic"),
        ("[[group]]\nmatch = '*'\ndtype = 'F32'\n", "line 3: dtype is nothing that a recipe says here"),
        ("[[group]]\nmatch = '*'\nsplit-fused = 'x'\nrank = 1\n", "line 3: split_fused is 'x', expected true"),
        ("split-fused = true\nrank = 1\nsplit_fused = true\n", "line 3: split_fused is said already"),
        ("rank = 1\ngroup = [{match='*', rank=-1}]", "line 2: rank is -1"),
        ("group = [{match='*', rank=1}, {match='*q*', rank=-2}]\n", "line 1: rank is -2"),
        ("# \u2028\n[['group']]\nmatch = '*'\nrank = -1\n", "line 4: rank is -1"),
        ("group = 3\n", "line 1: group is no table"),
        ("{}", "is no TOML and no manifest"),
        ('{"options": {"recipe": [{"no": 1}]}}', "is no TOML and no manifest"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, text, told):
    assert told in refused(tmp_path, text)


def test_all_problems_are_told_at_once(tmp_path):
    told = refused(tmp_path, "a = 1\nb = 2\n[[group]]\nmatch = '*'\nrank = -1\nalpha = nan\n")
    assert [line.split(": ")[0].rsplit(" ", 1)[1] for line in told.splitlines()] == ["1", "2", "5", "6"]


def test_a_recipes_options_are_checked_as_typed_ones_are(pair, tmp_path):
    file = written(tmp_path, "rank = -3\n")
    ran = lox("run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out", "--recipe", file)
    assert ran.exit_code != 0
    assert "--rank is -3" in ran.stderr
    missing = lox(
        "run", "--base", pair[0], "--aligned", pair[1], "--out", tmp_path / "out", "--recipe", tmp_path / "no"
    )
    assert "no such file" in missing.stderr
