"""Replaced shots: files in a film's folder that neither its storyboard nor the film that lies there needs.

A shot whose request, model or version changes gets files of a new name, and the old ones stay until they are
pruned. Only files that Lockstep wrote are removed: a shot's files are recognised by its report, whose recipe
begins with the digest in their name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from launch.film.folder import MANIFEST, OPEN, QUEUE, held, is_shot
from launch.film.shots import Film
from launch.serve.queue import Queue
from launch.shell.terminal import counted
from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError, reason
from runtime.files.atomic import remove_orphans
from runtime.files.checks import refusing
from runtime.files.text import read_json

_SHOT = re.compile(r"(?P<stem>[a-z0-9][a-z0-9_-]*-(?P<digest>[0-9a-f]{12}))\.(?:json|checkpoints)")
_KINDS = (".mp4", ".png", ".json")  # the report goes last: an interrupted pruning is completed by the next


@dataclass(frozen=True, slots=True)
class Replaced:
    """A shot that is not needed any more.

    Attributes:
        video: path of its mp4; the other files have the same stem.
        files: its video, picture and report, as far as they exist.
        checkpoints: its checkpoints, which an unfinished job left; None if there are none.
        bytes: size of all of them when they were found.
    """

    video: Path
    files: tuple[Path, ...]
    checkpoints: Path | None
    bytes: int

    @property
    def paths(self) -> list[Path]:
        """All that is removed of it."""
        return [*self.files, *([] if self.checkpoints is None else [self.checkpoints])]

    def remove(self) -> None:
        """Remove it. Checkpoints that another process holds stay, and so do other files in their folder.

        Raises:
            BadRequestError: a file cannot be removed.
        """
        if self.checkpoints is not None:
            _checkpoints(self.checkpoints).remove()
        for path in self.files:
            remove_orphans(path)
            with refusing("out", path):
                path.unlink(missing_ok=True)


def find_replaced(film: Film) -> list[Replaced]:
    """Find the replaced shots of a film, in the order of their names.

    In use are the shots of the storyboard, those of the film that was joined last (by its manifest), and
    those of requests in the film's queue that have not ended.

    Raises:
        BadRequestError: the manifest or the folder cannot be read.
    """
    shots, used = film.out / "shots", _used(film)
    with refusing("out", shots):
        names = sorted(path.name for path in shots.iterdir()) if shots.is_dir() else []
    found = {match["stem"]: match["digest"] for match in map(_SHOT.fullmatch, names) if match}
    every = (_replaced(shots / f"{stem}.mp4", digest) for stem, digest in found.items() if stem not in used)
    return [one for one in every if one.paths]


def prune(film: Film) -> list[Replaced]:
    """Remove the replaced shots of a film, and return them.

    Raises:
        BadRequestError: another process makes a film in the folder, or see `find_replaced`.
    """
    if not find_replaced(film):  # so that nothing is created in a folder that has none
        return []
    with held(film.out):
        replaced = find_replaced(film)
        for one in replaced:
            one.remove()
    return replaced


def summary(replaced: Sequence[Replaced]) -> str:
    """Write how many shots these are, and how large they are together."""
    if not replaced:
        return "no replaced shots"
    return f"{counted(len(replaced), 'replaced shot')}, {sum(one.bytes for one in replaced) / 1e6:.1f} MB"


def listing(replaced: Sequence[Replaced], out: Path) -> str:
    """Write a line for each path that is removed, relative to the film's folder, and the sum."""
    paths = [str(path.relative_to(out)) for one in replaced for path in one.paths]
    return "\n".join([*paths, summary(replaced)])


def _used(film: Film) -> set[str]:
    """Stems of the shots that are in use."""
    used = {film.video(number).stem for number in range(len(film.shots))} | _joined(film.out / MANIFEST)
    if (film.out / QUEUE / "queue.sqlite").is_file():
        with closing(Queue(film.out / QUEUE)) as queue:
            names = [entry.name for entry in queue.entries(*OPEN) if is_shot(entry)]
        used.update(name.rpartition("@")[0] for name in names)
    return used


def _joined(manifest: Path) -> set[str]:
    """Stems of the shots from which the film that lies there was joined."""
    try:
        return {Path(shot["file"]).stem for shot in read_json(manifest)["shots"]}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequestError(
            f"out: {str(manifest)!r} does not say which shots the film was joined from ({reason(error)}); "
            "make the film again before its replaced shots are pruned"
        ) from None


def _replaced(video: Path, digest: str) -> Replaced:
    """Find what Lockstep left of one shot."""
    files = [video.with_suffix(kind) for kind in _KINDS] if _is_ours(video, digest) else []
    found = tuple(path for path in files if path.is_file())
    folder = video.with_suffix(".checkpoints")
    left = folder.is_dir() and not folder.is_symlink() and _checkpoints(folder).left
    size = sum(_size(path) for path in (*found, *(folder.rglob("*") if left else ())))
    return Replaced(video, found, folder if left else None, size)


def _is_ours(video: Path, digest: str) -> bool:
    """Return whether the report beside a video says that Lockstep made it from what its name tells."""
    try:
        report = read_json(video.with_suffix(".json"))
        written = [Path(name).name for name in report["videos"]]  # the folder may have been moved since
        return str(report["recipe"]).startswith(digest) and written == [video.name]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, every=1)


def _size(path: Path) -> int:
    with suppress(OSError):
        return 0 if path.is_dir() else path.lstat().st_size
    return 0
