"""Networks and tokenizers of transformers, in folders that its ``save_pretrained`` wrote. It is
imported when one is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sora_lightning.checks import import_optional


def transformers_class(name: str) -> Any:
    """Return a class of transformers. Raises ``ValueError`` where that is not installed."""
    return getattr(import_optional("transformers", name), name)


def model_type(folder: Path, role: str, kinds: Collection[str] = ()) -> str:
    """Return the ``model_type`` of a folder's configuration, which is one of ``kinds`` if any are
    given.

    ``role`` says in messages what is wanted. Raises ``ValueError`` for a folder without a
    configuration, and for another kind.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: holds no config.json of a {role}")
    kind = json.loads(file.read_text()).get("model_type")
    if kinds and kind not in kinds:
        raise ValueError(f"{folder}: holds a {kind}; a {role} is one of {', '.join(kinds)}")
    return kind


def read_network(folder: Path, name: str, role: str, **options: Any) -> Any:
    """Return a network with its weights, read by the class of this name with ``options``.

    Raises ``ValueError`` for a folder whose weights are missing, in whole or in part, or damaged.
    """
    logging = import_optional("transformers", name).logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of a whole model's other weights
    try:
        network, info = transformers_class(name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: holds no {role} to read: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: lacks weights of its {role}, such as {missing[0]}")
    return network


def read_tokenizer(folder: Path, name: str = "AutoTokenizer") -> Any:
    """Return the tokenizer of a folder, or its processor with one, read by the class of this name.

    Raises ``ValueError`` where there is none.
    """
    refusal = f"{folder}: has no tokenizer to read"
    try:
        read = transformers_class(name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{refusal}: {reason}") from error
    names = getattr(read, "tokenizer", read).vocab_files_names.values()
    if not any((folder / name).is_file() for name in names):  # made up by transformers
        raise ValueError(f"{refusal}: none of {', '.join(names)}")
    return read
