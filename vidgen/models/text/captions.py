# SPDX-License-Identifier: Apache-2.0
"""Captions to prompts: pure functions on strings."""

from __future__ import annotations

import html
import re

import torch

OPENSORA_PLAN_V1_5_PREFIX = "high quality, "
OPENSORA_PLAN_V1_3_PREFIX = "high quality, high aesthetic, "
OPENSORA_PLAN_V1_3_NEGATIVE_PROMPT = (
    "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
# Part of what the inpainting model was trained on: it stands for a caption that says nothing.
OPENSORA_PLAN_V1_3_NEUTRAL_CAPTION = "The video/image showcases a scene with coherent and clear visuals."

_ENDS_WITH_FPS = re.compile(r"\d+ FPS\.$")
_NICKNAME = re.compile(r"@\w+")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_REMOVED = re.compile(
    r"</?[a-z][^<>]*>"  # HTML tags
    r"|<?(https?://|www\.)[^\s<>]*>?"  # addresses of pages
    r"|[\w.+-]+@[\w-]+(\.[\w-]+)+"  # addresses of people
    r"|[\x00-\x08\x0e-\x1f\x7f\ufeff\u200b]"  # control and zero-width characters
)


def clean_caption(caption: str) -> str:
    """Lower-case a caption and take out what was never said about the picture.

    HTML entities are decoded; tags, web and mail addresses and control characters are removed; typographic quotes and
    dashes become plain ones; white space is collapsed to single spaces and stripped. Words, punctuation and every
    script stay. Cleaning twice is the same as once, so it does not matter that the original systems do so.

    The original systems use a longer list of rules, which also drops Chinese, Japanese and Korean characters.
    """
    while (cleaned := _clean_once(caption)) != caption:
        caption = cleaned  # decoding one entity can bring out another, or a tag
    return caption


def opensora_plan_v1_3_prompt(caption: str) -> str:
    """The positive prompt that Open-Sora Plan v1.3 samples with: ``"high quality, high aesthetic, {caption}"``.

    The caption is not cleaned. The original puts line breaks and spaces around it, which mT5's tokenizer takes out.
    """
    return OPENSORA_PLAN_V1_3_PREFIX + caption


def opensora_plan_v1_3_training_caption(caption: str) -> str:
    """The caption that Open-Sora Plan v1.3 trains with: cleaned, and without names that begin with ``@``.

    Every script stays, since mT5 reads them all.
    """
    caption = clean_caption(caption)
    while (cleaned := " ".join(_NICKNAME.sub(" ", caption).split())) != caption:
        caption = cleaned
    return caption


def drop_caption(
    caption: str, *, probability: float = 0.1, inpaint: bool = False, generator: torch.Generator | None = None
) -> str:
    """Now and then the empty caption, from which a model learns what guidance compares with (Open-Sora Plan v1.3).

    Args:
        caption: comes back in all other cases.
        probability: of dropping it; the original's is 0.1.
        inpaint: instead of the empty caption, half of the time, one that says nothing.
        generator: of the draws.

    Raises:
        ValueError: ``probability`` outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"drop_caption: probability must lie in [0, 1], got {probability}")
    dropped, neutral = torch.rand(2, generator=generator).tolist()
    if dropped >= probability:
        return caption
    return OPENSORA_PLAN_V1_3_NEUTRAL_CAPTION if inpaint and neutral < 0.5 else ""


def opensora_plan_v1_5_prompt(caption: str) -> str:
    """The positive prompt that Open-Sora Plan v1.5 samples with: "high quality, " and the cleaned caption.

    Negative prompts have no such prefix: clean them with ``clean_caption``.
    """
    return clean_caption(OPENSORA_PLAN_V1_5_PREFIX + caption)


def opensora_v2_prompt(caption: str, *, fps: int | None = 24, motion_score: int | str | None = 4) -> str:
    """The prompt that Open-Sora 2.0 samples with: ``"raining, sea"`` to ``"raining, sea. 24 FPS. 4 motion score."``.

    The caption is otherwise left as it is: neither cleaned nor put in lower case.

    Args:
        caption: with a frame rate, it is stripped and ends with a period; a frame rate that it ends with is kept.
        fps: frames per second of the video; None says nothing of them.
        motion_score: how much moves, about 1 to 7; None says nothing of it.
    """
    if fps is not None:
        caption = caption.strip()
        caption += "" if caption.endswith(".") else "."
        caption += "" if _ENDS_WITH_FPS.search(caption) else f" {fps} FPS."
    return caption if motion_score is None else f"{caption} {motion_score} motion score."


def opensora_v2_training_caption(caption: str, *, fps: int | None = None, motion_score: float | None = None) -> str:
    """The caption that Open-Sora 2.0 trains with: ``"a cat"`` to ``"a cat 24 FPS, 4 motion score."``.

    Args:
        caption: as it is; no period is added.
        fps: frames per second of the clip after frames were left out, None for an image.
        motion_score: as it was measured; rounded.
    """
    facts = [f"{fps} FPS"] if fps is not None else []
    facts += [f"{int(motion_score + 0.5)} motion score"] if motion_score is not None else []
    return f"{caption} {', '.join(facts)}." if facts else caption


def _clean_once(caption: str) -> str:
    caption = html.unescape(caption).lower().translate(_STRAIGHT)
    return " ".join(_REMOVED.sub(" ", caption).split())
