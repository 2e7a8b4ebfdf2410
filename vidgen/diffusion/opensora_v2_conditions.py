# SPDX-License-Identifier: Apache-2.0
"""Conditions of Open-Sora 2.0: which frames of the latent are given, for sampling and for training.

================  ==================================================  ===========================
condition         given frames of the video                           given frames of the latent
================  ==================================================  ===========================
``t2v``           none                                                none
``i2v_head``      the first, as an image                              the first
``i2v_tail``      the last, as an image                               the last
``i2v_loop``      the first and the last, as images                   the first and the last
``v2v_head``      the first 32 (causal: 33)                           the first 8 (causal: 9)
``v2v_tail``      the last 32 (33)                                    the last 8 (9)
``v2v_*_easy``    as above, 64 (65)                                   as above, 16 (17)
================  ==================================================  ===========================

Given frames are encoded by themselves, so that nothing of the others leaks into them. Source: hpcaitech/Open-Sora,
commit 7ad6a96. Shapes: B batch, C channels, T H W latent frames, height and width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

CONDITION_TYPES = (
    "t2v",
    "i2v_head",
    "i2v_tail",
    "i2v_loop",
    "v2v_head",
    "v2v_tail",
    "v2v_head_easy",
    "v2v_tail_easy",
)


def check_type(where: str, cond_type: str) -> None:
    if cond_type not in CONDITION_TYPES:
        raise ValueError(f"{where}: cond_type must be one of {', '.join(CONDITION_TYPES)}, got {cond_type!r}")


def given_frames(cond_type: str, *, causal: bool = True) -> int:
    """Latent frames that a condition gives at one end: 0, 1, 8 or 16 (causal: 9 or 17)."""
    check_type("given_frames", cond_type)
    if cond_type == "t2v":
        return 0
    if cond_type.startswith("i2v"):
        return 1
    return (16 if cond_type.endswith("easy") else 8) + causal


def reference_clips(
    references: Sequence[Tensor], cond_type: str, *, causal: bool = True, time_ratio: int = 4
) -> list[Tensor]:
    """What of the given videos or images is encoded for :func:`inference_condition`.

    Args:
        references: ``(3, frames, height, width)`` each, one or two; the second is the end of ``i2v_loop`` and, if there
            is one, of ``i2v_tail``.
        cond_type: of the table above. ``v2v_*_easy`` of a reference that is too short takes as much as ``v2v_*``.
        causal, time_ratio: of the autoencoder.

    Returns:
        One clip, two for ``i2v_loop``, none for ``t2v``.

    Raises:
        ValueError: unknown type, no reference or one that is too short.
    """
    check_type("reference_clips", cond_type)
    if cond_type == "t2v":
        return []
    if not references:
        raise ValueError(f"reference_clips: {cond_type} needs a reference, got none")
    head, tail = references[0][:, :1], references[-1][:, -1:]
    if cond_type.startswith("i2v"):
        return {"i2v_head": [head], "i2v_tail": [tail], "i2v_loop": [head, tail]}[cond_type]
    first = references[0]
    lengths = [k * time_ratio + causal for k in ((16, 8) if cond_type.endswith("easy") else (8,))]
    fitting = [n for n in lengths if n <= first.shape[1]]
    if not fitting:
        raise ValueError(
            f"reference_clips: {cond_type} needs a reference of at least {lengths[-1]} frames, got {first.shape[1]}"
        )
    return [first[:, : fitting[0]] if "head" in cond_type else first[:, -fitting[0] :]]


def inference_condition(
    latent: Tensor, cond_type: str, references: Sequence[Sequence[Tensor] | None] | None = None, *, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Mask and masked latent of a condition.

    Args:
        latent: of the video to be made; only its shape, dtype and device matter.
        cond_type: of the table above.
        references: for each sample None (which makes it text to video) or encoded clips ``(C, frames, H, W)`` as
            :func:`reference_clips` orders them.
        causal: of the autoencoder.

    Returns:
        ``(B, 1, T, H, W)``, 1 where a frame is given, and ``(B, C, T, H, W)``, the clips there and 0 elsewhere. An
        image (T = 1) has no condition.

    Raises:
        ValueError: unknown type, no references, or ones that do not fit.
    """
    check_type("inference_condition", cond_type)
    batch, channels, frames, height, width = latent.shape
    mask, masked = latent.new_zeros(batch, 1, frames, height, width), torch.zeros_like(latent)
    if cond_type == "t2v" or frames == 1:
        return mask, masked
    if references is None or len(references) != batch:
        got = "none" if references is None else len(references)
        raise ValueError(f"inference_condition: {cond_type} needs references for {batch} samples, got {got}")
    for index, clips in enumerate(references):
        if clips is None:
            continue
        if not clips or any((len(c), *c.shape[2:]) != (channels, height, width) for c in clips):
            wanted, shapes = f"({channels}, frames, {height}, {width})", [tuple(c.shape) for c in clips]
            raise ValueError(f"inference_condition: references of sample {index} must be {wanted}, got {shapes}")
        for place, values in placements(cond_type, clips, frames, causal):
            mask[index, :, place] = 1
            masked[index, :, place] = values.to(masked)
    return mask, masked


def placements(cond_type: str, clips: Sequence[Tensor], frames: int, causal: bool) -> list[tuple[slice, Tensor]]:
    """Where in a latent of so many frames which part of the encoded clips goes; in a short one, everywhere."""
    counts = [min(given_frames(cond_type, causal=causal), frames)]
    if cond_type.endswith("easy"):  # a reference that was too short for it
        counts.append(min(given_frames(cond_type.removesuffix("_easy"), causal=causal), frames))
    fitting = [count for count in counts if count <= clips[0].shape[1]]
    if not fitting:
        raise ValueError(
            f"inference_condition: {cond_type} needs {counts[-1]} latent frames, the reference has {clips[0].shape[1]}"
        )
    count = fitting[0]
    head, tail = slice(0, count), slice(frames - count, frames)
    if cond_type == "i2v_loop":
        return [(head, clips[0][:, :1]), (tail, clips[-1][:, -1:])]
    if cond_type == "i2v_tail":
        return [(tail, clips[-1][:, -1:])]
    return [(head, clips[0][:, :count])] if "head" in cond_type else [(tail, clips[0][:, -count:])]


def restore_references(
    latent: Tensor, mask: Tensor, masked_latent: Tensor, cond_type: str, *, first_sample_only: bool = False
) -> Tensor:
    """A sampled latent with the given images of ``i2v_*`` put back in their frames; others are returned as they are.

    Args:
        latent, mask, masked_latent: ``(B, C, T, H, W)`` and what :func:`inference_condition` returned.
        cond_type: of the table above.
        first_sample_only: do so in the first sample of the batch alone, as the original does.
    """
    check_type("restore_references", cond_type)
    if not cond_type.startswith("i2v"):
        return latent
    given = mask > 0
    if first_sample_only:
        given = given & (torch.arange(len(mask), device=mask.device) == 0).view(-1, 1, 1, 1, 1)
    return torch.where(given, masked_latent.to(latent), latent)


def final_frames(video: Tensor, num_frames: int, cond_type: str, *, causal: bool = True, time_ratio: int = 4) -> Tensor:
    """The frames of a decoded video ``(B, 3, frames, height, width)`` that are shown.

    The first ``num_frames``; with an autoencoder that is not causal, without the ``time_ratio - 1`` copies of a given
    image that make up its latent frame.
    """
    check_type("final_frames", cond_type)
    video = video[:, :, :num_frames]
    if causal or not cond_type.startswith("i2v"):
        return video
    copies, frames = time_ratio - 1, video.shape[2]
    start = copies if cond_type in ("i2v_head", "i2v_loop") else 0
    stop = frames - copies if cond_type in ("i2v_tail", "i2v_loop") else frames
    return video[:, :, start:stop]


def choose_condition(
    weights: Mapping[str, float], frames: int, rng: random.Random, *, causal: bool = True, time_ratio: int = 4
) -> str:
    """Draw the condition of a training sample, as ``random.choices`` does with these weights.

    Args:
        weights: relative frequency of each type. ``v2v_*`` types that would give the whole video are left out, for
            this sample only (the original once left them out for the rest of the run).
        frames: of the latent.
        rng: the source of chance.
        causal, time_ratio: of the autoencoder.

    Raises:
        ValueError: unknown types, negative weights, or none that is left.
    """
    for name, weight in weights.items():
        check_type("choose_condition", name)
        if not weight >= 0:
            raise ValueError(f"choose_condition: the weight of {name} must not be negative, got {weight}")
    limits = {"easy": 64 // time_ratio + causal, "v2v": 32 // time_ratio + causal}
    fitting = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("v2v") or frames > limits["easy" if name.endswith("easy") else "v2v"]
    }
    if not any(fitting.values()):
        raise ValueError(
            f"choose_condition: no type with a positive weight fits {frames} latent frames: {dict(weights)}"
        )
    return rng.choices(list(fitting), weights=list(fitting.values()), k=1)[0]


def training_condition(
    video: Tensor,
    latent: Tensor,
    cond_types: Sequence[str],
    encode: Callable[[Tensor], Tensor],
    *,
    causal: bool = True,
    time_ratio: int = 4,
) -> tuple[Tensor, Tensor]:
    """Mask and masked latent of training samples, from their own first and last frames.

    Args:
        video: ``(B, 3, frames, height, width)``.
        latent: ``(B, C, T, H, W)``, the encoded video.
        cond_types: one for each sample.
        encode: clip ``(1, 3, frames, height, width)`` to its scaled latent. Called for each given clip by itself; a
            model that is not causal sees ``v2v_*`` frames in the latent of the whole video instead.
        causal, time_ratio: of the autoencoder.

    Returns:
        As :func:`inference_condition`.

    Raises:
        ValueError: a number of types that does not fit, unknown ones, or a video that is too short.
    """
    if len(cond_types) != len(video):
        raise ValueError(f"training_condition: wanted {len(video)} condition types, got {len(cond_types)}")
    mask, masked = torch.zeros_like(latent[:, :1]), torch.zeros_like(latent)
    for index, cond_type in enumerate(cond_types):
        check_type("training_condition", cond_type)
        if cond_type == "t2v" or latent.shape[2] == 1:
            continue
        if cond_type.startswith("v2v") and not causal:
            clips = [latent[index]]
        else:
            wanted = reference_clips([video[index]], cond_type, causal=causal, time_ratio=time_ratio)
            clips = [encode(clip.unsqueeze(0))[0] for clip in wanted]
        sample = inference_condition(latent[index : index + 1], cond_type, [clips], causal=causal)
        mask[index], masked[index] = sample[0][0], sample[1][0]
    return mask, masked
