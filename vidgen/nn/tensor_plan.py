# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism cuts the linear layers of a model; ``vidgen.parallel.tensor`` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cut:
    """How ranks share a linear layer.

    Args:
        way: "column": each rank computes some of the outputs. "gathered": the same, and then all ranks get all outputs.
            "row": each rank has some of the inputs, and the sum over the ranks is the output.
        sections: sizes of the parts of a fused axis, of each of which every rank has its share; empty: it is one.
    """

    way: Literal["column", "gathered", "row"]
    sections: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorPlan:
    """The cuts of a model.

    Args:
        heads: of attention, which are shared out.
        cuts: by shell patterns of layers' names. All linear layers of the blocks are here.
    """

    heads: int
    cuts: Mapping[str, Cut]


COLUMN, GATHERED, ROW = Cut("column"), Cut("gathered"), Cut("row")
