# SPDX-License-Identifier: Apache-2.0
"""How a causal video autoencoder is used: whole, in chunks of time, in tiles of space. The networks are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.checkpoints.hf import PretrainedModel

from .coding import Coding, Span
from .streaming import Stream, mark_ends, regroup, split_frames
from .tiling import Tiles, place_tiles, run_tiled

LOGVAR_RANGE = (-30.0, 20.0)
RGB = 3


class CausalAutoencoder(PretrainedModel):
    """Video ``(B, 3, T, H, W)`` in [-1, 1] to latent ``(B, D, t, h, w)`` and back.

    With the factors f of time and p of space, T is ``f n + 1`` (an image is 1 frame) and t is ``n + 1``; H and W are
    multiples of p, h = H / p and w = W / p. Inputs have the dtype of the weights.

    Chunks in time (``chunk_frames``, ``chunk_latents``, ``encode_stream``, ``decode_stream``) give exactly the result
    of a whole pass, in the memory of one chunk. Tiles in space (``tile_size``, ``tile_overlap``, both in pixels, the
    overlap a quarter of the tile unless stated) are blended linearly and approximate. Both are for inference: their
    results carry no gradient. They may be combined.

    A subclass sets ``frames_per_latent`` and ``pixels_per_latent``, and in its constructor ``config`` (with
    ``latent_dim``, ``scale`` and ``shift``), ``encoder`` and ``decoder``. These two take a tensor and a Stream and
    return a tensor (moments, video) and whatever else training needs.
    """

    frames_per_latent: int
    pixels_per_latent: int
    encoder: nn.Module
    decoder: nn.Module

    def encode_moments(
        self,
        video: Tensor,
        *,
        chunk_frames: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """Mean and log-variance of the unscaled latent, ``(B, 2D, t, h, w)``, mean first, logvar not clamped.

        Args:
            video: ``(B, 3, T, H, W)``.
            chunk_frames: encode at most this many frames at once; a multiple of ``frames_per_latent``.
            tile_size, tile_overlap: see the class.

        Raises:
            ValueError: a video, chunk or tile of a size that does not fit.
        """
        first = self._check_chunks("encode_moments", video, chunk_frames)
        if chunk_frames is None and tile_size is None and tile_overlap is None:
            return self.encoder(video, Stream())[0]
        chunks = iter((video,)) if chunk_frames is None else split_frames(video, first, chunk_frames)
        return torch.cat(list(self.encode_stream(chunks, tile_size=tile_size, tile_overlap=tile_overlap)), 2)

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[Tensor], *, tile_size: int | None = None, tile_overlap: int | None = None
    ) -> Iterator[Tensor]:
        """Moments of one video that comes in chunks of any numbers of frames, as soon as they are known.

        Args:
            chunks: ``(B, 3, frames, H, W)`` each, together ``f n + 1`` frames; fewer than f frames ever wait.
            tile_size, tile_overlap: see the class.

        Yields:
            ``(B, 2D, frames, h, w)``; together what :meth:`encode_moments` returns.

        Raises:
            ValueError: sizes that do not fit; a wrong number of frames is noticed at the end.
        """
        tiles, streams = None, []
        for chunk, first in regroup(chunks, self.frames_per_latent):
            self._check_video("encode_stream", chunk)
            if tiles is None:
                cells = (chunk.shape[3] // self.pixels_per_latent, chunk.shape[4] // self.pixels_per_latent)
                tiles = self._tiles(cells, tile_size, tile_overlap)
                streams = [Stream() for _ in range(len(tiles))]
            step = step_of(self.encoder, streams, first=first, last=False)
            yield run_tiled(chunk, tiles, step, in_unit=self.pixels_per_latent, out_unit=1)

    def encode(
        self,
        video: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        sample: bool = False,
        chunk_frames: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """The scaled latent ``(z - shift) * scale``, ``(B, D, t, h, w)``, with ``z = mean + exp(logvar / 2) * noise``.

        Args:
            video, chunk_frames, tile_size, tile_overlap: as in :meth:`encode_moments`.
            noise: standard normal, ``(B, D, t, h, w)``.
            generator: draws the noise instead, on its device.
            sample: draw the noise from PyTorch's global generator if neither is given. Without all three, z = mean.

        Raises:
            ValueError: sizes that do not fit; noise and a generator.
        """
        moments = self.encode_moments(video, chunk_frames=chunk_frames, tile_size=tile_size, tile_overlap=tile_overlap)
        mean, logvar = split_moments(moments)
        if sample or noise is not None or generator is not None:
            mean = sample_latent(mean, logvar, noise, generator)
        return self.normalize(mean)

    def decode(
        self,
        latent: Tensor,
        *,
        chunk_latents: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """The video ``(B, 3, T, H, W)`` of a scaled latent ``(B, D, t, h, w)``; not clamped to [-1, 1].

        Args:
            latent: as from :meth:`encode`.
            chunk_latents: decode this many latent frames at once.
            tile_size, tile_overlap: see the class.

        Raises:
            ValueError: a latent, chunk or tile of a size that does not fit.
        """
        self._check_latent("decode", latent)
        if chunk_latents is None and tile_size is None and tile_overlap is None:
            return self.decoder(self.unnormalize(latent), Stream())[0]
        frames = latent.shape[2] if chunk_latents is None else chunk_latents
        chunks = self.decode_stream(latent, chunk_latents=frames, tile_size=tile_size, tile_overlap=tile_overlap)
        return torch.cat(list(chunks), 2)

    def decode_unscaled(self, z: Tensor) -> Tensor:
        """The video of an unscaled latent, in one pass."""
        self._check_latent("decode_unscaled", z)
        return self.decoder(z, Stream())[0]

    @torch.no_grad()
    def decode_stream(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        chunk_latents: int = 2,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Iterator[Tensor]:
        """The video of a scaled latent, chunk by chunk.

        Args:
            latent: ``(B, D, t, h, w)``, decoded ``chunk_latents`` frames at a time, or chunks of it, as they come.
            chunk_latents: used where ``latent`` is one tensor.
            tile_size, tile_overlap: see the class.

        Yields:
            ``(B, 3, frames, H, W)``; together what :meth:`decode` returns. Frames that depend on a later latent frame
            come with the next chunk.

        Raises:
            ValueError: sizes that do not fit.
        """
        if chunk_latents < 1:
            raise ValueError(f"decode_stream: chunk_latents must be at least 1, got {chunk_latents}")
        if isinstance(latent, Tensor):
            self._check_latent("decode_stream", latent)
            latent = split_frames(latent, chunk_latents, chunk_latents)
        tiles, streams = None, []
        for chunk, first, last in mark_ends(latent):
            self._check_latent("decode_stream", chunk)
            if tiles is None:
                tiles = self._tiles((chunk.shape[3], chunk.shape[4]), tile_size, tile_overlap)
                streams = [Stream() for _ in range(len(tiles))]
            step = step_of(self.decoder, streams, first=first, last=last)
            yield run_tiled(self.unnormalize(chunk), tiles, step, in_unit=1, out_unit=self.pixels_per_latent)

    def encoding(
        self,
        video: Tensor,
        *,
        chunk_frames: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Coding:
        """What :meth:`encode_moments` does with the same arguments, for others to run."""
        first = self._check_chunks("encoding", video, chunk_frames)
        cells = (video.shape[3] // self.pixels_per_latent, video.shape[4] // self.pixels_per_latent)
        return self._coding(video, True, (first, chunk_frames or first), self._tiles(cells, tile_size, tile_overlap))

    def decoding(
        self,
        latent: Tensor,
        *,
        chunk_latents: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Coding:
        """What :meth:`decode` does with the same arguments, for others to run."""
        self._check_latent("decoding", latent)
        if chunk_latents is not None and chunk_latents < 1:
            raise ValueError(f"decoding: chunk_latents must be at least 1, got {chunk_latents}")
        size = chunk_latents or latent.shape[2]
        tiles = self._tiles((latent.shape[3], latent.shape[4]), tile_size, tile_overlap)
        return self._coding(self.unnormalize(latent), False, (size, size), tiles)

    def _coding(self, x: Tensor, encodes: bool, sizes: tuple[int, int], tiles: Tiles) -> Coding:
        network, factor = self.encoder if encodes else self.decoder, self.frames_per_latent
        units = (self.pixels_per_latent, 1) if encodes else (1, self.pixels_per_latent)

        def chunks(frames: int) -> list[Span]:
            stops = [*range(sizes[0], frames, sizes[1]), frames]
            return list(zip([0, *stops], stops, strict=False))

        return Coding(
            x,
            encodes,
            network,
            lambda x, stream: network(x, stream)[0],
            chunks,
            latents=lambda frames: (frames - 1) // factor + 1 if encodes else frames,
            first_frame=lambda latent, frames: max(0, factor * (latent - 1) + 1),
            tiles=len(tiles),
            in_tiles=lambda step, x, each: run_tiled(x, tiles, step, in_unit=units[0], out_unit=units[1], each=each),
        )

    def normalize(self, z: Tensor) -> Tensor:
        """``(z - shift) * scale`` per channel, computed in float32 at least."""
        shift, scale = self._statistics(z)
        return ((z - shift) * scale).to(z.dtype)

    def unnormalize(self, latent: Tensor) -> Tensor:
        """``latent / scale + shift`` per channel, computed in float32 at least."""
        shift, scale = self._statistics(latent)
        return (latent / scale + shift).to(latent.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        count, dtype = self.config.latent_dim, torch.promote_types(like.dtype, torch.float32)
        shift, scale = self.config.shift or (0.0,) * count, self.config.scale or (1.0,) * count
        values = torch.tensor([shift, scale], dtype=dtype, device=like.device).view(2, count, 1, 1, 1)
        return values[0], values[1]

    def _tiles(self, cells: tuple[int, int], tile_size: int | None, tile_overlap: int | None) -> Tiles:
        return place_tiles(
            *cells, tile_size=tile_size, tile_overlap=tile_overlap, pixels_per_cell=self.pixels_per_latent
        )

    def _check_chunks(self, where: str, video: Tensor, chunk_frames: int | None) -> int:
        """Frames of the first chunk."""
        self._check_video(where, video)
        factor, frames = self.frames_per_latent, video.shape[2]
        if (frames - 1) % factor:
            raise ValueError(f"{where}: frames must be {factor}n + 1 (1, {factor + 1}, ...), got {frames}")
        if chunk_frames is None:
            return frames
        if chunk_frames < factor or chunk_frames % factor:
            raise ValueError(f"{where}: chunk_frames must be a positive multiple of {factor}, got {chunk_frames}")
        return chunk_frames - factor + 1

    def _check_video(self, where: str, video: Tensor) -> None:
        side = self.pixels_per_latent
        if (
            video.dim() != 5
            or video.shape[1] != RGB
            or 0 in video.shape
            or video.shape[3] % side
            or video.shape[4] % side
        ):
            wanted = f"(batch, {RGB}, frames, height, width) with height and width multiples of {side}"
            raise ValueError(f"{where}: video must be {wanted}, got {tuple(video.shape)}")
        self._check_dtype(where, "video", video)

    def _check_latent(self, where: str, latent: Tensor) -> None:
        channels = self.config.latent_dim
        if latent.dim() != 5 or latent.shape[1] != channels or 0 in latent.shape:
            wanted = f"(batch, {channels}, frames, height, width)"
            raise ValueError(f"{where}: latent must be {wanted}, got {tuple(latent.shape)}")
        self._check_dtype(where, "latent", latent)

    def _check_dtype(self, where: str, name: str, x: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype:
            raise ValueError(f"{where}: {name} must have the dtype of the weights, {dtype}, got {x.dtype}")


def step_of(
    network: Callable[[Tensor, Stream], Any], streams: list[Stream], *, first: bool, last: bool
) -> Callable[[int, Tensor], Tensor]:
    """``step(i, x)`` runs tile i's chunk x through the network, in its own stream."""
    for stream in streams:
        stream.first, stream.last = first, last
    return lambda index, x: network(x, streams[index])[0]


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log-variance."""
    mean, logvar = moments.chunk(2, 1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def sample_latent(mean: Tensor, logvar: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """``mean + exp(logvar / 2) * noise``; without noise, it is drawn from the generator, on its device."""
    if noise is None:
        source = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=source).to(mean.device)
    elif generator is not None:
        raise ValueError("sample_latent: noise or a generator may be given, got both")
    if noise.shape != mean.shape:
        raise ValueError(f"sample_latent: noise must be {tuple(mean.shape)} like the latent, got {tuple(noise.shape)}")
    return mean + (logvar / 2).exp() * noise.to(mean.dtype)
