"""Downloads public training files that are not shipped, since they state no licence.

The main function is `fetch_files`; SETS lists the files. Free of torch.
"""

import hashlib
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from finetune.files import written_whole
from finetune.rows.formats import BadRow
from finetune.rows.sources import read_json_items

BASE_URL = "https://raw.githubusercontent.com"
BLOCK = 1 << 16
SIZE_LIMIT = 2**30  # bytes
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PublicFile:
    """A file of a repository.

    Attributes:
        path: in the repository.
        rows, size, sha256: of the copy that this project's results are of, of November 2026.
    """

    path: str
    rows: int
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class FileSet:
    """Files of one repository.

    Attributes:
        folder: where they are put below --output.
    """

    repository: str
    text: str
    folder: str
    files: tuple[PublicFile, ...]


SETS = {
    "chatglm_finetuning": FileSet(
        "liucongg/ChatGLM-Finetuning",
        "triples of car faults (spo) and questions to texts (d2q)",
        "data",
        (
            PublicFile(
                "data/spo_0.json",
                1441,
                1333167,
                "28d34085de065c7a51a309b1436e0dbb8406ac0c88c1260a8e32b1bdb58f6762",
            ),
            PublicFile(
                "data/spo_1.json",
                50,
                49246,
                "650cefa4977662f4e2a8ae30be28c4a2844ebcfc50febfd59cd0d8c2c105efdc",
            ),
            PublicFile(
                "data/d2q_0.json",
                3143,
                3904662,
                "59e5f5d12600c70d323e29f8bfcdfc0bf35fde52ea12eee3fb7e64706bbd233b",
            ),
            PublicFile(
                "data/d2q_1.json",
                20,
                25830,
                "68f3cb8bde7978e4514ca24c3c654dfe0dc5aac2626544db9e8c3d4592f15f45",
            ),
        ),
    ),
    "uellm": FileSet(
        "HYIUYOU/UELLM",
        "Alpaca's instructions with measured lengths of answers",
        "dataset",
        (
            PublicFile(
                "dataset/output.json",
                100,
                14142,
                "89c0eb1558d9a9030ca0a8bc6b1d0d186c028f4c74d4b6035cbacb97d8036a66",
            ),
            PublicFile(
                "dataset/alpaca_data_output.json",
                100,
                14158,
                "0160067101a668c96a8eba00fed7b5a512c07a15d2c06cb925bd127ee4322a38",
            ),
            PublicFile(
                "dataset/alpaca_data_output_1.json",
                100,
                14164,
                "fdd0b4c3c01b323faac59b9aaa79da6f2ae83e0fcbe2a8cb1cb8de3c96f1c7af",
            ),
            PublicFile(
                "dataset/alpaca_data_zh_output.json",
                100,
                41636,
                "eb824adf31dcb69a73605f6b5e8582e2723932ad045e373fdb750d66a44cc130",
            ),
            PublicFile(
                "dataset/chatglm2.json",
                100,
                46923,
                "e90baea661b2eac7337edf8b752df70cfd5afc579317d6f50930f0aab3268d6c",
            ),
        ),
    ),
}


def url_of(files: FileSet, file: PublicFile, base_url: str) -> str:
    """Where a file is, at the head of its repository."""
    return f"{base_url.rstrip('/')}/{files.repository}/HEAD/{file.path}"


def fetch_files(files: FileSet, output: Path, base_url: str = BASE_URL) -> list[str]:
    """Download the files that are not there yet; returns a line of each.

    A file is written aside and renamed, once its rows are read.

    Raises:
        OSError: it cannot be downloaded or written; names the URL.
        BadRow: what came is no rows.
    """
    lines = []
    for file in files.files:
        path = output / files.folder / file.name
        if path.is_file():
            lines.append(f"{path}: is there; {describe_content(path.read_bytes(), file)}")
            continue
        content = download_bytes(url_of(files, file, base_url))
        with written_whole(path) as handle:
            handle.write(content)
            handle.flush()
            check_fetched_rows(Path(handle.name), path)
        lines.append(f"{path}: {describe_content(content, file)}")
    return lines


def download_bytes(url: str) -> bytes:
    """The content at a URL, with a progress bar."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            size = int(answer.headers.get("Content-Length") or 0) or None
            blocks: list[bytes] = []
            received = 0  # not bar.n, which stays 0 where no bar is shown
            with tqdm(total=size, unit="B", unit_scale=True, desc=url, disable=None) as bar:
                while block := answer.read(BLOCK):
                    blocks.append(block)
                    received += len(block)
                    bar.update(len(block))
                    if received > SIZE_LIMIT:
                        raise ValueError(f"more than {SIZE_LIMIT:,} bytes")
            if size is not None and received < size:
                raise ValueError(f"the connection ended after {received:,} of {size:,} bytes")
            return b"".join(blocks)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"{url}: {reason}; fetch it otherwise and name it to --train_path, or give the "
            "address of a mirror as --base_url"
        ) from None


def describe_content(content: bytes, file: PublicFile) -> str:
    """Whether a file is the one that this project's results are of, in words."""
    digest = hashlib.sha256(content).hexdigest()
    if digest == file.sha256:
        return f"{file.rows} rows, the file of docs/results.md"
    return (
        f"{len(content)} bytes, SHA-256 {digest}: another than the file of docs/results.md "
        f"({file.size} bytes, {file.sha256[:12]}...)"
    )


def check_fetched_rows(aside: Path, path: Path) -> None:
    """Raises BadRow where a downloaded file holds no rows: a page of a proxy, for example."""
    number = -1
    for number, (place, item) in enumerate(read_json_items(aside)):
        if not isinstance(item, dict):
            raise BadRow(f"{path}: what was downloaded is no rows (row {number + 1} of {place})")
    if number < 0:
        raise BadRow(f"{path}: what was downloaded is empty")
