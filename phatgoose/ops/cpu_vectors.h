// Vectors of W floats, as GCC and Clang know them (`vector_size`), for cpu_kernels.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

using Bfloat16 = uint16_t;  // the upper half of a float32

// The widest vector of the instruction set that this file is compiled for.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(2 * W), aligned(2), may_alias));
};
template <int W>
using Vector = typename Lanes<W>::Float;

template <int W>
inline Vector<W> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::Unaligned*>(from);
}

template <int W>
inline Vector<W> load(const Bfloat16* from) {
  auto half = *reinterpret_cast<const typename Lanes<W>::Half*>(from);
  auto bits = __builtin_convertvector(half, typename Lanes<W>::Int) << 16;
  return (Vector<W>)bits;  // the same bits
}

template <int W>
inline void store(float* to, Vector<W> value) {
  *reinterpret_cast<typename Lanes<W>::Unaligned*>(to) = value;
}

inline float to_float(Bfloat16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline Bfloat16 to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return Bfloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <int W>
inline float sum(Vector<W> value) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += value[lane];
  return total;
}

// The sum of `terms(n, W)`, the W terms from n on, for all n < count.
template <class Terms>
inline float total_over(int64_t count, Terms terms) {
  Vector<kWidth> totals = {};
  int64_t n = 0;
  for (; n + kWidth <= count; n += kWidth)
    totals += terms(n, std::integral_constant<int, kWidth>());
  float total = sum<kWidth>(totals);
  for (; n < count; ++n) total += terms(n, std::integral_constant<int, 1>())[0];
  return total;
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, and for minus infinity.
template <int W>
inline Vector<W> exp_of_negative(Vector<W> x) {
  using Int = typename Lanes<W>::Int;
  Int tiny = x < -87.0f;
  x = tiny ? Vector<W>{} - 87.0f : x;
  Int whole = __builtin_convertvector(x * 1.44269504f - 0.5f, Int);  // rounds to the nearest
  Vector<W> n = __builtin_convertvector(whole, Vector<W>);
  Vector<W> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<W> p = ((((r * (1 / 720.f) + 1 / 120.f) * r + 1 / 24.f) * r + 1 / 6.f) * r + 0.5f);
  p = (p * r + 1.0f) * r + 1.0f;
  Int bits = (whole + 127) << 23;
  p *= (Vector<W>)bits;
  return tiny ? Vector<W>{} : p;
}

}  // namespace
