"""GKE: a JobSet, with a queue of Kueue's or without, on TPU slices or GPU nodes."""

import argparse
import re
from collections.abc import Sequence

from speechjax.errors import RESTART, UserError
from speechjax.launching.flags import count, covered, name_of, parse_mounts
from speechjax.launching.render import FILE, Plan, fill, kubernetes_words, yaml
from speechjax.launching.tpus import parse_slice

SUMMARY = "a JobSet on TPU slices or GPU nodes; started again while it ends with code 42"
RETRYABLE = [RESTART, *range(127, 256)]  # ours, and those of processes that a signal killed
PORT = 8476


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, metavar="NAME:TAG", help="made by launch/train.Dockerfile")
    parser.add_argument("--mount", action="append", default=[], metavar="PATH=CLAIM", help="a persistent volume claim, "
                        "ReadWriteMany, where --workdir or data is; may be repeated")  # fmt: skip
    parser.add_argument("--tpu", metavar="TYPE:TOPOLOGY", help="of each slice, e.g. v5e:4x4, v5p:2x2x4, tpu7x:2x2x1")
    parser.add_argument("--slices", type=count, default=1, metavar="N", help="of TPUs (default: %(default)s)")
    parser.add_argument("--gpu", metavar="LABEL", help="cloud.google.com/gke-accelerator, e.g. nvidia-h100-80gb")
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="with GPUs (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--spot", action="store_true", help="on spot machines")
    parser.add_argument("--queue", metavar="NAME", help="Kueue's LocalQueue (default: no Kueue)")
    parser.add_argument("--namespace", default="default", metavar="NAME", help="(default: %(default)s)")
    parser.set_defaults(restarts=100)


def plan(args: argparse.Namespace, job: Sequence[str]) -> Plan:
    """The JobSet and the command that creates it.  Raises UserError for what Kubernetes would refuse."""
    if bool(args.tpu) == bool(args.gpu):
        raise UserError("say where: --tpu=v5e:4x4 or --gpu=nvidia-h100-80gb")
    mounts = parse_mounts(args.mount)
    if not covered(args.workdir, mounts):
        raise UserError(
            f"--workdir={args.workdir} would vanish with its container: put it on a volume, e.g. "
            "--mount=/shared=CLAIM --workdir=/shared/runs/NAME"
        )
    for flag in ("queue", "namespace"):
        if (name := getattr(args, flag)) and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise UserError(f"--{flag}={name}: a name of Kubernetes has a-z, 0-9 and -")
    jobs, hosts, chips, selector = _hardware(args)
    # Pods are NAME-workers-SLICE-HOST-abcde, and a name has at most 63 characters.
    name = name_of(args, 63 - len(f"-workers-{jobs - 1}-{hosts - 1}-abcde"))
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    volumes = [
        dict(name=f"mount-{i}", persistentVolumeClaim=dict(claimName=claim)) for i, claim in enumerate(mounts.values())
    ]
    values = dict(
        name=name,
        namespace=args.namespace,
        labels=yaml({"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}),
        restarts=str(args.restarts),
        hosts=str(hosts),
        chips=str(chips),
        retryable=yaml(RETRYABLE),
        selector=yaml(selector),
        image=yaml(args.image),
        command="\n".join(
            f"- {yaml(word)}" for word in kubernetes_words(["python", "-m", "speechjax.main", *job])
        ),
        mounts="\n".join(f"- {yaml(dict(name=f'mount-{i}', mountPath=path))}" for i, path in enumerate(mounts)),
        volumes="\n".join(f"- {yaml(volume)}" for volume in volumes),
    )  # fmt: skip
    more = dict(slices=str(args.slices)) if args.tpu else dict(port=str(PORT))
    text = fill("jobset_tpu.yaml" if args.tpu else "jobset_gpu.yaml", values | more)
    command = ("kubectl", f"--namespace={args.namespace}", "create", "-f", FILE)
    return Plan(text, ".yaml", command, "install kubectl and gcloud container clusters get-credentials CLUSTER")


def _hardware(args: argparse.Namespace) -> tuple[int, int, int, dict[str, str]]:
    """(jobs, hosts a job, accelerators a host, node labels)."""
    if args.tpu:
        tpu = parse_slice(args.tpu)
        if args.slices > 1 and tpu.hosts == 1:
            raise UserError(f"--tpu={args.tpu} --slices={args.slices}: several slices need more than one host each")
        labels = {
            "cloud.google.com/gke-tpu-accelerator": tpu.names.gke,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        }
        return args.slices, tpu.hosts, tpu.chips_per_host, labels
    if args.slices > 1:
        raise UserError(f"--slices={args.slices} is of TPUs; with GPUs --nodes=N")
    return 1, args.nodes, args.gpus_per_node, {"cloud.google.com/gke-accelerator": args.gpu}
