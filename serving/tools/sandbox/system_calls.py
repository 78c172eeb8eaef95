"""The system calls that a sandboxed process may make, as a seccomp filter.

A list of what is allowed: every other call, and every one that a later kernel brings, fails with
EPERM. The filter is a classic BPF program over `struct seccomp_data` (Linux
Documentation/userspace-api/seccomp_filter.rst): the call's number at byte 0, the architecture at
4, six arguments of 64 bits from 16 on. Numbers are those of the kernel's tables; tests compare
them with libseccomp's where that is installed.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from serving.tools.sandbox.kernel import prctl

# "name x86_64 aarch64"; - where the architecture has no such call.
FREE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
pwritev 296 70, preadv2 327 286, pwritev2 328 287, open 2 -, openat 257 56, openat2 437 437,
close 3 57, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332
291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, lseek 8
62, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80
49, fchdir 81 50, dup 32 23, dup2 33 -, dup3 292 24, flock 73 32, fsync 74 82, fdatasync 75 83,
ftruncate 77 46, truncate 76 45, fallocate 285 47, fadvise64 221 223, sendfile 40 71,
copy_file_range 326 285, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35,
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -,
symlinkat 266 36, umask 95 166, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd2 290 19, timerfd_create 283 85, timerfd_settime 286 86, mmap 9 222,
munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, msync 26 227, mincore
27 232, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, nanosleep 35
101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -, futex 202 98,
set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, set_tid_address 218 96,
membarrier 324 283, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
getcpu 309 168, arch_prctl 158 -, getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -,
getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108
177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpriority 140 141, getrandom 318
278, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163, wait4 61 260, waitid 247
95, exit 60 93, exit_group 231 94, recvfrom 45 207, sendto 44 206, shutdown 48 210,
restart_syscall 219 128
"""
# Attributes of files, which Landlock does not protect: only where nothing but own files is there.
ATTRIBUTES = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, utime 132 -, utimes 235 -, utimensat 280 88,
futimesat 261 -
"""
# Only with certain arguments: RULES.
CHECKED = """
fcntl 72 25, clone 56 220, clone3 435 435, prctl 157 167, ioctl 16 29, prlimit64 302 261, kill
62 129, tgkill 234 131, socketpair 53 199
"""
COLUMNS = {"x86_64": 1, "aarch64": 2}
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
ERRNO = 0x00050000  # SECCOMP_RET_ERRNO
EPERM, ENOSYS = 1, 38
LOAD, EQUALS, MASK, RETURN = 0x20, 0x15, 0x54, 0x06  # BPF: ld [k]; jeq k; and k; ret k
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
SOCK_TYPE_MASK = 0xF
CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020000  # CLONE_NEW*


@dataclass(frozen=True)
class Check:
    """A condition on an argument: (its low or high 32 bits & mask) is, or is not, among values."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    high: bool = False
    among: bool = True

    def program(self) -> list[bytes]:
        """Instructions that return EPERM where the condition does not hold, else go on."""
        offset = 16 + 8 * self.argument + 4 * self.high
        program = [instruction(LOAD, offset)]
        if self.mask != 0xFFFFFFFF:
            program.append(instruction(MASK, self.mask))
        for place, value in enumerate(self.values):
            # Past the last instruction below where the value may be; else onto it.
            program.append(instruction(EQUALS, value, jump=len(self.values) - place))
        if not self.among:
            program.append(instruction(EQUALS, 0, jump=1, otherwise=1))  # past the refusal
        program.append(instruction(RETURN, ERRNO | EPERM))
        return program


def rules(own_pid: int) -> dict[str, tuple[Check, ...]]:
    """What the arguments of CHECKED must be.

    Args:
        own_pid: of the process, as it sees itself; it may signal itself alone.
    """
    return {
        # threads, no processes
        "clone": (Check(0, (CLONE_THREAD,), mask=CLONE_THREAD | CLONE_NAMESPACES),),
        "prctl": (Check(0, (15, 16)),),  # PR_SET_NAME, PR_GET_NAME
        # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        "ioctl": (Check(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
        # F_SETOWN, F_SETSIG, F_SETOWN_EX let the kernel signal others; F_NOTIFY watches folders
        "fcntl": (Check(1, (8, 10, 15, 1026), among=False),),
        # limits are read, never set
        "prlimit64": (Check(2, (0,)), Check(2, (0,), high=True)),
        "kill": (Check(0, (own_pid,)),),
        "tgkill": (Check(0, (own_pid,)),),
        # AF_UNIX, SOCK_STREAM: what asyncio wakes itself with; it has no address to send to
        "socketpair": (Check(0, (1,)), Check(1, (1,), mask=SOCK_TYPE_MASK)),
    }


def instruction(code: int, value: int, jump: int = 0, otherwise: int = 0) -> bytes:
    """A struct sock_filter; jumps count instructions to skip."""
    return struct.pack("=HBBI", code, jump, otherwise, value)


def call_numbers(table: str, machine: str) -> dict[str, int]:
    """{name: number} of a table on a machine."""
    numbers = {}
    for entry in table.split(","):
        row = entry.split()
        if (number := row[COLUMNS[machine]]) != "-":
            numbers[row[0]] = int(number)
    return numbers


def filter_program(machine: str, own_pid: int, attributes: bool) -> bytes:
    """The filter of a machine ("x86_64" or "aarch64").

    Args:
        own_pid: as in `rules`.
        attributes: files' modes and times may be set.
    """
    program = [
        instruction(LOAD, 4),
        instruction(EQUALS, AUDIT_ARCHITECTURES[machine], jump=1),
        instruction(RETURN, KILL),
        instruction(LOAD, 0),
    ]
    free = call_numbers(FREE, machine)
    if attributes:
        free |= call_numbers(ATTRIBUTES, machine)
    for number in sorted(free.values()):
        program += [instruction(EQUALS, number, otherwise=1), instruction(RETURN, ALLOW)]
    checked = call_numbers(CHECKED, machine)
    # The C library goes on with clone, whose flags a filter can read.
    no_call = [instruction(RETURN, ERRNO | ENOSYS)]
    program += guarded(checked.pop("clone3"), no_call)
    conditions = rules(own_pid)
    for name, number in checked.items():
        block: list[bytes] = []
        for check in conditions[name]:
            block += check.program()
        program += guarded(number, [*block, instruction(RETURN, ALLOW)])
    program.append(instruction(RETURN, ERRNO | EPERM))
    return b"".join(program)


def guarded(number: int, block: Sequence[bytes]) -> list[bytes]:
    """Instructions that run a block, which returns, for one call."""
    return [instruction(EQUALS, number, otherwise=len(block)), *block]


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def restrict_calls(attributes: bool) -> None:
    """Let this process, for good, make only the allowed calls; it needs no_new_privs.

    Raises:
        OSError: the kernel, or the machine, has no such filters.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCHITECTURES:
        raise OSError(f"no seccomp filter is written for {machine}")
    program = filter_program(machine, os.getpid(), attributes)
    filter_ = FilterProgram(len(program) // 8, program)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_))
