# SPDX-License-Identifier: Apache-2.0
"""What the battery cannot know about the modulated norms, the gated residual and the norms with SiLU."""

import pytest
import torch

from vidgen import ops

VOLUME = (2, 70, 3, 17, 33)  # several blocks of kernels, and the end of one


def close(y, truth, x):
    """Within a few roundings to x's dtype of the largest value."""
    assert (y.double() - truth).abs().max() <= 4 * torch.finfo(x.dtype).eps * truth.abs().max().clamp(min=1)


def as_format(x, channels_last):
    return x.to(memory_format=torch.channels_last_3d) if channels_last else x


def parameters(channels, dtype):
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def norm_silu(name, x, weight, bias, **out):
    if name == "group_norm_silu":
        return ops.group_norm_silu(x, 7, weight, bias, **out)
    return ops.layer_norm_silu(x, weight, bias, **out)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("channels", [70, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_residual_adaln_is_its_two_parts_to_the_bit(dtype, channels):
    x, y = (torch.randn(2, 9, channels).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(2, 3 * channels).to(dtype).chunk(3, -1)
    weight, bias = parameters(channels, dtype)
    h, modulated = ops.gated_residual_adaln(x, gate, y, shift, scale, weight=weight, bias=bias)
    assert torch.equal(h, ops.gated_residual(x, gate, y))
    assert torch.equal(modulated, ops.adaln_modulate(h, shift, scale, weight=weight, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_residual_rounds_as_eager_does_to_the_bit(dtype):
    """Ties, which are common where few digits are added, go to even; NaN and infinity pass."""
    x, y = (torch.randint(-300, 300, (1, 64, 129)).to(dtype) / 8 for _ in range(2))
    gate = torch.randint(-8, 8, (1, 129)).to(dtype) / 16
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    eager = (x.float() + gate[:, None].float() * y.float()).to(dtype)
    torch.testing.assert_close(ops.gated_residual(x, gate, y), eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_that_go_past_the_caches(dtype, native):
    sequence = (12 << 20) // (1024 * torch.finfo(dtype).bits // 8)  # 12 MiB a tensor
    x, y = (torch.randn(2, sequence // 2, 1024).to(dtype) for _ in range(2))
    gate = torch.randn(2, 1024).to(dtype)
    eager = (x.float() + gate[:, None].float() * y.float()).to(dtype)
    native.guard_outputs(True)
    try:
        assert torch.equal(ops.gated_residual(x, gate, y), eager) and native.count_damaged_guards() == 0
    finally:
        native.guard_outputs(False)
    offset = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape)  # no cache line begins here
    assert torch.equal(ops.gated_residual(x, gate, y, out=offset), eager)
    assert torch.equal(ops.gated_residual(x, gate, y, out=x), eager)


@pytest.mark.parametrize("channels", [5, 70, 128])
def test_rows_may_be_overwritten(channels):
    x, y = (torch.randn(2, 9, channels) for _ in range(2))
    gate, shift, scale = torch.randn(2, 3 * channels).chunk(3, -1)
    h, modulated = ops.gated_residual_adaln(x, gate, y, shift, scale)
    assert torch.equal(ops.gated_residual(x, gate, y, out=x), h)
    assert torch.equal(ops.adaln_modulate(x, shift, scale, out=x), modulated)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["group_norm_silu", "layer_norm_silu"])
def test_norm_silu_of_a_volume(name, dtype, channels_last):
    x = as_format((3 * torch.randn(VOLUME) + 1).to(dtype), channels_last)
    weight, bias = parameters(VOLUME[1], dtype)
    y = norm_silu(name, x, weight, bias)
    assert y.stride() == x.stride()
    with ops.use_backend("reference"):
        close(y, norm_silu(name, x.double(), weight.double(), bias.double()), x)
    if ops.native_status is None:  # library calls may block a batch otherwise than a row
        assert torch.equal(norm_silu(name, x[1:], weight, bias), y[1:])
    assert torch.equal(norm_silu(name, x, weight, bias, out=torch.empty(VOLUME, dtype=dtype)), y)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["group_norm_silu", "layer_norm_silu"])
def test_norm_silu_survives_a_large_mean(name, channels_last):
    x = as_format(torch.randn(VOLUME) + 1000, channels_last)
    weight, bias = parameters(VOLUME[1], x.dtype)
    with ops.use_backend("reference"):
        truth = norm_silu(name, x.double(), weight.double(), bias.double())
    # The mean itself is rounded, to eps * 1000 of a spread of 1.
    assert (norm_silu(name, x, weight, bias).double() - truth).abs().max() < 5e-4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["group_norm_silu", "layer_norm_silu"])
def test_norm_silu_of_extreme_values(name, channels_last):
    x = as_format(torch.randn(VOLUME), channels_last)
    weight, bias = torch.zeros(VOLUME[1]), torch.linspace(-120, 120, VOLUME[1])
    y = norm_silu(name, x, weight, bias)
    truth = torch.nn.functional.silu(bias.double()).view(-1, 1, 1, 1).expand(VOLUME[1:])
    torch.testing.assert_close(y[0].double(), truth, rtol=1e-5, atol=1e-30)
    x[0, 3, 1, 2, 3] = float("nan")
    y = norm_silu(name, x, weight, bias)
    assert y[0, 3, 1, 2, 3].isnan() and y[1].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["group_norm_silu", "layer_norm_silu"])
def test_results_do_not_depend_on_the_number_of_threads(name, dtype, channels_last):
    x = as_format(torch.randn(VOLUME).to(dtype), channels_last).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(VOLUME[1], dtype))

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = norm_silu(name, x, weight, bias)
            return y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
        finally:
            torch.set_num_threads(before)

    if ops.native_status is None:
        assert all(torch.equal(a, b) for a, b in zip(results(1), results(3), strict=True))


def test_errors_name_the_argument():
    x = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match="num_groups must divide the 6 channels, got 4"):
        ops.group_norm_silu(x, 4)
    with pytest.raises(ValueError, match=r"layer_norm_silu: weight must be \(6,\)"):
        ops.layer_norm_silu(x, torch.ones(5), torch.ones(6))
    with pytest.raises(ValueError, match=r"gate must be \(batch, channels\) or \(batch, sequence, channels\)"):
        ops.gated_residual(x, torch.randn(2, 5), x)
    with pytest.raises(ValueError, match="gated_residual_adaln: y must be"):
        ops.gated_residual_adaln(x, x, x[:1], x, x)
