"""Triton kernels for the softmax and squared-error heads of large classifiers, usable alone.

From the simplest to the cleverest:

    primitives.py     device functions that every kernel shares
    tiles.py          which tile each kernel uses on which architecture
    operands.py       precision modes: how a matrix is rounded or split for the tensor cores
    prepare.py        the kernel that rounds, splits, pads and turns them
    segments.py       sums of rows that share a class, and one dot product per row and target
    off_target.py     E = exp(z - z_y) off the targets, with its row sums
    library.py        products by torch's library, in the kernels' precision
    products.py       the two products of E with the parameters, epilogues fused
    blocks.py         E a block of classes at a time, each multiplied while the cache holds it
    fp8.py            E and both products in e4m3, with a scale a row and 128 terms
    one_pass.py       loss and both gradients with E never stored, for narrow features
    matvec.py         products with the logit gradient and its transpose
    hvp.py            the tile of the Hessian-vector product
    squared_error.py  Gram matrices in float64, for the squared error
    row_sums.py       the kernels between the passes: from the sums of a row's tiles to its factors
    rows.py           loss and gradient factors of a row from its sums
    head_checks.py    what a driver of a head refuses
    head_parts.py     what the drivers of a head share
    head.py           drivers on torch tensors: values and gradients
    fp8_head.py       driver on torch tensors of mode fp8, with its fall-back to bfloat16
    replays.py        steps recorded as CUDA graphs and replayed
    curvature.py      drivers on torch tensors: Hessian and logit-gradient products
    squared_head.py   driver on torch tensors of the squared error
    build.py, builds.py, vector_builds.py
                      what the gate builds: types, constants and tiles of every launch
    compile_gate.py   builds every kernel without a GPU and inspects the result

Importing the package imports neither torch nor triton.
"""
