"""Runs in processes of their own, for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.forked import Nursery, nursery_in


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery_in(tmp_path_factory.mktemp("nursery")) as started:
        yield started
