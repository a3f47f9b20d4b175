// Memory for the activations of a step, kept from step to step.
#pragma once

#include <vector>

#include "product.h"

namespace kernels {

template <class T>
struct Buffer {
  std::vector<T> held;
  T* data = nullptr;
  // At least `count` zeros on a cache line; what was there is lost.
  void size_for(size_t count) {
    if (count + 64 <= held.size()) return;
    held.assign(count + 64, T{});
    data = (T*)(((uintptr_t)held.data() + 63) & ~(uintptr_t)63);
  }
};

// Activations of one width, with room for their levels.
struct Rows {
  Buffer<float> values, scales, scaled_sums;
  Buffer<Act8> levels8;
  Buffer<int8_t> levels4;
  Buffer<int32_t> starts;
  Activations view{};
  void size_for(int rows, int width) {
    const int stride = round_up(width, GROUP), groups = num_groups(width);
    values.size_for((size_t)rows * stride);
    levels8.size_for((size_t)rows * stride);
    levels4.size_for((size_t)rows * stride);
    scales.size_for((size_t)rows * groups);
    scaled_sums.size_for((size_t)rows * groups);
    starts.size_for((size_t)rows * groups);
    view = {stride, groups, values.data, levels8.data, levels4.data,
            scales.data, scaled_sums.data, starts.data};
  }
};

}  // namespace kernels
