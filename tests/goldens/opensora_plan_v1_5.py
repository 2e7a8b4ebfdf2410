# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora Plan v1.5, driven by each case's own json."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import diffusion

from .comparison import Case, Comparison

FORMULA = (
    "v = tanh(0.8*x + c*(0.5 + t/1000)) + 0.1*c ; x = latents, t = timestep (sigma*1000), "
    "c = mean over (1,L,D) of encoder_hidden_states per batch entry, broadcast"
)


def dit_forward(case: Case, compare: Comparison) -> None:
    model = _model(case.meta["config"], case.group("w/"))
    seen: dict[str, Tensor] = {}
    hooks = _watch(model, compare.expected, seen)
    with torch.no_grad():
        seen["output"] = model(**case.group("in/"))
    for hook in hooks:
        hook.remove()
    for name in compare.expected:
        compare(name, seen[name])


def _watch(model: Any, names: dict[str, Tensor], seen: dict[str, Tensor]) -> list[Any]:
    """Hook the module behind every stored intermediate; streams are stored as (sequence, batch, hidden)."""

    def sequence_first(t: Tensor) -> Tensor:
        return t.transpose(0, 1)

    def keep(name: str, pick: Callable[[Any], Tensor]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = pick(output)

        return hook

    hooks = []
    for name in names:
        if name == "output":
            continue
        if block := re.fullmatch(r"stage(\d+)_(?:block(\d+)|last_block)/(hidden|encoder)", name):
            stage = model.transformer_blocks[int(block[1])]
            module = stage[-1 if block[2] is None else int(block[2])]
            stream = ("hidden", "encoder").index(block[3])
            pick = lambda output, stream=stream: sequence_first(output[stream])  # noqa: E731
        elif skip := re.fullmatch(r"(skip_norm_linear(?:_enc)?)(\d+)", name):
            module, pick = getattr(model, skip[1])[int(skip[2])], sequence_first
        else:
            module, pick = model.get_submodule(name), lambda output: output
        hooks.append(module.register_forward_hook(keep(name, pick)))
    return hooks


def _model(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT, SparseUMMDiTConfig

    model = SparseUMMDiT(SparseUMMDiTConfig.from_original(config)).eval()
    model.load_state_dict(weights, strict=True)
    return model


def wfvae_v1_5(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.wfvae import WFVAE, WFVAEConfig

    vae = WFVAE(WFVAEConfig.from_original(case.meta["config"])).eval()
    vae.load_state_dict(case.group("w/"), strict=True)
    inputs, expected = case.group("in/"), compare.expected
    with torch.no_grad():
        moments = vae.encode_moments(inputs["video"])
        mean, logvar = moments.chunk(2, dim=1)
        compare("moments", moments)
        compare("mean", mean)
        compare("logvar", logvar.clamp(-30, 20))
        compare("latent_mean_scaled", vae.encode(inputs["video"]))
        compare("latent_sampled_scaled", vae.encode(inputs["video"], noise=inputs["noise"]))
        compare("decoded", vae.decode(inputs["latent_for_decode"]))
        if "tiled_moments" in expected:
            compare("tiled_moments", vae.encode_moments(inputs["video"], chunk_frames=case.meta["t_chunk_enc"]))
        if "tiled_decoded" in expected:
            chunked = vae.decode(inputs["latent_for_decode"], chunk_latents=case.meta["t_chunk_dec"])
            compare("tiled_decoded", chunked)


def rearrange_maps(case: Case, compare: Comparison) -> None:
    from vidgen.ops import skiparse_index

    for entry in case.meta["maps"]:
        name, n, k, batch = entry["name"], entry["N"], entry["k"], entry["B"]
        pattern = "group" if entry["group"] else "single"
        group, position = skiparse_index(n, k, pattern)
        table = torch.full(tuple(entry["shape"]), -1)
        for b in range(batch):
            table[position[:n], group[:n] * batch + b] = torch.arange(n) * batch + b
        compare(name, table)
        if f"{name}_mask" in compare.expected:
            compare(f"{name}_mask", _hidden_keys(table, n, k, batch, pattern, compare.expected[f"{name}_mask"]))
    for name in compare.expected:
        if text := re.fullmatch(r"text_(repeated|merged)_k(\d+)", name):
            route = _repeat_text if text[1] == "repeated" else _merge_text
            compare(name, route(case.group("in/"), int(text[2])))


def _hidden_keys(table: Tensor, n: int, k: int, batch: int, pattern: str, stored: Tensor) -> Tensor:
    """Which keys the op hides from each group, read off its output.

    Zero queries and keys weigh every visible key alike, and values that are unit vectors say which keys those were.
    """
    from vidgen.ops import skiparse_attention

    num_text = stored.shape[-1] - table.shape[0]
    text_valid = stored[:, 0, -num_text:] == 0
    size = n + num_text
    zero, zero_text = torch.zeros(batch, n, 1, size), torch.zeros(batch, num_text, 1, size)
    units = torch.eye(size).view(1, size, 1, size).expand(batch, -1, -1, -1)
    visual, _ = skiparse_attention(
        zero, zero, units[:, :n], sparse_n=k, pattern=pattern,
        text_q=zero_text, text_k=zero_text, text_v=units[:, n:], text_mask=text_valid[:batch],
    )  # fmt: skip
    rows = torch.ones_like(stored)
    for column in range(k * batch):
        tokens = table[:, column]
        real = tokens[tokens >= 0]
        if not len(real):  # a group of padding only: nobody in it to ask
            rows[column, 0, len(tokens) :] = (~text_valid[column]).to(stored.dtype)
            continue
        b = column % batch
        visible = visual[b, real[0] // batch, 0] > 0
        rows[column, 0, : len(tokens)][tokens >= 0] = (~visible[real // batch]).to(stored.dtype)
        rows[column, 0, len(tokens) :] = (~visible[n:]).to(stored.dtype)
    return rows


def _repeat_text(inputs: dict[str, Tensor], k: int) -> Tensor:
    """The text each group sees: with visual keys hidden, head i of a visual query returns text token i."""
    from vidgen.ops import skiparse_attention, skiparse_index

    text = inputs["text_s_b"]
    length, batch, width = text.shape
    n = k * k
    scores = torch.where(torch.eye(length, dtype=torch.bool), 0.0, -1e4).view(1, length, length, 1)
    visual, _ = skiparse_attention(
        torch.ones(batch, n, length, width),
        torch.zeros(batch, n, length, width),
        torch.zeros(batch, n, length, width),
        sparse_n=k,
        pattern="single",
        text_q=torch.zeros(batch, length, length, width),
        text_k=scores.expand(batch, -1, -1, width).contiguous(),
        text_v=text.transpose(0, 1)[:, :, None].expand(-1, -1, length, -1).contiguous(),
        mask=torch.zeros(batch, n, dtype=torch.bool),
    )
    group, _ = skiparse_index(n, k, "single")
    first = [int((group == g).nonzero()[0]) for g in range(k)]
    return visual[:, first].permute(2, 1, 0, 3).reshape(length, k * batch, width)


def _merge_text(inputs: dict[str, Tensor], k: int) -> Tensor:
    """The mean over groups: with text keys hidden, head i of text query i returns its group's visual value."""
    from vidgen.ops import skiparse_attention, skiparse_index

    grouped = inputs["text_grouped"]
    length, columns, width = grouped.shape
    batch, n = columns // k, k * k
    group, _ = skiparse_index(n, k, "single")
    values = grouped.view(length, k, batch, width)[:, group[:n]].permute(2, 1, 0, 3).contiguous()
    zeros, zeros_text = torch.zeros_like(values), torch.zeros(batch, length, length, width)
    _, text = skiparse_attention(
        zeros, zeros, values, sparse_n=k, pattern="single", text_q=zeros_text, text_k=zeros_text, text_v=zeros_text,
        text_mask=torch.zeros(batch, length, dtype=torch.bool),
    )  # fmt: skip
    return text.diagonal(dim1=1, dim2=2).permute(2, 0, 1)


def sampler_trajectory(case: Case, compare: Comparison) -> None:
    settings, inputs = case.meta["scheduler"], case.group("in/")
    names = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "prompt_embeds_2",
        "encoder_attention_mask": "prompt_attention_mask",
    }
    model, outputs = _velocity(case), []

    def recorded(latents: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        outputs.append(model(latents, timestep, **conditioning))
        return outputs[-1]

    noise = inputs["noise"]
    guided = settings.get("guidance_scale", 4.5) > 1
    batch = noise.shape[0]
    negative = {name: inputs[stored][:batch] for name, stored in names.items()} if guided else None
    positive = {name: inputs[stored][batch if guided else 0 :] for name, stored in names.items()}
    sigmas, latents = _sigmas(settings, noise), [noise]
    final = diffusion.sample(
        recorded,
        noise,
        sigmas,
        positive,
        negative_conditioning=negative,
        guidance_scale=settings.get("guidance_scale", 4.5),
        guidance_rescale=settings.get("guidance_rescale", 0.7),
        on_step=lambda index, x: latents.append(x),
    )
    compare("sigmas", sigmas)
    compare("timesteps", 1000 * sigmas[:-1])
    compare("latents_per_step", torch.stack(latents))
    compare("model_outputs_per_step", torch.stack(outputs))
    compare("final", final)


def _sigmas(settings: dict[str, Any], latents: Tensor) -> Tensor:
    known = {"num_inference_steps", "guidance_scale", "guidance_rescale", "shift", "use_dynamic_shifting"}
    known |= {"use_linear_quadratic_schedule", "sigma_eps"}
    if unknown := settings.keys() - known:
        raise AssertionError(f"scheduler: unknown settings {', '.join(sorted(unknown))}")
    num_steps = settings["num_inference_steps"]
    if settings.get("use_linear_quadratic_schedule"):
        return diffusion.linear_quadratic_schedule(num_steps)
    if settings.get("use_dynamic_shifting"):
        shift = diffusion.dynamic_shift(latents.shape[-2] * latents.shape[-1] // 4)
    else:
        shift = max(settings.get("shift", 1.0), 1.0)  # the original leaves the schedule alone up to 1
    return diffusion.shifted_linear_schedule(num_steps, shift, sigma_eps=settings.get("sigma_eps") or 0.0)


def _velocity(case: Case) -> Callable[..., Tensor]:
    stated = case.meta["model"]
    if stated == FORMULA:

        def formula(latents: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
            text = conditioning["encoder_hidden_states"].mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1)
            time = timestep.view(-1, 1, 1, 1, 1)
            return torch.tanh(0.8 * latents + text * (0.5 + time / 1000)) + 0.1 * text

        return formula
    if not isinstance(stated, dict) or stated.get("kind") != "SparseUMMDiT":
        raise AssertionError(f"model: unknown {stated!r}")
    model = _model(stated["config"], case.group("w/"))
    return lambda latents, timestep, **conditioning: model(
        hidden_states=latents, timestep=timestep, attention_mask=torch.ones_like(latents[:, 0]), **conditioning
    )


def sigmas(case: Case, compare: Comparison) -> None:
    inputs = case.group("in/")
    constants = case.meta["constants"]
    fit = {name: constants[name] for name in ("base_shift", "max_shift")}
    fit |= {"base_tokens": constants["base_image_seq"], "max_tokens": constants["max_image_seq"]}
    shifts = {}
    for entry in case.meta["dynamic"]:
        height, width = entry["latent_h"], entry["latent_w"]
        shifts[f"{height}x{width}"] = diffusion.dynamic_shift(height * width // 4, **fit)
        compare(f"shift {height}x{width}", shifts[f"{height}x{width}"], entry["shift"])
        compare(f"mu {height}x{width}", math.log(shifts[f"{height}x{width}"]), entry["mu"])
    for name in compare.expected:
        compare(name, _sigma_output(name, case, inputs, shifts))


def _sigma_output(name: str, case: Case, inputs: dict[str, Tensor], shifts: dict[str, float]) -> Tensor:
    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, name)

    if m := match(r"static_shift_([\d.]+)"):
        return diffusion.shift_sigmas(inputs["sigmas"], float(m[1]))
    if m := match(r"shifted_(?:gamma([\d.]+)_)?(\d+x\d+)"):
        return diffusion.shift_sigmas(inputs["sigmas"], shifts[m[2]], gamma=float(m[1] or 1))
    if m := match(r"schedule_shift([\d.]+)_(\d+)"):
        return diffusion.shifted_linear_schedule(int(m[2]), float(m[1]))
    if m := match(r"schedule_linear_quadratic_(\d+)"):
        return diffusion.linear_quadratic_schedule(int(m[1]))
    if m := match(r"schedule_dynamic_(\d+)"):
        # the case does not say for which of its sizes; exactly one of them has to fit
        stored = case.tensors[f"out/{name}"]
        schedules = [diffusion.shifted_linear_schedule(int(m[1]), shift) for shift in shifts.values()]
        return min(schedules, key=lambda schedule: float((schedule - stored).abs().max()))
    if m := match(r"density_(\w+)"):
        seed, stored = case.meta["seed"] + 7, case.tensors[f"out/{name}"]
        return diffusion.draw_sigmas(len(stored), m[1], generator=torch.Generator().manual_seed(seed))
    if m := match(r"rescale_([\d.]+)"):
        return diffusion.rescale_guidance(inputs["cfg_guided"], inputs["cfg_text"], float(m[1]))
    raise AssertionError(f"{name}: unknown output")


def train_loss_and_grads(case: Case, compare: Comparison) -> None:
    inputs = case.group("in/")
    model = _model(case.meta["config"], case.group("w/"))
    seen: dict[str, Tensor] = {}

    def velocity(x_t: Tensor, timestep: Tensor) -> Tensor:
        names = ("pooled_projections", "encoder_hidden_states", "attention_mask", "encoder_attention_mask")
        seen.update(x_t=x_t, timestep=timestep, sigma=timestep / 1000)
        seen["model_output"] = model(x_t, timestep, **{name: inputs[name] for name in names})
        return seen["model_output"]

    loss = diffusion.flow_matching_loss(
        velocity,
        inputs["x0"],
        noise=inputs["noise"],
        sigmas=diffusion.logit_normal_sigmas(inputs["normal_draw"]),
        mask=inputs["attention_mask"],
    )
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    compare("loss", loss.reshape(1))
    for name, value in seen.items():
        compare(name, value)
    for name in case.group("out/grad/"):
        compare(f"grad/{name}", grads[name])
    norm = torch.stack([g.double().square().sum() for g in grads.values() if g is not None]).sum().sqrt()
    compare("grad_norm_all", norm.reshape(1))
    # not computing a gradient and computing zeros are the same to whoever takes the step
    idle = sorted(name for name, g in grads.items() if g is None or not g.any())
    stored = sorted(case.meta["params_without_grad"] + case.meta["params_with_zero_grad"])
    compare.equal("parameters without effect", idle, stored)


def agc(case: Case, compare: Comparison) -> None:
    from vidgen.train.gradient_clipping import AdaptiveGradientClipping, PerRankGradientClipping

    clippings = {"distributed_optimizer": AdaptiveGradientClipping, "plain": PerRankGradientClipping}
    for name, sequence in case.meta["sequences"].items():
        clipping = clippings[sequence["mode"]](sequence["decay"], reproduce_original=True)
        coefficient = 1.0
        for index, step in enumerate(sequence["steps"]):
            result = clipping(_parameters_with_gradient_norm(float(step["norm_in"])))
            # the original leaves the coefficient of the step before standing when a step is extreme
            coefficient = coefficient if result.extreme else result.coefficient
            ours = {
                "norm_in": result.norm,
                "norm_after": result.norm_after,
                "returned": result.norm_after,
                "ema": clipping.average,
                "ema_var": clipping.variance,
                "clip_coef": coefficient,
                "nan_flag": int(not result.finite),
                "extreme_flag": int(result.stop),
            }
            for field, value in ours.items():
                compare(f"{name}[{index}].{field}", value, float(step[field]))
            if step["threshold_before"] is None:
                compare.equal(f"{name}[{index}].threshold_before", result.threshold, None)
            else:
                compare(f"{name}[{index}].threshold_before", result.threshold, float(step["threshold_before"]))


def _parameters_with_gradient_norm(norm: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(shape, requires_grad=True) for shape in ((4, 6), (5,), (2, 3, 2))]
    draws = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    total = torch.stack([draw.square().sum() for draw in draws]).sum().sqrt()
    for p, draw in zip(params, draws, strict=True):
        p.grad = (draw / total * norm).float()
    return params


def optimizer(case: Case, compare: Comparison) -> None:
    from vidgen.train.optimizer import EMAAdamW

    inputs = case.group("in/")
    starts = sorted((name for name in inputs if re.fullmatch(r"p\d+", name)), key=lambda name: int(name[1:]))
    params = [torch.nn.Parameter(inputs[name].clone()) for name in starts]
    hyper = dict(case.meta["hyper"])
    ours = EMAAdamW(params, hyper.pop("lr"), **hyper)
    for step in range(1, case.meta["steps"] + 1):
        for index, p in enumerate(params):
            p.grad = inputs[f"grad{index}_step{step}"].clone()
        ours.step()
        for index, (p, average) in enumerate(zip(params, ours.ema_parameters(), strict=True)):
            state = ours.state[p]
            values = {"p": p, "ema": average, "m": state["exp_avg"], "v": state["exp_avg_sq"]}
            for letter, value in values.items():
                compare(f"{letter}{index}_step{step}", value)


def checkpoint_merge(case: Case, compare: Comparison) -> None:
    from vidgen.checkpoints.lazy import lazy
    from vidgen.checkpoints.megatron import find_iteration, merge, rank_folder, read_tree, split
    from vidgen.models.opensora_plan_v1_5.mindspeed_mm import ORIGINAL

    shards = [case.group(f"in/shard{rank}/") for rank in range(case.meta["tp"])]
    stored = case.group("out/merged/")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "latest_checkpointed_iteration.txt").write_text("10")
        for rank, shard in enumerate(shards):
            file = root / "iter_0000010" / rank_folder(rank, 0, 1) / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            noise = {key: torch.zeros_like(value) for key, value in shard.items()}
            extra = {"transformer_blocks.0.0.attn1.to_q._extra_state": None}
            torch.save({"iteration": 10, "model": noise, "ema_model": shard | extra}, file)
        folder = find_iteration(root)
        assert folder is not None
        merged = {key: t.load() for key, t in merge(read_tree(folder, ema=True), ORIGINAL).items()}
    compare.equal("keys", sorted(merged), sorted(stored))
    for key in stored:
        compare(f"merged/{key}", merged[key])
    files = split({key: lazy(t) for key, t in stored.items()}, ORIGINAL, len(shards))
    for rank, shard in enumerate(shards):
        again = files[rank_folder(rank, 0, 1)]["model"]
        compare.equal(f"shard {rank}: keys", sorted(again), sorted(shard))
        for key, value in shard.items():
            compare(f"shard {rank}: {key}", again[key].load(), value)
    rules = {"replicated": "replicated", "column": "dim0", "row": "dim1"}
    for key, rule in case.meta["split_rule"].items():
        compare.equal(f"rule of {key}", rules[ORIGINAL.split_of(key)], rule)


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "agc": agc,
    "checkpoint_merge": checkpoint_merge,
    "dit_forward": dit_forward,
    "optimizer": optimizer,
    "rearrange_maps": rearrange_maps,
    "sampler_trajectory": sampler_trajectory,
    "sigmas": sigmas,
    "train_loss_and_grads": train_loss_and_grads,
    "wfvae_v1_5": wfvae_v1_5,
}
NOT_BUILT = {"batch_sampler", "collate", "data_rules"}
