"""The code interpreter: what it runs, and what it keeps code from. Every escape is tried for real.

As root, as a user with namespaces, and as a user with Landlock alone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serving.tools.interpreter import (
    InterpreterLimits,
    InterpreterRefused,
    PythonInterpreter,
    printable,
)
from serving.tools.python_tool import InterpreterPool, python_tool
from serving.tools.registry import ToolRegistry
from serving.tools.sandbox.filesystem import work_folder
from serving.tools.sandbox.frames import FrameError, decode_frame, encode_frame
from serving.tools.sandbox.isolation import SandboxLimits
from serving.tools.sandbox.worker import OutputLimits
from tests.serving.tools.escapes import ESCAPES, attempts

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def started(**limits):
    interpreter = PythonInterpreter(InterpreterLimits(**limits))
    try:
        interpreter.start()
    except InterpreterRefused as error:
        pytest.skip(str(error))
    return interpreter


@pytest.fixture(scope="module")
def python():
    with started() as interpreter:
        yield interpreter


@pytest.fixture
def small():
    """One that a test may break: 6 s a run, 512 MiB, 2 MiB of files."""
    sandbox = SandboxLimits(cpu_s=3, memory_mib=512, files_mib=2, open_files=32, threads=8)
    with started(wall_s=6, sandbox=sandbox) as interpreter:
        yield interpreter


@pytest.fixture
def brief():
    """One whose runs end after half a second."""
    with started(wall_s=0.5, sandbox=SandboxLimits(memory_mib=512)) as interpreter:
        yield interpreter


def processes_of(parent: int) -> list[int]:
    """Processes below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
        except OSError:
            continue
        children.setdefault(int(status.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found, left = [], [parent]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def own_processes(interpreter: PythonInterpreter) -> list[int]:
    """The supervisor, the worker."""
    supervisor = interpreter._process.pid
    return [supervisor, *processes_of(supervisor)]


def gone(processes: list[int]) -> bool:
    for _ in range(100):
        if not any(Path(f"/proc/{number}").exists() for number in processes):
            return True
        time.sleep(0.02)
    return False


# ---- what it runs


def test_value_of_the_last_line_and_output(python):
    assert python.run("print('out')\n6 * 7").text == "out\n42"
    assert python.run("x = 1").text == "(no output)"
    assert python.run("None").text == "(no output)"


def test_variables_stay(python):
    python.run("def double(n):\n    return 2 * n\nkept = 21")
    assert python.run("double(kept)").text == "42"


def test_a_traceback_shows_the_models_lines_alone(python):
    result = python.run("def f():\n    return 1 / 0\nf()")
    assert result.failed
    assert result.text.splitlines()[0] == "Traceback (most recent call last):"
    assert "return 1 / 0" in result.text and "ZeroDivisionError" in result.text
    assert "worker" not in result.text


@pytest.mark.parametrize(
    "code, error",
    [
        ("(", "SyntaxError"),
        ("x = ", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f():\n    f()\nf()", "RecursionError"),
        ("'\\ud800'.encode()", "UnicodeEncodeError"),
        (
            "class A:\n    def __repr__(self):\n        raise ValueError('no')\nA()",
            "ValueError: no",
        ),
    ],
)
def test_errors_leave_the_process_alone(python, code, error):
    python.run("alive = 1")
    result = python.run(code)
    assert result.failed and error in result.text
    assert python.run("alive").text == "1"


def test_a_figure_is_an_image(python):
    pytest.importorskip("matplotlib")
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    result = python.run(code)
    assert result.text == "[Image]" and not result.failed
    assert result.images[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert python.run("len(plt.get_fignums())").text == "0"


def test_threads_sockets_of_asyncio_and_own_files_work(python):
    code = """
import asyncio, shutil, tempfile, threading
async def late():
    await asyncio.sleep(0)
    return 3
done = []
thread = threading.Thread(target=lambda: done.append(asyncio.run(late())))
thread.start(); thread.join()
with tempfile.TemporaryDirectory() as folder:
    with open(f"{folder}/a", "w") as file:
        file.write("text")
    shutil.copy(f"{folder}/a", f"{folder}/b")
    done.append(open(f"{folder}/b").read())
done"""
    assert python.run(code).text == "[3, 'text']"


def test_output_is_cut_and_cannot_steer_a_terminal(python):
    result = python.run("print('x' * 10**6)\n'y' * 10**6")
    assert (
        len(result.text) < 2 * 4000 + 100 and "[TRUNCATED: 996001 more characters]" in result.text
    )
    assert (
        python.run("print('\\x1b]0;title\\x07 \\ud800 \\x9b31m red')").text == "]0;title  31m red"
    )
    assert printable("a\tb\n\x00\x7f") == "a\tb\n"


def test_images_are_bounded(python):
    pytest.importorskip("matplotlib")
    code = "import matplotlib.pyplot as plt\nfor i in range(9):\n    plt.figure(figsize=(90, 1))"
    result = python.run(code)
    assert len(result.images) == 4
    assert int.from_bytes(result.images[0][16:20], "big") == 2000


# ---- what it keeps code from


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A file that everybody may read."""
    file = tmp_path_factory.mktemp("secret") / "secret"
    file.write_text("secret")
    for folder in (file, *list(file.parents)[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    return str(file)


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_fails(python, secret, name):
    code = attempts(secret, os.getpid(), str(ROOT))[name]
    result = python.run(code)
    assert result.failed and "ESCAPED" not in result.text, result.text
    assert python.run("1").text == "1"


@pytest.mark.parametrize(
    "who, way", [("user", "namespaces"), ("user", "landlock"), ("container", "landlock")]
)
def test_escapes_fail_for_others(who, way, secret):
    """As a user without rights, and as root in a container, by namespaces or by Landlock alone."""
    if os.getuid() != 0:
        pytest.skip("to become another user needs root; test_an_escape_fails runs as this one")
    program = [HERE / "escapes.py", way, secret, str(os.getpid())]
    command = [sys.executable, HERE / "as_user.py", who, *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    if "refused" in texts:
        pytest.skip(texts["refused"])
    assert texts.keys() == ESCAPES.keys()
    assert {name: text for name, text in texts.items() if "ESCAPED" in text} == {}


def test_nothing_of_the_parents_environment(python, monkeypatch):
    monkeypatch.setenv("GLM_TEST_SECRET", "hidden")
    with started() as interpreter:
        text = interpreter.run("import os\ndict(os.environ)").text
    assert "hidden" not in text and "GLM_TEST" not in text and "'HOME': '/tmp'" in text


def test_open_files_are_its_pipes_alone(python):
    """The parent's files do not come with it."""
    with open(ROOT / "README.md") as file:
        os.set_inheritable(file.fileno(), True)
        with started() as interpreter:
            code = "import os\nopen_ = []\nfor n in range(64):\n    try:\n        os.fstat(n)\n"
            code += "        open_.append(n)\n    except OSError:\n        pass\nopen_"
            found = json.loads(interpreter.run(code).text)
    assert len(found) == 5  # standard input, output, error, and two pipes


def test_another_architectures_calls_end_the_process(small):
    """int 0x80 would make i386's calls, whose numbers differ."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 alone has two tables of calls")
    code = """
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))())"""
    result = small.run(code)
    assert result.failed and "crashed (SIG" in result.text


def test_python_in_tmp_is_not_hidden():
    """Its files lie where code would write; it then writes elsewhere."""
    assert work_folder(["/usr/lib", "/tmp/venv/lib"]) == "/sandbox"
    assert work_folder(["/usr/lib"]) == "/tmp"


# ---- limits


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(60)",
        "while True:\n    pass",
        "import signal\nfor n in range(1, 65):\n    try:\n"
        "        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "while True:\n    print('x' * 1000)",
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
        "9 ** 9 ** 9",
    ],
)
def test_a_run_that_does_not_end_is_ended(brief, code):
    brief.run("kept = 1")
    running = own_processes(brief)
    assert len(running) == 2
    begun_s = time.monotonic()
    result = brief.run(code)
    assert result.failed and "longer than 0.5 s" in result.text and "lost" in result.text
    assert time.monotonic() - begun_s < 5
    assert gone(running)
    assert "NameError" in brief.run("kept").text  # a new process


def test_cpu_seconds_are_limited():
    with started(wall_s=20, sandbox=SandboxLimits(cpu_s=1)) as interpreter:
        result = interpreter.run("while True:\n    pass")
    assert result.failed and "1 CPU seconds" in result.text


def test_memory_is_limited(small):
    result = small.run("held = []\nwhile True:\n    held.append(bytearray(10**7))")
    assert result.failed and "MemoryError" in result.text
    assert small.run("held = None\n1 + 1").text == "2"


def test_threads_are_limited(small):
    code = """
import threading, time
threading.stack_size(32768)
begun = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        begun += 1
except RuntimeError:
    print(begun)"""
    text = small.run(code).text
    assert int(text.split()[0]) < 10


def test_open_files_are_limited(small):
    result = small.run("files = []\nwhile True:\n    files.append(open('/dev/null'))")
    assert result.failed and "Too many open files" in result.text
    assert small.run("len(files) < 40, files.clear()").text == "(True, None)"


@pytest.mark.parametrize(
    "code",
    [
        "open('a', 'wb').write(bytes(10**7))",
        "for n in range(9):\n    open(f'f{n}', 'wb').write(bytes(10**6))",
        "import os\nos.posix_fallocate(os.open('b', os.O_RDWR | os.O_CREAT), 0, 10**7)",
        "for n in range(10**5):\n    open(f'n{n}', 'w').close()",
    ],
)
def test_the_folder_is_limited(small, code):
    if small.way != "namespaces":
        pytest.skip("by Landlock alone there is no folder")
    result = small.run(code)
    assert result.failed and ("File too large" in result.text or "No space" in result.text)


def test_a_process_that_ends_itself_is_replaced(small):
    result = small.run("import os\nos._exit(7)")
    assert result.failed and "ended its process (status 7)" in result.text
    assert "status 200" in small.run("import os\nos._exit(200)").text
    result = small.run("import ctypes\nctypes.string_at(0)")
    assert result.failed and "crashed (SIGSEGV)" in result.text
    assert small.run("2 + 2").text == "4"


def test_an_end_between_two_runs_is_told(small):
    small.run("kept = 1")
    [_, worker] = own_processes(small)
    os.kill(worker, signal.SIGKILL)
    small._process.wait(5)
    result = small.run("kept")
    assert result.failed and "earlier runs had ended" in result.text
    assert small.run("8").text == "8"


PIPES = """
import os, struct, json
for pipe in range(3, 10):
    try:
        os.write(pipe, {data})
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "data",
    [
        "b'garbage' * 100",
        "struct.pack('>II', 2**31, 2**31)",
        "struct.pack('>II', 2, 0) + b'[]'",
        "struct.pack('>II', 20000, 0) + b'[' * 20000",
        "struct.pack('>II', 13, 0) + b'{\"images\": []}'[:13]",
        "struct.pack('>II', 14, 0) + b'{\"images\": []}'",
        "struct.pack('>II', 15, 3) + b'{\"images\": [9]}' + b'abc'",
    ],
)
def test_what_is_no_answer_is_told_and_the_process_replaced(small, data):
    result = small.run(PIPES.format(data=data))
    assert result.failed and ("no answer" in result.text or "longer than" in result.text)
    assert small.run("5").text == "5"


def test_answers_written_ahead_are_found_out(small):
    """A forged answer is that run's text, but the run's own answer is then one too many."""
    forged = 'struct.pack(\'>II\', 39, 0) + b\'{"id": 1, "output": "X", "images": []}\'.ljust(39)'
    assert small.run(PIPES.format(data=forged)).text == "X"
    result = small.run("6")
    assert result.failed and "no answer" in result.text
    assert small.run("7").text == "7"


def test_what_is_no_png_is_no_image(small):
    """Code can send any bytes; they are never shown as an image."""
    code = "class A:\n    def _repr_png_(self):\n        return b'<svg onload=alert(1)>'\nA()"
    assert small.run(code).images == ()


def test_a_process_stands_still_between_runs(small):
    small.run(
        "import threading, time\ncount = 0\n"
        "def spin():\n    global count\n    while True:\n        count += 1\n"
        "threading.Thread(target=spin, daemon=True).start()"
    )
    time.sleep(0.2)
    [_, worker] = own_processes(small)

    def used() -> int:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(0.4)
    assert used() - before <= 1
    assert int(small.run("count").text) > 0


# ---- conversations, ends


def test_one_conversation_does_not_see_another():
    with started() as one, started() as other:
        one.run("secret = 5\nopen('note', 'w').write('secret')")
        assert "NameError" in other.run("secret").text
        assert other.run("import os\n[f for f in os.listdir('/tmp')]").text == "[]"


def test_a_pool_ends_who_was_used_longest_ago():
    now = [0.0]
    pool = InterpreterPool(most=2, idle_s=100, now_s=lambda: now[0])
    first = pool.of("a")
    assert pool.of("b") is not first and pool.of("a") is first
    third = pool.of("c")
    assert pool.of("a") is first and pool.of("c") is third
    now[0] = 101.0
    assert pool.of("c") is third
    assert pool.of("a") is not first
    pool.end("a")
    pool.close()


def test_nothing_is_left_after_close():
    interpreter = started()
    own = own_processes(interpreter)
    assert len(own) == 2
    interpreter.run(
        "import signal, threading, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "threading.Thread(target=time.sleep, args=(99,)).start()"
    )
    interpreter.close()
    assert gone(own)


def test_a_killed_parent_leaves_nothing(tmp_path):
    """Nor do its processes keep running while they stand still."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from serving.tools.interpreter import PythonInterpreter
python = PythonInterpreter()
python.run("import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()")
print("running", flush=True)
import time; time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    if parent.stdout.readline() != "running\n":
        parent.wait()
        pytest.skip("the interpreter does not start here (the first tests say why)")
    below = processes_of(parent.pid)
    assert len(below) == 2
    parent.kill()
    parent.wait()
    assert gone(below)


def test_a_dropped_interpreter_ends():
    interpreter = started()
    interpreter.run("1")
    own = own_processes(interpreter)
    supervisor = interpreter._process
    del interpreter
    assert supervisor.wait(5) != 0
    assert gone(own)


def test_an_interrupt_ends_the_run(small):
    """Ctrl-C in a terminal; the next run is a new process's."""
    small.run("kept = 1")
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        small.run("import time\ntime.sleep(60)")
    assert "NameError" in small.run("kept").text


def test_many_short_runs(python):
    """Stopping and going on between runs never gets out of order."""
    for number in range(500):
        assert python.run(str(number)).text == str(number)


def test_threads_share_an_interpreter(python):
    texts = []
    threads = []
    for number in range(4):
        threads.append(
            threading.Thread(target=lambda n=number: texts.append(python.run(f"{n}").text))
        )
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == ["0", "1", "2", "3"]


def test_elsewhere_it_refuses_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InterpreterRefused, match="^the code interpreter needs Linux, .* darwin$"):
        PythonInterpreter().run("1")


def test_a_machine_without_protections_is_told(monkeypatch):
    """A way that cannot be had is refused, and no code runs."""
    with pytest.raises(InterpreterRefused, match="is off: nothing: ") as refusal:
        PythonInterpreter(way="nothing").run("1")
    assert "\n" not in str(refusal.value)


# ---- the tool, frames


def test_as_a_tool(python):
    registry = ToolRegistry()
    registry.add(python_tool(python))
    assert registry.descriptions()[0]["function"]["parameters"]["required"] == ["code"]
    assert registry.call("python", '{"code": "40 + 2"}').text == "42"
    assert registry.call("python", '{"code": "1 / 0"}').failed
    wrong = registry.call("python", '{"code": 5}')
    assert wrong.text == "Error: python: code must be a text, got 5"


def test_long_code_is_refused(python):
    assert python.run("1 " * 50_000).failed


def test_frames_round_trip():
    frame = encode_frame({"id": 1, "text": "文"}, (b"abc", b"d"))
    text_bytes = int.from_bytes(frame[:4], "big")
    decoded = decode_frame(frame[8 : 8 + text_bytes], frame[8 + text_bytes :])
    assert decoded.body["text"] == "文" and decoded.images == (b"abc", b"d")


@pytest.mark.parametrize(
    "text", ["5", "{}", '{"images": 3}', '{"images": [-1]}', '{"images": [true]}', "[" * 99999]
)
def test_other_frames_are_refused(text):
    with pytest.raises(FrameError):
        decode_frame(text.encode(), b"a")


def test_output_limits_reach_the_process():
    with started(output=OutputLimits(characters=10)) as interpreter:
        assert (
            interpreter.run("print('x' * 30)").text == "xxxxxxxxxx\n[TRUNCATED: 21 more characters]"
        )
