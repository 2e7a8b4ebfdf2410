# SPDX-License-Identifier: Apache-2.0
"""Thin modules over the ops that several models share."""

from .embeddings import EmbeddingMLP, FramePatchEmbed, TimestepTextEmbedding, sinusoidal_embedding, unpatchify
from .feed_forward import FeedForward
from .init import init_default, init_normal
from .inputs import drop_axis_1, patch_mask
from .norms import AdaNorm, Norm, WideLinear, make_norm, modulate, residual_modulate, wide_linear
from .packing import pack_patches, patch_positions, unpack_patches
from .sequence import ALONE, DENSE, Place, Tokens, alone
from .tensor_plan import COLUMN, GATHERED, ROW, Cut, TensorPlan

__all__ = [
    "ALONE",
    "AdaNorm",
    "COLUMN",
    "Cut",
    "DENSE",
    "EmbeddingMLP",
    "FeedForward",
    "FramePatchEmbed",
    "GATHERED",
    "Norm",
    "Place",
    "ROW",
    "TensorPlan",
    "TimestepTextEmbedding",
    "Tokens",
    "WideLinear",
    "alone",
    "drop_axis_1",
    "init_default",
    "init_normal",
    "make_norm",
    "modulate",
    "patch_mask",
    "pack_patches",
    "patch_positions",
    "residual_modulate",
    "sinusoidal_embedding",
    "unpack_patches",
    "unpatchify",
    "wide_linear",
]
