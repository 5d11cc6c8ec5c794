"""How tests read the files of a cluster: as YAML without duplicate keys, and as kustomize would build them."""

import json
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
ENVIRONMENT_FILE = KUBERNETES / "base/ray.env"


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML lets the last win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def documents(path: Path) -> list[Any]:
    read = list(yaml.load_all(path.read_text(encoding="utf-8"), _Loader))
    # PyYAML shares one object between the uses of an alias, where others see separate ones.
    return [json.loads(json.dumps(each)) for each in read]


def document(path: Path) -> Any:
    [content] = documents(path)
    return content


def environment() -> dict[str, str]:
    lines = ENVIRONMENT_FILE.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    assert len(dict(pairs)) == len(pairs), "given twice"
    return dict(pairs)


def resources(folder: str) -> list[Any]:
    """Return the objects that `kubectl apply -k` would create, except for generated ConfigMaps."""
    path = KUBERNETES / folder
    kustomization = document(path / "kustomization.yaml")
    found: list[Any] = []
    for name in kustomization["resources"]:
        found += documents(path / name) if (path / name).is_file() else resources(f"{folder}/{name}")
    for patch in kustomization.get("patches", []):
        [target] = [each for each in found if each["kind"] == patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        jsonpatch.apply_patch(target, yaml.load(patch["patch"], _Loader), in_place=True)
    return found


def of_kind(objects: list[Any], kind: str) -> Any:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def groups(cluster: Any) -> list[Any]:
    """Return a RayCluster's head group and worker groups."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
