"""``python -m internvl_torch.server``: serves an exported folder over HTTP."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any

EXIT_CONFIG = 78
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
CONNECTIONS = 1024
"""Open connections; more are answered with 503."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m internvl_torch.server",
        description=__doc__,
        epilog="Stops on SIGTERM or Ctrl-C after it has answered what it has accepted. "
        "Exit status: 0 stopped, 78 it could not start.",
    )
    top.add_argument(
        "--model", metavar="DIR", type=Path, help="an exported folder (the one this lies in)"
    )
    top.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    top.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    top.add_argument("--device", help="cuda, cpu ... (the best there is)")
    top.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(as stored)")
    top.add_argument("--api-key-file", metavar="F", type=Path, help="keys, one a line")
    top.add_argument("--max-batch", type=int, default=16, help="items in a batch (%(default)s)")
    top.add_argument(
        "--max-wait-ms", type=float, default=5, help="wait for a batch to fill (%(default)s)"
    )
    top.add_argument("--max-queue", type=int, default=256, help="items that wait (%(default)s)")
    top.add_argument("--max-images", type=int, default=16, help="of a request (%(default)s)")
    top.add_argument("--max-image-mb", type=int, default=10, help="of a file (%(default)s)")
    top.add_argument(
        "--max-image-pixels", type=int, default=40_000_000, help="of a picture (%(default)s)"
    )
    top.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (%(default)s)")
    top.add_argument(
        "--timeout-s", type=float, default=60, help="from body to answer (%(default)s)"
    )
    return top


def main(argv: list[str] | None = None) -> int:
    """Serves until told to stop; returns the exit status."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        import uvicorn

        from .api import Api, application
        from .batching import Queue
        from .limits import Limits
    except ImportError as error:
        print(f"{error}: install what serving needs, fastapi and uvicorn.", file=sys.stderr)
        return EXIT_CONFIG
    try:
        if not 0 <= arguments.port < 1 << 16:
            raise ValueError(f"--port {arguments.port} is no port: use 0 to 65535.")
        keys = read_keys(arguments.api_key_file) if arguments.api_key_file else []
        limits = Limits(
            image_bytes=arguments.max_image_mb << 20,
            image_pixels=arguments.max_image_pixels,
            images=arguments.max_images,
            new_tokens=arguments.max_new_tokens,
            seconds=arguments.timeout_s,
        )
        queue = Queue(arguments.max_batch, arguments.max_wait_ms / 1000, arguments.max_queue)
        api = Api(load(arguments), limits, queue)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    if arguments.host not in LOOPBACK and not keys:
        print(
            f"Anyone who reaches {arguments.host} can use this server: give --api-key-file, or let "
            "only a proxy that asks for credentials reach it.",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        application(api, keys),
        host=arguments.host,
        port=arguments.port,
        # This parser bounds the headers; nothing here speaks WebSocket or trusts a proxy's headers.
        http="h11",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(arguments.timeout_s) + 1,
    )
    # uvicorn stops in good order on these, then raises them again: that is how its caller is told.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    except SystemExit:  # it has said why it cannot listen
        return EXIT_CONFIG
    return 0


def load(arguments: argparse.Namespace) -> Any:
    """The engine."""
    from ..engine import Engine

    folder = arguments.model or Path(__file__).parents[2]
    return Engine.load(folder, device=arguments.device, dtype=arguments.dtype)


def read_keys(file: Path) -> list[str]:
    """The keys in a file, one a line; empty lines don't count.

    Raises:
        ValueError: if there is none.
        OSError: if the file cannot be read.
    """
    keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{file} holds no key: write one a line, or leave --api-key-file out.")
    return keys


if __name__ == "__main__":
    sys.exit(main())
