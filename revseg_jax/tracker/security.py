"""Who may talk to a sidecar: TLS files and bearer tokens, on both sides. No torch here."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from revseg_jax.errors import InputError

SHORTEST_TOKEN = 16  # characters
TOKEN_KEY = "authorization"  # of the call's metadata; its value is "Bearer TOKEN"


@dataclass(frozen=True)
class TLS:
    """What a client needs to talk to a sidecar over TLS: PEM files.

    ca: the authority that signed the sidecar's certificate; None takes the public ones that gRPC ships.
    certificate, key: the client's own, for a sidecar that asks for one (mutual TLS).

    Raises InputError when a file is missing or unfit, or only one of the two is given.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self):
        _check_files(self.ca, self.certificate, self.key)

    def credentials(self) -> grpc.ChannelCredentials:
        ca, certificate, key = (file and Path(file).read_bytes() for file in (self.ca, self.certificate, self.key))
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True)
class ServerTLS:
    """A sidecar's certificate and key, PEM files. client_ca: the authority that signed those of the clients it serves;
    with it a client without a certificate is turned away (mutual TLS). Raises InputError as `TLS` does."""

    certificate: str | Path
    key: str | Path
    client_ca: str | Path | None = None

    def __post_init__(self):
        _check_files(self.client_ca, self.certificate, self.key)

    def credentials(self) -> grpc.ServerCredentials:
        pair = Path(self.key).read_bytes(), Path(self.certificate).read_bytes()
        ca = Path(self.client_ca).read_bytes() if self.client_ca else None
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def read_token(path: str | Path) -> str:
    """The bearer token in a file, without the white space around it. Raises InputError."""
    try:
        return check_token(Path(path).read_text("ascii").strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain ASCII"
        raise InputError(f"token file {path} cannot be read: {reason}") from None
    except InputError as error:
        raise InputError(f"token file {path}: {error}") from None


def check_token(token: str) -> str:
    if len(token) < SHORTEST_TOKEN or not all("!" <= character <= "~" for character in token):
        raise InputError(f"a token has at least {SHORTEST_TOKEN} characters, all of them visible ASCII")
    return token


def refuse_exposure(host: str, tls: ServerTLS | None, token: str | None) -> None:
    """Raises InputError when `host` can be reached from other machines and not both of TLS and a token protect it."""
    if (tls is None or token is None) and not is_loopback(host):
        missing = " and ".join(name for name, given in (("TLS", tls), ("a token", token)) if given is None)
        raise InputError(
            f"listening on {host} without {missing} would serve anyone who can reach it: give --tls-certificate, "
            f"--tls-key and --token-file, listen on 127.0.0.1, or say --insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether every address of a host name is of this machine alone. The empty name means all interfaces."""
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(entry[4][0].split("%")[0]).is_loopback for entry in found)


def channel(address: str, tls: TLS | None, token: str | None, options: list[tuple[str, int]]) -> grpc.Channel:
    """A channel to "host:port". Raises InputError for a token that would travel readable to another machine."""
    if tls is None and token is not None and not is_loopback(address.rpartition(":")[0].strip("[]")):
        raise InputError(f"a token is sent to {address} only over TLS: give tls too (tracker.tls_ca)")
    if tls is None:
        opened = grpc.insecure_channel(address, options=options)
    else:
        opened = grpc.secure_channel(address, tls.credentials(), options=options)
    return opened if token is None else grpc.intercept_channel(opened, _Token(check_token(token)))


def same_token(metadata: tuple[tuple[str, str | bytes], ...] | None, token: str) -> bool:
    """Whether a call's metadata carries the token; takes as long for a nearly right one as for any other."""
    given = [value for key, value in metadata or () if key == TOKEN_KEY]
    expected = f"Bearer {token}".encode()
    given = given[0] if len(given) == 1 else b""
    return hmac.compare_digest(given.encode() if isinstance(given, str) else given, expected)


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    """Adds the token to every call. (gRPC's own call credentials refuse a channel without TLS, even to loopback.)"""

    def __init__(self, token: str):
        self._entry = (TOKEN_KEY, f"Bearer {token}")

    def _add(self, continuation, details: grpc.ClientCallDetails, request):
        return continuation(details._replace(metadata=[*(details.metadata or ()), self._entry]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _add


def _check_files(ca: str | Path | None, certificate: str | Path | None, key: str | Path | None) -> None:
    """gRPC would only fail at the first handshake, without saying which file is to blame."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if (certificate is None) != (key is None):
        raise InputError("a TLS certificate and its key go together: only one of them is given")
    try:
        if certificate is not None:
            what = f"TLS certificate {certificate} with key {key}"
            context.load_cert_chain(certificate, key, password=lambda: b"")  # or it would ask on the terminal
        if ca is not None:
            what = f"TLS certificate authority {ca}"
            context.load_verify_locations(ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InputError(f"{what} cannot be used: {error.strerror or error}") from None
