"""What is fuzzed: each target makes a damaged file in its folder, and reads it as lox-stream does."""

from __future__ import annotations

import contextlib
import io
import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from click.testing import CliRunner
from mangling import TEXTS, mangled, mangled_json, mangled_pickle, opcodes
from safetensors.torch import save_file

from lox_stream import Options, extrapolate, plan
from lox_stream.checkpoint import open_checkpoint
from lox_stream.cli import commands
from lox_stream.errors import LoxError
from lox_stream.journal import Journal, Replay, identity, replay, session
from lox_stream.manifest import read_manifest
from lox_stream.model_card import completed
from lox_stream.output_rules import JOURNAL, MANIFEST
from lox_stream.recipes import read_recipe
from lox_stream.repairing import facts_of, survey
from lox_stream.resuming import resumable
from lox_stream.sampling import options_of
from lox_stream.sealing import sealed
from lox_stream.shards import read_shard
from lox_stream.synthetic import pair_of
from lox_stream.torch_files import read_torch_file
from lox_stream.verifying import verify_checksums

WHAT = """A case is a valid file with one to four changes: bits, bytes and pieces; other values in JSON (numbers to
2^64, to 20,000 digits, NaN, paths that lead outside, escape sequences, half characters, keys twice, nesting to 50,000);
opcodes of pickles left out, repeated, or of another program."""
INDEX = "model.safetensors.index.json"
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": ENTRY,
    "model.layers.0.weight": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [24, 36]},
    "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [36, 36]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [36, 44]},
}
LENGTHS = (0, 1, 2, 8, 100_000_000, 100_000_001, 2**31, 2**32 + 5, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "text_config": {"tie_word_embeddings": False, "quantization_config": {"quant_method": "gptq"}},
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "ffn_config": {"moe_num_experts": 4},
}
PLAIN_CONFIG = {"model_type": "llama", "tie_word_embeddings": True, "text_config": {}, "moe_num_experts": 2}
RECIPE = b"""# a recipe
rank = 2
alpha = 0.5
svd = "exact"
tolerance = 1e-3
skip = ["*norm*", "lm_head.weight"]
only = []
rounding = "stochastic"
seed = 7
rename = ["net.*=model.*"]
on-missing = "copy"
on_shape_mismatch = "overlap"
on-nonfinite = "copy"

[[group]]
match = "*.mlp.*"
rank = 16

[[group]]
match = '''*embed*'''
skip = true
"""
TOML = (
    *(
        b"rank = 0x" + b"f" * 5000,
        b"rank = " + b"9" * 5000,
        b"alpha = nan\n",
        b"alpha = -inf\n",
        b"alpha = 1e999\n",
        b"seed = -1\n",
    ),
    *(
        b"skip = " + b"[" * 2000,
        b"skip = " + b"[" * 200 + b"]" * 200,
        b"a." * 2000 + b"b = 1\n",
        b"[group]\n",
        b"[[group]]\n",
    ),
    *(
        b"[[group.group]]\n",
        b'match = "\\u001b[2J"\n',
        b'"\\u202e" = 1\n',
        b"on_missing = 'copy'\n",
        b"on-missing = 'copy'\n",
    ),
    *(
        b"rank = true\n",
        b"rank = 2020-01-01\n",
        b"svd = {a = {}}\n",
        b"group = 5\n",
        b"group = [5]\n",
        b"'' = ''\n",
        b"\x00",
        b"\r",
    ),
)


CARD = b"""---
license: mit
tags: [x, y]
base_model:
  - a
language: en  # comment
model-index: {name: x, results: []}
---
# A model
"""
YAML = (
    *(
        b"[" * 2000,
        b"[" * 300 + b"]" * 300,
        b"{a: " * 100,
        b"- " * 2000,
        b"&a [*a]",
        b"*b",
        b"!!python/object:os.system x",
    ),
    *(
        b"|\n  a\n",
        b">-\n",
        b"? a",
        b"!!set {a}",
        b"\t",
        b"%YAML 9.9",
        b"...",
        b"---",
        b"<<: *a",
        b"\xc2\x85",
        b"2020-99-99",
    ),
)


class Target(Protocol):
    """`make` writes a case into the folder, `read` reads it and returns what is shown; LoxError: it is refused."""

    name: ClassVar[str]
    weight: ClassVar[int]

    def make(self, rng: random.Random) -> None: ...

    def read(self) -> str: ...

    def made(self) -> Sequence[Path]: ...


def warm_up(target: Target) -> None:
    """Some cases, so that what is imported late is there before anybody looks."""
    for number in range(20):
        target.make(random.Random(f"warm {number}"))
        with contextlib.suppress(Exception):
            target.read()


def small_pair(folder: Path, kind: str = "one") -> tuple[Path, Path]:
    """(base, aligned) of a matrix, a stack of two names and a vector; `kind` "one" file, or "two" with an index."""
    generator = torch.Generator().manual_seed(0)
    pairs = {f"model.layers.{i}.weight": pair_of(6, 5, generator) for i in range(2)}
    pairs["model.norm.weight"] = (torch.ones(5), torch.full((5,), 2.0))
    for side, name in enumerate(("base", "aligned")):
        (folder / name).mkdir()
        tensors = {key: both[side] for key, both in pairs.items()}
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        if kind == "one":
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
            continue
        weight_map = {}
        for i, (key, tensor) in enumerate(tensors.items(), 1):
            weight_map[key] = f"model-0000{i}-of-00003.safetensors"
            save_file({key: tensor}, folder / name / weight_map[key], metadata={"format": "pt"})
        (folder / name / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / "base", folder / "aligned"


def header_bytes(rng: random.Random) -> bytes:
    """A safetensors file."""
    text = mangled_json(rng, HEADER)
    length = len(text) if rng.random() < 0.9 else rng.choice((*LENGTHS, len(text) + 1, len(text) - 1)) % 2**64
    return length.to_bytes(8, "little") + text + bytes(44 if rng.random() < 0.9 else rng.choice((0, 1, 43, 45, 5000)))


class Header:
    """The header of a shard."""

    name = "header"
    weight = 500

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"

    def made(self) -> Sequence[Path]:
        return [self.path]

    def make(self, rng: random.Random) -> None:
        data = header_bytes(rng)
        self.path.write_bytes(mangled(rng, data) if rng.random() < 0.2 else data)

    def read(self) -> str:
        read_shard(self.path)
        return ""


class Index:
    """The index of a checkpoint in three shards."""

    name = "index"
    weight = 130

    def __init__(self, folder: Path) -> None:
        self.aligned = small_pair(folder, "two")[1]
        self.tree = json.loads((self.aligned / INDEX).read_bytes())

    def made(self) -> Sequence[Path]:
        return [self.aligned / INDEX]

    def make(self, rng: random.Random) -> None:
        (self.aligned / INDEX).write_bytes(mangled_json(rng, self.tree))

    def read(self) -> str:
        return "\n".join(open_checkpoint(self.aligned).warnings)


class Config:
    """config.json and the tokenizer's, as planning sees them."""

    name = "config"
    weight = 60

    def __init__(self, folder: Path) -> None:
        self.base, self.aligned = small_pair(folder)

    def made(self) -> Sequence[Path]:
        return [self.aligned / "config.json", self.aligned / "tokenizer_config.json"]

    def make(self, rng: random.Random) -> None:
        config = CONFIG if rng.random() < 0.3 else PLAIN_CONFIG
        (self.aligned / "config.json").write_bytes(mangled_json(rng, config))
        (self.aligned / "tokenizer_config.json").write_bytes(mangled_json(rng, {"chat_template": "x", "a": []}))

    def read(self) -> str:
        return "\n".join(plan(self.base, self.aligned).warnings)


class Torch:
    """A file of torch.save: its pickle, and the archive around it."""

    name = "torch"
    weight = 200

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pytorch_model.bin"
        generator = torch.Generator().manual_seed(0)
        tensors = {f"layers.{i}": torch.randn(3, 2, generator=generator) for i in range(3)}
        kinds: list[Any] = [
            tensors,
            {"state_dict": tensors, "epoch": 3, "lr": 0.5},
            {"a": torch.nn.Parameter(torch.ones(2))},
        ]
        kinds += [{"f8": torch.zeros(2, 2).to(torch.float8_e4m3fn), "c": torch.zeros(2, dtype=torch.complex64)}]
        self.files, self.members = [], []
        for kind in kinds:
            buffer = io.BytesIO()
            torch.save(kind, buffer)
            self.files.append(buffer.getvalue())
            with zipfile.ZipFile(buffer) as archive:
                self.members.append({name: archive.read(name) for name in archive.namelist()})
        pickles = [next(data for name, data in held.items() if name.endswith("data.pkl")) for held in self.members]
        self.opcodes = [opcodes(data) for data in pickles]

    def made(self) -> Sequence[Path]:
        return [self.path]

    def make(self, rng: random.Random) -> None:
        at = rng.randrange(len(self.files))
        if rng.random() < 0.25:
            self.path.write_bytes(mangled(rng, self.files[at], self.files))
            return
        with zipfile.ZipFile(self.path, "w", rng.choice((0, 0, 0, 8))) as archive:
            for name, data in self.members[at].items():
                if name.endswith("data.pkl"):
                    data = mangled_pickle(rng, self.opcodes[at], self.opcodes)
                elif rng.random() < 0.02:
                    data = mangled(rng, data)
                if rng.random() < 0.99:
                    archive.writestr(name, data)

    def read(self) -> str:
        read_torch_file(self.path)
        return ""


class _Run:
    """A pair, its finished output, and the plan that made it."""

    def __init__(self, folder: Path) -> None:
        self.base, self.aligned = small_pair(folder)
        self.out = folder / "out"
        options = Options(rank=2, threads=1)
        extrapolate(self.base, self.aligned, self.out, options=options)
        self.plan = plan(self.base, self.aligned, self.out, options=options, overwrite=True)
        self.manifest = json.loads((self.out / MANIFEST).read_bytes())


class JournalTarget(_Run):
    """The journal of an unfinished run."""

    name = "journal"
    weight = 70

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.out / MANIFEST).unlink()
        Journal(self.out, Replay(identity(self.plan), (session(),), facts_of(self.manifest["tensors"]))).close()
        self.lines = [json.loads(line) for line in (self.out / JOURNAL).read_bytes().splitlines()]

    def made(self) -> Sequence[Path]:
        return [self.out / JOURNAL]

    def make(self, rng: random.Random) -> None:
        at = rng.randrange(len(self.lines))
        lines = [mangled_json(rng, line) if i == at else json.dumps(line).encode() for i, line in enumerate(self.lines)]
        (self.out / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")

    def read(self) -> str:
        state = replay(self.out)
        return "\n".join(resumable(self.plan)[1]) + (" ".join(state.finished) if state and not state.finished else "")


class Manifest(_Run):
    """The manifest of a finished output, as `verify`, a repair and a recipe read it."""

    name = "manifest"
    weight = 40

    def made(self) -> Sequence[Path]:
        return [self.out / MANIFEST]

    def make(self, rng: random.Random) -> None:
        tree = {key: item for key, item in self.manifest.items() if key != "seal"}
        data = mangled_json(rng, tree)
        if rng.random() < 0.8:  # sealed, as nobody but an attacker would
            data = sealed(data.rstrip()[:-1] + b"\n}\n")
        (self.out / MANIFEST).write_bytes(data)

    def read(self) -> str:
        found = read_manifest(self.out)
        said = "\n".join(check.message for check in verify_checksums(self.out))
        refused = []
        for reading in (
            lambda: options_of(self.out, found["options"]),
            lambda: survey(self.plan),
            lambda: read_recipe(self.out / MANIFEST),
        ):
            try:
                reading()
            except LoxError as error:
                refused.append(str(error))
        if refused:
            raise LoxError("\n".join([said, *refused]))
        return said


class Recipe:
    """A recipe in TOML."""

    name = "recipe"
    weight = 110

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.toml"

    def made(self) -> Sequence[Path]:
        return [self.path]

    def make(self, rng: random.Random) -> None:
        text = RECIPE
        for _ in range(rng.choice((0, 1, 1, 2))):
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines) + 1)
            lines[at : at + rng.randrange(2)] = [rng.choice((*TOML, *lines))]
            text = b"".join(lines)
        if rng.random() < 0.3:
            word = json.dumps(rng.choice(TEXTS)).encode("utf-8", "surrogatepass")
            text = text.replace(rng.choice((b'"exact"', b"0.5", b"7", b"true", b'"*.mlp.*"')), word, 1)
        self.path.write_bytes(mangled(rng, text) if rng.random() < 0.6 else text)

    def read(self) -> str:
        Options(**read_recipe(self.path))
        return ""


class Card:
    """A model card, whose front matter is completed."""

    name = "card"
    weight = 4

    def __init__(self, folder: Path) -> None:
        self.path = folder / "README.md"

    def made(self) -> Sequence[Path]:
        return [self.path]

    def make(self, rng: random.Random) -> None:
        text = CARD.replace(rng.choice((b"mit", b"[x, y]", b"- a", b"en")), rng.choice(YAML), rng.randrange(2))
        self.path.write_bytes(mangled(rng, text) if rng.random() < 0.8 else text)

    def read(self) -> str:
        card = self.path.read_bytes().decode("utf-8", "surrogateescape")
        completed(card, {"base_model": ["a/b"], "base_model_relation": "merge", "tags": ["lox"], "language": ["en"]})
        return ""


class Whole:
    """The commands `inspect` and `run --dry-run`, and all that they print."""

    name = "commands"
    weight = 6

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.aligned = small_pair(folder)
        self.original = (self.aligned / "model.safetensors").read_bytes()
        n_header = int.from_bytes(self.original[:8], "little")
        self.tree, self.data = json.loads(self.original[8 : 8 + n_header]), self.original[8 + n_header :]
        self.command: list[str] = []

    def made(self) -> Sequence[Path]:
        return [self.aligned / "model.safetensors", self.aligned / "config.json", self.aligned / "recipe.toml"]

    def make(self, rng: random.Random) -> None:
        tree = {(rng.choice(TEXTS) if rng.random() < 0.3 else key): entry for key, entry in self.tree.items()}
        text = mangled_json(rng, tree) if rng.random() < 0.3 else json.dumps(tree).encode()
        (self.aligned / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + self.data)
        (self.aligned / "config.json").write_bytes(mangled_json(rng, CONFIG) if rng.random() < 0.5 else b"{}")
        (self.aligned / "recipe.toml").write_bytes(RECIPE if rng.random() < 0.7 else mangled(rng, RECIPE))
        recipe = ["--recipe", str(self.aligned / "recipe.toml")] if rng.random() < 0.3 else []
        if rng.random() < 0.5:
            self.command = ["inspect", str(self.aligned), *recipe]
        else:
            sides = ["--base", str(self.base), "--aligned", str(self.aligned), "--out", str(self.folder / "out")]
            self.command = ["run", *sides, "--on-missing", "copy", "--dry-run", *recipe]

    def read(self) -> str:
        ran = CliRunner().invoke(commands, self.command)
        assert "bug in lox-stream" not in ran.output, ran.output[-1000:]
        assert ran.exit_code in (0, 1, 2), ran.exit_code
        if ran.exit_code:
            raise LoxError(ran.output)
        return ran.output


TARGETS: dict[str, Any] = {
    target.name: target for target in (Header, Index, Config, Torch, JournalTarget, Manifest, Recipe, Card, Whole)
}
