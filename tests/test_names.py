"""Laws of names: globs, patterns, near misses, and what reaches a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lox_stream.names import is_plain_relative, listing, matches, near_misses, pattern_of, printable, unmatched

NAMES = [f"model.layers.{i}.{module}.weight" for i in range(20) for module in ("self_attn.q_proj", "mlp.up_proj")]
NAMES += ["lm_head.weight", "model.embed_tokens.weight"]


@given(st.text())
def test_printable_text_holds_nothing_that_a_terminal_obeys(name):
    assert printable(name).isprintable()


@given(st.lists(st.sampled_from(["layers", "0", "17", "q_proj", "weight"]), min_size=1))
def test_a_pattern_matches_the_name_it_was_made_of(parts):
    name = ".".join(parts)
    assert matches(name, (pattern_of(name),))


def test_a_listing_says_how_many_it_leaves_out():
    assert listing("abc", 2) == "a, b and 1 more"
    assert listing("ab", 2) == "a, b"
    assert "\x1b" not in listing(["\x1b[2J"])


def test_globs_tell_upper_from_lower_case_and_stars_cross_dots():
    assert matches("model.layers.3.mlp.weight", ("model.*.weight",))
    assert not matches("Model.norm", ("model.*",))
    assert unmatched(("*.weight", "*.bias"), NAMES) == ("*.bias",)


@pytest.mark.parametrize(
    ("glob", "meant"),
    [
        ("lm_head", "lm_head.weight"),
        ("*lm_haed*", "lm_head.weight"),
        ("*.q_porj.*", "model.layers.*.self_attn.q_proj.weight"),
        ("model.layers.99.mlp.up_porj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("LM_HEAD.weight", "lm_head.weight"),
    ],
)
def test_near_misses_name_what_was_meant_and_work_as_globs(glob, meant):
    near = near_misses(glob, NAMES)
    assert meant in near
    assert unmatched(near, NAMES) == ()


def test_there_is_no_near_miss_of_something_far():
    assert near_misses("*zzzzzzzz*", NAMES) == ()


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x",
        "a/../x",
        "a/..",
        "./a",
        "a//b",
        "",
        "a\\b",
        "C:x",
        "a\0b",
        "\ud800.safetensors",
        "a/",
    ],
)
def test_a_name_that_could_leave_its_folder_is_not_plain(name):
    assert not is_plain_relative(name)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model.safetensors", "é ü.safetensors", "..a", "ab:c"])
def test_other_names_are_plain(name):
    assert is_plain_relative(name)
