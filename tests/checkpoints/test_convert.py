# SPDX-License-Identifier: Apache-2.0
"""vidgen convert: from every form to every other, through files; what is refused; and that nothing half-done stays."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen import cli, io
from vidgen.checkpoints import lazy as lazies
from vidgen.checkpoints.convert import FORMATS, convert, read_stages, recognise
from vidgen.checkpoints.lazy import lazy
from vidgen.checkpoints.sources import cleaner, open_source

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
SAT_FILE = "1/mp_rank_00_model_states.pt"
RANK_FILE = "release/mp_rank_00/model_optim_rng.pt"


def load(path: Path) -> dict[str, Any]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def names(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


# Every form


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_form_is_read_and_written(tiny, same, tmp_path: Path, system: str) -> None:
    folder, state = tiny(system)
    forms = {"hf": "folder", "safetensors": "one.safetensors", "pt": "one.pt", "mindspeed-mm": "tree"}
    forms |= {"mindspeed-mm-pt": "theirs.ckpt"}
    forms |= {"megatron": "own_tree"} if system == "opensora_plan_v1_5" else {}
    forms |= {"sat": "sat"} if system == "cogvideox" else {}
    for form, name in forms.items():
        report = convert(folder, tmp_path / "a" / name, form)
        assert report["model"] == system and report["tensors"] == len(state) and report["written"]
        assert report["parameters"] == sum(t.numel() for t in state.values())
    # Reading and writing do not know of each other: each form once from each side is enough.
    for (form, name), (other, target) in zip(forms.items(), [*list(forms.items())[1:], ("hf", "folder")], strict=True):
        convert(tmp_path / "a" / name, tmp_path / "b" / target, other, config=folder / "config.json")
        ours, theirs = tmp_path / "b" / target, tmp_path / "a" / target
        assert names(ours) == names(theirs)
        for file in names(theirs) if theirs.is_dir() else [""]:
            if file.endswith((".pt", ".safetensors")) or not file:
                a, b = (load(place / file if file else place) for place in (ours, theirs))
                a, b = (content.get("model", content.get("module", content)) for content in (a, b))
                assert same(a, b), (form, other, file)
            else:
                assert (ours / file).read_text() == (theirs / file).read_text()
    assert same(load(tmp_path / "a/one.safetensors"), state)


def test_folders_load_as_models(tiny, same, tmp_path: Path) -> None:
    from vidgen.models.opensora_v2 import MMDiT

    folder, state = tiny("opensora_v2")
    convert(folder, tmp_path / "tree", "mindspeed-mm")
    config = folder / "config.json"
    convert(tmp_path / "tree", tmp_path / "folder", "hf", config=config, max_shard_bytes=200_000)
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    model = MMDiT.from_pretrained(tmp_path / "folder")
    assert same(dict(model.state_dict()), state)
    assert json.loads((tmp_path / "folder/config.json").read_text()) == json.loads(config.read_text())
    convert(tmp_path / "folder", tmp_path / "again", "mindspeed-mm")  # shards are read too
    assert same(load(tmp_path / "again" / RANK_FILE)["model"], load(tmp_path / "tree" / RANK_FILE)["model"])


def test_low_precision_stays(tiny, tmp_path: Path) -> None:
    _, state = tiny("cogvideox")
    mixed = {name: t.bfloat16() if "norm" not in name else t for name, t in state.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", tmp_path / "tree", "mindspeed-mm", tp=2)
    convert(tmp_path / "tree", tmp_path / "back.safetensors", "safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in mixed.items())


@pytest.mark.parametrize("preset, kept", [("tiny-2b", False), ("tiny-5b-i2v", True)])
def test_tables_of_positions(tiny, tmp_path: Path, preset: str, kept: bool) -> None:
    """SAT stores positions that are computed (2B) and positions that are learned (5B-I2V); we keep the latter."""
    folder, state = tiny("cogvideox", preset)
    convert(folder, tmp_path / "sat", "sat")
    content = load(tmp_path / "sat" / SAT_FILE)
    key = "model.diffusion_model.mixins.pos_embed.pos_embedding"
    if not kept:
        assert key not in content["module"]
        width = content["module"]["model.diffusion_model.time_embed.0.weight"].shape[1]
        content["module"][key] = torch.cat([torch.zeros(1, 3, width), torch.randn(1, 8, width)], 1)
    content["module"]["model.diffusion_model.mixins.pos_embed.freqs_sin"] = torch.randn(4, 8)
    content["module"]["first_stage_model.encoder.conv_in.weight"] = torch.randn(4)
    torch.save(content, tmp_path / "sat" / SAT_FILE)
    convert(tmp_path / "sat", tmp_path / "ours.pt", "pt")
    assert load(tmp_path / "ours.pt").keys() == state.keys()
    convert(tmp_path / "sat", tmp_path / "ours", "hf", config=folder / "config.json")
    convert(tmp_path / "sat", tmp_path / "theirs.pt", "mindspeed-mm-pt")
    assert "pos_embed.pos_embedding" in load(tmp_path / "theirs.pt")
    assert not any("freqs" in name for name in load(tmp_path / "theirs.pt"))


def test_sats_file_without_its_folder(tiny, same, tmp_path: Path) -> None:
    folder, state = tiny("cogvideox")
    convert(folder, tmp_path / "sat", "sat")
    assert (tmp_path / "sat/latest").read_text() == "1"
    for name, source in (("a", tmp_path / "sat" / SAT_FILE), ("b", tmp_path / "sat/1")):
        convert(source, tmp_path / f"{name}.pt", "pt")
        assert same(load(tmp_path / f"{name}.pt"), state)


def test_a_model_json_of_the_trainer_is_a_configuration(tiny, same, tmp_path: Path) -> None:
    from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT

    folder, state = tiny("opensora_plan_v1_5")
    values = json.loads((folder / "config.json").read_text())
    del values["_class_name"], values["norm_cls"]
    model_json = {"ae": {"model_id": "wfvae"}, "predictor": {"model_id": "SparseUMMDiT", "dropout": 0.0, **values}}
    io.write_json(tmp_path / "model.json", model_json)
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", "hf", config=tmp_path / "model.json")
    assert same(dict(SparseUMMDiT.from_pretrained(tmp_path / "folder").state_dict()), state)
    io.write_json(tmp_path / "model.json", {"predictor": 3})
    with pytest.raises(ValueError, match="predictor must be an object, got int"):
        convert(tmp_path / "a.safetensors", tmp_path / "x", "hf", config=tmp_path / "model.json")


def test_patches_in_the_rank_that_the_model_has(tiny, same, tmp_path: Path) -> None:
    folder, state = tiny("cogvideox", "tiny-5b")
    flat = {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}
    save_file(flat, tmp_path / "flat.safetensors")
    convert(tmp_path / "flat.safetensors", tmp_path / "fitted.pt", "pt", config=folder / "config.json")
    assert same(load(tmp_path / "fitted.pt"), state)


@pytest.mark.parametrize("prefix", ["module.", "predictor.", "module.predictor.", "model."])
@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_what_trainers_put_around_weights(tiny, same, tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    _, state = tiny("opensora_plan_v1_3")
    named: dict[str, Any] = {prefix + name: t for name, t in state.items()}
    named[f"{prefix}proj_out._extra_state"] = None
    torch.save(
        {wrapper: named, "ema_model": {n: t + 1 for n, t in named.items() if t is not None}} if wrapper else named,
        tmp_path / "a.pt",
    )
    convert(tmp_path / "a.pt", tmp_path / "b.pt", "pt")
    assert same(load(tmp_path / "b.pt"), state)
    if wrapper:
        convert(tmp_path / "a.pt", tmp_path / "c.pt", "pt", ema=True)
        assert same(load(tmp_path / "c.pt"), {name: t + 1 for name, t in state.items()})


def test_prefixes() -> None:
    assert cleaner(["model.diffusion_model.a", "first_stage_model.b"])("model.diffusion_model.a") == "a"
    assert cleaner(["model.diffusion_model.a", "first_stage_model.b"])("first_stage_model.b") is None
    assert cleaner(["predictor.a", "ae.b"])("predictor.a") == "a"
    assert cleaner(["predictor.a", "b"])("predictor.a") == "predictor.a"
    assert cleaner(["transformer.layers.0.a"])("transformer.layers.0.a") == "transformer.layers.0.a"


# VAEs


VAES = {"cogvideox_vae": "AutoencoderKLCogVideoX", "hunyuan_vae": "HunyuanVAE", "wfvae": "WFVAE"}


def vae(kind: str) -> Any:
    module = importlib.import_module(f"vidgen.models.autoencoders.{kind}")
    preset = importlib.import_module(f"vidgen.models.autoencoders.{kind}_config").preset
    return getattr(module, VAES[kind])(preset("tiny"))


@pytest.mark.parametrize("kind", VAES)
def test_vaes(same, tmp_path: Path, kind: str) -> None:
    model = vae(kind)
    state = dict(model.state_dict())
    model.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder/config.json"
    report = convert(tmp_path / "folder", tmp_path / "one.safetensors", "safetensors")
    assert report["model"] == kind
    convert(tmp_path / "one.safetensors", tmp_path / "one.pt", "pt", config=config)
    convert(tmp_path / "one.pt", tmp_path / "again", "hf", config=config)
    assert same(dict(type(model).from_pretrained(tmp_path / "again").state_dict()), state)
    if kind == "wfvae":  # its weights tell the configuration
        convert(tmp_path / "one.pt", tmp_path / "told", "hf")
        assert type(model).from_pretrained(tmp_path / "told").config == model.config
    else:
        with pytest.raises(ValueError, match="checked with its configuration"):
            convert(tmp_path / "one.pt", tmp_path / "x.pt", "pt")
    with pytest.raises(ValueError, match=f"{kind} cannot be written as mindspeed-mm"):
        convert(tmp_path / "folder", tmp_path / "tree", "mindspeed-mm")
    del state[next(name for name in state if name.startswith("decoder.conv_out.") and name.endswith("bias"))]
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="1 missing"):
        convert(tmp_path / "part.safetensors", tmp_path / "y.pt", "pt", config=config)


def test_cogvideox_vae_in_sats_form(same, tmp_path: Path) -> None:
    model = vae("cogvideox_vae")
    model.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder/config.json"
    convert(tmp_path / "folder", tmp_path / "3d-vae.pt", "sat")
    content = load(tmp_path / "3d-vae.pt")
    assert content.keys() == {"state_dict"} and "decoder.up.0.block.0.conv1.conv.weight" in content["state_dict"]
    content["state_dict"]["loss.discriminator.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "3d-vae.pt")
    convert(tmp_path / "3d-vae.pt", tmp_path / "back", "hf", config=config)
    assert same(dict(type(model).from_pretrained(tmp_path / "back").state_dict()), dict(model.state_dict()))


def test_diffusers_own_hunyuan_folder(same, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    theirs.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "vae.pt", "pt")
    convert(tmp_path / "vae.pt", tmp_path / "back", "hf", config=tmp_path / "folder/config.json")
    again = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "back")
    assert same(dict(again.state_dict()), dict(theirs.state_dict()))


def test_diffusers_own_cogvideox_folder(same, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=12, time_embed_dim=8,
        use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False, ofs_embed_dim=8, in_channels=8,
        out_channels=4,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "tree", "mindspeed-mm", tp=2, stages=[[1, 1]])
    convert(tmp_path / "tree", tmp_path / "back", "hf", config=tmp_path / "folder/config.json")
    again = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "back")
    assert same(dict(again.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("ema", [None, True, False])
def test_trained_wfvae(same, tmp_path: Path, ema: bool | None) -> None:
    model = vae("wfvae")
    model.save_pretrained(tmp_path / "folder")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    average = {f"module.{name}": t + 1 for name, t in state.items() if name in trained}
    content = {"ema_state_dict": average, "state_dict": {"gen_model": state, "dics_model": {"x": torch.zeros(1)}}}
    torch.save(content, tmp_path / "merged.ckpt")
    convert(tmp_path / "merged.ckpt", tmp_path / "out.pt", "pt", config=tmp_path / "folder/config.json", ema=ema)
    wanted = state if ema is False else {name: t + 1 if name in trained else t for name, t in state.items()}
    assert same(load(tmp_path / "out.pt"), wanted)


# Adapters


def make_adapters(state: dict[str, Tensor], targets: tuple[str, ...], rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, weight in state.items():
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            layer = name.removesuffix(".weight")
            found[f"{layer}.lora_A.default.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            found[f"{layer}.lora_B.default.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    return found


def with_adapters(state: dict[str, Tensor], adapters: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    result = dict(state)
    for name, a in adapters.items():
        if "lora_A" in name:
            weight = name.replace("lora_A.default.", "")
            result[weight] = state[weight] + alpha / a.shape[0] * adapters[name.replace("lora_A", "lora_B")] @ a
    return result


def test_adapters_of_mindspeed_mm_change_the_weights(tiny, tmp_path: Path) -> None:
    folder, state = tiny("cogvideox")
    convert(folder, tmp_path / "base.pt", "mindspeed-mm-pt")
    base = load(tmp_path / "base.pt")
    adapters = make_adapters(base, ("self_atten.proj_qkv", "self_atten.proj_out"))
    assert len(adapters) == 8
    torch.save({"model": adapters}, tmp_path / "lora.pt")
    options = {"lora": tmp_path / "lora.pt", "lora_alpha": 6}
    wanted = with_adapters(base, adapters, 6)
    for source in (tmp_path / "base.pt", folder):  # in their names and in ours
        convert(source, tmp_path / f"{source.name}_merged.pt", "mindspeed-mm-pt", **options)
        merged = load(tmp_path / f"{source.name}_merged.pt")
        assert merged.keys() == base.keys()
        changed = {name for name in base if not torch.equal(merged[name], base[name])}
        assert changed == {name for name in base if name.endswith(("proj_qkv.weight", "self_atten.proj_out.weight"))}
        for name in base:
            torch.testing.assert_close(merged[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_adapters_in_a_tree_are_cut_like_their_layers(tiny, tmp_path: Path) -> None:
    folder, _ = tiny("cogvideox")
    convert(folder, tmp_path / "base", "mindspeed-mm", tp=2, stages=[[1, 1]])
    whole: dict[str, Tensor] = {}
    for stage in (0, 1):
        ranks = [tmp_path / f"base/release/mp_rank_0{t}_00{stage}/model_optim_rng.pt" for t in (0, 1)]
        states = [load(file)["model"] for file in ranks]
        for name in ("proj_qkv", "proj_out"):
            key = f"videodit_blocks.0.self_atten.{name}"
            full = key.replace(".0.", f".{stage}.")
            shapes = [state[f"{key}.weight"].shape for state in states]
            columns = sum(s[1] for s in shapes) if name == "proj_out" else shapes[0][1]
            rows = sum(s[0] for s in shapes) if name == "proj_qkv" else shapes[0][0]
            a, b = torch.randn(3, columns), torch.randn(rows, 3)
            whole[f"{full}.lora_A.default.weight"], whole[f"{full}.lora_B.default.weight"] = a, b
            for t in (0, 1):
                half_a = a.chunk(2, 1)[t] if name == "proj_out" else a
                half_b = torch.cat([p.chunk(2)[t] for p in b.chunk(3)]) if name == "proj_qkv" else b
                folder_ = tmp_path / f"lora/iter_0000005/mp_rank_0{t}_00{stage}"
                folder_.mkdir(parents=True, exist_ok=True)
                file = folder_ / "model_optim_rng.pt"
                content = load(file) if file.exists() else {"model": {}}
                content["model"] |= {
                    f"{key}.lora_A.default.weight": half_a.clone(),
                    f"{key}.lora_B.default.weight": half_b,
                }
                torch.save(content, file)
    (tmp_path / "lora/latest_checkpointed_iteration.txt").write_text("5")
    options = {"lora": tmp_path / "lora", "lora_alpha": 1.5}
    convert(tmp_path / "base", tmp_path / "merged", "mindspeed-mm", tp=2, stages=[[1, 1]], **options)
    convert(tmp_path / "merged", tmp_path / "merged.pt", "mindspeed-mm-pt")
    convert(tmp_path / "base", tmp_path / "base.pt", "mindspeed-mm-pt")
    base, merged = load(tmp_path / "base.pt"), load(tmp_path / "merged.pt")
    wanted = with_adapters(base, whole, 1.5)
    for name in base:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(merged[name], base[name]) for name in base) == 4


@pytest.mark.parametrize("form", ["peft", "diffusers", "sat"])
def test_adapters_in_our_names_and_in_sats(tiny, tmp_path: Path, form: str) -> None:
    folder, state = tiny("cogvideox")
    adapters = make_adapters(state, ("to_q", "to_k", "to_v", "to_out.0"))
    stored = {name.replace(".default", ""): t for name, t in adapters.items()}
    if form == "peft":
        stored = {f"base_model.model.{name}": t for name, t in stored.items()}
    elif form == "diffusers":
        stored = {f"transformer.{name}": t for name, t in stored.items()}
    else:
        layers = {"to_q": "query_key_value.{}.0", "to_k": "query_key_value.{}.1", "to_v": "query_key_value.{}.2"}
        layers["to_out.0"] = "dense.{}.0"
        renamed = {}
        for name, t in stored.items():
            block, layer = name.split(".")[1], name.split("attn1.")[1].split(".lora")[0]
            half = "matrix_A" if "lora_A" in name else "matrix_B"
            renamed[f"model.diffusion_model.transformer.layers.{block}.attention.{layers[layer].format(half)}"] = t
        stored = renamed
    (tmp_path / "lora").mkdir()
    save_file(stored, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not say its alpha"):
        convert(folder, tmp_path / "x.pt", "pt", lora=tmp_path / "lora")
    io.write_json(tmp_path / "lora/adapter_config.json", {"lora_alpha": 6, "r": 3})
    convert(folder, tmp_path / "merged.pt", "pt", lora=tmp_path / "lora")
    merged, wanted = load(tmp_path / "merged.pt"), with_adapters(state, adapters, 6)
    for name in state:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(merged[name], state[name]) for name in state) == 8
    io.write_json(tmp_path / "lora/adapter_config.json", {"lora_alpha": 6, "use_rslora": True})
    with pytest.raises(ValueError, match="sets use_rslora"):
        convert(folder, tmp_path / "x.pt", "pt", lora=tmp_path / "lora")


def test_adapters_that_do_not_fit(tiny, tmp_path: Path) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    good = make_adapters(state, ("attn1.to_q",))
    first = next(iter(good))
    other = first.replace("lora_A", "lora_B")
    cases = {
        "1 without the other half": {k: t for k, t in good.items() if k != other},
        "1 of different ranks": {**good, first: torch.zeros(4, good[first].shape[1])},
        "1 of another shape": {**good, first: torch.zeros(3, 5)},
        "1 that are no adapters": {**good, "proj_out.bias": torch.zeros(2)},
        "1 without a weight in the base": good | {k.replace("to_q", "to_x"): good[k] + 1 for k in (first, other)},
    }
    for words, adapters in cases.items():
        save_file(adapters, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match=words):
            convert(folder, tmp_path / "x.pt", "pt", lora=tmp_path / "lora.safetensors", lora_alpha=1)
    assert names(tmp_path) == ["lora.safetensors"]


# What is refused


@pytest.mark.parametrize(
    "to, options, words",
    [
        ("zip", {}, "to must be one of hf, safetensors"),
        ("pt", {"tp": 2}, "only trees"),
        ("hf", {"stages": [[2, 2]]}, "only trees"),
        ("sat", {}, "opensora_plan_v1_3 cannot be written as sat: it has the forms hf, safetensors, pt, mindspeed-mm"),
        ("megatron", {}, "cannot be written as megatron"),
        ("mindspeed-mm", {"model": "flux"}, "model must be one of"),
        ("mindspeed-mm", {"model": "cogvideox"}, "not the tensors of cogvideox"),
        ("mindspeed-mm", {"ema": True}, "no running average"),
        ("mindspeed-mm", {"iteration": 3}, "no iteration 3"),
        ("hf", {"max_shard_bytes": 0}, "max_shard_bytes must be at least 1"),
    ],
)
def test_what_cannot_be_done(tiny, tmp_path: Path, to: str, options: dict[str, Any], words: str) -> None:
    target = tmp_path / ("x.pt" if to == "pt" else "x")
    with pytest.raises(ValueError, match=words):
        convert(tiny("opensora_plan_v1_3")[0], target, to, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "to, name", [("hf", "x.safetensors"), ("mindspeed-mm", "x.pt"), ("pt", "x"), ("safetensors", "x.pt")]
)
def test_targets_named_like_something_else(tiny, tmp_path: Path, to: str, name: str) -> None:
    with pytest.raises(ValueError, match="target"):
        convert(tiny("opensora_v2")[0], tmp_path / name, to)


def test_mindspeed_mm_has_one_layout_of_open_sora_2(tmp_path: Path) -> None:
    from vidgen.models.opensora_v2 import MMDiT, MMDiTConfig

    config = MMDiTConfig(
        in_channels=8, vec_in_dim=6, context_in_dim=5, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(4, 6, 6), fused_qkv=True, use_liger_rope=False,
    )  # fmt: skip
    MMDiT(config).save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="to_release_layout"):
        convert(tmp_path / "flux", tmp_path / "tree", "mindspeed-mm")


def test_a_folder_needs_a_configuration_that_fits(tiny, tmp_path: Path) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give config.json with --config"):
        convert(tmp_path / "a.safetensors", tmp_path / "x", "hf")
    values = json.loads((folder / "config.json").read_text())
    config = tmp_path / "config.json"
    for change, words in (
        ({"num_layers": values["num_layers"] + 1}, "missing:\n *transformer_blocks.4"),
        ({"caption_channels": 7}, "caption_projection.linear_1.weight: wanted"),
        ({"num_layer": 3}, "num_layer"),
        ({"_class_name": "Other"}, "describes a Other, wanted OpenSoraT2V_v1_3 or OpenSoraInpaint_v1_3"),
    ):
        io.write_json(config, {**values, **change})
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / "a.safetensors", tmp_path / "x", "hf", config=config)
    del values["_class_name"]
    io.write_json(config, values)
    convert(tmp_path / "a.safetensors", tmp_path / "x", "hf", config=config)  # the variant is seen by its tensors
    assert json.loads((tmp_path / "x/config.json").read_text())["_class_name"] == "OpenSoraInpaint_v1_3"


def test_sources_of_no_known_form(tmp_path: Path) -> None:
    def refused(words: str, path: Path = tmp_path, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            open_source(path, **options)

    refused("does not exist", tmp_path / "nothing")
    refused("holds 0 sets of safetensors")
    (tmp_path / "notes.txt").write_text("x")
    refused("wanted a folder, .safetensors", tmp_path / "notes.txt")
    (tmp_path / ".metadata").touch()
    refused("torch.distributed.checkpoint")
    (tmp_path / ".metadata").unlink()
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    refused("holds 2 sets of safetensors, wanted one: name one of its files: a.safetensors, b.safetensors")
    (tmp_path / "b.safetensors").unlink()
    io.write_json(tmp_path / "m.safetensors.index.json", {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}})
    refused("a.safetensors is not what m.safetensors.index.json says\n  1 missing:\n    y")
    io.write_json(tmp_path / "m.safetensors.index.json", {"weight_map": {"x": "../a.safetensors"}})
    refused("not a safetensors file of this folder")
    torch.save({"optimizer": {"a": 1}}, tmp_path / "o.pt")
    refused("holds no weights, but optimizer", tmp_path / "o.pt")
    refused("no running average", tmp_path / "o.pt", ema=True)
    torch.save({"model0": {"a": torch.zeros(1)}, "checkpoint_version": 3.0}, tmp_path / "v.pt")
    refused("one rank of a tree with virtual stages", tmp_path / "v.pt")
    sat = tmp_path / "sat"
    (sat / "1").mkdir(parents=True)
    (sat / "latest").write_text("../1")
    refused("must name a folder beside it", sat)
    (sat / "latest").write_text("1")
    (sat / "1/mp_rank_01_model_states.pt").touch()
    refused("cut over ranks", sat)


def test_damaged_files_are_refused_in_words(tiny, tmp_path: Path) -> None:
    """Whatever bytes are changed, the answer is a ValueError, or acceptance where only values changed."""
    folder, _ = tiny("cogvideox")
    convert(folder, tmp_path / "tree", "mindspeed-mm")
    convert(folder, tmp_path / "a.safetensors", "safetensors")
    shutil.copytree(folder, tmp_path / "folder")
    rng = random.Random(0)
    refused = 0
    for source, name in (("tree", RANK_FILE), ("a.safetensors", ""), ("folder", "config.json")):
        file = tmp_path / source / name
        whole = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            # Structure is at both ends.
            place = rng.choice([rng.randrange(min(len(whole), 9000)), -1 - rng.randrange(min(len(whole), 6000))])
            damaged[place:] = rng.randbytes(rng.randrange(9)) + whole[place:][1:]
            file.write_bytes(damaged if rng.random() < 0.7 else damaged[:place])
            try:
                convert(tmp_path / source, tmp_path / "x", "mindspeed-mm", dry_run=True)
            except ValueError:
                refused += 1
        file.write_bytes(whole)
    assert refused > 40 and not (tmp_path / "x").exists()


def test_tensors_of_no_model() -> None:
    with pytest.raises(ValueError, match="not the tensors of opensora_plan_v1_3 or .*: a, b"):
        recognise(["a", "b"])


# Nothing half-done


def test_existing_targets_are_left_alone(tiny, tmp_path: Path) -> None:
    folder, _ = tiny("opensora_v2")
    (tmp_path / "tree").mkdir()
    (tmp_path / "one.pt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, to in (("tree", "mindspeed-mm"), ("one.pt", "pt"), ("link", "hf")):
        with pytest.raises(FileExistsError, match="exists already"):
            convert(folder, tmp_path / name, to)
    assert names(tmp_path) == ["one.pt"] and (tmp_path / "one.pt").read_text() == "mine"


def test_a_dry_run_writes_nothing_and_checks_everything(tiny, tmp_path: Path) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    report = convert(folder, tmp_path / "new/tree", "mindspeed-mm", tp=2, stages=[[1, 3]], dry_run=True)
    assert not list(tmp_path.iterdir()) and not report["written"]
    real = convert(folder, tmp_path / "new/tree", "mindspeed-mm", tp=2, stages=[[1, 3]])
    assert report["files"] == real["files"] and sorted(real["files"]) == names(tmp_path / "new/tree")
    broken = {name: t for name, t in state.items() if name != "proj_out.bias"}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="1 missing:\n *proj_out.bias"):
        convert(tmp_path / "broken.safetensors", tmp_path / "tree", "mindspeed-mm", dry_run=True)


@pytest.mark.parametrize("to", ["mindspeed-mm", "safetensors", "pt", "hf"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tiny, tmp_path: Path, monkeypatch, to: str, error: BaseException) -> None:
    target = tmp_path / ("x.pt" if to == "pt" else "x.safetensors" if to == "safetensors" else "x")
    real, calls = lazies.values, []

    def fail(tensor: Any, name: str) -> Any:
        calls.append(name)
        if len(calls) == 60:
            raise error
        return real(tensor, name)

    monkeypatch.setattr(lazies, "values", fail)
    options = {"tp": 2} if to == "mindspeed-mm" else {"max_shard_bytes": 100_000} if to == "hf" else {}
    with pytest.raises(type(error)):
        convert(tiny("opensora_plan_v1_3")[0], target, to, **options)
    assert len(calls) == 60 and not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="1,000 bytes free, .* are needed"):
        convert(tiny("opensora_v2")[0], tmp_path / "x.pt", "pt")
    assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), io.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with io.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "b").mkdir()
        (temporary / "b/file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a/b/file"]
    with pytest.raises(FileExistsError), io.atomic_directory(tmp_path / "a"):
        pass
    with pytest.raises(FileExistsError), io.atomic_directory(tmp_path / "c") as temporary:
        (tmp_path / "c").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


# The command


def run(*arguments: Any) -> int:
    return cli.main(["convert", *map(str, arguments)])


def test_command(tiny, same, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    assert run(folder, tmp_path / "tree", "--to", "mindspeed-mm", "--tp", 2, "--vpp", "1,1/2,0") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "opensora_plan_v1_3" and len(report["files"]) == 5
    assert run(tmp_path / "tree", tmp_path / "new", "--to", "hf", "--config", folder / "config.json") == 0
    assert same(load(tmp_path / "new/diffusion_pytorch_model.safetensors"), state)
    capsys.readouterr()
    assert run(folder, tmp_path / "dry", "--to", "mindspeed-mm", "--pp", "1,3", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["written"] is False and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to", "mindspeed-mm", "--pp", "1;3"], "stages must be of the form --pp 10,11,11,10, got '1;3'"),
        (["--to", "mindspeed-mm", "--pp", "1,1/1,1"], "stages must be of the form --pp 10,11,11,10"),
        (["--to", "mindspeed-mm", "--pp", "1,3", "--vpp", "1,1/1,1"], "give --pp or --vpp"),
        (["--to", "nothing"], "to must be one of"),
        (["--to", "mindspeed-mm", "--tp", "3"], "cannot be cut over 3 ranks"),
    ],
)
def test_command_says_in_a_line_what_is_wrong(tiny, tmp_path, capsys, arguments: list[str], words: str) -> None:
    assert run(tiny("opensora_plan_v1_3")[0], tmp_path / "x", *arguments) == cli.USER_ERROR
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_command_refuses_an_existing_target(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny("opensora_v2")[0], tmp_path, "--to", "mindspeed-mm") == cli.USER_ERROR
    assert f"{tmp_path} exists already" in capsys.readouterr().err


def test_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    words = capsys.readouterr().out
    assert "--dry-run" in words and "docs/conversion.md" in words
    text = (Path(__file__).parents[2] / "docs/conversion.md").read_text()
    assert all(f"`{form}`" in text for form in FORMATS)


def test_stages() -> None:
    assert read_stages("10,11,11,10", None) == [[10, 11, 11, 10]]
    assert read_stages("[8, 8]", None) == [[8, 8]]
    assert read_stages(None, "4,4/4,4") == read_stages(None, "[[4,4],[4,4]]") == [[4, 4], [4, 4]]
    assert read_stages(None, None) is None
    with pytest.raises(ValueError, match="--vpp 4,4/4,4"):
        read_stages(None, "4,4")


KILLED = """
import sys, time
from vidgen.checkpoints import lazy
from vidgen.checkpoints.convert import convert
real = lazy.values
def slow(tensor, name):
    print("writing", flush=True)
    time.sleep(0.05)
    return real(tensor, name)
lazy.values = slow
convert(sys.argv[1], sys.argv[2], "mindspeed-mm")
"""


def test_kill_during_a_write_leaves_no_target(tiny, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(tiny("opensora_plan_v1_3")[0]), str(tmp_path / "tree")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (tmp_path / "tree").exists()
    assert all(path.name.startswith(".tree.") for path in tmp_path.iterdir())
    assert lazy(torch.zeros(1)).num_bytes == 4
