"""What must hold of a queue of `lockstep serve` when a soak is over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from launch.serve.entries import Entry, State
from launch.serve.queue import Queue

OPEN = (State.WAITING, State.RUNNING)
_MADE = {"video.mp4", "video.json", "video.png"}


def broken_promises(folder: Path, accepted: Mapping[str, str]) -> list[str]:
    """Promises that a queue's folder does not keep, one a line.

    Args:
        folder: of the queue, which nobody serves any more.
        accepted: id of each video that clients were told of → how it ended for them: `completed`, `failed`,
            `cancelled` or `deleted`.
    """
    with closing(Queue(folder)) as queue:
        entries = queue.entries()
        found = [*_requests(entries, accepted), *_ends(queue, entries)]
    return [*found, *_files(folder, entries, accepted)]


def _requests(entries: Sequence[Entry], accepted: Mapping[str, str]) -> Iterator[str]:
    """Each accepted video has one request, which has ended as the client was told; there are no others."""
    count = Counter(entry.name.partition(".")[0] for entry in entries)
    for id in count.keys() - accepted.keys():
        yield f"{id}: no client was told of it"
    for id, end in accepted.items():
        if count[id] != 1 and not (end == "deleted" and not count[id]):  # those are forgotten after an hour
            yield f"{id}: it has {count[id]} requests"
    for entry in entries:
        end = accepted.get(entry.name, "deleted")
        if entry.state in OPEN:
            yield f"{entry.name}: it has not ended"
        elif end != "deleted" and entry.state is not State(_state(end)):
            yield f"{entry.name}: it is {entry.state}, and a client saw {end}"


def _state(end: str) -> str:
    return "done" if end == "completed" else end


def _ends(queue: Queue, entries: Sequence[Entry]) -> Iterator[str]:
    """Each request ends once, and tells of it once."""
    said = "SELECT request, COUNT(*) FROM events WHERE kind = 'state' AND json_extract(told, '$.state') "
    told = dict(queue.read(tuple, f"{said} NOT IN ('waiting', 'running') GROUP BY request"))
    for entry in entries:
        ends = [state for state, _, _ in queue.history(entry.id) if state not in OPEN]
        if len(ends) != 1:
            yield f"{entry.name}: it has ended {len(ends)} times"
        if told.get(entry.id, 0) != 1:
            yield f"{entry.name}: {told.get(entry.id, 0)} events tell of its end"


def _files(folder: Path, entries: Sequence[Entry], accepted: Mapping[str, str]) -> Iterator[str]:
    """Completed videos have their files, and nothing else is left of any."""
    results = folder / "results"
    kept = {path.name: path for path in results.iterdir()} if results.is_dir() else {}
    for entry in entries:
        files = {path.name for path in kept[entry.name].iterdir()} if entry.name in kept else set[str]()
        if accepted.get(entry.name) == "completed" and not files >= _MADE:
            yield f"{entry.name}: it lacks {', '.join(sorted(_MADE - files))}"
        if entry.state is State.DONE and files - _MADE:
            yield f"{entry.name}: {', '.join(sorted(files - _MADE))} was left"
    for name in kept.keys() - {id for id, end in accepted.items() if end != "deleted"}:
        yield f"{name}: its folder was left"
    previews = folder / "previews"
    for path in previews.iterdir() if previews.is_dir() else ():
        yield f"{path.name}: a preview was left"


def different_bits(made: Sequence[tuple[str, str, str]]) -> list[str]:
    """Videos that differ from others of the same request.

    Args:
        made: request, id and digest of the frames of each completed video.
    """
    of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for asked, id, digest in made:
        of[asked][digest].append(id)
    return [
        f"{ids[0]}: its frames differ from those of the same request"
        for digests in of.values()
        for ids in sorted(digests.values(), key=len)[:-1]
    ]
