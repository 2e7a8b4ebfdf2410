// SPDX-License-Identifier: Apache-2.0
// How work is cut into pieces. Plain C++17, for the host, for the kernels and for tests.
#pragma once
#include <cstdint>

namespace vidgen {

#ifdef __CCE__  // the Ascend C compiler: these functions are for both sides
#define VIDGEN_BOTH inline[host, aicore]
#else
#define VIDGEN_BOTH inline
#endif

// Bytes of unified buffer that kernels plan with: the 192 KiB of Atlas A2 and A3, less 8 KiB left to the compiler.
constexpr uint32_t UB_BYTES = 184 * 1024;
constexpr uint32_t BLOCK_BYTES = 32;  // unit of addresses and copies in the unified buffer

enum class Float : uint32_t { float32, bfloat16, float16 };
VIDGEN_BOTH constexpr uint32_t size_of(Float type) { return type == Float::float32 ? 4 : 2; }

VIDGEN_BOTH constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
VIDGEN_BOTH constexpr uint32_t round_up(uint32_t a, uint32_t to) { return ceil_div(a, to) * to; }

// `elements` of any of the types, rounded up to whole 32-byte blocks of the narrowest: rows of all types then have the
// same number of lanes.
VIDGEN_BOTH constexpr uint32_t lanes(uint32_t elements) { return round_up(elements, 16); }

// The rows of every sample, cut into `parts` runs of `rows_per_part` (the last may be shorter). A run is what one core
// takes at a time: core c of n takes runs c, c + n, ...
struct RowSplit {
  uint32_t samples, rows, parts, rows_per_part;
};

// A float sum that grows by one row after the other loses accuracy with its length. Kernels that sum over rows take
// runs of at most so many, and sum_partials adds its rows in groups.
constexpr uint32_t MOST_SUMMED = 64, GROUP_SUMMED = 32;

// The least number of parts with which every core gets the same number of runs, of at most `most_rows` rows.
inline RowSplit split_rows(uint32_t samples, uint32_t rows, uint32_t cores, uint32_t most_rows = UINT32_MAX) {
  uint32_t a = cores, b = samples;
  while (b != 0) {
    const uint32_t rest = a % b;
    a = b, b = rest;
  }
  const uint32_t even = a == 0 ? 1 : cores / a;  // any multiple of it is shared evenly
  const uint32_t rows_of_each = ceil_div(rows, even);
  const uint32_t wanted = most_rows < rows_of_each ? even * ceil_div(rows_of_each, most_rows) : even;
  RowSplit split{samples, rows, 0, 0};
  split.rows_per_part = rows == 0 ? 1 : ceil_div(rows, wanted < rows ? wanted : rows);
  split.parts = ceil_div(rows, split.rows_per_part);
  return split;
}

VIDGEN_BOTH uint32_t runs(const RowSplit& split) { return split.samples * split.parts; }

struct Run {
  uint32_t sample, begin, end;  // rows [begin, end) of the sample
};
VIDGEN_BOTH Run run_of(const RowSplit& split, uint32_t index) {
  Run run{index / split.parts, index % split.parts * split.rows_per_part, 0};
  run.end = run.begin + split.rows_per_part < split.rows ? run.begin + split.rows_per_part : split.rows;
  return run;
}
// Row `r` of a run, counted over all samples.
VIDGEN_BOTH uint64_t row_at(const RowSplit& split, const Run& run, uint32_t r) {
  return uint64_t(run.sample) * split.rows + r;
}
VIDGEN_BOTH uint64_t elements_of(const RowSplit& split, uint32_t channels) {
  return uint64_t(split.samples) * split.rows * channels;
}

}  // namespace vidgen
