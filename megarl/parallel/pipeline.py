"""Point-to-point sends between pipeline stages for micro-batches of different lengths."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor


class PipelineCommunicator(P2PCommunicator):
    """Megatron's communicator, exchanging shapes one direction after the other.

    Upstream posts the shapes of both directions at once. With two stages the previous and the next rank are the same, and
    messages between two ranks match in the order they were posted, so the two shapes can be mistaken for each other.
    """

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> Any:
        forward = self._exchange(tensor_send_next, self.next_rank, self.prev_rank if recv_prev else None)
        backward = self._exchange(tensor_send_prev, self.prev_rank, self.next_rank if recv_next else None)
        return forward, backward

    def _exchange(self, sent: Tensor | None, destination: int, source: int | None) -> list[int]:
        device = torch.cuda.current_device()
        operations = []
        received = torch.zeros(3, device=device, dtype=torch.int64)
        if sent is not None:
            shape = torch.tensor(sent.size(), device=device, dtype=torch.int64)
            operations.append(dist.P2POp(dist.isend, shape, destination, self.pp_group))
        if source is not None:
            operations.append(dist.P2POp(dist.irecv, received, source, self.pp_group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return received.tolist()
