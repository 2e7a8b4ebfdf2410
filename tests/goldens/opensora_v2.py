# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora 2.0, driven by each case's own json."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidgen import ops
from vidgen.nn import pack_patches, patch_positions, unpack_patches

from . import checkpoints
from .comparison import Case, Comparison

INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond", "guidance")


def mmdit_forward(case: Case, compare: Comparison) -> None:
    from vidgen.models.opensora_v2.embeddings import rope_table

    model, inputs = _mmdit(case.meta["config"], case.group("w/")), case.group("in/")
    patch = model.config.patch_size
    if "latent_5d" in inputs:
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
        elif name == "pred" or name.startswith("pe"):
            continue
        else:
            module, pick = model.get_submodule(name), lambda _, output: output
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
    vae = _vae({**stated["config"], **tiling, **overlap, **scale, "allow_misaligned_tiles": True}, source.group("w/"))
    seen: dict[str, Tensor] = {}
    hooks = _watch_vae(vae, compare.expected, seen)
    with torch.no_grad():
        seen["moments"] = vae.encode_moments(inputs["x"])
        seen["z_mode"] = vae.encode(inputs["x"])
        if "z_sample" in compare.expected:
            seen["z_sample"] = vae.encode(inputs["x"], noise=inputs["posterior_eps"])
        if "rec_from_z_mode" in compare.expected:
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


def schedule(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion import opensora_v2 as sampling

    for entry in case.meta["cases"]:
        tokens, frames = entry["image_seq_len"], entry["num_frames"]
        levels = sampling.schedule(
            entry["num_steps"], tokens, frames, flow_shift=entry["shift_alpha"], shift=entry["shift"],
            **{name: entry[name] for name in ("base_shift", "max_shift") if name in entry},
        )  # fmt: skip
        compare(f"timesteps_{entry['index']}", levels)
        if entry["shift"] and entry["shift_alpha"] is None:
            shifts = {name: entry[name] for name in ("base_shift", "max_shift") if name in entry}
            alpha = sampling.resolution_shift(tokens, frames, **shifts)
            compare(f"alpha of case {entry['index']}", alpha, entry["alpha"])


def oscillation(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion.opensora_v2 import oscillate

    for row in case.meta["rows"]:
        ours = oscillate(row["scale"], row["i"], force_num=case.meta["force_num"])
        compare.equal(f"scale {row['scale']} at step {row['i']}", ours, row["gs"])


def text_suffix(case: Case, compare: Comparison) -> None:
    from vidgen.models.text import opensora_v2_prompt

    fps = case.meta["fps"]
    for row in case.meta["rows"]:
        text = row["text"]
        compare.equal(f"{text!r} with fps", opensora_v2_prompt(text, fps=fps, motion_score=None), row["with_fps"])
        compare.equal(f"{text!r} with motion", opensora_v2_prompt(text, fps=None), row["with_motion"])
        compare.equal(f"{text!r} with both", opensora_v2_prompt(text, fps=fps), row["fps_then_motion"])


def conditions(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion.opensora_v2_conditions import inference_condition

    inputs = case.group("in/")
    references = [[a, b] for a, b in zip(inputs["ref_a"], inputs["ref_b"], strict=True)]
    for name in compare.expected:
        cond_type, causal, output = name.split(".")
        mask, masked = inference_condition(inputs["z"], cond_type, references, causal=causal == "causal1")
        if output == "mask_t":
            compare(name, mask[:, 0, :, 0, 0])
            compare.equal(f"{name}: one value for a frame", bool((mask == mask[..., :1, :1]).all()), True)
        else:
            compare(name, masked[..., :1, :1])


def sampler(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion import opensora_v2 as sampling
    from vidgen.diffusion.opensora_v2_conditions import (
        final_frames,
        inference_condition,
        reference_clips,
        restore_references,
    )

    option, inputs, expected = case.meta["sampling_option"], case.group("in/"), compare.expected
    model, vae = (
        _mmdit(case.meta["config"], case.group("w/mmdit.")),
        _vae(case.meta["vae_config"], case.group("w/vae.")),
    )
    patch, causal, cond_type = model.config.patch_size, option["is_causal_vae"], case.meta["cond_type"]
    time_ratio = option["temporal_reduction"]
    frames = sampling.latent_frames(option["num_frames"], time_ratio=time_ratio, causal=causal)
    batch = len(case.meta["prompts_order"]) - 1
    # a resolution and an aspect ratio instead of sizes: the video shows which ones the original looked up
    height_and_width = [option[side] or expected["video"].shape[at] for side, at in (("height", -2), ("width", -1))]
    noise = sampling.initial_noise(
        batch, model.config.latent_channels, frames, *height_and_width,
        patch_size=patch, seed=case.meta["noise_seed"],
    )  # fmt: skip
    packed = pack_patches(noise, patch)
    compare("noise", packed.repeat(len(inputs["noise_packed"]) // batch, 1, 1), inputs["noise_packed"])
    grid = (frames, noise.shape[3] // patch, noise.shape[4] // patch)
    levels = sampling.schedule(
        option["num_steps"], grid[1] * grid[2], frames, flow_shift=option["flow_shift"], shift=option["shift"]
    )
    compare("timesteps", levels)

    entering, predictions = [packed], []

    def watched(**arguments: Tensor) -> Tensor:
        predictions.append(model(**arguments))
        return predictions[-1]

    positive = {"txt": inputs["t5"][:batch], "y_vec": inputs["clip"][:batch]}
    on_step = lambda index, latents: entering.append(latents)  # noqa: E731
    if option["method"].endswith("DISTILLED"):
        latent = sampling.sample_distilled(
            watched, noise, levels, positive, guidance=option["guidance"], patch_size=patch, on_step=on_step
        )
    else:
        clips = [inputs[name] for name in ("ref_a", "ref_b") if name in inputs]
        chosen = reference_clips(clips, cond_type, causal=causal, time_ratio=time_ratio)
        references, draws = [], 0
        for _ in range(batch):  # all samples have the same references, encoded again with noise of their own
            with torch.no_grad():
                eps = [inputs[f"ref_posterior_eps_{draws + i}"] for i in range(len(chosen))]
                references.append([vae.encode(c[None], noise=e)[0] for c, e in zip(chosen, eps, strict=True)])
            draws += len(chosen)
        mask, masked = inference_condition(noise, cond_type, references, causal=causal)
        compare("mask", mask, inputs["masks"])
        compare("masked reference", masked, inputs["masked_ref"])
        condition = {"mask": mask, "masked_latent": masked} if model.config.cond_embed else {}
        latent = sampling.sample_guided(
            watched, noise, levels, positive, {name: t[-1:].repeat_interleave(batch, 0) for name, t in _text(inputs)},
            **condition, guidance=option["guidance"], guidance_img=option["guidance_img"],
            text_osci=option["text_osci"], image_osci=option["image_osci"],
            scale_temporal_osci=option["scale_temporal_osci"] and "i2v" in cond_type, patch_size=patch, on_step=on_step,
        )  # fmt: skip
    compare("traj_img", torch.stack(entering[:-1]))
    compare("latent_final_packed", pack_patches(latent, patch))
    for name, prediction in (("first_pred", predictions[0]), ("last_pred", predictions[-1])):
        # without a condition we do not ask for the third branch, which is the second again
        missing = (len(expected[name]) - len(prediction)) // batch
        compare(name, torch.cat((prediction, *[prediction[-batch:]] * missing)))
    if not option["method"].endswith("DISTILLED"):
        latent = restore_references(latent, mask, masked, cond_type, first_sample_only=True)
    with torch.no_grad():
        video = vae.decode(latent)
    compare("video", final_frames(video, option["num_frames"], cond_type, causal=causal, time_ratio=time_ratio))


def _text(inputs: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [("txt", inputs["t5"]), ("y_vec", inputs["clip"])]


def train_step(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion import opensora_v2_loss as training
    from vidgen.diffusion.opensora_v2_conditions import training_condition

    inputs, options = case.group("in/"), case.meta["train_config"]
    model, vae = (
        _mmdit(case.meta["config"], case.group("w/mmdit.")),
        _vae(case.meta["vae_config"], case.group("w/vae.")),
    )
    batch, patch = len(inputs["video"]), options["patch_size"]
    with torch.no_grad():
        latent = vae.encode(inputs["video"])
        condition = {}
        if weights := options.get("condition_config"):
            causal = options.get("is_causal_vae", True)
            types = _drawn_types(weights, latent, compare.expected["inp.cond"], patch, causal)
            mask, masked = training_condition(inputs["video"], latent, types, vae.encode, causal=causal)
            condition = {"mask": mask, "masked_latent": masked}
    text = {name: t[:batch] for name, t in _text(inputs)}
    for (name, t), encoder in zip(_text(inputs), ("t5", "clip"), strict=True):
        if ratio := (options.get("dropout_ratio") or {}).get(encoder):
            text[name] = training.drop_text(t[:batch], t[-1:], inputs[f"drop_rand_{encoder}"], ratio)
    arguments, target = training.training_inputs(
        latent, **text, normal=inputs["t_randn"], noise=inputs["noise_x1"], patch_size=patch,
        guidance=options.get("guidance", 4.0), sigma_min=case.meta["sigma_min"], **condition,
    )  # fmt: skip
    for name in compare.expected:
        if name.startswith("inp."):
            ours = arguments[name.removeprefix("inp.")]
            compare(name, ours.expand(batch, -1, -1) if name.endswith("_ids") else ours)
    compare("x0_packed", pack_patches(latent, patch))
    mask = inputs.get("masks") if options.get("no_i2v_ref_loss") else None
    loss = training.batch_loss(model(**arguments), target, mask)
    loss.backward()
    compare("loss", loss)
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name in compare.expected:
        if name.startswith("grad."):
            compare(name, grads[name.removeprefix("grad.")])
    total = torch.stack([g.double().square().sum() for g in grads.values() if g is not None]).sum().sqrt()
    compare("grad_global_norm", total)


def _drawn_types(weights: dict[str, float], latent: Tensor, cond: Tensor, patch: int, causal: bool) -> list[str]:
    """The type of each sample: the only one there is, else the one whose given frames are those of the stored mask."""
    from vidgen.diffusion.opensora_v2_conditions import choose_condition, inference_condition

    frames, types = latent.shape[2], []
    stored = cond[..., 0].unflatten(1, (frames, -1))[:, :, 0]  # of each frame, whether it is given
    for sample, given in zip(latent, stored, strict=True):
        left = [name for name, weight in weights.items() if weight and (name[:1] != "v" or frames > 8 + causal)]
        fitting = []
        for name in left if len(left) > 1 else []:
            whole = [sample, sample] if name == "i2v_loop" else [sample]
            try:
                mask, _ = inference_condition(sample[None], name, [whole], causal=causal)
            except ValueError:
                continue
            if torch.equal(mask[0, 0, :, 0, 0], given):
                fitting.append(name)
        types.append(choose_condition(dict.fromkeys(fitting[:1] or left, 1), frames, random.Random(0)))
    return types


def batch_loss(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion.opensora_v2_loss import batch_loss

    inputs = case.group("in/")
    for name in compare.expected:
        mask = inputs["masks"] if name == "loss_masked" else None
        compare(name, batch_loss(inputs["pred"], inputs["target"], mask))


def ema(case: Case, compare: Comparison) -> None:
    from vidgen.train.optimizer import EMAAdamW

    inputs = case.group("in/")
    p = torch.nn.Parameter(inputs["param"].clone())
    optimizer = EMAAdamW([p], lr=0.0, ema_decay=case.meta["decay"], ema_warmup=False)
    optimizer.load_state_dict({
        **optimizer.state_dict(),
        "state": {
            0: {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "ema": inputs["ema"].clone(),
            }
        },
    })  # fmt: skip
    p.grad = torch.zeros_like(p)
    optimizer.step()
    compare("ema", optimizer.ema_parameters()[0])


def mm_scheduler(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion import opensora_v2 as sampling
    from vidgen.diffusion import opensora_v2_loss as training

    inputs, sigma_min = case.group("in/"), case.meta["sigma_min"]
    clean = pack_patches(inputs["x_start"], 2)
    compare("x_t", training.mix_with_noise(clean, inputs["noise"], inputs["t"], sigma_min=sigma_min))
    target = training.velocity_target(clean, inputs["noise"], sigma_min=sigma_min)
    compare("loss", training.batch_loss(inputs["pred"], target).reshape(1))
    for index, arguments in enumerate(case.meta["timesteps_args"]):
        compare(f"timesteps_{index}", sampling.schedule(*arguments))


def checkpoint_keys(case: Case, compare: Comparison) -> None:
    with torch.device("meta"):
        model = _release(case.name)
    compare.equal("parameters", sum(p.numel() for p in model.parameters()), case.meta["n_params"])
    ours = {name: list(t.shape) for name, t in model.state_dict().items()}
    compare.equal("names", sorted(ours), sorted(row[0] for row in case.meta["rows"]))
    for row in case.meta["rows"]:
        compare.equal(row[0], ours.get(row[0]), row[1])
    checkpoints.opensora_v2_names(case, compare)


def _release(name: str) -> Any:
    from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
    from vidgen.models.opensora_v2 import MMDiT, preset

    if name == "checkpoint_keys_mmdit":
        return MMDiT(preset("released"))
    if name == "checkpoint_keys_vae":
        return HunyuanVAE(HunyuanVAEConfig())
    raise AssertionError(f"{name}: keys of an unknown model")


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "batch_loss": batch_loss,
    "checkpoint_convert": checkpoints.opensora_v2,
    "checkpoint_keys": checkpoint_keys,
    "conditions": conditions,
    "ema": ema,
    "hunyuan_vae": hunyuan_vae,
    "mm_scheduler": mm_scheduler,
    "mmdit_forward": mmdit_forward,
    "oscillation": oscillation,
    "rope": rope,
    "sampler": sampler,
    "schedule": schedule,
    "text_suffix": text_suffix,
    "timestep_embedding": timestep_embedding,
    "train_step": train_step,
}
NOT_BUILT = {"buckets", "mm_buckets"}
