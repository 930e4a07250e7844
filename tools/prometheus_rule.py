"""Write the alert rules of ``deploy/prometheus`` as the Prometheus operator takes them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from tools.generated import write_or_check

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
FILE = DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml"

HEAD = """\
# Written by `make docs` from deploy/prometheus/alerts.yaml. Do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm
spec:
"""


def page() -> str:
    """The whole file: the groups as they stand there."""
    text = ALERTS.read_text()
    return HEAD + textwrap.indent(text[text.index("groups:") :], "  ")


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, page, __doc__))
