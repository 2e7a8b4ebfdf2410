# SPDX-License-Identifier: Apache-2.0
"""Adapters of low rank beside frozen weights: what the section ``lora`` of a recipe asks for, by the library peft.

Files are peft's: ``adapter_model.safetensors`` and ``adapter_config.json``. ``vidgen convert --lora`` adds them to the
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.checkpoints.distributed import Distributed
from vidgen.checkpoints.hf import misfits, read_safetensors, write_safetensors
from vidgen.io import write_json
from vidgen.parallel import Parallel

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, ADAPTER = "base_model.model.", ".default"  # of names in peft's files, and what memory has in them besides


@dataclass
class Lora:
    """Train ``W + alpha / rank * B A`` with W as it is, for the linear layers whose names end in ``target_modules``."""

    target_modules: list[str] = field(default_factory=list)
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # of what A sees

    def validate(self) -> list[str]:
        problems = [
            f"{name} must be positive, got {getattr(self, name)}"
            for name in ("rank", "alpha")
            if getattr(self, name) <= 0
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must lie in [0, 1), got {self.dropout}")
        if not self.target_modules:
            problems.append("target_modules must name linear layers, such as [to_q, to_v], got none")
        return problems

    def parallel_problems(self, parallel: Parallel | None) -> list[str]:
        """Why adapters cannot be trained in this layout; empty if they can."""
        sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline")} if parallel is not None else {}
        return [
            f"lora: adapters are not cut over {name} ranks, got parallel.{name}={size}; nearest: {name}=1 and shard"
            for name, size in sizes.items()
            if size > 1
        ]


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Freeze the model and put adapters, which change nothing yet, beside the layers; in place.

    Draws of A come from PyTorch's global generator; on the meta device there are none.

    Raises:
        ValueError: a name of ``target_modules`` that no linear layer has.
    """
    peft = library()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            endings = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdecimal()})
            raise ValueError(
                f"lora: target_modules must be ends of names of linear layers ({', '.join(endings)}), got {target!r}"
            )
    model.requires_grad_(False)
    with torch.device(next(model.parameters()).device):
        peft.inject_adapter_in_model(peft_config(lora), model)


def peft_config(lora: Lora) -> Any:
    return library().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )


class Adapters:
    """The trained part of a model with adapters, under its names: what a checkpoint holds."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters()}


def file_name(name: str) -> str:
    """What an adapter is called in peft's files."""
    return PREFIX + name.replace(ADAPTER, "")


def save(folder: Path, adapters: Mapping[str, Tensor], lora: Lora, base: Any) -> None:
    """Write a folder that peft reads.

    Args:
        adapters: by the names that they have in the model.
        base: the folder of the weights that they belong to, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / FILE, {file_name(name): t for name, t in adapters.items()})
    values = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
    }
    write_json(folder / CONFIG, values)


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Fill the adapters of a model from what :func:`save` wrote. Raises ValueError where they are others."""
    wanted = {file_name(name): p for name, p in Adapters(model).named_parameters()}
    found = read_safetensors(folder / FILE)
    if problems := misfits(wanted, found):
        raise ValueError(f"lora: the adapters in {folder} are not those of the recipe\n" + "\n".join(problems))
    for name, p in wanted.items():
        p.copy_(found[name])


def export(source: Distributed, folder: Path, *, ema: bool, lora: Lora, base: Any) -> None:
    """Write ``model`` and, where an average is kept, ``ema`` into ``folder``, from a checkpoint of many processes."""
    for name in ("model", "ema") if ema else ("model",):
        tensors = source.weights(ema=name == "ema")
        save(folder / name, {key: lazy.load() for key, lazy in tensors.items()}, lora, base)


def library() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'vidgen[lora]'") from error
    return peft
