// Batch normalization of a training batch in one operation, and its gradient in another.
//
//   z        = gamma * (x - mean) / sqrt(variance + epsilon) + beta + residual
//   y        = activation(z)
//   g        = dy where the activation passes z on, otherwise 0
//   dbeta    = sum(g)
//   dgamma   = sum(g * (x - mean)) / sqrt(variance + epsilon)
//   dx       = gamma / sqrt(variance + epsilon)
//              * (g - dbeta / N - dgamma / N * (x - mean) / sqrt(variance + epsilon))
//   dresidual = g
// Source: Ioffe & Szegedy, "Batch Normalization", 2015 (arXiv:1502.03167), section 3.
//
// Memory is what a batch norm takes time for, so x is read twice forward, for the statistics
// and for the output, and x and dy twice backward, for the two sums and for dx; z is computed
// again. The second pass goes through the tensors from the end, where the caches still hold
// what the first one read last; of tensors that they cannot hold, it writes past them.
//
// The work is cut into units of about 128 KB, which a cache of the second level holds, by
// the shape alone: whatever the number of threads, the same numbers are added in the same
// order. In a unit, sums over a few rows are float32 for each place of a row, of deviations
// from a mean of the unit's own; theirs are float64, and Chan's formula merges the units
// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
// One source for C++11 (TensorFlow 1.15) and C++17, of plain loops that compilers vectorise.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#define INLINE inline __attribute__((always_inline))

// Compiled for several processors, of which the fastest that runs it is taken when the library
// is loaded. The build gives BN_TF1_CLONES where the compiler has it: GNU's for x86-64.
#ifdef BN_TF1_CLONES
#define CLONED __attribute__((target_clones(BN_TF1_CLONES)))
#else
#define CLONED
#endif

// What is written may be what is read, place by place: no iteration needs another's result.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace bn_tf1 {
// ------------------------------------------------------------------------------ numbers

// As they are stored; all arithmetic is float32, or float64 for float64.
struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <typename T> struct Wide { typedef float type; };
template <> struct Wide<double> { typedef double type; };

// The same bits as another type.
template <typename To, typename From> INLINE To bits_as(From value) {
  To to;
  return std::memcpy(&to, &value, sizeof to), to;
}
template <typename T> INLINE T load(T value) { return value; }
INLINE float load(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
INLINE float load(Half value) {
  // Exponents begin 112 lower. Of a subnormal number, 2^-14 is added and taken away again.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t more = exponent == 0x0f800000u ? 224u : exponent == 0 ? 113u : 112u;
  const float absolute = bits_as<float>(magnitude + (more << 23)) -
                         bits_as<float>(exponent == 0 ? 113u << 23 : 0u);
  return bits_as<float>(bits_as<uint32_t>(absolute) | (value.bits & 0x8000u) << 16);
}
template <typename A> INLINE void store(A value, A* to) { *to = value; }
// Both round to nearest, ties to even, as TensorFlow's casts do.
INLINE void store(float value, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = uint16_t(is_nan ? 0x7fc0u : rounded);
}
INLINE void store(float value, Half* to) {
  const uint32_t sign = bits_as<uint32_t>(value) & 0x80000000u;
  const uint32_t bits = bits_as<uint32_t>(value) ^ sign;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // The addition rounds a subnormal number to the last bit that there is.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - (126u << 23);
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t small = bits < (113u << 23) ? subnormal : normal;
  to->bits = uint16_t((bits >= (143u << 23) ? special : small) | sign >> 16);
}
// With eight digits: what is less by it loses none, mostly.
INLINE float coarse(float value) {
  BFloat16 rounded;
  return store(value, &rounded), load(rounded);
}
INLINE double coarse(double value) { return value; }

// -------------------------------------------------------------------------------- units

const int64_t kUnit = 1 << 15;  // values: 128 KB of float32
const int64_t kMostPlaces = 1024, kLanes = 128;
const int64_t kPlaces = 512;  // so many sums, and what they are made of, the first level holds
const int64_t kAhead = 512;  // so long before it is read, a value is asked for

// One piece of work: `rows` rows of `width` neighbours, the beginnings of two rows `stride`
// apart, and `tail` values after the last row, which lie as in the beginning of one.
// A row holds `channels` channels `repeat` times: all of them after each other, or each by
// itself `repeat` times where `is_planar`.
struct Unit {
  int64_t offset, rows, stride, width, tail;
  int64_t first_channel, channels, repeat;
  int64_t part;  // where what it finds is kept, among that of others for the same channels
  bool is_planar;
  int64_t count() const { return (rows * width + tail) / channels; }
  int64_t ahead() const { return width < stride ? stride : kAhead; }  // of what is read then
};
// Cuts a tensor of [outer, channels, inner] into units, for the caches and the vectors.
class Layout {
 public:
  // For rows of about `wanted` values, where all channels are neighbours.
  Layout(const int64_t sizes[3], int64_t wanted)
      : outer_(sizes[0]), channels_(sizes[1]), inner_(sizes[2]) {
    is_columns_ = inner_ > 1 ? inner_ <= kMostPlaces : channels_ > kPlaces;
    if (is_columns_) {
      // Columns of some channels, about equally many, through several of the outermost size.
      places_ = divide_up(channels_, divide_up(channels_, kMostPlaces / inner_));
      columns_ = divide_up(channels_, places_);
      block_ = std::max<int64_t>(kUnit / (places_ * inner_), 1);
      parts_ = divide_up(outer_, block_);
      units_ = parts_ * columns_;
      return;
    }
    // Whole rows of several neighbours: of all channels, or of the one of a plane.
    planes_ = inner_ > 1 ? outer_ * channels_ : 1;
    length_ = inner_ > 1 ? inner_ : outer_;
    step_ = inner_ > 1 ? 1 : channels_;
    int64_t fill = 16;  // so many places fill vectors
    while (fill > 1 && step_ * fill / 2 % 16 == 0) fill /= 2;
    places_ = std::max<int64_t>((inner_ > 1 ? kLanes : wanted) / (step_ * fill), 1) * fill;
    places_ = std::min(places_, kPlaces / step_);
    block_ = std::max<int64_t>(kUnit / (places_ * step_), 1) * places_;
    pieces_ = divide_up(length_, block_);
    units_ = planes_ * pieces_;
    parts_ = units_ * step_ / channels_;
  }
  int64_t units() const { return units_; }
  // How many units there are for each channel, and the values of a channel in one of them.
  int64_t parts() const { return parts_; }
  int64_t count(int64_t part) const {
    if (is_columns_) return unit(part * columns_).count();
    return unit(part / pieces_ * (channels_ / step_) * pieces_ + part % pieces_).count();
  }
  Unit unit(int64_t i) const {
    if (is_columns_) {
      const int64_t row = i / columns_ * block_, channel = i % columns_ * places_;
      const int64_t some = std::min(places_, channels_ - channel), stride = channels_ * inner_;
      return {row * stride + channel * inner_, std::min(block_, outer_ - row), stride,
              some * inner_, 0, channel, some, inner_, i / columns_, true};
    }
    const int64_t plane = i / pieces_, first = i % pieces_ * block_;
    const int64_t rows = std::min(block_, length_ - first), width = places_ * step_;
    return {(plane * length_ + first) * step_, rows / places_, width, width,
            rows % places_ * step_, plane % channels_, step_, places_,
            plane / channels_ * pieces_ + i % pieces_, step_ == 1};
  }
 private:
  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  bool is_columns_;
  int64_t outer_, channels_, inner_, places_, block_, parts_, units_, columns_ = 1;
  int64_t planes_ = 1, length_ = 1, step_ = 1, pieces_ = 1;
};
// The kinds of coefficients:
//   z  = (x - mean) * scale + offset
//   dx = g * direct + (x - mean) * through + constant
enum { kMean, kScale, kOffset, kDirect, kThrough, kConstant, kKinds };
// What a pass makes of each place.
enum Pass { kStatistics, kOutput, kOutputWithResidual, kUnmasked, kMaskedAgain, kMaskedByOutput };

// What is done to all units of a tensor, forward or backward.
template <typename T> struct Task {
  typedef typename Wide<T>::type A;
  const T *x, *dy = nullptr;
  const T* other = nullptr;  // forward the residual; backward y, where there was a residual
  T *out = nullptr, *g = nullptr;  // y or dx; backward g, where there is y
  int64_t size, channels;
  int64_t piece;  // rows that are added up in float32: few, where the recipe's sums are short
  // More than the caches hold: rows are added up one by one.
  bool is_large, is_streamed = false;  // and what is written goes past them
  Layout layout, wide;  // for sums, four rows at a time, which are best short; for the rest
  // Of each part and channel: mean and squares around it; or sums of g and g * (x - mean).
  std::vector<double> first, second;
  std::vector<A> coefficients;  // [kind, channels]
  Pass pass = kStatistics;      // that which writes `out`
  A low, high;                  // between which the activation passes z on
  Task(const T* x, const int64_t sizes[3], bool is_masked, double high)
      : x(x), size(sizes[0] * sizes[1] * sizes[2]), channels(sizes[1]),
        piece(size < 1024 * channels ? 4 : size < 8192 * channels ? 16 : 64),
        is_large(size * sizeof(T) > 8 << 20),
        layout(sizes, is_large ? kPlaces : 256 / sizeof(T)), wide(sizes, kPlaces),
        first(layout.parts() * channels), second(first), coefficients(kKinds * channels),
        low(is_masked ? 0 : -high), high(high) {}
};
// Coefficients of a unit, from one for each channel to one for each place of a row.
template <typename A> INLINE void spread(const Unit& u, const A* by_channel, A* by_place) {
  for (int64_t i = 0; !u.is_planar && i < u.repeat; ++i) {
    for (int64_t c = 0; c < u.channels; ++c) by_place[i * u.channels + c] = by_channel[c];
  }
  for (int64_t c = 0; u.is_planar && c < u.channels; ++c) {
    for (int64_t i = 0; i < u.repeat; ++i) by_place[c * u.repeat + i] = by_channel[c];
  }
}
// Adds the sums at each place of a row to those by channel.
template <typename A> INLINE void fold(const Unit& u, const A* by_place, double* by_channel) {
  for (int64_t i = 0; !u.is_planar && i < u.repeat; ++i, by_place += u.channels) {
    for (int64_t c = 0; c < u.channels; ++c) by_channel[c] += by_place[c];
  }
  for (int64_t c = 0; u.is_planar && c < u.channels; ++c) {
    double sums[8] = {0};  // none waits for another
    int64_t i = 0;
    for (; i + 8 <= u.repeat; i += 8, by_place += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += by_place[k];
    }
    for (int k = 0; i < u.repeat; ++i, ++by_place) sums[k++] += *by_place;
    for (double sum : sums) by_channel[c] += sum;
  }
}
// ------------------------------------------------------------------------------- passes

// One place of a row: `at` in the tensor, `j` in the row, of which `kinds` are coefficients.
template <typename T> struct Place {
  typedef typename Wide<T>::type A;
  const T *x, *dy, *other;
  T* kept;
  const A (*kinds)[kMostPlaces];
  int64_t piece;
  bool is_large;
  A low, high;
  // With the first `last` and one kinds, which it spreads.
  INLINE Place(const Task<T>& t, const Unit& u, int last, A (*kinds)[kMostPlaces])
      : x(t.x), dy(t.dy), other(t.other), kept(t.g), kinds(kinds), piece(t.piece),
        is_large(t.is_large), low(t.low), high(t.high) {
    for (int kind = 0; kind <= last; ++kind) {
      spread(u, &t.coefficients[kind * t.channels + u.first_channel], kinds[kind]);
    }
  }
  // The difference comes first: a mean of hundreds of deviations costs no digits.
  INLINE A deviation(int64_t at, int64_t j) const { return A(load(x[at])) - kinds[kMean][j]; }
  INLINE A z(int64_t at, int64_t j) const {
    return deviation(at, j) * kinds[kScale][j] + kinds[kOffset][j];
  }
  INLINE A activated(A z) const {
    z = z < low ? low : z;  // NaN stays NaN
    return z > high ? high : z;
  }
  // A product, as in TensorFlow, so that the compiler does not wait for z to load dy.
  INLINE A passed(int64_t at, A z) const { return A(load(dy[at])) * A((z > low) & (z < high)); }
  // Asks for what comes next: the processor looks ahead within a page of memory alone.
  template <int pass> INLINE void ask(int64_t at, int64_t width) const {
    for (int64_t i = at; i < at + width; i += 64 / sizeof(T)) {
      __builtin_prefetch(x + i);
      if (pass >= kUnmasked) __builtin_prefetch(dy + i);
      if (pass == kOutputWithResidual || pass == kMaskedByOutput) __builtin_prefetch(other + i);
    }
  }
  template <int pass> INLINE A g(int64_t at, int64_t j) const {
    if (pass == kStatistics) return deviation(at, j);
    if (pass == kUnmasked) return A(load(dy[at]));
    if (pass == kMaskedAgain) return passed(at, z(at, j));
    const A g = passed(at, A(load(other[at])));
    store(g, kept + at);
    return g;
  }
  template <int pass> INLINE A written(int64_t at, int64_t j) const {
    if (pass == kOutput) return activated(z(at, j));
    if (pass == kOutputWithResidual) return activated(z(at, j) + A(load(other[at])));
    return g<pass>(at, j) * kinds[kDirect][j] +
           (deviation(at, j) * kinds[kThrough][j] + kinds[kConstant][j]);
  }
};
// Sums of g and of g * (x - mean), place by place. Four rows at a time, so that sums are loaded
// and stored a quarter as often; where it waits for memory, one by one, as they lie there.
template <int pass, typename T, typename A>
INLINE void sum_rows(const Unit& u, const Place<T>& p, A* sum, A* product) {
  const int64_t s = u.stride;
  int64_t row = 0;
  for (int64_t j = 0; j < u.width; ++j) sum[j] = product[j] = 0;
  for (; !(p.is_large && u.width == s) && row + 4 <= u.rows; row += 4) {
    const int64_t at = u.offset + row * s;
    for (int64_t begin = 0, end; begin < u.width; begin = end) {
      end = std::min(begin + kLanes, u.width);
      // In portions, between which it adds. Where no mask delays it, it looks ahead by itself.
      for (int64_t k = 4; pass != kUnmasked && k < 8 && row + k < u.rows; ++k) {
        p.template ask<pass>(at + k * s + begin, end - begin);
      }
      INDEPENDENT
      for (int64_t j = begin; j < end; ++j) {
        const int64_t a = at + j, b = a + s, c = b + s, d = c + s;
        const A g0 = p.template g<pass>(a, j), g1 = p.template g<pass>(b, j);
        const A g2 = p.template g<pass>(c, j), g3 = p.template g<pass>(d, j);
        sum[j] += (g0 + g1) + (g2 + g3);
        product[j] += (g0 * p.deviation(a, j) + g1 * p.deviation(b, j)) +
                      (g2 * p.deviation(c, j) + g3 * p.deviation(d, j));
      }
    }
  }
  for (; row <= u.rows; ++row) {
    const int64_t at = u.offset + row * s, width = row < u.rows ? u.width : u.tail;
    for (int64_t begin = 0, end; begin < width; begin = end) {
      end = std::min(begin + kLanes, width);
      p.template ask<pass>(at + begin + u.ahead(), end - begin);
      INDEPENDENT
      for (int64_t j = begin; j < end; ++j) {
        const A g = p.template g<pass>(at + j, j);
        sum[j] += g;
        product[j] += g * p.deviation(at + j, j);
      }
    }
  }
}
// By channel, in float64 from pieces so short that float32 loses little.
template <int pass, typename T>
INLINE void add_up(const Unit& u, const Place<T>& p, double* sums, double* products) {
  alignas(64) typename Wide<T>::type sum[kMostPlaces], product[kMostPlaces];
  for (double* all : {sums, products}) std::fill_n(all, u.channels, 0);
  Unit piece = u;
  for (int64_t row = 0; row < std::max<int64_t>(u.rows, 1); row += p.piece) {
    piece.offset = u.offset + row * u.stride;
    piece.rows = std::min(u.rows - row, p.piece);
    piece.tail = row + p.piece < u.rows ? 0 : u.tail;
    sum_rows<pass>(piece, p, sum, product);
    fold(u, sum, sums);
    fold(u, product, products);
  }
}
// To memory, past the caches, a line of them at a time where that can be. The caller fences.
#ifdef __SSE2__
#define STREAM(TARGET, V, LOAD, STORE)                                                      \
  __attribute__((target(TARGET))) void stream(const void* from, int64_t bytes, void* to) {  \
    const bool fits = (reinterpret_cast<uintptr_t>(to) | bytes) % sizeof(V) == 0;           \
    if (!fits) std::memcpy(to, from, bytes);                                                \
    for (int64_t i = 0; fits && i < bytes / int64_t(sizeof(V)); ++i) {                      \
      STORE(static_cast<V*>(to) + i, LOAD(static_cast<const V*>(from) + i));                \
    }                                                                                       \
  }
STREAM("default", __m128i, _mm_load_si128, _mm_stream_si128)
#ifdef BN_TF1_CLONES
STREAM("avx512f", __m512i, _mm512_load_si512, _mm512_stream_si512)
#endif
#else
void stream(const void* from, int64_t bytes, void* to) { std::memcpy(to, from, bytes); }
#endif
template <int pass, typename T> INLINE void write_rows(const Unit& u, const Place<T>& p,
                                                       const Task<T>& t) {
  alignas(64) T line[kLanes];
  for (int64_t row = 0; row <= u.rows; ++row) {
    const int64_t width = row < u.rows ? u.width : u.tail;
    for (int64_t begin = 0; begin < width; begin += kLanes) {
      const int64_t at = u.offset + row * u.stride + begin, some = std::min(width - begin, kLanes);
      p.template ask<pass>(at + u.ahead(), some);
      for (int64_t j = 0; !t.is_streamed && j < some; j += 64 / sizeof(T)) {
        __builtin_prefetch(t.out + at + u.ahead() + j, 1);
      }
      T* to = t.is_streamed ? line : t.out + at;
      INDEPENDENT
      for (int64_t j = 0; j < some; ++j) store(p.template written<pass>(at + j, begin + j), to + j);
      if (t.is_streamed) stream(line, some * sizeof(T), t.out + at);
    }
  }
#ifdef __SSE2__
  if (t.is_streamed) _mm_sfence();  // before another thread is told that the unit is done
#endif
}
// Mean, and sum of squares around it, of one unit.
template <typename T> INLINE void unit_statistics(Task<T>& t, const Unit& u) {
  typedef typename Wide<T>::type A;
  alignas(64) A shift[1][kMostPlaces] = {}, shifts[kMostPlaces];
  double sums[kMostPlaces], squared[kMostPlaces];
  const Place<T> place(t, u, -1, shift);
  // A first shift, from some values of each channel.
  Unit some = u;
  some.rows = std::min(u.rows, std::max<int64_t>(std::min<int64_t>(16 / u.repeat, 4), 1));
  if (some.rows > 0) some.tail = 0;
  add_up<kStatistics>(some, place, sums, squared);
  for (int64_t c = 0; c < u.channels; ++c) shifts[c] = coarse(A(sums[c] / some.count()));
  const double count = double(u.count());
  for (int turn = 0; turn < 2; ++turn) {
    spread(u, shifts, shift[0]);
    add_up<kStatistics>(u, place, sums, squared);
    // A shift more than two deviations away costs digits; a second turn, in the cache, little.
    bool is_far = false;
    for (int64_t c = 0; c < u.channels; ++c) {
      const double square = sums[c] * sums[c];
      is_far = is_far || square > 4 * (count * squared[c] - square);
    }
    if (!is_far || turn > 0) break;
    for (int64_t c = 0; c < u.channels; ++c) shifts[c] += A(sums[c] / count);
  }
  const int64_t to = u.part * t.channels + u.first_channel;
  for (int64_t c = 0; c < u.channels; ++c) {
    const double around_mean = squared[c] - sums[c] * sums[c] / count;
    t.first[to + c] = double(shifts[c]) + sums[c] / count;
    t.second[to + c] = around_mean < 0 ? 0 : around_mean;  // NaN stays NaN
  }
}
template <typename T> INLINE void unit_sums(Task<T>& t, const Unit& u) {
  typedef typename Wide<T>::type A;
  alignas(64) A kinds[kOffset + 1][kMostPlaces];
  double sums[kMostPlaces], products[kMostPlaces];
  const Place<T> place(t, u, t.pass == kMaskedAgain ? kOffset : kMean, kinds);
  if (t.pass == kUnmasked) add_up<kUnmasked>(u, place, sums, products);
  if (t.pass == kMaskedAgain) add_up<kMaskedAgain>(u, place, sums, products);
  if (t.pass == kMaskedByOutput) add_up<kMaskedByOutput>(u, place, sums, products);
  const int64_t to = u.part * t.channels + u.first_channel;
  std::copy_n(sums, u.channels, &t.first[to]);
  std::copy_n(products, u.channels, &t.second[to]);
}
template <typename T> INLINE void unit_results(const Task<T>& t, const Unit& u) {
  alignas(64) typename Wide<T>::type kinds[kKinds][kMostPlaces];
  Place<T> place(t, u, t.pass < kUnmasked ? kOffset : kConstant, kinds);
  if (t.pass == kOutput) return write_rows<kOutput>(u, place, t);
  if (t.pass == kOutputWithResidual) return write_rows<kOutputWithResidual>(u, place, t);
  if (t.pass == kMaskedAgain) return write_rows<kMaskedAgain>(u, place, t);
  if (t.pass == kMaskedByOutput) place.dy = t.g;  // masked already
  write_rows<kUnmasked>(u, place, t);
}
#define FOR_STORED(T)                                                                \
  CLONED void find_statistics(Task<T>& t, const Unit& u) { unit_statistics(t, u); }  \
  CLONED void find_sums(Task<T>& t, const Unit& u) { unit_sums(t, u); }              \
  CLONED void find_results(Task<T>& t, const Unit& u) { unit_results(t, u); }
FOR_STORED(float) FOR_STORED(double) FOR_STORED(BFloat16) FOR_STORED(Half)

// --------------------------------------------------------------------------- operations
using namespace tensorflow;  // NOLINT: of its many names this file needs a dozen
using shape_inference::InferenceContext;
typedef decltype(errors::Internal("")) Result;  // the Status of either version
#define NEED(...) OP_REQUIRES_OK(context, (__VA_ARGS__))

// TensorFlow's numbers, and the same bits here.
template <typename T> struct Stored { typedef T type; };
template <> struct Stored<tensorflow::bfloat16> { typedef BFloat16 type; };
template <> struct Stored<Eigen::half> { typedef Half type; };

template <typename S> S* values(const Tensor& tensor) {
  return reinterpret_cast<S*>(const_cast<char*>(tensor.tensor_data().data()));
}
// What both operations are told, and the way through all units.
template <typename T> class Operation : public OpKernel {
 public:
  typedef typename Stored<T>::type S;
  typedef typename Wide<S>::type A;
  explicit Operation(OpKernelConstruction* context) : OpKernel(context) {
    float rounded, rest;
    std::string activation;
    NEED(context->GetAttr("axis", &axis_));
    NEED(context->GetAttr("epsilon", &rounded));
    NEED(context->GetAttr("epsilon_rest", &rest));
    NEED(context->GetAttr("unbiased", &unbiased_));
    NEED(context->GetAttr("activation", &activation));
    epsilon_ = double(rounded) + rest;
    is_masked_ = activation != "none";
    high_ = activation == "relu6" ? 6 : INFINITY;
  }
 protected:
  // Sizes before the channels, of them and after them; those of gamma and beta must fit.
  Result sizes(OpKernelContext* context, int x_index, int gamma, int64_t sizes[3]) const {
    const Tensor& x = context->input(x_index);
    if (axis_ >= x.dims()) {
      return errors::InvalidArgument("axis is ", axis_, ", x ", x.shape().DebugString());
    }
    sizes[0] = sizes[1] = sizes[2] = 1;
    for (int i = 0; i < x.dims(); ++i) sizes[(i >= axis_) + (i > axis_)] *= x.dim_size(i);
    const Result fits = check(context, gamma, TensorShape({sizes[1]}));
    return fits.ok() ? check(context, gamma + 1, TensorShape({sizes[1]})) : fits;
  }
  static Result check(OpKernelContext* context, int index, const TensorShape& wanted) {
    const TensorShape& shape = context->input(index).shape();
    return shape == wanted ? Result() : errors::InvalidArgument(
        "input ", index, " has shape ", shape.DebugString(), ", not ", wanted.DebugString());
  }
  // Whether `tensors` tensors like x are more than the last cache holds, as Linux tells (glibc's
  // sysconf adds up several). Not of 16 bits, which take longer to convert than to write.
  static bool exceed_cache(int tensors, const Tensor& x) {
    static const int64_t kilobytes = [] {
      int64_t told = 0;  // from "32768K", or where there is no such file
      std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> told;
      return told;
    }();
    return sizeof(S) > 2 && kilobytes > 0 && tensors * int64_t(x.TotalBytes()) > kilobytes << 10;
  }
  // The same forward and backward, so that the activation passes on there what it did here.
  // The offset makes up for what the mean loses when it is rounded.
  static void set_output(const A* gamma, const A* beta, const double* mean, Task<S>* t) {
    const int64_t channels = t->channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = double(gamma[c]) * mean[channels + c], rest = mean[c] - A(mean[c]);
      t->coefficients[kMean * channels + c] = A(mean[c]);
      t->coefficients[kScale * channels + c] = A(scale);
      t->coefficients[kOffset * channels + c] = A(double(beta[c]) - rest * scale);
    }
  }
  // In TensorFlow's own pool. Each unit writes to places of its own, and a thread that is done
  // with one takes the next: all end together. The second pass over a tensor goes from the end.
  static void for_each_unit(OpKernelContext* context, Task<S>& t, bool is_second,
                            void (*work)(Task<S>&, const Unit&)) {
    const Layout& layout = is_second ? t.wide : t.layout;
    const int64_t units = layout.units();
    std::atomic<int64_t> next;
    next = 0;  // at last, and read at the end: that tells a sanitizer what the pool orders
    context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
        units, t.size / units /* cycles, about */, [&](int64_t, int64_t) {
          for (int64_t i = next++; i < units; i = next++) {
            work(t, layout.unit(is_second ? units - 1 - i : i));
          }
        });
    next.load();
  }
  int axis_;
  double epsilon_, high_;
  bool unbiased_, is_masked_;
};
template <typename T> class Forward : public Operation<T> {
 public:
  typedef typename Operation<T>::S S;
  typedef typename Operation<T>::A A;
  explicit Forward(OpKernelConstruction* context) : Operation<T>(context) {}
  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    int64_t sizes[3];
    NEED(this->sizes(context, 0, 1, sizes));
    const int64_t channels = sizes[1];
    Tensor *y, *mean, *variance, *kept;
    OP_REQUIRES(context, context->num_inputs() < 5, errors::InvalidArgument("two residuals"));
    const bool has_residual = context->num_inputs() > 3;
    if (has_residual) NEED(this->check(context, 3, x.shape()));
    const std::vector<int> forwarded(has_residual, 3);  // which is written over, if it may be
    NEED(context->forward_input_or_allocate_output(forwarded, 0, x.shape(), &y));
    NEED(context->allocate_output(1, {channels}, &mean));
    NEED(context->allocate_output(2, {channels}, &variance));
    NEED(context->allocate_output(3, {2, channels}, &kept));
    A *means = values<A>(*mean), *variances = values<A>(*variance);
    double *exact = values<double>(*kept), *inverses = exact + channels;
    for (A* moments : {means, variances}) std::fill_n(moments, channels, A(NAN));
    std::fill_n(exact, 2 * channels, NAN);
    if (x.NumElements() == 0) return;  // with what 0 / 0 is
    Task<S> t(values<S>(x), sizes, this->is_masked_, this->high_);
    t.other = has_residual ? values<S>(context->input(3)) : nullptr;
    t.pass = has_residual ? kOutputWithResidual : kOutput;
    t.out = values<S>(*y);
    t.is_streamed = t.out != t.other && this->exceed_cache(2, x);
    this->for_each_unit(context, t, false, find_statistics);
    // Of all parts, into the first of them: by Chan's formula, one after the other.
    double count = double(t.layout.count(0));
    for (int64_t part = 1; part < t.layout.parts(); ++part) {
      const double more = double(t.layout.count(part)), share = more / (count + more);
      for (int64_t c = 0; c < channels; ++c) {
        const double difference = t.first[part * channels + c] - t.first[c];
        t.first[c] += difference * share;
        t.second[c] += t.second[part * channels + c] + difference * difference * count * share;
      }
      count += more;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double biased = t.second[c] / count;
      exact[c] = t.first[c];
      inverses[c] = 1 / std::sqrt(biased + this->epsilon_);
      means[c] = A(exact[c]);
      variances[c] = A(this->unbiased_ && count > 1 ? t.second[c] / (count - 1) : biased);
    }
    this->set_output(values<A>(context->input(1)), values<A>(context->input(2)), exact, &t);
    this->for_each_unit(context, t, true, find_results);
  }
};
template <typename T> class Backward : public Operation<T> {
 public:
  typedef typename Operation<T>::S S;
  typedef typename Operation<T>::A A;
  explicit Backward(OpKernelConstruction* context) : Operation<T>(context) {
    NEED(context->GetAttr("outputs", &outputs_));
    NEED(context->GetAttr("moments", &moments_));
    OP_REQUIRES(context, outputs_ < 2 && (moments_ == 0 || moments_ == 2),
                errors::InvalidArgument("outputs is ", outputs_, ", moments is ", moments_));
  }
  void Compute(OpKernelContext* context) override {
    const Tensor &x = context->input(1), &kept = context->input(4);
    int64_t sizes[3];
    NEED(this->sizes(context, 1, 2, sizes));
    const int64_t channels = sizes[1];
    NEED(this->check(context, 0, x.shape()));
    NEED(this->check(context, 4, {2, channels}));
    const int moments = 5 + outputs_;  // where they begin
    for (int i = 5; i < context->num_inputs(); ++i) {
      NEED(this->check(context, i, i < moments ? x.shape() : TensorShape({channels})));
    }
    // What is read for the last time is written over, where nobody else needs it.
    Tensor *dx, *dgamma, *dbeta, *g = nullptr;
    NEED(context->forward_input_or_allocate_output({outputs_ > 0 ? 5 : 0}, 0, x.shape(), &dx));
    NEED(context->allocate_output(1, {channels}, &dgamma));
    NEED(context->allocate_output(2, {channels}, &dbeta));
    if (outputs_) NEED(context->forward_input_or_allocate_output({0}, 3, x.shape(), &g));
    A *dgammas = values<A>(*dgamma), *dbetas = values<A>(*dbeta);
    for (A* sums : {dgammas, dbetas}) std::fill_n(sums, channels, A(0));
    if (x.NumElements() == 0) return;
    const A* gamma = values<A>(context->input(2));
    const double *mean = values<double>(kept), *inverse = mean + channels;
    Task<S> t(values<S>(x), sizes, this->is_masked_, this->high_);
    this->set_output(gamma, values<A>(context->input(3)), mean, &t);
    t.dy = values<S>(context->input(0));
    t.other = outputs_ ? values<S>(context->input(5)) : nullptr;
    t.pass = outputs_ ? kMaskedByOutput : this->is_masked_ ? kMaskedAgain : kUnmasked;
    t.g = outputs_ ? values<S>(*g) : nullptr;
    t.out = values<S>(*dx);
    t.is_streamed = t.out != t.dy && t.out != t.other && this->exceed_cache(3, x);
    this->for_each_unit(context, t, false, find_sums);
    for (int64_t i = channels; i < t.layout.parts() * channels; ++i) {
      t.first[i % channels] += t.first[i];
      t.second[i % channels] += t.second[i];
    }
    const double count = double(t.size / channels);
    const double divisor = this->unbiased_ && count > 1 ? count - 1 : count;
    for (int64_t c = 0; c < channels; ++c) {
      // The products are with x less the rounded mean: the rest comes here.
      const double rest = mean[c] - double(A(mean[c])), sum = t.first[c];
      const double slope = (t.second[c] - rest * sum) * inverse[c];
      const double direct = double(gamma[c]) * inverse[c];
      double through = -direct * inverse[c] * slope / count, constant = -direct * sum / count;
      if (moments_ > 0) {
        constant += values<A>(context->input(moments))[c] / count;
        through += 2 * double(values<A>(context->input(moments + 1))[c]) / divisor;
      }
      dgammas[c] = A(slope), dbetas[c] = A(sum);
      t.coefficients[kDirect * channels + c] = A(direct);
      t.coefficients[kThrough * channels + c] = A(through);
      t.coefficients[kConstant * channels + c] = A(constant - rest * through);
    }
    this->for_each_unit(context, t, true, find_results);
  }
 private:
  int outputs_, moments_;
};
Result infer_forward(InferenceContext* c) {
  int axis;
  TF_RETURN_IF_ERROR(c->GetAttr("axis", &axis));
  shape_inference::ShapeHandle x = c->input(0), parameter = c->Vector(c->UnknownDim());
  if (c->RankKnown(x) && axis < c->Rank(x)) parameter = c->Vector(c->Dim(x, axis));
  for (int i = 1; i < 3; ++i) {
    TF_RETURN_IF_ERROR(c->Merge(c->input(i), parameter, &parameter));
    c->set_output(i, parameter);
  }
  for (int i = 3; i < c->num_inputs(); ++i) TF_RETURN_IF_ERROR(c->Merge(x, c->input(i), &x));
  c->set_output(0, x);
  c->set_output(3, c->Matrix(2, c->Dim(parameter, 0)));
  return Result();
}
Result infer_backward(InferenceContext* c) {
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(i == 1 || i == 2 ? 2 : 1));
  return Result();
}
#define SETTINGS                                                                             \
  .Attr("T: {bfloat16, half, float, double}").Attr("U: {float, double}")                     \
  .Attr("axis: int >= 0").Attr("epsilon: float").Attr("epsilon_rest: float = 0.0")           \
  .Attr("unbiased: bool = false").Attr("activation: {'none', 'relu', 'relu6'} = 'none'")

// kept: mean and 1 / sqrt(variance + epsilon). The whole epsilon has the digits of a double.
REGISTER_OP("BnTf1CompiledBatchNorm")
    .Input("x: T").Input("gamma: U").Input("beta: U").Input("residual: residuals * T")
    .Output("y: T").Output("mean: U").Output("variance: U").Output("kept: double")
    .Attr("residuals: int >= 0 = 0") SETTINGS
    .SetShapeFn(infer_forward)
    .Doc("kernel=\"compiled\" of bn_tf1: call bn_tf1.compiled.load() first.");

// y: where there was a residual and an activation.
REGISTER_OP("BnTf1CompiledBatchNormGrad")
    .Input("dy: T").Input("x: T").Input("gamma: U").Input("beta: U").Input("kept: double")
    .Input("y: outputs * T").Input("dmoments: moments * U")
    .Output("dx: T").Output("dgamma: U").Output("dbeta: U").Output("dresidual: outputs * T")
    .Attr("outputs: int >= 0 = 0").Attr("moments: int >= 0 = 0") SETTINGS
    .SetShapeFn(infer_backward)
    .Doc("The gradient of BnTf1CompiledBatchNorm.");

#define KERNEL(NAME, T, U) \
  Name(NAME).Device(DEVICE_CPU).TypeConstraint<T>("T").TypeConstraint<U>("U")
#define REGISTER_BOTH(T, U)                                                       \
  REGISTER_KERNEL_BUILDER(KERNEL("BnTf1CompiledBatchNorm", T, U), Forward<T>);    \
  REGISTER_KERNEL_BUILDER(KERNEL("BnTf1CompiledBatchNormGrad", T, U), Backward<T>)

REGISTER_BOTH(tensorflow::bfloat16, float);
REGISTER_BOTH(Eigen::half, float);
REGISTER_BOTH(float, float);
REGISTER_BOTH(double, double);

}  // namespace bn_tf1
