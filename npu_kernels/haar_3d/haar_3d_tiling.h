// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/tiling.h"

namespace vidgen {

// Also of inverse_haar_3d. Sizes are those of a band; a tile is `tile_rows` x `tile_columns` of it, of all eight bands.
struct HaarTiling {
  uint32_t batch, channels, frames, height, width;
  uint32_t video_frames;  // of the video: 2 * frames, or one less where its first frame counts twice
  uint32_t tile_rows, tile_columns;
  float filter_constant;
};

// A tile's rows start on whole blocks.
VIDGEN_BOTH constexpr uint32_t pitch(const HaarTiling& t) { return lanes(t.tile_columns); }

// Unified buffer per element of a tile of a band, a quarter of a frame's tile. Analysis: two frames in and two bands
// out in their own type; in float the two frames and their sum, 7 planes for the bands; offsets of one band. Synthesis:
// two bands in and two frames out; in float twice eight bands and a frame; offsets of a frame.
VIDGEN_BOTH constexpr uint32_t haar_bytes(uint32_t elements, Float type) {
  return elements * ((2 * 4 + 2) * size_of(type) + (3 * 4 + 7) * 4 + 4);
}
VIDGEN_BOTH constexpr uint32_t inverse_haar_bytes(uint32_t elements, Float type) {
  return elements * ((2 + 2 * 4) * size_of(type) + (16 + 4) * 4 + 4 * 4);
}

// Fills the tile's size; the other fields are given.
inline void tile(HaarTiling& t, Float type, bool inverse, uint32_t ub_bytes = UB_BYTES) {
  const uint32_t piece = inverse ? inverse_haar_bytes(16, type) : haar_bytes(16, type);
  const uint32_t most = ub_bytes / piece * 16, row = lanes(t.width);
  t.tile_columns = row <= most ? t.width : most;
  const uint32_t rows = row <= most ? most / row : 1;
  t.tile_rows = rows < t.height ? rows : t.height;
}

struct HaarTile {
  uint64_t video;  // (batch, channel) counted together
  uint32_t frame, row, column, rows, columns;
};
VIDGEN_BOTH uint32_t tiles(const HaarTiling& t) {
  return t.batch * t.channels * t.frames * ceil_div(t.height, t.tile_rows) * ceil_div(t.width, t.tile_columns);
}
VIDGEN_BOTH HaarTile tile_of(const HaarTiling& t, uint32_t index) {
  const uint32_t across = ceil_div(t.width, t.tile_columns), down = ceil_div(t.height, t.tile_rows);
  HaarTile tile{};
  tile.column = index % across * t.tile_columns;
  tile.row = index / across % down * t.tile_rows;
  tile.frame = index / across / down % t.frames;
  tile.video = index / across / down / t.frames;
  tile.rows = t.height - tile.row < t.tile_rows ? t.height - tile.row : t.tile_rows;
  tile.columns = t.width - tile.column < t.tile_columns ? t.width - tile.column : t.tile_columns;
  return tile;
}

// Where a tile's band `band` starts among the bands (batch, 8 * channels, frames, height, width): band-major.
VIDGEN_BOTH uint64_t band_at(const HaarTiling& t, const HaarTile& tile, uint32_t band) {
  const uint64_t sample = tile.video / t.channels, channel = tile.video % t.channels;
  const uint64_t plane = ((sample * 8 + band) * t.channels + channel) * t.frames + tile.frame;
  return (plane * t.height + tile.row) * t.width + tile.column;
}
// Where it starts in frame `frame` of the video (batch, channels, video_frames, 2 * height, 2 * width).
VIDGEN_BOTH uint64_t video_at(const HaarTiling& t, const HaarTile& tile, uint32_t frame) {
  const uint64_t plane = tile.video * t.video_frames + frame;
  return (plane * 2 * t.height + 2 * tile.row) * 2 * t.width + 2 * tile.column;
}

}  // namespace vidgen
