"""Plans as of a machine without a card: of an H100, whatever these tests run on."""

import pytest


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setattr("qwen3f.plan.config.this_card", lambda: None)
