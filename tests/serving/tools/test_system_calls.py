"""The seccomp filter: its numbers against libseccomp's, its program by a small machine for BPF.

So the filter for arm64 is tested on x86-64 too.
"""

import ctypes
import struct

import pytest

from serving.tools.sandbox.system_calls import (
    ALLOW,
    ATTRIBUTES,
    AUDIT_ARCHITECTURES,
    CHECKED,
    ERRNO,
    FREE,
    KILL,
    call_numbers,
    filter_program,
)

MACHINES = list(AUDIT_ARCHITECTURES)
PID = 77
EPERM, ENOSYS = ERRNO | 1, ERRNO | 38


def run_filter(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a program returns for a call (linux/filter.h, linux/seccomp.h)."""
    words = [*arguments, *(6 - len(arguments)) * (0,)]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(word % 2**64 for word in words))
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = value = 0
    while True:
        code, jump, otherwise, k = instructions[place]
        place += 1
        if code == 0x20:
            value = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x54:
            value &= k
        elif code == 0x15:
            place += jump if value == k else otherwise
        else:
            assert code == 0x06
            return k


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_libseccomps(machine):
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    for table in (FREE, ATTRIBUTES, CHECKED):
        for name, number in call_numbers(table, machine).items():
            architecture = AUDIT_ARCHITECTURES[machine]
            known = library.seccomp_syscall_resolve_name_arch(architecture, name.encode())
            assert known == number, name


@pytest.mark.parametrize("attributes", [False, True])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_other_call_fails(machine, attributes):
    program = filter_program(machine, PID, attributes)
    assert len(program) // 8 < 4096  # BPF_MAXINSNS
    free = set(call_numbers(FREE, machine).values())
    if attributes:
        free |= set(call_numbers(ATTRIBUTES, machine).values())
    checked = set(call_numbers(CHECKED, machine).values())
    for number in [*range(600), *range(0x40000000, 0x40000600), 2**32 - 1]:
        if number not in checked:
            wanted = ALLOW if number in free else EPERM
            assert run_filter(program, AUDIT_ARCHITECTURES[machine], number) == wanted
    for other in (0x40000003, 0x40000028, 0, *AUDIT_ARCHITECTURES.values()):
        if other != AUDIT_ARCHITECTURES[machine]:
            assert run_filter(program, other, 0) == KILL


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name, arguments, wanted",
    [
        ("clone", [0x3D0F00], ALLOW),  # glibc's flags of a thread
        ("clone", [17], EPERM),  # SIGCHLD alone: a fork
        ("clone", [0x4111], EPERM),  # a vfork
        ("clone", [0x3D0F00 | 0x20000], EPERM),
        ("clone", [0x3D0F00 | 0x10000000], EPERM),
        ("clone3", [0x1234, 88], ENOSYS),
        ("prctl", [15, 1], ALLOW),
        ("prctl", [1, 0], EPERM),
        ("prctl", [38, 0], EPERM),
        ("prctl", [22, 2], EPERM),
        ("ioctl", [1, 0x5413], ALLOW),
        ("ioctl", [0, 0x5412], EPERM),  # TIOCSTI types into a terminal
        ("fcntl", [1, 1], ALLOW),
        ("fcntl", [1, 4, 2048], ALLOW),
        ("fcntl", [1, 8, 5], EPERM),
        ("fcntl", [1, 10, 9], EPERM),
        ("fcntl", [1, 15, 9], EPERM),
        ("fcntl", [1, 1026, 9], EPERM),
        ("prlimit64", [0, 7, 0, 0x1234], ALLOW),
        ("prlimit64", [0, 7, 0x1234, 0], EPERM),
        ("prlimit64", [0, 7, 0x7F0000000000, 0], EPERM),
        ("kill", [PID, 9], ALLOW),
        ("kill", [PID + 1, 9], EPERM),
        ("kill", [0, 9], EPERM),
        ("kill", [-1, 9], EPERM),
        ("tgkill", [PID, 80, 6], ALLOW),
        ("tgkill", [1, 1, 6], EPERM),
        ("socketpair", [1, 1 | 0o2000000, 0], ALLOW),
        ("socketpair", [1, 2, 0], EPERM),
        ("socketpair", [1, 5, 0], EPERM),
        ("socketpair", [2, 1, 0], EPERM),
    ],
)
def test_arguments_are_checked(machine, name, arguments, wanted):
    program = filter_program(machine, PID, True)
    number = call_numbers(CHECKED, machine)[name]
    assert run_filter(program, AUDIT_ARCHITECTURES[machine], number, *arguments) == wanted


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_reach_out_are_in_no_table(machine):
    names = {**call_numbers(FREE, machine), **call_numbers(ATTRIBUTES, machine)}
    for name in (
        *("socket", "connect", "bind", "listen", "accept", "accept4", "sendmsg", "recvmsg"),
        *("fork", "vfork", "execve", "execveat", "ptrace", "process_vm_readv", "kcmp"),
        *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_tree"),
        *("setuid", "setresuid", "capset", "keyctl", "add_key", "bpf", "perf_event_open"),
        *("io_uring_setup", "userfaultfd", "memfd_create", "shmget", "mq_open", "mknod"),
        *("pidfd_open", "pidfd_getfd", "setrlimit", "setsid", "setpgid", "setpriority", "seccomp"),
        *("init_module", "reboot", "swapon", "name_to_handle_at", "open_by_handle_at"),
    ):
        assert name not in names
