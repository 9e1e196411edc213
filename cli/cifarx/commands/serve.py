"""`cifarx serve`: model files over HTTP, until a signal ends it."""

import asyncio
import ipaddress
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cifarx.options import DeviceName
from cifarx.output.console import note
from cifarx_serve.backends.cuda_libraries import has_driver
from cifarx_serve.backends.registry import read_spec, registered_backends
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.listener import create_ssl_context
from cifarx_serve.server.processes.supervisor import Supervisor, listen
from cifarx_serve.server.settings import Limits, Settings, files_by_name
from cifarx_serve.system.cpus import available_cpus

_DEFAULT = Limits()


def command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Model files; the first answers where none is named.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 is any that is free.")] = 8000,
    workers: Annotated[str, typer.Option(metavar="N", help="Processes; auto is one a CPU, or one on a GPU.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Images that go through the model together.")] = 64,
    max_delay_us: Annotated[
        int, typer.Option(min=0, help="How long an idle model waits for more images, in microseconds.")
    ] = 0,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that wait for a busy model; past it 503.")] = 256,
    deadline_ms: Annotated[int, typer.Option(min=1, help="From request to answer; past it 504.")] = 10_000,
    device: DeviceName = "auto",
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="[default: by the file]")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Take a file that changes into service, as SIGHUP does.")
    ] = False,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of a request, in MiB; past it 413.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of an image; past it 413.")] = _DEFAULT.max_pixels,
    max_images: Annotated[int, typer.Option(min=1, help="Of a request; past it 413.")] = 64,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open at a time, a worker; quiet ones make room, else more wait.")
    ] = 1024,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys that may ask, one a line.")] = None,
    certfile: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS: the certificate, PEM.")] = None,
    keyfile: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS: its private key, PEM.")] = None,
    cors_origin: Annotated[
        str | None, typer.Option(metavar="ORIGIN", help="A site whose pages may ask, as https://example.org; * is any.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line of JSON a request on standard output.")
    ] = True,
) -> int:
    """Serve model files over HTTP: /docs of the server says how to ask."""
    names = files_by_name(files)
    for path in files:
        read_spec(path)  # what is wrong with a file is told before anything is started
    _require_origin(cors_origin)
    if api_key_file:
        ApiKeys(api_key_file)
    tls = create_ssl_context(_text(certfile), _text(keyfile))
    count = _workers(workers, device)
    settings = Settings(
        files=names,
        backend=backend,
        device=device,
        threads=max(1, available_cpus() // count),
        registered=registered_backends(),
        limits=Limits(
            max_batch=max_batch,
            max_delay_us=max_delay_us,
            max_queue=max_queue,
            deadline_s=deadline_ms / 1000,
            max_body_bytes=max_body_mb * 2**20,
            max_pixels=max_pixels,
            max_images=max_images,
            max_connections=max_connections,
        ),
        api_key_file=_text(api_key_file),
        cors_origin=cors_origin,
        certificate=_text(certfile),
        private_key=_text(keyfile),
        access_log=access_log,
    )
    if not (_is_loopback(host) or settings.api_key_file):
        note(f"note: {host} can be reached from other machines, and nobody is asked for a key: see --api-key-file")
    asyncio.run(_serve(settings, host, port, count, watch, "https" if tls else "http"))
    return 0


async def _serve(settings: Settings, host: str, port: int, count: int, watch: bool, scheme: str) -> None:
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        where = f"{scheme}://{shown}:{listener.getsockname()[1]}"
        processes = f"{count} {'process' if count == 1 else 'processes'}"

        def tell(line: str) -> None:
            with suppress(OSError):  # nobody reads it any more; a worker is replaced all the same
                note(
                    f"serving {', '.join(settings.files)} on {where} with {processes}"
                    if line == "ready"
                    else f"note: {line}"
                )

        await Supervisor(settings, listener, count, watch, tell).run()


def _workers(given: str, device: str) -> int:
    """One process a CPU: each computes with one thread, which wastes nothing; a GPU is one process's."""
    kind = parse_device(device).kind
    on_gpu = has_driver() if kind == "auto" else kind != "cpu"
    if given == "auto":
        return 1 if on_gpu else available_cpus()
    if not re.fullmatch("[1-9][0-9]{0,3}", given):
        raise UsageError(f"--workers {given}", "give a number from 1, or auto")
    return int(given)


def _require_origin(origin: str | None) -> None:
    if origin is not None and origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
        raise UsageError(f"--cors-origin {origin!r} is no origin", "give it as https://example.org, without a path")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
