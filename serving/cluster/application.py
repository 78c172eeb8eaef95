"""The application that Ray Serve runs: a front before replicas. Needs Ray, the extra `ray`.

A file of Ray Serve, such as KubeRay's, names it with the flags of `up` as arguments:

    applications:
      - name: glm-foundry
        import_path: serving.cluster.application:build_application
        args: {model: /models/model, predictor: /models/predictor, replicas: 2}
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from serving.cluster import autoscaling, router
from serving.cluster.bundles import GPU, ReplicaPlace, common_place, place_of_replica
from serving.cluster.flags import (
    ClusterFlags,
    check_cluster_flags,
    parse_cluster_flags,
    unplaced,
    words_of,
)
from serving.cluster.front import AttemptFailed, Front, FrontOptions
from serving.cluster.messages import ForwardedRequest, Part
from serving.cluster.replica import ModelReplica, ReplicaOptions
from serving.server.keys import KEY_VARIABLE
from serving.server.predictors import one_line_of

FRONT, REPLICA = "Front", "Replica"  # names of the deployments
FRONT_REQUESTS = 8192  # that the front has at once
HEALTH_S = 5.0  # between two looks at a replica


class RayReplicas:
    """serving.cluster.front.Replicas over a handle of Ray's."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle.options(stream=True, method_name="answer")

    async def parts(self, request: ForwardedRequest) -> AsyncIterator[Part]:
        response = self.handle.remote(request)
        try:
            async for part in response:
                yield part
        except (RayError, RayServeException) as error:
            raise AttemptFailed(one_line_of(error)[:500]) from None
        finally:
            with suppress(RayError, RayServeException):
                response.cancel()  # has no effect on one that has ended


class RayFront(Front):
    """The front as a deployment; Ray fills the handle in."""

    def __init__(self, options: FrontOptions, handle: Any) -> None:
        logging.getLogger("serving").setLevel(logging.INFO)
        super().__init__(options, RayReplicas(handle))


class RayReplica(ModelReplica):
    """A replica as a deployment, with Ray's name of it."""

    def __init__(self, options: ReplicaOptions) -> None:
        super().__init__(options, serve.get_replica_context().replica_id.unique_id)


def build_application(arguments: dict[str, Any]) -> serve.Application:
    """The application of a file of Ray Serve: `arguments` are the flags of `up`, by name."""
    _, flags = parse_cluster_flags(["up", *words_of(arguments)])
    check_cluster_flags(flags)
    return make_application(flags, *replica_place(flags))


def make_application(flags: ClusterFlags, place: ReplicaPlace, count: int) -> serve.Application:
    """The application of checked flags.

    Args:
        place: of each replica. count: of them, at first.
    """
    server = flags.server
    options = ReplicaOptions(unplaced(server), place)
    front = FrontOptions(
        predictor=server.predictor,
        predict_ms=flags.predict_ms,
        kv_tokens=server.kv_tokens,
        slo_s=server.slo_s,
        wait_s=flags.wait_s,
        host=server.host,
        api_key=server.api_key or os.environ.get(KEY_VARIABLE),
        api_keys=server.api_keys,
        allowed_hosts=server.allowed_hosts,
    )
    replicas = serve.deployment(RayReplica, name=REPLICA).options(
        **replica_settings(flags, place, count)
    )
    fronts = serve.deployment(RayFront, name=FRONT).options(
        num_replicas=1,  # it alone knows what it has given to whom
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=server.drain_s,
        health_check_period_s=HEALTH_S,
        ray_actor_options={"num_cpus": 0},
    )
    return fronts.bind(front, replicas.bind(options))


def replica_settings(flags: ClusterFlags, place: ReplicaPlace, count: int) -> dict[str, Any]:
    """Ray Serve's options of the replicas' deployment."""
    server = flags.server
    settings: dict[str, Any] = {
        "max_ongoing_requests": server.max_batch + server.max_queue,
        "graceful_shutdown_timeout_s": server.drain_s,
        "health_check_period_s": HEALTH_S,
        "ray_actor_options": {"num_cpus": place.cpus, "num_gpus": place.gpus},
        "placement_group_bundles": place.bundles,
        "placement_group_strategy": "STRICT_PACK",
        "request_router_config": RequestRouterConfig(
            request_router_class=f"{router.__name__}.{router.PredictedWorkRouter.__name__}"
        ),
    }
    if flags.max_replicas is None:
        return settings | {"num_replicas": count}
    policy = AutoscalingPolicy(
        policy_function=f"{autoscaling.__name__}:{autoscaling.PredictedTokensPolicy.__name__}",
        policy_kwargs={"tokens_per_replica": flags.target_tokens},
    )
    scaling = AutoscalingConfig(
        min_replicas=count,
        max_replicas=max(flags.max_replicas, count),
        upscale_delay_s=flags.upscale_delay_s,
        downscale_delay_s=flags.downscale_delay_s,
        policy=policy,
    )
    return settings | {"autoscaling_config": scaling}


def replica_place(flags: ClusterFlags) -> tuple[ReplicaPlace, int]:
    """(what each replica gets, how many there are), by the deployer where one is asked for.

    Raises:
        ValueError: the placement does not fit, or its replicas differ.
    """
    server = flags.server
    if not server.is_placed:
        gpus = flags.replica_gpus
        if gpus is None:
            has_gpu = ray.cluster_resources().get(GPU, 0) >= 1
            gpus = int(server.device != "cpu" and has_gpu)
        place = ReplicaPlace(flags.replica_cpus or 1, gpus)
        return place, flags.replicas or 1
    from serving.deployment.placement import MODULES, modules_of
    from serving.replicas.backends import planned  # of torch
    from serving.replicas.served_model import ServedModel, limits_of_flags

    limits = limits_of_flags(server.max_batch, server.kv_tokens, server.max_tokens)
    plan = planned(ServedModel.of(server, engine=server.engine), server, limits)
    print(plan.describe(), flush=True)
    model = plan.placement.model
    layer = MODULES[modules_of(model)][1]
    places = []
    for replica in plan.replicas:
        places.append(place_of_replica(replica, layer, model.layers))
    return common_place(places), flags.replicas or len(places)


def check_room(place: ReplicaPlace, count: int) -> None:
    """Raises ValueError where the cluster has no room for so many replicas."""
    resources = ray.cluster_resources()
    for name, per_replica in place.bundles[0].items():
        needed, available = count * per_replica, resources.get(name, 0)
        if needed > available:
            raise ValueError(f"{count} replicas reserve {needed:g} {name}, Ray has {available:g}")
