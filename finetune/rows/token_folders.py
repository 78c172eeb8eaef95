"""Which folders hold a data set of token ids, and its files. Free of torch and numpy."""

from pathlib import Path

from chatglm.files import read_json

TOKENISED = "tokenised.json"
FILES = "train-*.parquet"


def is_tokenised(folder: str | Path) -> bool:
    """Whether a folder is such a data set."""
    return Path(folder, TOKENISED).is_file()


def tokenised_files(folder: Path) -> tuple[Path, ...]:
    """The Parquet files of a data set, in order; raises ValueError where they are not those that
    tokenised.json names."""
    files = tuple(sorted(folder.glob(FILES)))
    named = read_json(folder / TOKENISED).get("files")
    if [path.name for path in files] != named:
        raise ValueError(f"{folder / TOKENISED} names {named}, the folder has {len(files)} files")
    return files
