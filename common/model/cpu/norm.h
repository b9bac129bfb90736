// RMSNorm and rotary embedding, row by row, in float32.
#pragma once

#include "model.h"

namespace tandem {

constexpr int MAX_HEAD_DIM = 512;

template <class T>
inline void store_row(T* to, const float* from, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) narrow(to[i], from[i]);
}

template <class T>
inline void load_row(float* to, const T* from, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
}

// 1 / rms of `count` values; x is zero from there to `padded`, a multiple of 16.
inline float inverse_rms(const float* x, int count, size_t padded, float eps) {
    Lanes squares = fill(0.0f);
    for (size_t i = 0; i < padded; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    return 1.0f / std::sqrt(sum(squares) / float(count) + eps);
}

// weight and x are zero from `count` to `padded`, and so is the result.
template <class T>
inline void rms_norm(const float* x, const float* weight, int count, size_t padded, float eps,
                     T* to) {
    const Lanes scale = fill(inverse_rms(x, count, padded, eps));
    for (size_t i = 0; i < padded; i += LANES)
        store(to + i, load(x + i) * scale * load(weight + i));
}

// One head: normalised if there is a weight, then rotated by cos and sin [head_dim / 2] (Su et al.
// 2021, halves as in transformers), then written in the model's type.
template <class T>
inline void place_head(const float* from, const std::vector<float>& norm, float eps,
                       const float* cos, const float* sin, int head_dim, T* to) {
    alignas(64) float x[MAX_HEAD_DIM] = {}, rotated[MAX_HEAD_DIM];
    std::memcpy(x, from, head_dim * sizeof(float));
    if (!norm.empty()) rms_norm(x, norm.data(), head_dim, round_up(head_dim, LANES), eps, x);
    const int half = head_dim / 2;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Lanes a = load(x + i), b = load(x + i + half), c = load(cos + i), d = load(sin + i);
        store(rotated + i, a * c - b * d);
        store(rotated + i + half, b * c + a * d);
    }
    for (; i < half; ++i) {
        rotated[i] = x[i] * cos[i] - x[i + half] * sin[i];
        rotated[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
    store_row(to, rotated, head_dim);
}

}  // namespace tandem
