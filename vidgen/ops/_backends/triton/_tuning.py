# SPDX-License-Identifier: Apache-2.0
"""How work is cut on each device. CUDA: measured on an H100; Ascend: sized for its unified buffer, never measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Numbers of elements, rows or warps.

    Args:
        max_channels: longest row that one program holds as a whole.
        stages: rows that a program which sums over the sequence loads ahead.
        forward_rows: rows of one program of a row-wise kernel.
        backward_programs: programs per sample of a kernel that sums over the sequence; each leaves a partial sum.
        tile: elements of one block of a kernel that goes element by element.
        volume_tile: elements of one block of (channels, positions).
        head_tile: elements of one block of (tokens, heads, channels).
        warp_elements: elements of a block per warp; sets how many warps a program has.
    """

    max_channels: int
    stages: int
    forward_rows: int
    backward_programs: int
    tile: int
    volume_tile: int
    head_tile: int
    warp_elements: int

    def warps(self, elements: int) -> int:
        """A power of two, as Triton wants."""
        return 1 << min(4, max(1, elements // self.warp_elements).bit_length() - 1)


TUNING = {
    "cuda": Tuning(16384, 2, 1, 512, 4096, 16384, 2048, 512),
    "npu": Tuning(4096, 1, 64, 40, 4096, 4096, 4096, 512),
    "cpu": Tuning(16384, 1, 2, 3, 256, 256, 64, 512),  # the interpreter: small, so that tests cross every boundary
}
