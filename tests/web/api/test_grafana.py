"""The Grafana dashboard asks for metrics and labels that the portal has, and for nothing else."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from core import metrics
from core.roles import Role
from tests.support.harness import api_as

BOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "onboarding.json"
SELECTED = re.compile(r"(portal_[a-z_]+)\{([^}]*)\}")
GROUPED = re.compile(r"by \(([a-z, ]+)\) \(")
OF_PROMETHEUS = {"job", "le"}  # labels that are not the portal's


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.fixture
def served(app: Flask) -> dict[str, set[str]]:
    """The labels of each sample of ``/metrics``, after each thing that is counted by labels has happened."""
    counts = metrics.counts
    counts.registrations.labels(key="portal").inc(0)
    counts.renewals.labels(by="device").inc(0)
    counts.passes.labels(outcome="done").inc(0)
    counts.ocsp.labels(answer="good", kept="no").inc(0)
    counts.events.labels(outcome="delivered").inc(0)
    counts.refusals.labels(code="not_found").inc(0)
    api_as(app, Role.SYSTEM).get("/devices")
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(api_as(app, Role.SYSTEM).get("/metrics").text):
        found[family.name + ("_total" if family.type == "counter" else "")] |= set()  # there, perhaps without a value
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


@pytest.mark.parametrize("query", queries())
def test_metrics_has_each_metric_and_label_of_a_query(served: dict[str, set[str]], query: str) -> None:
    asked = SELECTED.findall(query)
    assert asked
    assert len(asked) == query.count("portal_"), "a metric without the choice of a job"
    grouped = {label for labels in GROUPED.findall(query) for label in labels.split(", ")}
    for name, selectors in asked:
        assert name in served
        labels = set(re.findall(r"(\w+)(?:=|!=)", selectors)) | grouped
        assert labels - OF_PROMETHEUS <= served[name], name


def test_the_dashboard_says_what_each_figure_is_and_needs_no_source_of_a_certain_name() -> None:
    board = json.loads(BOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels():
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${source}"}
    legends = {
        word
        for query in re.findall(r'"legendFormat": "(.*)"', BOARD.read_text())
        for word in re.findall(r"{{(\w+)}}", query)
    }
    assert legends <= {
        label for query in queries() for labels in GROUPED.findall(query) for label in labels.split(", ")
    }
