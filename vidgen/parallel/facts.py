# SPDX-License-Identifier: Apache-2.0
"""What the planner knows about a model and its samples: numbers, read off the model by whoever has one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Amount:
    """Of one sample: what goes with its video tokens, what with its text's, and what with neither."""

    video: float = 0.0
    text: float = 0.0
    fixed: float = 0.0

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.video - other.video, self.text - other.text, self.fixed - other.fixed)

    def part(self, video: float, text: float, fixed: float = 1.0) -> float:
        """What a process has of it that holds such shares of the tokens, and of the rest."""
        return self.video * video + self.text * text + self.fixed * fixed

    @property
    def whole(self) -> float:
        return self.part(1.0, 1.0)


@dataclass(frozen=True)
class Step:
    """A block, or what a model computes before the first or after the last of them.

    Attributes:
        parameters, trainable: numbers of them; ``cut`` is how many tensor parallelism divides.
        linear, attention: FLOPs forward.
        saved: bytes kept for the backward pass; ``gathered`` of them stand in front of layers that tensor parallelism
            cuts by rows of the output, and are whole on each of its ranks.
        outside: bytes kept although the block is recomputed; ``inputs``: bytes of what it is recomputed from.
        stream: bytes that the next block is given.
        gathers, scatters: bytes that meet before, and are summed after, layers that tensor parallelism cuts.
        text: text tokens that take part in the attention with the video's; None where a block has no attention.
        joint: they are tokens of one sequence with the video's; ``answers``: they also get a result.
        ratio, pattern: of Skiparse.
        moves: bytes that go to other places before this block where whole groups lie on each rank; ``joins``: those
            that are brought to all ranks of a sequence.
        widest: bytes of the largest tensor kept.
    """

    parameters: int = 0
    trainable: int = 0
    cut: int = 0
    linear: Amount = Amount()
    attention: float = 0.0
    saved: Amount = Amount()
    gathered: Amount = Amount()
    outside: Amount = Amount()
    inputs: Amount = Amount()
    stream: Amount = Amount()
    gathers: Amount = Amount()
    scatters: Amount = Amount()
    moves: Amount = Amount()
    joins: Amount = Amount()
    text: int | None = None
    joint: bool = False
    answers: bool = True
    ratio: int = 1
    pattern: str = "single"
    widest: Amount = Amount()

    @property
    def trainable_cut(self) -> float:
        return self.trainable * self.cut / self.parameters if self.parameters else 0.0

    def local(self, count: float, tensor: int) -> float:
        """What a tensor rank has of all, or of the trainable, parameters."""
        cut = self.cut / self.parameters if self.parameters else 0.0
        return count * (1 - cut + cut / tensor)


@dataclass(frozen=True)
class ModelShape:
    """What decides which combinations are legal. ``heads`` is 0 for a model without tokens, such as a VAE;
    ``adapters``: low-rank ones are trained beside frozen weights."""

    heads: int
    blocks: int
    tokens: int
    ratios: tuple[int, ...] = (1,)
    adapters: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What a step of a recipe consists of, for one sample.

    Attributes:
        shape: see :class:`ModelShape`.
        width: heads times head_dim.
        text: text tokens; ``spread_text``: they lie spread over a sequence's ranks like the video's.
        before, blocks, after: the model in order.
        element: bytes of a number in computation.
        batch, accumulation: samples of a process at once, and how often before a step of the optimizer.
        recomputed: blocks are computed again in the backward pass.
        states: float32 numbers that the optimizer keeps for each trainable parameter.
        input_bytes: latents, noise, target and text, which every process of a sample has whole.
        resident_bytes: weights of the VAE and the text encoders, which every process has whole while the model
            computes; None: not known, and not counted.
    """

    name: str
    shape: ModelShape
    width: int
    text: int
    spread_text: bool
    before: Step
    blocks: tuple[Step, ...]
    after: Step
    element: int = 2
    batch: int = 1
    accumulation: int = 1
    recomputed: bool = False
    states: int = 3
    input_bytes: float = 0.0
    resident_bytes: float | None = 0.0

    @property
    def parameters(self) -> int:
        return sum(step.parameters for step in (self.before, *self.blocks, self.after))

    @cached_property
    def flops(self) -> float:
        """Of one sample's forward pass."""
        steps = (self.before, *self.blocks, self.after)
        return sum(step.linear.whole + step.attention for step in steps)

    @cached_property
    def stream(self) -> Amount:
        """What the block that passes on most passes on."""
        return max((block.stream for block in self.blocks), key=lambda stream: stream.whole, default=Amount())

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each block the first that is like it."""
        first: dict[Step, int] = {}
        return tuple(first.setdefault(block, index) for index, block in enumerate(self.blocks))
