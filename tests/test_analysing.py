"""`analyze`: every figure against its formula in float64, on planted subspaces, and on all kinds of inputs."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from folders import write
from safetensors.torch import load_file, save_file

import lox_stream
from lox_stream import (
    Cancelled,
    CheckpointError,
    DataError,
    MemoryBudgetError,
    OptionError,
    Options,
    analyze,
    extrapolate,
    measuring,
)
from lox_stream.advising import advice
from lox_stream.analysed import energy_of, mean_of, retained
from lox_stream.recording import document_of, table_text
from lox_stream.synthetic import llama_shapes, orthonormal, write_pair


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(m, n, seed, size=1.0):
    return size * torch.randn(m, n, generator=generator(seed))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, aligned, and aligned after a fine-tuning that takes away some of what alignment brought."""
    folder = tmp_path_factory.mktemp("models")
    base, aligned = write_pair(folder, llama_shapes(64, 160, 2, 200, 32), aligned_shards=2)
    weights = {name: tensor for path in aligned.glob("*.safetensors") for name, tensor in load_file(path).items()}
    before = load_file(base / "model.safetensors")
    tuned = {}
    for i, (name, w1) in enumerate(weights.items()):
        lost = 0.4 * (before[name].float() - w1.float())
        noise = 1e-4 * torch.randn(w1.shape, generator=generator(i))
        tuned[name] = (w1.float() + lost + noise).to(w1.dtype)
    return base, aligned, write(folder / "tuned", tuned)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def found(models):
    return analyze(*models[:2], finetuned=models[2])


def share(u, delta):
    """|U U' delta|_F / |delta|_F."""
    return float(torch.linalg.matrix_norm(u.T @ delta.double()) / torch.linalg.matrix_norm(delta.double()))


@pytest.mark.parametrize("whole_side", [1024, 8])  # by the Gram matrix, and by the solver of a run
def test_every_figure_is_its_formula_in_float64(models, whole_side, monkeypatch):
    monkeypatch.setattr(measuring, "WHOLE_SIDE", whole_side)
    base, aligned, tuned = map(tensors_of, models)
    found = analyze(*models[:2], finetuned=models[2])
    assert len(found.findings) == sum(w.ndim == 2 for w in aligned.values())
    for one in found.findings:
        w0, w1, w2 = (weights[one.tensor].double() for weights in (base, aligned, tuned))
        u, s, _ = torch.linalg.svd(w1 - w0, full_matrices=False)
        assert (one.m, one.n) == tuple(w1.shape)
        assert one.delta_norm == pytest.approx(float((w1 - w0).norm()), rel=1e-6)
        assert one.weight_norm == pytest.approx(float(w1.norm()), rel=1e-6)
        assert one.spectrum.values == pytest.approx(s[:32].tolist(), rel=1e-3)
        assert all(abs(a - b) <= r + 1e-6 * s[0] for a, b, r in zip(one.spectrum.values, s, one.radius, strict=False))
        squares = s.square() / s.square().sum()
        assert one.spectrum.curve == pytest.approx(squares.cumsum(0)[:32].tolist(), rel=1e-3)
        assert one.spectrum.stable_rank == pytest.approx(float(1 / squares[0]), rel=1e-4)
        entropy = math.exp(-float((squares * squares.log()).sum()))
        assert one.entropy_rank[0] * (1 - 1e-3) <= entropy <= one.entropy_rank[1] * (1 + 1e-3)
        assert one.ours.align == pytest.approx(share(u[:, :6], w1 - w0), rel=1e-3)
        assert one.ours.finetuned == pytest.approx(share(u[:, :6], w2 - w0), rel=2e-3)


def test_the_reference_column_is_the_papers_arithmetic(models, found):
    base, aligned, tuned = map(tensors_of, models)
    linear = [one for one in found.findings if one.reference is not None]
    assert {one.tensor for one in found.findings} - {one.tensor for one in linear} == {"model.embed_tokens.weight"}
    for one in linear:
        w0, w1, w2 = (weights[one.tensor] for weights in (base, aligned, tuned))
        align, tune = w1 - w0, w2 - w1  # in bfloat16
        u = torch.linalg.svd(align.float(), full_matrices=False)[0][:, :100].double()
        assert one.reference.rank == min(100, *w1.shape)
        assert one.reference.align == pytest.approx(share(u, align), rel=1e-4)
        assert one.reference.finetuned == pytest.approx(share(u, align + tune), rel=1e-4)
    means = mean_of(one.reference for one in found.findings)
    assert means.matrices == len(linear)
    assert means.align == pytest.approx(sum(one.reference.align for one in linear) / len(linear))


def test_retention_is_that_of_the_run(models, found, tmp_path):
    for rounding in ("nearest", "stochastic"):
        summary = extrapolate(*models[:2], tmp_path / rounding, options=Options(rounding=rounding))
        rows = json.loads((tmp_path / rounding / "lox_stream.json").read_text())["tensors"]
        for one in found.findings:
            (facts,) = rows[one.tensor]["matrices"]
            assert one.retention(6, 1.25, rounding) == pytest.approx(facts["retention"], abs=2e-3)
        assert retained(found.findings, 6, 1.25, rounding) == pytest.approx(summary.totals.retention, abs=2e-3)


def test_a_large_matrix_is_looked_at_in_some_rows(models, found, monkeypatch):
    monkeypatch.setattr(measuring, "LOOKED_AT", 2000)
    some = analyze(*models[:2])
    for one, all_of_it in zip(some.findings, found.findings, strict=True):
        assert one.looked_at < one.m * one.n == all_of_it.looked_at
        assert one.retention(6, 1.25, "nearest") == pytest.approx(all_of_it.retention(6, 1.25, "nearest"), abs=0.1)
    assert retained(some.findings, 6, 1.25, "nearest") == pytest.approx(
        retained(found.findings, 6, 1.25, "nearest"), abs=0.03
    )


def planted(folder, delta, extra=None):
    """A pair whose only matrix differs by `delta`, and a fine-tuned model that differs from base by `extra`."""
    w0 = noisy(*delta.shape, 9)
    base = write(folder / "base", {"a.weight": w0})
    aligned = write(folder / "aligned", {"a.weight": w0 + delta})
    return (base, aligned) if extra is None else (base, aligned, write(folder / "tuned", {"a.weight": w0 + extra}))


def test_a_planted_subspace_has_the_answers_that_are_known(tmp_path):
    u, v = orthonormal(80, 8, generator(1)), orthonormal(50, 8, generator(2))
    sizes = torch.tensor([8.0, 4.0, 2.0])
    delta = (u[:, :3] * sizes) @ v[:, :3].T
    kept, away = u[:, :2] @ v[:, 3:5].T, u[:, 4:6] @ v[:, 5:7].T  # within the first two directions, and outside
    models = planted(tmp_path, delta, kept + away)
    (one,) = analyze(*models[:2], finetuned=models[2], options=Options(rank=2), values=3).findings
    assert one.spectrum.values == pytest.approx(sizes.tolist(), rel=1e-5)
    assert one.ours.align == pytest.approx(math.sqrt(80 / 84), rel=1e-5)
    assert one.ours.finetuned == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert one.spectrum.stable_rank == pytest.approx(84 / 64, rel=1e-5)
    assert one.bulk.outliers == 3


@pytest.mark.parametrize("change", ["rows", "columns", "signs"])
def test_order_and_signs_change_nothing(tmp_path, change):
    delta, tuned = noisy(40, 60, 1, 0.01), noisy(40, 60, 2, 0.01)
    delta += 0.1 * torch.outer(noisy(40, 1, 3)[:, 0], noisy(60, 1, 4)[:, 0])
    rows = torch.randperm(40, generator=generator(5)) if change == "rows" else torch.arange(40)
    columns = torch.randperm(60, generator=generator(6)) if change == "columns" else torch.arange(60)
    signs = torch.randint(0, 2, (60,), generator=generator(7)) * 2 - 1 if change == "signs" else torch.ones(60)

    def turned(a):
        return (a[rows][:, columns] * signs).contiguous()

    w0 = noisy(40, 60, 9)
    results = []
    for name, turn in (("plain", lambda a: a.contiguous()), ("turned", turned)):
        models = [
            write(tmp_path / name / side, {"a.weight": turn(w)})
            for side, w in (("base", w0), ("aligned", w0 + delta), ("tuned", w0 + delta + tuned))
        ]
        results.append(analyze(*models[:2], finetuned=models[2]).findings[0])
    plain, other = results
    assert other.spectrum.values == pytest.approx(plain.spectrum.values, rel=1e-5)
    assert (other.ours.align, other.ours.finetuned) == pytest.approx((plain.ours.align, plain.ours.finetuned), rel=1e-4)
    assert other.reference.finetuned == pytest.approx(plain.reference.finetuned, rel=1e-2)
    assert other.bulk.outliers == plain.bulk.outliers


def lora(folder, weights, rank=3):
    """A LoRA adapter for the projections of a model, and what it adds to each."""
    factors, added = {}, {}
    for i, (name, w) in enumerate(sorted(weights.items())):
        if name.endswith("_proj.weight"):
            a, b = noisy(rank, w.shape[1], i, 0.02), noisy(w.shape[0], rank, i + 50, 0.02)
            at = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
            added[name] = 2.0 * b.double() @ a.double()
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder, added


def test_aligned_may_be_an_adapter(models, tmp_path):
    base = tensors_of(models[0])
    adapter, added = lora(tmp_path / "adapter", base)
    found = analyze(models[0], adapter, options=Options(rank=2), ranks=(1, 2), reference=True)
    assert {one.tensor for one in found.findings} == set(added)
    for one in found.findings:
        s = torch.linalg.svdvals(added[one.tensor])
        assert one.spectrum.values == pytest.approx(s[:3].tolist(), rel=1e-5)
        assert one.spectrum.whole
        assert one.ours.align == pytest.approx(float(s[:2].norm() / s[:3].norm()), rel=1e-5)
        w1 = base[one.tensor].double() + added[one.tensor]
        assert one.weight_norm == pytest.approx(float(w1.norm()), rel=1e-5)
        assert one.reference.align == pytest.approx(1.0, abs=1e-2)  # but for the rounding of both sides to bfloat16


def test_the_fine_tuned_model_may_be_an_adapter_of_aligned(models, tmp_path):
    base, aligned = map(tensors_of, models[:2])
    adapter, added = lora(tmp_path / "adapter", aligned)
    found = analyze(*models[:2], finetuned=adapter)
    merged = {name: w.double() + added.get(name, 0.0) for name, w in aligned.items()}
    for one in found.findings:
        w0, w1, w2 = base[one.tensor].double(), aligned[one.tensor].double(), merged[one.tensor]
        if one.tensor in added:
            u = torch.linalg.svd(w1 - w0)[0][:, :6]
            assert one.ours.finetuned == pytest.approx(share(u, w2 - w0), rel=1e-3)
        else:
            assert one.ours.finetuned == pytest.approx(one.ours.align)


def test_two_adapters_are_refused(models, tmp_path):
    first, _ = lora(tmp_path / "first", tensors_of(models[0]))
    with pytest.raises(CheckpointError, match="expected one model at least"):
        analyze(models[0], first, finetuned=first)


def test_a_fine_tuned_model_of_something_else_is_refused_and_a_lack_is_told(models, tmp_path):
    other = write(tmp_path / "other", {"other.weight": noisy(8, 8, 1)})
    with pytest.raises(CheckpointError, match="has none of the matrices"):
        analyze(*models[:2], finetuned=other)
    tuned = tensors_of(models[2])
    lost = "model.layers.1.mlp.up_proj.weight"
    part = write(tmp_path / "part", {name: w for name, w in tuned.items() if name != lost})
    found = analyze(*models[:2], finetuned=part)
    assert any(lost in warning for warning in found.warnings)
    assert next(one for one in found.findings if one.tensor == lost).ours.finetuned is None
    assert mean_of(one.ours for one in found.findings).matrices == len(found.findings) - 1
    assert any("R_ft / R_align" in sentence for sentence in advice(found.findings, found.asked))


def test_the_same_on_both_sides_is_told(tmp_path):
    w = noisy(20, 20, 1)
    found = analyze(*(write(tmp_path / side, {"a.weight": w}) for side in ("base", "aligned")))
    assert found.findings[0].spectrum is None
    assert "the same in every matrix" in advice(found.findings, found.asked)[0]
    document = document_of(found)
    assert document["totals"]["changed"] == 0
    assert document["matrices"][0]["singular_values"] == []
    assert len(table_text(found).splitlines()) == 2


def test_advice_names_what_it_says_with_figures(models, found):
    told = " ".join(advice(found.findings, found.asked))
    assert "They look like a pair" in told
    assert f"Rank 6 holds {100 * energy_of(found.findings, 6):.2g} % of the energy" in told
    left = retained(found.findings, 6, 1.25, "nearest")
    assert f"Rounding to nearest leaves {100 * left:.2g} %" in told
    assert told.count("R_ft / R_align is") == 2


def test_strangers_are_told_apart_from_a_pair(tmp_path):
    base = write(tmp_path / "base", {"a.weight": noisy(30, 30, 1)})
    aligned = write(tmp_path / "aligned", {"a.weight": noisy(30, 30, 2)})
    found = analyze(base, aligned)
    assert "do not look like a pair" in advice(found.findings, found.asked)[0]


def test_nan_ends_it_or_is_left_out_with_a_word(tmp_path):
    w0, bad = noisy(20, 30, 1), noisy(20, 30, 2)
    bad[3, 4] = math.nan
    base = write(tmp_path / "base", {"a.weight": w0, "b.weight": w0.clone()})
    aligned = write(tmp_path / "aligned", {"a.weight": bad, "b.weight": w0 + 0.01 * noisy(20, 30, 3)})
    with pytest.raises(DataError, match=r"a\.weight: aligned has nan at \[3, 4\]"):
        analyze(base, aligned)
    found = analyze(base, aligned, options=Options(on_nonfinite="copy"))
    assert [one.spectrum is None for one in found.findings] == [True, False]
    assert any("a.weight: not looked at" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"options": Options(rank=0)}, "--rank 0"),
        ({"options": Options(alpha=0.0)}, "--alpha 0"),
        ({"values": 0}, "--values 0"),
        ({"ranks": (0,)}, "--ranks"),
        ({"alphas": (0.0,)}, "--alphas"),
        ({"alphas": 1.25}, "--alphas 1.25"),
        ({"ranks": 5}, "--ranks 5"),
        ({"ranks": "6"}, "--ranks '6'"),
        ({"options": Options(form="peft")}, "form"),
        ({"options": Options(only=("*norm*",))}, "no matrix"),
    ],
)
def test_what_cannot_be_asked_is_refused(models, given, problem):
    with pytest.raises(OptionError, match=problem):
        analyze(*models[:2], **given)


def test_it_can_be_stopped_and_leaves_no_thread(models):
    before, stop = threading.active_count(), threading.Event()
    with pytest.raises(Cancelled):
        analyze(*models[:2], cancel=stop, progress=lambda at: stop.set())
    assert threading.active_count() == before


def test_progress_counts_what_is_looked_at(models):
    seen = []
    found = analyze(*models[:2], progress=seen.append)
    assert [at.done_tensors for at in seen] == sorted(at.done_tensors for at in seen)
    assert seen[-1].done_tensors == seen[-1].total_tensors == len(found.findings)
    assert seen[-1].done_bytes == seen[-1].total_bytes


def test_neither_threads_nor_memory_change_a_figure(models):
    one, other = (
        analyze(*models[:2], options=Options(threads=threads, memory_bytes=memory))
        for threads, memory in ((1, 1 << 28), (2, 4 << 30))
    )
    assert one.findings == other.findings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_stay_as_they_are(tmp_path, dtype):
    """All figures of float64 weights are those of the same numbers in float32: nothing is overwritten on the way."""
    w0, delta = noisy(40, 24, 1).to(dtype), 0.01 * noisy(40, 24, 2).to(dtype)
    models = [
        write(tmp_path / name, {"a.weight": w})
        for name, w in (
            ("base", w0),
            ("aligned", w0 + delta),
            ("tuned", w0 + delta + 0.02 * noisy(40, 24, 3).to(dtype)),
        )
    ]
    (one,) = analyze(*models[:2], finetuned=models[2], options=Options(dtype="bfloat16")).findings
    assert one.retention(6, 1.25, "stochastic") == pytest.approx(1.0, abs=0.02)
    total = delta.double() + 0.02 * noisy(40, 24, 3).double()
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    assert one.ours.finetuned == pytest.approx(share(u[:, :6], total), rel=1e-4)
    part = (u[:, :6] * s[:6]) @ vh[:6]
    assert one.ours.kept == pytest.approx(float((total * part).sum() / part.square().sum()), rel=1e-4)


def test_a_reversed_alignment_is_told(tmp_path):
    delta = 0.01 * noisy(40, 24, 2)
    models = planted(tmp_path, delta, -delta)
    found = analyze(*models[:2], finetuned=models[2])
    (one,) = found.findings
    assert one.ours.finetuned == pytest.approx(one.ours.align, rel=1e-4)
    assert one.ours.kept == pytest.approx(-1.0, abs=1e-4)
    assert any(
        "-100 % is there after it (it is reversed)" in sentence for sentence in advice(found.findings, found.asked)
    )


def test_nan_in_the_fine_tuned_model_is_no_figure(tmp_path):
    bad = 0.01 * noisy(40, 24, 3)
    bad[3, 4] = math.inf
    models = planted(tmp_path, 0.01 * noisy(40, 24, 2), bad)
    with pytest.raises(DataError, match="the fine-tuned model, or its difference from base, holds NaN or Inf"):
        analyze(*models[:2], finetuned=models[2])


def test_what_a_matrix_needs_is_held_against_the_budget(models):
    with pytest.raises(MemoryBudgetError, match=r"to look at it needs \d+ bytes of memory, the budget is 1000000"):
        analyze(*models[:2], options=Options(memory_bytes=1_000_000))


def test_the_package_offers_it():
    assert lox_stream.analyze is analyze
    assert "Analysis" in lox_stream.__all__
