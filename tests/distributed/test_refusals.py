# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are refused by all ranks, with words that help, and none is left waiting for another."""

import pytest

from .pool import Pool

REFUSALS = {
    "no group": "group must be a ProcessGroup that this process is in, got None",
    "not in it": "group must be a ProcessGroup that this process is in",
    "heads differ": "heads must be the same on all ranks, got [3, 4]",
    "dtypes differ": "dtype must be the same on all ranks, got ['torch.float32', 'torch.float64']",
    "text differs": "text tokens must be the same on all ranks, got [3, 2]",
    "one has text": "text tokens must be the same on all ranks, got [3, -1]",
    "one has a mask": "masks must be the same on all ranks, got [0, 1]",
    "masks differ": "mask tokens must be the same on all ranks, got [8, 7]",
    "patterns differ": "pattern must be the same on all ranks, got [0, 1]",
    "short mask": "mask must be (2, 8) of bool, the tokens of all ranks, got (2, 7)",
    "float mask": "mask must be (2, tokens) of bool",
    "short text mask": "text_mask must be (2, 3) of bool",
    "too few sizes": "sizes must be 2 token counts, one a rank, got (4,)",
    "other sizes": "sizes says 5 tokens for rank",
    "other text sizes": "text_sizes says 2 tokens for rank",
    "half a text": "text_k and text_v go together",
    "text mask only": "text_mask and text_sizes need text_k and text_v",
    "other heads of text": "text must match q",
    "misplaced shards": "shard 1 of (4, 4) does not begin where a round of 4 groups does",
    "window": "window must divide the 2 ranks of the ring, got 3",
    "order": "order must be one of",
    "same groups": "must share this rank only, got [0, 1]",
    "ranks of a placement": "target is for 1 ranks, the group has 2",
    "lengths of placements": "source has 8 tokens, target 6",
    "rows of a placement": "x must be (batch, 4, ...)",
    "rows of groups": "placement gives rank",
    "mask of groups": "mask must be (2, 8) of bool",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_all_ranks_refuse(pool: Pool, what: str) -> None:
    for words in pool.run("refusal", 2, what=what):
        assert REFUSALS[what] in words


def test_others_hear_of_a_refusal(pool: Pool) -> None:
    first, last = pool.run("refusal", 2, what="one refuses")
    assert "the arguments of rank 1 of the group were refused" in first
    assert "k must be (2, keys, 3, 4)" in last or "k and v must have q's shape" in last
