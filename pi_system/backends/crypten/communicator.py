"""CrypTen's communicator over one :class:`Channel`: two parties, nothing but int64 tensors.

What goes over the wire is exactly one frame per party and exchange, so the channel's meter is
the only account of bytes and rounds. Collectives that two parties computing on arithmetic and
binary shares do not need are absent, and CrypTen's base class raises for them; objects
(``send_obj`` and its like) are refused because CrypTen would pickle them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from crypten.communicator import Communicator
from torch import Tensor
from torch.distributed import ReduceOp

from ...errors import RefusedError
from ...net.channel import Channel
from ...net.meter import PHASES

Array = npt.NDArray[np.int64]
_COMBINE: Final[dict[Any, Callable[[Array, Array], Array]]] = {
    ReduceOp.SUM: np.add,
    ReduceOp.BXOR: np.bitwise_xor,
}


class ChannelCommunicator(Communicator):  # type: ignore[misc]
    """Party ``rank`` (0 the server, 1 the client) at one end of ``channel``."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel = channel
        self._rank = rank

    def get_rank(self) -> int:
        return self._rank

    def get_world_size(self) -> int:
        return 2

    def barrier(self) -> None:
        """Nothing: two parties that exchange messages need no barrier."""

    def _refuse_object(self, *_: Any, **__: Any) -> NoReturn:
        raise RefusedError("CrypTen would send a pickled object; this is refused")

    send_obj = recv_obj = broadcast_obj = _refuse_object

    def all_reduce(
        self, input: Tensor | Sequence[Tensor], op: Any = ReduceOp.SUM, batched: bool = False
    ) -> Tensor | list[Tensor]:
        """Combine both parties' tensors; a batch goes in one frame."""
        tensors = _listed(input, batched)
        mine = _flat(tensors)
        theirs = self._channel.exchange_array(mine)
        return _shaped(_COMBINE[op](mine, theirs), tensors, batched)

    def reduce(
        self,
        input: Tensor | Sequence[Tensor],
        dst: int,
        op: Any = ReduceOp.SUM,
        batched: bool = False,
    ) -> Tensor | list[Tensor] | None:
        """Combine both parties' tensors at party ``dst`` only: one message."""
        tensors = _listed(input, batched)
        mine = _flat(tensors)
        if self._rank != dst:
            self._channel.send_array(mine)
            return None
        theirs = self._channel.recv_array(np.int64, mine.shape)
        return _shaped(_COMBINE[op](mine, theirs), tensors, batched)

    def get_communication_stats(self) -> dict[str, int]:
        """Bytes sent to the other party, as the channel's meter counted them on the socket."""
        meter, peer = self._channel.meter, self._channel.peer
        return {"bytes": sum(meter.total(phase, peer, "sent") for phase in PHASES)}

    def _refuse_counter(self) -> NoReturn:
        raise RefusedError("CrypTen's counter is not kept; the channel's meter counts bytes")

    reset_communication_stats = print_communication_stats = _refuse_counter


def _listed(input: Tensor | Sequence[Tensor], batched: bool) -> list[Tensor]:
    if isinstance(input, Tensor):
        assert not batched
        return [input]
    assert batched
    return list(input)


def _flat(tensors: list[Tensor]) -> Array:
    arrays: list[Array] = [tensor.reshape(-1).numpy() for tensor in tensors]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _shaped(flat: Array, tensors: list[Tensor], batched: bool) -> Tensor | list[Tensor]:
    parts = torch.split(torch.from_numpy(flat), [tensor.numel() for tensor in tensors])
    results = [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
    return results if batched else results[0]
