"""Valid files made wrong: bytes, JSON, and the opcodes of a pickle, each by a few random steps out of a seed."""

from __future__ import annotations

import json
import pickletools
import random
from collections.abc import Sequence
from typing import Any

DEEP, BIG = "@deep@", "@big@"  # stand in a JSON text for what json.dumps does not write
DEPTHS = (40, 200, 900, 940, 960, 970, 980, 985, 990, 995, 1000, 2000, 50_000)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), BIG),
)
TEXTS: tuple[Any, ...] = (
    *(
        "",
        "a",
        "..",
        ".",
        "/",
        "../x",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "a/../../b",
        "a//b",
        "C:\\x",
        "\\\\x\\y",
    ),
    *(
        "a\0b",
        "\ud800",
        "\udfff\ud800",
        "\x1b[2J",
        "\x1b]0;x\x07",
        "\x9b1m",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "[red]x[/red]",
    ),
    *(
        "[link=http://x]",
        "<script>",
        "a\nb",
        "a\r",
        "\x7f",
        "é",
        "e\u0301",
        "漢" * 50,
        "A" * 5000,
        "%s{0}",
        "$(id)",
        "*",
        "[!a]",
    ),
    *(
        "F32",
        "BF16",
        "F8_E4M3",
        "F4",
        "C64",
        "I64",
        "BOOL",
        "f32",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
    ),
    *("error", "copy", "nearest", "stochastic", "exact", "cuda:0", "auto", "a=b", "*=*", "lm_head.weight", "x.bin"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, [0, 0], [0] * 70, [2**62] * 300, DEEP)
WORDS = (0, 1, 2, 255, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
PIECES = (
    *(
        b"\0",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b",",
        b"\\",
        b"\\u0000",
    ),
    *(
        b"\\ud800",
        b"\x1b[31m",
        b"\xe2\x80\xae",
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-",
        b"9" * 40,
        b"1e999",
        b"\n",
        b" " * 100,
    ),
    *(
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"\x80\x02",
        b"[[",
        b"]]",
        b"=",
        b"#",
        b"'''",
        b'"""',
        b"../",
        b"/etc/passwd",
    ),
)


def mangled(rng: random.Random, seed: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bytes with one to four places of them changed."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 1, 4, 16, 200)))
        step = rng.randrange(9)
        if step == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif step == 1:
            data[at:end] = b""
        elif step == 2:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        elif step == 3:
            del data[at:]
        elif step == 4:
            data[at:end] = rng.choice(PIECES)
        elif step == 5:
            data[at:at] = rng.choice(PIECES)
        elif step == 6:
            data[at:end] = rng.randbytes(rng.choice((1, 2, 4, 8, 30)))
        elif step == 7:
            data[at : at + 8] = rng.choice(WORDS).to_bytes(8, rng.choice(("little", "big")))
        elif others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at:end] = other[start : start + rng.choice((4, 40, 400))]
    return bytes(data)


def value(rng: random.Random) -> Any:
    """Something that JSON can hold, rarely what is expected."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    return (
        rng.choice(OTHERS)
        if kind < 7
        else {rng.choice(TEXTS): rng.choice(NUMBERS), rng.choice(TEXTS): rng.choice(OTHERS)}
    )


def mangled_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON value with one to three of its parts changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _changed(rng, tree)
    return tree


def _changed(rng: random.Random, tree: Any) -> Any:
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return value(rng)
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        kept = list(tree)
        step = rng.randrange(4)
        if step == 0:
            kept.insert(at, value(rng))
        elif step == 1:
            del kept[at]
        else:
            kept[at] = _changed(rng, kept[at])
        return kept
    changed = dict(tree)
    key = rng.choice(list(tree))
    step = rng.randrange(8)
    if step == 0:
        changed[rng.choice(TEXTS)] = value(rng)
    elif step == 1:
        changed[rng.choice(TEXTS)] = changed.pop(key)
    elif step == 2:
        del changed[key]
    elif step == 3:
        changed[key] = changed[rng.choice(list(tree))]
    else:
        changed[key] = _changed(rng, changed[key])
    return changed


def as_text(rng: random.Random, tree: Any) -> bytes:
    """The JSON of a tree, in UTF-8 that may hold half characters, with nesting and digits that are too many."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    if DEEP in text:
        depth = rng.choice(DEPTHS)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
        text = text.replace(f'"{DEEP}"', opening * depth + "0" + closing * depth, 1)
    if BIG in text:
        text = text.replace(f'"{BIG}"', "9" * rng.choice((20, 400, 4300, 4301, 20_000)), 1)
    return text.encode("utf-8", "surrogatepass")


def mangled_json(rng: random.Random, tree: Any) -> bytes:
    """JSON that is mostly JSON, in most cases with other values, in some with a key twice, in some damaged."""
    text = as_text(rng, mangled_tree(rng, tree))
    if rng.random() < 0.1:
        text = text.replace(b'{"', b'{"a":0,"a":{},"', 1)
    return mangled(rng, text) if rng.random() < 0.2 else text


def opcodes(pickled: bytes) -> list[bytes]:
    """A pickle cut into its opcodes, each with its argument."""
    starts = [at for _, _, at in pickletools.genops(pickled)]
    return [pickled[at:end] for at, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]


STRANGE = (
    b"\x96\0\0\0\0\0\1\0\0",  # 2^40 bytes, which BYTEARRAY8 allocates before it reads one
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n",
    ),
    *(
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nfloat8_e4m3fn\n",
    ),
    *(
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n",
        b"\x93",
        b"ib\nc\n",
    ),
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"0",
        b"1",
        b"2",
        b"N",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"R",
        b"b",
        b"Q",
        b"s",
        b"u",
        b"d",
        b"l",
    ),
    *(
        b"a",
        b"e",
        b"o",
        b"\x81",
        b"\x92",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x94",
        b"h\0",
        b"q\0",
        b"j\xff\xff\xff\x7f",
        b"r\xff\xff\xff\x7f",
    ),
    *(
        b"I9\n",
        b"I" + b"9" * 5000 + b"\n",
        b"L-1L\n",
        b"F1e999\n",
        b"Fnan\n",
        b"V\\ud800\n",
        b"S'a'\n",
        b"p99999999999\n",
        b"g5\n",
    ),
    *(
        b"J\xff\xff\xff\xff",
        b"\x8a\x09" + b"\xff" * 8 + b"\0",
        b"\x8a\0",
        b"\x8b\xff\xff\xff\x7f",
        b"G\x7f\xf0" + b"\0" * 6,
    ),
    *(
        b"X\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
        b"\x8e\0\0\0\0\0\0\0\x40",
        b"\x95\0\0\0\0\0\0\0\x40",
        b"\x95\1\0\0\0\0\0\0\0.",
    ),
    *(
        b"X\5\0\0\0\x1b[2J!",
        b"X\3\0\0\0\xe2\x80\xae",
        b"\x8c\2\xed\xa0",
        b"\x97",
        b"\x98",
        b"P5\n",
        b"\x82\1",
        b"\x80\5",
        b"\x80\xff",
        b".",
    ),
    (b"q\0h\0\x86" * 60) + b"K\1s",  # a key that is a tuple of tuples of tuples: 2^60 steps to hash
)


def mangled_pickle(rng: random.Random, seed: Sequence[bytes], others: Sequence[Sequence[bytes]]) -> bytes:
    """The opcodes of a pickle with some left out, repeated, changed places, replaced by those of others or strange."""
    ops = list(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1, len(ops) + 1) if ops else 0
        step = rng.randrange(7)
        if step == 0:
            del ops[at : at + rng.choice((1, 1, 3))]
        elif step == 1:
            ops[at:at] = ops[at : at + rng.choice((1, 5, 20))]
        elif step == 2:
            ops[at : at + rng.randrange(2)] = [rng.choice(STRANGE)]
        elif step == 3:
            ops[at:at] = [rng.choice(STRANGE) for _ in range(rng.choice((2, 4)))]
        elif step == 4 and at < len(ops):
            ops[at] = mangled(rng, ops[at])
        elif step == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            ops[at:at] = other[start : start + rng.choice((1, 4, 12))]
        elif at < len(ops):
            other_at = rng.randrange(len(ops))
            ops[at], ops[other_at] = ops[other_at], ops[at]
    return b"".join(ops)
