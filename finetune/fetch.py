"""Fetch a base from the hub: its name in; a folder in the hub's cache out, whole, every file's hash compared.

Only what training and releasing use is fetched. A file that was broken off goes on where it stopped. The token is the
one that huggingface_hub finds (HF_TOKEN, or what `hf auth login` saved); nothing that a server says is repeated.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import Problem, StorageError, UserError
from finetune.machine import GIB, is_offline
from finetune.trust import allowed_commit

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# In the repository's first folder; weights by what the index says, or the one file.
BESIDE = (
    *("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
SHARDS = "model-*.safetensors"
ROOM_TO_SPARE = 1 << 28  # bytes that a disk keeps
MAIN = "main"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of the repository: its size, and the hash the hub has of it."""

    name: str
    bytes: int
    sha256: str | None  # of the large ones
    blob: str | None  # git's sha1 of the small ones

    @property
    def etag(self) -> str | None:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Fetched:
    """A base that is whole on this disk."""

    base: str
    commit: str
    folder: Path
    files: Sequence[RemoteFile]
    fetched_bytes: int
    licence: str | None

    def to_json(self) -> dict[str, Any]:
        files = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in self.files]
        return {**vars(self), "folder": str(self.folder), "files": files}


def fetch(base: str, *, revision: str | None = None, weights: bool = True, tell: Tell = lambda line: None) -> Fetched:
    """Fetch what is missing of a hub repository and compare every file with the hub's hash; its name and size first.

    Raises:
        UserError: no such repository or revision, one whose licence has to be accepted, no weights in safetensors
            form, no network or one that broke off.
        StorageError: not enough room, or a file whose hash is not the hub's.
    """
    refuse_offline(base)
    with _told_plainly(base):
        info = _ask(base, revision)
        commit = str(info.sha)
        files = _wanted(base, info, weights=weights)
        storage = storage_folder(base)
        missing = [file for file in files if not _blob(storage, file).is_file()]
        size = sum(file.bytes for file in missing)
        _tell_size(tell, base, commit, files, size, info)
        _refuse_full_disk(storage, size)
        folder = storage / "snapshots" / commit
        for file in files:
            if file in missing:
                tell(f"{file.name}: {_size(file.bytes)}")
            _get(base, commit, file, storage)
        _refuse_damaged(folder, files if weights else missing)
    if weights:  # last: with it the revision counts as here
        reference = storage / "refs" / (revision or MAIN)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    return Fetched(base, commit, folder, files, size, _licence(info))


def fetch_text(done: Fetched) -> str:
    """What a person reads of a fetched base."""
    licence = f", licence {done.licence}" if done.licence else ""
    total = sum(file.bytes for file in done.files)
    return (
        f"{done.base} at {done.commit[:12]}: {len(done.files)} files, {_size(total)}{licence}; "
        f"{_size(done.fetched_bytes)} fetched, every hash is the hub's\n{done.folder}"
    )


def refuse_offline(base: str) -> None:
    """Raises a UserError where the network is switched off."""
    if is_offline():
        message = (
            f"{base!r} is not a folder here and not whole in the hub's cache, and the network is switched off "
            "(--offline or HF_HUB_OFFLINE); run `finetune fetch` with a network first, or give a folder"
        )
        raise UserError(Problem("model.base", message))


def local_folder(base: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the hub's cache, whole or not; None where there is none. No network.

    Raises:
        UserError: the name is no hub id.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(base, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise UserError(Problem("model.base", f"{base!r} is neither a folder nor a hub id")) from error
    except LocalEntryNotFoundError:
        return None


def remote_tensors(base: str, commit: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, safetensors dtype and shape of every weight, from the headers alone: some hundred kilobytes.

    Raises:
        UserError: as fetch.
    """
    from huggingface_hub import HfApi

    with _told_plainly(base):
        found = HfApi().get_safetensors_metadata(base, revision=commit)
    return [
        (name, tensor.dtype, tuple(tensor.shape))
        for file in sorted(found.files_metadata)
        for name, tensor in found.files_metadata[file].tensors.items()
    ]


def storage_folder(base: str) -> Path:
    """Where the hub's cache keeps a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model")


def _ask(base: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi

    return HfApi().model_info(base, revision=revision, files_metadata=True)


def _wanted(base: str, info: ModelInfo, *, weights: bool) -> list[RemoteFile]:
    """The files we use, small ones first; foreign code only at the commit that was allowed."""
    there = [each for each in info.siblings or () if "/" not in each.rfilename]
    patterns = [*BESIDE, *(["*.py"] if allowed_commit(base) == info.sha else [])]
    names = {each.rfilename for each in there}
    weight_pattern = SHARDS if INDEX in names else ONE_FILE
    if not any(fnmatch(name, weight_pattern) for name in names):
        others = sorted(name for name in names if name.endswith((".bin", ".pth", ".gguf", ".safetensors")))
        hint = f"; there is {others[0]}, which is not read" if others else ""
        raise UserError(Problem(base, f"holds no weights as {weight_pattern}{hint}; name a base in safetensors form"))
    chosen = []
    for each in there:
        if any(fnmatch(each.rfilename, pattern) for pattern in patterns) or (
            weights and fnmatch(each.rfilename, weight_pattern)
        ):
            sha256 = each.lfs.sha256 if each.lfs else None
            chosen.append(RemoteFile(each.rfilename, int(each.size or 0), sha256, each.blob_id))
    return sorted(chosen, key=lambda file: (file.bytes, file.name))


def _tell_size(tell: Tell, base: str, commit: str, files: Sequence[RemoteFile], missing: int, info: ModelInfo) -> None:
    licence = _licence(info)
    total = sum(file.bytes for file in files)
    said = f"{base} at {commit[:12]}: {len(files)} files, {_size(total)}, of which {_size(missing)} are not here yet"
    tell(f"{said}; licence {licence}" if licence else said)


def _licence(info: ModelInfo) -> str | None:
    card = info.card_data
    named = (card.get("license_name") or card.get("license")) if card else None
    return named if isinstance(named, str) else None


def _refuse_full_disk(storage: Path, needed: int) -> None:
    there = next(path for path in (storage, *storage.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if needed and needed + ROOM_TO_SPARE > free:
        message = f"{_size(needed)} are to be fetched, {_size(free)} are free"
        raise StorageError(Problem(str(there), f"{message}; make room, or set HF_HOME to a folder on another disk"))


def _get(base: str, commit: str, file: RemoteFile, storage: Path) -> None:
    """The file in the snapshot; a large one through a partial file of our own, which a later start goes on with.

    huggingface_hub 2 throws a partial file away when its process ends (file_download.py, _download_to_tmp_and_move).
    """
    from huggingface_hub import hf_hub_download

    blob = _blob(storage, file)
    if file.sha256 and not blob.is_file():
        _get_large(base, commit, file, blob)
    hf_hub_download(base, file.name, revision=commit)


def _get_large(base: str, commit: str, file: RemoteFile, blob: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(base, file.name, revision=commit)
    headers = build_hf_headers()
    location = get_hf_file_metadata(url).location
    if location.split("/")[2] != url.split("/")[2]:  # another host, which is not to see the token
        headers.pop("authorization", None)
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.finetune-partial")
    with partial.open("ab") as stream:
        http_get(location, stream, headers=headers, resume_size=stream.tell(), expected_size=file.bytes)
    partial.replace(blob)


def _refuse_damaged(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Every file as it lies on the disk; a damaged one is removed, so that the next start fetches it."""
    problems = []
    for file in files:
        path = folder / file.name
        wrong = _sha256(path) != file.sha256 if file.sha256 else _git_sha1(path) != file.blob
        if wrong and file.etag:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            message = "its hash is not the hub's; it was removed, the same command fetches it again"
            problems.append(Problem(str(path), message))
    if problems:
        raise StorageError(problems)


def _blob(storage: Path, file: RemoteFile) -> Path:
    return storage / "blobs" / str(file.etag)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    """As git names a file's content; the hub gives no other hash of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _told_plainly(base: str) -> Iterator[None]:
    """What the hub or the way to it refuses, in our words: a server's own may hold the token."""
    from huggingface_hub import errors

    # The errors of whichever HTTP library this version of huggingface_hub is built on.
    broken: Any = (errors.HfHubHTTPError.__bases__[0], errors.LocalEntryNotFoundError, ConnectionError)
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(Problem("model.base", f"{base!r} is neither a folder nor a hub id")) from error
    except errors.GatedRepoError as error:
        message = (
            f"its licence has to be accepted first: open https://huggingface.co/{base}, agree to it with your account, "
            "then `hf auth login` (or set HF_TOKEN) and run the same command again"
        )
        raise UserError(Problem(base, message)) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(Problem("model.revision", f"{base} has no such revision; correct or remove it")) from error
    except errors.RepositoryNotFoundError as error:
        message = "the hub has no such model, or a private one that your login does not show; correct the name, or "
        raise UserError(Problem(base, message + "`hf auth login`")) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        cure = "`hf auth login` with a token that may read it" if status in (401, 403) else "try again later"
        raise UserError(Problem(base, f"the hub refused it (status {status}); {cure}")) from error
    except broken as error:
        message = "the hub cannot be reached, or the connection broke; the same command goes on where it stopped"
        raise UserError(Problem(base, message)) from error
    except OSError as error:
        reason = error.strerror or "the disk or the connection failed"
        message = f"cannot be fetched: {reason}; when that is cured, the same command goes on where it stopped"
        raise StorageError(Problem(base, message)) from error


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
