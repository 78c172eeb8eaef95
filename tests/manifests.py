"""Kubernetes manifests against the models of released clients: python manifests.py FILE...

Run by the python of the environment `kubernetes` (benchmarks/client_env.py). Every object is built
with the client's own class, which wants the required fields; fields that the class has not, and
values of other types, are errors. Prints `kind name` of each object.
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
}
PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object}
QUANTITIES = ("limits", "requests", "sizeLimit")  # numbers or texts


def find_class(name: str) -> type:
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
