"""The model card: completed without losing a character of what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lox_stream.checkpoint import Checkpoint
from lox_stream.manifest import totals
from lox_stream.model_card import card_for, completed, model_name
from lox_stream.options import Options
from lox_stream.planning import Plan

ENTRIES = {"base_model": ["org/aligned", "base"], "base_model_relation": "merge", "tags": ("lox", "safety")}


def checkpoint(folder: Path, card: str | bytes | None = None, config: dict[str, object] | None = None) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    companions: tuple[Path, ...] = ()
    if card is not None:
        (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        companions = (Path("README.md"),)
    return Checkpoint(folder, folder, (), {}, None, None, config or {}, companions)


def card_of(tmp_path: Path, card: str | bytes | None, options: Options = Options(), **config: object) -> str:  # noqa: B008
    aligned = checkpoint(tmp_path / "models--org--aligned" / "snapshots" / "1a2b", card, config)
    plan = Plan(checkpoint(tmp_path / "base"), aligned, aligned, tmp_path / "out", options, (), ())
    return card_for(plan, totals([])).decode("utf-8", "surrogateescape")


def front(card: str) -> dict[str, object]:
    """The front matter as a reader of YAML 1.2, such as the hub, sees it: every scalar as it is spelled."""
    return yaml.load(card.lstrip("\ufeff").split("---")[1], Loader=yaml.BaseLoader)


def test_a_new_card_says_what_the_model_was_made_of(tmp_path: Path) -> None:
    card = card_of(tmp_path, None, model_type="llama")
    assert front(card) == {
        "base_model": ["org/aligned", "base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["lox", "safety"],
    }
    assert "\n# out\n" in card
    assert card.startswith("---\nbase_model:\n")


def test_no_licence_and_no_library_are_invented(tmp_path: Path) -> None:
    assert {"license", "library_name"}.isdisjoint(front(card_of(tmp_path, None)))


def test_the_section_says_how_it_was_made(tmp_path: Path) -> None:
    card = card_of(tmp_path, None, Options(rank=9, alpha=-0.5, rounding="stochastic", seed=3))
    assert "| rank | 9 |\n| alpha | -0.5 |\n" in card
    assert "| rounding | stochastic, seed 3 |" in card
    assert "2506.15606" in card
    assert "`org/aligned`" in card
    assert "| rank | full |" in card_of(tmp_path, None, Options(rank=0))


def test_what_a_card_holds_stays_as_it_is_spelled(tmp_path: Path) -> None:
    body = (
        "# a comment\nlicense: apache-2.0  # kept\nlanguage:\n- no\n- en\nversion: 1.10\n"
        "extra_gated_prompt: >-\n  One\n  two.\nbase_model_relation: finetune\nbase_model: org/base\n"
    )
    text = "\n# Aligned\n\nHello, --- wörld.\n"
    card = card_of(tmp_path, f"---\n{body}---\n{text}")
    assert card.startswith("---\n" + body.removesuffix("base_model: org/base\n"))
    assert f"---\n{text}\n## LoX" in card
    found = front(card)
    assert found["base_model"] == ["org/base", "org/aligned", "base"]
    assert found["base_model_relation"] == "finetune"
    assert found["language"] == ["no", "en"]
    assert found["tags"] == ["lox", "safety"]


def test_a_card_without_front_matter_gets_one_and_keeps_its_text(tmp_path: Path) -> None:
    card = card_of(tmp_path, "# Aligned\n---\ntext")
    assert front(card)["tags"] == ["lox", "safety"]
    assert "---\n\n# Aligned\n---\ntext\n\n## LoX" in card


@pytest.mark.parametrize(
    ("body", "tags"),
    [
        ("tags:\n- chat\n- lox\nlicense: mit\n", ["chat", "lox", "safety"]),
        ("tags:\n    - chat\n    # more to come\nlicense: mit\n", ["chat", "lox", "safety"]),
        ("license: mit\ntags: [chat, 'a: b',\n  no]\n", ["chat", "a: b", "no", "lox", "safety"]),
        ("tags: chat\nlicense: mit\n", ["chat", "lox", "safety"]),
        ("tags:\nlicense: mit\n", ["lox", "safety"]),
        ("license: mit\ntags: []\n", ["lox", "safety"]),
        ("license: mit\ntags:\n- >-\n  folded\n  text\n\n", ["folded text", "lox", "safety"]),
        ("license: mit\ntags:\n- chat", ["chat", "lox", "safety"]),
        ("license: mit\n", ["lox", "safety"]),
        ('"tags":\n- chat\nlicense: mit\n', ["chat", "lox", "safety"]),
    ],
)
def test_tags_are_added_however_they_are_written(body: str, tags: list[str]) -> None:
    found = front(completed(f"---\n{body}\n---\ntext", ENTRIES))
    assert found["tags"] == tags
    assert found["license"] == "mit"
    assert found["base_model"] == ["org/aligned", "base"]


def test_a_complete_card_is_not_changed() -> None:
    card = "---\nbase_model: [org/aligned, base]\nbase_model_relation: merge\ntags: [safety, lox]\n---\ntext"
    assert completed(card, ENTRIES) == card


@pytest.mark.parametrize(
    "card",
    [
        "---\n{license: mit}\n---\ntext",
        "---\n- a list\n---\ntext",
        "---\nbroken: [\n---\ntext",
        "---\ntags: {a: b}\nbase_model: {c: d}\nbase_model_relation: x\n---\ntext",
    ],
)
def test_front_matter_that_cannot_be_completed_stays_as_it_is(card: str) -> None:
    assert completed(card, ENTRIES) == card


def test_the_line_ends_of_a_card_are_kept() -> None:
    card = completed("---\r\nlicense: mit\r\n---\r\ntext\r\n", ENTRIES)
    assert card.replace("\r\n", "").count("\n") == 0
    assert card.endswith("---\r\ntext\r\n")


def test_a_byte_order_mark_and_bytes_that_are_no_text_survive(tmp_path: Path) -> None:
    card = card_of(tmp_path, "\ufeff---\nlicense: mit\n---\n".encode() + b"caf\xe9\n")
    assert card.startswith("\ufeff---\nlicense: mit\n")
    assert b"caf\xe9\n" in card.encode("utf-8", "surrogateescape")


def test_empty_front_matter_is_filled() -> None:
    assert front(completed("---\n---\ntext", ENTRIES))["base_model_relation"] == "merge"


def test_a_low_retention_is_said_with_the_way_out(tmp_path: Path) -> None:
    aligned = checkpoint(tmp_path / "aligned")
    plan = Plan(checkpoint(tmp_path / "base"), aligned, aligned, tmp_path / "out", Options(), (), ())
    none = totals([])
    low = card_for(plan, replace(none, retention=0.553, energy=0.25)).decode()
    assert "| retention of the update after rounding | 55.3 % |\n" in low
    assert "| energy of the difference in the update | 25.0 % |\n" in low
    assert "--rounding stochastic" in low
    assert "--rounding stochastic" not in card_for(plan, replace(none, retention=0.95)).decode()
    assert "retention" not in card_for(plan, none).decode()


@pytest.mark.parametrize(
    ("path", "name"),
    [("models--org--a--b/snapshots/0f", "org/a--b"), ("plain", "plain"), ("models--gpt2/snapshots/0f", "0f")],
)
def test_a_model_is_called_as_on_the_hub_or_by_its_folder(tmp_path: Path, path: str, name: str) -> None:
    assert model_name(checkpoint(tmp_path / path)) == name


def test_names_cannot_break_the_table(tmp_path: Path) -> None:
    aligned = checkpoint(tmp_path / "x\ny")
    plan = Plan(checkpoint(tmp_path / "a|b`c"), aligned, aligned, tmp_path / "out", Options(), (), ())
    card = card_for(plan, totals([])).decode()
    assert "| base | `a/b'c` |\n" in card
    assert "| aligned | `x\\ny` |\n" in card
