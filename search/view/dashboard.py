"""Optuna's dashboard over a run's study, which can be looked at and not touched.

    fmnist-search dashboard --study cnn

optuna-dashboard has no login, no check of the Host header, and deletes studies on request. Here the
database is opened read only, only GET and HEAD come through, only loopback is listened on, and only
a request that names this machine is answered: another site's page whose name was pointed at
127.0.0.1 (DNS rebinding) reads nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import socketserver
import sys
import threading
import warnings
import webbrowser
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna

from search.errors import SearchError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"
PORTS_TRIED = 100
# Any port: behind `ssh -L 9000:127.0.0.1:8080` the browser names 9000. The name is what protects.
_THIS_MACHINE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_MAX_DRAINED = 1 << 20  # bytes of a refused request's body, read so that the answer arrives
_NICENESS = 10  # the search's workers come first
_NO_ANSWER = 60  # seconds of silence after which a connection is dropped


def read_only(app: WSGIApplication) -> WSGIApplication:
    """The application, asked only for what changes nothing, and only by this machine's pages.

    A request with another Host gets 403, another method than GET and HEAD 405; the application sees
    neither. The answer is JSON with a `reason`, which the dashboard's pages show.
    """

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not _THIS_MACHINE.fullmatch(environ.get("HTTP_HOST", "")):
            reason = "Only this machine's own address is answered, such as 127.0.0.1"
            return _refuse(environ, start_response, "403 Forbidden", reason)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            reason = "This dashboard is read only: the study belongs to the search"
            return _refuse(environ, start_response, "405 Method Not Allowed", reason)
        return app(environ, start_response)

    return guarded


def bind(port: int) -> WSGIServer:
    """A server on loopback that listens on `port`, or on the next one that is free.

    Raises:
        SearchError: if there is none, or the port is not for this user.
    """
    for candidate in range(port, min(port + PORTS_TRIED, 2**16)):
        try:
            return _Server((HOST, candidate), _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SearchError(
                    f"--port {candidate} can't be listened on: {error.strerror}; take another, "
                    "above 1023"
                ) from None
    raise SearchError(f"no port from {port} on is free; take another --port")


def serve(study: optuna.Study, port: int, *, browser: bool, say: Callable[[str], object]) -> None:
    """Show a study until Ctrl-C; called by the main thread.

    Args:
        study: opened read only; others in the same file are shown too.
        port: the wanted one.
        browser: open it there.
        say: is told the address when it answers.
    """
    # Also where a script has put the command in the background, which would let it ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), bind(port) as server:
        _serve(server, study, port, browser, say)


def _serve(
    server: WSGIServer, study: optuna.Study, port: int, browser: bool, say: Callable[[str], object]
) -> None:
    _be_quiet()
    import optuna_dashboard  # seconds: plotly, scikit-learn

    server.set_app(read_only(optuna_dashboard.wsgi(study._storage)))
    address = f"http://{HOST}:{server.server_port}/dashboard/studies/{study._study_id}"
    taken = "" if server.server_port == port else f"port {port} is taken; "
    say(f"{taken}{study.study_name!r} is shown at {address} (read only; Ctrl-C ends it)")
    if browser and has_browser():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    server.serve_forever()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a plot that is being computed does not keep Ctrl-C waiting

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the network for the machine's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The browser went away; nothing that anybody could mend."""


class _Handler(WSGIRequestHandler):
    timeout = _NO_ANSWER

    def log_message(self, format: str, *args: Any) -> None:
        """A page asks several times a minute; no line for each."""


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"fmnist-search: dashboard: {record.getMessage().splitlines()[0]}"


def _be_quiet() -> None:
    """Let the search go first; no warnings of plots for which there are too few trials."""
    os.nice(_NICENESS)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    log = logging.getLogger("optuna_dashboard")
    log.addHandler(handler)
    log.setLevel(logging.ERROR)
    log.propagate = False


def has_browser() -> bool:
    """Not on a server: there Python would start a browser for text, on top of this terminal."""
    if sys.platform == "darwin":
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _refuse(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, reason: str
) -> Iterable[bytes]:
    # A connection closed with unread data is reset, and the answer may be lost with it.
    length = environ.get("CONTENT_LENGTH") or "0"
    if length.isdecimal():
        environ["wsgi.input"].read(min(int(length), _MAX_DRAINED))
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status.startswith("405"):
        headers.append(("Allow", "GET, HEAD"))
    start_response(status, headers)
    return [body]
