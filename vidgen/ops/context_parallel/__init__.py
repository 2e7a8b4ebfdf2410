# SPDX-License-Identifier: Apache-2.0
"""Attention over the ranks of a ``torch.distributed`` process group: ``from vidgen.ops import context_parallel``.

Plain functions of tensors and process groups, whoever made the groups. See docs/context_parallel.md.
"""

from .group_parallel import move_tokens, skiparse_group_parallel
from .layout import Groups, Shards, shard_sizes, skiparse_multiple
from .ring import ring_attention
from .ulysses import ulysses_attention
from .usp import usp_attention
from .volume import group_parallel_volume, ring_volume, ulysses_volume

__all__ = [
    "Groups",
    "Shards",
    "group_parallel_volume",
    "move_tokens",
    "ring_attention",
    "ring_volume",
    "shard_sizes",
    "skiparse_group_parallel",
    "skiparse_multiple",
    "ulysses_attention",
    "ulysses_volume",
    "usp_attention",
]
