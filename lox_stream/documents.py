"""The files that stand beside the weights of a finished output: model card, index, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lox_stream import files
from lox_stream.adapters import CONFIG as ADAPTER_CONFIG
from lox_stream.carrying import adapter_config
from lox_stream.checkpoint import companion_path, models_in
from lox_stream.facts import Documents, TensorFacts
from lox_stream.files import GO_ON
from lox_stream.layout import PIPELINE_INDEX
from lox_stream.manifest import as_json, corrected_index, manifest_of, stamp, stamp_of, totals
from lox_stream.model_card import card_for
from lox_stream.model_config import CONFIG, config_for
from lox_stream.output_rules import MANIFEST, MODEL_CARD
from lox_stream.planning import Plan
from lox_stream.sealing import sealed


def written_documents(
    plan: Plan,
    finished: Mapping[str, TensorFacts],
    *,
    elapsed_s: float,
    sessions: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    began: Mapping[str, Any] | None = None,
) -> Documents:
    """What `Output.publish` makes of them; `sessions` and the rest as for `manifest_of`.

    Reads the companions, for their checksums; raises OutputError for one that cannot be read any more.
    """
    written: dict[str, bytes] = {}
    whole = not plan.options.part
    if whole:
        with files.explained(plan.aligned.folder, "read its model card", GO_ON):
            written[MODEL_CARD] = card_for(plan, totals(finished.values()))
    if plan.options.form != "weights":
        written[ADAPTER_CONFIG] = as_json(adapter_config(plan.aligned, plan.steps, plan.options))
    for model in models_in(plan.written) if plan.options.form == "weights" and whole else ():
        if model.index_name is not None:
            written[model.index_name] = as_json(corrected_index(model))
        config = None if plan.options.dtype == "same" else config_for(model, plan.options.dtype)
        if config is not None:
            written[model.prefix + CONFIG] = config
    if plan.written.components:
        path = plan.aligned.folder / PIPELINE_INDEX
        with files.explained(path, "read it", GO_ON):
            written[PIPELINE_INDEX] = path.read_bytes()
    copied = {}
    for relative in plan.aligned.companions if whole else ():
        if relative.as_posix() not in written:
            path = companion_path(plan.aligned, relative)
            with files.explained(path, "read it", GO_ON):
                copied[relative.as_posix()] = stamp_of(path)
    beside = {name: stamp([data]) for name, data in written.items()} | copied
    facts = manifest_of(
        plan, finished, elapsed_s=elapsed_s, sessions=sessions, warnings=warnings, beside=beside, began=began
    )
    manifest = {MANIFEST: sealed(as_json(facts))}
    return Documents(written | manifest, {name: row["xxh3_128"] for name, row in copied.items()})
