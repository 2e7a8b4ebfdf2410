// SPDX-License-Identifier: Apache-2.0
// Eight bands of sums and differences over pairs of frames, rows and columns.
//
// Vector instructions take neighbours in memory, and here neighbours are to be subtracted from each other. So the
// pixels of every second column and row are first gathered into planes of their own (Gather with a table of offsets
// that is the same for every tile: even and odd are one address apart, and a row is another), and the rest is on whole
// planes. Copies cannot do this: each of their blocks would be one pixel, and takes 32 bytes.
#pragma once
#include "common/vector.h"
#include "haar_3d/haar_3d_tiling.h"

namespace vidgen {

template <typename T>
class Haar3d {
 public:
  __aicore__ inline void init(TPipe& pipe, GM_ADDR x, GM_ADDR y, const HaarTiling& t) {
    t_ = t, pitch_ = pitch(t), plane_ = t.tile_rows * pitch_;
    const uint64_t video = uint64_t(t.batch) * t.channels * t.video_frames * 4 * t.height * t.width;
    x_ = global<T>(x, video);
    y_ = global<T>(y, uint64_t(t.batch) * t.channels * 8 * t.frames * t.height * t.width);
    pipe.InitBuffer(in_, 2, 4 * plane_ * sizeof(T));
    pipe.InitBuffer(out_, 2, plane_ * sizeof(T));
    pipe.InitBuffer(planes_, (3 * 4 + 7) * plane_ * sizeof(float));
    pipe.InitBuffer(offsets_, plane_ * sizeof(int32_t));
    auto all = planes_.template Get<float>();
    for (uint32_t i = 0; i < 3; ++i) image_[i] = all[4 * i * plane_];
    for (uint32_t i = 0; i < 7; ++i) quarter_[i] = all[(12 + i) * plane_];
    write_offsets();
  }

  __aicore__ inline void process() {
    for (uint32_t i = GetBlockIdx(); i < tiles(t_); i += GetBlockNum()) {
      const HaarTile tile = tile_of(t_, i);
      fetch(tile, 0);
      fetch(tile, 1);
      take(image_[0]);
      take(image_[1]);
      Add(image_[2], image_[0], image_[1], 4 * plane_);
      Sub(image_[1], image_[0], image_[1], 4 * plane_);
      fence();
      over_rows_and_columns(tile, image_[2], 0);
      over_rows_and_columns(tile, image_[1], 4);
    }
  }

 private:
  // Bytes from the start of a frame's tile to the pixel of each output element: every second of every second row.
  __aicore__ inline void write_offsets() {
    auto offsets = offsets_.template Get<int32_t>();
    for (uint32_t c = 0; c < pitch_; ++c) {
      offsets.SetValue(c, static_cast<int32_t>(2 * c * sizeof(float)));
    }
    vector_after_scalar();
    for (uint32_t r = 1; r < t_.tile_rows; ++r) {
      Adds(offsets[r * pitch_], offsets, static_cast<int32_t>(r * 2 * 2 * pitch_ * sizeof(float)),
           static_cast<int32_t>(pitch_));
    }
    fence();
  }

  // Frame 2 t + which of the video; one before it where the first frame counts twice.
  __aicore__ inline void fetch(const HaarTile& tile, uint32_t which) {
    const uint32_t repeated = 2 * t_.frames - t_.video_frames, frame = 2 * tile.frame + which;
    auto pixels = in_.template AllocTensor<T>();
    load(pixels, x_[video_at(t_, tile, frame < repeated ? 0 : frame - repeated)],
         {2 * tile.columns, 2 * tile.rows, 2 * t_.width, 2 * pitch_});
    in_.EnQue(pixels);
  }
  __aicore__ inline void take(const LocalTensor<float>& to) {
    auto pixels = in_.template DeQue<T>();
    widen(to, pixels, 4 * plane_);
    fence();
    in_.FreeTensor(pixels);
  }

  // The four bands of an image, from band `first` on: 2 * (differences over rows) + (differences over columns).
  __aicore__ inline void over_rows_and_columns(const HaarTile& tile, const LocalTensor<float>& image, uint32_t first) {
    auto offsets = offsets_.template Get<int32_t>().template ReinterpretCast<uint32_t>();
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t start = (i / 2 * 2 * pitch_ + i % 2) * sizeof(float);
      Gather(quarter_[i], image, offsets, start, plane_);
    }
    fence();
    Add(quarter_[4], quarter_[0], quarter_[2], plane_);
    Add(quarter_[5], quarter_[1], quarter_[3], plane_);
    Sub(quarter_[0], quarter_[0], quarter_[2], plane_);
    Sub(quarter_[1], quarter_[1], quarter_[3], plane_);
    fence();
    for (uint32_t band = 0; band < 4; ++band) {
      const auto &even = quarter_[band < 2 ? 4 : 0], &odd = quarter_[band < 2 ? 5 : 1];
      if (band % 2 == 0) {
        Add(quarter_[6], even, odd, plane_);
      } else {
        Sub(quarter_[6], even, odd, plane_);
      }
      fence();
      Muls(quarter_[6], quarter_[6], t_.filter_constant, plane_);
      fence();
      auto out = out_.template AllocTensor<T>();
      narrow(out, quarter_[6], plane_);
      out_.EnQue(out);
      out = out_.template DeQue<T>();
      store(y_[band_at(t_, tile, first + band)], out, {tile.columns, tile.rows, t_.width, pitch_});
      out_.FreeTensor(out);
    }
  }

  HaarTiling t_;
  uint32_t pitch_, plane_;
  TQue<TPosition::VECIN, 2> in_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> planes_, offsets_;
  LocalTensor<float> image_[3], quarter_[7];
  GlobalTensor<T> x_, y_;
};

}  // namespace vidgen
