"""How much memory a device needs for an optimizer step, part by part, counted from shapes.

A step is looked at where memory is highest: with all activations at the loss, at both ends of the backward pass, in the
optimizer, and where layouts of several devices have something of their own. What a layer keeps of its forward pass is
in ``activations.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from mft_lightning.model.activations import Computation, heads_within, kept_by_layer
from mft_lightning.model.adapters import has_adapters, in_adapter
from mft_lightning.model.frozen import only_multiplied
from mft_lightning.model.lora_start import changes_base
from mft_lightning.model.loss_memory import LossMemory
from mft_lightning.model.parallel import transformer_layers
from mft_lightning.model.product_dtype import computes_bfloat16
from mft_lightning.model.quantized import dequantized_bytes, eight_bit_layers, held_bytes
from mft_lightning.model.step_setup import StepSetup
from mft_lightning.model.whole_modules import in_force

PARTS = ("weights", "gathered weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be highest.

    Attributes:
        name: of the moment.
        parts: bytes of each of ``PARTS``.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def moments_of_step(setup: StepSetup) -> list[Moment]:
    """Each device's memory in bytes where it may be highest, in the order of a step that is not the first."""
    return _Step(setup).moments()


def peak(setup: StepSetup) -> Moment:
    """The moment of a step that needs the most memory."""
    return max(moments_of_step(setup), key=lambda moment: moment.total)


class _Step:
    """Sizes of a setup in numbers of elements (``…_numel``) and in bytes (all others)."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup = setup
        network = self.network = setup.group_member()
        layers = transformer_layers(network)
        self.config, self.layer, self.layers = network.causal_lm.config, cast(Any, layers[0]), len(layers)
        self.head: Any = in_force(cast(nn.Module, network.causal_lm.get_output_embeddings()))
        self.several = setup.micro_batches > 1
        self.fsdp = setup.sharing == "fsdp"
        self.communicates = self.fsdp and setup.data_parallel_size > 1
        self.again = setup.checkpoint_activations
        self.mixed = setup.precision.endswith("-mixed")
        # bytes of an element
        self.held = next(network.parameters()).element_size()
        self.used = 2 if self.mixed and self.fsdp else self.held  # of weights as layers see them
        self.product = 2 if self.mixed else self.held
        self.stream = self.used
        self.halved = only_multiplied(network, setup.device) if self.mixed and not self.fsdp else []
        self.reduced = 4 if self.fsdp and setup.precision.startswith("bf16") else self.held
        # weights; the root is all that is not in a layer
        self.numel, self.trained_numel = _numel(network.parameters()), _numel(_trained(network))
        self.layer_numel, self.layer_trained_numel = _numel(self.layer.parameters()), _numel(_trained(self.layer))
        self.root_numel = self.numel - self.layers * self.layer_numel
        self.root_trained_numel = self.trained_numel - self.layers * self.layer_trained_numel
        self.head_trained_numel = _numel(_trained(self.head))
        seen = self.product if self.head in self.halved else self.used
        self.loss = LossMemory(self.head, setup.tokens, setup.device, self.product, seen, not self.again)
        self.root_last_numel = _trained(network)[-1].numel() if self.root_trained_numel else 0
        # a share of what is held for the whole step; offloaded, it is not on the device
        offloaded = setup.parallel.cpu_offload and setup.device == "cuda"
        self.share = 0.0 if self.fsdp and offloaded else 1 / setup.data_parallel_size if self.fsdp else 1.0

    def moments(self) -> list[Moment]:
        """In the order of a step; FSDP2's gathering at the beginning of one, and DDP's second step, are their own."""
        found = [("loss", self._at_loss()), ("backward begins", self._backward_begins())]
        found += [("backward ends", self._backward_ends()), ("optimizer", self._update())]
        if self.fsdp:
            found.insert(0, ("forward begins", self._forward_begins()))
        if self.setup.sharing == "ddp":
            # gradients of the first step live on in its buckets while the reducer lays out others
            found.append(("second step begins", {"gradients": 2 * self.trained_numel * self.held}))
        network = self.network
        fixed = {
            "weights": sum(map(held_bytes, network.parameters())) * self.share + self._begun() - self._halves(),
            "optimizer": 2 * self.trained_numel * self.held * self.share,  # AdamW's two moments
            "loss": self.loss.kept(),
        }
        return [
            Moment(name, {part: round(fixed.get(part, 0) + parts.get(part, 0)) for part in PARTS})
            for name, parts in found
        ]

    # ---------------------------------------------------------------- where memory is highest, beside what is fixed

    def _forward_begins(self) -> dict[str, float]:
        """FSDP2 gathers the root, then the first layer, each into a buffer from which it is copied out."""
        gathered = (2 if self.communicates else 1) * (self.root_numel + self.layer_numel) * self.used
        return {"gathered weights": gathered, "gradients": self._unreduced()}

    def _at_loss(self) -> dict[str, float]:
        """The last micro-batch's activations are all there, and a chunk of its logits."""
        return {
            "weights": self._casts(0 if self.again else self.layers),
            "gathered weights": self._gathered(0, coming=2),
            "gradients": self._before_backward(),
            "activations": self._kept() + 2 * self._hidden_states(),  # the last norm's input, and what it gave
            "loss": 2 * self._hidden_states() + self.loss.beside_kept(),  # the head's inputs and their gradients
        }

    def _backward_begins(self) -> dict[str, float]:
        """In the last layer, its activations computed again where they were not kept."""
        return {
            "weights": self._casts(1 if self.again else self.layers),
            "gathered weights": self._gathered(1, coming=2),
            "gradients": self._before_backward() + self._new_gradients(self.head_trained_numel),
            "activations": self._kept() + self._recomputed() + self._in_backward(),
        }

    def _backward_ends(self) -> dict[str, float]:
        """In the first layer or, after it, in the embedding, whichever needs more."""
        of_head, of_rest = self.head_trained_numel, self.root_trained_numel - self.head_trained_numel
        if self.fsdp:
            sharded = self.layers * self.layer_trained_numel * self.held * self.share
            earlier = self.root_trained_numel * self.reduced if self.several else 0
            in_layer = sharded + earlier + self._new_gradients(of_head)
            in_embedding = sharded + max(self._reducing_root(), self._adding_tied() + earlier)
        elif self.several or self.setup.sharing == "ddp":  # all are there, and one is made that is added or copied
            in_layer = self.trained_numel * self.held + self._new_gradients(0)
            in_embedding = (self.trained_numel + of_rest) * self.held
        else:
            in_layer = (self.trained_numel - of_rest) * self.held
            in_embedding = self.trained_numel * self.held
        first = {
            "weights": self._casts(1),
            "gathered weights": self._gathered(1, coming=1),
            "gradients": in_layer,
            "activations": self._layer() + self._in_backward(),
        }
        embedding = {"gradients": in_embedding, "activations": self._hidden_states()}
        return max(first, embedding, key=lambda parts: sum(parts.values()))

    def _update(self) -> dict[str, float]:
        """AdamW is fused and needs nothing, unless the loss is scaled, when it has the denominators of all weights, or
        weights are cut in several ways, when it has those of one after the other.
        """
        trained = self.trained_numel * self.held * self.share
        if self.setup.precision == "16-mixed":
            return {"gradients": trained, "optimizer": trained}
        if self.setup.parallel.tensor_parallel_size == 1:
            return {"gradients": trained}
        sizes = [parameter.numel() * self.held * self.share for parameter in _trained(self.network)]
        pairs = zip(sizes, [0, *sizes], strict=False)  # two of a weight, and that of the weight before
        return {"gradients": trained, "optimizer": max((2 * size + before for size, before in pairs), default=0)}

    # ---------------------------------------------------------------- parts

    def _begun(self) -> float:
        """What adapters took from the base to begin with, which the first rank keeps in host memory to save it."""
        adapted: Any = self.setup.network.model
        if self.setup.device != "cpu" or not has_adapters(adapted) or not changes_base(adapted.peft_config["default"]):
            return 0
        named = self.setup.network.named_parameters()
        return sum(value.numel() for name, value in named if value.requires_grad and in_adapter(name)) * self.held

    def _halves(self) -> float:
        """What is spared by holding frozen weights as products read them (``frozen.py``)."""
        return (self.held - self.product) * sum(_numel(linear.parameters()) for linear in self.halved)

    def _unreduced(self) -> float:
        """Gradients of earlier micro-batches; FSDP2 holds them whole until the last one's backward."""
        return self.trained_numel * self.reduced if self.several else 0

    def _before_backward(self) -> float:
        """Gradients that are there before the last backward; DDP's buckets always are."""
        buckets = self.trained_numel * self.held if self.setup.sharing == "ddp" else 0
        return self._unreduced() + buckets

    def _new_gradients(self, head_numel: int) -> float:
        """Of the head and of one layer, before they are reduced, or added to those of earlier micro-batches."""
        if self.fsdp:
            return (head_numel + self.layer_trained_numel) * self.used + self.layer_trained_numel * self.reduced
        if self.several or self.setup.sharing == "ddp":
            return max(map(_numel_of, _trained(self.layer)), default=0) * self.held
        return (head_numel + self.layer_trained_numel) * self.held

    def _reducing_root(self) -> float:
        """FSDP2's whole gradients of the root (of several micro-batches their sum), and the buffer for the others'.

        On a CPU gloo copies the buffer again, before the gradient of the root's last weight, most often the head's, is
        let go. A single group copies it to the place of what several would reduce it to, with all gradients gone.
        """
        root, summed = self.root_trained_numel, self.reduced if self.several else self.used
        copied = root * (summed + self.reduced)
        if not self.communicates:
            return max(copied, 2 * root * self.reduced)
        if self.setup.device != "cpu":
            return copied
        shares = 2 + 1 / self.setup.data_parallel_size
        return max(copied, self.root_last_numel * summed + root * self.reduced * shares)

    def _adding_tied(self) -> float:
        """Gradients of a weight that is both embedding and head: each one's, and their sum."""
        tied = self.head.weight is self.network.causal_lm.get_input_embeddings().weight
        return 3 * self.head_trained_numel * self.used if tied else 0

    def _gathered(self, layers: int, coming: int) -> float:
        """FSDP2's whole weights: the root's, and those of layers.

        Args:
            layers: whose weights are there.
            coming: as many again, as the buffers that they come in; a single group copies its weights without such.
        """
        if not self.fsdp:
            return 0
        layers += coming if self.communicates else 0
        if not self.setup.parallel.reshard_after_forward:
            layers = self.layers + 1
        return (self.root_numel + layers * self.layer_numel) * self.used

    def _casts(self, layers: int) -> float:
        """What matrix products under autocast keep of the weights of so many layers, in half precision."""
        if not self.mixed or self.fsdp:
            return 0
        linears = {module for module in self.layer.modules() if type(module) is nn.Linear}.difference(self.halved)
        return 2 * layers * sum(_numel(linear.parameters()) for linear in linears)

    def _hidden_states(self) -> float:
        return self.setup.tokens * self.config.hidden_size * self.stream

    def _layer(self) -> float:
        """What one layer keeps, computed in full."""
        setup = self.setup
        rows = 1 if setup.packed else setup.conversations
        eager_row = setup.packed and self.config._attn_implementation == "eager"
        half_on_cpu = setup.device == "cpu" and self.product == 2 and computes_bfloat16()
        how = Computation(
            stream=self.stream,
            product=self.product,
            adapter=self.used,
            device=setup.device,
            norms_cast=self.mixed and self.stream == 2 and setup.device == "cuda",
            rows=rows,
            length=setup.tokens if eager_row else setup.length,
            blocked=half_on_cpu and setup.packed and not eager_row and not self.config.attention_dropout,
        )
        return setup.tokens * sum(kept_by_layer(self.layer, self.config, how).values())

    def _kept(self) -> float:
        """What all layers keep, or their inputs alone, with what they share: rotary positions, and eager's mask."""
        tokens, config = self.setup.tokens, self.config
        rotary = int(config.hidden_size // config.num_attention_heads * config.rope_parameters["partial_rotary_factor"])
        shared = 2 * tokens * rotary * self.stream  # cosine and sine
        if config._attn_implementation == "eager":
            shared += tokens * (tokens if self.setup.packed else self.setup.length) * self.stream
        each = self._hidden_states() if self.again else self._layer()
        return shared + self.layers * (each + self._held_inputs())

    def _held_inputs(self) -> float:
        """Inputs that 8-bit layers hold themselves, and not autograd, which could compute them again."""
        return self.setup.tokens * self.product * sum(linear.in_features for linear in eight_bit_layers(self.layer))

    def _recomputed(self) -> float:
        return self._layer() - self._hidden_states() + self._held_inputs() if self.again else 0

    def _in_backward(self) -> float:
        """Gradients of a layer's activations, and results of its forward pass where that is computed again.

        In the MLP's last matrix there are those of what it gives and what it reads, and itself if it is quantised; in
        attention that is not fused those of all scores, of which the MLP's activations are gone by then.
        """
        tokens, config = self.setup.tokens, self.config
        inner = tokens * self.layer.mlp.dense_h_to_4h.out_features * self.product
        made = inner + dequantized_bytes(self.layer.mlp.dense_4h_to_h, self.held, self.product)
        if config._attn_implementation == "eager":
            row = tokens if self.setup.packed else self.setup.length
            heads = heads_within(self.layer.attention.query_key_value.out_features // 3, config)
            made = max(made, 2 * tokens * heads * row * 4 - 2 * inner)
        if self.mixed and not self.fsdp and has_adapters(self.network.model):
            made += 2 * 4 * tokens * self.layer.mlp.dense_h_to_4h.out_features  # of what float32 adapters read
        if self.again and has_adapters(self.network.model):
            made += 4 * tokens * config.hidden_size * self.product  # what adapters add to, and to what they are added
        return self._hidden_states() + made


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _numel_of(parameter: nn.Parameter) -> int:
    return parameter.numel()


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(map(_numel_of, parameters))
