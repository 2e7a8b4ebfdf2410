# SPDX-License-Identifier: Apache-2.0
import argparse

import pytest
import torch

from vidgen.checkpoints.open_sora_plan_v1_5 import (
    load_tensor_parallel,
    merge_tensor_parallel,
    split_tensor_parallel,
    tensor_parallel_axis,
)

AXES = {
    "patch_embed.proj.weight": None,
    "time_text_embed.timestep_embedder.linear_1.weight": None,
    "transformer_blocks.0.0.attn1.to_q.weight": 0,
    "transformer_blocks.0.0.attn1.to_q.bias": 0,
    "transformer_blocks.0.0.attn1.norm_q.weight": None,
    "transformer_blocks.0.0.attn1.to_out.0.weight": 1,
    "transformer_blocks.0.0.attn1.to_out.0.bias": None,
    "transformer_blocks.0.0.attn1.to_add_out.weight": 1,
    "transformer_blocks.0.0.ff_enc.net.0.proj.weight": 0,
    "transformer_blocks.0.0.ff.net.2.weight": 1,
    "transformer_blocks.0.0.norm1.linear.bias": 0,
    "transformer_blocks.0.0.norm1.norm_enc.bias": None,
    "norm_out.linear.weight": 0,
    "norm_out.norm.weight": None,
    "skip_norm_linear.0.1.weight": None,
    "proj_out.weight": None,
}


def full_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(8, 4) if name.endswith("weight") else torch.randn(8) for name in AXES}


def write(folder, shards, *, key="model", iteration=10, **content):
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    for rank, shard in enumerate(shards):
        file = folder / f"iter_{iteration:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({key: shard, **content}, file)


@pytest.mark.parametrize(("name", "axis"), AXES.items())
def test_axis(name, axis):
    assert tensor_parallel_axis(name) == axis


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_round_trip_through_files(tmp_path, num_ranks):
    state = full_state()
    shards = split_tensor_parallel(state, num_ranks)
    extra = {"transformer_blocks.0.0.attn1.to_q._extra_state": None}
    args = argparse.Namespace(tensor_model_parallel_size=num_ranks, lr=1e-5)
    write(tmp_path, [{**shard, **extra} for shard in shards], key="ema_model", args=args)
    for folder, iteration in ((tmp_path, None), (tmp_path, 10), (tmp_path / "iter_0000010", None)):
        merged = load_tensor_parallel(folder, key="ema_model", iteration=iteration)
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[name], state[name]) for name in state)


def test_differing_replicas_warn_and_the_last_wins():
    shards = split_tensor_parallel(full_state(), 2)
    shards[0]["proj_out.weight"] = shards[0]["proj_out.weight"] + 1
    with pytest.warns(UserWarning, match="proj_out.weight"):
        merged = merge_tensor_parallel(shards)
    assert torch.equal(merged["proj_out.weight"], shards[1]["proj_out.weight"])


class Harmful:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_files_that_run_code_are_refused(tmp_path, capsys):
    write(tmp_path, [full_state()], rng_state=Harmful())
    with pytest.raises(ValueError, match="not plain data"):
        load_tensor_parallel(tmp_path)
    assert capsys.readouterr().out == ""


def test_bad_checkpoints_are_named(tmp_path):
    state = full_state()
    with pytest.raises(ValueError, match="at least one rank"):
        merge_tensor_parallel([])
    with pytest.raises(ValueError, match="one of them only: proj_out.weight"):
        merge_tensor_parallel([state, {n: t for n, t in state.items() if n != "proj_out.weight"}])
    with pytest.raises(ValueError, match="to_q.weight must have one shape"):
        merge_tensor_parallel([state, {**state, "transformer_blocks.0.0.attn1.to_q.weight": torch.zeros(8, 5)}])
    with pytest.raises(ValueError, match="must be a tensor"):
        merge_tensor_parallel([{**state, "proj_out.weight": None}])
    with pytest.raises(ValueError, match="divisible by 3"):
        split_tensor_parallel(state, 3)
    with pytest.raises(FileNotFoundError, match="latest_checkpointed_iteration"):
        load_tensor_parallel(tmp_path)
    write(tmp_path, [state])
    with pytest.raises(FileNotFoundError, match="iter_0000011"):
        load_tensor_parallel(tmp_path, iteration=11)
    with pytest.raises(ValueError, match="'ema_model', got model"):
        load_tensor_parallel(tmp_path, key="ema_model")
    (tmp_path / "iter_0000010" / "mp_rank_00").rename(tmp_path / "iter_0000010" / "mp_rank_00_000")
    with pytest.raises(ValueError, match="pipeline stages"):
        load_tensor_parallel(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../10")
    with pytest.raises(ValueError, match="tracker"):
        load_tensor_parallel(tmp_path)
