"""Pipelines of diffusers: several components in one folder, extrapolated as one checkpoint and published as one."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace

import exactly
import pytest
import torch
from folders import write
from safetensors.torch import load_file, save_file

from lox_stream import Options, errors, extrapolate, plan, stream
from lox_stream.checkpoint import open_checkpoint
from lox_stream.files import replace_file
from lox_stream.inspecting import inspect_checkpoint
from lox_stream.recomputing import compare_all
from lox_stream.sampling import choose_sample
from lox_stream.synthetic import pair_of
from lox_stream.verifying import verify_checksums

OPTIONS = Options(rank=3)
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
TENSORS = {
    "transformer": {"blocks.0.attn.to_q.weight": (40, 30), "blocks.1.attn.to_q.weight": (40, 30), "norm.weight": (9,)},
    "text_encoder": {"shared.weight": (50, 20), "encoder.embed_tokens.weight": (50, 20), "lm_head.weight": (50, 20)},
    "text_encoder_2": {"shared.weight": (50, 20), "block.0.wo.weight": (20, 24)},
    "vae": {"encoder.conv_in.weight": (16, 3, 3, 3), "decoder.proj.weight": (24, 24)},
}
CONFIGS = {
    "transformer": {"_class_name": "DiTTransformer2DModel"},
    "text_encoder": {"architectures": ["T5EncoderModel"], "tie_word_embeddings": True},
    "text_encoder_2": {"architectures": ["T5EncoderModel"]},
    "vae": {"_class_name": "AutoencoderKL"},
}


def make(folder):
    """base and aligned: a transformer of two shards, two text encoders, a VAE with a variant beside, and the rest."""
    sides = {"base": {}, "aligned": {}}
    generator = torch.Generator().manual_seed(3)
    for component, shapes in TENSORS.items():
        for name, shape in shapes.items():
            w0, w1 = (w.view(shape) for w in pair_of(shape[0], torch.Size(shape).numel() // shape[0], generator))
            sides["base"].setdefault(component, {})[name] = w0
            sides["aligned"].setdefault(component, {})[name] = w1
    for side, components in sides.items():
        components["text_encoder"]["encoder.embed_tokens.weight"] = components["text_encoder"]["shared.weight"].clone()
        components["text_encoder"]["lm_head.weight"] = components["text_encoder"]["shared.weight"].clone()
        root = folder / side
        for component, tensors in components.items():
            write(root / component, tensors, **CONFIGS[component])
            if component in ("transformer", "vae"):
                (root / component / "model.safetensors").rename(
                    root / component / "diffusion_pytorch_model.safetensors"
                )
        in_shards(root / "transformer", components["transformer"])
        save_file(components["vae"], root / "vae" / "diffusion_pytorch_model.fp16.safetensors")
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
        (root / "model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": "DiTPipeline",
                    "scheduler": ["diffusers", "DDIMScheduler"],
                    "safety_checker": [None, None],
                    **{component: ["diffusers", "Model"] for component in TENSORS},
                }
            )
        )
    return folder / "base", folder / "aligned", sides


def in_shards(folder, tensors):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[:1], names[1:]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / shard)
        weight_map |= dict.fromkeys(some, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_component_is_extrapolated_and_the_rest_is_copied(tmp_path):
    base, aligned, sides = make(tmp_path)
    summary = extrapolate(base, aligned, tmp_path / "out", options=OPTIONS)
    found = files(tmp_path / "out")
    kept = {name for name in files(aligned) if "fp16" not in name}
    assert set(found) == kept | {"lox_stream.json", "README.md"}
    weights = {}
    for component in TENSORS:
        for path in (tmp_path / "out" / component).glob("*.safetensors"):
            weights |= {f"{component}/{name}": tensor for name, tensor in load_file(path).items()}
    for component, tensors in sides["aligned"].items():
        for name, w1 in tensors.items():
            w0, out = sides["base"][component][name], weights.pop(f"{component}/{name}")
            if w1.ndim == 1:
                assert torch.equal(out, w1)
                continue
            right = exactly.extrapolated(w1.flatten(1), w0.flatten(1), 3, 1.25).view(w1.shape).bfloat16()
            assert int((out != right).sum()) <= 0.0005 * out.numel() + 1, name
    assert not weights
    assert summary.totals.extrapolated == 9
    assert found["model_index.json"] == (aligned / "model_index.json").read_bytes()
    size = sum(tensor.nbytes for tensor in sides["aligned"]["transformer"].values())
    assert json.loads(found[INDEX])["metadata"]["total_size"] == size
    said = json.loads(found["lox_stream.json"])
    assert said["components"] == sorted(TENSORS)
    assert "library_name: diffusers" in found["README.md"].decode()
    assert torch.equal(
        *(dict(stream(base, aligned, options=OPTIONS))[f"text_encoder/{name}.weight"] for name in ("shared", "lm_head"))
    )


def test_a_variant_beside_the_plain_weights_is_left_out_and_said(tmp_path):
    base, aligned, _ = make(tmp_path)
    assert any("vae/diffusion_pytorch_model.fp16.safetensors" in told for told in plan(base, aligned).warnings)


def test_globs_choose_components(tmp_path):
    base, aligned, _ = make(tmp_path)
    made = plan(base, aligned, options=Options(skip=("vae/*",), only=("*/*.weight",)))
    changed = {step.name.partition("/")[0] for step in made.steps if step.action == "extrapolate"}
    assert changed == set(TENSORS) - {"vae"}
    with pytest.raises(errors.OptionError, match=r"--skip 'unet/\*' matches no tensor"):
        plan(base, aligned, options=Options(skip=("unet/*",)))


def test_an_output_is_verified_byte_by_byte_and_against_its_inputs(tmp_path):
    base, aligned, _ = make(tmp_path)
    out = tmp_path / "out"
    extrapolate(base, aligned, out, options=OPTIONS)
    checks = list(verify_checksums(out))
    assert all(check.ok for check in checks)
    assert sum(check.n_bytes for check in checks) == sum(map(len, files(out).values()))
    assert all(seen.ok for seen in compare_all(choose_sample(out, base, aligned, count=20)))
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", INDEX):
        path = out / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + b"\x01\x02\x03\x04" if name != INDEX else whole.replace(b"00001", b"00002"))
        assert [check.ok for check in verify_checksums(out)].count(False) >= 1, name
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", INDEX, "model_index.json"])
def test_what_is_damaged_in_a_component_is_repaired(name, tmp_path):
    base, aligned, _ = make(tmp_path)
    out = tmp_path / "out"
    extrapolate(base, aligned, out, options=OPTIONS)
    whole = files(out)
    (out / name).write_bytes(whole[name][:-4] + b"1234")
    extrapolate(base, aligned, out, options=OPTIONS, resume=True, repair=True)
    assert files(out)[name] == whole[name]
    assert all(check.ok for check in verify_checksums(out))


def test_a_stopped_run_publishes_nothing_and_goes_on_to_the_same_bytes(tmp_path):
    base, aligned, _ = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "right", options=OPTIONS)
    stop = threading.Event()

    def progress(seen):
        if seen.done_tensors >= 4:
            stop.set()

    with pytest.raises(errors.Cancelled):
        extrapolate(base, aligned, tmp_path / "out", options=OPTIONS, progress=progress, cancel=stop)
    left = files(tmp_path / "out")
    assert all(name.endswith(".partial") or name == "lox_stream.journal" for name in left)
    with pytest.raises(errors.CheckpointError, match="unfinished output"):
        open_checkpoint(tmp_path / "out")
    extrapolate(base, aligned, tmp_path / "out", options=OPTIONS, resume=True)
    found, right = files(tmp_path / "out"), files(tmp_path / "right")
    for record in (found, right):
        del record["lox_stream.json"], record["README.md"]  # times and names
    assert found == right


def test_the_index_of_the_pipeline_comes_after_all_weights(tmp_path, monkeypatch):
    base, aligned, _ = make(tmp_path)
    order = []

    def watched(path, data, write=replace_file):
        order.append(path.relative_to(tmp_path / "out").as_posix())
        if order[-1] == "model_index.json":
            assert not list((tmp_path / "out").rglob("*.safetensors.partial"))
            assert (tmp_path / "out" / INDEX).exists()
        write(path, data)

    monkeypatch.setattr("lox_stream.files.replace_file", watched)
    extrapolate(base, aligned, tmp_path / "out", options=OPTIONS)
    assert order[-3:] == [INDEX, "model_index.json", "lox_stream.json"]


def test_an_earlier_output_is_replaced_and_strange_weights_are_refused(tmp_path):
    base, aligned, _ = make(tmp_path)
    out = tmp_path / "out"
    extrapolate(base, aligned, out, options=OPTIONS)
    extrapolate(base, aligned, out, options=replace(OPTIONS, alpha=2.0), overwrite=True)
    assert all(check.ok for check in verify_checksums(out))
    shutil.copy(out / "vae" / "diffusion_pytorch_model.safetensors", out / "transformer")
    with pytest.raises(errors.OutputError, match=r"transformer/diffusion_pytorch_model\.safetensors: would be loaded"):
        plan(base, aligned, out, overwrite=True)


def weights_in(folder):
    return {name for name in files(folder) if ".safetensors" in name}


def test_an_earlier_output_in_another_layout_is_withdrawn(tmp_path):
    base, aligned, _ = make(tmp_path)
    out = tmp_path / "out"
    for size in (2000, 0, 2000):
        options = replace(OPTIONS, max_shard_size=size)
        extrapolate(base, aligned, out, options=options, overwrite=True)
        extrapolate(base, aligned, tmp_path / f"right{size}", options=options, overwrite=True)
        assert weights_in(out) == weights_in(tmp_path / f"right{size}")
        assert all(check.ok for check in verify_checksums(out))
    assert weights_in(tmp_path / "right2000") != weights_in(tmp_path / "right0")


def test_an_earlier_pipeline_leaves_nothing_beside_a_single_model_and_the_other_way_about(tmp_path):
    base, aligned, _ = make(tmp_path)
    (aligned / "vae" / "notes.json").write_text("{}")
    out = tmp_path / "out"
    alone = (base / "transformer", aligned / "transformer")
    for sides in ((base, aligned), alone, (base, aligned)):
        extrapolate(*sides, out, options=OPTIONS, overwrite=True)
        extrapolate(*sides, tmp_path / "right", options=OPTIONS)
        assert set(files(out)) == set(files(tmp_path / "right"))
        assert set(open_checkpoint(out).tensors) == set(open_checkpoint(sides[1]).tensors)
        shutil.rmtree(tmp_path / "right")


def test_weights_beside_an_output_are_seen_by_all_that_look_at_it(tmp_path):
    base, aligned, _ = make(tmp_path)
    out = tmp_path / "out"
    extrapolate(base, aligned, out, options=OPTIONS)
    shutil.copy(out / "vae" / "diffusion_pytorch_model.safetensors", out / "transformer")
    (failed,) = [check for check in verify_checksums(out) if not check.ok]
    assert failed.name == "transformer/diffusion_pytorch_model.safetensors"
    assert "is loaded beside or instead of the output" in failed.message
    with pytest.raises(errors.OutputError, match=r"transformer/diffusion_pytorch_model\.safetensors: would be loaded"):
        extrapolate(base, aligned, out, options=OPTIONS, resume=True, repair=True)
    assert (out / "lox_stream.json").exists()


def as_variant(folder):
    """Rename every file of weights as diffusers and transformers name those of the variant fp16."""
    for path in folder.rglob("*.fp16.safetensors"):
        path.unlink()
    for path in [*folder.rglob("*.safetensors*")]:
        if path.name.endswith(".index.json"):
            path.write_text(path.read_text().replace("_model-", "_model.fp16-"))
            path.rename(path.with_name(path.name.replace(".index.json", ".index.fp16.json")))
        else:
            stem, dash, number = path.name.removesuffix(".safetensors").partition("-")
            path.rename(path.with_name(f"{stem}.fp16{dash}{number}.safetensors"))


def test_a_pipeline_of_nothing_but_a_variant_keeps_its_names_unless_its_files_are_others(tmp_path):
    base, aligned, _ = make(tmp_path)
    extrapolate(base, aligned, tmp_path / "plain", options=OPTIONS)
    for side in (base, aligned):
        as_variant(side)
    extrapolate(base, aligned, tmp_path / "out", options=OPTIONS)
    variant, plain = files(tmp_path / "out"), files(tmp_path / "plain")
    assert weights_in(tmp_path / "out") == weights_in(aligned)
    index = "transformer/diffusion_pytorch_model.safetensors.index.fp16.json"
    assert set(json.loads(variant[index])["weight_map"].values()) <= {path.name for path in out_of(tmp_path)}
    shard = "transformer/diffusion_pytorch_model{}-00001-of-00002.safetensors"
    assert variant[shard.format(".fp16")] == plain[shard.format("")]
    extrapolate(base, aligned, tmp_path / "wide", options=replace(OPTIONS, dtype="float32"))
    assert weights_in(tmp_path / "wide") == weights_in(tmp_path / "plain")
    extrapolate(base, aligned, tmp_path / "small", options=replace(OPTIONS, max_shard_size=2000))
    assert not [name for name in weights_in(tmp_path / "small") if "fp16" in name]
    assert len(open_checkpoint(tmp_path / "small").shards) > len(open_checkpoint(aligned).shards)


def out_of(folder):
    return (folder / "out").rglob("*.safetensors")


def test_a_component_that_the_index_says_wrongly_is_an_error(tmp_path):
    base, _, _ = make(tmp_path)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"vae": "AutoencoderKL"}))
    with pytest.raises(
        errors.CheckpointError, match=r"vae is 'AutoencoderKL', and there is a folder .* expected \[lib"
    ):
        open_checkpoint(base)


def test_problems_of_all_components_are_told_at_once(tmp_path):
    base, aligned, _ = make(tmp_path)
    (aligned / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    (aligned / "text_encoder" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(errors.CheckpointError) as caught:
        plan(base, aligned)
    assert {"vae", "text_encoder"} <= {word for text in caught.value.problems for word in text.split("/")}


def test_architectures_are_compared_component_by_component(tmp_path):
    base, aligned, _ = make(tmp_path)
    (base / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(errors.CheckpointError, match=r"text_encoder/config\.json: architectures of aligned"):
        plan(base, aligned)


def test_what_a_pipeline_names_may_not_lead_outside(tmp_path):
    base, _, _ = make(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "model_index.json").write_text('{"../base/vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(errors.CheckpointError, match="names no folder here that holds weights"):
        open_checkpoint(tmp_path / "evil")
    assert open_checkpoint(base).tensors["vae/decoder.proj.weight"].shape == (24, 24)


def test_inspect_shows_all_components(tmp_path):
    base, _, _ = make(tmp_path)
    seen = inspect_checkpoint(base)
    assert seen.architecture == "DiTPipeline"
    assert {row.name.partition("/")[0] for row in seen.rows} == set(TENSORS)
    assert seen.tied == {
        "text_encoder/encoder.embed_tokens.weight": "text_encoder/shared.weight",
        "text_encoder/lm_head.weight": "text_encoder/shared.weight",
    }
