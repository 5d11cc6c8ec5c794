"""The manifests, without a Kubernetes: against its schemas and KubeRay's, and for the properties they must ensure."""

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve._private import constants

from cluster.batch.capacity import check_capacity
from cluster.batch.errors import CapacityError
from cluster.batch.pipeline import READ_CPUS
from cluster.batch.settings import read_stages
from deployments.launch.environment import CLUSTER_ENVIRONMENT
from deployments.launch.load_balancer import LoadBalancer
from tests.cluster.files import (
    CLUSTER,
    KUBERNETES,
    ROOT,
    document,
    documents,
    environment,
    groups,
    of_kind,
    resources,
)
from tests.cluster.kuberay import SCHEMAS

VERSION = "1.34"
BASE, GPU = resources("base"), resources("gpu")
JOB = document(KUBERNETES / "batch/rayjob.yaml")
OBJECTS = [*BASE, *GPU, JOB]
CLUSTERS = {
    "base": of_kind(BASE, "RayService")["spec"]["rayClusterConfig"],
    "gpu": of_kind(GPU, "RayService")["spec"]["rayClusterConfig"],
    "batch": JOB["spec"]["rayClusterSpec"],
}
SERVICES = [pytest.param(CLUSTERS[name], id=name) for name in ("base", "gpu")]


def pods() -> Iterator[tuple[str, Any]]:
    """Yield all pod templates, each with its location."""
    for name, cluster in CLUSTERS.items():
        for group in groups(cluster):
            yield f"{name}-{group.get('groupName', 'head')}", group["template"]
    yield "redis", of_kind(BASE, "StatefulSet")["spec"]["template"]


PODS = list(pods())


@pytest.mark.parametrize("content", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata'].get('name', '')}")
def test_every_object_matches_its_schema(content: Any) -> None:
    if content["kind"] in SCHEMAS:
        jsonschema.validate(content, SCHEMAS[content["kind"]])
    else:
        kubernetes_validate.validate(content, VERSION, strict=True)


@pytest.mark.parametrize(("name", "template"), PODS, ids=[name for name, _ in PODS])
def test_every_pod_matches_kubernetes_schema(name: str, template: Any) -> None:
    metadata = {"name": name, **template.get("metadata", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_misspelt_field_is_detected_in_objects_and_pods() -> None:
    service = copy.deepcopy(of_kind(BASE, "RayService"))
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        jsonschema.validate(service, SCHEMAS["RayService"])
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": copy.deepcopy(PODS[0][1]["spec"])}
    pod["spec"]["containers"][0]["imagePullPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolicies"):
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_duplicate_key_is_detected(tmp_path: Any) -> None:
    (tmp_path / "twice.yaml").write_text("a: {b: 1, c: 2, b: 3}\n")
    with pytest.raises(yaml.YAMLError, match=r"given twice: \['b'\]"):
        documents(tmp_path / "twice.yaml")


@pytest.mark.parametrize(("objects", "file"), [(BASE, CLUSTER), (GPU, KUBERNETES / "gpu")], ids=["base", "gpu"])
def test_the_manifest_contains_the_text_of_the_configuration(objects: list[Any], file: Any) -> None:
    text = (file / "serve_config.yaml").read_text(encoding="utf-8")
    assert of_kind(objects, "RayService")["spec"]["serveConfigV2"] == text


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_kernels_compiled_by_triton_are_kept_where_pods_may_write(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs")
    *_, image = re.findall(r"^ENV (.*)$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for name, value in (each.split("=", 1) for each in image.split()):
        if name != "PATH":
            monkeypatch.setenv(name, value)
    folder = Path(knobs.cache.dir)
    for group in groups(cluster):
        [container] = group["template"]["spec"]["containers"]
        mounts = [each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")]
        assert any(folder.is_relative_to(mount) for mount in mounts), (folder, mounts)


def test_kuberays_service_has_the_port_of_the_proxies() -> None:
    """KubeRay makes it from the ports of the head's container, where these are given."""
    for group in groups(CLUSTERS["base"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"containerPort": 8000, "name": "serve"} in container["ports"]


def test_nodes_have_the_cluster_environment() -> None:
    assert environment() == CLUSTER_ENVIRONMENT


def test_serves_haproxy_has_the_same_limits_as_ours() -> None:
    ours = LoadBalancer(("127.0.0.1", 1), "127.0.0.1", [1], "llava").configuration
    given = environment()
    assert given["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    hours = int(given["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) // 3600
    for line in (
        f"retries {given['RAY_SERVE_HAPROXY_RETRIES']}",
        f"timeout client {given['RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S']}s",
        f"timeout server {hours}h",
    ):
        assert f"    {line}\n" in ours


def test_serve_knows_every_variable_with_its_prefix() -> None:
    known = Path(constants.__file__).read_text(encoding="utf-8")
    assert [name for name in environment() if name.startswith("RAY_SERVE_") and f'"{name}"' not in known] == []


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_every_ray_pod_has_the_environment_and_the_token(cluster: Any) -> None:
    generated = document(KUBERNETES / "base/kustomization.yaml")
    [generator] = generated["configMapGenerator"]
    assert generator["envs"] == ["ray.env"]
    assert generated["generatorOptions"]["disableNameSuffixHash"] is True
    for group in groups(cluster):
        [container] = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": generator["name"]}}]
    assert cluster["authOptions"] == {"mode": CLUSTER_ENVIRONMENT["RAY_AUTH_MODE"], "secretName": "llava-ray-token"}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_ray_is_the_version_that_was_tested(cluster: Any) -> None:
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "template"), PODS, ids=[name for name, _ in PODS])
def test_no_pod_is_root_or_can_become_it(name: str, template: Any) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    assert len(volumes) == len(set(volumes))
    for container in spec["containers"]:
        confined = container["securityContext"]
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["readOnlyRootFilesystem"] is True
        assert confined["capabilities"] == {"drop": ["ALL"]}
        mounts = [(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]]
        assert len(mounts) == len(set(mounts))
        # Redis' data volume is a claim template of its StatefulSet.
        assert {mount for mount, _ in mounts} == ({"data"} if name == "redis" else set(volumes))
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert container["readinessProbe"]
        assert container["livenessProbe"]


@pytest.mark.parametrize("cluster", SERVICES)
def test_keys_and_models_are_read_only(cluster: Any) -> None:
    for group in groups(cluster):
        [container] = group["template"]["spec"]["containers"]
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts["/etc/llava"]
        assert mounts.get("/models", True)


@pytest.mark.parametrize(("objects", "folder"), [(BASE, CLUSTER), (GPU, KUBERNETES / "gpu")], ids=["base", "gpu"])
def test_grace_periods_exceed_the_longest_answer(objects: list[Any], folder: Any) -> None:
    service = of_kind(objects, "RayService")["spec"]
    [application] = document(folder / "serve_config.yaml")["applications"]
    longest = application["args"]["limits"]["max_timeout_seconds"]
    # test_app.py checks a gateway's grace period; a departing node gets more time, to place its replicas elsewhere.
    assert int(environment()["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > longest
    assert service["rayClusterDeletionDelaySeconds"] > longest
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    for worker in service["rayClusterConfig"]["workerGroupSpecs"]:
        spec = worker["template"]["spec"]
        [container] = spec["containers"]
        command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "drain-node"
        assert longest < int(seconds) < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("objects", "name"), [(BASE, "base"), (GPU, "gpu")], ids=["base", "gpu"])
def test_workers_of_the_service_are_evicted_one_at_a_time(objects: list[Any], name: str) -> None:
    budget = of_kind(objects, "PodDisruptionBudget")["spec"]
    # For pods whose owner has no scale subresource, like a RayCluster, Kubernetes accepts only an integer minAvailable.
    assert budget.keys() == {"minAvailable", "selector"}
    assert budget["minAvailable"] == sum(worker["minReplicas"] for worker in CLUSTERS[name]["workerGroupSpecs"]) - 1
    for worker in CLUSTERS[name]["workerGroupSpecs"]:
        assert _selects(budget["selector"], worker["template"]["metadata"]["labels"] | WORKER)
    for group in groups(CLUSTERS["batch"]):
        assert not _selects(budget["selector"], group["template"]["metadata"]["labels"] | WORKER)


@pytest.mark.parametrize("cluster", SERVICES)
def test_the_head_is_fault_tolerant_and_the_cluster_autoscales(cluster: Any) -> None:
    assert cluster["enableInTreeAutoscaling"] is True
    address = cluster["gcsFaultToleranceOptions"]["redisAddress"]
    redis = of_kind(BASE, "StatefulSet")
    assert address == f"{redis['metadata']['name']}:6379"
    assert redis["metadata"]["name"] == of_kind(BASE, "Service")["metadata"]["name"]
    [container] = redis["spec"]["template"]["spec"]["containers"]
    [variable] = container["env"]
    assert variable["valueFrom"] == cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_stage_has_a_worker_group_with_room_for_it() -> None:
    [application] = document(KUBERNETES / "gpu/serve_config.yaml")["applications"]
    workers = {worker["groupName"]: worker for worker in CLUSTERS["gpu"]["workerGroupSpecs"]}
    assert set(workers) == {"front", "encoder", "generator"}
    for stage in ("gateway", "preprocessor", "vision_encoder", "generator"):
        args = application["args"][stage]
        [worker] = [each for each in workers.values() if each["labels"] == args["label_selector"]]
        [container] = worker["template"]["spec"]["containers"]
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert args["num_cpus"] <= float(requests["cpu"])
        assert args.get("num_gpus", 0) == int(limits.get("nvidia.com/gpu", 0))
        if args.get("num_gpus"):
            # One replica per node.
            assert worker["maxReplicas"] >= args["max_replicas"]
            assert worker["template"]["spec"]["nodeSelector"].keys() == {"nvidia.com/gpu.product"}


def test_worker_groups_have_room_for_the_minimum_and_maximum_of_replicas() -> None:
    [application] = document(CLUSTER / "serve_config.yaml")["applications"]
    stages = [application["args"][stage] for stage in ("gateway", "preprocessor", "vision_encoder", "generator")]
    [worker] = CLUSTERS["base"]["workerGroupSpecs"]
    [container] = worker["template"]["spec"]["containers"]
    cpus = float(container["resources"]["requests"]["cpu"])
    for replicas, nodes in (("min_replicas", "minReplicas"), ("max_replicas", "maxReplicas")):
        assert sum(stage["num_cpus"] * stage[replicas] for stage in stages) <= cpus * worker[nodes]


def _admits(
    policies: list[Any], to: dict[str, str], source: dict[str, str], port: int, namespace: str = "llava"
) -> bool:
    """Whether a connection is allowed, as Kubernetes defines it: a policy that selects the pod must allow it."""
    selecting = [each["spec"] for each in policies if _selects(each["spec"]["podSelector"], to)]
    rules = [rule for spec in selecting for rule in spec.get("ingress", [])]
    return not selecting or any(_rule_admits(rule, source, port, namespace) for rule in rules)


def _rule_admits(rule: Any, source: dict[str, str], port: int, namespace: str) -> bool:
    if "ports" in rule and port not in [each["port"] for each in rule["ports"]]:
        return False
    return "from" not in rule or any(_is_from(peer, source, namespace) for peer in rule["from"])


def _is_from(peer: Any, source: dict[str, str], namespace: str) -> bool:
    if "namespaceSelector" in peer:
        is_there = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        is_there = namespace == "llava"
    return is_there and _selects(peer.get("podSelector", {}), source)


def _selects(selector: Any, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


HEAD = {"app.kubernetes.io/part-of": "llava", "ray.io/node-type": "head"}
WORKER = {"app.kubernetes.io/part-of": "llava", "ray.io/node-type": "worker"}
REDIS = {"app.kubernetes.io/name": "llava-redis"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
POLICIES = [each for each in BASE if each["kind"] == "NetworkPolicy"]
# Ports of the GCS, the dashboard, its agent, Ray Client, a worker, a gateway, and HAProxy's two status pages.
RAYS_PORTS = (6379, 8265, 52365, 10001, 10002, 30000, 9101, 8404)


def test_pods_have_the_labels_that_policies_select() -> None:
    for name, template in PODS:
        component = "batch" if name.startswith("batch-") else "service"
        ours = {"app.kubernetes.io/part-of": "llava", "app.kubernetes.io/component": component}
        expected = REDIS if name == "redis" else ours
        # KubeRay adds `ray.io/node-type` itself.
        assert template["metadata"]["labels"] == expected


@pytest.mark.parametrize("port", RAYS_PORTS)
def test_rays_ports_are_reachable_only_from_nodes_of_the_cluster(port: int) -> None:
    for pod, other in itertools.product((HEAD, WORKER), repeat=2):
        assert _admits(POLICIES, pod, other, port)
    for pod in (HEAD, WORKER):
        assert not _admits(POLICIES, pod, {"app": "stranger"}, port)
        # From another namespace, the right labels are not enough.
        assert not _admits(POLICIES, pod, WORKER, port, namespace="other")


def test_other_pods_reach_only_the_gateways_port() -> None:
    assert _admits(POLICIES, WORKER, {"app": "stranger"}, 8000)
    assert _admits(POLICIES, WORKER, {}, 8000, namespace="ingress")
    assert not _admits(POLICIES, HEAD, {}, 8000, namespace="ingress")
    assert not _admits(POLICIES, REDIS, {"app": "stranger"}, 6379)
    assert not _admits(POLICIES, WORKER, {"app": "stranger"}, 8080)


def test_operator_metrics_and_heads_reach_what_they_need() -> None:
    assert _admits(POLICIES, HEAD, OPERATOR, 8265, namespace="kuberay")
    assert not _admits(POLICIES, HEAD, OPERATOR, 6379, namespace="kuberay")
    assert _admits(POLICIES, WORKER, {}, 8080, namespace="monitoring")
    assert _admits(POLICIES, REDIS, HEAD, 6379)
    assert not _admits(POLICIES, REDIS, WORKER, 6379)


def test_no_manifest_contains_a_secret_and_the_documentation_creates_each() -> None:
    assert not [each for each in OBJECTS if each["kind"] == "Secret"]
    named = set(_secrets(OBJECTS))
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    assert named == {"llava-ray-token", "llava-redis", "llava-keys"}
    for name in named:
        assert f"kubectl create secret generic {name} " in text


def _secrets(content: Any) -> Iterator[str]:
    if isinstance(content, list):
        for each in content:
            yield from _secrets(each)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key == "secretName":
                yield value
            elif key == "secretKeyRef":
                yield value["name"]
            else:
                yield from _secrets(value)


def test_the_job_runs_a_batch_and_survives_failures() -> None:
    assert JOB["spec"]["entrypoint"].startswith("llava batch ")
    assert JOB["spec"]["backoffLimit"] > 0
    files = JOB["spec"]["entrypoint"].split()[2:4]
    for group in groups(CLUSTERS["batch"]):
        spec = group["template"]["spec"]
        [volume] = [each for each in spec["volumes"] if "persistentVolumeClaim" in each]
        [path] = [each["mountPath"] for each in spec["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
        assert all(file.startswith(f"{path}/") for file in files)


def test_the_jobs_stages_need_all_its_workers() -> None:
    words = JOB["spec"]["entrypoint"].split()
    stages = read_stages(value for word, value in itertools.pairwise(words) if word == "--stage")
    [group] = CLUSTERS["batch"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    worker = {"CPU": float(container["resources"]["requests"]["cpu"])}
    check_capacity(stages, READ_CPUS, [worker] * group["maxReplicas"], None)
    with pytest.raises(CapacityError):
        check_capacity(stages, READ_CPUS, [worker] * (group["maxReplicas"] - 1), None)
    assert "--wait-for-nodes" in words, "it begins with fewer"
