"""Tied weights: names that a model keeps as one tensor and that a file may hold once, twice, or under another name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo, model_of, models_in
from lox_stream.names import matches

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


def tied_partner(tensor: TensorInfo, other: Checkpoint) -> TensorInfo | None:
    """The tensor of `other` that holds what `tensor` is called there, where `other` keeps it under another name.

    For example aligned's own `lm_head.weight` and the `model.embed_tokens.weight` of a base that ties the two.
    """
    if not matches(tensor.name, EMBEDDINGS + HEADS):
        return None
    other = model_of(other, tensor.name)
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

    Only where both are in the files, alike in shape and dtype. Both must get the same bytes, or the model that is
    loaded depends on which one the loader takes.
    """
    return {name: leader for model in models_in(checkpoint) for name, leader in _tied_in(model).items()}


def _tied_in(checkpoint: Checkpoint) -> dict[str, str]:
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


def _is_shared(name: str) -> bool:
    return matches(name, SHARED)


def _distance(candidate: str, name: str) -> tuple[bool, int, str]:
    """Sorts candidates: embeddings before heads, then the longest common beginning, then by name."""
    parts = zip(candidate.split("."), name.split("."), strict=False)
    in_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
    return matches(candidate, HEADS), -in_common, candidate
