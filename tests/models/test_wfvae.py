# SPDX-License-Identifier: Apache-2.0
"""WFVAE: sizes and names of the release, exact chunks, tiles, files. Values are held against tests/goldens."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.models.autoencoders import WFVAE, WFVAEConfig, preset
from vidgen.models.autoencoders.discriminator import PatchDiscriminator3D
from vidgen.models.autoencoders.layers import CausalConv3d, FrameConv, ResBlock, Upsample3D
from vidgen.models.autoencoders.streaming import Stream, regroup
from vidgen.models.autoencoders.tiling import place_tiles, run_tiled
from vidgen.models.autoencoders.wavelets import BANDS_2D, Haar2D, all_taps, haar_taps_2d
from vidgen.models.autoencoders.wfvae_original_chunks import decode_with_original_chunks

FRAMES = (1, 9, 17, 25, 33, 41, 65)
ORIGINAL_CONFIG = json.loads(
    (Path(__file__).parents[1] / "data/golden/opensora_plan_v1_5/wfvae_888_image.json").read_text()
)["config"]


def new_vae(name: str = "tiny", dtype: torch.dtype = torch.float32, **changes) -> WFVAE:
    """Seeded, and every parameter drawn, so that no path is dead."""
    torch.manual_seed(0)
    vae = WFVAE(preset(name, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    """Float64, so that a frame computed otherwise cannot hide in rounding."""
    return new_vae(dtype=torch.float64, scale=(1.5, 0.8, 1.1, 2.0), shift=(0.1, -0.3, 0.2, 0.0))


@pytest.fixture(scope="module")
def vae4() -> WFVAE:
    """4x8x8, in float64."""
    return new_vae("tiny_4x8x8", torch.float64, scale=(1.5, 0.8, 1.1, 2.0), connect_res_layer_num=2)


def new_video(frames: int, height: int = 16, width: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=generator, dtype=dtype) * 2 - 1


def new_latent(frames: int, height: int = 2, width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(frames), dtype=dtype)


# The released model


def test_released_parameters_and_names():
    with torch.device("meta"):
        vae = WFVAE(preset("released"))
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert len(shapes) == 252
    taps = sum(buffer.numel() for buffer in vae.encoder.buffers())  # the original counts the encoder's, 192
    assert sum(p.numel() for p in vae.encoder.parameters()) + taps == 60_326_464
    assert sum(p.numel() for p in vae.decoder.parameters()) == 166_709_352
    for name, shape in {
        "encoder.down1.0.weight": (160, 24, 3, 3),
        "encoder.down1.1.conv2.weight": (160, 160, 3, 3),
        "encoder.down1.3.conv.conv.weight": (160, 160, 3, 3, 3),
        "encoder.down2.0.weight": (320, 288, 3, 3),
        "encoder.mid.0.nin_shortcut.conv.weight": (640, 448, 1, 1, 1),
        "encoder.mid.1.norm.norm.weight": (640,),
        "encoder.conv_out.conv.weight": (64, 640, 3, 3, 3),
        "encoder.wavelet_transform_l2.gh_v_conv.conv.weight": (1, 1, 2, 2, 2),
        "decoder.conv_in.conv.weight": (640, 32, 3, 3, 3),
        "decoder.up2.3.nin_shortcut.conv.weight": (768, 640, 1, 1, 1),
        "decoder.up1.2.conv.conv.weight": (320, 320, 3, 3, 3),
        "decoder.layer.0.nin_shortcut.conv.weight": (160, 320, 1, 1, 1),
        "decoder.connect_l1.0.conv1.conv.weight": (128, 128, 3, 3, 3),
        "decoder.connect_l2.1.weight": (24, 128, 3, 3),
        "decoder.inverse_wavelet_transform_out.hh": (1, 1, 2, 2, 2),
    }.items():
        assert shapes[name] == shape, name


# Chunks in time


@pytest.mark.parametrize("frames", FRAMES)
def test_encoding_in_chunks_is_exact(vae: WFVAE, frames: int):
    video = new_video(frames)
    whole = vae.encode_moments(video)
    for chunk_frames in (8, 16, 24, 64):
        chunked = vae.encode_moments(video, chunk_frames=chunk_frames)
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("frames", FRAMES)
def test_decoding_in_chunks_is_exact(vae: WFVAE, frames: int):
    latent = new_latent((frames - 1) // 8 + 1)
    whole = vae.decode(latent)
    assert whole.shape == (1, 3, frames, 16, 24)
    for chunk_latents in (1, 2, 3, 5, 16):
        chunked = vae.decode(latent, chunk_latents=chunk_latents)
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("frames", (9, 33))
def test_chunks_in_float32(frames: int):
    vae, video = new_vae(), new_video(frames, dtype=torch.float32)
    moments = vae.encode_moments(video)
    torch.testing.assert_close(vae.encode_moments(video, chunk_frames=8), moments, rtol=1e-5, atol=1e-5)
    latent = moments[:, :4]
    torch.testing.assert_close(vae.decode(latent, chunk_latents=2), vae.decode(latent), rtol=1e-5, atol=1e-5)


def test_streams_take_pieces_of_any_length(vae: WFVAE):
    video, latent = new_video(33), new_latent(5)
    pieces = video.split((3, 1, 6, 0, 2, 13, 8), 2)
    encoded = list(vae.encode_stream(pieces))
    assert len(encoded) > 2
    torch.testing.assert_close(torch.cat(encoded, 2), vae.encode_moments(video), rtol=0, atol=1e-10)
    decoded = list(vae.decode_stream(latent.split((1, 3, 1), 2)))
    assert [chunk.shape[2] for chunk in decoded] == [1, 18, 14]  # of 8t - 13 = 19 after the second
    torch.testing.assert_close(torch.cat(decoded, 2), vae.decode(latent), rtol=0, atol=1e-10)


def test_two_videos_may_pass_in_turns(vae: WFVAE):
    latents = (new_latent(4), new_latent(5))
    names = set(vae.state_dict())
    streams = [vae.decode_stream(latent, chunk_latents=1) for latent in latents]
    videos: list[list[Tensor]] = [[], []]
    for turn in range(5):
        for stream, video in zip(streams, videos, strict=True):
            video.extend(chunk for chunk in [next(stream, None)] if chunk is not None)
        if turn == 2:
            vae.encode_moments(new_video(9))
    for video, latent in zip(videos, latents, strict=True):
        torch.testing.assert_close(torch.cat(video, 2), vae.decode(latent), rtol=0, atol=1e-10)
    assert set(vae.state_dict()) == names


def test_memory_of_a_stream_does_not_grow(vae: WFVAE):
    for network, chunk in ((vae.encoder, new_video(8)), (vae.decoder, new_latent(2))):
        stream, sizes = Stream(), []
        stream.last = False
        for index in range(5):
            stream.first = index == 0
            network(chunk[:, :, : 1 if stream.first else None], stream)
            sizes.append(sum(kept.nbytes for kept in stream._kept.values()))
            held = sum(kept.untyped_storage().nbytes() for kept in stream._kept.values())
            assert held == sizes[-1]  # no views that keep whole chunks
        assert sizes[1] > 0
        assert sizes[2] == sizes[3] == sizes[4]


def test_a_whole_pass_keeps_nothing(vae: WFVAE):
    stream = Stream()
    vae.decoder(new_latent(3), stream)
    assert not stream._kept


def test_streams_carry_no_gradient_and_leave_the_mode_alone(vae: WFVAE):
    latent = new_latent(3).requires_grad_()
    for chunk in vae.decode_stream(latent, chunk_latents=1):
        assert not chunk.requires_grad
        assert torch.is_grad_enabled()
    assert vae.decode(latent).requires_grad


def test_regrouping():
    video = torch.arange(25.0).view(1, 1, 25, 1, 1)
    chunks = list(regroup(video.split((4, 6, 1, 14), 2), 8))
    assert [(chunk.shape[2], first) for chunk, first in chunks] == [(1, True), (8, False), (16, False)]
    assert torch.equal(torch.cat([chunk for chunk, _ in chunks], 2), video)


# Tiles in space


def test_one_tile_is_the_whole_frame(vae: WFVAE):
    video, latent = new_video(9, 32, 40), new_latent(2, 4, 5)
    assert torch.equal(vae.encode_moments(video, tile_size=40), vae.encode_moments(video))
    assert torch.equal(vae.decode(latent, tile_size=64), vae.decode(latent))


def test_tiles_and_chunks_together(vae: WFVAE):
    video, latent = new_video(17, 32, 40), new_latent(3, 4, 5)
    tiled = vae.encode_moments(video, tile_size=24, tile_overlap=8)
    assert not torch.equal(tiled, vae.encode_moments(video))
    chunked = vae.encode_moments(video, chunk_frames=8, tile_size=24, tile_overlap=8)
    torch.testing.assert_close(chunked, tiled, rtol=0, atol=1e-6)  # blended in float32
    tiled = vae.decode(latent, tile_size=24, tile_overlap=8)
    chunked = vae.decode(latent, chunk_latents=1, tile_size=24, tile_overlap=8)
    torch.testing.assert_close(chunked, tiled, rtol=0, atol=2e-6)


def test_tiled_result_is_near():
    """On a smooth video; with weights drawn at random the border of a tile matters more than in a trained model."""
    vae = new_vae()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    x = torch.linspace(0, 20, 256) + torch.arange(9.0)[:, None, None] / 10
    video = torch.stack([torch.sin(k * x).expand(9, 32, 256) for k in (1, 2, 3)])[None]
    moments = vae.encode_moments(video)
    latent = moments[:, :4]
    decoded = vae.decode(latent)
    tiled = vae.encode_moments(video, tile_size=128, tile_overlap=64)
    assert (tiled - moments).abs().mean() < 0.05 * moments.std()
    tiled = vae.decode(latent, tile_size=128, tile_overlap=64)
    assert (tiled - decoded).abs().mean() < 0.05 * decoded.std()


@pytest.mark.parametrize(("height", "width", "overlap"), [(11, 23, 2), (8, 30, 3), (17, 9, 0), (10, 10, 7)])
def test_blending_gives_back_what_the_tiles_agree_on(height: int, width: int, overlap: int):
    tiles = place_tiles(height, width, tile_size=64, tile_overlap=8 * overlap, pixels_per_cell=8)
    frame = torch.randn(1, 2, 3, height, width)
    enlarged = frame.repeat_interleave(4, 3).repeat_interleave(4, 4)
    shrunk = run_tiled(enlarged, tiles, lambda _, x: x[..., ::4, ::4], in_unit=4, out_unit=1)
    torch.testing.assert_close(shrunk, frame)
    grown = run_tiled(
        frame, tiles, lambda _, x: x.repeat_interleave(4, 3).repeat_interleave(4, 4), in_unit=1, out_unit=4
    )
    torch.testing.assert_close(grown, enlarged)


def test_blending_is_continuous():
    tiles = place_tiles(8, 40, tile_size=64, tile_overlap=32, pixels_per_cell=8)
    frame = torch.zeros(1, 1, 1, 8, 40)
    y = run_tiled(frame, tiles, lambda i, x: torch.full((1, 1, 1, 64, 64), float(i % 2)), in_unit=1, out_unit=8)
    assert y.min() == 0 and y.max() > 0.98
    assert y.diff(dim=-1).abs().max() <= 1 / 32 + 1e-6


# Sampling, memory format, training


def test_encode_samples_only_when_asked(vae: WFVAE):
    video = new_video(9)
    mean, logvar = vae.encode_moments(video).chunk(2, 1)
    scale, shift = (
        torch.tensor(v, dtype=mean.dtype).view(1, -1, 1, 1, 1) for v in (vae.config.scale, vae.config.shift)
    )
    torch.testing.assert_close(vae.encode(video), (mean - shift) * scale)
    noise = torch.randn_like(mean)
    expected = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise - shift) * scale
    torch.testing.assert_close(vae.encode(video, noise=noise), expected)
    drawn = [vae.encode(video, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(vae.encode(video, sample=True), vae.encode(video))
    torch.testing.assert_close(vae.decode(vae.encode(video)), vae.decode_unscaled(mean))


def test_bfloat16_stays_in_one_memory_format():
    vae, seen = new_vae("small", torch.bfloat16), []

    def note(module, inputs, output):
        for name, x in (("input", inputs[0]), ("output", output)):
            channels = module.in_channels if isinstance(module, FrameConv) else None
            if not (name == "input" and channels == 24):  # what comes from the wavelet
                seen.append(x.is_contiguous(memory_format=torch.channels_last_3d))

    for module in vae.modules():
        if isinstance(module, CausalConv3d | FrameConv | ResBlock | Upsample3D):
            module.register_forward_hook(note)
    with torch.no_grad():
        moments = vae.encode_moments(new_video(17, 32, 48, torch.bfloat16))
        vae.decode(moments[:, :8])
    assert len(seen) > 50 and all(seen)


def test_bfloat16_is_near_float32():
    vae, video = new_vae(), new_video(9, dtype=torch.float32)
    moments = vae.encode_moments(video)
    decoded = vae.decode(moments[:, :4])
    low = vae.bfloat16()
    assert (low.encode_moments(video.bfloat16()) - moments).abs().max() < 0.1 * moments.std()
    assert (low.decode(moments[:, :4].bfloat16()) - decoded).abs().mean() < 0.05 * decoded.std()


def test_every_parameter_is_trained():
    vae = new_vae().train()
    video, noise = new_video(9, dtype=torch.float32), torch.randn(1, 4, 2, 2, 3)
    output = vae(video, noise=noise)
    assert output.reconstruction.shape == video.shape
    assert [tuple(b.shape) for b in output.encoder_bands] == [(1, 24, 3, 4, 6), (1, 24, 2, 2, 3)]
    assert [b.shape for b in output.decoder_bands] == [b.shape for b in output.encoder_bands]
    output.reconstruction.square().sum().backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # softmax does not see what all keys have in common
    assert without in ([], ["encoder.mid.1.k.conv.bias"], ["decoder.mid.1.k.conv.bias"])
    torch.testing.assert_close(output.reconstruction, vae(video, noise=noise).reconstruction)


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.encode_moments(new_video(8)), "frames must be 8n \\+ 1"),
        (lambda v: v.encode_moments(new_video(9, 12, 16)), "multiples of 8"),
        (lambda v: v.encode_moments(new_video(9)[0]), r"\(batch, 3, frames, height, width\)"),
        (lambda v: v.encode_moments(new_video(9).float()), "dtype of the weights"),
        (lambda v: v.encode_moments(new_video(9), chunk_frames=12), "chunk_frames must be a positive multiple of 8"),
        (lambda v: v.encode_moments(new_video(9), tile_size=20), "tile_size must be a positive multiple of 8"),
        (lambda v: v.encode_moments(new_video(9), tile_size=16, tile_overlap=16), "below tile_size=16"),
        (lambda v: v.encode_moments(new_video(9), tile_overlap=16), "needs tile_size"),
        (lambda v: list(v.encode_stream(new_video(17).split(6, 2)[:2])), "8n \\+ 1 .*got 12"),
        (lambda v: list(v.encode_stream([])), "at least one frame"),
        (lambda v: list(v.encode_stream([new_video(9), new_video(8, 32)])), "chunk 1 must be"),
        (lambda v: v.encode(new_video(9), noise=torch.zeros(1, 4, 2, 2, 2)), "noise must be"),
        (lambda v: v.encode(new_video(1), noise=torch.zeros(1), generator=torch.Generator()), "got both"),
        (lambda v: v.decode(new_latent(2)[:, :3]), r"latent must be \(batch, 4,"),
        (lambda v: v.decode(new_latent(2), chunk_latents=0), "chunk_latents must be at least 1"),
        (lambda v: list(v.decode_stream([new_latent(2), new_latent(1, 4)])), "chunk 1 must be"),
    ],
)
def test_refusals(vae: WFVAE, call, message: str):
    with pytest.raises(ValueError, match=message):
        call(vae)


# Configuration and files


def test_original_configuration():
    config = WFVAEConfig.from_original(ORIGINAL_CONFIG)
    assert (config.latent_dim, config.base_channels, config.connect_res_layer_num) == (4, 4, 1)
    assert config.scale == (0.7043, 0.8056, 0.9858, 0.727)
    corrected = {k.replace("dowmsample", "downsample"): v for k, v in ORIGINAL_CONFIG.items()}
    assert WFVAEConfig.from_original(corrected) == config
    assert WFVAE(dataclasses.replace(config, use_attention=False)).encoder.mid[1].norm1.norm.normalized_shape == (16,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l1_dowmsample_block": "Downsample"}, "l1_downsample_block must be 'Spatial2xTime2x3DDownsample'"),
        ({"norm_type": "groupnorm"}, "base_channels must be a multiple of 32 for norm_type='groupnorm', got 4"),
        ({"latent_dims": 4}, "latent_dims.*latent_dim"),
        ({"scale": [1.0]}, "scale must have latent_dim=4 values"),
        ({"decoder_num_resblocks": 0}, "decoder_num_resblocks must be at least 1"),
        ({"dropout": 0.1}, "dropout must be 0.0"),
    ],
)
def test_original_configuration_refusals(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        WFVAEConfig.from_original({**ORIGINAL_CONFIG, **change})
    with pytest.raises(ValueError, match="base_channels is missing"):
        WFVAEConfig.from_original({k: v for k, v in {**ORIGINAL_CONFIG, **change}.items() if k != "base_channels"})


def test_model_folder_round_trip(tmp_path: Path):
    vae = new_vae(scale=(1.0, 2.0, 3.0, 4.0))
    vae.save_pretrained(tmp_path)
    again = WFVAE.from_pretrained(tmp_path)
    assert again.config == vae.config
    video = new_video(9, dtype=torch.float32)
    assert torch.equal(again.encode(video), vae.encode(video))


def checkpoint(form: str, state: dict[str, Tensor]) -> dict:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name not in all_taps()}
    trained = {f"module.{name}": tensor for name, tensor in state.items() if name not in all_taps()}
    return {
        "average": {"ema_state_dict": trained, "state_dict": {"gen_model": zeros}},
        "generator": {"ema_state_dict": {}, "state_dict": {"gen_model": state, "dics_model": {}}},
        "state_dict": {"state_dict": state},
        "flat": state,
    }[form]


@pytest.mark.parametrize("form", ["average", "generator", "state_dict", "flat"])
def test_original_checkpoints(tmp_path: Path, form: str):
    vae = new_vae()
    torch.save(checkpoint(form, vae.state_dict()), tmp_path / "merged.ckpt")
    again = WFVAE.from_pretrained(tmp_path / "merged.ckpt", config=vae.config)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_only_wavelet_taps_may_be_missing(tmp_path: Path):
    vae = new_vae()
    state = vae.state_dict()
    del state["decoder.conv_in.conv.bias"]
    torch.save({"ema_state_dict": state}, tmp_path / "merged.ckpt")
    with pytest.raises(ValueError, match=r"1 missing:\s+decoder.conv_in.conv.bias"):
        WFVAE.from_pretrained(tmp_path / "merged.ckpt", config=vae.config)


@pytest.mark.parametrize("factor", [-1.0, 1.02])
def test_other_taps_are_refused(factor: float):
    state = new_vae().state_dict()
    state["encoder.wavelet_transform_l1.g_conv.conv.weight"] = (
        state["encoder.wavelet_transform_l1.g_conv.conv.weight"] * factor
    )
    with pytest.raises(ValueError, match="l1.g_conv.conv.weight must be the Haar taps"):
        WFVAE.convert_state_dict(state)
    half = {name: tensor.half() for name, tensor in new_vae().state_dict().items()}
    assert WFVAE.convert_state_dict(half).keys() == half.keys()


def test_taps_are_the_ones_that_the_transform_uses():
    """Each band of a single pixel is that pixel's place in the filter."""
    from vidgen.models.autoencoders.wavelets import BANDS, Haar3D, haar_taps

    transform = Haar3D()
    for index in range(8):
        video = torch.zeros(1, 1, 3, 2, 2)
        place = (index >> 2, (index >> 1) & 1, index & 1)
        video[0, 0, 1 + place[0], place[1], place[2]] = 1
        bands = transform(video, Stream())[0, :, 1, 0, 0]
        torch.testing.assert_close(bands, torch.stack([haar_taps()[name][0, 0][place] for name in BANDS]))


# 4x8x8


def test_released_4x8x8_parameters_and_names():
    with torch.device("meta"):
        vae = WFVAE(preset("released_4x8x8"))
    assert (vae.frames_per_latent, vae.pixels_per_latent) == (4, 8)
    taps = 2 * 64 + 4 * 4  # the original counts those of the encoder
    assert sum(p.numel() for p in vae.encoder.parameters()) + taps == 37_182_368
    assert round(sum(p.numel() for p in vae.decoder.parameters()) / 1e6, 2) == 110.17
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    for name, shape in {
        "encoder.down1.0.weight": (128, 24, 3, 3),
        "encoder.down1.3.conv.weight": (128, 128, 3, 3),
        "encoder.down2.0.weight": (256, 192, 3, 3),
        "encoder.down2.2.conv2.conv.weight": (256, 256, 3, 3, 3),
        "encoder.down2.3.conv.conv.weight": (256, 256, 3, 3, 3),
        "encoder.connect_l1.weight": (64, 12, 3, 3),
        "encoder.connect_l2.weight": (64, 24, 3, 3),
        "encoder.mid.0.conv1.conv.weight": (512, 320, 3, 3, 3),
        "encoder.mid.0.nin_shortcut.conv.weight": (512, 320, 1, 1, 1),
        "encoder.mid.1.norm.norm.weight": (512,),
        "encoder.norm_out.norm.weight": (512,),
        "encoder.conv_out.conv.weight": (16, 512, 3, 3, 3),
        "encoder.wavelet_transform_l1.ad": (1, 1, 2, 2),
        "encoder.wavelet_transform_l2.gh_v_conv.conv.weight": (1, 1, 2, 2, 2),
        "decoder.conv_in.conv.weight": (512, 8, 3, 3, 3),
        "decoder.mid.2.conv1.conv.weight": (640, 512, 3, 3, 3),
        "decoder.up2.2.conv.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up2.3.conv2.conv.weight": (640, 640, 3, 3, 3),
        "decoder.up1.0.nin_shortcut.conv.weight": (256, 512, 1, 1, 1),
        "decoder.up1.2.conv.weight": (256, 256, 3, 3),
        "decoder.layer.0.nin_shortcut.conv.weight": (128, 256, 1, 1, 1),
        "decoder.connect_l1.1.conv1.conv.weight": (128, 128, 3, 3, 3),
        "decoder.connect_l1.2.weight": (12, 128, 3, 3),
        "decoder.connect_l2.2.weight": (24, 128, 3, 3),
        "decoder.norm_out.norm.weight": (128,),
        "decoder.conv_out.weight": (24, 128, 3, 3),
        "decoder.inverse_wavelet_transform_l1.dd": (1, 1, 2, 2),
    }.items():
        assert shapes[name] == shape, name


@pytest.mark.parametrize("interpolation", ["trilinear", "nearest"])
@pytest.mark.parametrize("frames", range(1, 38, 4))
def test_4x8x8_in_chunks_is_exact(vae4: WFVAE, frames: int, interpolation: str):
    vae = vae4
    if interpolation == "nearest":
        vae = new_vae("tiny_4x8x8", torch.float64, t_interpolation="nearest")
        assert not torch.equal(vae.decode(new_latent(3)), vae4.decode(new_latent(3)))
    video, latent = new_video(frames), new_latent((frames - 1) // 4 + 1)
    moments, decoded = vae.encode_moments(video), vae.decode(latent)
    assert moments.shape == (1, 8, (frames - 1) // 4 + 1, 2, 3) and decoded.shape == video.shape
    for chunk_frames in (4, 8, 12):
        chunked = vae.encode_moments(video, chunk_frames=chunk_frames)
        torch.testing.assert_close(chunked, moments, rtol=0, atol=1e-10)
    for chunk_latents in (1, 2, 3):
        chunked = vae.decode(latent, chunk_latents=chunk_latents)
        torch.testing.assert_close(chunked, decoded, rtol=0, atol=1e-10)


def test_4x8x8_streams_and_tiles(vae4: WFVAE):
    decoded = list(vae4.decode_stream(new_latent(5).split((1, 3, 1), 2)))
    assert [chunk.shape[2] for chunk in decoded] == [1, 10, 6]  # of 4t - 5 = 11 after the second
    video, latent = new_video(9, 32, 40), new_latent(3, 4, 5)
    tiled = vae4.encode_moments(video, tile_size=24, tile_overlap=8)
    chunked = vae4.encode_moments(video, chunk_frames=4, tile_size=24, tile_overlap=8)
    torch.testing.assert_close(chunked, tiled, rtol=0, atol=1e-6)  # blended in float32
    tiled = vae4.decode(latent, tile_size=24, tile_overlap=8)
    torch.testing.assert_close(
        vae4.decode(latent, chunk_latents=1, tile_size=24, tile_overlap=8), tiled, rtol=0, atol=2e-6
    )
    assert not torch.equal(tiled, vae4.decode(latent))
    with pytest.raises(ValueError, match=r"frames must be 4n \+ 1"):
        vae4.encode_moments(new_video(8))


def test_original_chunks_go_wrong_at_the_end_of_even_latents(vae4: WFVAE):
    for frames in (1, 3, 5, 7):
        latent = new_latent(frames)
        assert torch.equal(decode_with_original_chunks(vae4, latent), vae4.decode(latent))
    for frames in (4, 6, 8):
        latent = new_latent(frames)
        exact, original = vae4.decode(latent), decode_with_original_chunks(vae4, latent)
        wrong = (exact - original).abs().amax((0, 1, 3, 4)) > 1e-6
        assert wrong.nonzero().flatten().tolist() == [*range(4 * frames - 9, 4 * frames - 3)], frames
    with pytest.raises(ValueError, match="2 frames"):
        decode_with_original_chunks(vae4, new_latent(2))
    with pytest.raises(ValueError, match="must be of 4x8x8"):
        decode_with_original_chunks(new_vae(), new_latent(3, dtype=torch.float32))


def test_rows_of_a_batch_are_independent(vae4: WFVAE):
    video = torch.cat([new_video(5), new_video(9)[:, :, :5]])
    moments = vae4.encode_moments(video)
    for row in range(2):
        torch.testing.assert_close(moments[row : row + 1], vae4.encode_moments(video[row : row + 1]))


def test_every_parameter_of_4x8x8_is_trained():
    vae = new_vae("tiny_4x8x8").train()
    output = vae(new_video(9, dtype=torch.float32), noise=torch.randn(1, 4, 3, 2, 3))
    assert [tuple(b.shape) for b in output.encoder_bands] == [(1, 12, 5, 4, 6), (1, 24, 3, 2, 3)]
    assert [b.shape for b in output.decoder_bands] == [b.shape for b in output.encoder_bands]
    output.reconstruction.square().sum().backward()
    without = {name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without <= {"encoder.mid.1.k.conv.bias", "decoder.mid.1.k.conv.bias"}


def test_4x8x8_in_bfloat16():
    vae, video = new_vae("small_4x8x8"), new_video(9, 32, 48, torch.float32)
    moments = vae.encode_moments(video)
    decoded = vae.decode(moments[:, :8])
    low = vae.bfloat16()
    assert (low.encode_moments(video.bfloat16()) - moments).abs().max() < 0.1 * moments.std()
    assert (low.decode(moments[:, :8].bfloat16()) - decoded).abs().mean() < 0.05 * decoded.std()


def new_group_norm_vae(factor: tuple[int, int, int] = (4, 8, 8)) -> WFVAE:
    widths = ("base_channels", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size")
    return new_vae("tiny", vae_scale_factor=factor, norm_type="groupnorm", **dict.fromkeys(widths, 32))


def test_group_norms_see_whole_videos():
    vae = new_group_norm_vae()
    assert "encoder.down1.1.norm1.weight" in vae.state_dict() and "decoder.norm_out.weight" in vae.state_dict()
    video, latent = new_video(9, dtype=torch.float32), new_latent(3, dtype=torch.float32)
    moments = vae.encode_moments(video)
    changed = video.clone()
    changed[:, :, -1] *= -1
    assert not torch.equal(vae.encode_moments(changed)[:, :, 0], moments[:, :, 0])
    assert vae.decode(latent).isfinite().all()
    for call in (lambda: vae.encode_moments(video, chunk_frames=4), lambda: vae.decode(latent, chunk_latents=1)):
        with pytest.raises(ValueError, match="'groupnorm' normalises over all frames"):
            call()
    torch.testing.assert_close(vae.encode_moments(video, tile_size=64), moments)


# Configurations that are read off the weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vae_scale_factor": (8, 8, 8)},
        {"connect_res_layer_num": 3, "encoder_num_resblocks": 2, "use_attention": False},
        {"decoder_num_resblocks": 2, "encoder_energy_flow_hidden_size": 8, "latent_dim": 6, "connect_res_layer_num": 0},
        "groupnorm",
    ],
)
def test_checkpoints_tell_their_configuration(tmp_path: Path, changes: dict | str):
    vae = new_group_norm_vae() if changes == "groupnorm" else new_vae("tiny_4x8x8", **changes)
    kept = {} if vae.frames_per_latent == 8 else {"scale": (0.18215,) * vae.config.latent_dim}
    kept |= {} if vae.frames_per_latent == 8 else {"shift": (0.0,) * vae.config.latent_dim}
    constants = all_taps(frames_apart=vae.frames_per_latent == 4)
    trained = {f"module.{name}": tensor for name, tensor in vae.state_dict().items() if name not in constants}
    torch.save({"ema_state_dict": trained, "state_dict": {"gen_model": {}}}, tmp_path / "merged.ckpt")
    again = WFVAE.from_checkpoint(tmp_path / "merged.ckpt")
    assert again.config == dataclasses.replace(vae.config, **kept)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())
    stated = WFVAE.from_checkpoint(tmp_path / "merged.ckpt", t_interpolation="nearest", scale=(), shift=())
    assert (stated.config.t_interpolation, stated.config.scale) == ("nearest", ())


def test_checkpoints_of_something_else(tmp_path: Path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="not the weights of a WFVAE, they lack encoder.connect_l1.weight"):
        WFVAE.from_checkpoint(tmp_path / "model.ckpt")


def test_folder_of_v1_3(tmp_path: Path):
    """Its config.json, with the names of the blocks of level 1."""
    original = json.loads(
        (Path(__file__).parents[1] / "data/golden/opensora_plan_v1_3/wfvae_13f_even_latent_tiled.json").read_text()
    )["config"]
    config = WFVAEConfig.from_original({**original, "_class_name": "WFVAEModel", "_diffusers_version": "0.30.2"})
    assert config.vae_scale_factor == (4, 8, 8) and config.scale == (0.18215,) * 8
    with pytest.raises(ValueError, match="l1_upsample_block must be 'Upsample', got 'Spatial2xTime2x3DUpsample'"):
        WFVAEConfig.from_original({**original, "l1_upsample_block": "Spatial2xTime2x3DUpsample"})
    vae = WFVAE(config)
    vae.save_pretrained(tmp_path)
    assert WFVAE.from_pretrained(tmp_path).config == config
    with pytest.raises(ValueError, match="vae_scale_factor must be one of"):
        preset("tiny", vae_scale_factor=(2, 8, 8))


def test_flat_taps_are_the_ones_that_the_transform_uses():
    transform = Haar2D()
    for index in range(4):
        frame = torch.zeros(1, 1, 1, 2, 2)
        frame[0, 0, 0, index >> 1, index & 1] = 1
        bands = transform(frame, Stream())[0, :, 0, 0, 0]
        torch.testing.assert_close(
            bands, torch.stack([haar_taps_2d()[name][0, 0, index >> 1, index & 1] for name in BANDS_2D])
        )
    state = new_vae("tiny_4x8x8").state_dict()
    state["encoder.wavelet_transform_l1.da"] = state["encoder.wavelet_transform_l1.ad"]
    with pytest.raises(ValueError, match="wavelet_transform_l1.da must be the Haar taps of magnitude 0.5"):
        WFVAE.convert_state_dict(state)


# The discriminator


def test_discriminator_of_the_original():
    discriminator = PatchDiscriminator3D()
    state = {name: tuple(t.shape) for name, t in discriminator.state_dict().items() if t.dim()}
    assert {int(name.split(".")[1]) for name in state} == {0, 2, 3, 5, 6, 8, 9, 11, 12, 14}
    widths = [state[f"main.{i}.weight"][0] for i in (0, 2, 5, 8, 11, 14)]
    assert widths == [64, 128, 256, 512, 512, 1] and "main.2.bias" not in state and "main.14.bias" in state
    assert discriminator(torch.randn(1, 3, 9, 32, 32)).shape == (1, 1, 3, 2, 2)
    assert 0.018 < discriminator.main[5].weight.std() < 0.022 and 0.9 < discriminator.main[3].weight.mean() < 1.1
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        PatchDiscriminator3D(num_layers=0)
