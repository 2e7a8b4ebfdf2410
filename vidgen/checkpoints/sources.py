# SPDX-License-Identifier: Apache-2.0
"""Whatever holds weights, opened: which form it has is read off the files, values stay in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen import io

from . import megatron
from .distributed import Distributed, is_distributed
from .hf import CONFIG, PICKLES, SHOWN, misfits
from .lazy import State, TorchFile, is_tensor, read_safetensors

SAT_FILE = "mp_rank_00_model_states.pt"
SAT_TRACKER = "latest"
INDEX_SUFFIX = ".safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

# What trainers put before the names of the model that they train, tried in this order until none fits.
PREFIXES = ("model.diffusion_model.", "predictor.", "base_model.model.", "module.", "model.", "transformer.model.")
# Models that lie in one file with the one that is meant, where that one has a prefix.
OTHERS = ("first_stage_model.", "conditioner.", "ae.", "text_encoder.", "loss")
# Where a file that is not a flat map keeps weights, each looked for inside what the one before it held.
WRAPPERS = ("model", "module", "state_dict", "gen_model")
AVERAGES = ("ema_model", "ema_state_dict", "ema")


@dataclass(frozen=True)
class Source:
    """Weights as they were found: one state or the shards of a tree, and the configuration that lies with them."""

    path: Path
    form: str
    state: State | None = None
    tree: megatron.Tree | None = None
    config: dict[str, Any] | None = None

    def names(self) -> list[str]:
        return self.tree.names() if self.tree is not None else list(self.state or ())


def open_source(path: str | Path, *, ema: bool | None = None, iteration: int | None = None) -> Source:
    """Open a model folder, a file of weights, or a tree of training checkpoints.

    Names lose what trainers put before them; entries that are no tensors and ``_extra_state`` are left out.

    Args:
        path: what to open.
        ema: True: the running average; False: the weights; None: the weights, but the running average of a VAE's
            training checkpoint, as its original loads it.
        iteration: of a tree; default what its tracker says, or the newest.

    Raises:
        ValueError: nothing of a known form there, or nothing that can be read without running code.
    """
    path = Path(path)
    if path.is_file():
        source = _open_file(path, ema)
    elif path.is_dir():
        source = _open_folder(path, ema, iteration)
    else:
        raise ValueError(f"{path} does not exist")
    if iteration is not None and source.form not in ("megatron", "layerzero"):
        raise ValueError(f"{path} is no tree of training checkpoints: it has no iteration {iteration}")
    rename = cleaner(source.names())
    if source.tree is not None:
        return Source(path, source.form, tree=source.tree.renamed(rename), config=source.config)
    state: State = {}
    for name, value in (source.state or {}).items():
        if (new := rename(name)) is not None:
            state[new] = value
    if not state:
        raise ValueError(f"{path} holds no weights")
    return Source(path, source.form, state=state, config=source.config)


def _open_folder(path: Path, ema: bool | None, iteration: int | None) -> Source:
    if is_distributed(path):
        opened = Distributed(path)
        return Source(path, "distributed", state=opened.weights(ema=bool(ema)), config=opened.model_config())
    if (path / ".metadata").is_file():
        if is_distributed(path.parent):
            raise ValueError(f"{path} is a part of a checkpoint: name the checkpoint, {path.parent}")
        raise ValueError(
            f"{path} is a folder of torch.distributed.checkpoint, whose index is a pickle that only its own program "
            "should read; save it as safetensors there"
        )
    if (path / SAT_TRACKER).is_file() or (path / SAT_FILE).is_file():
        return Source(path, "sat", state=_torch_state(_sat_file(path), ema))
    if (folder := megatron.find_iteration(path, iteration)) is not None:
        if megatron.is_layerzero(folder):
            return Source(path, "layerzero", state=megatron.read_layerzero(folder, ema=bool(ema)))
        return Source(path, "megatron", tree=megatron.read_tree(folder, ema=bool(ema)))
    if ema:
        raise ValueError(f"{path} is a model folder: it holds one set of weights, and no running average beside it")
    config = io.read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG}: wanted an object, got {type(config).__name__}")
    return Source(path, "hf", state=_safetensors_folder(path), config=config)


def _sat_file(path: Path) -> Path:
    folder = path
    if (path / SAT_TRACKER).is_file():
        name = (path / SAT_TRACKER).read_text(errors="replace").strip()
        if not name or Path(name).name != name:
            raise ValueError(f"{path / SAT_TRACKER} must name a folder beside it, got {name[:80]!r}")
        folder = path / name
    others = [f.name for f in sorted(folder.glob("mp_rank_*_model_states.pt")) if f.name != SAT_FILE]
    if others:
        raise ValueError(f"{folder} is cut over ranks ({', '.join(others[:SHOWN])}): merge them with SAT first")
    return folder / SAT_FILE


def _safetensors_folder(path: Path) -> State:
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    shards: set[str] = set()
    states: list[State] = []
    for file in indices:
        index = io.read_json(file)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{file}: wanted a weight_map of tensor names to file names")
        state: State = {}
        for name in sorted(set(places.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{file}: {name!r} is not a safetensors file of this folder")
            part = read_safetensors(path / name)
            listed = {key: None for key, place in places.items() if place == name}
            if any(key not in listed for key in part) or any(key not in part for key in listed):
                raise ValueError(
                    f"{path / name} is not what {file.name} says\n" + "\n".join(misfits(listed, dict(part)))
                )
            state.update(part)
        shards |= set(places.values())
        states.append(state)
    singles = [file for file in sorted(path.glob("*.safetensors")) if file.name not in shards]
    if len(states) + len(singles) != 1:
        others = [f.name for f in sorted(path.iterdir()) if f.suffix in (*PICKLES, ".safetensors", ".json")]
        hint = f": name one of its files: {', '.join(others[:SHOWN])}" if others else ""
        raise ValueError(f"{path} holds {len(states) + len(singles)} sets of safetensors, wanted one{hint}")
    return states[0] if states else read_safetensors(singles[0])


def _open_file(path: Path, ema: bool | None) -> Source:
    if path.suffix == ".safetensors":
        if ema:
            raise ValueError(f"{path} holds one set of weights, and no running average beside it")
        return Source(path, "safetensors", state=read_safetensors(path))
    if path.suffix in PICKLES:
        return Source(path, "pt", state=_torch_state(path, ema))
    raise ValueError(f"{path}: wanted a folder, .safetensors, {', '.join(PICKLES)}")


def _torch_state(path: Path, ema: bool | None) -> State:
    """The weights in a file, wherever it keeps them."""
    file = TorchFile(path)
    content: Mapping[Any, Any] = file.content()
    averages = [key for key in AVERAGES if isinstance(content.get(key), Mapping) and content[key]]
    if ema and not averages:
        raise ValueError(f"{path} holds no running average ({', '.join(AVERAGES)}), but {_some(content)}")
    # Trained VAEs are loaded from their average unless told otherwise.
    if averages and (ema or (ema is None and averages[0] == "ema_state_dict")):
        state = file.state(averages[0])
        return {name.replace("module.", ""): value for name, value in state.items() if not _extra(name)}
    keys: list[str] = []
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            keys.append(wrapper)
            content = content[wrapper]
    if "model0" in content and not keys:
        raise ValueError(f"{path} is one rank of a tree with virtual stages: name the folder of the tree")
    if not any(is_tensor(value) for value in content.values()):
        raise ValueError(f"{path} holds no weights, but {_some(content)}")
    return {name: value for name, value in file.state(*keys).items() if not _extra(name)}


def _extra(name: str) -> bool:
    return name.endswith("_extra_state")


def _some(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(content)[:SHOWN])) or "nothing"


def cleaner(names: Iterable[str]) -> Callable[[str], str | None]:
    """What turns names in a file into those of the model; None for names of other models in the same file."""
    prefix, rest = "", list(names)
    found = True
    while found:
        found = False
        for candidate in PREFIXES:
            inside = [name.removeprefix(candidate) for name in rest if name.startswith(candidate)]
            outside = [name for name in rest if not name.startswith((candidate, *OTHERS))]
            if inside and not outside:
                prefix, rest, found = prefix + candidate, inside, True
                break

    def rename(name: str) -> str | None:
        if prefix and not name.startswith(prefix):
            return None
        return name.removeprefix(prefix)

    return rename
