"""From a folder to a repository of the hub, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.errors import OptionError, WriteError


def require_repository(repository: str, *, private: bool) -> None:
    """Makes a repository, unless it is there: what cannot be pushed to is known before the work.

    Raises:
        OptionError: It is no name of one.
        WriteError: The hub refuses.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repository, "check its name and your token (`hf auth login`)"):
        HfApi().create_repo(repository, private=private, exist_ok=True)


def push_folder(folder: str, repository: str) -> str:
    """Uploads a folder.

    Returns:
        The address of the commit.

    Raises:
        WriteError: The hub refuses, or the network does.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repository, f"the folder is complete, so try again: `hf upload {repository} {folder}`"):
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder))


@contextmanager
def _hub_errors(repository: str, advice: str) -> Iterator[None]:
    # The second is that of its HTTP library, which is another in each of its releases: a network that fails.
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise OptionError(f"{repository!r} names no repository of the hub: {_first_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise WriteError(f"{repository} on the hub cannot be written: {_first_line(error)}; {advice}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
