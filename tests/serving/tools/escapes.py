"""What code in the sandbox tries: each must raise. Run as a program, it prints what came of each.

python tests/serving/tools/escapes.py WAY SECRET_FILE PARENT_PID
"""

import json
import sys

# Native calls that Python's own functions may not make: numbers of x86-64 and arm64.
NATIVE = """
import ctypes, os, platform
x86 = platform.machine() == "x86_64"
libc = ctypes.CDLL(None, use_errno=True)
zeros = ctypes.byref(ctypes.create_string_buffer(128))
def call(on_x86, on_arm, *arguments):
    result = libc.syscall(ctypes.c_long(on_x86 if x86 else on_arm), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
ESCAPES = {
    # network
    "socket": "import socket; socket.socket()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "datagram pair": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
    "native socket": NATIVE + "call(41, 198, 2, 1, 0)",
    "native connect": NATIVE + "call(42, 203, 0, b'0' * 16, 16)",
    "x32 socket": NATIVE + "call(0x40000000 + 41, 198, 2, 1, 0)",
    "io_uring": NATIVE + "call(425, 425, 8, ctypes.byref(ctypes.create_string_buffer(120)))",
    # processes
    "fork": "import os; os.fork()",
    "system": "import os; assert os.system('true') == 0",
    "popen": "import os; assert os.popen('echo out').read() == 'out\\n'",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "execv": "import os; os.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process().start()",
    "native fork": NATIVE + "call(57, 220, 17, 0, 0, 0, 0)",
    "native vfork": NATIVE + "call(58, 220, 17, 0, 0, 0, 0)",
    "native clone": NATIVE + "call(56, 220, 17, 0, 0, 0, 0)",
    "clone3": NATIVE + "call(435, 435, ctypes.byref((ctypes.c_uint64 * 11)()), 88)",
    "native execve": NATIVE + "call(59, 221, b'/bin/true', None, None)",
    "execveat": NATIVE + "call(322, 281, -100, b'/bin/true', None, None, 0)",
    # others' files and memory
    "shadow": "open('/etc/shadow').read()",
    "passwd": "open('/etc/passwd').read()",
    "secret": "open(SECRET).read()",
    "project": "import sys; sys.path.insert(0, ROOT); import predict",
    "home": "import os; os.listdir(os.path.expanduser('~root/.ssh'))",
    "init's environment": "open('/proc/1/environ').read()",
    "parent's environment": "open(f'/proc/{PARENT}/environ').read()",
    "parent's memory": "open(f'/proc/{PARENT}/mem', 'rb')",
    "own memory file": "open('/proc/self/mem', 'rb')",
    "process_vm_readv": NATIVE + "call(310, 270, PARENT, None, 0, None, 0, 0)",
    "ptrace": NATIVE + "call(101, 117, 16, PARENT, 0, 0)",
    "pidfd_open": NATIVE + "call(434, 434, PARENT, 0)",
    "shared memory": "open('/dev/shm/x', 'w')",
    "posix shm": "import multiprocessing.shared_memory as s; s.SharedMemory(create=True, size=9)",
    "sysv shm": NATIVE + "call(29, 194, 0, 4096, 0o1600)",
    "message queue": NATIVE + "call(240, 180, b'q', 66, 0o600, None)",
    "memfd": "import os; os.memfd_create('x')",
    "keyring": NATIVE + "call(250, 219, 0, -3, 0)",
    "bpf": NATIVE + "call(321, 280, 0, None, 0)",
    "userfaultfd": NATIVE + "call(323, 282, 0)",
    "perf": NATIVE + "call(298, 241, None, 0, -1, -1, 0)",
    # writing elsewhere
    "write to root": "open('/escaped', 'w')",
    "write to etc": "open('/etc/escaped', 'w')",
    "write to Python": "import os; open(os.path.dirname(os.__file__) + '/escaped.py', 'w')",
    "touch Python": "import os; os.utime(os.__file__)",
    "chmod Python": "import os; os.chmod(os.__file__, 0o777)",
    "truncate Python": "import os; os.truncate(os.__file__, 0)",
    "remove Python": "import os; os.remove(os.__file__)",
    "symlink to shadow": "import os; os.symlink('/etc/shadow', 'l'); open('l').read()",
    "link to Python": "import os; os.link(os.__file__, '/tmp/linked'); open('/tmp/linked', 'w')",
    "dots": "open('../../../../../../etc/shadow').read()",
    "device": "open('/dev/mem', 'rb')",
    "disk": "open('/dev/vda', 'rb')",
    "tty": "open('/dev/tty', 'w')",
    "mknod": "import os; os.mknod('d', 0o60666, os.makedev(254, 0)); open('d', 'rb')",
    # who it is
    "mount": NATIVE + "call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None)",
    "umount": NATIVE + "call(166, 39, b'/tmp', 2)",
    "unshare": NATIVE + "call(272, 97, 0x10000000)",
    "setns": NATIVE + "call(308, 268, 0, 0)",
    "chroot": "import os; os.mkdir('r'); os.chroot('r')",
    "pivot_root": NATIVE + "call(155, 41, b'.', b'.')",
    "setuid": NATIVE + "call(105, 146, 0)",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 1))",
    "outlive the parent": NATIVE + "call(157, 167, 1, 0, 0, 0, 0)",
    "be dumpable": NATIVE + "call(157, 167, 4, 1, 0, 0, 0)",
    "another filter": NATIVE + "call(317, 277, 1, 0, None)",
    # signals
    "kill the parent": "import os; os.kill(PARENT, 9)",
    "kill everything": "import os; os.kill(-1, 9)",
    "kill the group": "import os; os.kill(0, 9)",
    "killpg": "import os; os.killpg(os.getpgid(0), 9)",
    "tgkill": NATIVE + "call(234, 131, PARENT, PARENT, 9)",
    "tkill": NATIVE + "call(200, 130, PARENT, 9)",
    "sigqueue": NATIVE + "call(129, 138, PARENT, 9, zeros)",
    "signals by files": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PARENT)",
    "session": "import os; os.setsid()",
    "group": "import os; os.setpgid(0, 0)",
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "reboot": NATIVE + "call(169, 142, 0xfee1dead, 672274793, 0, None)",
}


def attempts(secret: str, parent: int, root: str) -> dict[str, str]:
    """{name: code}, which prints ESCAPED where nothing was raised."""
    before = f"SECRET, PARENT, ROOT = {secret!r}, {parent}, {root!r}\n"
    return {name: f"{before}{code}\nprint('ESCAPED')" for name, code in ESCAPES.items()}


def main(way: str, secret: str, parent: str) -> None:
    sys.path.insert(0, ROOT)
    from serving.tools.interpreter import InterpreterRefused, PythonInterpreter

    texts = {}
    with PythonInterpreter(way=way) as interpreter:
        try:
            interpreter.start()
        except InterpreterRefused as error:
            print(json.dumps({"refused": str(error)}))
            return
        for name, code in attempts(secret, int(parent), ROOT).items():
            texts[name] = interpreter.run(code).text
    print(json.dumps(texts))


if __name__ == "__main__":
    ROOT = sys.path[0].removesuffix("/tests/serving/tools")
    main(*sys.argv[1:])
