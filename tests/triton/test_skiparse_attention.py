# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention's kernel: what it takes, and its values over whole tiles (skiparse_cases.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidgen import ops
from vidgen.ops.skiparse_attention import new_args

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
META = torch.device("meta")


@pytest.fixture(autouse=True)
def triton():
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed (make setup installs it where it exists)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


def test_whole_tiles_in_the_interpreter():
    settings = {"TRITON_INTERPRET": "1", "VIDGEN_NATIVE": "0", "OMP_NUM_THREADS": "1", "OP": "skiparse_attention_lse"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    for inherited in ("VIDGEN_STRICT", "VIDGEN_BACKEND", "PYTEST_ADDOPTS"):
        environment.pop(inherited, None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        str(HERE / "skiparse_cases.py"),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


class OnCuda(torch.Tensor):
    """Says that it lies on another device than it does: refusals look at sizes, strides and the device's name."""

    device = SimpleNamespace(type="cuda")


class OnNpu(torch.Tensor):
    device = SimpleNamespace(type="npu")


def refusal(name, device, *, changes=None, dtype=torch.bfloat16, tokens=64, dim=64, **options):
    """What the kernel says to these arguments; ``changes`` are {position: argument}."""
    kernels = importlib.import_module("vidgen.ops._backends.triton.skiparse_attention")
    args = list(new_args(1, tokens, 2, dim, 4, "group", 0, META, dtype, **options))
    for i, value in (changes or {}).items():
        args[i] = value
    kind = {"cuda": OnCuda, "npu": OnNpu}[device]
    args = [a.as_subclass(kind) if isinstance(a, torch.Tensor) else a for a in args]
    return getattr(kernels, f"{name}_refuses")(*args)


def test_on_cuda_the_kernel_serves_where_keys_are_hidden():
    hidden = torch.ones(1, 64, dtype=torch.bool, device=META)
    assert "nothing is hidden" in refusal("skiparse_attention", "cuda")
    assert refusal("skiparse_attention", "cuda", mask=hidden) is None
    assert refusal("skiparse_attention", "cuda", tokens=61) is None
    assert "float32" in refusal("skiparse_attention", "cuda", mask=hidden, dtype=torch.float32)
    assert refusal("skiparse_attention", "npu") is None


@pytest.mark.parametrize(
    "words, device, options",
    [
        ("float64", "cuda", {"dtype": torch.float64}),
        ("head_dim is at most 256, not 257", "cuda", {"dim": 257}),
        ("a size is 0", "cuda", {"tokens": 0}),
        ("scale must be positive, not -1.0", "cuda", {"changes": {10: -1.0}}),
        (
            "elements apart",
            "cuda",
            {"changes": {0: torch.empty_strided((1, 64, 2, 64), (1, 2**21, 64, 1), device=META)}},
        ),
        ("Ascend launches at most 65535", "npu", {"tokens": 2_400_000}),
    ],
    ids=["dtype", "head_dim", "empty", "scale", "stride", "programs"],
)
def test_what_the_kernel_cannot_take_it_refuses(words, device, options):
    for name in ("skiparse_attention", "skiparse_attention_lse"):
        assert words in refusal(name, device, **options)
    assert refusal("skiparse_attention_lse", device) is None


def test_merging_parts_of_the_keys_gives_the_whole():
    """What the log-sum-exp is for, in the order of the tokens and per group for the text."""
    torch.manual_seed(0)
    q, k, v, text_q, text_k, text_v = (torch.randn(1, n, 2, 8) for n in (20, 20, 20, 6, 6, 6))
    text = {"text_q": text_q, "text_k": text_k, "text_v": text_v}
    options = {"sparse_n": 2, "pattern": "group", **text}
    whole = ops.skiparse_attention_lse(q, k, v, **options)
    first = torch.arange(20)[None] < 9
    text_first = torch.arange(6)[None] < 2
    parts = [
        ops.skiparse_attention_lse(q, k, v, mask=seen, text_mask=text_seen, **options)
        for seen, text_seen in ((first, text_first), (~first, ~text_first))
    ]
    for i in (0, 2):
        lse = torch.logaddexp(parts[0][i + 1], parts[1][i + 1])
        torch.testing.assert_close(lse, whole[i + 1])
        weighed = [
            out * (part - lse).exp().transpose(-1, -2).unsqueeze(-1) for out, part in (p[i : i + 2] for p in parts)
        ]
        torch.testing.assert_close(sum(weighed), whole[i])


@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_over_groups_is_skiparse_attention(masked):
    torch.manual_seed(0)
    q, k, v, text_q, text_k, text_v = (torch.randn(2, n, 2, 8) for n in (11, 11, 11, 3, 3, 3))
    options = {"sparse_n": 2, "pattern": "group", "mask": torch.rand(2, 11) < 0.7 if masked else None}
    texts = {"text_q": text_q, "text_k": text_k, "text_v": text_v}
    visual, text = ops.skiparse_attention(q, k, v, **texts, **options)
    out, lse, text_out, text_lse = ops.skiparse_attention_lse(q, k, v, **texts, **options)
    torch.testing.assert_close(out, visual)
    torch.testing.assert_close(text_out.mean(1), text)
    assert lse.shape == (2, 2, 11) and text_lse.shape == (2, 2, 2, 3)
