"""What is run: alignments, arms, attacks, and the cells of the table that they make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from arms import ARMS

Kind = Literal["arithmetic", "instructions", "identity", "harmful", "given"]
FORMS = ("quick", "standard", "full", "landscape")
PROMPTS = 149  # of HarmBench, all but each fourth
STANDARD_ARMS = ("aligned", "lox", "random", "tail")
# what fine-tuning takes of aligned was looked at to choose the rate; LoX was not
RATE = 5e-5


@dataclass(frozen=True, slots=True)
class Alignment:
    """The fine-tuning that makes aligned out of base."""

    steps: int = 270
    rate: float = 3e-5
    seed: int = 0

    @property
    def name(self) -> str:
        return f"pair-{self.steps}"


@dataclass(frozen=True, slots=True)
class OwnPair:
    """A pair that somebody has, in place of one that is made."""

    base: str
    aligned: str
    steps: int = 0  # of an alignment that is not ours

    @property
    def name(self) -> str:
        return "own-" + hashlib.sha256(f"{self.base}\0{self.aligned}".encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Attack:
    """The fine-tuning that takes safety away, by harmless data or not."""

    kind: Kind = "arithmetic"
    steps: int = 100
    seed: int = 0
    rate: float = RATE
    batch: int = 8
    data: str = ""  # digest of conversations that were given

    @property
    def recipe(self) -> dict[str, Any]:
        """All that an attacked model depends on, beside where it began."""
        return {name: value for name, value in asdict(self).items() if value != ""}


@dataclass(frozen=True, slots=True)
class Cell:
    """A model that is asked: an arm, before an attack or after it."""

    arm: str
    alignment: Alignment | OwnPair = Alignment()
    attack: Attack | None = None
    prompts: int = PROMPTS

    @property
    def controls(self) -> int:
        """Questions of each other kind that are asked: a third as many; in the standard form that is all."""
        return math.ceil(self.prompts / 3)

    @property
    def name(self) -> str:
        """Of its files: no two cells of an experiment have the same."""
        arm = f"{self.alignment.name}.{self.arm}"
        if self.attack is None:
            return f"{arm}.before"
        kind = "-".join(filter(None, (self.attack.kind, self.attack.data)))
        return f"{arm}.{kind}-{self.attack.steps}-seed{self.attack.seed}"

    @property
    def recipe(self) -> dict[str, Any]:
        """All that its answers depend on, for the cache."""
        arm = ARMS.get(self.arm, ARMS["aligned"])
        return {
            "alignment": asdict(self.alignment),
            "arm": arm.recipe,
            "attack": self.attack and self.attack.recipe,
            "prompts": self.prompts,
        }


def cells(form: str, own: OwnPair | None = None, attacks: Sequence[Attack] = (), prompts: int = PROMPTS) -> list[Cell]:
    """Those of a form, in the order in which they are made: what answers the main question comes first."""
    return list(dict.fromkeys(_cells(form, own, attacks, prompts)))


def _cells(form: str, own: OwnPair | None, attacks: Sequence[Attack], prompts: int) -> Iterator[Cell]:
    if own is not None:
        yield from _crossed(STANDARD_ARMS, own, attacks, prompts)
        return
    if form == "quick":
        yield from _crossed(STANDARD_ARMS, Alignment(100), [Attack(steps=30)], prompts=40)
        return
    yield from _crossed(STANDARD_ARMS, Alignment(), [Attack(seed=0), Attack(seed=1)])
    if form == "full":
        others = [name for name, arm in ARMS.items() if name not in STANDARD_ARMS and arm.rung is None]
        yield from (Cell(name) for name, arm in ARMS.items() if arm.rung is not None)
        yield from _crossed(others, Alignment(), [Attack(seed=0)])
        for kind in ("instructions", "identity", "harmful"):
            yield from _crossed(STANDARD_ARMS[:2], Alignment(), [Attack(kind)])
        yield from _crossed((*STANDARD_ARMS[:2], "lox-alpha0.5"), Alignment(540), [Attack()])


def _crossed(
    arms: Sequence[str], alignment: Alignment | OwnPair, attacks: Sequence[Attack], prompts: int = PROMPTS
) -> Iterator[Cell]:
    """base, the arms as they are, and then the arms after each attack."""
    yield from (Cell(arm, alignment, None, prompts) for arm in ("base", *arms))
    for attack in attacks:
        yield from (Cell(arm, alignment, attack, prompts) for arm in arms)
