# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import yaml

from avar_verl.tools.synth.config import (
    EndpointConfig,
    EngineConfig,
    ModelConfig,
    SynthConfig,
    documented_fields,
    load_config,
)
from examples.synth.kill_and_resume import CONFIG, ROOT

CONFIGS = sorted((ROOT / "recipes" / "avar" / "synth").glob("*.yaml"))


def test_the_shipped_yaml_has_every_field_and_no_other():
    node = yaml.safe_load(CONFIG.read_text())
    assert sorted(node) == sorted(documented_fields(SynthConfig))
    for name in ("input", "gates", "output", "ray"):
        assert sorted(node[name]) == sorted(
            documented_fields(
                SynthConfig.__dataclass_fields__[name].default_factory
                if name not in ("input",)
                else type(load_config(CONFIG).input)
            )
        ), name
    for endpoint in node["endpoints"].values():
        assert sorted(endpoint) == sorted(documented_fields(EndpointConfig))
    for model in node["models"].values():
        assert sorted(model) == sorted(documented_fields(ModelConfig))
    for stage in node["stages"].values():
        assert sorted(stage) == sorted(documented_fields(type(load_config(CONFIG).stages.describe)))
    engines = yaml.safe_load((CONFIG.parent / "engine.yaml").read_text())["models"]
    assert sorted(engines["describer"]["engine"]) == sorted(documented_fields(EngineConfig))


def test_every_first_field_of_the_yaml_has_a_comment_above():
    lines = CONFIG.read_text().splitlines()
    seen, bare = set(), []
    for number, line in enumerate(lines):
        match = re.match(r" *([a-z_0-9]+):", line)
        if not match or match[1] in seen:
            continue
        seen.add(match[1])
        above = next((text for text in reversed(lines[:number]) if text.strip()), "")
        # Pairs such as min_words, max_words share the comment above the first of them; names of one's own have none.
        if not above.strip().startswith("#") and match[1] not in (
            *("output_usd", "pixels_per_token", "max_words", "vision", "language", "describer", "thinker"),
            *("describe", "reason", "integrate"),
        ):
            bare.append(match[1])
    assert not bare


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert load_config(path).stages.describe.sees_images


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("typo=1", "Key 'typo' not in 'SynthConfig'"),
        ("endpoints.vision.in_flight=many", "could not be converted to Integer"),
        ("endpoints.vision.in_flight=0", "in_flight of endpoint .* must be >= 1; got 0"),
        ("endpoints.vision.max_attempts=0", "max_attempts of"),
        ("endpoints.vision.max_failed_in_row=0", "max_failed_in_row of"),
        ("endpoints.vision.url=ftp://x", "url must be http or https; got 'ftp://x'"),
        ("endpoints.vision.timeout_s=0", "timeout_s of .* must be > 0"),
        ("endpoints.vision.backoff_s=-1", "backoff_s of .* must be >= 0"),
        ("endpoints.vision.max_backoff_s=0.1", "max_backoff_s of .* must be >= backoff_s"),
        ("endpoints.vision.requests_per_minute=0", "requests_per_minute of .* must be null or >= 1"),
        ("endpoints.vision.tokens_per_minute=0", "tokens_per_minute of .* must be null or >= 1"),
        ("endpoints.vision.tokens_per_minute=2000", "tokens_per_minute of a worker must exceed max_tokens of describe"),
        ("models.describer.endpoint=null", "a model must have an endpoint or an engine"),
        ("models.describer.model=''", "a model must have a name"),
        ("models.describer.input_usd=-1", "input_usd of .* must be >= 0"),
        ("models.describer.chars_per_token=0", "chars_per_token must be > 0"),
        ("models.describer.pixels_per_token=0", "pixels_per_token must be >= 1"),
        ("models.describer.endpoint=moon", "endpoint of describer must be one of"),
        ("stages.reason.model=moon", "stages.reason.model must be one of"),
        ("stages.reason.temperature=-1", "temperature must be >= 0"),
        ("stages.reason.top_p=0", "top_p must be in"),
        ("stages.reason.max_tokens=0", "max_tokens must be >= 1"),
        ("stages.reason.expected_tokens=0", "expected_tokens must be >= 1"),
        ("stages.reason.extra={model: x}", r"extra must not repeat fields of the stage; got \['model'\]"),
        ("stages.describe.sees_images=false", "stage 1 must see the images"),
        ("input.files=[]", "input.files must name at least one file"),
        ("gates.disabled=[answer]", r"gates.disabled must be among .* got \['answer'\]"),
        ("gates.disabled=[moon]", "gates.disabled must be among"),
        ("gates.min_anchors=-1", "gates.min_anchors must be >= 0"),
        ("gates.min_reflections=-1", "gates.min_reflections must be >= 0"),
        ("gates.min_words=-1", "gates.min_words must be >= 0"),
        ("gates.min_parts=5", "gates.min_parts must be in 0..4"),
        ("gates.min_box_iou=2", r"gates.min_box_iou must be in \[0, 1\]"),
        ("gates.min_language=2", r"gates.min_language must be in \[0, 1\]"),
        ("gates.max_words=3", "gates.max_words must be >= min_words"),
        ("gates.duplicate_jaccard=0", "duplicate_jaccard must be in"),
        ("gates.duplicate_distance=65", "duplicate_distance must be 0..64"),
        ("output.coordinates=yards", "output.coordinates must be one of"),
        ("output.rl_from=moon", "output.rl_from must be one of"),
        ("output.browser_samples=-1", "output.browser_samples must be >= 0"),
        ("ray.workers=0", "ray.workers must be >= 1"),
        ("ray.workers=64", "in_flight of vision must be at least ray.workers"),
        ("ray.num_cpus=0", "ray.num_cpus must be null or >= 1"),
        ("budget_usd=0", "budget_usd must be null or > 0"),
    ],
)
def test_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIG, [override])


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="--config must be a YAML file"):
        load_config(tmp_path / "none.yaml")


def engine(engine_kwargs=None, **fields):
    return EngineConfig(model_source="folder", engine_kwargs={"max_model_len": 8, **(engine_kwargs or {})}, **fields)


def test_an_engine_names_its_model():
    assert ModelConfig(engine=engine()).model == "folder"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "engine.batch_size of folder must be >= 1; got 0"),
        ({"concurrency": 0}, "engine.concurrency of folder must be >= 1"),
        ({"max_restarts": -1}, "engine.max_restarts of folder must be >= 0; got -1"),
        ({"engine_kwargs": {"max_model_len": None}}, "must have max_model_len, an integer >= 1; got None"),
        ({"engine_kwargs": {"max_model_len": "8k"}}, "must have max_model_len, an integer >= 1; got '8k'"),
        ({"placement_group_config": {"strategy": "PACK"}}, "must have bundles or bundle_per_worker"),
        ({"chat_template_content_format": "auto"}, "chat_template_content_format of folder must be one of"),
    ],
)
def test_an_engine_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        engine(**fields)


def test_resources_of_an_engine():
    assert engine().resources() == {"GPU": 1, "CPU": 1}
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    assert engine(parallel).resources() == {"GPU": 6, "CPU": 6}
    cpus = {"bundle_per_worker": {"CPU": 2, "GPU": 0}}
    assert engine(parallel, placement_group_config=cpus).resources() == {"CPU": 12}
    assert engine(accelerator_type="H100").resources() == {"GPU": 1, "CPU": 1, "accelerator_type:H100": 0.001}
    bundles = [{"GPU": 1}, {"GPU": 1, "CPU": 4}]
    assert engine(parallel, placement_group_config={"bundles": bundles}).resources() == {"GPU": 2, "CPU": 4}


def test_cost_is_dollars_a_million_tokens():
    model = ModelConfig(model="m", endpoint="e", input_usd=2.0, output_usd=10.0)
    assert model.cost(500_000, 100_000) == pytest.approx(1.0 + 1.0)
