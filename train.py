"""Turn an autoregressive Qwen2 into a block-diffusion model: the training recipe of Fast-dLLM v2 (paper, section 3).

    python train.py ar --model FOLDER --data problems.jsonl --out parent        # ordinary next-token training
    python train.py adapt --model parent --data problems.jsonl --out adapted    # complementary masks and token shift

Data is JSONL with `messages`, or `question` and `answer`, a line; trainable is what the assistant wrote. A run that
was stopped goes on where its last state was saved, when it is started again with the same command.

Shapes: B rows, L positions of a row, N masked targets. An input of the network is the noisy views of a row, followed by
its clean copy: [view 1 ; view 2 ; clean], 3L tokens, all parts at positions 0..L-1.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastdllm import (
    CAUSAL,
    DTYPES,
    InputError,
    Qwen2,
    Tokenizer,
    load,
    load_tokenizer,
    pick_device,
    read_config,
    replace_file,
    require,
    round_up,
    save,
)

# --- Mask ---


def training_mask(length: int, block_size: int, views: int = 1, device: str | None = None) -> Tensor:
    """May a query see a key, in [noisy views ; clean]? Bool, square, (views + 1) * length a side (paper, section 3).

    A noisy query sees its own block of its own view, and the clean blocks before it; a clean query sees the clean
    blocks up to its own; nothing clean sees anything noisy.
    """
    index = torch.arange((views + 1) * length, device=device)
    part, block = index // length, index % length // block_size
    query_part, query_block, clean = part[:, None], block[:, None], part == views
    own_block = (query_part == part) & (query_block == block)
    earlier_clean = clean & (query_block > block)
    return own_block | earlier_clean


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` written out. In bfloat16 on a CPU its backward pass is 5 times as fast as the fused kernel's."""
    B, H, T, d = q.shape
    groups = H // k.shape[1]  # query heads of one key head are more rows of the same product
    scores = (q.reshape(B, -1, groups * T, d) @ k.transpose(2, 3)).float() * d**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(groups, 1), -torch.inf)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, T, d)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`plain_attention` with the causal mask."""
    return plain_attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril())


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, length: int, block_size: int, views: int) -> Tensor:
    """What `training_mask` allows, computed block by block, so that no query meets a key it may not see.

    Shapes as in `attention`. With n blocks it does about (n + 2) / (2 n + 2) / (views + 1) of the dense mask's work.
    """
    fold = lambda x: x[:, :, :-length].unflatten(2, (views, length)).transpose(1, 2).flatten(0, 1)  # views into rows
    noisy_q, noisy_k, noisy_v = fold(q), fold(k), fold(v)  # (B * views, heads, L, d)
    clean_q, clean_k, clean_v = (x[:, :, -length:] for x in (q, k, v))
    noisy, clean = [], []
    for start in range(0, length, block_size):
        own, end = slice(start, start + block_size), start + block_size
        keys, values = (
            torch.cat([part[:, :, own], whole[:, :, :start].repeat_interleave(views, dim=0)], dim=2)
            for part, whole in ((noisy_k, clean_k), (noisy_v, clean_v))
        )
        noisy.append(plain_attention(noisy_q[:, :, own], keys, values))
        clean.append(plain_attention(clean_q[:, :, own], clean_k[:, :, :end], clean_v[:, :, :end]))
    unfolded = torch.cat(noisy, dim=2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2, 3)
    return torch.cat([unfolded, *clean], dim=2)


# --- Noise ---


def complementary_noise(trainable: Tensor, block_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Which trainable positions (B, L) view 1 masks; view 2 masks the others, so that each is a target exactly once.

    Per block t ~ U[0, 1), and a position is masked with probability 0.999 t + 0.001.
    """
    B, L = trainable.shape
    t = torch.rand(B, L // block_size, generator=generator).repeat_interleave(block_size, dim=1)
    u = torch.rand(B, L, generator=generator)
    return trainable & (u < 0.999 * t + 0.001).to(trainable.device)


# --- Loss ---


def training_loss(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    block_size: int | None = None,
    masked: Tensor | None = None,
    dense: bool | None = None,
) -> Tensor:
    """The adaptation's loss, a scalar: token-shifted cross entropy of complementary views (paper, section 3).

    tokens (B, L) and trainable (B, L) bool, L a multiple of the block size (default: the checkpoint's). Output i
    predicts the token at i + 1 where that is masked, so position 0 is never a target; the sum over both views is
    divided by the number of targets. `masked` (B, L) bool fixes what view 1 masks, which is drawn otherwise.
    One clean copy serves both views, so a row costs 3L tokens. `dense` chooses between one masked attention and
    attention block by block (default: the latter on the CPU, where it is faster). Inputs are left as they are.
    Raises InputError for a length that is no multiple of the block, or a model without a mask token.
    """
    size, mask_id = block_size or model.config.block_size, model.config.mask_token_id
    B, L = tokens.shape
    if mask_id is None:
        raise InputError("The model has no mask token; give its config a mask_token_id inside the embedding.")
    if L % size:
        raise InputError(f"The rows have {L} positions, no multiple of the block size {size}; pad them with masks.")
    masked = complementary_noise(trainable, size) if masked is None else masked & trainable
    views = torch.stack([masked, trainable & ~masked], dim=1)  # (B, 2, L)
    noisy = tokens[:, None].masked_fill(views, mask_id).flatten(1)  # (B, 2L)
    dense = tokens.device.type != "cpu" if dense is None else dense
    mask = (
        training_mask(L, size, 2, tokens.device)
        if dense
        else partial(blockwise_attention, length=L, block_size=size, views=2)
    )
    hidden = model(torch.cat([noisy, tokens], dim=1), torch.arange(L, device=tokens.device).repeat(3)[None], mask)
    # token shift: the output at i answers for the token at i + 1
    targets = tokens[:, None].expand_as(views)[:, :, 1:][views[:, :, 1:]]  # (N)
    rows = hidden[:, : 2 * L].unflatten(1, (2, L))[:, :, :-1][views[:, :, 1:]]  # (N, D)
    return cross_entropy(model, rows, targets)


def causal_loss(model: Qwen2, tokens: Tensor, trainable: Tensor) -> Tensor:
    """Ordinary next-token loss over the trainable tokens, a scalar; shapes as in `training_loss`."""
    mask = causal_attention if tokens.device.type == "cpu" else CAUSAL
    hidden = model(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None], mask)
    return cross_entropy(model, hidden[:, :-1][trainable[:, 1:]], tokens[:, 1:][trainable[:, 1:]])


def cross_entropy(model: Qwen2, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in float32 of hidden states (N, D) against token ids (N); only target rows reach the head."""
    return F.cross_entropy(model.logits(hidden).float(), targets, reduction="sum") / max(len(targets), 1)


# --- Data ---


def read_documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and which of them are trainable, of each line of a JSONL file. Raises InputError naming the line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "question" in record:
                    roles = ("user", record["question"]), ("assistant", record["answer"])
                    record = {"messages": [{"role": role, "content": content} for role, content in roles]}
                document = chat_document(record["messages"], tokenizer)
                require(any(document[1]), f"{path}, line {number}: nothing of it is an assistant's, so nothing trains.")
                yield document
            except InputError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not a JSON object with messages ({error!r}).") from None


def chat_document(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ChatML of a conversation; trainable is what the assistant wrote, with its end token and newline."""
    tokens, trainable = [], []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.chat(messages[:turn])
            answer = tokenizer.encode(f"{message['content']}<|im_end|>\n")
            trainable += [False] * (len(prompt) - len(tokens)) + [True] * len(answer)
            tokens = prompt + answer
    return tokens, trainable


def batches(lengths: list[int], rows: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of document indices, each batch of one length: each document once an epoch, in a seeded order."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        groups = {}
        for i in rng.permutation(len(lengths)):
            groups.setdefault(lengths[i], []).append(i)
        chunks = [group[i : i + rows] for group in groups.values() for i in range(0, len(group), rows)]
        yield from (chunks[i] for i in rng.permutation(len(chunks)))
        epoch += 1


# --- Training ---


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up from 0, then constant, or a cosine down to 0 at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def initial_model(folder: Path, from_scratch: bool, device: str, seed: int) -> tuple[Qwen2, Tokenizer]:
    """The model to train, in float32, and its tokenizer."""
    if not from_scratch:
        model, tokenizer = load(folder, device, "float32")
    else:
        tokenizer = load_tokenizer(folder)
        config = read_config(folder, tokenizer)
        torch.manual_seed(seed)
        model = Qwen2(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))  # two additions to the residual a layer
                torch.nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if out else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        model.to(pick_device(device))
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer, so the data cannot be read.")
    return model.train(), tokenizer


def train(
    objective: str,
    model: Qwen2,
    documents: list[tuple[np.ndarray, np.ndarray]],
    out: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    warmup: int,
    schedule: str,
    weight_decay: float,
    clip: float,
    ar_weight: float,
    seed: int,
    save_every: int,
) -> None:
    """Train in place, from the state in `out` if there is one; a step depends on seed and step number alone."""
    size, device = model.config.block_size, model.lm_head.weight.device
    pad = model.config.mask_token_id
    lengths = [round_up(len(tokens), size) for tokens, _ in documents]
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    state_file, done = out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    order = batches(lengths, batch_size, seed)
    for _ in range(done):
        next(order)
    with open(out / "metrics.jsonl", "a") as log, tqdm(total=steps, initial=done, unit="step") as bar:
        for step in range(done, steps):
            began, chosen = time.perf_counter(), next(order)
            tokens = torch.full((len(chosen), lengths[chosen[0]]), pad or 0)  # like masks, and not trained
            trainable = torch.zeros(tokens.shape, dtype=torch.bool)
            for row, i in enumerate(chosen):
                tokens[row, : len(documents[i][0])] = torch.from_numpy(documents[i][0])
                trainable[row, : len(documents[i][1])] = torch.from_numpy(documents[i][1])
            masked = complementary_noise(trainable, size, torch.Generator().manual_seed(seed * 2**32 + step))
            tokens, trainable, masked = (x.to(device) for x in (tokens, trainable, masked))
            record = {"step": step + 1, "tokens": tokens.numel()}
            with torch.autocast(device.type, torch.bfloat16):  # float32 weights, bfloat16 products
                loss = torch.zeros((), device=device)
                if objective == "adapt":
                    loss = training_loss(model, tokens, trainable, masked=masked)
                    record["diffusion_loss"] = loss.item()
                if objective == "ar" or ar_weight:
                    causal = causal_loss(model, tokens, trainable)
                    record["ar_loss"] = causal.item()
                    loss = loss + causal * (1 if objective == "ar" else ar_weight)
            loss.backward()
            record["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup, schedule)
            optimizer.step()
            optimizer.zero_grad()
            record["seconds"] = time.perf_counter() - began
            log.write(json.dumps({k: round(v, 5) for k, v in record.items()}) + "\n")
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in record.items() if k.endswith("loss")}, refresh=False)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                log.flush()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                replace_file(state_file, partial(torch.save, state))


# --- Command line ---

POSITIVE = click.IntRange(1)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("objective", type=click.Choice(["ar", "adapt"]))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="Checkpoint to start from.")
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSONL.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the result and the saved state.")
@click.option("--from-scratch", is_flag=True, help="Random weights; --model then needs config and tokenizer only.")
@click.option("--steps", type=POSITIVE, default=6000, show_default=True)
@click.option("--batch-size", type=POSITIVE, default=32, show_default=True, help="Documents a step.")
@click.option("--lr", default=2e-5, show_default=True, help="Peak learning rate of AdamW.")
@click.option("--warmup", default=500, show_default=True, help="Steps of linear warm-up.")
@click.option("--schedule", type=click.Choice(["constant", "cosine"]), default="constant", show_default=True)
@click.option("--weight-decay", default=0.01, show_default=True)
@click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--ar-weight", default=0.0, show_default=True, help="Weight of a causal loss beside the diffusion loss.")
@click.option("--block-size", type=POSITIVE, help="Diffusion block to adapt to  [default: the checkpoint's, or 32]")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", type=POSITIVE, default=200, show_default=True, help="Steps between saved states.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the result.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=POSITIVE, help="CPU threads.")
def main(objective, folder, data, out, from_scratch, block_size, dtype, device, threads, **options):
    if threads:
        torch.set_num_threads(threads)
    try:
        model, tokenizer = initial_model(folder, from_scratch, device, options["seed"])
        trained = model.config.block_size
        size = 1 if objective == "ar" else block_size or (trained if trained > 1 else 32)
        model.config = replace(model.config, block_size=size)
        documents = [
            (np.array(tokens, np.int64), np.array(trainable))
            for tokens, trainable in tqdm(read_documents(data, tokenizer), "reading", unit=" documents")
        ]
        require(documents, f"{data}: holds no documents.")
        out.mkdir(parents=True, exist_ok=True)
        train(objective, model, documents, out, **options)
        save(model.to(DTYPES[dtype]), tokenizer, out)
    except (InputError, OSError) as error:
        mistake = click.ClickException(str(error))
        mistake.exit_code = 2
        raise mistake from None


if __name__ == "__main__":
    main()
