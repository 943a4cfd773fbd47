"""TPU slices by generation and topology, as `python -m speechjax.aot --topology=v5e:4x4` names them too."""

import math
import re
from dataclasses import dataclass

from speechjax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """A TPU generation: axes of its topologies, and names.

    `gke` is the node label; `api` is the Cloud TPU API's type ("": not served), which counts `cores` of a chip, and
    `runtime` its software version.
    """

    gke: str
    axes: int
    api: str = ""
    cores: int = 1
    runtime: str = ""


# From Google's pages "Plan TPUs in GKE" and "TPU software versions"; the latter also says that the Cloud TPU API gets
# bug fixes only and does not serve TPU7x and later.
GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", 3, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", 2, "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", 3, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", 2, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", 3),
}


@dataclass(frozen=True)
class Slice:
    """A slice of one generation: `topology` are its chips along each axis."""

    generation: str
    topology: str

    @property
    def names(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        """4, or all of a smaller slice; slices of 2x4 are one host of 8."""
        return self.chips if self.chips < 4 or (self.names.axes == 2 and self.chips == 8) else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """The Cloud TPU API's name; of several topologies with as many chips it takes the most cubic one."""
        return f"{self.names.api}-{self.chips * self.names.cores}"


def parse_slice(text: str) -> Slice:
    """`v5e:4x4` as a slice.  Raises UserError where there is no such thing."""
    generation, _, topology = text.partition(":")
    if generation not in GENERATIONS:
        raise UserError(f"--tpu={text}: there are {', '.join(GENERATIONS)}, each with a topology, e.g. v5e:4x4")
    axes = GENERATIONS[generation].axes
    example = "x".join(["4"] * axes)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != axes - 1:
        raise UserError(f"--tpu={text}: the topology of {generation} has {axes} axes, e.g. {generation}:{example}")
    found = Slice(generation, topology)
    if found.chips % found.chips_per_host:
        raise UserError(f"--tpu={text}: {found.chips} chips are not whole hosts of {found.chips_per_host}")
    return found
