# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of weight conversion, through files: what is compared is what was written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .comparison import Case, Comparison

RANK_FILE = "model_optim_rng.pt"
# Rotary tables that the model computes: converters may carry them along, ours does not.
COMPUTED = ("pos_embed.freqs_sin", "pos_embed.freqs_cos")


def opensora_v2(case: Case, compare: Comparison) -> None:
    from vidgen.checkpoints.convert import convert

    weights = case.neighbour(case.meta["weights_in"]).group("w/")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(weights, folder / "source.safetensors")
        convert(folder / "source.safetensors", folder / "tree", "mindspeed-mm")
        tree = folder / "tree"
        files = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())
        compare.equal("tree", files, sorted(case.meta["tree"]))
        compare.equal("latest", (tree / "latest_checkpointed_iteration.txt").read_text(), case.meta["latest"])
        content = _load(tree / f"release/mp_rank_00/{RANK_FILE}")
        convert(tree, folder / "back.pt", "pt")
        back = _load(folder / "back.pt")
    compare.equal("top level", sorted(content), sorted(case.meta["top_level_keys"]))
    theirs = content["model"]
    compare.equal("names", sorted(theirs), sorted(case.meta["mapping"].values()))
    compare.equal("names, back", sorted(back), sorted(weights))
    for ours, name in case.meta["mapping"].items():
        if name in theirs:
            compare(name, theirs[name], weights[ours])
        compare(ours, back[ours], weights[ours])


def opensora_v2_names(case: Case, compare: Comparison) -> None:
    """What MindSpeed-MM calls every tensor of the release, where a case of names says so."""
    from vidgen.checkpoints.lazy import lazy
    from vidgen.models.opensora_v2.mindspeed_mm import MINDSPEED_MM

    for ours, shape, *theirs in case.meta["rows"]:
        if theirs:
            found = MINDSPEED_MM.to_theirs({ours: lazy(torch.empty(shape, device="meta"))})
            compare.equal(f"{ours} in MindSpeed-MM", list(found), theirs)


def cogvideox(case: Case, compare: Comparison) -> None:
    from vidgen.checkpoints.convert import convert

    weights = case.group("w/") or case.neighbour(case.meta["weights_from"].split()[0]).group("w/")
    tp, pp = case.meta["tp_size"], case.meta["pp_sizes"]
    lora = case.meta.get("lora")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sat/1").mkdir(parents=True)
        (folder / "sat/latest").write_text("1")
        torch.save({"module": weights}, folder / "sat/1/mp_rank_00_model_states.pt")
        options: dict[str, Any] = {}
        if lora is not None:
            save_file(case.group("in/lora/"), folder / "lora.safetensors")
            options = {"lora": folder / "lora.safetensors", "lora_alpha": lora["alpha"]}
        convert(folder / "sat", folder / "whole.pt", "mindspeed-mm-pt")
        convert(folder / "sat", folder / "ours.safetensors", "safetensors")
        convert(folder / "ours.safetensors", folder / "by_ours.pt", "mindspeed-mm-pt")
        convert(folder / "sat", folder / "tree", "mindspeed-mm", tp=tp, stages=[pp])
        convert(folder / "tree", folder / "merged_shards.pt", "mindspeed-mm-pt")
        convert(folder / "tree", folder / "with_lora.pt", "mindspeed-mm-pt", **options)
        whole, by_ours, again = (_load(folder / f"{n}.pt") for n in ("whole", "by_ours", "merged_shards"))
        with_lora = _load(folder / "with_lora.pt")
        ranks = {path.parent.name: _load(path)["model"] for path in (folder / "tree").rglob(RANK_FILE)}

    _same_names(compare, "unsplit", whole, [])
    for key in whole:
        compare(f"unsplit/{key}", whole[key])
        _exact(compare, f"unsplit/{key}", whole[key], compare.expected.get(f"unsplit/{key}"))
        _exact(compare, f"unsplit by our names/{key}", by_ours.get(key), whole[key])
        _exact(compare, f"shards merged/{key}", again.get(key), whole[key])
    # The original's converter forgets these when it cuts into stages; they belong to the first one.
    forgotten = case.meta.get("dropped_by_pp_split", [])
    for rank, state in ranks.items():
        first = len(pp) == 1 or rank.endswith("_000")
        _same_names(compare, rank, state, forgotten if first else [])
        for key in state.keys() - set(forgotten):
            compare(f"{rank}/{key}", state[key])
            _exact(compare, f"{rank}/{key}", state[key], compare.expected[f"{rank}/{key}"])
        for key in forgotten if first else []:
            _exact(compare, f"{rank}/{key}", state[key], whole[key])
    changed = {key for key in whole if not torch.equal(with_lora[key], whole[key])}
    stored = {key.removeprefix("merged/") for key in compare.expected if key.startswith("merged/")}
    compare.equal("changed by the adapters", sorted(changed), sorted(stored))
    for key in stored:
        compare(f"merged/{key}", with_lora[key])


def _same_names(compare: Comparison, part: str, ours: dict[str, Tensor], forgotten: list[str]) -> None:
    stored = {key.removeprefix(f"{part}/") for key in compare.expected if key.startswith(f"{part}/")}
    for key in stored & set(COMPUTED):
        compare.unused.discard(f"{part}/{key}")
    compare.equal(f"{part}: names", sorted(ours), sorted(stored - set(COMPUTED) | set(forgotten)))


def _exact(compare: Comparison, name: str, ours: Tensor | None, wanted: Tensor | None) -> None:
    same = ours is not None and wanted is not None and ours.dtype == wanted.dtype and torch.equal(ours, wanted)
    compare.equal(f"{name}: exactly the same", same, True)


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content
