"""Job files of every target: read back, and run by stand-ins for the tools that would take them."""

import shutil
import subprocess
from typing import Any

import pytest
import yaml as pyyaml

from speechjax.errors import RESTART, UserError
from tests.launching.plans import JOB, plan, script
from tests.launching.test_render import NASTY, expanded


@pytest.mark.parametrize("kind", ["slurm", "tpu-vm"])
def test_scripts_are_valid_bash(kind, tmp_path):
    file = tmp_path / "job"
    file.write_text(plan(kind, *(f"--config.data.exclude={text}" for text in NASTY)).text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=warning", str(file)], capture_output=True, text=True)
        assert not done.returncode, done.stdout


# ---- SLURM

SRUN = """
while [[ $1 == --* ]]; do shift; done
worst=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 "$@" || { code=$?; ((code > worst)) && worst=$code; }
done
exit "$worst"
"""


def slurm(tmp_path, codes: str, *, count: int = 0, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
    """(code, what scontrol was told) of a job of two tasks that end with `codes`."""
    script(tmp_path / "bin", "srun", SRUN)
    script(tmp_path / "bin", "sleep", "")
    script(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    python = f'printf "%s\\0" "$@" > {tmp_path}/heard\nset -- {codes}\nshift "$SLURM_PROCID"\n'
    script(tmp_path / "bin", "python", python + 'if [[ $1 == -* ]]; then kill "$1" $$; else exit "$1"; fi\n')
    text = plan("slurm", f"--python={tmp_path}/bin/python", "--restarts=2", *arguments).text
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_RESTART_COUNT": str(count),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", text], env=environment, timeout=30)
    told = tmp_path / "scontrol"
    return done.returncode, told.read_text().strip() if told.exists() else ""


@pytest.mark.parametrize(
    ("codes", "count", "expected"),
    [
        ("0 0", 0, (0, "")),
        ("42 42", 0, (42, "requeue 7")),
        ("42 42", 2, (42, "")),  # often enough
        ("42 1", 0, (1, "")),
        ("3 42", 0, (3, "")),
        ("-KILL 1", 0, (1, "")),
        ("-KILL 42", 1, (42, "requeue 7")),
        ("127 127", 0, (127, "")),  # no such program
    ],
)
def test_slurm_goes_back_into_the_queue_for_42_alone(tmp_path, codes, count, expected):
    assert slurm(tmp_path, codes, count=count) == expected


def test_slurm_hands_over_every_word(tmp_path):
    overrides = tuple(f"--config.data.exclude={text}" for text in NASTY)
    assert slurm(tmp_path, "0 0", arguments=overrides) == (0, "")
    heard = (tmp_path / "heard").read_bytes().decode().split("\0")[:-1]
    assert heard == ["-m", "speechjax.main", *JOB, *overrides]


def test_slurm_asks_for_what_was_asked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = plan("slurm", "--workdir=runs 100%/x", "--partition=gpu", "--account=lab", "--setup=module load cuda")
    options = [line.removeprefix("#SBATCH ") for line in found.text.splitlines() if line.startswith("#SBATCH")]
    assert set(options) == {
        "--job-name=x", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8",
        "--time=1-12:00:00", "--partition=gpu", "--account=lab", "--qos=high", "--requeue", "--open-mode=append",
        "--signal=TERM@130", f'--chdir="{tmp_path}"', f'--output="{tmp_path}/runs 100%%/x/logs/slurm-%j.log"',
    }  # fmt: skip
    assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in found.text  # one process with all GPUs of its node
    assert "\nmodule load cuda\n" in found.text
    assert found.folders == (tmp_path / "runs 100%/x/logs",)
    assert "JAX_LOCAL_DEVICE_IDS" not in plan("slurm", "--gpus-per-node=0").text


@pytest.mark.parametrize(("workdir", "hints"), [("/tmp/a", 1), ("/shared/a", 0)])
def test_slurm_knows_disks_that_no_other_node_sees(workdir, hints):
    assert len(plan("slurm", f"--workdir={workdir}").hints) == hints
    assert not plan("slurm", f"--workdir={workdir}", "--nodes=1").hints


# ---- GKE

KEYS = {  # a JobSet around its Job, as jobset.x-k8s.io/v1alpha2 has them
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "spec": {"failurePolicy", "network", "replicatedJobs"},
    "spec.failurePolicy": {"maxRestarts", "rules"},
    "spec.failurePolicy.rules.0": {"name", "action", "onJobFailureReasons"},
    "spec.network": {"enableDNSHostnames", "publishNotReadyAddresses"},
    "spec.replicatedJobs.0": {"name", "replicas", "template"},
    "spec.replicatedJobs.0.template": {"spec"},
}


def at(tree: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key, {})
    return tree


@pytest.mark.parametrize("kind", ["gke tpu", "gke gpu"])
def test_jobsets_have_the_keys_of_a_jobset(kind):
    found = pyyaml.safe_load(plan(kind).text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for path, keys in KEYS.items():
        assert at(found, path).keys() <= keys, path


@pytest.mark.parametrize("kind", ["gke tpu", "gke gpu"])
def test_the_job_inside_is_valid(kind):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (108 MB)")
    template = at(pyyaml.safe_load(plan(kind).text), "spec.replicatedJobs.0.template")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
    validate.validate(job, "1.30", strict=True)
    job["spec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.30", strict=True)


@pytest.mark.parametrize("kind", ["gke tpu", "gke gpu"])
def test_jobsets_try_again_after_42_and_signals_alone(kind):
    found = pyyaml.safe_load(plan(kind, "--restarts=7").text)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    [rule] = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = at(found, "spec.replicatedJobs.0.template.spec")
    assert job["backoffLimit"] == 0  # so what the rule below does not stop fails the job, and the set starts again
    [rule] = job["podFailurePolicy"]["rules"]
    condition = rule["onExitCodes"]
    assert (rule["action"], condition["operator"]) == ("FailJob", "NotIn")
    assert {RESTART, 128 + 6, 128 + 9, 128 + 15} <= set(condition["values"])
    assert not {0, 1, 2, 3, 41, 43, 126} & set(condition["values"])
    pod = job["template"]["spec"]
    assert condition["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("kind", ["gke tpu", "gke gpu"])
def test_kubernetes_hands_over_every_word(kind):
    overrides = [f"--config.data.exclude={text}" for text in NASTY]
    found = pyyaml.safe_load(plan(kind, *overrides).text)
    [container] = at(found, "spec.replicatedJobs.0.template.spec.template.spec.containers")
    environment = {"HOME": "/root", "id": "x"}
    heard = [expanded(word, environment) for word in container["command"]]
    assert heard == ["python", "-m", "speechjax.main", *JOB, *overrides]


def test_tpu_slices():
    found = pyyaml.safe_load(plan("gke tpu").text)
    job = at(found, "spec.replicatedJobs.0")
    assert job["replicas"] == 2
    assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (4, 4)
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert "env" not in pod["containers"][0]  # JAX finds its neighbours by itself
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lab"}
    assert found["metadata"]["name"] == "a"
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert {mounts[name]: claims[name] for name in mounts} == {"/shared": "claim"}


def test_gpu_nodes_are_told_of_each_other():
    found = pyyaml.safe_load(plan("gke gpu", "--name=job").text)
    [container] = at(found, "spec.replicatedJobs.0.template.spec.template.spec.containers")
    told = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    # NAME-JOB-INDEX-HOST.SUBDOMAIN, the subdomain being the name of the set
    assert told["SPEECHJAX_COORDINATOR"] == "job-workers-0-0.job:8476"
    assert told["SPEECHJAX_PROCESSES"] == "2"
    field = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert told["SPEECHJAX_PROCESS"] == {"fieldRef": {"fieldPath": field}}
    assert at(found, "spec.replicatedJobs.0.name") == "workers"
    assert found["metadata"]["labels"] == {}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


# ---- SkyPilot


def test_skypilot():
    overrides = [f"--config.data.exclude={text}" for text in NASTY]
    found = pyyaml.safe_load(plan("skypilot", "--infra=gcp/us-central1", *overrides).text)
    assert found["name"] == "a"
    assert found["num_nodes"] == 2
    assert found["file_mounts"] == {"/shared": "gs://bucket"}
    assert found["resources"] == {
        "accelerators": "H100:8", "infra": "gcp/us-central1", "use_spot": True,
        "job_recovery": {"recover_on_exit_codes": [RESTART]},
    }  # fmt: skip
    assert "'.[gpu]'" in found["setup"]
    shown = found["run"].replace("exec ", "printf '%s\\0' ")
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    told = "printf '%s\\0' \"$SPEECHJAX_COORDINATOR $SPEECHJAX_PROCESSES $SPEECHJAX_PROCESS\""
    heard = subprocess.run(["bash", "-c", f"{shown}\n{told}"], env=environment, capture_output=True, check=True)
    words = heard.stdout.decode().split("\0")[:-1]
    assert words == [".venv/bin/python", "-m", "speechjax.main", *JOB, *overrides, "10.0.0.1:8476 2 1"]


def test_skypilot_leaves_tpus_to_jax():
    found = pyyaml.safe_load(plan("skypilot", "--accelerators=tpu-v6e-8").text)
    assert "SPEECHJAX" not in found["run"]
    assert "'.[tpu]'" in found["setup"]


def test_skypilot_accepts_it():
    schemas = pytest.importorskip("sky.utils.schemas", reason="pip install skypilot")
    jsonschema = pytest.importorskip("jsonschema")
    found = pyyaml.safe_load(plan("skypilot").text)
    jsonschema.validate(found, schemas.get_task_schema())
    jsonschema.validate(found["resources"], schemas.get_resources_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found["resources"] | {"acelerators": "H100:8"}, schemas.get_resources_schema())


# ---- mistakes


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("slurm", ["--time=soon"], "--time=soon"),
        ("slurm", ["--sbatch=--comment=a b"], "an option of sbatch"),
        ("slurm", ["--partition=a\nscancel"], "an option of sbatch"),
        ("slurm", ['--workdir=/a"b'], "sbatch cannot read"),
        ("slurm", ["--name=My_Job"], "--name=My_Job"),
        ("gke tpu", ["--gpu=x"], "--tpu=v5e:4x4 or --gpu"),
        ("gke tpu", ["--workdir=runs/a"], "would vanish"),
        ("gke tpu", ["--workdir=/sharedness/a"], "would vanish"),
        ("gke tpu", ["--mount=shared=x"], "--mount=shared=x"),
        ("gke tpu", ["--queue=My_Queue"], "--queue=My_Queue"),
        ("gke tpu", ["--tpu=v5e:2x4"], "more than one host"),
        ("gke tpu", ["--name=" + "a" * 46], "at most 45"),  # pods get a suffix, and 63 characters
        ("gke tpu", ["--name=1st"], "beginning with a letter"),
        ("gke gpu", ["--slices=2"], "--nodes=N"),
        ("tpu-vm", ["--tpu=tpu7x:2x2x1"], "for tpu7x use gke"),
        ("tpu-vm", ["--zone=us east"], "--zone=us east"),
        ("tpu-vm", ["--setup=a\nb"], "--setup"),
        ("skypilot", ["--accelerators=8 H100"], "--accelerators=8 H100"),
        ("skypilot", ["--workdir=runs/a"], "would vanish"),
    ],
)  # fmt: skip
def test_mistakes_have_one_line(kind, more, message):
    with pytest.raises(UserError, match=message) as found:
        plan(kind, *more)
    assert len(str(found.value).splitlines()) == 1
