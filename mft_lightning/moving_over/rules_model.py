"""What the original was told of the model, its adapters and its optimizer."""

from __future__ import annotations

from mft_lightning.errors import UserError
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.old_options import OPTIONS
from mft_lightning.moving_over.old_values import is_open

LORA = {"lora_rank": 96, "lora_alpha": 32, "lora_dropout": 0.05}  # which run_train.py could not be told
BITS = {"4bit": 4, "8bit": 8}
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "log_warmup_linear_decay",
)
MODES = ("case1", "case2", "case3", "case4", "coba")
COBA = ("warmup_steps", "history_length", "tau", "update_interval", "sample_valid_num")


def convert_model(conversion: Conversion) -> None:
    """The keys of ``model``, and where the run goes on."""
    _source(conversion)
    kind = _peft_type(conversion)
    resumed = _resume(conversion, kind)
    _adapters(conversion, kind, resumed)
    _quantization(conversion, kind)
    _computing(conversion)
    _optimizer(conversion)
    _weighting(conversion)


def _source(conversion: Conversion) -> None:
    path, config = conversion.take("pretrained_model_path"), conversion.take("config_path")
    if path is None and config is None:
        raise UserError("pretrained_model_path: is missing. Add the directory or hub id of the base model.")
    if path is None:
        conversion.draft.put(
            "model.pretrained_model_path", config, "config_path: config.json, and the tokenizer's files, which it needs"
        )
        conversion.draft.put("model.init", "random")
    else:
        conversion.draft.put("model.pretrained_model_path", path)
        if config is not None:
            conversion.draft.ignored.append(("config_path", "pretrained_model_path has a config.json"))
    conversion.copy("tokenizer_path")
    conversion.copy("model_type")
    conversion.copy("trust_remote_code", comment="")
    if conversion.draft.values.get("model.trust_remote_code") is False:
        del conversion.draft.values["model.trust_remote_code"]


def _peft_type(conversion: Conversion) -> str | None:
    kind = conversion.known("peft_type")
    kind = kind.lower() if kind else None
    if kind not in (None, "lora", "qlora"):
        raise UserError(f"{conversion.where('peft_type')}: {kind!r} is not trained here; lora and qlora are. Mend it.")
    if kind is not None:
        says = [conversion.default_told("peft_type")]
        if conversion.of_config:
            if kind == "lora" and conversion.take("quantization") in BITS:
                says.append(
                    f"quantization {conversion.take('quantization')}: the original's first versions quantised the base "
                    "of lora by it too; here only that of qlora is"
                )
            says.append("biases stay as they are; late versions of the original trained those of layers with adapters")
        elif kind == "qlora":
            says.append("the original had no qlora in this program; here it has one")
        conversion.draft.put("model.peft_type", kind, *says)
    return kind


def _resume(conversion: Conversion, kind: str | None) -> bool:
    """Where the run goes on; whether its adapters start from others."""
    given = conversion.take("resume_from_checkpoint")
    automatic = conversion.of_config and conversion.known("auto_resume")
    if not conversion.of_config:
        if isinstance(given, str) and given.lower() == "true":
            conversion.draft.put(
                "ckpt_path",
                "last",
                "the last checkpoint of this program in output_dir. One of the original cannot be gone on from: its "
                "weights can start a run, as model.pretrained_model_path or model.lora.start_from",
            )
        elif given is not None and str(given).lower() != "false":
            raise UserError(
                f"{conversion.where('resume_from_checkpoint')}: {given!r} is neither true nor false, and the original "
                "took it for false. Mend it."
            )
        else:
            _ignore(conversion, "resume_from_checkpoint", "false: --ckpt_path says where a run goes on")
        return False
    if given is None:
        if automatic:
            conversion.draft.put(
                "ckpt_path",
                "last",
                "auto_resume: goes on where output_dir holds a run of this program; late versions of the original did",
                conversion.default_told("auto_resume"),
            )
        return False
    says = f"resume_from_checkpoint: {OPTIONS['resume_from_checkpoint'].says}"
    if kind is None:
        conversion.draft.put("model.pretrained_model_path", given, says)
        return False
    conversion.draft.put("model.lora.start_from", given, says)
    return True


def _adapters(conversion: Conversion, kind: str | None, resumed: bool) -> None:
    targets = _targets(conversion)
    for name, fixed in LORA.items():
        value = conversion.take(name)
        if kind is None:
            _ignore(conversion, name, "peft_type is null, which trains all weights")
        elif resumed and name != "lora_dropout":
            _ignore(conversion, name, "the adapter to start from says it")
        else:
            told = conversion.default_told(name) if conversion.of_config else ""
            conversion.draft.put(OPTIONS[name].key, fixed if value is None else value, told)
    if targets is None:
        return
    if kind is None or resumed:
        _ignore(conversion, "target_modules", "there are no new adapters")
    else:
        conversion.draft.put("model.lora.target_modules", targets)


def _targets(conversion: Conversion) -> list[str] | None:
    """Names of layers; None for GPT-NeoX's four, which all its linear layers but the head are."""
    targets = conversion.take("target_modules")
    kind = conversion.take("model_type")
    if targets not in (None, ["all-linear"]):
        return targets
    if kind != "gpt_neox" and not is_open(kind) and conversion.take("peft_type"):
        raise UserError(
            f"target_modules: is all linear layers of a {kind}, whose names model.lora.target_modules must give here. "
            "Give the list."
        )
    return None


def _quantization(conversion: Conversion, kind: str | None) -> None:
    quantization, bits = conversion.take("quantization"), conversion.known("bits")
    if kind != "qlora":
        _ignore(conversion, "quantization", f"{conversion.take('quantization')}: of qlora alone")
        _ignore(conversion, "bits", "of qlora alone")
        return
    if quantization is not None and not is_open(quantization):
        if quantization not in BITS:
            raise UserError(f"{conversion.where('quantization')}: {quantization!r} is neither 4bit nor 8bit. Mend it.")
        if bits not in (None, BITS[quantization]):
            raise UserError(
                f"{conversion.where('bits')}: is {bits}, but quantization is {quantization}. Leave one out."
            )
        bits = BITS[quantization]
    if bits not in (None, 4, 8):
        raise UserError(f"{conversion.where('bits')}: {bits} is neither 4 nor 8. Mend it.")
    says = "late versions of the original took 4 whatever was given" if bits == 8 else ""
    conversion.draft.put("model.qlora.bits", bits or 4, says)


def _computing(conversion: Conversion) -> None:
    _, checkpoints = conversion.first("checkpoint_activations", "gradient_checkpointing")
    if checkpoints is None and conversion.of_config:
        conversion.draft.put("model.checkpoint_activations", True, "the original always did")
    elif checkpoints is not None:
        says = "the original did all the same" if conversion.of_config and checkpoints is False else ""
        conversion.draft.put("model.checkpoint_activations", checkpoints, says)
    attention, flash = conversion.take("attn_implementation"), conversion.take("flash_attention")
    if attention in ("eager", "sdpa", "flex_attention") or is_open(attention):
        conversion.draft.put("model.attn_implementation", attention)
    elif attention == "flash_attention_2" or flash is True:
        name = "attn_implementation" if attention else "flash_attention"
        conversion.draft.put("model.attn_implementation", "sdpa", f"{attention or name}: {OPTIONS[name].says}")
    elif attention is not None:
        raise UserError(
            f"{conversion.where('attn_implementation')}: {attention!r} is none of sdpa, eager, flash_attention_2. "
            "Mend it."
        )
    conversion.copy("make_vocab_size_divisible_by")


def _optimizer(conversion: Conversion) -> None:
    rate = conversion.copy("learning_rate")
    least = conversion.take("min_lr")
    if least is not None and isinstance(rate, float | int) and isinstance(least, float | int) and least > rate:
        if conversion.has("min_lr"):
            raise UserError(
                f"{conversion.where('min_lr')}: {least} is above learning_rate {rate}, which no decay ends at. Mend it."
            )
        least = rate
    if least is not None:
        held = "to 0, and was held at min_lr" if conversion.of_config else "to 0, whatever min_lr was"
        says = f"where the decay ends; the original decayed {held}"
        conversion.draft.put("model.min_lr", least, says, conversion.default_told("min_lr"))
    name = "custom_lr_scheduler_type" if conversion.has("custom_lr_scheduler_type") else "lr_scheduler_type"
    scheduler, other = conversion.take(name), conversion.take("lr_scheduler_type")
    if name != "lr_scheduler_type" and conversion.has("lr_scheduler_type") and other != scheduler:
        _ignore(conversion, "lr_scheduler_type", f"custom_lr_scheduler_type is {scheduler}, which came first")
    if scheduler not in SCHEDULERS and not is_open(scheduler):
        raise UserError(f"{conversion.where(name)}: {scheduler!r} is none of {', '.join(SCHEDULERS)}. Mend it.")
    conversion.draft.put("model.lr_scheduler_type", scheduler, conversion.default_told(name))
    _warmup(conversion)
    conversion.copy("weight_decay", comment=None if conversion.of_config else "")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        conversion.copy(name)
    if conversion.of_config and not conversion.has("adam_beta2"):
        conversion.draft.put(
            "model.adam_beta2", 0.999, "fixed in the original: at 0.999, in its first versions at 0.95"
        )


def _warmup(conversion: Conversion) -> None:
    steps = conversion.take("num_warmup_steps")
    if isinstance(steps, float):
        if 0 < steps < 1:
            raise UserError(
                f"{conversion.where('num_warmup_steps')}: {steps} is a share of the run, and model.num_warmup_steps is "
                "a number of optimizer steps. Give that number."
            )
        if not steps.is_integer():
            raise UserError(f"{conversion.where('num_warmup_steps')}: {steps} is no number of steps. Mend it.")
        steps = int(steps)
    says = conversion.default_told("num_warmup_steps")
    if says and conversion.of_config:
        says = "not given; the original's default, which was 0.05 of the run in its last versions"
    conversion.draft.put("model.num_warmup_steps", steps, says)


def _weighting(conversion: Conversion) -> None:
    mode = conversion.known("weighted_loss_mode")
    if mode is not None and mode not in MODES:
        raise UserError(f"{conversion.where('weighted_loss_mode')}: {mode!r} is none of {', '.join(MODES)}. Mend it.")
    conversion.copy("weighted_loss_mode")
    for key in COBA:
        name = f"coba_{key}"
        value = conversion.take(name)
        if mode != "coba":
            _ignore(conversion, name, "of weighted_loss_mode coba alone")
        elif value is not None:
            conversion.draft.put(f"model.coba.{key}", value)


def _ignore(conversion: Conversion, name: str, why: str) -> None:
    if conversion.has(name):
        conversion.draft.ignored.append((name, why))
