"""What the doctor measures at a real RabbitMQ, which no interface of it says."""

from __future__ import annotations

import pytest

from operations.doctor.doctor import CHECKS, examine
from operations.wiring import utc_now
from tests.support.rabbitmq import is_installed
from tests.support.rabbitmq_site import RabbitmqSite

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(not is_installed(), reason="rabbitmq-server is not installed"),
]
GUEST = {"password": "guest", "tags": "administrator"}


def said_of_rabbitmq(site: RabbitmqSite) -> dict[str, str]:
    checks = tuple(named for named in CHECKS if "RabbitMQ" in named[0] or named[0] == "probe certificates")
    found = {finding.name: finding for finding in examine(site.settings, utc_now, checks=checks)}
    assert len(found) == 4
    return {name: finding.detail for name, finding in found.items() if finding.advice}


def test_a_node_as_it_is_installed_is_well_but_for_the_user_of_every_installation() -> None:
    with RabbitmqSite() as site:
        [node] = site.cluster.nodes
        site.cluster.wait_for(lambda: "mem_alarm" in node.get("/api/nodes")[0])
        assert said_of_rabbitmq(site) == {}
        node.ask("PUT", "/api/users/guest", GUEST)
        assert said_of_rabbitmq(site) == {
            "RabbitMQ nodes": "RabbitMQ has the user guest, with which it was installed, and admits it by its default"
            f" password at {node.name}."
        }


def test_a_node_that_waits_for_answers_and_believes_them_for_longer_is_found_out() -> None:
    longer = {"auth_cache.cache_ttl": "2500", "auth_http.request_timeout": "2500"}
    with RabbitmqSite(options=longer) as site:
        [node] = site.cluster.nodes
        site.cluster.wait_for(lambda: "mem_alarm" in node.get("/api/nodes")[0])
        assert said_of_rabbitmq(site) == {
            "RabbitMQ times": f"{node.name} believes answers for longer than 1 s."
            f" {node.name} waits for an answer for longer than 1 s."
        }
