// One row back out of a packed matrix: a tied embedding lies in the head only.
#pragma once

#include "product.h"

namespace kernels {

// The first `size` numbers of row `n` of a packed matrix, dequantised.
inline void unpack_row(const Matrix& m, int n, int size, float* to) {
  const auto* w = (const uint8_t*)m.panels + panel_bytes(m.format, m.k) * (n / NR);
  const int lane = n % NR, vector = lane / L, at = lane % L;
  if (m.format == FLOAT32) {
    for (int i = 0; i < size; ++i) to[i] = ((const float*)w)[(size_t)i * NR + lane];
    return;
  }
  for (int g = 0; g < num_groups(size); ++g) {
    float scale[NR], minimum[NR];
    const bool half = m.format != INT4W;
    const size_t row = half ? 2 * NR : 4 * NR;
    for (int i = 0; i < NR; i += L) {
      store(scale + i, half ? load((const uint16_t*)w + i) : load((const float*)w + i));
      if (m.format != INT8)
        store(minimum + i, half ? load((const uint16_t*)(w + row) + i)
                                : load((const float*)(w + row) + i));
    }
    w += m.format == INT8 ? row : 2 * row;
    for (int i = 0; i < GROUP && g * GROUP + i < size; ++i) {
      float& out = to[g * GROUP + i];
      if (m.format == INT8) {
        const int k = i / INT8_K;
        const uint8_t level = w[(k * 2 + vector) * L * INT8_K + at * INT8_K + i % INT8_K];
        out = scale[lane] * (INT8_ZERO ? level - INT8_ZERO : (int8_t)level);
      } else {
        const uint8_t both = w[(i / 4 * L + at) * 4 + i % 4];
        out = scale[lane] * (vector ? both >> 4 : both & 15) + minimum[lane];
      }
    }
    w += m.format == INT8 ? GROUP * NR : GROUP / 2 * NR;
  }
}

}  // namespace kernels
