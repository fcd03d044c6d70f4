"""Keys: who may use a server and how much; hashed at rest, and in no log."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch.http.auth import Keys
from launch.http.keys import Key, add_key, digest_of, new_token, read_keys, remove_key
from runtime.errors import BadRequestError
from runtime.files import locks
from tests.forked import completed
from tests.serving import SMALL, Api, error_of, serving


def add(path: Path, owner: str, **allowed: Any) -> str:
    token = new_token()
    add_key(path, Key(name=f"{owner}'s", sha256=digest_of(token), owner=owner, **allowed))
    return token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def tokens(file: Path) -> dict[str, str]:
    return {
        "ann": add(file, "ann", priority=5, queued=2),
        "bob": add(file, "bob", per_hour=1),
    }


@pytest.fixture
def api(tmp_path: Path, file: Path, tokens: dict[str, str]) -> Iterator[Api]:
    with serving(tmp_path / "queue", file) as opened:
        yield opened


def ask(api: Api, token: str | None, method: str = "GET", path: str = "/v1/videos", **options: Any) -> Any:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return api.client.request(method, path, headers=headers, **options)


def create(api: Api, token: str, **fields: Any) -> Any:
    return ask(api, token, "POST", json={**SMALL, **fields})


def test_keys_are_hashed_and_for_their_owner_alone(file: Path, tokens: dict[str, str]) -> None:
    text = file.read_text()
    assert all(token not in text and digest_of(token) in text for token in tokens.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tokens["ann"] not in repr(read_keys(file)) and digest_of(tokens["ann"]) not in repr(
        read_keys(file)
    )


@pytest.mark.parametrize("token", [None, "", "x", "lockstep-", "\x00", "é"])
def test_every_route_needs_a_known_key(api: Api, token: str | None) -> None:
    for method, path in (
        ("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/videos/video_0"),
        ("GET", "/v1/videos/video_0/content"), ("DELETE", "/v1/videos/video_0"),
        ("POST", "/v1/videos/video_0/cancel"), ("POST", "/v1/videos/video_0/remix"),
    ):  # fmt: skip
        headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
        answer = api.client.request(method, path, headers=headers)
        assert error_of(answer)[:2] == (401, "invalid_api_key") and answer.headers["WWW-Authenticate"]


def test_no_key_is_in_a_log(api: Api, tokens: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    create(api, tokens["ann"])
    ask(api, tokens["ann"] + "x")
    assert tokens["ann"] not in caplog.text


def test_an_owner_sees_their_own_videos(api: Api, tokens: dict[str, str]) -> None:
    id = create(api, tokens["ann"]).json()["id"]
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/content")):
        answer = ask(api, tokens["bob"], method, f"/v1/videos/{id}{path}")
        assert error_of(answer)[:2] == (404, "video_not_found")
    assert ask(api, tokens["bob"]).json()["data"] == []
    assert error_of(ask(api, tokens["bob"], path=f"/v1/videos?after={id}"))[1] == "invalid_value"
    assert [one["id"] for one in ask(api, tokens["ann"]).json()["data"]] == [id]
    [entry] = api.queue.entries()
    assert entry.owner == "ann"


def test_quotas_and_priorities_are_the_keys(api: Api, tokens: dict[str, str]) -> None:
    ann, bob = tokens["ann"], tokens["bob"]
    assert error_of(create(api, ann, priority=6)) == (403, "priority_not_allowed", "priority")
    assert create(api, ann, priority=5).json()["request"]["priority"] == 5
    create(api, ann)
    answer = create(api, ann)
    assert error_of(answer)[:2] == (429, "quota_queued") and answer.headers["Retry-After"]
    api.finish()
    assert create(api, ann).status_code == 200
    id = create(api, bob).json()["id"]
    ask(api, bob, "DELETE", f"/v1/videos/{id}")  # does not give the quota back
    answer = create(api, bob)
    assert (
        error_of(answer)[:2] == (429, "quota_per_hour") and 3590 <= int(answer.headers["Retry-After"]) <= 3600
    )


def test_resumed_videos_count_as_requests(api: Api, tokens: dict[str, str]) -> None:
    bob = tokens["bob"]
    id = create(api, bob).json()["id"]
    ask(api, bob, "POST", f"/v1/videos/{id}/cancel")
    assert error_of(ask(api, bob, "POST", f"/v1/videos/{id}/resume"))[:2] == (429, "quota_per_hour")


def test_what_no_quota_can_hold_is_refused_for_good(api: Api, tokens: dict[str, str]) -> None:
    for owner, code in (("ann", "quota_queued"), ("bob", "quota_per_hour")):
        shots = [SMALL] * 3
        answer = ask(api, tokens[owner], "POST", "/v1/films", json={"title": "x", "shots": shots})
        assert error_of(answer)[:2] == (429, code)
        assert answer.headers["x-should-retry"] == "false" and "Retry-After" not in answer.headers


def test_a_lower_key_of_the_same_owner_makes_no_high_priorities(
    api: Api, file: Path, tokens: dict[str, str]
) -> None:
    lower = new_token()
    add_key(file, Key(name="lower", sha256=digest_of(lower), owner="ann", priority=1))
    id = create(api, tokens["ann"], priority=5).json()["id"]
    remixed = ask(api, lower, "POST", f"/v1/videos/{id}/remix", json={"prompt": "x"})
    assert remixed.json()["request"]["priority"] == 1
    ask(api, lower, "POST", f"/v1/videos/{id}/cancel")
    assert ask(api, lower, "POST", f"/v1/videos/{id}/resume").status_code == 200
    assert [entry.priority for entry in api.queue.entries()] == [5, 1, 1]


def test_a_removed_key_is_refused_and_a_new_one_known_at_once(
    api: Api, file: Path, tokens: dict[str, str]
) -> None:
    remove_key(file, "ann's")
    assert error_of(ask(api, tokens["ann"]))[0] == 401
    new = add(file, "eve")
    assert ask(api, new).status_code == 200
    file.write_text("keys: 7")  # while it is being edited, say
    assert ask(api, new).status_code == 200


def test_files_that_are_not_of_keys_are_refused(file: Path) -> None:
    with pytest.raises(BadRequestError, match=r"keys: .*cannot be read"):
        Keys(file)
    file.write_text("keys: []")
    with pytest.raises(BadRequestError, match="has no key"):
        Keys(file)
    with pytest.raises(BadRequestError, match="name: 'x' given; the keys are none"):
        remove_key(file, "x")
    add(file, "ann")
    with pytest.raises(BadRequestError, match="has a key of this name"):
        add(file, "ann")


def test_a_mistake_in_the_file_shows_no_secret(file: Path) -> None:
    token, secret = new_token(), f"whsec_{'A' * 25}"  # which is no base64
    wrong = {"sha256": token, "webhook": f"{{url: 'http://a.example', secret: {secret}}}"}
    for field, value in wrong.items():
        fields = {"name": "x", "owner": "x", "sha256": f"'{'0' * 64}'", field: value}
        file.write_text("keys:\n- " + "\n  ".join(f"{name}: {text}" for name, text in fields.items()) + "\n")
        with pytest.raises(BadRequestError, match=r"(sha256|secret): must be") as refused:
            Keys(file)
        assert token not in str(refused.value) and secret not in str(refused.value)


WRITTEN = """\
# Keys of the render farm. Ask Dana before changing them.
keys:
{indent}# the studio
{indent}- name: studio  # made in May
{indent}  sha256: "{digest}"
{indent}  owner: studio
{indent}  webhook: {{url: "https://example.org/hook", secret: whsec_{secret}}}  # their relay

{indent}# the night shift
{indent}- sha256: '{other}'
{indent}  owner: nights
{indent}  name: nights  # has a lower priority
{indent}  priority: -5   # see above
# The end.
"""


@pytest.mark.parametrize("indent", ["", "    "])
def test_what_people_wrote_beside_the_keys_is_kept(file: Path, indent: str) -> None:
    names = {"digest": digest_of("a"), "other": digest_of("b"), "secret": "x" * 24}
    text = WRITTEN.format(indent=indent, **names)
    file.write_text(text)
    add(file, "ann", priority=2)
    assert [key.name for key in read_keys(file).keys] == ["studio", "nights", "ann's"]
    assert {*text.splitlines()} <= {*file.read_text().splitlines()}
    remove_key(file, "ann's")
    assert file.read_text() == text
    remove_key(file, "studio")
    assert [(key.name, key.priority) for key in read_keys(file).keys] == [("nights", -5)]
    assert digest_of("a") not in file.read_text()
    remove_key(file, "nights")
    said = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    assert said == [
        "# Keys of the render farm. Ask Dana before changing them.", "keys:", "# the studio",
        "# the night shift", "[]", "# The end.",
    ]  # fmt: skip
    add(file, "bob")
    assert [key.name for key in read_keys(file).keys] == ["bob's"]
    assert file.read_text().startswith("# Keys of the render farm.") and "# The end." in file.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "keys: []",
        "keys: []  # none yet\n",
        "{keys: []}",
        "keys: [{name: x, owner: x, sha256: %s}]",
        "keys:\n-\n  name: x\n  owner: x\n  sha256: %s",
        "keys:\r\n- name: x\r\n  owner: x\r\n  sha256: %s\r\n",
        "keys:\n- name: x\n  sha256: %s\n  owner: >-\n    x\n",
        "keys:\n- &a {name: x, owner: x, sha256: %s}\n",
        "'keys':\n- {name: x, owner: x, sha256: %s}",
        "---\nkeys:\n- {name: x, owner: x, sha256: %s}\n...\n",
        "{}",
    ],
)
def test_keys_are_added_and_removed_in_whatever_form_the_file_has(file: Path, text: str) -> None:
    file.write_text(text.replace("%s", digest_of("x")), newline="")
    before = read_keys(file).keys
    for owner in ("ann", "bob"):
        add(file, owner)
    remove_key(file, "ann's")
    assert [key.name for key in read_keys(file).keys] == [*(key.name for key in before), "bob's"]
    assert read_keys(file).keys[:-1] == before
    for key in read_keys(file).keys:
        remove_key(file, key.name)
    assert not read_keys(file).keys


def test_keys_that_are_made_at_the_same_time_are_all_kept(file: Path) -> None:
    names = [f"owner-{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        tokens = list(pool.map(lambda name: add(file, name), names))
    assert {key.owner for key in read_keys(file).keys} == {*names}
    assert all(read_keys(file).find(token) for token in tokens)
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_a_file_that_is_held_for_too_long_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    with (
        locks.alone_in(file.parent, field="keys"),
        pytest.raises(BadRequestError, match=r"keys: another process changes files in .*; try again"),
    ):
        add(file, "ann")
    add(file, "ann")


def test_whoever_could_read_the_keys_still_can(file: Path) -> None:
    add(file, "ann")
    file.chmod(0o640)
    add(file, "bob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    if os.getuid() == 0:
        os.chown(file, 65534, 65534)
        remove_key(file, "bob's")
        assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65534)


def test_a_link_to_the_keys_is_refused(file: Path, tokens: dict[str, str]) -> None:
    link = file.with_name("link.yaml")
    link.symlink_to(file)
    for change in (lambda: add(link, "eve"), lambda: remove_key(link, "ann's")):
        with pytest.raises(BadRequestError, match=r"keys: .* is a symbolic link; .*keys\.yaml"):
            change()
    assert link.is_symlink() and len(read_keys(file).keys) == len(tokens)


def test_the_folder_of_the_keys_is_made(tmp_path: Path) -> None:
    add(tmp_path / "new" / "keys.yaml", "ann")
    with pytest.raises(BadRequestError, match=r"keys: .*cannot be read"):
        remove_key(tmp_path / "none" / "keys.yaml", "ann")
    assert [one.name for one in tmp_path.iterdir()] == ["new"]


def test_a_key_that_cannot_be_printed_is_not_made(file: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = completed(["keys", "add", "ann", "--keys", str(file)], stdout=full)
    assert ended.returncode == 3 and "cannot print the key, so it was not made" in ended.stderr
    assert read_keys(file).keys == ()
