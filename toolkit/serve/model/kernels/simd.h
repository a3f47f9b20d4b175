// Vectors of L floats or 32-bit integers, and the few operations the kernels are written in.
//
// Three instruction sets, chosen when the file is compiled for the machine it runs on: AVX-512 with
// VNNI, AVX2 with FMA and F16C, and plain C++ that any compiler takes. Integer products differ in
// how many neighbouring k they join (INT8_K) and in the type of an activation (Act8): AVX2
// multiplies 16-bit pairs, because its 8-bit product saturates.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define KERNELS_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KERNELS_AVX2 1
#include <immintrin.h>
#endif

namespace kernels {

#if KERNELS_AVX512

constexpr int ISA = 2, L = 16, INT8_K = 4;
using Act8 = int8_t;
using F = __m512;
using I = __m512i;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F splat(float v) { return _mm512_set1_ps(v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(uint16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm512_cvtps_epi32(v); }
inline I splat_int(int32_t v) { return _mm512_set1_epi32(v); }
// v x 2^n, where n is the low bits of `n`'s mantissa.
inline F scaled(F v, F n) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}

inline float maximum(F v) { return _mm512_reduce_max_ps(v); }
inline int32_t total(I v) { return _mm512_reduce_add_epi32(v); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline void store_narrow(int8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }

// Weights lie here as unsigned numbers, 128 too large: what that adds is taken off by where the sum
// begins.
constexpr int INT8_ZERO = 128;
struct Weights8 { I v; };
inline Weights8 load_weights8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// Where the sum of a row's group begins, and that as a vector.
inline int32_t int8_start(int32_t activation_sum) { return -INT8_ZERO * activation_sum; }
inline I int8_begin(const int32_t* start) { return splat_int(*start); }
inline I dot8(I acc, Weights8 w, const Act8* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(acc, w.v, _mm512_set1_epi32(four));
}

struct Weights4 { I low, high; };
inline Weights4 load_weights4(const uint8_t* p) {
  const I both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
}
using Sum4 = I;
inline Sum4 sum4_zero() { return _mm512_setzero_si512(); }
inline Sum4 dot4(Sum4 acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
inline I splat4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
inline I sum4_int(Sum4 v) { return v; }

#elif KERNELS_AVX2

constexpr int ISA = 1, L = 8, INT8_K = 2;
using Act8 = int16_t;
using F = __m256;
using I = __m256i;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F splat(float v) { return _mm256_set1_ps(v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F load(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(uint16_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I to_int(F v) { return _mm256_cvtps_epi32(v); }
inline I splat_int(int32_t v) { return _mm256_set1_epi32(v); }
inline F scaled(F v, F n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}

inline float maximum(F v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t total(I v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline __m128i narrow16(I v) {
  return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
inline void store_narrow(int16_t* p, I v) { _mm_storeu_si128((__m128i*)p, narrow16(v)); }
inline void store_narrow(int8_t* p, I v) {
  const __m128i words = narrow16(v);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

constexpr int INT8_ZERO = 0;
struct Weights8 { I v; };
inline Weights8 load_weights8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))};
}
inline int32_t int8_start(int32_t) { return 0; }
inline I int8_begin(const int32_t*) { return _mm256_setzero_si256(); }
inline I dot8(I acc, Weights8 w, const Act8* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  // Written out, because compilers add into the product's register and then copy it to the sum's.
  asm volatile("vpaddd %1, %0, %0" : "+v"(acc) : "v"(_mm256_madd_epi16(w.v, _mm256_set1_epi32(two))));
  return acc;
}

struct Weights4 { I low, high; };
inline Weights4 load_weights4(const uint8_t* p) {
  const I both = _mm256_loadu_si256((const I*)p), mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16(both, 4), mask)};
}
// 16-bit sums: a group of 32 adds 16 products of at most 15 x 127 into each, 30,480 < 32,768.
using Sum4 = I;
inline Sum4 sum4_zero() { return _mm256_setzero_si256(); }
inline Sum4 dot4(Sum4 acc, I w, I x) {
  asm volatile("vpaddw %1, %0, %0" : "+v"(acc) : "v"(_mm256_maddubs_epi16(w, x)));
  return acc;
}
inline I splat4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline I sum4_int(Sum4 v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

#else

constexpr int ISA = 0, L = 8, INT8_K = 4;
using Act8 = int8_t;
struct F { float v[L]; };
struct I { int32_t v[L]; };

#define KERNELS_EACH(result, expression)      \
  result out;                                 \
  for (int i = 0; i < L; ++i) out.v[i] = (expression); \
  return out

inline F load(const float* p) { KERNELS_EACH(F, p[i]); }
inline void store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
inline F splat(float v) { KERNELS_EACH(F, v); }
inline F fma(F a, F b, F c) { KERNELS_EACH(F, a.v[i] * b.v[i] + c.v[i]); }
inline F add(F a, F b) { KERNELS_EACH(F, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { KERNELS_EACH(F, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { KERNELS_EACH(F, a.v[i] * b.v[i]); }
inline F div(F a, F b) { KERNELS_EACH(F, a.v[i] / b.v[i]); }
inline F max(F a, F b) { KERNELS_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F abs(F a) { KERNELS_EACH(F, std::fabs(a.v[i])); }
inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude =
      exponent == 0    ? std::ldexp((float)mantissa, -24)
      : exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : INFINITY)
                       : std::ldexp((float)(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int step = exponent < -13 ? -24 : exponent - 11;
  const int steps = (int)std::nearbyint(std::ldexp(magnitude, -step));
  return sign | (uint16_t)(exponent < -13 ? steps : ((exponent + 13) << 10) + steps);
}
inline F load(const uint16_t* p) { KERNELS_EACH(F, half_to_float(p[i])); }
inline void store(uint16_t* p, F v) {
  for (int i = 0; i < L; ++i) p[i] = float_to_half(v.v[i]);
}
inline F to_float(I v) { KERNELS_EACH(F, (float)v.v[i]); }
inline I to_int(F v) { KERNELS_EACH(I, (int32_t)std::nearbyint(v.v[i])); }
inline I splat_int(int32_t v) { KERNELS_EACH(I, v); }
inline float scaled_one(float v, float n) {
  uint32_t bits, power;
  std::memcpy(&bits, &v, 4);
  std::memcpy(&power, &n, 4);
  bits += power << 23;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline F scaled(F v, F n) { KERNELS_EACH(F, scaled_one(v.v[i], n.v[i])); }

inline float maximum(F v) {
  float most = v.v[0];
  for (int i = 1; i < L; ++i) most = most > v.v[i] ? most : v.v[i];
  return most;
}
inline int32_t total(I v) {
  int32_t all = 0;
  for (int i = 0; i < L; ++i) all += v.v[i];
  return all;
}
inline I add_int(I a, I b) { KERNELS_EACH(I, a.v[i] + b.v[i]); }
inline void store_narrow(int8_t* p, I v) {
  for (int i = 0; i < L; ++i) p[i] = (int8_t)v.v[i];
}

constexpr int INT8_ZERO = 0;
struct Weights8 { int8_t v[4 * L]; };
inline Weights8 load_weights8(const uint8_t* p) {
  Weights8 out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline int32_t int8_start(int32_t) { return 0; }
inline I int8_begin(const int32_t*) { return splat_int(0); }
inline int32_t join(const int8_t* w, const int8_t* x) {
  return w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
}
inline I dot8(I acc, Weights8 w, const Act8* x) { KERNELS_EACH(I, acc.v[i] + join(w.v + 4 * i, x)); }

struct Bytes { int8_t v[4 * L]; };
struct Weights4 { Bytes low, high; };
inline Weights4 load_weights4(const uint8_t* p) {
  Weights4 out;
  for (int i = 0; i < 4 * L; ++i) {
    out.low.v[i] = p[i] & 15;
    out.high.v[i] = p[i] >> 4;
  }
  return out;
}
using Sum4 = I;
inline Sum4 sum4_zero() { return splat_int(0); }
inline Bytes splat4(const int8_t* x) {
  Bytes out;
  for (int i = 0; i < L; ++i) std::memcpy(out.v + 4 * i, x, 4);
  return out;
}
inline Sum4 dot4(Sum4 acc, Bytes w, Bytes x) { KERNELS_EACH(I, acc.v[i] + join(w.v + 4 * i, x.v + 4 * i)); }
inline I sum4_int(Sum4 v) { return v; }

#undef KERNELS_EACH
#endif

// Two vectors side by side are what every product computes for a row.
constexpr int NR = 2 * L;
constexpr int GROUP = 32;

inline F zero() { return splat(0.0f); }

// Keep a running sum in a register, and work on sums in the order written: left alone, compilers
// load for all rows first and then have no registers left for the sums.
#if KERNELS_AVX512 || KERNELS_AVX2
#define KERNELS_PIN(value) asm volatile("" : "+v"(value))
#else
#define KERNELS_PIN(value) (void)0
#endif

// Always in the same order.
inline float sum(F v) {
  float lanes[L];
  store(lanes, v);
  for (int step = L / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// Adding this to a number rounds it to a whole one, which then stands in the mantissa's low bits.
constexpr float WHOLE = 12582912.0f;

// 2^(r + n) for |r| <= 1/2 and n as `scaled` takes it: 1 + r p(r), p fitted for the least largest
// relative error (9e-8), and exactly 1 at 0.
inline F power(F r, F n) {
  F series = splat(1.326472731307149e-3f);
  series = fma(series, r, splat(9.671512991189957e-3f));
  series = fma(series, r, splat(5.550733581185341e-2f));
  series = fma(series, r, splat(0.24022242426872253f));
  series = fma(series, r, splat(0.6931470036506653f));
  return scaled(fma(series, r, splat(1.0f)), n);
}
// 2^x for x <= 127. Below -126 it stays at what it is there.
inline F exp2(F x) {
  const F bounded = max(x, splat(-126.0f)), n = add(bounded, splat(WHOLE));
  return power(sub(bounded, sub(n, splat(WHOLE))), n);
}
// e^x for x <= 88, within 2 units in the last place. Below -87 it stays at what it is there.
inline F exp(F x) {
  const F bounded = max(x, splat(-87.0f));
  const F n = fma(bounded, splat(1.44269504f), splat(WHOLE)), whole = sub(n, splat(WHOLE));
  // ln 2 in two parts: a whole number times the first is exact, with a fused product or without.
  F r = fma(whole, splat(-0.693359375f), bounded);
  r = fma(whole, splat(2.12194440e-4f), r);
  return power(mul(r, splat(1.44269504f)), n);
}

}  // namespace kernels
