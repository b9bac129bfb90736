// Memory in large pages: weights are streamed once per step, and a walk of the page table for
// every 4 KB would be felt.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

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

}  // namespace tandem
