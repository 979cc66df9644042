"""GPTQ's columns, a block of 128 in one launch on a GPU: one after another they are some ten launches each.

gptqmodel (7.6) has such a kernel too, which wants nvcc and a C++ compiler in the pod. This one is compiled by NVRTC,
which comes with torch. It does what the columns do one by one, in the same order and with the same roundings.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

log = logging.getLogger(__name__)

ROWS_OF_A_LAUNCH = 4
"""A warp each."""
ROUNDED_AS_TORCH_DOES = ["--fmad=false"]
NAME = "gptq_block"
SOURCE = r"""
// A warp has a row, each of its lanes four columns: lane, lane + 32, lane + 64, lane + 96.
extern "C" __global__ void gptq_block(
    float* work, const float* inverse, const float* scale, const float* zero, const int* group,
    float* quantized, float* errors, float* losses,
    int rows, int work_stride, int inverse_row, int inverse_column, int scale_stride, int zero_stride,
    int quantized_stride, int errors_stride, int losses_stride, int levels)
{
    const int lane = threadIdx.x;
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    float weight[4], code[4], error[4], loss[4];
    #pragma unroll
    for (int part = 0; part < 4; ++part) weight[part] = work[row * work_stride + part * 32 + lane];
    #pragma unroll
    for (int part = 0; part < 4; ++part) {
        for (int step = 0; step < 32; ++step) {
            const int column = part * 32 + step;
            const float mine = __shfl_sync(0xffffffffu, weight[part], step);
            const float diagonal = inverse[(long long)column * (inverse_row + inverse_column)];
            const float width = scale[(long long)group[column] * scale_stride + row];
            const float middle = zero[(long long)group[column] * zero_stride + row];
            float whole = rintf(mine / width) + middle;
            if (whole < 0.0f) whole = 0.0f;              // and not fmaxf: NaN stays NaN
            if (whole > (float)levels) whole = (float)levels;
            const float rounded = width * (whole - middle);
            const float left = mine - rounded;
            const float spread = left / diagonal;
            if (lane == step) {
                code[part] = rounded;
                error[part] = spread;
                loss[part] = left * left / (diagonal * diagonal);
            }
            #pragma unroll
            for (int other = 0; other < 4; ++other) {
                const int place = other * 32 + lane;
                if (place >= column)
                    weight[other] -= spread
                        * inverse[(long long)column * inverse_row + (long long)place * inverse_column];
            }
        }
    }
    #pragma unroll
    for (int part = 0; part < 4; ++part) {
        const int place = part * 32 + lane;
        work[row * work_stride + place] = weight[part];
        quantized[row * quantized_stride + place] = code[part];
        errors[row * errors_stride + place] = error[part];
        losses[row * losses_stride + place] = loss[part];
    }
}
"""


@cache
def compile_kernel(device: int) -> Any:  # noqa: ANN401 - torch's type of a kernel is its own
    """The kernel for that GPU, or None with a word in the log: then columns go one after another."""
    import torch  # noqa: PLC0415 - slow

    try:
        with torch.cuda.device(device), without_toolkit():
            return torch.cuda._compile_kernel(SOURCE, NAME, nvcc_options=ROUNDED_AS_TORCH_DOES)  # noqa: SLF001
    except (RuntimeError, OSError, AttributeError) as error:
        log.warning("GPTQ goes column by column, which is slow: its kernel could not be compiled: %s", error)
        return None


@contextmanager
def without_toolkit() -> Iterator[None]:
    """Let torch (2.13) compile where no CUDA toolkit is: it insists on the place of headers that nothing includes."""
    from torch.utils import cpp_extension  # noqa: PLC0415 - slow

    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or "no-toolkit"
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home


def update_block(  # noqa: PLR0913 - as gptqmodel calls it
    work: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    quantized: torch.Tensor,
    errors: torch.Tensor,
    losses: torch.Tensor,
    levels: int,
) -> None:
    """Round 128 columns of `work` (rows, 128), each after the error of those before it was spread onto it.

    `inverse` (128, 128): the Cholesky factor of the inverse Hessian, of this block. `scale`, `zero` (groups, rows);
    `group` (128), int32: a column's group. Written are `work`, `quantized`, `errors` and `losses` (rows, 128), which
    may be parts of wider tensors; all in fp32. Arithmetic: https://arxiv.org/abs/2210.17323, algorithm 1.
    """
    import torch  # noqa: PLC0415 - slow

    rows = work.shape[0]
    strides = [work.stride(0), *inverse.stride(), scale.stride(0), zero.stride(0)]
    strides += [each.stride(0) for each in (quantized, errors, losses)]
    with torch.cuda.device(work.device):
        compile_kernel(work.device.index)(
            grid=(-(-rows // ROWS_OF_A_LAUNCH), 1, 1),
            block=(32, ROWS_OF_A_LAUNCH, 1),
            args=[work, inverse, scale, zero, group, quantized, errors, losses, rows, *strides, levels],
        )


def round_in_blocks(kernels: Any) -> None:  # noqa: ANN401 - a module of gptqmodel
    """Let gptqmodel take this kernel (it asks `gptqmodel.quantization.gptq_cuda` on GPUs only)."""
    import torch  # noqa: PLC0415 - slow

    kernels.block_update_available = lambda: compile_kernel(torch.cuda.current_device()) is not None
    kernels.gptq_block_update = update_block
