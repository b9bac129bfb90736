// Sixteen numbers at a time: the only file that knows the instruction set.
//
// `Lanes` are 16 floats; `Words` are 16 units of 4 bytes, each one float32 or one pair of bfloat16.
// A matrix operand is read word by word, so that every kernel is written once for both types:
// `dot<T>` multiplies the words of two operands and adds them to 16 sums.
//
// AVX-512 (with or without its bfloat16 instructions) has code of its own; anything else uses the
// vectors of the compiler, two halves of eight, which is AVX2 + FMA where the CPU has it.
//
// Multiplications and additions fuse only where `fma` says so (the library is compiled with
// -ffp-contract=off): the same formula gives the same bits in every kernel.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t word = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    to.bits = std::isnan(x) ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

// Rows of a register block: 12 x 2 sums and two operands fill the 32 registers.
constexpr int MAX_ROWS = 12;

using Lanes = __m512;
using Words = __m512i;

inline Lanes fill(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes root(Lanes x) { return _mm512_sqrt_ps(x); }
// A number as its nearest whole one and the rest.
struct Split {
    Lanes whole, fraction;
};
inline Split split(Lanes x) {  // infinities have no fraction
    const Lanes fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return {x - fraction, fraction};
}
// x * 2^n for whole n.
inline Lanes scale2(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }
// Keeps lanes first <= i < last, the others become `other`, whatever they are, NaN too.
inline Lanes keep(Lanes x, int first, int last, Lanes other) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask = _mm512_cmp_epi32_mask(index, _mm512_set1_epi32(first), _MM_CMPINT_NLT) &
                           _mm512_cmp_epi32_mask(index, _mm512_set1_epi32(last), _MM_CMPINT_LT);
    return _mm512_mask_blend_ps(mask, other, x);
}
inline float first(Lanes x) { return _mm512_cvtss_f32(x); }
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest(Lanes x) { return _mm512_reduce_max_ps(x); }

inline Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Words load_words(const uint32_t* p, int count) {
    return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), p);
}
inline void store_words(uint32_t* p, Words x) { _mm512_storeu_si512(p, x); }
inline Words fill_words(uint32_t x) { return _mm512_set1_epi32(int(x)); }

template <class T>
Lanes dot(Lanes sums, Words a, Words b);
template <>
inline Lanes dot<float>(Lanes sums, Words a, Words b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sums);
}
#if defined(__AVX512BF16__)
template <>
inline Lanes dot<bf16>(Lanes sums, Words a, Words b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}
inline void store(bf16* p, Lanes x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}
#else
template <>
inline Lanes dot<bf16>(Lanes sums, Words a, Words b) {
    const Words high = _mm512_set1_epi32(int(0xffff0000));
    sums = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                           _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sums);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, high)), sums);
}
inline void store(bf16* p, Lanes x) {
    const __m512i word = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
#endif
inline Lanes load(const bf16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// Adds to 16 whole numbers the products of four unsigned bytes of `a` and signed ones of `b` each.
inline Words dot_bytes(Words sums, Words a, Words b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, a, b);
#else
    const Words bytes = _mm512_set1_epi16(255);
    const Words even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), odd = _mm512_srai_epi16(b, 8);
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_and_si512(a, bytes), even));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_srli_epi16(a, 8), odd));
#endif
}
inline Words even_nibbles(Words x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Words odd_nibbles(Words x) { return even_nibbles(_mm512_srli_epi32(x, 4)); }
// 16 whole numbers, less `offset`.
inline Lanes numbers(const uint32_t* p, int32_t offset) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(load_words(p), _mm512_set1_epi32(offset)));
}

// Words of 16 columns: pairs of (a[i], b[i]), the first in the lower half.
inline Words pair_up(const bf16* a, const bf16* b) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same of 32 columns.
inline void pair_up32(const bf16* a, const bf16* b, uint32_t* to) {
    alignas(64) static constexpr auto order = [] {
        std::array<uint16_t, 64> index{};
        for (int i = 0; i < 64; ++i) index[i] = uint16_t(i / 2 + i % 2 * 32);
        return index;
    }();
    const __m512i one = _mm512_loadu_si512(a), two = _mm512_loadu_si512(b);
    const auto* p = order.data();
    store_words(to, _mm512_permutex2var_epi16(one, _mm512_load_si512(p), two));
    store_words(to + LANES, _mm512_permutex2var_epi16(one, _mm512_load_si512(p + 32), two));
}

// to[i * to_stride + j] = from[j * from_stride + i] for 16 rows of `count` <= 16 words.
inline void transpose16(const uint32_t* from, size_t from_stride, int count, uint32_t* to,
                        size_t to_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load_words(from + i * from_stride, count);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (int i = 0; i < count; ++i) store_words(to + i * to_stride, a[i]);
}

#else  // any other CPU

#if defined(__aarch64__)
constexpr int MAX_ROWS = 4;  // 32 registers of 4 floats
#else
constexpr int MAX_ROWS = 3;  // 16 registers of 8 floats
#endif

typedef float Half __attribute__((vector_size(32)));
typedef uint32_t HalfWords __attribute__((vector_size(32)));
struct Lanes {
    Half low, high;
};
struct Words {
    HalfWords low, high;
};

inline Lanes fill(float x) { return {Half{} + x, Half{} + x}; }
inline Lanes load(const float* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
inline Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
inline Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
inline Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
inline Lanes operator/(Lanes a, Lanes b) { return {a.low / b.low, a.high / b.high}; }
#if defined(__FMA__)
inline Half fma(Half a, Half b, Half c) {
    return (Half)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
inline Half fma(Half a, Half b, Half c) { return a * b + c; }
#endif
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

template <class F>
inline Lanes each(Lanes x, F f) {
    for (int i = 0; i < 8; ++i) x.low[i] = f(x.low[i], i);
    for (int i = 0; i < 8; ++i) x.high[i] = f(x.high[i], i + 8);
    return x;
}
inline Half larger(Half a, Half b) { return a > b ? a : b; }
inline Lanes larger(Lanes a, Lanes b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline Half smaller(Half a, Half b) { return a < b ? a : b; }
inline Lanes smaller(Lanes a, Lanes b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
struct Split {
    Lanes whole, fraction;
};
inline Split split(Lanes x) {
    // Infinities have no fraction: far below is 0 and far above infinite all the same.
    x = smaller(larger(x, fill(-1000.0f)), fill(1000.0f));
    const Lanes shift = fill(12582912.0f);  // rounds |x| < 2^22
    const Lanes whole = (x + shift) - shift;
    return {whole, x - whole};
}
inline Lanes root(Lanes x) {
    return each(x, [](float v, int) { return std::sqrt(v); });
}
inline Half scale2(Half x, Half n) {
    typedef int32_t Ints __attribute__((vector_size(32)));
    const Half clipped = smaller(larger(n, Half{} - 126.0f), Half{} + 128.0f);
    const Ints power = (__builtin_convertvector(clipped, Ints) + 127) << 23;
    return n < -126.0f ? Half{} : x * (Half)power;
}
inline Lanes scale2(Lanes x, Lanes n) { return {scale2(x.low, n.low), scale2(x.high, n.high)}; }
inline Lanes keep(Lanes x, int first, int last, Lanes other) {
    float values[16], others[16];
    store(values, x);
    store(others, other);
    for (int i = 0; i < 16; ++i) values[i] = i >= first && i < last ? values[i] : others[i];
    return load(values);
}
inline float first(Lanes x) { return x.low[0]; }
inline float sum(Lanes x) {
    const Half half = x.low + x.high;
    return ((half[0] + half[4]) + (half[2] + half[6])) +
           ((half[1] + half[5]) + (half[3] + half[7]));
}
inline float largest(Lanes x) {
    const Half half = larger(x.low, x.high);
    float most = half[0];
    for (int i = 1; i < 8; ++i) most = half[i] > most ? half[i] : most;
    return most;
}

inline Words load_words(const uint32_t* p) {
    Words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store_words(uint32_t* p, Words x) { std::memcpy(p, &x, sizeof x); }
inline Words fill_words(uint32_t x) { return {HalfWords{} + x, HalfWords{} + x}; }

template <class T>
Lanes dot(Lanes sums, Words a, Words b);
template <>
inline Lanes dot<float>(Lanes sums, Words a, Words b) {
    return {fma((Half)a.low, (Half)b.low, sums.low), fma((Half)a.high, (Half)b.high, sums.high)};
}
inline Half dot_pairs(Half sums, HalfWords a, HalfWords b) {
    sums = fma((Half)(a << 16), (Half)(b << 16), sums);
    return fma((Half)(a & 0xffff0000u), (Half)(b & 0xffff0000u), sums);
}
template <>
inline Lanes dot<bf16>(Lanes sums, Words a, Words b) {
    return {dot_pairs(sums.low, a.low, b.low), dot_pairs(sums.high, a.high, b.high)};
}
inline void store(bf16* p, Lanes x) {
    float values[16];
    store(values, x);
    for (int i = 0; i < 16; ++i) narrow(p[i], values[i]);
}
inline Lanes load(const bf16* p) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = widen(p[i]);
    return load(values);
}
typedef int32_t HalfInts __attribute__((vector_size(32)));
inline HalfWords dot_bytes(HalfWords sums, HalfWords a, HalfWords b) {
#if defined(__AVX2__)
    const __m256i u = (__m256i)a, s = (__m256i)b, bytes = _mm256_set1_epi16(255);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
    const __m256i sum = _mm256_add_epi32(
        _mm256_madd_epi16(_mm256_and_si256(u, bytes), even),
        _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8)));
    return sums + (HalfWords)sum;
#else
    for (int k = 0; k < 32; k += 8)
        sums += ((a >> k) & 255u) * (HalfWords)((HalfInts)(b << (24 - k)) >> 24);
    return sums;
#endif
}
inline Words dot_bytes(Words sums, Words a, Words b) {
    return {dot_bytes(sums.low, a.low, b.low), dot_bytes(sums.high, a.high, b.high)};
}
inline Words even_nibbles(Words x) { return {x.low & 0x0f0f0f0fu, x.high & 0x0f0f0f0fu}; }
inline Words odd_nibbles(Words x) { return even_nibbles({x.low >> 4, x.high >> 4}); }
inline Lanes numbers(const uint32_t* p, int32_t offset) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = float(int32_t(p[i]) - offset);
    return load(values);
}
inline Words pair_up(const bf16* a, const bf16* b) {
    uint32_t words[16];
    for (int i = 0; i < 16; ++i) words[i] = a[i].bits | uint32_t(b[i].bits) << 16;
    return load_words(words);
}
inline void pair_up32(const bf16* a, const bf16* b, uint32_t* to) {
    store_words(to, pair_up(a, b));
    store_words(to + LANES, pair_up(a + LANES, b + LANES));
}
inline void transpose16(const uint32_t* from, size_t from_stride, int count, uint32_t* to,
                        size_t to_stride) {
    for (int i = 0; i < count; ++i)
        for (int j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
}

#endif

inline Words pair_up(const float* a, const float*) {
    return load_words(reinterpret_cast<const uint32_t*>(a));
}
inline void pair_up32(const float* a, const float*, uint32_t* to) {
    std::memcpy(to, a, 2 * LANES * sizeof(float));
}

// 2^f on [-0.5, 0.5] by the polynomial of exp2f in Cephes (Moshier), to about 1 unit in the last
// place; exactly 1 at 0.
inline Lanes exp2_fraction(Lanes f) {
    Lanes y = fill(1.5353362e-4f);
    y = fma(y, f, fill(1.3398874e-3f));
    y = fma(y, f, fill(9.6184373e-3f));
    y = fma(y, f, fill(5.5503324e-2f));
    y = fma(y, f, fill(2.4022648e-1f));
    y = fma(y, f, fill(6.9314720e-1f));
    return fma(y, f, fill(1.0f));
}

// 2^x; 0 far below, infinite far above.
inline Lanes exp2(Lanes x) {
    const Split parts = split(x);
    return scale2(exp2_fraction(parts.fraction), parts.whole);
}

// 2^x for a weight that will be rounded to T: for bfloat16 a polynomial of fewer terms, true to
// 4e-5 (Taylor), which is a hundredth of what rounding takes away.
template <class T>
inline Lanes weight_of(Lanes x) {
    return exp2(x);
}
template <>
inline Lanes weight_of<bf16>(Lanes x) {
    const Split parts = split(x);
    const Lanes f = parts.fraction;
    Lanes y = fma(fill(9.6181291e-3f), f, fill(5.5504109e-2f));
    y = fma(y, f, fill(2.4022651e-1f));
    y = fma(y, f, fill(6.9314718e-1f));
    return scale2(fma(y, f, fill(1.0f)), parts.whole);
}

constexpr float LOG2_E = 1.44269504088896340736f;

inline Lanes silu(Lanes x) { return x / (fill(1.0f) + exp2(x * fill(-LOG2_E))); }

}  // namespace tandem
