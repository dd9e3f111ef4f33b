"""``python -m internvl_torch.server``: how it starts, refuses to start and stops."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from internvl_jax.convert.runtime.server import __main__ as door

# An engine that can do nothing, in place of the one that needs torch and weights.
START = """
import sys
from internvl_jax.convert.runtime.server import __main__ as door

class Engine:
    name, abilities = "none", frozenset()
    settings = prompt = decode_image = None
    embed_image = embed_text = score = caption = chat = None

door.load = lambda arguments: Engine()
sys.exit(door.main(sys.argv[1:]))
"""


def started(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START, *argv], stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one-key\n\nanother\n")
    with started("--port", "0", "--api-key-file", str(keys)) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                pytest.fail("It did not start.")
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
            connection.request("GET", "/v1/models")
            assert connection.getresponse().status == 401
            connection.close()
            connection.request("GET", "/v1/models", headers={"Authorization": "Bearer another"})
            assert connection.getresponse().status == 200
            connection.close()
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(20) == 0 and "one-key" not in rest and "Traceback" not in rest
        finally:
            process.kill()


def test_a_port_in_use_ends_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with started("--port", str(taken.getsockname()[1])) as process:
            _, said = process.communicate(timeout=30)
    assert process.returncode == 78 and "in use" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--api-key-file", "missing"], "missing"),
        (["--api-key-file", "empty"], "holds no key"),
        (["--max-images", "0"], "images"),
        (["--max-image-mb", "-1"], "image"),
        (["--timeout-s", "inf"], "seconds"),
        (["--max-batch", "0"], "max_batch"),
        (["--port", "70000"], "port"),
    ],
)
def test_what_it_cannot_use_is_a_sentence(
    argv: list[str], word: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    monkeypatch.setattr(door, "load", lambda arguments: pytest.fail("the model was loaded"))
    assert door.main(argv) == 78
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1
