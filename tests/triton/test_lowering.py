# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel lowers to Ascend's dialect, into strided blocks; what that proves stands in lower.py."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.npu import environment
from tests.npu.conftest import need

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "vidgen" / "ops" / "_backends" / "triton"

# Not in Triton 3.2, or meaningless on Ascend.
FORBIDDEN = {
    "inline_asm_elementwise",
    "make_tensor_descriptor",
    "TensorDescriptor",
    "load_tensor_descriptor",
    "store_tensor_descriptor",
    "tensor_descriptor",
}


def python(*command: str) -> subprocess.CompletedProcess[str]:
    """Run with triton-ascend in place of triton."""
    need("triton_ascend")
    variables = {**environment.triton_ascend(), "VIDGEN_NATIVE": "0"}
    variables.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=900)


def test_every_kernel_lowers_to_blocks():
    done = python(str(HERE / "lower.py"))
    assert done.returncode in (0, 1), done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["triton"].startswith("3.2"), "the wrong triton"
    assert report["failed"] == []
    assert report["lowered"], "nothing was launched"
    assert report["never_launched"] == []
    wrong = {f"{k['kernel']} ({k['launched_by']}) {k['constants']}": k["lint"] for k in report["lowered"] if k["lint"]}
    assert wrong == {}


def test_the_lowering_refuses_what_it_should():
    script = (
        f"import json, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import lower; lower.pretend_device()\n"
        "import refused; refused.launch()\n"
        "print(json.dumps([{k['kernel']: k['lint'] for k in lower.lowered}, "
        "{k['kernel']: k['error'] for k in lower.failed}, lower.never_launched(refused)]))"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    lint, failed, unused = json.loads(done.stdout)
    assert lint["sound"] == []
    assert "single elements" in lint["gather"][0] and "memref.load" in lint["gather"][0]
    assert "single elements" in lint["scatter"][0]
    assert lint["inline_assembly"] == ["inline assembly"]
    assert lint["too_large"] == ["one buffer of 262144 bytes; the unified buffer has 196608"]
    assert set(failed) == {"pointer_select", "newer_than_3_2"}
    assert "triton-adapter-opt" in failed["pointer_select"]
    assert unused == ["never_launched"]


def test_a_grid_that_ascend_cannot_launch_is_refused():
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import lower; lower.pretend_device()\n"
        "import refused, torch; x = torch.empty(8, device='meta'); refused.sound[(256, 256)](x, x, 8, BLOCK=8)"
    )
    done = python("-c", script)
    assert done.returncode != 0 and "65536" in done.stderr


def forbidden_names(source: str) -> set[str]:
    names = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    return {name for name in names if name.removeprefix("_experimental_") in FORBIDDEN}


def test_the_kernels_name_nothing_that_ascend_lacks():
    files = sorted(KERNELS.glob("*.py"))
    assert files
    assert {path.name: found for path in files if (found := forbidden_names(path.read_text()))} == {}
    assert forbidden_names((HERE / "refused.py").read_text()) == {"inline_asm_elementwise", "make_tensor_descriptor"}
