# SPDX-License-Identifier: Apache-2.0
"""What the processes of pool.py run: each case gets a group of its ranks, and returns plain Python.

All ranks draw the same whole problem, solve it alone, solve their part of it together and compare.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen import ops
from vidgen.ops import context_parallel as cp
from vidgen.ops.context_parallel import exchange

Group = dist.ProcessGroup
Errors = dict[str, float]
Parallel = Callable[..., Any]


def draw_problem(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    *,
    text: int = 0,
    text_queries: bool = True,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Inputs of attention, of the whole sequence. The first sample's mask hides everything but a little."""
    random = torch.Generator().manual_seed(seed)

    def normal(length: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=random, dtype=torch.float32).to(dtype)

    def some(length: int) -> Tensor:
        mask = torch.rand(batch, length, generator=random) < 0.6
        mask[0] = False
        mask[0, length // 2 : length // 2 + 1] = True
        return mask

    problem: dict[str, Tensor | None] = {name: normal(tokens) for name in ("q", "k", "v")}
    for name in ("text_q", "text_k", "text_v"):
        problem[name] = normal(text) if text and (text_queries or name != "text_q") else None
    problem["mask"] = some(tokens) if masked else None
    problem["text_mask"] = some(text) if masked and text else None
    return problem


def alone(problem: dict[str, Tensor | None], upstream: list[Tensor], **options: Any) -> tuple[list[Tensor], Errors]:
    """Outputs and gradients of one process."""
    leaves = {name: t.clone().requires_grad_() for name, t in problem.items() if is_input(t)}
    out = ops.skiparse_attention(**{**problem, **leaves}, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, upstream)
    return [o.detach() for o in outs], {name: leaf.grad for name, leaf in leaves.items()}


def is_input(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def compare(
    group: Group,
    attend: Parallel,
    problem: dict[str, Tensor | None],
    tokens: list[Tensor],
    text_tokens: list[Tensor] | None,
    rank: int,
    *,
    relative: bool = False,
    strided: bool = False,
    **options: Any,
) -> Errors:
    """Largest differences from one process, of outputs and of gradients of every input (``relative`` to the largest).

    ``tokens`` says which tokens each rank holds, ``text_tokens`` the same of the text; None: all of it.
    """
    ranks = len(tokens)
    random = torch.Generator().manual_seed(99)
    q, text_q = problem["q"], problem["text_q"]
    assert q is not None
    grad = torch.randn(q.shape, generator=random, dtype=torch.float32).to(q.dtype)
    grads, own_grads = [grad], [grad[:, tokens[rank]]]
    if text_q is not None:
        each = torch.randn(ranks, *text_q.shape, generator=random, dtype=torch.float32).to(q.dtype)
        grads.append(each.sum(0) if text_tokens is None else each[0])
        own_grads.append(each[rank] if text_tokens is None else each[0][:, text_tokens[rank]])
    expected, expected_grads = alone(problem, grads, **options)

    def laid_out(t: Tensor) -> Tensor:
        """The same values, with head_dim outermost."""
        return t.movedim(3, 0).contiguous().movedim(0, 3) if strided else t

    own_grads = [laid_out(grad) for grad in own_grads]
    own: dict[str, Any] = {}
    for name, t in problem.items():
        if name in ("mask", "text_mask") or t is None:
            own[name] = t
        elif name.startswith("text") and text_tokens is None:
            own[name] = laid_out(t.clone()).requires_grad_()
        else:
            assert text_tokens is not None or not name.startswith("text")
            mine = text_tokens[rank] if name.startswith("text") and text_tokens is not None else tokens[rank]
            own[name] = laid_out(t[:, mine]).requires_grad_()
    out = attend(**own, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, own_grads)

    errors: Errors = {}
    for name, got, want in zip(("out", "text_out"), outs, expected, strict=False):
        mine = tokens[rank] if name == "out" else text_tokens[rank] if text_tokens else slice(None)
        errors[name] = difference(got.detach(), want[:, mine])
    for name, want in expected_grads.items():
        got = own[name].grad
        if name.startswith("text") and text_tokens is None:
            dist.all_reduce(got, group=group)
            mine = slice(None)
        else:
            mine = text_tokens[rank] if name.startswith("text") and text_tokens is not None else tokens[rank]
        errors[f"grad of {name}"] = difference(got, want[:, mine]) / (want.abs().max().item() if relative else 1)
    assert len(outs) == len(expected)
    return errors


def difference(a: Tensor, b: Tensor) -> float:
    """NaN where one is; an error of shape where they differ in it."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def placed(sizes: tuple[int, ...]) -> list[Tensor]:
    return list(torch.arange(sum(sizes)).split(list(sizes)))


GROUPS: dict[tuple[int, ...], Group] = {}


def make_groups(world: int, timeout: datetime.timedelta) -> None:
    """All groups of consecutive or evenly spaced ranks; every process has to make all of them."""
    for count in range(1, world + 1):
        for step in range(1, world):
            for first in range(world - (count - 1) * step):
                ranks = tuple(range(first, first + count * step, step))
                if ranks not in GROUPS:
                    GROUPS[ranks] = dist.new_group(list(ranks), timeout=timeout)


def grid(group: Group, inner: int) -> tuple[Group, Group]:
    """This rank's group of ``inner`` consecutive ranks, and that of the ranks at the same place of theirs."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    first = rank - rank % inner
    return GROUPS[tuple(range(first, first + inner))], GROUPS[tuple(range(rank % inner, ranks, inner))]


def attention(
    group: Group,
    mode: str,
    shape: tuple[int, int, int, int],
    *,
    text: int = 0,
    shard_text: bool = False,
    text_queries: bool = True,
    masked: bool = False,
    tell_sizes: bool = True,
    sizes: tuple[int, ...] | None = None,
    sparse_n: int = 1,
    pattern: str = "single",
    inner: int = 1,
    relative: bool = False,
    strided: bool = False,
    dtype: str = "float32",
    **parallel: Any,
) -> Errors:
    """``mode`` is ulysses, ring, ulysses_inner or ring_inner; ``inner`` the size of the inner group of the latter."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    kinds: dict[str, Any] = {"text": text, "text_queries": text_queries, "masked": masked}
    problem = draw_problem(1, *shape, **kinds, dtype=getattr(torch, dtype))
    sizes = sizes or cp.shard_sizes(shape[1], ranks, 1 if mode == "ulysses" else cp.skiparse_multiple([sparse_n]))
    text_sizes = cp.shard_sizes(text, ranks) if shard_text else None
    parallel.update(sizes=sizes if tell_sizes else None, text_sizes=text_sizes)

    def attend(*, q: Tensor, k: Tensor, v: Tensor, **own: Any) -> Any:
        own.update(parallel)
        if mode == "ulysses":
            return cp.ulysses_attention(q, k, v, group, **own)
        if mode == "ring":
            return cp.ring_attention(q, k, v, group, **own)
        near, far = grid(group, inner)
        groups = (near, far) if mode == "ulysses_inner" else (far, near)
        return cp.usp_attention(q, k, v, *groups, order=mode, **own)

    text_tokens = placed(text_sizes) if text_sizes else None
    options = {"sparse_n": sparse_n, "pattern": pattern, "relative": relative, "strided": strided}
    return compare(group, attend, problem, placed(sizes), text_tokens, rank, **options)


def group_parallel(
    group: Group,
    shape: tuple[int, int, int, int],
    *,
    sparse_n: int,
    pattern: str,
    text: int = 0,
    text_queries: bool = True,
    masked: bool = False,
    strided: bool = False,
    dtype: str = "float32",
) -> Errors:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    kinds: dict[str, Any] = {"text": text, "text_queries": text_queries, "masked": masked}
    problem = draw_problem(1, *shape, **kinds, dtype=getattr(torch, dtype))
    placement = cp.Groups(shape[1], sparse_n, pattern, ranks)

    def attend(*, q: Tensor, k: Tensor, v: Tensor, sparse_n: int, pattern: str, **own: Any) -> Any:
        return cp.skiparse_group_parallel(q, k, v, placement, group, **own)

    tokens = [placement.tokens(rank) for rank in range(ranks)]
    options = {"sparse_n": sparse_n, "pattern": pattern, "strided": strided}
    return compare(group, attend, problem, tokens, None, rank, **options)


def text_of_groups(group: Group, sparse_n: int) -> list[float]:
    """The text's result of group parallelism in bfloat16."""
    random = torch.Generator().manual_seed(1)
    placement = cp.Groups(40, sparse_n, "group", dist.get_world_size(group))
    q, text = (torch.randn(1, n, 3, 8, generator=random).bfloat16() for n in (40, 5))
    q = q[:, placement.tokens(dist.get_rank(group))]
    _, out = cp.skiparse_group_parallel(q, q, q, placement, group, text_q=text, text_k=text, text_v=text)
    return out.flatten().tolist()


def layers(group: Group, tokens: int, ratios: list[int], text: int, masked: bool = False) -> Errors:
    """Layers of a small Skiparse network, in single-skip and group-skip by turns, some of them dense: the stream moves
    from shards through the placements and back. Compares the streams and the gradients of inputs and weights."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    batch, heads, dim = 2, 3, 4
    width = heads * dim
    random = torch.Generator().manual_seed(5)
    x, y = (torch.randn(batch, n, width, generator=random) for n in (tokens, text))
    weights = torch.randn(len(ratios), 2, 3, width, width, generator=random) * width**-0.5
    grad = torch.randn(batch, tokens, width, generator=random)
    text_grads = torch.randn(ranks, batch, text, width, generator=random)
    mask = draw_problem(2, batch, tokens, 1, 1, masked=masked)["mask"]

    def run(x: Tensor, y: Tensor, weights: Tensor, attend: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        for i, ratio in enumerate(ratios):
            x, out, text_out = attend(x, y, weights[i], ratio, "group" if i % 2 else "single")
            x, y = x + out.flatten(2), y + text_out.flatten(2)
        return x, y

    def project(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
        names = ("q", "k", "v", "text_q", "text_k", "text_v")
        both = [t @ w for t, three in ((x, weights[0]), (y, weights[1])) for w in three]
        return {name: t.unflatten(-1, (heads, dim)) for name, t in zip(names, both, strict=True)}

    def whole(x: Tensor, y: Tensor, weights: Tensor, ratio: int, pattern: str) -> Any:
        out = ops.skiparse_attention(**project(x, y, weights), sparse_n=ratio, pattern=pattern, mask=mask)
        return x, *out

    shards = cp.Shards(cp.shard_sizes(tokens, ranks))
    where: list[Any] = [shards]

    def spread(x: Tensor, y: Tensor, weights: Tensor, ratio: int, pattern: str) -> Any:
        if ratio == 1:  # dense attention takes the tokens as they lie
            sizes = [len(where[-1].tokens(r)) for r in range(ranks)]
            order = torch.cat([where[-1].tokens(r) for r in range(ranks)])
            shown = None if mask is None else mask[:, order]
            return x, *cp.ulysses_attention(**project(x, y, weights), group=group, sizes=sizes, mask=shown)
        where.append(cp.Groups(tokens, ratio, pattern, ranks))
        x = cp.move_tokens(x, where[-2], where[-1], group)
        qkv = project(x, y, weights)
        out = cp.skiparse_group_parallel(**qkv, placement=where[-1], group=group, mask=mask)
        return x, *out

    leaves = [t.clone().requires_grad_() for t in (x, y, weights)]
    expected = run(*leaves, whole)
    torch.autograd.backward(expected, [grad, text_grads.sum(0)])
    own = [t.clone().requires_grad_() for t in (x[:, shards.tokens(rank)], y, weights)]
    out, text_out = run(*own, spread)
    out = cp.move_tokens(out, where[-1], shards, group)
    torch.autograd.backward([out, text_out], [grad[:, shards.tokens(rank)], text_grads[rank]])
    for part in own[1:]:
        dist.all_reduce(part.grad, group=group)
    errors = {
        "out": difference(out.detach(), expected[0].detach()[:, shards.tokens(rank)]),
        "text_out": difference(text_out.detach(), expected[1].detach()),
    }
    for name, mine, leaf in zip(("x", "y", "weights"), own, leaves, strict=True):
        want = leaf.grad[:, shards.tokens(rank)] if name == "x" else leaf.grad
        # Relative: few keys are shown, whose gradients so are large.
        errors[f"grad of {name}"] = difference(mine.grad, want) / leaf.grad.abs().max().item()
    return errors


def moves(group: Group, seed: int) -> bool:
    """Random placements, one after the other: each rank always holds what the placement says, in its order."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    random = Random(seed)
    for _ in range(20):
        tokens = random.choice((0, 1, 5, 16, 33, 100))
        x = torch.stack((torch.arange(tokens), 1000 + torch.arange(tokens))).unsqueeze(-1).expand(-1, -1, 3)
        cuts = sorted(random.choices(range(tokens + 1), k=ranks - 1))
        uneven = tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))
        course: list[Any] = [cp.Shards(uneven), cp.Shards(cp.shard_sizes(tokens, ranks, random.choice((1, 4, 9))))]
        course += [cp.Groups(tokens, random.randint(1, 9), random.choice(("single", "group")), ranks) for _ in range(4)]
        random.shuffle(course)
        here = x[:, course[0].tokens(rank)]
        for source, target in zip(course, course[1:], strict=False):
            here = cp.move_tokens(here, source, target, group)
            if not torch.equal(here, x[:, target.tokens(rank)]):
                return False
    return True


def precision(group: Group) -> dict[str, tuple[float, float]]:
    """Squared errors in bfloat16 against float64: of a ring's shard here, and of PyTorch's attention in one process."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    random = torch.Generator().manual_seed(3)
    *given, grad = (torch.randn(1, 512, 2, 64, generator=random).bfloat16() for _ in range(4))

    def dense(*tensors: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    shard = torch.arange(512).chunk(ranks)[rank]
    truth = dense(*(t.double() for t in given))
    own = [t[:, shard].requires_grad_() for t in given]
    out = cp.ring_attention(*own, group)
    ring = [out.detach(), *torch.autograd.grad(out, own, grad[:, shard])]
    return {
        name: ((a - true[:, shard]).square().sum().item(), (b - true).square().sum().item())
        for name, a, b, true in zip(("out", "q", "k", "v"), ring, dense(*given), truth, strict=True)
    }


def overlap(group: Group, window: int) -> list[tuple[str, int]]:
    """What a ring does in turn: each block of attention, and how many hops are under way at that time."""
    from vidgen.ops.context_parallel import ring

    events: list[tuple[str, int]] = []
    under_way: set[Any] = set()
    originals = ring.Hop.__init__, ring.Hop.wait, ring.attend, ring.attend_backward

    def start(self: Any, *args: Any) -> None:
        originals[0](self, *args)
        under_way.add(self)

    def wait(self: Any) -> Tensor:
        under_way.remove(self)
        return originals[1](self)

    def forward(*args: Any) -> Any:
        events.append(("forward", len(under_way)))
        return originals[2](*args)

    def backward(*args: Any) -> Any:
        events.append(("backward", len(under_way)))
        return originals[3](*args)

    ring.Hop.__init__, ring.Hop.wait, ring.attend, ring.attend_backward = start, wait, forward, backward
    try:
        q = torch.randn(1, 3, 2, 4, requires_grad=True)
        cp.ring_attention(q, q, q, group, window=window).sum().backward()
    finally:
        ring.Hop.__init__, ring.Hop.wait, ring.attend, ring.attend_backward = originals
    assert not under_way
    return events


def sampling(group: Group) -> Errors:
    """All modes without autograd, on groups that a DeviceMesh made."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("ring", "ulysses"))
    problem = draw_problem(1, 2, 23, 3, 4, text=5)
    errors = {}
    with torch.inference_mode():
        expected, expected_text = ops.skiparse_attention(**problem, sparse_n=2, pattern="group")
        sizes = cp.shard_sizes(23, ranks, 4)
        mine, placement = placed(sizes)[rank], cp.Groups(23, 2, "group", ranks)
        grouped = placement.tokens(rank)
        text = {name: problem[name] for name in ("text_q", "text_k", "text_v")}
        q, k, v = (problem[name] for name in "qkv")
        own = [t[:, mine] for t in (q, k, v)]
        options = {**text, "sizes": sizes, "sparse_n": 2, "pattern": "group"}
        pairs = mesh["ulysses"].get_group(), mesh["ring"].get_group()
        for name, tokens, (out, text_out) in (
            ("ulysses", mine, cp.ulysses_attention(*own, group, **options)),
            ("ring", mine, cp.ring_attention(*own, group, **options)),
            ("both", mine, cp.usp_attention(*own, *pairs, **options)),
            (
                "groups",
                grouped,
                cp.skiparse_group_parallel(*(t[:, grouped] for t in (q, k, v)), placement, group, **text),
            ),
        ):
            errors[name] = difference(out, expected[:, tokens])
            errors[f"text of {name}"] = difference(text_out, expected_text)
    return errors


def second_group(group: Group) -> Errors:
    """Hops between windows in a group of their own."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    problem, sizes = draw_problem(4, 1, 14, 2, 4, text=3), cp.shard_sizes(14, ranks)

    def attend(*, q: Tensor, k: Tensor, v: Tensor, **own: Any) -> Any:
        own.update(window=2, window_group=dist.group.WORLD)
        return cp.ring_attention(q, k, v, group, sizes=sizes, **own)

    return compare(group, attend, problem, placed(sizes), None, rank, sparse_n=1, pattern="single")


# Bytes


class Counted:
    """Counts the bytes that this rank gives to others, and the collectives of context parallelism that it calls."""

    def __init__(self, group: Group) -> None:
        self.group, self.bytes, self.calls = group, 0, 0

    def __enter__(self) -> Counted:
        self.originals = dist.all_to_all_single, dist.batch_isend_irecv, exchange.all_gather, dist.all_gather
        all_to_all, batch, gather, _ = self.originals

        def counted_all_to_all(out: Tensor, given: Tensor, received: list[int], sent: list[int], **rest: Any) -> Any:
            away = sum(sent) - sent[dist.get_rank(self.group)]
            self.bytes += away * given[:1].numel() * given.element_size()
            self.calls += 1
            return all_to_all(out, given, received, sent, **rest)

        def counted_batch(messages: list[Any]) -> Any:
            self.bytes += sum(m.tensor.numel() * m.tensor.element_size() for m in messages if m.op is dist.isend)
            self.calls += 1
            return batch(messages)

        def counted_gather(out: Tensor, given: Tensor, **rest: Any) -> Any:
            self.bytes += (out.numel() - given.numel()) * given.element_size()
            self.calls += 1
            return gather(out, given, **rest)

        def unexpected(*args: Any, **rest: Any) -> Any:
            raise AssertionError("a collective that is not counted")

        dist.all_to_all_single, dist.batch_isend_irecv = counted_all_to_all, counted_batch
        exchange.all_gather, dist.all_gather = counted_gather, unexpected
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, dist.batch_isend_irecv, exchange.all_gather, dist.all_gather = self.originals


def volume(
    group: Group, mode: str, tokens: int, heads: int, dim: int, text: int, sparse_n: int, shard_text: bool = False
) -> tuple[int, int, int]:
    """Bytes that this rank sends for one layer, forward and backward, in float32 (hidden states move before it), and
    how many collectives that takes forward."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = cp.shard_sizes(tokens, ranks)
    text_sizes = cp.shard_sizes(text, ranks) if shard_text else None
    own_text = text_sizes[rank] if text_sizes else text
    rows = sizes[rank]
    if mode == "group":
        single, grouped = (cp.Groups(tokens, sparse_n, pattern, ranks) for pattern in ("single", "group"))
        rows = len(single.tokens(rank))
    x, y = (torch.randn(1, n, heads, dim, requires_grad=True) for n in (rows, own_text))
    options: dict[str, Any] = {f"text_{name}": y for name in "qkv"} if text else {}
    with Counted(group) as forward:
        if mode == "group":
            moved = cp.move_tokens(x, single, grouped, group)
            out = cp.skiparse_group_parallel(moved, moved, moved, grouped, group, **options)
        else:
            attend = cp.ulysses_attention if mode == "ulysses" else cp.ring_attention
            out = attend(x, x, x, group, sizes=sizes, text_sizes=text_sizes, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    with Counted(group) as backward:
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    return forward.bytes, backward.bytes, forward.calls


def documentation(group: Group, page: str) -> list[tuple[int, ...]]:
    """Run the Python of docs/context_parallel.md on 64 tokens; returns the last shapes of x, out and text."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    near, far = grid(group, 2)
    names: dict[str, Any] = {name: torch.randn(1, 16, 3, 4) for name in "qkv"}
    names.update({f"text_{name}": torch.randn(1, 5, 3, 4) for name in "qkv"})
    names.update(tokens=torch.randn(1, 64, 12), mask=torch.ones(1, 64, dtype=torch.bool), num_tokens=64)
    names.update(cos=torch.randn(64, 4), sin=torch.randn(64, 4), rank=rank, ranks=ranks)
    names.update(group=group, process_group=group, ulysses_group=near, ring_group=far)
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    return [tuple(names[name].shape) for name in ("x", "out", "text")]


# Refusals


def refusal(group: Group, what: str) -> str:
    """The words with which a rank refuses wrong arguments; the last rank's are wrong, or all are."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    last = rank == ranks - 1
    q = torch.randn(2, 4, 3, 4)
    text = {f"text_{name}": torch.randn(2, 3, 3, 4) for name in "qkv"}
    sizes = (4,) * ranks
    wider = torch.randn(2, 4, 4, 4)
    bad = wider if last else q
    mask = torch.ones(2, 4 * ranks, dtype=torch.bool)
    placement = cp.Groups(4 * ranks, 4, "single", ranks)
    alike = {"q": q, "k": q, "v": q}
    other = dist.GroupMember.NON_GROUP_MEMBER
    calls: dict[str, Callable[[], Any]] = {
        "no group": lambda: cp.ulysses_attention(q, q, q, None),
        "not in it": lambda: cp.ulysses_attention(q, q, q, other),
        "heads differ": lambda: cp.ulysses_attention(bad, bad, bad, group),
        "dtypes differ": lambda: cp.ring_attention(*(q.double() if last else q for _ in range(3)), group),
        "one refuses": lambda: cp.ring_attention(q, bad, bad, group),
        "text differs": lambda: cp.ring_attention(q, q, q, group, **{n: t[:, : 3 - last] for n, t in text.items()}),
        "one has text": lambda: cp.ulysses_attention(q, q, q, group, **({} if last else text)),
        "one has a mask": lambda: cp.ulysses_attention(q, q, q, group, mask=mask if last else None),
        "masks differ": lambda: cp.ring_attention(q, q, q, group, mask=mask[:, int(last) :]),
        "patterns differ": lambda: cp.ulysses_attention(q, q, q, group, sparse_n=2, pattern=("single", "group")[last]),
        "short mask": lambda: cp.ulysses_attention(q, q, q, group, sizes=sizes, mask=mask[:, 1:]),
        "float mask": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, mask=mask.float()),
        "short text mask": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, **text, text_mask=mask[:, :2]),
        "too few sizes": lambda: cp.ulysses_attention(q, q, q, group, sizes=sizes[1:]),
        "other sizes": lambda: cp.ulysses_attention(q, q, q, group, sizes=(5,) * ranks),
        "other text sizes": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, **text, text_sizes=(2,) * ranks),
        "half a text": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, text_k=q),
        "text mask only": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, text_mask=mask),
        "other heads of text": lambda: cp.ring_attention(q, q, q, group, sizes=sizes, text_k=wider, text_v=wider),
        "misplaced shards": lambda: cp.ring_attention(q, q, q, group, sparse_n=4, pattern="group"),
        "window": lambda: cp.ring_attention(q, q, q, group, window=3),
        "order": lambda: cp.usp_attention(q, q, q, GROUPS[rank,], group, order="outer"),
        "same groups": lambda: cp.usp_attention(q, q, q, group, group),
        "ranks of a placement": lambda: cp.move_tokens(q, placement, cp.Shards((4 * ranks,)), group),
        "lengths of placements": lambda: cp.move_tokens(q, placement, cp.Shards((3,) * ranks), group),
        "rows of a placement": lambda: cp.move_tokens(q[:, 1:], placement, cp.Shards(sizes), group),
        "rows of groups": lambda: cp.skiparse_group_parallel(q[:, 1:], q[:, 1:], q[:, 1:], placement, group),
        "mask of groups": lambda: cp.skiparse_group_parallel(**alike, placement=placement, group=group, mask=mask[:1]),
    }
    try:
        calls[what]()
    except ValueError as error:
        return str(error)
    return "nothing was refused"
