"""What answers for the hub's page: pages made from files, nothing changed, nothing kept but what was read last.

  /                          the page; /now is the part of it that changes, which the page asks for again
  /runs/RUN                  that run's report
  /runs/RUN/NAME             one file of its result (of view.FILES, no other)

Whoever can open it is on the hub's host: it listens on loopback. A page of somebody else's in the operator's browser
can neither read it (no CORS, and the Host header must be a loopback name, against DNS rebinding) nor change anything
(GET alone).
Enters: the folder of runs, what is known of the sites. Leaves: a Starlette application.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.errors import BouquetError
from bouquet.hub.live import view
from bouquet.hub.live.sites import Known
from bouquet.report import page, reading

PARTS = {"live.js": "text/javascript", "live.css": "text/css"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    ),
}


def application(runs: Path, sites: Callable[[], Known]) -> Starlette:
    """runs: the folder on the shared volume; sites: the latest that is known of them."""
    seen = view.Runs(runs)

    def whole(request: Request) -> Response:
        return HTMLResponse(view.whole(seen, sites()), headers=HEADERS)

    def now(request: Request) -> Response:
        text = view.now(seen, sites())
        tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=HEADERS | {"ETag": tag})
        return HTMLResponse(text, headers=HEADERS | {"ETag": tag})

    def report(request: Request) -> Response:
        if (folder := seen.folder(request.path_params["run"])) is None:
            return missing(request)
        try:
            text = page.page(reading.read(folder))
        except BouquetError as error:
            return PlainTextResponse(error.report(), 500, headers=HEADERS)
        # the report has its own
        return HTMLResponse(text, headers=HEADERS | {"Content-Security-Policy": "frame-ancestors 'none'"})

    def file(request: Request) -> Response:
        folder, place = seen.folder(request.path_params["run"]), view.FILES.get(request.path_params["name"])
        if folder is None or place is None or not (found := folder / place).is_file():
            return missing(request)
        name = f"{folder.name}-{found.name}"
        return FileResponse(
            found,
            headers=HEADERS,
            filename=name,
            content_disposition_type="inline" if found.suffix == ".png" else "attachment",
        )

    def part(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in PARTS:
            return missing(request)
        return Response(view.part(name), media_type=PARTS[name], headers=HEADERS)

    def missing(request: Request, error: Exception | None = None) -> Response:
        return PlainTextResponse("There is nothing here.\n", 404, headers=HEADERS)

    def broken(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"This could not be shown ({type(error).__name__}).\n", 500, headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", whole),
            Route("/now", now),
            Route("/runs/{run}", report),
            Route("/runs/{run}/{name}", file),
            Route("/part/{name}", part),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"], www_redirect=False)],
        exception_handlers={404: missing, 500: broken},
    )
