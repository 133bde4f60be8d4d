"""Bytes that come in by TCP."""

import os
import socket
import struct
from pathlib import Path


def received_bytes() -> int:
    """As Linux counts it, of all TCP connections that this process has."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not descriptor.readlink().name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # no connection, or closed meanwhile
            continue
        total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total
