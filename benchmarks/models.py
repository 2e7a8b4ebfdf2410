# SPDX-License-Identifier: Apache-2.0
"""One forward pass of Open-Sora Plan 1.5 with random weights: Skiparse against dense attention, and without kernels.

    python benchmarks/models.py --device cuda       # 8.5 billion parameters, 121 x 576 x 1024

Dense means the same model and weights with ratio 1 in every block. Without kernels means the plain formulas of the
ops, one PyTorch operator after the other. Times are those of the device, attention's by events around each call.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
import torch
from device_timing import Watch
from measure import device_name
from torch import Tensor

from vidgen import device as devices
from vidgen import ops
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT, SparseUMMDiTConfig, preset

COLUMNS = ("case", "forward_s", "attention_s", "attention_share", "faster", "attention_faster", "memory_gb", "error")
COMPRESSION = 8  # of the system's autoencoder, along each axis


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu, cuda or npu (default: the best that is there)")
    parser.add_argument("--preset", default="released", help="released (default), small or tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--size", type=int, nargs=3, default=(121, 576, 1024), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--text", type=int, default=512, help="text tokens (default: 512)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each case; the median counts")
    parser.add_argument("--output", type=Path, help="folder for csv and table")
    return parser.parse_args(arguments)


def build(config: SparseUMMDiTConfig, device: torch.device, dtype: torch.dtype) -> SparseUMMDiT:
    """With weights as training starts from, drawn on the device in ``dtype``: no copy of them ever is elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = SparseUMMDiT(config)
    finally:
        torch.set_default_dtype(before)
    assert not list(model.buffers()), "a buffer's values would be lost"
    model = model.to_empty(device=device)
    model.init_weights()
    return model.eval()


def inputs(config: SparseUMMDiTConfig, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    frames, height, width = arguments.size
    grid = ((frames - 1) // COMPRESSION + 1, height // COMPRESSION, width // COMPRESSION)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    latent = some(1, config.in_channels, *grid)
    pooled, text = some(1, config.pooled_projection_dim), some(1, arguments.text, config.caption_channels)
    return latent, torch.tensor([500.0], device=device), pooled, text


@contextlib.contextmanager
def dense(model: SparseUMMDiT) -> Iterator[None]:
    attentions = [block.attn1 for stage in model.transformer_blocks for block in stage]
    before = [attention.sparse_n for attention in attentions]
    try:
        for attention in attentions:
            attention.sparse_n = 1
        yield
    finally:
        for attention, ratio in zip(attentions, before, strict=True):
            attention.sparse_n = ratio


@contextlib.contextmanager
def without_kernels(device: torch.device) -> Iterator[None]:
    """Each op as if this device had no backend."""
    if device.type == "cpu":  # its kernels are not in the list
        with ops.use_backend("reference"):
            yield
        return
    ops.table(device.type)  # loads the backends
    before = {name: op.backends.get(device.type, []) for name, op in ops.OPS.items()}
    try:
        for op in ops.OPS.values():
            op.backends[device.type] = []
        yield
    finally:
        for name, op in ops.OPS.items():
            op.backends[device.type] = before[name]


@contextlib.contextmanager
def attention_timed(watch: Watch) -> Iterator[list[tuple[Any, Any]]]:
    """Collects the events before and after each call of attention."""
    timed: list[tuple[Any, Any]] = []
    plain = ops.skiparse_attention

    def attend(*args: Any, **options: Any) -> Any:
        start, end = (watch.event(enable_timing=True) for _ in range(2))
        start.record()
        result = plain(*args, **options)
        end.record()
        timed.append((start, end))
        return result

    ops.skiparse_attention = attend
    try:
        yield timed
    finally:
        ops.skiparse_attention = plain


def measure(model: SparseUMMDiT, given: Any, repeats: int, device: torch.device) -> dict[str, Any]:
    watch = Watch(device)
    if watch.module is not None:
        watch.module.reset_peak_memory_stats()
    with torch.no_grad():
        result = model(*given)
        forward, attention = [], []
        for _ in range(repeats):
            with attention_timed(watch) as timed:
                whole = watch.time(lambda: model(*given))
            forward += watch.seconds([whole])
            attention.append(sum(watch.seconds(timed)))
    return {
        "forward": statistics.median(forward),
        "attention": statistics.median(attention),
        "result": result,
        "memory": devices.peak_memory_bytes(device),
    }


def measure_all(arguments: argparse.Namespace) -> list[dict[str, str]]:
    device, dtype = devices.resolve(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    config = preset(arguments.preset)
    model = build(config, device, dtype)
    given = inputs(config, arguments, device, dtype)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr, flush=True)

    found = {}
    cases = {
        "dense": dense(model),
        "Skiparse": contextlib.nullcontext(),
        "Skiparse, no kernels": without_kernels(device),
    }
    for name, case in cases.items():
        with case:
            found[name] = measure(model, given, arguments.repeats, device)
        print(f"{name}: {found[name]['forward']:.3f} s", file=sys.stderr, flush=True)
    return [row(name, found, device) for name in cases]


def row(name: str, found: dict[str, dict[str, Any]], device: torch.device) -> dict[str, str]:
    """``faster`` is against dense; ``error`` against the plain formulas, of Skiparse."""
    case, base, plain = found[name], found["dense"], found["Skiparse, no kernels"]["result"].double()
    error = ((case["result"].double() - plain).norm() / plain.norm()).item()
    return {
        "case": name,
        "forward_s": f"{case['forward']:.3f}",
        "attention_s": f"{case['attention']:.3f}",
        "attention_share": f"{case['attention'] / case['forward']:.2f}",
        "faster": f"{base['forward'] / case['forward']:.2f}",
        "attention_faster": f"{base['attention'] / case['attention']:.2f}",
        "memory_gb": f"{case['memory'] / 1e9:.1f}",
        "error": f"{error:.1e}" if name != "dense" else "",
        "device": device_name(device),
        "torch": torch.__version__,
    }


def main() -> None:
    arguments = parse()
    if ops._registry._strict:
        sys.exit("benchmarks/models.py: unset VIDGEN_STRICT: the case without kernels is a fallback")
    rows = measure_all(arguments)
    if arguments.output:
        report.write_table(rows, COLUMNS, arguments.output / report.file_name(rows[0], "_models.csv"))
    size = " x ".join(map(str, arguments.size))
    print(f"{rows[0]['device']}, Open-Sora Plan 1.5, {arguments.preset}, {size}, {arguments.dtype}")
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
