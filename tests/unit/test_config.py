"""Options: every refusal names the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from vllm_rc_backend.config import KEY, OptionError, RCTopKConfig

REFUSED = {
    "budget": [0, -1, 0.0, -0.5, 1.5, "2048", True, None, float("nan"), float("inf")],
    "sink_tokens": [-16, 8, 17, 16.0, "16", True],
    "tail_tokens": [0, -1, 64.0, None],
    "page_size": [0, 8, 24, 256, 16.0, "16"],
    "selection": ["quest", "", None, "Box"],
    "selection_weight": [-0.1, 4.1, "1", True, float("nan")],
    "group_rule": ["min", None],
    "completion": ["linaer", 3],
    "features_file": ["maps.safetensors", 3, ""],
    "statistics_bits": [4, 32, 2.0, "8"],
    "dense_threshold": [-1, 0.5],
    "dense_layers": [[-1], [0.5], "0", 3, [True]],
    "summary_slots": [0, -1, 2.0],
    "kv_residency": ["disk", None],
    "host_kv_gib": [0, -1, "64", True, float("inf"), 64],
    "page_cache_gib": [-1, "4", True, float("nan"), 4],
    "log_requests": [1, "yes", None],
    "log_interval": [-1, float("inf"), "10", True, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(n, v, id=f"{n}={v!r}") for n, values in REFUSED.items() for v in values]
)
def test_refusal_names_key_value_and_allowed(name: str, value: object) -> None:
    with pytest.raises(OptionError) as error:
        RCTopKConfig.from_mapping({name: value})
    message = str(error.value)
    assert message.startswith(f"--additional-config.{KEY}.{name}: got {value!r}; allowed: ")
    assert re.search(r"allowed: \S+", message)


def test_a_dense_layer_must_be_in_the_model() -> None:
    config = RCTopKConfig(dense_layers=(0, 6))
    config.check_layers(7)
    RCTopKConfig().check_layers(1)
    with pytest.raises(OptionError, match=r"dense_layers: got \[0, 6\]; allowed: layers 0 to 5"):
        config.check_layers(6)


def test_every_option_has_refusals_tested() -> None:
    assert set(REFUSED) == set(RCTopKConfig.names())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 1 / 32},
        {"budget": 4096},
        {"budget": 512.0},
        {"sink_tokens": 0, "tail_tokens": 2, "budget": 33},
        {"page_size": 32, "sink_tokens": 32},
        {"selection": "mean_var", "selection_weight": 1},
        {"selection": "oracle", "group_rule": "softmax", "completion": "none"},
        {"dense_layers": [0, 1], "dense_threshold": 4096, "statistics_bits": 8, "summary_slots": 3},
        {"group_rule": "share"},
        {"selection": "moba", "group_rule": "share", "completion": "linear"},
        {"log_requests": True},
        {"log_interval": 0},
        {"kv_residency": "host", "host_kv_gib": 0.5},
        {"kv_residency": "host", "host_kv_gib": 64, "page_cache_gib": 0},
        {"completion": "features", "features_file": "maps.safetensors"},
    ],
    ids=str,
)
def test_accepted_and_survives_json(options: dict[str, object]) -> None:
    config = RCTopKConfig.from_mapping(options)
    again = RCTopKConfig.from_mapping(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    for name, value in options.items():
        kept = getattr(config, name)
        assert (list(kept) if isinstance(kept, tuple) else kept) == value


def test_unknown_option_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"rc_topk\.budgte: got 3; .*sink_tokens.* Did you mean budget\?"):
        RCTopKConfig.from_mapping({"budgte": 3})


def test_options_that_are_no_object() -> None:
    with pytest.raises(ValueError, match=r"rc_topk: got \['budget'\]; allowed: a JSON object"):
        RCTopKConfig.from_additional_config({KEY: ["budget"]})


@pytest.mark.parametrize("name", ["budget", "rc-topk", "RC_TOPK", "rc_topk_options"])
def test_options_in_the_wrong_place(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got .*; allowed: .* in an object named rc_topk"):
        RCTopKConfig.from_additional_config({name: {"budget": 512}})
    assert RCTopKConfig.from_additional_config({"of another plugin": 1}) == RCTopKConfig()
    assert RCTopKConfig.from_additional_config({name: 1, KEY: {"budget": 512}}).budget == 512


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"host_kv_gib: got None; allowed: a number above 0 with kv_residency=host"),
        ({"host_kv_gib": 0}, r"host_kv_gib: got 0; allowed: a number above 0 with kv_residency=host"),
        ({"host_kv_gib": 1, "page_cache_gib": -1}, r"page_cache_gib: got -1; allowed: a number from 0 up"),
        (
            {"host_kv_gib": 1, "selection": "oracle"},
            r"kv_residency: got 'host'; allowed: gpu with selection=oracle. It reads every key",
        ),
        (
            {"host_kv_gib": 1, "dense_layers": [0]},
            r"dense_layers: got \(0,\); allowed: \[\] with kv_residency=host",
        ),
    ],
    ids=str,
)
def test_what_pages_in_host_memory_need(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        RCTopKConfig.from_mapping({"kv_residency": "host", **options})


def test_budget_below_anchors_and_one_page() -> None:
    smallest = RCTopKConfig().smallest_budget
    assert RCTopKConfig(budget=smallest).budget == smallest
    with pytest.raises(OptionError, match=f"allowed: {smallest} or more with sink_tokens=16, tail_tokens=16"):
        RCTopKConfig(budget=smallest - 1)


@pytest.mark.parametrize("selection", ["box", "mean_var"])
def test_share_contradicts_scores_that_are_no_masses(selection: str) -> None:
    with pytest.raises(
        OptionError,
        match=rf"group_rule: got 'share'; allowed: max, mean, sum, softmax with selection={selection}. "
        "Policies whose scores estimate a page's mass: moba, oracle, runs.",
    ):
        RCTopKConfig.from_mapping({"selection": selection, "group_rule": "share"})


@pytest.mark.parametrize("selection", ["moba", "oracle"])
def test_weight_contradicts_policies_without_one(selection: str) -> None:
    with pytest.raises(
        OptionError, match=rf"selection_weight: got 1; allowed: null with selection={selection}"
    ):
        RCTopKConfig.from_mapping({"selection": selection, "selection_weight": 1})


def test_slots_contradict_no_completion() -> None:
    with pytest.raises(OptionError, match="summary_slots: got 4; allowed: null with completion=none"):
        RCTopKConfig.from_mapping({"completion": "none", "summary_slots": 4})


@pytest.mark.parametrize("additional", [None, {}, {"another_plugin": {"budget": -1}}])
def test_defaults_where_nothing_is_given(additional: object) -> None:
    assert RCTopKConfig.from_additional_config(additional) == RCTopKConfig()


def test_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RCTopKConfig().budget = 1  # type: ignore[misc]


def test_table_documents_every_option_with_its_default() -> None:
    rows = RCTopKConfig.table()
    assert [row[0] for row in rows] == list(RCTopKConfig.names())
    for name, default, allowed, documentation in rows:
        assert RCTopKConfig.from_mapping(
            {name: json.loads(default) if default[0] in "ntf[0123456789" else default}
        )
        assert allowed
        assert documentation.endswith(".")
