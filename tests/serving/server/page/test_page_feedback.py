"""The route of feedback: what is checked, and the lines that come of it."""

import json
import threading

import httpx
import pytest

from serving.server.keys import key_digest
from serving.server.page.feedback import FeedbackFile, read_feedback
from tests.serving.server.test_server_faults import running

TALK = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见"}]
GIVEN = {
    "id": "a1",
    "model": "m",
    "messages": TALK,
    "rating": "up",
    "correction": None,
    "report": {"output_tokens": 2},
}
CALLED = [
    {"role": "user", "content": "几点？"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    {"role": "assistant", "content": "十二点", "more": 1},
]


@pytest.fixture(scope="module")
def server(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    keys = folder / "keys.txt"
    keys.write_text(f"ann {key_digest(b'a')}\n")
    words = ("--feedback", folder / "feedback.jsonl", "--tools", "samples", "--api_keys", keys)
    with running(tiny_folders["glm3"], *words) as found:
        found.file = folder / "feedback.jsonl"
        yield found


def give(server, body, **headers):
    headers = {"Authorization": "Bearer a"} | headers
    return httpx.post(f"{server.root}/page/api/feedback", json=body, headers=headers)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_feedback_is_a_line(server):
    before = len(lines_of(server.file))
    reply = give(server, GIVEN)
    assert reply.status_code == 200 and reply.json() == {"id": "a1"}
    again = give(server, GIVEN | {"rating": "down", "correction": "你好！"})
    assert again.status_code == 200
    first, second = lines_of(server.file)[before:]
    assert first.pop("time") <= second.pop("time")
    assert first == GIVEN | {"key": "ann"}
    assert second == GIVEN | {"rating": "down", "correction": "你好！", "key": "ann"}
    assert "你好" in server.file.read_text(encoding="utf-8")  # as it is, not escaped


def test_a_line_with_calls_has_the_tools(server):
    assert give(server, GIVEN | {"messages": CALLED}).status_code == 200
    line = lines_of(server.file)[-1]
    assert line["tools"] == server.service.page_tools.descriptions()
    assert line["messages"][:3] == CALLED[:3]
    assert line["messages"][3] == {"role": "assistant", "content": "十二点"}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"id": ""}, "id must be 1 to 64 printable characters"),
        ({"id": "x" * 65}, "at most 64 characters"),
        ({"id": "a\nb"}, "printable"),
        ({"id": None}, "id must be text"),
        ({"model": 1}, "model must be text"),
        ({"rating": "good"}, 'rating must be "up", "down" or null'),
        ({"rating": True}, 'rating must be "up", "down" or null'),
        ({"correction": "  "}, "correction must have a text"),
        ({"correction": "x" * 200_001}, "at most 200000 characters"),
        ({"correction": "\ud83d"}, "half of a surrogate pair"),
        ({"messages": TALK[:1]}, "messages must end with the answer"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": CALLED[:2]}, "without text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a role of"),
        ({"report": [1]}, "report must be null or an object"),
        ({"report": {"x": "y" * 8000}}, "at most 8000 characters"),
        ({"stars": 5}, "unknown field 'stars'"),
    ],
)
def test_what_is_wrong_is_told(server, changes, told):
    before = server.file.read_bytes()
    body = GIVEN | changes
    headers = {"Authorization": "Bearer a", "Content-Type": "application/json"}
    url = f"{server.root}/page/api/feedback"
    reply = httpx.post(url, content=json.dumps(body), headers=headers)
    assert reply.status_code == 400 and told in reply.json()["error"]["message"]
    assert server.file.read_bytes() == before


def test_feedback_wants_the_key_and_the_own_page(server):
    assert give(server, GIVEN, Authorization="Bearer b").status_code == 401
    assert give(server, GIVEN, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_a_withdrawal_is_a_line_too():
    line = read_feedback(GIVEN | {"rating": None, "report": None})
    assert line["rating"] is line["correction"] is line["report"] is None


def test_lines_stay_whole(tmp_path):
    """Two servers share a file; one of them goes on after a line that was cut."""
    path = tmp_path / "said.jsonl"
    path.write_text('{"id": "cut')
    files = [FeedbackFile(path), FeedbackFile(path)]
    files[1]._file._ends_mid_line = False  # it was opened when the line was whole

    def add(file, number):
        for i in range(50):
            file.add({"id": f"{number}-{i}", "text": "好" * 2000})

    files[0].add({"id": "first"})
    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=add, args=(files[number % 2], number)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"id": "cut' and json.loads(lines[1]) == {"id": "first"}
    ids = {json.loads(line)["id"] for line in lines[2:]}
    assert len(ids) == 200


def test_a_full_disk_is_told(tiny_folders):
    with running(tiny_folders["glm2"], "--feedback", "/dev/full") as server:
        for _ in range(2):
            reply = httpx.post(f"{server.root}/page/api/feedback", json=GIVEN)
            assert reply.status_code == 500
            assert "the feedback is not kept" in reply.json()["error"]["message"]
        assert httpx.get(f"{server.root}/health").status_code == 200
