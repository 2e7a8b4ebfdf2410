// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of the heads of a token: y = x * cos + partner(x) * sin, where partner exchanges the two channels of
// every pair, cos and sin stand at both channels, and sin is negative at the first.
//
// Halves of whole blocks change places by two copies of columns. Other pairs, and neighbours ("interleaved"), are not
// whole blocks of 32 bytes, so Gather picks each element's partner; its table of offsets is the same for every token.
// The token's own cos and sin are spread over the channels by Gather too, once for all heads.
#pragma once
#include "common/short_rows.h"
#include "qk_norm_rope/qk_norm_rope_tiling.h"

namespace vidgen {

struct Channel {
  uint32_t partner, pair;
  bool first;
};

__aicore__ inline Channel channel_of(const QkNormRopeTiling& t, uint32_t i) {
  if (t.interleaved) return {i ^ 1u, i / 2, i % 2 == 0};
  uint32_t start = 0, s = 0;
  while (i >= start + t.sections[s]) start += t.sections[s++];
  const uint32_t half = t.sections[s] / 2, within = i - start;
  const bool first = within < half;
  return {first ? i + half : i - half, start / 2 + (first ? within : within - half), first};
}

class Rotation {
 public:
  // `direction` is 1 for the embedding, -1 for its transpose.
  __aicore__ inline void init(TPipe& pipe, GM_ADDR cos, GM_ADDR sin, const QkNormRopeTiling& t, float direction) {
    t_ = t, pitch_ = pitch(t), pairs_ = t.head_dim / 2;
    pipe.InitBuffer(rows_, 4 * pitch_ * sizeof(float));
    pipe.InitBuffer(offsets_, t.tile_heads * pitch_ * sizeof(int32_t));
    pipe.InitBuffer(table_, 2, 2 * pitch_ * sizeof(float));
    auto rows = rows_.Get<float>();
    cos_ = rows, sin_ = rows[pitch_], sign_ = rows[2 * pitch_];
    if (!t.rotates) return;
    const uint64_t angles = uint64_t(t.table_stride ? t.split.samples : 1) * t.tokens * pairs_;
    cos_at_ = global<float>(cos, angles), sin_at_ = global<float>(sin, angles);
    by_columns_ = !t.interleaved;
    for (uint32_t width : t.sections) by_columns_ = by_columns_ && width / 2 % PER_BLOCK == 0;
    write_offsets(direction);
  }

  // To be called once per token, before its heads.
  __aicore__ inline void read_angles(uint32_t sample, uint32_t token) {
    if (!t_.rotates) return;
    const uint64_t at = uint64_t(sample) * t_.table_stride + uint64_t(token) * pairs_;
    auto table = table_.AllocTensor<float>();
    load(table, cos_at_[at], one_row(pairs_));
    load(table[pitch_], sin_at_[at], one_row(pairs_));
    table_.EnQue(table);
    table = table_.DeQue<float>();
    auto pairs = pair_offsets().ReinterpretCast<uint32_t>();
    Gather(cos_, table, pairs, 0, t_.head_dim);
    Gather(sin_, table, pairs, pitch_ * sizeof(float), t_.head_dim);
    fence();
    Mul(sin_, sin_, sign_, t_.head_dim);
    fence();
    table_.FreeTensor(table);
  }

  // Rotates x; `scratch` is as large.
  __aicore__ inline void apply(const ShortRows& rows, const LocalTensor<float>& x,
                               const LocalTensor<float>& scratch) const {
    if (!t_.rotates) return;
    exchange(rows, scratch, x);
    fence();
    rows.multiply_by_row(x, cos_);
    rows.multiply_by_row(scratch, sin_);
    Add(x, x, scratch, rows.rows * pitch_);
    fence();
  }

 private:
  __aicore__ inline LocalTensor<int32_t> pair_offsets() {
    return rows_.Get<float>()[3 * pitch_].ReinterpretCast<int32_t>();
  }

  __aicore__ inline void exchange(const ShortRows& rows, const LocalTensor<float>& to,
                                  const LocalTensor<float>& x) const {
    if (!by_columns_) {
      Gather(to, x, partner_offsets_, 0, rows.rows * pitch_);
      return;
    }
    uint32_t start = 0;
    for (uint32_t width : t_.sections) {
      rows.copy_columns(to, start, x, start + width / 2, width / 2);
      rows.copy_columns(to, start + width / 2, x, start, width / 2);
      start += width;
    }
  }

  __aicore__ inline void write_offsets(float direction) {
    auto partners = offsets_.Get<int32_t>();
    auto pairs = pair_offsets();
    for (uint32_t i = 0; i < t_.head_dim; ++i) {
      const Channel channel = channel_of(t_, i);
      partners.SetValue(i, static_cast<int32_t>(channel.partner * sizeof(float)));
      pairs.SetValue(i, static_cast<int32_t>(channel.pair * sizeof(float)));
      sign_.SetValue(i, channel.first ? -direction : direction);
    }
    for (uint32_t i = t_.head_dim; i < pitch_; ++i) {
      partners.SetValue(i, static_cast<int32_t>(i * sizeof(float)));
    }
    vector_after_scalar();
    for (uint32_t r = 1; r < t_.tile_heads; ++r) {
      Adds(partners[r * pitch_], partners, static_cast<int32_t>(r * pitch_ * sizeof(float)),
           static_cast<int32_t>(pitch_));
    }
    fence();
    partner_offsets_ = partners.ReinterpretCast<uint32_t>();
  }

  QkNormRopeTiling t_;
  uint32_t pitch_, pairs_;
  bool by_columns_ = false;
  TBuf<TPosition::VECCALC> rows_, offsets_;
  TQue<TPosition::VECIN, 1> table_;
  LocalTensor<float> cos_, sin_, sign_;
  LocalTensor<uint32_t> partner_offsets_;
  GlobalTensor<float> cos_at_, sin_at_;
};

}  // namespace vidgen
