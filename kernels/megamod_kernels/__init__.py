"""GPU kernels of megamod, one a file: equation, plain torch reference, Triton kernel, autograd, public function.

Nothing here imports megamod or megatron-core, and triton may be absent: then the references run.
"""
