"""Laws of opening a checkpoint: what is accepted, what is refused and in which words, and what travels with it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from lox_stream.checkpoint import DTYPE_BITS, DTYPE_BYTES, open_checkpoint
from lox_stream.errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def entry(shape: list[int], begin: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + math.prod(shape) * DTYPE_BITS[dtype] // 8]}


def raw(header: bytes | dict, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def save(path: Path, **tensors: tuple[list[int], str]) -> None:
    """A file of zeros: save(path, a=([2, 3], "BF16"))."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        header[name] = entry(shape, end, dtype)
        end = header[name]["data_offsets"][1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw(header, bytes(end)))


def save_index(folder: Path, weight_map: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder / "model-00001-of-00002.safetensors", a=([2, 3], "F32"), b=([4], "BF16"))
    save(folder / "model-00002-of-00002.safetensors", c=([5, 2], "F16"))
    save_index(
        folder,
        {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    )
    return folder


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return raised.value.problems


def the_problem(path: Path) -> str:
    problems = problems_of(path)
    assert len(problems) == 1, problems
    return problems[0]


# What is accepted


def test_each_tensor_of_a_sharded_checkpoint_has_its_place(sharded):
    data = (sharded / "model-00001-of-00002.safetensors").read_bytes()
    checkpoint = open_checkpoint(sharded)
    first, second = checkpoint.shards
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert first.header == data[: -(24 + 8)]
    assert first.header_hash == xxhash.xxh3_128_hexdigest(first.header)
    assert (first.size_bytes, first.mtime_ns) == (len(data), first.path.stat().st_mtime_ns)
    b = checkpoint.tensors["b"]
    assert (b.dtype, b.shape, b.path, b.start, b.n_bytes) == ("BF16", (4,), first.path, len(data) - 8, 8)
    assert second.tensors == (checkpoint.tensors["c"],)
    assert checkpoint.index_name == "model.safetensors.index.json"
    assert checkpoint.warnings == ()


def test_tensors_come_in_the_order_of_their_bytes_and_not_of_their_names(tmp_path):
    header = {"a": entry([2], 4), "b": entry([1], 0), "e": entry([0, 3], 12), "s": entry([], 12)}
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(16)))
    (shard,) = open_checkpoint(tmp_path).shards
    assert [tensor.name for tensor in shard.tensors] == ["b", "a", "e", "s"]
    assert [tensor.n_bytes for tensor in shard.tensors] == [4, 8, 0, 4]


def test_a_single_file_is_accepted_in_place_of_a_folder(tmp_path):
    save(tmp_path / "x.safetensors", a=([2], "F64"))
    (tmp_path / "config.json").write_text("not read")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert (checkpoint.root, checkpoint.folder) == (tmp_path / "x.safetensors", tmp_path)
    assert (checkpoint.config, checkpoint.companions, checkpoint.index_name) == ({}, (), None)


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "anything"])
def test_a_lone_weights_file_may_have_any_name(tmp_path, name):
    save(tmp_path / f"{name}.safetensors", a=([2], "F32"))
    assert [shard.name for shard in open_checkpoint(tmp_path).shards] == [f"{name}.safetensors"]


def test_a_shard_without_tensors_belongs_to_its_family(sharded):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (sharded / name).rename(sharded / name.replace("of-00002", "of-00003"))
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("of-00002", "of-00003"))
    save(sharded / "model-00003-of-00003.safetensors")
    checkpoint = open_checkpoint(sharded)
    assert [len(shard.tensors) for shard in checkpoint.shards] == [2, 1, 0]


def test_the_hub_cache_with_its_links_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save(blobs / "123", a=([2], "F32"))
    (blobs / "456").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/456")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors["a"].path == (blobs / "123").resolve()
    assert checkpoint.companions == (Path("tokenizer.json"),)
    assert checkpoint.warnings == ()


def test_unicode_and_spaces_in_paths(tmp_path):
    folder = tmp_path / "modèle à moi 模型"
    save(folder / "sub dir" / "shard é.safetensors", a=([2], "F32"))
    save_index(folder, {"a": "sub dir/shard é.safetensors"})
    assert open_checkpoint(folder).shards[0].name == "sub dir/shard é.safetensors"


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_safetensors_is_known_by_its_size(tmp_path, dtype):
    save(tmp_path / "model.safetensors", a=([8, 3], dtype))
    n_bytes = open_checkpoint(tmp_path).tensors["a"].n_bytes
    assert n_bytes * 8 == 24 * DTYPE_BITS[dtype]
    assert (dtype in DTYPE_BYTES) == (DTYPE_BITS[dtype] >= 8)
    assert DTYPE_BYTES.get(dtype, 0) == DTYPE_BITS[dtype] // 8


def test_metadata_that_is_null_is_read_as_the_loaders_do(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw({"__metadata__": None, "a": entry([2], 0)}, bytes(8)))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


# Warnings


def test_a_single_file_beside_an_index_wins_with_a_warning(sharded):
    save(sharded / "model.safetensors", z=([2], "F32"))
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["z"]
    assert any("model.safetensors.index.json" in warning for warning in checkpoint.warnings)


def test_an_index_of_one_file_belongs_to_it(tmp_path):
    save(tmp_path / "model.safetensors", a=([2], "F32"))
    save_index(tmp_path, {"a": "model.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.index_name, checkpoint.warnings) == ("model.safetensors.index.json", ())


def test_a_tensor_that_the_index_does_not_name_is_kept_with_a_warning(sharded):
    save(sharded / "model-00002-of-00002.safetensors", c=([5, 2], "F16"), extra=([1], "F32"))
    checkpoint = open_checkpoint(sharded)
    assert "extra" in checkpoint.tensors
    assert any("extra" in warning for warning in checkpoint.warnings)


def test_an_output_of_lox_stream_is_recognised(tmp_path):
    save(tmp_path / "model.safetensors", a=([2], "F32"))
    (tmp_path / "lox_stream.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert any("output of lox-stream" in warning for warning in checkpoint.warnings)
    assert checkpoint.companions == ()


# One file that is broken


BROKEN = {
    "empty": (b"", ["empty", "0 bytes"]),
    "git-lfs": (LFS, ["git lfs pull"]),
    "zip": (b"PK\x03\x04" + bytes(40), ["zip", "Convert"]),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), ["GGUF"]),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", ["web page"]),
    "garbage": (bytes(range(7, 60)), ["no safetensors header"]),
    "zeros": (bytes(64), ["no safetensors header"]),
    "five bytes": (b"12345", ["no safetensors header"]),
    "header of 200 MB": ((200_000_000).to_bytes(8, "little") + b"{}" + bytes(64), ["200000000", "100000000"]),
    "header cut": (raw({"a": entry([2], 0)})[:30], ["truncated in its header", "found 30", "download it again"]),
    "not JSON": (raw(b'{"a": nonsense}'), ["not JSON"]),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), ["not JSON"]),
    "deep": (raw(b'{"a":' + b"[" * 200_000 + b"}"), ["not JSON"]),
    "truncated": (raw({"a": entry([4, 4], 0)}, bytes(60)), ["truncated", "4 are missing", "download it again"]),
    "bytes after the end": (raw({"a": entry([2], 0)}, bytes(11)), ["3 bytes after the last tensor"]),
    "hole": (raw({"a": entry([2], 0), "b": entry([1], 12)}, bytes(16)), ["4 bytes between a and b"]),
    "hole at the start": (raw({"a": entry([2], 4)}, bytes(12)), ["between the header and a"]),
    "overlap": (raw({"a": entry([2], 0), "b": entry([2], 4)}, bytes(12)), ["b overlaps a by 4"]),
    "unknown dtype": (raw({"a": {**entry([2], 0), "dtype": "F33"}}, bytes(8)), ["F33", "BF16"]),
    "size and shape": (raw({"a": {**entry([2], 0), "shape": [3]}}, bytes(8)), ["12 bytes", "found 8"]),
    "half a byte": (raw({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)), ["1.5 bytes"]),
    "negative": (raw({"a": {**entry([2], 0), "shape": [-2]}}, bytes(8)), ["shape", "[-2]"]),
    "fraction": (raw({"a": {**entry([2], 0), "shape": [2.0]}}, bytes(8)), ["shape"]),
    "backwards": (raw({"a": {**entry([2], 0), "data_offsets": [8, 0]}}, bytes(8)), ["data_offsets"]),
    "no entry": (raw({"a": 5}), ["entry is 5"]),
    "list": (raw(b" [1, 2]"), ["is a list"]),
    "twice": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0)).encode(),) * 2), bytes(4)), ["twice", "a"]),
    "metadata": (raw({"__metadata__": {"n": 1}, "a": entry([1], 0)}, bytes(4)), ["safetensors refuses"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_words_that_say_how(tmp_path, kind):
    data, words = BROKEN[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    problem = the_problem(tmp_path)
    assert problem.startswith(f"{path}: ")
    assert [word for word in words if word not in problem] == []


def test_control_characters_in_names_do_not_reach_a_message(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw({"\x1b[2J": {**entry([2], 0), "dtype": "\x1b[1m"}}, bytes(8)))
    assert "\x1b" not in the_problem(tmp_path)


def test_control_characters_of_an_index_do_not_reach_a_message(tmp_path):
    save_index(tmp_path, {"a": "\x1b[2Jé.safetensors"})
    problem = the_problem(tmp_path)
    assert "\x1b" not in problem
    assert "x1b[2Jé.safetensors: no such file" in problem


def test_a_file_that_is_not_permitted_says_so(tmp_path, monkeypatch):
    save(tmp_path / "model.safetensors", a=([2], "F32"))

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root, as whom tests may run
    assert "no permission" in the_problem(tmp_path)


def test_a_pipe_in_place_of_a_shard_does_not_hang(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(sharded / "model-00002-of-00002.safetensors")
    assert "pipe" in the_problem(sharded)


# The folder


def test_a_missing_path_names_what_is_beside_it(sharded):
    assert "Beside it: model" in the_problem(sharded.parent / "modle")
    assert "nor is there" in the_problem(sharded.parent / "no" / "such" / "path")


def test_a_link_to_nowhere_says_where_it_leads(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("blobs/gone")
    problem = the_problem(tmp_path)
    assert "link to blobs/gone" in problem
    assert "Download" in problem


def test_weights_of_other_formats_are_named_with_the_way_out(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"x")
    problem = the_problem(tmp_path)
    assert "model.gguf" in problem
    assert "from_pretrained(DIR, gguf_file=NAME), then save_pretrained(NEW)" in problem
    assert "Convert" in problem


def test_an_empty_folder_a_pipeline_and_an_unfinished_output_are_told_apart(tmp_path):
    assert "empty folder" in the_problem(tmp_path)
    save(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", a=([2], "F32"))
    assert "folders unet" in the_problem(tmp_path)
    (tmp_path / "lox_stream.journal").write_text("")
    assert "--resume" in the_problem(tmp_path)


def test_an_adapter_is_to_be_merged_first(tmp_path):
    save(tmp_path / "adapter_model.safetensors", a=([2], "F32"))
    assert "merge_and_unload" in the_problem(tmp_path)


def test_several_weights_files_without_an_index_are_ambiguous(tmp_path):
    save(tmp_path / "one.safetensors", a=([2], "F32"))
    save(tmp_path / "two.safetensors", a=([2], "F32"))
    assert "more than one checkpoint" in the_problem(tmp_path)


def test_shards_without_their_index_ask_for_it(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "index is missing" in the_problem(sharded)


def test_an_index_in_place_of_a_folder_names_the_folder(sharded):
    assert f"Give the folder instead: {sharded}" in the_problem(sharded / "model.safetensors.index.json")


# The index


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        (LFS.decode(), "git lfs pull"),
        ("[]", "holds a list"),
        ("{}", "weight_map is none"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 5}}', "no file names"),
        ('{"weight_map": {"a": ["x"]}}', "no file names"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names twice: a"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "expected *.safetensors"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert words in the_problem(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.safetensors", "a/../../x.safetensors", "..", "a\\..\\b"])
def test_no_path_in_an_index_leads_outside_its_folder(tmp_path, name):
    save(tmp_path / "secret.safetensors", a=([2], "F32"))
    save_index(tmp_path / "model", {"a": name})
    assert "leads outside" in the_problem(tmp_path / "model")


def test_all_problems_of_a_checkpoint_come_at_once(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (sharded / "config.json").write_text("{")
    problems = problems_of(sharded)
    assert len(problems) == 3
    assert all(word in text for word, text in zip(["no such file", "truncated", "not JSON"], problems, strict=True))


def test_a_tensor_that_is_not_where_the_index_says_is_a_problem(sharded):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_index(sharded, {"a": names[0], "b": names[1], "c": names[1], "gone": names[1]})
    moved, gone = problems_of(sharded)
    assert f"names b in {names[1]}, but it is in {names[0]}" in moved
    assert "gone" in gone
    assert "in no shard" in gone


def test_a_tensor_in_two_shards_is_a_problem(sharded):
    save(sharded / "model-00002-of-00002.safetensors", c=([5, 2], "F16"), a=([2, 3], "F32"))
    assert "a is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in the_problem(sharded)


@pytest.mark.parametrize("text", ["{", "[1]", LFS.decode(), '{"a": 1, "a": 2}', "\0"])
def test_a_config_that_is_none_is_a_problem(sharded, text):
    (sharded / "config.json").write_text(text)
    assert str(sharded / "config.json") in the_problem(sharded)


# Companions


def test_code_that_a_model_brings_is_copied_and_said(sharded):
    assert not any("code of its own" in warning for warning in open_checkpoint(sharded).warnings)
    (sharded / "modeling_x.py").write_text("raise SystemExit('was run')")
    opened = open_checkpoint(sharded)
    assert Path("modeling_x.py") in opened.companions
    (told,) = (warning for warning in opened.warnings if "code of its own" in warning)
    assert "modeling_x.py" in told
    assert "trust_remote_code" in told


def test_companions_are_all_that_a_model_needs_beside_its_weights(sharded):
    kept = [
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "modeling_x.py",
        "1_Pooling/config.json",
        "README.md",
    ]
    left = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.gguf",
        "tf_model.h5",
        "a.PTH",
        "onnx/m.onnx",
        ".gitattributes",
    ]
    left += [
        ".cache/x.json",
        ".git/HEAD",
        "__pycache__/a.py",
        "checkpoint-500/trainer_state.json",
        "lox_stream.journal",
    ]
    left += ["consolidated.safetensors", "model.safetensors.partial", "x.lock"]
    for name in kept + left:
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("{}")
    checkpoint = open_checkpoint(sharded)
    assert sorted(path.as_posix() for path in checkpoint.companions) == sorted(kept)
    assert [warning for warning in checkpoint.warnings if "consolidated.safetensors" in warning]


def test_links_are_followed_and_no_walk_is_endless(sharded, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("s")
    (sharded / "tokenizer").mkdir()
    (sharded / "tokenizer" / "vocab.txt").write_text("v")
    (sharded / "tokenizer" / "loop").symlink_to("..")
    (sharded / "tokenizer_2").symlink_to("tokenizer")
    (sharded / "elsewhere").symlink_to(outside)
    (sharded / "terms.txt").symlink_to(outside / "secret.txt")
    checkpoint = open_checkpoint(sharded)
    names = {path.as_posix() for path in checkpoint.companions}
    assert {"tokenizer/vocab.txt", "tokenizer_2/vocab.txt", "terms.txt"} <= names
    assert not any(name.startswith("elsewhere") for name in names)
    assert len(names) < 10
    assert any("elsewhere" in warning for warning in checkpoint.warnings)
    assert any("secret.txt" in warning for warning in checkpoint.warnings)


def test_opening_imports_no_torch():
    modules = (
        "checkpoint, planning, matching, options, output_rules, inspecting, companions, layout, quantisation, ties"
    )
    code = f"from lox_stream import {modules}; import sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
