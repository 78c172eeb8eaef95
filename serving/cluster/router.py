"""Ray Serve's choice of a replica, by predicted outstanding work.

Ray sends this module by value to the processes that route, so that it holds no state: the ledger
is found by the function of another module. Ray of serving.cluster.application alone imports it.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serving.cluster.ledger import process_ledger


class PredictedWorkRouter(RequestRouter):
    """Ranks the replicas by the ledger of the front, in whose process it runs."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in a rank each: Ray takes the first that is not full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else full replicas are asked anew
        replicas = {}
        for replica in candidate_replicas:
            replicas[replica.replica_id.unique_id] = replica
        number = pending_request.args[0].number
        ranked = process_ledger().ranked(number, tuple(replicas))
        return [[replicas[name]] for name in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        process_ledger().enter(pending_request.args[0].number, replica_id.unique_id)
