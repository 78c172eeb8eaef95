"""Record the load and the memory of GPUs, or of CPU cores where there are none, as a CSV file.

python -m serving.monitor --output load.csv --picture load.png --pid 1234
python -m serving.monitor --output load.csv -- python -m serving.server --model DIR

The columns are those of UELLM's pref.py: Time (seconds), a load (percent) of each device, and
Total Memory Change, which is the MiB in use of all devices, as there. It ends with Ctrl-C,
--seconds, the process --pid, or the command after --.
"""

import argparse
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from chatglm.commands import Parser, number, run_command, whole
from predictor.pictures import new_figure
from serving.monitor.meters import choose_meter
from serving.monitor.recording import draw_recording, record_meter
from serving.monitor.watched import Nothing, Watched, WatchedCommand, WatchedProcess

PROG = "serving.monitor"


@dataclass(frozen=True)
class MonitorFlags:
    """The flags of the command; `monitor_parser` has their meaning and defaults."""

    output: Path
    interval_s: float
    seconds: float | None
    pid: int | None
    device: str
    picture: Path | None
    command: tuple[str, ...] = ()


def monitor_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [flags] [-- COMMAND ...]",
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu_data.csv"), help="the CSV file [gpu_data.csv]")
    interval = "seconds from one line to the next [1]"
    add("--interval_s", type=number(0.01, 86400), default=1.0, help=interval)
    add("--seconds", type=number(0, above=True), help="end after so many (default: no limit)")
    add("--pid", type=whole(), help="end when this process has ended")
    kinds = "what is recorded [auto: GPUs, else the CPU]"
    add("--device", choices=("auto", "gpu", "cpu"), default="auto", help=kinds)
    picture = "draw load and memory at the end: .png, .svg or .pdf"
    add("--picture", type=Path, metavar="FILE", help=picture)
    return parser


def parse_monitor_flags(argv: list[str]) -> MonitorFlags:
    """The flags, and the command after "--"."""
    words: list[str] = []
    parser = monitor_parser()
    if "--" in argv:
        place = argv.index("--")
        argv, words = argv[:place], argv[place + 1 :]
        if not words:
            parser.error("no command after --")
    flags = MonitorFlags(**vars(parser.parse_args(argv)), command=tuple(words))
    if flags.command and flags.pid is not None:
        parser.error("--pid and a command after -- exclude each other")
    if flags.picture is not None and flags.picture.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--picture {flags.picture}: wanted .png, .svg or .pdf")
    return flags


def watched_by(flags: MonitorFlags) -> Watched:
    """What the recording lasts for. Raises ValueError."""
    if flags.command:
        return WatchedCommand(flags.command)
    if flags.pid is not None:
        return WatchedProcess(flags.pid)
    return Nothing()


def run_monitor(flags: MonitorFlags) -> int:
    """Record, then draw; the exit code is the command's, where there is one."""
    if flags.picture is not None:
        new_figure()  # says where matplotlib is not installed
    meter = choose_meter(flags.device)
    stop = threading.Event()
    before = {}
    for kind in (signal.SIGINT, signal.SIGTERM):
        before[kind] = signal.signal(kind, lambda *_: stop.set())
    try:
        watched = watched_by(flags)
        try:
            lines = record_meter(
                meter,
                flags.output,
                flags.interval_s,
                flags.seconds,
                stop.wait,
                watched.has_ended,
            )
        finally:
            code = watched.close()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    print(f"{flags.output}: {lines} lines of {', '.join(meter.names)}", file=sys.stderr)
    if flags.picture is not None:
        draw_recording(flags.output, flags.picture)
    return code


def main(argv: list[str] | None = None) -> int:
    flags = parse_monitor_flags(sys.argv[1:] if argv is None else argv)
    return run_command(PROG, lambda: run_monitor(flags))


if __name__ == "__main__":
    sys.exit(main())
