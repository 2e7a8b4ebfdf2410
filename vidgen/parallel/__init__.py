# SPDX-License-Identifier: Apache-2.0
"""Training and sampling on many devices, on PyTorch's own engine: DeviceMesh, FSDP2, DTensor, pipelining, DCP."""

from .layout import Layout, Parallel

__all__ = ["Layout", "Parallel"]
