"""An application behind a socket."""

import socket

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """
    uvicorn, which says where it listens once it does, also where the port was chosen by the system.

    Args:
        app: as `create_app` makes it.
        model_name: what clients call the model.
        host, port: where to listen; port 0: one that is free.
        shutdown_timeout: seconds that running requests have to end.
        log_level: of uvicorn.

    Raises:
        OSError: nobody can listen there.
    """

    def __init__(
        self, app: FastAPI, model_name: str, host: str, port: int, shutdown_timeout: int, log_level: str
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level=log_level, access_log=False, timeout_graceful_shutdown=shutdown_timeout, lifespan="on"
            )
        )
        self.model_name = model_name
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise OSError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error
        self.port: int = self.socket.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.port}/v1"

    def serve_until_stopped(self) -> None:
        """Returns after SIGTERM or Ctrl-C, when what was begun has ended; uvicorn raises the signal again."""
        self.run(sockets=[self.socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            print(f"Serving {self.model_name} at {self.url} (Ctrl-C stops)", flush=True)  # noqa: T201


__all__ = ["Server"]
