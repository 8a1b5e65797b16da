"""Steps recorded as CUDA graphs and replayed, for repeated calls of one shape.

A step is a call whose launches depend on tensors, by their memory, shape and kind, and on settings:

    first call     runs it: kernels are built, and the library takes its workspace
    second         records it, and replays what it recorded
    later          replay: one launch from the host

Numbers may change between calls, in place; other memory, another shape or another setting is
another step. The handle owns the graphs, at most `most` of them, and the one that was not called
for longest leaves first. What a recorded step allocates stays its own until then, and graphs of a
stream share it; so a caller gets copies of the results, and names what he wants written in place
among the tensors.

Count: bytes and flops are the step's, and copies of its results, which are vectors of its rows. A
step of the softmax head is 7 launches a chunk of rows and some 20 more, at several microseconds of
the host each; between them a device that is done waits. At (16384, 16384, 64) recording took the
share of the library's products from 30 to 92 %, at (16384, 16384, 4096) from 83 to 92
(`bench/results/nvidia-h200.csv`). Memory is a second chunk of E: the plain call's stays with the
allocator. Undecided in a solve, whose trial points have memory of their own; so `tiles.REPLAYED`
has no mode before a device has shown it faster, and `bench/gpu.py` times both.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Results = tuple[Any, ...]  # tensors, and None for what there is not
Step = Callable[[], Results]


class Recorder(Protocol):
    """What records a step: where it would run, None for nowhere; and (its replay, the results that
    this fills).
    """

    def place(self, tensors: Sequence[Tensor | None]) -> Hashable | None: ...

    def record(self, step: Step, place: Hashable) -> tuple[Callable[[], None], Results]: ...


class CudaGraphs:
    """Records on CUDA, unless a graph of the caller's own is being captured already. Graphs of one
    stream share their memory.
    """

    def __init__(self) -> None:
        self.pools: dict[Hashable, tuple[int, int]] = {}

    def place(self, tensors: Sequence[Tensor | None]) -> Hashable | None:
        first = next((x for x in tensors if x is not None), None)
        if first is None or not first.is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        return first.device.index, torch.cuda.current_stream(first.device).cuda_stream

    def record(self, step: Step, place: Hashable) -> tuple[Callable[[], None], Results]:
        if place not in self.pools:
            self.pools[place] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pools[place]):
            results = step()
        return graph.replay, results


class Replays:
    """The handle: ``replays(step, tensors, settings)`` is ``step()``, from its second call on by a
    recording.

    Args:
        step: must not wait for the device. Its results are its own or tensors of the recording.
        tensors: all that its launches read or write and that was there before, None for what is
            not there.
        settings: everything else that decides its launches, hashable.
    """

    def __init__(self, most: int = 4, recorder: Recorder | None = None) -> None:
        self.most = most
        self.recorder = CudaGraphs() if recorder is None else recorder
        self._known: OrderedDict[Hashable, tuple[Callable[[], None], Results] | None] = (
            OrderedDict()
        )

    def __call__(
        self, step: Step, tensors: Sequence[Tensor | None], settings: Hashable = ()
    ) -> Results:
        place = self.recorder.place(tensors)
        if place is None:
            return step()
        key = place, settings, tuple(map(signature, tensors))
        if key not in self._known:
            results = step()
            self._remember(key, None)
            return results
        recorded = self._known[key]
        if recorded is None:
            recorded = self.recorder.record(step, place)
        self._remember(key, recorded)
        replay, results = recorded
        replay()
        return tuple(x if x is None else x.clone() for x in results)

    def _remember(self, key: Hashable, recorded: tuple[Callable[[], None], Results] | None) -> None:
        """The last one called for; those beyond `most` go, and their graphs with them."""
        self._known[key] = recorded
        self._known.move_to_end(key)
        while len(self._known) > self.most:
            self._known.popitem(last=False)


def signature(x: Tensor | None) -> Hashable:
    """What a recorded launch holds of a tensor."""
    return None if x is None else (x.data_ptr(), x.dtype, tuple(x.shape), x.stride())
