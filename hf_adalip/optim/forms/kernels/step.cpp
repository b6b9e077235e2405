// The passes over memory of a fused step, compiled for one Spec (see kernels/__init__.py):
//
//   measure   reads what the signal x_t needs, and sums g², x² and (x - x_prev)²
//   advance   reads gradient, parameter and moments, and writes parameter, moments and history
//
// Where EARLY, it is `measure` that writes the history: what it has just read is in the cache, and
// writing is little beside its waiting for what it reads next.
//
// cpu.py defines, above this text, what depends on the Spec:
//   COUNT MOMENTS DIRECTION                         the base optimizer's formula, see rules/rule.py
//   SIGNAL                                          a word of the enumeration below
//   MOMENTUM NESTEROV EPS_IN_SQRT MAXIMIZE COUPLED  true or false
//   PARAM OPMATH HISTORY   types: of parameters, of arithmetic, of the history (void for none)
//   HALF                 whether one of them is float16
//   SKETCH               k, or 0
//   EARLY STOCHASTIC     true or false
//
// Sums are added up in an order that neither the number of threads nor the width of vectors
// changes: that all ranks have the same S, bit for bit, rests on it.

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__F16C__) && HALF
#include <immintrin.h>  // which takes as long to compile as all the rest
#endif

namespace {

// Types

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;

  explicit bfloat16(float x) {  // to the nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fc0 : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  }

  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

#if HALF  // not every compiler that has all the rest has it
using float16 = _Float16;
#else
struct float16 {};
#endif

enum class Signal { gradient, update, recomputed };

constexpr Signal signal = Signal::SIGNAL;
constexpr bool has_history = !std::is_void_v<HISTORY>;
constexpr bool written_late = has_history && !EARLY;
using Param = PARAM;
using Opmath = OPMATH;
using History = std::conditional_t<has_history, HISTORY, Opmath>;

constexpr int moments = COUNT;

constexpr int64_t block = 1024;  // elements that `measure` takes together
constexpr int64_t ahead = 512;   // elements between what is worked on and what is fetched

// And `advance`: few, so that reading goes on while it streams, if enough to convert them fast.
constexpr int64_t burst = std::is_same_v<Param, Opmath> ? 32 : 128;

constexpr int64_t chunk = std::max(16 * block, int64_t{64} * SKETCH);  // what a thread takes

// Sums that are added up side by side; of a sketch, the elements that share a hash.
constexpr int64_t lanes = SKETCH > 0 ? 32 : 128 / sizeof(Opmath);

// What cpu.py passes

struct Numbers {  // of one tensor, a row of `numbers`
  Opmath lr, correction1, correction2;
  Opmath prev_rate, prev_correction1, prev_correction2;
  Opmath rate, history_rate, decay, step;
};

struct Constants {  // of the group
  double momentum, beta1, beta2, eps, weight_decay;  // beta1 is RMSprop's alpha too
};

struct Tensors {  // rows of n numbers each
  int64_t n;
  const int64_t* rows;

  int64_t size(int64_t i) const { return rows[i]; }
  template <class T>
  T* role(int64_t row, int64_t i) const { return reinterpret_cast<T*>(rows[(1 + row) * n + i]); }
  Param* param(int64_t i) const { return role<Param>(0, i); }
  const Param* grad(int64_t i) const { return role<const Param>(1, i); }
  Param* moment(int64_t which, int64_t i) const { return role<Param>(2 + which, i); }
  History* history(int64_t i) const { return role<History>(2 + moments, i); }
  int64_t start(int64_t i) const { return rows[(3 + moments + has_history) * n + i]; }
  int64_t seed(int64_t i) const { return rows[(4 + moments + has_history) * n + i]; }
};

// The base optimizer, one element at a time

struct Moments {
  Opmath first, second;
};

struct Arithmetic {
  Opmath momentum, beta1, take1, beta2, take2, eps, weight_decay;

  explicit Arithmetic(const Constants& c)
      : momentum(c.momentum), beta1(c.beta1), take1(1 - c.beta1), beta2(c.beta2),
        take2(1 - c.beta2), eps(c.eps), weight_decay(c.weight_decay) {}

  Opmath gradient(Opmath grad, Opmath param) const {
    if constexpr (MAXIMIZE) grad = -grad;
    if constexpr (COUPLED) grad += weight_decay * param;
    return grad;
  }

  Moments next_moments(Opmath grad, Moments old) const { return MOMENTS; }

  Opmath direction(Opmath grad, Moments m, Opmath inverse1, Opmath inverse2) const {
    return DIRECTION;
  }

  Opmath root(Opmath square) const {
    return EPS_IN_SQRT ? std::sqrt(square + eps) : std::sqrt(square) + eps;
  }
};

// Memory

template <class To, class From>
void convert(const From* __restrict from, int64_t n, To* __restrict to) {
  int64_t i = 0;
#if defined(__F16C__) && HALF  // which GCC does not use by itself
  if constexpr (std::is_same_v<From, float16> && std::is_same_v<To, float>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float16>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// n elements in another type: converted into the buffer, or as they are where that is the type.
template <class To, class From>
To* as(From* from, int64_t n, To* buffer) {
  if constexpr (std::is_same_v<std::remove_const_t<From>, To>) {
    return const_cast<To*>(from);
  } else {
    convert(from, n, buffer);
    return buffer;
  }
}

// Back from where `as` made of them.
template <class To>
void put(const Opmath* from, int64_t n, To* to) {
  if constexpr (!std::is_same_v<To, Opmath>) convert(from, n, to);
}

// Asks for elements before they are needed: the processor itself looks no further than a page.
template <int64_t count, bool written = false, class T>
void fetch(const T* from) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, written);
}

// Writes past the cache, which would read first what is about to be overwritten.
void stream(const void* from, int64_t bytes, void* to) {
  auto source = static_cast<const char*>(from);
  auto target = static_cast<char*>(to);
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(target) & 15);
  std::memcpy(target, source, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128((__m128i*)(target + i), _mm_loadu_si128((const __m128i*)(source + i)));
  std::memcpy(target + i, source + i, bytes - i);
#else
  std::memcpy(target, source, bytes);
#endif
}

// Hashes

constexpr uint32_t golden = 0x9e3779b9u;

constexpr uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// Sketch (see kernels/__init__.py)

constexpr int64_t k = std::max(SKETCH, 1);

// x with its sign turned where `sign`, 0 or 1, is set.
Opmath turned(Opmath x, uint32_t sign) {
  using Bits = std::conditional_t<sizeof(Opmath) == 4, uint32_t, uint64_t>;
  Bits bits;
  std::memcpy(&bits, &x, sizeof x);
  bits ^= Bits(sign) << (8 * sizeof x - 1);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The signs of the runs of `lanes` elements of a block, and where in the sketch they begin.
struct Runs {
  static constexpr int64_t most = SKETCH > 0 ? block / lanes + 1 : 0;
  std::array<uint32_t, most> signs, places;

  explicit Runs(int64_t index) {  // of the block's first element in its parameter
    constexpr uint32_t in_k = std::max<int64_t>(k / lanes, 1);
    const uint32_t first = index / lanes;
    for (uint32_t r = 0; r < most; ++r) {  // as vectors
      signs[r] = mix(first + r + golden);
      places[r] = ((first + r) * uint32_t(lanes) + mix((first + r) / in_k + golden * 2)) % k;
    }
  }
};

// Stochastic rounding (see optim/rounding.py)

// The words of a run of elements whose indices have the same upper half.
struct Words {
  uint32_t first = 0, key = 0;

  Words(const Tensors& tensors, const Numbers& of, int64_t i, int64_t at) {
    if constexpr (STOCHASTIC) {
      const uint64_t index = tensors.start(i) + at;
      const uint32_t seed = tensors.seed(i);
      first = uint32_t(index) + seed;
      key = mix(seed + golden * uint32_t(of.step)) + golden * uint32_t(index >> 32);
    }
  }

  uint32_t operator[](int64_t i) const { return mix(mix(first + uint32_t(i)) ^ key); }

  // How many elements are left in the half that `index` is in.
  static int64_t left(int64_t index) { return (int64_t{1} << 32) - (index & 0xffffffff); }
};

// To a neighbouring bfloat16; what is not finite stays as it is.
float rounded(float x, uint32_t word) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  bits = finite ? (bits + (word & 0xffffu)) & 0xffff0000u : bits;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Arithmetic on a block. Functions of pointers that are known to differ, and not inlined: so
// compilers make vectors of them.

struct Sources {  // what `measure` reads; and the history, which it may write
  const Param *grad, *param, *moment[2];
  History* history;

  Sources(const Tensors& tensors, int64_t i, int64_t at)
      : grad(tensors.grad(i) + at), param(tensors.param(i) + at), moment{}, history{} {
    for (int m = 0; m < moments; ++m) moment[m] = tensors.moment(m, i) + at;
    if constexpr (has_history) history = tensors.history(i) + at;
  }

  void fetch_run(int64_t i) const {
    fetch<lanes>(grad + i);
    if constexpr (COUPLED) fetch<lanes>(param + i);
    if constexpr (signal != Signal::gradient)
      for (int m = 0; m < moments; ++m) fetch<lanes>(moment[m] + i);
    if constexpr (has_history) fetch<lanes, EARLY>(history + i);
  }
};

// The sketch of x is added to k + lanes buckets: a run may pass the end, and what it adds
// there belongs to the first buckets. `index` is that of the block's first element in its parameter.
__attribute__((noinline)) void measure_block(
    const Arithmetic rules, const Numbers of, const int64_t n, const Opmath* __restrict grad,
    const Opmath* __restrict param, const Opmath* __restrict first, const Opmath* __restrict second,
    Opmath* __restrict history, const Sources next, const int64_t index,
    Opmath* __restrict buckets, double (*__restrict totals)[lanes]) {
  const Opmath inverse1 = 1 / of.correction1, inverse2 = 1 / of.correction2;
  const Opmath prev_inverse1 = 1 / of.prev_correction1, prev_inverse2 = 1 / of.prev_correction2;
  const Runs runs(index);
  Opmath sums[3][lanes] = {};
  const auto add = [&](int64_t i, int64_t lane, uint32_t signs, Opmath* __restrict to) {
    const Opmath g = rules.gradient(grad[i], COUPLED ? param[i] : 0);
    Opmath x = g, before = has_history ? history[i] : 0;
    if constexpr (signal != Signal::gradient) {
      const Moments old{moments > 0 ? first[i] : 0, moments > 1 ? second[i] : 0};
      x = -of.lr * rules.direction(g, rules.next_moments(g, old), inverse1, inverse2);
      if constexpr (signal == Signal::recomputed) {
        const Opmath d = rules.direction(0, old, prev_inverse1, prev_inverse2);
        before = of.prev_rate == 0 ? 0 : -of.prev_rate * d;
      }
      sums[1][lane] += x * x;
    }
    if constexpr (SKETCH > 0) to[lane] += turned(x, signs >> lane & 1);
    sums[0][lane] += g * g;
    sums[2][lane] += (x - before) * (x - before);
    if constexpr (EARLY) history[i] = x;
  };
  int64_t i = 0, r = 0;
  const auto add_run = [&](int64_t begin, auto end) {
    const uint32_t signs = SKETCH > 0 ? runs.signs[r] : 0;
    Opmath* __restrict to = SKETCH > 0 ? buckets + runs.places[r] : nullptr;
    for (int64_t lane = begin; lane < end; ++lane) add(i + lane - begin, lane, signs, to);
    i += end - begin, ++r;
  };
  // A sketch's first run may have begun in the block before.
  if (const int64_t begin = SKETCH > 0 ? index % lanes : 0) add_run(begin, std::min(lanes, begin + n));
  while (i + lanes <= n) {
    next.fetch_run(i);
    add_run(0, std::integral_constant<int64_t, lanes>());
  }
  if (i < n) add_run(0, n - i);
  for (int sum = 0; sum < 3; ++sum)
    for (int64_t lane = 0; lane < lanes; ++lane) totals[sum][lane] += sums[sum][lane];
}

__attribute__((noinline)) void advance_block(
    const Arithmetic rules, const Numbers of, const int64_t n, const Opmath* __restrict grad,
    Opmath* __restrict param, Opmath* __restrict first, Opmath* __restrict second,
    Opmath* __restrict history, const Words words) {
  const Opmath inverse1 = 1 / of.correction1, inverse2 = 1 / of.correction2;
  for (int64_t i = 0; i < n; ++i) {
    const Opmath g = rules.gradient(grad[i], param[i]);
    const Moments old{moments > 0 ? first[i] : 0, moments > 1 ? second[i] : 0};
    const Moments next = rules.next_moments(g, old);
    const Opmath d = rules.direction(g, next, inverse1, inverse2);
    if constexpr (moments > 0) first[i] = next.first;
    if constexpr (moments > 1) second[i] = next.second;
    param[i] = param[i] * of.decay - of.rate * d;
    if constexpr (STOCHASTIC) param[i] = rounded(param[i], words[i]);
    if constexpr (written_late)
      history[i] = signal == Signal::gradient ? g : -of.history_rate * d;
  }
}

// Work

struct Chunk {
  int64_t tensor, first, size;
  int64_t before;  // elements of the chunks before it
};

template <class Takes>
std::vector<Chunk> cut(const Tensors& tensors, const Takes& takes) {
  std::vector<Chunk> chunks;
  int64_t before = 0;
  for (int64_t i = 0; i < tensors.n; ++i)
    for (int64_t first = 0, size = takes(i) ? tensors.size(i) : 0; first < size; first += chunk) {
      chunks.push_back({i, first, std::min(chunk, size - first), before});
      before += chunks.back().size;
    }
  return chunks;
}

// Calls work(number of a chunk), each thread for a run of chunks with as many elements as others.
template <class Work>
void share(const std::vector<Chunk>& chunks, int threads, bool backwards, const Work& work) {
  if (chunks.empty()) return;
  const int64_t total = chunks.back().before + chunks.back().size;
  threads = std::min<int64_t>(threads, 1 + total / chunk);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    const auto edge = [&](int64_t before) {
      const auto less = [](const Chunk& c, int64_t value) { return c.before < value; };
      return std::lower_bound(chunks.begin(), chunks.end(), before, less) - chunks.begin();
    };
    const int64_t begin = edge(total * me / all), end = edge(total * (me + 1) / all);
    for (int64_t i = begin; i < end; ++i) work(backwards ? begin + end - 1 - i : i);
  }
}

}  // namespace

// out: [n, 3 + SKETCH].
extern "C" void measure(int64_t n, const int64_t* rows, const Numbers* numbers,
                        const Constants* constants, int threads, Opmath* out) {
  const Tensors tensors{n, rows};
  const auto chunks = cut(tensors, [](int64_t) { return true; });
  std::vector<std::array<double, 3>> squares(chunks.size());
  const int64_t width = SKETCH > 0 ? SKETCH + lanes : 0;
  const std::unique_ptr<Opmath[]> parts(new Opmath[chunks.size() * width]);

  share(chunks, threads, false, [&](int64_t number) {
    const auto [i, first, size, _] = chunks[number];
    const Arithmetic rules(*constants);
    alignas(64) Opmath buffers[5][block];
    double totals[3][lanes] = {};
    Opmath* const buckets = parts.get() + number * width;
    std::fill_n(buckets, width, Opmath(0));

    for (int64_t at = first, end = first + size; at < end; at += block) {
      const int64_t count = std::min(block, end - at);
      const Sources from(tensors, i, at), next(tensors, i, at + ahead);
      const Opmath *grad = as(from.grad, count, buffers[0]), *param = nullptr;
      const Opmath* moment[2] = {nullptr, nullptr};
      Opmath* history = nullptr;
      if constexpr (COUPLED) param = as(from.param, count, buffers[1]);
      if constexpr (signal != Signal::gradient)
        for (int m = 0; m < moments; ++m) moment[m] = as(from.moment[m], count, buffers[2 + m]);
      if constexpr (has_history) history = as(from.history, count, buffers[4]);
      const int64_t index = SKETCH > 0 ? tensors.start(i) + at : 0;
      measure_block(rules, numbers[i], count, grad, param, moment[0], moment[1], history, next,
                    index, buckets, totals);
      if constexpr (EARLY) put(history, count, from.history);
    }
    for (int sum = 0; sum < 3; ++sum)
      squares[number][sum] = std::accumulate(totals[sum], totals[sum] + lanes, 0.0);
    if constexpr (SKETCH > 0)
      for (int64_t lane = 0; lane < lanes; ++lane) buckets[lane] += buckets[SKETCH + lane];
  });

  std::vector<int64_t> firsts(n + 1);  // chunk of each tensor
  for (const Chunk& c : chunks) ++firsts[c.tensor + 1];
  std::partial_sum(firsts.begin(), firsts.end(), firsts.begin());
#pragma omp parallel for num_threads(threads) if (SKETCH > 0)
  for (int64_t i = 0; i < n; ++i) {
    Opmath *const norms = out + i * (3 + SKETCH), *const sketch = norms + 3;
    double sums[3] = {};
    std::fill_n(sketch, SKETCH, Opmath(0));
    for (int64_t number = firsts[i]; number < firsts[i + 1]; ++number) {
      for (int sum = 0; sum < 3; ++sum) sums[sum] += squares[number][sum];
      for (int64_t b = 0; b < SKETCH; ++b) sketch[b] += parts[number * width + b];
    }
    norms[0] = std::sqrt(sums[0]);
    norms[1] = signal == Signal::gradient ? norms[0] : std::sqrt(sums[1]);
    norms[2] = SKETCH > 0 ? 0 : std::sqrt(sums[2]);
  }
}

// active: [n]; where false, only the history is written: zeros.
extern "C" void advance(int64_t n, const int64_t* rows, const Numbers* numbers,
                        const Constants* constants, int threads, const bool* active) {
  const Tensors tensors{n, rows};
  const auto chunks = cut(tensors, [&](int64_t i) { return has_history || active[i]; });

  // Backwards: what `measure` read last may still be in the cache.
  share(chunks, threads, true, [&](int64_t number) {
    const auto [i, first, size, _] = chunks[number];
    const Arithmetic rules(*constants);
    alignas(64) Opmath buffers[5][burst];
    alignas(64) History narrow[burst];

    if (!active[i]) {  // never without a history, as those were not cut
      if constexpr (has_history) std::memset(tensors.history(i) + first, 0, size * sizeof(History));
      return;
    }
    for (int64_t at = first, end = first + size, count; at < end; at += count) {
      count = std::min(burst, end - at);
      if constexpr (STOCHASTIC) count = std::min(count, Words::left(tensors.start(i) + at));
      fetch<burst>(tensors.grad(i) + at + ahead);
      fetch<burst, true>(tensors.param(i) + at + ahead);
      for (int m = 0; m < moments; ++m) fetch<burst, true>(tensors.moment(m, i) + at + ahead);
      const Opmath* grad = as(tensors.grad(i) + at, count, buffers[0]);
      Opmath *param = as(tensors.param(i) + at, count, buffers[1]), *moment[2] = {nullptr, nullptr};
      for (int m = 0; m < moments; ++m)
        moment[m] = as(tensors.moment(m, i) + at, count, buffers[2 + m]);
      advance_block(rules, numbers[i], count, grad, param, moment[0], moment[1], buffers[4],
                    Words(tensors, numbers[i], i, at));
      put(param, count, tensors.param(i) + at);
      for (int m = 0; m < moments; ++m) put(moment[m], count, tensors.moment(m, i) + at);
      if constexpr (written_late)
        stream(as(buffers[4], count, narrow), count * sizeof(History), tensors.history(i) + at);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
  });
}
