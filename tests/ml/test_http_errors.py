"""Errors of hornbeam as responses: FastAPI, Starlette, Flask, bare ASGI and WSGI callables."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from flask import Blueprint, Flask
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from hornbeam_ml import DeadlineExceeded, HornbeamError, Overloaded, install_error_handlers
from hornbeam_ml.errors import ClientDisconnected
from hornbeam_ml.web.problems import problem_of
from hornbeam_ml.web.wsgi_errors import WsgiErrors
from hornbeam_state import StoreFull, StoreUnavailable


class Busy(Overloaded):
    retry_after_s = 7.2


ERRORS = {
    "overloaded": Overloaded("serving 'secret': 32 items wait already"),
    "unavailable": StoreUnavailable("redis://:secret@host does not answer"),
    "late": DeadlineExceeded("secret: too late"),
    "busy": Busy("secret"),
    "full": StoreFull("secret"),
}
EXPECTED = {
    "overloaded": (503, "1"),
    "unavailable": (503, "1"),
    "late": (504, None),
    "busy": (503, "8"),
    "full": (500, None),
}


def raise_it(name):
    raise type(ERRORS[name])(*ERRORS[name].args)


def fastapi_app(**options):
    app = FastAPI(**options)

    @app.get("/async/{name}")
    async def in_task(name):
        raise_it(name)

    @app.get("/{name}")
    def in_thread(name):
        raise_it(name)

    return app


async def endpoint(request):
    raise_it(request.path_params["name"])


def starlette_app(**options):
    return Starlette(routes=[Route("/{name}", endpoint)], **options)


def flask_app():
    app = Flask("app")

    @app.get("/<name>")
    def view(name):
        raise_it(name)

    return app


async def bare_asgi(scope, receive, send):
    raise_it(scope["path"].strip("/"))


def bare_wsgi(environ, start_response):
    raise_it(environ["PATH_INFO"].strip("/"))


def generating_wsgi(environ, start_response):
    start_response("200 OK", [])
    raise_it(environ["PATH_INFO"].strip("/"))
    yield b""


def get(app, path):
    """Send one request to an app in this process."""
    if isinstance(app, Flask | DispatcherMiddleware | WsgiErrors):
        transport = httpx.WSGITransport(app, raise_app_exceptions=False)
        with httpx.Client(transport=transport, base_url="http://app") as client:
            return client.get(path)

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.get(path, headers={"origin": "http://else"})

    return asyncio.run(send())


APPS = [
    pytest.param(fastapi_app, id="fastapi"),
    pytest.param(starlette_app, id="starlette"),
    pytest.param(flask_app, id="flask"),
    pytest.param(lambda: bare_asgi, id="asgi"),
    pytest.param(lambda: bare_wsgi, id="wsgi"),
    pytest.param(lambda: generating_wsgi, id="wsgi-generator"),
]


@pytest.mark.parametrize("make", APPS)
@pytest.mark.parametrize("name", [name for name in ERRORS if name != "full"])
def test_an_error_has_its_status(make, name, caplog):
    app = install_error_handlers(install_error_handlers(make()))
    response = get(app, f"/{name}")
    assert (response.status_code, response.headers.get("retry-after")) == EXPECTED[name]
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    assert "secret" not in response.text
    records = [record for record in caplog.records if record.name.startswith("hornbeam")]
    assert [record.exc_info for record in records] == [None] * (name == "unavailable")


@pytest.mark.parametrize("make", [fastapi_app, starlette_app, flask_app])
def test_other_errors_stay_what_they_were(make):
    assert get(install_error_handlers(make()), "/full").status_code == 500


def test_other_errors_leave_a_bare_callable():
    app = install_error_handlers(bare_wsgi)
    with pytest.raises(StoreFull):
        app({"PATH_INFO": "/full"}, None)


def test_an_async_endpoint_of_fastapi():
    assert get(install_error_handlers(fastapi_app()), "/async/busy").status_code == 503


def test_a_client_that_left_has_a_status_too():
    assert problem_of(ClientDisconnected()).status == 499
    assert problem_of(ClientDisconnected()).reason == "Client Closed Request"
    assert problem_of(ValueError()) is None


# The app's own handlers.


@pytest.mark.parametrize("first", [True, False], ids=["registered-first", "registered-later"])
@pytest.mark.parametrize("make", [fastapi_app, starlette_app, flask_app])
@pytest.mark.parametrize(
    "kind",
    [Busy, Overloaded, HornbeamError, Exception, 503],
    ids=["itself", "parent", "root", "any", "status"],
)
def test_handlers_of_the_app_win(make, first, kind):
    app = make()

    def own(*args):
        error = args[-1]
        if isinstance(app, Flask):
            return f"own {getattr(error, 'code', '')}", 418
        return PlainTextResponse(f"own {getattr(error, 'status_code', '')}", 418)

    if not first:
        install_error_handlers(app)
    if isinstance(app, Flask):
        app.register_error_handler(kind, own)
    else:
        app.add_exception_handler(kind, own)
    install_error_handlers(app)
    response = get(app, "/busy")
    assert response.status_code == 418
    assert response.text == ("own 503" if kind == 503 else "own ")


@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
def test_an_own_form_of_http_errors_is_used(make):
    app = install_error_handlers(make())

    async def own(request, error):
        return JSONResponse({"mine": error.detail}, error.status_code, error.headers)

    app.add_exception_handler(HTTPException if make is fastapi_app else 503, own)
    response = get(app, "/busy")
    assert (response.status_code, response.headers["retry-after"]) == (503, "8")
    assert list(response.json()) == ["mine"]


def test_a_page_for_500_is_for_other_errors():
    app = install_error_handlers(fastapi_app())
    app.add_exception_handler(500, lambda request, error: PlainTextResponse("mine", 500))
    assert get(app, "/busy").status_code == 503
    assert get(app, "/full").text == "mine"


def test_a_handler_of_a_blueprint_wins():
    app, part = install_error_handlers(flask_app()), Blueprint("part", "part")
    part.add_url_rule("/part", view_func=lambda: raise_it("busy"))
    part.register_error_handler(HornbeamError, lambda error: ("of the part", 418))
    app.register_blueprint(part)
    assert get(app, "/part").text == "of the part"
    assert get(app, "/busy").status_code == 503


# Apps in apps.


class Wrapper:
    """Middleware that keeps the app in a slot, as Sentry's does."""

    __slots__ = ("app",)

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


def mounting(inner):
    app = FastAPI()
    app.mount("/in", inner)
    return app


def routed():
    router, app = APIRouter(), FastAPI()

    @router.get("/in/{name}")
    def view(name):
        raise_it(name)

    app.include_router(router)
    return app


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: mounting(fastapi_app()), id="fastapi-in-fastapi"),
        pytest.param(lambda: mounting(starlette_app()), id="starlette-in-fastapi"),
        pytest.param(lambda: mounting(bare_in), id="callable-in-fastapi"),
        pytest.param(
            lambda: Starlette(routes=[Mount("/in", Wrapper(fastapi_app()))]), id="wrapped-mount"
        ),
        pytest.param(lambda: Wrapper(CORSMiddleware(mounting(fastapi_app()))), id="wrapped-twice"),
        pytest.param(routed, id="router"),
        pytest.param(
            lambda: DispatcherMiddleware(flask_app(), {"/in": flask_app()}), id="dispatcher"
        ),
        pytest.param(
            lambda: DispatcherMiddleware(flask_app().wsgi_app, {"/in": flask_app().wsgi_app}),
            id="dispatcher-of-methods",
        ),
    ],
)
def test_apps_in_apps_are_found(make):
    response = get(install_error_handlers(make()), "/in/busy")
    assert (response.status_code, response.headers["retry-after"]) == (503, "8")


async def bare_in(scope, receive, send):
    raise_it("busy")


@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
def test_errors_of_middleware_have_their_status(make):
    app = make(middleware=[Middleware(Refusing)])
    assert get(install_error_handlers(app), "/x").status_code == 503


class Refusing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        raise_it("unavailable")


def test_middleware_adds_to_the_response():
    app = install_error_handlers(fastapi_app())
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    assert get(app, "/busy").headers["access-control-allow-origin"] == "*"


# Too late.


@pytest.mark.parametrize("make", [Starlette, FastAPI])
def test_after_the_start_of_the_response_the_error_is_raised(make):
    async def chunks():
        yield b"first"
        raise_it("busy")

    async def endpoint(request):
        return StreamingResponse(chunks())

    app = install_error_handlers(make(routes=[Route("/", endpoint)]))

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            await client.get("http://app/")

    with pytest.raises(Busy):
        asyncio.run(send())


def test_a_generator_that_fails_after_its_first_chunk_raises():
    closed = []

    def app(environ, start_response):
        try:
            start_response("200 OK", [])
            yield b"first"
            raise_it("busy")
        finally:
            closed.append(True)

    answer = install_error_handlers(app)({}, lambda *args: None)
    assert next(answer) == b"first"
    with pytest.raises(Busy):
        next(answer)
    answer.close()
    assert closed == [True]


def test_a_generator_is_passed_on_whole_and_closed():
    closed = []

    def app(environ, start_response):
        try:
            yield from (b"1", b"2", b"3")
        finally:
            closed.append(True)

    wrapped = install_error_handlers(app)
    assert list(wrapped({}, None)) == [b"1", b"2", b"3"]
    answer = wrapped({}, None)
    answer.close()
    assert closed == [True, True]


def test_an_app_that_has_started_is_refused():
    for app, path in ((fastapi_app(), "/busy"), (flask_app(), "/busy")):
        get(app, path)
        with pytest.raises(RuntimeError, match="has started"):
            install_error_handlers(app)


def test_websockets_and_lifespans_pass_through():
    async def app(scope, receive, send):
        raise_it("busy")

    async def run(kind):
        await install_error_handlers(app)({"type": kind}, None, None)

    for kind in ("lifespan", "websocket"):
        with pytest.raises(Busy):
            asyncio.run(run(kind))


def test_the_log_of_an_outage_is_one_line(caplog):
    with caplog.at_level(logging.DEBUG, "hornbeam"):
        get(install_error_handlers(flask_app()), "/unavailable")
        get(install_error_handlers(flask_app()), "/overloaded")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["answered 503"]
