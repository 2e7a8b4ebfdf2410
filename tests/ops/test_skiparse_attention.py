# SPDX-License-Identifier: Apache-2.0
"""What the battery does not see: the table itself, that nothing is copied, and that text and padding are as stated."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vidgen import ops
from vidgen.ops.skiparse_index import groups_to_tokens, tokens_to_groups

COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::index", "aten::gather", "aten::pad"}


def qkv(*shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def operators(f):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        f()
    return {event.key for event in seen.key_averages()}


def members(group, g):
    return torch.nonzero(group == g).flatten().tolist()


def test_groups_of_eight_tokens():
    """The worked example of the reference: ratio 2."""
    single, _ = ops.skiparse_index(8, 2, "single")
    group, _ = ops.skiparse_index(8, 2, "group")
    assert [members(single, g) for g in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [members(group, g) for g in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("pattern", ["single", "group"])
@pytest.mark.parametrize("tokens, k", [(1, 1), (16, 2), (17, 2), (45, 4), (70, 8), (20, 3), (0, 4)])
def test_layout_follows_the_table(tokens, k, pattern):
    group, position = ops.skiparse_index(tokens, k, pattern)
    x = torch.arange(1, tokens + 1)[None, :, None].float()
    groups = tokens_to_groups(x, k, pattern)
    assert groups.shape == (1, k, ops.skiparse_padded_length(tokens, k) // k, 1)
    assert torch.equal(groups[0, group, position], x[0])
    assert groups.count_nonzero() == tokens, "padding is zero"
    assert torch.equal(groups_to_tokens(groups, tokens, pattern), x)


@pytest.mark.parametrize("k, pattern", [(0, "single"), (2, "triple")])
def test_index_refuses(k, pattern):
    with pytest.raises(ValueError, match="skiparse_index: "):
        ops.skiparse_index(8, k, pattern)


def copied(f, at_least=1):
    """How many elements are copied, not counting what is smaller than ``at_least``: masks and text queries."""
    into = ("aten::copy_", "vidgen::skiparse_groups")  # what the others of COPIES come down to
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        f()
    sizes = [math.prod(event.input_shapes[0]) for event in seen.events() if event.name in into]
    return sum(size for size in sizes if size >= at_least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_single_skip_copies_nothing(batch, dtype):
    q, k, v = qkv(batch, 64, 2, 16, dtype=dtype)
    call = lambda: ops.skiparse_attention(q, k, v, sparse_n=4, pattern="single")  # noqa: E731
    seen = operators(call)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen
    assert not seen & COPIES


@pytest.mark.parametrize("packed", ["v", "qkv"])
def test_single_skip_of_packed_projections(packed):
    """Heads and groups of a part of a packed projection are no one axis: of one sample heads become samples instead, of
    a batch each such part is copied once."""
    for batch, copies in ((1, 0), (2, len(packed))):
        parts = torch.randn(batch, 64, 3, 2, 16).unbind(2)
        q, k, v = parts if packed == "qkv" else (*qkv(batch, 64, 2, 16)[:2], parts[2])
        call = lambda: ops.skiparse_attention(q, k, v, sparse_n=4, pattern="single")  # noqa: B023, E731
        assert copied(call) == copies * v.numel()
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators(call)
        expected = ops.skiparse_attention(*(t.contiguous() for t in (q, k, v)), sparse_n=4, pattern="single")
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_parts_with_a_mask_and_gradients(masked):
    whole = torch.randn(1, 16, 3, 2, 4, requires_grad=True)
    mask = torch.rand(1, 16) < 0.7 if masked else None
    results = []
    for parts in (whole.unbind(2), [t.contiguous() for t in whole.unbind(2)]):
        out = ops.skiparse_attention(*parts, sparse_n=2, pattern="single", mask=mask)
        (grad,) = torch.autograd.grad(out.square().sum(), whole)
        results.append((out, grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("pattern", ["single", "group"])
@pytest.mark.parametrize("tokens", [64, 70])
@pytest.mark.parametrize("text", [0, 3])
def test_whatever_must_be_copied_is_copied_once(pattern, tokens, text, native):
    """Layout, padding and the text behind each group are written in one pass."""
    q, k, v = qkv(2, tokens, 2, 16)
    named = dict(zip(("text_q", "text_k", "text_v"), qkv(2, text, 2, 16), strict=True)) if text else {}
    call = lambda: ops.skiparse_attention(q, k, v, sparse_n=4, pattern=pattern, **named)  # noqa: E731
    moved = pattern == "group" or tokens != 64
    inputs = (3 if moved else 2 if text else 0) * q.numel()
    result = q.new_empty(2, ops.skiparse_padded_length(tokens, 4), 2, 16).numel() if pattern == "group" else 0
    assert copied(call, at_least=q.numel()) == inputs + result
    if tokens == 64:  # nor joined otherwise; with padding masks are
        assert not operators(call) & {"aten::cat", "aten::index", "aten::pad"}


def test_grouped_input_leaves_one_copy_of_the_result():
    q, k, v = qkv(2, 64, 2, 16)
    call = lambda: ops.skiparse_attention(q, k, v, sparse_n=4, pattern="group", grouped=True)  # noqa: E731
    assert copied(call) == q.numel()
    assert not operators(call) & {"aten::cat", "aten::index", "aten::pad"}


def test_no_mask_is_built_where_nothing_is_hidden():
    q, k, v = qkv(1, 64, 2, 16)
    text = qkv(1, 3, 2, 16)
    named = dict(zip(("text_q", "text_k", "text_v"), text, strict=True))
    for pattern in ("single", "group"):
        seen = operators(lambda p=pattern: ops.skiparse_attention(q, k, v, sparse_n=4, pattern=p, **named))
        assert not seen & {"aten::ones", "aten::where", "aten::masked_fill_"}


@pytest.mark.parametrize("pattern", ["single", "group"])
def test_ratio_one_is_dense_attention(pattern):
    q, k, v = qkv(2, 7, 2, 4)
    dense = ops.attention(q, k, v)
    torch.testing.assert_close(ops.skiparse_attention(q, k, v, sparse_n=1, pattern=pattern), dense)


@pytest.mark.parametrize("pattern", ["single", "group"])
def test_each_group_is_dense_attention_over_itself_and_the_text(pattern):
    q, k, v = qkv(2, 11, 2, 4)
    text_q, text_k, text_v = qkv(2, 3, 2, 4)
    mask, text_mask = torch.rand(2, 11) < 0.7, torch.rand(2, 3) < 0.7
    visual, text = ops.skiparse_attention(
        q, k, v, sparse_n=2, pattern=pattern, text_q=text_q, text_k=text_k, text_v=text_v, mask=mask,
        text_mask=text_mask,
    )  # fmt: skip
    group, _ = ops.skiparse_index(11, 2, pattern)
    texts = []
    for g in range(2):
        own = group == g
        joint = [torch.cat((x[:, own], t), 1) for x, t in ((q, text_q), (k, text_k), (v, text_v))]
        out = ops.attention(*joint, mask=torch.cat((mask[:, own], text_mask), 1))
        torch.testing.assert_close(visual[:, own], out[:, :-3])
        texts.append(out[:, -3:])
    torch.testing.assert_close(text, torch.stack(texts).mean(0))


def test_layout_of_qk_norm_rope_is_the_one_that_grouped_means():
    q, k, v = qkv(2, 11, 2, 16)
    weight = torch.randn(16)
    cos, sin = ops.rope_3d_table((11, 1, 1), (4, 6, 6))
    options = {"q_weight": weight, "k_weight": weight, "cos": cos, "sin": sin, "sections": (4, 6, 6)}
    plain = ops.qk_norm_rope(q, k, v, **options)
    moved = ops.qk_norm_rope(q, k, v, sparse_n=3, **options)
    expected = ops.skiparse_attention(*plain, sparse_n=3, pattern="group")
    got = ops.skiparse_attention(*moved, sparse_n=3, pattern="group", grouped=True, num_tokens=11)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pattern": "single", "grouped": True}, "grouped is for pattern 'group'"),
        ({"pattern": "other"}, "pattern must be one of"),
        ({"sparse_n": 0}, "sparse_n must be 1 or more"),
        ({"text_q": torch.zeros(1, 3, 2, 4)}, "text_k and text_v go together"),
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, r"mask must be \(1, 8\) of bool"),
        ({"grouped": True, "num_tokens": 3}, "8 rows do not hold num_tokens=3"),
    ],
)
def test_refusals_name_the_argument(change, words):
    q, k, v = qkv(1, 8, 2, 4)
    with pytest.raises(ValueError, match=words):
        ops.skiparse_attention(q, k, v, **{"sparse_n": 2, "pattern": "group", **change})


def test_log_sum_exp_merges_parts_of_the_keys():
    q, k, v = qkv(2, 5, 2, 4)
    whole, lse = ops.attention(q, k, v, return_lse=True)
    (a, lse_a), (b, lse_b) = (ops.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(2), slice(2, 5)))
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    weigh = lambda part: (part - lse).exp().transpose(1, 2).unsqueeze(-1)  # noqa: E731
    torch.testing.assert_close(a * weigh(lse_a) + b * weigh(lse_b), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_may_attend_to_nothing_gets_zero(dtype):
    q, k, v = qkv(1, 2, 1, 4, dtype=dtype)
    q.requires_grad_()
    mask = torch.tensor([[[True, False], [False, False]]])
    out, lse = ops.attention(q, k, v, mask=mask, return_lse=True)
    for result in (out, ops.attention(q, k, v, mask=mask)):
        assert result[:, 0].count_nonzero() and not result[:, 1].count_nonzero()
        (grad,) = torch.autograd.grad(result.sum(), q, retain_graph=True)
        assert grad.isfinite().all() and not grad[:, 1].count_nonzero()
    assert lse.isfinite().tolist() == [[[True, False]]] and lse[0, 0, 1] == -torch.inf
