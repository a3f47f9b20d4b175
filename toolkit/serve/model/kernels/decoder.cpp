// One call computes one step of a decoder: every layer, for every sequence of a batch.
//
// All members of the team run the same walk through the layers and share out each phase's work;
// a barrier ends a phase. Floating point is never reassociated, so build without -ffast-math.

#include "embedding.h"
#include "norm.h"
#include "rows.h"

namespace kernels {

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
    // The longest first: the last to be taken decide how long the others wait.
    std::stable_sort(c_.tasks.begin(), c_.tasks.end(),
                     [](const Task& a, const Task& b) { return a.work() > b.work(); });
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
      // Of many tasks a member takes all heads, so that it knows what to fetch next.
      const int num_tasks = (int)c_.tasks.size();
      const int heads = num_tasks < 8 * team.members() ? 1 : m_.kv_heads;
      team.runs(phase++, num_tasks * m_.kv_heads, heads, [&](int first, int last) {
        const Task& task = c_.tasks[first / m_.kv_heads];
        attention.fetch(task, first % m_.kv_heads);
        for (int number = first; number < last; ++number) {
          const int head = number % m_.kv_heads;
          for (int i = 0; whole_ && i < task.last; ++i)
            place(layer, attention, task.sequence->first_row + i, head);
          attention.run(task, head, number + 1 < last, c_.qkv.view.values, c_.qkv.view.stride,
                        c_.mixed.view.values, c_.mixed.view.stride, c_.attention[member]);
        }
      });
      team.barrier();
      const auto mixed = quantise_rows(member, phase++, c_.mixed, layer.output.format);
      product(phase++, layer.output, mixed, rows, partial,
              {Output::ADD, c_.residual.view.values, c_.residual.view.stride, layer.output.bias});
      const auto fed = norm_rows(member, phase++, layer.ffn_norm, layer.gate_up.format);
      product(phase++, layer.gate_up, fed, rows, partial,
              {m_.gelu ? Output::GELU : Output::GATE, c_.gated.view.values, c_.gated.view.stride,
               layer.gate_up.bias});
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
    if (!m_.positions) return;
    const float* position = m_.positions + (size_t)step_.positions[row] * m_.hidden;
    for (int i = 0; i < m_.hidden; ++i) to[i] += position[i];
  }

  void norm_row(int row, const Norm& norm, const Activations& to, int to_row, int format) {
    normalise(c_.residual.view.values + (size_t)row * c_.residual.view.stride, norm,
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
  Activations norm_rows(int member, int phase, const Norm& norm, int format) {
    if (!by_oneself()) {
      by_row(phase, [&](int row) { norm_row(row, norm, c_.normed.view, row, format); });
      return c_.normed.view;
    }
    const Activations to = own(member, c_.normed.view);
    for (int row = 0; row < step_.num_tokens; ++row) norm_row(row, norm, to, row, format);
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
    const size_t angles = (size_t)step_.positions[row] * half;
    float* key = q + (m_.heads + head) * size;
    for (int i = 0; i <= group; ++i) {
      float* at = i < group ? q + (head * group + i) * size : key;
      const float* norm = i < group ? layer.q_norm : layer.k_norm;
      if (norm) normalise_head(at, norm, size, m_.eps);
      if (m_.cos) rotate(at, m_.cos + angles, m_.sin + angles, half);
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

// What the packers must know: {instruction set, vector width, k joined in an 8-bit product, what is
// added to its weights}.
void kernels_layout(int32_t* out) { out[0] = ISA, out[1] = L, out[2] = INT8_K, out[3] = INT8_ZERO; }

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

// Where the largest of each row's first `count` numbers stands, the first of equals.
void kernels_argmax(void* context, const float* x, int rows, int stride, int count, int32_t* found) {
  auto& c = *(Context*)context;
  c.team.run(1, [&](int) {
    c.team.runs(0, rows, 1, [&](int row, int) {
      found[row] = argmax(x + (size_t)row * stride, count);
    });
  });
}

void kernels_exp(const float* x, float* y, int count) {
  for (int i = 0; i < count; i += L) store(y + i, exp(load(x + i)));
}
}
