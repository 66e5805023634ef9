"""Data sets of the Hugging Face hub: `hub:OWNER/NAME[:SPLIT]` in, the data files of that split out, each on disk."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from finetune.errors import Problem, UserError
from finetune.machine import is_offline

PREFIX = "hub:"
NAME = re.compile(r"hub:([\w.-]+/[\w.-]+?)(?::([\w.-]+))?")
SUFFIXES = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
COMPRESSED = ("", ".gz", ".xz", ".zst", ".bz2")
WANTED = [f"*{suffix}{compression}" for suffix in SUFFIXES for compression in COMPRESSED]
FETCHED = [*WANTED, "README.md"]  # the card names the licence
ABOUT_THE_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # no rows in these


@cache  # one process sees one state of the data set, however often it asks
def hub_files(source: str) -> tuple[tuple[str, Path], ...]:
    """(`hub:OWNER/NAME/path`, file on disk) of a split, sorted; downloaded if they are not cached yet.

    Without a split it is the files of `train`, or all of them if none is called so.

    Raises:
        UserError: if the name is none, or the data set is not here and cannot be had.
    """
    match = NAME.fullmatch(source)
    if match is None:
        raise _problem(source, "is no name of a data set; write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT")
    name, split = match.groups()
    folder = _download(source, name)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if _is_data(path)]
    if not paths:
        raise _problem(source, f"this data set has no file that ends in {', '.join(SUFFIXES)}; download and convert it")
    return tuple((f"{PREFIX}{name}/{path}", folder / path) for path in _of_split(source, paths, split))


def can_be_had(source: str) -> bool:
    """Whether a source's files are here or can be downloaded now; True also for a name that is none, which is told."""
    try:
        return bool(hub_files(source))
    except UserError as error:
        return not _is_out_of_reach(error.__cause__)


def _is_data(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and name not in ABOUT_THE_DATA and any(name.endswith(wanted[1:]) for wanted in WANTED)


def _of_split(source: str, paths: Sequence[str], split: str | None) -> Sequence[str]:
    # `train` is in train-00000-of-00002.parquet, alpaca_train.json and train/0.json, not in train_sft-0.parquet.
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(split or 'train')}(?![A-Za-z]|_[A-Za-z])", re.IGNORECASE)
    chosen = [path for path in paths if word.search(path)]
    if not chosen and split is not None:
        there = ", ".join(paths[:6]) + (", ..." if len(paths) > 6 else "")
        raise _problem(source, f"no data file has {split!r} in its path; there are {there}")
    chosen = chosen or list(paths)
    kinds = sorted({next(each for each in SUFFIXES if each in path.lower()) for path in chosen})
    if len(kinds) > 1:  # most often the same rows twice
        cure = "download the data set and name one file or folder of it"
        raise _problem(source, f"the split lies there as {' and as '.join(kinds)}, perhaps the same rows; {cure}")
    return chosen


def _download(source: str, name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    by_hand = f"run `hf download {name} --repo-type dataset` where there is a network, or name a folder that holds it"
    try:
        if not is_offline():
            files = huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=FETCHED, dry_run=True)
            size = sum(file.file_size or 0 for file in files if file.will_download)
            if size:
                sys.stderr.write(f"downloading {source}: {size / 1e6:,.1f} MB\n")
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=FETCHED, local_files_only=is_offline()
            )
        )
    except HFValidationError as error:
        raise _problem(source, "is no name of a data set; write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT") from error
    except (OSError, HfHubHTTPError) as error:
        if _is_out_of_reach(error):
            why = "the network is switched off (--offline)" if is_offline() else "the hub cannot be reached"
            raise _problem(source, f"not in the hub cache, and {why}; {by_hand}") from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _problem(source, f"cannot be downloaded ({reason}); correct the name, or {by_hand}") from error


def _is_out_of_reach(error: BaseException | None) -> bool:
    """Whether nobody answered; a hub that refuses a name answers with an HTTP error."""
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, DryRunError):  # of whatever went wrong (huggingface_hub/_snapshot_download.py)
        return not isinstance(error.__cause__, HfHubHTTPError)
    return isinstance(error, LocalEntryNotFoundError)


def _problem(source: str, message: str) -> UserError:
    return UserError(Problem(source, f"source: {message}"))
