/* The C interface of the CPU kernels; `common.model.cpu.library` mirrors it in ctypes.
 *
 * Matrices are [out, in], row-major, of the model's type (0: float32, 1: bfloat16). */
#pragma once

#include <stdint.h>

struct tandem_matrix {
    const void* data;    /* of the model's type; quantised: int8 */
    const float* scales; /* [out, groups]: what a value of 1 means; of quantised ones only */
    int32_t bits;        /* 0: not quantised; 8 or 4: how many of each value count */
    int32_t group;       /* values of a row that share a scale, a multiple of 8; 0: all */
    int32_t planes;      /* the other operand is quantised to 8 bits (1) or to 16 (2) */
};

struct tandem_layer {
    struct tandem_matrix qkv, o, gate_up, down;
    const void *input_norm, *qkv_bias, *q_norm, *k_norm, *o_bias;
    const void *mlp_norm, *gate_up_bias, *down_bias; /* null: the model has none */
    int32_t window; /* a token sees this many tokens, itself included; 0: all before it */
};

struct tandem_model {
    int32_t dtype, threads;
    int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, block_size;
    float eps;
    const void* embedding; /* [vocab, hidden], read in every step */
    const void* norm;
    struct tandem_matrix head;
    const struct tandem_layer* layer; /* [layers]; copied into packed form */
    void* pool; /* [num_blocks, layer, k|v, kv_head, slot, head_dim], read and written in every step
                 */
};

/* One step over `rows` rows; row r is `counts[r]` tokens from position `starts[r]` on. */
struct tandem_batch {
    int32_t rows, tokens, samples;
    const int32_t *starts, *counts;
    const int32_t* blocks;        /* the block tables of all rows, one after the other */
    const int32_t* block_offsets; /* [rows]: where each begins */
    const int32_t* token_ids;     /* [tokens] */
    const float *cos, *sin;       /* [positions, head_dim / 2] */
    const int32_t* sample_tokens; /* [samples]: tokens of the batch whose logits are wanted */
    const int32_t* sample_lines; /* [samples]: line of `logits`, or -1: the largest one is enough */
    float* logits;               /* [lines, vocab] */
    int32_t* best;               /* [samples]: index of the largest logit, the first of equals;
                                    of samples without a line only */
};
