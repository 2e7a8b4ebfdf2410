# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention on an accelerator against dense attention of the same tokens, all in one run.

The ideal time of a case is that of the dense kernel scaled by arithmetic: without text, 1 / k of it. Dense attention is
PyTorch's, by each of its backends; FlexAttention is compiled, per group (single) or under a mask of blocks (group).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import device_timing
import torch
import torch.nn.functional as F
from measure import device_name
from originals import ORIGINALS, Step, bind, relative_error, tolerance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import SIZES, Sizes, module

from vidgen import device as devices
from vidgen import ops
from vidgen.ops.skiparse_index import groups_to_tokens

COLUMNS = ("tokens", "case", "implementation", "median_us", "tflops", "to_ideal_best", "to_ideal_flash")
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SMALL = Sizes(grid=(4, 16, 16), heads=4, head_dim=64, text=32)  # for a CPU, where it only shows that all of it runs
failed: list[str] = []


@dataclass(frozen=True)
class Case:
    """``grouped``: the arguments are in the group layout already; ``missing`` tokens make padding necessary."""

    sparse_n: int
    pattern: str
    grouped: bool = False
    text: int = 0
    missing: int = 0

    @property
    def name(self) -> str:
        text = f", text {self.text}" if self.text else ""
        missing = f", {self.missing} tokens less" if self.missing else ""
        return f"k={self.sparse_n} {self.pattern}{', grouped' if self.grouped else ''}{text}{missing}"


def cases(sizes: Sizes, quick: bool) -> list[Case]:
    ratios = (4,) if quick else (4, 8)
    plain = [
        Case(ratio, pattern, grouped)
        for ratio in ratios
        for pattern, grouped in (("single", False), ("group", False), ("group", True))
    ]
    with_text = [Case(4, "single", text=sizes.text), Case(4, "group", grouped=True, text=sizes.text)]
    padded = [Case(4, "group", missing=5)]
    return plain if quick else plain + with_text + padded


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    """For run.py: the rows of each dtype asked for."""
    device = devices.resolve(arguments.device)
    facts = {"device": device_name(device), "torch": torch.__version__}
    for dtype in arguments.dtype or ("bfloat16",):
        sizes = SMALL if device.type == "cpu" else SIZES
        for found in measure_all(device, getattr(torch, dtype), arguments.quick, sizes):
            tokens = f"{dtype} 1x{sizes.tokens}x{sizes.heads}x{sizes.head_dim}"
            yield {"tokens": tokens} | found | facts


def measure_all(
    device: torch.device, dtype: torch.dtype, quick: bool = False, sizes: Sizes = SIZES
) -> Iterator[dict[str, str]]:
    """A row for each case and implementation; what fails is listed in ``failed`` and left out."""
    shape = (1, sizes.tokens, sizes.heads, sizes.head_dim)
    dense_flops = 4 * sizes.heads * sizes.head_dim * sizes.tokens**2
    best, flash = None, None
    with torch.no_grad(), device_timing.forgotten_memory(device):
        steps = dense_steps(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(3)))
        dense = device_timing.in_turns(steps, device)
    for which, seconds in sorted(dense.items()):
        yield row("dense", f"SDPA {which}", seconds, dense_flops, None, None)
    best = min(dense.values()) / dense_flops
    flash = dense["flash"] / dense_flops if "flash" in dense else None
    for case in cases(sizes, quick):
        torch.manual_seed(0)
        print(case.name, file=sys.stderr, flush=True)
        try:
            with torch.no_grad(), device_timing.forgotten_memory(device):
                args = arguments(case, sizes, device, dtype)
                flops = ops.OPS["skiparse_attention"].cost(*args).flops
                times = device_timing.in_turns(steps_of(case, args, compiled=not quick), device)
        except Exception as error:  # of any library below: the other rows are still worth having
            fail(case.name, error)
            continue
        for which, seconds in times.items():
            yield row(case.name, which, seconds, flops, best, flash)


def row(
    case: str, implementation: str, seconds: float, flops: int, best: float | None, flash: float | None
) -> dict[str, str]:
    """``best`` and ``flash``: seconds that dense attention takes for each floating-point operation."""

    def ratio(per_flop: float | None) -> str:
        return f"{seconds / (per_flop * flops):.3f}" if per_flop else ""

    return {
        "case": case,
        "implementation": implementation,
        "median_us": f"{seconds * 1e6:.0f}",
        "tflops": f"{flops / seconds / 1e12:.0f}",
        "to_ideal_best": ratio(best),
        "to_ideal_flash": ratio(flash),
    }


def fail(what: str, error: Exception) -> None:
    failed.append(what)
    print(f"{what}: {type(error).__name__}: {str(error).strip()[:500]}", file=sys.stderr)


def arguments(case: Case, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (1, sizes.tokens - case.missing, sizes.heads, sizes.head_dim)
    new: Callable[..., tuple[Any, ...]] = module("skiparse_attention").new_args
    return new(*shape, case.sparse_n, case.pattern, case.text, device, dtype, grouped=case.grouped)


def dense_steps(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Step]:
    """PyTorch's attention by its own choice, and by each backend that takes these tensors."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def by(backend: SDPBackend) -> Step:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    steps: dict[str, Step] = {"default": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, backend in DENSE.items():
        step = by(backend)
        try:
            step()
        except RuntimeError as error:
            print(f"SDPA {name}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            steps[name] = step
    return steps


def steps_of(case: Case, args: tuple[Any, ...], compiled: bool) -> dict[str, Step]:
    """``ours`` as users get it, each backend that takes the arguments, the kernel with the log-sum-exp, which takes
    what the library does better too, copies as the original makes them, and FlexAttention.
    """
    op = ops.OPS["skiparse_attention"]
    expected = op(*args)
    taking = [b for b in op.candidates(args[0].device.type) if b.name != "reference" and b.refuse(*args) is None]
    steps: dict[str, Step] = {f"ours ({taking[0].name})": lambda: op(*args)}
    for backend in taking[1:]:
        steps[backend.name] = lambda run=backend.run: run(*args)
    for backend in ops.OPS["skiparse_attention_lse"].candidates(args[0].device.type):
        if backend.name == "triton" and backend.refuse(*args) is None:
            steps["triton, with lse"] = lambda run=backend.run: visual_and_text(run(*args), args)
    steps["copies and SDPA"] = bind(ORIGINALS["skiparse_attention"], args)
    if compiled and case.text == 0 and (case.grouped or case.pattern == "single"):
        try:
            steps["FlexAttention"] = flex_step(case, args)
        except Exception as error:  # code generation and its compilers raise many kinds
            fail(f"FlexAttention, {case.name}", error)
    for name, step in list(steps.items()):
        result = step()
        if name == "FlexAttention" and case.grouped:
            result = [groups_to_tokens(result[0].unflatten(1, (case.sparse_n, -1)), args[-1], case.pattern)]
        error = relative_error(result, expected)
        if not error <= tolerance(args[0].dtype):
            fail(f"{name}, {case.name}", ValueError(f"off by {error:.1e}"))
            del steps[name]
    return steps


def visual_and_text(results: tuple[Tensor, ...], args: tuple[Any, ...]) -> list[Tensor]:
    out, _, text, _ = results
    return [out] if args[5] is None else [out, text.mean(1)]


def flex_step(case: Case, args: tuple[Any, ...]) -> Step:
    """Its result stays in the layout of the arguments, so that no copy is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    q, k, v = args[:3]
    tokens, heads, ratio = q.shape[1], q.shape[2], case.sparse_n
    if case.pattern == "single":  # groups are heads, as they lie in memory
        folded = [t.reshape(1, tokens // ratio, ratio * heads, -1).transpose(1, 2) for t in (q, k, v)]
        return lambda: [flex(*folded).transpose(1, 2).reshape(q.shape)]
    places = tokens // ratio
    mask = create_block_mask(
        lambda batch, head, query, key: query // places == key // places, None, None, tokens, tokens, device=q.device
    )
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    return lambda: [flex(*rows, block_mask=mask).transpose(1, 2)]
