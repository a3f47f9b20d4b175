// Attention straight from KV blocks, for decoding tokens and for prompt chunks alike.
//
// A task is one key-value head and some tokens of one sequence; the G query heads that share the
// head and the tokens are its rows. It walks the context in spans of whole blocks with an online
// softmax. Spans start at multiples of their size in the sequence, and a score, a probability and
// an output are summed in one fixed order, so a token's result is the same whether it was decoded
// or was part of a chunk of any size.
//
// Layout per layer: keys [block][head][D][padded block], so that a score needs no sum across a
// vector; values [block][head][block size][padded D]. Padding is to whole vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "product.h"

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
constexpr int SPAN_TOKENS = 64;

struct Task {
  const Sequence* sequence;
  int first, last;  // tokens of the sequence's rows
  bool whole() const { return last - first == sequence->num_rows; }
};

inline int task_tokens(const AttentionShape& shape) {
  const int tokens = TASK_ROWS / shape.group();
  return tokens > 1 ? tokens : 1;
}
inline int span_blocks(const Cache& cache) {
  const int blocks = SPAN_TOKENS / cache.block_size;
  return blocks > 1 ? blocks : 1;
}

// One member's memory: queries, outputs and scores of a task.
struct AttentionScratch {
  int rows, width;
  std::vector<float> queries, outputs, scores, most, total, decay;
  void size_for(const AttentionShape& shape, const Cache& cache) {
    rows = task_tokens(shape) * shape.group();
    width = span_blocks(cache) * cache.padded_block;
    queries.resize((size_t)rows * shape.head_size);
    outputs.resize((size_t)rows * cache.padded_head);
    scores.resize((size_t)rows * width);
    for (auto* each : {&most, &total, &decay}) each->resize(rows);
  }
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

  // Tokens of `task` under key-value head `head`: `qkv` and `out` have a row a token of the step.
  void run(const Task& task, int head, const float* qkv, int qkv_stride, float* out, int out_stride,
           AttentionScratch& s) const {
    const int group = shape_.group(), size = shape_.head_size, padded = cache_.padded_head;
    const Sequence& sequence = *task.sequence;
    const int rows = (task.last - task.first) * group;
    const float scale = 1.0f / std::sqrt((float)size);
    for (int r = 0; r < rows; ++r) {
      const size_t row = sequence.first_row + task.first + r / group;
      const float* from = qkv + row * qkv_stride + (head * group + r % group) * size;
      for (int d = 0; d < size; ++d) s.queries[(size_t)r * size + d] = from[d] * scale;
      s.most[r] = -INFINITY;
      s.total[r] = 0.0f;
    }
    std::fill_n(s.outputs.begin(), (size_t)rows * padded, 0.0f);
    const int known = sequence.start + task.last, blocks = span_blocks(cache_);
    for (int block = 0; block * cache_.block_size < known; block += blocks) {
      const int begin = block * cache_.block_size;
      const int needed = (known - begin + cache_.block_size - 1) / cache_.block_size;
      const int count = needed < blocks ? needed : blocks;
      const int32_t* table = tables_ + sequence.table + block;
      // Few rows mean that memory is waited for: what comes next is fetched meanwhile.
      const bool fetch = rows <= TILE_ROWS;
      score(table, count, head, rows, s, fetch);
      for (int r = 0; r < rows; ++r)
        soften(r, sequence.start + task.first + r / group + 1 - begin, count, s);
      const int left = needed - count;
      mix(table, count, known - begin, head, rows, s, fetch ? left < blocks ? left : blocks : 0);
    }
    for (int r = 0; r < rows; ++r) {
      const size_t row = sequence.first_row + task.first + r / group;
      float* to = out + row * out_stride + (head * group + r % group) * size;
      for (int d = 0; d < size; ++d) to[d] = s.outputs[(size_t)r * padded + d] / s.total[r];
    }
  }

 private:
  Kept* keys_of(int block, int head) const {
    return keys_ + ((size_t)block * shape_.kv_heads + head) * key_tile_;
  }
  Kept* values_of(int block, int head) const {
    return values_ + ((size_t)block * shape_.kv_heads + head) * value_tile_;
  }

  // scores = queries x keys of `count` blocks; `fetch` their values meanwhile.
  void score(const int32_t* table, int count, int head, int rows, AttentionScratch& s,
             bool fetch) const {
    const int size = shape_.head_size, per_block = cache_.padded_block / L;
    const int vectors = count * per_block;
    const auto vector = [&](int v) {
      return keys_of(table[v / per_block], head) + v % per_block * L;
    };
    for (int v = 0; v < vectors; v += 2) {
      const bool pair = v + 1 < vectors;
      const Kept *w0 = vector(v), *w1 = pair ? vector(v + 1) : w0, *soon = nullptr;
      if (fetch)
        soon = values_of(table[v / per_block], head) +
               (size_t)(v % per_block * L) * cache_.padded_head;
      tiles(0, rows, [&](int row, auto constant) {
        constexpr int ROWS = constant;
        F sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = zero();
        const float* x = s.queries.data() + (size_t)row * size;
        if (pair)
          tile_float<ROWS, 2>(x, size, w0, w1, cache_.padded_block, size, sums, soon);
        else
          tile_float<ROWS, 1>(x, size, w0, w1, cache_.padded_block, size, sums, soon);
        for (int r = 0; r < ROWS; ++r) {
          float* to = s.scores.data() + (size_t)(row + r) * s.width + v * L;
          store(to, sums[r][0]);
          if (pair) store(to + L, sums[r][1]);
        }
      });
    }
  }

  // A row's scores become probabilities relative to the highest so far; `visible` tokens count.
  void soften(int row, int visible, int count, AttentionScratch& s) const {
    float* scores = s.scores.data() + (size_t)row * s.width;
    const int block = cache_.block_size, padded = cache_.padded_block, width = count * padded;
    for (int b = 0; b < count; ++b) {
      const int left = visible - b * block, shown = left < 0 ? 0 : left < block ? left : block;
      for (int i = b * padded + shown; i < (b + 1) * padded; ++i) scores[i] = -INFINITY;
    }
    s.decay[row] = 1.0f;
    if (visible <= 0) return (void)std::fill_n(scores, width, 0.0f);
    F top = load(scores);
    for (int i = L; i < width; i += L) top = max(top, load(scores + i));
    const float most = std::fmax(s.most[row], maximum(top));
    const F subtract = splat(most);
    F total = zero();
    for (int i = 0; i < width; i += L) {
      const F p = exp(sub(load(scores + i), subtract));
      store(scores + i, p);
      total = add(total, p);
    }
    s.decay[row] = exp_one(s.most[row] - most);
    s.total[row] = s.total[row] * s.decay[row] + sum(total);
    s.most[row] = most;
  }

  // outputs = outputs x decay + probabilities x values; nothing beyond `known` tokens is read.
  // The keys of the `fetch` blocks that follow are fetched meanwhile.
  void mix(const int32_t* table, int count, int known, int head, int rows, AttentionScratch& s,
           int fetch) const {
    const int padded = cache_.padded_head, vectors = padded / L;
    for (int v = 0; v < vectors; v += 2) {
      const bool pair = v + 1 < vectors;
      tiles(0, rows, [&](int row, auto constant) {
        constexpr int ROWS = constant;
        F sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r) {
          const float* from = s.outputs.data() + (size_t)(row + r) * padded + v * L;
          const F decay = splat(s.decay[row + r]);
          sums[r][0] = mul(load(from), decay);
          sums[r][1] = pair ? mul(load(from + L), decay) : zero();
        }
        for (int b = 0; b < count; ++b) {
          const int left = known - b * cache_.block_size;
          const int tokens = left < cache_.block_size ? left : cache_.block_size;
          const Kept *w = values_of(table[b], head) + v * L, *soon = nullptr;
          if (b < fetch) soon = keys_of(table[count + b], head) + (size_t)v / 2 * tokens * 16;
          const float* x = s.scores.data() + (size_t)row * s.width + b * cache_.padded_block;
          if (pair)
            tile_float<ROWS, 2>(x, s.width, w, w + L, padded, tokens, sums, soon);
          else
            tile_float<ROWS, 1>(x, s.width, w, w, padded, tokens, sums, soon);
        }
        for (int r = 0; r < ROWS; ++r) {
          float* to = s.outputs.data() + (size_t)(row + r) * padded + v * L;
          store(to, sums[r][0]);
          if (pair) store(to + L, sums[r][1]);
        }
      });
    }
  }

  const AttentionShape& shape_;
  const Cache& cache_;
  const int32_t* tables_;
  Kept* keys_;
  Kept* values_;
  const size_t key_tile_, value_tile_;
};

}  // namespace kernels
