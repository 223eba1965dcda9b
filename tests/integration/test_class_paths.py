"""Strategies of Lightning's that are named by their class path run here, or are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from tests.integration.conftest import metrics, same_weights, weights
from tests.integration.layouts import apart, differ, in_series

FSDP1, DDP = ("lightning.pytorch.strategies.FSDPStrategy", "lightning.pytorch.strategies.DDPStrategy")
DEEPSPEED = "lightning.pytorch.strategies.DeepSpeedStrategy"
WHOLE = ("--model.lora.modules_to_save", "[embed_in,lm_head]")
KINDS: dict[str, tuple[str, ...]] = {"full": (), "lora": ("--model.lora.dropout", "0", *WHOLE)}
LAYER = "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer"
HYBRID = ("--trainer.strategy.sharding_strategy", "HYBRID_SHARD")
KEEP = ("--checkpoint.save_total_limit", "null", "--data.per_device_train_batch_size", "2")
LAST, HALF = "step-00000008", "step-00000004"


WITHOUT_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")


class OwnDDPStrategy(DDPStrategy):
    """One that a user derived."""


def by_class_path(kind: str) -> tuple[str, str]:
    return ("--trainer.strategy.class_path", kind)


@pytest.mark.parametrize(
    ("class_path", "script"), [(FSDP1, "flat_sharding.py"), (DEEPSPEED, "zero_on_cpus.py")], ids=["fsdp1", "deepspeed"]
)
def test_it_takes_the_steps_of_one_process(
    fit_arguments: Callable[..., list[str]],
    fit: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    class_path: str,
    script: str,
) -> None:
    """On CPUs, where torch's FSDP1 and DeepSpeed run although Lightning does not let them."""
    if class_path == DEEPSPEED:
        pytest.importorskip("deepspeed", reason="deepspeed, an optional dependency, is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    lines = []
    for kind, without in KINDS.items():
        one = fit(tmp_path / f"{kind}-one", *KEEP, *without, config=f"{kind}.yaml")
        words = (*KEEP, *without, *by_class_path(class_path))
        for name, resumed in (("two", ()), ("on", (one / HALF,)), ("again", (tmp_path / f"{kind}-two" / HALF,))):
            from_there = [word for path in resumed for word in ("--ckpt_path", str(path))]
            arguments = fit_arguments(tmp_path / f"{kind}-{name}", *words, *from_there, config=f"{kind}.yaml")
            lines.append(["fit", *arguments])
    printed = in_series(2, lines, tmp_path, script)
    assert printed.count(f"2 x cpu, {class_path.rpartition('.')[2]}") == len(lines)
    for kind, without in KINDS.items():
        one, two = tmp_path / f"{kind}-one", tmp_path / f"{kind}-two"
        assert differ(metrics(one), metrics(two)) < 1e-5
        assert same_weights(two / LAST, tmp_path / f"{kind}-again" / LAST)
        words = ("--ckpt_path", str(two / HALF), *KEEP, *without)
        back = fit(tmp_path / f"{kind}-back", *words, config=f"{kind}.yaml")
        for other in (
            two,
            tmp_path / f"{kind}-on",
            back,
        ):  # AdamW in float32 blows up the last digits of small gradients
            assert apart(weights(one / LAST), weights(other / LAST)) < 1e-4
    assert same_weights(tmp_path / "lora-one" / "base", tmp_path / "lora-two" / "base")


def test_fsdp1_that_computes_activations_again(
    fit_arguments: Callable[..., list[str]], fit: Callable[..., Path], tmp_path: Path
) -> None:
    """torch wraps those layers in a module of its own too, and parameters are told by their names."""
    one = fit(tmp_path / "one", *KEEP)
    options = ("--trainer.strategy.activation_checkpointing_policy", f"[{LAYER}]")
    arguments = fit_arguments(tmp_path / "two", *KEEP, *by_class_path(FSDP1), *options)
    in_series(2, [["fit", *arguments]], tmp_path, "flat_sharding.py")
    assert differ(metrics(one), metrics(tmp_path / "two")) < 1e-5
    assert apart(weights(one / LAST), weights(tmp_path / "two" / LAST)) < 1e-4


def test_ddp_by_its_class_path(
    fit_arguments: Callable[..., list[str]], fit: Callable[..., Path], tmp_path: Path
) -> None:
    one = fit(tmp_path / "one", *KEEP)
    options = ("--trainer.strategy.find_unused_parameters", "true")
    in_series(2, [["fit", *fit_arguments(tmp_path / "two", *KEEP, *by_class_path(DDP), *options)]], tmp_path)
    assert differ(metrics(one), metrics(tmp_path / "two")) < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(by_class_path(DEEPSPEED), "you must have DeepSpeed installed", marks=WITHOUT_DEEPSPEED),
        (by_class_path(f"{__name__}.OwnDDPStrategy"), "trainer.strategy: OwnDDPStrategy is not supported. Use auto,"),
        (by_class_path("lightning.pytorch.strategies.XLAStrategy"), "XLAStrategy cannot be made: "),
        (by_class_path(FSDP1), "trainer.strategy: FSDPStrategy (FSDP1) shards over CUDA GPUs alone. Use fsdp"),
        (
            by_class_path("lightning.pytorch.strategies.ModelParallelStrategy"),
            "trainer.strategy: ModelParallelStrategy",
        ),
        (
            (*by_class_path(DDP), "--trainer.strategy.process_group_backend", "mpi"),
            "trainer.strategy.init_args.process_group_backend: has no effect here",
        ),
        (
            (*by_class_path(DDP), "--trainer.strategy.timeout", "0:01:00"),
            "trainer.strategy.init_args.timeout: has no effect here",
        ),
        (
            (*by_class_path(DDP), "--trainer.strategy.start_method", "spawn"),
            "trainer.strategy.init_args.start_method: spawn is not supported",
        ),
        (
            (*by_class_path("lightning.pytorch.strategies.SingleDeviceStrategy"), "--trainer.devices", "2"),
            "trainer.strategy: SingleDeviceStrategy is for one device, but",
        ),
        (
            (*by_class_path(DDP), "--trainer.strategy.dict_kwargs", "{static_graph: true}"),
            "trainer.strategy: static_graph reduces wrong gradients",
        ),
        ((*by_class_path(DDP), "--parallel.find_unused_parameters", "true"), "parallel.find_unused_parameters: is an"),
    ],
)
def test_what_cannot_run_is_refused(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refused(tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trainer.strategy.sharding_strategy", "NO_SHARD"), "sharding_strategy: NO_SHARD shares out nothing"),
        (("--trainer.strategy.device_mesh", "[1, 2]"), "device_mesh: is for sharding_strategy: HYBRID_SHARD"),
        ((*HYBRID, "--trainer.strategy.device_mesh", "[2, 2]"), "device_mesh: 2 x 2 is not the 2 devices"),
        ((*HYBRID, "--trainer.strategy.device_mesh", "[2, 1]"), "2 copies of 1 shard share out nothing"),
        (("--trainer.devices", "1"), "FSDPStrategy has one device to share out over. Use auto"),
        (("--trainer.precision", "64-true"), "trainer.precision: FSDPStrategy has no 64-true"),
        (("--evaluation.exact_match_per_task", "2"), "evaluation.exact_match_per_task: FSDPStrategy cannot answer"),
        (("--evaluation.samples_per_task", "2"), "evaluation.samples_per_task: FSDPStrategy cannot answer"),
        (("--trainer.strategy.state_dict_type", "sharded"), "state_dict_type: sharded is no Hugging Face directory"),
        (("--trainer.strategy.dict_kwargs", "{use_orig_params: false}"), "use_orig_params: false leaves no matrices"),
    ],
)
def test_what_fsdp1_cannot_do_here_is_refused(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("mft_lightning.training.strategies.cuda_is_available", lambda: True)
    assert message in refused(tmp_path / "run", *by_class_path(FSDP1), "--trainer.devices", "2", *words)
