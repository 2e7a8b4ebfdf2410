# SPDX-License-Identifier: Apache-2.0
"""Tables of what a foreign training system calls a model's tensors, how it cuts them, and where it keeps them.

A :class:`Row` names one tensor of theirs and the one, or several, of ours that it holds; ``#`` in a name stands for a
number, the same in all names of a row. Shapes are written in letters (``"6d d"``): one letter has one value in all of
a model, and ``2o``, ``3d+m`` are sums; ``|`` separates shapes that a tensor may have. What a state lacks, has too much
or has in another shape is found from the table alone, without building the model.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from .hf import SHOWN, paragraph, with_nearest
from .lazy import Lazy, State, chunk, join

# Over tensor-parallel ranks: all of it everywhere; output rows; input columns; rows of each of the thirds q, k, v.
Split = Literal["replicated", "column", "row", "qkv"]
Naming = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Part:
    """One of our tensors inside one of theirs: which of the equal chunks along the first axis it consists of."""

    name: str
    shape: str
    chunks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Row:
    """One tensor of theirs.

    Args:
        theirs, shape: its name and shape.
        parts: ours.
        split: over tensor-parallel ranks.
        group: rows of a group are all there or not at all (an option of the model); empty: always there.
        not_in_last: the last block may lack it.
    """

    theirs: str
    shape: str
    parts: tuple[Part, ...]
    split: Split = "replicated"
    group: str = ""
    not_in_last: bool = False

    @property
    def num_chunks(self) -> int:
        return sum(len(part.chunks) for part in self.parts)

    def names(self, naming: Naming) -> Iterator[tuple[str, str]]:
        """Names and shapes of this row's tensors."""
        if naming == "theirs":
            yield self.theirs, self.shape
        else:
            yield from ((part.name, part.shape) for part in self.parts)


def tensor(ours: str, theirs: str, shape: str, split: Split = "replicated", group: str = "", **options: bool) -> Row:
    """A tensor that is only renamed."""
    return Row(theirs, shape, (Part(ours, shape),), split, group, **options)


def linear(
    ours: str,
    theirs: str,
    shape: str,
    split: Split = "replicated",
    group: str = "",
    bias: str | None = "",
    **options: bool,
) -> list[Row]:
    """Weight and bias; ``bias`` is the group of the bias if it has one of its own, None for no bias."""
    rows = [tensor(f"{ours}.weight", f"{theirs}.weight", shape, split, group, **options)]
    if bias is not None:
        width = "|".join(dict.fromkeys(s.split()[0] for s in shape.split("|")))
        kind: Split = "replicated" if split == "row" else split
        rows.append(tensor(f"{ours}.bias", f"{theirs}.bias", width, kind, bias or group, **options))
    return rows


@dataclass(frozen=True)
class Layout:
    """A model in another system's names.

    Args:
        model: ours, for messages.
        rows: every tensor that the model may have.
        first, last: how names begin, in theirs, that lie on the first and on the last pipeline stage, outside blocks.
        blocks: how the names of blocks begin, in theirs; empty where the system cannot cut the model into stages.
        tensor_parallel: whether it cuts tensors.
        virtual_stages: whether a stage may hold several chunks.
        alternatives: groups of which one must be there.
        ignored: shell patterns of names, in theirs, that a checkpoint may hold and nothing is made of.
        suspicion: given all shapes, in theirs or ours, says in words what must be missing though each part fits.
        refusal: given our configuration, says in words why the other system cannot have such a model.
    """

    model: str
    rows: tuple[Row, ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    blocks: str = ""
    tensor_parallel: bool = True
    virtual_stages: bool = False
    alternatives: tuple[tuple[str, ...], ...] = ()
    ignored: tuple[str, ...] = ()
    suspicion: Callable[[Mapping[str, tuple[int, ...]]], str | None] = field(default=lambda shapes: None)
    refusal: Callable[[Any], str | None] = field(default=lambda config: None)

    def __post_init__(self) -> None:
        """Every tensor lies on some stage: a table that forgets one would lose it."""
        for row in self.rows if self.blocks else ():
            places = [row.theirs.startswith(start) for start in (self.blocks, *self.first, *self.last)]
            if sum(places) != 1:
                raise ValueError(f"{self.model}: {row.theirs} must lie in a block, on the first or on the last stage")

    @cached_property
    def _patterns(self) -> dict[Naming, dict[str, tuple[Row, int, str]]]:
        """For each naming, name with ``#`` to row, number of the part, shape."""
        found: dict[Naming, dict[str, tuple[Row, int, str]]] = {"ours": {}, "theirs": {}}
        for row in self.rows:
            found["theirs"][row.theirs] = row, 0, row.shape
            for number, part in enumerate(row.parts):
                found["ours"][part.name] = row, number, part.shape
        return found

    def match(self, name: str, naming: Naming) -> tuple[Row, int, tuple[int, ...]] | None:
        """The row of a name, which of its parts, and the numbers in the name."""
        table = self._patterns[naming]
        if name in table:
            return table[name][0], table[name][1], ()
        for pattern, numbers in _numbered(name):
            if pattern in table:
                return table[pattern][0], table[pattern][1], numbers
        return None

    def is_ignored(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)

    def split_of(self, theirs: str) -> Split:
        """How the tensor of this name (in theirs) is cut over tensor-parallel ranks. Raises ValueError."""
        found = self.match(theirs, "theirs")
        if found is None:
            raise ValueError(f"{self.model}: {theirs} is not a tensor of the model")
        return found[0].split

    def block_of(self, theirs: str) -> int | None:
        """Index of the block that a tensor belongs to, None outside blocks."""
        found = re.match(re.escape(self.blocks) + r"(\d+)\.", theirs) if self.blocks else None
        return int(found[1]) if found else None

    def with_block(self, theirs: str, index: int) -> str:
        """The same name in another block."""
        return re.sub(re.escape(self.blocks) + r"\d+\.", lambda _: f"{self.blocks}{index}.", theirs, count=1)

    def on_last_stage(self, theirs: str) -> bool:
        return theirs.startswith(self.last)

    # Names and shapes

    def problems(self, state: Mapping[str, Lazy], naming: Naming) -> list[str]:
        """What is wrong with names and shapes, a paragraph for each kind; empty when all is well."""
        wanted = self._wanted(state, naming)
        missing = [name for name in wanted if name not in state]
        unexpected = [name for name in state if name not in wanted and not self.is_ignored(name)]
        shapes = self._misshapen({name: t.shape for name, t in state.items() if name in wanted}, wanted)
        found = [
            *paragraph("missing", [with_nearest(name, unexpected) for name in missing[:SHOWN]], len(missing)),
            *paragraph(
                "unexpected",
                [with_nearest(name, missing or list(wanted)) for name in unexpected[:SHOWN]],
                len(unexpected),
            ),
            *paragraph("of the wrong shape", shapes[:SHOWN], len(shapes)),
        ]
        if not found and (reason := self.suspicion({name: t.shape for name, t in state.items()})):
            found.append(f"  {reason}")
        return found

    def check(self, state: Mapping[str, Lazy], naming: Naming, what: str) -> None:
        """Raise ValueError listing what is wrong with ``state``, which messages call ``what``."""
        if found := self.problems(state, naming):
            raise ValueError(f"{what} is not a whole {self.model}\n" + "\n".join(found))

    def _wanted(self, state: Mapping[str, Lazy], naming: Naming) -> dict[str, str]:
        """Every name that a state with these blocks and options has, with its shape in letters."""
        blocks: dict[str, set[int]] = {}  # what stands before the last number to the numbers seen there
        groups: set[str] = set()
        whole_last: set[str] = set()  # blocks that have something of what the last one may lack
        for name in state:
            if (found := self.match(name, naming)) is None:
                continue
            row, part, numbers = found
            if any(number >= len(state) for number in numbers):  # no block without a tensor: these count nothing
                continue
            groups.add(row.group)
            if numbers:
                pattern = row.theirs if naming == "theirs" else row.parts[part].name
                stem = fill(pattern[: pattern.rindex("#")], numbers)
                blocks.setdefault(stem, set()).add(numbers[-1])
                if row.not_in_last:
                    whole_last.add(f"{stem}{numbers[-1]}.")
        for choice in self.alternatives:
            if not groups & set(choice):
                groups.add(choice[0])
        wanted: dict[str, str] = {}
        for row in self.rows:
            if row.group and row.group not in groups:
                continue
            for pattern, shape in row.names(naming):
                names = list(_instances(pattern, blocks))
                if row.not_in_last and not any(names[-1].startswith(block) for block in whole_last):
                    names.pop()
                wanted.update(dict.fromkeys(names, shape))
        return wanted

    def _misshapen(self, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, str]) -> list[str]:
        """Tensors whose shape does not agree with the rest, each with what the rest says it should be."""
        values: dict[str, int] = {}
        while True:  # what most tensors say of a letter holds for all
            votes: dict[str, Counter[int]] = {}
            for name, shape in shapes.items():
                for form in _forms(wanted[name], len(shape)):
                    for size, terms in zip(shape, form, strict=True):
                        unknown = [letter for letter in terms if letter and letter not in values]
                        if len(unknown) != 1:
                            continue
                        known = sum(n * (values[x] if x else 1) for x, n in terms.items() if x != unknown[0])
                        whole, remainder = divmod(size - known, terms[unknown[0]])
                        if not remainder and whole > 0:
                            votes.setdefault(unknown[0], Counter())[whole] += 1
            if not votes:
                break
            surest = max(votes, key=lambda letter: votes[letter].most_common(1)[0][1])
            values[surest] = votes[surest].most_common(1)[0][0]
        found = []
        for name, shape in shapes.items():
            forms = [tuple(_size(t, values) for t in form) for form in _forms(wanted[name])]
            if not any(
                len(f) == len(shape) and all(w in (None, s) for w, s in zip(f, shape, strict=True)) for f in forms
            ):
                words = " or ".join(str(f).replace("None", "any") for f in forms)
                found.append(f"{name}: wanted {words}, got {shape}")
        return found

    # Renaming

    def to_ours(self, state: Mapping[str, Lazy]) -> State:
        """A checked state in their names, in ours."""
        result: State = {}
        for name, value in state.items():
            if (found := self.match(name, "theirs")) is None:
                continue
            row, _, numbers = found
            if len(row.parts) == 1:
                result[fill(row.parts[0].name, numbers)] = value
                continue
            pieces = chunk(value, 0, row.num_chunks)
            for part in row.parts:
                result[fill(part.name, numbers)] = join([pieces[i] for i in part.chunks], 0)
        return result

    def to_theirs(self, state: Mapping[str, Lazy]) -> State:
        """A checked state in our names, in theirs."""
        result: State = {}
        for name, value in state.items():
            if (found := self.match(name, "ours")) is None:
                continue
            row, number, numbers = found
            if len(row.parts) == 1:
                result[fill(row.theirs, numbers)] = value
            elif number == 0:
                pieces: dict[int, Lazy] = {}
                for part in row.parts:
                    value = state[fill(part.name, numbers)]
                    pieces.update(zip(part.chunks, chunk(value, 0, len(part.chunks)), strict=True))
                result[fill(row.theirs, numbers)] = join([pieces[i] for i in range(row.num_chunks)], 0)
        return result


def fill(pattern: str, numbers: Sequence[int]) -> str:
    """A name from its pattern."""
    for number in numbers:
        pattern = pattern.replace("#", str(number), 1)
    return pattern


def renamed(layout: Layout, rename: Callable[[Row], str], **changes: object) -> Layout:
    """The same layout with other names of theirs, and other fields."""
    rows = tuple(replace(row, theirs=rename(row)) for row in layout.rows)
    return replace(layout, rows=rows, **changes)  # type: ignore[arg-type]


def _instances(pattern: str, blocks: Mapping[str, set[int]]) -> Iterator[str]:
    """The names of a pattern, for every block that exists or must exist because there is a later one; at least one."""
    if "#" not in pattern:
        yield pattern
        return
    stem, _, rest = pattern.rpartition("#")
    prefixes = [stem]
    if "#" in stem:  # stages of blocks
        expression = re.compile(re.escape(stem).replace(r"\#", r"(\d+)"))
        stages = [int(match[1]) for prefix in blocks if (match := expression.fullmatch(prefix))]
        prefixes = [fill(stem, (i,)) for i in range(max(stages, default=0) + 1)]
    for prefix in prefixes:
        for i in range(max(blocks.get(prefix, ()), default=0) + 1):
            yield f"{prefix}{i}{rest}"


def _numbered(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """``a.3.b.0.c`` as ``a.#.b.0.c`` with 3, and ``a.#.b.#.c`` with 3 and 0."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts[1:-1], 1) if part.isdecimal()]
    for count in (1, 2)[: len(places)]:
        numbers = tuple(int(parts[i]) for i in places[:count])
        yield ".".join("#" if i in places[:count] else part for i, part in enumerate(parts)), numbers


def _forms(shape: str, rank: int | None = None) -> list[list[dict[str, int]]]:
    """``"3d+m d"`` as ``[[{"d": 3, "m": 1}, {"d": 1}]]``; a plain number has the empty letter."""
    forms = []
    for form in shape.split("|"):
        sizes = []
        for size in form.split():
            terms: dict[str, int] = {}
            for term in size.split("+"):
                number, letter = re.fullmatch(r"(\d*)([a-z]*)", term).groups()  # type: ignore[union-attr]
                terms[letter] = terms.get(letter, 0) + int(number or 1)
            sizes.append(terms)
        if rank is None or len(sizes) == rank:
            forms.append(sizes)
    return forms


def _size(terms: Mapping[str, int], values: Mapping[str, int]) -> int | None:
    if any(letter and letter not in values for letter in terms):
        return None
    return sum(number * (values[letter] if letter else 1) for letter, number in terms.items())
