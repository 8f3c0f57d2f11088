"""Tied weights: names that a model keeps as one tensor and that a file may hold once, twice, or under another name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo, model_of, models_in
from lox_stream.names import matches, printable
from lox_stream.tables import Read, equal_tables, padding_rows, tables_of, vocabulary_sizes

SHARED = ("shared.weight", "*[./]shared.weight")
EMBEDDINGS = (
    *SHARED,
    *("*embed_tokens.weight", "*wte.weight", "*embed_in.weight", "*word_embeddings.weight", "*tok_embeddings.weight"),
)
HEADS = ("*lm_head.weight", "*embed_out.weight", "output.weight", "*/output.weight", "*predictions.decoder.weight")
_INNER_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """`tie_word_embeddings` of a config or of the language model in it; None where it is not said.

    It speaks of the head and the embedding. Several embeddings (T5's `shared` and `encoder.embed_tokens`) are tied
    whatever it says.
    """
    for owner in (config, *(config.get(key) for key in _INNER_CONFIGS)):
        if isinstance(owner, Mapping) and isinstance(owner.get("tie_word_embeddings"), bool):
            return bool(owner["tie_word_embeddings"])
    return None


def tied_partner(tensor: TensorInfo, other: Checkpoint, own: Checkpoint) -> TensorInfo | None:
    """The tensor of `other` that holds what `tensor` is called there, where `other` keeps it under another name.

    For example aligned's own `lm_head.weight` and the `model.embed_tokens.weight` of a base that ties the two; of names
    that are not known the only table with a row for each word, where the config of `other` ties; unless the tensor's
    `own` checkpoint has one of that name, too, and no config that says it is untied: then it is something else.
    """
    other = model_of(other, tensor.name)
    if not matches(tensor.name, EMBEDDINGS + HEADS):
        words = [table for table in tables_of(other) if table.shape[0] in vocabulary_sizes(other.config)]
        only = words[0] if says_tied(other.config) and len(words) == 1 else None
        beside = (
            only is not None and only.name in own.tensors and says_tied(model_of(own, tensor.name).config) is not False
        )
        return only if only is not None and only.shape == tensor.shape and not beside else None
    is_head, head_is_own = matches(tensor.name, HEADS), says_tied(other.config) is False
    found = [
        candidate
        for candidate in other.tensors.values()
        if candidate.shape == tensor.shape
        and matches(candidate.name, EMBEDDINGS + HEADS)
        and not (head_is_own and is_head != matches(candidate.name, HEADS))
    ]
    return min(found, key=lambda candidate: _distance(candidate.name, tensor.name), default=None)


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names stored beside the one they are tied to: `{"lm_head.weight": "model.embed_tokens.weight"}`.

    Only where both are in the files, alike in shape, dtype and bytes. Both must get the same bytes, or the model that
    is loaded depends on which one the loader takes. Reads samples of tables of a vocabulary.
    """
    return {name: leader for model in models_in(checkpoint) for name, leader in _tied_in(model).items()}


def tie_warnings(checkpoint: Checkpoint) -> list[str]:
    """That names which the config ties hold different numbers; complete messages."""
    return [
        f"{printable(model.folder / 'config.json')}: ties {printable(name)} to {printable(leader)}, but their numbers "
        "differ: each is extrapolated by itself. transformers 5 loads both as they are, earlier versions only one of "
        "them: set tie_word_embeddings to false there if both are meant"
        for model in models_in(checkpoint)
        for name, leader in _at_odds(model).items()
    ]


def look_at(checkpoint: Checkpoint, read: Read) -> None:
    """Read through `read` whatever bytes a plan may look at: those that tell ties, and padding."""
    for model in models_in(checkpoint):
        equal_tables(_compared(model), read)
        for table in tables_of(model):
            padding_rows(table, model, read)


def _tied_in(checkpoint: Checkpoint) -> dict[str, str]:
    """By names that are known, and else by bytes: the name of a head is another one in every architecture."""
    said = says_tied(checkpoint.config)
    groups = _equal(checkpoint)
    result = {name: leader for name, leader in _named(checkpoint).items() if _together(name, leader, groups)}
    for group, told in groups if said is not False else ():
        free = [table for table in group if table.name not in result]
        leader = min(free, key=_leads, default=None)
        if told and leader is not None:
            result |= {table.name: leader.name for table in free if table is not leader}
    return {name: result.get(leader, leader) for name, leader in result.items()}


def _equal(checkpoint: Checkpoint) -> list[tuple[list[TensorInfo], bool]]:
    """Tensors of the same bytes, and whether that tells anything: tables, and what torch has stored once."""
    storages: dict[tuple[object, ...], list[TensorInfo]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.place is not None and tensor.n_bytes:
            storages.setdefault((tensor.path, tensor.start, tensor.dtype, tensor.shape), []).append(tensor)
    return [*((group, True) for group in storages.values() if len(group) > 1), *equal_tables(_compared(checkpoint))]


def _compared(checkpoint: Checkpoint) -> list[TensorInfo]:
    """What may be one weight under two names; where the config unties the head, only what is tied all the same."""
    named = _named(checkpoint)
    found = [checkpoint.tensors[name] for name in dict.fromkeys([*named, *named.values()])]
    others = [] if says_tied(checkpoint.config) is False else tables_of(checkpoint)
    return [*found, *(table for table in others if table not in found)]


def _together(name: str, other: str, groups: Iterable[tuple[list[TensorInfo], bool]]) -> bool:
    return any({name, other} <= {tensor.name for tensor in group} for group, _ in groups)


def _at_odds(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that hold other numbers than those which they are tied to.

    Where no name is known, two tables with a row for each word, if there are just two.
    """
    said = says_tied(checkpoint.config)
    if said is False:
        return {}
    pairs, tied = _named(checkpoint), _tied_in(checkpoint)
    sizes = vocabulary_sizes(checkpoint.config)
    words = sorted((table for table in tables_of(checkpoint) if table.shape[0] in sizes), key=_leads)
    if said and not pairs and len(words) == 2 and len({(table.shape, table.dtype) for table in words}) == 1:
        pairs = {words[1].name: words[0].name}
    return {name: leader for name, leader in pairs.items() if name not in tied}


def _named(checkpoint: Checkpoint) -> dict[str, str]:
    """Known names that are tied if their bytes are equal, and the name that each is tied to."""
    tied = says_tied(checkpoint.config)
    known = [tensor for tensor in checkpoint.tensors.values() if matches(tensor.name, EMBEDDINGS + HEADS)]
    result = {}
    for tensor in known:
        is_head = matches(tensor.name, HEADS)
        leaders = [
            other
            for other in known
            if (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            and other.name != tensor.name
            and ((is_head and tied and matches(other.name, EMBEDDINGS)) or (not is_head and _is_shared(other.name)))
        ]
        if leaders and not _is_shared(tensor.name):
            leader = min(leaders, key=lambda other: (not _is_shared(other.name), _distance(other.name, tensor.name)))
            result[tensor.name] = leader.name
    return result


def _leads(table: TensorInfo) -> tuple[bool, bool, str]:
    """Sorts tables of the same bytes: what is known to be an embedding, what is called one, then by name."""
    return not matches(table.name, EMBEDDINGS), "emb" not in table.name, table.name


def _is_shared(name: str) -> bool:
    return matches(name, SHARED)


def _distance(candidate: str, name: str) -> tuple[bool, int, str]:
    """Sorts candidates: embeddings before heads, then the longest common beginning, then by name."""
    parts = zip(candidate.split("."), name.split("."), strict=False)
    in_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
    return matches(candidate, HEADS), -in_common, candidate
