# SPDX-License-Identifier: Apache-2.0
"""How work is cut on each device. CUDA: measured on an H100; Ascend: sized for its unified buffer, never measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Numbers of elements, rows or warps.

    Args:
        max_channels: longest row that one program holds as a whole.
        stages: blocks that a program which goes through many has in flight, if these fit into ``buffer_bytes``.
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
    buffer_bytes: int
    forward_rows: int
    backward_programs: int
    tile: int
    volume_tile: int
    head_tile: int
    run_tile: int
    row_warp_elements: int
    warp_elements: int

    def stages_of(self, bytes_in_flight: int) -> int:
        """``bytes_in_flight``: of all the blocks that are loaded in one step."""
        return max(1, min(self.stages, self.buffer_bytes // bytes_in_flight))

    def row_warps(self, elements: int) -> int:
        return power_of_2_warps(elements // self.row_warp_elements)

    def warps(self, elements: int) -> int:
        return power_of_2_warps(elements // self.warp_elements)


def power_of_2_warps(wanted: int) -> int:
    """From 1 to 16, as Triton wants them."""
    return 1 << min(4, max(1, wanted).bit_length() - 1)


TUNING = {
    "cuda": Tuning(16384, 4, 192 * 1024, 1, 512, 4096, 8192, 2048, 1024, 1024, 512),
    "npu": Tuning(4096, 1, 64 * 1024, 64, 40, 4096, 4096, 4096, 4096, 512, 512),
    "cpu": Tuning(16384, 2, 64 * 1024, 2, 3, 256, 256, 64, 32, 512, 512),  # the interpreter: small, so that tests cross every boundary
}
