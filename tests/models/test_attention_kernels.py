"""Fused attention against XLA's, the Pallas kernels interpreted on CPU, and when which is chosen."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from speechjax.errors import UserError
from speechjax.models import attention_kernels as kernels
from speechjax.models.attention import SelfAttention, attention
from speechjax.models.attention_kernels import Call, choose
from speechjax.models.layers import frame_mask
from speechjax.models.relative import AttentionOptions
from speechjax.models.transformer import Transformer
from speechjax.sharding import make_mesh
from tests.conftest import REPO
from tests.drawing import draw_params

B, T, H, E = 3, 130, 2, 32
PADDED = np.array([130, 70, 0], np.int32)
PACKED = np.repeat([[1, 2, 0], [1, 2, 3], [0, 0, 0]], [50, 60, 20], axis=1).astype(np.int32)

TPU, GPU = Call("tpu"), Call("gpu", 9.0)


# ---- the choice


@pytest.mark.parametrize(
    ("call", "changes", "kernel", "reason"),
    [
        (TPU, {}, "splash", ""),
        (TPU, dict(dtype="float32", width=20, packed=True), "splash", ""),
        (TPU, dict(chunk=True), "splash", ""),
        (TPU, dict(chunk=True, packed=True), "xla", "fill=False"),
        (TPU, dict(bias=True), "xla", "no bias"),
        (TPU, dict(dropout=True), "xla", "attention_dropout=0"),
        (TPU, dict(prefix=True), "xla", "prefix"),
        (TPU, dict(recalled=True), "xla", "stream"),
        (TPU, dict(splits=False), "xla", "mesh"),
        (TPU, dict(width=512), "xla", "256 wide"),
        (GPU, {}, "cudnn", ""),
        (GPU, dict(dtype="float16", capability=8.0, width=128), "cudnn", ""),
        (GPU, dict(width=256), "cudnn", ""),
        (GPU, dict(width=256, capability=8.9), "xla", "at most 128"),
        (GPU, dict(width=20), "xla", "multiple of 8"),
        (GPU, dict(capability=0.0), "xla", "this machine has no GPU"),
        (GPU, dict(capability=7.5), "xla", "8.0"),
        (GPU, dict(dtype="float32"), "xla", "bfloat16"),
        (GPU, dict(bias=True), "xla", "no bias"),
        (GPU, dict(packed=True), "xla", "fill=False"),
        (GPU, dict(chunk=True), "xla", "chunk"),
        (GPU, dict(dropout=True), "xla", "attention_dropout=0"),
        (Call("cpu"), {}, "xla", ""),
        (Call(""), {}, "xla", ""),
    ],
)
def test_auto_takes_a_kernel_where_it_fits(call, changes, kernel, reason):
    chosen, why = choose("auto", dataclasses.replace(call, **changes))
    assert chosen == kernel
    assert reason in why if reason else not why
    assert choose("xla", dataclasses.replace(call, **changes)) == ("xla", "")


@pytest.mark.parametrize(
    ("impl", "call", "message"),
    [
        ("splash", Call("cpu"), r"impl='splash' does not fit here: it runs on a TPU, not a CPU; set .*impl='auto'"),
        ("cudnn", TPU, "it runs on a GPU, not a TPU"),
        ("flash", dataclasses.replace(TPU, dropout=True), "attention_dropout=0"),
        ("flash", dataclasses.replace(TPU, chunk=True), "chunk"),
        ("flash", dataclasses.replace(TPU, width=160), "at most 128 wide, or 256"),
        ("splash", dataclasses.replace(TPU, bias=True), "no bias"),
    ],
)
def test_a_kernel_by_name_that_does_not_fit_is_refused(impl, call, message):
    with pytest.raises(UserError, match=message):
        choose(impl, call)


def test_flash_by_name_takes_a_bias():
    assert choose("flash", dataclasses.replace(TPU, bias=True, packed=True)) == ("flash", "")


def test_unknown_implementations_are_named():
    with pytest.raises(UserError, match=r"impl='fast': there are auto, xla, splash, flash, cudnn"):
        AttentionOptions(impl="fast")


# ---- what is traced


def elsewhere(platform, shape=(2, 1, 2)):
    """The mesh of a program for `platform`, whatever is here."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    return AbstractMesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def traced(mesh, rows=4, heads=2, train=False, **settings):
    """The program of self-attention on a mesh."""
    module = SelfAttention(heads=heads, **settings)
    x, lengths = jnp.zeros((rows, 140, 48)), jnp.full(rows, 140, jnp.int32)
    keys: Any = dict.fromkeys(("params", "dropout"), jax.random.key(0))
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(lambda x: module.init_with_output(keys, x, lengths, train=train)[0])(x))


def test_the_mesh_says_what_is_compiled_for():
    program = traced(elsewhere("tpu"))
    assert "splash_mha" in program
    assert "shard_map" in program
    assert "shard_map" not in traced(elsewhere("tpu", (1, 1, 1))), "one device needs none"
    for platform in ("cpu", "cuda"):  # no GPU here
        assert "pallas" not in traced(elsewhere(platform))
    assert "pallas" not in traced(elsewhere("tpu"), rows=3)
    assert "pallas" not in traced(elsewhere("tpu"), heads=1)
    assert "pallas" not in traced(elsewhere("tpu"), options=dict(impl="xla"))
    assert "flash" in traced(elsewhere("tpu"), options=dict(impl="flash", positions="shaw"))


def test_dropout_is_xlas_and_said_once(caplog):
    kernels._say.cache_clear()
    with caplog.at_level("INFO", "speechjax"):
        assert "pallas" in traced(elsewhere("tpu"), dropout=0.1)
        assert not caplog.messages
        for _ in range(2):
            assert "pallas" not in traced(elsewhere("tpu"), dropout=0.1, train=True)
    assert len(caplog.messages) == 1
    assert "attention_dropout=0" in caplog.messages[0]


def test_auto_on_cpu_is_xla(caplog):
    q = jnp.zeros((2, 5, 2, 4))
    program = lambda impl: str(jax.make_jaxpr(lambda q: attention(q, q, q, lengths=jnp.array([5, 3]), impl=impl))(q))  # noqa: E731
    with caplog.at_level("INFO", "speechjax"):
        assert program("auto") == program("xla")
        with jax.set_mesh(make_mesh(data=-1, fsdp=1)):
            assert program("auto") == program("xla")
    assert not caplog.messages
    with pytest.raises(UserError, match="not a CPU"):
        program("splash")


@pytest.mark.parametrize("frames", [1, 128, 129, 499, 512, 513, 749, 1499, 1536, 3000])
def test_blocks_cover_all_frames_with_little_to_spare(frames):
    block, pad = kernels._blocks(frames)
    count, rest = divmod(frames + pad, block)
    assert rest == 0
    assert pad >= 0
    assert block % 128 == 0
    assert block <= kernels.BLOCK
    assert pad < 128 * count


# ---- the numbers


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels run as plain JAX."""
    real = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **kwargs: real(*args, **kwargs | {"interpret": True}))


@pytest.fixture(scope="module")
def qkv():
    return np.random.default_rng(0).normal(size=(3, B, T, H, E)).astype(np.float32)


def compare(run, qkv, lengths, bias=None, **options):
    """A kernel's outputs and gradients against XLA's where they count, finite and without effect elsewhere."""
    valid = np.asarray(frame_mask(jnp.asarray(lengths), T))
    weights = np.random.default_rng(1).normal(size=(B, T, H, E)).astype(np.float32)

    def loss(run):
        def outputs(qkv, bias, lengths):
            y = run(*qkv, lengths, bias)
            return jnp.sum(jnp.where(valid[..., None, None], y * weights, 0.0)), y

        return jax.jit(jax.value_and_grad(outputs, argnums=(0, 1), has_aux=True))

    xla = loss(lambda q, k, v, lengths, bias: attention(q, k, v, lengths=lengths, bias=bias, **options))
    fused = loss(run)
    (_, expected), gradients = xla(qkv, bias, lengths)
    (_, found), own = fused(qkv, bias, lengths)
    # Float32, sums of 130 products in another order.
    np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()
    for mine, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert (np.asarray(own[0])[:, ~valid] == 0).all()

    changed = lengths.copy()
    changed[0] = 30 if lengths.ndim == 1 else (lengths[0] > 0).astype(np.int32)
    (_, other), _ = fused(qkv, bias, changed)
    assert np.abs(other - found)[0, :50].max() > 0.01, "negative control: other lengths or segments"


def no_bias(run, **options):
    return lambda q, k, v, lengths, _: run(q, k, v, lengths, **options)


def random_bias(*shape):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def test_splash_is_attention_in_padded_rows(interpreted, qkv):
    compare(no_bias(kernels.splash), qkv, PADDED)


@pytest.mark.slow
def test_splash_is_attention_in_packed_rows(interpreted, qkv):
    compare(no_bias(kernels.splash), qkv, PACKED)


@pytest.mark.slow
@pytest.mark.parametrize("left", [-1, 2])
def test_splash_is_attention_in_chunks(interpreted, qkv, left):
    compare(no_bias(kernels.splash, chunk=16, left=left), qkv, PADDED, chunk=16, left=left)


@pytest.mark.slow
def test_flash_is_attention_without_a_bias(interpreted, qkv):
    compare(no_bias(kernels.flash), qkv, PADDED)


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "shape"), [(PADDED, (B, H, T, T)), (PACKED, (1, H, T, T))])
def test_flash_is_attention_with_a_bias_and_its_gradient(interpreted, qkv, lengths, shape):
    compare(kernels.flash, qkv, lengths, random_bias(*shape))


@pytest.mark.slow
def test_several_blocks_are_one_attention(interpreted, qkv, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)
    compare(no_bias(kernels.splash, chunk=16, left=2), qkv, PADDED, chunk=16, left=2)
    compare(kernels.flash, qkv, PACKED, random_bias(B, H, T, T))


@jax.custom_vjp
def poison_gradient(x, valid):
    return x


poison_gradient.defvjp(lambda x, valid: (x, valid), lambda valid, g: (jnp.where(valid, g, jnp.nan), None))


def test_what_cudnn_leaves_in_padding_stays_there(monkeypatch, qkv):
    """Its call with XLA's numbers and, forward and backward, NaN in all padding."""
    real = jax.nn.dot_product_attention

    def fake(q, k, v, *, query_seq_lengths, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        valid = frame_mask(query_seq_lengths, T)[..., None, None]
        q, k, v = (poison_gradient(x, valid) for x in (q, k, v))
        y = real(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")
        return jnp.where(valid, y, jnp.nan)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    compare(no_bias(kernels.cudnn), qkv, PADDED)


def encoder(options, **settings):
    """A scanned, recomputed stack of two layers."""
    return Transformer(
        layers=2, heads=2, norm="pre", positions=dict(name="none"), dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, layerdrop=0.0, scan=True, remat=True, attention=options, **settings,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, dict(positions="buckets", gated=True), dict(impl="flash", positions="buckets", gated=True)]
)
def test_every_device_of_a_mesh_computes_its_rows_and_heads(interpreted, monkeypatch, options):
    monkeypatch.setattr(kernels, "target", lambda impl: ("tpu", 0.0))
    x = np.random.default_rng(3).normal(size=(4, T, 64)).astype(np.float32)
    weights = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    lengths = np.array([130, 70, 0, 129], np.int32)
    model, plain = (encoder(o, mlp=32, dtype=jnp.float32) for o in (options, options | dict(impl="xla")))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, lengths, train=False))["params"]
    params = draw_params(shapes)

    def step(model):
        def loss(params, x):
            y, _ = model.apply({"params": params}, x, lengths, train=True)
            return jnp.sum(y * weights)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    expected, gradients = step(plain)(params, x)
    with jax.set_mesh(make_mesh(data=1, fsdp=2, tensor=2)):
        traced = step(model).trace(params, x)
        found, own = traced.lower().compile()(params, x)
    assert ("shard_map" in str(traced.jaxpr)) == (not options or "impl" in options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    for mine, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * largest)  # those of the keys' bias are noise


# ---- compiled for a TPU that is not here

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from speechjax import sharding
from tests.models.test_attention_kernels import encoder

mesh = sharding.make_mesh(data=-1, fsdp=1, devices=topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
found = {}
for impl in ("auto", "xla"):
    model = encoder(dict(impl=impl), mlp=512, dtype=jnp.bfloat16)

    def step(params, x, lengths):
        loss = lambda params: jnp.mean(model.apply({"params": params}, x, lengths, train=True)[0])
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, sharding.BATCH)
        x = jax.ShapeDtypeStruct((16, 1500, 128), jnp.bfloat16, sharding=place)
        lengths = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=place)
        init = lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), jnp.zeros(16, int), train=False)
        params = sharding.placed(mesh, jax.eval_shape(init)["params"])
        program = jax.jit(step).lower(params, x, lengths).compile()
    text = program.as_text()
    found[impl] = dict(
        memory=program.memory_analysis().temp_size_in_bytes, splash=text.count("splash_mha"),
        kernels=text.count('custom_call_target="tpu_custom_call"'),
    )
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_step_compiled_for_tpus_has_the_kernel_and_takes_less_memory():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler, but no TPU: pip install 'speechjax[tpu]'")
    env = {k: v for k, v in os.environ.items() if not re.match("JAX_|XLA_|TPU_", k)}
    env |= dict(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", PYTHONPATH=os.pathsep.join(sys.path),
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True, timeout=1500, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["auto"]["splash"] > 0
    assert found["auto"]["kernels"] >= 3  # forward, and two of the backward pass
    assert found["xla"]["kernels"] == 0, "negative control"
    assert found["auto"]["memory"] < 0.5 * found["xla"]["memory"]
