"""The `cifarx serve` command: serve model files over HTTP until a signal stops the server."""

import asyncio
import importlib.util
import inspect
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cifarx.options import DeviceName
from cifarx.output.console import note
from cifarx_serve.backends.cuda_libraries import has_driver
from cifarx_serve.backends.registry import read_spec, registered_backends
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import UsageError, unknown_name_error
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.forwarded import UNIX, TrustedProxies, require_root_path
from cifarx_serve.server.http.listener import create_ssl_context
from cifarx_serve.server.model_files import absolute_path, absolute_paths, initial_files, latest_keys
from cifarx_serve.server.processes.port_reservation import PortReservation
from cifarx_serve.server.processes.supervisor import BACKLOG, Supervisor, listen
from cifarx_serve.server.settings import (
    SHADOW_SHARE,
    LimitOption,
    ModelControlMode,
    Settings,
    limit_options,
    limits_from_options,
)
from cifarx_serve.system.cpus import available_cpus

if TYPE_CHECKING:
    from cifarx_serve.files.signature import Verifier

_HOST: Final = "127.0.0.1"
_PORT: Final = 8000

_GRPC_PACKAGES: Final = ("grpc", "tritonclient", "grpc_health", "grpc_reflection")
"""The packages of the extra `grpc`."""

_OTEL_PACKAGES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
"""The packages of the extra `otel`."""

_SECOND_GROUP: Final = "max_body_mb"
"""On the help page, limit options before this one follow --workers; this one and the rest follow --watch."""


def _add_limit_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace the parameter `**limits` of the command by one option per limit."""
    signature = inspect.signature(command)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    options = limit_options()
    split = [option.name for option in options].index(_SECOND_GROUP)
    for after, group in (("workers", options[:split]), ("watch", options[split:])):
        position = [parameter.name for parameter in parameters].index(after) + 1
        parameters[position:position] = [_parameter(option) for option in group]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _parameter(option: LimitOption) -> inspect.Parameter:
    annotation = Annotated[int, typer.Option(min=option.minimum, help=option.help)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(option.name, kind, default=option.default, annotation=annotation)


@_add_limit_options
def command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[@N]=]FILE...",
            help="Model files, with the names and versions to serve them under; the first is the default.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help=f"Address to listen on; 0.0.0.0 for all. [default: {_HOST}]")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help=f"Port to listen on; 0 chooses a free one. [default: {_PORT}]"),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to serve gRPC on as well; 0 chooses a free one.")
    ] = None,
    uds: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Listen on a Unix socket instead, such as of a reverse proxy.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="/PREFIX", help="Path under which a reverse proxy makes the server available.")
    ] = "",
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CIDR",
            help="Network of reverse proxies whose X-Forwarded-* headers are used, or unix for --uds; repeatable.",
        ),
    ] = None,
    workers: Annotated[
        str, typer.Option(metavar="N", help="Number of worker processes; auto is one per CPU, or one on a GPU.")
    ] = "auto",
    device: DeviceName = "auto",
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="[default: by the file]")] = None,
    model_repository: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory with model files, and with folders NAME/1, NAME/2 as in Triton."),
    ] = None,
    model_control: Annotated[
        ModelControlMode,
        typer.Option(help="Load the models of the repository at the start, on request, or whenever they change."),
    ] = "none",
    shadow: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Model that answers a share of the requests of NAME too, to compare."),
    ] = None,
    shadow_share: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=1,
            help=f"Share of the requests that a shadow answers, in spare time. [default: {SHADOW_SHARE}]",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Reload a model when its file changes, as on SIGHUP.")] = False,
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBKEY", help="Serve only files signed with the private key of this PEM public key."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="API keys, one per line.")] = None,
    certfile: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS certificate, PEM.")] = None,
    keyfile: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of the certificate, PEM.")] = None,
    cors_origin: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGIN", help="Origin allowed to call the server, such as https://example.org; * for any."
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="Log one line of JSON per request on standard output.")
    ] = True,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Record traces, and export them to this collector, http://127.0.0.1:4318."),
    ] = None,
    trace_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the requests to trace that are not part of a trace. [default: all]"),
    ] = None,
    **limits: int,
) -> int:
    """Serve model files over HTTP, and over gRPC if a port is given. The server documents its API at /docs."""
    models = initial_files(files or [], model_repository, model_control)
    verifier = None if require_signature is None else _verifier(require_signature)
    for path in models.values():
        if verifier is not None:
            verifier.verify(path)
        read_spec(path)  # report an invalid file before any process is started
    _check_origin(cors_origin)
    if api_key_file:
        ApiKeys(api_key_file)
    ssl_context = create_ssl_context(_absolute(certfile), _absolute(keyfile))
    worker_count = _count_workers(workers, device)
    settings = Settings(
        files=absolute_paths(models),
        model_repository=_absolute(model_repository),
        model_control=model_control,
        shadows=_shadows(shadow or [], models, verifier),
        shadow_share=_shadow_share(shadow, shadow_share),
        backend=backend,
        device=device,
        threads=max(1, available_cpus() // worker_count),
        registered_backends=registered_backends(),
        limits=limits_from_options(limits),
        api_key_file=_absolute(api_key_file),
        cors_origin=cors_origin,
        certfile=_absolute(certfile),
        keyfile=_absolute(keyfile),
        access_log=access_log,
        root_path=require_root_path(root_path),
        trusted_proxies=_check_proxies(trusted_proxy or [], uds),
        public_key=_absolute(require_signature),
        otlp_endpoint=_check_collector(otlp_endpoint, trace_share),
        trace_share=trace_share,
    )
    if host is not None and not (_is_loopback(host) or settings.api_key_file):
        note(f"note: {host} can be reached from other machines, and no API key is required: see --api-key-file")
    with (
        _listen(host, port, uds, "https" if ssl_context else "http") as (listener, address, on_drain),
        _reserve_grpc_port(host, grpc_port) as grpc,
    ):
        asyncio.run(_serve(settings, listener, worker_count, watch, address, on_drain, grpc))
    return 0


@contextmanager
def _listen(
    host: str | None, port: int | None, uds: Path | None, scheme: str
) -> Iterator[tuple[socket.socket, str, Callable[[], None]]]:
    """Return a listening socket, its address for the user, and what to call before it is closed."""
    if uds is None:
        host = _HOST if host is None else host
        with listen(host, _PORT if port is None else port) as listener:
            url_host = f"[{host}]" if ":" in host else host
            yield listener, f"{scheme}://{url_host}:{listener.getsockname()[1]}", lambda: None
        return
    if host is not None or port is not None:
        raise UsageError(f"--uds {uds} with --host or --port", "give one of them: the server listens at one address")
    from cifarx_serve.server.processes.unix_socket import UnixSocket  # not every system has such sockets

    unix_socket = UnixSocket(uds, BACKLOG)
    with unix_socket.listener:
        try:
            yield unix_socket.listener, f"unix:{uds}", unix_socket.remove
        finally:
            unix_socket.remove()


@contextmanager
def _reserve_grpc_port(host: str | None, port: int | None) -> Iterator[PortReservation | None]:
    """Reserve the port for gRPC, if there is to be one."""
    if port is None:
        yield None
        return
    for package in _GRPC_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--grpc-port needs {package}, which is not installed", 'pip install "cifarx[grpc]"')
    with closing(PortReservation(_HOST if host is None else host, port)) as reservation:
        yield reservation


async def _serve(
    settings: Settings,
    listener: socket.socket,
    workers: int,
    watch: bool,
    address: str,
    on_drain: Callable[[], None],
    grpc: PortReservation | None,
) -> None:
    processes = f"{workers} {'process' if workers == 1 else 'processes'}"
    also_grpc = f", gRPC on {grpc.address}" if grpc else ""

    def print_event(event: str) -> None:
        with suppress(OSError):  # standard error is closed, which must not stop the server
            note(
                f"serving {', '.join(settings.files) or 'no model yet'} on {address} with {processes}{also_grpc}"
                if event == "ready"
                else f"note: {event}"
            )

    await Supervisor(settings, listener, workers, watch, print_event, on_drain, grpc).run()


def _count_workers(value: str, device: str) -> int:
    """Return the number of workers. On CPUs, "auto" is one single-threaded worker per CPU: the most efficient."""
    device_type = parse_device(device).type
    on_gpu = has_driver() if device_type == "auto" else device_type != "cpu"
    if value == "auto":
        return 1 if on_gpu else available_cpus()
    if not re.fullmatch("[1-9][0-9]{0,3}", value):
        raise UsageError(f"--workers {value!r} is not a number from 1 to 9999", "give the number of processes, or auto")
    return int(value)


def _verifier(public_key: Path) -> "Verifier":
    from cifarx_serve.files.signature import Verifier  # its libraries take 0.5 s to import

    return Verifier(public_key)


def _check_collector(endpoint: str | None, share: float | None) -> str | None:
    if endpoint is None:
        if share is not None:
            raise UsageError(f"--trace-share {share:g} without --otlp-endpoint", "name the collector of the traces")
        return None
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", endpoint):
        raise UsageError(f"--otlp-endpoint {endpoint!r} is not a URL", "give it as http://127.0.0.1:4318")
    for package in _OTEL_PACKAGES:
        with suppress(ModuleNotFoundError):  # a package that contains it is missing
            if importlib.util.find_spec(package) is not None:
                continue
        raise UsageError(f"--otlp-endpoint needs {package}, which is not installed", 'pip install "cifarx[otel]"')
    return endpoint


def _check_proxies(networks: Sequence[str], uds: Path | None) -> tuple[str, ...]:
    TrustedProxies(networks)
    if networks and (UNIX in networks) != (uds is not None):
        problem = f"--trusted-proxy {' '.join(networks)} {'with' if uds else 'without'} --uds trusts no client"
        raise UsageError(problem, f"add --trusted-proxy {UNIX}" if uds else "give the network of the proxy")
    return tuple(networks)


def _shadow_share(shadows: list[str] | None, share: float | None) -> float:
    if share is not None and not shadows:
        raise UsageError(f"--shadow-share {share:g} without --shadow", "name the model, as in --shadow NAME=FILE")
    return SHADOW_SHARE if share is None else share


def _shadows(arguments: list[str], models: Mapping[str, Path], verifier: "Verifier | None") -> dict[str, str]:
    """Return the files of shadows by the key of their model, after checking that they can be compared."""
    if not arguments:
        return {}
    from cifarx_serve.server.inference.shadow import require_comparable  # it imports what runs models

    shadows: dict[str, str] = {}
    latest = latest_keys(models)
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not (name and equals and file):
            raise UsageError(f"--shadow {argument!r} names no file", "give it as NAME=FILE, with the name of a model")
        key = latest.get(name, name)
        if key not in models:
            raise unknown_name_error("model", name, latest)
        if key in shadows:
            raise UsageError(f"two shadows for {name}", "give one")
        if verifier is not None:
            verifier.verify(Path(file))
        require_comparable(key, read_spec(models[key]), file, read_spec(file))
        shadows[key] = absolute_path(Path(file))
    return shadows


def _check_origin(origin: str | None) -> None:
    if origin is not None and origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
        raise UsageError(f"--cors-origin {origin!r} is not an origin", "give it as https://example.org, without a path")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(path: Path | None) -> str | None:
    return None if path is None else absolute_path(path)
