// One call computes one step of a Llama-family decoder: every layer, for every sequence of a batch.
//
// All members of the team run the same walk through the layers and share out each phase's work;
// a barrier ends a phase. Floating point is never reassociated, so build without -ffast-math.




#include "attention.h"

namespace kernels {

struct Layer {
  const float *attention_norm, *q_norm, *k_norm, *ffn_norm;  // q_norm, k_norm may be null
  Matrix qkv, output, gate_up, down;
};

struct Model {
  int32_t layers, hidden, heads, kv_heads, head_size, ffn, vocab, reserved;
  float eps, reserved_float;
  const Layer* layer;
  const float* norm;
  Matrix head;
  const float* embedding;  // [vocab, hidden], or null: rows are read out of `head`
  const float *cos, *sin;  // [context, head_size / 2]
};

struct Step {
  int32_t num_tokens, num_sequences, num_samples, logits_stride;
  const int32_t *tokens, *positions, *slots, *tables, *sample_rows;
  const Sequence* sequences;
  float* logits;
  // Rows whose normed last hidden states are wanted, each `hidden_stride` (whole groups) apart.
  const int32_t* pooled_rows;
  float* hidden;
  int32_t num_pooled, hidden_stride;
};

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
  Buffer<int32_t> sums;
  Activations view{};
  void size_for(int rows, int width) {
    const int stride = round_up(width, GROUP), groups = num_groups(width);
    values.size_for((size_t)rows * stride);
    levels8.size_for((size_t)rows * stride);
    levels4.size_for((size_t)rows * stride);
    scales.size_for((size_t)rows * groups);
    scaled_sums.size_for((size_t)rows * groups);
    sums.size_for((size_t)rows * groups);
    view = {stride, groups, values.data, levels8.data, levels4.data,
            scales.data, scaled_sums.data, sums.data};
  }
};

// Up to so many rows every member normalises and quantises for itself: less than a barrier takes.
constexpr int OWN_ROWS = 2;

struct Context {
  Team team;
  Rows residual, normed, qkv, mixed, gated, drawn;
  std::vector<Rows> own;
  std::vector<Buffer<float>> partial;
  std::vector<AttentionScratch> attention;
  std::vector<Task> tasks;
  Context(int members, const int* cpus, int num_cpus)
      : team(members, cpus, num_cpus), own(members), partial(members), attention(members) {
    for (auto& each : partial) each.size_for((size_t)BLOCK_ROWS * NR);
  }
};

// y = x / sqrt(mean of x^2 + eps) * weight, over `size` values; padding is zero and stays zero.
inline void normalise(const float* x, const float* weight, float* y, int size, float eps) {
  F squares = zero();
  for (int i = 0; i < round_up(size, GROUP); i += L) squares = fma(load(x + i), load(x + i), squares);
  const F scale = splat(1.0f / std::sqrt(sum(squares) / (float)size + eps));
  for (int i = 0; i < round_up(size, GROUP); i += L)
    store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
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

// The first `size` numbers of row `n` of a packed matrix, dequantised.
void unpack_row(const Matrix& m, int n, int size, float* to) {
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
        out = scale[lane] * ((const int8_t*)w)[(k * 2 + vector) * L * INT8_K + at * INT8_K + i % INT8_K];
      } else {
        const uint8_t both = w[(i / 4 * L + at) * 4 + i % 4];
        out = scale[lane] * (vector ? both >> 4 : both & 15) + minimum[lane];
      }
    }
    w += m.format == INT8 ? GROUP * NR : GROUP / 2 * NR;
  }
}

template <class Kept>
class Walk {
 public:
  Walk(Context& context, const Model& model, const Cache& cache, const Step& step)
      : c_(context), m_(model), cache_(cache), step_(step),
        shape_{model.heads, model.kv_heads, model.head_size} {
    const int rows = step.num_tokens;
    c_.residual.size_for(rows, m_.hidden);
    c_.normed.size_for(rows, m_.hidden);
    c_.qkv.size_for(rows, (m_.heads + 2 * m_.kv_heads) * m_.head_size);
    c_.mixed.size_for(rows, m_.heads * m_.head_size);
    c_.gated.size_for(rows, m_.ffn);
    c_.drawn.size_for(step.num_samples, m_.hidden);
    for (auto& each : c_.attention) each.size_for(shape_, cache_);
    const int widest = std::max({m_.hidden, m_.heads * m_.head_size, m_.ffn});
    for (auto& each : c_.own) each.size_for(OWN_ROWS, widest);
    c_.tasks.clear();
    const int tokens = task_tokens(shape_);
    for (int i = 0; i < step.num_sequences; ++i)
      for (int first = 0; first < step.sequences[i].num_rows; first += tokens)
        c_.tasks.push_back({step.sequences + i, first,
                            std::min(first + tokens, step.sequences[i].num_rows)});
    for (const Task& task : c_.tasks) whole_ = whole_ && task.whole();
  }

  void run() {
    c_.team.run(PHASES * m_.layers + 4, [this](int member) { member_walk(member); });
  }

 private:
  static constexpr int PHASES = 10;

  void member_walk(int member) {
    Team& team = c_.team;
    float* partial = c_.partial[member].data;
    const int rows = step_.num_tokens;
    int phase = 0;
    team.runs(phase++, rows, 4, [&](int first, int last) {
      for (int row = first; row < last; ++row) embed(row);
    });
    team.barrier();
    for (int i = 0; i < m_.layers; ++i) {
      const Layer& layer = m_.layer[i];
      const Attention<Kept> attention(shape_, cache_, i, step_.tables);
      const auto normed = norm_rows(member, phase++, layer.attention_norm, layer.qkv.format);
      product(phase++, layer.qkv, normed, rows, partial,
              {Output::STORE, c_.qkv.view.values, c_.qkv.view.stride, layer.qkv.bias});
      // Keys and values must be in place before any task reads them; a task that is all there is
      // of its sequence in this step sees to its own.
      if (!whole_)
        by_row(phase, [&](int row) {
          for (int head = 0; head < m_.kv_heads; ++head) place(layer, attention, row, head);
        });
      ++phase;
      team.runs(phase++, (int)c_.tasks.size() * m_.kv_heads, 1, [&](int number, int) {
        const Task& task = c_.tasks[number / m_.kv_heads];
        const int head = number % m_.kv_heads;
        for (int i = 0; whole_ && i < task.last; ++i)
          place(layer, attention, task.sequence->first_row + i, head);
        attention.run(task, head, c_.qkv.view.values, c_.qkv.view.stride, c_.mixed.view.values,
                      c_.mixed.view.stride, c_.attention[member]);
      });
      team.barrier();
      const auto mixed = quantise_rows(member, phase++, c_.mixed, layer.output.format);
      product(phase++, layer.output, mixed, rows, partial,
              {Output::ADD, c_.residual.view.values, c_.residual.view.stride, layer.output.bias});
      const auto fed = norm_rows(member, phase++, layer.ffn_norm, layer.gate_up.format);
      product(phase++, layer.gate_up, fed, rows, partial,
              {Output::GATE, c_.gated.view.values, c_.gated.view.stride, nullptr});
      const auto gated = quantise_rows(member, phase++, c_.gated, layer.down.format);
      product(phase++, layer.down, gated, rows, partial,
              {Output::ADD, c_.residual.view.values, c_.residual.view.stride, layer.down.bias});
    }
    team.runs(phase++, step_.num_samples + step_.num_pooled, 1, [&](int i, int) {
      const int pooled = i - step_.num_samples;
      if (pooled < 0)
        norm_row(step_.sample_rows[i], m_.norm, c_.drawn.view, i, m_.head.format);
      else
        normalise(c_.residual.view.values + (size_t)step_.pooled_rows[pooled] * c_.residual.view.stride,
                  m_.norm, step_.hidden + (size_t)pooled * step_.hidden_stride, m_.hidden, m_.eps);
    });
    team.barrier();
    if (step_.num_samples)
      product(phase, m_.head, c_.drawn.view, step_.num_samples, partial,
              {Output::STORE, step_.logits, step_.logits_stride, nullptr});
  }

  template <class Body>
  void by_row(int phase, Body body) {
    const int size = std::max(1, step_.num_tokens / (8 * c_.team.members()));
    c_.team.runs(phase, step_.num_tokens, size, [&](int first, int last) {
      for (int row = first; row < last; ++row) body(row);
    });
    c_.team.barrier();
  }

  void product(int phase, const Matrix& m, const Activations& x, int rows, float* partial,
               const Output& out) {
    multiply(c_.team, phase, m, x, rows, partial, out);
    c_.team.barrier();
  }

  void embed(int row) {
    float* to = c_.residual.view.values + (size_t)row * c_.residual.view.stride;
    const int token = step_.tokens[row];
    if (m_.embedding)
      std::memcpy(to, m_.embedding + (size_t)token * m_.hidden, sizeof(float) * m_.hidden);
    else
      unpack_row(m_.head, token, m_.hidden, to);
  }

  void norm_row(int row, const float* weight, const Activations& to, int to_row, int format) {
    normalise(c_.residual.view.values + (size_t)row * c_.residual.view.stride, weight,
              to.values + (size_t)to_row * to.stride, m_.hidden, m_.eps);
    if (format != FLOAT32) quantise(to, format, to_row);
  }

  bool by_oneself() const { return step_.num_tokens <= OWN_ROWS; }

  // What a member keeps to itself of activations shaped as `like`.
  Activations own(int member, const Activations& like) {
    Activations mine = c_.own[member].view;
    mine.stride = like.stride, mine.groups = like.groups;
    return mine;
  }

  // The residual stream normalised, and quantised for products of `format`.
  Activations norm_rows(int member, int phase, const float* weight, int format) {
    if (!by_oneself()) {
      by_row(phase, [&](int row) { norm_row(row, weight, c_.normed.view, row, format); });
      return c_.normed.view;
    }
    const Activations to = own(member, c_.normed.view);
    for (int row = 0; row < step_.num_tokens; ++row) norm_row(row, weight, to, row, format);
    return to;
  }

  Activations quantise_rows(int member, int phase, const Rows& x, int format) {
    if (format == FLOAT32) return x.view;
    if (!by_oneself()) {
      by_row(phase, [&](int row) { quantise(x.view, format, row); });
      return x.view;
    }
    Activations to = own(member, x.view);
    to.values = x.view.values;
    for (int row = 0; row < step_.num_tokens; ++row) quantise(to, format, row);
    return to;
  }

  // Normalise and rotate what a row has under one key-value head: its queries and its key, which
  // goes into the cache with its value.
  void place(const Layer& layer, const Attention<Kept>& attention, int row, int head) {
    float* q = c_.qkv.view.values + (size_t)row * c_.qkv.view.stride;
    const int size = m_.head_size, half = size / 2, group = shape_.group();
    const float* cos = m_.cos + (size_t)step_.positions[row] * half;
    const float* sin = m_.sin + (size_t)step_.positions[row] * half;
    float* key = q + (m_.heads + head) * size;
    for (int i = 0; i <= group; ++i) {
      float* at = i < group ? q + (head * group + i) * size : key;
      const float* norm = i < group ? layer.q_norm : layer.k_norm;
      if (norm) normalise_head(at, norm, size, m_.eps);
      rotate(at, cos, sin, half);
    }
    attention.write(step_.slots[row], head, key, key + m_.kv_heads * size);
  }

  Context& c_;
  const Model& m_;
  const Cache& cache_;
  const Step& step_;
  const AttentionShape shape_;
  bool whole_ = true;  // every task is all of its sequence's rows
};

}  // namespace kernels

using namespace kernels;

extern "C" {

// What the packers must know: {instruction set, vector width, k joined in an 8-bit product}.
void kernels_layout(int32_t* out) { out[0] = ISA, out[1] = L, out[2] = INT8_K; }

void* kernels_open(int members, const int32_t* cpus, int num_cpus) {
  return new Context(members, cpus, num_cpus);
}
void kernels_close(void* context) { delete (Context*)context; }

void kernels_step(void* context, const Model* model, const Cache* cache, const Step* step) {
  auto& c = *(Context*)context;
  if (cache->half)
    Walk<uint16_t>(c, *model, *cache, *step).run();
  else
    Walk<float>(c, *model, *cache, *step).run();
}

// y [rows, n padded to whole panels] = x [rows, k] times a matrix; for tests and measurements.
void kernels_multiply(void* context, const Matrix* m, const float* x, int rows, float* y) {
  auto& c = *(Context*)context;
  c.normed.size_for(rows, m->k);
  const Activations& a = c.normed.view;
  c.team.run(2, [&](int member) {
    c.team.runs(0, rows, std::max(1, rows / (8 * c.team.members())), [&](int first, int last) {
      for (int row = first; row < last; ++row) {
        std::memcpy(a.values + (size_t)row * a.stride, x + (size_t)row * m->k, sizeof(float) * m->k);
        if (m->format != FLOAT32) quantise(a, m->format, row);
      }
    });
    c.team.barrier();
    multiply(c.team, 1, *m, a, rows, c.partial[member].data,
             {Output::STORE, y, num_panels(*m) * NR, m->bias});
  });
}

void kernels_exp(const float* x, float* y, int count) {
  for (int i = 0; i < count; i += L) store(y + i, exp(load(x + i)));
}
}
