# SPDX-License-Identifier: Apache-2.0
"""Attention over the ranks of a ``torch.distributed`` process group: ``from vidgen.ops import context_parallel``.

Plain functions of tensors and process groups; whoever made the groups, Megatron, MindSpeed-MM, a DeviceMesh or
``torch.distributed.new_group``, is fine. See docs/context_parallel.md.
"""

from .layout import Groups, Shards, shard_sizes, skiparse_multiple
from .ulysses import ulysses_attention

__all__ = ["Groups", "Shards", "shard_sizes", "skiparse_multiple", "ulysses_attention"]
