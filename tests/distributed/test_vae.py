# SPDX-License-Identifier: Apache-2.0
"""Autoencoders over the ranks of a group: every result equals that of one process."""

from random import Random
from typing import Any

import pytest

from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config, wfvae_config
from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX
from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE
from vidgen.models.autoencoders.wfvae import WFVAE
from vidgen.parallel.vae import frame_shares

from .pool import Pool

IN_FLOAT32, IN_FLOAT64 = 1e-5, 1e-11  # of the largest value; in float32 one process alone is 5e-6 from the truth


def check(found: list[dict[int, float]], tolerance: float) -> None:
    assert max(max(errors.values()) for errors in found) <= tolerance, found


@pytest.mark.parametrize(
    ("system", "kind", "counts"),
    [
        ("wfvae", "encode", [9, 1, 17, 41]),
        ("wfvae", "decode", [2, 1, 3, 7]),
        ("wfvae_4x8x8", "encode", [9, 1, 5, 29]),
        ("wfvae_4x8x8", "decode", [2, 1, 3, 7]),
        ("hunyuan", "encode", [6, 1, 5, 16, 29]),
        ("hunyuan", "decode", [2, 1, 3, 7]),
        ("cogvideox", "encode", [9, 1, 16, 49]),
        ("cogvideox", "decode", [2, 1, 3, 4, 13]),
    ],
)
def test_frames_over_ranks(pool: Pool, system: str, kind: str, counts: list[int]) -> None:
    case = {"system": system, "kind": kind}
    check(pool.run("vae_cases.errors", 4, counts=counts, **case), IN_FLOAT32)
    check(pool.run("vae_cases.errors", 3, counts=counts[2:], batch=2, **case), IN_FLOAT32)
    check(pool.run("vae_cases.errors", 2, counts=counts[-2:], double=True, **case), IN_FLOAT64)
    check(pool.run("vae_cases.errors", 1, counts=counts[-1:], **case), IN_FLOAT32)


@pytest.mark.parametrize(
    ("system", "kind", "counts", "options"),
    [
        ("wfvae", "encode", [41], {"chunk_frames": 8}),
        ("wfvae", "decode", [4, 5], {"chunk_latents": 1}),
        ("wfvae", "decode", [9], {"chunk_latents": 2}),
        ("wfvae_4x8x8", "encode", [21], {"chunk_frames": 4}),
        ("wfvae_4x8x8", "decode", [6], {"chunk_latents": 1}),
        ("cogvideox", "encode", [23], {"chunk_frames": 4}),
        ("cogvideox", "decode", [4], {"chunk_latents": 1}),
        ("cogvideox", "decode", [6], {"chunk_latents": [1, 3, 2]}),
    ],
)
def test_chunks_in_rounds(pool: Pool, system: str, kind: str, counts: list[int], options: dict[str, Any]) -> None:
    """Fewer ranks than chunks, so that what the last rank keeps must reach the first one."""
    case = {"system": system, "kind": kind, "counts": counts, "options": options, "double": True}
    check(pool.run("vae_cases.errors", 2, **case), IN_FLOAT64)


@pytest.mark.parametrize(
    ("kind", "frames"), [("encode", 2), ("encode", 15), ("encode", 16), ("encode", 17), ("decode", 2), ("decode", 7)]
)
def test_one_batch_of_cogvideox_is_spread(pool: Pool, kind: str, frames: int) -> None:
    """Whether it begins with a still depends on all its frames, level by level."""
    options = {"chunk_frames": None} if kind == "encode" else {"chunk_latents": [frames]}
    case = {"system": "cogvideox", "kind": kind, "counts": [frames], "options": options, "double": True}
    check(pool.run("vae_cases.errors", 3, **case), IN_FLOAT64)


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize("changes", [{"norm_type": "groupnorm"}, {"t_interpolation": "nearest"}], ids=str)
def test_variants_of_the_wfvae(pool: Pool, kind: str, changes: dict[str, str]) -> None:
    wide = {"base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32}
    case = {"system": "wfvae_4x8x8", "kind": kind, "counts": [17 if kind == "encode" else 5], "double": True}
    check(pool.run("vae_cases.errors", 3, **case, **wide, **changes), IN_FLOAT64)


def test_shares_of_frames() -> None:
    """The first ranks have one latent frame more; the first frame of a video is a latent frame of its own."""
    wfvae, hunyuan = WFVAE(wfvae_config.preset("tiny")), HunyuanVAE(hunyuan_vae_config.preset("tiny"))
    cogvideox = AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny"))
    assert frame_shares(wfvae, 2, frames=17) == [((0, 2), (0, 9)), ((2, 3), (9, 17))]
    assert frame_shares(wfvae, 3, latents=2) == [((0, 1), (0, 1)), ((1, 2), (1, 9)), ((2, 2), (9, 9))]
    assert frame_shares(hunyuan, 2, frames=7) == [((0, 1), (0, 1)), ((1, 2), (1, 7))]
    # batches of 2 and 2, neither of which begins with a still
    assert frame_shares(cogvideox, 3, latents=4) == [((0, 2), (0, 8)), ((2, 3), (8, 12)), ((3, 4), (12, 16))]


def test_any_group(pool: Pool) -> None:
    case = {"system": "hunyuan", "kind": "decode", "counts": [5], "double": True}
    check(pool.run("vae_cases.errors_of_some", 4, members=(1, 3), **case), IN_FLOAT64)


def test_odd_sizes(pool: Pool) -> None:
    case = {"system": "hunyuan", "kind": "encode", "counts": [11], "size": (13, 19), "batch": 2, "double": True}
    check(pool.run("vae_cases.errors", 3, **case), IN_FLOAT64)
    for system in ("wfvae", "hunyuan", "cogvideox"):
        case = {"system": system, "kind": "decode", "counts": [7], "size": (3, 1), "batch": 2, "double": True}
        check(pool.run("vae_cases.errors", 2, **case), IN_FLOAT64)


TILED = {"tile_size": 16, "tile_overlap": 8}
IN_SPACE = {"use_spatial_tiling": True, "sample_size": 32}
IN_TIME = {"use_temporal_tiling": True, "sample_tsize": 16}


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize(
    ("system", "options", "changes"),
    [
        ("wfvae", TILED, {}),
        ("cogvideox", TILED, {}),
        ("hunyuan", {}, IN_SPACE),
        ("hunyuan", {}, IN_TIME),
        ("hunyuan", {}, IN_SPACE | IN_TIME),
        ("cogvideox", {"diffusers_tiling": True}, {}),
    ],
    ids=["wfvae", "cogvideox", "hunyuan_space", "hunyuan_time", "hunyuan_both", "diffusers"],
)
def test_tiles(pool: Pool, system: str, kind: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    """Dealt to the ranks they give the same bits; one after another, their frames are spread."""
    size, frames = ((3, 4), 3) if system != "hunyuan" else ((3, 6), 6)
    if "diffusers_tiling" in options:
        size = (7, 4)
    if kind == "encode":
        size, frames = (8 * size[0], 8 * size[1]), (21 if system == "hunyuan" else 9)
    if system == "wfvae":
        options = options | ({"chunk_frames": 8} if kind == "encode" else {"chunk_latents": 1})
    case = {"system": system, "kind": kind, "counts": [frames], "size": size, "options": options, **changes}
    check(pool.run("vae_cases.errors", 3, split="tiles", ways=["whole", "stream"], **case), 0.0)
    # the sums over tiles are float32 whatever the input
    check(pool.run("vae_cases.errors", 2, ways=["share"], double=True, **case), 1e-6)


@pytest.mark.parametrize(
    ("system", "size", "options", "changes", "decoded"),
    [
        ("wfvae", (2, 6), TILED, {}, [2, 2, 1]),  # one row of five
        ("hunyuan", (1, 1), {}, IN_TIME, [1, 1, 0]),  # of five latent frames and of three
        ("hunyuan", (3, 6), {}, IN_SPACE | IN_TIME, [2, 2, 0]),  # each of them again two, beside each other
    ],
    ids=["wfvae", "hunyuan_time", "hunyuan_both"],
)
def test_tiles_are_dealt(
    pool: Pool, system: str, size: tuple[int, int], options: dict[str, Any], changes: dict[str, Any], decoded: list[int]
) -> None:
    case = {"system": system, "frames": 6, "size": size, "options": options}
    assert pool.run("vae_cases.tiles_decoded", 3, **case, **changes) == decoded


@pytest.mark.parametrize(
    ("system", "kind", "frames", "options"),
    [
        ("wfvae", "encode", 65, {}),
        ("wfvae", "decode", 9, {}),
        ("wfvae", "decode", 9, {"chunk_latents": 1}),
        ("hunyuan", "encode", 65, {}),
        ("hunyuan", "decode", 17, {}),
        ("cogvideox", "encode", 65, {}),
        ("cogvideox", "encode", 65, {"chunk_frames": None}),
        ("cogvideox", "decode", 17, {}),
        ("cogvideox", "decode", 17, {"chunk_latents": [17]}),
    ],
)
def test_a_rank_sees_its_part_of_the_frames(
    pool: Pool, system: str, kind: str, frames: int, options: dict[str, Any]
) -> None:
    """No convolution gets more frames than a quarter, and those of one latent frame that does not divide evenly."""
    latent_frame = 8 if system == "wfvae" else 4
    for here, whole in pool.run("vae_cases.most_frames", 4, system=system, kind=kind, frames=frames, options=options):
        assert here <= whole / 4 + latent_frame, (here, whole)


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize("system", ["wfvae", "hunyuan", "cogvideox"])
def test_volume_is_the_formulas(pool: Pool, system: str, kind: str) -> None:
    found = pool.run("vae_cases.sent_and_formula", 3, system=system, kind=kind, frames=33 if kind == "encode" else 5)
    assert sum(sent for sent, _ in found) == found[0][1] > 0


def test_refusals_reach_every_rank(pool: Pool) -> None:
    found = pool.run("vae_cases.refusals", 2)
    assert found[0] == found[1]
    said = found[0]
    assert "rank 1: decoding: latent must be (batch, 4" in said["one rank's input"]
    for name in ("one rank's number of frames", "one rank's option"):
        assert "must be those of rank 0, got others on ranks [1]" in said[name]
    assert "must be called under torch.no_grad()" in said["gradient"]
    assert "split must be one of ('frames', 'tiles'), got 'both'" in said["split"]
    assert "chunks" in said["unknown option"]
    for name in ("chunks of a norm over all frames", "described chunks of such a norm"):
        assert "cannot be chunked" in said[name]
    assert "frames or latents" in said["shares"]
    assert "latent must be" in said["stream"]


@pytest.mark.parametrize("system", ["wfvae", "hunyuan", "cogvideox"])
def test_bfloat16_is_as_exact_as_on_one_process(pool: Pool, system: str) -> None:
    for kind, frames in (("encode", 17), ("decode", 4)):
        for one, many in pool.run("vae_cases.bfloat16", 2, system=system, kind=kind, frames=frames):
            assert many <= 1.1 * one, (kind, one, many)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_cases(pool: Pool, seed: int) -> None:
    """Any system, ranks, frames, size, chunks, tiles and split."""
    random = Random(seed)
    system, kind = random.choice(["wfvae", "wfvae_4x8x8", "hunyuan", "cogvideox"]), random.choice(["encode", "decode"])
    latents, factor = random.randint(1, 10), 8 if system == "wfvae" else 4
    frames = latents if kind == "decode" else factor * (latents - 1) + 1
    if kind == "encode" and not system.startswith("wfvae"):
        frames += random.randint(0, 3)
    size = (random.randint(1, 4), random.randint(1, 4))
    size = size if kind == "decode" else (8 * size[0], 8 * size[1])
    options: dict[str, Any] = {}
    if system == "cogvideox" and random.random() < 0.3:
        options = {"chunk_frames": None} if kind == "encode" else {"chunk_latents": [frames]}
    elif system != "hunyuan" and random.random() < 0.6:
        chunk = random.randint(1, 3)
        options = {"chunk_frames": chunk * factor} if kind == "encode" else {"chunk_latents": chunk}
    tiled = random.random() < 0.4
    if tiled and system != "hunyuan":
        options |= {"tile_size": 16, "tile_overlap": random.choice([0, 8])}
    changes = random.choice([IN_TIME, IN_SPACE, IN_TIME | IN_SPACE]) if tiled and system == "hunyuan" else {}
    case = {"system": system, "kind": kind, "counts": [frames], "size": size, "batch": random.randint(1, 2)}
    case |= {"split": random.choice(["frames", "tiles"]) if tiled else "frames", "options": options, "double": True}
    check(pool.run("vae_cases.errors", random.randint(1, 4), **case, **changes), 1e-6 if tiled else IN_FLOAT64)
