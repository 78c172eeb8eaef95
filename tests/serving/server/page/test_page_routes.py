"""The page's files and what it asks first: headers, paths, keys."""

import http.client
import json
import shutil
import subprocess
import sys
import zipfile

import httpx
import pytest

from serving.server.access import AccessRules
from serving.server.keys import KeyRing
from serving.server.page.static_files import (
    CONTENT_TYPES,
    SECURITY_HEADERS,
    STATIC,
    names_etag,
    read_page_files,
)
from tests.conftest import REPO_ROOT
from tests.serving.server.page.live_reader import LiveReader
from tests.serving.server.test_server_faults import running

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
KEY = {"Authorization": "Bearer of-the-test"}
OPEN = ("/", "/page/index.html", "/page/api/access")
CLOSED = ("/page/api/settings", "/page/api/live", "/page/api/tools/call", "/page/api/", "/metrics")


@pytest.fixture(scope="module")
def server(tiny_folders):
    with running(tiny_folders["glm2"]) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tiny_folders):
    """A server that wants a key."""
    with running(tiny_folders["glm3"], "--api_key", "of-the-test") as found:
        yield found


def raw_reply(server, target, method="GET", **headers):
    """(status, headers, body) of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def served_files():
    return [f"/page/{name}" for name in read_page_files()]


@pytest.mark.parametrize("path", ["/", *served_files()])
def test_every_file_has_the_security_headers(server, path):
    reply = httpx.get(server.root + path)
    assert reply.status_code == 200 and reply.content
    assert reply.headers["content-security-policy"] == POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cross-origin-opener-policy"] == "same-origin"
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"
    assert "camera=()" in reply.headers["permissions-policy"]
    name = "index.html" if path == "/" else path
    suffix = "." + name.rpartition(".")[2]
    assert reply.headers["content-type"] == CONTENT_TYPES[suffix]


def test_the_page_has_its_place_for_the_front_end(server):
    reply = httpx.get(server.root)
    assert reply.headers["content-type"].startswith("text/html") and 'id="app"' in reply.text
    for word in (" style=", "<style", " onclick", "javascript:", "//cdn"):
        assert word not in reply.text


def test_scripts_are_javascript():
    assert CONTENT_TYPES[".js"] == CONTENT_TYPES[".mjs"] == "text/javascript; charset=utf-8"


def test_a_file_that_a_client_has_is_not_sent_again(server):
    etag = httpx.get(server.root).headers["etag"]
    for value in (etag, f'"other", W/{etag}', "*"):
        again = httpx.get(server.root, headers={"If-None-Match": value})
        assert again.status_code == 304 and not again.content
        assert again.headers["etag"] == etag
        assert again.headers["content-security-policy"] == POLICY
    other = httpx.get(server.root, headers={"If-None-Match": '"other"'})
    assert other.status_code == 200 and other.headers["cache-control"] == "no-cache"
    assert not names_etag("", etag)


@pytest.mark.parametrize("path", ["/", "/page/index.html", "/page/api/access"])
def test_head_is_get_without_the_body(server, path):
    got, head = httpx.get(server.root + path), httpx.head(server.root + path)
    assert head.status_code == 200 and not head.content
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]
    assert httpx.post(server.root + path).status_code == 405


STRAY = [
    "/page/../access.py",
    "/page/../routes.py",
    "/page/%2e%2e/routes.py",
    "/page/..%2froutes.py",
    "/page/..%5croutes.py",
    "/page/%2e%2e%2f%2e%2e%2faccess.py",
    "/page//etc/passwd",
    "/page/%2fetc%2fpasswd",
    "/page/./index.html",
    "/page/index.html/",
    "/page/index.html%00.js",
    "/page/INDEX.HTML",
    "/page/",
    "/page",
    "/page/nothing.js",
    "/page/vendor",
    "/page/%ff%fe",
    "/page/api",
    "/page/api/nothing",
    "/index.html",
]


@pytest.mark.parametrize("target", STRAY)
def test_only_listed_files_are_served(server, target):
    status, _, body = raw_reply(server, target)
    assert status == 404
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_files_are_listed_by_suffix_and_links_are_left_out(tmp_path):
    root, outside = tmp_path / "static", tmp_path / "outside"
    for folder in (root / "vendor", outside):
        folder.mkdir(parents=True)
    (outside / "secret.js").write_text("secret")
    (root / "app.js").write_text("1")
    (root / "vendor" / "a.mjs").write_text("2")
    (root / "vendor" / "LICENSE").write_text("3")
    (root / "notes.py").write_text("4")
    (root / ".hidden").write_text("5")
    (root / "link.js").symlink_to(outside / "secret.js")
    (root / "folder").symlink_to(outside)
    assert set(read_page_files(root)) == {"app.js", "vendor/a.mjs"}
    before = read_page_files(root)["app.js"].etag
    (root / "app.js").write_text("2")
    assert read_page_files(root)["app.js"].etag != before


def test_the_shell_is_open_and_the_rest_wants_the_key(locked):
    for path in OPEN:
        assert httpx.get(locked.root + path).status_code == 200, path
    for path in CLOSED:
        reply = httpx.get(locked.root + path)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{locked.root}/page/api/access").json() == {"needs_key": True}
    assert httpx.get(f"{locked.root}/page/api/settings", headers=KEY).status_code == 200
    wrong = {"Authorization": "Bearer other"}
    assert httpx.get(f"{locked.root}/page/api/settings", headers=wrong).status_code == 401


def test_the_stream_wants_the_key(locked):
    with LiveReader(locked.root, headers=KEY) as viewer:
        assert viewer.wait_for(lambda snapshot: True)["running"] == 0


@pytest.mark.parametrize(
    "target",
    [
        "/page/../v1/models",
        "/page/%2e%2e/v1/models",
        "/page//api/settings",
        "/page/%61pi/settings",
        "/page/api%2fsettings",
        "/page/api/settings%0a",
        "//page/x/../../v1/models",
        "/page/../page/api/settings",
    ],
)
def test_no_way_round_the_key(locked, target):
    status, _, body = raw_reply(locked, target)
    assert status in (401, 404)
    assert b"max_batch" not in body and b'"data"' not in body


def test_what_is_open():
    rules = AccessRules(KeyRing("k"), None)
    assert rules.check("/page/app.js", {}) is None
    for path in ("/page/api/settings", "/page/api/", "/page", "/pages/app.js", "/v1/models"):
        with pytest.raises(Exception, match="wanted the header Authorization"):
            rules.check(path, {})


def test_hosts_are_checked_for_the_page_too(server):
    for path in ("/", "/page/index.html", "/page/api/access"):
        status, _, body = raw_reply(server, path, Host="evil.example")
        assert status == 403 and json.loads(body)["error"]["code"] == "host_not_allowed"


def test_settings_without_a_predictor(server):
    reply = httpx.get(f"{server.root}/page/api/settings")
    assert reply.headers["cache-control"] == "no-store"
    found = reply.json()
    assert found["model"] == server.service.name
    assert found["policy"] == "fcfs" and found["engine"] == "continuous"
    assert found["predictor"] is None and found["slo_s"] == 30.0
    assert found["defaults"] == {"temperature": 0.8, "top_p": 0.8}
    assert found["limits"] == {"max_batch": 2, "kv_tokens": 2048, "max_tokens": 1024}
    assert found["takes_tools"] is False and found["tools"] == []
    assert (found["tool_rounds"], found["tool_calls"]) == (8, 16)
    assert found["feedback"] is False and isinstance(found["version"], str)
    assert httpx.get(f"{server.root}/page/api/access").json() == {"needs_key": False}


class Offered:
    """Tools of a page."""

    def descriptions(self):
        return [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def test_settings_with_tools_and_feedback(locked, server, monkeypatch):
    for found in (locked, server):
        monkeypatch.setattr(found.service, "page_tools", Offered())
        monkeypatch.setattr(found.service, "feedback", object())
    told = httpx.get(f"{locked.root}/page/api/settings", headers=KEY).json()
    assert told["takes_tools"] and told["tools"] == Offered().descriptions() and told["feedback"]
    told = httpx.get(f"{server.root}/page/api/settings").json()  # ChatGLM2 writes no calls
    assert told["takes_tools"] is False and told["tools"] == []


def test_settings_name_the_predictor(folders):
    model, predictor = folders
    with running(model, "--policy", "deadline", "--predictor", predictor, endless=False) as found:
        told = httpx.get(f"{found.root}/page/api/settings").json()
    assert told["policy"] == "deadline" and told["predictor"] == predictor.name


def test_the_page_can_be_off(tiny_folders, capsys):
    with running(tiny_folders["glm2"], "--no_page") as found:
        for path in (*OPEN, *CLOSED[:4]):
            assert httpx.get(found.root + path).status_code == 404, path
        assert httpx.get(f"{found.root}/v1/models").status_code == 200
        document = httpx.get(f"{found.root}/openapi.json").json()
        assert not [path for path in document["paths"] if path == "/" or path.startswith("/page")]
    assert "in a browser" not in capsys.readouterr().out


def test_two_lines_say_where_it_is(tiny_folders, capsys):
    with running(tiny_folders["glm2"]) as found:
        httpx.get(found.root)
    name = found.service.name
    address = f"http://127.0.0.1:{found.port}"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"serving {name} at {address}/v1", f"open {address}/ in a browser"]


def test_metrics_do_not_grow_with_files(server):
    for number in range(5):
        httpx.get(f"{server.root}/page/none{number}.js")
    text = httpx.get(f"{server.root}/metrics").text
    labels = {line.split('"')[1] for line in text.splitlines() if "http_requests_total{" in line}
    assert "/page/{file}" in labels and "none" not in "".join(labels)


def test_openapi_has_the_page(locked, server):
    document = httpx.get(f"{server.root}/openapi.json").json()
    stream = document["paths"]["/page/api/live"]["get"]["responses"]["200"]["content"]
    assert list(stream) == ["text/event-stream"]
    settings = httpx.get(f"{server.root}/page/api/settings").json()
    schema = document["paths"]["/page/api/settings"]["get"]["responses"]["200"]["content"]
    assert set(schema["application/json"]["schema"]["required"]) == set(settings)
    document = httpx.get(f"{locked.root}/openapi.json", headers=KEY).json()
    assert document["paths"]["/page/api/access"]["get"]["security"] == []
    assert "security" not in document["paths"]["/page/api/settings"]["get"]


def test_a_wheel_has_the_files(tmp_path):
    """Of a copy of the package's folder alone: the rest of the project takes long to build."""
    shutil.copy(REPO_ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "README.md").write_text("")
    shutil.copytree(STATIC.parent, tmp_path / "serving" / "server" / "page")
    deep = tmp_path / "serving" / "server" / "page" / "static" / "vendor" / "deep"
    deep.mkdir(parents=True)
    (deep / "a.js").write_text("1")
    (deep / "LICENSE").write_text("2")
    for folder in ("serving", "serving/server"):
        (tmp_path / folder / "__init__.py").write_text("")
    for name in ("train", "merge_lora", "predict", "glm_foundry"):
        (tmp_path / f"{name}.py").write_text("")
    code = "from setuptools import setup; setup()"
    words = [sys.executable, "-c", code, "-q", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in read_page_files():
        assert f"serving/server/page/static/{name}" in held
    assert "serving/server/page/static/vendor/deep/a.js" in held
    assert "serving/server/page/static/vendor/deep/LICENSE" in held


def test_headers_are_those_of_the_policy():
    assert SECURITY_HEADERS["Content-Security-Policy"] == POLICY
