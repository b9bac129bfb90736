// y = a W^T over weights of 8 or 4 bits, in whole numbers.
//
// A row of `a` is quantised as it comes, by one scale: to 8 bits (w8a8), or to 16 bits as two digits
// of 8, the higher counting 256, which loses less than bfloat16 does. Weights are stored with an
// offset that makes them unsigned, as vpdpbusd wants them; the sum of the digits takes it off again.
// Sums of whole numbers have no rounding: a row's result has the same bits in any batch.
//
// Packed layout: [tile of 32 columns][word along K][32 columns], a word being four weights of 8 bits
// of a column, or eight of 4 bits, of which the even nibbles are the first four.
#pragma once

#include "abi.h"
#include "linear.h"

// Hidden: libraries for several instruction sets in one process must not share a table of kernels.
namespace tandem __attribute__((visibility("hidden"))) {

constexpr int BYTES = 4;  // weights of a word of 8 bits

// Rows of activations as digits: [row, plane, word], and what undoes it.
struct Digits {
    const uint32_t* words;
    const float* scales;  // [row]
    const int32_t* sums;  // [row, group, plane]
};

template <int ROWS, int BITS>
__attribute__((noinline)) void multiply_bytes(const uint32_t* a, size_t a_stride, const uint32_t* b,
                                              int steps, uint32_t* to) {
    constexpr int AHEAD = 1024;
    Words sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = fill_words(0);
    for (int step = 0; step < steps; step += 8 / BITS, b += TILE) {
        const Words low = load_words(b), high = load_words(b + LANES);
        __builtin_prefetch(b + AHEAD);
        __builtin_prefetch(b + AHEAD + LANES);
        if constexpr (BITS == 8) {
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const Words row = fill_words(a[r * a_stride + step]);
                sums[r][0] = dot_bytes(sums[r][0], low, row);
                sums[r][1] = dot_bytes(sums[r][1], high, row);
            }
        } else {
            const Words low_even = even_nibbles(low), low_odd = odd_nibbles(low);
            const Words high_even = even_nibbles(high), high_odd = odd_nibbles(high);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const Words even = fill_words(a[r * a_stride + step]);
                const Words odd = fill_words(a[r * a_stride + step + 1]);
                sums[r][0] = dot_bytes(dot_bytes(sums[r][0], low_even, even), low_odd, odd);
                sums[r][1] = dot_bytes(dot_bytes(sums[r][1], high_even, even), high_odd, odd);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        store_words(to + r * TILE, sums[r][0]);
        store_words(to + r * TILE + LANES, sums[r][1]);
    }
}

class QuantizedMatrix {
 public:
    // values: [.., depth], whole numbers of `bits`; scales: [.., groups]. row_of(column) is the row
    // of both that a column takes, or -1.
    template <class RowOf>
    void pack(const tandem_matrix& from, int columns, int depth, Arena& arena, Team& team,
              RowOf row_of) {
        columns_ = columns;
        depth_ = depth;
        bits_ = from.bits;
        planes_ = from.planes;
        group_ = from.group > 0 ? from.group : int(round_up(depth, 2 * BYTES));
        groups_ = (depth + group_ - 1) / group_;
        steps_ = int(round_up(depth, 2 * BYTES)) / BYTES;
        tiles_ = (columns + TILE - 1) / TILE;
        const size_t tile_words = size_t(steps_) * bits_ / 8 * TILE;
        packed_ = arena.take(tiles_ * tile_words);
        scales_ = reinterpret_cast<float*>(arena.take(size_t(tiles_) * groups_ * TILE));
        const auto* values = static_cast<const int8_t*>(from.data);
        const auto pack_tile = [&](int tile) {
            auto* to = reinterpret_cast<uint8_t*>(packed_ + tile * tile_words);
            for (int j = 0; j < TILE; ++j) {
                const int64_t row = tile * TILE + j < columns ? row_of(tile * TILE + j) : -1;
                if (row < 0) continue;
                for (int g = 0; g < groups_; ++g)
                    scales_[(size_t(tile) * groups_ + g) * TILE + j] =
                        from.scales[row * groups_ + g];
                for (int i = 0; i < depth; ++i) {
                    const auto value = uint8_t(values[row * depth + i] + offset());
                    if (bits_ == 8)
                        to[(size_t(i / BYTES) * TILE + j) * BYTES + i % BYTES] = value;
                    else
                        to[(size_t(i / (2 * BYTES)) * TILE + j) * BYTES + i % BYTES] |=
                            uint8_t(i / BYTES % 2 ? value << 4 : value);
                }
            }
        };
        Phases phases;
        phases.reset(1);
        auto job = [&](int) {
            phases.share(0, tiles_, 8, [&](Part part) {
                for (int tile = part.first; tile < part.last; ++tile) pack_tile(tile);
            });
        };
        team.run(job);
    }

    int columns() const { return columns_; }
    int tiles() const { return tiles_; }
    // Words of one row of digits; and sums of one row.
    size_t words() const { return size_t(planes_) * steps_; }
    size_t sums() const { return size_t(planes_) * groups_; }

    // One row of `a` as digits. What lies behind `depth` becomes zero.
    template <class T>
    void quantize(const T* a, uint32_t* words, float* scale, int32_t* sums) const {
        constexpr float SHIFT = 12582912.0f;  // rounds |x| < 2^22 to whole numbers, ties to even
        // A maximum has one value in any order, but the compiler takes one number at a time.
        Lanes peak = fill(0.0f);
        int next = 0;
        for (; next + LANES <= depth_; next += LANES) {
            const Lanes x = load(a + next);
            peak = larger(peak, larger(x, fill(0.0f) - x));
        }
        float most = largest(peak);
        for (; next < depth_; ++next) most = std::max(most, std::abs(widen(a[next])));
        const float limit = planes_ == 1 ? 127.0f : 32512.0f;
        const float inverse = most > 0.0f ? limit / most : 0.0f;
        *scale = most / limit;
        auto* high = reinterpret_cast<int8_t*>(words);
        int8_t* low = high + (planes_ - 1) * size_t(steps_) * BYTES;
        for (int i = depth_; i < steps_ * BYTES; ++i) high[i] = low[i] = 0;
        for (int g = 0; g < groups_; ++g) {
            const int first = g * group_, last = std::min(depth_, first + group_);
            int32_t sum_high = 0, sum_low = 0;
            if (planes_ == 1) {
                for (int i = first; i < last; ++i) {
                    const float y = widen(a[i]) * inverse + SHIFT;
                    const int32_t q = std::bit_cast<int32_t>(y) - std::bit_cast<int32_t>(SHIFT);
                    high[i] = int8_t(q);
                    sum_high += q;
                }
            } else {
                for (int i = first; i < last; ++i) {
                    const float y = widen(a[i]) * inverse + SHIFT;
                    const int32_t q = std::bit_cast<int32_t>(y) - std::bit_cast<int32_t>(SHIFT);
                    const int32_t h = (q + 128) >> 8, l = q - h * 256;
                    high[i] = int8_t(h);
                    low[i] = int8_t(l);
                    sum_high += h;
                    sum_low += l;
                }
            }
            sums[g * planes_] = sum_high;
            sums[g * planes_ + planes_ - 1] = planes_ == 1 ? sum_high : sum_low;
        }
    }

    // Tiles first <= t < last of a W^T; finish(row, column, low 16 sums, high 16 sums) takes them.
    template <class Finish>
    void apply(const Digits& a, int rows, Part part, Finish&& finish) const {
        const int most = std::max(1, MAX_ROWS / planes_), blocks = (rows + most - 1) / most;
        for (int tile = part.first; tile < part.last; ++tile)
            for (int i = 0; i < blocks; ++i) {
                const int first = int(int64_t(rows) * i / blocks);
                block(a, first, int(int64_t(rows) * (i + 1) / blocks) - first, tile, finish);
            }
    }

 private:
    static constexpr int MOST = MAX_ROWS < 2 ? 2 : MAX_ROWS;  // rows of digits of a block

    int offset() const { return bits_ == 8 ? 128 : 8; }

    template <class Finish>
    void block(const Digits& a, int first, int count, int tile, Finish& finish) const {
        alignas(64) uint32_t sums[MOST * TILE];
        alignas(64) float results[MOST * TILE];
        const uint32_t* b = packed_ + size_t(tile) * steps_ * bits_ / 8 * TILE;
        for (int g = 0; g < groups_; ++g) {
            const int word = g * group_ / BYTES;
            const int steps = std::min(steps_ - word, group_ / BYTES);
            multiply(count * planes_, a.words + first * words() + word, b, steps, sums);
            b += size_t(steps) * bits_ / 8 * TILE;
            const float* scales = scales_ + (size_t(tile) * groups_ + g) * TILE;
            for (int r = 0; r < count; ++r) {
                const int32_t* taken = a.sums + ((first + r) * groups_ + g) * planes_;
                for (int j = 0; j < TILE; j += LANES) {
                    const uint32_t* from = sums + r * planes_ * TILE + j;
                    Lanes sum = numbers(from, taken[0] * offset());
                    if (planes_ == 2)
                        sum = fma(sum, fill(256.0f), numbers(from + TILE, taken[1] * offset()));
                    sum = sum * load(scales + j);
                    float* to = results + r * TILE + j;
                    store(to, g == 0 ? sum : load(to) + sum);
                }
            }
        }
        for (int r = 0; r < count; ++r) {
            const Lanes scale = fill(a.scales[first + r]);
            finish(first + r, tile * TILE, load(results + r * TILE) * scale,
                   load(results + r * TILE + LANES) * scale);
        }
    }

    void multiply(int rows, const uint32_t* a, const uint32_t* b, int steps, uint32_t* to) const {
        using Block = void (*)(const uint32_t*, size_t, const uint32_t*, int, uint32_t*);
        static constexpr auto blocks = []<int... I>(std::integer_sequence<int, I...>) {
            return std::array<std::array<Block, MOST>, 2>{
                std::array<Block, MOST>{multiply_bytes<I + 1, 4>...},
                std::array<Block, MOST>{multiply_bytes<I + 1, 8>...}};
        }(std::make_integer_sequence<int, MOST>());
        blocks[bits_ == 8][rows - 1](a, size_t(steps_), b, steps, to);
    }

    int columns_ = 0, depth_ = 0, bits_ = 0, planes_ = 0, group_ = 0, groups_ = 0, steps_ = 0,
        tiles_ = 0;
    uint32_t* packed_ = nullptr;
    float* scales_ = nullptr;  // [tile, group, 32]
};

// A matrix of the model, in its type or quantised.
template <class T>
struct Matrix {
    PackedMatrix<T> dense;
    QuantizedMatrix quantized;
    bool is_quantized = false;

    template <class RowOf>
    void pack(const tandem_matrix& from, int columns, int depth, Arena& arena, Team& team,
              RowOf row_of) {
        is_quantized = from.bits != 0;
        if (is_quantized) return quantized.pack(from, columns, depth, arena, team, row_of);
        const T* rows = static_cast<const T*>(from.data);
        dense.pack(columns, depth, arena, team, [&](int column) {
            const int64_t row = row_of(column);
            return row < 0 ? nullptr : rows + row * depth;
        });
    }
    int columns() const { return is_quantized ? quantized.columns() : dense.columns(); }
    int tiles() const { return is_quantized ? quantized.tiles() : dense.tiles(); }
    // Tiles that a thread takes at a time: some ten pieces each, so that threads end together.
    int grain(int threads) const { return std::max(1, tiles() / (threads * 10)); }
};

}  // namespace tandem
