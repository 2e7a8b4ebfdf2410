# SPDX-License-Identifier: Apache-2.0
"""What is trained: a VAE on clips, or a DiT on the latents and captions of clips. The loop knows only `Task`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vidgen import config as loading
from vidgen import device as devices
from vidgen.checkpoints.hf import PretrainedModel
from vidgen.data.dataset import ClipDataset, ShuffledSampler, read_annotations
from vidgen.models.autoencoders.causal import split_moments
from vidgen.pipelines.folders import NEEDED, Parts, needed, weights_folder, write_parts

from . import lora
from .features import FeatureCache, Features, clip_key, folder_fingerprint, stack
from .recipe import SYSTEMS, Recipe, diffusion_options, model_class, model_config, vae_config, vae_loss_config
from .vae_loss import vae_loss

BuildModel = Callable[[Recipe, torch.device, torch.dtype, Path | None], PretrainedModel]
NUM_STATISTICS_CLIPS = 64  # at most this many clips say what the latents' mean and spread are


class Task:
    """A model, its batches and its loss. Subclasses say what a batch is worth."""

    model: Any  # a PretrainedModel

    def __init__(
        self, recipe: Recipe, device: torch.device, weights: Path | None, build: BuildModel | None = None
    ) -> None:
        self.recipe, self.device = recipe, device
        self.dtype = devices.compute_dtype(device, recipe.training.precision)
        self.model = (build or build_model)(recipe, device, self.dtype, weights).train()
        if recipe.training.activation_checkpointing:
            if not hasattr(self.model, "gradient_checkpointing"):
                raise ValueError(f"training.activation_checkpointing: {type(self.model).__name__} does not offer it")
            self.model.gradient_checkpointing = True
        data = recipe.data
        self.dataset = ClipDataset(
            read_annotations(data.path),
            data.num_frames,
            data.height,
            data.width,
            data.fps,
            recipe.seed,
            max_broken_fraction=data.max_broken_fraction,
        )
        self.cache = FeatureCache(data.cache) if data.cache is not None else None
        self._remembered: tuple[list[int], list[Features]] | None = None

    # Batches

    def samples(self, start: int, stride: int = 1) -> Iterator[dict[str, Any]]:
        """Batches without end, from sample number ``start`` of the run on; of every ``stride`` batches the first."""
        if self.cache is None:
            return self._decoded(start, stride)
        return self._kept(start, stride, *self.remember())

    def remember(self) -> tuple[list[int], list[Features]]:
        """Numbers and features of all clips that are not broken, from the cache; the encoders may be gone then."""
        assert self.cache is not None
        if self._remembered is None:
            self._remembered = self._compute_features(self.cache)
        return self._remembered

    def _order(self, length: int, start: int, stride: int) -> ShuffledSampler:
        batch = self.recipe.training.batch_size
        return ShuffledSampler(length, self.recipe.seed, start, batch=batch, stride=stride)

    def _decoded(self, start: int, stride: int) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.dataset,
            self.recipe.training.batch_size,
            sampler=self._order(len(self.dataset), start, stride),
            num_workers=self.recipe.data.num_workers,
            generator=torch.Generator().manual_seed(self.recipe.seed),  # its draws stay out of the global generator
        )
        for batch in loader:
            self.dataset.note_replaced(batch["replaced"])
            yield batch

    def _kept(self, start: int, stride: int, numbers: list[int], entries: list[Features]) -> Iterator[dict[str, Any]]:
        order = iter(self._order(len(entries), start, stride))
        while True:
            indices = [next(order) for _ in range(self.recipe.training.batch_size)]
            clips = [self.dataset.clips[numbers[i % len(entries)]] for i in indices]
            epochs = [i // len(entries) for i in indices]
            captions = [clip.captions[epoch % len(clip.captions)] for clip, epoch in zip(clips, epochs, strict=True)]
            features = stack([entries[i % len(entries)] for i in indices])
            yield {**features, "caption": captions, "path": [str(clip.path) for clip in clips]}

    def _compute_features(self, cache: FeatureCache) -> tuple[list[int], list[Features]]:
        """Of one fixed part of each clip; broken clips are left out. The clips' numbers and their features."""
        found = {number: self._entry(cache, number) for number in range(len(self.dataset.clips))}
        self.features_are_ready()
        kept = {number: entry for number, entry in found.items() if entry is not None}
        return list(kept), list(kept.values())

    def _entry(self, cache: FeatureCache, number: int) -> Features | None:
        """The features of one clip; None where it is broken."""
        dataset = self.dataset
        try:
            return cache.get(
                {**self._feature_kind, **clip_key(dataset.clips[number]), "number": number},
                functools.partial(self._features_of, number),
            )
        except (_BrokenClip, FileNotFoundError):
            dataset[number]  # notes it, and stops the run if there are too many
            return None

    @functools.cached_property
    def _feature_kind(self) -> dict[str, Any]:
        sizes = {name: getattr(self.dataset, name) for name in ("num_frames", "height", "width", "fps")}
        return {**self.feature_kind(), "seed": self.dataset.seed, **sizes}

    def _features_of(self, number: int) -> Features:
        sample = self.dataset[number]
        if sample["replaced"] != "[]":
            raise _BrokenClip
        return {name: value[0].cpu() for name, value in self.features(sample["video"][None]).items()}

    def features(self, video: Tensor) -> Features:
        """What is kept of a video ``(1, 3, frames, height, width)``; ``(1, ...)`` each."""
        return {"video": video}

    def feature_kind(self) -> dict[str, Any]:
        """What the features depend on beside the clip."""
        return {"kind": "video"}

    def features_are_ready(self) -> None:
        """Let go what was only needed to compute features."""

    def fill_cache(self, rank: int, ranks: int) -> None:
        """Compute every ``ranks``-th entry of the cache, from ``rank`` on, so that the others find it on disk."""
        assert self.cache is not None
        for number in range(rank, len(self.dataset.clips), ranks):
            self._entry(self.cache, number)

    @property
    def encodes(self) -> bool:
        """Whether a batch passes encoders, which stand still otherwise, before the model."""
        return False

    # Training

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of a batch and its terms; all draws come from ``generator``, on the CPU."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last step, with the averaged weights in the model: what the saved model still needs."""

    # Saving

    def save(self, folder: Path) -> None:
        if self.recipe.lora is None:
            self.model.save_pretrained(folder)
        else:
            adapters = lora.Adapters(self.model).state_dict()
            lora.save(folder, adapters, self.recipe.lora, self.recipe.model.get("pretrained"))

    def save_beside(self, folder: Path) -> None:
        """Write what a checkpoint holds beside the weights."""

    def state_dict(self) -> dict[str, Any]:
        return {"broken": self.dataset.broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.broken = dict(state["broken"])

    def report(self) -> dict[str, Any]:
        broken = [{"path": path, "reason": reason} for path, reason in self.dataset.broken.items()]
        facts: dict[str, Any] = {"num_clips": len(self.dataset), "broken_clips": broken}
        if self.cache is not None:
            facts["cache"] = {"hits": self.cache.hits, "misses": self.cache.misses}
        return facts


class _BrokenClip(Exception):
    """The clip cannot be used; the dataset has noted why."""


class VAETask(Task):
    """Reconstruct clips."""

    model: Any

    def __init__(
        self, recipe: Recipe, device: torch.device, weights: Path | None, build: BuildModel | None = None
    ) -> None:
        super().__init__(recipe, device, weights, build)
        self.loss_config = vae_loss_config(recipe)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        video = batch["video"].to(self.device, self.dtype)
        noise = torch.randn(latent_shape(self.model, video), generator=generator).to(self.device, self.dtype)
        return vae_loss(self.model(video, noise=noise), video, self.loss_config)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the latents: per channel ``shift`` is their mean, ``scale`` one over their standard deviation."""
        samples = self.samples(0)
        sums = squares = count = torch.zeros((), dtype=torch.float64)
        numbers = range(min(len(self.dataset), NUM_STATISTICS_CLIPS))
        batches = -(-len(numbers) // self.recipe.training.batch_size)
        for _ in range(batches):
            video = next(samples)["video"].to(self.device, self.dtype)
            mean, logvar = split_moments(self.model.encode_moments(video))
            mean, variance = mean.double().cpu(), logvar.double().exp().cpu()
            sums = sums + mean.sum((0, 2, 3, 4))
            squares = squares + (mean**2 + variance).sum((0, 2, 3, 4))
            count = count + mean[:, 0].numel()
        shift = sums / count
        spread = (squares / count - shift**2).clamp(min=1e-12).sqrt()
        self.model.config = dataclasses.replace(
            self.model.config, shift=tuple(shift.tolist()), scale=tuple((1 / spread).tolist())
        )


PREPARED, GENERATOR = "prepared.", "generator_state"  # how tensors of an encoded batch are called


class Inputs(NamedTuple):
    """What the encoders make of a batch: latents, embeddings of the captions, and conditions of the system."""

    latents: Tensor
    text: Features
    given: Features

    def named(self) -> Features:
        """As one map."""
        parts = {"text": self.text, "given": self.given}
        return {"latents": self.latents} | {f"{p}.{name}": t for p, part in parts.items() for name, t in part.items()}

    @classmethod
    def of(cls, tensors: Features) -> Inputs:
        """The inverse of :meth:`named`."""
        text, given = (
            {name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p)} for p in ("text.", "given.")
        )
        return cls(tensors["latents"], text, given)


class DiTTask(Task):
    """Denoise latents of clips, from their captions and whatever else the system shows its transformer.

    What differs between the systems are the functions of ``system``, a module of this folder.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, weights: Path | None, build: BuildModel | None = None
    ) -> None:
        super().__init__(recipe, device, weights, build)
        self.system: Any = SYSTEMS[recipe.system]
        self.options: Any = diffusion_options(recipe)
        self.parts = parts_of(recipe)
        self.vae: Any = self.system.load_vae(self.parts, self.dtype, device).requires_grad_(False)
        self.encoders: Any = self.system.load_encoders(self.parts, self.dtype, device)
        self.needs_video = self.system.needs_video(self.model.config)
        self._check_widths()
        self._texts: dict[str, Features] = {}
        if self.cache is not None:
            folders = {"t5": recipe.text.t5, "clip": recipe.text.clip}
            used = [name for name in NEEDED[recipe.system] if name in folders]
            self._text_kind = {
                "text": [folder_fingerprint(needed(folders[name])) for name in used],
                "lengths": [getattr(self.parts, f"{name}_max_length") for name in used],
            }

    def _check_widths(self) -> None:
        found = self.system.widths(self.model.config, self.system.vae_channels(self.vae.config), self._encode(""))
        problems = [
            f"model.{name} must be {wanted}, the width of {what}, got {given}"
            for name, (given, wanted, what) in found.items()
            if given != wanted
        ]
        if problems:
            raise ValueError("recipe: " + "; ".join(problems))

    # Latents

    @torch.no_grad()
    def features(self, video: Tensor) -> Features:
        """Mean and standard deviation of the scaled latent, in float32; the video too if conditions are made of it."""
        mean, logvar = split_moments(self.vae.encode_moments(video.to(self.device, self.dtype)).float())
        shift, scale = (value.to(mean.device) for value in self.system.vae_statistics(self.vae))
        kept = {"video": video} if self.needs_video else {}
        return {"mean": (mean - shift) * scale, "std": (logvar / 2).exp() * scale.abs(), **kept}

    def feature_kind(self) -> dict[str, Any]:
        kind = {"kind": "latent", "vae": folder_fingerprint(needed(self.parts.vae)), "precision": str(self.dtype)}
        return {**kind, "video": True} if self.needs_video else kind

    def features_are_ready(self) -> None:
        """With latents and captions kept, the encoders are needed no longer."""
        for caption in self._captions():
            self._text(caption)
        self.encoders = None
        if not self.needs_video:
            self.vae = None

    def _captions(self) -> list[str]:
        """All that batches can have."""
        return [*self.system.DROPPED, *(caption for clip in self.dataset.clips for caption in clip.captions)]

    def fill_cache(self, rank: int, ranks: int) -> None:
        super().fill_cache(rank, ranks)
        for caption in sorted(set(self._captions()))[rank::ranks]:
            self._text(caption)

    @property
    def encodes(self) -> bool:
        return self.vae is not None or self.encoders is not None

    def move_encoders(self, device: torch.device) -> None:
        """Let the VAE and the text encoders lie on a device; what they have made stays where it is."""
        encoders = self.encoders if isinstance(self.encoders, tuple) else (self.encoders,)
        for part in (self.vae, *encoders):
            if part is not None:
                part.to(device)

    def _latents(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        if "mean" not in batch:
            batch.update(self.features(batch["video"]))
        mean, std = batch["mean"], batch["std"]
        return mean.to(self.device) + std.to(self.device) * torch.randn(mean.shape, generator=generator).to(self.device)

    # Captions

    def text(self, captions: Sequence[str]) -> Features:
        """What the encoders make of the captions, ``(batch, ...)`` each, on the device."""
        return {name: value.to(self.device) for name, value in stack([self._text(c) for c in captions]).items()}

    def _text(self, caption: str) -> Features:
        """What the encoders make of one caption, ``(...)`` without a batch axis."""
        caption = self.system.caption(caption, self.recipe) if caption else caption
        if caption in self._texts:
            return self._texts[caption]
        if self.cache is None:
            return self._encode(caption)
        key = {**self._text_kind, "kind": "caption", "caption": caption, "precision": str(self.dtype)}
        self._texts[caption] = entry = self.cache.get(key, lambda: self._encode(caption))
        return entry

    def _encode(self, caption: str) -> Features:
        assert self.encoders is not None
        return {name: value[0] for name, value in self.system.encode_text(self.encoders, caption).items()}

    # Training

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> Inputs:
        """All that the VAE and the text encoders are needed for, with the draws that belong to it."""
        latents = self._latents(batch, generator)
        text = self.system.draw_text(self, batch["caption"], generator)
        return Inputs(latents, text, self.system.conditions(self, latents, batch, generator))

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The batch as :meth:`loss` takes it without encoders, on the host: inputs, and the generator's state."""
        tensors = {PREPARED + name: t.cpu() for name, t in self.prepare(batch, generator).named().items()}
        others = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
        return {**others, **tensors, GENERATOR: generator.get_state()}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if GENERATOR in batch:
            tensors = {n.removeprefix(PREPARED): t.to(self.device) for n, t in batch.items() if n.startswith(PREPARED)}
            inputs = Inputs.of(tensors)
            generator.set_state(batch[GENERATOR])
        else:
            inputs = self.prepare(batch, generator)
        return self.system.loss(self, *inputs, generator), {}

    def save_beside(self, folder: Path) -> None:
        write_parts(self.parts, folder)


def parts_of(recipe: Recipe) -> Parts:
    """What stands in the ``pipeline.json`` of the run's checkpoints."""
    data, text = recipe.data, recipe.text
    if recipe.vae is None or any(getattr(text, name) is None for name in NEEDED[recipe.system] if name != "vae"):
        names = ", ".join(name if name == "vae" else f"text.{name}" for name in NEEDED[recipe.system])
        raise ValueError(f"recipe: training a dit needs {names}")
    own, pretrained = Path("model" if recipe.optimizer.ema_decay is None else "ema"), recipe.model.get("pretrained")
    adapters = recipe.lora is not None and pretrained is not None
    return Parts(
        transformer=weights_folder(needed(pretrained)).resolve() if adapters else own,
        lora=own if adapters else None,
        vae=weights_folder(recipe.vae).resolve(),
        t5=text.t5 and text.t5.resolve(),
        clip=text.clip and text.clip.resolve(),
        system=recipe.system,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=data.fps or 24.0,
        t5_max_length=text.t5_max_length,
        clip_max_length=text.clip_max_length,
        prompt_prefix="",  # captions had none
        motion_score=None,
    )


TASKS: dict[str, Callable[..., Task]] = {"vae": VAETask, "dit": DiTTask}


def build_task(
    recipe: Recipe, device: torch.device, weights: Path | None = None, build: BuildModel | None = None
) -> Task:
    """The task of a recipe; ``weights`` is the model folder to go on from instead of a fresh or pretrained model.

    ``build`` makes the model in another way than :func:`build_model`, sharded for example.
    """
    return TASKS[recipe.task](recipe, device, weights, build)


def build_model(recipe: Recipe, device: torch.device, dtype: torch.dtype, weights: Path | None) -> PretrainedModel:
    """The model of a recipe on the device, as a whole: fresh, or from ``weights``, or from ``model.pretrained``."""
    cls, found = model_class(recipe), weights
    if recipe.lora is not None:
        weights = None  # they are adapters; what they belong to is the recipe's
    if weights is None and "pretrained" in recipe.model:
        weights = weights_folder(recipe.model["pretrained"])
    if weights is not None:
        model = cls.from_pretrained(weights, dtype=dtype, device=device)
    else:
        model = cls(model_config(recipe)).to(device, dtype)
    if recipe.lora is None:
        return model.requires_grad_(True)
    lora.add_adapters(model, recipe.lora)
    if found is not None:
        lora.load(model, found)
    return model


def latent_shape(vae: Any, video: Tensor) -> tuple[int, ...]:
    """Shape of the latent of a video ``(batch, 3, frames, height, width)``."""
    batch, _, frames, height, width = video.shape
    factor, side = vae.frames_per_latent, vae.pixels_per_latent
    return batch, vae.config.latent_dim, (frames - 1) // factor + 1, height // side, width // side


def describe(recipe: Recipe) -> dict[str, Any]:
    """Parameters and shapes of a recipe, without loading or drawing any weight."""
    data, batch = recipe.data, recipe.training.batch_size
    config = model_config(recipe)
    with torch.device("meta"):
        model = model_class(recipe)(config)
    system = SYSTEMS[recipe.system]
    factor, side = system.vae_factors(vae_config(recipe))
    latent = [(data.num_frames - 1) // factor + 1, data.height // side, data.width // side]
    channels = config.latent_dim if recipe.task == "vae" else system.latent_channels(config)
    facts: dict[str, Any] = {
        "model": loading.to_dict(config),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "clips": len(read_annotations(data.path)) if data.path.exists() else f"{data.path} does not exist",
        "video_shape": [batch, 3, data.num_frames, data.height, data.width],
        "latent_shape": [batch, channels, *latent],
        "samples_per_step": batch * recipe.training.accumulation,
    }
    if recipe.task == "dit":
        facts["tokens"] = system.tokens(config, latent)
        facts["text_tokens"] = recipe.text.t5_max_length
    return facts
