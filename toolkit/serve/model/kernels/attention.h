// Attention straight from KV blocks, for decoding tokens and for prompt chunks alike.
//
// A task is one key-value head and some tokens of one sequence; the G query heads that share the
// head and the tokens are its rows. It walks the context in spans of whole blocks with an online
// softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Spans start at multiples of their size in
// the sequence, and a score, a probability and an output are summed in one fixed order, so a token's
// result is the same whether it was decoded or was part of a chunk of any size.
//
// Layout per layer: keys [block][head][D][padded block], so that a score needs no sum across a
// vector; values [block][head][block size][padded D]. Padding is to whole vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace kernels {

struct Cache {
  void* const* keys;    // one pointer a layer
  void* const* values;
  int32_t block_size, padded_block, padded_head, half;
};

struct Sequence {
  int32_t first_row, num_rows, start, table;  // `table`: where its block numbers begin
};

struct AttentionShape {
  int heads, kv_heads, head_size;
  int group() const { return heads / kv_heads; }
};

// Rows a task holds scores for, and tokens of a span at least.
constexpr int TASK_ROWS = 96;
constexpr int SPAN_TOKENS = 256;
// Up to so many rows wait for memory: blocks are read in place, a span's values are
// fetched while its keys are read, and while its values are, the keys that follow. For more rows
// what several tiles read is laid side by side first.
constexpr int FEW_ROWS = 2 * TILE_ROWS;
// Blocks of keys that are fetched before a task begins.
constexpr int FIRST_BLOCKS = 16;

struct Task {
  const Sequence* sequence;
  int first, last;  // tokens of the sequence's rows
  bool whole() const { return last - first == sequence->num_rows; }
  // Tokens that its last row sees.
  int known() const { return sequence->start + last; }
  int64_t work() const { return (int64_t)known() * (last - first); }
};

inline int task_tokens(const AttentionShape& shape) {
  const int tokens = TASK_ROWS / shape.group();
  return tokens > 1 ? tokens : 1;
}
inline int span_tokens(const Cache& cache) {
  return std::max(SPAN_TOKENS / cache.block_size, 1) * cache.block_size;
}

// One member's memory: a task's queries, outputs and scores, and what of a span is laid side by side.
struct AttentionScratch {
  int width;  // of a row of scores: a span, and what whole vectors write beyond it
  Buffer<float> queries, outputs, scores, packed, most, total, decay, added;
  void size_for(const AttentionShape& shape, const Cache& cache) {
    const int rows = task_tokens(shape) * shape.group(), span = span_tokens(cache);
    width = round_up(span, L) + cache.padded_block;
    queries.size_for((size_t)rows * shape.head_size);
    outputs.size_for((size_t)rows * cache.padded_head);
    scores.size_for((size_t)rows * width);
    packed.size_for((size_t)std::max(span, shape.head_size) * NR);
    for (auto* each : {&most, &total, &decay, &added}) each->size_for(rows + L);
  }
};

// Some of the context of a task, under one head.
struct Span {
  const int32_t* table;      // where its blocks' numbers begin
  int head, tokens, blocks;  // tokens up to those that the last row sees
  int before, group, rows;   // tokens of the span before row 0's own, negative if that is earlier
  // What is read after it, if that is known.
  const int32_t* next_table;
  int next_head, next_blocks;

  // Tokens that a row sees: none if not positive.
  int visible(int row) const { return std::min(tokens, before + row / group + 1); }
  // The first row that sees a token.
  int first_row(int token) const { return std::max(token - before, 0) * group; }
};

template <class Kept>
class Attention {
 public:
  Attention(const AttentionShape& shape, const Cache& cache, int layer, const int32_t* tables)
      : shape_(shape), cache_(cache), tables_(tables),
        keys_((Kept*)cache.keys[layer]), values_((Kept*)cache.values[layer]),
        key_tile_((size_t)shape.head_size * cache.padded_block),
        value_tile_((size_t)cache.block_size * cache.padded_head) {}

  // Store a token's key and value under one head, already rotated, at its slot. Reads and writes
  // whole vectors: what stands beyond a head goes into padding that nobody looks at.
  void write(int slot, int head, const float* key, const float* value) const {
    const int block = slot / cache_.block_size, offset = slot % cache_.block_size;
    const int size = shape_.head_size;
    Kept* k = keys_of(block, head) + offset;
    Kept* v = values_of(block, head) + (size_t)offset * cache_.padded_head;
    for (int d = 0; d < size; d += L) {
      store(v + d, load(value + d));
      Kept lanes[L];
      store(lanes, load(key + d));
      for (int i = 0; i < L && d + i < size; ++i)
        k[(size_t)(d + i) * cache_.padded_block] = lanes[i];
    }
  }

  // Begin to fetch what `run` reads first.
  void fetch(const Task& task, int head) const {
    const Span x = span(task, head, 0, false);
    for (int b = 0; b < std::min(FIRST_BLOCKS, x.blocks) && x.rows <= FEW_ROWS; ++b)
      for (size_t at = 0; at < key_tile_; at += 64 / sizeof(Kept))
        __builtin_prefetch(keys_of(x.table[b], head) + at);
  }

  // Tokens of `task` under key-value head `head`: `qkv` and `out` have a row a token of the step.
  // With `more`, the next call is for the next head.
  void run(const Task& task, int head, bool more, const float* qkv, int qkv_stride, float* out,
           int out_stride, AttentionScratch& s) const {
    const int group = shape_.group(), size = shape_.head_size, padded = cache_.padded_head;
    const int rows = (task.last - task.first) * group;
    const auto offset = [&](int row, int stride) {
      const size_t token = task.sequence->first_row + task.first + row / group;
      return token * stride + (head * group + row % group) * size;
    };
    // Scores are powers of two.
    const float scale = 1.44269504f / std::sqrt((float)size);
    for (int row = 0; row < rows; ++row) {
      const float* from = qkv + offset(row, qkv_stride);
      float* to = s.queries.data + (size_t)row * size;
      for (int d = 0; d < size; ++d) to[d] = from[d] * scale;
    }
    std::fill_n(s.most.data, rows, -INFINITY);
    std::fill_n(s.total.data, rows, 0.0f);
    std::fill_n(s.outputs.data, (size_t)rows * padded, 0.0f);
    for (int begin = 0; begin < task.known(); begin += span_tokens(cache_)) {
      const Span x = span(task, head, begin, more);
      score(x, s);
      soften(x, s);
      mix(x, s);
    }
    for (int row = 0; row < rows; ++row) {
      const float *from = s.outputs.data + (size_t)row * padded, total = s.total.data[row];
      float* to = out + offset(row, out_stride);
      for (int d = 0; d < size; ++d) to[d] = from[d] / total;
    }
  }

 private:
  Kept* keys_of(int block, int head) const {
    return keys_ + ((size_t)block * shape_.kv_heads + head) * key_tile_;
  }
  Kept* values_of(int block, int head) const {
    return values_ + ((size_t)block * shape_.kv_heads + head) * value_tile_;
  }
  int blocks_of(int tokens) const { return (tokens + cache_.block_size - 1) / cache_.block_size; }

  Span span(const Task& task, int head, int begin, bool more) const {
    const int size = span_tokens(cache_), left = task.known() - begin;
    const int32_t *first = tables_ + task.sequence->table, *table = first + begin / cache_.block_size;
    Span x{table, head, std::min(left, size), 0, task.sequence->start + task.first - begin,
           shape_.group(), (task.last - task.first) * shape_.group(), table, head, 0};
    x.blocks = blocks_of(x.tokens);
    if (left > size) {
      x.next_table += x.blocks;
      x.next_blocks = blocks_of(std::min(left - size, size));
    } else if (more) {
      x.next_table = first;
      x.next_head = head + 1;
      x.next_blocks = blocks_of(std::min(task.known(), size));
    }
    return x;
  }

  // Call `body(v, N)` for vectors v.. v + N of `count`, two at a time, with N constant.
  template <class Body>
  static void pairs(int count, Body body) {
    int v = 0;
    for (; v + 2 <= count; v += 2) body(v, std::integral_constant<int, 2>{});
    if (v < count) body(v, std::integral_constant<int, 1>{});
  }

  // scores = queries x keys. What a row does not see stays as it was, or is nonsense.
  void score(const Span& x, AttentionScratch& s) const {
    const int block = cache_.block_size, per_block = cache_.padded_block / L;
    const int vectors = x.tokens / block * per_block + (x.tokens % block + L - 1) / L;
    const int size = shape_.head_size;
    const auto token = [&](int v) { return v / per_block * block + v % per_block * L; };
    const auto keys = [&](int v) {
      return keys_of(x.table[v / per_block], x.head) + v % per_block * L;
    };
    pairs(vectors, [&](int v, auto number) {
      constexpr int N = number;
      const auto by = [&](auto fetch, const auto* w, ptrdiff_t apart, int step, Fetch soon) {
        tiles(x.first_row(token(v)), x.rows, [&](int row, auto constant) {
          constexpr int ROWS = constant;
          F sums[ROWS][N];
          unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED { sums[r][n] = zero(); });
          const float* q = s.queries.data + (size_t)row * size;
          tile_float<fetch>(q, size, w, apart, step, size, sums, soon);
          // A vector may reach into the next block's scores: those are stored after it.
          float* to = s.scores.data + (size_t)row * s.width;
          const int at[] = {token(v), token(v + N - 1)};
          unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED {
            store(to + (size_t)r * s.width + at[n], sums[r][n]);
          });
        });
      };
      const Kept* from = keys(v);
      const ptrdiff_t apart = N == 2 ? keys(v + 1) - from : 0;
      const int step = cache_.padded_block;
      if (x.rows <= FEW_ROWS) {
        const Kept* soon = values_of(x.table[v / per_block], x.head);
        soon += (size_t)(v % per_block) * L * cache_.padded_head;
        by(std::true_type{}, from, apart, step, Fetch{(const uint8_t*)soon, 16 * sizeof(Kept)});
      } else if constexpr (std::is_same_v<Kept, float>) {
        by(std::false_type{}, from, apart, step, Fetch{});
      } else {
        lay_side_by_side<N>(from, apart, step, size, s.packed.data);
        by(std::false_type{}, s.packed.data, L, N * L, Fetch{});
      }
    });
  }

  // Copy N vectors from each of `count` places, as floats.
  template <int N>
  static void lay_side_by_side(const Kept* from, ptrdiff_t apart, int step, int count, float* to) {
    for (int i = 0; i < count; ++i)
      for (int n = 0; n < N; ++n)
        store(to + (i * N + n) * L, load(from + (ptrdiff_t)i * step + n * apart));
  }

  // Rows' scores become probabilities relative to the highest so far, 0 beyond what a row sees.
  void soften(const Span& x, AttentionScratch& s) const {
    const int first = x.first_row(0);
    for (int row = first; row < x.rows; ++row) {
      float* scores = s.scores.data + (size_t)row * s.width;
      const int visible = x.visible(row);
      store(scores + visible, splat(-INFINITY));
      F top = load(scores);
      for (int i = L; i < visible; i += L) top = max(top, load(scores + i));
      const float before = s.most.data[row], here = maximum(top), most = here > before ? here : before;
      const F subtract = splat(most);
      F total = zero();
      for (int i = 0; i < visible; i += L) {
        const F p = exp2(sub(load(scores + i), subtract));
        store(scores + i, p);
        total = add(total, p);
      }
      for (int i = visible; i < x.tokens; i += L) store(scores + i, zero());
      s.most.data[row] = most;
      s.decay.data[row] = before - most;
      s.added.data[row] = sum(total);
    }
    for (int row = first; row < x.rows; row += L) {
      const F decay = exp2(load(s.decay.data + row));
      store(s.decay.data + row, decay);
      store(s.total.data + row, fma(load(s.total.data + row), decay, load(s.added.data + row)));
    }
  }

  // outputs = outputs x decay + probabilities x values; nothing beyond `x.tokens` is read.
  void mix(const Span& x, AttentionScratch& s) const {
    // Few rows take some blocks at a time, which stay in the first cache for all columns.
    const int step = x.rows > FEW_ROWS ? x.blocks : blocks_of(64);
    for (int b = 0; b < x.blocks; b += step) mix(x, b, std::min(b + step, x.blocks), s);
  }

  // The same with blocks [begin, end) alone.
  void mix(const Span& x, int begin, int end, AttentionScratch& s) const {
    const int padded = cache_.padded_head, vectors = padded / L, block = cache_.block_size;
    const int first = x.first_row(begin * block);
    const auto size_of = [&](int b, int tokens) { return std::min(tokens - b * block, block); };
    pairs(vectors, [&](int v, auto number) {
      constexpr int N = number;
      const auto values = [&](int b) { return values_of(x.table[b], x.head) + v * L; };
      // `add(p, tokens, sums)` adds what a tile's rows see of the span.
      const auto by = [&](auto add) {
        tiles(first, x.rows, [&](int row, auto constant) {
          constexpr int ROWS = constant;
          F sums[ROWS][N];
          float* outputs = s.outputs.data + (size_t)row * padded + v * L;
          unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED {
            const float decay = begin ? 1.0f : s.decay.data[row + r];
            sums[r][n] = mul(load(outputs + r * padded + n * L), splat(decay));
          });
          add(s.scores.data + (size_t)row * s.width, x.visible(row + ROWS - 1), sums);
          unrolled<ROWS, N>([&](int r, int n) KERNELS_INLINED {
            store(outputs + r * padded + n * L, sums[r][n]);
          });
        });
      };
      if (x.rows <= FEW_ROWS)
        return by([&](const float* p, int tokens, auto& sums) KERNELS_INLINED {
          for (int b = begin; b < end && b * block < tokens; ++b) {
            const int size = size_of(b, tokens);
            const Kept* soon = values(b);
            if (b < x.next_blocks)
              soon = keys_of(x.next_table[b], x.next_head) + (size_t)v / 2 * size * 16;
            tile_float<true>(p + b * block, s.width, values(b), L, padded, size, sums,
                             Fetch{(const uint8_t*)soon, 16 * sizeof(Kept)});
          }
        });
      for (int b = 0; b < x.blocks; ++b)
        lay_side_by_side<N>(values(b), L, padded, size_of(b, x.tokens),
                            s.packed.data + (size_t)b * block * N * L);
      by([&](const float* p, int tokens, auto& sums) KERNELS_INLINED {
        tile_float<false>(p, s.width, s.packed.data, L, N * L, tokens, sums);
      });
    });
  }

  const AttentionShape& shape_;
  const Cache& cache_;
  const int32_t* tables_;
  Kept* keys_;
  Kept* values_;
  const size_t key_tile_, value_tile_;
};

}  // namespace kernels
