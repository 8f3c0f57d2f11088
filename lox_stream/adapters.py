"""LoRA adapters as PEFT saves them: what lies in their folder, and by which two thin factors each module changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from lox_stream.checkpoint import Overlay, Shard, TensorInfo
from lox_stream.companions import find_companions
from lox_stream.errors import CheckpointError
from lox_stream.layout import read_json
from lox_stream.names import matches, printable, shown
from lox_stream.quantisation import FLOATS
from lox_stream.shards import read_shard, unreadable
from lox_stream.stacked import parameters_of
from lox_stream.torch_files import read_torch_file

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in this order, as PEFT looks
MERGED = "Merge it into its base first (peft: `model.merge_and_unload()`, then save), and give that as aligned"
BROUGHT = (  # of an adapter's companions, what speaks of the model that it makes
    *("*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*chat_template*", "*.jinja"),
    *("generation_config.json", "*processor_config.json", "special_tokens_map.json"),
)
_WHOLE_MODEL = re.compile(r"(model|diffusion_pytorch_model|pytorch_model)[.-].*(safetensors|bin|\.json)")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?")
_PREFIX = "base_model.model."
_OTHERWISE = {  # keys of the config under which a module does more than add scaling * B A to its weight
    "use_dora": "DoRA scales what it adds to",
    "layer_replication": "layers are repeated",
    "modules_to_save": "whole modules beside the factors",
    "trainable_token_indices": "rows of embeddings beside the factors",
    "lora_bias": "biases of the factors",
    "megatron_config": "layers of Megatron",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
        "a variant of LoRA",
    ),
    "velora_config": "a variant of LoRA",
}
_ON_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # initialisations by name that leave the base as it is
_LARGEST = 1e30  # lora_alpha that is still a number
_UNUSUAL = re.compile(  # of a regular expression: what can take for ever, or what Python warns of
    r"\)[*+{]|\\\d|\(\?[P=!<]|\[[^\]]*(\[|--|&&|~~|\|\|)"
)


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of an (m, n) matrix: `scaling * B A`, or its transpose where the module keeps its weight turned.

    Of a stack they are those of all its matrices, as `stacked` has them.
    """

    a: TensorInfo  # (r, n), or (r, in, ...) of a convolution; turned: (r, m); of a stack (count * r, n)
    b: TensorInfo  # (m, r), or (out, r, 1, ...); turned: (n, r); of a stack (m, r * count)
    rank: int
    scaling: float
    turned: bool = False
    count: int = 1  # matrices that these are the factors of
    number: int = 0  # of the one of them that is meant; of a tensor that is a stack, of its first
    rows: tuple[int, int] | None = None  # of that one, where other tensors have the others; None: all


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of an adapter that is written: the factors of the update of an (m, n) weight."""

    module: str
    a: TensorInfo  # (rank, n), or (rank, in, ...) of a convolution; turned: (rank, m)
    b: TensorInfo  # (m, rank), or (m, rank, 1, ...); turned: (n, rank)
    rank: int  # of all pairs of the adapter; beyond the update's own they hold zeros
    rows: int  # m of the weight; the update may have fewer
    turned: bool  # of a module that keeps the transposed weight, or looks rows up in it
    fold: float  # factor that goes into B
    parameter: str = ""  # that the module is wrapped for; "": the module itself is changed
    count: int = 1  # matrices of a stack, as `stacked` has their factors


@dataclass(frozen=True, slots=True)
class Module:
    """The two factors of a module, before it is known which tensor of the base they belong to."""

    name: str  # of the module in the base's model
    a: TensorInfo
    b: TensorInfo
    rank: int
    scaling: float
    embeds: bool
    changes: str  # name of the tensor
    count: int = 1  # of a stack


@dataclass(frozen=True, slots=True)
class Adapter:
    """What lies in the folder of an adapter."""

    overlay: Overlay
    config: dict[str, Any]
    modules: tuple[Module, ...]
    whole: tuple[TensorInfo, ...]  # tensors that are no factors


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's folder, or its weights; not where a whole model lies beside it."""
    path = Path(path)
    try:
        if path.is_file():
            return path.name in WEIGHTS
        names = {child.name for child in path.iterdir()}
    except OSError:  # no folder, or one that cannot be looked at, which whoever opens it will say
        return False
    return bool(names & {CONFIG, *WEIGHTS}) and not any(map(_WHOLE_MODEL.fullmatch, names))


def open_adapter(path: str | Path) -> Adapter:
    """Read an adapter's config and the header of its weights; raises CheckpointError with all that is wrong."""
    root = Path(path).absolute()
    folder = root if root.is_dir() else root.parent
    config = read_json(folder / CONFIG)
    problems = _config_problems(folder, config)
    if problems:
        raise CheckpointError(problems)
    weights = _weights(folder)
    modules, whole = _modules(folder, config, weights)
    brought = tuple(
        relative for relative in find_companions(folder, WEIGHTS).files if matches(relative.as_posix(), BROUGHT)
    )
    return Adapter(Overlay(folder, (_as_shard(folder / CONFIG), weights), brought), config, modules, whole)


def _weights(folder: Path) -> Shard:
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        raise CheckpointError(
            [f"{printable(folder)}: no weights of the adapter, expected {' or '.join(WEIGHTS)}. Download it again"]
        )
    return (read_shard if name == WEIGHTS[0] else read_torch_file)(folder / name, name)


def _as_shard(path: Path) -> Shard:
    """A small file as a shard that is nothing but header: its hash is part of what a run is told by."""
    try:
        data, status = path.read_bytes(), path.stat()
    except OSError as error:
        raise CheckpointError([unreadable(path, error)]) from error
    return Shard(path.name, path.resolve(), len(data), status.st_mtime_ns, data, xxhash.xxh3_128_hexdigest(data), ())


def _config_problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What makes a module's change another one than scaling * B A on the weights of base."""
    where = printable(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{where}: peft_type is {shown(kind)}, expected 'LORA'. {MERGED}"]
    problems = [
        f"{where}: {key} is {shown(config[key], 40)} ({what}), expected none. {MERGED}"
        for key, what in _OTHERWISE.items()
        if config.get(key)
    ]
    if config.get("bias") not in (None, "none"):
        problems.append(f"{where}: bias is {shown(config['bias'])}, expected 'none'. {MERGED}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _ON_THE_BASE:
        problems.append(
            f"{where}: init_lora_weights is {shown(start, 60)}, which changes the base before training (pissa, olora, "
            f"corda, loftq, lora_ga) or is not known here; expected true, false or {', '.join(_ON_THE_BASE)}. Convert "
            "it: PEFT saves with path_initial_model_for_weight_conversion"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(where, key, config.get(key))
    return [*problems, *_target_problems(where, config)]


def _target_problems(where: str, config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_parameters")
    if not targets:
        return []
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        return [f"{where}: target_parameters is {shown(targets, 40)}, expected [name, ...]. Download it again"]
    alone = [target for target in targets if "." not in target]
    if alone and not isinstance(config.get("target_modules") or [], list):
        return [
            f"{where}: target_parameters names {shown(alone[0], 40)} without its module, and target_modules is a "
            f"pattern; expected names of both. {MERGED}"
        ]
    return []


def _pattern_problems(where: str, key: str, patterns: Any) -> list[str]:
    if not patterns:
        return []
    if not isinstance(patterns, dict):
        return [f"{where}: {key} is {shown(patterns, 40)}, expected {{pattern: number}}. Download it again"]
    return [
        f"{where}: {key} has {shown(pattern, 60)}, expected a module's name or a regular expression with at most two "
        f"repetitions, none of them of a group. {MERGED}"
        for pattern in patterns
        if not _is_plain(pattern)
    ]


def _is_plain(pattern: str) -> bool:
    """Whether a regular expression is one, and matches in no more time than its and a name's length let expect."""
    if _UNUSUAL.search(pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
        return False
    try:
        _ending(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _modules(
    folder: Path, config: Mapping[str, Any], weights: Shard
) -> tuple[tuple[Module, ...], tuple[TensorInfo, ...]]:
    """The pairs of factors by module, and all other tensors; raises CheckpointError."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    whole, problems = [], []
    for tensor in weights.tensors:
        found = _FACTOR.fullmatch(tensor.name)
        if found is None:
            whole.append(tensor)
            continue
        sides = parts.setdefault(found[1].removeprefix(_PREFIX), {})
        if found[3] in sides:
            problems.append(
                f"{printable(tensor.name)}: is there twice, expected one adapter in the file. Save it again"
            )
        sides[found[3]] = tensor
    modules, changed = [], _changed(folder / weights.name, parts, config)
    for name, sides in parts.items():
        if "A" not in sides or "B" not in sides:
            there = sides.get("A", sides.get("B"))
            problems.append(f"{printable(there.name if there else name)}: its other factor is missing. Save it again")
            continue
        try:
            modules.append(_module(name, changed.get(name, ""), sides, config))
        except ValueError as error:
            problems.append(f"{printable(name)}: {error}")
    if not parts and not problems:
        problems.append("no factors in it, expected tensors such as ...q_proj.lora_A.weight. Save it again")
    if problems:
        raise CheckpointError([f"{printable(folder / weights.name)}: {problem}" for problem in problems])
    return tuple(modules), tuple(whole)


def _changed(path: Path, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The parameters that are changed by themselves, by the module that has their factors; raises CheckpointError."""
    modules = config.get("target_modules")
    others = [one for one in modules if isinstance(one, str)] if isinstance(modules, list) else []
    try:
        return parameters_of(names, config.get("target_parameters") or [], others)
    except ValueError as error:
        raise CheckpointError([f"{printable(path)}: {printable(str(error))}. {MERGED}"]) from error


def _module(name: str, parameter: str, sides: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Module:
    """Raises ValueError for factors that do not fit each other or the config."""
    a, b, pattern = sides["A"], sides["B"], parameter or name
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        raise ValueError(f"its factors are {a.dtype} and {b.dtype}, expected F32, F16, BF16 or F64. {MERGED}")
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] == 0 or math.prod(b.shape[1:]) != a.shape[0]:
        raise ValueError(
            f"factors {a.shape} and {b.shape} do not multiply, expected (r, in) and (out, r): grouped convolutions, or "
            f"shards of a parallel trainer that were not gathered. {MERGED}"
        )
    rank, said = a.shape[0], _said(config, "rank_pattern", "r", pattern)
    count = rank // said if parameter and type(said) is int and 0 < said <= rank else 1
    if type(said) is not int or said * count != rank:
        times = ", or that times so many experts" * bool(parameter)
        raise ValueError(f"its rank is {rank}, {CONFIG} says {shown(said)}{times}. Take both from the same save")
    rank = said
    alpha = _said(config, "alpha_pattern", "lora_alpha", pattern)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST:
        raise ValueError(f"{CONFIG} says a lora_alpha of {shown(alpha)}, expected a number. Save it again")
    scaling, changes = _scaling(alpha, rank, config), parameter or f"{name}.weight"
    return Module(name, a, b, rank, scaling, ".lora_embedding_" in a.name, changes, count)


def _scaling(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """What the factors' product is taken times; an alpha that was written as a decimal, times r, is that decimal again.

    >>> 0.7 * 6 / 6, _scaling(0.7 * 6, 6, {})
    (0.6999999999999998, 0.7)
    """
    return float(f"{alpha / (math.sqrt(rank) if config.get('use_rslora') else rank):.15g}")


def rescaled_to(adapter: Adapter, scaling: float) -> Adapter:
    """The adapter with another lora_alpha / r; modules with an alpha or a rank of their own keep their share of it.

    Raises CheckpointError where there is nothing that it could be a share of.
    """
    config = adapter.config
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    usual = _scaling(alpha, rank, config) if type(rank) is int and rank > 0 and type(alpha) in (int, float) else 0.0
    if not usual:
        where = printable(adapter.overlay.folder / CONFIG)
        raise CheckpointError(
            [
                f"{where}: lora_alpha is {shown(alpha)} and r {shown(rank)}, expected two numbers whose quotient "
                "--alpha takes the place of. Leave --alpha out"
            ]
        )
    modules = [
        replace(one, scaling=scaling if one.scaling == usual else one.scaling / usual * scaling)
        for one in adapter.modules
    ]
    return replace(adapter, modules=tuple(modules))


def _said(config: Mapping[str, Any], patterns: str, otherwise: str, name: str) -> Any:
    """What the first pattern says that a module's name ends with (`get_pattern_key` of PEFT), or the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if _ending(pattern).match(name):
            return value
    return config.get(otherwise, 8)  # what PEFT takes where nothing is said


def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def own_name(tensor: TensorInfo) -> str:
    """The name in the base's model of a whole tensor that an adapter holds."""
    return tensor.name.removeprefix(_PREFIX).replace(".base_layer.", ".")
