"""What the original was told of devices: how many, what each holds, and what it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from mft_lightning.errors import UserError
from mft_lightning.moving_over.conversion import Conversion
from mft_lightning.moving_over.old_values import is_open
from mft_lightning.moving_over.shell_expansion import as_variables, as_written

PER_NODE = ("nproc_per_node", "num_gpus")
PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed", "no": "bf16-true"}


@dataclass(frozen=True)
class Sharing:
    """How devices share out weights and states.

    Attributes:
        name: of the strategy.
        says: what is different.
        reshard: whether gathered weights are freed between forward and backward.
    """

    name: str
    says: str = ""
    reshard: bool = True


def convert_devices(conversion: Conversion) -> int | None:
    """The devices, their strategy and the precision.

    Returns:
        The devices that share out the data; None where that is left to the machine.
    """
    tensor_parallel = conversion.known("tp", 1) or 1
    nodes, devices = _count(conversion, tensor_parallel)
    draft = conversion.draft
    left_open = _left_open(conversion, nodes) if devices is None else None
    if devices is not None or left_open is not None:
        draft.put("trainer.devices", devices or left_open, "of each node" if nodes > 1 else "")
    if nodes > 1:
        draft.put("trainer.num_nodes", nodes)
    sharing = _sharing(conversion, tensor_parallel)
    if sharing is not None and devices != 1:
        draft.put("trainer.strategy", sharing.name, sharing.says)
    _precision(conversion, sharing if devices != 1 else None)
    _uncounted(conversion)
    if tensor_parallel > 1 and sharing is not None and sharing.name == "ddp":
        raise UserError(f"{conversion.where('tp')}: is {tensor_parallel}, and {sharing.says}. Give 1.")
    if tensor_parallel > 1:
        draft.put("parallel.tensor_parallel_size", tensor_parallel, "the original's code took 1 alone")
    if sharing is not None and sharing.name == "fsdp" and devices != 1:
        if not sharing.reshard:
            draft.put("parallel.reshard_after_forward", False, "gathered weights are kept until their backward")
        _offload(conversion)
    return None if devices is None else devices * nodes // tensor_parallel


def _count(conversion: Conversion, tensor_parallel: int) -> tuple[int, int | None]:
    """Nodes, and devices of each; None where the machine says it."""
    nodes = 1
    for name in ("nnodes", "num_nodes", "num_machines"):
        if name in conversion.launched:
            nodes = _nodes(conversion, name)
    per_node = None
    for name in PER_NODE:
        per_node = _launched_number(conversion, name) or per_node
    processes = _launched_number(conversion, "num_processes")
    if processes is not None:
        if processes % nodes:
            raise UserError(
                f"{conversion.where('num_processes')}: {processes} cannot be shared out over {nodes} nodes. Mend it."
            )
        per_node = processes // nodes
    data_parallel = conversion.known("dp")
    if data_parallel is None:
        return nodes, per_node
    whole = data_parallel * tensor_parallel
    if per_node is not None and per_node * nodes != whole:
        raise UserError(
            f"{conversion.where('dp')}: tp {tensor_parallel} x dp {data_parallel} is {whole}, but the launcher starts "
            f"{per_node * nodes} processes. Make them agree."
        )
    if data_parallel < 1 or tensor_parallel < 1 or whole % nodes:
        raise UserError(
            f"{conversion.where('dp')}: tp {tensor_parallel} x dp {data_parallel} cannot be shared out over {nodes} "
            "node(s). Mend it."
        )
    return nodes, whole // nodes


def _nodes(conversion: Conversion, name: str) -> int:
    """How many nodes the launcher was given.

    Raises:
        UserError: it is no number, or open.
    """
    given = conversion.launched[name]
    value = as_written(str(given.value))
    if not value.isdecimal() or not int(value):
        how = f"Give it: --set {value[1:]}=VALUE" if value[:1] == "$" and value[1:].isidentifier() else "Write it."
        raise UserError(f"{given.where}: is {value}, and trainer.num_nodes is a number that does not change. {how}")
    return int(value)


def _launched_number(conversion: Conversion, name: str) -> int | None:
    """A number of devices that the launcher was given; None where it is none, or open."""
    given = conversion.launched.get(name)
    return int(given.value) if given is not None and str(given.value).isdecimal() else None


def _left_open(conversion: Conversion, nodes: int) -> str | None:
    """The variable that says how many devices each node has; None where the launcher was given none."""
    for name in (*PER_NODE, *(("num_processes",) if nodes == 1 else ())):
        given = conversion.launched.get(name)
        if given is not None and is_open(variable := as_variables(str(given.value))) and variable[2:-1].isidentifier():
            return variable
    return None


def _uncounted(conversion: Conversion) -> None:
    """Say which of the launcher's counts became no key."""
    for name in (*PER_NODE, "num_processes"):
        given = conversion.launched.get(name)
        if given is None or str(given.value).isdecimal():
            continue
        if as_variables(str(given.value)) != conversion.draft.values.get("trainer.devices"):
            value = as_written(str(given.value))
            conversion.draft.ignored.append((f"--{name}", f"{value}: the number of devices is trainer.devices"))


def _sharing(conversion: Conversion, tensor_parallel: int) -> Sharing | None:
    kind = conversion.take("peft_type")
    if not conversion.of_config:
        if kind == "qlora":
            return Sharing("ddp", "quantised weights cannot be shared out")
        return Sharing("fsdp", "FSDP2, as the original sharded whatever dp is; ddp is faster where each holds all")
    asked = conversion.take("distributed_type")
    sharing = _of_launch(conversion, asked.lower() if asked else None)
    if sharing is None and tensor_parallel > 1:
        return Sharing("fsdp")
    if sharing is not None and sharing.name == "fsdp" and kind == "qlora":
        return Sharing("ddp", "quantised weights cannot be shared out")
    return sharing


def _of_launch(conversion: Conversion, asked: str | None) -> Sharing | None:
    """What the launcher, or the configuration, says of it; None where neither does."""
    zero = conversion.take_launched("zero_stage")
    sharded = conversion.take_launched("fsdp_sharding_strategy")
    if asked not in (None, "fsdp", "deepspeed") and not is_open(asked):
        raise UserError(f"{conversion.where('distributed_type')}: {asked!r} is neither deepspeed nor fsdp. Mend it.")
    if asked == "fsdp" or conversion.take_launched("use_fsdp"):
        if str(sharded).upper() in ("3", "NO_SHARD"):
            return Sharing("ddp", "NO_SHARD")
        if str(sharded).upper() in ("4", "5", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"):
            raise UserError(
                f"{conversion.where('fsdp_sharding_strategy')}: {sharded} shards within each node alone, which is not "
                "done here. Give FULL_SHARD."
            )
        return Sharing("fsdp", "FSDP2", reshard=str(sharded).upper() not in ("2", "SHARD_GRAD_OP"))
    if asked == "deepspeed" or zero is not None or conversion.take_launched("use_deepspeed"):
        stage = 2 if zero is None else zero
        if stage == 0:
            return Sharing("ddp", "ZeRO stage 0")
        return Sharing("fsdp", f"ZeRO stage {stage} in the original; FSDP2 shares out the same", reshard=stage == 3)
    return None


def _offload(conversion: Conversion) -> None:
    found = [
        name
        for name in ("offload_optimizer_device", "offload_param_device")
        if conversion.take_launched(name) not in (None, "none")
    ]
    if conversion.take_launched("fsdp_offload_params") is True:
        found.append("fsdp_offload_params")
    if found:
        conversion.draft.put(
            "parallel.cpu_offload", True, f"{', '.join(found)}: weights, gradients and optimizer states together"
        )


def _precision(conversion: Conversion, sharing: Sharing | None) -> None:
    if conversion.of_config:
        asked = conversion.take_launched("mixed_precision") or "bf16"
        says = "weights and moments in float32, products in bfloat16, as the original's launches ask for"
        says = says if "mixed_precision" not in conversion.launched else ""
    else:
        half, brain = conversion.take("fp16"), conversion.take("bf16")
        if half and brain:
            conversion.draft.ignored.append(("fp16", "bf16 is given, which came first"))
        if not half and not brain:
            return
        asked, says = "bf16" if brain else "fp16", ""
    if is_open(asked):
        conversion.draft.put("trainer.precision", asked)
        return
    if asked not in PRECISIONS:
        raise UserError(f"{conversion.where('mixed_precision')}: {asked!r} is none of bf16, fp16, no. Mend it.")
    if asked == "fp16" and sharing is not None and sharing.name == "fsdp":
        where = conversion.where("fp16" if "fp16" in conversion.given else "mixed_precision")
        raise UserError(
            f"{where}: fp16 scales losses, which is not done where devices share out weights and states. Use bf16."
        )
    if asked == "no":
        says = "mixed_precision no: the original held weights and moments in bfloat16"
    conversion.draft.put("trainer.precision", PRECISIONS[asked], says)
