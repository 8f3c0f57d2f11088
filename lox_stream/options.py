"""What a user may ask for: the options, their checks, sizes as people write them, and the platform."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lox_stream.errors import LoxError, OptionError
from lox_stream.names import counted, matches, shown

MAX_NUMBER = 2**63 - 1
MAX_THREADS = 1024
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


@dataclass(frozen=True, slots=True)
class Rule:
    """What a recipe says of the tensors whose names match, where the options would say something else."""

    match: str  # a glob
    rank: int | None = None
    alpha: float | None = None
    rounding: Literal["nearest", "stochastic"] | None = None
    skip: bool = False
    split_fused: bool | None = None
    at: str = field(default="", compare=False, repr=False)  # "--recipe FILE, line 7", for messages and nothing else


@dataclass(frozen=True, slots=True)
class Options:
    """All that a run may be told. Those before `device` change bytes, and it too; the others are free on resume."""

    rank: int = 6  # 0: full rank, no SVD; min(m, n) and more: delta itself
    alpha: float = 1.25
    svd: Literal["randomized", "exact"] = "randomized"
    tolerance: float = 2e-4  # share of output elements that may differ from the exact result
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    on_nonfinite: Literal["error", "copy"] = "error"
    rename: tuple[str, ...] = ()  # PATTERN=REPLACEMENT: names of base as aligned has them
    on_missing: Literal["error", "copy"] = "error"  # a matrix that base lacks
    on_shape_mismatch: Literal["error", "copy", "overlap"] = "error"  # overlap: the rows that both have
    split_fused: bool = False  # the parts of fused projections as matrices of their own
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"  # of the output's floats
    max_shard_size: int = 0  # bytes of tensors in a file of the output; 0: the files of aligned
    form: Literal["weights", "peft", "vllm"] = "weights"  # what is written: the model, or its update as an adapter
    factor_dtype: Literal["float32", "bfloat16"] = "float32"  # of that adapter's factors
    part: str = ""  # "2/8": the second of eight shares of the output's files; "": all of it
    scaling: float | None = None  # of an adapter's factors; None: as its config says
    solved_for: float = 0.0  # alpha that the tolerance is for; 0: alpha itself
    recipe: tuple[Rule, ...] = ()  # the first that matches a name counts; skip and only win over all
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:N" | "cuda:N,M,..." | "cuda:all"
    memory_bytes: int = 4 << 30  # for the program's own buffers
    threads: int = 0  # 0: all cores
    gpu_memory_bytes: int = 0  # of each GPU; 0: 80 % of what is free on it
    kernels: Literal["auto", "triton", "torch"] = "auto"  # on a GPU


def rule_for(name: str, options: Options) -> Rule | None:
    """The rule of the recipe that counts for a tensor."""
    return next((rule for rule in options.recipe if matches(name, (rule.match,))), None)


def said_by(rule: Rule) -> dict[str, Any]:
    """The options that a rule changes."""
    said = {name: getattr(rule, name) for name in ("rank", "alpha", "rounding", "split_fused")}
    return {name: value for name, value in said.items() if value is not None}


def options_for(name: str, options: Options) -> Options:
    """The options as they are for one tensor."""
    rule = rule_for(name, options)
    if rule is None:
        return options
    solved_for = options.solved_for if rule.alpha is None else 0.0
    return replace(options, solved_for=solved_for, **said_by(rule))


def alpha_solved_for(options: Options) -> float:
    """The factor for which a matrix is solved as accurately as the tolerance asks."""
    return options.solved_for or options.alpha


def to_json(options: Options) -> dict[str, Any]:
    """The options as JSON holds them; where a rule stood in its file is not among them."""
    said = asdict(options)
    for rule in said["recipe"]:
        del rule["at"]
    return said


def from_json(said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Options that JSON or TOML holds: lists as tuples, rules as Rule. Raises TypeError for other rules."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    if "recipe" in fields:
        fields["recipe"] = tuple(Rule(**{**rule, "at": ""}) for rule in fields["recipe"])
    return fields


def is_gpu(device: str) -> bool:
    """Whether a value of `Options.device` asks for a GPU."""
    return device.startswith("cuda")


def gpu_count(device: str) -> int:
    """How many GPUs a value of `Options.device` names; one for "cuda:all", as long as nobody has counted them.

    >>> gpu_count("cpu"), gpu_count("cuda"), gpu_count("cuda:0,2")
    (0, 1, 2)
    """
    return device.count(",") + 1 if is_gpu(device) else 0


def check_options(options: Options) -> None:
    """Raise OptionError that names every option whose value cannot be obeyed."""
    problems = [
        *_whole_number("--rank", options.rank, 0, None, "0 is full rank: delta itself, without an SVD"),
        *_whole_number("--seed", options.seed, 0, MAX_NUMBER, "any such number gives its own reproducible rounding"),
        *_whole_number("--threads", options.threads, 0, MAX_THREADS, "0 uses all cores"),
        *_whole_number("--memory", options.memory_bytes, 1, None, "write a size such as 4GiB or 512M"),
        *_whole_number("--gpu-memory", options.gpu_memory_bytes, 0, None, "0 uses 80 % of what is free"),
        *_real_number("--alpha", options.alpha, -math.inf, "1.25 is the paper's; 0 copies the aligned weights"),
        *_real_number("--tolerance", options.tolerance, 0.0, "2e-4 is the default: one element in 5000 may differ"),
        *([] if options.scaling is None else _real_number("--alpha", options.scaling, -math.inf, "1 is PEFT's")),
        *_real_number("solved_for", options.solved_for, -math.inf, "0 is alpha itself"),
        *_part(options.part),
        *_one_of("--target", options.form, ("weights", "peft", "vllm")),
        *_one_of("factor_dtype", options.factor_dtype, ("float32", "bfloat16")),
        *_one_of("--svd", options.svd, ("randomized", "exact")),
        *_one_of("--rounding", options.rounding, ("nearest", "stochastic")),
        *_one_of("--on-nonfinite", options.on_nonfinite, ("error", "copy")),
        *_one_of("--on-missing", options.on_missing, ("error", "copy")),
        *_one_of("--on-shape-mismatch", options.on_shape_mismatch, ("error", "copy", "overlap")),
        *_yes_or_no("--split-fused", options.split_fused),
        *_one_of("--dtype", options.dtype, ("same", "float32", "float16", "bfloat16")),
        *_whole_number("--max-shard-size", options.max_shard_size, 0, None, "0 keeps the files of aligned"),
        *_device(options.device),
        *_one_of("--kernels", options.kernels, ("auto", "triton", "torch")),
        *_for_gpus(options),
        *_globs("--skip", options.skip),
        *_globs("--only", options.only),
        *_renames(options.rename),
        *_rules(options.recipe),
    ]
    if problems:
        raise OptionError("\n".join(problems))


def parse_size(text: str) -> int:
    """Bytes in a size as people write it: `4GiB`, `4G`, `512M`, `1.5 GB`, `1000000`.

    `K M G T` with or without `B` are powers of 1000, `KiB MiB GiB TiB` (also `Ki ...`) powers of 1024.

    >>> parse_size("4GiB"), parse_size("1.5 GB")
    (4294967296, 1500000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS:
        raise OptionError(f"{text!r} is not a size. Write a number with a unit, such as 4GiB, 512M or 1.5GB")
    n_bytes = int(float(found[1]) * _UNITS[found[2]]) if "." in found[1] else int(found[1]) * _UNITS[found[2]]
    if n_bytes < 1:
        raise OptionError(f"{text!r} is less than one byte. Write a size such as 4GiB or 512M")
    return n_bytes


def check_platform() -> None:
    """Raise LoxError on Windows, which lacks the file operations that keep an output whole."""
    if sys.platform == "win32":
        raise LoxError(
            "lox-stream does not run on Windows itself: it needs the file operations of Linux (or macOS). "
            "Use it in WSL: `wsl --install` in a terminal, then install and run it inside"
        )


def check_ways(*, resume: bool, overwrite: bool, repair: bool) -> None:
    """Raise OptionError for ways to treat an output folder that exclude each other."""
    if resume and overwrite:
        raise OptionError("--resume and --overwrite are both given, expected one: go on with the run, or start it anew")
    if repair and not resume:
        raise OptionError("--repair is given without --resume, expected both: it goes on from what is right")


def _whole_number(option: str, value: object, low: int, high: int | None, hint: str) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= (high or MAX_NUMBER):
        return []
    unbounded = high is None and not (isinstance(value, int) and value > MAX_NUMBER)
    wanted = f"{low} or more" if unbounded else f"{low} to {high or MAX_NUMBER}"
    return [f"{option} is {shown(value)}, expected a whole number, {wanted}; {hint}"]


def _real_number(option: str, value: object, above: float, hint: str) -> list[str]:
    """Finite and above a bound; a tolerance also has to be under 1."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if math.isfinite(number) and (above == -math.inf or above < number < 1):
        return []
    wanted = "a finite number" if above == -math.inf else "a number over 0 and under 1"
    return [f"{option} is {shown(value)}, expected {wanted}; {hint}"]


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{option} is {shown(value)}, expected {' or '.join(allowed)}"]


def _yes_or_no(option: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{option} is {shown(value)}, expected true or false"]


def _device(value: object) -> list[str]:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:(all|[0-9]{1,3}(,[0-9]{1,3})*))?", value):
        numbers = value.removeprefix("cuda:").split(",")
        if len(set(map(int, filter(str.isdigit, numbers)))) in (0, len(numbers)):
            return []
    return [
        f"--device is {shown(value)}, expected auto, cpu, cuda, cuda:N (the N-th GPU, from 0), cuda:0,1 or cuda:all"
    ]


def _for_gpus(options: Options) -> list[str]:
    """What is said about GPUs where none is asked for."""
    if not isinstance(options.device, str) or is_gpu(options.device):
        return []
    given = {"--kernels": options.kernels != "auto", "--gpu-memory": options.gpu_memory_bytes != 0}
    return [
        f"{option} is for --device cuda, and --device is {options.device!r}; expected both or none. Leave {option} out"
        for option, said in given.items()
        if said
    ]


def _part(value: object) -> list[str]:
    if value == "":
        return []
    found = re.fullmatch(r"([1-9]\d{0,4})/([1-9]\d{0,4})", value) if isinstance(value, str) else None
    if found is not None and int(found[1]) <= int(found[2]):
        return []
    return [f"--part is {shown(value)}, expected such as 2/8: the second of eight parts"]


def _globs(option: str, value: object) -> list[str]:
    if isinstance(value, str):
        return [f"{option} is one string, {shown(value)}, expected a tuple of globs: ({shown(value)},)"]
    if not isinstance(value, tuple) or not all(isinstance(glob, str) for glob in value):
        return [f"{option} is {shown(value)}, expected a tuple of globs such as ('lm_head.weight', '*.mlp.*')"]
    if "" in value:
        return [f"{option} holds an empty glob, expected a tensor's name or a glob such as '*.mlp.*'"]
    return []


def rename_problem(text: str) -> str:
    """What is wrong with a `PATTERN=REPLACEMENT`, in words; nothing if it can be obeyed.

    >>> rename_problem("model.*=language_model.*")
    ''
    """
    pattern, _, replacement = text.partition("=")
    if not (pattern and replacement):
        return "expected PATTERN=REPLACEMENT, such as 'model.*=language_model.model.*'"
    known, wanted = (len(re.findall("[*?]", side)) for side in (pattern, replacement))
    if known != wanted:
        has = f"the pattern has {counted(known, 'wildcard')} and the replacement {wanted}"
        return f"{has}, expected as many: each stands for one"
    return ""


def _renames(value: object) -> list[str]:
    problems = _globs("--rename", value)
    if problems or not isinstance(value, tuple):
        return problems
    return [f"--rename {text!r}: {problem}" for text in value if (problem := rename_problem(text))]


def rule_problems(rule: Rule) -> list[str]:
    """What is wrong with a rule of a recipe, each complete but for where it stands."""
    checks = [
        *([] if rule.rank is None else _whole_number("rank", rule.rank, 0, None, "0 is full rank")),
        *([] if rule.alpha is None else _real_number("alpha", rule.alpha, -math.inf, "0 copies the aligned weights")),
        *([] if rule.rounding is None else _one_of("rounding", rule.rounding, ("nearest", "stochastic"))),
        *_yes_or_no("skip", rule.skip),
        *([] if rule.split_fused is None else _yes_or_no("split_fused", rule.split_fused)),
    ]
    if not isinstance(rule.match, str) or not rule.match:
        checks.append(f"match is {shown(rule.match)}, expected a tensor's name or a glob such as '*.mlp.*'")
    if rule.skip is True and said_by(rule):
        checks.append("skip is true, and there is more beside it; expected nothing else for tensors that are copied")
    if not rule.skip and not said_by(rule):
        checks.append("it says nothing, expected rank, alpha, rounding, split_fused or skip")
    return checks


def _rules(value: object) -> list[str]:
    if not isinstance(value, tuple) or not all(isinstance(rule, Rule) for rule in value):
        return [f"recipe is {shown(value)}, expected a tuple of Rule"]
    places = [rule.at or f"recipe, rule {i}" for i, rule in enumerate(value, 1)]
    return [f"{at}: {problem}" for at, rule in zip(places, value, strict=True) for problem in rule_problems(rule)]


def thread_count(options: Options) -> int:
    """Computing threads: as asked, or one for each core this process may use."""
    if options.threads:
        return options.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
