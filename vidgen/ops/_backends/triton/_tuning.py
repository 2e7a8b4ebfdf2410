# SPDX-License-Identifier: Apache-2.0
"""How work is cut on each device. CUDA: measured on an H100; Ascend: sized for its unified buffer, never measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Numbers of elements, rows or warps.

    Args:
        max_channels: longest row that one program holds as a whole.
        stages: blocks that a program which goes through many has in flight, if there is memory for them.
        forward_rows: rows of one program of a row-wise kernel.
        backward_programs: programs per sample of a kernel that sums over the sequence; each leaves a partial sum.
        tile: elements of one block of a kernel that goes element by element.
        volume_tile: elements of one block of (channels, positions).
        head_tile: elements of one block of (tokens, heads, channels).
        run_tile: the same where a block is a run of the group layout; these lie apart, and smaller ones are faster on
            CUDA. Ascend launches at most 65535 programs, which small ones would exceed for a whole model's tokens.
        row_warp_elements, warp_elements: elements of a block per warp, of the row-wise kernels and of all others.
    """

    max_channels: int
    stages: int
    forward_rows: int
    backward_programs: int
    tile: int
    volume_tile: int
    head_tile: int
    run_tile: int
    row_warp_elements: int
    warp_elements: int

    def row_warps(self, elements: int) -> int:
        return power_of_2_warps(elements // self.row_warp_elements)

    def warps(self, elements: int) -> int:
        return power_of_2_warps(elements // self.warp_elements)


def power_of_2_warps(wanted: int) -> int:
    """From 1 to 16, as Triton wants them."""
    return 1 << min(4, max(1, wanted).bit_length() - 1)


TUNING = {
    "cuda": Tuning(
        max_channels=16384,
        stages=4,
        forward_rows=1,
        backward_programs=512,
        tile=4096,
        volume_tile=8192,
        head_tile=2048,
        run_tile=1024,
        row_warp_elements=1024,
        warp_elements=512,
    ),
    "npu": Tuning(
        max_channels=4096,
        stages=1,
        forward_rows=64,
        backward_programs=40,
        tile=4096,
        volume_tile=4096,
        head_tile=4096,
        run_tile=4096,
        row_warp_elements=512,
        warp_elements=512,
    ),
    # the interpreter: small, so that tests cross every boundary
    "cpu": Tuning(
        max_channels=16384,
        stages=2,
        forward_rows=2,
        backward_programs=3,
        tile=256,
        volume_tile=256,
        head_tile=64,
        run_tile=32,
        row_warp_elements=512,
        warp_elements=512,
    ),
}
