"""Where a shard set lies: in a folder, on `s3://`, or wherever else fsspec reaches."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from errors import UserError

STORAGE_ERRORS = (OSError, BotoCoreError, ClientError)
"""What file systems raise, s3fs included, when something can't be read or written."""


def open_storage(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that `path` names, and its path in there.

    For `s3://`, credentials, region and endpoint come from where AWS's own tools take them.

    Raises:
        UserError: If fsspec knows no such place.
    """
    options = {"use_listings_cache": False}  # others write there too
    if path.startswith("s3://"):
        # s3fs itself tries again; with botocore's many attempts inside each of those, a wrong endpoint takes minutes.
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 2}}
    try:
        return fsspec.url_to_fs(path, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be reached ({error})") from None


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise whatever keeps us from reading below `path` as a UserError."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def reason(error: Exception) -> str:
    """What a file system's error says, in a few words."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, PermissionError) and not error.strerror:  # from a server
        text += "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do"
    return text
