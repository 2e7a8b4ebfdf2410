# SPDX-License-Identifier: Apache-2.0
"""What accelerators are measured on: larger than the ops' own workloads, which fit a CPU's patience.

Sizes are those of Open-Sora Plan 1.5 at 121 frames of 576 x 1024 and of the autoencoders' large layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidgen import ops

Make = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of every workload; the defaults are measured, tests shrink them."""

    grid: tuple[int, int, int] = (16, 36, 64)  # frames, rows and columns of tokens
    heads: int = 24
    head_dim: int = 128
    text: int = 512
    video: tuple[int, int, int] = (121, 576, 1024)
    layer: tuple[int, int, int] = (17, 256, 256)  # frames, rows and columns inside an autoencoder

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


SIZES = Sizes()


def workloads(device: torch.device, dtype: torch.dtype, sizes: Sizes = SIZES) -> dict[str, dict[str, Make]]:
    """``{op: {shape: make the arguments}}``; ops that are missing here are measured elsewhere or have no kernel."""
    here: tuple[Any, ...] = (device, dtype)
    return {**of_blocks(here, sizes), **of_attention_inputs(here, sizes), **of_autoencoders(here, sizes)}


def of_blocks(here: tuple[Any, ...], sizes: Sizes) -> dict[str, dict[str, Make]]:
    rows = (1, sizes.tokens, sizes.channels)
    name = "x".join(map(str, rows))

    def block(op: str, *affine: bool) -> Make:
        return lambda: module(op).block(*rows, *affine, *here)

    return {
        "adaln_modulate": {name: block("adaln_modulate", False), f"{name} affine": block("adaln_modulate", True)},
        "adaln_modulate_backward": {f"{name} affine": block("adaln_modulate_backward", True)},
        "gated_residual": {name: block("gated_residual")},
        "gated_residual_backward": {name: block("gated_residual_backward")},
        "gated_residual_adaln": {f"{name} affine": block("gated_residual_adaln", True)},
        "gated_residual_adaln_backward": {f"{name} affine": block("gated_residual_adaln_backward", True)},
    }


def of_attention_inputs(here: tuple[Any, ...], sizes: Sizes) -> dict[str, dict[str, Make]]:
    device, dtype = here
    dim, text = sizes.head_dim, sizes.text
    shape = (1, sizes.tokens, sizes.heads, dim)
    name = "x".join(map(str, shape))
    sections = (dim // 4, dim * 3 // 8, dim * 3 // 8)
    qk = module("qk_norm_rope")

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def norm_rope(style: str, sparse_n: int = 1, norm: str = "rms") -> tuple[Any, ...]:
        tables = ops.rope_3d_table(sizes.grid, sections, device=device)
        per_axis = sections if style == "half_per_axis" else None
        grouped = sparse_n > 1
        return qk.new_args(shape, norm, style, per_axis, sparse_n, device, dtype, with_v=grouped, tables=tables)

    def rope(style: str) -> tuple[Any, ...]:
        cos, sin = ops.rope_3d_table(sizes.grid, sections, device=device)
        return some(*shape), cos, sin, style, sections if style == "half_per_axis" else None

    return {
        "qk_norm_rope": {
            f"{name} per axis": lambda: norm_rope("half_per_axis"),
            f"{name} group layout k=4": lambda: norm_rope("half_per_axis", 4),
            f"{name} half": lambda: norm_rope("half"),
            f"{name} LayerNorm, interleaved": lambda: norm_rope("interleaved", norm="layer"),
        },
        "qk_norm_rope_backward": {
            f"{name} per axis": lambda: qk.backward_args(norm_rope("half_per_axis"), device, dtype),
        },
        "rope_3d": {
            f"{name} per axis": lambda: rope("half_per_axis"),
            f"{name} half": lambda: rope("half"),
            f"{name} interleaved": lambda: rope("interleaved"),
        },
        "skiparse_groups": {
            f"{name} k=4 group, text {text}": lambda: (some(*shape), some(1, text, *shape[2:]), 4, "group"),
        },
    }


def of_autoencoders(here: tuple[Any, ...], sizes: Sizes) -> dict[str, dict[str, Make]]:
    device, dtype = here
    frames, height, width = sizes.video
    bands = ((frames + 1) // 2, height // 2, width // 2)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def layer(op: str, channels: int, *groups: int, channels_last: bool = False) -> dict[str, Make]:
        shape = (1, channels, *sizes.layer)
        name = "x".join(map(str, shape)) + (" channels last" if channels_last else "")
        return {name: lambda: module(op).resnet(shape, *groups, channels_last, *here)}

    def named(make: Callable[..., Any], *shape: int) -> dict[str, Make]:
        return {"x".join(map(str, shape)): lambda: make(some(*shape))}

    return {
        "haar_3d": named(lambda x: (x, 0.3536, True), 1, 3, frames, height, width),
        "inverse_haar_3d": named(lambda y: (y, 0.3536, True), 1, 24, *bands),
        "haar_2d": named(lambda x: (x, 0.5), 1, 3, frames, height, width),
        "inverse_haar_2d": named(lambda y: (y, 0.5), 1, 12, frames, *bands[1:]),
        "group_norm_silu": {
            **layer("group_norm_silu", 128, 32),
            **layer("group_norm_silu", 128, 32, channels_last=True),
        },
        "group_norm_silu_backward": layer("group_norm_silu_backward", 128, 32),
        "layer_norm_silu": layer("layer_norm_silu", 160),
        "layer_norm_silu_backward": layer("layer_norm_silu_backward", 160),
    }


def module(op: str) -> Any:
    """The file of an op: its public function has the same name."""
    return importlib.import_module(f"vidgen.ops.{op}")
