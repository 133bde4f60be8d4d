"""The Triton kernels, imported when they are first wanted."""

from packc.ops.linear_scan.triton_backward import backward as backward
from packc.ops.linear_scan.triton_forward import forward as forward
from packc.ops.linear_scan.triton_summary import adjoint as adjoint
from packc.ops.linear_scan.triton_summary import summary as summary
