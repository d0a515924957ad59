"""What every call must pass before the service sees it: the bearer token, and a message that can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health

from revseg_jax.errors import InputError
from revseg_jax.tracker.security import same_token

OPEN_TO_ALL = f"/{health.SERVICE_NAME}/"  # probes carry no token and learn only whether the sidecar serves


class Guard(grpc.ServerInterceptor):
    """Refuses calls without the token, if there is one: UNAUTHENTICATED. An unreadable message: INVALID_ARGUMENT.

    refused: told the method of each call that is turned away for its token.
    """

    def __init__(self, token: str | None, refused: Callable[[str], None] = lambda method: None):
        self._token, self._refused = token, refused

    def intercept_service(self, continuation, details):
        open_to_all = self._token is None or details.method.startswith(OPEN_TO_ALL)
        if not open_to_all and not same_token(details.invocation_metadata, self._token):
            self._refused(details.method)
            return grpc.stream_stream_rpc_method_handler(_refuse)  # answers before any message is read
        handler = continuation(details)
        return handler and _readable(handler)


def _refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token, or not the one that this sidecar wants")


def _readable(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler, but an unreadable message is the sender's fault (gRPC calls it INTERNAL and logs a traceback)."""
    parse = handler.request_deserializer

    def read(data: bytes) -> Message | DecodeError:
        try:
            return parse(data)
        except DecodeError as error:
            return error

    def all_read(requests: Iterator[Message | DecodeError]) -> Iterator[Message]:
        for request in requests:
            if isinstance(request, DecodeError):
                raise InputError("request: not a message of this method")
            yield request

    def one(request: Message | DecodeError, context: grpc.ServicerContext):
        if isinstance(request, DecodeError):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request: not a message of this method")
        return (handler.unary_unary or handler.unary_stream)(request, context)

    def many(requests: Iterator[Message | DecodeError], context: grpc.ServicerContext):
        return (handler.stream_unary or handler.stream_stream)(all_read(requests), context)

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, one),
        (False, True): (grpc.unary_stream_rpc_method_handler, one),
        (True, False): (grpc.stream_unary_rpc_method_handler, many),
        (True, True): (grpc.stream_stream_rpc_method_handler, many),
    }
    make, behaviour = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour, read, handler.response_serializer)
