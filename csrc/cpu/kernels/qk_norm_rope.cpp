// SPDX-License-Identifier: Apache-2.0
// Norm over head_dim, rotation and group-skip order for queries or keys; float32 inside. Compiled once per instruction
// set. One token at a time: its heads are widened into scratch that stays in the nearest cache, and all horizontal sums
// are taken before the first is needed, so that their latencies overlap.
#include "cpu/kernels/qk_norm_rope.h"

#include <ATen/Parallel.h>

#include <array>

#include "common/rotation.h"

namespace vidgen {
namespace CPU_CAPABILITY {
namespace {

// Row of a token in group-skip order: see skiparse_index.py.
int64_t grouped_row(int64_t token, int64_t padded, int64_t k) {
  return token / k % k * (padded / k) + token / (k * k) * k + token % k;
}

int64_t tokens_per_task(int64_t channels) { return std::max<int64_t>(1, 16384 / channels); }

// What add(total, j) makes of zero for j = 0, one vector, ... over a head, lane by lane.
template <typename F>
Vec add_up(int64_t dim, F add) {
  Vec total(0);
  int64_t j = 0;
  for (; j + Vec::size() <= dim; j += Vec::size()) total = add(total, j);
  return j < dim ? Vec::set(total, add(total, j), dim - j) : total;
}

// Sums over all heads of what add(total, head, j) adds, as many heads at once as a vector has lanes: each step adds
// even and odd lanes of two vectors into one, so that after the last one lane i is the sum of vector i.
template <typename F>
void sum_heads(float* sums, int64_t heads, int64_t dim, F add) {
  constexpr int kLanes = Vec::size();
  for (int64_t first = 0; first < heads; first += kLanes) {
    std::array<Vec, kLanes> totals;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t head = first + i;
      totals[i] = head < heads ? add_up(dim, [&](const Vec& total, int64_t j) { return add(total, head, j); }) : Vec(0);
    }
    for (int left = kLanes; left > 1; left /= 2) {
      for (int i = 0; i < left / 2; ++i) {
        const auto [even, odd] = at::vec::deinterleave2(totals[2 * i], totals[2 * i + 1]);
        totals[i] = even + odd;
      }
    }
    totals[0].store(sums + first);
  }
}

// Subtracts the mean of each head where the norm is a LayerNorm; rstd of each head.
void centre(float* x, float* rstd, int64_t heads, int64_t dim, bool layer, float eps) {
  if (layer) {
    sum_heads(rstd, heads, dim,
              [&](const Vec& total, int64_t h, int64_t j) { return total + Vec::loadu(x + h * dim + j); });
    sum_heads(rstd, heads, dim, [&](const Vec& total, int64_t h, int64_t j) {
      const Vec v = Vec::loadu(x + h * dim + j) - Vec(rstd[h] / dim);
      v.store(x + h * dim + j, std::min<int64_t>(Vec::size(), dim - j));
      return at::vec::fmadd(v, v, total);
    });
  } else {
    sum_heads(rstd, heads, dim, [&](const Vec& total, int64_t h, int64_t j) {
      const Vec v = Vec::loadu(x + h * dim + j);
      return at::vec::fmadd(v, v, total);
    });
  }
  for (int64_t h = 0; h < heads; h += Vec::size()) {
    (Vec(1) / (Vec::loadu(rstd + h) / Vec(dim) + Vec(eps)).sqrt()).store(rstd + h);
  }
}

// head_dim parameters as float32; `otherwise` where there are none.
template <typename T>
void widen_parameter(float* to, const std::optional<at::Tensor>& t, int64_t dim, float otherwise) {
  if (t) {
    widen_heads(to, t->const_data_ptr<T>(), 1, dim, dim);
  } else {
    std::fill_n(to, dim, otherwise);
  }
}

// Channels a and b of each pair, in the order of the tables.
void split_pairs(float* a, float* b, const float* x, const Pairs& pairs, int64_t dim) {
  if (pairs.interleaved) {
    for (int64_t j = 0; j < dim / 2; ++j) a[j] = x[2 * j], b[j] = x[2 * j + 1];
  }
  for (const Run& run : pairs.runs) {
    std::copy_n(x + run.a, run.count, a + run.pair);
    std::copy_n(x + run.b, run.count, b + run.pair);
  }
}

// One token at a time, q, k and v together: a packed projection is then read from front to back.
template <typename T>
class Forward {
 public:
  Forward(const NormRopeTensors& t, const NormRope& how)
      : t_(t), how_(how), heads_(t.q.size(2)), dim_(t.q.size(3)), channels_(heads_ * dim_) {}

  void run() const {
    const int64_t tokens = t_.q.size(1), padded = t_.new_q.size(1);
    at::parallel_for(0, t_.q.size(0) * padded, tokens_per_task(channels_), [&](int64_t begin, int64_t end) {
      Scratch scratch(2 * channels_ + heads_ + 15 * dim_, 29);
      const Rows rows{scratch.row(channels_), scratch.row(channels_), scratch.row(heads_)};
      Angles angles(scratch, dim_ / 2);
      Parameters of_q(scratch, t_.q_weight, t_.q_bias, how_, dim_), of_k(scratch, t_.k_weight, t_.k_bias, how_, dim_);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / padded, token = row % padded;
        const int64_t to = (b * padded + grouped_row(token, padded, how_.sparse_n)) * channels_;
        const int64_t next = (b * padded + grouped_row(token + 1, padded, how_.sparse_n)) * channels_;
        if (token >= tokens) {
          for (const at::Tensor& out : {t_.new_q, t_.new_k, t_.new_v}) {
            if (out.numel()) std::fill_n(out.mutable_data_ptr<T>() + to, channels_, T(0));
          }
          continue;
        }
        if (how_.cos) {
          const Turn turn = angles.read(*how_.cos, *how_.sin, b, token, false);
          of_q.weigh(turn, dim_ / 2);
          of_k.weigh(turn, dim_ / 2);
        }
        one(t_.new_q, to, next, t_.q, b, token, rows, of_q, [](int64_t) {});
        if (!t_.v) {
          one(t_.new_k, to, next, t_.k, b, token, rows, of_k, [](int64_t) {});
          continue;
        }
        const T* v_from = token_row(*t_.v, b, token);
        T* v_to = t_.new_v.mutable_data_ptr<T>() + to;
        one(t_.new_k, to, next, t_.k, b, token, rows, of_k, [&](int64_t h) {  // v has no work to hide its way in
          prefetch_head(v_from + h * t_.v->stride(2), dim_);
          prefetch_head(v_to + h * dim_, dim_);
        });
        copy_heads(v_to, v_from, t_.v->stride(2));
      }
    });
  }

 private:
  struct Rows {
    float *plain, *rotated, *rstd;
  };
  struct Parameters {
    float *weight, *bias, *weight_a, *weight_b, *bias_a, *bias_b, *turns[6];
    bool shifted;
    Turn turn{};

    Parameters(Scratch& scratch, const std::optional<at::Tensor>& w, const std::optional<at::Tensor>& b,
               const NormRope& how, int64_t dim)
        : weight(scratch.row(dim)),
          bias(scratch.row(dim)),
          weight_a(scratch.row(dim / 2)),
          weight_b(scratch.row(dim / 2)),
          bias_a(scratch.row(dim / 2)),
          bias_b(scratch.row(dim / 2)),
          shifted(b.has_value()) {
      widen_parameter<T>(weight, w, dim, 1);
      widen_parameter<T>(bias, b, dim, 0);
      for (auto& row : turns) row = scratch.row(dim / 2);
      if (how.cos) {
        split_pairs(weight_a, weight_b, weight, how.pairs, dim);
        split_pairs(bias_a, bias_b, bias, how.pairs, dim);
      }
    }

    // Weight and bias go into the angles and offsets of the token's rotation: that saves a pass over the heads.
    void weigh(const Turn& plain, int64_t pairs) {
      for (int64_t j = 0; j < pairs; ++j) {
        turns[0][j] = plain.cos_a[j] * weight_a[j];
        turns[1][j] = plain.sin_b[j] * weight_b[j];
        turns[2][j] = plain.cos_b[j] * weight_b[j];
        turns[3][j] = plain.sin_a[j] * weight_a[j];
      }
      turn = {turns[0], turns[1], turns[2], turns[3]};
      if (!shifted) return;
      for (int64_t j = 0; j < pairs; ++j) {
        turns[4][j] = bias_a[j] * plain.cos_a[j] - bias_b[j] * plain.sin_b[j];
        turns[5][j] = bias_b[j] * plain.cos_b[j] + bias_a[j] * plain.sin_a[j];
      }
      turn.offset_a = turns[4];
      turn.offset_b = turns[5];
    }
  };

  static const T* token_row(const at::Tensor& x, int64_t b, int64_t token) {
    return x.const_data_ptr<T>() + b * x.stride(0) + token * x.stride(1);
  }

  // `beside`: as of rotate_heads.
  template <typename F>
  void one(const at::Tensor& out, int64_t at, int64_t next, const at::Tensor& x, int64_t b, int64_t token,
           const Rows& rows, const Parameters& of, F beside) const {
    const T *from = token_row(x, b, token), *next_to = out.const_data_ptr<T>() + next;
    T* to = out.mutable_data_ptr<T>() + at;
    widen_heads(rows.plain, from, heads_, dim_, x.stride(2));
    centre(rows.plain, rows.rstd, heads_, dim_, how_.layer, static_cast<float>(how_.eps));
    if (!how_.cos) {
      for (int64_t h = 0; h < heads_; ++h) scale(rows.plain + h * dim_, rows.rstd[h], of);
    } else {
      const Heads heads{rows.rotated, rows.plain, heads_, dim_, rows.rstd};
      rotate_heads(heads, of.turn, how_.pairs, [&](int64_t h) {  // the next token, where it comes from and goes to
        prefetch_head(from + x.stride(1) + h * x.stride(2), dim_);
        prefetch_head(next_to + h * dim_, dim_);
        beside(h);
      });
    }
    narrow_row(to, how_.cos ? rows.rotated : rows.plain, channels_);
  }

  void scale(float* head, float rstd, const Parameters& of) const {
    int64_t j = 0;
    for (; j + Vec::size() <= dim_; j += Vec::size()) {
      const Vec normalised = Vec::loadu(head + j) * Vec(rstd);
      at::vec::fmadd(normalised, Vec::loadu(of.weight + j), Vec::loadu(of.bias + j)).store(head + j);
    }
    for (; j < dim_; ++j) head[j] = head[j] * rstd * of.weight[j] + of.bias[j];
  }

  void copy_heads(T* to, const T* from, int64_t head_stride) const {
    if (head_stride == dim_) {
      std::copy_n(from, channels_, to);
    } else {
      for (int64_t h = 0; h < heads_; ++h) std::copy_n(from + h * head_stride, dim_, to + h * dim_);
    }
  }

  const NormRopeTensors& t_;
  const NormRope& how_;
  const int64_t heads_, dim_, channels_;
};

// Gradients of x, weight and bias.
template <typename T>
struct Backward {
  const at::Tensor &grad_x, &grad, &x;
  const NormRope& how;
  int64_t tokens = x.size(1), heads = x.size(2), dim = x.size(3), channels = heads * dim, padded = grad.size(1);

  // Sums over tokens are cut into as many parts on any number of threads, so that the result does not depend on it.
  static constexpr int64_t kParts = 64;

  void run(const at::Tensor& grad_weight, const at::Tensor& grad_bias, const std::optional<at::Tensor>& weight) const {
    const int64_t rows = x.size(0) * tokens, per_part = (rows + kParts - 1) / kParts;
    std::vector<double> sums(kParts * 2 * dim);  // per part: of the weight, of the bias
    at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(3 * channels + 3 * heads + 2 * dim, 9);
      float *g = scratch.row(channels), *unrotated = scratch.row(channels), *plain = scratch.row(channels);
      float *rstd = scratch.row(heads), *w = scratch.row(dim);
      float *along = scratch.row(heads), *means = scratch.row(heads);
      Angles angles(scratch, dim / 2);
      widen_parameter<T>(w, weight, dim, 1);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t row = p * per_part; row < std::min(rows, (p + 1) * per_part); ++row) {
          const int64_t sample = row / tokens, token = row % tokens;
          const int64_t grad_row = grouped_row(token, padded, how.sparse_n);
          widen_heads(g, grad.const_data_ptr<T>() + sample * grad.stride(0) + grad_row * grad.stride(1), heads, dim,
                      grad.stride(2));
          widen_heads(plain, x.const_data_ptr<T>() + sample * x.stride(0) + token * x.stride(1), heads, dim,
                      x.stride(2));
          if (how.cos) {
            const Turn turn = angles.read(*how.cos, *how.sin, sample, token, true);
            rotate_heads({unrotated, g, heads, dim, nullptr}, turn, how.pairs, [](int64_t) {});
          } else {
            std::swap(unrotated, g);
          }
          centre(plain, rstd, heads, dim, how.layer, static_cast<float>(how.eps));
          double* sum = sums.data() + p * 2 * dim;
          differentiate(unrotated, plain, rstd, w, along, means, sum, sum + dim);
          narrow_row(grad_x.mutable_data_ptr<T>() + row * channels, plain, channels);
        }
      }
    });
    for (int64_t p = 1; p < kParts; ++p) {
      for (int64_t j = 0; j < 2 * dim; ++j) sums[j] += sums[p * 2 * dim + j];
    }
    std::copy_n(sums.data(), dim, grad_weight.mutable_data_ptr<T>());
    std::copy_n(sums.data() + dim, dim, grad_bias.mutable_data_ptr<T>());
  }

  // g: gradient of the norm's result; x: its input, centred, replaced by its gradient. `along` and `means`
  // are room for sums over heads; means are 0 where the norm is not a LayerNorm.
  void differentiate(float* g, float* x, const float* rstd, const float* w, float* along, float* means,
                     double* weight_sum, double* bias_sum) const {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t i = h * dim + j;
        x[i] *= rstd[h];
        weight_sum[j] += g[i] * x[i];
        bias_sum[j] += g[i];
        g[i] *= w[j];
      }
    }
    sum_heads(along, heads, dim, [&](const Vec& total, int64_t h, int64_t j) {
      return at::vec::fmadd(Vec::loadu(g + h * dim + j), Vec::loadu(x + h * dim + j), total);
    });
    if (how.layer) {
      sum_heads(means, heads, dim,
                [&](const Vec& total, int64_t h, int64_t j) { return total + Vec::loadu(g + h * dim + j); });
    }
    for (int64_t h = 0; h < heads; ++h) {
      const float mean = means[h] / dim, pull = along[h] / dim;
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t i = h * dim + j;
        x[i] = rstd[h] * (g[i] - mean - pull * x[i]);
      }
    }
  }
};

}  // namespace

void qk_norm_rope(const NormRopeTensors& t, const NormRope& how) {
  VIDGEN_DISPATCH_FLOATS(t.q.scalar_type(), "qk_norm_rope", [&] { Forward<scalar_t>(t, how).run(); });
}

void qk_norm_rope_backward(const at::Tensor& grad_x, const at::Tensor& grad_weight, const at::Tensor& grad_bias,
                           const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const NormRope& how) {
  VIDGEN_DISPATCH_FLOATS(x.scalar_type(), "qk_norm_rope_backward",
                         [&] { Backward<scalar_t>{grad_x, grad, x, how}.run(grad_weight, grad_bias, weight); });
}

}  // namespace CPU_CAPABILITY
}  // namespace vidgen
