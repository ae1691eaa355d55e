# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine with attention guidance in training, and masses and visual dependency in the log-prob pass.

Shape suffixes:
    B = samples of a micro-batch, S = positions, Q = selected queries, L = captured layers, H = query heads,
    R = token roles (+ 2 columns, see objectives.agto), F = fields of VISUAL_FIELDS, N = tokens of all samples
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from types import ModuleType

import torch
from peft import get_peft_model_state_dict
from peft.utils import load_peft_weights
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fs import copy_to_local
from verl.utils.ulysses import get_ulysses_sequence_parallel_group
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from avar_verl.attention.capture import CapturedMass, capture_mass, select_queries
from avar_verl.attention.mass import choose_implementation
from avar_verl.model.checkpoint import check_weights
from avar_verl.model.corrupt import blank, check_blank, first_rows, has_pixels, swap, with_first_rows
from avar_verl.model.families import Family, get_family, known_families
from avar_verl.model.freeze import excluded_modules, freeze_adapters, freeze_vision
from avar_verl.model.layers import head_size, resolve_indices, select_layers
from avar_verl.model.regions import REGION_KEY, image_region
from avar_verl.model.roles import RoleMap, TokenRole, prompt_images
from avar_verl.objectives.agto import RATIO, SHARE, AgtoTerms, agto_terms, eligible, mean_over_queries, schedule
from avar_verl.objectives.alarms import system_mass_alarm
from avar_verl.objectives.dependency import mean_dependency, token_dependency
from avar_verl.objectives.vars import MASS_FIELDS, VISUAL_ROLES, VisualReduction, visual_fields
from avar_verl.plugin.compat.cpu.detect import PLATFORM
from avar_verl.plugin.compat.verl.weight_names import checkpoint_name, peft_name
from avar_verl.plugin.config import (
    DEPENDENCY_OUTPUT,
    MEASURE_FLAG,
    PARTNER,
    QUERY_ROLES,
    VISUAL_OUTPUT,
    AgtoConfig,
    VarsConfig,
)
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
from avar_verl.plugin.engine.inputs import (
    DummyImage,
    merged_features,
    partner_features,
    prompt_rows,
    sample_features,
    with_features,
)


def _mean_over_heads(mean_over_own_heads: torch.Tensor) -> torch.Tensor:
    """Mean over the heads of all sequence-parallel ranks, with the gradient of the rank's own mean."""
    group = get_ulysses_sequence_parallel_group()
    if group is None:
        return mean_over_own_heads
    total = mean_over_own_heads.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    mean = total / torch.distributed.get_world_size(group)
    return mean_over_own_heads + (mean - mean_over_own_heads.detach())


# Models whose images reach verl's fused forward pass (verl/models/transformers/monkey_patch.py:254-277). That of all
# others (dense_common.py:30) is for text: it takes pixel features as arguments of the loss, and drops them.
FUSED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v")


class _Guidance:
    """State of one optimizer step: how many samples of the global batch have each term, and sums for the log."""

    SUMS = ("enhance", "suppress", "image_mass", "system_mass", "vas", "image_share", "lm_loss")

    def __init__(self, factor: float, num_enhance: int, num_suppress: int, num_samples: int, dp_size: int):
        self.factor, self.dp_size = factor, dp_size
        self.num_enhance, self.num_suppress, self.num_samples = num_enhance, num_suppress, num_samples
        self.sums = dict.fromkeys(self.SUMS, 0.0)

    def add(self, terms: AgtoTerms, by_role_BR: torch.Tensor, lm_loss: torch.Tensor) -> None:
        with_image, with_both = terms.has_enhance_B, terms.has_suppress_B
        self.sums["enhance"] += float(terms.enhance_B.detach().sum())
        self.sums["suppress"] += float(terms.suppress_B.detach().sum())
        self.sums["image_mass"] += float(by_role_BR[with_image, TokenRole.IMAGE].sum())
        self.sums["system_mass"] += float(by_role_BR[with_both, TokenRole.SYSTEM].sum())
        self.sums["vas"] += float(by_role_BR[with_both, RATIO].sum())
        self.sums["image_share"] += float(by_role_BR[with_both, SHARE].sum())
        self.sums["lm_loss"] += float(lm_loss.detach()) / self.dp_size

    def metrics(self, group, alarm_system_mass: float) -> dict[str, float]:
        """Means over the global batch, the same on every rank."""
        total = torch.tensor([self.sums[name] for name in self.SUMS], dtype=torch.float64, device=get_device_id())
        torch.distributed.all_reduce(total, group=group)
        sums = dict(zip(self.SUMS, total.tolist(), strict=True))
        out = {"avar/lm_loss": sums["lm_loss"], "avar/schedule": self.factor}
        out["avar/guided_samples"] = max(self.num_enhance, self.num_suppress)
        # Without image keys (cross-attention), nothing that depends on the image mass is defined.
        if self.num_enhance:
            out["avar/samples_without_system"] = self.num_enhance - self.num_suppress
            out["avar/enhance"] = sums["enhance"] / self.num_enhance
            out["avar/image_mass"] = sums["image_mass"] / self.num_enhance
        if self.num_suppress:
            for name in ("suppress", "system_mass", *(("vas", "image_share") if self.num_enhance else ())):
                out[f"avar/{name}"] = sums[name] / self.num_suppress
            out["avar/alarm/system_mass"] = float(system_mass_alarm(out["avar/system_mass"], alarm_system_mass))
        return out


class AvarFSDPEngine(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` that measures attention masses and visual dependency when its config asks for it.

    Changes relative to verl's engine; all but the last one need an `AvarFSDPEngineConfig`:
    - training with `agto`: the loss gets alpha * L_enhance + beta * L_suppress, normalised over the global batch like
      verl's own loss, and `avar/*` metrics; with alpha = beta = 0 nothing is added to it;
    - a forward pass flagged MEASURE_FLAG with `vars`: the model output gets VISUAL_OUTPUT, a few numbers per sample,
      and DEPENDENCY_OUTPUT with `token_weights`; for the dependency, the model runs again with corrupted images;
    - with `freeze_vision_tower` or `freeze_projector`: these parameters have no gradient and no optimizer state, and
      LoRA puts no adapter there;
    - for known families: images with different numbers of tiles can share a micro-batch, per-position inputs are
      computed from the ids, and a micro-batch without images runs the vision tower too (`engine.inputs`).
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self._check(model_config, engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        is_avar = isinstance(engine_config, AvarFSDPEngineConfig)
        self._agto = engine_config.agto if is_avar else None
        self._vars = engine_config.vars if is_avar else None
        self._guidance: _Guidance | None = None
        self._has_measured = False
        self._partners: dict[str, dict] = {}  # With swapped images: the features of this pass by PARTNER.
        self._role_map: RoleMap | None = None
        model_type = model_config.hf_config.model_type
        self._family: Family | None = get_family(model_type) if model_type in known_families() else None
        self._dummy_image: DummyImage | None = None
        self._frozen: list[str] = []
        if self._capturing(engine_config):
            self._role_map = RoleMap.from_pretrained(model_config.processor, model_config.hf_config)

    @staticmethod
    def _capturing(engine_config) -> list[AgtoConfig | VarsConfig]:
        """The parts of the config that need attention masses."""
        if not isinstance(engine_config, AvarFSDPEngineConfig):
            return []
        agto, vars_ = engine_config.agto, engine_config.vars
        guidance = [agto] if agto is not None and (agto.guides or agto.measure) else []
        return guidance + ([vars_] if vars_ is not None and vars_.measures_masses else [])

    @classmethod
    def _check(cls, model_config, engine_config) -> None:
        """Refuse what cannot work, before parameters are loaded."""
        if get_device_name() == "cpu" and engine_config.strategy == "fsdp":
            raise ValueError(
                "FSDP1 needs an accelerator (sync_module_states wants its parameters on one); got strategy='fsdp' on "
                "the CPU. Set strategy=fsdp2."
            )
        freezes = isinstance(engine_config, AvarFSDPEngineConfig) and engine_config.freezes
        if freezes and engine_config.strategy == "fsdp" and not engine_config.use_orig_params:
            raise ValueError(
                "FSDP1 flattens frozen and trained parameters together unless it keeps the originals; got "
                "freeze_vision_tower or freeze_projector with use_orig_params=False. Set use_orig_params=True, or "
                "strategy=fsdp2."
            )
        model_type = model_config.hf_config.model_type
        if model_config.use_fused_kernels and model_type in known_families() and model_type not in FUSED:
            raise ValueError(
                f"verl's fused kernels pass images on in {FUSED} alone, and drop them in any other model without a "
                f"word; got use_fused_kernels=True with model_type={model_type!r}. Set model.use_fused_kernels=False."
            )
        family = get_family(model_type) if model_type in known_families() else None
        attention = getattr(model_config.hf_config, "_attn_implementation", None) or ""
        if family is not None and family.no_flash is not None and "flash" in attention:
            reason = family.no_flash(model_config.hf_config.get_text_config())
            if reason:
                raise ValueError(
                    f"flash attention cannot run this {model_type}: {reason}; got attn_implementation={attention!r}. "
                    "Set model.override_config.attn_implementation=sdpa (in GRPO actor_rollout_ref.model...)."
                )
        if family is not None and family.leaks_packed:
            cls._check_packing(model_config, family)
        capturing = cls._capturing(engine_config)
        vars_ = engine_config.vars if isinstance(engine_config, AvarFSDPEngineConfig) else None
        measures_dependency = vars_ is not None and vars_.measures_dependency
        if not capturing and not measures_dependency:
            return
        if model_config.processor is None:
            raise ValueError(
                "attention masses and visual dependency need the model's processor; verl loaded none from "
                f"{model_config.tokenizer_path!r}. Check that the folder holds a processor of a family that verl knows."
            )
        sp_size = engine_config.ulysses_sequence_parallel_size
        if sp_size > 1 and not model_config.use_remove_padding:
            raise ValueError(
                "sequence parallelism needs packed micro-batches; got use_remove_padding=False with "
                f"ulysses_sequence_parallel_size={sp_size}. Set model.use_remove_padding=True."
            )
        family = get_family(model_type)  # Of the known ones, which the error names.
        cls._check_packing(model_config, family)
        if measures_dependency and vars_.corruption == "blank":
            check_blank(model_config.processor)
        wants_image_mass = any(part is vars_ or part.alpha > 0 for part in capturing)
        if family.cross_attention and wants_image_mass:
            raise ValueError(
                "L_enhance, ratio and image share need image and system keys in one softmax; got "
                f"model_type={model_type!r}, which reads images in cross-attention layers. Set avar.agto.alpha to 0, "
                "avar.vars.measure to false, and avar.vars.statistic to dependency or avar.vars.lambda_v to 0; "
                "L_suppress (avar.agto.beta) works."
            )
        text_config = model_config.hf_config.get_text_config()
        for part in capturing:
            layers = select_layers(text_config, part.layers)
            choose_implementation(
                part.implementation, get_device_name(), len(TokenRole), head_size(text_config, layers)
            )
            if part.layer_weights is not None and len(part.layer_weights) != len(layers):
                raise ValueError(
                    f"layer_weights must have one weight per layer; got {len(part.layer_weights)} for "
                    f"{len(layers)} layers. Give one weight per layer, or null."
                )
        if engine_config.agto is not None:
            resolve_indices("heads", engine_config.agto.heads, text_config.num_attention_heads)
            if engine_config.agto.heads is not None and sp_size > 1:
                raise ValueError(
                    "a subset of heads cannot be guided under sequence parallelism, which gives a rank some heads of "
                    f"its own; got avar.agto.heads={list(engine_config.agto.heads)} with a size of {sp_size}. Set "
                    "heads=null, or ulysses_sequence_parallel_size=1."
                )

    @staticmethod
    def _check_packing(model_config, family: Family) -> None:
        if model_config.use_remove_padding and family.unpackable:
            raise ValueError(
                f"samples of {model_config.hf_config.model_type} cannot be packed ({family.unpackable}); got "
                "use_remove_padding=True. Set model.use_remove_padding=False."
            )

    def _build_module(self):
        module = super()._build_module()
        if isinstance(self.engine_config, AvarFSDPEngineConfig):
            tower, projector = self.engine_config.freeze_vision_tower, self.engine_config.freeze_projector
            self._frozen = freeze_vision(module, self.model_config.hf_config.model_type, tower, projector)
            if self._family is not None and self._family.prepare is not None:
                self._family.prepare(module)
        return module

    def _build_lora_module(self, module):
        if self._frozen:
            # A copy: the config is shared, and its class refuses to set the field.
            self.model_config = copy.copy(self.model_config)
            excluded = excluded_modules(self._frozen, self.model_config.exclude_modules)
            object.__setattr__(self.model_config, "exclude_modules", excluded)
        module = super()._build_lora_module(module)
        freeze_adapters(module, self._frozen)
        adapter = self.model_config.lora_adapter_path
        if adapter is not None:
            # peft goes on with an adapter that lacks weights, at random.
            there = set(load_peft_weights(copy_to_local(adapter, use_shm=self.model_config.use_shm), device="cpu"))
            wanted = set(get_peft_model_state_dict(module))
            check_weights(wanted - there, there - wanted, adapter)
        return module

    def _build_model_optimizer(self):
        super()._build_model_optimizer()
        # For families whose forward it replaces, verl has its own dummy image.
        if self._family is not None and not self._family.verl_forward and self.model_config.processor is not None:
            self._dummy_image = DummyImage(self.module, self.model_config.processor, self._family)

    # ---- roles -------------------------------------------------------------------------------------------------

    @staticmethod
    def _masks(data: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S) bool of right-padded samples: where there is a token, and where a token of the response."""
        input_ids, mask = data["input_ids"], data["loss_mask"]
        lengths_B = input_ids.offsets().diff()
        positions_S = torch.arange(int(lengths_B.max()), device=lengths_B.device)
        real_BS = positions_S < lengths_B[:, None]
        # SFT has masks of whole samples, RL of responses: both end where the sample ends.
        mask_BM = torch.nested.to_padded_tensor(mask, padding=0)
        index_BS = positions_S - (lengths_B - mask.offsets().diff())[:, None]
        inside_BS = (index_BS >= 0) & real_BS
        return real_BS, mask_BM.gather(1, index_BS.clamp(0, mask_BM.shape[1] - 1)).bool() & inside_BS

    def _roles(self, data: TensorDict) -> torch.Tensor:
        """(B, S) roles of right-padded samples, aligned with the padded model inputs (prepare_model_inputs)."""
        ids_BS = torch.nested.to_padded_tensor(data["input_ids"], padding=0)
        real_BS, response_BS = self._masks(data)
        roles_BS = self._role_map(ids_BS, real_BS, response_BS)
        if REGION_KEY in data.keys():  # From plugin.datasets.region: image tokens outside the boxes have no role.
            region_BS = torch.nested.to_padded_tensor(data[REGION_KEY], padding=0).bool()
            roles_BS = roles_BS.masked_fill((roles_BS == TokenRole.IMAGE) & ~region_BS, TokenRole.OTHER)
        return roles_BS

    def _images_beside(self, data: TensorDict) -> torch.Tensor | None:
        """Which samples have images that a cross-attention family reads, (B,) bool; None for other families."""
        if not self._family.cross_attention:
            return None
        token_id = self.model_config.hf_config.image_token_index
        return torch.stack([(ids_S == token_id).any() for ids_S in data["input_ids"].unbind()])

    def _inside_boxes(self, roles_BS: torch.Tensor, data: TensorDict) -> torch.Tensor:
        """Roles in which image tokens of the prompt outside the reference boxes of its sample have no role.

        Args:
            roles_BS: with the images of the prompt alone (`prompt_images`).
        """
        roles_BS = roles_BS.clone()
        samples = zip(data["input_ids"].unbind(), data["extra_info"], sample_features(data), strict=True)
        for row, (ids_S, info, inputs) in enumerate(samples):
            info = info or {}
            boxes, size = info.get("boxes"), info.get("boxes_size")
            response_S = roles_BS[row, : len(ids_S)] == TokenRole.RESPONSE
            prompt_S = ids_S[: int(response_S.long().argmax()) if bool(response_S.any()) else None]
            is_image_S = roles_BS[row, : len(prompt_S)] == TokenRole.IMAGE
            if not bool(is_image_S.any()):
                continue
            places = self._family.image_places(self.model_config.processor, inputs)
            ends = accumulate(len(own) for own in places)
            num_images = sum(end <= int(is_image_S.sum()) for end in ends)  # Of the prompt; then come those of tools.
            if boxes is None or size is None or num_images != 1:
                raise ValueError(
                    "avar.vars.region needs extra_info['boxes'] and extra_info['boxes_size'] for the one image of a "
                    f"prompt; got {sorted(info)} and {num_images} images for sample {info.get('index')}. Add them "
                    "([] for the whole image), or set avar.vars.region=false."
                )
            region_S = image_region(prompt_S, self._role_map.image_token_ids, [boxes], [size], places[:1])
            roles_BS[row, : len(prompt_S)][is_image_S & ~region_S] = TokenRole.OTHER
        return roles_BS

    # ---- training: guidance ------------------------------------------------------------------------------------

    def _begin_guidance(self, data: TensorDict) -> _Guidance:
        roles_BS = self._roles(data)
        _, valid_BQ = select_queries(roles_BS, QUERY_ROLES[self._agto.query_role])
        has_enhance_B, has_suppress_B = eligible(roles_BS, valid_BQ, self._images_beside(data))
        counts = torch.stack([has_enhance_B.sum(), has_suppress_B.sum(), torch.tensor(len(roles_BS))])
        counts = counts.to(get_device_id())
        torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
        # The scheduler makes one step per optimizer step, and is part of the checkpoint.
        factor = schedule(self.lr_scheduler.last_epoch, self._agto.warmup_steps, self._agto.anneal)
        return _Guidance(factor, *counts.tolist(), dp_size=self.get_data_parallel_size())

    def _guided(self, loss_function: Callable, captured: CapturedMass) -> Callable:
        agto, guidance = self._agto, self._guidance

        def loss_with_guidance(model_output, data, dp_group=None):
            loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
            mean_mass_BLHR = torch.stack(captured.per_layer(), dim=1)
            mean_mass_BLHR = mean_mass_BLHR[:, :, list(resolve_indices("heads", agto.heads, mean_mass_BLHR.shape[2]))]
            terms = agto_terms(
                mean_mass_BLHR,
                captured.roles,
                captured.valid,
                agto.epsilon,
                agto.image_target,
                agto.system_floor,
                agto.layer_weights,
                self._images_beside(data),
            )
            # Under Ulysses a rank holds some of the heads. Values become the mean over all heads; the gradient stays
            # that of the rank's own mean, which FSDP's average over ranks turns into the mean over all heads.
            terms = replace(
                terms, enhance_B=_mean_over_heads(terms.enhance_B), suppress_B=_mean_over_heads(terms.suppress_B)
            )
            guidance.add(terms, _mean_over_heads(mean_mass_BLHR.detach().double().mean((1, 2))), loss)
            # Per-sample terms are averaged over the global batch. FSDP then averages gradients over ranks; the factor
            # dp_size cancels that, as in verl's sft_loss (verl/workers/utils/losses.py).
            if agto.alpha > 0 and guidance.num_enhance:
                weight = guidance.factor * agto.alpha * guidance.dp_size / guidance.num_enhance
                loss = loss + weight * terms.enhance_B.sum()
            if agto.beta > 0 and guidance.num_suppress:
                weight = guidance.factor * agto.beta * guidance.dp_size / guidance.num_suppress
                loss = loss + weight * terms.suppress_B.sum()
            return loss, metrics

        return loss_with_guidance

    # ---- verl's methods ----------------------------------------------------------------------------------------

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False):
        if self._is_measured(data):
            self._has_measured = True
            if self._vars.swaps:
                self._partners = partner_features(data)
        if not forward_only:
            self._check_measured()
        if forward_only or self._agto is None or not (self._agto.guides or self._agto.measure):
            return super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        self._guidance = self._begin_guidance(data)
        try:
            outputs = super().forward_backward_batch(data, loss_function, forward_only=forward_only)
            outputs["metrics"].update(
                self._guidance.metrics(self.get_data_parallel_group(), self._agto.alarm_system_mass)
            )
        finally:
            self._guidance = None
        return outputs

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only):
        if self._guidance is not None:
            capture = dict(
                layers=self._agto.layers,
                query_role=QUERY_ROLES[self._agto.query_role],
                reduction=mean_over_queries,
                implementation=self._agto.implementation,
            )
            micro_batch = micro_batch.to(get_device_id())
            with self._capture(micro_batch, self._roles(micro_batch), **capture) as captured:
                return super().forward_step(micro_batch, self._guided(loss_function, captured), forward_only)
        if not self._is_measured(micro_batch):
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        with self._capture_masses(micro_batch) as captured:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        model_output = output["model_output"]
        if captured is None:
            fields_BF = torch.full((len(micro_batch), len(MASS_FIELDS)), float("nan"), device=get_device_id())
        else:
            fields_BF = visual_fields(captured.per_layer(), captured.roles, captured.valid, self._vars.layer_weights)
        dependency_B = fields_BF.new_full((len(micro_batch),), float("nan"))
        if self._vars.measures_dependency:
            dependency = self._token_dependency(micro_batch, model_output["log_probs"])
            if self._vars.token_weights == "dependency":
                model_output[DEPENDENCY_OUTPUT] = dependency
            _, response_BS = self._masks(micro_batch)
            dependency_BS = torch.nested.to_padded_tensor(dependency, padding=0.0, output_size=response_BS.shape)
            # The log-probability of a token is at the position before it; the first token of a sample has none.
            dependency_B = mean_dependency(dependency_BS[:, :-1], response_BS[:, 1:])
        model_output[VISUAL_OUTPUT] = torch.cat([fields_BF, dependency_B[:, None]], dim=1)
        return loss, output

    def _is_measured(self, data: TensorDict) -> bool:
        """Whether the forward pass returns VISUAL_OUTPUT."""
        flagged = tu.get_non_tensor_data(data=data, key=MEASURE_FLAG, default=False)
        return bool(flagged) and self._vars is not None and self._vars.measures

    def _check_measured(self) -> None:
        """Refuse an update before any pass was measured: nothing reads `vars` in the trainer of this run."""
        if self._vars is not None and self._vars.measures and not self._has_measured:
            raise ValueError(
                "avar.vars needs the measurements of a log-prob pass before the first update; got an update without "
                f"one, with lambda_v={self._vars.lambda_v}. Set trainer.v1.trainer_mode=avar_sync and "
                "trainer.use_v1=true; or set avar.vars.lambda_v=0 and leave the other switches of avar.vars off; or "
                "set vars=null in the engine of a trainer that does not measure."
            )

    def _capture(self, micro_batch: TensorDict, roles_BS: torch.Tensor, **settings):
        packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
        offsets = {"packed_offsets": micro_batch["input_ids"].offsets()} if packed else {}
        return capture_mass(self.module, roles_BS, **settings, **offsets)

    def _capture_masses(self, micro_batch: TensorDict):
        """The capture of a measured forward pass; of None without masses."""
        if not self._vars.measures_masses:
            return nullcontext()
        roles_BS = self._roles(micro_batch)
        if self._vars.images == "prompt":
            roles_BS = prompt_images(roles_BS)
        return self._capture(
            micro_batch,
            self._inside_boxes(roles_BS, micro_batch) if self._vars.region else roles_BS,
            layers=self._vars.layers,
            query_role=TokenRole.RESPONSE,
            reduction=VisualReduction(self._vars.epsilon, lambda mass: _mean_over_heads(mass.mean(1))),
            columns=VISUAL_ROLES,
            implementation=self._vars.implementation,
        )

    def _token_dependency(self, micro_batch: TensorDict, log_probs: torch.Tensor) -> torch.Tensor:
        """d(t) of `objectives.dependency`, nested like `log_probs`, from a forward pass with corrupted images.

        A micro-batch without images is run again too: under FSDP all ranks take part in the collectives.
        """
        samples = sample_features(micro_batch)
        rows = prompt_rows(micro_batch) if self._vars.images == "prompt" else [None] * len(samples)
        images = [first_rows(features, own) for features, own in zip(samples, rows, strict=True)]
        if self._vars.swaps:
            others = [self._partners[key] for key in tu.get(micro_batch, PARTNER)]
            images = [swap(features, partner) for features, partner in zip(images, others, strict=True)]
        else:
            images = [blank(features) for features in images]
        corrupted = with_features(micro_batch, [with_first_rows(*pair) for pair in zip(samples, images, strict=True)])
        tu.assign_non_tensor(corrupted, calculate_entropy=False, calculate_sum_pi_squared=False)
        with torch.no_grad():
            _, output = super().forward_step(corrupted, None, forward_only=True)
        dependency_N = token_dependency(log_probs.values(), output["model_output"]["log_probs"].values()).float()
        # To the bit, whatever the kernels make of the same sample beside others.
        has_image_B = torch.tensor([has_pixels(features) for features in images], device=dependency_N.device)
        lengths_B = log_probs.offsets().diff()
        dependency_N = dependency_N.where(has_image_B.repeat_interleave(lengths_B), 0.0)
        return torch.nested.nested_tensor_from_jagged(dependency_N, log_probs.offsets())

    def prepare_model_inputs(self, micro_batch: TensorDict):
        if self._family is None or "multi_modal_inputs" not in micro_batch.keys():
            return super().prepare_model_inputs(micro_batch)
        dummy = self._dummy_image
        features, micro_batch = merged_features(self._family, micro_batch, dummy.features if dummy else None)
        if dummy is not None:
            dummy.wanted = not features
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if self._family.token_inputs is not None:
            inputs.update(self._family.token_inputs(self.model_config.hf_config, inputs["input_ids"], features))
        return inputs, output_args

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        params, peft_config = super().get_per_tensor_param(layered_summon, base_sync_done, **kwargs)
        module = getattr(self.module, "_fsdp_wrapped_module", self.module)
        is_peft = hasattr(module, "peft_config")
        name_of = checkpoint_name(module.get_base_model() if is_peft else module)
        if is_peft:
            name_of = peft_name(name_of)
        if peft_config is not None and base_sync_done:
            params = list(params)
            self._check_adapters([name for name, _ in params])
        return ((name_of(name), param) for name, param in params), peft_config

    def _check_adapters(self, names: list[str]) -> None:
        """Refuse adapters that vLLM would ignore, so that it would roll out with another policy than the trained one.

        vLLM puts adapters into the language model alone (unless its `enable_tower_connector_lora` is set, which verl
        does not do), and says nothing about the tensors of others.
        """
        if self._family is None:
            return
        prefixes = (*self._family.towers, *self._family.projectors)
        outside = tuple(f"base_model.model.{prefix}." for prefix in prefixes)
        ignored = sorted(name for name in names if name.startswith(outside))
        if ignored:
            raise ValueError(
                "vLLM applies adapters to the language model alone; got "
                f"{len(ignored)} tensors of adapters in the vision tower or the projector, such as {ignored[0]!r}. Set "
                "actor_rollout_ref.actor.freeze_vision_tower=true and fsdp_config.freeze_projector=true, leave them "
                "out with actor_rollout_ref.model.exclude_modules, or set actor_rollout_ref.model.lora.merge=true."
            )


# (device, vendor) keys that win over the device keys of verl's own FSDP engines.
ACCELERATORS = {"cuda": ["nvidia", "amd"], "npu": ["huawei"]}


def register_engine(_engines: ModuleType) -> None:
    """Put `AvarFSDPEngine` in the place of verl's FSDP engines for language models, on every device."""
    for device, vendors in ACCELERATORS.items():
        EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device, vendors)(AvarFSDPEngine)
    for strategy in ("fsdp", "fsdp2"):
        EngineRegistry._engines["language_model"][strategy][PLATFORM] = AvarFSDPEngine
