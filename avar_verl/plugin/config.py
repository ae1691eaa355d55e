# SPDX-License-Identifier: Apache-2.0
"""The `avar` config node as validated dataclasses; recipes/avar/config/avar/avar.yaml has the same fields for hydra.

The string under each field gives its meaning, unit and range, the value that disables it, and the paper's value (arXiv
2603.03825).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from avar_verl import moved
from avar_verl.attention.mass import IMPLEMENTATIONS
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.dependency import CORRUPTIONS
from avar_verl.objectives.vars import SHAPINGS, STATISTICS

# Set on a batch to have its forward pass return VISUAL_OUTPUT, a vector of VISUAL_FIELDS for every sample. A flag and
# not a mode, because with LoRA the same engine also runs the reference pass, whose masses are not needed.
MEASURE_FLAG = "avar_measure"
VISUAL_OUTPUT = "avar_visual"
# Beside it with token_weights: the dependency of every token, laid out like verl's log_probs (nested, whole samples).
DEPENDENCY_OUTPUT = "avar_dependency"
# With corruption=swap: the key of the rollout whose image features stand in for the row's own, "" for a row without an
# image, and the partition of the TransferQueue in which both are.
PARTNER, PARTITION = "avar_partner", "avar_partition"
# In a rollout's extra_fields, if tools returned images: how many rows of each image feature are the prompt's.
PROMPT_ROWS = "avar_prompt_rows"
# Beside it, if tools were called: verl's response mask, 1 on the tokens that the policy wrote; and, for rollouts that
# are written to a folder, name and content of a file for each image of a tool.
OWN_TOKENS, TOOL_FILES = "avar_own_tokens", "avar_tool_files"
TOKEN_WEIGHTS = ("none", "dependency")
IMAGES = ("prompt", "all")
# Fields of VarsConfig that only masses read.
OF_MASSES = ("epsilon", "layers", "layer_weights", "region", "alarm_system_mass", "implementation")
# The names of TRL's `multi_objective_aggregation`.
ADVANTAGES = ("sum_then_normalize", "normalize_then_sum")
DROP_GROUPS = ("identical", "all_wrong")
# Strategies whose engine is AvarFSDPEngine (`plugin.engine.fsdp.register_engine`).
STRATEGIES = ("fsdp", "fsdp2")
QUERY_ROLES = {
    "user": (TokenRole.USER,),
    "response": (TokenRole.RESPONSE,),
    "both": (TokenRole.USER, TokenRole.RESPONSE),
}


def _check(condition: bool, rule: str, got, fix: str) -> None:
    if not condition:
        raise ValueError(f"{rule}; got {got!r}. {fix}")


def _check_indices(name: str, values: Sequence[int] | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    ok = not isinstance(values, str) and len(values) > 0 and all(type(value) is int for value in values)
    _check(ok, f"{name} must be null or a non-empty list of integers", values, "Use null for all of them.")
    return tuple(values)


def _check_weights(weights: Sequence[float] | None, layers: Sequence[int] | None) -> tuple[float, ...] | None:
    if weights is None:
        return None
    fix = "Set avar.agto.layer_weights or avar.vars.layer_weights to one positive weight per layer, or to null."
    ok = not isinstance(weights, str) and len(weights) > 0 and all(weight > 0 for weight in weights)
    _check(ok, "layer_weights must be null or positive numbers", weights, fix)
    ok = layers is None or len(weights) == len(layers)
    _check(ok, "layer_weights must have one weight per layer", (weights, layers), fix)
    return tuple(float(weight) for weight in weights)


def _check_alarm(floor: float) -> None:
    _check(
        0 <= floor < 1,
        "alarm_system_mass must be in [0, 1)",
        floor,
        "Set avar.agto.alarm_system_mass or avar.vars.alarm_system_mass to 0 to disable it.",
    )


def _check_implementation(implementation: str) -> None:
    fix = "Set avar.agto.implementation or avar.vars.implementation to auto."
    _check(implementation in IMPLEMENTATIONS, f"implementation must be one of {IMPLEMENTATIONS}", implementation, fix)


@dataclass(frozen=True, kw_only=True)
class AgtoConfig:
    """Attention-guided losses of the cold start (`objectives.agto`)."""

    alpha: float = 0.15
    """Weight of L_enhance, >= 0; 0 disables it. Paper: 0.15."""

    beta: float = 0.15
    """Weight of L_suppress, >= 0; 0 disables it. Paper: 0.15."""

    epsilon: float = 1e-6
    """Added to the mean mass per system key inside the logarithm of L_suppress, >= 0. Paper: 1e-6."""

    query_role: str = "user"
    """Whose attention is guided: user, response or both. Released code: user."""

    layers: Sequence[int] | None = None
    """Guided decoder layers; negative indices count from the end. null: all with a full softmax over system and image
    keys (`model.layers`). Paper: all."""

    layer_weights: Sequence[float] | None = None
    """Weights > 0 of the guided layers in the mean over layers, in ascending order of layers; null means equal weights.
    Paper: null.
    """

    heads: Sequence[int] | None = None
    """Guided query heads in each of these layers; null means all. Paper: all."""

    image_target: float | None = None
    """Image mass at which L_enhance stops pushing a head, in (0, 1]; null never stops. Paper: null."""

    system_floor: float | None = None
    """System mass below which L_suppress stops pushing a head, in [0, 1); null never stops. Paper: null."""

    warmup_steps: int = 0
    """Optimizer steps over which both weights rise linearly from 0, >= 0; 0 disables it. Paper: 0."""

    anneal: Sequence[int] | None = None
    """Optimizer steps [first, last] between which both weights fall linearly to 0; null disables it. Paper: null."""

    measure: bool = False
    """Log masses and VAS even if both weights are 0; the loss is then bit-identical to verl's."""

    alarm_system_mass: float = 0.01
    """Mean system mass below which avar/alarm/system_mass is 1 in the log, in [0, 1); 0 disables the alarm."""

    implementation: str = "auto"
    """Implementation of the masses, all with the same results: auto, chunked, lse or triton
    (`attention.mass.choose_implementation`)."""

    def __post_init__(self):
        fix = "Set avar.agto."
        _check(self.alpha >= 0, "alpha must be >= 0", self.alpha, fix + "alpha=0 to disable L_enhance.")
        _check(self.beta >= 0, "beta must be >= 0", self.beta, fix + "beta=0 to disable L_suppress.")
        _check(self.epsilon >= 0, "epsilon must be >= 0", self.epsilon, fix + "epsilon=1e-6, the paper's.")
        _check(self.query_role in QUERY_ROLES, f"query_role must be one of {sorted(QUERY_ROLES)}", self.query_role, fix)
        target, floor = self.image_target, self.system_floor
        _check(
            target is None or 0 < target <= 1, "image_target must be null or in (0, 1]", target, fix + "image_target."
        )
        _check(floor is None or 0 <= floor < 1, "system_floor must be null or in [0, 1)", floor, fix + "system_floor.")
        _check(self.warmup_steps >= 0, "warmup_steps must be >= 0", self.warmup_steps, fix + "warmup_steps=0 for none.")
        _check_alarm(self.alarm_system_mass)
        _check_implementation(self.implementation)
        object.__setattr__(self, "layers", _check_indices("layers", self.layers))
        object.__setattr__(self, "layer_weights", _check_weights(self.layer_weights, self.layers))
        object.__setattr__(self, "heads", _check_indices("heads", self.heads))
        anneal = _check_indices("anneal", self.anneal)
        ok = anneal is None or (len(anneal) == 2 and self.warmup_steps <= anneal[0] < anneal[1])
        _check(
            ok, "anneal must be [first, last] with warmup_steps <= first < last", anneal, fix + "anneal=null for none."
        )
        object.__setattr__(self, "anneal", anneal)

    @property
    def guides(self) -> bool:
        """Whether the loss differs from verl's."""
        return self.alpha > 0 or self.beta > 0


@dataclass(frozen=True, kw_only=True)
class VarsConfig:
    """Visual attention reward of GRPO (`objectives.vars`)."""

    lambda_v: float = 0.3
    """Weight of r_visual, >= 0; 0 disables it. Paper: 0.3."""

    epsilon: float = 1e-6
    """Added to the system mass in the ratio, > 0. Paper: not given."""

    layers: Sequence[int] | None = None
    """Decoder layers L in the average; negative indices count from the end. null: all with a full softmax over system
    and image keys (`model.layers`). Paper: all."""

    layer_weights: Sequence[float] | None = None
    """Weights > 0 of these layers in the average, in ascending order of layers; null means equal weights. Paper: null.
    """

    statistic: str = "ratio"
    """The rewarded statistic: ratio (image mass over system mass, the paper's, unbounded), image_share (in [0, 1]) or
    dependency (mean log-probability that the image adds to a response token, in nats, in [-5, 5]; one more forward).
    """

    shaping: str = "none"
    """none (paper), clip, log (log(1 + r), not for dependency) or rank (rank among the correct answers of the group, in
    (0, 1]).
    """

    clip_max: float | None = None
    """Bound of the statistic for shaping=clip, > 0; must be null otherwise."""

    images: str = "prompt"
    """Which images count: prompt (those of the prompt; images that a tool returned have no role in the masses and stay
    as they are when the dependency is measured, so r_visual does not pay for calling tools) or all. The same in
    rollouts without images from tools. Paper: no tools.
    """

    region: bool = False
    """Count only image tokens inside a sample's reference boxes as image: `extra_info["boxes"]` (x1, y1, x2, y2) in
    `extra_info["boxes_size"]` (width, height), one image per prompt; [] means the whole image. Paper: false.
    """

    advantage: str = "sum_then_normalize"
    """How r_visual enters the advantage: sum_then_normalize (paper: into the reward, which the estimator then
    normalises) or normalize_then_sum (each normalised by mean and standard deviation of the group, then r_visual's,
    times lambda_v, added: GDPO, arXiv 2601.05242; for grpo and grpo_vectorized).
    """

    drop_groups: str = "identical"
    """Which groups verl's filter drops where `algorithm.filter_groups.enable` is on: identical (verl's, DAPO's: the
    metric is the same in all rollouts, right or wrong) or all_wrong (no answer is right by the gate; all-right groups,
    where r_visual is the signal, stay).
    """

    gate_key: str = "acc"
    """Key in the reward function's dict that says whether the answer is correct."""

    gate_threshold: float = 0.5
    """The answer is correct if the gate's value is above this."""

    measure: bool = False
    """Log the masses of rollouts even if no reward is made of them (lambda_v=0 or statistic=dependency); with
    lambda_v=0, the rewards are then bit-identical to verl's.
    """

    measure_dependency: bool = False
    """Log the visual dependency of rollouts even if nothing else needs it; one more forward in the log-prob pass."""

    corruption: str = "blank"
    """What the image is compared with for the dependency: blank (the processor's mean colour) or swap (another image of
    the same size from the same batch).
    """

    token_weights: str = "none"
    """Weights of the advantages of a response's tokens: none, or dependency (in proportion to what the image adds to
    the token's log-probability, mean 1 over a response). Paper: none.
    """

    alarm_system_mass: float = 0.01
    """Mean system mass below which avar/alarm/system_mass is 1 in the log, in [0, 1); 0 disables the alarm."""

    implementation: str = "auto"
    """Implementation of the masses, all with the same results: auto, chunked, lse or triton
    (`attention.mass.choose_implementation`)."""

    alarm_window: int = 20
    """Number of steps (of mini-batches with avar_separate_async) over which avar/alarm/rise_without_accuracy compares
    statistic and accuracy, >= 2; 0 disables it.
    """

    def __post_init__(self):
        fix = "Set avar.vars."
        _check(self.lambda_v >= 0, "lambda_v must be >= 0", self.lambda_v, fix + "lambda_v=0 to disable the reward.")
        _check(self.epsilon > 0, "epsilon must be > 0", self.epsilon, fix + "epsilon=1e-6.")
        _check(
            self.statistic in STATISTICS, f"statistic must be one of {STATISTICS}", self.statistic, fix + "statistic."
        )
        _check(self.shaping in SHAPINGS, f"shaping must be one of {SHAPINGS}", self.shaping, fix + "shaping.")
        _check(isinstance(self.region, bool), "region must be true or false", self.region, fix + "region=false.")
        _check(self.images in IMAGES, f"images must be one of {IMAGES}", self.images, fix + "images=prompt.")
        ok = self.images == "prompt" or not self.region
        _check(ok, "region is of the prompt's image", f"images={self.images}", fix + "images=prompt.")
        ok = self.images == "prompt" or self.corruption != "swap"
        rule = "only the prompt's images can be swapped, since those of tools have sizes of their own"
        _check(ok, rule, f"images={self.images}", fix + "images=prompt, or corruption=blank.")
        ok = self.advantage in ADVANTAGES
        _check(ok, f"advantage must be one of {ADVANTAGES}", self.advantage, fix + "advantage=sum_then_normalize.")
        ok = self.drop_groups in DROP_GROUPS
        _check(ok, f"drop_groups must be one of {DROP_GROUPS}", self.drop_groups, fix + "drop_groups=identical.")
        if self.shaping == "clip":
            ok = self.clip_max is not None and self.clip_max > 0
            _check(ok, "shaping=clip needs clip_max > 0", self.clip_max, fix + "clip_max=20, for example.")
        else:
            got = (self.shaping, self.clip_max)
            _check(self.clip_max is None, "clip_max needs shaping=clip", got, fix + "shaping=clip.")
        _check_alarm(self.alarm_system_mass)
        _check_implementation(self.implementation)
        window = self.alarm_window
        _check(window == 0 or window >= 2, "alarm_window must be 0 or >= 2", window, fix + "alarm_window=0 for none.")
        object.__setattr__(self, "layers", _check_indices("layers", self.layers))
        object.__setattr__(self, "layer_weights", _check_weights(self.layer_weights, self.layers))
        for name, values in (("corruption", CORRUPTIONS), ("token_weights", TOKEN_WEIGHTS)):
            _check(getattr(self, name) in values, f"{name} must be one of {values}", getattr(self, name), fix + name)
        ok = isinstance(self.measure_dependency, bool)
        _check(ok, "measure_dependency must be true or false", self.measure_dependency, fix + "measure_dependency.")
        got = (self.statistic, self.shaping)
        _check(
            got != ("dependency", "log"),
            "shaping=log needs a statistic >= 0, which the dependency is not",
            got,
            fix + "shaping to none, clip or rank.",
        )
        _check(
            self.corruption == "blank" or self.measures_dependency,
            "corruption needs a measured dependency",
            self.corruption,
            fix + "measure_dependency=true, or corruption=blank, the default.",
        )
        if self.statistic == "dependency" and not self.measure:
            given = {name: getattr(self, name) for name in OF_MASSES}
            unread = {name: value for name, value in given.items() if value != getattr(VarsConfig, name)}
            _check(
                not unread,
                "some settings are of attention masses, which statistic=dependency does not measure",
                unread,
                fix + "measure=true to log masses too, or leave them at their defaults.",
            )

    @property
    def measures_masses(self) -> bool:
        """Whether the log-prob pass must return masses."""
        return self.measure or (self.lambda_v > 0 and self.statistic != "dependency")

    @property
    def measures_dependency(self) -> bool:
        """Whether the log-prob pass must return the dependency."""
        is_read = self.statistic == "dependency" and (self.lambda_v > 0 or self.measure)
        return is_read or self.measure_dependency or self.token_weights == "dependency"

    @property
    def swaps(self) -> bool:
        """Whether images are swapped for each other."""
        return self.measures_dependency and self.corruption == "swap"

    @property
    def measures_statistic(self) -> bool:
        """Whether the log-prob pass returns `statistic`."""
        return self.measures_dependency if self.statistic == "dependency" else self.measures_masses

    @property
    def measures(self) -> bool:
        """Whether the log-prob pass must return anything."""
        return self.measures_masses or self.measures_dependency


@dataclass(frozen=True, kw_only=True)
class RewardManagerConfig:
    """Reward manager `avar` (`plugin.rollout.reward_manager`), for any reward function."""

    skip_special_tokens: bool = True
    """Drop special tokens from the response before scoring; set false if boxes are written with tokens like
    <|box_start|>.
    """

    timeout_s: float | None = 60.0
    """Timeout of the reward function for one response in seconds, > 0; null waits forever."""

    max_failures: int = 16
    """Consecutive failures of the reward function in one reward worker that end the run, >= 1; 1 ends it at the first
    failure.
    """

    def __post_init__(self):
        fix = "Set avar.reward."
        ok = isinstance(self.skip_special_tokens, bool)
        _check(ok, "skip_special_tokens must be true or false", self.skip_special_tokens, fix + "skip_special_tokens.")
        ok = self.timeout_s is None or self.timeout_s > 0
        _check(ok, "timeout_s must be null or > 0", self.timeout_s, fix + "timeout_s=null to wait forever.")
        _check(self.max_failures >= 1, "max_failures must be >= 1", self.max_failures, fix + "max_failures=16.")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Every trainer of `plugin.trainer`, whatever is rewarded."""

    poll_interval_s: float | None = 0.1
    """Seconds between two looks of verl's replay buffer at the rollouts, > 0; null keeps the buffer's own interval
    (verl's: 2). A step waits half of it on average. One look takes the trainer's process 1 ms for 16 prompts x 8
    rollouts, 8 ms for 256 x 8 and 29 ms for 1024 x 8.
    """

    def __post_init__(self):
        interval = self.poll_interval_s
        fix = "Set avar.trainer.poll_interval_s=0.1, or null for the buffer's own."
        _check(interval is None or interval > 0, "poll_interval_s must be null or > 0", interval, fix)


@dataclass(frozen=True, kw_only=True)
class AvarConfig:
    """The top-level node `avar`. Each stage reads its own part: the cold start `agto`, GRPO `vars`."""

    agto: AgtoConfig = field(default_factory=AgtoConfig)
    """Cold start."""

    vars: VarsConfig = field(default_factory=VarsConfig)
    """Reinforcement learning."""

    reward: RewardManagerConfig = field(default_factory=RewardManagerConfig)
    """How reward functions are called."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How the trainer runs."""

    family: str = ""
    """Family of a model that is not shipped, `module:FAMILY` (docs/new-model.md). Empty: that of `config.model_type`,
    shipped or of an installed package.
    """


def __getattr__(name: str):
    if name == "RewardConfig":
        moved.warn("avar_verl.config.RewardConfig", "avar_verl.plugin.config.RewardManagerConfig")
        return RewardManagerConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
