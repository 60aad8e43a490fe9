"""Reads what the portal tells Prometheus, by Prometheus's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """Every sample by its name and labels; fails if one is there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value_of(samples: Samples, name: str, **labels: str) -> float:
    """One sample's value, 0 where it is not there: a counter that has not begun."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def total_of(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all samples of that name that have these labels, among others."""
    return sum(value for (of, having), value in samples.items() if of == name and having >= set(labels.items()))
