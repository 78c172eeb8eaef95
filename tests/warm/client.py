"""Run a Python command in a fork of the server; the server's folder is this file's.

Arguments are those of `python`: [-u] SCRIPT, -m MODULE or -c CODE, and the command's own.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(os.path.join(os.path.dirname(sys.argv[0]), "socket"))
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        request = {"words": words, "env": dict(os.environ), "cwd": os.getcwd()}
        request["executable"] = sys.argv[0]
        content = json.dumps(request).encode()
        streams = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        server.sendmsg([len(content).to_bytes(8, "big")], rights)
        server.sendall(content)
        answer = server.recv(64)
    if not answer:
        print(f"{sys.argv[0]}: the server has ended", file=sys.stderr)
        return 1
    code = int(answer)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
