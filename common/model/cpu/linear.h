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
#include <utility>

#include "lanes.h"
#include "memory.h"
#include "threads.h"

namespace tandem {

constexpr int TILE = 32;

template <class T>
constexpr size_t words(size_t count) {
    return (count * sizeof(T) + 3) / 4;
}

// Sums of ROWS x VECTORS * 16 over `steps` words: a[row * a_stride + step], b[step * b_stride + i].
// AHEAD: words of b that are fetched in advance (0: none), for operands that come from memory.
template <class T, int ROWS, int VECTORS, int AHEAD>
inline __attribute__((always_inline)) void multiply(const uint32_t* a, size_t a_stride,
                                                    const uint32_t* b, size_t b_stride, int steps,
                                                    Lanes (&sums)[ROWS][VECTORS]) {
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = fill(0.0f);
    for (int step = 0; step < steps; ++step) {
        Words columns[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
            columns[v] = load_words(b + v * LANES);
            if constexpr (AHEAD > 0) __builtin_prefetch(b + v * LANES + AHEAD, 0, 3);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Words row = fill_words(a[r * a_stride + step]);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = dot<T>(sums[r][v], row, columns[v]);
        }
        b += b_stride;
    }
}

// Calls f.operator()<N>() for the N of 1..MOST that equals `n`.
template <int MOST, class F>
inline void with_constant(int n, F&& f) {
    if constexpr (MOST > 1) {
        if (n < MOST) return with_constant<MOST - 1>(n, std::forward<F>(f));
    }
    f.template operator()<MOST>();
}

// Calls f(first, constant count) over `rows` in blocks of at most MOST, of nearly equal size.
template <int MOST, class F>
inline void in_blocks(int rows, F&& f) {
    const int blocks = (rows + MOST - 1) / MOST;
    for (int i = 0; i < blocks; ++i) {
        const int first = int(int64_t(rows) * i / blocks);
        with_constant<MOST>(int(int64_t(rows) * (i + 1) / blocks) - first,
                            [&]<int ROWS>() { f.template operator()<ROWS>(first); });
    }
}

template <class T>
class PackedMatrix {
 public:
    // rows_of(column) is the row of the [.., depth] source that column of the result takes, or
    // null.
    template <class RowOf>
    void pack(int columns, int depth, Team& team, RowOf row_of) {
        columns_ = columns;
        steps_ = int(words<T>(depth));
        tiles_ = (columns + TILE - 1) / TILE;
        packed_.resize(size_t(tiles_) * steps_ * TILE + AHEAD);
        const auto pack_tile = [&](int tile) {
            uint32_t* to = packed_.data() + size_t(tile) * steps_ * TILE;
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
    // Tiles that a thread takes at a time: some ten pieces each, so that threads end together.
    int grain(int threads) const { return std::max(1, tiles_ / (threads * 10)); }
    size_t bytes() const { return size_t(tiles_) * steps_ * TILE * 4; }

    // Tiles first <= t < last of a W^T; finish(row, column, low 16 sums, high 16 sums) takes them.
    // a: [rows, a_stride words]; what lies behind a row's last word is not read.
    template <class Finish>
    void apply(const T* a, size_t a_stride, int rows, Part part, Finish&& finish) const {
        const auto* words_of_a = reinterpret_cast<const uint32_t*>(a);
        for (int tile = part.first; tile < part.last; ++tile) {
            const uint32_t* b = packed_.data() + size_t(tile) * steps_ * TILE;
            in_blocks<MAX_ROWS>(rows, [&]<int ROWS>(int first) {
                Lanes sums[ROWS][2];
                multiply<T, ROWS, 2, AHEAD>(words_of_a + first * a_stride, a_stride, b, TILE,
                                            steps_, sums);
                for (int r = 0; r < ROWS; ++r)
                    finish(first + r, tile * TILE, sums[r][0], sums[r][1]);
            });
        }
    }

 private:
    static constexpr int AHEAD = 1024;  // 4 KB

    int columns_ = 0, steps_ = 0, tiles_ = 0;
    Buffer<uint32_t> packed_;
};

}  // namespace tandem
