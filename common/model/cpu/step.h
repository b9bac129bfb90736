// One step of the whole model: a ragged batch of prefill chunks and decode rows in, the KV of its
// tokens in the pool, logits or the best token of the sampled ones out.
//
// All threads run the same function and share the pieces of its phases: rows, weight tiles or
// attention tasks. Residuals, norms and sums are float32,
// operands of matrix products are of the model's type.
#pragma once

#include <atomic>
#include <memory>
#include <numeric>

#include "attention.h"

namespace tandem {

template <class T>
class Model {
 public:
    Model(const Shape& shape, const tandem_model& from)
        : s_(shape),
          team_(from.threads),
          pool_{static_cast<T*>(from.pool), shape.layers, shape.kv_heads, shape.block_size,
                shape.head_dim},
          embedding_(static_cast<const T*>(from.embedding)),
          norm_(parameters<T>(from.norm, shape.hidden, shape.hidden_stride())) {
        layers_.reserve(shape.layers);
        for (int i = 0; i < shape.layers; ++i)
            layers_.emplace_back(shape, from.layer[i], arena_, team_);
        Layer<T>::pack(head_, from.head, shape.vocab, shape.hidden, arena_, team_);
        for (int i = 0; i < team_.size(); ++i) attention_.emplace_back(shape);
        for (const auto& layer : layers_) windowed_ |= layer.window > 0;
        own_queries_.resize(size_t(team_.size()) * shape.heads * shape.head_dim);
    }

    void step(const tandem_batch& batch) {
        prepare(batch);
        auto job = [&](int id) { compute(batch, id); };
        team_.run(job);
        if (batch.samples > 0) choose(batch);
    }

 private:
    static constexpr int FEW = 8;           // rows
    static constexpr int LAYER_PHASES = 12;  // at most

    // The partitions of a decode row that several tasks share; the last of them combines.
    struct Pieces {
        int first_part, parts, tasks;  // tasks: 0: one task, nothing to combine
        size_t kept;                   // where in partials_: [partition, kv head, partial_size]
        std::atomic<int> done;
    };

    void prepare(const tandem_batch& batch) {
        spans_.clear();
        tasks_.clear();
        span_of_.clear();
        int token = 0;
        only_decode_ = true;
        int64_t units = 0;  // partitions of one head, of decode rows
        for (int row = 0; row < batch.rows; ++row) {
            const Span span{batch.starts[row], batch.counts[row], token,
                            batch.blocks + batch.block_offsets[row]};
            spans_.push_back(span);
            span_of_.insert(span_of_.end(), span.count, row);
            token += span.count;
            only_decode_ &= span.count == 1;
            if (span.count == 1) units += (span.start / PART + 1) * s_.kv_heads;
        }
        make_tasks(units);
        reserve(batch.tokens, batch.samples);
        std::fill(best_.data(), best_.data() + team_.size() * size_t(sample_capacity_),
                  Best{-std::numeric_limits<float>::infinity(), 0});
        phases_.reset(s_.layers * LAYER_PHASES + 4);
    }

    // A decode row is one task, so that the heads of a block are read together; where that would
    // leave threads idle it is cut by partitions, then by heads.
    void make_tasks(int64_t units) {
        const int rows = int(spans_.size());
        if (rows > pieces_capacity_)
            pieces_ = std::make_unique<Pieces[]>(pieces_capacity_ = int(round_up(rows, 64)));
        const int share = team_.size() == 1
                              ? std::numeric_limits<int>::max()
                              : int(std::max<int64_t>(1, units / (4 * team_.size())));
        size_t kept = 0;
        for (int row = 0; row < rows; ++row) {
            const Span& span = spans_[row];
            pieces_[row].tasks = 0;
            pieces_[row].done.store(0, std::memory_order_relaxed);
            if (span.count > 1) {
                const int most = Attention<T>::task_tokens(s_);
                for (int first = 0; first < span.count; first += most)
                    for (int head = 0; head < s_.kv_heads; ++head)
                        tasks_.push_back(task_of(row, first, std::min(first + most, span.count),
                                                 head, head + 1));
                continue;
            }
            Task task = task_of(row, 0, 1, 0, s_.kv_heads);
            const int parts = task.last_part - task.first_part;
            // Layers with a window see less; their tasks are cut anew in `attend`.
            if (int64_t(parts) * s_.kv_heads <= share || windowed_) {
                tasks_.push_back(task);
                continue;
            }
            Pieces& pieces = pieces_[row];
            pieces.first_part = task.first_part;
            pieces.parts = parts;
            pieces.kept = kept;
            kept += size_t(parts) * s_.kv_heads * Attention<T>::partial_size(s_);
            const int heads = std::min(share, s_.kv_heads), length = std::max(1, share / heads);
            task.whole = false;
            for (int part = 0; part < parts; part += length)
                for (int head = 0; head < s_.kv_heads; head += heads) {
                    task.first_head = head;
                    task.last_head = std::min(head + heads, s_.kv_heads);
                    task.first_part = pieces.first_part + part;
                    task.last_part = pieces.first_part + std::min(part + length, parts);
                    tasks_.push_back(task);
                    ++pieces.tasks;
                }
        }
        if (kept > kept_capacity_) partials_.resize(kept_capacity_ = kept);
        // The longest first, so that threads end together.
        const auto cost = [&](const Task& task) {
            return int64_t(task.last - task.first) * (task.last_part - task.first_part) *
                   (task.last_head - task.first_head);
        };
        std::stable_sort(tasks_.begin(), tasks_.end(),
                         [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    }

    Task task_of(int row, int first, int last, int first_head, int last_head) const {
        const int start = spans_[row].start;
        const Part parts = Attention<T>::parts(0, start + first, start + last);
        return {row, first, last, first_head, last_head, parts.first, parts.last, true};
    }

    void reserve(int tokens, int samples) {
        if (tokens > capacity_) {
            capacity_ = int(round_up(tokens, 64));
            x_.resize(capacity_ * s_.hidden_stride());
            normed_.resize((capacity_ + team_.size() * FEW) * s_.hidden_stride());
            qkv_.resize(capacity_ * s_.qkv_stride());
            queries_.resize(size_t(capacity_) * s_.heads * s_.head_dim);
            attended_.resize(capacity_ * s_.attended_stride());
            inner_.resize(capacity_ * s_.inner_stride());
            reserve_digits(capacity_ + team_.size() * FEW);
        }
        if (samples > sample_capacity_) {
            sample_capacity_ = int(round_up(samples, 16));
            sampled_.resize(sample_capacity_ * s_.hidden_stride());
            best_.resize(team_.size() * size_t(sample_capacity_));
        }
    }

    void reserve_digits(size_t rows) {
        const auto most = [&](const Matrix<T>& w) {
            if (!w.is_quantized) return;
            digit_words_ = std::max(digit_words_, w.quantized.words());
            digit_groups_ = std::max(digit_groups_, w.quantized.sums());
        };
        for (const auto& layer : layers_) {
            for (const auto* w : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) most(*w);
        }
        most(head_);
        digits_.resize(rows * digit_words_);
        digit_scales_.resize(rows);
        digit_sums_.resize(rows * digit_groups_);
    }

    // One thread's way through the phases of a step.
    struct Walk {
        Model& model;
        const tandem_batch& batch;
        int id, phase = 0;

        template <class F>
        void share(int count, int grain, F&& f) {
            model.phases_.share(phase++, count, grain, f);
        }
        template <class F>
        void each(int count, int grain, F&& f) {
            share(count, grain, [&](Part part) {
                for (int i = part.first; i < part.last; ++i) f(i);
            });
        }
        // All tiles of a W^T, `rows` of a with `stride` elements each.
        template <class Finish>
        void linear(const Matrix<T>& w, const T* a, size_t stride, int rows, Finish&& finish) {
            linear_of(w, rows, [](int, T*) {}, a, stride, finish);
        }
        // The same for a = rms_norm(x).
        template <class Finish>
        void linear_of_norm(const Matrix<T>& w, const std::vector<float>& weight, int rows,
                            Finish&& finish) {
            const size_t stride = model.s_.hidden_stride();
            const auto norm = [&](int row, T* to) {
                model.norm_row(model.x_.data() + row * stride, weight, to + row * stride);
            };
            linear_of(w, rows, norm, nullptr, stride, finish);
        }
        // prepare(row, to) makes a row of `a`, unless `a` is there. A few rows are cheaper to make
        // in every thread than to wait for.
        template <class Prepare, class Finish>
        void linear_of(const Matrix<T>& w, int rows, Prepare&& prepare, const T* a, size_t stride,
                       Finish&& finish) {
            const bool few = rows <= FEW;
            const size_t own = model.capacity_ + size_t(id) * FEW;
            T* made = a != nullptr ? nullptr : model.normed_.data() + (few ? own * stride : 0);
            const T* from = a != nullptr ? a : made;
            uint32_t* words = model.digits_.data() + (few ? own * model.digit_words_ : 0);
            float* scales = model.digit_scales_.data() + (few ? own : 0);
            int32_t* sums = model.digit_sums_.data() + (few ? own * model.digit_groups_ : 0);
            const auto make = [&](int row) {
                if (made != nullptr) prepare(row, made);
                if (w.is_quantized)
                    w.quantized.quantize(from + row * stride, words + row * w.quantized.words(),
                                         scales + row, sums + row * w.quantized.sums());
            };
            bool ready = !few || (made == nullptr && !w.is_quantized);
            if (!few && (made != nullptr || w.is_quantized)) each(rows, 8, make);
            share(w.tiles(), w.grain(model.team_.size()), [&](Part part) {
                for (int row = 0; row < rows && !ready; ++row) make(row);
                ready = true;
                if (w.is_quantized)
                    w.quantized.apply(Digits{words, scales, sums}, rows, part, finish);
                else
                    w.dense.apply(from, tandem::words<T>(stride), rows, part, finish);
            });
        }
    };

    void compute(const tandem_batch& batch, int id) {
        Walk walk{*this, batch, id};
        walk.each(batch.tokens, 16, [&](int t) {
            load_row(x_.data() + t * s_.hidden_stride(),
                     embedding_ + int64_t(batch.token_ids[t]) * s_.hidden, s_.hidden);
        });
        for (int i = 0; i < s_.layers; ++i) attend_and_think(walk, i);
        if (batch.samples == 0) return;
        walk.each(batch.samples, 8, [&](int i) {
            norm_row(x_.data() + batch.sample_tokens[i] * s_.hidden_stride(), norm_,
                     sampled_.data() + i * s_.hidden_stride());
        });
        predict(walk);
    }

    void attend_and_think(Walk& walk, int number) {
        const Layer<T>& layer = layers_[number];
        const int tokens = walk.batch.tokens;
        const auto add_to_x = [&](const std::vector<float>& bias) {
            return [&](int row, int column, Lanes low, Lanes high) {
                add_bias(bias, column, low, high);
                float* x = x_.data() + row * s_.hidden_stride() + column;
                store(x, load(x) + low);
                store(x + LANES, load(x + LANES) + high);
            };
        };
        walk.linear_of_norm(layer.qkv, layer.input_norm, tokens,
                            [&](int row, int column, Lanes low, Lanes high) {
                                add_bias(layer.qkv_bias, column, low, high);
                                float* to = qkv_.data() + row * s_.qkv_stride() + column;
                                store(to, low);
                                store(to + LANES, high);
                            });
        if (!only_decode_)
            walk.each(tokens * s_.kv_heads, 4 * s_.kv_heads, [&](int i) {
                const int token = i / s_.kv_heads, head = i % s_.kv_heads;
                place(walk.batch, layer, number, token, head, queries_of(head, token), true);
            });
        walk.each(int(tasks_.size()), 1,
                  [&](int i) { attend(walk.batch, layer, number, i, walk.id); });
        walk.linear(layer.o, attended_.data(), s_.attended_stride(), tokens,
                    add_to_x(layer.o_bias));
        walk.linear_of_norm(
            layer.gate_up, layer.mlp_norm, tokens, [&](int row, int column, Lanes gate, Lanes up) {
                add_bias(layer.gate_up_bias, column, gate, up);
                store(inner_.data() + row * s_.inner_stride() + column / 2, silu(gate) * up);
            });
        walk.linear(layer.down, inner_.data(), s_.inner_stride(), tokens,
                    add_to_x(layer.down_bias));
    }

    static void add_bias(const std::vector<float>& bias, int column, Lanes& low, Lanes& high) {
        if (bias.empty()) return;
        low = low + load(bias.data() + column);
        high = high + load(bias.data() + column + LANES);
    }

    void norm_row(const float* x, const std::vector<float>& weight, T* to) const {
        rms_norm(x, weight.data(), s_.hidden, s_.hidden_stride(), s_.eps, to);
    }

    // Query heads of one kv head and token, [kv_head, token, head of the group, head_dim].
    T* queries_of(int kv_head, int token) {
        return queries_.data() + (size_t(kv_head) * capacity_ + token) * s_.group() * s_.head_dim;
    }

    // Rotates one kv head's queries of a token, and its key if it is to be written to the pool with
    // its value.
    void place(const tandem_batch& batch, const Layer<T>& layer, int number, int token, int kv_head,
               T* queries, bool writes) {
        const Span& span = spans_[span_of_[token]];
        const int position = span.start + token - span.first_token, dim = s_.head_dim;
        const float* cos = batch.cos + int64_t(position) * (dim / 2);
        const float* sin = batch.sin + int64_t(position) * (dim / 2);
        const float* heads = qkv_.data() + token * s_.qkv_stride();
        for (int i = 0; i < s_.group(); ++i)
            place_head(heads + (kv_head * s_.group() + i) * dim, layer.q_norm, s_.eps, cos, sin,
                       dim, queries + i * dim);
        if (!writes) return;
        const int block = span.blocks[position / s_.block_size], slot = position % s_.block_size;
        place_head(heads + (s_.heads + kv_head) * dim, layer.k_norm, s_.eps, cos, sin, dim,
                   pool_.page(block, number, 0, kv_head) + slot * dim);
        store_row(pool_.page(block, number, 1, kv_head) + slot * dim,
                  heads + (s_.heads + s_.kv_heads + kv_head) * dim, dim);
    }

    void attend(const tandem_batch& batch, const Layer<T>& layer, int number, int index, int id) {
        const auto cut = [&](Task task) {
            const int start = spans_[task.row].start;
            if (layer.window > 0)
                task.first_part = Attention<T>::parts(layer.window, start + task.first,
                                                      start + task.last).first;
            return task;
        };
        const Task task = cut(tasks_[index]);
        const Span& span = spans_[task.row];
        const int token = span.first_token + task.first, group_size = s_.group() * s_.head_dim;
        const bool decode = span.count == 1;
        T* queries = queries_of(task.first_head, token);
        size_t head_stride = size_t(capacity_) * group_size;
        // A decode row needs no key of this step but its own.
        if (only_decode_) {
            queries = own_queries_.data() + size_t(id) * s_.heads * s_.head_dim;
            head_stride = group_size;
            const bool writes = task.last_part == span.start / PART + 1;
            for (int head = task.first_head; head < task.last_head; ++head)
                place(batch, layer, number, token, head,
                      queries + (head - task.first_head) * head_stride, writes);
        }
        Attention<T>& attention = attention_[id];
        // The threads take turns, as a rule.
        Ahead next;
        const int following = index + team_.size();
        const Task coming = following < int(tasks_.size()) ? cut(tasks_[following]) : task;
        if (following < int(tasks_.size()))
            next = Attention<T>::beginning(spans_[coming.row], coming);
        T* to = attended_.data() + token * s_.attended_stride();
        if (task.whole) {
            attention.attend(pool_, number, layer.window, span, task, queries, head_stride,
                             to + task.first_head * group_size,
                             decode ? group_size : s_.attended_stride(), next);
            return;
        }
        Pieces& pieces = pieces_[task.row];
        const size_t size = Attention<T>::partial_size(s_), stride = size * s_.kv_heads;
        float* kept = partials_.data() + pieces.kept;
        attention.part(pool_, number, layer.window, span, task, queries, head_stride, next,
                       [&](int part, int head) {
                           return kept + (part - pieces.first_part) * stride +
                                  (task.first_head + head) * size;
                       });
        if (pieces.done.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces.tasks) return;
        pieces.done.store(0, std::memory_order_relaxed);
        for (int head = 0; head < s_.kv_heads; ++head)
            attention.combine(kept + head * size, pieces.parts, stride, to + head * group_size);
    }

    struct Best {
        float value;
        int32_t token;
    };

    void predict(Walk& walk) {
        const tandem_batch& batch = walk.batch;
        Best* best = best_.data() + size_t(walk.id) * sample_capacity_;
        const auto take_best = [&](int row, int column, const float (&values)[TILE]) {
            const int count = std::min(TILE, s_.vocab - column);
            for (int j = 0; j < count; ++j)
                if (values[j] > best[row].value) best[row] = {values[j], column + j};
        };
        const auto finish = [&](int row, int column, Lanes low, Lanes high) {
            alignas(64) float values[TILE];
            const int line = batch.sample_lines[row];
            // Most tiles do not hold a row's best token; of them nothing is written.
            if (line < 0 && largest(larger(low, high)) <= best[row].value) return;
            store(values, low);
            store(values + LANES, high);
            if (line < 0) return take_best(row, column, values);
            std::memcpy(batch.logits + int64_t(line) * s_.vocab + column, values,
                        std::min(TILE, s_.vocab - column) * sizeof(float));
        };
        walk.linear(head_, sampled_.data(), s_.hidden_stride(), batch.samples, finish);
    }

    // The best of all threads, and of equals the first.
    void choose(const tandem_batch& batch) {
        for (int i = 0; i < batch.samples; ++i) {
            Best most = best_[i];
            for (int id = 1; id < team_.size(); ++id) {
                const Best& other = best_[size_t(id) * sample_capacity_ + i];
                if (other.value > most.value ||
                    (other.value == most.value && other.token < most.token))
                    most = other;
            }
            batch.best[i] = most.token;
        }
    }

    const Shape s_;
    Team team_;
    Phases phases_;
    Arena arena_;
    const Pool<T> pool_;
    const T* embedding_;
    std::vector<float> norm_;
    std::vector<Layer<T>> layers_;
    Matrix<T> head_;
    std::vector<Attention<T>> attention_;  // [threads]

    std::vector<Span> spans_;
    std::vector<Task> tasks_;
    std::vector<int> span_of_;  // [tokens]: row of each
    bool only_decode_ = false, windowed_ = false;
    std::unique_ptr<Pieces[]> pieces_;  // [rows]
    int pieces_capacity_ = 0;
    Buffer<float> partials_;
    size_t kept_capacity_ = 0;

    int capacity_ = 0, sample_capacity_ = 0;
    Buffer<float> x_;  // [tokens, hidden], the residual
    Buffer<T> normed_;
    Buffer<float> qkv_;  // [tokens, q heads, k heads, v heads]
    Buffer<T> queries_, attended_, inner_, sampled_;
    Buffer<T> own_queries_;  // [threads, heads, head_dim], of the decode row at hand
    Buffer<uint32_t> digits_;  // of quantised products: see `Digits`
    Buffer<float> digit_scales_;
    Buffer<int32_t> digit_sums_;
    size_t digit_words_ = 0, digit_groups_ = 0;
    Buffer<Best> best_;  // [threads, samples]
};

}  // namespace tandem
