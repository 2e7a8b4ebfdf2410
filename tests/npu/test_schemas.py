# SPDX-License-Identifier: Apache-2.0
"""Every call that npu_torch makes fits the operator's schema in the real torch_npu (rung 1)."""

import ast
from pathlib import Path

import pytest

from vidgen import ops
from vidgen.ops._backends import npu as package

from .worker import Worker

FILES = sorted(Path(package.__file__).parent.glob("*.py"))
WITHOUT_META = {"npu::npu_group_norm_swish_grad"}  # what its results look like stands in its documents only


def called_in(tree: ast.AST) -> set[str]:
    """``x`` of every ``torch.ops.npu.x``, however it is called."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu" and node.attr != "default"
    }


def required_in(tree: ast.AST) -> set[str]:
    """Names of operators as strings: those that an op asks for before it takes any arguments."""
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {s for s in strings if s.startswith("npu_") and s.isidentifier() and s != "npu_torch"}


TREES = {path.name: ast.parse(path.read_text()) for path in FILES}
CALLED = set().union(*map(called_in, TREES.values()))
REQUIRED = set().union(*map(required_in, TREES.values()))
PROBE = {"npu_format_cast"}  # tells whether torch_npu is there at all


@pytest.fixture(scope="module")
def made(npu: Worker):
    return npu.run("cases_ops.calls_of_all_samples")


def test_calls_fit_and_results_look_as_torch_npu_says(made):
    assert made["unknown"] <= WITHOUT_META


def test_every_operator_named_in_the_package_is_called(made):
    """So that none of the calls is left out of the test above."""
    assert made["calls"] >= CALLED and len(CALLED) >= 8


def test_every_operator_called_is_asked_for_first(made):
    """An op whose operators, of its gradient too, this version of torch_npu lacks must refuse, not fail."""
    assert made["calls"] == REQUIRED - PROBE


def test_names_exist(npu: Worker):
    names = sorted(CALLED | REQUIRED)
    assert npu.run("cases_ops.registered", names=names) == names


def test_nothing_imports_torch_npu():
    for name, tree in TREES.items():
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("torch_npu" in ast.unparse(n) for n in imports), name


def test_every_op_has_a_file_of_its_own():
    assert {path.stem for path in FILES if not path.stem.startswith("_")} == set(package.SERVED)
    assert {name for name, backends in ops.table("npu").items() if "npu_torch" in backends} == set(package.SERVED)
