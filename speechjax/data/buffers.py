"""Memory for batches, used again: the pages of a fresh array cost more CPU time than the samples that go into it."""

import math
import threading
import weakref

import numpy as np

_ALIGN = 64  # bytes; TensorFlow and XLA copy what is aligned to less


class Buffers:
    """Hands out arrays, in memory whose last array nobody holds any more; may be used from several threads.

    Every view of an array, and TensorFlow and JAX where they read it in place, hold on to it, so an array keeps its
    content for as long as anybody can reach it.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array of this shape, its content left to chance."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            fitting = next((k for k, memory in enumerate(self._free) if len(memory) >= size + _ALIGN), None)
            if fitting is None:
                self._free.clear()  # too small for one batch is too small for its successors
                memory = np.empty(size + _ALIGN, np.uint8)
            else:
                memory = self._free.pop(fitting)
        # Views of an array hold the outermost one that is made from a buffer, not the memory below that.
        array = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        start = -memory.ctypes.data % _ALIGN
        return array[start : start + size].view(dtype).reshape(shape)
