"""What of a model's update a LoRA adapter can carry, and under which names: PEFT's conventions, vLLM's limits.

An adapter is a plan of its own: the same steps, but where `run` writes a tensor it writes the two factors of its
update, which are tensors of `adapter_model.safetensors`. Their shapes are known before anything is computed, so that
the file is reserved, resumed, checked and repaired as any other output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lox_stream.adapters import CONFIG, WEIGHTS, Pair
from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, whence
from lox_stream.matching import Step
from lox_stream.names import hub_name, listing, matches, printable
from lox_stream.options import Options, options_for
from lox_stream.rewriting import DTYPES, laid_out
from lox_stream.stacked import called, is_transposed, not_carried, text_config, wrappers
from lox_stream.ties import EMBEDDINGS, HEADS, says_tied

PREFIX = "base_model.model."
LOOKUPS = (*EMBEDDINGS, "*token_type_embeddings.weight", "*embedding_table.weight")
WORDS = ("*emb*.weight",)  # with a row for each word
POSITIONS = (
    *("*embed_positions.weight", "*position_embedding*.weight", "*wpe.weight", "*pos_embed.weight"),
    *("*relative_attention_bias.weight", "*rel_embeddings.weight"),
)
ROUTERS = ("*router.weight", "*router.*.weight", "*.gate.weight", "*.gate.wg.weight")
EXPERTS = ("*.experts.*",)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
STACKED_BY_PEFT = ("*.mlp.experts.*",)  # of models whose target_modules it rewrites, where these are of experts
TAKEN_FOR_EXPERTS = tuple(f"*.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")  # that have Conv1D of transformers
TURNED = ("*c_attn.weight", "*q_attn.weight", "*c_proj.weight", "*c_fc.weight")
MAMBA_MODELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
REFUSED_OF_MAMBA = ("*.out_proj.weight", "*.conv1d.weight")  # their kernels read the weights past PEFT
WITH_HEAD = (  # embeddings whose head is tied to them, where the files have the embedding alone
    *("model.embed_tokens.weight", "model.decoder.embed_tokens.weight", "gpt_neox.embed_in.weight"),
    *("transformer.wte.weight", "transformer.word_embeddings.weight"),
)
ALSO_CALLED = {"embed_out": ("lm_head",)}  # by transformers 5, once it is loaded; PEFT passes over a name that is none
HEAD_OF = {"whisper": "proj_out", "gpt_neox": "embed_out"}  # by the kind of model; of all others it is lm_head
TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
NOT_PAIRED = {"missing": "a matrix that base lacks", "other shape": "a matrix of another shape in base"}  # by a reason
NO_ALPHA = 1.0  # that is folded into the factors: none


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that is extrapolated, and that an adapter cannot carry."""

    name: str
    reason: str


def as_adapter(
    aligned: Checkpoint, steps: Sequence[Step], options: Options
) -> tuple[Checkpoint, tuple[Step, ...], tuple[LeftOut, ...], list[str]]:
    """The adapter's file in place of aligned's, the steps that write it, what it leaves out, and problems."""
    problems = _problems(steps)
    changed = [step for step in steps if step.action == "extrapolate"]
    reasons = {step.name: NOT_PAIRED[step.reason] for step in steps if step.reason in NOT_PAIRED}
    stacks = [step.name for step in changed if step.count > 1]
    reasons |= {step.name: _refusal(step, aligned, stacks, options) for step in changed}
    carried = [step for step in changed if not reasons[step.name]]
    left = tuple(LeftOut(name, reason) for name, reason in reasons.items() if reason)
    if not carried and not problems:
        problems.append(_nothing(steps, left))
    if problems:
        return aligned, (), left, problems
    rank = max(min(step.rank, step.m, step.n) for step in carried)
    infos: list[TensorInfo] = []
    paired = []
    wrapped = _wrapped(carried)
    for step in carried:
        modules = [wrapped[step.name]] if step.name in wrapped else [(name, "") for name in _modules(step, aligned)]
        pairs = tuple(_pair(step, *module, rank, aligned, options) for module in modules)
        paired.append(replace(step, pairs=pairs))
        infos += [info for pair in pairs for info in (pair.a, pair.b)]
    first = replace(aligned.shards[0], tensors=tuple(infos), header=b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    shard = laid_out(first, WEIGHTS[0], "")
    tensors = {info.name: info for info in shard.tensors}
    written = replace(aligned, shards=(shard,), tensors=tensors, index_name=CONFIG, index={}, companions=())
    placed = tuple(
        replace(step, pairs=tuple(replace(p, a=tensors[p.a.name], b=tensors[p.b.name]) for p in step.pairs))
        for step in paired
    )
    return written, placed, left, []


def _nothing(steps: Iterable[Step], left: Sequence[LeftOut]) -> str:
    """That there is nothing to carry, and why."""
    if any(step.reason == "alpha 0" for step in steps):
        return "--alpha is 0, and an adapter that adds nothing is none; expected another factor. 1.25 is the paper's"
    why = f": left out are {listing(one.name for one in left)} ({left[0].reason})" if left else ""
    return (
        f"no tensor that an adapter can carry is extrapolated{why}; expected one at least. Look at what `lox-stream "
        "run --dry-run` says of the tensors, and at --only and --skip"
    )


def adapter_warnings(steps: Sequence[Step], options: Options) -> list[str]:
    """What a person should know who loads an adapter."""
    warnings = [
        f"{printable(step.name)}: is tied to {printable(step.pairs[1].module)} and the adapter changes both, as PEFT "
        "uses them; PEFT's merge_and_unload() would add the change twice to the one weight: merge with "
        "`lox-stream apply`"
        for step in steps
        if _is_with_head(step)
    ]
    experts = [step.name for step in steps if matches(step.name, EXPERTS) and step.count == 1]
    if experts and options.form == "peft":
        warnings.append(
            f"{len(experts)} of the weights are of experts, which transformers 5 keeps stacked: PEFT stacks their "
            "factors for the models that it knows, and passes over others without a word (docs/adapters.md)"
        )
    stacks = sum(step.count > 1 for step in steps)
    if stacks:
        warnings.append(
            f"{stacks} of the weights are stacks of experts, which the adapter changes as parameters of their modules: "
            "PEFT from 0.19.1 on loads these, in models of transformers 5 (docs/adapters.md)"
        )
    return warnings


def adapter_inputs(aligned: Checkpoint) -> list[str]:
    """What is no model that an adapter could be for."""
    if aligned.components:
        return [
            f"{printable(aligned.root)}: is a pipeline of several models, expected one model for an adapter. Give the "
            "folder of a component, such as its transformer/, as base and as aligned"
        ]
    if aligned.overlay is not None:
        return [
            f"{printable(aligned.overlay.folder)}: aligned is an adapter itself, expected a model. Merge it first: "
            "lox-stream apply --adapter DIR --aligned BASE --out DIR"
        ]
    return []


def _problems(steps: Iterable[Step]) -> list[str]:
    """What is asked for and no adapter can be."""
    problems = []
    full = [step.name for step in steps if step.action == "extrapolate" and step.rank == 0]
    if full:
        problems.append(
            f"an adapter has a rank, and that of {listing(full)} is 0 (full rank); expected 1 or more: --rank"
        )
    split = [step.name for step in steps if step.parts]
    if split:
        problems.append(
            f"--split-fused: an adapter changes {listing(split)} as one matrix. Leave the option away, or skip these"
        )
    return problems


def _refusal(step: Step, aligned: Checkpoint, stacks: Sequence[str], options: Options) -> str:
    """Why a tensor's update cannot be carried; nothing if it can. `stacks`: names of all stacks that are changed."""
    vllm = options.form == "vllm"
    if step.count > 1 and vllm:
        return "a stack of experts, whose factors vLLM has in another order than PEFT"
    if step.count > 1:
        return not_carried(step.name, step.aligned.shape, aligned.config, stacks)
    if not step.name.endswith(".weight"):
        return "a parameter that is no module's weight"
    if _routes(step, aligned):
        return "a router, which PEFT wraps in some versions of transformers only"
    if matches(step.name, POSITIONS):
        return "embeddings of positions, whose modules are of their own kind"
    if _is_lookup(step, aligned):
        if vllm:
            return "an embedding, which vLLM does not take from an adapter"
        if matches(step.name, EMBEDDINGS) and _has_hidden_head(aligned) and step.name not in WITH_HEAD:
            return "an embedding that is tied to a head of unknown name"
    if aligned.config.get("model_type") in MAMBA_MODELS and matches(step.name, REFUSED_OF_MAMBA):
        return "a weight that kernels of Mamba read past any adapter"
    if vllm and matches(step.name, HEADS):
        return "the head, which vLLM takes from the adapters of some models only"
    if vllm and len(step.aligned.shape) != 2:
        return "a convolution, which vLLM does not take from an adapter"
    return ""


def _routes(step: Step, aligned: Checkpoint) -> bool:
    counts = {config.get(key) for config in (aligned.config, text_config(aligned.config)) for key in EXPERT_COUNTS}
    return matches(step.name, ROUTERS) and step.aligned.shape[0] in counts


def _is_lookup(step: Step, aligned: Checkpoint) -> bool:
    """Whether the module looks rows up, so that its factors are those of the transposed weight."""
    if matches(step.name, HEADS) or len(step.aligned.shape) != 2:
        return False
    configs = [aligned.config, *(inner for inner in aligned.config.values() if isinstance(inner, Mapping))]
    sizes = {config.get("vocab_size") for config in configs}
    words = matches(step.name, WORDS) and step.aligned.shape[0] in sizes
    return words or matches(step.name, LOOKUPS)


def _has_hidden_head(aligned: Checkpoint) -> bool:
    """Whether the head is the embedding and not in the files: said so, or it is a language model without one."""
    if any(matches(name, HEADS) for name in aligned.tensors):
        return False
    said = says_tied(aligned.config)
    return _task(aligned.config) == "CAUSAL_LM" if said is None else said


def _modules(step: Step, aligned: Checkpoint) -> list[str]:
    """The modules that a step's update belongs to: with an embedding the head that is tied to it."""
    own = step.name.removesuffix(".weight")
    head = HEAD_OF.get(str(aligned.config.get("model_type")), "lm_head")
    heads = [head, *ALSO_CALLED.get(head, ())]
    if own in heads:
        return heads
    return [own, *heads] if step.name in WITH_HEAD and _has_hidden_head(aligned) else [own]


def _is_with_head(step: Step) -> bool:
    """Whether it is an embedding whose factors are also those of the head that is tied to it."""
    return len(step.pairs) > 1 and ".lora_embedding_" in step.pairs[0].a.name


def _wrapped(carried: Sequence[Step]) -> dict[str, tuple[str, str]]:
    """The module that has the factors, and the parameter, of what PEFT changes as a parameter; by the tensor's name."""
    stacks = {step.name: called(step.name) for step in carried if step.count > 1}
    modules = wrappers(stacks.values())
    found = {name: (modules[parameter], parameter) for name, parameter in stacks.items()}
    if any(matches(parameter, STACKED_BY_PEFT) for parameter in stacks.values()):
        beside = [step.name for step in carried if step.count == 1 and matches(step.name, TAKEN_FOR_EXPERTS)]
        found |= {name: (name.removesuffix(".weight"), name) for name in beside}
    return found


def _pair(step: Step, module: str, parameter: str, rank: int, aligned: Checkpoint, options: Options) -> Pair:
    shape, own = step.aligned.shape, module == step.name.removesuffix(".weight")
    lookup = own and _is_lookup(step, aligned)
    turned = lookup or (aligned.config.get("model_type") in TURNED_MODELS and matches(step.name, TURNED))
    if step.count > 1:
        shape, turned = shape[1:], bool(is_transposed(step.name, shape, aligned.config))
    a, b = (rank, *shape[1:]), (shape[0], rank, *(1,) * (len(shape) - 2))
    if turned:
        a, b = (rank, shape[0]), (shape[1], rank)
    a, b = (a[0] * step.count, *a[1:]), (b[0], b[1] * step.count, *b[2:])
    kind = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
    dtype = DTYPES[options.factor_dtype]
    info_a, info_b = (
        TensorInfo(f"{PREFIX}{module}.{side}", dtype, sizes, step.aligned.path, 0, prod(sizes) * DTYPE_BYTES[dtype])
        for side, sizes in zip(kind, (a, b), strict=True)
    )
    fold = options_for(step.seed_name, options).alpha if options.form == "vllm" else NO_ALPHA
    return Pair(module, info_a, info_b, rank, shape[0], turned, fold, parameter, step.count)


def adapter_config(aligned: Checkpoint, steps: Sequence[Step], options: Options) -> dict[str, Any]:
    """`adapter_config.json` as PEFT writes it: scaling = lora_alpha / r is the alpha of the run.

    For vLLM, which in some versions has no eyes for patterns, alpha is in the factors and the scaling is one.
    """
    pairs = [(step, pair) for step in steps for pair in step.pairs]
    rank = pairs[0][1].rank
    vllm = options.form == "vllm"
    alphas = {pair.parameter or pair.module: options_for(step.seed_name, options).alpha for step, pair in pairs}
    usual = options.alpha if options.alpha in alphas.values() else next(iter(alphas.values()))
    others = {} if vllm else {name: _times(alpha, rank) for name, alpha in alphas.items() if alpha != usual}
    tied = any(map(_is_with_head, steps))
    parameters = _target_parameters([pair.parameter for _, pair in pairs if pair.parameter], aligned)
    linear = [pair for _, pair in pairs if "embedding" not in pair.a.name and not pair.parameter]
    return {
        "peft_type": "LORA",
        "task_type": _task(aligned.config),
        "base_model_name_or_path": hub_name(aligned.folder) or whence(aligned).partition("@")[0],
        "r": rank,
        "lora_alpha": rank if vllm else _times(usual, rank),
        "target_modules": _targets([pair.module for _, pair in pairs if not pair.parameter], aligned),
        **({"target_parameters": parameters} if parameters else {}),
        "alpha_pattern": others,
        "rank_pattern": {},
        "bias": "none",
        "fan_in_fan_out": any(pair.turned for pair in linear),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **({"ensure_weight_tying": True} if tied else {}),
    }


def _times(alpha: float, rank: int) -> float | int:
    """lora_alpha, of which PEFT makes alpha again by a division."""
    product = alpha * rank
    return int(product) if product.is_integer() else product


def _targets(modules: Sequence[str], aligned: Checkpoint) -> list[str]:
    """The last part of the modules' names where all modules of that name are changed; else whole names."""
    carried = set(modules)
    others = {name.removesuffix(".weight") for name in aligned.tensors if name.endswith(".weight")} - carried
    taken = {_last(name) for name in others}
    taken |= {part for name in aligned.tensors for part in _holders(name)}
    return sorted({name if _last(name) in taken or _last(name).isdecimal() else _last(name) for name in modules})


def _target_parameters(parameters: Sequence[str], aligned: Checkpoint) -> list[str]:
    """The last two parts of the parameters' names where all of that name are changed; else whole names."""
    others = {_last_two(name) for name in set(map(called, aligned.tensors)) - set(parameters)}
    return sorted({name if _last_two(name) in others else _last_two(name) for name in parameters})


def _last_two(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _holders(name: str) -> list[str]:
    """The modules on the way to a tensor that hold others, or numbers of their own: none that an adapter wraps."""
    parts = name.split(".")
    return parts[:-2] if parts[-1] in ("weight", "bias") else parts[:-1]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _task(config: Mapping[str, Any]) -> str | None:
    """What kind of model PEFT is to make of it."""
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    found = next((task for ending, task in TASKS if name.endswith(ending)), None)
    if found is None and name.endswith("ForConditionalGeneration"):
        found = "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else "CAUSAL_LM"
    return found
