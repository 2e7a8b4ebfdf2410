# SPDX-License-Identifier: Apache-2.0
"""Converting a tree takes less memory than two of its shards, whatever the size of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidgen.checkpoints.lazy import Lazy, write_safetensors

MEASURED = """
import json, sys
from pathlib import Path
from vidgen.checkpoints.convert import MODELS, convert
import vidgen.models.opensora_plan_v1_3.mindspeed_mm, safetensors.torch, numpy
import torch
from vidgen.device import peak_memory_bytes
torch.save({"a": torch.zeros(9)}, sys.argv[2] + "/warm.pt")
convert(sys.argv[1], sys.argv[2] + "/warm", "mindspeed-mm", dry_run=True)
peak = lambda: peak_memory_bytes(torch.device("cpu"))
steps = {}
before = peak()
for name, source, to, options in json.loads(sys.argv[3]):
    convert(Path(sys.argv[2], source), Path(sys.argv[2], name), to, **options)
    steps[name] = peak() - before
print(json.dumps(steps))
"""
HIDDEN, BLOCKS = 448, 24


def shapes() -> dict[str, tuple[int, ...]]:
    d = HIDDEN
    found: dict[str, tuple[int, ...]] = {"pos_embed.proj.weight": (d, 8, 2, 2), "pos_embed.proj.bias": (d,)}
    found |= {"scale_shift_table": (2, d), "proj_out.weight": (32, d), "proj_out.bias": (32,)}
    layers = {"caption_projection.linear_1": (d, 4 * d), "caption_projection.linear_2": (d, d)}
    layers |= {f"adaln_single.emb.timestep_embedder.linear_{i}": (d, s) for i, s in ((1, 256), (2, d))}
    layers["adaln_single.linear"] = (6 * d, d)
    for i in range(BLOCKS):
        block = f"transformer_blocks.{i}"
        found[f"{block}.scale_shift_table"] = (6, d)
        names = [f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
        layers |= {f"{block}.{name}": (d, d) for name in names}
        layers |= {f"{block}.ff.net.0.proj": (4 * d, d), f"{block}.ff.net.2": (d, 4 * d)}
    for name, shape in layers.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    state = {name: Lazy(shape, torch.float32, lambda s=shape: torch.randn(s)) for name, shape in shapes().items()}
    write_safetensors(tmp_path / "model.safetensors", state)
    cut = {"tp": 2, "stages": [[12, 12]]}
    steps = [
        ("tree", "model.safetensors", "mindspeed-mm", cut),
        ("resplit", "tree", "mindspeed-mm", {"stages": [[6, 6, 6, 6]]}),
        ("one.pt", "resplit", "pt", {}),
        ("back.safetensors", "tree", "safetensors", {}),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "model.safetensors"), str(tmp_path), json.dumps(steps)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout.splitlines()[-1])
    shard = max(file.stat().st_size for file in (tmp_path / "tree").rglob("*.pt"))
    whole = (tmp_path / "model.safetensors").stat().st_size
    print(
        {name: f"{n / 1e6:.0f} MB" for name, n in grown.items()}, f"shard {shard / 1e6:.0f} MB of {whole / 1e6:.0f} MB"
    )
    assert 4 * shard < whole * 1.2
    assert max(grown.values()) < 2 * shard
