// Paged attention over the KV pool: prefill chunks and decode rows are the same kernel.
//
// A task is some consecutive tokens of one row, for one kv head; the queries of all heads that
// share the kv head are the rows of a small matrix product, so that each key and value is loaded
// once for the group (GQA). Decode is a task of one token.
//
// Keys are taken in partitions of PART that lie at fixed positions of the sequence. Scores of a
// partition, its softmax and its weighted values are complete before they are merged into the
// running ones (online softmax: Milakov and Gimelshein 2018; FlashAttention-2: Dao 2023). What a
// query computes therefore depends on its position alone: keys that it may not see contribute
// exact zeros, and the bits are the same wherever a chunk was cut and whoever else is in it.
//
// Slots that hold no token may hold anything, NaN too: their scores are replaced, not added to, and
// their values are never loaded.
#pragma once

#include <limits>

#include "norm.h"

namespace tandem {

constexpr int PART = 128;
constexpr int TASK_ROWS = 96;  // queries of a task, all heads of the group together

struct Span {  // one row of the batch
    int start, count, first_token;
    const int32_t* blocks;
};

struct Task {
    int row, kv_head, first, last;  // tokens first <= i < last of the row
};

template <class T>
class Attention {
 public:
    explicit Attention(const Shape& s)
        : s_(s),
          rows_(std::max(s.group(), TASK_ROWS / s.group() * s.group())),
          key_words_(int(words<T>(s.head_dim))),
          scores_(size_t(rows_) * STRIDE),
          weights_(size_t(rows_) * STRIDE),
          merged_(size_t(rows_) * s.value_stride()),
          highest_(rows_),
          total_(rows_),
          before_(rows_),
          now_(rows_),
          packed_keys_(size_t(key_words_) * TILE),
          packed_values_(size_t(PART) * s.value_stride()),
          no_value_(s.value_stride()) {}

    // Tokens of one task at most.
    static int task_tokens(const Shape& s) { return std::max(1, TASK_ROWS / s.group()); }

    // queries: [token of the task, head of the group, head_dim]; to: the first of them, where rows
    // of one token lie head_dim apart and tokens `to_stride`.
    void attend(const Pool<T>& pool, int layer, int window, const Span& span, const Task& task,
                const T* queries, T* to, size_t to_stride) {
        const int group = s_.group(), tokens = task.last - task.first, rows = tokens * group;
        const int begin = span.start + task.first, end = span.start + task.last;
        const size_t dims = s_.value_stride();
        for (int r = 0; r < rows; ++r) {
            highest_[r] = -std::numeric_limits<float>::infinity();
            total_[r] = 0.0f;
        }
        std::fill(merged_.data(), merged_.data() + rows * dims, 0.0f);
        const int oldest = window > 0 ? std::max(0, begin - window + 1) : 0;
        const int first = oldest / PART * PART;
        for (int j = first; j < std::min(end, first + PART); j += LANES)
            fetch(slot_of(pool, layer, 0, span, task.kv_head, j));
        for (int base = first; base < end; base += PART) {
            const int count = std::min(PART, end - base);
            score(pool, layer, span, task.kv_head, base, count, queries, rows);
            for (int r = 0; r < rows; ++r) {
                const int position = begin + r / group;
                const int low = window > 0 ? std::max(0, position - window + 1 - base) : 0;
                soften(r, low, std::min(count, position + 1 - base), count);
            }
            weigh(pool, layer, span, task.kv_head, base, count, end, rows);
        }
        for (int r = 0; r < rows; ++r) {
            const Lanes scale = fill(1.0f / total_[r]);
            float* sums = merged_.data() + r * dims;
            for (size_t i = 0; i < dims; i += LANES) store(sums + i, load(sums + i) * scale);
            store_row(to + (r / group) * to_stride + (r % group) * s_.head_dim, sums, s_.head_dim);
        }
    }

 private:
    static constexpr int STRIDE = PART + LANES;  // of scores and weights; no power of two

    const T* slot_of(const Pool<T>& pool, int layer, int kind, const Span& span, int head,
                     int position) const {
        const T* page = pool.page(span.blocks[position / s_.block_size], layer, kind, head);
        return page + int64_t(position % s_.block_size) * s_.head_dim;
    }

    // Brings 16 slots nearer. Pages of a sequence lie anywhere: no hardware foresees the next one.
    void fetch(const T* slots) const {
        const char* p = reinterpret_cast<const char*>(slots);
        for (size_t i = 0; i < LANES * s_.head_dim * sizeof(T); i += 64) __builtin_prefetch(p + i);
    }

    // scores[r][j] = query r . key base + j; garbage from `count` on.
    void score(const Pool<T>& pool, int layer, const Span& span, int head, int base, int count,
               const T* queries, int rows) {
        const auto* from = reinterpret_cast<const uint32_t*>(queries);
        for (int first = 0; first < count; first += TILE) {
            for (int j = first; j < std::min(count, first + TILE); j += LANES) {
                const T* slot = slot_of(pool, layer, 0, span, head, base + j);
                fetch(slot_of(pool, layer, 1, span, head, base + j));
                for (int word = 0; word < key_words_; word += LANES)
                    transpose16(reinterpret_cast<const uint32_t*>(slot) + word, key_words_,
                                std::min(LANES, key_words_ - word),
                                packed_keys_.data() + word * TILE + (j - first), TILE);
            }
            in_blocks(rows, [&](int row, int number) {
                multiply<T, 0>(number, from + size_t(row) * key_words_, key_words_,
                               packed_keys_.data(), TILE, key_words_,
                               scores_.data() + row * STRIDE + first, STRIDE);
            });
        }
    }

    // Turns scores[r] into weights[r], zero but for low <= j < last, and settles how this partition
    // and those before it count from now on: before_[r] and now_[r].
    void soften(int r, int low, int last, int count) {
        float* scores = scores_.data() + r * STRIDE;
        T* weights = weights_.data() + r * STRIDE;
        for (int j = 0; j < count; j += LANES)
            if (j + LANES <= low || j >= last) store(weights + j, fill(0.0f));
        before_[r] = 1.0f;
        now_[r] = 0.0f;
        if (low >= last) return;
        const Lanes none = fill(-std::numeric_limits<float>::infinity());
        const int begin = low / LANES * LANES;
        Lanes most = none;
        for (int j = begin; j < last; j += LANES) {
            Lanes x = load(scores + j);
            if (j < low || j + LANES > last)
                store(scores + j, x = keep(x, low - j, last - j, none));
            most = larger(most, x);
        }
        const float highest = largest(most), higher = std::max(highest_[r], highest);
        const Lanes factor = fill(LOG2_E / std::sqrt(float(s_.head_dim)));
        Lanes total = fill(0.0f);
        for (int j = begin; j < last; j += LANES) {
            const Lanes weight = exp2((load(scores + j) - fill(highest)) * factor);
            total = total + weight;
            store(weights + j, weight);
        }
        before_[r] = first(exp2(fill(highest_[r] - higher) * factor));
        now_[r] = first(exp2(fill(highest - higher) * factor));
        total_[r] = total_[r] * before_[r] + sum(total) * now_[r];
        highest_[r] = higher;
    }

    // merged[r] = before[r] * merged[r] + now[r] * (weights[r] . values of base .. base + count)
    void weigh(const Pool<T>& pool, int layer, const Span& span, int head, int base, int count,
               int end, int rows) {
        constexpr int PER_WORD = 4 / sizeof(T);
        const int dims = int(s_.value_stride()), steps = (count + PER_WORD - 1) / PER_WORD;
        for (int step = 0; step < steps; ++step) {
            const int j = step * PER_WORD;
            if (j % LANES == 0 && base + PART + j < end)
                fetch(slot_of(pool, layer, 0, span, head, base + PART + j));
            const T* one = slot_of(pool, layer, 1, span, head, base + j);
            const T* two = j + 1 < count ? one + s_.head_dim : no_value_.data();
            pack_values(one, two, packed_values_.data() + size_t(step) * dims);
        }
        for (int column = 0; column < dims; column += TILE)
            in_blocks(rows, [&](int row, int number) {
                multiply<T, 0>(
                    number, reinterpret_cast<const uint32_t*>(weights_.data() + row * STRIDE),
                    words<T>(STRIDE), packed_values_.data() + column, dims, steps, sums_, TILE);
                for (int r = row; r < row + number; ++r)
                    for (int j = 0; j < TILE; j += LANES) {
                        float* merged = merged_.data() + size_t(r) * dims + column + j;
                        const Lanes sums = load(sums_ + (r - row) * TILE + j);
                        store(merged, fma(load(merged), fill(before_[r]), sums * fill(now_[r])));
                    }
            });
    }

    void pack_values(const T* one, const T* two, uint32_t* to) {
        const int full = s_.head_dim / LANES * LANES, rest = s_.head_dim - full;
        for (int i = 0; i < full; i += LANES) store_words(to + i, pair_up(one + i, two + i));
        if (rest == 0) return;  // what is behind stays zero
        T tails[2][LANES] = {};
        std::memcpy(tails[0], one + full, rest * sizeof(T));
        std::memcpy(tails[1], two + full, rest * sizeof(T));
        store_words(to + full, pair_up(tails[0], tails[1]));
    }

    const Shape s_;
    const int rows_, key_words_;
    alignas(64) float sums_[SUMS];
    Buffer<float> scores_;
    Buffer<T> weights_;
    Buffer<float> merged_, highest_, total_, before_, now_;
    Buffer<uint32_t> packed_keys_, packed_values_;
    Buffer<T> no_value_;
};

}  // namespace tandem
