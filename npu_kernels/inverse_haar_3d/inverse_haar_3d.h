// SPDX-License-Identifier: Apache-2.0
// The video of eight bands: sums and differences of bands, over columns, rows and frames, then the pixels of the four
// planes of a frame put next to each other by Gather; see haar_3d.h. Gather and not its reverse, because cores of Atlas
// A2 and A3 have no instruction that scatters.
#pragma once
#include "common/vector.h"
#include "haar_3d/haar_3d_tiling.h"

namespace vidgen {

template <typename T>
class InverseHaar3d {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR y, GM_ADDR x, const HaarTiling& t) {
    t_ = t, pitch_ = pitch(t), plane_ = t.tile_rows * pitch_;
    y_ = global<T>(y, uint64_t(t.batch) * t.channels * 8 * t.frames * t.height * t.width);
    x_ = global<T>(x, uint64_t(t.batch) * t.channels * t.video_frames * 4 * t.height * t.width);
    pipe.InitBuffer(in_, 2, plane_ * sizeof(T));
    pipe.InitBuffer(out_, 2, 4 * plane_ * sizeof(T));
    pipe.InitBuffer(planes_, (16 + 4) * plane_ * sizeof(float));
    pipe.InitBuffer(offsets_, 4 * plane_ * sizeof(int32_t));
    auto all = planes_.template Get<float>();
    bands_ = all, other_ = all[8 * plane_], image_ = all[16 * plane_];
    write_offsets();
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < tiles(t_); i += GetBlockNum()) {
      const HaarTile tile = tile_of(t_, i);
      for (uint32_t band = 0; band < 8; ++band) read(tile, band);
      for (uint32_t pair = 0; pair < 4; ++pair) butterfly(other_, bands_, 2 * pair * plane_, plane_);
      for (uint32_t pair = 0; pair < 2; ++pair) butterfly(bands_, other_, 4 * pair * plane_, 2 * plane_);
      butterfly(other_, bands_, 0, 4 * plane_);
      const uint32_t dropped = 2 * t_.frames - t_.video_frames;
      for (uint32_t which = 0; which < 2; ++which) {
        const uint32_t frame = 2 * tile.frame + which;
        if (frame >= dropped) write(tile, which, frame - dropped);
      }
    }
  }

 private:
  // For each pixel of a frame's tile, bytes to it from the start of the frame's four planes 2 * (odd row) + (odd
  // column).
  __aicore__ inline void write_offsets() {
    auto offsets = offsets_.template Get<int32_t>();
    for (uint32_t row = 0; row < 2; ++row) {
      for (uint32_t c = 0; c < 2 * pitch_; ++c) {
        offsets.SetValue(row * 2 * pitch_ + c,
                         static_cast<int32_t>(((2 * row + c % 2) * plane_ + c / 2) * sizeof(float)));
      }
    }
    vector_after_scalar();
    for (uint32_t r = 1; r < t_.tile_rows; ++r) {
      Adds(offsets[r * 4 * pitch_], offsets, static_cast<int32_t>(r * pitch_ * sizeof(float)),
           static_cast<int32_t>(4 * pitch_));
    }
    fence();
  }

  __aicore__ inline void read(const HaarTile& tile, uint32_t band) {
    auto values = in_.template AllocTensor<T>();
    load(values, y_[band_at(t_, tile, band)], {tile.columns, tile.rows, t_.width, pitch_});
    in_.EnQue(values);
    values = in_.template DeQue<T>();
    widen(bands_[band * plane_], values, plane_);
    fence();
    in_.FreeTensor(values);
  }

  // n sums and n differences of two neighbouring ranges, from one buffer into the same place of the other.
  __aicore__ inline void butterfly(const LocalTensor<float>& to, const LocalTensor<float>& from, uint32_t at,
                                   uint32_t n) {
    Add(to[at], from[at], from[at + n], n);
    Sub(to[at + n], from[at], from[at + n], n);
    fence();
  }

  __aicore__ inline void write(const HaarTile& tile, uint32_t which, uint32_t frame) {
    auto offsets = offsets_.template Get<int32_t>().template ReinterpretCast<uint32_t>();
    Gather(image_, other_, offsets, which * 4 * plane_ * sizeof(float), 4 * plane_);
    fence();
    Muls(image_, image_, t_.filter_constant, 4 * plane_);
    fence();
    auto pixels = out_.template AllocTensor<T>();
    narrow(pixels, image_, 4 * plane_);
    out_.EnQue(pixels);
    pixels = out_.template DeQue<T>();
    store(x_[video_at(t_, tile, frame)], pixels, {2 * tile.columns, 2 * tile.rows, 2 * t_.width, 2 * pitch_});
    out_.FreeTensor(pixels);
  }

  HaarTiling t_;
  uint32_t pitch_, plane_;
  TQue<TPosition::VECIN, 1> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> planes_, offsets_;
  LocalTensor<float> bands_, other_, image_;
  GlobalTensor<T> x_, y_;
};

}  // namespace vidgen
