"""The parts of `benchmarks.gpu`. Nothing here imports pyzmq, msgspec, redis or fastapi."""
