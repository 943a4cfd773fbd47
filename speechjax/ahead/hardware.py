"""Hardware that is not here: what it can do, and its devices as its compiler knows them.

Peak FLOP/s are those of dense products in bfloat16.  Sources: for TPUs the page of each version in the Cloud TPU
documentation (docs.cloud.google.com/tpu/docs/v5e and so on), for GPUs NVIDIA's data sheets of the SXM modules (L4: the
card).  A page gives them for a chip; devices are half a chip on TPU7x.  Memory of a TPU is what its compiler grants a
program, which says so when it refuses one; of a GPU what its driver reports.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speechjax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device: its `memory` in bytes, peak `flops` a second, and what the compiler must know of it (`facts`)."""

    platform: str
    memory: float
    flops: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def _gpu(memory: float, flops: float, capability: tuple[int, int], **facts: Any) -> Chip:
    return Chip("cuda", memory, flops, dict(capability=capability, **facts))


_HOPPER: dict[str, Any] = dict(
    capability=(9, 0), cores=132, units=128, clock=1.98, cache=50, shared=(233472, 232448)
)  # fmt: skip
CHIPS = {
    "v4": Chip("tpu", 30.75 * GIB, 275e12, {"chip_config_name": "megacore"}),
    "v5e": Chip("tpu", 15.75 * GIB, 197e12),
    "v5p": Chip("tpu", 95.74 * GIB, 459e12),
    "v6e": Chip("tpu", 31.25 * GIB, 918e12),
    "tpu7x": Chip("tpu", 94.75 * GIB, 2307e12 / 2),
    "a100": _gpu(
        85.10e9, 312e12, (8, 0), cores=108, units=64, clock=1.41, cache=40, shared=(167936, 166912), rate=2.04
    ),
    "h100": _gpu(84.94e9, 989e12, rate=3.35, **_HOPPER),
    "h200": _gpu(150.75e9, 989e12, rate=4.8, **_HOPPER),
    "b200": _gpu(
        191.51e9, 2250e12, (10, 0), cores=148, units=128, clock=1.965, cache=126, shared=(233472, 232448), rate=7.67
    ),
    "l4": _gpu(23.66e9, 121e12, (8, 9), cores=58, units=128, clock=2.04, cache=48, shared=(102400, 101376), rate=0.3),
    "cpu": Chip("cpu", 0.0, math.nan),
}


@dataclass(frozen=True)
class Topology:
    """`slices` times `shape` chips called `name`: v5e:4x4; hosts x GPUs, h200:2x8; virtual CPU devices, cpu:4."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    def __str__(self) -> str:
        text = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices} slices of {text}"

    def usable_memory(self) -> float:
        """Bytes of a device that JAX will use: of a GPU three quarters, unless the usual variable says otherwise."""
        if self.chip.platform == "cuda":
            return self.chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
        if self.chip.platform == "cpu":
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / math.prod(self.shape)
        return self.chip.memory

    def devices(self) -> list[Any]:
        """The devices to compile for.  Raises UserError where their compiler is not installed, or knows no such."""
        find = {"tpu": _tpus, "cuda": _gpus, "cpu": _cpus}[self.chip.platform]
        return list(find(self))


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that `text` names.  Raises UserError, listing what there is, for anything else."""
    found = re.fullmatch(r"([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", text)
    if not found or found[1] not in CHIPS:
        raise UserError(
            f"--topology={text}: write CHIP:SHAPE, e.g. v5e:4x4 (chips), h100:2x8 (hosts x GPUs), cpu:4; chips are "
            f"{', '.join(CHIPS)}"
        )
    topology = Topology(found[1], tuple(map(int, found[2].split("x"))), slices)
    if slices < 1 or (slices > 1 and topology.chip.platform != "tpu"):
        raise UserError(f"--slices={slices}: a whole number from 1 on, of TPUs; several GPU hosts are {found[1]}:2x8")
    if topology.chip.platform != "tpu" and len(topology.shape) > (2 if topology.chip.platform == "cuda" else 1):
        raise UserError(f"--topology={text}: {found[1]}:8, or as hosts x GPUs h100:2x8")
    return topology


def prepare(topology: Topology) -> None:
    """Sets what keeps compilers from looking for hardware here; before JAX is used for the first time."""
    if topology.chip.platform == "cuda":
        # Tiles of Triton's products are chosen by timing them; without a GPU some sizes end in an internal error.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # the metadata server of a TPU machine
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a lock file guards hardware that is not used
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _tpus(topology: Topology) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology}: its compiler is not here: pip install 'speechjax[tpu]' (needs no TPU)")
    options = dict(topology.chip.facts)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    name = str(Topology(topology.name, topology.shape))
    return _described(topology, name, "tpu", options | {"num_slices": topology.slices})


def _gpus(topology: Topology) -> Any:
    import jax

    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        version = jax.__version__
        raise UserError(
            f"--topology={topology}: its compiler is not here: pip install --no-deps jax-cuda12-plugin=={version} "
            f"jax-cuda12-pjrt=={version} (needs no GPU)"
        )
    hosts, gpus = (1, *topology.shape)[-2:]
    options = dict(target_config=_target(topology), topology=f"1x{hosts}x{gpus}")
    return _described(topology, str(topology), "cuda", options)


def _described(topology: Topology, name: str, platform: str, options: dict[str, Any]) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform=platform, **options).devices
    except Exception as error:  # whatever a compiler says of a shape that it does not know
        raise UserError(f"--topology={topology}: {str(error).strip().splitlines()[0]}") from error


def _cpus(topology: Topology) -> Any:
    import jax

    (count,) = topology.shape
    if count > max(1, jax.config.jax_num_cpu_devices):  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # JAX has begun, with as many as it has
            jax.config.update("jax_num_cpu_devices", count)
    if len(devices := jax.devices("cpu")) < count:
        raise UserError(f"--topology={topology}: {len(devices)} CPU devices are there already")
    return devices[:count]


def _target(topology: Topology) -> str:
    """What XLA wants to know of a GPU, as a GpuTargetConfigProto in text."""
    chip = topology.chip
    facts = chip.facts
    major, minor = facts["capability"]
    of_core, of_block = facts["shared"]
    numbers = dict(
        threads_per_block_limit=1024, threads_per_warp=32, threads_per_core_limit=2048, core_count=facts["cores"],
        fpus_per_core=facts["units"], shared_memory_per_block=49152, shared_memory_per_core=of_core,
        shared_memory_per_block_optin=of_block, registers_per_core_limit=65536, registers_per_block_limit=65536,
        block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535, thread_dim_limit_x=1024,
        thread_dim_limit_y=1024, thread_dim_limit_z=64, memory_bandwidth=int(facts["rate"] * 1e12),
        l2_cache_size=facts["cache"] * 2**20, clock_rate_ghz=facts["clock"], device_memory_size=int(chip.memory),
    )  # fmt: skip
    lines = [f"  {name}: {value}" for name, value in numbers.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        ["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 10 }",
         f'device_description_str: "{topology.name}"']
    )  # fmt: skip
