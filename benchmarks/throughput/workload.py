"""The work that all contenders do: a base model, an adapter to start from, and the conversations of every step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides a contender's steps; a JSON file tells it to those in other environments.

    Attributes:
        directory: where everything lies.
        tasks: task directories.
        steps: that a contender may be asked to begin.
        conversations: of a step.
        micro_batches: of a step.
        seq_length: most tokens of a conversation.
        device: "cpu" or "cuda".
        attention: transformers' name of it.
        rank: of adapters.
    """

    directory: str
    tasks: list[str]
    steps: int
    conversations: int
    micro_batches: int
    seq_length: int
    device: str
    attention: str
    rank: int = 16
    adam: dict[str, Any] = field(
        default_factory=lambda: {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    )
    clip: float = 1.0

    @property
    def model(self) -> str:
        """Directory of the base, in float32, with its tokenizer."""
        return str(Path(self.directory) / "model")

    @property
    def adapter(self) -> str:
        """Directory of the adapter that training with adapters starts from, of peft's."""
        return str(Path(self.directory) / "adapter")

    @property
    def rows(self) -> int:
        """Conversations of a micro-batch."""
        return self.conversations // self.micro_batches

    def read_conversations(self) -> list[dict[str, list[int]]]:
        """``input_ids`` and ``labels`` (-100 where not supervised) of the conversations, step after step."""
        return json.loads((Path(self.directory) / "conversations.json").read_text())

    def steps_of(self, conversations: list[Any]) -> list[list[Any]]:
        """The conversations step by step."""
        size = self.conversations
        return [conversations[start : start + size] for start in range(0, len(conversations), size)]

    def write(self) -> None:
        (Path(self.directory) / "workload.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, directory: str) -> Workload:
        return cls(**json.loads((Path(directory) / "workload.json").read_text()))
