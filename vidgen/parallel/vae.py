# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding videos on all ranks of a group: frames spread over the ranks, or tiles dealt to them.

Results equal those of one process. Where the frames are spread (``split="frames"``), layers get what they need of other
ranks' frames from these: a convolution the last frames before its own, an interpolation one on either side, a GroupNorm
the statistics of all, attention the keys and values of earlier frames. Nothing is computed twice.

A video without chunks is spread once, so that a rank holds the activations of 1/ranks of the frames. With chunks
(``chunk_frames``, ``chunk_latents``) every rank has one chunk at a time, in rounds. The CogVideoX VAE, whose chunks are
part of the result, so works in rounds by default; a clip that is one chunk is spread.

With ``split="tiles"`` each rank computes whole tiles of space (or of time, where there are only those), and every rank
blends them.

Every rank calls with the same arguments: the whole input, of which it uses its part. The weights must be the same on
all ranks. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen.models.autoencoders.causal import RGB
from vidgen.models.autoencoders.coding import Coding, Span
from vidgen.ops.context_parallel.layout import shard_sizes

from .agree import together
from .vae_rounds import ALL, NOTHING, coded, join

Split = Literal["frames", "tiles"]


class Share(NamedTuple):
    """The frames of one rank: start and stop in the latent and in the video; some ranks may have none."""

    latents: Span
    frames: Span


def parallel_encode(
    vae: nn.Module,
    video: Tensor,
    group: dist.ProcessGroup,
    *,
    gather: bool = True,
    split: Split = "frames",
    **options: Any,
) -> Tensor:
    """What ``vae.encode_moments(video, **options)`` returns, computed by all ranks of ``group``.

    Args:
        vae: a WFVAE, HunyuanVAE or AutoencoderKLCogVideoX, or another with their ``encoding`` and ``decoding``.
        video: ``(B, 3, T, H, W)``, whole, on every rank.
        group: any process group; nothing is asked of its size.
        gather: every rank gets the whole result; False: its frames by :func:`frame_shares`, which may be none.
        split: see the module.
        options: of ``vae.encode_moments``.

    Returns:
        Moments ``(B, 2D, t, h, w)`` in the dtype of ``video``.

    Raises:
        ValueError: on all ranks, if one has arguments that do not fit, or others than rank 0, or wants gradients.
    """
    return _coded("parallel_encode", vae, video, group, gather, split, options)


def parallel_decode(
    vae: nn.Module,
    latent: Tensor,
    group: dist.ProcessGroup,
    *,
    gather: bool = True,
    split: Split = "frames",
    **options: Any,
) -> Tensor:
    """What ``vae.decode(latent, **options)`` returns, computed by all ranks of ``group``.

    Args:
        latent: ``(B, D, t, h, w)``, scaled and whole, on every rank.
        vae, group, gather, split, options: as for :func:`parallel_encode`; options of ``vae.decode``.

    Returns:
        The video ``(B, 3, T, H, W)`` in the dtype of ``latent``.

    Raises:
        ValueError: as :func:`parallel_encode`.
    """
    return _coded("parallel_decode", vae, latent, group, gather, split, options)


def parallel_decode_stream(
    vae: nn.Module, latent: Tensor, group: dist.ProcessGroup, *, split: Split = "frames", **options: Any
) -> Iterator[Tensor]:
    """What :func:`parallel_decode` returns, on rank 0 alone and in consecutive pieces ``(B, 3, frames, H, W)``.

    Rank 0 holds the piece of one rank at a time. All ranks must exhaust the iterator; on the others it yields nothing.

    Raises:
        ValueError: as :func:`parallel_encode`, before the first piece.
    """
    coding = agree("parallel_decode_stream", vae, latent, group, split, options)
    wanted = [ALL] + [NOTHING] * (dist.get_world_size(group) - 1)

    def pieces() -> Iterator[Tensor]:
        results = coded(coding, group, wanted, split == "tiles")
        while True:
            with torch.no_grad():  # not while the caller works
                piece = next(results, None)
            if piece is None:
                return
            if piece.shape[2]:
                yield piece
            del piece  # not while the next one is computed

    return pieces()


def frame_shares(
    vae: Any, ranks: int, *, frames: int | None = None, latents: int | None = None, **options: Any
) -> list[Share]:
    """Which frames each rank gets from ``gather=False``: equal numbers of latent frames, the first ranks one more.

    Args:
        ranks: of the group.
        frames: of the video to be encoded, or
        latents: frames of the latent to be decoded.
        options: of ``vae.encode_moments`` or ``vae.decode``.

    Raises:
        ValueError: both numbers or none, or options that do not fit.
    """
    if (frames is None) == (latents is None):
        raise ValueError(f"frame_shares: frames or latents must be given, got {frames} and {latents}")
    like = next(vae.parameters())
    if frames is not None:
        channels, side = getattr(vae.config, "in_channels", RGB), vae.pixels_per_latent
        return shares_of(vae.encoding(like.new_empty(1, channels, frames, side, side, device="meta"), **options), ranks)
    channels = getattr(vae.config, "latent_channels", None) or vae.config.latent_dim
    return shares_of(vae.decoding(like.new_empty(1, channels, latents, 1, 1, device="meta"), **options), ranks)


def shares_of(coding: Coding, ranks: int) -> list[Share]:
    frames = coding.x.shape[2]
    count = sum(coding.latents(stop - start) for start, stop in coding.segments(frames))
    return [Share(*share) for share in coding.shares(frames, shard_sizes(count, ranks))]


def _coded(
    where: str, vae: Any, x: Tensor, group: dist.ProcessGroup, gather: bool, split: Split, options: dict[str, Any]
) -> Tensor:
    coding = agree(where, vae, x, group, split, {**options, "gather": gather})
    ranks = dist.get_world_size(group)
    spans = [share.latents if coding.encodes else share.frames for share in shares_of(coding, ranks)]
    with torch.no_grad():
        return join(coded(coding, group, [ALL] * ranks if gather else spans, split == "tiles"))


def agree(where: str, vae: Any, x: Tensor, group: dist.ProcessGroup, split: Split, options: dict[str, Any]) -> Coding:
    """The coding, once every rank has one and all are alike."""
    codings = []

    def describe() -> tuple[Any, ...]:
        codings.append(prepare(where, vae, x, split, {k: v for k, v in options.items() if k != "gather"}))
        return where, repr(vae.config), tuple(x.shape), str(x.dtype), split, repr(sorted(options.items()))

    everyone = together(describe, group)
    if others := [rank for rank, facts in enumerate(everyone) if facts != everyone[0]]:
        raise ValueError(f"{where}: all arguments must be those of rank 0, got others on ranks {others}")
    return codings[0]


def prepare(where: str, vae: Any, x: Tensor, split: Split, options: dict[str, Any]) -> Coding:
    if split not in get_args(Split):
        raise ValueError(f"{where}: split must be one of {get_args(Split)}, got {split!r}")
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in vae.parameters())):
        raise ValueError(f"{where}: must be called under torch.no_grad(), got weights or an input that want gradients")
    device = next(vae.parameters()).device
    if x.device != device:
        raise ValueError(f"{where}: the input must be on the device of the weights, {device}, got {x.device}")
    with torch.no_grad():
        return (vae.encoding if where == "parallel_encode" else vae.decoding)(x, **options)
