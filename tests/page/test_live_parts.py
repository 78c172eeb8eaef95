"""The live view's parts that need no server's figures, called in a browser."""

import pytest

from serving.policies.continuous import POLICIES

IMPORTS = "const part = name => import(new URL('page/live/' + name + '.js', location.href));"


@pytest.fixture
def call(open_page):
    """call(body, argument): what the body of an async function of `part` and `given` returns."""
    page = open_page("/")

    def called(body, given=None):
        return page.evaluate(f"async given => {{ {IMPORTS} {body} }}", given)

    return called


def snapshot(time, tokens=0, **fields):
    totals = {"tokens": tokens} | fields.pop("totals", {})
    return {"t": time, "policy": "fcfs", "totals": totals} | fields


def events(call, *snapshots):
    """[(kind, values)] of the last snapshot."""
    body = """
        const { Snapshots } = await part('snapshots');
        const { addEvents } = await part('events');
        const kept = new Snapshots();
        for (const snapshot of given) { kept.add([snapshot]); addEvents(kept); }
        return kept.last.events.map(({ kind, values }) => [kind, values]);
    """
    return [tuple(event) for event in call(body, list(snapshots))]


def replicas(*states):
    return [{"number": n, "state": state, "restarts": 0} for n, state in enumerate(states)]


def test_every_policy_has_its_sentence(call):
    body = """
        await import(new URL('page/live/policies.js', location.href));
        const { translator } = await import(new URL('page/i18n.js', location.href));
        return ['en', 'zh'].map(language => given.map(name => translator(language)(name)));
    """
    names = [f"policy.{name}" for name in POLICIES]
    english, chinese = call(body, names)
    for name, one, other in zip(names, english, chinese, strict=True):
        assert one != name and other != name and one != other
    assert len(set(english)) == len(names)


def test_events_are_the_differences(call):
    before = snapshot(1, 10, replicas=replicas("ready", "ready"))
    after = snapshot(2, 20, totals={"requeued": 3}, replicas=replicas("ready", "starting"))
    lost = [("lost", {"number": 1}), ("requeued", {"count": 3})]
    assert events(call, before, after) == lost
    later = snapshot(5.5, 30, totals={"requeued": 3}, replicas=replicas("ready", "ready"))
    assert events(call, before, after, later) == [("ready", {"number": 1, "seconds": 3.5})]
    assert events(call, snapshot(1, 10), snapshot(2, 3)) == [("restarted", {})]
    assert events(call, snapshot(1), snapshot(9)) == [("gap", {"seconds": 8})]
    more = {"totals": {"preempted": 2, "refused": 1, "late": 4}}
    counts = [("preempted", {"count": 2}), ("refused", {"count": 1}), ("late", {"count": 4})]
    assert events(call, snapshot(1), snapshot(2, **more)) == counts


def test_snapshots_are_kept_in_order_once_and_bounded(call):
    body = """
        const { Snapshots } = await part('snapshots');
        const kept = new Snapshots(4);
        for (const times of given) kept.add(times.map(t => ({ t })));
        const indices = [0, 3, 4.5, 99].map(t => kept.indexAt(t));
        return [kept.items.map(({ t }) => t), indices];
    """
    assert call(body, [[3], [1, 2, 3], [5], [4, 5]]) == [[2, 3, 4, 5], [0, 1, 2, 3]]
    assert call(body, []) == [[], [-1, -1, -1, -1]]


def test_rates_stop_at_restarts_and_gaps(call):
    body = """
        const { Snapshots } = await part('snapshots');
        const { columns } = await part('series');
        const kept = new Snapshots();
        kept.add(given);
        const { t, rate, running } = columns(kept.items, 0, kept.items.length - 1);
        return { t, rate, running };
    """
    found = call(body, [snapshot(1, 10), snapshot(2, 30), snapshot(3, 5), snapshot(20, 25)])
    assert found["t"] == [1, 2, 3, 4, 20]  # a row without values stands in the gap
    assert found["rate"] == [None, 20, None, None, None]
    assert found["running"] == [0, 0, 0, None, 0]


def test_a_row_keeps_its_lane(call):
    body = """
        const { complete } = await part('snapshots');
        const { Slots } = await part('slots');
        const slots = new Slots();
        return given.map(raw => {
            const [group] = slots.place(complete(raw), 4);
            return group.lanes.map(lane => lane && [lane.row.id, Boolean(lane.ended)]);
        });
    """

    def rows(*ids):
        return [{"id": i, "made": 1, "replica": None} for i in ids]

    ended = [{"id": 1, "made": 9, "in_time": True}]
    first = {"t": 1, "rows": rows(1, 2)}
    second = {"t": 2, "rows": rows(2), "ended": ended}
    third = {"t": 3, "rows": rows(2, 3, 4)}
    after_a_jump = {"t": 90, "rows": rows(3, 4)}
    found = call(body, [first, second, third, after_a_jump])
    assert found[0] == [[1, False], [2, False], None, None]
    assert found[1] == [[1, True], [2, False], None, None]
    assert found[2] == [[3, False], [2, False], [4, False], None]
    assert found[3] == [[3, False], [4, False], None, None]


def test_numbers_as_people_read_them(call):
    body = """
        const { bytes, percent, seconds, short } = await part('format');
        const { roundUp } = await part('series');
        return [bytes(812345678), percent(0.9871), percent(1), seconds(0.44), seconds(31.6),
                short(12345), short(null), roundUp(0), roundUp(210), roundUp(1000)];
    """
    found = call(body)
    assert found == ["775 MiB", "98.7", "100", "0.4", "32", "12.3k", "–", 1, 300, 1000]
