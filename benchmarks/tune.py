# SPDX-License-Identifier: Apache-2.0
"""Tries numbers of vidgen/ops/_backends/triton/_tuning.py on the device at hand, on the workloads of workloads.py.

    python benchmarks/tune.py --device cuda

One number is changed at a time. Prints, per workload, bandwidth as it is and under each value.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from device_timing import in_turns
from workloads import workloads

from vidgen import device as devices
from vidgen import ops
from vidgen.ops._backends.triton._tuning import TUNING

# Which numbers matter to which ops.
ROWS = ("adaln_modulate", "gated_residual_adaln")
ROWS_BACKWARD = ("adaln_modulate_backward", "gated_residual_adaln_backward")
TILES = ("gated_residual", "haar_3d", "inverse_haar_3d")
VOLUMES = ("group_norm_silu", "group_norm_silu_backward", "layer_norm_silu", "layer_norm_silu_backward")
HEADS = ("qk_norm_rope", "rope_3d", "qk_norm_rope_backward")
CANDIDATES = {
    "forward_rows": (ROWS, (1, 2, 4, 8, 16)),
    "backward_programs": ((*ROWS_BACKWARD, "gated_residual_backward", "qk_norm_rope_backward"), (132, 256, 512, 1024)),
    "stages": ((*ROWS_BACKWARD, "qk_norm_rope_backward"), (1, 2, 3, 4)),
    "tile": (TILES, (1024, 2048, 4096, 8192, 16384)),
    "volume_tile": (VOLUMES, (4096, 8192, 16384, 32768)),
    "head_tile": (HEADS, (1024, 2048, 4096, 8192)),
    "run_tile": (HEADS, (512, 1024, 2048, 4096)),
    "warp_elements": ((*ROWS, *ROWS_BACKWARD, *TILES, *VOLUMES, *HEADS), (128, 256, 512, 1024)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--op", action="append", help="only this op (may be given again)")
    arguments = parser.parse_args()
    device = devices.resolve(arguments.device)
    for name, shapes in workloads(device, getattr(torch, arguments.dtype)).items():
        fields = {f: values for f, (names, values) in CANDIDATES.items() if name in names}
        if arguments.op and name not in arguments.op:
            continue
        for shape, make in shapes.items():
            args = make()
            moved = ops.OPS[name].cost(*args).bytes
            for field, values in fields.items():
                steps = {str(value): step(name, args, field, value) for value in values}
                found = {value: f"{moved / s / 1e9:.0f}" for value, s in in_turns(taken(steps), device).items()}
                now = getattr(TUNING[device.type], field)
                print(f"{name} {shape}, {field} (now {now}), GB/s: {found}", flush=True)


def step(name: str, args: tuple[Any, ...], field: str, value: int) -> Callable[[], Any]:
    kind = args[0].device.type
    given = TUNING[kind]

    def run() -> Any:
        TUNING[kind] = dataclasses.replace(given, **{field: value})
        try:
            return ops.OPS[name](*args)
        finally:
            TUNING[kind] = given

    return run


def taken(steps: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Those that the device has room for."""
    fit = {}
    for value, run in steps.items():
        try:
            run()
        except RuntimeError as error:
            print(f"{value}: {str(error).splitlines()[0]}")
        else:
            fit[value] = run
    return fit


if __name__ == "__main__":
    main()
