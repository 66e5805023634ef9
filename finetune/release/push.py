"""Upload a release to a model hub: a proven folder and a repository's name in, one commit that holds its files out.

The token is found by huggingface_hub itself (HF_TOKEN, or what `hf auth login` saved); here it is only looked at to be
cut out of every message.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from finetune.base import sha256_of
from finetune.errors import FinetuneError, Problem, ProofError, UserError, raise_problems
from finetune.machine import is_offline
from finetune.release.fresh import Proof, proof
from finetune.release.licences import Found, find_licence, has_prefix
from finetune.release.manifest import MANIFEST, OF_THE_HUB, damaged_files, read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
MAIN = "main"


@dataclass(frozen=True)
class Push:
    """What was uploaded, or with `dry_run` would be: where, which files, and what was proven before and after."""

    out: str
    repo: str
    revision: str
    files: Sequence[Mapping[str, Any]]
    proofs: Sequence[Proof]
    notes: Sequence[str]
    commit: str | None  # None: nothing was uploaded

    def to_json(self) -> dict[str, Any]:
        proofs = [found.to_json() for found in self.proofs]
        return {**vars(self), "files": list(self.files), "proofs": proofs, "notes": list(self.notes)}


def push(  # noqa: PLR0913  a parameter is an option
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = MAIN,
    files_only: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Push:
    """Prove the folder again, upload it in one commit, and compare what the hub says it has.

    Raises:
        UserError: no release, no repository name, no token, no network, or a repository that holds other files.
        ProofError: the folder, or what the hub has afterwards, is not what the manifest says.
    """
    _refuse_names(repo, revision)
    manifest = read_manifest(folder)
    files = files_to_push(folder, manifest)
    notes = _notes(folder, manifest, repo)
    if dry_run:
        raise_problems(damaged_files(folder, manifest["files"]), error=ProofError)
        return Push(_address(repo), repo, revision, files, [Proof("files", 0, 0, passed=True)], notes, None)
    _refuse_offline(repo)
    with told_plainly(repo):
        api = _connect(repo)
    proofs = _prove(folder, manifest, files_only=files_only, progress=progress)
    with told_plainly(repo):
        parent = _prepare(api, repo, private=private, revision=revision)
        gone = _refuse_other_files(api, repo, files, revision=revision, replace=replace)
        progress(f"uploading {len(files)} files, {sum(entry['bytes'] for entry in files):,} bytes, to {repo}")
        commit = _commit(api, folder, repo, files, gone=gone, revision=revision, parent=parent)
        proofs.append(_compare(api, repo, folder, files, commit=commit))
    return Push(_address(repo), repo, revision, files, proofs, notes, commit)


def push_text(done: Push) -> str:
    """What a person reads of an upload."""
    total = f"{len(done.files)} files, {sum(entry['bytes'] for entry in done.files):,} bytes"
    if done.commit is None:
        lines = [f"would upload to {done.out} ({done.revision}), nothing was sent: {total}"]
    else:
        lines = [f"{done.out}: {total}, commit {done.commit[:12]} on {done.revision}"]
    lines += [f"  {entry['bytes']:>15,}  {entry['name']}" for entry in done.files]
    lines += [f"  {'ok  ' if found.passed else 'FAIL'} {found.name}: {found.value:.6g}" for found in done.proofs]
    return "\n".join([*lines, *(f"note: {note}" for note in done.notes)])


def files_to_push(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of the manifest's files and of the manifest itself; nothing else is ever uploaded.

    Raises:
        ProofError: a name in the manifest is hidden, or leads out of the folder.
    """
    names = [entry["name"] for entry in manifest["files"]]
    wrong = [
        name
        for name in names
        if PurePosixPath(name).is_absolute()
        or any(part.startswith(".") for part in PurePosixPath(name).parts)
        or not (folder / name).resolve().is_relative_to(folder.resolve())
    ]
    raise_problems(
        (Problem(f"{folder / MANIFEST}: {name}", "is no file of a release; merge or export again") for name in wrong),
        error=ProofError,
    )
    manifest_file = folder / MANIFEST
    own = {"name": MANIFEST, "bytes": manifest_file.stat().st_size, "sha256": sha256_of(manifest_file)}
    return [*({key: entry[key] for key in ("name", "bytes", "sha256")} for entry in manifest["files"]), own]


def _refuse_names(repo: str, revision: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

    problems = []
    try:
        validate_repo_id(repo)
        is_name = repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        message = f"{repo!r} is no name of a repository; write OWNER/NAME with letters, digits, - _ and ."
        problems.append(Problem("REPO", message))
    if not re.fullmatch(r"[\w][\w./-]*", revision) or ".." in revision:
        problems.append(Problem("--revision", f"{revision!r} is no name of a branch; write one such as main or v2"))
    raise_problems(problems)


def _notes(folder: Path, manifest: Mapping[str, Any], repo: str) -> list[str]:
    """The licence's demand on the name is about the name that others see: that of the repository."""
    found: Found = find_licence(folder, manifest["base"]["id"])
    name = repo.split("/")[1]
    if found.licence is None or has_prefix(name, found.licence):
        return []
    wanted = found.licence.prefix
    return [
        f"the {found.licence.name} asks for a model name that begins with {wanted!r}; {name!r} does not: rename the "
        f"repository, for example to {repo.split('/')[0]}/{wanted.replace(' ', '-')}-{name}"
    ]


def _refuse_offline(repo: str) -> None:
    if is_offline():
        message = "the network is switched off (--offline or HF_HUB_OFFLINE); switch it on, or add --dry-run"
        raise UserError(Problem(repo, f"cannot be uploaded: {message}"))


def _connect(repo: str) -> HfApi:
    import sys

    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # a server's words would go to the screen as they are
    if not sys.stderr.isatty():
        disable_progress_bars()
    if get_token() is None:
        message = "no token is here; run `hf auth login` or set HF_TOKEN to one that may write"
        raise UserError(Problem(repo, f"cannot be uploaded: {message}"))
    return HfApi(library_name="finetune")


def _prove(
    folder: Path, manifest: Mapping[str, Any], *, files_only: bool, progress: Callable[[str], None]
) -> list[Proof]:
    if files_only:
        raise_problems(damaged_files(folder, manifest["files"]), error=ProofError)
        return [Proof("files", 0, 0, passed=True)]
    from finetune.release.verify import verify  # imports torch

    progress("proving the folder again")
    verification = verify(folder)
    if verification.not_proven is not None:
        message = (
            f"only its files could be compared: {verification.not_proven}; bring back what it was made of, "
            "or add --files-only to upload it with the proofs of its manifest"
        )
        raise UserError(Problem(str(folder), message))
    return list(verification.proofs)


def _prepare(api: HfApi, repo: str, *, private: bool, revision: str) -> str:
    """Repository and branch are there; the commit that ours will follow."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        message = (
            "is there already and public, although --private was asked; make it private on the hub, or leave it out"
        )
        raise UserError(Problem(repo, message))
    if revision != MAIN:
        api.create_branch(repo, branch=revision, exist_ok=True)
    parent = api.repo_info(repo, revision=revision).sha
    assert parent is not None
    return parent


def _refuse_other_files(
    api: HfApi, repo: str, files: Sequence[Mapping[str, Any]], *, revision: str, replace: bool
) -> list[str]:
    """Files that lie there and belong to another release; with `replace` they go in the same commit."""
    names = {entry["name"] for entry in files}
    others = sorted({file.path for file in _remote_files(api, repo, revision)} - names)
    if others and not replace:
        named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        message = f"holds {len(others)} files that are not of this release ({named}); name another repository, "
        raise UserError(Problem(repo, message + "or add --replace to delete them in the same commit"))
    return others


def _commit(  # noqa: PLR0913  what is uploaded, and where it goes
    api: HfApi,
    folder: Path,
    repo: str,
    files: Sequence[Mapping[str, Any]],
    *,
    gone: Sequence[str],
    revision: str,
    parent: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(entry["name"], str(folder / entry["name"])) for entry in files]
    operations += [CommitOperationDelete(name) for name in gone]
    message = f"Release {folder.resolve().name}, proven by finetune"
    return api.create_commit(repo, operations, commit_message=message, revision=revision, parent_commit=parent).oid


def _compare(api: HfApi, repo: str, folder: Path, files: Sequence[Mapping[str, Any]], *, commit: str) -> Proof:
    """The hub's own hashes of what it has now against those of the manifest."""
    remote = {file.path: file for file in _remote_files(api, repo, commit)}
    wrong = sorted(set(remote) - {entry["name"] for entry in files})
    wrong += [
        entry["name"]
        for entry in files
        if entry["name"] not in remote or not _is_the_same(remote[entry["name"]], folder / entry["name"], entry)
    ]
    found = proof("files on the hub that differ from the manifest", len(wrong), 0)
    if not found.passed:
        told = "the hub does not hold what was proven; delete that commit there and push again"
        raise ProofError(
            [*(Problem(f"{repo}/{name}", "differs from the manifest") for name in wrong), Problem(repo, told)]
        )
    return found


def _is_the_same(remote: RepoFile, file: Path, entry: Mapping[str, Any]) -> bool:
    """Large files by their sha256; small ones are git blobs, whose hash is that of a header and the content."""
    if remote.size != entry["bytes"]:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == entry["sha256"])
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return blob == remote.blob_id and hashlib.sha256(content).hexdigest() == entry["sha256"]


def _remote_files(api: HfApi, repo: str, revision: str) -> Iterator[RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    for each in api.list_repo_tree(repo, recursive=True, revision=revision):
        if isinstance(each, RepoFile) and not each.path.startswith(OF_THE_HUB):
            yield each


def _address(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def told_plainly(repo: str) -> Iterator[None]:
    """Whatever a hub or a network says ends as one line that names the cure and holds no token."""
    from huggingface_hub.errors import HfHubHTTPError

    # OSError, and the errors of whichever HTTP library this version of huggingface_hub is built on
    broken: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError)  # type: ignore[assignment]
    try:
        yield
    except FinetuneError:
        raise
    except HfHubHTTPError as error:
        message = _status_message(error.response.status_code if error.response is not None else None)
        raise _user_error(repo, f"{message} (the hub said: {_reason(error)})") from None
    except ValueError as error:
        raise _user_error(repo, f"the hub refused the upload; correct what it names ({_reason(error)})") from None
    except broken as error:
        message = "the hub cannot be reached or the connection broke; nothing was published, push again"
        raise _user_error(repo, f"{message} ({_reason(error)})") from None


STATUS = {
    401: "the token is not valid; run `hf auth login`, or set HF_TOKEN to a new one",
    403: "the token may not write there; make one with write permission, or name a repository of your own",
    404: "is not there or not yours to see; correct OWNER, or take a token of that owner",
    409: "something else is being written there; wait a moment and push again",
    412: "somebody else committed meanwhile; look at it and push again",
    429: "the hub asks to wait; push again in some minutes",
}


def _status_message(status: int | None) -> str:
    if status is not None and status >= 500:
        return "the hub has a problem of its own; push again later"
    return STATUS.get(status or 0, "the hub refused the upload; correct what it names")


def _reason(error: BaseException) -> str:
    """The first line that says something, without the token."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return next((line.strip() for line in str(text).splitlines() if line.strip()), type(error).__name__)


def _user_error(repo: str, message: str) -> UserError:
    from huggingface_hub import get_token

    token = get_token()
    return UserError(Problem(repo, TOKEN.sub("hf_***", message.replace(token, "***") if token else message)))
