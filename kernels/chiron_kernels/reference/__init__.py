"""What the Triton kernels compute, in plain torch: same names, same signatures, any device and dtype."""
