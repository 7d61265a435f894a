"""Memory that another process on the same machine, or on the same GPU, opens by a handle.

The other end is ``open_handle`` in engines/plugin/megarl_slice_sources.py.
"""

import json
import mmap
import os
from typing import Any

import torch

HANDLE_BYTES = 2048  # a handle travels as JSON, filled up with spaces; the receiver's number too


class SharedBuffer:
    """A staging buffer for one reader. On a GPU it is opened by CUDA IPC, else by its file, which has no name to leave behind.

    Attributes:
        data: [num_bytes], uint8. Whoever still uses it keeps the memory.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._file: int | None = None
        if device.type == "cuda":
            self.data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        self._file = os.memfd_create("megarl-weights")
        os.ftruncate(self._file, num_bytes)
        self.data = torch.frombuffer(mmap.mmap(self._file, num_bytes), dtype=torch.uint8)

    def handle(self) -> bytes:
        """What one other process opens the buffer with, once: CUDA counts a reader for every handle made."""
        described: dict[str, Any]
        if self._file is not None:
            described = {"path": f"/proc/{os.getpid()}/fd/{self._file}", "bytes": self.data.numel()}
        else:
            # (device, memory, bytes, offset, reference counter, its offset, event, whether to wait for the event)
            parts = self.data.untyped_storage()._share_cuda_()
            described = {"cuda": [part.hex() if isinstance(part, bytes) else part for part in parts[1:]]}
        handle = json.dumps(described).encode().ljust(HANDLE_BYTES)
        assert len(handle) == HANDLE_BYTES
        return handle

    def close(self) -> None:
        """Give the memory up, which lives on until its reader has closed it too."""
        del self.data
        if self._file is not None:
            os.close(self._file)
            self._file = None
        else:
            torch.cuda.ipc_collect()
