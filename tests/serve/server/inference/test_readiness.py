import asyncio
from pathlib import Path

import pytest

from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Settings
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model


def test_a_stuck_pool_is_reported_once_the_models_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_faulty_backend(monkeypatch)
    path = write_faulty_model(tmp_path / "a.faulty")

    async def run() -> None:
        repository = ModelRepository(Settings(files={"a": str(path)}, device="cpu"), Metrics())
        decoder = ImageDecoder(1, 1)
        readiness = Readiness(repository, decoder)
        stuck = False
        monkeypatch.setattr(ImageDecoder, "is_stuck", property(lambda _: stuck))
        assert readiness.state == "starting"
        await repository.open()
        assert readiness.state == "ready"
        stuck = True
        assert readiness.state == "overloaded"
        repository.draining = True
        assert readiness.state == "draining"
        await repository.close()
        decoder.close()

    asyncio.run(run())
