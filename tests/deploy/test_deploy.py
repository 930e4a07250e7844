"""What is in deploy/ against the schemas, linters and parsers that ordinary packages bring.

Not run here: building the image, the composition, Kubernetes itself (admission, scheduling, kustomize's own merge),
KubeRay's operator and Grafana. The kustomizations are resolved by these tests: resources in order, then the patches,
which are JSON patches (RFC 6902).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import promql_parser
import pytest
import yaml

from tools import dashboard, prometheus_rule
from vllm_rc_backend.observability.metrics import METRICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["base", "overlays/small", "overlays/large"]


def run(tool: str, *arguments: str | Path) -> None:
    """A validator's command line; its output is the failure's message."""
    command = [Path(sys.executable).parent / tool, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def load(file: Path) -> Any:
    """The only document of a YAML file."""
    return yaml.safe_load(file.read_text())


def test_yaml_style() -> None:
    run("yamllint", "--strict", "-c", DEPLOY / ".yamllint.yaml", DEPLOY)


def test_workflow() -> None:
    """GitHub's own schema; and it runs what CI runs."""
    file = ROOT / ".github" / "workflows" / "ci.yml"
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", file)
    steps = [step for job in load(file)["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]


def test_dockerfile() -> None:
    run("hadolint", DEPLOY / "docker" / "Dockerfile")


def test_dockerfile_copies_what_is_there() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    sources = [s for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for s in shlex.split(line)[:-1]]
    assert "vllm_rc_backend" in sources
    assert all((ROOT / source).exists() for source in sources)


def test_compose_file() -> None:
    file = DEPLOY / "docker" / "compose.yaml"
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    for service in load(file)["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in load(file)["volumes"] or (file.parent / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_composition_says_which_variables_it_needs() -> None:
    text = (DEPLOY / "docker" / "compose.yaml").read_text()
    command = next(line for line in text.splitlines() if line.endswith("compose.yaml up"))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == set(re.findall(r"(\w+)=", command)) == {"MODEL", "VLLM_API_KEY", "GRAFANA_PASSWORD"}


SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""What prometheus_client appends to the name of a metric of each kind."""


@functools.cache
def vllm_metrics() -> set[str]:
    """Names of the time series that vLLM's own source declares, by the kind of metric that it declares them as."""
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    text = "".join(file.read_text() for file in sorted(Path(folder, "v1", "metrics").glob("*.py")))
    kinds = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', text)
    return {name + suffix for kind, name in kinds for suffix in SUFFIXES[kind]}


def names_in(expression: str) -> Iterator[str]:
    """The metrics that a PromQL expression reads; raises if it is not PromQL."""
    for variable in ("$__rate_interval", "$instance"):
        expression = expression.replace(variable, "5m")

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node.name)

    found: list[str] = []
    promql_parser.walk(promql_parser.parse(expression), visit)
    assert found, expression
    yield from found


def exists(metric: str) -> bool:
    """Whether a server with this plugin, or Prometheus itself, has such a time series."""
    ours = {f"{m.name}_total" for m in METRICS}
    return metric in ours | vllm_metrics() | {"up"}


ALERTS = [rule for group in load(DEPLOY / "prometheus" / "alerts.yaml")["groups"] for rule in group["rules"]]
QUERIES = [query.promql for panels in dashboard.ROWS.values() for panel in panels for query in panel.queries]


@pytest.mark.parametrize("expression", [*(rule["expr"] for rule in ALERTS), *QUERIES])
def test_every_metric_that_is_asked_for_exists(expression: str) -> None:
    assert [name for name in names_in(expression) if not exists(name)] == []


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert list(names_in("rate(vllm_rc_topk_tokens_red_total[5m]) / vllm:num_requests_running")) == [
        "vllm_rc_topk_tokens_red_total",
        "vllm:num_requests_running",
    ]
    assert not exists("vllm_rc_topk_tokens_red_total")
    assert exists("vllm:num_requests_running")
    assert not exists("vllm:num_requests_running_total")
    assert exists("vllm:num_preemptions_total")
    assert not exists("vllm:num_preemptions")


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for query in QUERIES for name in names_in(query)}
    assert {f"{m.name}_total" for m in METRICS} <= shown


def test_alerts_and_metrics_are_documented() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert [metric.name for metric in METRICS if f"`{metric.name}`" not in operations] == []
    for rule in ALERTS:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert f"`{rule['alert']}`" in operations, rule["alert"]
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)


def test_prometheus_reads_these_alerts_and_scrapes_the_server() -> None:
    config = load(DEPLOY / "prometheus" / "prometheus.yaml")
    assert all((DEPLOY / "prometheus" / file).exists() for file in config["rule_files"])
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    ports = load(DEPLOY / "docker" / "compose.yaml")["services"][service]["ports"]
    assert any(published.endswith(f":{port}") for published in ports)
    assert {"job": job["job_name"]} == {"job": "vllm"}  # which the alerts name


def test_the_operator_gets_the_same_alerts() -> None:
    assert prometheus_rule.FILE.read_text() == prometheus_rule.page(), "run `make docs`"
    rule = load(prometheus_rule.FILE)
    assert rule["spec"]["groups"] == load(DEPLOY / "prometheus" / "alerts.yaml")["groups"]
    component = load(prometheus_rule.FILE.parent / "kustomization.yaml")
    assert all((prometheus_rule.FILE.parent / resource).exists() for resource in component["resources"])


def test_dashboard_is_current_and_laid_out() -> None:
    """Grafana's typed builders wrote it; here, that it is what they write now and that nothing overlaps."""
    assert dashboard.FILE.read_text() == dashboard.page(), "run `make docs`"
    panels = json.loads(dashboard.page())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
        references = [target["refId"] for target in panel.get("targets", ())]
        assert all(references)
        assert len(set(references)) == len(references)


def test_grafana_is_provisioned_with_what_the_composition_mounts() -> None:
    mounts = [
        v.split(":")[1] for v in load(DEPLOY / "docker" / "compose.yaml")["services"]["grafana"]["volumes"]
    ]
    (provider,) = load(DEPLOY / "grafana/provisioning/dashboards/rc-topk.yaml")["providers"]
    assert any(mount.startswith(provider["options"]["path"]) for mount in mounts)
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"


def resolve(folder: Path) -> dict[tuple[str, str], Any]:
    """The objects of a kustomization, by kind and name."""
    kustomization = load(folder / "kustomization.yaml")
    objects: dict[tuple[str, str], Any] = {}
    for resource in kustomization["resources"]:
        path = folder / resource
        if path.is_dir():
            objects |= resolve(path)
        else:
            loaded = load(path)
            objects[loaded["kind"], loaded["metadata"]["name"]] = loaded
    for patch in kustomization.get("patches", ()):
        key = patch["target"]["kind"], patch["target"]["name"]
        objects[key] = jsonpatch.apply_patch(objects[key], load(folder / patch["path"]))
    return objects


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_objects(overlay: str) -> None:
    for loaded in resolve(KUBERNETES / overlay).values():
        kubernetes_validate.validate(loaded, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str) -> None:
    pod = resolve(KUBERNETES / overlay)["Deployment", "vllm"]["spec"]["template"]["spec"]
    assert_restricted(pod)
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert container["resources"]["limits"].keys() >= {"memory", "nvidia.com/gpu"}
    # What must be writable under a read-only root, and a volume for every mount.
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/home/vllm/.cache", "/tmp", "/dev/shm"} <= set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
        assert container[probe]["httpGet"]["port"] in {port["name"] for port in container["ports"]}


def assert_restricted(pod: dict[str, Any]) -> None:
    """Kubernetes' Pod Security Standard `restricted`, which the namespace enforces; and no service links.

    For a service named vllm those would set VLLM_PORT to a URL, where vLLM expects a number.
    """
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_meet(overlay: str) -> None:
    objects = resolve(KUBERNETES / overlay)
    deployment = objects["Deployment", "vllm"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    for kind, path in (
        ("Service", ("selector",)),
        ("PodDisruptionBudget", ("selector", "matchLabels")),
        ("NetworkPolicy", ("podSelector", "matchLabels")),
    ):
        selector = functools.reduce(lambda part, key: part[key], path, objects[kind, "vllm"]["spec"])
        assert selector
        assert selector.items() <= labels
    claims = {v["persistentVolumeClaim"]["claimName"] for v in deployment["template"]["spec"]["volumes"]
              if "persistentVolumeClaim" in v}  # fmt: skip
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= set(objects)
    monitor = load(KUBERNETES / "components/monitoring/servicemonitor.yaml")["spec"]
    assert (
        monitor["selector"]["matchLabels"].items() <= objects["Service", "vllm"]["metadata"]["labels"].items()
    )


def ray_arguments() -> list[str]:
    """What the Ray Serve application passes to ``vllm serve``."""
    config = yaml.safe_load(load(DEPLOY / "ray" / "rayservice.yaml")["spec"]["serveConfigV2"])
    return list(config["applications"][0]["args"]["arguments"])


def container_arguments(overlay: str) -> list[str]:
    """What the Deployment passes to ``vllm serve``."""
    pod = resolve(KUBERNETES / overlay)["Deployment", "vllm"]["spec"]["template"]["spec"]
    return list(pod["containers"][0]["args"])


def compose_arguments() -> list[str]:
    """What the composition passes to ``vllm serve``, with the defaults of its variables."""
    text = json.dumps(load(DEPLOY / "docker" / "compose.yaml")["services"]["vllm"]["command"])
    text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", text)
    return list(json.loads(re.sub(r"\$\{\w+:\?[^}]+\}", "a-model", text)))


@pytest.mark.parametrize(
    "arguments",
    [*(container_arguments(o) for o in OVERLAYS), compose_arguments(), ray_arguments()],
    ids=[*OVERLAYS, "compose", "ray"],
)
def test_vllm_takes_these_arguments(arguments: list[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_rc_backend.config import RCTopKConfig
    from vllm_rc_backend.plugin import register

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args([f"--model={arguments[0]}", *arguments[1:]])
    assert parsed.attention_backend == "rc_topk"
    assert RCTopKConfig.from_additional_config(parsed.additional_config).budget >= 1024


def test_ray_service() -> None:
    """Ray's own schema for what Ray Serve reads; Kubernetes' for the pods inside. KubeRay's schema is not at hand."""
    from ray.serve.schema import ServeDeploySchema

    loaded = load(DEPLOY / "ray" / "rayservice.yaml")
    assert (loaded["apiVersion"], loaded["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(loaded["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    cluster = loaded["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    policy = load(DEPLOY / "ray" / "networkpolicy.yaml")
    for group in groups:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            "spec": group["template"]["spec"],
        }
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert_restricted(pod["spec"])
        assert group["template"]["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    (workers,) = cluster["workerGroupSpecs"]
    per_node = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    arguments = application.args["arguments"]
    ranks = int(arguments[arguments.index("--tensor-parallel-size") + 1])
    assert application.args["gpus"] == ranks <= per_node
    assert application.args["replicas"] * ranks <= per_node * workers["replicas"]
    module, _, builder = application.import_path.partition(":")
    source = (DEPLOY / "ray" / f"{module}.py").read_text()
    assert f"def {builder}(" in source
