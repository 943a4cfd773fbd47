"""The quantizer of VQ-VAE against loops: choice, gradients, moving codebook, revival."""

import jax
import jax.numpy as jnp
import numpy as np

from speechjax.models.vector_quantizer import VectorQuantizer, codewords, follow, revive

B, T, V, C = 2, 9, 5, 3


def drawn(seed: int = 0):
    """(inputs, which are valid, codebook)."""
    rng = np.random.default_rng(seed)
    z = jnp.asarray(rng.normal(size=(B, T, C)), jnp.float32)
    valid = jnp.arange(T)[None] < jnp.array([[9], [4]])
    counts = rng.uniform(1, 4, V)
    sums = rng.normal(size=(V, C)) * counts[:, None]
    return z, valid, dict(sums=jnp.asarray(sums, jnp.float32), counts=jnp.asarray(counts, jnp.float32))


def test_nearest_codeword_and_what_it_is_given():
    z, valid, book = drawn()
    out = VectorQuantizer(V).apply({"codebook": book}, z, valid)
    words = np.asarray(book["sums"], np.float64) / np.asarray(book["counts"])[:, None]
    sums, counts = np.zeros((V, C)), np.zeros(V)
    for b, t in np.ndindex(B, T):
        code = np.square(words - np.asarray(z)[b, t]).sum(axis=1).argmin()
        assert out.codes[b, t] == code
        np.testing.assert_allclose(out.vectors[b, t], words[code], atol=1e-5)  # z + (word - z) in float32
        np.testing.assert_allclose(out.distance[b, t], np.square(words[code] - np.asarray(z)[b, t]).mean(), rtol=1e-4)
        if valid[b, t]:
            sums[code] += np.asarray(z)[b, t]
            counts[code] += 1
    np.testing.assert_array_equal(out.given["counts"], counts)
    np.testing.assert_allclose(out.given["sums"], sums, atol=1e-5)
    assert counts.sum() == 13, "padding is not given"
    assert len(set(np.asarray(out.codes).ravel().tolist())) > 2


def test_gradients_pass_straight_through_and_commitment_moves_the_input_alone():
    z, valid, book = drawn()
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, C)), jnp.float32)

    def total(z, book, part):
        out = VectorQuantizer(V).apply({"codebook": book}, z, valid)
        return jnp.sum(out.vectors * pull) if part == "vectors" else jnp.sum(out.distance)

    dz, dbook = jax.grad(total, (0, 1))(z, book, "vectors")
    np.testing.assert_array_equal(dz, pull)
    assert all((g == 0).all() for g in jax.tree.leaves(dbook))
    dz, dbook = jax.grad(total, (0, 1))(z, book, "distance")
    nearest = np.asarray(codewords(book))[np.asarray(VectorQuantizer(V).apply({"codebook": book}, z, valid).codes)]
    np.testing.assert_allclose(dz, 2 / C * (np.asarray(z) - nearest), atol=1e-6)
    assert all((g == 0).all() for g in jax.tree.leaves(dbook))


def test_codebook_is_the_moving_average():
    """Equations 6 to 8 in float64 over ten batches; decay 0.9 moves far enough that 0.99 would not pass."""
    _, _, book = drawn()
    sums, counts = (np.asarray(book[k], np.float64) for k in ("sums", "counts"))
    rng = np.random.default_rng(3)
    for _ in range(10):
        n = np.array([7.0, 0.0, 3.0, 1.0, 0.0])
        given = rng.normal(size=(V, C)) * n[:, None]
        book = follow(book, dict(sums=jnp.asarray(given, jnp.float32), counts=jnp.asarray(n, jnp.float32)), 0.9)
        sums, counts = 0.9 * sums + 0.1 * given, 0.9 * counts + 0.1 * n
    total = counts.sum()
    words = sums / ((counts + 1e-5) / (total + V * 1e-5) * total)[:, None]
    np.testing.assert_allclose(codewords(book), words, rtol=1e-4, atol=1e-6)  # float32


def test_codes_of_nothing_stay_finite():
    empty = dict(sums=jnp.zeros((V, C)).at[0].set(3.0), counts=jnp.zeros(V).at[0].set(3.0))
    words = np.asarray(codewords(empty))
    np.testing.assert_allclose(words[0], 1, rtol=1e-4)  # Laplace takes 1e-5 of it
    np.testing.assert_array_equal(words[1:], 0)


def test_unused_codes_take_half_of_the_most_used():
    counts = jnp.array([6.0, 0.01, 10.0, 4.0, 0.0], jnp.float32)
    words = jnp.asarray(np.random.default_rng(0).normal(size=(V, C)), jnp.float32)
    book = dict(sums=words * counts[:, None], counts=counts)
    new = jax.tree.map(np.asarray, revive(book, jax.random.key(0), 0.05))
    np.testing.assert_allclose(new["counts"], [3, 5, 5, 4, 3], rtol=1e-5)
    after = new["sums"] / new["counts"][:, None]
    spread = float(np.sqrt(np.mean(np.square(words))))
    for code, donor in ((1, 2), (4, 0)):
        distance = np.abs(after[code] - np.asarray(words)[donor]).max()
        assert 0 < distance < 0.05 * spread
    for code in (0, 2, 3):
        np.testing.assert_allclose(after[code], words[code], rtol=1e-5)
    same = revive(book, jax.random.key(0), 0.0)
    jax.tree.map(np.testing.assert_array_equal, same, book)


def test_where_most_codes_are_dead_the_dead_help_nobody():
    counts = jnp.array([8.0, 0.0, 0.0, 0.0, 0.0], jnp.float32)
    book = dict(sums=jnp.ones((V, C)) * counts[:, None], counts=counts)
    new = jax.tree.map(np.asarray, revive(book, jax.random.key(0), 0.1))
    np.testing.assert_allclose(sorted(new["counts"]), [0, 0, 0, 4, 4])
    assert np.isfinite(new["sums"]).all()


def test_a_fresh_codebook_spreads_over_its_inputs():
    """Inputs far from all codewords but one: within a hundred updates of the published decay most codes are in use."""
    key, V = jax.random.key(0), 16
    z, valid = 3 + 0.1 * jax.random.normal(key, (1, 200, C)), jnp.ones((1, 200), bool)
    quantizer = VectorQuantizer(V)
    book = quantizer.init(key, z, valid)["codebook"]

    @jax.jit
    def update(book, step):
        out = quantizer.apply({"codebook": book}, z, valid)
        return revive(follow(book, out.given, 0.99), jax.random.fold_in(key, step), 0.03), out.given["counts"]

    used = []
    for step in range(100):
        book, counts = update(book, step)
        used.append(int((counts > 0).sum()))
    assert used[0] <= 3
    assert used[-1] >= 12
