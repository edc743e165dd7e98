"""What Kubernetes does not refuse in objects of KubeRay: open doors, missing tokens, idle cost, small shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nightseg.cluster.launch import SECRET_NAME, image_problems, secret_in

KINDS = ("RayCluster", "RayJob", "RayService")
_GROWING = "enableInTreeAutoscaling"


def is_for_kubernetes(config: Mapping[str, Any]) -> bool:
    return "apiVersion" in config and "kind" in config


def kubernetes_problems(*documents: Mapping[str, Any]) -> list[str]:
    """Every weakness of a parsed file, in words; an empty list: none was found.

    A document is one object, or a List of them. Of objects that are not KubeRay's only secrets are looked for.
    """
    objects = [one for each in documents for one in (each["items"] if each.get("kind") == "List" else [each])]
    kinds = {one.get("kind") for one in objects}
    found = [problem for one in objects if one.get("kind") in KINDS for problem in _object_problems(one)]
    if not kinds & set(KINDS):
        found.append(f"there is none of {', '.join(KINDS)} in it")
    elif "NetworkPolicy" not in kinds:
        found.append("no NetworkPolicy: every pod of the Kubernetes cluster reaches dashboard and GCS")
    return found + list(secret_in(by_place(documents)))


def by_place(documents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Several documents as one mapping, by the name that their keys begin with in messages; a single one as it is."""
    if len(documents) == 1:
        return documents[0]
    return {f"document {number}": document for number, document in enumerate(documents, 1)}


def _object_problems(one: Mapping[str, Any]) -> Iterator[str]:
    place, spec = f"{one['kind']} {one['metadata']['name']}", one["spec"]
    cluster = spec if one["kind"] == "RayCluster" else spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
    if one["kind"] == "RayJob":
        if cluster is not None and not spec.get("shutdownAfterJobFinishes"):
            yield f"{place}: without shutdownAfterJobFinishes its cluster stays, and costs, when it is done"
        if spec.get("clusterSelector") and (spec.get("shutdownAfterJobFinishes") or spec.get("backoffLimit")):
            yield f"{place}: the cluster of a clusterSelector is not its own: shutdown and backoffLimit are refused"
    if cluster is not None:
        yield from _cluster_problems(place, cluster)


def _cluster_problems(place: str, spec: Mapping[str, Any]) -> Iterator[str]:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield f"{place}: no authOptions: {{mode: token}}: whoever reaches a port runs code on the cluster"
    if spec.get("rayVersion") != version("ray"):
        yield f"{place}: rayVersion {spec.get('rayVersion')} is not the Ray {version('ray')} of nightseg"
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs") or []
    if (head.get("serviceType") or "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield f"{place}: the head's service is reached from outside of Kubernetes; use kubectl port-forward"
    if str((head.get("rayStartParams") or {}).get("num-cpus")) != "0":
        yield f'{place}: the head takes work, which makes the cluster stutter: rayStartParams: {{num-cpus: "0"}}'
    if not spec.get(_GROWING):
        yield f"{place}: without {_GROWING} workers are neither added nor stopped when they are idle"
    yield from _pod_problems(f"{place}, head", head["template"]["spec"])
    for group in workers:
        where = f"{place}, {group['groupName']}"
        if group.get("minReplicas") or group.get("replicas"):
            yield f"{where}: replicas and minReplicas: these pods are paid for all the time; 0 starts them on demand"
        yield from _pod_problems(where, group["template"]["spec"])


def _pod_problems(place: str, pod: Mapping[str, Any]) -> Iterator[str]:
    if not pod.get("serviceAccountName"):
        yield f"{place}: no serviceAccountName: name the one that may use the bucket, and nothing else"
    if pod.get("hostNetwork"):
        yield f"{place}: hostNetwork opens Ray's ports on the machine, past every NetworkPolicy"
    container = pod["containers"][0]
    yield from image_problems(str(container.get("image") or ""), place)
    limits = (container.get("resources") or {}).get("limits") or {}
    if not {"cpu", "memory"} <= limits.keys():
        yield f"{place}: no limits of cpu and memory: Ray takes all that the machine has for its own"
    if (container.get("securityContext") or {}).get("privileged"):
        yield f"{place}: a privileged container is root on its machine"
    in_memory = {volume["name"] for volume in pod.get("volumes") or [] if (volume.get("emptyDir") or {}).get("medium")}
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts") or []}
    if mounts.get("/dev/shm") not in in_memory:  # noqa: S108
        yield f"{place}: /dev/shm has 64 MiB: Ray's objects go to the disk and NCCL fails; mount an emptyDir in memory"
    for variable in container.get("env") or []:
        if SECRET_NAME.search(variable["name"]) and variable.get("value"):
            yield f"{place}: the value of {variable['name']} stands in the file; use valueFrom.secretKeyRef"
