# SPDX-License-Identifier: Apache-2.0
"""``F.gelu`` is the tanh form on npu, whatever it is asked for: so models ask for that, or call ops.gelu."""

import ast
import json
from pathlib import Path

import pytest
import torch

from vidgen import ops
from vidgen.models.text import CLIPTextEncoder
from vidgen.models.text.tiny import save_tiny_text_encoders

ROOT = Path(__file__).parents[2] / "vidgen"
FORMS = {"F.gelu", "nn.functional.gelu", "torch.nn.functional.gelu", "nn.GELU", "torch.nn.GELU"}


def test_models_ask_for_tanh():
    found = 0
    for path in ROOT.rglob("*.py"):
        if path.is_relative_to(ROOT / "ops"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in FORMS:
                found += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORMS:
                found -= 1
                form = [ast.unparse(a) for a in [*node.args, *(k.value for k in node.keywords)]]
                assert "'tanh'" in form, f"{path}:{node.lineno}"
    assert found == 0, "named without being called"


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
def test_text_encoders_of_transformers_call_ours(tmp_path, kind):
    """CLIP ViT-bigG, of Open-Sora Plan 1.5, has the exact form; that of ViT-L is neither, and left alone."""
    _, folder = save_tiny_text_encoders(tmp_path, t5_channels=32, clip_channels=24)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": kind}))
    encoder = CLIPTextEncoder.from_pretrained(folder)
    layers = [m for m in encoder.modules() if type(m).__name__ == "GELUActivation"]
    assert len(layers) == (2 if kind == "gelu" else 0) and all(layer.act is ops.gelu for layer in layers)
    vectors = encoder.encode(["a cat"])
    with ops.use_backend("reference"):
        torch.testing.assert_close(encoder.encode(["a cat"]), vectors)
    for layer in layers:
        layer.act = torch.nn.functional.gelu
    assert torch.equal(encoder.encode(["a cat"]), vectors)
