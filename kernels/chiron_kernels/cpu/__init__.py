"""Kernels for x86-64 CPUs with AVX-512, in C, compiled on the machine that runs them."""
