"""The parts of KubeRay's objects that the manifests use, as a JSON schema: names, types and choices as in its API
reference of version 1.6. The pods inside are Kubernetes' own, which has its own schemas."""

from typing import Any

_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_COUNT = {"type": "integer", "minimum": 0}
_POD = {"type": "object", "required": ["spec"]}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_REDIS_CREDENTIAL = _closed(value=_TEXT, valueFrom={"type": "object"})
_GROUP = {
    "rayStartParams": _TEXTS,
    "labels": _TEXTS,
    "resources": _TEXTS,
    "template": _POD,
}
_RAY_CLUSTER = _closed(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    authOptions=_closed(mode={"enum": ["disabled", "token"]}, secretName=_TEXT, enableK8sTokenAuth={"type": "boolean"}),
    gcsFaultToleranceOptions=_closed(
        ("redisAddress",),
        redisAddress=_TEXT,
        redisUsername=_REDIS_CREDENTIAL,
        redisPassword=_REDIS_CREDENTIAL,
        externalStorageNamespace=_TEXT,
    ),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_closed(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources={"type": "object"},
        securityContext={"type": "object"},
    ),
    headGroupSpec=_closed(("rayStartParams", "template"), **_GROUP, serviceType=_TEXT),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": _closed(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            **_GROUP,
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            idleTimeoutSeconds=_COUNT,
        ),
    },
)


def _object(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_closed(name=_TEXT, generateName=_TEXT, labels=_TEXTS, annotations=_TEXTS),
        spec=spec,
    )


SCHEMAS = {
    "RayService": _object(
        "RayService",
        _closed(
            ("serveConfigV2", "rayClusterConfig"),
            serveConfigV2=_TEXT,
            upgradeStrategy=_closed(type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
            rayClusterDeletionDelaySeconds=_COUNT,
            excludeHeadPodFromServeSvc={"type": "boolean"},
            rayClusterConfig=_RAY_CLUSTER,
        ),
    ),
    "RayJob": _object(
        "RayJob",
        _closed(
            ("entrypoint", "rayClusterSpec"),
            entrypoint=_TEXT,
            submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
            backoffLimit=_COUNT,
            activeDeadlineSeconds=_COUNT,
            shutdownAfterJobFinishes={"type": "boolean"},
            ttlSecondsAfterFinished=_COUNT,
            runtimeEnvYAML=_TEXT,
            rayClusterSpec=_RAY_CLUSTER,
        ),
    ),
}
