"""Options of the original that have no key here, each with the reason."""

from __future__ import annotations

_NOT_READ = "the original never read it"
_OVERWRITTEN = "the original overwrote it"
_ALWAYS = "always so here"
_STARTING = "how processes are started is the launcher's (docs/parallel.md)"

IGNORED = {
    "train_iters": "epochs and max_steps say how long a run is; the original ignored it too",
    "padding": "padding_mode says how rows are filled",
    "use_dynamic_padding": f"{_ALWAYS}: a batch is as long as its longest row",
    "shuffle_before_split": f"{_ALWAYS}, by the seed",
    "use_random_sampler": f"{_ALWAYS}, by the seed",
    "use_weighted_loss": "weighted_loss_mode says how losses are weighed",
    "weight_by_num_documents": "weighted_loss_mode says how losses are weighed, data.task_sampling how tasks are drawn",
    "real_dataloader": _NOT_READ,
    "overwrite_cache": "changed files are noticed by themselves",
    "no_keep_linebreaks": f"{_NOT_READ}: contents are kept to the letter",
    "validation_split_percentage": f"{_NOT_READ}: data_split is",
    "vocab_file": "the tokenizer's directory has it",
    "tokenizer_type": "the tokenizer's directory says it",
    "use_slow_tokenizer": "the fast tokenizer gives the same ids",
    "ignore_mismatched_sizes": "weights of another shape would be drawn at random; here they are an error",
    "low_cpu_mem_usage": "how weights are read is decided here",
    "use_xformers": "model.attn_implementation says how attention is computed",
    "model_types": _NOT_READ,
    "hidden_size": f"{_OVERWRITTEN} from config.json",
    "num_hidden_layers": f"{_OVERWRITTEN} from config.json",
    "vocab_size": f"{_OVERWRITTEN} from config.json",
    "total_model_param": _OVERWRITTEN,
    "fp16_lm_cross_entropy": f"{_NOT_READ}: losses are summed in float32",
    "num_update_steps_per_epoch": _OVERWRITTEN,
    "resume_step": f"{_NOT_READ}: --ckpt_path says where a run goes on",
    "iteration": _NOT_READ,
    "push_to_hub": "the original never did; upload a checkpoint's directory",
    "hub_model_id": "the original never uploaded; upload a checkpoint's directory",
    "hub_token": "the original never uploaded; a token has no place in a file",
    "with_tracking": "TensorBoard and metrics.csv are always written; trainer.logger takes others",
    "report_to": "TensorBoard and metrics.csv are always written; trainer.logger takes others",
    "skip_atorch_autoacc_dryrun": "of atorch alone",
    "zero_opt_level": _NOT_READ,
    "world_size": f"{_OVERWRITTEN} by the number of processes",
    "local_rank": "the launcher gives it",
    "init_timeout_seconds": "ranks wait for each other (docs/parallel.md)",
    "save_transformers_model": f"{_ALWAYS}: a checkpoint is a Hugging Face directory",
    "do_train": _OVERWRITTEN,
    "do_valid": _OVERWRITTEN,
    **dict.fromkeys(
        ("selfpaced_interval", "selfpaced_history_length", "selfpaced_sample_valid_num", "selfpaced_scale_factor"),
        "of weighted_loss_mode selfpaced, which is refused",
    ),
}

# of accelerate, torchrun, deepspeed and atorch's launcher
LAUNCHERS_OWN = {
    **dict.fromkeys(
        (
            "node_rank",
            "master_addr",
            "master_port",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
            "main_training_function",
            "deepspeed_multinode_launcher",
            "dynamo_backend",
            "same_network",
            "rdzv_backend",
            "rdzv_id",
            "rdzv_endpoint",
            "rdzv_conf",
            "max_restarts",
            "standalone",
            "hostfile",
            "include",
            "exclude",
            "compute_environment",
            "multi_gpu",
            "use_cpu",
            "downcast_bf16",
            "num_cpu_threads_per_process",
        ),
        _STARTING,
    ),
    **dict.fromkeys(
        (
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "fsdp_auto_wrap_policy",
            "fsdp_state_dict_type",
            "fsdp_backward_prefetch_policy",
            "fsdp_backward_prefetch",
            "fsdp_forward_prefetch",
            "fsdp_transformer_layer_cls_to_wrap",
            "fsdp_sync_module_states",
            "fsdp_use_orig_params",
            "fsdp_cpu_ram_efficient_loading",
        ),
        "fsdp shards layer by layer here, and checkpoints are whole models",
    ),
}

REFUSED = {
    "split_before_read": "one task's directory with train/ and valid/ in it is not read. Give directories named as the "
    "tasks to data.data_paths and data.valid_data_paths.",
    "is_pipe_parallel": "there is no pipeline parallelism here. Use trainer.strategy: fsdp.",
    "pipe_parallel_size": "there is no pipeline parallelism here. Use trainer.strategy: fsdp.",
    "model_parallel_size": "layers are shared by parallel.tensor_parallel_size here. Give it as tp.",
    "role_markers": "the role markers are fixed here (docs/data.md). Leave it out, and train anew.",
    **dict.fromkeys(
        (
            "xxpo",
            "beta",
            "rpo_alpha",
            "dataset_num_proc",
            "max_prompt_length",
            "max_length",
            "warmup_steps",
            "logging_steps",
            "save_steps",
            "eval_steps",
        ),
        "is of preference alignment (DPO, ORPO), which this program does not do.",
    ),
}
HARMLESS: dict[str, tuple[object, ...]] = {  # values of those that change nothing
    "split_before_read": (False,),
    "is_pipe_parallel": (False,),
    "pipe_parallel_size": (0, 1, None),
    "model_parallel_size": (1, None),
    "role_markers": (None,),
}
