# SPDX-License-Identifier: Apache-2.0
"""Loading of configurations: types, overrides, and every kind of mistake."""

import dataclasses
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen import config
from vidgen.config import ConfigError


@dataclass
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    name: Literal["adamw", "sgd"] = "adamw"


@dataclass
class Model:
    num_heads: int
    sparse_n: list[int] = field(default_factory=lambda: [1, 2, 1])
    checkpoint: Path | None = None

    def validate(self) -> list[str]:
        return [f"num_heads must be even, got {self.num_heads}"] if self.num_heads % 2 else []


@dataclass
class Recipe:
    model: Model
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 100
    bf16: bool = False
    title: str = "demo"
    prompt: Optional[str] = None  # noqa: UP045 - the old spelling is tested too
    sizes: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    fps: int | float = 24
    stops: tuple[int, ...] = ()
    anything: Any = None
    seed: int = field(default=0, init=False)

    def validate(self) -> list[str]:
        return ["steps must be positive"] if self.steps <= 0 else []


MODEL = {"model": {"num_heads": 4}}


def problems(source=None, overrides=(), cls=Recipe) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(cls, source, overrides)
    return caught.value.problems


def test_defaults_and_values():
    recipe = config.load(Recipe, {"model": {"num_heads": 4, "checkpoint": "a/b"}, "optimizer": {"betas": [0.5, 1]}})
    assert recipe.model == Model(4, [1, 2, 1], Path("a/b"))
    assert recipe.optimizer.betas == (0.5, 1.0) and type(recipe.optimizer.betas[1]) is float
    assert recipe.steps == 100 and recipe.prompt is None
    assert config.load(Optimizer, None) == Optimizer()


def test_source_is_not_changed():
    source = {"model": {"num_heads": 4}, "extra": {"a": {"b": 1}}}
    config.load(Recipe, source, ["--model.num_heads", "2", "--extra.a.b", "2"])
    assert source == {"model": {"num_heads": 4}, "extra": {"a": {"b": 1}}}


def test_yaml_and_json_files(tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  num_heads: 6\noptimizer:\n  learning_rate: 1e-5\nfps: 29.97\n")
    recipe = config.load(Recipe, tmp_path / "a.yaml")
    assert recipe.optimizer.learning_rate == 1e-5 and recipe.fps == 29.97
    (tmp_path / "a.json").write_text('{"model": {"num_heads": 6}, "fps": 30}')
    recipe = config.load(Recipe, str(tmp_path / "a.json"))
    assert recipe.fps == 30 and type(recipe.fps) is int


def test_yaml_anchors_merge_and_empty_section(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {num_heads: 4}\nsizes: &s {a: 1}\nextra: {b: {<<: *s, c: 2}}\noptimizer:\n")
    recipe = config.load(Recipe, path)
    assert recipe.extra == {"b": {"a": 1, "c": 2}} and recipe.optimizer == Optimizer()


def test_overrides():
    arguments = "--model.num_heads 8 --steps=7 --steps 9 --bf16 true --model.sparse_n [2,4] --sizes.a 3 --extra.x.y 1e3"
    recipe = config.load(Recipe, None, [*arguments.split(), "--stops", "[1, 2, 3]", "--anything.deep", "[1]"])
    assert recipe.model == Model(8, [2, 4]) and recipe.steps == 9 and recipe.bf16 is True
    assert recipe.sizes == {"a": 3} and recipe.stops == (1, 2, 3)
    assert recipe.extra == {"x": {"y": "1e3"}} and recipe.anything == {"deep": [1]}


def test_override_of_a_negative_number_and_of_a_section():
    recipe = config.load(Recipe, MODEL, ["--optimizer.learning_rate", "-1", "--model", "{num_heads: 2}"])
    assert recipe.optimizer.learning_rate == -1.0 and recipe.model.num_heads == 2


@pytest.mark.parametrize("text", ["2024", "true", "a cat: cute", "[1,", "x y", "a=b", "1e-4", "{}", "- a"])
def test_text_fields_take_what_was_typed(text):
    recipe = config.load(Recipe, MODEL, ["--title", text, f"--prompt={text}"])
    assert recipe.title == text and recipe.prompt == text


def test_null_and_quotes_on_the_command_line():
    recipe = config.load(Recipe, MODEL, ["--prompt", "null", "--title", "null", "--model.checkpoint", "null"])
    assert recipe.prompt is None and recipe.title == "null" and recipe.model.checkpoint is None
    assert config.load(Recipe, MODEL, ["--prompt", "'null'"]).prompt == "null"


def test_all_problems_at_once_with_lines_and_nearest_names(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  num_head: 4\n  sparse_n: [1, two]\nstepz: 10\nlearning_rate: 1\n"
        "optimizer: {name: adam, betas: [1]}\nbf16: 1\ntitle: on\nzzzzzz: 0\n"
    )
    assert problems(path, ["--fps", "fast", "--sizes.a", "x"]) == [
        "stepz: unknown name, did you mean steps? (recipe.yaml line 4)",
        "learning_rate: unknown name, did you mean optimizer.learning_rate? (recipe.yaml line 5)",
        "zzzzzz: unknown name, known here: model, optimizer, steps, bf16, title, prompt, sizes, extra, fps, stops, "
        "anything (recipe.yaml line 9)",
        "model.num_head: unknown name, did you mean model.num_heads? (recipe.yaml line 2)",
        "model.num_heads: missing; wanted int",
        "model.sparse_n[1]: wanted int, got str 'two'",
        "optimizer.betas: wanted 2 values, got 1: [1] (recipe.yaml line 6)",
        "optimizer.name: wanted one of 'adamw', 'sgd', got 'adam', did you mean 'adamw'? (recipe.yaml line 6)",
        "bf16: wanted bool, got int 1 (recipe.yaml line 7)",
        "title: wanted str, got bool True; put it in quotes (recipe.yaml line 8)",
        "sizes.a: wanted int, got str 'x' (command line)",
        "fps: wanted int or float, got str 'fast' (command line)",
    ]


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"steps": True}, "steps: wanted int, got bool True"),
        ({"steps": 1.0}, "steps: wanted int, got float 1.0"),
        ({"steps": "10"}, "steps: wanted int, got str '10'"),
        ({"steps": None}, "steps: wanted int, got null"),
        ({"bf16": "yes"}, "bf16: wanted bool, got str 'yes'"),
        ({"title": 5}, "title: wanted str, got int 5; put it in quotes"),
        ({"prompt": 5}, "prompt: wanted str or null, got int 5"),
        ({"optimizer": [1]}, "optimizer: wanted mapping, got list [1]"),
        ({"optimizer": {"learning_rate": "high"}}, "optimizer.learning_rate: wanted float, got str 'high'"),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate: wanted float, got bool True"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: wanted a finite number, got nan"),
        ({"optimizer": {"learning_rate": "1e999"}}, "optimizer.learning_rate: wanted a finite number, got 1e999"),
        ({"optimizer": {"name": 1}}, "optimizer.name: wanted one of 'adamw', 'sgd', got 1"),
        ({"sizes": {"a": 1, "b": "x"}}, "sizes.b: wanted int, got str 'x'"),
        ({"sizes": [1]}, "sizes: wanted dict[str, int], got list [1]"),
        ({"stops": "abc"}, "stops: wanted tuple[int, ...], got str 'abc'"),
        ({"seed": 1}, "seed: unknown name"),
        ({7: 1}, "7: unknown name"),
        ({"steps": -1}, "configuration: steps must be positive"),
        ({"model": {"num_heads": 3}}, "model: num_heads must be even, got 3"),
    ],
)
def test_one_problem(values, problem):
    (got,) = problems({**MODEL, **values})
    assert got.startswith(problem)


def test_missing_section_names_its_missing_fields():
    assert problems(None) == ["model.num_heads: missing; wanted int"]


def test_error_from_post_init_is_reported():
    @dataclass
    class Picky:
        a: int = 0

        def __post_init__(self) -> None:
            if self.a < 0:
                raise ValueError(f"a must not be negative, got {self.a}")

    assert problems({"a": -1}, cls=Picky) == ["configuration: a must not be negative, got -1"]


def test_unsupported_field_type_is_a_programming_error():
    @dataclass
    class Odd:
        a: complex = 0j

    with pytest.raises(TypeError, match="not supported"):
        config.load(Odd, {"a": 1})


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["steps", "3"], "steps: an override is --name.of.field VALUE"),
        (["--steps"], "--steps: no value given"),
        (["--.a", "3"], "--.a: an override is"),
        (["--model.num_hedas", "3"], "model.num_hedas: unknown name, did you mean model.num_heads? (command line)"),
    ],
)
def test_bad_overrides(overrides, problem):
    assert any(line.startswith(problem) for line in problems(MODEL, overrides))


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("a.yaml", "steps: 1\nsteps: 2\n", "steps: stands there twice (a.yaml lines 1 and 2)"),
        ("a.yaml", "model:\n  num_heads: 1\n  num_heads: 2\n", "model.num_heads: stands there twice"),
        ("a.yaml", "- 1\n", "wanted a mapping of names to values, got list"),
        ("a.yaml", "a: [1\n", "a.yaml: not valid YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']\n", "a.yaml: not valid YAML"),
        ("a.yaml", "when: 2024-13-01\n", "a.yaml: not valid YAML"),
        ("a.yaml", "a: \b\n", "a.yaml: not valid YAML"),
        ("a.yaml", "steps: .nan\n", "steps: wanted int, got float nan"),
        ("a.json", '{"steps": 1, "steps": 2}', "'steps' appears twice"),
        ("a.json", '{"fps": NaN}', "not finite"),
        ("a.toml", "a = 1", "wanted a .yaml, .yml or .json file"),
    ],
)
def test_bad_files(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    assert any(problem in line for line in problems(tmp_path / name))


def test_missing_and_binary_files(tmp_path):
    assert "No such file" in problems(tmp_path / "none.yaml")[0]
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems(tmp_path / "a.yaml")[0]


def test_recursive_yaml_ends(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {num_heads: 2}\nstops: &a [*a]\n")
    assert "stops[0]: wanted int" in problems(tmp_path / "a.yaml")[0]


def test_save_and_load_again(tmp_path):
    values = {"title": "für: [x]", "stops": [1], "extra": {"a": [1, {"b": None}]}, "optimizer": {"learning_rate": 1e-9}}
    recipe = config.load(Recipe, {"model": {"num_heads": 2, "checkpoint": "/a"}, **values})
    config.save(recipe, tmp_path / "resolved.yaml")
    assert config.load(Recipe, tmp_path / "resolved.yaml") == recipe
    assert config.load(Recipe, config.to_dict(recipe)) == recipe
    assert "seed" not in config.to_dict(recipe)


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
names = st.sampled_from([f.name for f in dataclasses.fields(Recipe)]) | st.text(string.ascii_letters, min_size=1)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))


@quick
@given(st.dictionaries(names, values, max_size=5))
def test_any_mapping_loads_or_raises_config_error(source):
    try:
        recipe = config.load(Recipe, source)
    except ConfigError as error:
        assert error.problems
    else:
        assert isinstance(recipe, Recipe)


@quick
@given(st.text(max_size=30))
def test_any_override_loads_or_raises_config_error(text):
    try:
        config.load(Recipe, MODEL, ["--optimizer.betas", text, f"--{text}"])
    except ConfigError as error:
        assert error.problems


@quick
@given(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.floats(allow_nan=False), max_size=4))
def test_saved_yaml_reads_back(tmp_path_factory, extra):
    recipe = config.load(Recipe, {**MODEL, "extra": extra})
    assert yaml.safe_load(yaml.safe_dump(config.to_dict(recipe)))["extra"] == extra
