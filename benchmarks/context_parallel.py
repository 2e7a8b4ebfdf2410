# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/context_parallel.md: error of ring attention over the size of the ring, and volume of each mode.

``python benchmarks/context_parallel.py`` prints them, ``--write`` puts them into the page. The ring is played in one
process: the blocks, their merge and their backward are those of ``ring_attention``, only nobody sends anything.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import context_parallel as cp
from vidgen.ops.context_parallel.blocks import Partial, attend, attend_backward, merge

PAGE = Path(__file__).parents[1] / "docs" / "context_parallel.md"
RINGS = (2, 4, 8, 16)
Errors = list[float]  # relative L2 error of out, grad_q, grad_k, grad_v against float64
Keep = Callable[[Tensor], Tensor]


def exact(t: Tensor) -> Tensor:
    return t


def rounded(t: Tensor) -> Tensor:
    return t.bfloat16().to(t.dtype)


def ring(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ranks: int, block: Keep, running: Keep) -> list[Tensor]:
    """Result and gradients of a ring; ``block`` and ``running`` say how a block's and the running sums are kept."""
    total: Partial | None = None
    blocks = list(zip(k.chunk(ranks, 1), v.chunk(ranks, 1), strict=True))
    for some_k, some_v in blocks:
        out, lse = attend(q, some_k, some_v, None, None)
        merged, lse = merge(total, (block(out), lse))
        total = running(merged), lse
    assert total is not None
    out, lse = total[0].to(q.dtype), total[1]
    grad_q, grads_kv = torch.zeros_like(q, dtype=torch.float32), []
    for some_k, some_v in blocks:
        part, *parts = attend_backward(grad, q, some_k, some_v, out, lse, None, None)
        grad_q = running(grad_q + block(part))
        grads_kv.append([block(t) for t in parts])
    grad_k, grad_v = (torch.cat(parts, 1) for parts in zip(*grads_kv, strict=True))
    return [out, *(t.to(q.dtype) for t in (grad_q, grad_k, grad_v))]


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def measure_errors(tokens: int = 2048, heads: int = 4, dim: int = 64, seed: int = 0) -> dict[str, dict[int, Errors]]:
    """Kind to ring size to errors, bfloat16; ``dense`` is PyTorch's own kernel in one process, under size 1."""
    random = torch.Generator().manual_seed(seed)
    given = [torch.randn(1, tokens, heads, dim, generator=random).bfloat16() for _ in range(4)]
    truth = dense(*(t.double() for t in given))

    def errors(results: list[Tensor]) -> Errors:
        pairs = zip(results, truth, strict=True)
        return [((result.double() - true).norm() / true.norm()).item() for result, true in pairs]

    kinds = {"ours": (exact, exact), "16-bit kernel": (rounded, exact), "16-bit sums": (rounded, rounded)}
    table = {kind: {n: errors(ring(*given, n, *keep)) for n in RINGS} for kind, keep in kinds.items()}
    return {"dense": {1: errors(dense(*given))}, **table}


def error_table() -> str:
    lines = [
        "| ring | float32 blocks and sums: out, dq | 16-bit blocks, float32 sums: out, dq "
        "| 16-bit blocks and sums: out, dq |",
        "|---|---|---|---|",
    ]
    table = measure_errors()
    out, grad_q, *_ = table["dense"][1]
    lines.append(f"| dense, one process | {out:.2e}, {grad_q:.2e} | | |")
    for n in RINGS:
        cells = [f"{table[kind][n][0]:.2e}, {table[kind][n][1]:.2e}" for kind in table if kind != "dense"]
        lines.append(f"| {n} ranks | {' | '.join(cells)} |")
    return "\n".join(lines)


def volume_table(tokens: int = 36_864, text: int = 512, width: int = 24 * 128) -> str:
    lines = [
        "| ranks | Ulysses | ring | group parallel, ratio 8 | to Ulysses | group parallel, ratio 4 | to Ulysses |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in (2, 4, 8, 16):
        ulysses = cp.ulysses_volume(tokens, width, ranks, text)
        cells = [f"{2 * ulysses / 1e6:.0f}", f"{2 * cp.ring_volume(tokens, width, ranks, text) / 1e6:.0f}"]
        for ratio in (8, 4):
            groups = cp.group_parallel_volume(tokens, width, ranks, ratio, text)
            cells += [f"{2 * groups / 1e6:.0f}", f"{groups / ulysses:.2f}x"]
        lines.append(f"| {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    write = parser.parse_args().write
    text = PAGE.read_text()
    for name, table in (("error", error_table()), ("volume", volume_table())):
        print(f"{table}\n")
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S
        )
    if write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
