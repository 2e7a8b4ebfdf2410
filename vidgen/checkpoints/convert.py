# SPDX-License-Identifier: Apache-2.0
"""Weights of one system in the files of another: ``vidgen convert``.

Everything is opened, matched with the model's table of names and planned before the first byte is written; then it is
written tensor by tensor beside the target and renamed into place. docs/conversion.md lists formats and calls.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vidgen import config as loading
from vidgen import io

from . import lora as adapters
from . import megatron
from .hf import CONFIG, INDEX, PICKLES, SHOWN, STEM, WEIGHTS, PretrainedModel, misfits, split_into_shards
from .layout import Layout
from .lazy import Lazy, State, lazy, write_safetensors, write_torch
from .sources import ADAPTER_CONFIG, SAT_FILE, SAT_TRACKER, Source, open_source

FORMATS = {
    "hf": "folder of config.json and safetensors (diffusers' layout), in shards with an index where it is large",
    "safetensors": "one safetensors file",
    "pt": "one .pt file, a flat map",
    "sat": "CogVideoX's SAT: a folder for the transformer, one .pt file for the VAE",
    "mindspeed-mm": "tree of MindSpeed-MM, in its names",
    "mindspeed-mm-pt": "one .pt file in MindSpeed-MM's names",
    "megatron": "tree in the model's own names, as Open-Sora Plan 1.5 trains with",
}
TREES = ("mindspeed-mm", "megatron")
FILES = ("safetensors", "pt", "mindspeed-mm-pt")


@dataclass(frozen=True)
class Model:
    """Where a model's classes and tables are.

    Args:
        module: holds ``classes``.
        classes: of models; the name in ``config.json`` says which, the first is meant where it says nothing.
        layouts: for a naming, the table's name in the ``mindspeed_mm.py`` beside ``module``.
        aliases: other names of the classes in ``config.json``, each with what reads such a file.
        mark: something in the names of tensors that only this model has, where there are no tables.
    """

    module: str
    classes: tuple[str, ...]
    layouts: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    mark: str = ""

    def layout(self, naming: str) -> Layout:
        table: Layout = getattr(importlib.import_module(f"{self.module}.mindspeed_mm"), self.layouts[naming])
        return table

    def model_class(self, name: str | None) -> type[PretrainedModel]:
        """The class that a ``config.json`` names. Raises ValueError."""
        if name is not None and name not in (*self.classes, *self.aliases):
            raise ValueError(f"{CONFIG} describes a {name}, wanted {' or '.join((*self.classes, *self.aliases))}")
        found: type[PretrainedModel] = getattr(
            importlib.import_module(self.module), name if name in self.classes else self.classes[0]
        )
        return found


AUTOENCODERS = "vidgen.models.autoencoders"
MODELS = {
    "opensora_plan_v1_3": Model(
        "vidgen.models.opensora_plan_v1_3",
        ("OpenSoraT2V_v1_3", "OpenSoraInpaint_v1_3"),
        {"mindspeed-mm": "MINDSPEED_MM"},
    ),
    "opensora_plan_v1_5": Model(
        "vidgen.models.opensora_plan_v1_5",
        ("SparseUMMDiT",),
        {"megatron": "ORIGINAL", "mindspeed-mm": "MINDSPEED_MM"},
    ),
    "opensora_v2": Model("vidgen.models.opensora_v2", ("MMDiT",), {"mindspeed-mm": "MINDSPEED_MM"}),
    "cogvideox": Model(
        "vidgen.models.cogvideox",
        ("CogVideoXTransformer3DModel",),
        {"mindspeed-mm": "MINDSPEED_MM", "sat": "SAT"},
    ),
    "wfvae": Model(f"{AUTOENCODERS}.wfvae", ("WFVAE",), aliases={"WFVAEModel": "from_original"}, mark=".connect_l1."),
    "hunyuan_vae": Model(
        f"{AUTOENCODERS}.hunyuan_vae",
        ("HunyuanVAE",),
        aliases={"AutoencoderKLHunyuanVideo": "from_diffusers"},
        mark=".attentions.0.group_norm.",
    ),
    "cogvideox_vae": Model(f"{AUTOENCODERS}.cogvideox_vae", ("AutoencoderKLCogVideoX",), mark=".conv_y."),
}


@dataclass(frozen=True)
class Options:
    """What is asked for, see :func:`convert`."""

    to: str
    model: str | None = None
    config: Path | None = None
    tp: int = 1
    stages: megatron.Stages | None = None
    ema: bool | None = None
    iteration: int | None = None
    lora: Path | None = None
    lora_alpha: float | None = None
    max_shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class File:
    """A file to be written: ``content`` is lazy tensors for a file of tensors, otherwise text or JSON."""

    name: str
    content: Any
    num_bytes: int

    def write(self, path: Path) -> None:
        if isinstance(self.content, str):
            with io.atomic_write(path, "w") as file:
                file.write(self.content)
        elif path.suffix == ".safetensors":
            write_safetensors(path, self.content)
        elif path.suffix == ".json":
            io.write_json(path, self.content)
        else:
            write_torch(path, self.content)


def convert(
    source: str | Path, target: str | Path, to: str, *, dry_run: bool = False, **options: Any
) -> dict[str, Any]:
    """Write the weights in ``source`` to ``target`` in another format.

    Args:
        source: model folder, file of weights, or tree of training checkpoints; its form is found out.
        target: must not exist; a folder or a file, whatever ``to`` is.
        to: one of :data:`FORMATS`.
        dry_run: check and plan, write nothing.
        model: one of :data:`MODELS`; default: found from the names of tensors.
        config: a ``config.json`` of the model; default: the one in ``source``. Needed where ``to`` is "hf" or the model
            is a VAE (but WFVAE, whose weights tell it); where it is known, names and shapes are checked with the model.
        tp, stages: how a tree is cut: number of tensor-parallel ranks, and blocks of each chunk as ``[chunk][stage]``.
        ema: see :func:`vidgen.checkpoints.sources.open_source`.
        iteration: of a tree.
        lora: adapters to add to the weights: a file, a folder, or a tree.
        lora_alpha: their alpha; default: what the folder's ``adapter_config.json`` says.
        max_shard_bytes: of a file in a folder.

    Returns:
        What was or would be written: model, number of tensors and parameters, files with their sizes.

    Raises:
        ValueError: whatever does not fit: unknown forms, missing, unexpected or misshapen tensors, shards that
            disagree, a cut that the model or the format does not have, too little space on the disk.
        FileExistsError: ``target`` exists.
    """
    wanted = Options(to=to, **options)
    source, target = Path(source), Path(target)
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already: choose another target")
    model, state, files = plan(source, target, wanted)
    report = {
        "source": str(source),
        "target": str(target),
        "format": to,
        "model": model,
        "tensors": len(state),
        "parameters": sum(math.prod(t.shape) for t in state.values()),
        "files": {file.name: file.num_bytes for file in files},
        "written": not dry_run,
    }
    if not dry_run:
        write(target, files)
    return report


def plan(source: Path, target: Path, wanted: Options) -> tuple[str, State, list[File]]:
    """Everything but the writing: the model's name, its whole state in our names, and the files to write."""
    if wanted.tp < 1:
        raise ValueError(f"tensor-parallel ranks must be at least 1, got {wanted.tp}")
    if wanted.to not in TREES and (wanted.tp != 1 or wanted.stages is not None):
        raise ValueError(f"only trees ({', '.join(TREES)}) are cut over ranks and stages, got {wanted.to}")
    opened = open_source(source, ema=wanted.ema, iteration=wanted.iteration)
    name, naming = recognise(opened.names(), wanted.model)
    model = MODELS[name]
    _check_suffix(target, wanted.to, not model.layouts)
    values = _config_values(opened, wanted.config)
    network = _meta_model(model, values, opened.names())
    if not model.layouts:
        state, files = _plan_vae(name, opened, values, network, wanted)
        return name, state, files
    known = merged(opened, model, naming)
    state = _in_ours(known, model, naming, network)
    if wanted.lora is not None:
        state = _with_adapters(state, name, wanted.lora, wanted.lora_alpha)
    to = wanted.to.removesuffix("-pt")
    if to == naming:  # what is only cut anew keeps what the table ignores
        foreign = {**known, **(model.layout(to).to_theirs(state) if wanted.lora is not None else {})}
    elif wanted.to in ("hf", "safetensors", "pt"):
        foreign = _stored(state, model, network)
    else:
        foreign = _in_theirs(state, name, to, network)
    return name, state, _files(foreign, name, values, network, wanted)


def write(target: Path, files: Sequence[File]) -> None:
    """Write all files, or none. A single one without a name is ``target`` itself; more are a folder of that name."""
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.num_bytes for file in files), shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{parent} has {free:,} bytes free, {needed:,} are needed")
    if len(files) == 1 and not files[0].name:
        files[0].write(target)
        return
    with io.atomic_directory(target) as temporary:
        for file in files:
            path = temporary / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            file.write(path)


def read_stages(pp: str | None, vpp: str | None) -> megatron.Stages | None:
    """Layers of each stage from ``"10,11,11,10"``, or of each chunk from ``"4,4/4,4"``; brackets do no harm.

    Raises ValueError if both are given or one is not of this form.
    """
    if pp is not None and vpp is not None:
        raise ValueError("give --pp or --vpp: the rows of --vpp say how many stages there are")
    text = pp if pp is not None else vpp
    if text is None:
        return None
    rows = text.replace(" ", "").replace("],[", "/").strip("[]").split("/")
    if not all(re.fullmatch(r"\d+(,\d+)*", row) for row in rows) or (len(rows) > 1) != (vpp is not None):
        form = "--pp 10,11,11,10" if pp is not None else "--vpp 4,4/4,4"
        raise ValueError(f"stages must be of the form {form}, got {text!r}")
    return [[int(number) for number in row.split(",")] for row in rows]


# What the source is


def entry_of(model: object) -> Model:
    """The entry of a model's class. Raises ValueError."""
    name = type(model).__name__
    found = next((entry for entry in MODELS.values() if entry.layouts and name in entry.classes), None)
    if found is None:
        raise ValueError(f"no training system has a {name}")
    return found


def recognise(names: Sequence[str], model: str | None = None) -> tuple[str, str]:
    """The model that has tensors of these names, and whose naming they follow ("ours", or a layout's).

    Raises:
        ValueError: no model has most of them, or ``model`` is none that there is.
    """
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    best: tuple[int, str, str] = (0, "", "")
    for candidate, entry in MODELS.items():
        if model not in (None, candidate):
            continue
        if entry.mark and any(entry.mark in name for name in names):
            return candidate, "ours"
        for naming in entry.layouts:
            layout = entry.layout(naming)
            for side, called in (("ours", "ours"), ("theirs", naming)):
                count = sum(layout.match(_base_name(name), side) is not None for name in names)  # type: ignore[arg-type]
                if count > best[0]:
                    best = (count, candidate, called)
    if 2 * best[0] < len(names) or not best[0]:
        if model is not None and not MODELS[model].layouts:
            return model, "ours"
        words = ", ".join(list(names)[:SHOWN])
        raise ValueError(f"these are not the tensors of {model or ' or '.join(MODELS)}: {words}")
    return best[1], best[2]


def _base_name(name: str) -> str:
    """The weight that an adapter's half belongs to; other names stay."""
    match = adapters.HALF.fullmatch(name)
    return f"{match[1]}.weight" if match else name


def merged(source: Source, model: Model, naming: str, *, lora: bool = False) -> State:
    """The whole state of a source, in the naming that it has."""
    if source.tree is None:
        return dict(source.state or {})
    if naming == "ours":
        if "megatron" not in model.layouts:
            raise ValueError(f"{source.path} is a tree in our names, which no training system writes for this model")
        naming = "megatron"
    return megatron.merge(source.tree, model.layout(naming), lora=lora)


def _in_ours(known: State, model: Model, naming: str, network: PretrainedModel | None) -> State:
    """A whole state in our names, checked with the table and, where there is one, with the model."""
    if naming == "ours":
        model.layout(next(iter(model.layouts))).check(known, "ours", "the source")
        state = known
    else:
        layout = model.layout(naming)
        layout.check(known, "theirs", "the source")
        state = layout.to_ours(known)
        layout.check(state, "ours", "the source, renamed,")
    return state if network is None else fitted(state, network)


def fitted(state: State, network: PretrainedModel) -> State:
    """``state``, in our names, in the shapes that the model has, its names compared with the model's.

    Raises ValueError.
    """
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    fitting = network.fit_state_dict(shapes)
    own = network.state_dict()
    kept = {name: t for name, t in fitting.items() if name in own or not _is_ignored(name, network)}
    if problems := misfits(own, kept):
        raise ValueError(f"the source does not fit its {type(network).__name__} configuration\n" + "\n".join(problems))
    return {name: _reshaped(t, tuple(fitting[name].shape)) for name, t in state.items()}


def _is_ignored(name: str, network: PretrainedModel) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in network.ignored_keys())


def _reshaped(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    return tensor if tensor.shape == shape else Lazy(shape, tensor.dtype, lambda: tensor.load().reshape(shape))


def _config_values(source: Source, file: Path | None) -> dict[str, Any] | None:
    """The configuration's fields, of the file that was named or of the source."""
    if file is None:
        return source.config
    values = io.read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: wanted an object, got {type(values).__name__}")
    return values


def _meta_model(model: Model, values: Mapping[str, Any] | None, names: Sequence[str]) -> PretrainedModel | None:
    """The model that a configuration describes, without memory; None without a configuration."""
    if values is None:
        return None
    name = values.get("_class_name")
    if name is None and len(model.classes) > 1:  # a variant with more inputs
        name = model.classes[any(n.startswith("pos_embed_mask") for n in names)]
    cls = model.model_class(name)
    if name in model.aliases or (name is None and hasattr(cls.config_class, "from_original")):
        read = getattr(cls.config_class, model.aliases.get(str(name), "from_original"))
        inner = values.get("predictor", values)  # a model JSON of MindSpeed-MM describes encoders beside it
        if not isinstance(inner, Mapping):
            raise ValueError(f"predictor must be an object, got {type(inner).__name__}")
        config = read({k: v for k, v in inner.items() if not k.startswith("_")})
    else:
        config = loading.load(cls.config_class, {k: v for k, v in values.items() if not k.startswith("_")})
    with torch.device("meta"):
        return cls(config)


# Adapters


def adapted_weights(base: Path, path: Path) -> State:
    """The weights of the model folder ``base`` with the adapters in ``path`` added, of the layers that these change.

    Raises:
        ValueError: adapters of another model, that do not fit, or that do not say their alpha.
    """
    opened = open_source(base)
    name, naming = recognise(opened.names())
    model = MODELS[name]
    state = _in_ours(merged(opened, model, naming), model, naming, _meta_model(model, opened.config, opened.names()))
    return {key: weight for key, weight in _with_adapters(state, name, path, None).items() if weight is not state[key]}


def _with_adapters(state: State, name: str, path: Path, alpha: float | None) -> State:
    """``state`` with the adapters in ``path`` added, whichever naming they have."""
    model = MODELS[name]
    opened = open_source(path)
    alpha = _alpha(path, alpha)
    tables = importlib.import_module(f"{model.module}.mindspeed_mm")
    rename = getattr(tables, "rename_adapter", lambda adapter: adapter)
    _, naming = recognise([rename(adapter) for adapter in opened.names()], name)
    found = {rename(adapter): value for adapter, value in merged(opened, model, naming, lora=True).items()}
    if naming == "ours":
        return adapters.add(state, found, alpha)
    layout = model.layout(naming)
    return layout.to_ours(adapters.add(layout.to_theirs(state), found, alpha))


def _alpha(path: Path, alpha: float | None) -> float:
    if alpha is not None:
        return alpha
    file = path / ADAPTER_CONFIG
    values = io.read_json(file) if file.is_file() else None
    if not isinstance(values, dict) or not isinstance(values.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path} does not say its alpha: give it to vidgen convert with --lora-alpha")
    special = [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if values.get(key)]
    if special:
        raise ValueError(f"{file} sets {', '.join(special)}, which cannot be merged here")
    return float(values["lora_alpha"])


# What is written


def _stored(state: State, model: Model, network: PretrainedModel | None) -> State:
    """``state`` without what a model in our names computes, where that can be told."""
    if network is not None:
        own = network.state_dict()
        return {name: t for name, t in state.items() if name in own}
    tables = importlib.import_module(f"{model.module}.mindspeed_mm")
    without: Callable[[State], State] = getattr(tables, "without_computed", dict)
    return without(state)


def _in_theirs(state: State, name: str, to: str, network: PretrainedModel | None) -> State:
    model = MODELS[name]
    if to not in model.layouts:
        known = ", ".join(("hf", "safetensors", "pt", *model.layouts))
        raise ValueError(f"{name} cannot be written as {to}: it has the forms {known}")
    layout = model.layout(to)
    if network is not None and (reason := layout.refusal(network.config)):
        raise ValueError(f"{name} cannot be written as {to}: {reason}")
    result = layout.to_theirs(state)
    layout.check(result, "theirs", "the result")
    return result


def _files(
    state: State, name: str, values: Mapping[str, Any] | None, network: PretrainedModel | None, wanted: Options
) -> list[File]:
    if wanted.to == "hf":
        return _hf_files(state, name, values, network, wanted.max_shard_bytes)
    if wanted.to in FILES:
        return [File("", state, _num_bytes(state))]
    model = MODELS[name]
    if wanted.to == "sat":
        prefix = importlib.import_module(f"{model.module}.mindspeed_mm").SAT_PREFIX
        content = {"module": {prefix + key: t for key, t in state.items()}}
        return [File(SAT_TRACKER, "1", 1), File(f"1/{SAT_FILE}", content, _num_bytes(state))]
    layout = model.layout(wanted.to)
    if network is not None:
        heads = getattr(network.config, "num_attention_heads", getattr(network.config, "num_heads", wanted.tp))
        if heads % wanted.tp:
            raise ValueError(f"{name} has {heads} attention heads, which cannot be cut over {wanted.tp} ranks")
    files = megatron.split(state, layout, wanted.tp, wanted.stages)
    return [File(path, content, _num_bytes(content)) for path, content in megatron.tree_files(files)]


def _hf_files(
    state: State, name: str, values: Mapping[str, Any] | None, network: PretrainedModel | None, limit: int
) -> list[File]:
    if values is None or network is None:
        raise ValueError(f"a folder needs a configuration, and these weights have none: give {CONFIG} with --config")
    if limit < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {limit}")
    shapes = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in state.items()}
    shards = split_into_shards(shapes, limit)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"{STEM}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = []
    for file, keys in zip(names, shards, strict=True):
        shard = {key: state[key] for key in keys}
        files.append(File(file, shard, _num_bytes(shard)))
    if count > 1:
        places = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
        files.append(_json(INDEX, {"metadata": {"total_size": _num_bytes(state)}, "weight_map": places}))
    # Other programs read their own configuration again; what we had to translate is written in our words.
    ours = {"_class_name": type(network).__name__, **loading.to_dict(network.config)}
    foreign = values.get("_class_name") is None or MODELS[name].aliases.get(values["_class_name"]) == "from_original"
    files.append(_json(CONFIG, ours if foreign else dict(values)))
    return files


def _json(name: str, content: dict[str, Any]) -> File:
    return File(name, content, len(json.dumps(content)))


def _num_bytes(content: Any) -> int:
    if isinstance(content, Lazy):
        return content.num_bytes
    if isinstance(content, Mapping):
        return sum(_num_bytes(value) for value in content.values())
    return len(content) if isinstance(content, str) else 0


def _plan_vae(
    name: str, source: Source, values: Mapping[str, Any] | None, network: PretrainedModel | None, wanted: Options
) -> tuple[State, list[File]]:
    """A VAE has no table: the model itself is what its tensors are compared with."""
    from vidgen.models.autoencoders import wfvae_checkpoint

    allowed = ("hf", "safetensors", "pt", *(("sat",) if name == "cogvideox_vae" else ()))
    if wanted.to not in allowed:
        raise ValueError(f"{name} cannot be written as {wanted.to}: it has the forms {', '.join(allowed)}")
    if source.state is None:
        raise ValueError(f"{source.path} is a tree of training checkpoints; a {name} is kept in one file or folder")
    if wanted.lora is not None:
        raise ValueError(f"there are no adapters for {name}")
    known: Mapping[str, Any] = source.state
    if name == "wfvae":  # its constants are compared with ours, and filled in where an average lacks them
        known = wfvae_checkpoint.convert_state_dict({key: t.load() for key, t in known.items()})
        if network is None:
            model = MODELS[name]
            values = loading.to_dict(wfvae_checkpoint.infer_config(known))
            network = _meta_model(model, {"_class_name": model.classes[0], **values}, [])
    if network is None:
        raise ValueError(f"a {name} is checked with its configuration, which is not here: give {CONFIG} with --config")
    found = type(network).convert_state_dict(known)
    state = fitted({key: t if isinstance(t, Lazy) else lazy(t) for key, t in found.items()}, network)
    state = {key: t for key, t in state.items() if key in network.state_dict()}
    if wanted.to == "hf":
        return state, _hf_files(state, name, values, network, wanted.max_shard_bytes)
    if wanted.to != "sat":
        return state, [File("", state, _num_bytes(state))]
    to_sat = importlib.import_module(f"{AUTOENCODERS}.cogvideox_vae_checkpoint").to_sat
    return state, [File("", {"state_dict": to_sat(state)}, _num_bytes(state))]


def _check_suffix(target: Path, to: str, is_vae: bool) -> None:
    """A target that says by its name what it is must be that."""
    wanted = {"safetensors": (".safetensors",)}.get(to, PICKLES) if to in FILES or (to == "sat" and is_vae) else None
    if wanted is not None and target.suffix not in wanted:
        raise ValueError(f"target must be a file named *{' or *'.join(wanted)} for {to}, got {target}")
    if wanted is None and target.suffix in (*PICKLES, ".safetensors"):
        raise ValueError(f"target is a folder for {to}, got the file name {target}")
