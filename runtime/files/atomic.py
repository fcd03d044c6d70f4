"""Files: how they appear whole or not at all, which of a user's paths are refused, and where a job's go."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import BadRequestError, JobFailedError
from runtime.files.locks import is_at

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = 4096  # bytes written to see whether there is room; quotas count, too
_LONGEST = 100  # bytes of a name that its temporary name repeats; the file system's limit is 255
_PACKED = "runtime_resources"  # where Ray unpacks a job's working directory, and deletes it afterwards


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary name beside `path`; when the block ends well, it is flushed to disk and renamed to `path`.

    When the block raises, whatever was written is removed and `path` stays as it was; if the process is
    killed, the next one that writes `path` removes it. The temporary name keeps the suffix of `path`, which
    ffmpeg goes by.

    Args:
        overwrite: whether a file that is at `path` by then may be replaced.

    Raises:
        JobFailedError: the disk is full, or see `_keep_both`.
    """
    with whole_files([path], overwrite=overwrite) as temporaries:
        yield temporaries[0]


@contextmanager
def whole_files(paths: Sequence[Path], *, overwrite: bool) -> Iterator[list[Path]]:
    """As `whole_file` for several that belong together: they appear one right after the other, in order."""
    temporaries: list[Path] = []
    with ExitStack() as held:
        try:
            temporaries.extend(held.enter_context(_temporary(path)) for path in paths)
            yield temporaries
            for temporary in temporaries:
                flush(temporary)
            if not overwrite and any(os.path.lexists(path) for path in paths):
                _keep_both(temporaries, paths)
            for number, (temporary, path) in enumerate(zip(temporaries, paths, strict=True)):
                if overwrite:
                    temporary.replace(path)
                elif not _put(temporary, path):
                    _keep_both([*paths[:number], *temporaries[number:]], paths)
            for folder in {path.parent for path in paths}:
                flush(folder)
        except OSError as error:
            if error.errno in _NO_ROOM:
                names = ", ".join(repr(str(path)) for path in paths)
                raise JobFailedError(f"cannot write {names}: {os.strerror(error.errno)}") from error
            raise


class PlainFile(io.FileIO):
    """A file that is written as it comes, so that what is wrong is said at once, and remembered.

    Attributes:
        error: what was wrong, for writers that say something else of it.
    """

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        left = memoryview(content).cast("B")
        size = left.nbytes
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
            raise
        return size


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, with the rights that any new file has; removed if it is still there.

    It is locked meanwhile, so that whoever finds it knows whether it is still being written, in whatever
    container and on whatever machine; its name says so to people only.
    """
    _remove_orphans(path)
    who = f"{socket.gethostname()}.{os.getpid()}"
    descriptor = None
    while descriptor is None:
        name = f".{shortened(path.stem)}.{who}.{secrets.token_hex(4)}.part{path.suffix}"
        descriptor = _claimed(temporary := path.with_name(name))
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _claimed(temporary: Path) -> int | None:
    """Make a file and lock it; its descriptor, or None if somebody was there before."""
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except FileExistsError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lost = not os.path.lexists(temporary)
    except BlockingIOError:
        lost = True
    except OSError:  # a file system without locks: nobody there takes it for an orphan
        lost = False
    if lost:  # somebody took it for one before it was locked, and removes it
        os.close(descriptor)
        return None
    return descriptor


def shortened(name: str) -> str:
    """`name`, or if it is long its beginning and a digest: something can be added to it."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) <= _LONGEST:
        return name
    beginning = encoded[: _LONGEST - 20].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def _put(temporary: Path, path: Path) -> bool:
    """Give a file its name, unless another has it; whether it was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return False
        temporary.rename(path)
    return True


def _keep_both(temporaries: Sequence[Path], paths: Sequence[Path]) -> None:
    """Put files under names that are free.

    Raises:
        JobFailedError: always, with the names.
    """
    number = 2
    while any(os.path.lexists(_numbered(path, number)) for path in paths):
        number += 1
    for temporary, path in zip(temporaries, paths, strict=True):
        temporary.rename(_numbered(path, number))
    taken = next((path for path in paths if os.path.lexists(path)), paths[0])
    kept = ", ".join(repr(str(_numbered(path, number))) for path in paths)
    raise JobFailedError(
        f"{str(taken)!r} was made by somebody else meanwhile, and stays; what this job made is {kept}"
    )


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{shortened(path.stem)}.{number}")


def _remove_orphans(path: Path) -> None:
    """Remove temporary files of `path` that nobody is writing any more."""
    stem, suffix = re.escape(f".{shortened(path.stem)}."), re.escape(f".part{path.suffix}")
    own = re.compile(rf"{stem}[^/]+\.\d+\.[0-9a-f]{{8}}{suffix}")
    with suppress(OSError):  # the folder cannot be read: who writes in it will hear of it
        for orphan in [found for found in path.parent.iterdir() if own.fullmatch(found.name)]:
            with suppress(OSError):  # another user's, locked, or on a file system without locks
                _remove_unlocked(orphan)


def _remove_unlocked(orphan: Path) -> None:
    descriptor = os.open(orphan, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, orphan) and stat.S_ISREG(os.fstat(descriptor).st_mode):
            orphan.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def refusing(field: str, path: Path | str) -> Iterator[None]:
    """Turn what the file system says against a path that a user gave into a refusal of `field`.

    Raises:
        BadRequestError: the block raised an `OSError`.
    """
    if "\0" in str(path):
        raise BadRequestError(f"{field}: {str(path)!r} given; a name cannot hold a null byte")
    try:
        yield
    except OSError as error:
        raise BadRequestError(f"{field}: {str(path)!r} given; {reason(error)}") from None


def reason(error: OSError) -> str:
    """What the system says of an error, in words."""
    return error.strerror or str(error) or type(error).__name__


def check_writable(path: Path, *, overwrite: bool, field: str = "out") -> None:
    """Refuse an output that cannot be written, before any work is done for it. Makes missing folders.

    Raises:
        BadRequestError: there is something that is no file; or a file, and `overwrite` is false; or the
            folder cannot be written to, is full, or is deleted with a Ray job.
    """
    check_outlives(path, field=field)
    with refusing(field, path):
        kind = _kind(path)
    if path.name in ("", "..") or (kind is not None and stat.S_ISDIR(kind)):
        raise BadRequestError(f"{field}: {str(path)!r} given; it is a folder, a file name is needed")
    if kind is not None and not overwrite:
        raise BadRequestError(f"{field}: {str(path)!r} exists; give another name or --overwrite")
    if kind is not None and stat.S_ISLNK(kind):
        raise BadRequestError(
            f"{field}: {str(path)!r} given; it is a link, give the name of the file itself: "
            f"{os.path.realpath(path)!r}"  # which takes links in a circle, too
        )
    if kind is not None and not stat.S_ISREG(kind):
        raise BadRequestError(f"{field}: {str(path)!r} given; it is no regular file and is not replaced")
    check_folder(path.parent, field=field)
    with refusing(field, path):
        _kind(path)  # its name may be too long for a folder that is there only now


def _kind(path: Path) -> int | None:
    """The mode of what is at `path` itself; None if nothing is."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_folder(folder: Path, *, field: str) -> None:
    """Refuse a folder that files cannot be written in. Makes it if it is missing.

    Raises:
        BadRequestError: it cannot be made or written to, or there is no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadRequestError(f"{field}: cannot write in {str(folder)!r}: {reason(error)}") from None


def check_outlives(path: Path, *, field: str) -> None:
    """Refuse a place that is deleted with the working directory of a Ray job.

    Raises:
        BadRequestError: `path` is in it.
    """
    if _PACKED in Path(os.path.normpath(path.absolute())).parts:
        raise BadRequestError(
            f"{field}: {str(path)!r} given; the job's working directory is deleted with it, "
            "give an absolute path on a disk that the nodes share"
        )


def check_apart(outputs: Mapping[Path, str], inputs: Mapping[Path, str]) -> None:
    """Refuse outputs that would replace an input, whatever they are called and even if they may overwrite.

    Args:
        outputs, inputs: path → the field that it is of. An input may be a folder.

    Raises:
        BadRequestError: an output is an input, or a file in one.
    """
    for output, field in outputs.items():
        for given, other in inputs.items():
            if _is_in(output, given):
                raise BadRequestError(
                    f"{field}: {str(output)!r} given; it is {other}'s {str(given)!r}, which would be "
                    "replaced: give another name"
                )


def _is_in(output: Path, given: Path) -> bool:
    """Whether a file that is there is `given`, or lies in it."""
    try:
        if not output.exists() or not given.exists():
            return False
        if given.is_dir():
            return output.resolve().is_relative_to(given.resolve())
        return output.samefile(given)
    except OSError:  # what cannot be seen is refused where it is opened
        return False


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the files of one job go.

    Attributes:
        video: the mp4; with several videos their numbers are put before the suffix.
        report: the JSON; the picture lies beside it.
        overwrite: whether files that exist may be replaced.
    """

    video: Path
    report: Path
    overwrite: bool = False

    @classmethod
    def named(cls, video: Path, report: Path | None, *, overwrite: bool) -> Outputs:
        """The files of a job whose report lies beside its video if it is not named.

        Raises:
            BadRequestError: a name has the wrong suffix.
        """
        _check_suffix(video, ".mp4", field="out")
        if report is not None:
            _check_suffix(report, ".json", field="report")
        return cls(video, report or video.with_suffix(".json"), overwrite)

    @property
    def picture(self) -> Path:
        return self.report.with_suffix(".png")

    def videos(self, count: int) -> list[Path]:
        if count == 1:
            return [self.video]
        return [self.video.with_stem(f"{self.video.stem}-{number}") for number in range(1, count + 1)]

    def all(self, count: int) -> dict[Path, str]:
        """Every file that is written for `count` videos, and the option that names it.

        They appear in this order: where the report is, the videos that it names are this job's.
        """
        named = "out" if self.report == self.video.with_suffix(".json") else "report"
        return {self.report: named, self.picture: named, **dict.fromkeys(self.videos(count), "out")}

    def check(self, count: int) -> None:
        """Refuse names that cannot be written.

        Raises:
            BadRequestError: a name has the wrong suffix, or see `check_writable`.
        """
        _check_suffix(self.video, ".mp4", field="out")
        _check_suffix(self.report, ".json", field="report")
        fields = self.all(count)
        for path in (*self.videos(count), self.report, self.picture):
            check_writable(path, overwrite=self.overwrite, field=fields[path])


def _check_suffix(path: Path, suffix: str, *, field: str) -> None:
    if path.suffix != suffix:
        raise BadRequestError(f"{field}: {str(path)!r} given; the name must end in {suffix}")


def flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
