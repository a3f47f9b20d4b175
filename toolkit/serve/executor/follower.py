"""A rank beside the first: it loads its part of the model and computes every step it is told.

`python -m toolkit.serve.executor.follower`, started by tensor_parallel.py. It hears on its standard
input and ends when that does.
"""

from __future__ import annotations

import pickle
import signal
import sys

import torch

from toolkit.serve.executor import cuda
from toolkit.serve.executor.device import DeviceExecutor, Place
from toolkit.serve.executor.tensor_parallel import Orders
from toolkit.serve.model import weights
from toolkit.serve.model.device import DeviceDecoder
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.ranks import Ranks, meeting_place


def main() -> None:
    """Load, meet the others, follow."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whoever ends the first rank lets it drain: it needs this one until its pipe closes.
        signal.signal(number, signal.SIG_IGN)
    orders: Orders = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(orders.threads)
    place = _place(orders)
    model = weights.load(orders.source, part=orders.part)
    decoder = DeviceDecoder(model.config, model.weights, device=place.device, dtype=place.dtype)
    store = meeting_place(orders.port)
    store.set(orders.ready, "")
    decoder.ranks = Ranks(store, orders.part, place.device)
    executor = DeviceExecutor(decoder, orders.room, recorder=place.recorder, threads=orders.threads)
    while True:
        try:
            step: StepInput | None = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if step is None:
            executor.start()
        else:
            executor.compute(step)
        if place.device.type == "cuda":
            # Numbers of the next step may be written only when this one has read its own.
            torch.cuda.synchronize(place.device)


def _place(orders: Orders) -> Place:
    if orders.device == "cuda":
        return cuda.place(orders.dtype, orders.part.rank)
    return Place(torch.device("cpu"), orders.dtype, lambda: 0)


if __name__ == "__main__":
    main()
