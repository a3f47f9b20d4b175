// Rows of activations times a packed weight matrix, in four weight formats.
//
// A weight `[n, k]` lies in panels of NR outputs. Each output is summed over k in one fixed order
// (one chain of FMAs, over k or over groups of 32 k whose integer sums are exact), whatever the
// number of rows, the tile they fall into and the thread that takes the panel: a row's result does
// not depend on the other rows.
//
// A panel, by format (rows of NR outputs; the byte order inside is what simd.h's loads expect):
//   FLOAT32  k x [NR floats]
//   INT8     per group: [NR half scales] [32 / INT8_K x 2 x L x INT8_K levels, INT8_ZERO too large]
//   INT4     per group: [NR half scales] [NR half minima] [8 x L x 4 bytes, two outputs a byte]
//   INT4W    as INT4 with float scales and minima, for files whose scales no half holds exactly
// A 4-bit weight is scale x level + minimum with a level of 0..15.
#pragma once

#include <utility>

#include "pool.h"
#include "simd.h"

namespace kernels {

enum Format : int32_t { FLOAT32 = 0, INT8 = 1, INT4 = 2, INT4W = 3 };

struct Matrix {
  int32_t format, n, k, reserved;
  const void* panels;
  const float* bias;  // padded to whole panels, or null
};

#define KERNELS_INLINED __attribute__((always_inline))
#define KERNELS_INLINE KERNELS_INLINED inline

inline int round_up(int value, int step) { return (value + step - 1) / step * step; }
inline int num_panels(const Matrix& m) { return (m.n + NR - 1) / NR; }
inline int num_groups(int k) { return (k + GROUP - 1) / GROUP; }

inline size_t panel_bytes(int format, int k) {
  const size_t groups = num_groups(k);
  switch (format) {
    case FLOAT32: return sizeof(float) * NR * k;
    case INT8: return groups * (2 * NR + GROUP * NR);
    case INT4: return groups * (4 * NR + GROUP / 2 * NR);
    default: return groups * (8 * NR + GROUP / 2 * NR);
  }
}

// Rows as a product reads them: floats, or levels with a scale per row and group of 32.
struct Activations {
  int stride, groups;  // of `values` and of the levels (multiple of 32), in elements
  float* values;
  Act8* levels8;
  int8_t* levels4;
  float* scales;       // [rows, groups]
  float* scaled_sums;  // scale x sum of the levels
  int32_t* starts;     // where an 8-bit sum begins (simd.h)
};

template <class Level>
inline void quantise(const Activations& a, Level* levels, int row) {
  const float* values = a.values + (size_t)row * a.stride;
  levels += (size_t)row * a.stride;
  for (int g = 0; g < a.groups; ++g, values += GROUP, levels += GROUP) {
    F top = abs(load(values));
    for (int i = L; i < GROUP; i += L) top = max(top, abs(load(values + i)));
    const float most = maximum(top);
    const bool live = most > 1e-30f;
    const F inverse = splat(live ? 127.0f / most : 0.0f);
    I sums = splat_int(0);
    for (int i = 0; i < GROUP; i += L) {
      const I rounded = to_int(mul(load(values + i), inverse));
      store_narrow(levels + i, rounded);
      sums = add_int(sums, rounded);
    }
    const int32_t sum = total(sums);
    const size_t group = (size_t)row * a.groups + g;
    const float scale = live ? most / 127.0f : 0.0f;
    a.scales[group] = scale;
    a.scaled_sums[group] = scale * (float)sum;
    a.starts[group] = int8_start(sum);
  }
}
// Quantise row `row` of `a.values` as products of `format` read it. Symmetric, to -127..127.
inline void quantise(const Activations& a, int format, int row) {
  format == INT8 ? quantise(a, a.levels8, row) : quantise(a, a.levels4, row);
}

// Rows a tile computes at once: as many as the registers hold sums for.
constexpr int TILE_ROWS = L == 16 ? 12 : 6;
// Rows that go through a run of panels together, so that they stay in the second cache.
constexpr int BLOCK_ROWS = 24 * TILE_ROWS;
// Bytes of a panel that are fetched before they are needed, where one tile is all.
constexpr int AHEAD = 4096;
// What a tile fetches into the second cache meanwhile: with each step `gap` bytes further.
struct Fetch {
  const uint8_t* at;
  size_t gap;
  KERNELS_INLINE void next() {
    __builtin_prefetch(at, 0, 2);
    at += gap;
  }
};
// `num_tiles` tiles of `steps` steps share out what it takes to have the `bytes` that follow those
// at `now` at hand when they are done with these; a single one runs a little ahead of itself.
inline Fetch fetch_after(const void* now, size_t bytes, int num_tiles, int steps) {
  const auto* at = (const uint8_t*)now;
  return {at + (num_tiles == 1 ? (size_t)AHEAD : bytes), bytes / num_tiles / steps};
}
// k of a float panel that stay in the first cache while all rows pass.
constexpr int BLOCK_K = L == 16 ? 128 : 256;

// Call `body(i, j)` for all i < ROWS and j < COLUMNS in turn, as straight code: compilers unroll
// loops too late to keep an array in registers where the rest of a function is large.
template <size_t ROWS, size_t COLUMNS, class Body>
KERNELS_INLINE void unrolled(Body body) {
  [&]<size_t... at>(std::index_sequence<at...>) KERNELS_INLINED {
    (body(at / COLUMNS, at % COLUMNS), ...);
  }(std::make_index_sequence<ROWS * COLUMNS>{});
}

// sums[r][n] += sum over i of x[r][i] * the vector at w[i * step + n * apart], in order of i.
//
// With FETCH, `soon` is what will be read next.
template <bool FETCH, size_t ROWS, size_t N, class Kept>
KERNELS_INLINE void tile_float(const float* x, int stride, const Kept* w, ptrdiff_t apart, int step,
                               int count, F (&sums)[ROWS][N], Fetch soon = {}) {
  F held[ROWS][N];
  unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED { held[r][n] = sums[r][n]; });
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i, w += step) {
    F vectors[N], value;
    unrolled<N, 1>([&](int n, int) KERNELS_INLINED {
      vectors[n] = load(w + n * apart);
      KERNELS_PIN(vectors[n]);
    });
    if (FETCH) soon.next();
    unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED {
      if (n == 0) value = splat(x[(size_t)r * stride + i]);
      held[r][n] = fma(value, vectors[n], held[r][n]);
      KERNELS_PIN(held[r][n]);
    });
  }
  unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED { sums[r][n] = held[r][n]; });
}

template <int ROWS>
inline void tile_int8(const Activations& a, int row, const uint8_t* w, Fetch soon,
                      F (&sums)[ROWS][2]) {
  const Act8* x = a.levels8 + (size_t)row * a.stride;
  const size_t first_group = (size_t)row * a.groups, stride = a.stride, groups = a.groups;
  for (size_t g = 0; g < groups; ++g, x += GROUP) {
    const auto* scale = (const uint16_t*)w;
    const uint8_t* level = w + 2 * NR;
    w = level + GROUP * NR;
    I parts[ROWS][2];
    unrolled<ROWS, 1>([&](int r, int) KERNELS_INLINED {
      parts[r][0] = parts[r][1] = int8_begin(a.starts + first_group + r * groups + g);
    });
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i += INT8_K, level += NR * INT8_K) {
      soon.next();
      const Weights8 w0 = load_weights8(level), w1 = load_weights8(level + L * INT8_K);
      unrolled<ROWS, 1>([&](int r, int) KERNELS_INLINED {
        const Act8* at = x + r * stride + i;
        parts[r][0] = dot8(parts[r][0], w0, at);
        parts[r][1] = dot8(parts[r][1], w1, at);
        KERNELS_PIN(parts[r][0]);
        KERNELS_PIN(parts[r][1]);
      });
    }
    const F s0 = load(scale), s1 = load(scale + L);
    unrolled<ROWS, 1>([&](int r, int) KERNELS_INLINED {
      const F s = splat(a.scales[first_group + r * groups + g]);
      sums[r][0] = fma(to_float(parts[r][0]), mul(s0, s), sums[r][0]);
      sums[r][1] = fma(to_float(parts[r][1]), mul(s1, s), sums[r][1]);
    });
  }
}

template <int ROWS, class Scale>
inline void tile_int4(const Activations& a, int row, const uint8_t* w, Fetch soon,
                      F (&sums)[ROWS][2]) {
  const int8_t* x = a.levels4 + (size_t)row * a.stride;
  const size_t first_group = (size_t)row * a.groups, stride = a.stride, groups = a.groups;
  for (size_t g = 0; g < groups; ++g, x += GROUP) {
    const auto* scale = (const Scale*)w;
    const uint8_t* level = w + 2 * sizeof(Scale) * NR;
    w = level + GROUP / 2 * NR;
    Sum4 parts[ROWS][2];
    unrolled<ROWS, 2>([&](int r, int v) KERNELS_INLINED { parts[r][v] = sum4_zero(); });
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i += 4, level += 2 * NR) {
      soon.next();
      const Weights4 pair = load_weights4(level);
      unrolled<ROWS, 1>([&](int r, int) KERNELS_INLINED {
        const auto at = splat4(x + r * stride + i);
        parts[r][0] = dot4(parts[r][0], pair.low, at);
        parts[r][1] = dot4(parts[r][1], pair.high, at);
        KERNELS_PIN(parts[r][0]);
        KERNELS_PIN(parts[r][1]);
      });
    }
    const F s0 = load(scale), s1 = load(scale + L), m0 = load(scale + NR), m1 = load(scale + NR + L);
    unrolled<ROWS, 1>([&](int r, int) KERNELS_INLINED {
      const size_t group = first_group + r * groups + g;
      const F s = splat(a.scales[group]), t = splat(a.scaled_sums[group]);
      sums[r][0] = fma(to_float(sum4_int(parts[r][0])), mul(s0, s), fma(m0, t, sums[r][0]));
      sums[r][1] = fma(to_float(sum4_int(parts[r][1])), mul(s1, s), fma(m1, t, sums[r][1]));
    });
  }
}

// Call `tile(row, count)` with a constant count for tiles of even size that cover the rows.
template <int ROWS = TILE_ROWS, class Tile>
inline void tile_of(int row, int count, Tile& tile) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return tile_of<ROWS - 1>(row, count, tile);
  tile(row, std::integral_constant<int, ROWS>{});
}
template <class Tile>
inline void tiles(int first, int last, Tile tile) {
  for (int left = (last - first + TILE_ROWS - 1) / TILE_ROWS; left; --left) {
    const int count = (last - first + left - 1) / left;
    tile_of(first, count, tile);
    first += count;
  }
}

// x / (1 + e^-y). Beyond -88 the power would not fit a float, and the result is 0 all the same.
inline F weighed(F x, F y) {
  return div(x, add(splat(1.0f), exp(sub(zero(), max(y, splat(-88.0f))))));
}
// GELU's tanh form: 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline F gelu(F x) {
  const F cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
  return weighed(x, mul(cubic, splat(1.59576912f)));
}

// Where a product's outputs go. `y` has `stride` floats a row, whole panels at least.
struct Output {
  // GATE: gate and up lie side by side in a panel; silu(gate) x up comes out, L wide.
  enum Kind { STORE, ADD, GATE, GELU } kind;
  float* y;
  int stride;
  const float* bias;

  // Have the lines that `put` will write ready: a store that waits for its line holds up those after.
  void fetch(int panel, int row) const {
    const float* to = y + (size_t)row * stride + panel * (kind == GATE ? L : NR);
    __builtin_prefetch(to, 1);
    if (kind != GATE) __builtin_prefetch(to + L, 1);
  }

  void put(int panel, int row, F a, F b) const {
    float* to = y + (size_t)row * stride;
    if (kind == GATE) return store(to + panel * L, mul(weighed(a, a), b));
    to += panel * NR;
    if (bias) a = add(a, load(bias + panel * NR)), b = add(b, load(bias + panel * NR + L));
    if (kind == GELU) a = gelu(a), b = gelu(b);
    store(to, kind == ADD ? add(load(to), a) : a);
    store(to + L, kind == ADD ? add(load(to + L), b) : b);
  }
};

// Rows [first, last) times one panel.
[[gnu::noinline]] inline void rows_by_panel(const Activations& a, const Matrix& m, int panel, int first, int last,
                          float* partial, const Output& out) {
  const auto* w = (const uint8_t*)m.panels + panel_bytes(m.format, m.k) * panel;
  const int num_tiles = (last - first + TILE_ROWS - 1) / TILE_ROWS;
  if (m.format == FLOAT32) {
    const int parts = (m.k + BLOCK_K - 1) / BLOCK_K, step = (m.k + parts - 1) / parts;
    for (int start = 0; start < m.k; start += step) {
      const int size = start + step < m.k ? step : m.k - start;
      const float* from = (const float*)w + (size_t)start * NR;
      Fetch soon = fetch_after(from, sizeof(float) * NR * size, num_tiles, size);
      tiles(first, last, [&](int row, auto rows) {
        constexpr int ROWS = rows;
        F sums[ROWS][2];
        for (int r = 0; start + size == m.k && r < ROWS; ++r) out.fetch(panel, row + r);
        float* kept = partial + (size_t)(row - first) * NR;
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < 2; ++v) sums[r][v] = start ? load(kept + r * NR + v * L) : zero();
        const float* x = a.values + (size_t)row * a.stride + start;
        tile_float<true>(x, a.stride, from, L, NR, size, sums, soon);
        soon.at += soon.gap * size;
        for (int r = 0; r < ROWS; ++r)
          if (start + size == m.k) {
            out.put(panel, row + r, sums[r][0], sums[r][1]);
          } else {
            store(kept + r * NR, sums[r][0]);
            store(kept + r * NR + L, sums[r][1]);
          }
      });
    }
    return;
  }
  const int steps = num_groups(m.k) * (GROUP / (m.format == INT8 ? INT8_K : 4));
  Fetch soon = fetch_after(w, panel_bytes(m.format, m.k), num_tiles, steps);
  tiles(first, last, [&](int row, auto rows) {
    constexpr int ROWS = rows;
    F sums[ROWS][2];
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = sums[r][1] = zero();
      out.fetch(panel, row + r);
    }
    switch (m.format) {
      case INT8: tile_int8<ROWS>(a, row, w, soon, sums); break;
      case INT4: tile_int4<ROWS, uint16_t>(a, row, w, soon, sums); break;
      default: tile_int4<ROWS, float>(a, row, w, soon, sums);
    }
    soon.at += soon.gap * steps;
    for (int r = 0; r < ROWS; ++r) out.put(panel, row + r, sums[r][0], sums[r][1]);
  });
}

// One phase of a step: the team multiplies `rows` rows by the whole matrix.
inline void multiply(Team& team, int phase, const Matrix& m, const Activations& a, int rows,
                     float* partial, const Output& out) {
  const int panels = num_panels(m), size = panels / (8 * team.members());
  const int blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int block = blocks ? round_up((rows + blocks - 1) / blocks, TILE_ROWS) : 1;
  team.runs(phase, panels, size > 1 ? size : 1, [&](int first_panel, int last_panel) {
    for (int first = 0; first < rows; first += block) {
      const int last = first + block < rows ? first + block : rows;
      for (int panel = first_panel; panel < last_panel; ++panel)
        rows_by_panel(a, m, panel, first, last, partial, out);
    }
  });
}

}  // namespace kernels
