# SPDX-License-Identifier: Apache-2.0
"""Each documented limit of torch_npu's fused ops: at it a call is allowed, beyond it refused with the reason (rung 2).

Nothing is computed, and torch_npu is not needed: tensors have shapes only.
"""

import pytest
import torch

from vidgen import ops
from vidgen.ops._backends.npu import SERVED, _fusion_attention, _guards

M = 1_000_000


def at(**values):
    return values


def meta(*shape, dtype=torch.float32):
    """A shape of any size: one element of memory, and none of that."""
    return torch.empty(1, dtype=dtype, device="meta").expand(shape)


def qkv(batch=1, queries=4, keys=4, heads=2, dim=8, value_dim=None, key_heads=None, key_dim=None, dtype=torch.float32):
    q = meta(batch, queries, heads, dim, dtype=dtype)
    k = meta(batch, keys, key_heads or heads, key_dim or dim, dtype=dtype)
    return q, k, meta(batch, keys, key_heads or heads, dim if value_dim is None else value_dim, dtype=dtype)


def attention(**sizes):
    return _guards.attention(*qkv(**sizes))


def packed(lengths=(2, 2), key_lengths=None, ends=None, key_ends=None, **sizes):
    """Sequences of these lengths, whose ends are told unless others are given."""
    key_lengths = lengths if key_lengths is None else key_lengths
    q, k, v = (t[0] for t in qkv(queries=sum(lengths), keys=sum(key_lengths), **sizes))
    told, told_keys = (torch.tensor(n).cumsum(0).tolist() for n in (lengths, key_lengths))
    return _guards.packed_attention(q, k, v, ends or told, key_ends or told_keys)


def dropped(*shape, dtype=torch.bool):
    q, k, _ = qkv(batch=2, queries=3, keys=5, heads=4)
    return _guards.dropped(meta(*shape, dtype=dtype), q, k)


def rotary(batch=1, heads=2, dim=8, dtype=torch.float32, interleaved=False, tokens=3):
    return _guards.rotary(meta(batch, tokens, heads, dim, dtype=dtype), interleaved)


def rms_norm(dtype=torch.float32, weight=None, tokens=3):
    return _guards.rms_norm(
        meta(1, tokens, 2, 8, dtype=dtype), None if weight is None else torch.empty(8, dtype=weight)
    )


def gelu(dtype=torch.float32, axes=2, size=2):
    return _guards.gelu(meta(*[size] * axes, dtype=dtype))


def group_norm(dtype=torch.float32, weight=None, bias=None, size=4):
    weight, bias = (None if t is None else torch.empty(8, dtype=t) for t in (weight, bias))
    return _guards.group_norm(meta(1, 8, size, size, dtype=dtype), weight, bias)


def group_norm_backward(channels, groups=1, **others):
    return _guards.group_norm_backward(meta(1, channels, 2, **others), groups, None, None)


def ring_update(dtype=torch.float32, lse=torch.float32, queries=4):
    return _guards.ring_update(meta(1, queries, 2, 8, dtype=dtype), meta(1, 2, queries, dtype=lse))


# (guard, just inside the limit, just outside, what the reason says)
LIMITS = {
    "attention dtype": (attention, at(dtype=torch.float16), at(dtype=torch.float64), "not float64"),
    "attention bfloat16": (attention, at(dtype=torch.bfloat16), at(dtype=torch.int8), "not int8"),
    "attention head_dim": (attention, at(dim=768), at(dim=769), "head_dim must lie in 1..768, got 769"),
    "attention no head_dim": (attention, at(dim=1), at(dim=0), "head_dim must lie in 1..768, got 0"),
    "attention heads": (attention, at(heads=256), at(heads=257), "heads must lie in 1..256, got 257"),
    "attention no heads": (attention, at(heads=1), at(heads=0), "heads must lie in 1..256, got 0"),
    "attention queries": (attention, at(queries=M), at(queries=M + 1), "queries must lie in 1..1000000"),
    "attention no queries": (attention, at(queries=1), at(queries=0), "queries must lie in"),
    "attention keys": (attention, at(keys=M), at(keys=M + 1), "keys must lie in 1..1000000"),
    "attention no keys": (attention, at(keys=1), at(keys=0), "keys must lie in"),
    "attention batch": (attention, at(batch=2 * M), at(batch=2 * M + 1), "batch must lie in 1..2000000"),
    "attention no batch": (attention, at(batch=1), at(batch=0), "batch must lie in"),
    "attention value wider": (attention, at(value_dim=8), at(value_dim=9), "values must have head_dim 1..8, got 9"),
    "attention value empty": (attention, at(value_dim=1), at(value_dim=0), "values must have head_dim 1..8, got 0"),
    "attention key dim": (attention, at(key_dim=8), at(key_dim=4), "keys must have head_dim 8 too, got 4"),
    "attention key heads": (attention, at(key_heads=2), at(key_heads=1), "keys must have 2 heads too, got 1"),
    "packed dtype": (packed, at(dtype=torch.float16), at(dtype=torch.float64), "not float64"),
    "packed heads": (packed, at(heads=256), at(heads=257), "heads must lie in 1..256"),
    "packed head_dim": (packed, at(dim=768), at(dim=769), "head_dim must lie in 1..768"),
    "packed sequences": (packed, at(lengths=[1] * 1000), at(lengths=[1] * 1001), "sequences must lie in 1..1000"),
    "packed queries": (packed, at(lengths=(M,), key_lengths=(1,)), at(lengths=(M, 1), key_lengths=(1, 1)),
                       "queries of all sequences must lie in 1..1000000"),
    "packed keys": (packed, at(lengths=(1,), key_lengths=(M,)), at(lengths=(1, 1), key_lengths=(M, 1)),
                    "keys of all sequences must lie in 1..1000000"),
    "packed hides a row": (packed, at(key_lengths=(1, 2)), at(key_lengths=(0, 2)), "ends of the keys must rise"),
    "packed hides the last": (packed, at(key_lengths=(2, 1)), at(key_lengths=(2, 0)), "ends of the keys must rise"),
    "packed lengths": (packed, at(ends=[2, 4]), at(ends=[2, 2]), "ends of the queries must rise"),
    "packed leading 0": (packed, at(ends=[2, 4]), at(ends=[0, 4]), "ends of the queries must rise"),
    "packed rest": (packed, at(ends=[2, 4]), at(ends=[2, 3]), "last sequence of queries must end at 4, got 3"),
    "packed pairs": (packed, at(key_ends=[1, 4]), at(key_ends=[4]), "2 sequences of queries but 1 of keys"),
    "mask dtype": (lambda dtype: dropped(3, 5, dtype=dtype), at(dtype=torch.uint8), at(dtype=torch.float32),
                   "bool or uint8"),
    "mask of heads": (lambda heads: dropped(2, heads, 3, 5), at(heads=4), at(heads=2), "mask must be one of"),
    "mask of all heads": (lambda batch: dropped(batch, 1, 3, 5), at(batch=2), at(batch=3), "mask must be one of"),
    "mask of keys": (lambda shape: dropped(*shape), at(shape=(1, 1, 3, 5)), at(shape=(2, 1, 1, 5)),
                     "mask must be one of"),
    "mask of a sample": (lambda shape: dropped(*shape), at(shape=(3, 5)), at(shape=(2, 3, 5)), "mask must be one"),
    "rotary dtype": (rotary, at(dtype=torch.bfloat16), at(dtype=torch.float64), "not float64"),
    "rotary odd": (rotary, at(dim=6), at(dim=7), "head_dim must be even and below 896, got 7"),
    "rotary head_dim": (rotary, at(dim=894), at(dim=896), "head_dim must be even and below 896, got 896"),
    "rotary batch": (rotary, at(batch=999), at(batch=1000), "batch must lie in 1..999, got 1000"),
    "rotary heads": (rotary, at(heads=999), at(heads=1000), "heads must lie in 1..999, got 1000"),
    "rotary half is not bound by batch * heads": (rotary, at(batch=500, heads=2), at(heads=0), "a size is 0"),
    "rotary interleaved": (lambda **sizes: rotary(interleaved=True, **sizes), at(batch=333, heads=3),
                           at(batch=500, heads=2), "batch * heads of pairs side by side must lie in 1..999"),
    "rotary empty": (rotary, at(tokens=1), at(tokens=0), "a size is 0"),
    "rms_norm dtype": (rms_norm, at(dtype=torch.float16), at(dtype=torch.float64), "not float64"),
    "rms_norm weight": (rms_norm, at(dtype=torch.bfloat16, weight=torch.float32),
                        at(dtype=torch.bfloat16, weight=torch.float16), "weight must be torch.bfloat16 or float32"),
    "rms_norm weight narrower": (rms_norm, at(weight=torch.float32), at(weight=torch.bfloat16), "weight must be"),
    "rms_norm empty": (rms_norm, at(tokens=1), at(tokens=0), "a size is 0"),
    "gelu dtype": (gelu, at(dtype=torch.float16), at(dtype=torch.float64), "not float64"),
    "gelu axes": (gelu, at(axes=8), at(axes=9), "x must have at most 8 axes, got 9"),
    "gelu empty": (gelu, at(size=1), at(size=0), "a size is 0"),
    "group_norm dtype": (group_norm, at(dtype=torch.float16), at(dtype=torch.float64), "not float64"),
    "group_norm weight": (group_norm, at(dtype=torch.float16, weight=torch.float16),
                          at(dtype=torch.float16, weight=torch.float32), "weight and bias must be torch.float16"),
    "group_norm bias": (group_norm, at(bias=torch.float32), at(bias=torch.float16), "weight and bias must be"),
    "group_norm empty": (group_norm, at(size=1), at(size=0), "a size is 0"),
    "group_norm_backward": (group_norm_backward, at(channels=4000), at(channels=4001),
                            "channels of a group must lie in 1..4000, got 4001"),
    "group_norm_backward groups": (group_norm_backward, at(channels=8000, groups=2), at(channels=8002, groups=2),
                                   "channels of a group must lie in 1..4000, got 4001"),
    "group_norm_backward dtype": (group_norm_backward, at(channels=8), at(channels=8, dtype=torch.float64),
                                  "not float64"),
    "ring update dtype": (ring_update, at(dtype=torch.bfloat16), at(dtype=torch.int32), "not int32"),
    "ring update statistics": (ring_update, at(), at(lse=torch.float64), "statistics are float32"),
    "ring update empty": (ring_update, at(queries=1), at(queries=0), "a size is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name):
    guard, inside, outside, words = LIMITS[name]
    assert guard(**inside) is None
    assert words in (guard(**outside) or "allowed")


def test_one_dtype():
    q, k, v = qkv()
    assert "one dtype" in _guards.attention(q, k.half(), v) and "one dtype" in _guards.attention(q, k, v.half())
    assert "one dtype" in _guards.packed_attention(q[0], k[0], v[0].half(), [4], [4])


# The same through the ops: each asks the guards that its calls need.


@pytest.fixture
def installed(monkeypatch):
    """As if torch_npu were there: what is refused is refused by the limits."""
    monkeypatch.setattr(_guards, "available", lambda *names: None)


def sample(name, i=1):
    return list(ops.OPS[name].samples(torch.device("cpu"), torch.float32)[i])


def refusal(name, args):
    backend = next(b for b in ops.OPS[name].candidates("npu") if b.name == "npu_torch")
    return backend.refuse(*args)


def changed(name, i=1, **values):
    names = [a.name for a in ops.OPS[name].overload._schema.arguments]
    args = sample(name, i)
    for label, value in values.items():
        args[names.index(label)] = value
    return args


@pytest.mark.parametrize("name", SERVED)
def test_without_torch_npu_every_op_says_so(name):
    assert refusal(name, sample(name)) == "torch_npu is not imported"
    with ops.use_backend("npu_torch"), pytest.raises(ValueError, match="no backend 'npu_torch' on cpu"):
        ops.OPS[name](*sample(name))


@pytest.mark.parametrize("name", SERVED)
def test_every_op_takes_a_sample_and_refuses_float64(name, installed):
    assert refusal(name, sample(name)) is None
    double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in sample(name)]
    assert "not float64" in refusal(name, double)


def test_attention_ops_refuse_too_many_heads(installed):
    q, k, v = qkv(heads=257)
    lse = meta(1, 257, 4)
    assert "heads must lie in 1..256" in refusal("attention", (q, k, v, None, None))
    assert "heads must lie in 1..256" in refusal("attention_lse", (q, k, v, None, None))
    assert "heads must lie in 1..256" in refusal("attention_backward", (q, q, k, v, q, lse, None, None))


def skiparse(batch=1, tokens=64, heads=2, dim=8, sparse_n=4, text=0, pattern="single", text_queries=True):
    x = meta(batch, tokens, heads, dim)
    y = meta(batch, text, heads, dim) if text else None
    return (x, x, x, sparse_n, pattern, y if text_queries else None, y, y, None, None, None, False, tokens)


@pytest.mark.parametrize(
    "inside, outside, words",
    [
        (at(heads=256), at(heads=257), "heads must lie in 1..256, got 257"),  # not multiplied by the groups
        (at(dim=768), at(dim=769), "head_dim must lie in"),
        (at(tokens=4 * M), at(tokens=4 * M + 16), "queries must lie in 1..1000000, got 1000004"),  # of a group
        (at(batch=M // 2), at(batch=M // 2 + 1), "batch must lie in 1..2000000, got 2000004"),  # of all groups
        (at(tokens=3 * M, text=M // 4), at(tokens=3 * M, text=M // 4 + 1), "queries must lie in 1..1000000"),
        (at(tokens=3 * M, text=1, text_queries=False), at(tokens=3 * M, text=M // 2, text_queries=False),
         "keys must lie in 1..1000000"),
        (at(tokens=1), at(tokens=0), "queries must lie in 1..1000000, got 0"),
    ],
)  # fmt: skip
def test_skiparse_attention(installed, inside, outside, words):
    assert refusal("skiparse_attention", skiparse(**inside)) is None
    assert words in refusal("skiparse_attention", skiparse(**outside))


def test_rotary_of_samples_with_tables_of_their_own(installed):
    """These are one long sample: neither the batch nor batch * heads is bounded."""
    x, table = meta(2000, 3, 2, 8), meta(2000, 3, 4)
    assert refusal("rope_3d", (x, table, table, "interleaved", None)) is None
    assert "batch must lie in" in refusal("rope_3d", (x, table[0], table[0], "half", None))


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_qk_norm_rope_asks_for_the_rotation_too(installed, style):
    x, table = meta(1, 3, 2, 896), meta(3, 448)
    rotation = (table, table, style, None, 1)
    forward = (x, x, None, None, None, None, None, "rms", 1e-6)
    assert "below 896" in refusal("qk_norm_rope", (*forward, *rotation))
    assert "below 896" in refusal("qk_norm_rope_backward", (x, x, None, "layer", 1e-6, *rotation))
    assert refusal("qk_norm_rope", (*forward, None, None, style, None, 1)) is None


def test_group_norm_silu_backward_asks_for_the_channels_of_a_group(installed):
    x = meta(1, 8002, 2)
    assert "channels of a group" in refusal("group_norm_silu_backward", (x, x, 2, None, None, 1e-6))
    assert refusal("group_norm_silu", (x, 2, None, None, 1e-6)) is None  # the limit is that of the gradient


def test_merge_attention_has_no_gradient_there(installed):
    args = [a.requires_grad_() for a in sample("merge_attention")]
    assert "npu_ring_attention_update has no gradient" in refusal("merge_attention", args)
    with torch.no_grad():
        assert refusal("merge_attention", args) is None


# And once more where the op of torch_npu is called, for calls that are put together inside.


def test_calls_outside_of_a_limit_are_never_made():
    q, k, v = qkv(heads=257)
    with pytest.raises(ValueError, match="npu_fusion_attention: heads must lie in"):
        _fusion_attention.dense(q, k, v, 1.0)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="npu_fusion_attention: the mask must be one of"):
        _fusion_attention.dense(q, k, v, 1.0, meta(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="npu_fusion_attention: the ends of the keys must rise"):
        _fusion_attention.packed(q[0], k[0], v[0], 1.0, [2, 4], [4, 4])
    statistics = _fusion_attention.statistics(meta(1, 2, 4))
    with pytest.raises(ValueError, match="npu_fusion_attention_grad: the mask must be bool"):
        _fusion_attention.gradients(q, k, v, q, 1.0, meta(1, 1, 4, 4), *statistics, q)


def test_an_op_that_this_version_lacks_is_named(monkeypatch):
    class Registered:
        npu_format_cast = npu_rms_norm = None

    monkeypatch.setattr(torch.ops, "npu", Registered)
    assert _guards.available("npu_rms_norm") is None
    assert _guards.available("npu_rms_norm", "npu_rotary_mul") == "this torch_npu has no npu_rotary_mul"
