"""Every program of examples/ runs against a real server of a tiny random GLM-4."""

import re
import subprocess

import pytest

from benchmarks.client_env import environment_python
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.serving.server.test_server_faults import running
from tests.warm import warm_python


@pytest.fixture(scope="module")
def url(tiny_folders):
    with running(tiny_folders["glm4"], "--max_tokens", "900", endless=False) as server:
        yield server.root


def run(*words) -> str:
    done = subprocess.run(
        list(map(str, words)),
        cwd=REPO_ROOT,
        env=child_env() | {"NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_openai_client(url):
    out = run(warm_python(), "examples/openai_client.py", f"{url}/v1")
    for line in ("chat:", "lengths and deadline: {", "stream:", "form: {", "embeddings: [40, 40]"):
        assert line in out, out


def test_tools(url):
    out = run(warm_python(), "examples/tools.py", f"{url}/v1")
    assert "call: weather {'city': " in out and "answer:" in out


def test_curl(url):
    out = run("bash", "examples/curl.sh", url)
    for part in ('{"status":"ok"}', "chat.completion.chunk", "data: [DONE]", "text_completion"):
        assert part in out, out
    assert '"object":"response"' in out and '"object":"embedding"' in out


@pytest.mark.slow
def test_langchain_client(url):
    out = run(environment_python("clients"), "examples/langchain_client.py", f"{url}/v1")
    assert "structured: name=" in out and "embeddings: 40" in out


FAULTS = re.findall(
    r"^\| (\d+) \| .* \| `(.*curl.*)` \|$",
    (REPO_ROOT / "docs" / "server.md").read_text(encoding="utf-8"),
    re.M,
)


@pytest.fixture(scope="module")
def strict(tiny_folders, tmp_path_factory):
    """A server with a key that waits only a second for bodies; a folder with curl's settings."""
    settings = tmp_path_factory.mktemp("curl")
    (settings / ".curlrc").write_text('silent\nwrite-out = "\\n%{http_code}\\n"\n')
    words = ("--api_key", "k", "--client_s", "1")
    with running(tiny_folders["glm2"], *words) as keyed, running(tiny_folders["glm2"]) as plain:
        yield {"401": keyed.root, "408": keyed.root, "else": plain.root}, settings


@pytest.mark.parametrize("status, command", FAULTS)
def test_what_goes_wrong(strict, status, command):
    """The commands of docs/server.md's table give the errors that it names."""
    roots, settings = strict
    command = command.replace("\\|", "|").replace("sleep 40", "sleep 3")
    if status == "408":
        command += " -H 'Authorization: Bearer k'"
    url = f"{roots.get(status, roots['else'])}/v1"
    done = subprocess.run(
        ["bash", "-c", command],
        env=child_env() | {"url": url, "CURL_HOME": str(settings), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == status, (done.stdout, done.stderr)
    assert done.stdout.startswith('{"error":'), done.stdout


def test_the_table_has_commands():
    assert len(FAULTS) >= 9
