"""jieba's tokenizer of Chinese words."""

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jieba


@cache
def jieba_tokenizer() -> "jieba.Tokenizer":
    """jieba's tokenizer, with its cache in the user's own folder.

    Raises:
        ValueError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise ValueError(f'words need jieba: pip install -e ".[eval]" ({error})') from None

    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    folder = Path("~/.cache/glm-foundry").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # jieba caches its dictionary here. Its default is a file in /tmp, which any user may write.
    tokenizer.tmp_dir = str(folder)
    return tokenizer
