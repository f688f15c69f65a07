// Routed LoRA on a CPU: choose experts for each token, and add what they say to a linear's output.
//
// Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token,
// R LoRA rank, N = T * K pairs of a token and an expert, sorted by expert.
//
//     route   tokens are split among threads: 1 / std(x), scores, top-k, softmax
//     sort    one thread sorts the pairs by expert: a matrix is read once for all its tokens
//     shrink  pairs are split among threads: h_NR = weight_N * (x A_e)
//     expand  outputs are split among threads: y_TO += h_NR B_e, in place, without collisions
//
// This is a plain shared library without a Python interface; phatgoose/ops/compiled.py loads it
// with ctypes. It is compiled once for each instruction set (setup.py). The OpenMP runtime is the
// one that PyTorch has loaded: a second one in the same process would fight it for the cores.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// What does not change from call to call: one linear, its experts, and the rule of its router.
struct Experts {
  int64_t inputs, outputs, experts, rank, top_k;
  int32_t bfloat16;     // 1: factors and y are bfloat16, otherwise float32
  int32_t factorwise;   // 1: y += (sum_k w_k B_k) (sum_k w_k A_k) x, otherwise sum_k w_k B_k A_k x
  int32_t standardise;  // 1: scores are divided by the standard deviation of x
  int32_t absolute;     // 1: scores are absolute values
  int32_t equal;        // 1: the kept experts have equal weights
  float std_epsilon, sum_epsilon;
  const void* lora_A_EDR;
  const void* lora_B_ERO;
  const float* gates_ED;    // null if scores come from elsewhere
  const uint8_t* absent_E;  // null if every expert adapts this linear
};

// What one call reads and writes. Rows of x and y may be apart; the others are contiguous.
struct Call {
  int64_t tokens, threads, x_stride, y_stride;
  const float* x_TD;
  void* y_TO;
  const float* scores_TE;  // null: gates_ED @ x, or nothing to route if that is null too
  const float* bias_TE;    // added to the scores; null for no bias
  float* weights_TK;       // what was routed, or is to be mixed
  int64_t* indices_TK;
};

enum Status : int32_t { kDone = 0, kNoSuchExpert = 1 };

// ---- Route --------------------------------------------------------------------------------------

float inverse_std(const float* x_D, int64_t D, float epsilon) {
  const float mean = total_over(D, [&](int64_t d, auto w) { return load<w()>(x_D + d); }) / D;
  const float square = total_over(D, [&](int64_t d, auto w) {
    auto centered = load<w()>(x_D + d) - mean;
    return centered * centered;
  });
  return 1.0f / std::sqrt(square / D + epsilon);
}

// scores_E = gates_ED @ x_D for few tokens, where a matrix product would cost more to start.
void score(const float* x_D, const float* gates_ED, int64_t E, int64_t D, float* scores_E) {
  for (int64_t e = 0; e < E; ++e)
    scores_E[e] = total_over(D, [&](int64_t d, auto w) {
      return load<w()>(x_D + d) * load<w()>(gates_ED + e * D + d);
    });
}

// The `top_k` best of one token's scores, best first, and their weights.
void select(const Experts& on, const float* raw_E, float scale, const float* bias_E,
            float* scores_E, float* weights_K, int64_t* indices_K) {
  const float nothing = -std::numeric_limits<float>::infinity();
  const auto better = [](float a, float b) { return a > b || (a != a && b == b); };  // NaN first
  const int64_t E = on.experts, K = on.top_k;
  for (int64_t e = 0; e < E; ++e) {
    float score = raw_E[e] * scale;
    scores_E[e] = on.absolute ? std::fabs(score) : score;
  }
  if (bias_E)
    for (int64_t e = 0; e < E; ++e) scores_E[e] += bias_E[e];
  if (on.absent_E)
    for (int64_t e = 0; e < E; ++e) scores_E[e] = on.absent_E[e] ? nothing : scores_E[e];

  int64_t kept = 0;
  float* best_K = weights_K;  // until they become weights
  for (int64_t e = 0; e < E; ++e) {
    float score = scores_E[e];
    if (kept == K && !better(score, best_K[K - 1])) continue;
    int64_t place = kept < K ? kept++ : K - 1;
    for (; place > 0 && better(score, best_K[place - 1]); --place) {
      best_K[place] = best_K[place - 1];
      indices_K[place] = indices_K[place - 1];
    }
    best_K[place] = score;
    indices_K[place] = e;
  }

  const float largest = best_K[0];
  float present = 0;
  for (int64_t k = 0; k < K; ++k) present += best_K[k] > nothing;
  if (on.equal || largest == nothing) {  // without any expert a weight is not a number, or 0
    for (int64_t k = 0; k < K; ++k) {
      const bool absent = on.absent_E && on.absent_E[indices_K[k]];
      weights_K[k] = absent ? 0 : (best_K[k] > nothing) / present;
    }
    return;
  }
  const float total = total_over(E, [&](int64_t e, auto w) {
    return exp_of_negative<w()>(load<w()>(scores_E + e) - largest);
  });
  float share = 0;
  for (int64_t k = 0; k < K; ++k) share += weights_K[k] = std::exp(best_K[k] - largest) / total;
  for (int64_t k = 0; k < K; ++k) weights_K[k] /= share + on.sum_epsilon;
}

// ---- Shrink and expand --------------------------------------------------------------------------

// Rows and vectors of a tile: as many sums as there are registers for.
constexpr int kShrinkRows = kWidth == 16 ? 8 : 4, kShrinkVectors = 2;
constexpr int kExpandRows = 4, kExpandVectors = kWidth == 16 ? 4 : 2;

template <class F>
inline void prefetch(const F* from) {
  __builtin_prefetch(from, 0, 2);
}

// h[t] = x[t] A for `T` tokens and `V` vectors of `W` ranks; meanwhile fetches the next expert's A.
// A single chain of additions would wait for each result: few accumulators are made several.
template <int W, int T, int V, class F>
void shrink_tile(const float* const* x, const F* a, const F* next, int64_t D, int64_t R, float* h) {
  constexpr int kChains = T * V >= 8 ? 1 : 8 / (T * V);
  Vector<W> totals[kChains][T][V] = {};
  int64_t d = 0;
  for (; d + kChains <= D; d += kChains) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      const F* row = a + (d + c) * R;
      if (next) prefetch(next + (d + c) * R);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vector<W> factor = load<W>(row + v * W);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) totals[c][t][v] += factor * x[t][d + c];
      }
    }
  }
  for (; d < D; ++d)
    for (int v = 0; v < V; ++v)
      for (int t = 0; t < T; ++t) totals[0][t][v] += load<W>(a + d * R + v * W) * x[t][d];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) {
      Vector<W> total = totals[0][t][v];
      for (int c = 1; c < kChains; ++c) total += totals[c][t][v];
      store<W>(h + t * R + v * W, total);
    }
}

// Covers `width` columns from `begin` on with vectors of W, then of W / 2, and so on.
template <int W, int T, class F>
void shrink_rows(const float* const* x, const F* a, const F* next, int64_t D, int64_t R, float* h,
                 int64_t begin = 0) {
  for (; begin + kShrinkVectors * W <= R; begin += kShrinkVectors * W)
    shrink_tile<W, T, kShrinkVectors>(x, a + begin, next ? next + begin : next, D, R, h + begin);
  for (; begin + W <= R; begin += W)
    shrink_tile<W, T, 1>(x, a + begin, next ? next + begin : next, D, R, h + begin);
  if constexpr (W > 1)
    if (begin < R) shrink_rows<W / 2, T>(x, a, next, D, R, h, begin);
}

// y[t] += h[t] B for `T` tokens and `V` vectors of `W` outputs; fetches the next expert's B.
template <int W, int T, int V, class F>
void expand_tile(const float* const* h, const F* b, const F* next, int64_t R, int64_t O,
                 float* const* y, int64_t o) {
  Vector<W> totals[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) totals[t][v] = load<W>(y[t] + o + v * W);
  for (int64_t r = 0; r < R; ++r) {
    if (next)
      for (int v = 0; v < V; ++v) prefetch(next + r * O + o + v * W);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vector<W> factor = load<W>(b + r * O + o + v * W);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) totals[t][v] += factor * h[t][r];
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) store<W>(y[t] + o + v * W, totals[t][v]);
}

template <int W, int T, class F>
void expand_rows(const float* const* h, const F* b, const F* next, int64_t R, int64_t O,
                 float* const* y, int64_t begin, int64_t end) {
  for (; begin + kExpandVectors * W <= end; begin += kExpandVectors * W)
    expand_tile<W, T, kExpandVectors>(h, b, next, R, O, y, begin);
  for (; begin + W <= end; begin += W) expand_tile<W, T, 1>(h, b, next, R, O, y, begin);
  if constexpr (W > 1)
    if (begin < end) expand_rows<W / 2, T>(h, b, next, R, O, y, begin, end);
}

// Calls `tile` with a constant number of rows, 8, 4, 2 or 1, until all `rows` are done.
template <int Most, class Tile>
inline void in_tiles(int64_t rows, Tile tile) {
  int64_t row = 0;
  for (; row + Most <= rows; row += Most) tile(std::integral_constant<int, Most>(), row);
  if constexpr (Most > 1)
    if (row < rows)
      in_tiles<Most / 2>(rows - row, [&](auto count, int64_t at) { tile(count, row + at); });
}

// ---- One call -----------------------------------------------------------------------------------

struct Run {  // the pairs of one expert
  int64_t expert, begin, end;
};

struct Pairs {
  std::vector<int32_t> token_N, place_N;  // of each sorted pair, and where each pair went
  std::vector<Run> runs;
  std::unique_ptr<float[]> h_NR;
};

bool sort_pairs(const Experts& on, const Call& call, Pairs& pairs) {
  const int64_t N = call.tokens * on.top_k;
  std::vector<int32_t> next_E(on.experts + 1, 0);
  for (int64_t n = 0; n < N; ++n) {
    if (call.indices_TK[n] < 0 || call.indices_TK[n] >= on.experts) return false;
    ++next_E[call.indices_TK[n] + 1];
  }
  for (int64_t e = 0; e < on.experts; ++e) {
    if (next_E[e + 1]) pairs.runs.push_back({e, next_E[e], next_E[e] + next_E[e + 1]});
    next_E[e + 1] += next_E[e];
  }
  pairs.token_N.resize(N);
  pairs.place_N.resize(N);
  for (int64_t n = 0; n < N; ++n) {
    int32_t place = next_E[call.indices_TK[n]]++;
    pairs.token_N[place] = int32_t(n / on.top_k);
    pairs.place_N[n] = place;
  }
  pairs.h_NR.reset(new float[N * on.rank]);
  return true;
}

template <class F>
void shrink(const Experts& on, const Call& call, const Pairs& pairs, int64_t begin, int64_t end) {
  const int64_t D = on.inputs, R = on.rank;
  const F* a_EDR = static_cast<const F*>(on.lora_A_EDR);
  for (size_t i = 0; i < pairs.runs.size(); ++i) {
    const Run& run = pairs.runs[i];
    int64_t first = std::max(run.begin, begin), last = std::min(run.end, end);
    if (first >= last) continue;
    const F* next = i + 1 < pairs.runs.size() ? a_EDR + pairs.runs[i + 1].expert * D * R : nullptr;
    in_tiles<kShrinkRows>(last - first, [&](auto count, int64_t row) {
      constexpr int T = count();
      const float* x[T];
      for (int t = 0; t < T; ++t) x[t] = call.x_TD + pairs.token_N[first + row + t] * call.x_stride;
      shrink_rows<kWidth, T>(x, a_EDR + run.expert * D * R, row ? nullptr : next, D, R,
                             &pairs.h_NR[(first + row) * R]);
    });
  }
}

// Weighs the pairs of some tokens. Where factors are mixed, all of a token's pairs share one sum.
void weigh(const Experts& on, const Call& call, const Pairs& pairs, int64_t begin, int64_t end) {
  const int64_t K = on.top_k, R = on.rank;
  std::vector<float> total_R(R);
  for (int64_t t = begin; t < end; ++t) {
    std::fill(total_R.begin(), total_R.end(), 0.0f);
    for (int64_t n = t * K; n < (t + 1) * K; ++n) {
      float* h_R = &pairs.h_NR[pairs.place_N[n] * R];
      for (int64_t r = 0; r < R; ++r) total_R[r] += h_R[r] *= call.weights_TK[n];
    }
    if (!on.factorwise) continue;
    for (int64_t n = t * K; n < (t + 1) * K; ++n) {
      float* h_R = &pairs.h_NR[pairs.place_N[n] * R];
      for (int64_t r = 0; r < R; ++r) h_R[r] = total_R[r] * call.weights_TK[n];
    }
  }
}

template <class F>
void expand(const Experts& on, const Pairs& pairs, float* y_TO, int64_t y_stride, int64_t begin,
            int64_t end) {
  const int64_t R = on.rank, O = on.outputs;
  const F* b_ERO = static_cast<const F*>(on.lora_B_ERO);
  for (size_t i = 0; i < pairs.runs.size(); ++i) {
    const Run& run = pairs.runs[i];
    const F* next = i + 1 < pairs.runs.size() ? b_ERO + pairs.runs[i + 1].expert * R * O : nullptr;
    for (int64_t first = run.begin; first < run.end;) {
      // A token that has this expert twice must not be twice in one tile.
      int64_t last = first + 1;
      while (last < run.end && pairs.token_N[last] != pairs.token_N[last - 1]) ++last;
      in_tiles<kExpandRows>(last - first, [&](auto count, int64_t row) {
        constexpr int T = count();
        const float* h[T];
        float* y[T];
        for (int t = 0; t < T; ++t) {
          h[t] = &pairs.h_NR[(first + row + t) * R];
          y[t] = y_TO + pairs.token_N[first + row + t] * y_stride;
        }
        expand_rows<kWidth, T>(h, b_ERO + run.expert * R * O, row ? nullptr : next, R, O, y, begin,
                               end);
      });
      first = last;
    }
  }
}

// The share of one thread: [begin, end) of `count`, in whole multiples of `step`.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int64_t step = 1) {
    int64_t threads = 1, thread = 0;
#ifdef _OPENMP
    threads = omp_get_num_threads(), thread = omp_get_thread_num();
#endif
    int64_t steps = (count + step - 1) / step;
    begin = std::min(count, steps * thread / threads * step);
    end = std::min(count, steps * (thread + 1) / threads * step);
  }
};

// Routes where there are scores or gates, and mixes.
template <class F>
int32_t run(const Experts& on, const Call& call) {
  constexpr bool kHalf = sizeof(F) == 2;
  const int64_t T = call.tokens, D = on.inputs, O = on.outputs, E = on.experts, K = on.top_k;
  const bool routes = call.scores_TE || on.gates_ED;
  // Where y is bfloat16, sums over experts are taken in float32 and rounded once.
  std::unique_ptr<float[]> scores_TE(routes ? new float[T * E] : nullptr);
  std::unique_ptr<float[]> sums_TO(kHalf ? new float[T * O] : nullptr);
  float* y_TO = kHalf ? sums_TO.get() : static_cast<float*>(call.y_TO);
  const int64_t y_stride = kHalf ? O : call.y_stride;
  Pairs pairs;
  bool sorted = true;

#pragma omp parallel num_threads(int(call.threads)) if (call.threads > 1)
  {
    const Share tokens(T), outputs(O, kWidth);
    if (routes && !call.scores_TE) {
      const Share gates(E, 4);  // split by experts, as the tokens may be fewer than the threads
      for (int64_t t = 0; t < T; ++t)
        score(call.x_TD + t * call.x_stride, on.gates_ED + gates.begin * D,
              gates.end - gates.begin, D, &scores_TE[t * E + gates.begin]);
#pragma omp barrier
    }
    for (int64_t t = tokens.begin; routes && t < tokens.end; ++t) {
      const float* x_D = call.x_TD + t * call.x_stride;
      const float scale = on.standardise ? inverse_std(x_D, D, on.std_epsilon) : 1.0f;
      const float* raw_E = (call.scores_TE ? call.scores_TE : scores_TE.get()) + t * E;
      select(on, raw_E, scale, call.bias_TE ? call.bias_TE + t * E : nullptr, &scores_TE[t * E],
             call.weights_TK + t * K, call.indices_TK + t * K);
    }
#pragma omp barrier
#pragma omp single
    sorted = sort_pairs(on, call, pairs);
    if (sorted) {
      const Share share(T * K);
      shrink<F>(on, call, pairs, share.begin, share.end);
#pragma omp barrier
      weigh(on, call, pairs, tokens.begin, tokens.end);
#pragma omp barrier
      for (int64_t t = 0; kHalf && t < T; ++t)
        std::fill(y_TO + t * O + outputs.begin, y_TO + t * O + outputs.end, 0.0f);
      expand<F>(on, pairs, y_TO, y_stride, outputs.begin, outputs.end);
      for (int64_t t = 0; kHalf && t < T; ++t)
        for (int64_t o = outputs.begin; o < outputs.end; ++o) {
          Bfloat16& y = static_cast<Bfloat16*>(call.y_TO)[t * call.y_stride + o];
          y = to_bfloat16(to_float(y) + sums_TO[t * O + o]);
        }
    }
  }
  return sorted ? kDone : kNoSuchExpert;
}

}  // namespace

extern "C" {

int32_t phatgoose_run(const Experts* on, int64_t tokens, int64_t threads, int64_t x_stride,
                      int64_t y_stride, const float* x_TD, void* y_TO, const float* scores_TE,
                      const float* bias_TE, float* weights_TK, int64_t* indices_TK) {
  const Call call{tokens, threads, x_stride, y_stride, x_TD,
                  y_TO, scores_TE, bias_TE, weights_TK, indices_TK};
  return on->bfloat16 ? run<Bfloat16>(*on, call) : run<float>(*on, call);
}

// Names what was compiled: a digest of the source, and the compiler.
const char* phatgoose_build() { return PHATGOOSE_SOURCE " " __VERSION__; }
}
