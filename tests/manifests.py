"""Kubernetes manifests against the models of released clients: python manifests.py FILE...

Run by the python of the environment `kubernetes` (benchmarks/client_env.py). Every object is built
with the client's own class, which wants the required fields; fields that the class has not, and
values of other types, are errors. KubeRay has no such client: its kinds are written below, as
ray-operator/apis/ray/v1 had them at KubeRay's commit 026f143. Prints `kind name` of each object.
"""

import re
import sys
from pathlib import Path
from typing import Any

import kubernetes.client.models
import yaml
from kubeflow.training import models as kubeflow_models

CLASSES = {
    ("v1", "ConfigMap"): "V1ConfigMap",
    ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
    ("v1", "Secret"): "V1Secret",
    ("v1", "Service"): "V1Service",
    ("apps/v1", "Deployment"): "V1Deployment",
    ("apps/v1", "StatefulSet"): "V1StatefulSet",
    ("kubeflow.org/v1", "PyTorchJob"): "KubeflowOrgV1PyTorchJob",
    ("ray.io/v1", "RayService"): "RayService",
}
RAY_KINDS = {  # kind -> field -> (type, whether it is required)
    "RayService": {
        "apiVersion": ("str", True),
        "kind": ("str", True),
        "metadata": ("V1ObjectMeta", True),
        "spec": ("RayServiceSpec", True),
    },
    "RayServiceSpec": {
        "serveConfigV2": ("str", False),
        "rayClusterConfig": ("RayClusterSpec", False),
        "serveService": ("V1Service", False),
    },
    "RayClusterSpec": {
        "headGroupSpec": ("HeadGroupSpec", True),
        "workerGroupSpecs": ("list[WorkerGroupSpec]", False),
        "rayVersion": ("str", False),
        "enableInTreeAutoscaling": ("bool", False),
        "headServiceAnnotations": ("dict(str, str)", False),
        "suspend": ("bool", False),
    },
    "HeadGroupSpec": {
        "serviceType": ("str", False),
        "headService": ("V1Service", False),
        "enableIngress": ("bool", False),
        "rayStartParams": ("dict(str, str)", True),
        "template": ("V1PodTemplateSpec", True),
    },
    "WorkerGroupSpec": {
        "groupName": ("str", True),
        "replicas": ("int", False),
        "minReplicas": ("int", True),
        "maxReplicas": ("int", True),
        "numOfHosts": ("int", False),
        "rayStartParams": ("dict(str, str)", True),
        "template": ("V1PodTemplateSpec", True),
    },
}
PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object}
QUANTITIES = ("limits", "requests", "sizeLimit")  # numbers or texts


def ray_class(name: str) -> type:
    """A kind of KubeRay's as a class like those of the Kubernetes client."""
    fields = RAY_KINDS[name]

    def make(self, **given):
        for field, (_, is_required) in fields.items():
            if is_required and field not in given:
                raise ValueError(f"{name} needs {field}")

    types = {field: kind for field, (kind, _) in fields.items()}
    attributes = {"__init__": make, "attribute_map": dict(zip(fields, fields))}
    return type(name, (), attributes | {"openapi_types": types})


def find_class(name: str) -> type:
    if name in RAY_KINDS:
        return ray_class(name)
    for module in (kubernetes.client.models, kubeflow_models):
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"no class {name}")


def build(value: Any, kind: str, place: str) -> Any:
    """The object of a class of that name, or the plain value; ValueError names its place."""
    inner = re.fullmatch(r"list\[(.+)\]", kind)
    if inner:
        if not isinstance(value, list):
            raise ValueError(f"{place}: wanted a list, got {value!r}")
        return [build(item, inner[1], f"{place}[{i}]") for i, item in enumerate(value)]
    inner = re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind)
    if inner:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: wanted a mapping, got {value!r}")
        return {key: build(item, inner[1], f"{place}.{key}") for key, item in value.items()}
    if kind in PLAIN:
        is_quantity = any(f".{name}" in place for name in QUANTITIES) and isinstance(value, int)
        is_truth = isinstance(value, bool) and kind != "bool"
        if not is_quantity and (is_truth or not isinstance(value, PLAIN[kind])):
            raise ValueError(f"{place}: wanted {kind}, got {value!r}")
        return value
    if kind == "IntOrString":
        return value
    return build_object(value, find_class(kind), place)


def build_object(value: Any, cls: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: wanted a mapping, got {value!r}")
    attributes = {json: name for name, json in cls.attribute_map.items()}
    arguments = {}
    for key, item in value.items():
        if key not in attributes:
            raise ValueError(f"{place}: {cls.__name__} has no field {key}")
        name = attributes[key]
        arguments[name] = build(item, cls.openapi_types[name], f"{place}.{key}")
    try:
        return cls(**arguments)
    except ValueError as error:  # a required field
        raise ValueError(f"{place}: {error}") from None


def main(paths: list[str]) -> int:
    for path in paths:
        for document in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")):
            key = (document.get("apiVersion"), document.get("kind"))
            if key not in CLASSES:
                raise ValueError(f"{path}: no class for {key}")
            build_object(document, find_class(CLASSES[key]), path)
            print(document["kind"], document["metadata"]["name"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
