# SPDX-License-Identifier: Apache-2.0
"""Training trees: cut and merged again they are what they were, and shards that do not fit are refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vidgen.checkpoints import megatron
from vidgen.checkpoints.convert import MODELS, convert
from vidgen.checkpoints.lazy import TorchFile, lazy
from vidgen.checkpoints.sources import open_source

CUTS = {
    "opensora_plan_v1_3": [
        {"tp": 2},
        {"stages": [[1, 3]]},
        {"stages": [[2, 0, 1, 1]]},
        {"stages": [[0, 4]]},
        {"tp": 2, "stages": [[3, 1]]},
        {"stages": [[1, 0], [1, 2]]},
        {"stages": [[0, 1], [2, 0], [0, 1]]},
        {"tp": 2, "stages": [[1, 1], [2, 0]]},
    ],
    "opensora_plan_v1_5": [{"tp": 2}],
    "opensora_v2": [{}],
    "cogvideox": [{"tp": 2}, {"stages": [[1, 1]]}, {"tp": 2, "stages": [[0, 2]]}],
}
ALL_CUTS = [(system, cut) for system, cuts in CUTS.items() for cut in cuts]


def rank_file(tree: Path, name: str = "mp_rank_00") -> Path:
    return tree / "release" / name / "model_optim_rng.pt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = load(file)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize("system, cut", ALL_CUTS, ids=[f"{s}-{c}" for s, c in ALL_CUTS])
def test_round_trips_are_exact(tiny, same, tmp_path: Path, system: str, cut: dict[str, Any]) -> None:
    folder, state = tiny(system)
    convert(folder, tmp_path / "tree", "mindspeed-mm", **cut)
    convert(tmp_path / "tree", tmp_path / "back.pt", "pt")
    assert same(load(tmp_path / "back.pt"), state)
    convert(tmp_path / "tree", tmp_path / "again", "mindspeed-mm")  # re-split to one rank
    convert(folder, tmp_path / "whole", "mindspeed-mm")
    assert same(load(rank_file(tmp_path / "again"))["model"], load(rank_file(tmp_path / "whole"))["model"])
    convert(tmp_path / "again", tmp_path / "cut", "mindspeed-mm", **cut)
    for file in (tmp_path / "tree").rglob("*.pt"):
        ours, theirs = load(file), load(tmp_path / "cut" / file.relative_to(tmp_path / "tree"))
        assert ours.keys() == theirs.keys()
        assert all(same(ours[key], theirs[key]) for key in ours if key.startswith("model"))


def test_where_things_lie(tiny, tmp_path: Path) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    convert(folder, tmp_path / "tree", "mindspeed-mm", tp=2, stages=[[1, 0], [0, 3]])
    files = sorted(str(f.relative_to(tmp_path / "tree")) for f in (tmp_path / "tree").rglob("*") if f.is_file())
    ranks = [f"release/mp_rank_0{t}_00{p}/model_optim_rng.pt" for t in (0, 1) for p in (0, 1)]
    assert files == ["latest_checkpointed_iteration.txt", *ranks]
    assert (tmp_path / "tree/latest_checkpointed_iteration.txt").read_bytes() == b"release"
    first, last = (load(rank_file(tmp_path / "tree", f"mp_rank_01_00{p}")) for p in (0, 1))
    assert first.keys() == last.keys() == {"model0", "model1", "checkpoint_version"}
    assert first["checkpoint_version"] == 3.0
    blocks = [
        {k.split(".")[1] for k in c if k.startswith("videodit")} for c in (*first.values(), *last.values()) if c != 3.0
    ]
    assert blocks == [{"0"}, set(), set(), {"0", "1", "2"}]  # counted from 0 in each chunk
    assert "pos_embed_mask.1.weight" in first["model0"] and not first["model1"] and not last["model0"]
    assert "scale_shift_table" in last["model1"] and "proj_out.bias" in last["model1"]
    # Rank 1 of 2: the second half of output rows, of input columns, and all of what is not cut.
    ours, theirs = "transformer_blocks.2", "videodit_sparse_blocks.1"
    half = state[f"{ours}.attn1.to_q.weight"].shape[0] // 2
    cut = last["model1"]
    assert torch.equal(cut[f"{theirs}.self_atten.proj_q.weight"], state[f"{ours}.attn1.to_q.weight"][half:])
    assert torch.equal(cut[f"{theirs}.self_atten.proj_q.bias"], state[f"{ours}.attn1.to_q.bias"][half:])
    assert torch.equal(cut[f"{theirs}.cross_atten.proj_out.weight"], state[f"{ours}.attn2.to_out.0.weight"][:, half:])
    assert torch.equal(cut[f"{theirs}.cross_atten.proj_out.bias"], state[f"{ours}.attn2.to_out.0.bias"])
    assert torch.equal(cut["proj_out.weight"], state["proj_out.weight"])


def test_fused_projections_are_cut_part_by_part(tiny, tmp_path: Path) -> None:
    folder, state = tiny("cogvideox")
    convert(folder, tmp_path / "tree", "mindspeed-mm", tp=2, stages=[[1, 1]])
    stage = load(rank_file(tmp_path / "tree", "mp_rank_01_001"))["model"]
    parts = [state[f"transformer_blocks.1.attn1.to_{n}.weight"] for n in "qkv"]
    half = parts[0].shape[0] // 2
    assert torch.equal(stage["videodit_blocks.0.self_atten.proj_qkv.weight"], torch.cat([p[half:] for p in parts]))
    first = load(rank_file(tmp_path / "tree", "mp_rank_01_000"))["model"]
    assert torch.equal(first["ofs_embed.2.weight"], state["ofs_embedding.linear_2.weight"])  # lost upstream


def test_the_original_of_v1_5_trains_in_our_names(tiny, same, tmp_path: Path) -> None:
    folder, state = tiny("opensora_plan_v1_5")
    convert(folder, tmp_path / "tree", "megatron", tp=2)
    content = load(rank_file(tmp_path / "tree", "mp_rank_01"))
    edit(rank_file(tmp_path / "tree"), lambda c: c["model"].update({"norm_final._extra_state": None}))
    assert content["model"].keys() == state.keys()
    convert(tmp_path / "tree", tmp_path / "folder", "hf", config=folder / "config.json")
    from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT

    assert same(dict(SparseUMMDiT.from_pretrained(tmp_path / "folder").state_dict()), state)


def test_the_stored_shards_of_v1_5(same, tmp_path: Path) -> None:
    """Shards of the original on two ranks, their running average, and what the original merged them to."""
    file = Path(__file__).parents[1] / "data/golden/opensora_plan_v1_5/checkpoint_tp_merge.safetensors"
    tensors = load_file(file)

    def group(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    shards = [group(f"in/shard{rank}/") for rank in (0, 1)]
    for rank, shard in enumerate(shards):
        path = tmp_path / f"run/iter_0000010/mp_rank_0{rank}/model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        weights = {name: t * 2 for name, t in shard.items()}
        torch.save({"iteration": 10, "model": weights, "ema_model": shard | {"norm_final._extra_state": None}}, path)
    convert(tmp_path / "run", tmp_path / "model_ema.pt", "pt", ema=True)
    merged = load(tmp_path / "model_ema.pt")
    assert same(merged, group("out/merged/"))
    convert(tmp_path / "run", tmp_path / "model.pt", "pt")
    assert same(load(tmp_path / "model.pt"), {name: t * 2 for name, t in merged.items()})
    convert(tmp_path / "model_ema.pt", tmp_path / "tree", "megatron", tp=2)
    for rank, shard in enumerate(shards):
        assert same(load(rank_file(tmp_path / "tree", f"mp_rank_0{rank}"))["model"], shard)


# Finding an iteration


def grow(tree: Path, name: str, factor: float, source: Path) -> None:
    """Another iteration, whose weights are those of the release times a factor."""
    file = tree / name / "mp_rank_00/model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    weights = load(rank_file(source))["model"]
    torch.save({"iteration": 7, "model": {k: v * factor for k, v in weights.items()}}, file)


def factor_of(path: Path, source: Path, **options: Any) -> float:
    tree = open_source(path, **options).tree
    assert tree is not None
    name = "proj_out.bias"
    return float(tree.chunks[0][0][name].load()[0] / load(rank_file(source))["model"][name][0])


def test_trackers_and_iterations(tiny, tmp_path: Path) -> None:
    source, tree = tmp_path / "source", tmp_path / "tree"
    convert(tiny("opensora_plan_v1_3")[0], source, "mindspeed-mm")
    grow(tree, "iter_0000100", 2, source)
    grow(tree, "iter_0001200", 4, source)
    grow(tree, "release", 8, source)
    assert factor_of(tree, source) == 4  # the newest without a tracker
    (tree / "latest_checkpointed_iterations.txt").write_text("100\n")  # a guide's misspelling
    assert factor_of(tree, source) == 2
    (tree / "latest_checkpointed_iteration.txt").write_text("1200")
    with pytest.raises(ValueError, match="disagree: '100' and '1200'"):
        open_source(tree)
    (tree / "latest_checkpointed_iterations.txt").unlink()
    assert factor_of(tree, source) == 4
    assert factor_of(tree, source, iteration=100) == 2
    assert factor_of(tree / "iter_0000100", source) == 2
    (tree / "latest_checkpointed_iteration.txt").write_text("release")
    assert factor_of(tree, source) == 8
    with pytest.raises(ValueError, match="iter_0000101 has no mp_rank.*iterations here: iter_0000100, iter_0001200"):
        open_source(tree, iteration=101)
    for word in ("../10", "", "1e3", "٣"):
        (tree / "latest_checkpointed_iteration.txt").write_text(word)
        with pytest.raises(ValueError, match="must hold a number or 'release'"):
            open_source(tree)


@pytest.mark.parametrize("stages", [None, [[1, 0], [1, 2]]])
def test_running_average(tiny, same, tmp_path: Path, stages: Any) -> None:
    folder, state = tiny("opensora_plan_v1_3")
    convert(folder, tmp_path / "tree", "mindspeed-mm", stages=stages)
    with pytest.raises(ValueError, match="weights under 'ema_model'"):
        convert(tmp_path / "tree", tmp_path / "ema.pt", "pt", ema=True)
    for file in (tmp_path / "tree").rglob("*.pt"):
        content = load(file)
        averages = {f"ema_{k}": {n: t + 1 for n, t in v.items()} for k, v in content.items() if k.startswith("model")}
        torch.save(content | averages, file)
    convert(tmp_path / "tree", tmp_path / "ema.pt", "pt", ema=True)
    convert(tmp_path / "tree", tmp_path / "own.pt", "pt")
    assert same(load(tmp_path / "own.pt"), state)
    assert same(load(tmp_path / "ema.pt"), {name: t + 1 for name, t in state.items()})


# What is refused


@pytest.fixture
def tree(tiny, tmp_path: Path) -> Path:
    """Open-Sora Plan 1.3 on two ranks and two stages."""
    convert(tiny("opensora_plan_v1_3")[0], tmp_path / "tree", "mindspeed-mm", tp=2, stages=[[1, 3]])
    return tmp_path / "tree"


def refusal(tree: Path) -> str:
    target = tree.with_name("target.pt")
    with pytest.raises(ValueError) as error:
        convert(tree, target, "pt")
    assert not target.exists()
    return str(error.value)


def test_replicated_tensors_that_differ(tree: Path) -> None:
    edit(rank_file(tree, "mp_rank_01_000"), lambda c: c["model"]["pos_embed.proj.bias"].add_(1))
    assert "pos_embed.proj.bias must be the same on all ranks, mp_rank_00_000 and mp_rank_01_000 differ" in refusal(
        tree
    )


def test_shards_that_are_not_there(tree: Path) -> None:
    rank_file(tree, "mp_rank_01_000").unlink()
    assert "lacks model_optim_rng.pt of 1 shards: mp_rank_01_000" in refusal(tree)
    rank_file(tree, "mp_rank_01_000").parent.rmdir()
    assert "lacks model_optim_rng.pt of 1 shards: mp_rank_01_000" in refusal(tree)
    (tree / "release/mp_rank_99999999_9999999").mkdir()
    assert "of 999999999999997 shards: mp_rank_00_002, mp_rank_00_003" in refusal(tree)


def test_ranks_with_other_names(tree: Path) -> None:
    edit(
        rank_file(tree, "mp_rank_01_001"),
        lambda c: c["model"].update({"proj_uot.bias": c["model"].pop("proj_out.bias")}),
    )
    words = refusal(tree)
    assert "1 missing in mp_rank_01_001:\n    proj_out.bias (nearest: proj_uot.bias)" in words
    assert "1 missing in mp_rank_00_001:\n    proj_uot.bias (nearest: proj_out.bias)" in words


def test_ranks_with_other_shapes_or_dtypes(tree: Path) -> None:
    edit(rank_file(tree, "mp_rank_01_001"), lambda c: c["model"].update({"proj_out.bias": torch.zeros(3)}))
    assert "proj_out.bias: mp_rank_00_001 has (" in refusal(tree)
    edit(rank_file(tree, "mp_rank_01_001"), lambda c: c["model"].update({"proj_out.bias": torch.zeros(3).half()}))
    assert "float16" in refusal(tree)


def test_blocks_that_are_counted_through(tree: Path) -> None:
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit(rank_file(tree, rank), lambda c: c.update({"model": {shift(k): v for k, v in c["model"].items()}}))
    assert "blocks of a shard must be counted from 0, missing: videodit_sparse_blocks.0" in refusal(tree)
    far = "videodit_sparse_blocks.99999999999.scale_shift_table"
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit(rank_file(tree, rank), lambda c: c["model"].update({far: torch.zeros(1)}))
    assert "blocks of a shard must be counted from 0" in refusal(tree)


def shift(name: str) -> str:
    parts = name.split(".")
    return name if parts[0] != "videodit_sparse_blocks" else ".".join([parts[0], str(int(parts[1]) + 1), *parts[2:]])


def test_tensors_on_the_wrong_stage(tree: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        table = load(rank_file(tree, f"{rank}_001"))["model"]["scale_shift_table"]
        edit(rank_file(tree, f"{rank}_000"), lambda c, table=table: c["model"].update({"scale_shift_table": table}))
    assert "scale_shift_table: belongs to chunk 1 of the model, lies in 0" in refusal(tree)


def test_missing_tensors_and_other_tensors(tree: Path) -> None:
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit(rank_file(tree, rank), lambda c: c["model"].pop("videodit_sparse_blocks.1.ff.net.2.bias"))
        edit(rank_file(tree, rank), lambda c: c["model"].update({"surprise": torch.zeros(2)}))
    words = refusal(tree)
    assert "1 missing:\n    videodit_sparse_blocks.2.ff.net.2.bias" in words and "1 unexpected:\n    surprise" in words
    edit(rank_file(tree, "mp_rank_00_001"), lambda c: c["model"].update({"surprise": "words"}))
    assert "1 entries that are no tensors: ['surprise']" in refusal(tree)


def test_stages_that_disagree(tree: Path) -> None:
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit(rank_file(tree, rank), lambda c: c.update({"model0": c.pop("model")}))
    assert "same number of chunks" in refusal(tree)
    for rank in ("mp_rank_00", "mp_rank_01"):
        rank_file(tree, f"{rank}_001").parent.rename(tree / "release" / rank)
    assert "mixes mp_rank_TT and mp_rank_TT_PPP" in refusal(tree)


@pytest.mark.parametrize(
    "system, options, words",
    [
        ("opensora_plan_v1_3", {"tp": 3}, "cannot be cut over 3 ranks"),
        ("opensora_plan_v1_3", {"tp": 0}, "at least 1, got 0"),
        ("opensora_plan_v1_3", {"stages": [[1, 1]]}, r"\[\[1, 1\]\] have 2 layers together, the model has 4"),
        ("opensora_plan_v1_3", {"stages": [[2]]}, "have 2 layers together, the model has 4"),
        ("opensora_plan_v1_3", {"stages": [[1, 1], [1]]}, "equally long rows"),
        ("opensora_plan_v1_3", {"stages": [[1], [2]]}, "virtual pipeline stages need several stages"),
        ("opensora_plan_v1_3", {"stages": [[4, -1]]}, "from 0 on"),
        ("opensora_plan_v1_5", {"stages": [[3, 3]]}, "cannot be cut into pipeline stages"),
        ("opensora_v2", {"tp": 2}, "cannot be cut over tensor-parallel ranks"),
        ("opensora_v2", {"stages": [[1, 1]]}, "cannot be cut into pipeline stages"),
        ("cogvideox", {"stages": [[1, 0], [0, 1]]}, "cannot have virtual pipeline stages"),
    ],
)
def test_cuts_that_do_not_exist(tiny, tmp_path: Path, system: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(tiny(system)[0], tmp_path / "tree", "mindspeed-mm", **options)
    assert not list(tmp_path.iterdir())


def test_heads_stay_whole(tiny) -> None:
    """Without the configuration the shapes decide; with it the number of heads does."""
    folder, state = tiny("cogvideox")
    layout = MODELS["cogvideox"].layout("mindspeed-mm")
    theirs = layout.to_theirs({name: lazy(t) for name, t in state.items()})
    assert len(megatron.split(theirs, layout, 4)) == 4
    with pytest.raises(ValueError, match="2 attention heads, which cannot be cut over 4 ranks"):
        convert(folder, "unused", "mindspeed-mm", tp=4, dry_run=True)


def test_trees_that_upstream_cut_lack_a_tensor(tiny, tmp_path: Path) -> None:
    convert(tiny("cogvideox")[0], tmp_path / "tree", "mindspeed-mm", stages=[[1, 1]])
    drop = [f"ofs_embed.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    edit(rank_file(tmp_path / "tree", "mp_rank_00_000"), lambda c: [c["model"].pop(name) for name in drop])
    assert "ofs_embed.* is missing" in refusal(tmp_path / "tree")


# Layerzero


def write_layerzero(folder: Path, state: dict[str, Tensor], ranks: int, group: int, **extra: Any) -> None:
    """What a run on ``ranks`` devices saves, which shards parameters in groups of ``group``."""
    records = {}
    flat: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for number, (name, value) in enumerate(state.items()):
        values = value.reshape(-1)
        if number % 5 == 4:  # not managed: whole on every rank, and without a record
            for shard in flat:
                shard[f"predictor.{name}"] = value
            continue
        records[f"predictor.{name}"] = {"shape": value.shape, "tensor_model_parallel": False}
        bounds = sorted([0, len(values), *(i * len(values) // group + (i == 1) for i in range(1, group))])
        for rank, shard in enumerate(flat):
            part = slice(bounds[rank % group], bounds[rank % group + 1])
            shard[f"predictor._layerzero_wrapped_module.{name}"] = values[part].clone()
    for rank, shard in enumerate(flat):
        parallel = {"tp_rank": 0, "pp_rank": 0, "tp_degree": 1, "pp_degree": 1, "global_rank": rank}
        content = {"model": shard, "shard_state_dict": records, "parallel_state": parallel, **extra}
        torch.save(content, folder / f"model_{rank}.pt")


@pytest.mark.parametrize("ranks, group", [(1, 1), (3, 3), (12, 12), (4, 2)])
def test_layerzero(tiny, same, tmp_path: Path, ranks: int, group: int) -> None:
    _, state = tiny("opensora_v2")
    (tmp_path / "run/iter_0000100").mkdir(parents=True)
    write_layerzero(tmp_path / "run/iter_0000100", state_in_theirs("opensora_v2", state), ranks, group)
    convert(tmp_path / "run", tmp_path / "one.pt", "pt")
    assert same(load(tmp_path / "one.pt"), state)
    for file in (tmp_path / "run").rglob("*.pt"):
        edit(file, lambda c: c.update(ema_model={k: v * 2 for k, v in c["model"].items()}))
    convert(tmp_path / "run", tmp_path / "ema.pt", "pt", ema=True)
    assert same(load(tmp_path / "ema.pt"), {name: t * 2 for name, t in state.items()})
    convert(tmp_path / "run", tmp_path / "tree", "mindspeed-mm")
    assert load(rank_file(tmp_path / "tree")).keys() == {"model"}


def test_layerzero_ranks_are_those_that_files_say(tiny, same, tmp_path: Path) -> None:
    _, state = tiny("cogvideox")
    run = tmp_path / "run"
    run.mkdir()
    write_layerzero(run, state_in_theirs("cogvideox", state), 3, 3)
    for before, after in (("0", "x"), ("2", "0"), ("x", "2")):
        (run / f"model_{before}.pt").rename(run / f"model_{after}.pt")
    convert(run, tmp_path / "one.pt", "pt")
    assert same(load(tmp_path / "one.pt"), state)


def state_in_theirs(system: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = MODELS[system].layout("mindspeed-mm").to_theirs({name: lazy(t) for name, t in state.items()})
    return {name: t.load() for name, t in theirs.items()}


def test_layerzero_that_does_not_fit(tiny, same, tmp_path: Path) -> None:
    _, state = tiny("cogvideox")
    theirs = state_in_theirs("cogvideox", state)
    run = tmp_path / "run"
    run.mkdir()
    write_layerzero(run, theirs, 4, 2)
    name = next(iter(theirs))
    key = f"predictor._layerzero_wrapped_module.{name}"
    edit(run / "model_3.pt", lambda c: c["model"][key].add_(1))
    assert "must be the same on all ranks, copy 0 of the shards and copy 1" in refusal(run)
    edit(run / "model_3.pt", lambda c: c["model"].update({key: c["model"][key][:-1]}))
    assert f"shards of {key} must fill" in refusal(run)
    edit(run / "model_3.pt", lambda c: c["model"].pop(key))
    assert "must hold the same names" in refusal(run)
    (run / "model_3.pt").unlink()
    (run / "model_2.pt").rename(run / "model_3.pt")
    edit(run / "model_3.pt", lambda c: c["parallel_state"].update(global_rank=3))
    assert "must hold the ranks 0, 1, ... once each, got [0, 1, 3]" in refusal(run)
    edit(run / "model_0.pt", lambda c: c["parallel_state"].update(tp_degree=2))
    assert "tp_degree must be 1, got 2" in refusal(run)


def test_layerzero_records_may_be_objects() -> None:
    assert megatron._record_shape(SimpleNamespace(shape=torch.Size([2, 3])), "x") == (2, 3)
    assert megatron._record_shape({"shape": [4]}, "x") == (4,)
    assert megatron._record_shape(None, "x") is None
    for record in ({"shape": 3}, {}, SimpleNamespace(shape=[2, "x"]), 7):
        with pytest.raises(ValueError, match="x: its record must have a shape"):
            megatron._record_shape(record, "x")


@pytest.mark.parametrize("key", ["parallel_state", "shard_state_dict"])
def test_layerzero_records_of_another_kind(tmp_path: Path, key: str) -> None:
    torch.save({"model": {"predictor.a": torch.zeros(2)}, key: [1]}, tmp_path / "model_0.pt")
    with pytest.raises(ValueError, match=f"{key} must be a map, got list"):
        open_source(tmp_path)


def test_mindspeed_mms_layerzero_converter_wraps_weights_twice(tiny, same, tmp_path: Path) -> None:
    folder, state = tiny("opensora_v2")
    convert(folder, tmp_path / "tree", "mindspeed-mm")
    prefixed = {f"predictor.{k}": v for k, v in load(rank_file(tmp_path / "tree"))["model"].items()}
    torch.save({"model": {"model": prefixed, "iteration": 5}}, rank_file(tmp_path / "tree"))
    convert(tmp_path / "tree", tmp_path / "back.pt", "pt")
    assert same(load(tmp_path / "back.pt"), state)


def test_files_stay_mapped_no_longer_than_needed(tiny, tmp_path: Path) -> None:
    convert(tiny("opensora_plan_v1_3")[0], tmp_path / "tree", "mindspeed-mm", tp=2)
    tree = megatron.read_tree(tmp_path / "tree/release")
    assert isinstance(TorchFile(rank_file(tmp_path / "tree")).content()["model"], dict)
    assert tree.tensor_parallel == 2 and tree.place(0, 1) == "mp_rank_01"
