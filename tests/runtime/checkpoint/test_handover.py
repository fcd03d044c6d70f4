"""Checkpoints on machines that share no disk: each has the files of its ranks, and hands them on."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint import handover
from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.handover import Delivery
from runtime.checkpoint.manifests import complete_steps, kept_steps, manifest_name
from runtime.checkpoint.reader import Restored, restore
from runtime.checkpoint.writer import CheckpointWriter, Group, Snapshot, file_digest
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import do_job
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology
from runtime.sampling.denoise import OnStep, StepRecord
from spectrum import StepKind
from tests.jobs import TINY, make_job
from tests.ranks import run_ranks, watch_ranks

HOSTS = ("one", "one", "two")
TOPOLOGY = Topology(ring=3)
STEPS = (0, 2, 4)


def value(step: int, rank: int) -> torch.Tensor:
    """What a rank remembers of a step, of another length than the others'."""
    return torch.full((1, 200 + rank, 3), 10.0 * step + rank)


def write(folder: Path, rank: int, group: Group, steps: tuple[int, ...] = STEPS) -> None:
    writer = CheckpointWriter(folder, "{}", TOPOLOGY, rank, 1, group)
    for number, step in enumerate(steps):
        shared = {"latents": torch.full((2, 2), float(step))} if rank == 0 else {}
        history = {"cond": {at: value(at, rank) for at in steps[: number + 1]}}
        writer.finish(Snapshot(step, shared, {"rank": rank}, history))


def told(restored: Restored | None) -> Any:
    """What of a checkpoint can be compared: step, latents, who wrote, and what is remembered."""
    if restored is None:
        return None
    history = {at: one.flatten().tolist() for at, one in restored.history["cond"].items()}
    return restored.step, restored.shared["latents"].tolist(), restored.own, history


def as_written(step: int, ranks: tuple[int, ...]) -> Any:
    """What `told` says of the checkpoint of a step, for those who wrote the history."""
    steps = [at for at in STEPS if at <= step]
    history = {at: torch.cat([value(at, rank) for rank in ranks], 1).flatten().tolist() for at in steps}
    return step, [[float(step)] * 2] * 2, [{"rank": rank} for rank in ranks], history


Harm = Callable[[Path, int], None]


def untouched(root: Path, rank: int) -> None: ...


def swapped(root: Path, rank: int) -> None:
    """As if the ranks had been placed the other way round."""
    if rank == 0:
        (root / "one").rename(root / "before")
        (root / "two").rename(root / "one")
        (root / "before").rename(root / "two")


def without_a_part(root: Path, rank: int) -> None:
    if rank == 0:
        (root / "two" / "part-00004-2.pt").unlink()


def half_written(root: Path, rank: int) -> None:
    """On the only machine that has it, while another needs it."""
    swapped(root, rank)
    if rank == 0:
        path = root / "one" / "part-00004-2.pt"
        path.write_bytes(path.read_bytes()[:100])


def unwritable(root: Path, rank: int) -> None:
    """Where a machine would put what it lacks."""
    swapped(root, rank)
    if rank == 0:
        (root / "two" / "fetched-2").touch()


def of_other_types(root: Path, rank: int) -> None:
    """A manifest that is JSON, but not one of Lockstep's."""
    if rank == 2:
        path = root / "two" / manifest_name(4, 2)
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | {"parts": [*known["parts"]]}))


def of_another_group(root: Path, rank: int) -> None:
    """A third rank of another attempt has also written the last step."""
    if rank == 2:
        path = root / "two" / manifest_name(4, 2)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"group": "other"}))


def lost(root: Path, rank: int) -> None:
    if rank == 0:
        shutil.rmtree(root / "two")


def scenario(ranks: Ranks, root: Path, harm: Harm, topology: Topology, restart: bool) -> Any:
    """Write on each rank's own disk, harm what is there, and restore."""
    handover._CHUNK = 1000  # a part takes several rounds
    machine = socket.gethostname()
    assert [host.partition(":")[0] for host in ranks.hosts] == [*HOSTS]
    write(root / machine, ranks.rank, Group("mark", HOSTS))
    ranks.control.all_gather_object("written")
    harm(root, ranks.rank)
    ranks.control.all_gather_object("harmed")
    try:
        found = told(restore(root / machine, topology, ranks, ("cond",), restart=restart))
    except BadRequestError as error:
        found = str(error)
    ranks.control.all_gather_object("read")
    return found, sorted(path.name for path in root.glob("*/fetched-*"))


CASES: dict[str, tuple[Harm, Topology, bool, int | None]] = {
    "own disks": (untouched, TOPOLOGY, False, 4),
    "swapped": (swapped, TOPOLOGY, False, 4),
    "another arrangement": (untouched, Topology(cfg=3), False, 4),
    "a part that is gone": (without_a_part, TOPOLOGY, False, 2),
    "half-written": (half_written, TOPOLOGY, False, 2),
    "unwritable": (unwritable, TOPOLOGY, False, None),
    "of other types": (of_other_types, TOPOLOGY, False, 2),
    "of another group": (of_another_group, TOPOLOGY, False, 2),
    "lost": (lost, TOPOLOGY, False, None),
    "lost, and started again": (lost, TOPOLOGY, True, None),
}


def every_case(ranks: Ranks, root: Path) -> dict[str, Any]:
    return {name: scenario(ranks, root / name, *case[:3]) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank restores in each case."""
    return run_ranks(3, every_case, tmp_path_factory.mktemp("disks"), hosts=HOSTS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_every_rank_gets_what_was_written(cases: list[dict[str, Any]], name: str) -> None:
    _, topology, _, step = CASES[name]
    assert step is not None
    for rank, found in enumerate(cases):
        restored, left = found[name]
        assert restored == as_written(step, (rank,) if topology == TOPOLOGY else (0, 1, 2))
        assert left == []  # of what was fetched


def test_a_part_that_no_machine_has_is_an_error_of_all_ranks(cases: list[dict[str, Any]]) -> None:
    """It names the machine and the file. A job that is retried by itself starts again instead."""
    for found in cases:
        assert found["lost"][0].startswith(
            "resume: 'manifest-00000-2.json' and its parts were written on two, which does not have it any "
            "more (this job has one, two)"
        )
    assert [found["lost, and started again"][0] for found in cases] == [None] * 3


def test_a_machine_that_cannot_write_what_it_is_sent_loses_nothing(cases: list[dict[str, Any]]) -> None:
    """The job is refused, instead of beginning again and removing what is there."""
    for found in cases:
        assert found["unwritable"][0].startswith("resume: cannot fetch checkpoints from other machines: ")
        assert found["unwritable"][0].endswith("-2.pt': File exists (on two)")


def test_a_machine_that_is_not_in_the_job_is_named() -> None:
    """Even if nobody knows whether it wrote its part."""
    known = handover.Known(4, "mark", TOPOLOGY, HOSTS, -1, {0: [0], 1: [0]})
    assert "written on two, which is not a machine of this job" in known.why_missing(["one", "three"])
    assert known.why_missing(["one", "two"]) == ""  # it may have been killed before
    certain = handover.Known(4, "mark", TOPOLOGY, HOSTS, 4, {0: [0], 1: [0]})
    assert "'manifest-00004-2.json' and its parts were written on two" in certain.why_missing(["one", "two"])
    alone = handover.Known(4, "mark", TOPOLOGY, ("one",) * 3, 4, {0: [0], 1: [0]})
    assert alone.why_missing(["one"]) == ""  # nothing was on another machine


def test_a_machine_keeps_two_checkpoints_that_are_certain(tmp_path: Path) -> None:
    """It does not see the files of others. When it writes one, they may not have written the last two."""
    write(tmp_path, 2, Group("mark", HOSTS), (0, 2, 4, 6, 8, 10))
    assert complete_steps(tmp_path) == [] and kept_steps(tmp_path) == [10, 8, 6, 4]
    assert json.loads((tmp_path / manifest_name(10, 2)).read_text())["whole"] == 6
    assert {path.name for path in tmp_path.glob("part-*")} >= {"part-00000-2.pt"}  # remembered, still needed


def test_what_other_machines_have_counts_as_kept(tmp_path: Path) -> None:
    """But a rank of this machine that has written nothing was killed."""
    kept = Checkpoints(tmp_path, every=1)
    write(kept.of("{}"), 2, Group("mark", HOSTS))
    assert kept.newest == 4
    write(other := Checkpoints(tmp_path / "other", every=1).of("{}"), 1, Group("mark", HOSTS))
    assert kept_steps(other) == []


def test_more_parts_arrive_than_a_process_may_open_files(tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    content = torch.arange(5, dtype=torch.uint8)
    digest = hashlib.sha256(content.numpy().tobytes()).hexdigest()
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, usual[1]))
    try:
        files = [handover._Arriving(tmp_path / "fetched-0" / str(number)) for number in range(40)]
        for piece in (content[:2], content[2:]):
            for file in files:
                file.add(piece)
        assert {file.problem for file in files} == {""}
        assert all(file_digest(path) == digest for path in (tmp_path / "fetched-0").iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def test_pieces_cover_every_byte_once_and_pairs_take_turns() -> None:
    big, small = Delivery("a", 2 * handover._CHUNK + 5, 0, 1), Delivery("b", 7, 0, 1)
    back, empty = Delivery("c", 3, 1, 0), Delivery("d", 0, 1, 0)
    rounds = list(handover._rounds([big, small, back, empty]))
    assert all(len({piece.delivery[2:] for piece in one}) == len(one) for one in rounds)
    sent: dict[Delivery, int] = {}
    for piece in (piece for one in rounds for piece in one):
        assert piece.start == sent.get(piece.delivery, 0)
        sent[piece.delivery] = piece.start + piece.length
    assert sent == {big: big.size, small: 7, back: 3}


def do_on_disks(ranks: Ranks, root: Path, disks: dict[str, str], in_the_way: bool) -> None:
    """Do a job whose checkpoints are on each machine's disk; a folder may take the video's name meanwhile."""
    machine = ranks.hosts[ranks.rank].partition(":")[0]
    out = root / disks["one"] / "a.mp4"
    job = make_job(out, ranks=ranks.size, **TINY)
    assert job.checkpoints is not None
    kept = replace(job.checkpoints, root=root / disks[machine] / "a.checkpoints")

    @contextmanager
    def progress(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        def on_step(record: StepRecord) -> None:
            if in_the_way and ranks.is_leader and record.index == len(kinds) - 1:
                out.mkdir()

        yield on_step

    do_job(Engine(job.config, ranks, job.degrees), replace(job, checkpoints=kept), progress)


def test_checkpoints_stay_on_all_machines_until_the_video_is_written(tmp_path: Path) -> None:
    """The last thing that may fail is giving it its name."""
    disks = {"one": "one", "two": "two"}
    outcomes = watch_ranks(2, do_on_disks, tmp_path, disks, True, hosts=("one", "two"), timeout=30.0)
    assert outcomes[0].error is not None and "a.mp4" in outcomes[0].error[3], outcomes
    manifests = {path.name for path in tmp_path.glob("*/a.checkpoints/*/manifest-00003-*.json")}
    assert manifests == {manifest_name(3, 0), manifest_name(3, 1)}


def test_machines_may_share_a_disk_that_the_first_one_does_not(tmp_path: Path) -> None:
    """One of them holds the checkpoints there, and removes them at the end."""
    disks = {"one": "one", "two": "others", "three": "others"}
    run_ranks(3, do_on_disks, tmp_path, disks, False, hosts=tuple(disks))
    assert (tmp_path / "one" / "a.mp4").is_file()
    assert [*tmp_path.glob("*/a.checkpoints")] == []
