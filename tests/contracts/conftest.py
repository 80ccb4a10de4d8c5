"""One tiny model of every kind, written once for all contract tests."""

from __future__ import annotations

import pytest

from tests.contracts.tiny_models import TINY_MODELS, TinyModel


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], TinyModel]:
    root = tmp_path_factory.mktemp("tiny_models")
    return {one: TinyModel(root, *one) for one in TINY_MODELS}


@pytest.fixture(params=TINY_MODELS, ids=["-".join(one) for one in TINY_MODELS])
def tiny_model(
    tiny_models: dict[tuple[str, str], TinyModel], request: pytest.FixtureRequest
) -> TinyModel:
    return tiny_models[request.param]
