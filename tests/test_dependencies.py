# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read off the source, and what importing the kernel library costs."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidgen

PACKAGE = Path(vidgen.__file__).parent

# Each room may import those further down, and itself; those in a row do too, and have no order among them.
ORDER = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"train", "pipelines", "integrations", "environment"},
    {"models", "diffusion", "data", "parallel", "checkpoints", "evaluation"},
    {"nn"},
    {"io", "config", "device"},
    {"ops"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Imported when their device is first used, in the folder that is named after them.
BACKEND_LIBRARIES = ("triton", "torch_npu")
DEVICE_WORDS = re.compile(r"cuda|(?<!i)npu|triton", re.IGNORECASE)  # "input" is none
DEVICE_FREE = ("models", "nn", "diffusion")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                package = parts[: len(parts) - node.level + is_package]
                base = ".".join(package + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room(name: str) -> str:
    """The part of ``vidgen.room.rest`` that the order speaks of."""
    return (name.split(".") + [""])[1]


def wrong_import(module: str, target: str) -> str | None:
    """Why ``module`` may not import ``target``, or None."""
    here, there, library = room(module), room(target), target.split(".")[0]
    if library in ("tests", "benchmarks"):
        return "nothing imports tests or benchmarks"
    if library != "vidgen":
        allowed = library in ("torch", *BACKEND_LIBRARIES) or library in sys.stdlib_module_names
        return None if here != "ops" or allowed else "the kernel library needs torch alone"
    if "" in (here, there) or there in ("__version__", "_C"):  # the package itself
        return None
    for name in (here, there):
        if name not in LEVEL:
            return f"{name!r} has no place in the order"
    if here == there == "models" and module.split(".")[2:3] != target.split(".")[2:3]:
        return "models do not import each other"
    return "against the order" if LEVEL[there] < LEVEL[here] else None


def test_imports_follow_the_order() -> None:
    wrong = []
    for path in sources():
        module = module_name(path)
        for line, target in imports(path.read_text(), module, path.name == "__init__.py"):
            if reason := wrong_import(module, target):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {target}: {reason}")
    assert not wrong, "\n".join(wrong)


CASES = [
    ("vidgen.nn.norms", "vidgen.ops", True),
    ("vidgen.nn.norms", "vidgen.models.opensora_v2", False),
    ("vidgen.ops.rope_3d", "vidgen.ops._checks", True),
    ("vidgen.ops.rope_3d", "vidgen.io", False),
    ("vidgen.ops.rope_3d", "numpy", False),
    ("vidgen.ops.rope_3d", "torch.nn", True),
    ("vidgen.ops.rope_3d", "json", True),
    ("vidgen.models.opensora_v2.model", "vidgen.nn.norms", True),
    ("vidgen.models.opensora_v2.model", "vidgen.checkpoints.hf", True),
    ("vidgen.models.opensora_v2.model", "vidgen.models.opensora_v2.config", True),
    ("vidgen.models.opensora_v2.model", "vidgen.models.cogvideox.model", False),
    ("vidgen.models.text.t5", "vidgen.models.cogvideox", False),
    ("vidgen.models.opensora_v2.model", "vidgen.train", False),
    ("vidgen.train.loop", "vidgen.diffusion.schedules", True),
    ("vidgen.train.loop", "vidgen.cli", False),
    ("vidgen.cli", "vidgen.train.loop", True),
    ("vidgen.config", "vidgen.io", True),
    ("vidgen.io", "vidgen.nn", False),
    ("vidgen.nn.norms", "vidgen.config", True),
    ("vidgen.surprise.x", "vidgen.nn", False),
    ("vidgen.train.loop", "tests.conftest", False),
]


@pytest.mark.parametrize("module, target, allowed", CASES)
def test_the_rules_themselves(module: str, target: str, allowed: bool) -> None:
    assert (wrong_import(module, target) is None) == allowed


def test_relative_and_hidden_imports_are_seen() -> None:
    source = "from . import a\nfrom ..ops import b\ndef f():\n    import vidgen.train as t\n    from ...x.y import z\n"
    module = "vidgen.models.some.model"
    found = [name for _, name in imports(source, module, is_package=False)]
    assert found == ["vidgen.models.some.a", "vidgen.models.ops.b", "vidgen.train", "vidgen.x.y.z"]
    assert [name for _, name in imports("from .a import b", "vidgen.nn", is_package=True)] == ["vidgen.nn.a.b"]


def test_models_name_no_device() -> None:
    found = []
    for folder in DEVICE_FREE:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if DEVICE_WORDS.search(line):
                    found.append(f"{path.relative_to(PACKAGE.parent)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, found",
    [("x.cuda()", True), ("if NPU:", True), ("torch_npu", True), ("Triton", True), ("Inputs, inputs", False)],
)
def test_device_words(line: str, found: bool) -> None:
    assert bool(DEVICE_WORDS.search(line)) == found


# Where devices and the libraries of processes on them may be named: here, and where backends join their ops.
DEVICE_NAMES = re.compile(r"\b(cuda|npu|gloo|nccl|hccl)\b")
MAY_NAME_DEVICES = ("device.py", "ops/_registry.py", "ops/_backends/")


def device_names(source: str) -> Iterator[tuple[int, str]]:
    """Lines with a device's name as a word of code or of a string; comments and documentation may speak of devices."""
    for node in ast.walk(ast.parse(source)):
        words = {ast.Name: "id", ast.Attribute: "attr", ast.keyword: "arg", ast.arg: "arg"}.get(type(node))
        text = getattr(node, words) if words else node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and "\n" not in text and len(text) < 100 and DEVICE_NAMES.search(text):
            yield node.lineno, text


def test_only_device_py_names_devices() -> None:
    found = []
    for path in sources():
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(MAY_NAME_DEVICES):
            found += [f"vidgen/{name}:{line}: {text}" for line, text in device_names(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, found",
    [
        ("x.cuda()", True),
        ("torch.device('npu')", True),
        ("f'{x}: cuda'", True),
        ("init(backend='nccl')", True),
        ("# cuda", False),
        ("import torch_npu", False),
        ("input_cuda_like = 1", False),
    ],
)
def test_names_of_devices_in_code(line: str, found: bool) -> None:
    assert bool(list(device_names(line))) == found


# Importing


def run(code: str) -> dict[str, list[str]]:
    """What ``code`` prints as JSON, run in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


LEAN = """
import json, sys, torch
# Everything that torch itself reaches for, also when ops are defined, is torch's own affair.
library = torch.library.Library("lean_import_test", "DEF")
library.define("f(Tensor x) -> Tensor")
torch.library.register_fake("lean_import_test::f", lambda x: x, lib=library)
torch.library.register_autograd("lean_import_test::f", lambda ctx, g: g, lib=library)
before = set(sys.modules)

def forbidden(*args, **kwargs):
    raise AssertionError("importing vidgen.ops asked for a device")

touched = []
for device in (torch.cuda, torch.xpu, torch.mps, torch.accelerator):
    for name in ("is_available", "device_count", "current_device", "current_accelerator", "_lazy_init", "init"):
        if hasattr(device, name):
            setattr(device, name, forbidden)
import vidgen.ops
new = sorted(set(sys.modules) - before)
print(json.dumps({"new": new}))
"""


def test_importing_ops_is_lean() -> None:
    new = run(LEAN)["new"]
    foreign = [name for name in new if name.split(".")[0] not in {"vidgen", "torch", *sys.stdlib_module_names}]
    assert not foreign, f"modules of other packages: {foreign}"
    ours = [name for name in new if name.startswith("vidgen")]
    assert not [name for name in ours if room(name) not in ("", "ops", "_C")]
    assert not [name for name in ours if "_backends" in name]
    # The budget is 50 ms over torch. Tests do not measure time; at about 1 ms a module these counts keep within it.
    assert len(ours) <= 60, ours
    assert len(new) - len(ours) <= 30, sorted(set(new) - set(ours))


def test_core_needs_no_extra() -> None:
    """Models, samplers and training parts import without the packages of any extra."""
    extras = ("safetensors", "transformers", "yaml", "tqdm", "matplotlib", "av", "PIL", "decord", "torchmetrics")
    code = f"""
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import vidgen.config, vidgen.diffusion, vidgen.io, vidgen.nn, vidgen.ops
import vidgen.models.opensora_plan_v1_5, vidgen.checkpoints
print(json.dumps({{}}))
"""
    run(code)
