// Copying a block and digesting it in one pass over its bytes. Called by kvtransfer/copying.py.
//
// The digest is XXH3_64 with the default secret and seed 0 (github.com/Cyan4973/xxHash,
// doc/xxhash_spec.md), written for whole stripes: blocks of a multiple of 64 bytes, 256 at least.
// Stores go past the cache where the CPU can do that: a pool is far larger than the cache, and the
// lines of the target need not be read first.

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Lanes = uint64_t __attribute__((vector_size(64), may_alias));
using LooseLanes = uint64_t __attribute__((vector_size(64), may_alias, aligned(1)));

constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F,
                   PRIME64_3 = 0x165667B19E3779F9, PRIME64_4 = 0x85EBCA77C2B2AE63,
                   PRIME64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t PRIME_AVALANCHE = 0x165667919E3779F9;

constexpr int64_t STRIPE = 64;       // bytes of one round of the digest
constexpr int STRIPES = 16;          // rounds between two scrambles
constexpr int SECRET_STEP = 8;       // bytes by which the key moves on with each round
constexpr int SCRAMBLE_KEY = 128;    // offsets into SECRET: of the scramble,
constexpr int LAST_KEY = 121;        // of the last round of a block,
constexpr int MERGE_KEY = 11;        // and of the end

alignas(64) constexpr uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

enum class To { NOWHERE, CACHE, MEMORY };

inline Lanes load(const uint8_t* at) { return *reinterpret_cast<const LooseLanes*>(at); }

// MEMORY: `at` is a multiple of 64.
template <To TO>
inline void store(uint8_t* at, Lanes value) {
    if constexpr (TO == To::CACHE) {
        *reinterpret_cast<LooseLanes*>(at) = value;
    } else if constexpr (TO == To::MEMORY) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(at), reinterpret_cast<__m512i>(value));
#elif defined(__x86_64__)
        const auto* parts = reinterpret_cast<const __m128i*>(&value);
        for (int i = 0; i < 4; i++) _mm_stream_si128(reinterpret_cast<__m128i*>(at) + i, parts[i]);
#else
        *reinterpret_cast<Lanes*>(at) = value;
#endif
    }
}

inline void fold(Lanes& sums, Lanes data, Lanes key) {
    key ^= data;
    sums += __builtin_shufflevector(data, data, 1, 0, 3, 2, 5, 4, 7, 6);
    sums += (key & 0xffffffff) * (key >> 32);
}

uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Where the next stripe of a block comes from: one piece of memory,
struct Whole {
    const uint8_t* at;

    const uint8_t* next() {
        const uint8_t* here = at;
        at += STRIPE;
        return here;
    }
};

// or many: row after row, and in each row piece after piece, every one from a block of its own. A
// piece without a source is of zeros.
struct Pieces {
    const uint8_t* const* sources;
    int64_t pieces, piece_bytes, stride;
    int64_t row = 0, piece = 0, left = 0;
    const uint8_t* at = nullptr;
    bool is_empty = false;

    const uint8_t* next() {
        alignas(64) static constexpr uint8_t ZEROS[STRIPE] = {};
        if (left == 0) {
            is_empty = sources[piece] == nullptr;
            at = is_empty ? ZEROS : sources[piece] + row * stride;
            left = piece_bytes;
            if (++piece == pieces) {
                piece = 0;
                row++;
            }
        }
        left -= STRIPE;
        const uint8_t* here = at;
        if (!is_empty) at += STRIPE;
        return here;
    }
};

template <To TO, typename Source>
uint64_t pass(Source source, uint8_t* target, int64_t bytes) {
    Lanes sums = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                  PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const Lanes scramble = load(SECRET + SCRAMBLE_KEY);
    int64_t left = bytes / STRIPE;
    const auto round = [&](int key) __attribute__((always_inline)) {
        const Lanes data = load(source.next());
        store<TO>(target, data);
        fold(sums, data, load(SECRET + key));
        target += STRIPE;
    };
    for (; left > STRIPES; left -= STRIPES) {
#pragma GCC unroll 16
        for (int i = 0; i < STRIPES; i++) round(SECRET_STEP * i);
        sums ^= sums >> 47;
        sums ^= scramble;
        sums *= PRIME32_1;
    }
    for (int i = 0; i < left; i++) round(i + 1 < left ? SECRET_STEP * i : LAST_KEY);
    uint64_t keys[8];
    memcpy(keys, SECRET + MERGE_KEY, sizeof keys);
    uint64_t digest = static_cast<uint64_t>(bytes) * PRIME64_1;
    for (int i = 0; i < 8; i += 2) digest += fold(sums[i] ^ keys[i], sums[i + 1] ^ keys[i + 1]);
    digest ^= digest >> 37;
    digest *= PRIME_AVALANCHE;
    return digest ^ (digest >> 32);
}

template <typename Source>
uint64_t copy(Source source, uint8_t* target, int64_t bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(target) % STRIPE == 0;
    return aligned ? pass<To::MEMORY>(source, target, bytes)
                   : pass<To::CACHE>(source, target, bytes);
}

// What is read after this, a generation perhaps, is read after the sources; and whoever is told that
// the blocks are there finds them.
void settle() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

extern "C" {

// Copies `count` blocks of `bytes` bytes each; digests[i] is of what was written to targets[i].
void tandem_copy_blocks(int64_t count, int64_t bytes, const uint8_t* const* sources,
                        uint8_t* const* targets, uint64_t* digests) {
    for (int64_t i = 0; i < count; i++) digests[i] = copy(Whole{sources[i]}, targets[i], bytes);
    settle();
}

// Puts together `count` blocks of `rows` rows. A row has `pieces` pieces of `piece_bytes` bytes (a
// multiple of 64); row r of piece j of block i is at sources[i * pieces + j] + r * stride, and is of
// zeros where that is null. Without `targets` nothing is written; the digests are the same.
void tandem_gather_blocks(int64_t count, int64_t rows, int64_t pieces, int64_t piece_bytes,
                          int64_t stride, const uint8_t* const* sources, uint8_t* const* targets,
                          uint64_t* digests) {
    const int64_t bytes = rows * pieces * piece_bytes;
    for (int64_t i = 0; i < count; i++) {
        const Pieces source{sources + i * pieces, pieces, piece_bytes, stride};
        digests[i] = targets == nullptr ? pass<To::NOWHERE>(source, nullptr, bytes)
                                        : copy(source, targets[i], bytes);
    }
    settle();
}

// Digests of `count` blocks that lie one behind the other.
void tandem_digest_blocks(int64_t count, int64_t bytes, const uint8_t* blocks, uint64_t* digests) {
    for (int64_t i = 0; i < count; i++)
        digests[i] = pass<To::NOWHERE>(Whole{blocks + i * bytes}, nullptr, bytes);
}
}
