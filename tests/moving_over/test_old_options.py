"""No option of the original is passed over: each is mapped, ignored with a reason, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mft_lightning.errors import UserError
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.old_options import CONFIG, DEFAULTS, OPTIONS, SCRIPT, as_markdown
from mft_lightning.moving_over.old_values import Given
from mft_lightning.moving_over.original import convert
from mft_lightning.run_config import RunConfig
from tests.conftest import ROOT, SHARED
from tests.moving_over.launches import CONFIG_OPTIONS, KINDS, SCRIPT_OPTIONS, VALUES, config, script

# what run_train.py's parser takes
OF_SCRIPTS = re.findall(
    r"\w+",
    """
load_raw_dataset data_paths data_weights data_split padding tokenize_mode train_mode weighted_loss_mode padding_mode
shuffle_before_split use_random_sampler use_weighted_loss early_stopping_patience weight_by_num_documents
make_vocab_size_divisible_by validation_split_percentage pretrained_model_path config_path model_type peft_type bits
use_xformers use_dynamic_padding tokenizer_path vocab_file tokenizer_type use_slow_tokenizer trust_remote_code
ignore_mismatched_sizes per_device_train_batch_size per_device_valid_batch_size total_train_batch_size world_size
local_rank learning_rate min_lr weight_decay adam_beta1 adam_beta2 adam_epsilon num_train_epochs max_steps
gradient_accumulation_steps lr_scheduler_type custom_lr_scheduler_type num_warmup_steps num_update_steps_per_epoch
resume_step fp16_lm_cross_entropy bf16 fp16 output_dir tensorboard_dir seed model_types seq_length hidden_size
num_hidden_layers vocab_size total_model_param preprocessing_num_workers num_workers iteration overwrite_cache
no_keep_linebreaks push_to_hub hub_model_id hub_token checkpointing_steps resume_from_checkpoint flash_attention
with_tracking skip_atorch_autoacc_dryrun zero_opt_level report_to real_dataloader split_before_read tp dp
pipe_parallel_size model_parallel_size train_iters valid_iters valid_interval is_pipe_parallel log_interval
checkpoint_activations max_grad_norm evaluation_strategy save_strategy extra_save_by_epoch save_total_limit
metric_for_best_model greater_is_better
""",
)
# what the JSON files of all editions hold
OF_CONFIGS = re.findall(
    r"\w+",
    """
data_paths output_dir tb_dir pretrained_model_path model_type load_raw_dataset task_weights data_weights
low_cpu_mem_usage data_split padding_mode tokenize_mode weighted_loss_mode peft_type quantization lora_rank lora_alpha
lora_dropout target_modules per_device_train_batch_size per_device_eval_batch_size tokenizer_type learning_rate min_lr
weight_decay gradient_accumulation_steps lr_scheduler_type num_warmup_steps num_train_epochs seed seq_length
resume_from_checkpoint auto_resume log_interval checkpointing_steps evaluation_steps max_train_steps epoch_checkpointing
shuffle_before_split use_random_sampler early_stopping early_stopping_stall_num saving_limit use_dynamic_padding
coba_warmup_steps coba_history_length coba_tau coba_update_interval coba_sample_valid_num selfpaced_interval
selfpaced_history_length selfpaced_sample_valid_num selfpaced_scale_factor attn_implementation role_markers
distributed_type init_timeout_seconds use_xformers trust_remote_code weight_by_num_documents
make_vocab_size_divisible_by model_parallel_size use_slow_tokenizer world_size save_transformers_model vocab_file
evalation_steps checkpoint_activations preprocessing_num_workers num_workers
""",
)
OF_COMMANDS = (
    "train_config data_paths output_dir tb_dir pretrained_model_path micro_batch_size model_type distributed_type"
)


@pytest.mark.parametrize("name", [*OF_SCRIPTS, *OF_CONFIGS, *OF_COMMANDS.split()])
def test_every_option_of_the_originals_parsers_is_in_the_table(name: str) -> None:
    assert name in OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_key_or_a_reason(name: str) -> None:
    option = OPTIONS[name]
    assert option.key if option.fate == "mapped" else option.says


def test_every_option_of_the_list_of_parameters_is_in_the_table() -> None:
    listed = named_parameters(spec("PARAMETERS.md"))
    assert len(listed) > 60 and not listed - OPTIONS.keys()


def test_every_option_of_the_originals_page_is_in_the_table() -> None:
    listed = set(re.findall(r"^- \*\*(\w+)\*\*:", spec("000_c59dc96a5fe3620f.txt"), re.MULTILINE))
    assert len(listed) >= 30 and not listed - OPTIONS.keys()


def spec(name: str) -> str:
    file = SHARED / "spec" / name
    if not file.is_file():
        pytest.skip(f"the original's description is not beside this checkout (../shared/spec/{name})")
    return file.read_text(encoding="utf-8", errors="replace")


def named_parameters(text: str) -> set[str]:
    """The names in the first column of the table, and in the brackets of its last row."""
    found: set[str] = set()
    for row in text.splitlines():
        first = row.split("|")[1].strip() if row.startswith("|") else ""
        if first.startswith("all other options"):
            first = first[first.index("(") + 1 : first.index(")")]
        else:
            first = re.sub(r"\([^)]*\)", "", first).replace("pad token", "pad_token")
        found |= {name.strip() for name in first.split(",") if re.fullmatch(r"\w+", name.strip())}
    return found - {"original"}


def test_every_key_of_the_table_is_one_of_a_run() -> None:
    known = {option.lstrip("-") for action in parser_of_a_run()._actions for option in action.option_strings}
    keys = {key for option in OPTIONS.values() for key in option.key.split(", ") if key and not key.startswith("(")}
    assert not keys - known


def parser_of_a_run():  # type: ignore[no-untyped-def]
    kept = {}

    class Kept(RunConfig):
        def parse_arguments(self, parser, args) -> None:  # type: ignore[no-untyped-def]
            kept["parser"] = parser
            raise UserError("that is all")

    with pytest.raises(UserError):
        Kept([], "fit")
    return kept["parser"]


def test_the_docs_print_the_table() -> None:
    """Otherwise: ``python -c "from mft_lightning.moving_over.old_options import *; print(as_markdown())"``."""
    assert as_markdown() in (ROOT / "docs" / "moving_over.md").read_text()


# values that are accepted, for options that the launches of launches.py do not have
ACCEPTED: dict[str, object] = {
    "data_weights": "[1.0,1.0]",
    "target_modules": "all-linear",
    "task_weights": "[1.0,1.0]",
    "role_markers": None,
    "quantization": None,
    "bits": 4,
    "model_parallel_size": 1,
    "pipe_parallel_size": 0,
    "split_before_read": False,
    "is_pipe_parallel": False,
    "attn_implementation": "eager",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "max_steps": -1,
    "max_train_steps": None,
    "lr_scheduler_type": "cosine",
    "resume_from_checkpoint": None,
    "distributed_type": None,
    "per_device_train_batch_size": 10,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.1,
    "eos_token": "</s>",
    "pad_token": "<pad>",
}
FLAGS = {"fp16": False, "trust_remote_code": False, "load_raw_dataset": True, "early_stopping": True}


def accepted(name: str) -> object:
    """A value of an option that changes nothing that others say."""
    if name in ACCEPTED:
        return ACCEPTED[name]
    kind = OPTIONS[name].kind
    return FLAGS.get(name, True) if kind == "flag" else {"whole": 3, "number": 1.0}.get(kind, "x")


@pytest.mark.parametrize("name", sorted({*OF_SCRIPTS} - {*SCRIPT_OPTIONS}))
def test_a_script_with_any_option_says_what_became_of_it(tmp_path: Path, name: str) -> None:
    value = accepted(name)
    given = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    (tmp_path / "run.sh").write_text(script(**{name: given}))
    told(name, convert(tmp_path / "run.sh", VALUES, {}))


@pytest.mark.parametrize("name", sorted({*OF_CONFIGS} - {*CONFIG_OPTIONS, *KINDS["coba"], *KINDS["lora"]}))
def test_a_json_file_with_any_option_says_what_became_of_it(tmp_path: Path, name: str) -> None:
    changed = {name: accepted(name)} | ({"evaluation_steps": ...} if name == "evalation_steps" else {})
    (tmp_path / "a.json").write_text(config("lora", **changed))
    told(name, convert(tmp_path / "a.json", (), {}))


def told(name: str, converted: object) -> None:
    draft = converted.draft  # type: ignore[attr-defined]
    named = {about.lstrip("-") for about, _ in draft.ignored}
    assert name in named or any(key in draft.values for key in OPTIONS[name].key.split(", "))


@pytest.mark.parametrize("form", [SCRIPT, CONFIG])
def test_defaults_are_of_options_and_of_their_kinds(form: str) -> None:
    conversion = Conversion(form, {})
    for name, value in DEFAULTS[form].items():
        assert OPTIONS[name].fate == "mapped"
        assert Conversion(form, {name: Given(value, name, typed=True)}).take(name) == conversion.take(name) == value
