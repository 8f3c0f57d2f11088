"""Weights that PEFT changes as parameters of a module (`target_parameters`): stacks of experts, above all.

PEFT wraps a module once for each of its parameters, in the order in which the module has them, so that the last is
outermost: `...experts.base_layer.lora_A` is a factor of `gate_up_proj`, and `...experts.lora_A` one of `down_proj`. The
A of a stack of E matrices has theirs one under the other, (E * r, in); the columns of B take turns, (out, r * E). Which
side is in and which is out the module says, `is_transposed` (PEFT 0.19.1 and newer, transformers 5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from lox_stream.kinds import STACKED
from lox_stream.names import listing, matches, printable

ORDER = (  # in which modules of transformers have them
    *("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
    *("w1", "v1", "w2"),  # of DBRX
    *("input_gate_weight", "recurrent_gate_weight"),  # of RecurrentGemma: blocks of a block-diagonal matrix
)
CALLED = (  # in files, and by transformers 5 once they are loaded
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),  # GraniteMoE
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".mlp.experts.fc1.weight", ".mlp.experts.gate_up_proj"),  # Aria
    (".mlp.experts.fc2.weight", ".mlp.experts.down_proj"),
)
TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # that say so of their experts
EITHER_WAY = (
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)  # (hidden, 2 * ffn) on the hub, saved by transformers 5 the other way
APART = {  # of experts that are files' matrices and a model's stack: the parts of each, one under the other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
MIXTRAL = (".mlp.experts", ".block_sparse_moe.experts")  # the module, and where its files have the experts
WRAPPER = ".base_layer"


def called(name: str) -> str:
    """The name of a stack in the model.

    >>> called("model.layers.0.block_sparse_moe.output_linear.weight"), called("a.mlp.experts.down_proj")
    ('model.layers.0.block_sparse_moe.experts.down_proj', 'a.mlp.experts.down_proj')
    """
    for ending, other in CALLED:
        if name.endswith(ending):
            return name.removesuffix(ending) + other
    return name


def stored(name: str) -> str:
    """The name of a stack in files, of that in the model."""
    for other, ending in CALLED:
        if name.endswith(ending):
            return name.removesuffix(ending) + other
    return name


def is_transposed(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> bool | None:
    """Whether PEFT has the factors (r, m) and (n, r) of an (m, n) of a stack, and not (r, n) and (m, r).

    None: the model has it either way, and the shape does not tell.
    """
    inner = text_config(config)
    if config.get("model_type") not in EITHER_WAY:
        return config.get("model_type") in TRANSPOSED or inner.get("model_type") in TRANSPOSED
    hidden, down = inner.get("hidden_size", config.get("hidden_size")), name.endswith("down_proj")
    if hidden not in shape[-2:] or shape[-1] == shape[-2]:
        return None
    return bool((shape[-1] if down else shape[-2]) == hidden)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """That of the language model in a model of several kinds; empty where it is one itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else {}


def not_carried(name: str, shape: Sequence[int], config: Mapping[str, Any], others: Collection[str]) -> str:
    """Why no adapter of PEFT can have the update of a stack, with `others` in the model; nothing if it can."""
    if any(matches(name, names) for names, _ in STACKED):
        return "experts one under the other in two dimensions, which PEFT changes as one matrix"
    module, _, own = called(name).rpartition(".")
    if not module:
        return "a stack that is no module's parameter but the model's own"
    beside = {one.rpartition(".")[2] for one in map(called, others) if one.rpartition(".")[0] == module} - {own}
    if beside and not {own, *beside} <= set(ORDER):
        return f"one of several stacks of a module ({listing(sorted({own, *beside}))}), whose order in it is not known"
    if is_transposed(name, shape, config) is None:
        return "a stack of square matrices that the model may have turned"
    return ""


def wrappers(parameters: Iterable[str]) -> dict[str, str]:
    """The module that has the factors of each parameter, as PEFT nests those of one module.

    >>> wrappers(["a.gate_up_proj", "a.down_proj", "b.gate_up_proj"])
    {'a.down_proj': 'a', 'a.gate_up_proj': 'a.base_layer', 'b.gate_up_proj': 'b'}
    """
    found: dict[str, str] = {}
    depths: dict[str, int] = {}
    for parameter in sorted(parameters, key=_place, reverse=True):
        module = parameter.rpartition(".")[0]
        found[parameter] = module + WRAPPER * depths.get(module, 0)
        depths[module] = depths.get(module, 0) + 1
    return found


def parameters_of(modules: Iterable[str], targets: Sequence[str], others: Collection[str]) -> dict[str, str]:
    """The parameter that each module of an adapter has factors of, but for those that are changed as modules.

    `targets` and `others` are what the config names as parameters and as modules. Raises ValueError.
    """
    wrapped: dict[str, list[str]] = {}
    for module in modules:
        wrapped.setdefault(_root(module), []).append(module)
    found: dict[str, str] = {}
    for root, nested in wrapped.items():
        names = _named(root, targets, others)
        if not names:
            continue
        if len(names) != len(nested):
            raise ValueError(
                f"{printable(root)}: has {len(nested)} pairs of factors, target_parameters names {listing(names)} of "
                "it; expected as many"
            )
        if len(names) > 1 and not set(names) <= set(ORDER):
            raise ValueError(f"{printable(root)}: {listing(names)} are parameters whose order in it is not known")
        own = [f"{root}.{name}" for name in names]
        found |= {module: parameter for parameter, module in wrappers(own).items()}
    return found


def apart(parameter: str, count: int, names: Collection[str]) -> list[list[str]]:
    """The matrices in a checkpoint that a model stacks to a parameter: of each expert one, or its gate and its up."""
    root, _, own = parameter.rpartition(".")
    for where in (root, root.replace(*MIXTRAL)):
        for parts in APART.get(own, ()):
            experts = ([f"{where}.{number}.{part}.weight" for part in parts] for number in range(count))
            found = list(takewhile(lambda expert: all(name in names for name in expert), experts))
            if len(found) == count:
                return found
    return []


def _place(parameter: str) -> tuple[int, str]:
    name = parameter.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else -1, name


def _root(module: str) -> str:
    end = len(module)
    while module.endswith(WRAPPER, 0, end):
        end -= len(WRAPPER)
    return module[:end]


def _named(root: str, targets: Sequence[str], others: Collection[str]) -> list[str]:
    """The parameters of a module that an adapter's config names: with their module, or alone."""
    pairs = [target.rpartition(".")[::2] for target in targets]
    found = {name for module, name in pairs if module and f".{root}".endswith(f".{module}")}
    alone = {name for module, name in pairs if not module}
    if alone and not found and not any(f".{root}".endswith(f".{module}") for module in others):
        found = alone
    return sorted(found, key=_place)
