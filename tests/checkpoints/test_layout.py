# SPDX-License-Identifier: Apache-2.0
"""Tables of names: every released model fits its own, and what does not fit is named."""

import importlib
import re
from dataclasses import replace

import pytest
import torch

from vidgen.checkpoints.convert import MODELS
from vidgen.checkpoints.layout import Layout, linear, tensor
from vidgen.checkpoints.lazy import Lazy, State, lazy

RELEASED = [
    ("opensora_plan_v1_3", "OpenSoraT2V_v1_3", "released"),
    ("opensora_plan_v1_3", "OpenSoraInpaint_v1_3", "released_i2v"),
    ("opensora_plan_v1_5", "SparseUMMDiT", "released"),
    ("opensora_v2", "MMDiT", "released"),
    ("opensora_v2", "MMDiT", "flux_dev"),
    *(("cogvideox", "CogVideoXTransformer3DModel", n) for n in ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")),
]


@pytest.mark.parametrize("system, name, preset", RELEASED)
def test_released_models_fit_their_tables(system: str, name: str, preset: str) -> None:
    module = importlib.import_module(f"vidgen.models.{system}")
    with torch.device("meta"):
        state = getattr(module, name)(module.preset(preset)).state_dict()
    ours = {key: Lazy(tuple(t.shape), t.dtype, lambda t=t: t) for key, t in state.items()}
    for naming in MODELS[system].layouts:
        layout = MODELS[system].layout(naming)
        assert layout.problems(ours, "ours") == []
        theirs = layout.to_theirs(ours)
        assert layout.problems(theirs, "theirs") == []
        back = layout.to_ours(theirs)
        assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in ours.items()}


def test_sat_is_what_the_models_own_table_says(tiny) -> None:
    from vidgen.models.cogvideox.checkpoint import PREFIX, to_sat

    _, state = tiny("cogvideox")
    layout = MODELS["cogvideox"].layout("sat")
    ours = {PREFIX + name: t.load() for name, t in layout.to_theirs({k: lazy(t) for k, t in state.items()}).items()}
    theirs = to_sat(state)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_our_own_readers_know_the_names_of_the_tables(tiny) -> None:
    for system in ("opensora_plan_v1_3", "opensora_plan_v1_5"):
        _, state = tiny(system)
        convert = importlib.import_module(f"vidgen.models.{system}.checkpoint").convert_state_dict
        theirs = MODELS[system].layout("mindspeed-mm").to_theirs({name: lazy(t) for name, t in state.items()})
        assert set(theirs) != set(state) == set(convert(theirs))


# How MindSpeed-MM cuts its tensors: written down from its converters, apart from the tables.
BLOCK = r"videodit(_sparse)?_blocks\.#\."
CUT = {
    "opensora_plan_v1_3": {
        "column": BLOCK + r"((self|cross)_atten\.proj_[qkv]|ff\.net\.0\.proj)\.(weight|bias)",
        "row": BLOCK + r"((self|cross)_atten\.proj_out|ff\.net\.2)\.weight",
    },
    "cogvideox": {
        "column": f"({BLOCK}" + r"(ff\.net\.0\.proj|scale_shift_table\.1)|adaLN_modulation\.1)\.(weight|bias)",
        "row": BLOCK + r"(self_atten\.proj_out|ff\.net\.2)\.weight",
        "qkv": BLOCK + r"self_atten\.proj_qkv\.(weight|bias)",
    },
    "opensora_v2": {},
}
LAST = {
    "opensora_plan_v1_3": r"scale_shift_table|proj_out\.(weight|bias)",
    "cogvideox": r"(norm_final|norm_out|proj_out_linear|adaLN_modulation\.1)\.(weight|bias)",
}


@pytest.mark.parametrize("system", CUT)
def test_how_tensors_are_cut(system: str) -> None:
    layout = MODELS[system].layout("mindspeed-mm")
    for row in layout.rows:
        kinds = [kind for kind, pattern in CUT[system].items() if re.fullmatch(pattern, row.theirs)]
        assert row.split == (kinds[0] if kinds else "replicated"), row.theirs
    counts = {kind: sum(row.split == kind for row in layout.rows) for kind in ("column", "row", "qkv")}
    wanted = {"opensora_plan_v1_3": (14, 3, 0), "cogvideox": (6, 2, 2), "opensora_v2": (0, 0, 0)}
    assert tuple(counts.values()) == wanted[system]


@pytest.mark.parametrize("system", LAST)
def test_on_which_stage_tensors_lie(system: str) -> None:
    layout = MODELS[system].layout("mindspeed-mm")
    for row in layout.rows:
        if not re.match(BLOCK, row.theirs):
            assert layout.on_last_stage(row.theirs) == bool(re.fullmatch(LAST[system], row.theirs)), row.theirs


# What does not fit

SMALL = Layout(
    model="small",
    rows=(
        *linear("in", "in", "d c"),
        *linear("blocks.#.up", "layers.#.fc1", "4d d", "column"),
        *linear("blocks.#.down", "layers.#.fc2", "d 4d", "row"),
        *linear("blocks.#.gate", "layers.#.gate", "d", group="gate"),
        tensor("head.one", "head.one", "1 d", group="one"),
        tensor("head.two", "head.two", "2 d|2 d 1", group="two"),
    ),
    alternatives=(("one", "two"),),
)


def small(blocks: int = 3, d: int = 4) -> State:
    shapes = {"in.weight": (d, 5), "in.bias": (d,), "head.one": (1, d)}
    for i in range(blocks):
        shapes |= {f"blocks.{i}.up.weight": (4 * d, d), f"blocks.{i}.up.bias": (4 * d,)}
        shapes |= {f"blocks.{i}.down.weight": (d, 4 * d), f"blocks.{i}.down.bias": (d,)}
    return {name: lazy(torch.zeros(shape)) for name, shape in shapes.items()}


def complaints(state: State) -> str:
    with pytest.raises(ValueError) as error:
        SMALL.check(state, "ours", "the source")
    return str(error.value)


def test_whole_states_pass() -> None:
    SMALL.check(small(), "ours", "the source")
    SMALL.check(SMALL.to_theirs(small(1)), "theirs", "the source")
    other = small()
    del other["head.one"]
    other["head.two"] = lazy(torch.zeros(2, 4, 1))
    SMALL.check(other, "ours", "the source")


def test_missing_and_unexpected_names_come_with_the_nearest() -> None:
    state = small()
    state["blocks.1.up.wieght"] = state.pop("blocks.1.up.weight")
    assert complaints(state) == (
        "the source is not a whole small\n"
        "  1 missing:\n    blocks.1.up.weight (nearest: blocks.1.up.wieght)\n"
        "  1 unexpected:\n    blocks.1.up.wieght (nearest: blocks.1.up.weight)"
    )


def test_the_first_ten_are_listed() -> None:
    state = {name: t for name, t in small(9).items() if not name.startswith(("blocks.3.", "blocks.4.", "blocks.5."))}
    words = complaints(state)
    assert "12 missing" in words and "blocks.3.up.weight" in words and "and 2 more" in words
    assert words.count("blocks.") == 10


def test_shapes_are_those_of_the_majority() -> None:
    state = small()
    state["blocks.0.up.weight"] = lazy(torch.zeros(16, 5))
    state["in.weight"] = lazy(torch.zeros(4, 5, 1))
    words = complaints(state)
    assert "2 of the wrong shape" in words
    assert "blocks.0.up.weight: wanted (16, 4), got (16, 5)" in words
    assert "in.weight: wanted (4, any), got (4, 5, 1)" in words
    state = small()
    state["head.one"] = lazy(torch.zeros(1, 6))
    assert "head.one: wanted (1, 4), got (1, 6)" in complaints(state)


def test_options_are_whole_or_absent() -> None:
    state = small()
    state["blocks.1.gate.weight"] = lazy(torch.zeros(4))
    assert "5 missing" in complaints(state)
    state = small()
    del state["head.one"]
    assert "1 missing:\n    head.one" in complaints(state)


def test_numbers_that_count_nothing() -> None:
    state = small()
    state["blocks.999999999999.up.weight"] = state["blocks.0.up.weight"]
    assert "1 unexpected:\n    blocks.999999999999.up.weight" in complaints(state)


def test_a_table_says_where_everything_lies() -> None:
    table = MODELS["cogvideox"].layout("mindspeed-mm")
    for first in (("time_embed.",), (*table.first, "norm_out.")):
        with pytest.raises(ValueError, match="must lie in a block, on the first or on the last stage"):
            replace(table, first=first)


def test_last_block_of_v1_5_may_lack_its_text_outputs(tiny) -> None:
    _, state = tiny("opensora_plan_v1_5")
    layout = MODELS["opensora_plan_v1_5"].layout("megatron")
    ours = {name: lazy(t) for name, t in state.items()}
    place = max({name[: name.index(".attn1")] for name in ours if ".attn1." in name}, key=lambda p: p.split(".")[1:])
    first = "transformer_blocks.0.0"
    inert = [name for name in ours if name.startswith(f"{first}.") and name.replace(first, place) not in ours]
    assert len(inert) == 6
    trained = ours | {name.replace(first, place): ours[name] for name in inert}
    assert layout.problems(trained, "ours") == []
    del trained[inert[0].replace(first, place)]
    assert "1 missing" in "\n".join(layout.problems(trained, "ours"))
    del ours[inert[0]]
    assert inert[0] in "\n".join(layout.problems(ours, "ours"))
