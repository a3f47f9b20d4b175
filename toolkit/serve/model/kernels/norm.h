// Norms, rotation and the largest number of one row.
#pragma once

#include <algorithm>

#include "model.h"

namespace kernels {

// y = (x - mean) / sqrt(variance + eps) * weight + bias, over `size` values; without a bias the mean
// counts as 0. Padding is zero and stays zero.
inline void normalise(const float* x, const Norm& norm, float* y, int size, float eps) {
  const int padded = round_up(size, GROUP);
  float mean = 0.0f;
  if (norm.bias) {
    F total = zero();
    for (int i = 0; i < padded; i += L) total = add(total, load(x + i));
    mean = sum(total) / (float)size;
  }
  const F middle = splat(mean);
  F squares = zero();
  int i = 0;
  for (; i + L <= size; i += L) {
    const F off = sub(load(x + i), middle);
    squares = fma(off, off, squares);
  }
  float total = sum(squares);
  // Padding, being zero, is not at the mean.
  for (; i < size; ++i) total += (x[i] - mean) * (x[i] - mean);
  const F scale = splat(1.0f / std::sqrt(total / (float)size + eps));
  for (i = 0; i < padded; i += L) {
    const F scaled = mul(mul(sub(load(x + i), middle), scale), load(norm.weight + i));
    store(y + i, norm.bias ? add(scaled, load(norm.bias + i)) : scaled);
  }
}

// The same for one head, whose size need not be whole vectors.
inline void normalise_head(float* x, const float* weight, int size, float eps) {
  float squares = 0.0f;
  for (int i = 0; i < size; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / (float)size + eps);
  for (int i = 0; i < size; ++i) x[i] = x[i] * scale * weight[i];
}

inline void rotate(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

inline int argmax(const float* x, int count) {
  F top = splat(-INFINITY);
  int i = 0;
  for (; i + L <= count; i += L) top = max(top, load(x + i));
  float most = maximum(top);
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  const float* at = std::find(x, x + count, most);
  return at == x + count ? 0 : (int)(at - x);
}

}  // namespace kernels
