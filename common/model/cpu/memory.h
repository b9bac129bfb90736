// Memory in large pages: weights are streamed once per step, and a walk of the page table for
// every 4 KB would be felt.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace tandem {

template <class T>
class Buffer {
 public:
    Buffer() = default;
    explicit Buffer(size_t count) { resize(count); }
    ~Buffer() { release(); }
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(base_, other.base_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }

    // All zero afterwards. Throws std::bad_alloc.
    void resize(size_t count) {
        release();
        const size_t page = size_t(2) << 20;
        const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
        const size_t wanted = bytes < page ? bytes : bytes + page;
        if (bytes == 0) return;
        void* memory =
            mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        base_ = memory;
        bytes_ = wanted;
        data_ = static_cast<T*>(memory);
        if (bytes >= page) {
            data_ =
                reinterpret_cast<T*>((reinterpret_cast<size_t>(memory) + page - 1) / page * page);
            madvise(data_, bytes, MADV_HUGEPAGE);
        }
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    explicit operator bool() const { return data_ != nullptr; }

 private:
    void release() {
        if (base_ != nullptr) munmap(base_, bytes_);
        base_ = nullptr;
        data_ = nullptr;
        bytes_ = 0;
    }

    void* base_ = nullptr;
    T* data_ = nullptr;
    size_t bytes_ = 0;
};

inline size_t round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Memory of many matrices, one after the other, so that small ones too lie in large pages.
class Arena {
 public:
    // Zeros, at a cache line; as long as the arena lives. Throws std::bad_alloc.
    uint32_t* take(size_t count) {
        count = round_up(count, 16);
        if (count > left_) {
            left_ = count > CHUNK ? count : CHUNK;
            chunks_.emplace_back(left_);
            next_ = chunks_.back().data();
        }
        uint32_t* taken = next_;
        next_ += count;
        left_ -= count;
        return taken;
    }

 private:
    static constexpr size_t CHUNK = size_t(16) << 20;  // words

    std::vector<Buffer<uint32_t>> chunks_;
    uint32_t* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace tandem
