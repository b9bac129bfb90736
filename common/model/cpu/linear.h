// y = a W^T for any number of rows of `a`, over weights that were packed once.
//
// Packed layout: [tile of 32 columns][word along K][32 columns], one word being one float32 or two
// consecutive bfloat16 of a column, which is what vdpbf16ps multiplies. Unused columns and the odd
// last half word are zero. A thread streams its tiles from memory one after the other.
//
// A register block is up to MAX_ROWS rows by 32 columns. Each sum runs over all of K in one order,
// in one register, whatever the number of rows: a row's result has the same bits alone and in any
// batch. (So K is never split, and a tile must fit a core's second level cache: 32 x 4096 x 2 is a
// quarter of a MiB.)
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "lanes.h"
#include "memory.h"
#include "threads.h"

// Hidden: libraries for several instruction sets in one process must not share a table of kernels.
namespace tandem __attribute__((visibility("hidden"))) {

constexpr int TILE = 32;

template <class T>
constexpr size_t words(size_t count) {
    return (count * sizeof(T) + 3) / 4;
}

constexpr int SUMS = MAX_ROWS * TILE;

// to[row * to_stride + column] of ROWS x 32 over `steps` words: a[row * a_stride + step] times
// b[step * b_stride + column]. AHEAD: words of b that are fetched in advance, where it comes from
// memory; 0: none. Four times as many where many rows take longer over each word.
template <class T, int ROWS, int AHEAD>
__attribute__((noinline)) void multiply_block(const uint32_t* a, size_t a_stride, const uint32_t* b,
                                              size_t b_stride, int steps, float* to,
                                              size_t to_stride) {
    Lanes sums[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = fill(0.0f);
    for (int step = 0; step < steps; ++step) {
        const Words low = load_words(b), high = load_words(b + LANES);
        if constexpr (AHEAD > 0 && ROWS <= 5) {
            __builtin_prefetch(b + AHEAD);
            __builtin_prefetch(b + AHEAD + LANES);
        } else if constexpr (AHEAD > 0) {
            // Slower reading leaves room for the second level cache, and for a longer lead.
            __builtin_prefetch(b + 4 * AHEAD, 0, 2);
            __builtin_prefetch(b + 4 * AHEAD + LANES, 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Words row = fill_words(a[r * a_stride + step]);
            sums[r][0] = dot<T>(sums[r][0], row, low);
            sums[r][1] = dot<T>(sums[r][1], row, high);
        }
        b += b_stride;
    }
    for (int r = 0; r < ROWS; ++r) {
        store(to + r * to_stride, sums[r][0]);
        store(to + r * to_stride + LANES, sums[r][1]);
    }
}

// The same for 1..MAX_ROWS rows.
template <class T, int AHEAD>
inline void multiply(int rows, const uint32_t* a, size_t a_stride, const uint32_t* b,
                     size_t b_stride, int steps, float* to, size_t to_stride) {
    using Block = void (*)(const uint32_t*, size_t, const uint32_t*, size_t, int, float*, size_t);
    static constexpr auto blocks = []<int... I>(std::integer_sequence<int, I...>) {
        return std::array<Block, MAX_ROWS>{multiply_block<T, I + 1, AHEAD>...};
    }(std::make_integer_sequence<int, MAX_ROWS>());
    blocks[rows - 1](a, a_stride, b, b_stride, steps, to, to_stride);
}

// to of 1..MAX_ROWS rows and `columns`, a multiple of 32, over b that lies in the caches. Few rows
// take more columns at a time: a sum waits for its last addition, so there must be many of them.
template <class T, int ROWS, int COLUMNS>
inline void multiply_columns(const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride,
                             int steps, float* to, size_t to_stride) {
    Lanes sums[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = fill(0.0f);
    for (int step = 0; step < steps; ++step, b += b_stride) {
        Words columns[COLUMNS];
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; ++c) columns[c] = load_words(b + c * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Words row = fill_words(a[r * a_stride + step]);
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] = dot<T>(sums[r][c], row, columns[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; ++c) store(to + r * to_stride + c * LANES, sums[r][c]);
}
template <class T>
inline void multiply_wide(int rows, const uint32_t* a, size_t a_stride, const uint32_t* b,
                          size_t b_stride, int steps, float* to, size_t to_stride, int columns) {
    constexpr int WIDE = 4 * LANES;
    int first = 0;
    if constexpr (MAX_ROWS >= 12) {
        const auto wide = [&]<int ROWS>() {
            for (; first + WIDE <= columns; first += WIDE)
                multiply_columns<T, ROWS, 4>(a, a_stride, b + first, b_stride, steps, to + first,
                                             to_stride);
        };
        if (rows == 1) wide.template operator()<1>();
        if (rows == 2) wide.template operator()<2>();
        if (rows == 3) wide.template operator()<3>();
        if (rows == 4) wide.template operator()<4>();
    }
    for (; first < columns; first += TILE)
        multiply<T, 0>(rows, a, a_stride, b + first, b_stride, steps, to + first, to_stride);
}

// Calls f(first, count) over `rows` in blocks of at most MAX_ROWS, of nearly equal size.
template <class F>
inline void in_blocks(int rows, F&& f) {
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int i = 0; i < blocks; ++i) {
        const int first = int(int64_t(rows) * i / blocks);
        f(first, int(int64_t(rows) * (i + 1) / blocks) - first);
    }
}

template <class T>
class PackedMatrix {
 public:
    // rows_of(column) is the row of the [.., depth] source that column of the result takes, or
    // null.
    template <class RowOf>
    void pack(int columns, int depth, Arena& arena, Team& team, RowOf row_of) {
        columns_ = columns;
        steps_ = int(words<T>(depth));
        tiles_ = (columns + TILE - 1) / TILE;
        packed_ = arena.take(size_t(tiles_) * steps_ * TILE);
        const auto pack_tile = [&](int tile) {
            uint32_t* to = packed_ + size_t(tile) * steps_ * TILE;
            for (int j = 0; j < TILE; ++j) {
                const int column = tile * TILE + j;
                const T* row = column < columns ? row_of(column) : nullptr;
                if (row == nullptr) continue;
                for (int step = 0; step < steps_; ++step) {
                    const size_t first = size_t(step) * 4 / sizeof(T);
                    const size_t count = std::min(4 / sizeof(T), size_t(depth) - first);
                    std::memcpy(to + size_t(step) * TILE + j, row + first, count * sizeof(T));
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

    // Tiles first <= t < last of a W^T; finish(row, column, low 16 sums, high 16 sums) takes them.
    // a: [rows, a_stride words]; what lies behind a row's last word is not read.
    template <class Finish>
    void apply(const T* a, size_t a_stride, int rows, Part part, Finish&& finish) const {
        const auto* words_of_a = reinterpret_cast<const uint32_t*>(a);
        alignas(64) float sums[SUMS];
        for (int tile = part.first; tile < part.last; ++tile) {
            const uint32_t* b = packed_ + size_t(tile) * steps_ * TILE;
            in_blocks(rows, [&](int first, int count) {
                multiply<T, AHEAD>(count, words_of_a + first * a_stride, a_stride, b, TILE, steps_,
                                   sums, TILE);
                for (int r = 0; r < count; ++r)
                    finish(first + r, tile * TILE, load(sums + r * TILE),
                           load(sums + r * TILE + LANES));
            });
        }
    }

 private:
    static constexpr int AHEAD = 1024;  // 4 KB

    int columns_ = 0, steps_ = 0, tiles_ = 0;
    uint32_t* packed_ = nullptr;
};

}  // namespace tandem
