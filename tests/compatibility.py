# SPDX-License-Identifier: Apache-2.0
"""Which of verl's settings work with VARS: the table behind docs/compatibility.md and its tests.

Every row that works names the test that it is a parameter of, every other row is refused with the message that the
documentation shows. `python -m tests.compatibility` prints the page; tests/test_compatibility.py compares it with the
file.
"""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
ACTOR = "actor_rollout_ref.actor"
ENGINE = f"{ACTOR}.fsdp_config"
MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"
PACKED = f"{MODEL}.use_remove_padding=true"
ENTROPY = f"{ACTOR}.entropy_coeff=0.01"

# How a row is tested: text for the page.
TESTS = {
    "engine": "one update of verl's actor worker; masses, losses and parameters are those without the setting",
    "loss": "updates of verl's actor worker; parameters are bit for bit those of verl's own engine",
    "advantage": "the trainer's advantages; they are those that verl's trainer computes from the sum of both rewards",
    "filter": "the trainer's replay buffer on a real TransferQueue",
    "run": "two steps through verl's launcher with vLLM",
    "processes": "training and masses on two processes; they are those of one",
}

TWO = ("trainer.n_gpus_per_node=2",)
DYNAMIC = (
    f"{ACTOR}.use_dynamic_bsz=true",
    f"{ROLLOUT}.log_prob_use_dynamic_bsz=true",
    f"{ACTOR}.ppo_max_token_len_per_gpu=600",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu=600",
)
CHECKPOINTED = f"{ACTOR}.entropy_checkpointing=true"
OFFLOADS = (f"{ENGINE}.param_offload=true", f"{ENGINE}.optimizer_offload=true")
PREFETCH = f"{ENGINE}.forward_prefetch=true"
ADAPTERS = (f"{MODEL}.lora_rank=8", f"{MODEL}.target_modules=[q_proj,k_proj,v_proj,o_proj]")
KL_LOSS = (f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.1")
KL_REWARD = "algorithm.use_kl_in_reward=true"
DR_GRPO = "algorithm.norm_adv_by_std_in_grpo=false"
SEPARATE = [
    "trainer.v1.trainer_mode=avar_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{ROLLOUT}.nnodes=1",
    f"{ROLLOUT}.n_gpus_per_node=1",
    f"{ROLLOUT}.checkpoint_engine.backend=gloo",
    f"{ROLLOUT}.checkpoint_engine.custom_backend_module=avar_verl.plugin.compat.cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
]
# Launches of two steps (tests/e2e/test_grpo_modes.py), by name. Settings that do not depend on each other share one.
RUNS = {
    "colocate_async": ["trainer.v1.trainer_mode=avar_colocate_async", f"{CORRECTION}.rollout_is=token"],
    "separate_async": [*SEPARATE, "actor_rollout_ref.hybrid_engine=false"],
    "separate_async_hybrid": [*SEPARATE, "actor_rollout_ref.hybrid_engine=true"],
    "bypass": [f"{CORRECTION}.bypass_mode=true"],
    "two_processes": [
        *TWO,
        *DYNAMIC,
        ENTROPY,
        CHECKPOINTED,
        *OFFLOADS,
        PREFETCH,
        DR_GRPO,
    ],
    "lora": [*ADAPTERS, *KL_LOSS, KL_REWARD, f"{ACTOR}.policy_loss.loss_mode=cispo"],
    "lora_merged": [*ADAPTERS, f"{MODEL}.lora.merge=true"],
}


FUSED_NOTE = "backend `torch`; Qwen and GLM-4.1V, refused for other families, whose images verl would drop"


@dataclass(frozen=True)
class Row:
    """One line of the page. `settings` are overrides of `avar_grpo`; `test` is a key of TESTS, None if refused."""

    what: str
    settings: tuple[str, ...]
    test: str | None
    note: str = ""
    with_: tuple[str, ...] = ()  # What the setting needs to have an effect; the comparison has it too.


def engine(what: str, *settings: str, note: str = "", with_: tuple[str, ...] = ()) -> Row:
    return Row(what, settings, "engine", note, with_)


def loss(name: str, *settings: str) -> Row:
    return Row(name.upper(), (f"{ACTOR}.policy_loss.loss_mode={name}", *settings), "loss")


def advantage(what: str, *settings: str, note: str = "") -> Row:
    return Row(what, settings, "advantage", note)


def refused(what: str, *settings: str) -> Row:
    return Row(what, settings, None)


SECTIONS = {
    "Trainers": [
        Row("asynchronous, colocated", ("trainer.v1.trainer_mode=avar_colocate_async",), "run"),
        Row("asynchronous, separate", ("trainer.v1.trainer_mode=avar_separate_async",), "run", "weights over gloo"),
        Row(
            "without rollout servers on the training processes",
            ("actor_rollout_ref.hybrid_engine=false",),
            "run",
            with_=tuple(SEPARATE[:1]),
        ),
        Row("bypass mode", (f"{CORRECTION}.bypass_mode=true",), "run", "one pass more, to measure"),
        Row("several processes and rollout servers", TWO, "run"),
        refused("verl's own trainers", "trainer.v1.trainer_mode=sync"),
        refused("", "trainer.v1.trainer_mode=colocate_async"),
        refused("", "trainer.v1.trainer_mode=separate_async"),
        refused("verl's old trainer", "trainer.use_v1=false"),
    ],
    "Memory and speed of the actor": [
        engine("fused kernels", f"{MODEL}.use_fused_kernels=true", with_=(PACKED,), note=FUSED_NOTE),
        engine("entropy checkpointing", CHECKPOINTED, with_=(ENTROPY,)),
        engine(
            "entropy in chunks",
            f"{ACTOR}.entropy_from_logits_with_chunking=true",
            f"{ACTOR}.entropy_from_logits_chunk_size=64",
            with_=(ENTROPY, PACKED),
        ),
        engine("gradient checkpointing", f"{MODEL}.enable_gradient_checkpointing=true"),
        engine("parameter and optimizer offload", *OFFLOADS, note="moves nothing on a CPU"),
        engine("forward prefetch", PREFETCH),
        engine("dynamic batches", *DYNAMIC, with_=(PACKED,)),
        engine(
            "static shapes",
            f"{ACTOR}.pad_to_length=true",
            f"{ENGINE}.pad_to_length_bucket=512",
            with_=(PACKED,),
        ),
        Row("HSDP", (f"{ENGINE}.fsdp_size=1",), "processes", "two replicas of one shard", TWO),
        Row("sequence parallelism", (f"{ENGINE}.ulysses_sequence_parallel_size=2",), "processes", with_=TWO),
        Row("LoRA, sent to vLLM as adapters", (f"{MODEL}.lora_rank=8",), "run", "in the language model; two families"),
        Row("LoRA, merged", (f"{MODEL}.lora_rank=8", f"{MODEL}.lora.merge=true"), "run"),
        refused("FSDP turbo", f"{ACTOR}.strategy=fsdp_turbo"),
        refused("VeOmni", "model_engine=veomni"),
        refused("Megatron", "model_engine=megatron"),
        refused("TorchTitan", "model_engine=torchtitan"),
    ],
    "Policy losses": [
        loss("vanilla"),
        loss("gspo"),
        loss("cispo"),
        loss("sapo"),
        loss("gpg"),
        loss("geo_mean"),
        loss("clip_cov"),
        loss("kl_cov"),
        loss("dppo_tv"),
        loss("dppo_kl"),
        Row("KL loss", KL_LOSS, "loss"),
        Row("entropy bonus", (ENTROPY,), "loss"),
        Row("weights of rollout correction (TIS)", (f"{CORRECTION}.rollout_is=token",), "loss"),
    ],
    "Advantages": [
        advantage("GRPO", "algorithm.adv_estimator=grpo"),
        advantage("GRPO, vectorized", "algorithm.adv_estimator=grpo_vectorized"),
        advantage("GRPO, pass@k", "algorithm.adv_estimator=grpo_passk"),
        advantage("Dr.GRPO", DR_GRPO),
        advantage("RLOO", "algorithm.adv_estimator=rloo"),
        advantage("RLOO, vectorized", "algorithm.adv_estimator=rloo_vectorized"),
        advantage("REINFORCE++", "algorithm.adv_estimator=reinforce_plus_plus"),
        advantage("REINFORCE++ with a baseline", "algorithm.adv_estimator=reinforce_plus_plus_baseline"),
        advantage("OPO", "algorithm.adv_estimator=opo"),
        advantage("GPG", "algorithm.adv_estimator=gpg"),
        advantage("KL in reward", KL_REWARD),
        advantage("rollout correction (TIS), by token", f"{CORRECTION}.rollout_is=token"),
        advantage("rollout correction (TIS), by sequence", f"{CORRECTION}.rollout_is=sequence"),
        advantage(
            "rejection of rollouts",
            f"{CORRECTION}.rollout_rs=seq_mean_k1",
            f"{CORRECTION}.rollout_rs_threshold='0.99_1.01'",
            note="r_visual is that of the whole response",
        ),
        refused("GDPO of verl", "algorithm.adv_estimator=gdpo"),
        refused("ReMax", "algorithm.adv_estimator=remax"),
        refused("optimal token baseline", "algorithm.adv_estimator=optimal_token_baseline"),
        refused("", "algorithm.adv_estimator=tir_optimal_token_baseline"),
    ],
    "Groups": [
        Row("DAPO's filter", ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"), "filter"),
        Row(
            "a filter of all-wrong groups",
            (
                "algorithm.filter_groups.enable=true",
                "algorithm.filter_groups.metric=acc",
                "avar.vars.drop_groups=all_wrong",
            ),
            "filter",
        ),
        refused("DAPO's filter on the reward", "algorithm.filter_groups.enable=true"),
    ],
}
# Neither: nothing here can say whether they work.
UNTESTED = {
    "offload policy": (f"{ENGINE}.offload_policy=true", "pins memory, which needs an accelerator"),
    "fused kernels of Triton and Liger": (f"{MODEL}.fused_kernel_options.impl_backend", "need an accelerator"),
    "checkpoint engines": (f"{ROLLOUT}.checkpoint_engine.backend", "all of verl's but `naive` need an accelerator"),
    "GAE": ("algorithm.adv_estimator=gae", "r_visual reaches the reward as in GRPO; the critic's engine is verl's own"),
    "FSDP1": (f"{ACTOR}.strategy=fsdp", "needs an accelerator"),
    "SGLang, TensorRT-LLM": (f"{ROLLOUT}.name", "need an accelerator"),
}
ROWS = [row for rows in SECTIONS.values() for row in rows]


def reason(row: Row) -> str:
    """The message that refuses a run with these settings."""
    from tests.plugin.test_refusals import grpo

    try:
        grpo(*row.settings)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{row.settings} are not refused")


def page() -> str:
    """The text of docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "verl's settings with VARS. This page is printed by `python -m tests.compatibility`, from the table that the",
        "tests run; a test compares the two.",
        "",
        "| tested by | what |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in TESTS.items()),
    ]
    for title, rows in SECTIONS.items():
        works = [row for row in rows if row.test]
        lines += ["", f"## {title}", "", "| works | settings | tested by | |", "| --- | --- | --- | --- |"]
        for row in works:
            settings = "<br>".join(f"`{one}`" for one in row.settings)
            needs = ["with " + ", ".join(f"`{one}`" for one in row.with_)] if row.with_ else []
            note = "; ".join([*needs, *([row.note] if row.note else [])])
            lines.append(f"| {row.what} | {settings} | {row.test} | {note} |")
        if len(works) < len(rows):
            lines += ["", "| refused | settings | reason |", "| --- | --- | --- |"]
        for row in rows:
            if not row.test:
                settings = "<br>".join(f"`{one}`" for one in row.settings)
                lines.append(f"| {row.what} | {settings} | {reason(row)} |")
    lines += ["", "## Not tested", "", "| | settings | why |", "| --- | --- | --- |"]
    lines += [f"| {what} | `{setting}` | {why} |" for what, (setting, why) in UNTESTED.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
