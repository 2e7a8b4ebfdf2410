# SPDX-License-Identifier: Apache-2.0
"""The planner: what is legal, and its formulas against what processes really send and keep."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vidgen import cli
from vidgen.parallel import Parallel
from vidgen.parallel import plan as planning
from vidgen.parallel.cost import (
    Shares,
    activation_bytes,
    exchange_bytes,
    in_flight,
    memory_of,
    sent_bytes,
    sharding_bytes,
    stages_of,
)
from vidgen.parallel.facts import ModelFacts, ModelShape
from vidgen.parallel.timing import Group, Machine, cost, machine_with
from vidgen.train.facts import facts_of, require_legal, shape_of, transformer_facts
from vidgen.train.recipe import load_recipe
from vidgen.train.tracing import build

from .plan_table import CASES, SPARSE, SYSTEMS, cases_of, sent_table
from .pool import Pool

ROOT = Path(__file__).parents[2]
SHARDED: dict[str, dict[str, Any]] = {
    "shard 4": {},
    "shard 4, whole until backward": {"reshard_after_forward": False},
    "replicate 2 x shard 2": {"replicate": 2},
}


# The formulas' side


@cache
def facts_like(system: str) -> ModelFacts:
    """Of the models that the processes of plan_cases.py run."""
    import plan_cases
    from tiny import make_inputs

    whole = plan_cases.build(system)
    model = build(type(whole), whole.config, torch.float32)
    given, counts = [], []
    for frames in (plan_cases.LATENT[0], plan_cases.LATENT[0] // 2):
        inputs = make_inputs(whole, (frames, *plan_cases.LATENT[1:]), batch=1, text=plan_cases.TEXT, masks=False)
        counts.append(count_tokens(whole, inputs))
        given.append({name: t.to("meta") for name, t in inputs.items()})
    return transformer_facts(model, given, counts, name=system, text=plan_cases.TEXT, element=4)


def count_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    if "img" in inputs:
        return inputs["img"].shape[1]
    patch = model.config.patch if hasattr(model.config, "patch") else model.patch
    return math.prod(n // p for n, p in zip(inputs["hidden_states"].shape[2:], patch, strict=True))


@pytest.fixture(autouse=True)
def workers_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other by their own names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(pool: Pool) -> Any:
    """What processes send and keep, by system and case; each system is run once."""

    @cache
    def run(system: str) -> Any:
        return pool.run("plan_cases.exchanges", 4, system=system, cases=cases_of(system))

    return run


def formula_of(system: str, name: str) -> tuple[float, float]:
    """Bytes that a rank sends forward and backward."""
    facts, parallel = facts_like(system), Parallel(**CASES[name], shard=1)
    (stage,) = stages_of(facts, parallel)
    found = [
        (count, sent)
        for step, count in stage.all
        for sent in exchange_bytes(facts, Shares(facts, parallel), step).values()
    ]
    return sum(count * sent[0] for count, sent in found), sum(count * sent[1] for count, sent in found)


CASES_OF_SYSTEMS = [(system, name) for system in SYSTEMS for name in cases_of(system)]


@pytest.mark.parametrize(("system", "name"), CASES_OF_SYSTEMS)
def test_bytes_sent(measured: Any, system: str, name: str) -> None:
    formula = formula_of(system, name)
    counted = [sum(rank[name][way] for rank in measured(system)) / 4 for way in (0, 1)]
    # Which hidden states stay where they are is luck where whole groups move.
    assert counted == pytest.approx(list(formula), rel=0.1 if "groups" in name else 1e-9)
    assert min(formula) > 0


@pytest.mark.parametrize(("system", "name"), CASES_OF_SYSTEMS)
def test_bytes_kept(measured: Any, system: str, name: str) -> None:
    facts, parallel = facts_like(system), Parallel(**CASES[name], shard=1)
    (stage,) = stages_of(facts, parallel)
    kept = max(rank[name][2] for rank in measured(system))
    assert activation_bytes(facts, stage, Shares(facts, parallel)) == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("system", ["opensora_plan_v1_5", "cogvideox"])
def test_bytes_of_shards(pool: Pool, system: str) -> None:
    replies = pool.run("plan_cases.shards", 4, system=system, cases=SHARDED, micro=2)
    for name, case in SHARDED.items():
        facts, parallel = facts_like(system), Parallel(**case)
        sizes, (stage,) = parallel.sizes(4), stages_of(facts, parallel)
        formula = sharding_bytes(facts, stage, Shares(facts, parallel), sizes, micro=2)
        formula["gather from replicas"] = 0.0  # which is the optimizer's
        counted = sum(reply[name] for reply in replies) / 4
        assert counted == pytest.approx(sum(formula.values()), rel=0.02), name  # shards are padded to one size


@pytest.mark.parametrize("system", SYSTEMS[:3])  # tiny CogVideoX has two blocks
def test_bytes_of_a_pipeline(pool: Pool, system: str) -> None:
    """Skip connections travel too. Exchanges inside a stage are not sends, but all-to-alls."""
    blocks = facts_like(system).shape.blocks
    cases = {"even": {"pipeline": 4}, "virtual": {"pipeline": 2, "ulysses": 2, "stages": [[1, 1], [1, blocks - 3]]}}
    replies = pool.run("plan_cases.pipeline", 4, system=system, cases=cases, micro=4)
    for name, case in cases.items():
        parallel = Parallel(**case, shard=1)
        facts, sizes = facts_like(system), parallel.sizes(4)
        formula = [
            sent_bytes(facts, stage, Shares(facts, parallel), sizes, micro=4)["pipeline"]
            for stage in stages_of(facts, parallel)
            for _ in range(parallel.ulysses)
        ]
        assert [reply[name] for reply in replies] == pytest.approx(formula), name


def test_bytes_of_a_larger_model() -> None:
    """One process, wider and longer than the tiny models: what a pass keeps, with and without recomputation."""
    from plan_cases import count_kept

    for recomputed in (False, True):
        facts, model, inputs = middle_sized(recomputed)
        (stage,) = stages_of(facts, Parallel())
        formula = activation_bytes(facts, stage, Shares(facts, Parallel()))
        assert formula == pytest.approx(count_kept(model, inputs), rel=0.15), recomputed


def middle_sized(recomputed: bool) -> tuple[ModelFacts, Any, dict[str, torch.Tensor]]:
    from tiny import make_inputs, make_model

    whole = make_model("opensora_plan_v1_5", num_heads=4, head_dim=32)
    whole.gradient_checkpointing = recomputed
    model = build(type(whole), whole.config, torch.float32)
    inputs = [make_inputs(whole, (frames, 16, 16), batch=1, text=16, masks=False) for frames in (6, 3)]
    given = [{name: t.to("meta") for name, t in some.items()} for some in inputs]
    counts = [6 * 64, 3 * 64]
    facts = transformer_facts(model, given, counts, name="", text=16, element=4, recomputed=recomputed)
    return facts, whole, inputs[0]


def test_arithmetic_is_that_of_a_real_pass() -> None:
    from plan_cases import build as build_whole
    from tiny import make_inputs

    from vidgen.train.profile import FlopCount

    for system in SYSTEMS:
        whole = build_whole(system)
        with FlopCount() as count, torch.no_grad():
            whole(**make_inputs(whole, (4, 8, 8), batch=1, text=8, masks=False))
        facts = facts_like(system)
        # The profiler also counts what the fused ops do to each number.
        assert facts.flops == pytest.approx(count.total, rel=0.02), system
        assert facts.parameters == sum(p.numel() for p in whole.parameters())


# What is legal

SHAPE = ModelShape(heads=24, blocks=32, tokens=36_864, ratios=(1, 2, 4, 8))
DENSE = ModelShape(heads=24, blocks=42, tokens=17_550)
VAE = ModelShape(heads=0, blocks=0, tokens=0)
REFUSED: dict[str, tuple[ModelShape, dict[str, Any], int, int | None, str, dict[str, Any]]] = {
    "heads": (SHAPE, {"tensor": 5}, 5, None, "tensor must divide the 24 heads, got 5; nearest: 4 or 6", {"tensor": 6}),
    "processes": (SHAPE, {"ulysses": 4, "shard": 3}, 8, None, "set shard=2", {"ulysses": 4, "shard": 2}),
    "too many stages": (DENSE, {"pipeline": 48}, 48, None, "nearest: pipeline=42", {"pipeline": 42}),
    "sum of stages": (
        DENSE,
        {"pipeline": 4, "stages": [10, 10, 10, 10]},
        4,
        None,
        "add up to the model's 42 blocks, got 40; nearest: [11, 11, 10, 10]",
        {"pipeline": 4, "stages": [11, 11, 10, 10]},
    ),
    "dense groups": (DENSE, {"ulysses": 2, "skiparse": "groups"}, 2, None, "this one has none", {"ulysses": 2}),
    "groups in a ring": (SHAPE, {"ring": 2, "skiparse": "groups"}, 2, None, "set ulysses", {"ulysses": 2}),
    "groups of tensors": (
        SHAPE,
        {"tensor": 2, "skiparse": "groups"},
        2,
        None,
        "nearest: skiparse='heads'",
        {"tensor": 2},
    ),
    "vae": (VAE, {"ulysses": 2}, 2, None, "nearest: shard and replicate alone", {"shard": 2}),
    "micro-batches": (
        SHAPE,
        {"pipeline": 2, "stages": [[8, 8], [8, 8]]},
        2,
        5,
        "training.accumulation must be a multiple of 2",
        {"pipeline": 2, "stages": [16, 16]},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_nearest_legal_way(name: str) -> None:
    shape, parallel, world, accumulation, words, nearest = REFUSED[name]
    problems = planning.check(shape, Parallel(**parallel), world, accumulation=accumulation)
    assert any(words in problem for problem in problems), problems
    legal = Parallel(**nearest)
    assert planning.check(shape, legal, math.prod(legal.sizes(total(legal)).values()), accumulation=accumulation) == []


def total(parallel: Parallel) -> int:
    return parallel.replicate * parallel.context * parallel.tensor * parallel.pipeline * (parallel.shard or 1)


def test_what_is_wasteful() -> None:
    (idle,) = planning.warnings(SHAPE, Parallel(ulysses=8, tensor=6))
    assert "leaves 4 ranks without one of the 4 heads" in idle and "ulysses=4, ring=2" in idle
    (empty,) = planning.warnings(ModelShape(heads=8, blocks=2, tokens=100, ratios=(1, 4)), Parallel(ring=8))
    assert "8 ranks share 7 runs of 16 tokens" in empty
    (bubble,) = planning.warnings(DENSE, Parallel(pipeline=4), accumulation=2)
    assert "idle for 60% of the time; nearest: training.accumulation=4" in bubble
    assert planning.warnings(SHAPE, Parallel(ulysses=5)) == []  # heads need not divide
    assert planning.warnings(DENSE, Parallel(pipeline=4), accumulation=4) == []


# The formulas by themselves


@pytest.mark.parametrize(("stages", "micro"), [(1, 5), (2, 1), (2, 4), (4, 2), (4, 9)])
def test_micro_batches_in_flight(stages: int, micro: int) -> None:
    """Against the order in which 1F1B does things: stage s first goes forward ``stages - s`` times."""
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micro)
        order = ["F"] * warm_up + ["F", "B"] * (micro - warm_up) + ["B"] * warm_up
        held = [order[: i + 1].count("F") - order[: i + 1].count("B") for i in range(len(order))]
        assert in_flight(stage, stages, 1, micro, "1f1b") == (max(held) if stages > 1 else 1)
    assert in_flight(0, 4, 1, 9, "gpipe") == 9


def test_memory_adds_up() -> None:
    facts = facts_like("opensora_plan_v1_5")
    count = facts.parameters

    def memory(world: int, **sizes: Any) -> dict[str, float]:
        parallel = Parallel(**sizes)
        (stage,) = stages_of(facts, parallel)
        return memory_of(facts, stage, Shares(facts, parallel), parallel.sizes(world), 1)

    assert memory(1)["parameters"] == memory(1)["gradients"] == 4 * count
    assert memory(1)["optimizer"] == 3 * 4 * count  # two moments and the average
    assert memory(8)["parameters"] == memory(8, ulysses=4)["parameters"] == 4 * count / 8
    # A replica of two shards: the optimizer is divided over the replicas too, as layerzero's is, unless told otherwise.
    assert memory(8, replicate=4)["parameters"] == 4 * count / 2
    assert memory(8, replicate=4)["optimizer"] == 3 * 4 * count / 8
    assert memory(8, replicate=4, shard_optimizer=False)["optimizer"] == 3 * 4 * count / 2
    assert sum(memory(8, cpu_offload=True)[name] for name in ("parameters", "gradients", "optimizer")) == 0
    assert memory(4, ulysses=4)["activations"] < 0.4 * memory(1)["activations"]


def test_links() -> None:
    machine = Machine(link=100.0, network=10.0, node=8, latency=0.0)
    assert Group(4, 1, 8).collective(100.0, machine) == 1.0
    assert Group(4, 8, 8).collective(100.0, machine) == 10.0  # one of each node
    assert Group(16, 1, 8).collective(100.0, machine) == 100.0 / 80  # eight of each node, with eight adapters
    assert Group(2, 8, 8).all_to_all(100.0, machine) == 10.0
    assert Group(16, 1, 8).all_to_all(150.0, machine) == 8.0  # 80 of it to the other node
    assert Group(4, 2, 8).hop(100.0, machine) == 1.0
    assert Group(8, 2, 8).hop(100.0, machine) == 10.0
    assert Group(1, 1, 8).collective(100.0, machine) == 0.0


def test_more_of_everything_takes_longer() -> None:
    facts, machine = facts_like("opensora_plan_v1_5"), Machine()

    def seconds(**sizes: Any) -> dict[str, float]:
        return cost(facts, Parallel(**sizes), 4, machine, 4).seconds

    alone = cost(facts, Parallel(), 1, machine, 4).seconds
    assert alone["compute"] > 0 and set(alone) == {"compute", "shards"} and alone["shards"] == 0
    assert seconds(ulysses=4)["ulysses"] > 0
    assert seconds(tensor=4)["tensor"] > seconds(tensor=2)["tensor"]
    assert seconds(pipeline=4)["bubble"] == pytest.approx(3 / 4 * (seconds(pipeline=4)["compute"]), rel=0.3)
    assert seconds(replicate=4)["replicas"] > 0


# The search


@pytest.mark.parametrize("world", [1, 6, 8])
@pytest.mark.parametrize("system", SYSTEMS)
def test_search(system: str, world: int) -> None:
    facts = facts_like(system)
    plan = planning.search(facts, world, Machine(), samples=24)
    assert plan.best is plan.costs[0]
    assert all(math.prod(c.sizes.values()) == world for c in plan.costs)
    assert all(c.samples == 24 for c in plan.costs)
    assert all(planning.check(facts.shape, c.parallel, world, accumulation=c.accumulation) == [] for c in plan.costs)
    times = [1 / c.samples_per_s for c in plan.costs if plan.fits(c)]
    assert times == sorted(times)
    modes = {c.parallel.skiparse for c in plan.costs}
    assert ("groups" in modes) == (system in SPARSE and world > 1)
    for pipeline in {c.parallel.pipeline for c in plan.costs} - {1}:  # also with two virtual stages
        rows = {len(c.parallel.stage_rows) for c in plan.costs if c.parallel.pipeline == pipeline}
        assert rows == ({0, 2} if facts.shape.blocks >= 2 * pipeline else {0}), pipeline
    considered = len(plan.costs) + sum(count for count, _ in plan.refused.values())
    assert considered == len(list(planning.combinations(facts.shape, world, Parallel())))


def test_what_does_not_fit_comes_last() -> None:
    facts = facts_like("opensora_plan_v1_5")
    needed = sorted(c.memory_bytes for c in planning.search(facts, 4, Machine()).costs)
    limit = needed[len(needed) // 2] / planning.USABLE
    plan = planning.search(facts, 4, Machine(memory_bytes=limit))
    fits = [plan.fits(c) for c in plan.costs]
    assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits)
    assert planning.reason(plan, plan.costs[-1]).startswith("does not fit")
    nothing = planning.search(facts, 4, Machine(memory_bytes=1.0))
    assert nothing.best is None and "training.activation_checkpointing" in planning.recommendation(nothing)


def test_figures_of_a_machine() -> None:
    machine = machine_with(device_memory=64, tflops=200, node=16, link=50, network=25)
    assert (machine.memory_bytes, machine.linear_flops, machine.node) == (64e9, 200e12, 16)
    assert (machine.link, machine.network) == (50e9, 25e9)
    assert machine_with() == Machine()
    with pytest.raises(ValueError, match="node must be positive, got 0"):
        machine_with(node=0)


# The verb

RECIPE = str(ROOT / "configs/opensora_plan_v1_5/t2v_tiny.yaml")


def test_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", RECIPE, "--world", "4", "--parallel.ulysses", "2", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 processes on H100" in out and "the recipe's own:" in out and "recommended:\nparallel:\n" in out
    assert cli.main(["plan", RECIPE, "--world", "4", "--json", "--samples", "12", "--device-memory", "40"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["recommended"]
    chosen = load_recipe(RECIPE, [f"--parallel.{name}={value}" for name, value in best["parallel"].items()])
    assert chosen.parallel is not None
    assert planning.check(shape_of(chosen), chosen.parallel, 4, accumulation=best["accumulation"]) == []
    assert found["machine"]["memory_bytes"] == 40e9
    assert {c["samples"] for c in found["combinations"]} == {12}


def test_verb_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", RECIPE, "--world", "0"]) == 2
    assert "world must be positive, got 0" in capsys.readouterr().err
    assert cli.main(["plan", RECIPE, "--world", "4", "--parallel.tensr", "2"]) == 2
    assert "tensor" in capsys.readouterr().err
    assert cli.main(["plan", RECIPE, "--world", "3", "--parallel.tensor", "3"]) == 0
    assert "tensor must divide the 4 heads, got 3; nearest: 2 or 4" in capsys.readouterr().out


def test_what_the_trainer_calls() -> None:
    recipe = load_recipe(RECIPE, ["--parallel.tensor", "3", "--parallel.stages", "[1, 1]", "--parallel.pipeline", "2"])
    with pytest.raises(ValueError, match=r"tensor must divide the 4 heads.*add up to the model's 6 blocks, got 2"):
        require_legal(recipe, 6)
    assert require_legal(load_recipe(RECIPE, ["--parallel.ulysses", "4"]), 8) == []
    assert "leaves 1 ranks" in require_legal(load_recipe(RECIPE, ["--parallel.ulysses", "5"]), 5)[0]
    assert require_legal(load_recipe(RECIPE), 3) == []


def test_the_trainer_refuses_before_anything_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vidgen", "train", RECIPE, "--parallel.stages", "[5]", "--output", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "parallel.stages must add up to the model's 6 blocks, got 5; nearest: [6]" in result.stderr
    assert not list(tmp_path.iterdir())


def test_adapters() -> None:
    """Frozen weights have no gradients and no optimizer, and are neither cut nor sent to other stages."""
    pytest.importorskip("peft")
    whole = facts_of(load_recipe(RECIPE))
    options = ["--lora.target_modules", "[to_q, to_v]", "--lora.rank", "4"]
    facts = facts_of(load_recipe(RECIPE, options))
    width, blocks = facts.width, facts.shape.blocks
    adapters = 2 * blocks * 2 * 4 * width  # of two layers of each block, two factors of rank 4
    assert facts.parameters == whole.parameters + adapters
    assert sum(step.trainable for step in (facts.before, *facts.blocks, facts.after)) == adapters
    plan = planning.search(facts, 4, Machine())
    assert {(c.sizes["tensor"], c.sizes["pipeline"]) for c in plan.costs} == {(1, 1)}
    alone = cost(facts, Parallel(), 1, Machine()).memory
    assert alone["gradients"] == 4 * adapters and alone["parameters"] == 4 * facts.parameters
    assert cost(facts, Parallel(), 1, Machine()).step_s < cost(whole, Parallel(), 1, Machine()).step_s
    (problem,) = planning.check(facts.shape, Parallel(tensor=2), 2)
    assert "tensor must be 1 where adapters are trained, got 2; nearest: shard" in problem


def test_vae() -> None:
    facts = facts_of(load_recipe(str(ROOT / "configs/opensora_plan_v1_5/wfvae_tiny.yaml")))
    plan = planning.search(facts, 6, Machine())
    assert {(c.sizes["replicate"], c.sizes["shard"]) for c in plan.costs} == {(1, 6), (2, 3), (3, 2), (6, 1)}
    assert all(c.memory["activations"] > 0 for c in plan.costs)


def test_encoders_that_stay_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every process has them whole, in the precision of the run."""
    pytest.importorskip("transformers")
    from vidgen.models import autoencoders
    from vidgen.models.text import CLIPTextEncoder, T5TextEncoder, save_tiny_text_encoders

    command = ["plan", RECIPE, "--world", "2", "--vae", str(tmp_path / "vae")]
    command += ["--text.t5", str(tmp_path / "t5"), "--text.clip", str(tmp_path / "clip"), "--data.cache", "null"]
    assert cli.main(command) == 0
    assert "the VAE and the text encoders are not counted" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encoder_bytes"] is None
    vae = autoencoders.WFVAE(autoencoders.preset("tiny"))
    vae.save_pretrained(tmp_path / "vae")
    save_tiny_text_encoders(tmp_path, t5_channels=20, clip_channels=12, multilingual=True)
    parts = vae, T5TextEncoder.from_pretrained(tmp_path / "t5"), CLIPTextEncoder.from_pretrained(tmp_path / "clip")
    count = sum(p.numel() for part in parts for p in part.parameters())
    for options, wanted in (
        ([], 4.0 * count),
        (["--training.precision", "bf16"], 2.0 * count),
        (["--encoders.interval", "4"], 0.0),
        (["--data.cache", str(tmp_path / "cache")], 0.0),
    ):
        assert cli.main([*command, *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["combinations"], options
        for each in found["combinations"]:
            assert each["memory_bytes"]["encoders"] == pytest.approx(wanted, rel=0.02), options
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "clip" / "model.fp16.safetensors")
    assert facts_of(load_recipe(RECIPE, command[4:])).resident_bytes is None
    (tmp_path / "clip" / "model.fp16.safetensors").rename(tmp_path / "clip" / "model.safetensors")
    assert cli.main([*command, "--device-memory", "1e-6"]) == 0
    assert "encoders.interval" in capsys.readouterr().out.splitlines()[-1]


# The page


def test_computed_tables_are_up_to_date(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    for name, make in tables.TABLES.items():
        assert f"<!-- {name} -->\n{make()}\n<!-- end -->" in page, f"{name}: python benchmarks/scaling.py --write"


def test_measured_table_is_up_to_date(measured: Any, tables: ModuleType) -> None:
    assert sent_table(measured, formula_of) in tables.PAGE.read_text(), "python tests/distributed/plan_table.py"


def test_figures_of_the_default_machine_are_those_measured(tables: ModuleType) -> None:
    rows = [line.split("|") for line in tables.figures_table().splitlines()[2:]]
    for part, figure in (("attention", Machine().attention_flops), ("all else", Machine().linear_flops)):
        found = [float(row[5]) * 1e12 for row in rows if row[2].strip() == part]
        assert figure == pytest.approx(sum(found) / len(found), rel=0.02)
