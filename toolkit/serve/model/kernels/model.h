// What the caller hands over: a model's shape and weights, and a step's arrays (library.py).
#pragma once

#include "attention.h"

namespace kernels {

// Both padded with zeros to whole groups. Without a bias it is an RMS norm, with one a layer norm.
struct Norm {
  const float *weight, *bias;
};

struct Layer {
  Norm attention_norm, ffn_norm;
  const float *q_norm, *k_norm;         // or null
  Matrix qkv, output, gate_up, down;  // `gate_up` is up alone where `gelu` is set
};

struct Model {
  int32_t layers, hidden, heads, kv_heads, head_size, ffn, vocab, gelu;
  float eps, reserved_float;
  const Layer* layer;
  Norm norm;
  Matrix head;
  const float* embedding;  // [vocab, hidden], or null: rows are read out of `head`
  const float* positions;  // [context, hidden], added to the embedding, or null
  const float *cos, *sin;  // [context, head_size / 2], or null: nothing rotates
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

}  // namespace kernels
