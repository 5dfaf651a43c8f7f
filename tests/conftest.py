"""Fixtures: the golden checkpoints, the golden vectors, and the shipped checkpoint."""

import json
import os
import shutil
import sys
from pathlib import Path

# several OpenMP threads wait for each other where anything else wants a core; subprocesses inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny"), str(Path(__file__).parent)]

import golden_checkpoints  # noqa: E402

from checkpoint import load  # noqa: E402


def golden(name: str) -> dict:
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())


def write_files(folder: Path, files: dict[str, bytes | str | dict]) -> None:
    """Files by name; a dict becomes JSON."""
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def change_config(folder: Path, **changes) -> dict:
    """Change keys of a checkpoint's config.json, and return its contents."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    write_files(folder, {"config.json": raw})
    return raw


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Golden checkpoint folders by name; tests that change files copy them first."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {name: golden_checkpoints.build(base / name, name) for name in golden_checkpoints.VARIANTS}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of the untied golden checkpoint that a test may damage."""
    return shutil.copytree(folders["untied"], tmp_path / "copy")


@pytest.fixture(scope="session")
def golden_models(folders) -> dict:
    return {name: load(folder, "cpu")[0] for name, folder in folders.items()}


@pytest.fixture(scope="session")
def untied(golden_models):
    return golden_models["untied"]


@pytest.fixture(scope="session")
def tied(golden_models):
    return golden_models["tied"]


@pytest.fixture(scope="session")
def shipped():
    """(model, tokenizer) of the shipped checkpoint."""
    return load(ROOT / "tiny" / "checkpoint", "cpu")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
