"""The benchmark runs, and its loaders serve what is in the shards."""

from __future__ import annotations

import importlib.util
import json
import tarfile

import numpy as np
import pytest

from data_pipelines.benchmark import loaders, shards
from data_pipelines.benchmark.__main__ import main
from data_pipelines.image import decode


def test_shards_are_as_img2dataset_writes_them(tmp_path):
    shards.write_shards(tmp_path, 3, 64)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        names = tar.getnames()
        caption = tar.extractfile("000000001.txt").read().decode()
        assert json.load(tar.extractfile("000000001.json"))["caption"] == caption
        picture = tar.extractfile("000000001.jpg").read()
    assert names[:4] == ["000000000.jpg", "000000000.txt", "000000000.json", "000000001.jpg"]
    assert decode(picture).shape == (64, 64, 3)


def test_pictures_are_photo_like():
    """Most of the energy is in low frequencies, and they compress as photos do."""
    power = []
    for seed in range(4):
        pixels = shards.photo(np.random.default_rng(seed), 128, 128).mean(axis=2)
        power.append(np.abs(np.fft.rfft2(pixels - pixels.mean())) ** 2)
    mean = np.mean(power, axis=0)
    assert mean[:8, :8].mean() > 100 * mean[56:64, 56:64].mean()


# webdataset leaves its tars to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_measures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    small = ["--pictures", "70", "--side", "64", "--size", "48", "--rounds", "1"]
    assert main([*small, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["loaders"].keys() >= {"ours, 1 thread", "ours, 2 threads", "ours, exact"}
    has_webdataset = importlib.util.find_spec("webdataset") is not None
    assert ("webdataset, PIL, float32" in result["loaders"]) == has_webdataset
    assert all(t["cpu_ms"] > 0 for part in ("loaders", "stages") for t in result[part].values())
    assert all(0 < error <= 0.3 for error in result["errors"].values())
    assert "ours, exact" in capsys.readouterr().out


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main(["--shards", str(tmp_path)]) == 78
    assert "has no tars" in capsys.readouterr().err
    assert main(["--peer", "dali=python"]) == 78
    assert "open_clip or tensorflow" in capsys.readouterr().err
    shards.write_shards(tmp_path, 1, 64)
    assert main(["--shards", str(tmp_path), "--peer", "tensorflow=/no/python"]) == 78


def test_every_peer_has_its_script():
    for scripts in loaders.PEERS.values():
        for script, *_ in scripts.values():
            assert (loaders.SCRIPTS / script).exists()
