# SPDX-License-Identifier: Apache-2.0
"""Config of `avar synth` as validated dataclasses; recipes/avar/synth/*.yaml have the same fields.

The string under each field gives its meaning, unit and range, and the value that disables it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

STAGES = ("describe", "reason", "integrate")
"""The stages of the pipeline, in order."""

COORDINATES = ("absolute", "relative_1000")
RL_FROM = ("accepted", "inputs")
CONTENT_FORMATS = ("openai", "string")
GATES = (
    *("input", "overlap", "call", "refused", "truncated", "format", "answer", "anchors", "boxes", "reflection"),
    *("leak_description", "leak_answer", "length", "language", "near_duplicate"),
)
"""Gates in the order in which they run; an item is rejected by the first one that it fails."""

ALWAYS = ("input", "call", "format", "answer")
"""Gates that cannot be switched off: without them there is no sample, or a wrong one."""


def _check(condition: bool, rule: str, got: Any, fix: str) -> None:
    if not condition:
        raise ValueError(f"{rule}; got {got!r}. {fix}")


@dataclass(kw_only=True)
class InputConfig:
    """Where images, questions and answers come from."""

    files: list[str]
    """Parquet, jsonl or json files, or folders of them."""

    question: str = "question"
    """Column of the question, with dots for struct fields (extra_info.question). From a list of messages, the last user
    turn is used. `<image>` marks the places of images; without it, images come first.
    """

    answer: str = "answer"
    """Column of the accepted answer, or a list of them (`rewards.accuracy.accepted_answers`)."""

    images: str = "images"
    """Column of the images, one or a list, in any layout of docs/data.md."""

    boxes: Optional[str] = None
    """Column of reference boxes: for every image a list of (x1, y1, x2, y2) in its pixels; null if there are none."""

    data_source: str = "avar/synth"
    """Name of the data set in the RL parquet."""

    root: Optional[str] = None
    """Folder for relative image paths; null: the working folder."""

    allow_urls: bool = False
    """true: fetch images from http(s)."""

    def __post_init__(self):
        _check(len(self.files) > 0, "input.files must name at least one file", self.files, "Set input.files=[FILE].")


@dataclass(kw_only=True)
class EndpointConfig:
    """One OpenAI-compatible server. Its limits apply to all stages that use it together."""

    url: str
    """Base URL, up to and with /v1; requests go to URL/chat/completions."""

    api_key_env: Optional[str] = None
    """Environment variable with the key; null sends none."""

    in_flight: int = 64
    """Maximum number of concurrent requests, >= 1."""

    requests_per_minute: Optional[int] = None
    """Maximum requests per minute, >= 1; null disables the limit."""

    tokens_per_minute: Optional[int] = None
    """Maximum tokens per minute, counting estimated prompt tokens and max_tokens, >= 1; null disables the limit."""

    timeout_s: float = 300.0
    """Seconds after which an attempt counts as failed, > 0."""

    max_attempts: int = 6
    """Attempts of a call before its item is recorded as failed, >= 1; 1 disables retries."""

    backoff_s: float = 1.0
    """The wait before attempt k is backoff_s * 2^(k - 2) seconds, times a random 0.5 to 1; >= 0, 0 disables waiting. A
    server's Retry-After replaces it, for all calls to this endpoint.
    """

    max_backoff_s: float = 60.0
    """Longest of these waits in seconds, including Retry-After, >= backoff_s."""

    max_failed_in_row: int = 8
    """The endpoint counts as dead, and the run stops, after this many calls in a row have failed in every attempt, >=
    1.
    """

    def __post_init__(self):
        where = f"endpoint {self.url}"
        _check(self.url.startswith(("http://", "https://")), "url must be http or https", self.url, "Correct the URL.")
        for name in ("in_flight", "max_attempts", "max_failed_in_row"):
            _check(getattr(self, name) >= 1, f"{name} of {where} must be >= 1", getattr(self, name), "Raise it.")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} of {where} must be null or >= 1", value, "Use null for none.")
        _check(self.timeout_s > 0, f"timeout_s of {where} must be > 0", self.timeout_s, "Set it in seconds.")
        _check(self.backoff_s >= 0, f"backoff_s of {where} must be >= 0", self.backoff_s, "Use 0 for no wait.")
        ok = self.max_backoff_s >= self.backoff_s
        _check(ok, f"max_backoff_s of {where} must be >= backoff_s", self.max_backoff_s, "Raise it.")


@dataclass(kw_only=True)
class EngineConfig:
    """A local vLLM engine: fields of `ray.data.llm.vLLMEngineProcessorConfig`."""

    model_source: str
    """Hugging Face folder or name."""

    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's engine, such as tensor_parallel_size. max_model_len is required: an answer that reaches it is
    cut off, which Ray does not report.
    """

    batch_size: int = 32
    """Rows of a batch, >= 1."""

    concurrency: int = 1
    """Number of parallel engines, >= 1."""

    accelerator_type: Optional[str] = None
    """GPU type in a Ray cluster, such as H100; null: any."""

    placement_group_config: Optional[dict[str, Any]] = None
    """Ray resources of an engine: bundles, or bundle_per_worker; null: one GPU per worker. {bundle_per_worker: {CPU:
    1}} runs on a CPU.
    """

    chat_template_content_format: str = "openai"
    """Message format of the chat template for images: openai (a list of parts, as in most templates) or string."""

    max_restarts: int = 2
    """Number of times that a dead engine is restarted before the run stops, >= 0; 0 disables restarts."""

    def __post_init__(self):
        where = f"of {self.model_source}"
        for name, least in (("batch_size", 1), ("concurrency", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            _check(value >= least, f"engine.{name} {where} must be >= {least}", value, "Raise it.")
        length = self.engine_kwargs.get("max_model_len")
        ok = isinstance(length, int) and length >= 1
        _check(ok, f"engine_kwargs {where} must have max_model_len, an integer >= 1", length, "Add it.")
        group, kinds = self.placement_group_config, {"bundles", "bundle_per_worker"}
        ok = group is None or len(kinds & set(group)) == 1
        fix = "Name one of them."
        _check(ok, f"placement_group_config {where} must have bundles or bundle_per_worker", group, fix)
        ok = self.chat_template_content_format in CONTENT_FORMATS
        rule = f"chat_template_content_format {where} must be one of {CONTENT_FORMATS}"
        _check(ok, rule, self.chat_template_content_format, "See the model's chat template.")

    def resources(self) -> dict[str, float]:
        """Ray resources of one engine, such as {"GPU": 2.0, "CPU": 2.0}."""
        kwargs = self.engine_kwargs
        workers = kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)
        group = self.placement_group_config or {"bundle_per_worker": {"GPU": 1, "CPU": 1}}
        total: Counter = Counter()
        for bundle in group.get("bundles") or [group["bundle_per_worker"]] * workers:
            total.update(bundle)
        if self.accelerator_type:
            # Name and amount that Ray uses for every worker.
            total[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: float(number) for name, number in total.items() if number}


@dataclass(kw_only=True)
class ModelConfig:
    """A model: its name, location and prices."""

    model: str = ""
    """Name in requests and reports; part of the cache key."""

    endpoint: Optional[str] = None
    """Name under endpoints; null: a local engine."""

    engine: Optional[EngineConfig] = None
    """Local engine; null: an endpoint."""

    input_usd: float = 0.0
    """US dollars per million prompt tokens, >= 0."""

    output_usd: float = 0.0
    """US dollars per million generated tokens, >= 0."""

    chars_per_token: float = 3.5
    """Characters per token for estimates, > 0; reported usage is used if available."""

    pixels_per_token: int = 784
    """Image pixels per token for estimates, >= 1. 784 is Qwen2.5-VL's 28 x 28."""

    def __post_init__(self):
        one = (self.endpoint is None) != (self.engine is None)
        _check(one, "a model must have an endpoint or an engine", (self.endpoint, self.engine), "Set one of them.")
        if self.engine is not None and not self.model:
            self.model = self.engine.model_source
        _check(bool(self.model), "a model must have a name", self.model, "Set models.NAME.model.")
        for name in ("input_usd", "output_usd"):
            value = getattr(self, name)
            _check(value >= 0, f"{name} of {self.model} must be >= 0", value, "Use 0 for none.")
        _check(self.chars_per_token > 0, "chars_per_token must be > 0", self.chars_per_token, "3.5 suits English.")
        _check(
            self.pixels_per_token >= 1, "pixels_per_token must be >= 1", self.pixels_per_token, "784 is Qwen2.5-VL's."
        )

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """US dollars."""
        return (input_tokens * self.input_usd + output_tokens * self.output_usd) / 1e6


@dataclass(kw_only=True)
class StageConfig:
    """One stage: model, prompt and sampling."""

    model: str
    """Name under models."""

    prompt: str
    """A prompt of avar_verl/tools/synth/prompts (describe_v1), or the path of your own .jinja file."""

    temperature: float = 0.7
    """Sampling temperature, >= 0; 0 is greedy."""

    top_p: float = 0.95
    """Nucleus, in (0, 1]; 1 disables it."""

    max_tokens: int = 4096
    """Maximum number of answer tokens, >= 1."""

    seed: int = 0
    """Seed of the sampling. A different seed is a different cache entry, even if the endpoint ignores it."""

    sees_images: bool = False
    """Whether the model gets the images. Stages 2 and 3 of the paper do not."""

    expected_tokens: int = 600
    """Tokens of a typical answer, for estimates while the cache is empty, >= 1."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Additional fields of the request body (endpoint) or of vLLM's SamplingParams (engine); part of the cache key."""

    def __post_init__(self):
        _check(self.temperature >= 0, "temperature must be >= 0", self.temperature, "0 is greedy.")
        _check(0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p, "1 disables it.")
        _check(self.max_tokens >= 1, "max_tokens must be >= 1", self.max_tokens, "Raise it.")
        _check(self.expected_tokens >= 1, "expected_tokens must be >= 1", self.expected_tokens, "Raise it.")
        taken = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream"} & set(self.extra)
        _check(not taken, "extra must not repeat fields of the stage", sorted(taken), "Set the fields themselves.")

    def sampling(self) -> dict[str, Any]:
        """Sampling parameters of a request, part of the cache key."""
        names = ("temperature", "top_p", "max_tokens", "seed")
        return {**{name: getattr(self, name) for name in names}, **self.extra}


@dataclass(kw_only=True)
class StagesConfig:
    """The three stages."""

    describe: StageConfig
    """Stage 1: a vision model describes the image."""

    reason: StageConfig
    """Stage 2: a language model reasons over the description, with self-checks, to the known answer."""

    integrate: StageConfig
    """Stage 3: a language model rewrites the reasoning so that it refers to the image and looks back at it."""

    def __post_init__(self):
        _check(self.describe.sees_images, "stage 1 must see the images", False, "Set stages.describe.sees_images=true.")


@dataclass(kw_only=True)
class GatesConfig:
    """What a sample must be to be kept."""

    disabled: list[str] = field(default_factory=list)
    """Gates that are switched off; [] keeps all. input, call, format and answer cannot be switched off."""

    min_anchors: int = 2
    """Distinct references to the image in the reasoning (`rewards.anchors`), >= 0; 0 disables it."""

    min_parts: int = 2
    """Quarters of the reasoning with a new reference, 0 to 4; 0 disables it."""

    min_box_iou: float = 0.5
    """If there are reference boxes: smallest IoU that every box of the reasoning must have with one of them, in [0, 1];
    0 disables it.
    """

    min_reflections: int = 1
    """Sentences that check something again, not counting the first sentence, >= 0; 0 disables it."""

    min_words: int = 30
    """Minimum words of the reasoning, >= 0; 0 disables it. Two Chinese characters count as a word."""

    max_words: int = 3000
    """Maximum words of the reasoning, >= 1."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    """Languages (ISO 639-1) that the reasoning may be in; [] disables it."""

    min_language: float = 0.5
    """Minimum total probability of these languages, in [0, 1]."""

    duplicate_jaccard: float = 0.8
    """Estimated Jaccard similarity of question and reasoning (word 3-grams) from which two samples with the same
    picture are near-duplicates, in (0, 1]."""

    duplicate_distance: int = 4
    """Bits of 64 in which the difference hashes of the same picture may differ, 0 to 64."""

    overlap_lists: list[str] = field(default_factory=list)
    """Hash lists of test sets (`avar synth hashes`); [] disables the gate."""

    def __post_init__(self):
        unknown = [name for name in self.disabled if name not in GATES or name in ALWAYS]
        can = [name for name in GATES if name not in ALWAYS]
        _check(not unknown, f"gates.disabled must be among {can}", unknown, "Leave these out.")
        for name in ("min_anchors", "min_reflections", "min_words"):
            _check(getattr(self, name) >= 0, f"gates.{name} must be >= 0", getattr(self, name), "0 disables it.")
        _check(0 <= self.min_parts <= 4, "gates.min_parts must be in 0..4", self.min_parts, "0 disables it.")
        for name in ("min_box_iou", "min_language"):
            _check(0 <= getattr(self, name) <= 1, f"gates.{name} must be in [0, 1]", getattr(self, name), "Change it.")
        words = (self.min_words, self.max_words)
        _check(self.max_words >= max(1, self.min_words), "gates.max_words must be >= min_words", words, "Raise it.")
        _check(
            0 < self.duplicate_jaccard <= 1, "duplicate_jaccard must be in (0, 1]", self.duplicate_jaccard, "Try 0.8."
        )
        _check(
            0 <= self.duplicate_distance <= 64, "duplicate_distance must be 0..64", self.duplicate_distance, "Try 4."
        )


@dataclass(kw_only=True)
class OutputConfig:
    """What is written."""

    system: Optional[str] = None
    """System turn of every row; null for none. Qwen3-VL, InternVL and LLaVA-OneVision need one (docs/data.md)."""

    coordinates: str = "absolute"
    """Coordinate system of boxes in prompts and in the models' reasoning: absolute (pixels, Qwen2.5-VL) or
    relative_1000 (Qwen3-VL, Qwen2-VL, InternVL).
    """

    rl_from: str = "accepted"
    """Rows of the RL parquet: accepted, or inputs (every readable question that is not in a test set)."""

    browser_samples: int = 120
    """Samples in the HTML browser, accepted and rejected ones of all gates, >= 0; 0 writes none."""

    def __post_init__(self):
        ok = self.coordinates in COORDINATES
        _check(ok, f"output.coordinates must be one of {COORDINATES}", self.coordinates, "Take the trained family's.")
        _check(self.rl_from in RL_FROM, f"output.rl_from must be one of {RL_FROM}", self.rl_from, "Name one.")
        _check(self.browser_samples >= 0, "output.browser_samples must be >= 0", self.browser_samples, "0 for none.")


@dataclass(kw_only=True)
class RayConfig:
    """Where it runs."""

    address: str = "local"
    """local starts Ray on this machine; auto, or an address, joins a cluster."""

    num_cpus: Optional[int] = None
    """Logical CPUs of a local Ray, >= 1; null: those of the machine. A local engine raises it to what its pass needs.
    """

    workers: int = 1
    """Processes that make calls, >= 1; they share an endpoint's limits in equal parts. One process makes about 500
    calls per second; use more for several fast endpoints.
    """

    def __post_init__(self):
        _check(self.workers >= 1, "ray.workers must be >= 1", self.workers, "1 is enough for most endpoints.")
        ok = self.num_cpus is None or self.num_cpus >= 1
        _check(ok, "ray.num_cpus must be null or >= 1", self.num_cpus, "Use null for all.")


@dataclass(kw_only=True)
class SynthConfig:
    """A run of `avar synth`."""

    out: str
    """Folder of the run: the cache and all output files."""

    input: InputConfig
    """Images, questions and answers."""

    stages: StagesConfig
    """The three stages."""

    models: dict[str, ModelConfig]
    """Models by a name of your own."""

    endpoints: dict[str, EndpointConfig] = field(default_factory=dict)
    """Servers by a name of your own."""

    gates: GatesConfig = field(default_factory=GatesConfig)
    """What a sample must be to be kept."""

    output: OutputConfig = field(default_factory=OutputConfig)
    """What is written."""

    ray: RayConfig = field(default_factory=RayConfig)
    """Where it runs."""

    budget_usd: Optional[float] = None
    """Budget of the folder in US dollars, over all its runs, > 0; before a call that might exceed it, the run stops.
    null disables it.
    """

    def __post_init__(self):
        for name in STAGES:
            stage = self.stage(name)
            ok = stage.model in self.models
            _check(ok, f"stages.{name}.model must be one of {sorted(self.models)}", stage.model, "Add it under models.")
            model = self.model(name)
            if model.endpoint is not None:
                ok = model.endpoint in self.endpoints
                fix = "Add it under endpoints."
                _check(ok, f"endpoint of {stage.model} must be one of {sorted(self.endpoints)}", model.endpoint, fix)
                limit = self.endpoints[model.endpoint].tokens_per_minute
                ok = limit is None or limit // self.ray.workers > stage.max_tokens
                fix = "Lower max_tokens or workers."
                _check(ok, f"tokens_per_minute of a worker must exceed max_tokens of {name}", limit, fix)
        for name, endpoint in self.endpoints.items():
            ok = endpoint.in_flight >= self.ray.workers
            _check(ok, f"in_flight of {name} must be at least ray.workers", endpoint.in_flight, "Raise it.")
        _check(
            self.budget_usd is None or self.budget_usd > 0, "budget_usd must be null or > 0", self.budget_usd, "Raise."
        )

    def stage(self, name: str) -> StageConfig:
        """Stage `name` of STAGES."""
        return getattr(self.stages, name)

    def model(self, stage: str) -> ModelConfig:
        """Model of a stage."""
        return self.models[self.stage(stage).model]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SynthConfig:
    """Read a YAML file; `overrides` are `key.path=value`, as for hydra.

    Raises:
        ValueError: a missing file, an unknown key, a wrong type or an invalid value; the message names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.merge(
            OmegaConf.structured(SynthConfig), OmegaConf.load(path), OmegaConf.from_dotlist([*overrides])
        )
        return OmegaConf.to_object(node)
    except FileNotFoundError as error:
        raise ValueError(f"--config must be a YAML file; got {path}: {error.strerror}. Check the path.") from error
    except (OmegaConfBaseException, YAMLError) as error:
        text = str(error).replace("\n", " ")
        raise ValueError(
            f"{path} must fit avar_verl.tools.synth.config; got: {text}. Compare recipes/avar/synth."
        ) from error


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts and lists."""
    from dataclasses import asdict

    return asdict(config)


def documented_fields(cls: type) -> list[str]:
    """Names of the fields of a config class."""
    return [field.name for field in fields(cls)]
