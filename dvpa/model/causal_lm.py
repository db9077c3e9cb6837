"""`DvpaForCausalLM`: the language model, its difficulty head and the policy that picks a tier.

Checkpoints carry DeepSeek-V3 tensor names (experts one by one); Transformers' own conversion
mapping for that family stacks them on load and parts them on save.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from dvpa.config import DvpaConfig
from dvpa.model.cache_name import CACHE_NAME
from dvpa.model.decoder import DvpaModel, DvpaPreTrainedModel
from dvpa.model.difficulty import DifficultyHead, HeadOutput, last_position
from dvpa.model.loading import find_problem
from dvpa.model.mtp import DvpaMtpLayer, pair_plan
from dvpa.model.router import Routing, TierPlan
from dvpa.model.standalone import AUTO_MAP, write_standalone
from dvpa.pricing import price
from dvpa.tiers.policy import Policy
from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)
TIER_MAP_FILE = "tier_map.json"
register_checkpoint_conversion_mapping(
    DvpaConfig.model_type, get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)


@dataclass
class DvpaOutput(CausalLMOutputWithPast):
    """Output of `DvpaForCausalLM.forward`.

    `loss` scalar; `logits` [B, S, vocab]; the cache as `past_key_values` (from Transformers 5.24 on
    also `cache`); `difficulty` [B] where the model scored the prompt itself; `tiers` int64 [B] or
    [B, S]; `routing` one record per MoE layer. `mtp_logits` [B, S - 1, vocab] and `mtp_routing`,
    where asked for: at position i, of token i + 2. Without logits, what the head reads instead:
    `last_hidden_state` [B, S, D], `mtp_hidden_state` [B, S - 1, D].
    """

    difficulty: Tensor | None = None
    tiers: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    mtp_logits: Tensor | None = None
    mtp_routing: Routing | None = None
    last_hidden_state: Tensor | None = None
    mtp_hidden_state: Tensor | None = None


class DvpaForCausalLM(DvpaPreTrainedModel, GenerationMixin):
    """A DeepSeek-V3-architecture language model whose routed experts are nested into tiers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__(config)
        self.model = DvpaModel(config)
        if config.num_nextn_predict_layers:
            self.model.layers.append(DvpaMtpLayer(config))  # V3's name for it; not in the stack
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.difficulty_head = None if config.difficulty is None else DifficultyHead(config)
        costs = [float(tier.activated_params) for tier in price(config).tiers]
        self.policy = Policy(TierMap.untrained(config.tier_names, costs))
        self.post_init()

    @property
    def tier_map(self) -> TierMap:
        """The fitted map from difficulty to tier, saved beside the weights."""
        return self.policy.tier_map

    @tier_map.setter
    def tier_map(self, tier_map: TierMap) -> None:
        if list(tier_map.tier_names) != self.config.tier_names:
            raise ValueError(
                f"tier_map: its tiers {list(tier_map.tier_names)} are not the model's "
                f"{self.config.tier_names}"
            )
        self.policy = Policy(tier_map)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        tiers: int | str | Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        with_mtp: bool = False,
        with_logits: bool = True,
        **kwargs: Any,
    ) -> DvpaOutput | tuple[Any, ...]:
        """Logits of every position at the given tiers.

        Args:
            input_ids: int64 [B, S]; attention_mask: [B, cached + S], 0 on padding.
            tiers: index or name for all, LongTensor [B] per sequence or [B, S] per token; None: the
                difficulty head and the policy decide per sequence.
            labels: int64 [B, S], -100 ignored; shifted inside, as everywhere in Transformers.
            logits_to_keep: only the last n positions (0: all), or the given positions.
            past_key_values, cache: two names of one argument, see `cache_name`.
            with_mtp: also run the multi-token prediction module; over whole sequences only.
            with_logits: False: the states that `lm_head` would read, and no logits: for a caller
                that takes them to the head in parts, since a large vocabulary fills the memory.

        Raises:
            ValueError: unknown tier, shapes that do not fit, `with_mtp` where it cannot run, or
                `labels` without logits.
        """
        scored: list[HeadOutput] = []

        def choose(states: Tensor, prompt_mask: Tensor) -> Tensor:
            if self.difficulty_head is None:
                decisions = [self.policy.decide(None) for _ in range(len(states))]
            else:
                scored.append(self.assess(states, prompt_mask))
                decisions = [self.policy.decide(d) for d in scored[0].difficulty.tolist()]
            return torch.tensor([d.tier for d in decisions], device=states.device)

        if labels is not None and not with_logits:
            raise ValueError("labels: their loss needs logits (with_logits)")
        past = past_key_values if cache is None else cache
        if with_mtp and past is not None and past.get_seq_length():
            raise ValueError("with_mtp: needs whole sequences, without a cached prompt")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past,
            inputs_embeds=inputs_embeds,
            tiers=self.config.tier_index(tiers) if isinstance(tiers, str) else tiers,
            choose=choose,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = out.hidden[:, kept]
        logits = self.lm_head(states) if with_logits else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        mtp_states, mtp_routing = None, None
        if with_mtp:
            embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            mtp_states, mtp_routing = self.mtp_states(
                out.hidden, embeds, out.plan, attention_mask, position_ids, **kwargs
            )
        result = DvpaOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: out.past_key_values},
            hidden_states=out.layer_states,
            difficulty=scored[0].difficulty if scored else None,
            tiers=out.tiers,
            routing=out.routing,
            mtp_logits=self.lm_head(mtp_states) if with_mtp and with_logits else None,
            mtp_routing=mtp_routing,
            last_hidden_state=None if with_logits else states,
            mtp_hidden_state=None if with_logits else mtp_states,
        )
        return result.to_tuple() if return_dict is False else result

    def mtp_states(
        self,
        hidden: Tensor,
        embeds: Tensor,
        plan: TierPlan,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Routing | None]:
        """What the multi-token prediction module tells the head of token i + 2 at position i.

        Args:
            hidden: [B, S, D] after the final norm; embeds: [B, S, D], the tokens' embeddings.
            plan: the tiers of the same positions.
            attention_mask, position_ids: as in `forward`.

        Returns:
            What `lm_head` reads, [B, S - 1, D] of positions 0 .. S - 2, and what the module's
            router decided.

        Raises:
            ValueError: the model has no such module, or sequences are shorter than two tokens.
        """
        config = self.config
        if not config.num_nextn_predict_layers:
            raise ValueError("with_mtp: this model has no such module (num_nextn_predict_layers)")
        length = hidden.shape[1] - 1
        if length < 1:
            raise ValueError("with_mtp: needs sequences of two tokens or more")
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device)[None]
        if attention_mask is not None and attention_mask.dim() == 4:  # made by the caller
            attention_mask = attention_mask[..., :length, :length]
        elif attention_mask is not None:
            attention_mask = attention_mask[:, :length]
        shared = self.model.shared_inputs(hidden[:, :-1], attention_mask, position_ids[:, :length])
        read, routing = self.model.layers[config.num_hidden_layers](
            hidden[:, :-1], pair_plan(plan), embeds[:, 1:], **shared, **kwargs
        )
        return read, routing

    def probe_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Base-tier states after `probe_layer` layers, [B, S, D]; nothing beyond them runs."""
        out = self.model(input_ids, attention_mask, stop_at_probe=True)
        return out.hidden

    def assess(self, states: Tensor, prompt_mask: Tensor) -> HeadOutput:
        """Run the head on probe states [B, S, D]; the mask [B, S] is True on prompt positions."""
        last = last_position(states, prompt_mask.bool())
        logits = self.lm_head(self.model.norm(last))
        return self.difficulty_head(states, prompt_mask, logits)  # type: ignore[misc]

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> HeadOutput:
        """Difficulty of prompts [B, S], without generating anything.

        Raises:
            ValueError: the model has no difficulty head.
        """
        if self.difficulty_head is None:
            raise ValueError("difficulty: this checkpoint has no difficulty head")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.assess(self.probe_states(input_ids, attention_mask), mask)

    def _update_model_kwargs_for_generation(
        self, outputs: DvpaOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Each sequence keeps the tier of its prompt while it is decoded."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        if outputs.tiers is not None:
            tiers = outputs.tiers
            model_kwargs["tiers"] = tiers if tiers.dim() == 1 else tiers[:, -1]
        return model_kwargs

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; also writes `tier_map.json` and the model's own source (auto_map)."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.tier_map.save(Path(save_directory) / TIER_MAP_FILE)
            write_standalone(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers, but incomplete checkpoints are refused; also reads `tier_map.json`.

        Raises:
            FileNotFoundError: a folder without config.json.
            ValueError: a tensor is missing, unexpected or of the wrong shape, or a shard is
                corrupt; the message names it.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        config = kwargs.get("config")
        if config is None and folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: not a checkpoint folder (no config.json there)")
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                **{"use_safetensors": True, **kwargs},
            )
        except (RuntimeError, SafetensorError) as error:
            problem = None
            if folder.is_dir():
                config = config or DvpaConfig.from_pretrained(folder)
                ignored = cls._keys_to_ignore_on_load_unexpected or ()
                problem = find_problem(folder, config, ignored)
            if problem is None and not isinstance(error, SafetensorError):
                raise  # not the checkpoint's fault: out of memory, for one
            raise ValueError(f"{folder}: {problem or error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(kind):
                first = sorted(str(item) for item in info[kind])[0]
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {kind.replace('_', ' ')}: {first} "
                    f"({len(info[kind])} in all)"
                )
        path = cached_file(
            pretrained_model_name_or_path,
            TIER_MAP_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            model.tier_map = TierMap.load(path)
        return (model, info) if wants_info else model
