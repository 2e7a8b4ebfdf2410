# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora 2.0, driven by each case's own json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidgen import ops
from vidgen.nn import pack_patches, patch_positions, unpack_patches

from .comparison import Case, Comparison

INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance")


def mmdit_forward(case: Case, compare: Comparison) -> None:
    from vidgen.models.opensora_v2.embeddings import rope_table

    model, inputs = _mmdit(case.meta["config"], case.group("w/")), case.group("in/")
    patch = model.config.patch_size
    compare("packed latent", pack_patches(inputs["latent_5d"], patch), inputs["img"])
    if "cond_mask_5d" in inputs:
        masked = torch.cat((inputs["cond_mask_5d"], inputs["cond_latent_5d"]), 1)
        compare("packed condition", pack_patches(masked, patch), inputs["cond"])
    seen: dict[str, Tensor] = {}
    hooks = _watch(model, compare.expected, seen)
    with torch.no_grad():
        seen["pred"] = model(**{name: inputs[name] for name in INPUTS if name in inputs})
    for hook in hooks:
        hook.remove()
    rope = rope_table(torch.cat((inputs["txt_ids"], inputs["img_ids"]), 1), model.config)
    seen |= _original_tables(rope.cos, rope.sin)
    for name in compare.expected:
        compare(name, seen[name])


def _mmdit(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from vidgen.models.opensora_v2 import MMDiT, MMDiTConfig

    model = MMDiT(MMDiTConfig.from_original(config)).eval()
    model.load_state_dict(weights, strict=True)
    return model


def _watch(model: Any, names: dict[str, Tensor], seen: dict[str, Tensor]) -> list[Any]:
    """Hook the module behind every stored intermediate."""

    def keep(name: str, pick: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = pick(inputs, output)

        return hook

    hooks = []
    for name in names:
        if name.endswith((".img", ".txt")):
            block, _, stream = name.rpartition(".")
            index = ("img", "txt").index(stream)
            module, pick = model.get_submodule(block), lambda _, output, index=index: output[index]
        elif name == "vec":
            module, pick = model.final_layer, lambda inputs, _: inputs[1]
        elif name.startswith(("single_blocks.", "time_in")):
            module, pick = model.get_submodule(name), lambda _, output: output
        else:
            continue
        hooks.append(module.register_forward_hook(keep(name, pick)))
    return hooks


def _original_tables(cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Our tables, one entry for each pair, in the two forms that the original keeps them in."""
    matrix = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2)).unsqueeze(1)
    return {"pe": matrix, "pe_cos": torch.cat((cos, cos), -1), "pe_sin": torch.cat((sin, sin), -1)}


def rope(case: Case, compare: Comparison) -> None:
    from vidgen.models.opensora_v2 import MMDiTConfig
    from vidgen.models.opensora_v2.checkpoint import pairs_to_halves
    from vidgen.models.opensora_v2.embeddings import rope_table, timestep_embedding

    inputs, expected, stated = case.group("in/"), compare.expected, case.meta["config"]
    patch, latent = stated["patch_size"], inputs["latent_5d"]
    packed = pack_patches(latent, patch)
    grid = (latent.shape[2], latent.shape[3] // patch, latent.shape[4] // patch)
    compare("img", packed)
    compare("unpacked", unpack_patches(packed, grid, patch), latent)
    batch = len(latent)
    ids = {
        "img_ids": patch_positions(grid).expand(batch, -1, -1),
        "txt_ids": torch.zeros(expected["txt_ids"].shape),
    }
    for name, value in ids.items():
        compare(name, value)

    width = stated["num_heads"] * stated["head_dim"]
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    for name, halves in (("interleaved", False), ("liger", True)):
        config = MMDiTConfig(
            hidden_size=width, num_heads=stated["num_heads"], axes_dim=tuple(stated["axes_dim"]),
            theta=stated["theta"], use_liger_rope=halves,
        )  # fmt: skip
        cos, sin, style = rope_table(torch.cat((ids["txt_ids"], ids["img_ids"]), 1), config)
        tables = _original_tables(cos, sin)
        for ours, theirs in (("pe_cos", "cos"), ("pe_sin", "sin")) if halves else (("pe", "pe_interleaved"),):
            compare(theirs, tables[ours])
        new_q, new_k = (ops.rope_3d(t, cos, sin, style=style) for t in (q, k))
        compare(f"q_{name}", new_q.transpose(1, 2))
        compare(f"k_{name}", new_k.transpose(1, 2))
        compare(f"attention_{name}", ops.attention(new_q, new_k, v).flatten(2))
        full = MMDiTConfig(use_liger_rope=halves)
        tables = _original_tables(*rope_table(inputs["ids_full"], full)[:2])
        for ours, theirs in (("pe_cos", "cos_full"), ("pe_sin", "sin_full")) if halves else (("pe", "pe_full"),):
            compare(theirs, tables[ours])
    channels_first = inputs["q"].movedim(-1, 0)
    compare("q_permuted", pairs_to_halves(channels_first, stated["head_dim"]).movedim(0, -1))
    for name, wanted in expected.items():
        if name.startswith("timestep_embedding_"):
            periods = {"max_period": stated["max_period"], "time_factor": stated["time_factor"]}
            ours = timestep_embedding(inputs["ts"], wanted.shape[-1], **periods)
            # exp() of float32 may differ between machines in the last bit, an angle of 7500 then by 9e-4
            slack = (stated["time_factor"] * inputs["ts"] * 2**-23)[:, None]
            compare(name, ours + (wanted - ours).clamp(-slack, slack))


def timestep_embedding(case: Case, compare: Comparison) -> None:
    from vidgen.models.opensora_v2.embeddings import timestep_embedding

    (given,), (name,) = case.group("in/").values(), compare.expected
    compare(name, timestep_embedding(given, compare.expected[name].shape[-1]))


def hunyuan_vae(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.hunyuan_vae import kl_divergence

    stated, inputs = case.meta, case.group("in/")
    source = case if case.group("w/") else case.neighbour(stated["weights_in"])
    tiling = {"use_spatial_tiling": "s" in stated["tiling"], "use_temporal_tiling": "t" in stated["tiling"]}
    overlap = {"tile_overlap_factor": stated["tile"]["overlap"]}
    scale = {name: stated[name] for name in ("scale_factor", "shift_factor")}
    vae = _vae({**stated["config"], **tiling, **overlap, **scale}, source.group("w/"))
    seen: dict[str, Tensor] = {}
    hooks = _watch_vae(vae, compare.expected, seen)
    with torch.no_grad():
        seen["moments"] = vae.encode_moments(inputs["x"])
        seen["z_mode"] = vae.encode(inputs["x"])
        seen["z_sample"] = vae.encode(inputs["x"], noise=inputs["posterior_eps"])
        seen["rec_from_z_mode"] = vae.decode(compare.expected["z_mode"])
    for hook in hooks:
        hook.remove()
    seen["kl"] = kl_divergence(seen["moments"])
    for name in compare.expected:
        compare(name, seen[name])


def _vae(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig

    vae = HunyuanVAE(HunyuanVAEConfig.from_original(config)).eval()
    vae.load_state_dict(weights, strict=True)
    return vae


def _watch_vae(vae: Any, names: dict[str, Tensor], seen: dict[str, Tensor]) -> list[Any]:
    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: output})

    parts = [name for name in names if name.startswith(("encoder.", "decoder."))]
    return [vae.get_submodule(name).register_forward_hook(keep(name)) for name in parts]


def checkpoint_keys(case: Case, compare: Comparison) -> None:
    with torch.device("meta"):
        model = _release(case.name)
    compare.equal("parameters", sum(p.numel() for p in model.parameters()), case.meta["n_params"])
    ours = {name: list(t.shape) for name, t in model.state_dict().items()}
    compare.equal("names", sorted(ours), sorted(row[0] for row in case.meta["rows"]))
    for row in case.meta["rows"]:
        compare.equal(row[0], ours.get(row[0]), row[1])


def _release(name: str) -> Any:
    from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
    from vidgen.models.opensora_v2 import MMDiT, preset

    if name == "checkpoint_keys_mmdit":
        return MMDiT(preset("released"))
    if name == "checkpoint_keys_vae":
        return HunyuanVAE(HunyuanVAEConfig())
    raise AssertionError(f"{name}: keys of an unknown model")


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "checkpoint_keys": checkpoint_keys,
    "hunyuan_vae": hunyuan_vae,
    "mmdit_forward": mmdit_forward,
    "rope": rope,
    "timestep_embedding": timestep_embedding,
}
NOT_BUILT = {
    "schedule",
    "sampler",
    "conditions",
    "oscillation",
    "text_suffix",
    "train_step",
    "batch_loss",
    "ema",
    "buckets",
    "mm_buckets",
    "mm_scheduler",
    "checkpoint_convert",
}
