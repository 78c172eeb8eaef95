"""Adapters of a pool whose replicas end, begin and load while others are loaded."""

import threading
from types import SimpleNamespace

from serving.replicas import pooled_adapters
from serving.replicas.messages import LoadLora
from serving.replicas.pool import ReplicaPool
from serving.replicas.pooled_adapters import AdapterCall, PooledAdapters
from tests.serving.replicas.test_pool import job


def stub_replica(send=lambda message: None):
    return SimpleNamespace(job=SimpleNamespace(number=0), restarts=0, send=send)


def test_a_replica_is_restored_while_others_are_loaded():
    adapters, sent = PooledAdapters(lambda: []), []
    adapters.loaded = {"a": "1", "b": "2"}

    def send(message):
        sent.append(message)
        adapters.loaded["c"] = "3"

    adapters.restore(stub_replica(send))
    assert sent == [LoadLora(0, "a", "1"), LoadLora(0, "b", "2")]


def test_a_replica_that_ends_as_it_is_asked_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(pooled_adapters, "LORA_S", 5.0)
    replica = stub_replica()

    def ready():
        ending = threading.Thread(target=adapters.left, args=[replica], daemon=True)
        ending.start()
        ending.join(0.2)
        return [replica]

    adapters = PooledAdapters(ready)
    adapters.load("a", "folder")
    assert adapters.loaded == {"a": "folder"}


def test_a_load_does_not_outlast_the_pool():
    """Its thread is one that the process waits for at its end."""
    pool = ReplicaPool([job("m")])
    [replica] = pool.replicas
    replica.process = SimpleNamespace(poll=lambda: 0, wait=lambda: 0)
    waiting = pool._pooled._calls[1] = AdapterCall({0})
    pool._stopping = True
    pool._replica_ended(replica)
    assert waiting.done.is_set()
