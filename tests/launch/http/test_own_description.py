"""The API is what its own description says, whatever is sent: schemathesis asks each of its operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving import SMALL, Api, listening, serving

if TYPE_CHECKING:  # schemathesis takes a second, and most processes that collect this do not run it
    from schemathesis import Case, GenerationMode

MODES = ["positive", "negative"]
ENDLESS = ("/v1/events", "/v1/videos/{video_id}/events")  # streams, which have tests of their own
EACH = 12  # requests of each kind and operation


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("described") / "queue") as opened:
        yield opened


@pytest.fixture(scope="module")
def url(api: Api) -> Iterator[str]:
    with listening(api) as address:
        yield address


@pytest.fixture(scope="module")
def known(api: Api) -> dict[str, list[str]]:
    """Ids that are there: a video that is made, one that failed, one that waits, and a film of them."""
    videos = [api.create()["id"] for _ in range(3)]
    api.finish()
    shots = [{"video_id": id} for id in videos]
    film = api.client.post("/v1/films", json={"title": "x", "shots": shots}).json()["id"]
    return {"video_id": videos, "film_id": [film], "model": ["wan-tiny"]}


@pytest.mark.parametrize("kind", MODES)
def test_no_request_is_answered_with_an_error_of_the_server(
    url: str, known: dict[str, list[str]], kind: str
) -> None:
    import schemathesis
    from schemathesis import GenerationMode

    assert {*MODES} == {mode.value for mode in GenerationMode}
    mode = GenerationMode(kind)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [one for one in operations if one.path not in ENDLESS]
    assert len(asked) == len(operations) - len(ENDLESS) > 20
    for operation in asked:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.headers):
            continue  # nothing of it can be wrong
        _ask(operation, mode, known)


def _ask(operation: Any, mode: GenerationMode, known: dict[str, list[str]]) -> None:
    """Ask one operation, as often of things that are there as of others."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    described = [status_code_conformance, content_type_conformance, response_schema_conformance]

    @settings(
        max_examples=EACH,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        case: Case = data.draw(operation.as_strategy(generation_mode=mode))
        for name, ids in known.items():
            if name in case.path_parameters and data.draw(st.booleans()):
                case.path_parameters[name] = data.draw(st.sampled_from(ids))
        case.call_and_validate(checks=[not_a_server_error, *described], timeout=60)

    ask()


def test_what_a_form_or_a_json_body_may_be_is_described(api: Api) -> None:
    told = api.client.get("/openapi.json").json()
    taken = told["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert {*taken} == {"application/json", "multipart/form-data"}
    assert told["components"]["schemas"]["VideoCreate"]["required"] == ["prompt"]
    assert {*SMALL} <= {*told["components"]["schemas"]["VideoCreate"]["properties"]}
