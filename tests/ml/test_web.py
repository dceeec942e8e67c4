"""The pages about hornbeam itself, under ASGI and under WSGI."""

from __future__ import annotations

import httpx
import pytest

from hornbeam_ml import asgi_app, cached_inference, wsgi_app
from hornbeam_state import open_store, set_default_store


@pytest.fixture(params=["asgi", "wsgi"])
async def get(request):
    """Ask for a page through either kind of app."""
    if request.param == "asgi":
        transport = httpx.ASGITransport(asgi_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client.request
    else:
        with httpx.Client(
            transport=httpx.WSGITransport(wsgi_app()), base_url="http://test"
        ) as client:

            async def ask(*arguments, **options):
                return client.request(*arguments, **options)

            yield ask


async def test_cache_stats_are_json(get):
    """The figures of cache_stats, of all or of one prefix."""
    cached_inference(abs, -1)
    cached_inference(abs, -1)
    cached_inference(abs, -1, cache_prefix="other")
    answer = await get("GET", "/cache_stats")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert (answer.json()["hits"], answer.json()["misses"]) == (1, 2)
    answer = await get("GET", "/cache_stats?prefix=other")
    assert (answer.json()["hits"], answer.json()["misses"]) == (0, 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/nothing", 404, id="unknown page"),
        pytest.param("POST", "/cache_stats", 405, id="not a GET"),
        pytest.param("GET", "/cache_stats?prefix=%1f", 400, id="a prefix that makes no sense"),
    ],
)
async def test_mistakes_are_told_in_json(get, method, path, status):
    """A clear status and message, never a traceback."""
    answer = await get(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]


async def test_head_has_no_body(get):
    """HEAD answers with the headers of GET."""
    answer = await get("HEAD", "/cache_stats")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_store_that_is_down_is_a_503(get, tmp_path):
    """Retry later, says the answer, and not more."""
    (tmp_path / "file").write_text("")
    previous = set_default_store(open_store(f"lmdb://{tmp_path}/file/store"))
    try:
        answer = await get("GET", "/cache_stats")
    finally:
        set_default_store(previous)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert str(tmp_path) not in answer.text
