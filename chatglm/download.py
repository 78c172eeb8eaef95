"""Download a model by its name on a hub, and compare it with the hub's checksums. Free of torch.

python -m chatglm.download THUDM/chatglm2-6b                    into the cache; prints the folder
python -m chatglm.download THUDM/chatglm2-6b@main --local_dir chatglm2-6b --verify
python -m chatglm.download ms://ZhipuAI/chatglm3-6b             from ModelScope
python -m chatglm.download FOLDER --verify                      a folder that was downloaded before
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

from .checksums import CHECKSUMS, check_folder_files, hash_file, in_threads
from .commands import Parser, run_command
from .hub import MODELSCOPE, check_pointers, fetch, modelscope_hashes, parse_hub_name

METADATA = Path(".cache", "huggingface", "download")  # huggingface_hub's notes in a --local_dir
SHA256, GIT_SHA1 = 64, 40  # hexadecimal digits
BLOCK = 1 << 20  # bytes


def known_hashes(folder: Path) -> dict[str, str]:
    """{file: hash that the hub gave for it} of a downloaded folder, as huggingface_hub kept it.

    SHA-256 of a file in Git LFS, Git's own SHA-1 of another. In the cache a file is a link to one
    that is named so; a folder of its own has a note of three lines on each, the second is the hash.
    """
    hashes = {}
    noted = [folder / note.stem for note in (folder / METADATA).glob("*.metadata")]
    for path in sorted({*folder.iterdir(), *noted}):
        note = folder / METADATA / f"{path.name}.metadata"
        known = ""
        if path.is_symlink():
            known = path.readlink().name
        elif note.is_file():
            known = "".join(note.read_text(encoding="utf-8").splitlines()[1:2])
        if re.fullmatch(r"[0-9a-f]+", known) and len(known) in (SHA256, GIT_SHA1):
            hashes[path.name] = known
    return hashes


def is_same(path: Path, known: str) -> bool:
    """Whether a file has a hash of `known_hashes`."""
    if not path.is_file():
        return False
    if len(known) == SHA256:
        return hash_file(path, fast=False)["sha256"] == known
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest() == known


def verify_folder(folder: Path, hashes: dict[str, str] | None = None) -> int:
    """Compare a folder with the hub's checksums, or with its checksums.json; returns the files.

    Args:
        hashes: the hub's; None: `known_hashes`.
    Raises:
        ValueError: a file differs, is a Git LFS pointer, or there is nothing to compare with.
    """
    check_pointers(folder)
    hashes = hashes or known_hashes(folder)
    if not hashes and (folder / CHECKSUMS).is_file():
        check_folder_files(folder, "full")
        return len(list(folder.iterdir()))
    if not hashes:
        raise ValueError(
            f"{folder}: no checksums of a hub are known for it, and it has no {CHECKSUMS}; "
            "name the model: python -m chatglm.download OWNER/NAME --local_dir "
            f"{folder} --verify"
        )
    same = in_threads(lambda name: is_same(folder / name, hashes[name]), list(hashes))
    # in the cache a name is a link: what is damaged is the file behind it
    wrong = [str((folder / name).resolve()) for name, fits in zip(hashes, same) if not fits]
    if wrong:
        raise ValueError(
            f"{folder} is not as the hub has it: delete {', '.join(wrong)}, then download again"
        )
    return len(hashes)


def download(name: str, local_dir: str | None, verify: bool) -> None:
    """Download a model, or take a folder that is there; print the folder.

    Raises:
        ValueError, OSError: as `chatglm.hub.resolve_folder` and `verify_folder`.
    """
    asked = parse_hub_name(name)
    if asked:
        folder = fetch(asked, local_dir=local_dir)
    elif not Path(name).is_dir():
        raise FileNotFoundError(
            f"{name}: neither a folder nor OWNER/NAME, hf://OWNER/NAME or ms://OWNER/NAME"
        )
    elif local_dir or not verify:
        raise ValueError(f"{name} is a folder: it is there; --verify alone compares it")
    else:
        folder = Path(name)
    if verify:
        hashes = modelscope_hashes(asked) if asked and asked.hub == MODELSCOPE else None
        count = verify_folder(folder, hashes)
        print(f"{count} files are as the hub has them", file=sys.stderr)
    print(folder)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="chatglm.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="OWNER/NAME, perhaps hf:// or ms:// before it")
    parser.add_argument("--local_dir", metavar="DIR", help="download there [the hub's cache]")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the hub's checksum of it"
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: download(args.name, args.local_dir, args.verify))


if __name__ == "__main__":
    sys.exit(main())
