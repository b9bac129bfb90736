"""The backend for GPUs: kernels in Triton, and the decoder that runs a step with them."""
