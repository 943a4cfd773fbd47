"""Memory is used again, and never while anybody can still see what lies in it."""

import gc

import jax
import numpy as np
import pytest

from speechjax.data.buffers import Buffers


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = Buffers()
    first = buffers.empty((3, 50), np.int16)
    assert first.shape == (3, 50)
    assert first.dtype == np.int16
    assert address(first) % 64 == 0
    place = address(first)
    del first
    assert address(buffers.empty((2, 60), np.int16)) == place  # smaller ones fit, too


@pytest.mark.parametrize("view", [lambda a: a[1:, 7:], lambda a: a.T, lambda a: a.reshape(-1)[::3], lambda a: a.data])
def test_a_view_keeps_its_memory(view):
    buffers = Buffers()
    array = buffers.empty((3, 50), np.int16)
    array[:] = 7
    place, held = address(array), view(array)
    del array
    other = buffers.empty((3, 50), np.int16)
    assert address(other) != place
    other[:] = 9
    assert (np.asarray(held) == 7).all()


def test_larger_arrays_get_larger_memory():
    buffers = Buffers()
    sizes = [10, 1000, 20, 5000, 4999]
    for size in sizes:
        buffers.empty((size,), np.float32)[:] = 1.0
    assert len(buffers._free) == 1


def test_what_jax_reads_in_place_is_not_written_over():
    buffers = Buffers()
    held = []
    for k in range(8):
        array = buffers.empty((4, 1000), np.int16)
        array[:] = k
        held.append(jax.device_put(array))
        del array
    for k, array in enumerate(held):
        assert (np.asarray(array) == k).all()


def test_through_tensorflow_a_few_buffers_serve_many_batches():
    import tensorflow as tf

    buffers, places = Buffers(), set()

    def fetch(k):
        array = buffers.empty((50, 1000), np.int16)
        array[:] = k
        places.add(address(array))
        return array

    numbers = tf.data.Dataset.range(60)
    batches = numbers.map(lambda k: tf.numpy_function(fetch, [k], tf.int16, stateful=False), num_parallel_calls=2)
    late = []  # what a slow reader still holds
    for k, batch in enumerate(batches.prefetch(2).as_numpy_iterator()):
        late = [*late[-2:], (k, batch)]
        assert all((array == number).all() for number, array in late)
    gc.collect()
    assert len(places) < 20
