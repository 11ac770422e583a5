"""These tests plan as on a machine without a card, so for an H100, whatever they run on."""

import pytest


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setattr("qwen3f.plan.config.this_card", lambda: None)
