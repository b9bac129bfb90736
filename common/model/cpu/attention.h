// Paged attention over the KV pool: prefill chunks and decode rows are the same kernel.
//
// A task is some consecutive tokens of one row, for one kv head; the queries of all heads that
// share the kv head are the rows of a small matrix product, so that each key and value is loaded
// once for the group (GQA). Decode is a task of one token.
//
// Keys are taken in partitions of PART that lie at fixed positions of the sequence. Scores of a
// partition, its softmax and its weighted values are complete before they are merged into the
// running ones, partition by partition (online softmax: Milakov and Gimelshein 2018;
// FlashAttention-2: Dao 2023). What a query computes therefore depends on its position alone: keys
// that it may not see contribute exact zeros, and the bits are the same wherever a chunk was cut,
// whoever else is in it, and whether its partitions were computed in one task or in several
// (`part` and `combine`; flash-decoding: Dao et al. 2023).
//
// Slots that hold no token may hold anything, NaN too: their scores are replaced, not added to, and
// their values are never loaded.
#pragma once

#include <limits>

#include "norm.h"

namespace tandem {

constexpr int PART = 128;
constexpr int UNITS = PART / LANES;  // a unit: 16 slots, which never cross a block
constexpr int TASK_ROWS = 96;        // queries of a task, all heads of the group together

struct Span {  // one row of the batch
    int start, count, first_token;
    const int32_t* blocks;
};

// Tokens first <= i < last of a row and kv heads first_head <= h < last_head; where there are
// several heads, one token. first_part, last_part: the partitions of the task.
struct Task {
    int row, first, last, first_head, last_head, first_part, last_part;
    bool whole;  // all partitions that its tokens see
};

// The keys and values of a partition, in pieces: a piece is one unit of one head, keys or values.
struct Ahead {
    const Span* span = nullptr;
    int first_head = 0, heads = 0, base = 0, units = 0;

    int pieces() const { return heads * 2 * units; }
    bool operator==(const Ahead&) const = default;
};

template <class T>
class Attention {
 public:
    explicit Attention(const Shape& s)
        : s_(s),
          rows_(int(round_up(std::max(s.heads, TASK_ROWS), LANES))),
          key_words_(int(words<T>(s.head_dim))),
          factor_(LOG2_E / std::sqrt(float(s.head_dim))),
          scores_(size_t(MAX_ROWS) * STRIDE),
          weights_(size_t(MAX_ROWS) * STRIDE),
          merged_(size_t(rows_) * s.value_stride()),
          highest_(rows_),
          total_(rows_),
          sums_(size_t(MAX_ROWS) * s.value_stride()),
          packed_keys_(size_t(key_words_) * PART),
          packed_values_(size_t(PART) * s.value_stride()),
          no_value_(s.value_stride()) {}

    // Tokens of one task at most.
    static int task_tokens(const Shape& s) { return std::max(1, TASK_ROWS / s.group()); }
    // Floats that `part` keeps of one partition and head.
    static size_t partial_size(const Shape& s) {
        return 2 * round_up(s.group(), LANES) + s.group() * s.value_stride();
    }
    // Partitions first <= p < last that some token of begin <= position < end sees.
    static Part parts(int window, int begin, int end) {
        const int oldest = window > 0 ? std::max(0, begin - window + 1) : 0;
        return {oldest / PART, (end + PART - 1) / PART};
    }
    static Ahead beginning(const Span& span, const Task& task) {
        return ahead(span, task, task.first_part);
    }

    // queries: of the task's first head and token, [token, head of the group, head_dim], heads
    // `head_stride` apart; to: where its result belongs, rows of one token lie head_dim apart and
    // tokens `to_stride`. next: what this thread will probably read after that.
    void attend(const Pool<T>& pool, int layer, int window, const Span& span, const Task& task,
                const T* queries, size_t head_stride, T* to, size_t to_stride, Ahead next) {
        const int heads = task.last_head - task.first_head;
        const int rows = (task.last - task.first) * s_.group();
        clear(rows * heads);
        walk(pool, layer, window, span, task, queries, head_stride, next,
             [&](int, int head, int row, int count) {
                 merge(head * rows + row, count, highest_now_, total_now_, sums_.data());
             });
        write(rows * heads, to, to_stride);
    }

    // Partitions of one token, each for itself: keep(partition, head) is where.
    template <class Keep>
    void part(const Pool<T>& pool, int layer, int window, const Span& span, const Task& task,
              const T* queries, size_t head_stride, Ahead next, Keep&& keep) {
        const size_t lines = round_up(s_.group(), LANES), dims = s_.value_stride();
        walk(pool, layer, window, span, task, queries, head_stride, next,
             [&](int number, int head, int row, int count) {
                 float* to = keep(number, head);
                 std::memcpy(to + row, highest_now_, count * sizeof(float));
                 std::memcpy(to + lines + row, total_now_, count * sizeof(float));
                 std::memcpy(to + 2 * lines + row * dims, sums_.data(),
                             count * dims * sizeof(float));
             });
    }

    // What `attend` gives for one token and head, from its `count` partitions in their order, which
    // lie `stride` apart.
    void combine(const float* kept, int count, size_t stride, T* to) {
        const int group = s_.group();
        const size_t lines = round_up(group, LANES), dims = s_.value_stride();
        clear(group);
        for (int p = 0; p < count; ++p, kept += stride)
            in_blocks(group, [&](int row, int number) {
                merge(row, number, kept + row, kept + lines + row, kept + 2 * lines + row * dims);
            });
        write(group, to, 0);
    }

 private:
    static constexpr int STRIDE = PART + LANES;  // of scores and weights; no power of two
    static constexpr int DISTANCE = 24;           // pieces, of 2 KB where head_dim is 64
    static constexpr float NONE = -std::numeric_limits<float>::infinity();

    // What is fetched from memory, DISTANCE pieces before they are read, in the order in which they
    // are: all partitions of a task, then the first one of what probably comes after it.
    struct Stream {
        Ahead at;
        int layer = -1, piece = 0, lead = 0;  // pieces of `at` fetched; all that are not yet read
        bool moved = false;                   // `at` belongs to the task after this one
    };

    // A task begins: goes on if it is the expected one, else anew.
    void follow(int layer, const Ahead& first) {
        if (!stream_.moved || stream_.layer != layer || stream_.at != first)
            stream_ = {first, layer, 0, 0, false};
        stream_.moved = false;
    }

    // Called before a piece is read.
    void fetch(const Pool<T>& pool, const Span& span, const Task& task, const Ahead& next) {
        for (; stream_.lead < DISTANCE; ++stream_.lead) {
            if (stream_.piece == stream_.at.pieces()) {
                const int number = stream_.at.base / PART + 1;
                if (stream_.moved || (number >= task.last_part && next.span == nullptr)) break;
                stream_.moved = number >= task.last_part;
                stream_.at = stream_.moved ? next : ahead(span, task, number);
                stream_.piece = 0;
            }
            const Ahead& at = stream_.at;
            const int head = stream_.piece / (2 * at.units), rest = stream_.piece % (2 * at.units);
            const auto* p = reinterpret_cast<const char*>(
                slot_of(pool, stream_.layer, rest / at.units, *at.span, at.first_head + head,
                        at.base + rest % at.units * LANES));
            // Into the second level cache: the first takes few requests at a time.
            for (size_t i = 0; i < LANES * s_.head_dim * sizeof(T); i += 64)
                __builtin_prefetch(p + i, 0, 2);
            ++stream_.piece;
        }
        stream_.lead = std::max(0, stream_.lead - 1);
    }

    static Ahead ahead(const Span& span, const Task& task, int number) {
        const int base = number * PART, end = std::min(base + PART, span.start + task.last);
        return {&span, task.first_head, task.last_head - task.first_head, base,
                (end - base + LANES - 1) / LANES};
    }

    const T* slot_of(const Pool<T>& pool, int layer, int kind, const Span& span, int head,
                     int position) const {
        const T* page = pool.page(span.blocks[position / s_.block_size], layer, kind, head);
        return page + int64_t(position % s_.block_size) * s_.head_dim;
    }

    void clear(int rows) {
        std::fill(highest_.data(), highest_.data() + rows, NONE);
        std::fill(total_.data(), total_.data() + rows, 0.0f);
        std::fill(merged_.data(), merged_.data() + rows * s_.value_stride(), 0.0f);
    }

    // All partitions of a task for all of its queries, MAX_ROWS at a time: done(partition, head,
    // row, count) finds in highest_now_ the highest score of each row, in total_now_ the sum of its
    // weights relative to that, and in sums_ its weighted values.
    template <class Done>
    void walk(const Pool<T>& pool, int layer, int window, const Span& span, const Task& task,
              const T* queries, size_t head_stride, Ahead next, Done&& done) {
        const int group = s_.group(), rows = (task.last - task.first) * group;
        const int begin = span.start + task.first, end = span.start + task.last;
        const int heads = task.last_head - task.first_head;
        follow(layer, ahead(span, task, task.first_part));
        for (int number = task.first_part; number < task.last_part; ++number) {
            const int base = number * PART, count = std::min(PART, end - base);
            for (int head = 0; head < heads; ++head) {
                const auto unit = [&](int kind, int j) {
                    fetch(pool, span, task, next);
                    return slot_of(pool, layer, kind, span, task.first_head + head, base + j);
                };
                pack_keys(count, [&](int j) { return unit(0, j); });
                pack_values(count, [&](int j) { return unit(1, j); });
                in_blocks(rows, [&](int first, int block) {
                    score(queries + head * head_stride, first, block, count);
                    for (int i = 0; i < block; ++i) {
                        const int position = begin + (first + i) / group;
                        const int low = window > 0 ? std::max(0, position - window + 1 - base) : 0;
                        soften(i, low, std::min(count, position + 1 - base), count);
                    }
                    weigh(block, count);
                    done(number, head, first, block);
                });
            }
        }
    }

    // packed_keys_[word][slot]; garbage from `count` on. unit(j): the slots from j on.
    template <class Unit>
    void pack_keys(int count, Unit&& unit) {
        for (int j = 0; j < count; j += LANES) {
            const T* slot = unit(j);
            for (int word = 0; word < key_words_; word += LANES)
                transpose16(reinterpret_cast<const uint32_t*>(slot) + word, key_words_,
                            std::min(LANES, key_words_ - word),
                            packed_keys_.data() + word * PART + j, PART);
        }
    }

    // packed_values_[slot or pair of slots][dims]
    template <class Unit>
    void pack_values(int count, Unit&& unit) {
        constexpr int PER_WORD = 4 / sizeof(T);
        const size_t dims = s_.value_stride();
        uint32_t* to = packed_values_.data();
        for (int j = 0; j < count; j += LANES) {
            const T* values = unit(j);
            const int slots = std::min(LANES, count - j);
            for (int i = 0; i < slots; i += PER_WORD, to += dims) {
                const T* one = values + i * s_.head_dim;
                pack_pair(one, i + 1 < slots ? one + s_.head_dim : no_value_.data(), to);
            }
        }
    }

    void pack_pair(const T* one, const T* two, uint32_t* to) const {
        int i = 0;
        for (; i + 2 * LANES <= s_.head_dim; i += 2 * LANES) pair_up32(one + i, two + i, to + i);
        for (; i + LANES <= s_.head_dim; i += LANES)
            store_words(to + i, pair_up(one + i, two + i));
        const int rest = s_.head_dim - i;
        if (rest == 0) return;  // what is behind stays zero
        T tails[2][LANES] = {};
        std::memcpy(tails[0], one + i, rest * sizeof(T));
        std::memcpy(tails[1], two + i, rest * sizeof(T));
        store_words(to + i, pair_up(tails[0], tails[1]));
    }

    // scores_[i][j] = query first + i . key j; garbage from `count` on.
    void score(const T* queries, int first, int block, int count) {
        const auto* from = reinterpret_cast<const uint32_t*>(queries) + size_t(first) * key_words_;
        multiply_wide<T>(block, from, key_words_, packed_keys_.data(), PART, key_words_,
                         scores_.data(), STRIDE, int(round_up(count, TILE)));
    }

    // Turns scores_[i] into weights_[i], zero but for low <= j < last.
    void soften(int i, int low, int last, int count) {
        float* scores = scores_.data() + i * STRIDE;
        T* weights = weights_.data() + i * STRIDE;
        for (int j = 0; j < count; j += LANES)
            if (j + LANES <= low || j >= last) store(weights + j, fill(0.0f));
        highest_now_[i] = NONE;
        total_now_[i] = 0.0f;
        if (low >= last) return;
        const Lanes none = fill(NONE);
        const int begin = low / LANES * LANES;
        Lanes most = none;
        for (int j = begin; j < last; j += LANES) {
            Lanes x = load(scores + j);
            if (j < low || j + LANES > last)
                store(scores + j, x = keep(x, low - j, last - j, none));
            most = larger(most, x);
        }
        const float highest = largest(most);
        const Lanes factor = fill(factor_), offset = fill(-highest * factor_);
        Lanes total = fill(0.0f);
        for (int j = begin; j < last; j += LANES) {
            const Lanes weight = weight_of<T>(fma(load(scores + j), factor, offset));
            total = total + weight;
            store(weights + j, weight);
        }
        highest_now_[i] = highest;
        total_now_[i] = sum(total);
    }

    // sums_[i] = weights_[i] . values
    void weigh(int block, int count) {
        constexpr int PER_WORD = 4 / sizeof(T);
        const int dims = int(s_.value_stride());
        multiply_wide<T>(block, reinterpret_cast<const uint32_t*>(weights_.data()),
                         words<T>(STRIDE), packed_values_.data(), dims,
                         (count + PER_WORD - 1) / PER_WORD, sums_.data(), dims, dims);
    }

    // Adds a partition to the running result of `count` <= 16 queries from `row` on.
    void merge(int row, int count, const float* highest, const float* total, const float* sums) {
        alignas(64) float now[LANES] = {}, new_total[LANES] = {}, before[LANES], old[LANES] = {};
        std::fill(now, now + LANES, NONE);
        std::fill(before, before + LANES, NONE);
        std::memcpy(now, highest, count * sizeof(float));
        std::memcpy(new_total, total, count * sizeof(float));
        std::memcpy(before, highest_.data() + row, count * sizeof(float));
        std::memcpy(old, total_.data() + row, count * sizeof(float));
        const Lanes higher = larger(load(now), load(before));
        // A query that has seen nothing yet: no difference of infinities.
        const Lanes reference = larger(higher, fill(-std::numeric_limits<float>::max()));
        const Lanes factor = fill(factor_);
        const Lanes weight = exp2((load(now) - reference) * factor);
        const Lanes kept = exp2((load(before) - reference) * factor);
        store(old, load(old) * kept + load(new_total) * weight);
        store(before, higher);
        std::memcpy(highest_.data() + row, before, count * sizeof(float));
        std::memcpy(total_.data() + row, old, count * sizeof(float));
        store(now, weight);
        store(before, kept);
        const size_t dims = s_.value_stride();
        for (int i = 0; i < count; ++i) {
            float* merged = merged_.data() + (row + i) * dims;
            const Lanes a = fill(before[i]), b = fill(now[i]);
            for (size_t j = 0; j < dims; j += LANES)
                store(merged + j, fma(load(merged + j), a, load(sums + i * dims + j) * b));
        }
    }

    void write(int rows, T* to, size_t to_stride) {
        const size_t dims = s_.value_stride();
        for (int r = 0; r < rows; ++r) {
            const Lanes scale = fill(1.0f / total_[r]);
            float* sums = merged_.data() + r * dims;
            for (size_t i = 0; i < dims; i += LANES) store(sums + i, load(sums + i) * scale);
            store_row(to + (r / s_.group()) * to_stride + (r % s_.group()) * s_.head_dim, sums,
                      s_.head_dim);
        }
    }

    const Shape s_;
    const int rows_, key_words_;
    const float factor_;  // of scores, for powers of two
    alignas(64) float highest_now_[LANES], total_now_[LANES];
    Buffer<float> scores_;
    Buffer<T> weights_;
    Buffer<float> merged_, highest_, total_, sums_;
    Buffer<uint32_t> packed_keys_, packed_values_;
    Buffer<T> no_value_;
    Stream stream_;
};

}  // namespace tandem
