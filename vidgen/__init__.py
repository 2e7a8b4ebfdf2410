# SPDX-License-Identifier: Apache-2.0
"""Fused ops for video diffusion transformers, and thin models on top."""

__version__ = "0.1.0"
