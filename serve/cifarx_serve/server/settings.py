"""The settings of a server: model files, limits, TLS and access."""

from collections.abc import Mapping
from math import ceil, floor
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias, get_args

import msgspec
from msgspec import Meta

from cifarx_serve.backends.registry import RegisteredBackend

SHADOW_SHARE: Final = 0.1
"""The default share of the requests that a shadow answers."""

ModelControlMode: TypeAlias = Literal["none", "explicit", "poll"]

PROMETHEUS_MULTIPROC_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the directory in which workers share their metrics.

prometheus_client reads it when it is imported.
"""


class Option(NamedTuple):
    """Declares that `cifarx serve` and Ray Serve have an option for a limit. Its value is always a whole number.

    Attributes:
        help: the help text.
        name: the name of the option if it has another unit than the field, such as "deadline_ms".
        per_unit: the units of the option in one unit of the field, such as 1000 milliseconds per second.
    """

    help: str
    name: str | None = None
    per_unit: float = 1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one worker. A request over a limit is answered with an error; others are not affected.

    An annotation declares everything about a limit: its bounds, and the option that sets it, if it has one.
    """

    max_batch: Annotated[int, Meta(ge=1), Option("Maximum number of images per batch.")] = 64
    max_delay_us: Annotated[
        int, Meta(ge=0), Option("How long an idle model waits for more images, in microseconds.")
    ] = 0
    max_queue: Annotated[
        int, Meta(ge=1), Option("Maximum number of queued images; more are rejected with status 503.")
    ] = 256
    deadline_s: Annotated[
        float,
        Meta(gt=0),
        Option("Time limit per request, in milliseconds; slower requests fail with status 504.", "deadline_ms", 1000),
    ] = 10.0
    max_body_bytes: Annotated[
        int,
        Meta(ge=1),
        Option(
            "Maximum size of a request, in MiB; larger requests are rejected with status 413.", "max_body_mb", 2**-20
        ),
    ] = 32 * 2**20
    # A model with embedded preprocessing takes images of any size: the limit then holds for all images of a request.
    max_pixels: Annotated[
        int, Meta(ge=1), Option("Maximum number of pixels per image; larger images are rejected with status 413.")
    ] = 50_000_000
    max_images: Annotated[
        int, Meta(ge=1), Option("Maximum number of images per request; more are rejected with status 413.")
    ] = 64
    max_connections: Annotated[
        int, Meta(ge=1), Option("Maximum number of connections per worker; idle ones are closed to make room.")
    ] = 1024
    load_timeout_s: Annotated[
        float,
        Meta(gt=0),
        Option("Time limit for opening a model, and for each batch of its warm-up, in seconds.", "load_timeout_s"),
    ] = 30.0
    header_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    """Time limit for receiving the headers of a request. After it, the connection is closed, with 408 if they began."""
    body_timeout_s: Annotated[float, Meta(gt=0)] = 30.0
    """Time limit for receiving the body of a request. Slower requests are rejected with status 408."""
    keep_alive_s: Annotated[float, Meta(gt=0)] = 75.0
    """How long a connection stays open between two requests."""


class LimitOption(NamedTuple):
    """A limit as an option of `cifarx serve` and Ray Serve.

    Attributes:
        name: the name, with underscores and the unit.
        field: the field of `Limits` that the option sets.
        field_type: the type of the field, int or float.
        per_unit: the units of the option in one unit of the field.
        minimum: the smallest value within the bounds of the field.
        default: the value that leaves the field at its default.
        help: the help text.
    """

    name: str
    field: str
    field_type: type[int | float]
    per_unit: float
    minimum: int
    default: int
    help: str

    def to_field(self, value: int) -> int | float:
        """Return a value of the option in the unit of the field."""
        return value if self.per_unit == 1 else self.field_type(value / self.per_unit)


def limit_options() -> list[LimitOption]:
    """Return the options that set limits, in the order of the fields of `Limits`."""
    return [
        _limit_option(field, annotation)
        for field in msgspec.structs.fields(Limits)
        for annotation in get_args(field.type)[1:]
        if isinstance(annotation, Option)
    ]


def _limit_option(field: msgspec.structs.FieldInfo, option: Option) -> LimitOption:
    field_type, *annotations = get_args(field.type)
    (bounds,) = (annotation for annotation in annotations if isinstance(annotation, Meta))
    minimum = ceil((bounds.ge or 0) * option.per_unit)
    if bounds.gt is not None:
        minimum = floor(bounds.gt * option.per_unit) + 1
    return LimitOption(
        option.name or field.name,
        field.name,
        field_type,
        option.per_unit,
        minimum,
        round(field.default * option.per_unit),
        option.help,
    )


def limits_from_options(values: Mapping[str, int]) -> Limits:
    """Return limits with the given values of options, by name; other limits have their defaults."""
    options = [option for option in limit_options() if option.name in values]
    return msgspec.convert({option.field: option.to_field(values[option.name]) for option in options}, Limits)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a worker; the supervisor sends them as JSON.

    Attributes:
        files: the paths of the model files by key, as `files_by_name` returns them; the first model is the default.
        model_repository: a directory with models, see `scan_repository`; None for no model repository.
        model_control: whether the models of the repository are all loaded at the start, on request, or at the start and
            whenever the directory has changed.
        shadows: the files of models that answer a share of the requests of a model too, by the key of that model.
        shadow_share: the share of its requests.
        backend: the name of the backend; None to choose it by the file.
        device: where the models run, such as "auto", "cpu" or "cuda:0".
        threads: the number of CPUs that one worker computes with.
        registered_backends: the backends that are registered in the process that started the server.
        api_key_file: a file with one API key per line; None if no key is required.
        cors_origin: the origin whose pages may call the server from a browser; None for no cross-origin requests.
        certfile: the PEM certificate for TLS; set together with `keyfile`.
        keyfile: the private key of the certificate.
        access_log: whether each request is logged.
        root_path: the prefix under which a reverse proxy makes the server available, such as "/models".
        trusted_proxies: the networks of the reverse proxies whose headers are used, as `TrustedProxies` takes them.
        public_key: the file of the public key with which all model files must be signed; None if they need not be.
        otlp_endpoint: the URL of the collector for traces; None to record none.
        trace_share: the share of the traces that begin here to record, from 0 to 1; None for OpenTelemetry's default.
    """

    files: dict[str, str]
    model_repository: str | None = None
    model_control: ModelControlMode = "none"
    shadows: dict[str, str] = {}
    shadow_share: Annotated[float, Meta(gt=0, le=1)] = SHADOW_SHARE
    backend: str | None = None
    device: str = "auto"
    threads: Annotated[int, Meta(ge=1)] = 1
    registered_backends: tuple[RegisteredBackend, ...] = ()
    limits: Limits = Limits()
    api_key_file: str | None = None
    cors_origin: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    access_log: bool = True
    root_path: str = ""
    trusted_proxies: tuple[str, ...] = ()
    public_key: str | None = None
    otlp_endpoint: str | None = None
    trace_share: float | None = None
