"""Morphling with stress tests that are measured."""

from serving.cost_model.devices import Cluster
from serving.cost_model.model import DATASHEET, ModelSizes
from serving.deployment.deployers import Morphling, StressBudgetSpent
from serving.deployment.placement import Need


def test_an_injected_stress_test_decides_and_ends_the_search():
    """Morphling takes what was measured best, not what the cost model likes best."""
    sizes = ModelSizes.from_config("chatglm2-6b")
    cluster = Cluster.uniform("RTX3090", 3)
    asked = []

    def prefers_three_devices(placement) -> float:
        if len(asked) == 20:
            raise StressBudgetSpent
        asked.append(len(placement.stages))
        return 100.0 if len(placement.stages) == 3 else 1e-3

    found = Morphling(stress_test=prefers_three_devices).place(
        sizes, cluster, Need(1000), DATASHEET
    )
    assert len(found.stages) == 3
    assert len(asked) == found.search_steps <= 20


def test_a_spent_budget_leaves_what_is_known():
    sizes = ModelSizes.from_config("chatglm2-6b")
    asked = []

    def once(placement) -> float:
        if asked:
            raise StressBudgetSpent
        asked.append(placement.stages)
        return 1.0

    found = Morphling(stress_test=once).place(
        sizes, Cluster.uniform("RTX3090", 2), Need(1000), DATASHEET
    )
    assert [found.stages] == asked and found.search_steps == 1
