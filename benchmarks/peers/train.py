"""The peers of train.py, run with the interpreter of an environment that has them; see there.

python benchmarks/train_peers.py SIDE DIRECTORY '{"dim": ..., ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pacing import Pace
from torch.utils.data import DataLoader, Dataset

FOREVER = 10**6


class Rows(Dataset[Any]):
    """Rows of `length` tokens of the flat array, one after the other."""

    def __init__(self, file: Path, length: int, labelled: bool) -> None:
        self.tokens, self.length, self.labelled = np.load(file, mmap_mode="r"), length, labelled

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Any:
        row = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": row, "labels": row} if self.labelled else row


def trainer(directory: Path, shape: dict[str, Any]) -> None:
    """`transformers.Trainer` on `LlamaForCausalLM`, compiled where `shape` says so."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["dim"],
            intermediate_size=shape["ff_dim"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            max_position_embeddings=shape["context"],
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=shape["batch"],
        max_steps=FOREVER,
        learning_rate=shape["lr"],
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=shape["device"] == "cpu",
        bf16=shape["precision"] == "bf16",
        torch_compile=shape["compile"],
        disable_tqdm=True,
    )
    # The model shifts the labels itself: a row of one more token gives as many targets as ours.
    rows = Rows(directory / "tokens.npy", shape["context"], labelled=True)
    Trainer(model=model, args=arguments, train_dataset=rows).train()


def litgpt(directory: Path, shape: dict[str, Any]) -> None:
    """`litgpt pretrain`, which compiles the whole model; without `compile` torch.compile is told to do nothing."""
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import setup

    class Data(DataModule):
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            rows = Rows(directory / "tokens.npy", shape["context"] + 1, labelled=False)
            self.loader = DataLoader(rows, batch_size, shuffle=True, drop_last=True)

        def train_dataloader(self) -> DataLoader[Any]:
            return self.loader

        val_dataloader = train_dataloader

    if not shape["compile"]:
        torch.compiler.set_stance("force_eager")
    config = Config(
        name="llama-shape",
        block_size=shape["context"],
        vocab_size=shape["vocabulary"],
        padded_vocab_size=shape["vocabulary"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["ff_dim"],
    )
    setup(
        "llama-shape",
        config,
        out_dir=directory / "litgpt",
        precision="bf16-true" if shape["precision"] == "bf16" else "32-true",
        data=Data(),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=shape["batch"],
            micro_batch_size=shape["batch"],
            max_tokens=FOREVER * shape["batch"] * shape["context"],
            max_norm=1.0,
            min_lr=0.0,
            lr_warmup_steps=20,
        ),
        eval=EvalArgs(interval=FOREVER, initial_validation=False, max_iters=1),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": shape["lr"], "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True},
        },
        devices=1,
        logger_name="csv",
    )


def nanochat(directory: Path, shape: dict[str, Any]) -> None:
    """A step of `scripts/base_train.py` of the checkout in `shape`: its model, its Muon with AdamW, its order of work.

    Its script reads text of its own and evaluates with downloads, so its loop is written out here. Rates stand still,
    which changes nothing about speed. Its model and its optimizer's kernels are compiled where `shape` says so.
    """
    sys.path.insert(0, shape["nanochat"])
    from nanochat.gpt import GPT, GPTConfig

    if not shape["compile"]:
        torch.compiler.set_stance("force_eager")
    config = GPTConfig(
        sequence_len=shape["context"],
        vocab_size=shape["vocabulary"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_kv_head=shape["heads"],
        n_embd=shape["dim"],
        window_pattern="L",
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=shape["device"])
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)
    rows = Rows(directory / "tokens.npy", shape["context"] + 1, labelled=False)
    loader = DataLoader(rows, shape["batch"], shuffle=True, drop_last=True)
    while True:
        for row in loader:
            row = row.to(shape["device"])  # noqa: PLW2901
            loss = compiled(row[:, :-1].contiguous(), row[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            loss.item()


if __name__ == "__main__":
    side, folder, values = sys.argv[1:]
    wanted = json.loads(values)
    torch.set_num_threads(wanted["threads"])
    Pace(wanted["warmup"], wanted["steps"])
    {"trainer": trainer, "litgpt": litgpt, "nanochat": nanochat}[side](Path(folder), wanted)
