// A model as the kernels see it: its sizes, its packed weights, and the KV pool.
#pragma once

#include <vector>

#include "abi.h"
#include "quantized.h"

namespace tandem {

struct Shape {
    int vocab, hidden, inner, layers, heads, kv_heads, head_dim, block_size;
    float eps;

    int group() const { return heads / kv_heads; }  // query heads that share a kv head
    // Elements between rows of activations; what lies behind the last column stays zero.
    size_t hidden_stride() const { return round_up(hidden, TILE); }
    size_t qkv_stride() const { return round_up(size_t(heads + 2 * kv_heads) * head_dim, TILE); }
    size_t attended_stride() const { return round_up(size_t(heads) * head_dim, TILE); }
    size_t inner_stride() const { return round_up(inner, TILE); }
    size_t value_stride() const { return round_up(head_dim, TILE); }
};

// [num_blocks, layer, k|v, kv_head, slot, head_dim]
template <class T>
struct Pool {
    T* data;
    int layers, kv_heads, block_size, head_dim;

    // All slots of one head: [slot, head_dim]. kind: 0 keys, 1 values.
    T* page(int block, int layer, int kind, int head) const {
        const int64_t number = ((int64_t(block) * layers + layer) * 2 + kind) * kv_heads + head;
        return data + number * block_size * head_dim;
    }
};

// A vector of parameters in float32, zero up to `size`; empty where there is none.
template <class T>
std::vector<float> parameters(const void* source, size_t count, size_t size) {
    std::vector<float> values;
    if (source == nullptr) return values;
    values.resize(size);
    for (size_t i = 0; i < count; ++i) values[i] = widen(static_cast<const T*>(source)[i]);
    return values;
}

template <class T>
struct Layer {
    std::vector<float> input_norm, qkv_bias, q_norm, k_norm, o_bias, mlp_norm, gate_up_bias,
        down_bias;
    Matrix<T> qkv, o, gate_up, down;
    int window;  // 0: none

    Layer(const Shape& s, const tandem_layer& from, Arena& arena, Team& team)
        : window(from.window) {
        const int q_size = s.heads * s.head_dim, kv_size = s.kv_heads * s.head_dim;
        const int qkv_size = q_size + 2 * kv_size;
        input_norm = parameters<T>(from.input_norm, s.hidden, s.hidden_stride());
        mlp_norm = parameters<T>(from.mlp_norm, s.hidden, s.hidden_stride());
        q_norm = parameters<T>(from.q_norm, s.head_dim, round_up(s.head_dim, LANES));
        k_norm = parameters<T>(from.k_norm, s.head_dim, round_up(s.head_dim, LANES));
        qkv_bias = parameters<T>(from.qkv_bias, qkv_size, s.qkv_stride());
        o_bias = parameters<T>(from.o_bias, s.hidden, s.hidden_stride());
        down_bias = parameters<T>(from.down_bias, s.hidden, s.hidden_stride());
        pack(qkv, from.qkv, qkv_size, s.hidden, arena, team);
        pack(o, from.o, s.hidden, q_size, arena, team);
        pack(down, from.down, s.hidden, s.inner, arena, team);

        // A tile of gate_up is 16 columns of gate and the same 16 of up, so that one register block
        // holds both arguments of silu(gate) * up.
        const int columns = int(round_up(s.inner, LANES)) * 2;
        const auto source = [&](int column) {
            const int index = column / TILE * LANES + column % LANES;
            return index >= s.inner ? -1 : index + (column % TILE < LANES ? 0 : s.inner);
        };
        gate_up.pack(from.gate_up, columns, s.hidden, arena, team, source);
        if (from.gate_up_bias != nullptr) {
            gate_up_bias.resize(columns);
            for (int column = 0; column < columns; ++column)
                if (const int row = source(column); row >= 0)
                    gate_up_bias[column] = widen(static_cast<const T*>(from.gate_up_bias)[row]);
        }
    }

    static void pack(Matrix<T>& matrix, const tandem_matrix& source, int columns, int depth,
                     Arena& arena, Team& team) {
        matrix.pack(source, columns, depth, arena, team, [](int column) { return column; });
    }
};

}  // namespace tandem
