"""Find adapters: in a local folder, or on the hub."""

import re
from functools import lru_cache
from pathlib import Path

from phatgoose.errors import PhatgooseError, reason_of

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@lru_cache
def adapter_folder(where: str) -> str:
    """Return the folder of an adapter; download it into the hub's cache if needed.

    Args:
        where: a folder, or a hub id with or without a revision: `owner/name@revision`.

    Raises:
        PhatgooseError: there is no such folder, and the hub does not provide it.
    """
    if Path(where).expanduser().is_dir() or not _HUB_ID.fullmatch(where):
        return where
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = where.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = reason_of(error, first_line=True)
        raise PhatgooseError(
            f"adapter {where} is not a local folder, and the hub does not provide it ({reason}). "
            "Name a folder saved by PEFT, or check the id and the network."
        ) from error
