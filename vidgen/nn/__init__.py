# SPDX-License-Identifier: Apache-2.0
"""Thin modules over the ops that several models share."""

from .embeddings import EmbeddingMLP, FramePatchEmbed, TimestepTextEmbedding, sinusoidal_embedding, unpatchify
from .feed_forward import FeedForward
from .init import init_default, init_normal
from .norms import AdaNorm, Norm, WideLinear, make_norm, modulate, residual_modulate

__all__ = [
    "AdaNorm",
    "EmbeddingMLP",
    "FeedForward",
    "FramePatchEmbed",
    "Norm",
    "TimestepTextEmbedding",
    "WideLinear",
    "init_default",
    "init_normal",
    "make_norm",
    "modulate",
    "residual_modulate",
    "sinusoidal_embedding",
    "unpatchify",
]
