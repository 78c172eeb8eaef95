"""server.py FOLDER: fork for every connection to FOLDER/socket and run its command.

Ends, and removes the folder, where its stdin is closed.
"""

import array
import atexit
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MORE_MODULES = (
    "multiprocessing.spawn",  # it notes sys.executable, before that is replaced
    "torch.distributed.run",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.ops.adam",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
)


class Child:
    """A command under way: its process and its client's connection."""

    def __init__(self, pid: int, connection: socket.socket):
        self.pid, self.connection = pid, connection
        self.handle = os.pidfd_open(pid)

    def pass_on_signals(self) -> bool:
        """Pass on the client's signals; False where the client is gone: the command is ended."""
        try:
            numbers = self.connection.recv(16)
        except ConnectionResetError:
            numbers = b""
        for number in numbers or (signal.SIGKILL,):
            os.kill(self.pid, number)
        return bool(numbers)

    def report(self):
        """Tell the client how the ended command ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.handle)
        with self.connection, suppress(OSError):  # the client may have been killed
            self.connection.sendall(str(code).encode())


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A client's request and its three streams."""
    streams = array.array("i")
    length, rights, *_ = connection.recvmsg(8, socket.CMSG_LEN(3 * streams.itemsize))
    for *_, data in rights:
        streams.frombytes(data)
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += connection.recv(1 << 20)
    return json.loads(content), list(streams)


def run_python(words: list[str]):
    """What `python words` does, for a script, -m and -c."""
    while words[0] == "-u":
        words = words[1:]
    place, *sys.argv = words
    if place == "-m":
        sys.path[0] = os.getcwd()
        name = sys.argv[0]
        for known in (name, f"{name}.__main__"):  # runpy warns of an imported module
            if not hasattr(sys.modules.get(known), "__path__"):
                sys.modules.pop(known, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif place == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        sys.path[0], code = "", sys.argv[0]
        sys.argv[0] = "-c"
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(place))
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__file__ = place
        source = Path(place).read_bytes()
        exec(compile(source, place, "exec"), main.__dict__)


def exit_code(left: SystemExit) -> int:
    if left.code is None or isinstance(left.code, int):
        return (left.code or 0) & 0xFF
    print(left.code, file=sys.stderr)
    return 1


def is_imported_as(request: dict) -> bool:
    """The command needs a process as this one: the same threads, plain flags."""
    first = next((word for word in request["words"] if word != "-u"), "")
    plain = bool(first) and (not first.startswith("-") or first in ("-m", "-c"))
    threads = request["env"].get("OMP_NUM_THREADS")
    return plain and threads == os.environ["OMP_NUM_THREADS"]


def run_child(request: dict, streams: list[int]) -> NoReturn:
    """The fork's part."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        if stream > 2:
            os.close(stream)
    os.chdir(request["cwd"])
    if not is_imported_as(request):
        os.execve(sys.executable, [sys.executable, *request["words"]], request["env"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.executable = request["executable"]
    code = 0
    try:
        run_python(request["words"])
    except SystemExit as left:
        code = exit_code(left)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def import_libraries():
    """What the tests' commands import."""
    from benchmarks.forking import MODULES

    for name in (*MODULES, *MORE_MODULES):
        importlib.import_module(name)


class Server:
    """Accepts commands and waits for them, in one thread: a fork copies no other."""

    def __init__(self, folder: Path):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.imported = False

    def accept(self):
        """Start the command of a new client; the first waits for the imports."""
        connection, _ = self.listener.accept()
        if not self.imported:
            import_libraries()
            self.imported = True
        request, streams = receive(connection)
        pid = os.fork()
        if not pid:
            self.listener.close()
            self.selector.close()
            run_child(request, streams)
        for stream in streams:
            os.close(stream)
        child = Child(pid, connection)

        def from_client():
            if not child.pass_on_signals():
                self.selector.unregister(connection)

        def ended():
            self.selector.unregister(child.handle)
            if connection in self.selector.get_map():
                self.selector.unregister(connection)
            child.report()

        self.selector.register(connection, selectors.EVENT_READ, from_client)
        self.selector.register(child.handle, selectors.EVENT_READ, ended)

    def serve(self):
        """Until stdin is closed, which is when pytest ends."""
        self.selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    return
                if key.fd in self.selector.get_map():  # not unregistered by one before it
                    key.data()


def main(folder: Path):
    server = Server(folder)
    print("ready", flush=True)
    os.dup2(2, 1)
    try:
        server.serve()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
