# SPDX-License-Identifier: Apache-2.0
"""Video files: frame-exact reading, writing mp4, contact sheets.

Frames in memory are uint8 ``(frames, height, width, 3)`` in RGB, upright; a model's videos are float
``(channels, frames, height, width)`` in [-1, 1] (see `vidgen.data.transforms`).

Two libraries read: decord where it is installed, and PyAV behind it. PyAV is the judge. decord conceals damage inside
a stream and is not exact on every kind of file (open groups of pictures, edit lists, transport streams, 10 bits), so
`open_video` gives it a clip only after PyAV has decoded that clip once without an error and the two agree.
"""

import bisect
import ctypes
import functools
import importlib.util
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vidgen.io import atomic_path

Backend = Literal["auto", "decord", "pyav"]

# Containers of video only. Playlists and scripts, which can name other files, and still images stay outside.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
MAX_PIXELS = 1 << 26  # of one frame: a header of a few bytes must not claim all the memory
MAX_PROBED_FRAMES = 3000  # above this, decoding a clip once to let decord have it costs more than it can give back
SEEK_DISTANCE = 8  # frames; seeking to skip fewer than this is slower than decoding them


class VideoError(ValueError):
    """A clip that is broken, truncated, empty, or not a video. The message begins with the path."""


class VideoReader(Protocol):
    """An open clip. A context manager; ``close`` may be called more than once."""

    path: Path
    backend: str
    num_frames: int
    fps: float
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> Tensor:
        """The frames with these numbers, counted from 0 in the order they are shown, in the order asked for.

        Returns uint8 ``(len(indices), height, width, 3)``. Raises IndexError for a number outside the clip and
        VideoError where the clip cannot be decoded.
        """

    def close(self) -> None: ...

    def __enter__(self) -> "VideoReader": ...

    def __exit__(self, *error: object) -> None: ...


def open_video(path: str | Path, backend: Backend = "auto") -> VideoReader:
    """Open a clip for frame-exact reading.

    Frame i is the i-th shown one, whatever its time stamp. Damage that the decoder notices raises VideoError; it is
    never concealed. Both backends give the same frames.

    Args:
        path: a local file in one of `CONTAINERS`.
        backend: ``"auto"`` takes decord where it is installed and exact on this clip, PyAV otherwise. ``"decord"``
            raises VideoError saying why where it is not. The first time a process meets a clip with either of the two,
            the whole clip is decoded once to find out (clips up to `MAX_PROBED_FRAMES` frames). ``"pyav"`` never does.

    Raises:
        VideoError: the file is missing, broken, truncated, empty, without frames or not a video.
        ImportError: the library is not installed.
    """
    if backend not in ("auto", "decord", "pyav"):
        raise ValueError(f"open_video: backend must be 'auto', 'decord' or 'pyav', got {backend!r}")
    path = Path(path)
    if backend == "decord":
        _import_decord()
    if backend == "pyav" or importlib.util.find_spec("decord") is None:
        return PyAVReader(path)
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror}") from error
    probe = _probe_for_decord(path, status.st_size, status.st_mtime_ns)
    if not probe.refusal:
        return DecordReader(path, probe)
    if backend == "decord":
        raise VideoError(f"{path}: decord is not exact on this clip: {probe.refusal}")
    return PyAVReader(path)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing video needs PyAV: pip install 'vidgen[video]'") from error
    return av


def _import_decord() -> Any:
    try:
        import decord
    except ImportError as error:
        raise ImportError("this backend needs decord: pip install 'vidgen[video]' (it has x86_64 wheels)") from error
    return decord


def _checked_indices(path: Path, indices: Sequence[int], num_frames: int) -> list[int]:
    checked = [int(index) for index in indices]
    for index in checked:
        if not 0 <= index < num_frames:
            raise IndexError(f"{path}: frame {index} wanted, the clip has {num_frames}")
    return checked


class _Closing:
    """``with`` for the readers."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PyAVReader(_Closing):
    """Reads with PyAV.

    In mp4 and mov the sample table says when each frame is shown and where decoding can begin, so reading seeks. The
    other containers make no such promise: they are decoded from the beginning and counted.
    """

    backend = "pyav"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._av = _import_av()
        self._container: Any = None
        try:
            self._open()
            self._read_facts()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.close()
        if not self.path.is_file():
            raise VideoError(f"{self.path}: no such file")
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        try:
            self._container = self._av.open(f"file:{self.path}", options=options, metadata_errors="replace")
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self.path}: not a readable video: {error.strerror}") from error
        if not self._container.streams.video:
            raise VideoError(f"{self.path}: no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise VideoError(f"{self.path}: no decoder for its video stream")
        # One thread: data workers are parallel already, and damage is met in the same place every time.
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}

    def _read_facts(self) -> None:
        self._times: list[int] | None = None  # of frame i, in stream time units, where seeking is exact
        self._keys: list[int] = [0]  # numbers of the frames that decoding can begin at
        self.closed_groups = False  # no frame after a key frame in the file is shown before it
        if "mp4" in self._container.format.name:
            self._read_sample_table()
            self._open()
        first = next(self._decode_here(), None)
        if first is None:
            raise VideoError(f"{self.path}: no frames")
        self._rotation = getattr(first, "rotation", 0)
        self.height, self.width = self._picture(first).shape[:2]
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate:
            raise VideoError(f"{self.path}: no frame rate")
        self.fps = float(rate)
        self.num_frames = len(self._times) if self._times is not None else self._count(first)

    def _count(self, first: Any) -> int:
        """Decode the rest of the clip and count. Matroska and WebM say how long the stream should be."""
        count, last = 1, first
        for frame in self._decode_here():
            count, last = count + 1, frame
        promised = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", self._stream.metadata.get("DURATION", ""))
        if promised and last.time is not None:
            seconds = int(promised[1]) * 3600 + int(promised[2]) * 60 + float(promised[3])
            end = last.time + max(1 / self.fps, float((last.duration or 0) * self._stream.time_base))
            if end < seconds - max(0.1, 3 / self.fps):
                raise VideoError(f"{self.path}: truncated: {seconds:g} s promised, {end:g} s there")
        return count

    def _read_sample_table(self) -> None:
        shown, keys, closed, latest_key, count = [], [], True, None, 0
        listed = len(getattr(self._stream, "index_entries", ()))
        try:
            for packet in self._container.demux(self._stream):
                if packet.dts is None and packet.pts is None:  # the packet that flushes the decoder
                    continue
                if packet.pts is None:
                    return
                if packet.is_corrupt:
                    raise VideoError(f"{self.path}: truncated in frame {count}")
                count += 1
                if packet.is_keyframe:
                    latest_key = packet.pts
                closed = closed and latest_key is not None and packet.pts >= latest_key
                if not packet.is_discard:  # cut off by an edit list: decoded, never shown
                    shown.append(packet.pts)
                    keys += [packet.pts] if packet.is_keyframe else []
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self.path}: broken file: {error.strerror}") from error
        if count < listed:
            raise VideoError(f"{self.path}: truncated: {count} of {listed} frames are there")
        times = sorted(shown)
        if len(set(times)) == len(times):
            self._times, self.closed_groups = times, closed
            self._keys = sorted({0, *(bisect.bisect_left(times, key) for key in keys)})

    def _decode_here(self) -> Iterator[Any]:
        """Decoded frames from where the container stands."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise VideoError(f"{self.path}: truncated or damaged at {packet.pts} of its time units")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise VideoError(f"{self.path}: damaged frame at {frame.time} s")
                    yield frame
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self.path}: broken stream: {error.strerror}") from error

    def _decode_from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Numbered frames in the order shown, from the key frame ``start`` or a little before it."""
        if self._times is None or start == 0:
            self._open()
        else:
            self._container.seek(self._times[start], stream=self._stream, backward=True)
        yield from enumerate(self._decode_here()) if self._times is None else self._numbered_by_time()

    def _numbered_by_time(self) -> Iterator[tuple[int, Any]]:
        times = self._times or []
        for frame in self._decode_here():
            number = -1 if frame.pts is None else bisect.bisect_left(times, frame.pts)
            if not 0 <= number < len(times) or times[number] != frame.pts:
                raise VideoError(
                    f"{self.path}: broken stream: a frame at time {frame.pts} that its table does not list"
                )
            yield number, frame

    def _picture(self, frame: Any) -> Tensor:
        """A decoded frame as uint8 ``(height, width, 3)``."""
        picture = frame.reformat(format="rgb24")
        plane = picture.planes[0]
        rows = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(picture.height, plane.line_size)
        upright = rows[:, : picture.width * 3].reshape(picture.height, picture.width, 3)
        return torch.rot90(upright, self._rotation // 90) if self._rotation else upright

    def _runs(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Split sorted frame numbers where it is worth seeking: pairs of a key frame to begin at and the numbers."""
        run: list[int] = []
        begin = 0
        for number in numbers:
            key = self._keys[bisect.bisect_right(self._keys, number) - 1]
            if run and key - run[-1] > SEEK_DISTANCE:
                yield begin, run
                run = []
            begin = begin if run else key
            run.append(number)
        if run:
            yield begin, run

    def frames(self, indices: Sequence[int]) -> Tensor:
        """See `VideoReader.frames`."""
        numbers = _checked_indices(self.path, indices, self.num_frames)
        if self._container is None:
            raise VideoError(f"{self.path}: the reader is closed")
        result = torch.empty(len(numbers), self.height, self.width, 3, dtype=torch.uint8)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        for begin, run in self._runs(sorted(places)):
            try:
                pictures = self._read(begin, run)
            except VideoError:
                if begin == 0:
                    raise
                # A "key" frame that refreshes only part of the picture looks like damage when decoding begins there.
                pictures = self._read(0, run)
            for number, picture in pictures.items():
                result[places[number]] = picture
        return result

    def _read(self, begin: int, run: Sequence[int]) -> dict[int, Tensor]:
        """The pictures with these sorted numbers, decoding from the key frame ``begin``."""
        pictures: dict[int, Tensor] = {}
        missing = set(run)
        for number, frame in self._decode_from(begin):
            if number in missing:
                pictures[number] = self._picture(frame)
                missing.remove(number)
                if pictures[number].shape != (self.height, self.width, 3):
                    raise VideoError(f"{self.path}: the picture size changes at frame {number}")
            if number >= run[-1]:
                break
        if missing:
            raise VideoError(f"{self.path}: truncated: frame {min(missing)} of {self.num_frames} is not there")
        return pictures

    def decord_refusal(self) -> str:
        """Decode the whole clip and say why decord cannot be exact on it, or "". Raises VideoError for damage."""
        if self.num_frames > MAX_PROBED_FRAMES:
            return f"{self.num_frames} frames are more than are checked beforehand"
        if not self.closed_groups:
            return "decoding cannot begin cleanly at each key frame of its table"
        keys, whole = set(self._keys), self._av.video.frame.PictureType.I
        count, whole_pictures = 0, True
        for number, frame in self._decode_from(0):
            whole_pictures = whole_pictures and (number not in keys or frame.pict_type == whole)
            count += 1
        if count != self.num_frames:
            raise VideoError(f"{self.path}: truncated: {count} of {self.num_frames} frames are there")
        return "" if whole_pictures else "key frames that refresh only part of the picture"

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


@dataclass(frozen=True)
class _Probe:
    """What PyAV found out about a clip, and why decord may not read it ("" if it may)."""

    num_frames: int
    fps: float
    height: int
    width: int
    refusal: str


@functools.lru_cache(maxsize=1 << 16)
def _probe_for_decord(path: Path, size: int, modified_ns: int) -> _Probe:
    """Judge a clip once in a process; size and time of change are there to forget it when the file changes."""
    with PyAVReader(path) as reader:
        try:
            refusal = reader.decord_refusal() or _decord_differs(reader)
        except VideoError as error:  # damage somewhere: PyAV will say so when it is asked for those frames
            refusal = str(error)
        return _Probe(reader.num_frames, reader.fps, reader.height, reader.width, refusal)


def _decord_differs(reader: PyAVReader) -> str:
    """Compare number of frames, and the first, middle and last of them; "" if decord gives the same."""
    decord = _import_decord()
    try:
        other = decord.VideoReader(str(reader.path), ctx=decord.cpu(0), num_threads=1)
        if len(other) != reader.num_frames:
            return f"it counts {len(other)} frames instead of {reader.num_frames}"
        numbers = [0, reader.num_frames // 2, reader.num_frames - 1]
        theirs = torch.from_numpy(other.get_batch(numbers).asnumpy())
    except (decord.DECORDError, RuntimeError) as error:
        return "it fails: " + (str(error).splitlines() or ["no message"])[0]
    return "" if torch.equal(theirs, reader.frames(numbers)) else "its pixels differ"


class DecordReader(_Closing):
    """Reads with decord a clip that `_probe_for_decord` found it exact on."""

    backend = "decord"

    def __init__(self, path: Path, probe: _Probe) -> None:
        self._decord = _import_decord()
        self.path, self.num_frames, self.fps = path, probe.num_frames, probe.fps
        self.height, self.width = probe.height, probe.width
        try:
            self._reader = self._decord.VideoReader(str(path), ctx=self._decord.cpu(0), num_threads=1)
        except (self._decord.DECORDError, RuntimeError) as error:
            raise VideoError(f"{path}: decord: {error}") from error

    def frames(self, indices: Sequence[int]) -> Tensor:
        """See `VideoReader.frames`."""
        numbers = _checked_indices(self.path, indices, self.num_frames)
        if self._reader is None:
            raise VideoError(f"{self.path}: the reader is closed")
        if not numbers:
            return torch.empty(0, self.height, self.width, 3, dtype=torch.uint8)
        try:
            return torch.from_numpy(self._reader.get_batch(numbers).asnumpy())
        except (self._decord.DECORDError, RuntimeError) as error:
            raise VideoError(f"{self.path}: decord: {error}") from error

    def close(self) -> None:
        self._reader = None


# Writing


def _check_frames(name: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"{name}: frames must be uint8 (frames, height, width, 3) with at least one frame, "
            f"got {frames.dtype} {tuple(frames.shape)}"
        )


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.cpu().contiguous()  # stays alive while its memory is read; needs no numpy
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def write_video(path: str | Path, frames: Tensor | Iterable[Tensor], fps: float, crf: int = 18) -> None:
    """Write an mp4 that plays in a browser: H.264, yuv420p, index in front (faststart). Atomic.

    Args:
        path: ends in ``.mp4``; its directory exists.
        frames: uint8 ``(frames, height, width, 3)``, or chunks of them as they come, each written before the next one
            is asked for; height and width even, as yuv420p stores colour at half size.
        fps: frames per second.
        crf: x264's constant rate factor, 0 (best) to 51.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"write_video: path must end in .mp4, got {path}")
    chunks = iter((frames,) if isinstance(frames, Tensor) else frames)
    first = next(chunks, None)
    if first is None:
        raise ValueError("write_video: frames must have at least one chunk, got none")
    _check_frames("write_video", first)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"write_video: height and width must be even, got {height} x {width}; crop or pad the frames")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"write_video: fps must be positive, got {fps}")
    if not 0 <= crf <= 51:
        raise ValueError(f"write_video: crf must be from 0 to 51, got {crf}")
    av = _import_av()
    rate = Fraction(fps).limit_denominator(1001)  # 29.97... is 30000/1001
    with atomic_path(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # What swscale makes of RGB, said in the file so that every player undoes the same: BT.601, limited range.
        stream.codec_context.colorspace, stream.codec_context.color_range = 5, 1
        for chunk in itertools.chain((first,), chunks):
            _check_frames("write_video", chunk)
            if chunk.shape[1:3] != (height, width):
                raise ValueError(f"write_video: all chunks must be {height} x {width}, got {tuple(chunk.shape)}")
            for picture in chunk:
                frame = av.VideoFrame(width, height, "rgb24")
                padding = frame.planes[0].line_size - width * 3
                rows = torch.nn.functional.pad(picture.reshape(height, width * 3), (0, padding))
                frame.planes[0].update(_bytes(rows))
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def contact_sheet(path: str | Path, rows: Sequence[tuple[str, Tensor]], every: int = 1) -> None:
    """Write a PNG with one row for each clip: its label, and under it every ``every``-th frame from left to right.

    Args:
        rows: pairs of a label and uint8 frames ``(frames, height, width, 3)``; clips may differ in size and length.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("contact sheets need Pillow: pip install 'vidgen[video]'") from error
    if not rows:
        raise ValueError("contact_sheet: rows must not be empty")
    if every < 1:
        raise ValueError(f"contact_sheet: every must be at least 1, got {every}")
    for _, frames in rows:
        _check_frames("contact_sheet", frames)
    gap, text_height = 4, 16
    shown = [(label, frames[::every]) for label, frames in rows]
    width = gap + max(len(frames) * (frames.shape[2] + gap) for _, frames in shown)
    tops = [0, *itertools.accumulate(text_height + frames.shape[1] + gap for _, frames in shown)]
    sheet = Image.new("RGB", (width, tops[-1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for (label, frames), top in zip(shown, tops, strict=False):
        # Pillow's built-in font may know Latin-1 only
        draw.text((gap, top + 2), " ".join(label.split()).encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame in enumerate(frames):
            height, frame_width = frame.shape[:2]
            picture = Image.frombytes("RGB", (frame_width, height), _bytes(frame))
            sheet.paste(picture, (gap + column * (frame_width + gap), top + text_height))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
