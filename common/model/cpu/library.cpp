// The functions that Python calls. They return null or non-zero where memory is short.
#include <memory>
#include <variant>

#include "step.h"

using namespace tandem;

struct Handle {
    std::variant<std::unique_ptr<Model<float>>, std::unique_ptr<Model<bf16>>> model;
};

extern "C" {

Handle* tandem_create(const tandem_model* from) {
    const Shape shape{from->vocab,    from->hidden,   from->inner,      from->layers, from->heads,
                      from->kv_heads, from->head_dim, from->block_size, from->eps};
    try {
        if (from->dtype == 0) return new Handle{std::make_unique<Model<float>>(shape, *from)};
        return new Handle{std::make_unique<Model<bf16>>(shape, *from)};
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

}  // extern "C"
