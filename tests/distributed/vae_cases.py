# SPDX-License-Identifier: Apache-2.0
"""What the processes of pool.py run for test_vae.py: tiny autoencoders on one process and on all of a group."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from attention_cases import GROUPS
from torch import Tensor, nn

from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config, wfvae_config
from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX, DiffusersTiling
from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE
from vidgen.models.autoencoders.layers import FrameConv
from vidgen.models.autoencoders.wfvae import WFVAE
from vidgen.parallel.vae import frame_shares, parallel_decode, parallel_decode_stream, parallel_encode
from vidgen.parallel.vae_stream import Peers
from vidgen.parallel.vae_volume import frames_volume

Group = dist.ProcessGroup


@cache
def make_vae(system: str, **changes: Any) -> Any:
    """Tiny, with biases and norms that show, the same on all ranks."""
    torch.manual_seed(0)
    if system == "cogvideox":
        vae: nn.Module = AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny", **changes))
    elif system == "hunyuan":
        vae = HunyuanVAE(hunyuan_vae_config.preset("tiny", **changes))
    else:
        vae = WFVAE(wfvae_config.preset({"wfvae": "tiny", "wfvae_4x8x8": "tiny_4x8x8"}[system], **changes))
    with torch.no_grad():
        for p in vae.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return vae.eval().requires_grad_(False)


def draw(vae: Any, kind: str, frames: int, size: tuple[int, int], batch: int) -> Tensor:
    """A video or a latent of ``size``, whose frames differ in mean and spread, as statistics must notice."""
    generator = torch.Generator().manual_seed(frames)
    video = kind == "encode"
    channels = 3 if video else (getattr(vae.config, "latent_channels", None) or vae.config.latent_dim)
    x = torch.randn(batch, channels, frames, *size, generator=generator)
    gain, offset = torch.rand(2, batch, 1, frames, 1, 1, generator=generator)
    x = x * (0.5 + gain) + offset
    return x.clamp(-1, 1) if video else x


@torch.no_grad()
def alone(vae: Any, kind: str, x: Tensor, options: dict[str, Any]) -> Tensor:
    return vae.encode_moments(x, **options) if kind == "encode" else vae.decode(x, **options)


def together(vae: Any, kind: str, x: Tensor, group: Group, **options: Any) -> Tensor:
    return (parallel_encode if kind == "encode" else parallel_decode)(vae, x, group, **options)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape)
    assert a.isfinite().all()  # max() of Python passes over NaN
    return float((a - b).abs().max() / max(1.0, float(b.abs().max()))) if b.numel() else 0.0


WAYS = ("share", "whole", "stream")


def errors(
    group: Group,
    system: str,
    kind: str,
    counts: list[int],
    *,
    ways: tuple[str, ...] = WAYS,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    split: Any = "frames",
    options: dict[str, Any] | None = None,
    double: bool = False,
    **changes: Any,
) -> dict[int, float]:
    """How far results are from one process, for each number of frames: this rank's share, the whole result for the
    first of them, and rank 0's stream for the last of them."""
    vae, options, found = make_vae(system, **changes), options or {}, {}
    vae = copy.deepcopy(vae).double() if double else vae
    if options.pop("diffusers_tiling", False):
        options["diffusers_tiling"] = DiffusersTiling(height=32, width=32, overlap_height=0.25, overlap_width=0.25)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for frames in counts:
        x = draw(vae, kind, frames, size or ((8, 16) if kind == "encode" else (1, 2)), batch)
        x = x.double() if double else x
        wanted, apart = alone(vae, kind, x, options), []
        if "share" in ways:
            number = {"frames" if kind == "encode" else "latents": frames}
            share = frame_shares(vae, ranks, **number, **options)[rank]
            start, stop = share.latents if kind == "encode" else share.frames
            own = together(vae, kind, x, group, gather=False, split=split, **options)
            apart.append(difference(own, wanted[:, :, start:stop]))
        if "whole" in ways and frames == counts[0]:
            apart.append(difference(together(vae, kind, x, group, split=split, **options), wanted))
        if "stream" in ways and frames == counts[-1] and kind == "decode":
            pieces = list(parallel_decode_stream(vae, x, group, split=split, **options))
            assert bool(pieces) == (rank == 0)
            apart += [difference(torch.cat(pieces, 2), wanted)] if pieces else []
        found[frames] = max(apart, default=0.0)
    return found


def errors_of_some(group: Group, members: tuple[int, ...], **arguments: Any) -> dict[int, float]:
    """As :func:`errors`, on some ranks only, which are numbered otherwise in their group."""
    return errors(GROUPS[members], **arguments) if dist.get_rank() in members else {0: 0.0}


@contextmanager
def frames_seen(vae: nn.Module) -> Iterator[dict[str, int]]:
    """The most frames that each convolution gets in one call."""
    seen: dict[str, int] = {}
    hooks = []
    for name, module in vae.named_modules():
        if hasattr(module, "conv") or isinstance(module, FrameConv):

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                seen[name] = max(seen.get(name, 0), inputs[0].shape[2])

            hooks.append(module.register_forward_pre_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


def most_frames(group: Group, system: str, kind: str, frames: int, options: dict[str, Any]) -> tuple[int, int]:
    """Frames that the busiest convolution of this rank sees, and of one process."""
    vae = make_vae(system)
    x = draw(vae, kind, frames, (8, 8) if kind == "encode" else (1, 1), 1)
    with frames_seen(vae) as whole:
        alone(vae, kind, x, {} if system != "cogvideox" else whole_clip(kind, frames))
    with frames_seen(vae) as shared:
        together(vae, kind, x, group, gather=False, **options)
    return max(shared.values()), max(whole.values())


def tiles_decoded(
    group: Group, system: str, frames: int, size: tuple[int, int], options: dict[str, Any], **changes: Any
) -> int:
    """How many tiles this rank's decoder is given."""
    vae, calls = make_vae(system, **changes), []
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    parallel_decode(vae, draw(vae, "decode", frames, size, 1), group, split="tiles", **options)
    hook.remove()
    return len(calls)


def whole_clip(kind: str, frames: int) -> dict[str, Any]:
    """The CogVideoX VAE's options for a clip that is one batch."""
    return {"chunk_frames": None} if kind == "encode" else {"chunk_latents": [frames]}


def refusals(group: Group) -> dict[str, str]:
    """What each kind of wrong call says on this rank."""
    vae, rank, found = make_vae("wfvae"), dist.get_rank(group), {}
    latent = draw(vae, "decode", 2, (1, 1), 1)
    needy = copy.deepcopy(vae).requires_grad_(True)
    calls = {
        "one rank's input": lambda: parallel_decode(vae, latent[:, : 4 - (rank == 1)], group),
        "one rank's number of frames": lambda: parallel_decode(vae, latent[:, :, : 2 - (rank == 1)], group),
        "one rank's option": lambda: parallel_decode(vae, latent, group, chunk_latents=1 + (rank == 1)),
        "gradient": lambda: parallel_decode(needy, latent, group),
        "split": lambda: parallel_decode(vae, latent, group, split="both"),  # type: ignore[arg-type]
        "unknown option": lambda: parallel_decode(vae, latent, group, chunks=1),
        "chunks of a norm over all frames": lambda: parallel_decode(
            make_vae("wfvae", norm_type="groupnorm", **WIDE), latent, group, chunk_latents=1
        ),
        "described chunks of such a norm": lambda: make_vae("wfvae", norm_type="groupnorm", **WIDE).decoding(
            latent, chunk_latents=1
        ),
        "shares": lambda: frame_shares(vae, 2, frames=9, latents=2),
        "stream": lambda: parallel_decode_stream(vae, latent[0], group),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    with torch.no_grad():  # as pipelines call it, whatever the weights want
        assert not parallel_decode(needy, latent, group).requires_grad
    return found


def sent_and_formula(group: Group, system: str, kind: str, frames: int) -> tuple[int, int]:
    """Elements that this rank sends, and those that all should send together."""
    vae, counted = make_vae(system), []
    x = draw(vae, kind, frames, (8, 16) if kind == "encode" else (1, 2), 2)
    options = whole_clip(kind, frames) if system == "cogvideox" else {}
    coding = (vae.encoding if kind == "encode" else vae.decoding)(x, **options)
    swap = Peers.swap

    def counting(peers: Peers, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        counted.append(sum(t.numel() for t in sent.values()))
        swap(peers, sent, received)

    with mock.patch.object(Peers, "swap", counting):
        together(vae, kind, x, group, gather=False, **options)
    return sum(counted), sum(frames_volume(coding, dist.get_world_size(group)))


WIDE = {"base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32}


def bfloat16(group: Group, system: str, kind: str, frames: int) -> tuple[float, float]:
    """How far one process and all ranks are from float32, in bfloat16."""
    vae = make_vae(system)
    x = draw(vae, kind, frames, (16, 8) if kind == "encode" else (2, 1), 1)
    truth = alone(vae, kind, x, {})
    vae, x = copy.deepcopy(vae).bfloat16(), x.bfloat16()
    results = alone(vae, kind, x, {}), together(vae, kind, x, group)
    one, many = ((y.float() - truth).square().mean().sqrt().item() for y in results)
    return one, many
