"""Flags that the server and the gateway have alike; --help of either loads nothing for them."""

import argparse

from finetune.flag_effects import Effect
from serving.server.keys import KEY_VARIABLE

RECALIBRATION = Effect("--recalibrate", lambda c: c.recalibrate)
RECALIBRATION_EFFECTS = dict.fromkeys(("recalibrate_every", "recalibrated_dir"), RECALIBRATION)


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of who may ask, and of what is logged of it."""
    key = f"key that all requests but /health must carry (better: the environment's {KEY_VARIABLE})"
    parser.add_argument("--api_key", help=key)
    keys = "file of more keys, by name and hash (python -m serving.server.keys adds one)"
    parser.add_argument("--api_keys", metavar="FILE", help=keys)
    hosts = "names, with commas, that the header Host may have (default on loopback: --host)"
    parser.add_argument("--allowed_hosts", default="", help=hosts)
    lines = "a JSON line for each request on the standard error output"
    parser.add_argument("--access_log", action="store_true", help=lines)


def add_recalibration_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which the predictor learns from the answers."""
    update = "update the predictor in the background from the lengths of the answers"
    parser.add_argument("--recalibrate", action="store_true", help=update)
    every = "with --recalibrate: whole answers from one update to the next [500]"
    parser.add_argument("--recalibrate_every", type=int, default=500, help=every)
    output = "with --recalibrate: folder of the best update (default: PREDICTOR-recalibrated)"
    parser.add_argument("--recalibrated_dir", metavar="DIR", help=output)
