"""The Triton kernels, imported when they are first wanted."""

from packc.ops.selective_scan.triton_backward import backward as backward
from packc.ops.selective_scan.triton_forward import forward as forward
from packc.ops.selective_scan.triton_summary import adjoint as adjoint
from packc.ops.selective_scan.triton_summary import summary as summary
