# SPDX-License-Identifier: Apache-2.0
"""The documented limits of torch_npu's fused ops: the reason why arguments lie outside of them, or None.

The ops themselves do not look (their meta kernels take a head_dim of 1000 and a mask of any shape), so these functions
are all that stands between a call that the documents do not cover and the device. They read shapes and dtypes only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, HEAD_DIM = 256, 768
TOKENS = 1_000_000  # of one sequence; with packed sequences, of all together
BATCH, SEQUENCES = 2_000_000, 1000  # packed ones may be 2000, but 1000 is what the documents recommend
ROTARY_DIM, ROTARY_SIZE = 896, 1000  # both excluded
GROUP_CHANNELS = 4000


def first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def available(*names: str) -> str | None:
    """Whether torch_npu has registered these ops in this process; ops come and go with its versions."""
    missing = [name for name in names if not hasattr(torch.ops.npu, name)]
    if not missing:
        return None
    registered = hasattr(torch.ops.npu, "npu_format_cast")  # every version has it
    return f"this torch_npu has no {missing[0]}" if registered else "torch_npu is not imported"


def dtype(t: Tensor) -> str | None:
    if t.dtype in DTYPES:
        return None
    return f"torch_npu's op takes float32, float16 and bfloat16, not {str(t.dtype).removeprefix('torch.')}"


def within(what: str, value: int, most: int) -> str | None:
    """1 is the least in every documented range."""
    return None if 1 <= value <= most else f"{what} must lie in 1..{most}, got {value}"


def not_empty(*tensors: Tensor) -> str | None:
    return "a size is 0" if any(0 in t.shape for t in tensors) else None


def attention(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """npu_fusion_attention in the layout BSND: (batch, sequence, heads, head_dim)."""
    return first(
        (
            dtype(q),
            None if q.dtype == k.dtype == v.dtype else f"q, k and v must have one dtype, got {k.dtype} and {v.dtype}",
            within("batch", q.shape[0], BATCH),
            within("queries", q.shape[1], TOKENS),
            within("keys", k.shape[1], TOKENS),
            heads_and_dim(q, k, v),
        )
    )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], key_ends: Sequence[int]) -> str | None:
    """The same in the layout TND: (tokens of all sequences, heads, head_dim) and where each sequence ends."""
    return first(
        (
            dtype(q),
            None if q.dtype == k.dtype == v.dtype else f"q, k and v must have one dtype, got {k.dtype} and {v.dtype}",
            within("sequences", len(ends), SEQUENCES),
            None if len(ends) == len(key_ends) else f"{len(ends)} sequences of queries but {len(key_ends)} of keys",
            within("queries of all sequences", q.shape[0], TOKENS),
            within("keys of all sequences", k.shape[0], TOKENS),
            sequence_ends("queries", q.shape[0], ends),
            sequence_ends("keys", k.shape[0], key_ends),
            heads_and_dim(q, k, v),
        )
    )


def sequence_ends(what: str, tokens: int, ends: Sequence[int]) -> str | None:
    """Cumulative lengths without the leading 0. An empty sequence of keys would hide whole rows, which TND forbids."""
    if any(b <= a for a, b in itertools.pairwise((0, *ends))):
        return f"the ends of the {what} must rise from above 0, got {list(ends)}"
    return None if ends[-1] == tokens else f"the last sequence of {what} must end at {tokens}, got {ends[-1]}"


def heads_and_dim(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    heads, dim = q.shape[-2:]
    return first(
        (
            within("heads", heads, HEADS),
            # Fewer heads of keys than of queries are documented too, but no op here has them.
            None if k.shape[-2] == heads == v.shape[-2] else f"keys must have {heads} heads too, got {k.shape[-2]}",
            within("head_dim", dim, HEAD_DIM),
            None if k.shape[-1] == dim else f"keys must have head_dim {dim} too, got {k.shape[-1]}",
            None if 1 <= v.shape[-1] <= dim else f"values must have head_dim 1..{dim}, got {v.shape[-1]}",
        )
    )


def dropped(drop: Tensor, q: Tensor, k: Tensor) -> str | None:
    """A mask as npu_fusion_attention takes it, beside q and k in BSND."""
    batch, queries, heads, _ = q.shape
    forms = [(*lead, queries, k.shape[1]) for lead in ((batch, heads), (batch, 1), (1, 1), ())]
    if drop.dtype not in (torch.bool, torch.uint8):
        return f"the mask must be bool or uint8, got {drop.dtype}"
    return None if tuple(drop.shape) in forms else f"the mask must be one of {forms}, got {tuple(drop.shape)}"


def rotary(x: Tensor, interleaved: bool, as_one_sample: bool = False) -> str | None:
    """npu_rotary_mul in the layout BSND, with tables that have one row for every position: 1S1D."""
    batch, _, heads, dim = x.shape
    batch = min(batch, 1) if as_one_sample else batch
    return first(
        (
            dtype(x),
            not_empty(x),
            None if dim % 2 == 0 and dim < ROTARY_DIM else f"head_dim must be even and below {ROTARY_DIM}, got {dim}",
            within("batch", batch, ROTARY_SIZE - 1),
            within("heads", heads, ROTARY_SIZE - 1),
            within("batch * heads of pairs side by side", batch * heads, ROTARY_SIZE - 1) if interleaved else None,
        )
    )


def rms_norm(x: Tensor, weight: Tensor | None) -> str | None:
    """npu_rms_norm over the last axis."""
    fits = weight is None or weight.dtype in (x.dtype, torch.float32)
    wanted = f"the weight must be {x.dtype} or float32"
    return first((dtype(x), not_empty(x), None if fits or weight is None else f"{wanted}, got {weight.dtype}"))


def gelu(x: Tensor) -> str | None:
    """npu_gelu."""
    return first((dtype(x), not_empty(x), None if x.dim() <= 8 else f"x must have at most 8 axes, got {x.dim()}"))


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """npu_group_norm_swish."""
    other = next((t for t in (weight, bias) if t is not None and t.dtype != x.dtype), None)
    named = None if other is None else f"weight and bias must be {x.dtype} too, got {other.dtype}"
    return first((dtype(x), not_empty(x), named))


def group_norm_backward(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> str | None:
    return group_norm(x, weight, bias) or within("channels of a group", x.shape[1] // num_groups, GROUP_CHANNELS)


def ring_update(out: Tensor, lse: Tensor) -> str | None:
    """npu_ring_attention_update in the layout SBH, with statistics in float32."""
    statistics = None if lse.dtype == torch.float32 else f"statistics are float32 there, not {lse.dtype}"
    return first((dtype(out), statistics, not_empty(out)))
