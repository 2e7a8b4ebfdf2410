// SPDX-License-Identifier: Apache-2.0
// The tiling functions for ctypes: each walks over what every core would do, and counts how often each element comes
// up.
#include <cstdint>
#include <vector>

#include "launch.h"

namespace {

using namespace vidgen;

// How often each of so many elements came up.
struct Counts {
  explicit Counts(uint64_t elements) : seen(elements) {}
  void add(uint64_t i) { i < seen.size() ? void(++seen[i]) : void(outside = true); }

  // 0: each exactly once; 1: one did not; 2: one more than once; 4: one that there is not.
  int32_t verdict() const {
    if (outside) return 4;
    for (uint8_t count : seen) {
      if (count != 1) return count == 0 ? 1 : 2;
    }
    return 0;
  }

  std::vector<uint8_t> seen;
  bool outside = false;
};

constexpr int32_t TOO_LARGE = -1, BUDGET_EXCEEDED = 3;

template <typename F>
void over_runs(const RowSplit& split, uint32_t cores, const F& each) {
  for (uint32_t core = 0; core < cores; ++core) {
    for (uint32_t i = core; i < runs(split); i += cores) each(i, run_of(split, i));
  }
}

int32_t rows_once(const RowSplit& split, uint32_t cores) {
  Counts counts(split.samples * split.rows);
  over_runs(split, cores, [&](uint32_t, const Run& run) {
    for (uint32_t r = run.begin; r < run.end; ++r) counts.add(row_at(split, run, r));
  });
  return counts.verdict();
}

Float type_of(int32_t size) { return size == 4 ? Float::float32 : Float::bfloat16; }

}  // namespace

extern "C" {

int32_t cover_rows(uint32_t samples, uint32_t rows, uint32_t cores, uint32_t most) {
  const RowSplit split = split_rows(samples, rows, cores, most);
  return split.rows_per_part > most ? BUDGET_EXCEEDED : rows_once(split, cores);
}

// The longest and the shortest share of rows that a core gets, apart by how many runs.
uint32_t imbalance(uint32_t samples, uint32_t rows, uint32_t cores) {
  const uint32_t all = runs(split_rows(samples, rows, cores));
  return (all + cores - 1) / cores - all / cores;
}

int32_t cover_adaln(int32_t op, int32_t size, uint32_t samples, uint32_t rows, uint32_t channels, uint32_t cores,
                    uint32_t ub) {
  const Float type = type_of(size);
  AdalnModulateTiling a;
  GatedResidualAdalnTiling g;
  AdalnBackwardTiling b;
  if (op == 0) {
    if (!tile(a, type, samples, rows, channels, cores, ub)) return TOO_LARGE;
    return adaln_modulate_bytes(channels, type, a.buffers) > ub ? BUDGET_EXCEEDED : rows_once(a.split, cores);
  }
  if (op == 1) {
    if (!tile(g, type, samples, rows, channels, cores, ub)) return TOO_LARGE;
    return gated_residual_adaln_bytes(channels, type, g.buffers) > ub ? BUDGET_EXCEEDED : rows_once(g.split, cores);
  }
  if (!tile(b, type, op == 3, samples, rows, channels, cores, ub)) return TOO_LARGE;
  return adaln_backward_bytes(channels, type, op == 3, b.buffers) > ub ? BUDGET_EXCEEDED : rows_once(b.split, cores);
}

int32_t cover_gated(bool backward, int32_t size, uint32_t samples, uint32_t rows, uint32_t channels, uint32_t cores,
                    uint32_t ub) {
  GatedResidualTiling t;
  const Float type = type_of(size);
  tile(t, type, backward, samples, rows, channels, cores, ub);
  if ((backward ? gated_residual_backward_bytes(t.columns, type) : gated_residual_bytes(t.columns, type)) > ub) {
    return BUDGET_EXCEEDED;
  }
  Counts counts(samples * rows * channels);
  over_runs(t.split, cores, [&](uint32_t, const Run& run) {
    for (uint32_t column = 0; column < channels; column += t.columns) {
      const uint32_t n = channels - column < t.columns ? channels - column : t.columns;
      for (uint32_t r = run.begin; r < run.end; ++r) {
        for (uint32_t i = 0; i < n; ++i) counts.add(row_at(t.split, run, r) * channels + column + i);
      }
    }
  });
  return counts.verdict();
}

int32_t cover_sums(int32_t size, uint32_t outer, uint32_t parts, uint32_t width, uint32_t cores, uint32_t ub) {
  SumPartialsTiling t;
  tile(t, type_of(size), outer, parts, width, cores, ub);
  if (sum_partials_bytes(t.columns, type_of(size)) > ub) return BUDGET_EXCEEDED;
  Counts counts(outer * width);
  const uint32_t pieces = ceil_div(width, t.columns);
  for (uint32_t core = 0; core < cores; ++core) {
    for (uint32_t i = core; i < outer * pieces; i += cores) {
      for (uint32_t c = i % pieces * t.columns; c < width && c < (i % pieces + 1) * t.columns; ++c) {
        counts.add(i / pieces * width + c);
      }
    }
  }
  return counts.verdict();
}

// Tokens and heads; and the rows of the group layout, padding with them.
int32_t cover_heads(bool backward, int32_t size, uint32_t batch, uint32_t tokens, uint32_t heads, uint32_t dim,
                    uint32_t k, uint32_t cores, uint32_t ub) {
  QkNormRopeTiling t{};
  t.tokens = tokens, t.heads = heads, t.head_dim = dim, t.sparse_n = k, t.padded = round_up(tokens, k * k);
  const Float type = type_of(size);
  if (!tile(t, type, backward, batch, cores, ub)) return TOO_LARGE;
  if (qk_norm_rope_bytes(t.tile_heads, pitch(t), type, backward) > ub) return BUDGET_EXCEEDED;
  if (t.tile_heads > 255 || t.tile_heads % 8 || pitch(t) / 8 > 255) return BUDGET_EXCEEDED;
  Counts counts(batch * t.split.rows * heads), rows(batch * t.padded);
  over_runs(t.split, cores, [&](uint32_t, const Run& run) {
    for (uint32_t token = run.begin; token < run.end; ++token) {
      rows.add(run.sample * t.padded + group_row(t, token));
      for (uint32_t head = 0; head < heads; head += t.tile_heads) {
        for (uint32_t h = head; h < heads && h < head + t.tile_heads; ++h) {
          counts.add((run.sample * t.split.rows + token) * heads + h);
        }
      }
    }
  });
  const int32_t found = counts.verdict();
  return found != 0 || backward ? found : rows.verdict();
}

// Every element of the bands, and every pixel of the video that a tile writes or that is there to be read.
int32_t cover_haar(bool inverse, int32_t size, uint32_t batch, uint32_t channels, uint32_t frames, uint32_t height,
                   uint32_t width, bool odd, uint32_t cores, uint32_t ub) {
  HaarTiling t{batch, channels, frames, height, width, 2 * frames - odd, 0, 0, 1.0f};
  const Float type = type_of(size);
  tile(t, type, inverse, ub);
  const uint32_t plane = t.tile_rows * pitch(t);
  if ((inverse ? inverse_haar_bytes(plane, type) : haar_bytes(plane, type)) > ub) return BUDGET_EXCEEDED;
  Counts bands(batch * channels * 8 * frames * height * width);
  Counts video(batch * channels * t.video_frames * 4 * height * width);
  for (uint32_t core = 0; core < cores; ++core) {
    for (uint32_t i = core; i < tiles(t); i += cores) {
      const HaarTile tile = tile_of(t, i);
      for (uint32_t r = 0; r < tile.rows; ++r) {
        for (uint32_t band = 0; band < 8; ++band) {
          for (uint32_t c = 0; c < tile.columns; ++c) bands.add(band_at(t, tile, band) + r * width + c);
        }
      }
      for (uint32_t which = 0; which < 2; ++which) {
        const uint32_t frame = 2 * tile.frame + which;
        if (frame < odd) continue;
        for (uint32_t r = 0; r < 2 * tile.rows; ++r) {
          for (uint32_t c = 0; c < 2 * tile.columns; ++c) video.add(video_at(t, tile, frame - odd) + r * 2 * width + c);
        }
      }
    }
  }
  const int32_t found = bands.verdict();
  return found != 0 ? found : video.verdict();
}
}
