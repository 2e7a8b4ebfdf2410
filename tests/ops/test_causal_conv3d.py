# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from vidgen import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_future_frames_change_nothing(dtype):
    x, weight = torch.randn(1, 2, 4, 5, 5, dtype=dtype), torch.randn(3, 2, 3, 3, 3, dtype=dtype)
    later = x.clone()
    later[:, :, 2:] += 1
    y, z = (ops.causal_conv3d(t, weight, spatial_padding=(1, 1)) for t in (x, later))
    torch.testing.assert_close(y[:, :, :2], z[:, :, :2])
    assert not torch.allclose(y[:, :, 2:], z[:, :, 2:])


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_chunks_with_a_cache_equal_the_whole(stride, dilation):
    """As a streaming autoencoder runs it: the cache is the tail of what the chunk before was convolved over."""
    x, weight = torch.randn(1, 2, 9, 4, 4, dtype=torch.float64), torch.randn(3, 2, 3, 1, 1, dtype=torch.float64)
    options = {"stride": (stride, 1, 1), "dilation": (dilation, 1, 1)}
    whole = ops.causal_conv3d(x, weight, **options)
    parts, cache = [], None
    for chunk in (x[:, :, :1], x[:, :, 1:5], x[:, :, 5:]):
        parts.append(ops.causal_conv3d(chunk, weight, cache=cache, **options))
        front = chunk[:, :, :1].expand(-1, -1, 2 * dilation, -1, -1) if cache is None else cache
        cache = torch.cat((front, chunk), 2)[:, :, -((2 * dilation) // stride) :]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_an_empty_cache_puts_nothing_in_front():
    x, weight = torch.randn(1, 2, 4, 3, 3), torch.randn(3, 2, 2, 3, 3)
    torch.testing.assert_close(ops.causal_conv3d(x, weight, cache=x[:, :, :0]), F.conv3d(x, weight))


def test_one_frame_kernels_copy_no_input():
    x, weight = torch.randn(1, 2, 4, 3, 3), torch.randn(3, 2, 1, 1, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.causal_conv3d(x, weight)
    assert not {"aten::cat", "aten::copy_"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 4, 4)}, "x must be floating point"),
        ({"x": torch.ones(1, 2, 0, 4, 4)}, "x must have at least one frame"),
        ({"weight": torch.ones(1, 3, 3, 3, 3)}, r"weight must be \(out_channels, 2, "),
        ({"bias": torch.ones(2)}, r"bias must be \(1,\)"),
        ({"cache": torch.ones(1, 2, 2, 4, 3)}, r"cache must be \(1, 2, 2, 4, 4\)"),
        ({"cache": torch.ones(1, 2, 1, 4, 4)}, r"covers \(3, 3, 3\) .* has only \(2, 4, 4\)"),
        ({"cache": torch.ones(3)}, "cache must be"),
        ({"stride": (1, 1)}, "stride must be 3 integers"),
        ({"dilation": (1, 0, 1)}, "dilation must be 3 integers of at least 1"),
        ({"spatial_padding": (-1, 0)}, "spatial_padding must be 2 integers of at least 0"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.ones(1, 2, 1, 4, 4), "weight": torch.ones(1, 2, 3, 3, 3)} | change
    with pytest.raises(ValueError, match=f"causal_conv3d: .*{message}"):
        ops.causal_conv3d(**arguments)
