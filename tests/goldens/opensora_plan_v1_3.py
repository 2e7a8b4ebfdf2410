# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora Plan v1.3, driven by each case's own json."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidgen import diffusion, ops

from .comparison import Case, Comparison


def dit_forward(case: Case, compare: Comparison) -> None:
    model = _model(case.meta["config"], case.group("w/"), inpaint=case.meta["kind"] == "inpaint_forward")
    seen: dict[str, Tensor] = {}
    for name in compare.expected:
        if block := re.fullmatch(r"block_(\d+)", name):
            # stored as (tokens, batch, hidden)
            model.transformer_blocks[int(block[1])].register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: output.transpose(0, 1)})
            )
    with torch.no_grad():
        seen["sample"] = model(**case.group("in/"))
    for name in compare.expected:
        compare(name, seen[name])


def _model(config: dict[str, Any], weights: dict[str, Tensor], *, inpaint: bool = False) -> Any:
    from vidgen import config as loading
    from vidgen.models.opensora_plan_v1_3 import (
        OpenSoraConfig,
        OpenSoraInpaint_v1_3,
        OpenSoraInpaintConfig,
        OpenSoraT2V_v1_3,
    )

    if inpaint:
        model: Any = OpenSoraInpaint_v1_3(loading.load(OpenSoraInpaintConfig, config))
    else:
        model = OpenSoraT2V_v1_3(loading.load(OpenSoraConfig, config))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def rope(case: Case, compare: Comparison) -> None:
    for index, grid in enumerate(case.meta["grids"]):
        tokens = case.tensors[f"in/q{index}"].transpose(0, 1)
        sections = (tokens.shape[-1] // 3,) * 3
        cos, sin = ops.rope_3d_table(
            grid, sections, scale=case.meta["interpolation_scale_thw"], theta=case.meta["theta"]
        )
        rotated = ops.rope_3d(tokens, cos, sin, style="half_per_axis", sections=sections)
        compare(f"q{index}", rotated.transpose(0, 1))
        axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
        compare(f"pos{index}_thw", torch.stack(axes).flatten(1))


def rearrange_maps(case: Case, compare: Comparison) -> None:
    from vidgen.models.opensora_plan_v1_3.model import visible_keys

    for n, k, batch in case.meta["specs"]:
        for pattern in ("single", "group"):
            name = f"{pattern}_N{n}_k{k}_B{batch}"
            group, position = ops.skiparse_index(n, k, pattern)
            padded = ops.skiparse_padded_length(n, k)
            compare(f"padlen_{name}", torch.tensor([padded - n]))
            table = torch.full((padded // k, k * batch), -1)
            for b in range(batch):
                table[position, group * batch + b] = torch.arange(n) + 1000 * b
            compare(name, table)
            compare(f"selfmask_{name}", _self_mask(case.tensors[f"in/mask_{name}"][:, 0], k, pattern))
            # text: every group of a sample sees the whole text of that sample, which is why our layers are dense
            text = case.tensors[f"in/encmask_{name}"]
            compare(f"crossmask_{name}", text.repeat(k, 1, 1)[:, None])
            tokens = torch.arange(text.shape[-1])[:, None] + 1000 * torch.arange(batch)
            compare(f"kv_{name}", tokens.repeat(1, k))
            mask = case.tensors[f"in/mask_{name}"][:, 0] == 0
            hidden = visible_keys(mask, k, pattern)
            compare.equal(f"hidden {name}", bool((hidden & ~mask).any()), _has_hidden_group(mask, k, pattern))


def _self_mask(bias: Tensor, k: int, pattern: str) -> Tensor:
    """The bias of every key, group by group, with the -9980 that the original gives to padding."""
    from vidgen.ops.skiparse_index import tokens_to_groups

    grouped = tokens_to_groups(bias + 9980, k, pattern) - 9980  # padding is zero
    return grouped.transpose(0, 1).flatten(0, 1)[:, None, None]


def _has_hidden_group(mask: Tensor, k: int, pattern: str) -> bool:
    """Whether a group without padding has hidden keys only."""
    group, _ = ops.skiparse_index(mask.shape[1], k, pattern)
    full = ops.skiparse_padded_length(mask.shape[1], k) // k
    members = [mask[:, group == g] for g in range(k)]
    return any(m.shape[1] == full and bool((~m).all(1).any()) for m in members)


def sampler(case: Case, compare: Comparison) -> None:
    config = dict(case.meta["config"])
    compare.equal("prediction_type", config.pop("prediction_type"), "v_prediction")
    spacing, zero_snr = config.pop("timestep_spacing", "linspace"), config.get("rescale_betas_zero_snr", False)
    table = _table(config)
    compare.equal("other settings", config, {})
    inputs, steps, scale = case.group("in/"), case.meta["steps"], case.meta["guidance_scale"]
    schedule = diffusion.euler_ancestral_schedule(steps, table, spacing=spacing)
    latents, seen = [inputs["initial_noise"] * schedule.initial_std], []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        index = len(seen)
        seen.append(x[: len(inputs["initial_noise"])])
        expected = compare.expected["timesteps"][index].expand(len(x))
        compare(f"timestep {index}", timestep, expected, part="tables")
        text = inputs[f"v_text_{index}"]
        return torch.cat([inputs[f"v_uncond_{index}"], text]) if scale > 1 else text

    diffusion.sample_euler_ancestral(
        lambda x, timestep, text: model(x, timestep),
        inputs["initial_noise"],
        schedule,
        {"text": torch.zeros(len(latents[0]), 1)},
        negative_conditioning={"text": torch.zeros(len(latents[0]), 1)},
        guidance_scale=scale,
        guidance_rescale=case.meta.get("guidance_rescale", 0.0),
        step_noises=[inputs[f"step_noise_{i}"] for i in range(steps)],
        on_step=lambda index, x: latents.append(x),
    )
    for index, x in enumerate(latents):
        compare(f"latents_{index}", x, part="latents_1" if index == 1 else "later_latents")
    for index, x in enumerate(seen):
        if f"model_input_{index}" in compare.expected:
            compare(f"model_input_{index}", x, part="latents_1" if index == 1 else "later_latents")
    last = torch.tensor([2.0**-24]) if zero_snr else table[-1:]
    for name, value in {"ddpm_alphas_cumprod": table, "alphas_cumprod": torch.cat([table[:-1], last])}.items():
        if name in compare.expected:
            compare(name, value, part="tables")
    # 1 - a is as small as 1e-4 where a is close to 1: the last bit of the table, which linspace and cumprod round
    # differently from machine to machine, is 3e-5 of a sigma. So the sigmas are those of the stored table.
    numbers = {
        found[1]: int(found[1][1:]) for name in compare.expected if (found := re.fullmatch(r"sigmas(_\d+)", name))
    }
    for name, number in {"": steps, **numbers}.items():
        timesteps, sigmas, _ = diffusion.euler_ancestral_schedule(
            number, compare.expected.get("ddpm_alphas_cumprod", table), spacing=spacing
        )
        compare(f"timesteps{name}", timesteps, part="tables")
        compare(f"sigmas{name}", sigmas, part="tables")


def _table(settings: dict[str, Any]) -> Tensor:
    """The levels of a scheduler's settings, which are taken out of them; what is absent is as in diffusers."""
    schedule, zero_snr = settings.pop("beta_schedule", "linear"), settings.pop("rescale_betas_zero_snr", False)
    count = settings.pop("num_train_timesteps", 1000)
    ends = settings.pop("beta_start", 1e-4), settings.pop("beta_end", 0.02)
    if zero_snr:
        known = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
        if count != 1000 or known.get(schedule) != ends:
            raise AssertionError(f"scheduler: unknown table {schedule} of {count} from {ends}")
        return diffusion.open_sora_plan_alphas_cumprod(schedule)
    tables = {
        "linear": diffusion.v_prediction.linear_alphas_cumprod,
        "scaled_linear": diffusion.v_prediction.scaled_linear_alphas_cumprod,
    }
    return tables[schedule](count, *ends, dtype=torch.float32)


def train_loss(case: Case, compare: Comparison) -> None:
    inputs, settings = case.group("in/"), dict(case.meta["scheduler"])
    table = _table(settings)
    compare.equal("scheduler", settings, {"cls": "DDPMScheduler", "prediction_type": "v_prediction"})
    model = _model(case.meta["config"], case.group("w/"), inpaint="Inpaint" in case.meta["cls"])
    noise = inputs["noise"]
    if case.meta.get("noise_offset"):
        (offsets,) = (t for name, t in inputs.items() if "offset" in name)
        noise = diffusion.offset_noise(noise, case.meta["noise_offset"], offsets)
    seen: dict[str, Tensor] = {}
    names = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask")

    def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
        seen["noisy_latents"] = noisy
        more = [inputs[name] for name in ("masked_latents", "mask", "condition") if name in inputs]
        return model(torch.cat([noisy, *more], 1), timesteps, **{name: inputs.get(name) for name in names})

    loss = diffusion.v_prediction_loss(
        velocity,
        inputs["latents"],
        alphas_cumprod=table,
        mask=inputs.get("attention_mask"),
        noise=noise,
        timesteps=inputs["timesteps"],
        snr_gamma=case.meta.get("snr_gamma"),
    )
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    compare("loss", loss.reshape(1), part="loss")
    compare("noisy_latents", seen["noisy_latents"], part="grads")
    target = diffusion.v_prediction.velocity_target(inputs["latents"], noise, table, inputs["timesteps"])
    compare("velocity_target", target, part="grads")
    snr = diffusion.v_prediction.signal_to_noise(table, inputs["timesteps"])
    if "snr" in compare.expected:
        compare("snr", snr, part="grads")
    for name in case.group("out/grad/"):
        compare(f"grad/{name}", grads[name], part="grads")
    norm = torch.stack([g.double().square().sum() for g in grads.values() if g is not None]).sum().sqrt()
    compare("grad_norm_total", norm.reshape(1), part="grads")


def wfvae(case: Case, compare: Comparison) -> None:
    vae = _vae(case.meta["config"], case.group("w/"))
    inputs, expected = case.group("in/"), compare.expected
    latent, scaled = vae.normalize(inputs["latent"]), inputs["latent_scaled"]
    with torch.no_grad():
        moments, bands = vae.encode_with_bands(inputs["video"])
        mean, logvar = moments.chunk(2, 1)
        for name, value in {"moments": moments, "mode": mean, "std": (logvar.clamp(-30, 20) / 2).exp()}.items():
            if name in expected:
                compare(name, value)
        compare("latent_scaled", vae.encode(inputs["video"], noise=inputs["posterior_noise"]))
        decoded, decoder_bands = vae.decode_with_bands(inputs["latent"])
        compare("decoded", decoded)
        compare("decoded_from_scaled", vae.decode(scaled))
        for level in (1, 2):
            for name, of in ((f"enc_l{level}_coeffs", bands), (f"dec_l{level}_coeffs", decoder_bands)):
                if name in expected:
                    compare(name, of[level - 1])
        if "moments_tiled" in expected:
            compare("moments_tiled", vae.encode_moments(inputs["video"], chunk_frames=8))
        if "decoded_tiled" in expected:
            from vidgen.models.autoencoders.wfvae_original_chunks import decode_with_original_chunks

            compare("decoded_tiled", decode_with_original_chunks(vae, latent))
            compare("exact chunks", vae.decode(latent, chunk_latents=2), expected["decoded"])


def _vae(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from vidgen.models.autoencoders import WFVAE, WFVAEConfig
    from vidgen.models.autoencoders.wfvae_checkpoint import infer_config

    wanted = WFVAEConfig.from_original(config)
    read_off = infer_config(weights, scale=wanted.scale, shift=wanted.shift, t_interpolation=wanted.t_interpolation)
    assert read_off == wanted, f"the weights say {read_off}, the configuration {wanted}"
    vae = WFVAE(wanted).eval()
    constants = {name: value for name, value in vae.state_dict().items() if "wavelet_transform" in name}
    vae.load_state_dict({**constants, **weights}, strict=True)  # averaged checkpoints lack the constants
    return vae


def vae_blocks(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders import layers
    from vidgen.models.autoencoders.streaming import Stream

    for name in compare.expected:
        x, weights = case.tensors[f"in/{name}"], case.group(f"w/{name}.")
        channels, norm = x.shape[1], "groupnorm" if "_gn" in name else "layernorm"
        if name.startswith("causalconv"):
            weight = weights["conv.weight"]
            module: Any = layers.CausalConv3d(channels, weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
        elif name.startswith("resnet2d"):
            out = weights["conv1.weight"].shape[0]
            module = layers.ResBlock(channels, out, frames_apart=True, norm=norm)
        elif name.startswith("resnet3d"):
            module = layers.ResBlock(channels, weights["conv1.conv.weight"].shape[0], norm=norm)
        elif name.startswith("attn"):
            module = layers.FrameAttention(channels, norm=norm)
        elif name.startswith("up3d"):
            module = layers.Upsample3D(channels, t_interpolation=name.split("_")[1])
        else:
            kinds = {"down2d": layers.Downsample2D, "down3d": layers.Downsample3D, "up2d": layers.Upsample2D}
            module = kinds[name.split("_")[0]](channels)
        module.load_state_dict(weights, strict=True)
        compare(name, module(x, Stream()))


def haar(case: Case, compare: Comparison) -> None:
    inputs = case.group("in/")
    bands, image = ops.haar_3d(inputs["x3d"]), ops.haar_3d(inputs["x3d_image"])
    compare("haar3d", bands)
    compare("haar3d_image", image)
    compare("ihaar3d_of_haar3d", ops.inverse_haar_3d(bands))
    compare("ihaar3d_of_haar3d_image", ops.inverse_haar_3d(image))
    compare("ihaar3d_first_chunk", ops.inverse_haar_3d(inputs["coeffs3d"]))
    compare("ihaar3d_later_chunk", ops.inverse_haar_3d(inputs["coeffs3d"], drop_first_frame=False))
    compare("haar2d_framewise", ops.haar_2d(inputs["x3d"]))
    compare("ihaar2d", ops.inverse_haar_2d(inputs["coeffs2d"]))
    compare("ihaar2d_of_haar2d", ops.inverse_haar_2d(ops.haar_2d(inputs["x3d"])))
    # The original only transforms videos and hands a 4-D tensor back as it is: what analysis and synthesis give.
    compare("haar2d", ops.inverse_haar_2d(ops.haar_2d(inputs["x2d"])))


def vae_losses(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.discriminator import PatchDiscriminator3D
    from vidgen.train.vae_adversarial_loss import AdversarialLossConfig, discriminator_loss, generator_loss

    inputs, params = case.group("in/"), case.meta["params"]
    weights = {key: value for key, value in case.group("w/").items() if not key.startswith("discriminator.")}
    vae = _vae(case.meta["config"], weights).train()
    compare.equal("norm", case.meta["disc"].get("norm", "BatchNorm3d in train mode"), "BatchNorm3d in train mode")

    def new_discriminator() -> PatchDiscriminator3D:
        discriminator = PatchDiscriminator3D(case.meta["disc"]["ndf"], case.meta["disc"]["n_layers"])
        discriminator.load_state_dict(case.group("w/discriminator."), strict=True)
        return discriminator.train()

    config = AdversarialLossConfig(
        kl_weight=params["kl_weight"],
        wavelet_weight=params["wavelet_weight"],
        perceptual_weight=params["perceptual_weight"],
        adversarial_weight=params["disc_weight"] * params["disc_factor"],
        adversarial_start=params["disc_start"],
        distance=params["loss_type"],
        logvar=params["logvar_init"],
    )
    output = vae(inputs["video"], noise=inputs["posterior_noise"])
    loss, terms = generator_loss(
        output,
        inputs["video"],
        new_discriminator(),
        vae.decoder.conv_out.weight,
        params["global_step"],
        config,
    )
    loss.backward()
    grads = {name: p.grad for name, p in vae.named_parameters()}
    active = params["global_step"] >= params["disc_start"]
    compare("loss_generator", loss.reshape(1))
    values = {
        "recon": output.reconstruction,
        "disc_logits_fake_train_mode": new_discriminator()(output.reconstruction),
    }
    logged = {
        "total_loss": loss,
        "nll_loss": terms["reconstruction"],
        "rec_loss": terms["reconstruction"],
        "kl_loss": terms["kl"],
        "wl_loss": terms["wavelet"],
        "g_loss": terms["adversarial"],
        "d_weight": terms["adversarial_weight"] / params["disc_factor"],
        "logvar": torch.tensor(config.logvar),
        "disc_factor": torch.tensor(params["disc_factor"] * active),
    }
    values |= {f"log/{name}": value.reshape(1) for name, value in logged.items()}
    for name in compare.expected.keys() & values.keys():
        compare(name, values[name])

    judge = new_discriminator()
    loss, logits = discriminator_loss(judge, inputs["video"], output.reconstruction)
    loss = loss * params["disc_factor"] * active
    loss.backward()
    compare("loss_discriminator", loss.reshape(1))
    compare("dlog/disc_loss", loss.reshape(1))
    compare("dlog/logits_real", logits["real"].reshape(1))
    compare("dlog/logits_fake", logits["reconstructed"].reshape(1))
    grads |= {f"discriminator.{name}": p.grad for name, p in judge.named_parameters()}
    for name in case.group("out/grad/"):
        compare(f"grad/{name}", grads[name])


def inpaint_masks(case: Case, compare: Comparison) -> None:
    from vidgen.diffusion import inpaint

    pixels, random = case.tensors["in/pixels"], case.tensors["in/mask_random"]
    frames, keep = pixels.shape[0], case.meta["continuation_keep"]
    batch, _, _, height, width = random.shape

    def compressed(mask: Tensor, like: Tensor) -> Tensor:
        return inpaint.compress_mask(mask.view(1, 1, -1, 1, 1).expand(like.shape[0], 1, -1, height, width))

    for name, stored in compare.expected.items():
        form, kind = name.rsplit("_", 1)
        if name == "compressed_random":
            compare(name, inpaint.compress_mask(random))
        elif name.startswith("compressed_indices"):
            video = pixels.transpose(0, 1)
            _, mask = inpaint.place_frames(video[:, case.meta["indices"]], case.meta["indices"], frames)
            compare(name, compressed(mask, stored))
        else:
            mask = inpaint.frame_mask(kind, frames, min_clear_ratio=keep / frames, max_clear_ratio=keep / frames)
            if form == "mask_frames":
                compare(name, mask)
            elif form == "masked":
                masked = inpaint.hide_generated(pixels, mask.view(-1, 1, 1, 1), hidden=0.0)
                compare(name, masked[..., : stored.shape[-2], : stored.shape[-1]])
            else:
                compare(name, compressed(mask, stored))


def pipeline(case: Case, compare: Comparison) -> None:
    inputs, settings = case.group("in/"), case.meta
    model = _model(settings["transformer_config"], case.group("w/transformer."))
    vae = _vae(settings["vae_config"], case.group("w/vae."))
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    steps = settings["num_inference_steps"]
    latents = []
    final = diffusion.sample_euler_ancestral(
        model,
        inputs["initial_noise"],
        diffusion.euler_ancestral_schedule(steps),
        {name: inputs[stored] for name, stored in names.items()},
        negative_conditioning={
            name: inputs[f"negative_{stored}"] for name, stored in names.items() if f"negative_{stored}" in inputs
        },
        guidance_scale=settings["guidance_scale"],
        guidance_rescale=settings.get("guidance_rescale", 0.0),
        step_noises=[inputs[f"step_noise_{i}"] for i in range(steps)],
        on_step=lambda index, x: latents.append(x),
    )
    for index, x in enumerate(latents, 1):
        if f"latents_{index}" in compare.expected:
            compare(f"latents_{index}", x, part="latents_1" if index == 1 else "latents")
    compare("latents", final, part="latents")
    with torch.no_grad():
        video = vae.decode(final)
    compare("video", video.transpose(1, 2), part="video")
    frames = ((video / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
    compare.equal("tolerance of uint8", case.meta["tolerance"]["float32"]["uint8"], "off by one allowed")
    wanted = compare.expected["video_uint8"].int()
    compare("video_uint8", torch.where((frames.int() - wanted).abs() <= 1, wanted, frames.int()))


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "dit_forward": dit_forward,
    "inpaint_forward": dit_forward,
    "rearrange_maps": rearrange_maps,
    "rope": rope,
    "sampler": sampler,
    "train_loss": train_loss,
    "haar": haar,
    "vae_blocks": vae_blocks,
    "wfvae": wfvae,
    "vae_losses": vae_losses,
    "inpaint_masks": inpaint_masks,
    "pipeline": pipeline,
}
NOT_BUILT = {"data_rules", "metrics"}
