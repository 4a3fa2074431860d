"""Triton kernels of the hot path.

Each module holds one kernel: the kernel itself, `<name>_launch(...)`, which checks the arguments and
returns a `Launch`, and `<name>(...)`, which launches. A torch reference of the same name and signature
is in `chiron_kernels.reference`.

The configuration of a launch (tile sizes, warps, stages) follows from shapes and dtypes alone, by plain
conditions: nothing is tuned while serving, nothing is read back from the device, and a launch may be
captured in a CUDA graph. Numbers that change from step to step, and the alignment of vectors whose place
depends on such a number, are kept out of Triton's specialisation (`do_not_specialize`): each new one would
compile the kernel again while requests wait. As a `Launch` of tensors on torch's `meta` device compiles like
any other, what the compile gate compiles ahead of time is what the engine runs.

All tensors of a call lie on one GPU, which need not be the current one. The GPUs of a process are taken to be
alike.
"""
