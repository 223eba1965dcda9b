"""The LightningModule of a run: its keys, its network, its part of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn

from mft_lightning import ranks
from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import NotYetError, UserError
from mft_lightning.model.build import Built, make_network
from mft_lightning.model.compiled import compile_layers
from mft_lightning.model.export import describe, trained_names
from mft_lightning.model.flops import UsefulFlops
from mft_lightning.model.frozen import hold_as_multiplied
from mft_lightning.model.lora import check_adapters, modules_to_save
from mft_lightning.model.objective import Objective
from mft_lightning.model.optim import (
    OptimizerKind,
    OptimizerSettings,
    SchedulerType,
    matrix_names,
)
from mft_lightning.model.own_optimizer import OwnOptimizer
from mft_lightning.model.quantized import check_quantizable, described, require_bitsandbytes
from mft_lightning.model.settings import LoraSettings, QLoraSettings
from mft_lightning.model.source import Attention, ModelSource, load_config
from mft_lightning.model.supervised_loss import SupervisedLM
from mft_lightning.model.tensor_parallel import check_tensor_parallel
from mft_lightning.model.trained import TrainedModule
from mft_lightning.shipped import shipped_example
from mft_lightning.weighting.coba import CobaSettings
from mft_lightning.weighting.famo import FamoSettings
from mft_lightning.weighting.modes import (
    TASK_WEIGHTED_MODES,
    OwnBalancer,
    WeightingMode,
    check_settings,
    make_balancer,
    named,
)
from mft_lightning.words import check_words

NETWORK = "network.model."  # where the causal LM's weights stand in this module's state


class MFTModule(TrainedModule):
    """GPT-NeoX with optional LoRA, trained on the weighted loss of all supervised tokens of a global batch.

    Args:
        pretrained_model_path: local directory or hub id of the base model.
        init: "pretrained" weights, or a "random" draw from the seed (config.json is enough).
        tokenizer_path: directory or hub id of the tokenizer. Default: the model's.
        model_type: of the model in that directory; another causal LM than gpt_neox must be named here.
        peft_type: null trains all weights, "lora" adapters, "qlora" adapters of a base in 4 or 8 bits.
        lora: settings of the adapters.
        qlora: settings of the quantised base.
        checkpoint_activations: compute activations again in the backward pass instead of keeping them.
        compile_layers: train layers compiled by torch.compile, which takes a C++ compiler and time in the first steps.
        attn_implementation: sdpa, eager, or flash_attention_2 on CUDA (not yet run on a GPU).
        pad_vocab_to_multiple_of: where the embeddings must grow for the tokenizer, grow to a multiple of this.
        trust_remote_code: run code that comes with the model.
        optimizer: adamw, or paged_adamw: bitsandbytes' AdamW, whose moments go to the host where a GPU is full (not yet
            run on a GPU); or the class path of another one (docs/own_classes.md).
        learning_rate: peak of AdamW's learning rate.
        min_lr: where decaying schedules end.
        num_warmup_steps: optimizer steps up to the peak.
        lr_scheduler_type: shape of the learning rate.
        lr_power: exponent of the polynomial schedule.
        lr_num_cycles: decays of the cosine_with_restarts schedule.
        weight_decay: AdamW's, on matrices only.
        adam_beta1: AdamW's first decay rate.
        adam_beta2: AdamW's second decay rate.
        adam_epsilon: AdamW's epsilon.
        weighted_loss_mode: case1 (tokens alike), case2 (conversations alike), case3 (tasks alike, tokens within), case4
            (tasks alike, conversations within); or case3 with weights that a balancer moves: coba, famo, or the class
            path of your own (docs/own_classes.md).
        coba: settings of CoBa.
        famo: settings of FAMO.
        label_smoothing: share of each target that is spread evenly over the vocabulary.
        z_loss: factor of the squared logarithm of the softmax's denominator, like 1e-4; it keeps logits from drifting.
        focal_gamma: exponent of the focal loss, like 2: tokens that the model knows already count less.
        max_skipped_steps: optimizer steps with a loss or a gradient that is not finite are skipped; so many in a row
            end the run with an error.
        dtype: of the weights; the command line takes it from trainer.precision.
        product_dtype: of matrix products; the command line takes it from trainer.precision.
        seed: of random weights; the command line takes it from seed_everything.
    """

    def __init__(
        self,
        *,
        pretrained_model_path: str | Path,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_path: str | Path | None = None,
        model_type: str = "gpt_neox",
        peft_type: Literal["lora", "qlora"] | None = None,
        lora: LoraSettings = LoraSettings(),  # noqa: B008  # settings are read, never written
        qlora: QLoraSettings = QLoraSettings(),  # noqa: B008
        checkpoint_activations: bool = False,
        compile_layers: bool = False,
        attn_implementation: Attention = "sdpa",
        pad_vocab_to_multiple_of: int | None = None,
        trust_remote_code: bool = False,
        optimizer: OptimizerKind | OwnOptimizer = "adamw",
        learning_rate: float = 1e-5,
        min_lr: float = 0.0,
        num_warmup_steps: int = 0,
        lr_scheduler_type: SchedulerType = "cosine",
        lr_power: float = 1.0,
        lr_num_cycles: int = 1,
        weight_decay: float = 0.1,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_epsilon: float = 1e-8,
        weighted_loss_mode: WeightingMode | OwnBalancer = "case3",
        coba: CobaSettings = CobaSettings(),  # noqa: B008
        famo: FamoSettings = FamoSettings(),  # noqa: B008
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        focal_gamma: float = 0.0,
        max_skipped_steps: int = 10,
        dtype: str = "float32",
        product_dtype: str = "float32",
        seed: int = 42,
    ) -> None:
        check_words("model", MFTModule.__init__, locals())
        if peft_type == "qlora" and lora.changes_base:
            raise UserError("model.lora.init: needs the base's own weights, which qlora quantises. Leave it out.")
        check_settings(weighted_loss_mode, coba, famo)
        if attn_implementation == "flex_attention":
            why = "It has no backward pass on the CPU, and was not yet run on a GPU. Use sdpa or eager."
            raise NotYetError("model.attn_implementation", "flex_attention", why)
        if attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
            raise UserError("model.attn_implementation: flash_attention_2 needs a CUDA GPU. Use sdpa.")
        if pad_vocab_to_multiple_of is not None and pad_vocab_to_multiple_of < 1:
            raise UserError(f"model.pad_vocab_to_multiple_of: {pad_vocab_to_multiple_of} is less than 1.")
        if max_skipped_steps < 1:
            raise UserError(f"model.max_skipped_steps: {max_skipped_steps} is less than 1.")
        if peft_type is None and lora != LoraSettings():
            raise UserError("model.lora: is set, but model.peft_type is null. Set model.peft_type: lora.")
        if peft_type != "qlora" and qlora != QLoraSettings():
            raise UserError("model.qlora: is set, but model.peft_type is not qlora. Set model.peft_type: qlora.")
        optim = OptimizerSettings(
            kind=optimizer,
            learning_rate=learning_rate,
            min_lr=min_lr,
            num_warmup_steps=num_warmup_steps,
            lr_scheduler_type=lr_scheduler_type,
            lr_power=lr_power,
            lr_num_cycles=lr_num_cycles,
            weight_decay=weight_decay,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
            adam_epsilon=adam_epsilon,
            loraplus_lr_ratio=lora.loraplus_lr_ratio,
        )
        super().__init__(optim, weighted_loss_mode)
        self.source = ModelSource(
            path=shipped_example(pretrained_model_path),
            init=init,
            model_type=model_type,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        self.tokenizer_path = tokenizer_path
        self.peft_type, self.lora, self.qlora = peft_type, lora, qlora
        self.use_dtypes(dtype, product_dtype)
        self.checkpoint_activations = checkpoint_activations
        self.compile_layers = compile_layers
        self.pad_vocab_to_multiple_of = pad_vocab_to_multiple_of
        self.coba, self.famo = coba, famo
        self.objective = Objective(label_smoothing=label_smoothing, z_loss=z_loss, focal_gamma=focal_gamma)
        self.max_skipped_steps = max_skipped_steps
        self.strict_loading = peft_type is None  # an adapter's checkpoint holds the adapter alone
        self.built: Built | None = None
        self.saved_names: set[str] = set()  # what a checkpoint holds of this module's state

    # ---------------------------------------------------------------- setting up

    def use_dtypes(self, dtype: str, product_dtype: str) -> None:
        """Hold weights and multiply matrices in these types; before the network is made."""
        self.source = replace(self.source, dtype=getattr(torch, dtype))
        self.product_dtype = getattr(torch, product_dtype)
        self.quantization = self.qlora.resolved(product_dtype) if self.peft_type == "qlora" else None

    @property
    def undivided(self) -> str | None:
        """The key whose tensors bitsandbytes takes whole, so that devices cannot share them out."""
        if self.quantization is not None:
            return "model.peft_type: qlora"
        return "model.optimizer: paged_adamw" if self.optim.kind == "paged_adamw" else None

    def check(self, datamodule: MFTDataModule, tensor_parallel_size: int = 1, *, data_alone: bool = False) -> None:
        """Raise what can be known without loading weights or data; of this machine nothing where data alone will be."""
        config = load_config(self.source.path, self.source.model_type, self.source.trust_remote_code)
        check_tensor_parallel(config, tensor_parallel_size, modules_to_save(self.lora))
        if self.compile_layers and tensor_parallel_size > 1:
            raise UserError(
                "model.compile_layers: layers that parallel.tensor_parallel_size shares out cannot be compiled. Leave "
                "one of them out."
            )
        if self.peft_type is not None:
            check_adapters(self.lora, tensor_parallel_size, quantized=self.quantization is not None)
        if self.quantization is not None and not data_alone:
            check_quantizable(self.quantization, self.source.dtype)
        if self.optim.kind == "paged_adamw" and not data_alone:
            require_bitsandbytes("model.optimizer: paged_adamw")
        if datamodule.task_weights is not None and self.weighted_loss_mode not in TASK_WEIGHTED_MODES:
            raise UserError(
                f"data.task_weights: model.weighted_loss_mode: {named(self.weighted_loss_mode)} takes no weights of "
                f"tasks. Use {' or '.join(TASK_WEIGHTED_MODES)}, or leave the weights out."
            )
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and datamodule.policy.seq_length > longest:
            raise UserError(
                f"data.seq_length: {datamodule.policy.seq_length} is more than the {longest} positions the model in "
                f"{self.source.path} is made for."
            )

    def build(self, datamodule: MFTDataModule, random_base: str = "base", *, sketched: bool = False) -> SupervisedLM:
        """Make the network, once, before a Trainer of Lightning's has the module.

        Args:
            datamodule: gives the tokenizer and the tasks.
            random_base: the directory that an adapter names as its base where the base is a random draw.
            sketched: on the meta device, for a strategy that completes and shards it layer by layer.
        """
        if self.network is None:
            self.built = make_network(
                self.source,
                datamodule.tokenizer,
                adapters=self.lora if self.peft_type is not None else None,
                quantization=self.quantization,
                objective=self.objective,
                random_base=random_base,
                checkpoint_activations=self.checkpoint_activations,
                pad_vocab_to_multiple_of=self.pad_vocab_to_multiple_of,
                packed=datamodule.packed,
                new_tokens=len(datamodule.new_tokens),
                sketched=sketched,
            )
            self.network = self.built.network
            names = datamodule.task_names
            self.balancer = make_balancer(
                self.weighted_loss_mode, datamodule.task_weights or [1.0] * len(names), self.coba, self.famo
            )
            self.measure(names)
            self.description = describe(self.network.model, self.network.causal_lm, self.built.base)
            self.description |= described(self.quantization)
            self.useful_flops = UsefulFlops.of(self.network.causal_lm)
            self.matrices = matrix_names(self.network)
            self.optim.try_out(self.network.named_parameters(), self.matrices)
            self.saved_names = {NETWORK + name for name in trained_names(self.network.model)}
        return self.network

    def fingerprint(self, datamodule: MFTDataModule) -> dict[str, Any]:
        """What decides a run's steps, by key; a checkpoint resumes only on the same."""
        return {**datamodule.fingerprint, **self.description, **self.grouping}

    @property
    def grouping(self) -> dict[str, Any]:
        """What decides the form of the optimizer's state, by key."""
        optimizer = self.optim.name if self.optim.is_own else "adamw"  # paged_adamw saves the same state
        ratio = "set" if self.lora.loraplus_lr_ratio is not None else None
        return {"model.lora.loraplus_lr_ratio": ratio, "model.optimizer": optimizer}

    def configure_model(self) -> None:
        if self.built is None:
            raise UserError(
                "MFTModule: a plain lightning.Trainer lacks the seeds, balancers, logs and checkpoints of a run. Use "
                "mft_lightning.Trainer."
            )
        if self.compile_layers:
            compile_layers(self.built.network)
        if self.built.weights is None:  # of a sketch the strategy completes part after part
            self.built.complete()
            if isinstance(self.trainer.precision_plugin, MixedPrecision):  # autocast, which no sharding strategy uses
                kind = self.trainer.strategy.root_device.type
                hold_as_multiplied(self.built.network, self.product_dtype, kind)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains: everything, or the adapter alone."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in self.saved_names}
        checkpoint["balancer"] = {**self._balanced(), **self.balancer.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights of the tasks as they were, if the same balancer had moved those of the same tasks."""
        state = dict(checkpoint.get("balancer", {}))
        if {key: state.pop(key, None) for key in self._balanced()} == self._balanced():
            self.balancer.load_state_dict(state)
        elif self.balancer.learns and ranks.is_first() and self.trainer.state.fn == TrainerFn.FITTING:
            print(f"weights of tasks: {self.balancer.name} starts anew; the checkpoint has none of it for these tasks.")

    def _balanced(self) -> dict[str, Any]:
        return {"name": self.balancer.name, "tasks": self.datamodule.task_names}
