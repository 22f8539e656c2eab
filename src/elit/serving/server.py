"""The server: LitServe's processes and queues, our addresses, a worker for each device."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import Empty
from typing import Any

import litserve
from fastapi import Request
from litserve.loops.base import LitLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, LoopResponseType, WorkerSetupStatus
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from elit.serving.control import Picture
from elit.serving.dispatcher import Dispatcher, Drawn
from elit.serving.facts import Facts, RefusedError
from elit.serving.metrics import Metrics
from elit.serving.requests import MAX_BODY, parse
from elit.serving.settings import Settings

logger = logging.getLogger(__name__)

BODY_S = 20.0  # seconds in which a request's body must come
DRAIN_S = 600  # seconds in which a stop finishes what was accepted
_HELLO = "hello"  # instead of a batch's number


# ---- the worker's process ----


class _Drawing(LitLoop):
    """Takes batches from the queue until the server is gone."""

    def pre_setup(self, lit_api: Any, spec: Any = None) -> None:
        """Nothing of LitServe's own is used."""

    def run(
        self, lit_api: Any, device: Any, worker_id: int, request_queue: Any, transport: Any,
        workers_setup_status: Any, callback_runner: Any,
    ) -> None:  # fmt: skip
        """Draw batches; LitServe calls it once."""
        del device, workers_setup_status, callback_runner
        send = partial(self._send, transport, worker_id)
        send(_HELLO, lit_api.facts, LitAPIStatus.OK)
        parent = multiprocessing.parent_process()
        while parent is None or parent.is_alive():
            try:
                batch = request_queue.get(timeout=1.0)
            except Empty:
                continue
            except (EOFError, OSError):  # the queue's process is gone
                break
            if batch is None:
                break
            number, pictures, latents = batch
            send(number, None, LitAPIStatus.START)
            send(number, lit_api.worker.draw(pictures, latents), LitAPIStatus.OK)
        raise SystemExit(0)

    @staticmethod
    def _send(transport: Any, worker_id: int, key: Any, data: Any, status: str) -> None:
        # LitServe's reader takes (response, status, kind, worker); a START keeps the worker alone.
        message = (data, worker_id), status, LoopResponseType.REGULAR, worker_id
        transport.send((key, message), consumer_id=0)


class _Api(litserve.LitAPI):
    """What LitServe starts in the worker's process."""

    def __init__(self, settings: Settings, spec: LitSpec):
        super().__init__(spec=spec, loop=_Drawing())
        self.settings = settings
        self.complaint = multiprocessing.get_context("spawn").SimpleQueue()

    def setup(self, device: Any) -> None:
        """Load and measure; a user's mistake goes to the process that started this one."""
        for number in (signal.SIGINT, signal.SIGTERM):  # the server ends it, when all is drawn
            signal.signal(number, signal.SIG_IGN)
        try:
            from diffusers.utils import logging as diffusers_logging

            from elit.serving.worker import Worker, find_facts, open_served

            diffusers_logging.set_verbosity_error()
            diffusers_logging.disable_progress_bar()
            pipeline = open_served(self.settings, device if isinstance(device, str) else device[0])
            self.facts, self.worker = find_facts(pipeline, self.settings), Worker(pipeline)
        except (ValueError, OSError) as error:
            self.complaint.put(" ".join(str(error).split()))
            logging.disable(logging.CRITICAL)  # LitServe would print where it comes from
            raise


# ---- the process that answers ----


class _Mail:
    """What LitServe's reader puts the messages about a batch into; it sets an event that waits."""

    def __init__(self, began: Callable[[int], None], done: Callable[[Any, int], None]):
        self._began, self._done = began, done
        self.event = self
        self.response: Any = None

    @property
    def worker_id(self) -> None:
        """The worker that has taken it; only ever set."""

    @worker_id.setter
    def worker_id(self, worker: int) -> None:
        self._began(worker)

    def set(self) -> None:
        """Pass the message on."""
        (data, worker), _ = self.response
        self._done(data, worker)


class _Spec(LitSpec):
    """Our addresses, and the queue behind them."""

    def __init__(self, settings: Settings, announce: Callable[[Facts], None]):
        super().__init__()
        self.settings, self.announce = settings, announce
        self.api_path = "/v1/images/generations"
        self.metrics = Metrics()
        target = None if settings.p95_ms is None else settings.p95_ms / 1000
        self.dispatcher = Dispatcher(self._send, target, settings.most_waiting, self.metrics)
        self.add_endpoint(self.api_path, self.generate, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/metrics", self.read_metrics, ["GET"])

    def __getstate__(self) -> dict[str, Any]:
        return {"api_path": self.api_path}  # all that a worker's process needs

    def setup(self, server: Any) -> None:
        """Connect it to LitServe's queues."""
        super().setup(server)
        self.response_buffer[_HELLO] = _Mail(lambda _: None, self._hello)

    def _hello(self, facts: Facts, worker: int) -> None:
        first = self.dispatcher.facts is None
        self.dispatcher.hello(worker, facts)
        if first:
            self.announce(facts)

    def _send(self, number: int, pictures: list[Picture], latents: list[int]) -> None:
        def done(drawn: list[Drawn], worker: int) -> None:
            del worker
            self.response_buffer.pop(number, None)
            self.dispatcher.answer(number, drawn)

        self.response_buffer[number] = _Mail(partial(self.dispatcher.began, number), done)
        self.request_queue.put((number, pictures, latents))

    def dismiss_workers(self) -> None:
        """Nothing more will come: workers end."""
        with suppress(EOFError, OSError):
            for _ in self.dispatcher.workers:
                self.request_queue.put(None)

    async def generate(self, request: Request) -> Response:
        """Pictures, as OpenAI's API has it."""
        started = time.monotonic()
        try:
            drawn = await self._pictures(request)
        except RefusedError as error:
            self.metrics.requests.labels(error.status).inc()
            return _refusal(error)
        self.metrics.requests.labels(200).inc()
        self.metrics.seconds.observe(time.monotonic() - started)
        name = self.dispatcher.known().name
        return JSONResponse({"created": int(time.time()), "model": name, "data": drawn})

    async def _pictures(self, request: Request) -> list[Drawn]:
        facts = self.dispatcher.known()
        pictures = parse(await _body(request), facts)
        drawing = asyncio.ensure_future(self.dispatcher.draw(pictures))
        leaving = asyncio.ensure_future(request.receive())  # the body is read: now only a goodbye
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not drawing.done():
            drawing.cancel()
            raise RefusedError("the client has left", None, 499, "client_left")
        drawn = drawing.result()
        for one in drawn:
            if "error" in one:
                code = "failed" if one["status"] >= 500 else "invalid_value"
                raise RefusedError(one["error"], None, one["status"], code)
        return drawn

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        del request
        try:
            facts = self.dispatcher.known()
        except RefusedError as error:
            return _refusal(error)
        model = {"id": facts.name, "object": "model", "created": 0, "owned_by": "elit"}
        budgets = [facts.budget(n) for n in facts.ladder]
        return JSONResponse({"object": "list", "data": [model | {"budgets": budgets}]})

    async def read_metrics(self, request: Request) -> Response:
        """Numbers in Prometheus' format."""
        del request
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _body(request: Request) -> bytes:
    """The body of a request, or a RefusedError if it is too long or doesn't come."""
    body = b""
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise RefusedError(
                        f"the body is longer than {MAX_BODY} bytes", None, 413, "too_large"
                    )
    except TimeoutError:
        raise RefusedError(
            f"the body didn't come within {BODY_S:g} s", None, 408, "timeout"
        ) from None
    except ClientDisconnect:
        raise RefusedError("the client has left", None, 499, "client_left") from None
    return body


def _refusal(error: RefusedError) -> Response:
    after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.to_dict(), error.status, after)


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown address, a wrong method, a missing key: as OpenAI's API says it."""
    del request
    assert isinstance(error, HTTPException)
    refused = RefusedError(str(error.detail), None, error.status_code, "invalid_request")
    return JSONResponse(refused.to_dict(), error.status_code, error.headers)


# ---- the process that starts the others ----


class _LostError(ValueError):
    """A process ended that this one can't go on without."""


class _LitServer(litserve.LitServer):
    """LitServe's, which would wait forever for a process that was killed.

    Attributes:
        forks_queues: whether what is being forked is the process of the queues.
    """

    forks_queues = False

    def verify_worker_status(self) -> None:
        """Wait for the first worker."""
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            if self._shutdown_event.is_set():
                raise KeyboardInterrupt  # nothing was accepted yet
            for worker in self.inference_workers:
                if not worker.is_alive():
                    raise _LostError(
                        f"a worker ended, with code {worker.exitcode}, while it loaded the model; "
                        f"is there memory enough?"
                    )
            time.sleep(0.05)

    def end(self) -> None:
        """Stop in order, unless the process of the queues is gone."""
        with suppress(EOFError, OSError):
            self._shutdown_event.set()

    def _init_manager(self, count: int) -> Any:
        self.forks_queues = True
        manager = super()._init_manager(count)
        self.forks_queues = False
        return manager

    def _start_server(
        self, port: Any, count: int, log_level: str, sockets: list[socket.socket], *more: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        processes = super()._start_server(port, count, log_level, sockets, *more, **options)
        for one in sockets:  # they listen; what this process kept open would never be answered
            one.close()

        def watch() -> None:
            multiprocessing.connection.wait([process.sentinel for process in processes.values()])
            self.end()

        threading.Thread(target=watch, daemon=True).start()
        return processes


def serve(settings: Settings, announce: Callable[[Facts], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Args:
        settings: of the server.
        announce: told of the model once it answers, in the process that does.
    """
    spec = _Spec(settings, announce)
    api = _Api(settings, spec)
    kind, devices = _devices(settings.device)
    logger.info("loading %s, and timing its budgets", settings.run)
    server = _LitServer(
        api, kind, devices, timeout=False, restart_workers=True, disable_openapi_url=True
    )
    server.uvicorn_graceful_timeout = DRAIN_S
    server.app.add_exception_handler(HTTPException, _http_error)
    inner = server.app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
        spec.dismiss_workers()

    server.app.router.lifespan_context = lifespan
    received = _stop_on_signals(server)
    os.register_at_fork(after_in_child=partial(_in_fork, server, os.getpid()))
    logging.getLogger("litserve").setLevel(logging.ERROR)
    try:
        server.run(
            settings.host, settings.port, num_api_servers=1, log_level="error",
            generate_client_file=False, access_log=False,
        )  # fmt: skip
        if not received:
            raise _LostError("the process that answers has ended; start the server again")
    except BaseException as error:  # a second signal too
        for child in multiprocessing.active_children():
            child.kill()  # or this process would wait for them at its end
        if isinstance(error, _LostError) and not api.complaint.empty():
            raise ValueError(api.complaint.get()) from error
        if isinstance(error, EOFError | ConnectionError):
            raise _LostError(
                "the process of the queues has ended; start the server again"
            ) from error
        raise


def _devices(name: str) -> tuple[Any, Any]:
    """LitServe's kind of device, and which of them."""
    there = []
    if name != "cpu":
        import torch  # takes seconds

        known = {"cuda": torch.cuda, "mps": torch.backends.mps}
        there = [kind for kind, module in known.items() if module.is_available()]
    name = next(iter(there), "cpu") if name == "auto" else name
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number or "0").isdigit():
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:1 or mps")
    if kind not in ("cpu", *there):  # LitServe would start no worker, and wait for it
        raise ValueError(f"device {name!r} is not usable: there is none; use auto or cpu")
    return kind, [int(number)] if number else "auto"


def _stop_on_signals(server: _LitServer) -> list[int]:
    """The first SIGINT or SIGTERM stops in order, the second at once; gives those that came."""
    me, received = os.getpid(), list[int]()

    def stop(number: int, frame: Any) -> None:
        del frame
        if os.getpid() != me:  # a fork
            if server.forks_queues:  # LitServe's queues: they go last
                return
            raise SystemExit(0)  # what answers, before it does, or when it has
        received.append(number)
        if len(received) > 1 or getattr(server, "_shutdown_event", None) is None:
            raise KeyboardInterrupt
        # Not here: this thread waits for that very event, on the same connection.
        threading.Thread(target=server.end, daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return received


def _in_fork(server: _LitServer, parent: int) -> None:
    """What a forked process does first: it will end when the one that started it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if not server.forks_queues:
        return
    # Else clients would still get through after the process that answers has closed its door.
    for number in range(3, 256):
        with suppress(OSError):
            found = socket.socket(fileno=number)
            if found.family in (socket.AF_INET, socket.AF_INET6):
                found.close()
            else:
                found.detach()
