# SPDX-License-Identifier: Apache-2.0
"""One process of a gloo group whose tensors are on the emulated npu: ``python -m tests.npu.ranks RANK WORLD STORE``.

It runs the cases of test_ring_emulated.py against one process on the CPU and prints the errors as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from torch import Tensor

from tests.distributed.attention_cases import compare, draw_problem, placed
from vidgen.ops import context_parallel as cp

from .emulator import NpuEmulator
from .emulator_reference import REFERENCE

RING = {
    "ring": {},
    "ring of unequal shards": {"sizes": (9, 3)},
    "ring with masks and text": {"masked": True, "text": 5},
    "single-skip ring with text": {"sparse_n": 2, "text": 4},
    "group-skip ring": {"sparse_n": 2, "pattern": "group", "masked": True},
}
ULYSSES = {"ulysses": {}, "ulysses with text": {"masked": True, "text": 5}}
CASES = {**RING, **ULYSSES}


def post(messages: list[dist.P2POp]) -> list[dist.Work]:
    """torch_npu's own form of batch_isend_irecv wants hccl."""
    return [m.op(m.tensor, m.peer, m.group, m.tag) for m in messages]


def run(name: str, rank: int, ranks: int) -> dict[str, Any]:
    options = {"sparse_n": 1, "pattern": "single", **CASES[name]}
    parallel = cp.ring_attention if name in RING else cp.ulysses_attention
    kinds = {key: options.pop(key) for key in ("masked", "text") if key in options}
    tokens = 12
    problem = draw_problem(1, 2, tokens, 4, 16, **kinds)
    sizes = options.pop("sizes", None) or cp.shard_sizes(tokens, ranks, cp.skiparse_multiple([options["sparse_n"]]))

    def on(device: str, value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def attend(**own: Any) -> Any:
        out = parallel(**{key: on("npu", value) for key, value in own.items()}, group=dist.group.WORLD, sizes=sizes)
        outs = out if isinstance(out, tuple) else (out,)
        assert all(t.device.type == "npu" for t in outs)
        return tuple(on("cpu", t) for t in outs)

    with NpuEmulator(REFERENCE) as emulator, mock.patch.object(dist, "batch_isend_irecv", post):
        errors = compare(dist.group.WORLD, attend, problem, placed(sizes), None, rank, **options)
    return {"errors": errors, "npu": {k: n for k, n in emulator.calls.items() if k.startswith("npu::")}}


def main(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    print(json.dumps({name: run(name, rank, ranks) for name in CASES}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
