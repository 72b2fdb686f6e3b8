"""The JobSet is one that its controller takes (fields of that API and of Job), and fits the image and the launchers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
JOBSET, POLICY = yaml.safe_load_all((ROOT / "examples/kubernetes/jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]
POD = JOB["template"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]

# Of the API jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1: what these objects may hold.
ALLOWED = {
    "spec": {"network", "failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy", "suspend", "coordinator"},
    "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rule": {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"},
    "replicatedJob": {"name", "replicas", "template", "groupName", "dependsOn"},
    "job": {"completionMode", "parallelism", "completions", "backoffLimit", "podFailurePolicy", "template"},
}


def of_kind(kind: str, content: dict[str, Any]) -> None:
    assert set(content) <= ALLOWED[kind], kind


def test_it_has_the_fields_of_the_api() -> None:
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = JOBSET["spec"]
    for kind, content in (("spec", spec), ("network", spec["network"]), ("failurePolicy", spec["failurePolicy"])):
        of_kind(kind, content)
    of_kind("replicatedJob", JOB)
    of_kind("job", JOB["template"]["spec"])
    for rule in spec["failurePolicy"]["rules"]:
        of_kind("rule", rule)
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_one_lost_host_restarts_all() -> None:
    job = JOB["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == 2
    assert job["backoffLimit"] == 0
    assert POD["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_a_pod_that_has_to_go_saves_and_the_set_goes_on() -> None:
    (rule,) = JOB["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    assert codes["containerName"] == CONTAINER["name"]
    environment = {one["name"]: one["value"] for one in CONTAINER["env"]}
    assert codes["values"] == [int(environment["STOPPED_CODE"])]
    assert JOBSET["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert POD["terminationGracePeriodSeconds"] >= 600
    assert "train.resume=auto" in CONTAINER["args"]


def test_the_hosts_meet_at_the_first_one() -> None:
    line = CONTAINER["command"][2]
    name, job = JOBSET["metadata"]["name"], JOB["name"]
    port = CONTAINER["ports"][0]["containerPort"]
    assert f"--rdzv-endpoint={name}-{job}-0-0.{name}:{port}" in line
    assert f"--nnodes={JOB['template']['spec']['completions']}" in line
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in line


@pytest.mark.parametrize(("index", "is_host"), [("0", "1"), ("1", "0")])
def test_the_command_is_what_bash_makes_of_it(tmp_path: Path, index: str, is_host: str) -> None:
    node = tmp_path / "node.sh"
    node.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    node.chmod(0o755)
    shell, flag, line, name = CONTAINER["command"]
    line = line.replace("/opt/ppomax/examples/node.sh", str(node))
    done = subprocess.run(
        [shell, flag, line, name, *CONTAINER["args"]],
        env={"JOB_COMPLETION_INDEX": index, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert f"--rdzv-conf=is_host={is_host}" in words
    assert words[-3:] == ["/opt/ppomax/examples/ppo_max_llama7b.sh", *CONTAINER["args"]]


def test_it_runs_as_the_images_user_without_rights() -> None:
    (user,) = re.findall(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    context = POD["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"]) == (True, int(user))
    assert CONTAINER["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not POD["automountServiceAccountToken"]


def test_shared_memory_is_more_than_a_containers_64_mib() -> None:
    volumes = {one["name"]: one for one in POD["volumes"]}
    (mount,) = [one for one in CONTAINER["volumeMounts"] if one["mountPath"] == "/dev/shm"]
    assert volumes[mount["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert {one["name"] for one in CONTAINER["volumeMounts"]} == set(volumes)


def test_only_hosts_of_the_run_reach_its_store() -> None:
    label = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": JOBSET["metadata"]["name"]}}
    assert POLICY["spec"]["podSelector"] == label
    assert POLICY["spec"]["ingress"] == [{"from": [{"podSelector": label}]}]
