"""Settings of the server, read from one strict YAML file. No FastAPI, no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dvpa.architecture import find_config, load_yaml
from dvpa.engine.config import EngineConfig
from dvpa.engine.escalation import EscalationParams

KEYS_VARIABLE = "DVPA_API_KEYS"  # comma separated
MIN_KEY_LENGTH = 8
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the server runs; the defaults suit one machine behind a proxy.

    `api_keys` are never printed. Sizes are bytes, times seconds.

    Raises:
        ValueError: a field is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    model_name: str | None = None  # None: the checkpoint folder's name
    dtype: str = "auto"
    threads: int | None = None  # CPU threads of the engine; None: PyTorch's default
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_queue=256))
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    metrics_need_key: bool = False
    cors_origins: tuple[str, ...] = ()  # none: browsers elsewhere may not ask
    max_body_bytes: int = 2**20
    max_connections: int = 1024
    max_output_tokens: int | None = None  # of one completion; None: the context
    max_n: int = 16
    header_timeout_s: float = 10.0  # to send the request line and headers
    body_timeout_s: float = 30.0  # to send the body
    request_timeout_s: float | None = 600.0  # after it, what was generated is returned
    drain_s: float = 30.0  # how long running requests may go on after SIGTERM
    retry_after_s: int = 1
    telemetry_size: int = 1000  # requests that /v1/dvpa/telemetry remembers
    access_log: bool = True
    shadow_share: float = 0.0  # of routed requests that every tier answers again, for calibration
    dashboard: bool = True
    report: str | None = None  # calibration report; None: report.json beside the checkpoint folder
    otel_endpoint: str | None = None  # OTLP over HTTP; needs dvpa[otel]

    def __post_init__(self) -> None:
        """Check every field."""
        _check_whole("port", self.port, 0, 65535)
        for name in ("max_body_bytes", "max_connections", "max_n", "retry_after_s"):
            _check_whole(name, getattr(self, name), 1, 2**40)
        _check_whole("telemetry_size", self.telemetry_size, 1, 10_000)
        for name in ("threads", "max_output_tokens"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1, 2**31)
        for name in ("header_timeout_s", "body_timeout_s"):
            _check_seconds(name, getattr(self, name), positive=True)
        _check_seconds("drain_s", self.drain_s, positive=False)
        if self.request_timeout_s is not None:
            _check_seconds("request_timeout_s", self.request_timeout_s, positive=True)
        share = self.shadow_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"shadow_share: {share!r} must be a number in 0 .. 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} must be one of {', '.join(DTYPES)}")
        for name in ("host", "model_name", "api_key_file", "report", "otel_endpoint"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (value is None and name != "host"):
                raise ValueError(f"{name}: {value!r} must be a non-empty string")
        for name in ("metrics_need_key", "access_log", "dashboard"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be true or false")
        for origin in self.cors_origins:
            if not isinstance(origin, str) or not origin.startswith(("http://", "https://")):
                raise ValueError(
                    f"cors_origins: {origin!r} must be an origin such as https://example.org "
                    "(not a wildcard)"
                )
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable():
                raise ValueError(
                    f"api_keys: a key of {len(key)} characters must be {MIN_KEY_LENGTH} or more "
                    "printable ASCII characters"
                )


def load_serve_config(path: str | Path | None = None, **overrides: Any) -> ServeConfig:
    """The file's settings, then `overrides`, then the keys of file and environment.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key, a wrong value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        where = find_config(path)
        try:
            values = _checked(load_yaml(where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    values |= {name: value for name, value in overrides.items() if value is not None}
    config = ServeConfig(**values)
    return replace(config, api_keys=(*config.api_keys, *read_keys(config.api_key_file)))


def read_keys(api_key_file: str | None) -> tuple[str, ...]:
    """API keys of the file (one a line, # for comments) and of the environment.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is none in it.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if api_key_file is not None:
        lines = Path(api_key_file).read_text(encoding="utf-8").splitlines()
        named = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(named):  # it was meant to be closed
            raise ValueError(f"api_key_file: {api_key_file} holds no key")
        keys += named
    return tuple(dict.fromkeys(key for key in keys if key))


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Known keys only; lists become tuples, sections their dataclasses."""
    # Keys do not belong into a file that is shown to colleagues and kept in version control.
    known = {item.name for item in fields(ServeConfig)} - {"api_keys"}
    _check_known("", values, known)
    checked = dict(values)
    origins = checked.get("cors_origins", [])
    if not isinstance(origins, list):
        raise ValueError(f"cors_origins: {origins!r} must be a list")
    checked["cors_origins"] = tuple(origins)
    engine = checked.get("engine", {})
    if not isinstance(engine, Mapping):
        raise ValueError(f"engine: {engine!r} must be a mapping")
    _check_known("engine.", engine, {item.name for item in fields(EngineConfig)})
    engine = {"max_queue": 256, **engine}
    if engine.get("escalation") is not None:
        escalation = engine["escalation"]
        if not isinstance(escalation, Mapping):
            raise ValueError(f"engine.escalation: {escalation!r} must be null or a mapping")
        known = {item.name for item in fields(EscalationParams)}
        _check_known("engine.escalation.", escalation, known)
        engine["escalation"] = EscalationParams(**escalation)
    try:
        checked["engine"] = EngineConfig(**engine)
    except ValueError as error:
        raise ValueError(f"engine.{error}") from error
    return checked


def _check_known(prefix: str, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(
            f"unknown key {', '.join(prefix + key for key in unknown)}; allowed: "
            f"{', '.join(sorted(known))}"
        )


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} must be a whole number in {low} .. {high}")


def _check_seconds(name: str, value: Any, positive: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1e9 or (value == 0 and not positive)):
        least = "above 0" if positive else "0 or more"
        raise ValueError(f"{name}: {value!r} must be a number of seconds, {least}")
