// The functions that Python calls: a model and its steps, and each kernel alone for tests and
// benchmarks. Where memory is short they return null or non-zero.
#include <variant>

#include "step.h"

using namespace tandem;

// Calls f.operator()<T>() for the type that `dtype` names.
template <class F>
auto with_type(int32_t dtype, F&& f) {
    return dtype == 0 ? f.template operator()<float>() : f.template operator()<bf16>();
}

static Shape shape_of(const tandem_model& from) {
    return {from.vocab,    from.hidden,   from.inner,      from.layers, from.heads,
            from.kv_heads, from.head_dim, from.block_size, from.eps};
}

struct Handle {
    std::variant<std::unique_ptr<Model<float>>, std::unique_ptr<Model<bf16>>> model;
};

struct Linear {
    Team team;
    Phases phases;
    Arena arena;
    std::variant<Matrix<float>, Matrix<bf16>> matrix;
};

template <class T>
struct AttentionOf {
    Attention<T> attention;
    Pool<T> pool;
};

struct AttentionHandle {
    Shape shape;
    std::variant<AttentionOf<float>, AttentionOf<bf16>> kernel;
};

extern "C" {

Handle* tandem_create(const tandem_model* from) {
    try {
        return with_type(from->dtype, [&]<class T>() {
            return new Handle{std::make_unique<Model<T>>(shape_of(*from), *from)};
        });
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void tandem_destroy(Handle* handle) { delete handle; }

int tandem_step(Handle* handle, const tandem_batch* batch) {
    try {
        std::visit([&](auto& model) { model->step(*batch); }, handle->model);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// weight: [columns, depth]
Linear* tandem_linear_create(int32_t dtype, int32_t threads, const tandem_matrix* weight,
                             int32_t columns, int32_t depth) {
    try {
        return with_type(dtype, [&]<class T>() {
            auto* linear = new Linear{Team(threads), {}, {}, Matrix<T>()};
            std::get<Matrix<T>>(linear->matrix)
                .pack(*weight, columns, depth, linear->arena, linear->team,
                      [](int column) { return column; });
            return linear;
        });
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void tandem_linear_destroy(Linear* linear) { delete linear; }

// a: [rows, depth rounded up to 32], zero behind depth; to: [rows, columns rounded up to 32]
// float32
void tandem_linear_apply(Linear* linear, const void* a, int32_t rows, int32_t depth, float* to) {
    std::visit(
        [&]<class T>(const Matrix<T>& matrix) {
            const size_t stride = round_up(matrix.columns(), TILE), from = round_up(depth, TILE);
            const auto finish = [&](int row, int column, Lanes low, Lanes high) {
                store(to + row * stride + column, low);
                store(to + row * stride + column + LANES, high);
            };
            const QuantizedMatrix& quantized = matrix.quantized;
            std::vector<uint32_t> digits(matrix.is_quantized ? rows * quantized.words() : 0);
            std::vector<float> scales(matrix.is_quantized ? rows : 0);
            std::vector<int32_t> sums(matrix.is_quantized ? rows * quantized.sums() : 0);
            linear->phases.reset(2);
            auto job = [&](int) {
                linear->phases.share(0, matrix.is_quantized ? rows : 0, 8, [&](Part part) {
                    for (int row = part.first; row < part.last; ++row)
                        quantized.quantize(static_cast<const T*>(a) + row * from,
                                           digits.data() + row * quantized.words(),
                                           scales.data() + row,
                                           sums.data() + row * quantized.sums());
                });
                linear->phases.share(
                    1, matrix.tiles(), matrix.grain(linear->team.size()), [&](Part part) {
                        if (matrix.is_quantized)
                            quantized.apply({digits.data(), scales.data(), sums.data()}, rows, part,
                                            finish);
                        else
                            matrix.dense.apply(static_cast<const T*>(a), words<T>(from), rows, part,
                                               finish);
                    });
            };
            linear->team.run(job);
        },
        linear->matrix);
}

// Of `from` only the sizes, the type and the pool are read.
AttentionHandle* tandem_attention_create(const tandem_model* from) {
    try {
        const Shape s = shape_of(*from);
        return with_type(from->dtype, [&]<class T>() {
            const Pool<T> pool{static_cast<T*>(from->pool), s.layers, s.kv_heads, s.block_size,
                               s.head_dim};
            return new AttentionHandle{s, AttentionOf<T>{Attention<T>(s), pool}};
        });
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void tandem_attention_destroy(AttentionHandle* handle) { delete handle; }

// Tokens start .. start + count of a sequence in one layer and kv head, whose keys and values are
// in the pool. queries: [count, group, head_dim]; to: [count, group, head_dim].
void tandem_attention_apply(AttentionHandle* handle, int32_t layer, int32_t window, int32_t kv_head,
                            int32_t start, int32_t count, const int32_t* blocks,
                            const void* queries, void* to) {
    const Shape& s = handle->shape;
    const size_t stride = size_t(s.group()) * s.head_dim;
    std::visit(
        [&]<class T>(AttentionOf<T>& kernel) {
            const int most = Attention<T>::task_tokens(s);
            const Span span{start, count, 0, blocks};
            for (int first = 0; first < count; first += most) {
                const int last = std::min(first + most, count);
                const Part parts = Attention<T>::parts(window, start + first, start + last);
                const Task task{0,          first,      last, kv_head, kv_head + 1,
                                parts.first, parts.last, true};
                kernel.attention.attend(kernel.pool, layer, window, span, task,
                                        static_cast<const T*>(queries) + first * stride, 0,
                                        static_cast<T*>(to) + first * stride, stride, {});
            }
        },
        handle->kernel);
}

// x: [rows, count rounded up to 32] float32, zero behind count; so are weight and, of the type, to.
void tandem_rms_norm(int32_t dtype, const float* x, const float* weight, int32_t rows,
                     int32_t count, float eps, void* to) {
    with_type(dtype, [&]<class T>() {
        const size_t stride = round_up(count, TILE);
        for (int row = 0; row < rows; ++row)
            rms_norm(x + row * stride, weight, count, stride, eps,
                     static_cast<T*>(to) + row * stride);
    });
}

// heads: [count, head_dim] float32 of one token, rotated by cos and sin [head_dim / 2].
void tandem_rotate(int32_t dtype, const float* heads, const float* cos, const float* sin,
                   int32_t count, int32_t head_dim, void* to) {
    with_type(dtype, [&]<class T>() {
        for (int i = 0; i < count; ++i)
            place_head(heads + i * head_dim, {}, 0.0f, cos, sin, head_dim,
                       static_cast<T*>(to) + i * head_dim);
    });
}

// silu(gate) * up of `count` float32 each, a multiple of 16.
void tandem_swiglu(int32_t dtype, const float* gate, const float* up, int32_t count, void* to) {
    with_type(dtype, [&]<class T>() {
        for (int i = 0; i < count; i += LANES)
            store(static_cast<T*>(to) + i, silu(load(gate + i)) * load(up + i));
    });
}

// Reads `count` floats, a multiple of 16 per thread, and returns their sum: the floor of
// everything that streams memory.
float tandem_read(const float* data, int64_t count, int32_t threads) {
    Team team(threads);
    std::vector<float> sums(threads * LANES);
    const int64_t share = count / threads;
    auto job = [&](int id) {
        Lanes total[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
        for (const float *p = data + id * share, *end = p + share; p < end; p += 4 * LANES)
            for (int i = 0; i < 4; ++i) {
                __builtin_prefetch(p + 1024 + i * LANES);
                total[i] = total[i] + load(p + i * LANES);
            }
        sums[id * LANES] = sum((total[0] + total[1]) + (total[2] + total[3]));
    };
    Phases phases;
    phases.reset(1);
    auto shared = [&](int) { phases.share(0, threads, 1, [&](Part part) { job(part.first); }); };
    team.run(shared);
    return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

}  // extern "C"
