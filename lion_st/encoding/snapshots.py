"""Saved folders by their path, or by the name of the data set on the Hub that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lion_st.encoding.storage import StorageError
from lion_st.files import is_hub_name


def local_folder(place: str | Path, files: Sequence[str], revision: str | None = None) -> Path:
    """A folder as it is, or the snapshot of a data set on the Hub at one commit, downloaded unless it is cached.

    Args:
        place: A folder, which comes first, or the name of a data set, `owner/name`.
        files: Patterns of the files to download, the first one the file that the folder is known by.
        revision: Commit, tag or branch of the data set; main by default.
    """
    if not is_hub_name(place):
        if revision is not None:
            raise ValueError(
                f"{str(place)!r} is not the name of a data set on the Hub, owner/name, which alone has revisions (got "
                f"{revision!r}): leave it out."
            )
        if isinstance(place, str) and not Path(place).exists():
            raise FileNotFoundError(f"{place}: no such folder, nor is that a name on the Hub, owner/name.")
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(place), repo_type="dataset", revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = "" if revision is None else f" with the revision {revision!r}"
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{str(place)!r} is neither a folder here nor a data set on the Hub{at} that can be read ({reason})."
        ) from error
    if not (folder / files[0]).is_file():
        raise StorageError(f"The data set {str(place)!r} on the Hub has no {files[0]}: lion_st did not publish it.")
    return folder


@contextmanager
def download_explained(place: str | Path) -> Iterator[None]:
    """Say of what is damaged how it is downloaded again, if it came from the Hub."""
    try:
        yield
    except StorageError as error:
        if not is_hub_name(place):
            raise
        raise StorageError(
            f"{error} It was downloaded from the Hub: `hf cache rm dataset/{place}` removes it, and what reads it next "
            "downloads it again."
        ) from error
