# SPDX-License-Identifier: Apache-2.0
"""The CogVideoX VAE against diffusers, and what goldens do not show: batches, tiles, files, memory of what it keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX as Original
from torch import Tensor

from vidgen import config as loading
from vidgen.models.autoencoders.causal import split_moments
from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX, DiffusersTiling
from vidgen.models.autoencoders.cogvideox_vae_batches import frame_batches, sat_decode_batches
from vidgen.models.autoencoders.cogvideox_vae_checkpoint import to_sat
from vidgen.models.autoencoders.cogvideox_vae_config import PRESETS, CogVideoXVAEConfig, preset
from vidgen.models.autoencoders.cogvideox_vae_layers import SpatialNorm
from vidgen.models.autoencoders.streaming import Stream


def make_vae(name: str = "tiny", **changes: Any) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(preset(name, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in vae.named_parameters():
            norm = key.endswith("weight") and p.dim() == 1
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if norm else 0.12) + (1 if norm else 0))
    return vae


def original_of(vae: AutoencoderKLCogVideoX) -> Original:
    original = Original(**loading.to_dict(vae.config)).eval()
    original.load_state_dict(vae.state_dict(), strict=True)
    return original


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLCogVideoX, Original]:
    vae = make_vae()
    return vae, original_of(vae)


def video(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def latent(frames: int, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(frames))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=2e-4)


# The release


def test_released_size_and_names() -> None:
    with torch.device("meta"):
        vae, original = AutoencoderKLCogVideoX(preset("2b")), Original()
    shapes = {key: t.shape for key, t in vae.state_dict().items()}
    assert len(shapes) == 436
    assert sum(p.numel() for p in vae.parameters()) == 215_583_907
    assert sum(p.numel() for p in vae.encoder.parameters()) == 92_215_456
    assert sum(p.numel() for p in vae.decoder.parameters()) == 123_368_451
    assert shapes == {key: t.shape for key, t in original.state_dict().items()}


def test_presets_are_those_of_the_releases() -> None:
    factors = {name: (c.scaling_factor, c.invert_scale_latents) for name, c in PRESETS.items() if name != "tiny"}
    assert factors == {"2b": (1.15258426, False), "5b": (0.7, False), "1.5-i2v": (0.7, True)}


# Against diffusers


@pytest.mark.parametrize("frames", [1, 2, 5, 12, 17, 20])
@torch.no_grad()
def test_encoding_equals_diffusers(pair: tuple[AutoencoderKLCogVideoX, Original], frames: int) -> None:
    vae, original = pair
    clip = video(frames)
    theirs = original.encode(clip).latent_dist
    mean, logvar = split_moments(vae.encode_moments(clip))
    close(mean, theirs.mode())
    close(logvar, theirs.logvar)
    noise = latent(mean.shape[2])
    close(vae.encode(clip, noise=noise), (theirs.mean + theirs.std * noise) * vae.config.scaling_factor)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
@torch.no_grad()
def test_decoding_equals_diffusers(pair: tuple[AutoencoderKLCogVideoX, Original], frames: int) -> None:
    vae, original = pair
    z = latent(frames)
    theirs = original.decode(z).sample
    close(vae.decode_unscaled(z), theirs)
    close(vae.decode(vae.normalize(z)), theirs)
    close(torch.cat([*vae.decode_stream(vae.normalize(z))], 2), theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": (8, 12, 16), "down_block_types": ("CogVideoXDownBlock3D",) * 3}
        | {"up_block_types": ("CogVideoXUpBlock3D",) * 3},
        {"layers_per_block": 2, "norm_num_groups": 8, "block_out_channels": (8, 8, 16, 24)},
        {"temporal_compression_ratio": 8, "norm_eps": 1e-3},
        {"temporal_compression_ratio": 1, "latent_channels": 2},
    ],
)
@torch.no_grad()
def test_other_sizes_equal_diffusers(changes: dict[str, Any]) -> None:
    vae = make_vae(**changes)
    original, clip = original_of(vae), video(9, 16, 16)
    moments = vae.encode_moments(clip)
    close(moments, original.encode(clip).latent_dist.parameters)
    z = torch.randn(1, vae.config.latent_channels, 3, 2, 1, generator=torch.Generator().manual_seed(1))
    # diffusers builds the norms of the decoder's residual blocks with 1e-6 whatever norm_eps says
    close(vae.decode_unscaled(z), original.decode(z).sample)


@pytest.mark.parametrize("size", [(56, 40), (48, 48)])
@torch.no_grad()
def test_tiles_of_diffusers(size: tuple[int, int]) -> None:
    vae = make_vae(sample_height=96, sample_width=80)
    original = original_of(vae)
    original.enable_tiling()
    clip, z = video(1, *size), latent(1, size[0] // 8, size[1] // 8)
    tiling = DiffusersTiling()
    close(vae.encode_moments(clip, diffusers_tiling=tiling), original.encode(clip).latent_dist.parameters)
    close(vae.decode_unscaled(z, diffusers_tiling=tiling), original.decode(z).sample)
    assert not torch.allclose(vae.decode_unscaled(z), original.decode(z).sample, atol=1e-3)


@torch.no_grad()
def test_stated_tiles_of_diffusers() -> None:
    vae = make_vae()
    original = original_of(vae)
    original.enable_tiling(32, 40, 0.25, 0.4)
    z = latent(1, 7, 8)
    ours = vae.decode_unscaled(z, diffusers_tiling=DiffusersTiling(32, 40, 0.25, 0.4))
    close(ours, original.decode(z).sample)


@torch.no_grad()
def test_tiles_of_diffusers_that_do_not_add_up_are_refused() -> None:
    vae = make_vae()
    original = original_of(vae)
    original.enable_tiling(24, 24, 1 / 6, 1 / 6)
    z = latent(1, 4, 2)
    assert original.decode(z).sample.shape[3] != 32  # the defect
    with pytest.raises(ValueError, match="the tiles of 4 x 2 add up to .* instead of 32 x 16"):
        vae.decode_unscaled(z, diffusers_tiling=DiffusersTiling(24, 24, 1 / 6, 1 / 6))
    tiling = DiffusersTiling(24, 24, 1 / 6, 1 / 6, allow_misaligned=True)
    close(vae.decode_unscaled(z, diffusers_tiling=tiling), original.decode(z).sample)


@torch.no_grad()
def test_whole_clips_differ_from_batches_beyond_one() -> None:
    vae = make_vae()
    for frames in (1, 13):
        torch.testing.assert_close(
            vae.encode_moments(video(frames), chunk_frames=None), vae.encode_moments(video(frames)), atol=0, rtol=0
        )
    whole, batches = vae.encode_moments(video(17), chunk_frames=None), vae.encode_moments(video(17))
    assert (whole - batches).abs().max() > 1e-3


# Batches of frames


@pytest.mark.parametrize(
    "frames, size, wanted",
    [
        (49, 8, [9, 8, 8, 8, 8, 8]),
        (13, 2, [3, 2, 2, 2, 2, 2]),
        (22, 2, [2] * 11),
        (4, 2, [2, 2]),
        (2, 2, [2]),
        (1, 2, [1]),
        (5, 8, [5]),
        (15, 8, [15]),
        (21, [3, 18], [3, 18]),
    ],
)
def test_frame_batches(frames: int, size: Any, wanted: list[int]) -> None:
    spans = frame_batches(frames, size)
    assert [stop - start for start, stop in spans] == wanted
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]


def test_batches_of_sat() -> None:
    for frames in (1, 2, 3, 4, 5, 13, 20, 21):
        assert sat_decode_batches(frames) == [stop - start for start, stop in frame_batches(frames, 2)]
    assert sat_decode_batches(41) == [5] + [4] * 9


@torch.no_grad()
def test_decoding_in_stated_batches() -> None:
    vae = make_vae()
    z = latent(5, 1, 1)
    assert torch.equal(vae.decode(z, chunk_latents=[3, 2]), vae.decode(z))
    assert not torch.allclose(vae.decode(z, chunk_latents=[1, 4]), vae.decode(z), atol=1e-3)
    assert vae.decode(latent(4, 1, 1), chunk_latents=[3, 1]).shape[2] == 9 + 1


@torch.no_grad()
def test_nothing_stays_in_the_modules() -> None:
    """Two videos through one model in turns are those of two models; and a model holds no tensor but its weights."""
    vae = make_vae()
    a, b = latent(5, 1, 2), latent(7, 1, 2)
    wanted = [vae.decode(a), vae.decode(b)]
    first, second = vae.decode_stream(a), vae.decode_stream(b)
    chunks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in (0, 1, 1, 0, 1):
        chunks[index].append(next((first, second)[index]))
    for index, got in enumerate(chunks):
        assert torch.equal(torch.cat(got, 2), wanted[index])
    held = [key for m in vae.modules() for key, value in vars(m).items() if isinstance(value, Tensor)]
    assert held == []


@torch.no_grad()
def test_what_is_kept_between_batches_does_not_grow() -> None:
    """Two frames of each convolution's input, in memory of their own, and nothing after the last batch."""
    vae, z = make_vae(), latent(9, 1, 2)
    stream, sizes = Stream(), []
    for start, stop in frame_batches(9, 2):
        stream.first, stream.last = start == 0, stop == 9
        vae.decoder(z[:, :, start:stop], stream)
        kept = stream._kept.values()
        assert all(t.shape[2] == 2 and t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
        sizes.append(sum(t.numel() for t in kept))
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_peak_of_activations_does_not_grow_with_the_video() -> None:
    """Largest tensors alive at once while decoding: the same for 5 and 11 latent frames."""
    vae = make_vae()

    def largest(frames: int) -> int:
        seen = 0

        def hook(module: Any, inputs: Any, output: Any) -> None:
            nonlocal seen
            if isinstance(output, Tensor):
                seen = max(seen, output.numel())

        hooks = [module.register_forward_hook(hook) for module in vae.modules()]
        for _ in vae.decode_stream(latent(frames, 1, 2)):
            pass
        for handle in hooks:
            handle.remove()
        return seen

    assert largest(5) == largest(11) > 0


def test_gradients_flow_through_batches() -> None:
    vae = make_vae()
    original = original_of(vae)
    clip = video(16, 8, 8)
    vae.encode_moments(clip).square().mean().backward()
    original.encode(clip).latent_dist.parameters.square().mean().backward()
    z = latent(4, 1, 1)
    vae.decode_unscaled(z).square().mean().backward()
    original.decode(z).sample.square().mean().backward()
    theirs = dict(original.named_parameters())
    for key, p in vae.named_parameters():
        torch.testing.assert_close(p.grad, theirs[key].grad, atol=1e-4, rtol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_norm_of_the_decoder_is_the_same_without_gradient() -> None:
    norm = SpatialNorm(8, 4, 4)
    x, z = torch.randn(1, 8, 5, 4, 6), torch.randn(1, 4, 3, 2, 3)
    before = x.clone()
    plain = norm.silu(x, z, Stream())
    with torch.enable_grad():
        torch.testing.assert_close(norm.silu(x, z, Stream()), plain)
    assert torch.equal(x, before)


# Tiles, latents, dtypes


@torch.no_grad()
def test_tiles_blend_into_the_whole() -> None:
    vae = make_vae()
    z = latent(2, 3, 4)
    whole, tiled = vae.decode(z), vae.decode(z, tile_size=16, tile_overlap=8)
    assert tiled.shape == whole.shape
    streamed = torch.cat([*vae.decode_stream(z, tile_size=16, tile_overlap=8)], 2)
    assert torch.equal(streamed, tiled)
    assert 1e-4 < (tiled - whole).norm() / whole.norm() < 0.5
    assert torch.equal(vae.decode(z, tile_size=32), whole)
    clip = video(5, 24, 32)
    moments = vae.encode_moments(clip, tile_size=16)
    assert moments.shape == vae.encode_moments(clip).shape and torch.isfinite(moments).all()


def test_scales_of_latent_and_image() -> None:
    z = latent(1)
    for name, changes, factor in (("tiny", {}, 1.15258426), ("tiny", {"invert_scale_latents": True}, 1 / 1.15258426)):
        vae = AutoencoderKLCogVideoX(preset(name, **changes))
        torch.testing.assert_close(vae.normalize_image(z), z * factor)
        torch.testing.assert_close(vae.normalize(z), z * 1.15258426)
        torch.testing.assert_close(vae.unnormalize(vae.normalize(z)), z)


@torch.no_grad()
def test_samples_of_the_latent() -> None:
    vae = make_vae()
    clip = video(5)
    mean, logvar = split_moments(vae.encode_moments(clip))
    noise = latent(2)
    torch.testing.assert_close(vae.encode(clip), vae.normalize(mean))
    wanted = vae.normalize(mean + (logvar / 2).exp() * noise)
    torch.testing.assert_close(vae.encode(clip, noise=noise), wanted)
    drawn = [vae.encode(clip, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], vae.encode(clip))


@torch.no_grad()
def test_bfloat16_stays_near_float32() -> None:
    vae = make_vae()
    clip, z = video(5, 16, 16), latent(2, 2, 2)
    exact = vae.encode(clip), vae.decode(z)
    vae = vae.to(torch.bfloat16)
    rough = vae.encode(clip.bfloat16()), vae.decode(z.bfloat16())
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.bfloat16 and (b.float() - a).norm() / a.norm() < 0.1


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other() -> None:
    vae = make_vae()
    both = torch.cat([latent(3, 1, 2), latent(3, 1, 2) + 1])
    torch.testing.assert_close(vae.decode(both)[1:], vae.decode(both[1:]), atol=1e-5, rtol=1e-4)


# Files


def test_folders_of_diffusers_and_ours_are_the_same(tmp_path: Path) -> None:
    vae = make_vae(scaling_factor=0.7, invert_scale_latents=True)
    original_of(vae).save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "theirs")
    assert ours.config == vae.config
    vae.save_pretrained(tmp_path / "ours")
    theirs = Original.from_pretrained(tmp_path / "ours").eval()
    assert theirs.config.scaling_factor == 0.7
    for key, value in vae.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value) and torch.equal(theirs.state_dict()[key], value)


@pytest.mark.parametrize("wrapped", [True, False])
def test_sat_files(tmp_path: Path, wrapped: bool) -> None:
    vae = make_vae()
    sat: Any = to_sat(vae.state_dict())
    assert "decoder.up.0.block.0.norm1.conv_y.conv.weight" in sat and "encoder.down.2.downsample.conv.bias" in sat
    # SAT counts the decoder's levels from the pixels
    assert torch.equal(sat["decoder.up.3.upsample.conv.weight"], vae.decoder.up_blocks[0].upsamplers[0].conv.weight)
    sat["loss.discriminator.main.0.weight"] = sat["loss_scale"] = torch.zeros(1)
    torch.save({"state_dict": sat} if wrapped else sat, tmp_path / "3d-vae.pt")
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "3d-vae.pt", config=vae.config)
    ours, theirs = vae.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sat_names_of_the_release() -> None:
    with torch.device("meta"):
        sat = to_sat(AutoencoderKLCogVideoX(preset("2b")).state_dict())
    assert len(sat) == 436 and not any("blocks" in key or "resnets" in key for key in sat)


# Refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda vae: vae.encode_moments(video(5, 20, 24)), r"video must be \(batch, 3, frames, height, width\) with"),
        (lambda vae: vae.encode_moments(video(5)[:, :2]), "video must be"),
        (lambda vae: vae.encode_moments(video(5).double()), "video must have the dtype of the weights, torch.float32"),
        (lambda vae: vae.encode_moments(video(5), chunk_frames=6), "chunk_frames must be a positive multiple of 4"),
        (lambda vae: vae.decode(latent(3)[:, :3]), r"latent must be \(batch, 4, frames, height, width\), got"),
        (lambda vae: vae.decode(latent(3)[:, :, :0]), "latent must be"),
        (lambda vae: vae.decode(latent(3), chunk_latents=0), "a batch must have at least 1 frame, got 0"),
        (lambda vae: vae.decode(latent(3), chunk_latents=[2, 2]), r"must add up to 3 frames, got \[2, 2\]"),
        (lambda vae: vae.decode(latent(3), tile_size=12), "tile_size must be a positive multiple of 8"),
        (
            lambda vae: vae.decode(latent(3), tile_size=16, diffusers_tiling=DiffusersTiling()),
            "tile_size and tile_overlap, or diffusers_tiling: got both",
        ),
        (lambda vae: [*vae.decode_stream(latent(3).half())], "latent must have the dtype of the weights"),
        (lambda vae: vae.decode(latent(3), diffusers_tiling=DiffusersTiling(7, 40)), "at least 8 pixels"),
        (lambda vae: DiffusersTiling(overlap_height=1.0), r"overlap_height must lie in \[0, 1\), got 1.0"),
        (lambda vae: DiffusersTiling(width=0), "width must be at least 1, got 0"),
    ],
)
def test_bad_inputs(pair: tuple[AutoencoderKLCogVideoX, Original], call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pair[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_out_channels": (8, 10, 16, 24)}, r"must be multiples of norm_num_groups=4, got \[8, 10, 16, 24\]"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio must be a power of 2 up to 8"),
        ({"temporal_compression_ratio": 16}, "temporal_compression_ratio must be a power of 2 up to 8"),
        ({"up_block_types": ("UpBlock3D",) * 4}, "up_block_types must be 4 times 'CogVideoXUpBlock3D'"),
        ({"use_quant_conv": True}, "use_quant_conv must be False, got True"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("tiny", **changes)


def test_configurations_are_read_from_json() -> None:
    fields = loading.to_dict(preset("2b"))
    assert loading.load(CogVideoXVAEConfig, fields) == preset("2b")
    with pytest.raises(ValueError, match="no configuration 'huge'"):
        preset("huge")
