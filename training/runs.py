"""Runs that go on where they stopped: settings, processes, checkpoints, and the one loop of all trainings.

`run` drives a `Job`: next-token training and the adaptation of train.py, the drafts of drafts.py.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import click
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import Tokenizer, brief, read_json, replace_file
from commands.console import flag_of, options, own_device, say, threads, under
from commands.prompts import lock_run
from fastdllm import InputError, Qwen2, require
from training.data import Corpus, file_hash, tokenizer_hash
from verify import base_digest

# --- Settings ---

MAY_BE_0 = ("lr", "warmup", "seed", "weight_decay", "ar_weight", "cache_gb")
MAY_CHANGE = ("save_every", "keep", "eval_every", "eval_rows", "micro_batch", "recompute", "cache_gb")


@dataclass(frozen=True)
class RunSettings:
    """What every run needs to know. Raises InputError for numbers that make no sense."""

    steps: int
    batch_size: int  # rows
    lr: float
    warmup: int  # steps
    clip: float = 1.0
    seed: int = 0
    save_every: int | None = None  # steps; None: see `saves_every`
    keep: int = 2  # checkpoints
    eval_every: int = 200  # steps
    eval_rows: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) in (int, float):
                ok = 0 < value < 2**63 or value == 0 and name in MAY_BE_0
                allowed = "0 or " * (name in MAY_BE_0) + "a positive number below 2**63"
                require(ok, f"{flag_of(name)} is {value}, it must be {allowed}.")

    @property
    def saves_every(self) -> int:
        """Steps between checkpoints: what was given, else a tenth of all steps, but at most 200."""
        return min(200, math.ceil(self.steps / 10)) if self.save_every is None else self.save_every


def lasting(settings: RunSettings) -> dict:
    """Settings that a run keeps when it is resumed; the others change no step."""
    return {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}


FOLDER, FILE = click.Path(path_type=Path), click.Path(exists=True, dir_okay=False, path_type=Path)
files, steps, saving, machine = map(under, ("Model and data", "Steps", "Checkpoints", "Machine"))


def run_options(settings: type[RunSettings]) -> Callable:
    """The options of every run as a decorator; `settings` has the values of those that are not given."""
    return options(
        files("--model", "folder", required=True, help="Checkpoint to start from: a folder or Hub id."),
        files("--data", required=True, type=FILE, help="JSONL; `train.py show` shows what trains of it."),
        files("--out", required=True, type=FOLDER, help="Folder of the result, checkpoints and metrics."),
        files("--heldout", type=FILE, help="JSONL to measure on, never to train on."),
        files("--broken", type=click.Choice(["refuse", "skip"]), default="refuse",
              help="What a broken line of the data does: end the run, or be left out."),
        steps("--steps", default=settings.steps, help="Steps of the optimiser."),
        steps("--batch-size", default=settings.batch_size, help="Rows per step, of all devices together."),
        steps("--lr", default=settings.lr, help="Peak learning rate of AdamW."),
        steps("--warmup", default=settings.warmup, help="Steps in which the learning rate rises to --lr."),
        steps("--clip", default=settings.clip, help="The largest norm of gradients; larger ones are scaled."),
        steps("--seed", default=settings.seed, help="Of the data's order and of all that is drawn."),
        saving("--save-every", type=int, show_default="a tenth of --steps, at most 200",
               help="Steps between checkpoints: what a killed run computes again at most."),
        saving("--keep", default=settings.keep, help="Checkpoints that stay, the last ones."),
        saving("--eval-every", default=settings.eval_every, help="Steps between looks at --heldout."),
        saving("--eval-rows", default=settings.eval_rows,
               help="Rows (draft: documents) of --heldout per look."),
        machine("--device", default="auto", help="auto, cpu, cuda or mps."),
        threads(machine),
    )  # fmt: skip


# --- Processes ---


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def wait_for_all() -> None:
    """No process goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def first_process(work: Callable[[], None]) -> None:
    """Run long work in the first process while the others wait; its mistakes are raised in all of them."""
    if not dist.is_initialized():
        return work()
    problem = [None]
    # this group waits up to a day; the main group keeps its 30 minutes, so a hanging step still fails soon
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, group=patient)
    dist.destroy_process_group(patient)
    require(problem[0] is None, problem[0])


@contextmanager
def processes(device: str) -> Iterator[str]:
    """This process's device, among those that `torchrun` started."""
    device = own_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    yield device
    dist.destroy_process_group()  # not after a mistake, since NCCL would wait for the other processes


@contextmanager
def one_run(device: str, threads: int | None, out: Path) -> Iterator[str]:
    """Locks `out` and yields this process's device. Raises InputError where another run has the folder.

    On Ctrl-C it prints what the same command would go on from.
    """
    if threads:
        torch.set_num_threads(threads)
    with processes(device) as device:
        out.mkdir(parents=True, exist_ok=True)
        busy = f"{out}: another run is using it; wait for it, or take another --out."
        with lock_run(out / ".lock", busy) if rank() == 0 else nullcontext():
            try:
                yield device
                wait_for_all()  # for the first process, which writes the result
            except KeyboardInterrupt:
                place = checkpoints(out)[-1] if checkpoints(out) else "the start"
                if rank() == 0:
                    click.echo(f"Interrupted; the same command goes on from {place}.", err=True)
                raise
            finally:
                if rank() == 0 and not (out / "run.json").exists():  # refused before it was a run
                    (out / ".lock").unlink(missing_ok=True)


class Whole(nn.Module):
    """A model whose forward pass computes `loss(model)`.

    FSDP2 gathers weights where a forward pass begins, and a loss needs embedding and head. It would also
    move tensors to the device; inside of `loss` they stay where they are.
    """

    def __init__(self, model: Qwen2, compute: torch.dtype):
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, loss: Callable[[Qwen2], Tensor]) -> Tensor:
        weight = self.model.weight
        # FSDP2 has cast the weights already; autocast would cast again, and norms to float32
        mixed = weight.dtype is not self.compute
        with torch.autocast(weight.device.type, self.compute) if mixed else nullcontext():
            return loss(self.model)


def distribute(model: Qwen2, compute: torch.dtype, recompute: bool) -> Whole:
    """A model to train. Its weights are kept in float32; several processes share them out (FSDP2).

    Several processes compute with weights cast to `compute`; a single one has autocast, which casts for
    matrix products only. With `recompute` only the layers' inputs are kept for the backward pass.
    """
    whole, layers = Whole(model, compute), model.model.layers
    if recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes most of a second

        # without a mesh fully_shard takes CUDA wherever there is any, also for a run on CPUs
        mesh = init_device_mesh(model.weight.device.type, (world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for module in (*layers, whole):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to(torch.float32)
    return whole


def is_shared(tensor: Tensor) -> bool:
    """Whether each process has a share of it: a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def whole_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All shares put together, in the first process's memory; all processes take part."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if is_shared(tensor) else tensor
        if rank() == 0:
            found[name] = tensor.detach().cpu().contiguous()
    return found


# --- Checkpoints ---
# Why kill -9 loses nothing but time. A checkpoint is a folder with the weights and the optimiser's state in
# one safetensors file, and that file's checksum. It is renamed from .step-N.tmp to step-N when both are
# complete, so each step-N was whole; the checksum finds later damage. A step depends only on the state after
# the last one, the settings and its number: its rows, noise and rate follow from seed and number. So the same
# command goes on from the last checkpoint. Up to --save-every steps are computed again, identically; on
# another number of processes sums run in another order, so the last bits may differ.

STATE, CHECKSUM = "state.safetensors", "state.sha256"


def checkpoints(out: Path) -> list[Path]:
    """Finished ones, the oldest first."""
    found = (out / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.name.removeprefix("step-").isdecimal())


def open_data(
    out: Path, run: dict, data: Path, heldout: Path | None, model: Qwen2, tokenizer: Tokenizer, broken: str
) -> tuple[Corpus, Corpus | None]:
    """Training and held-out data, tokenised by the first process after it has checked that the run may go on.

    run: what may not change when the run is resumed; run.json keeps it, and digests of the data, of the
    tokenizer and of the model as it begins. Raises InputError for a folder with another run, and for data
    that cannot be used.
    """
    digest, mask = base_digest(model), model.config.mask_token_id
    for source in filter(None, (data, heldout)):
        require(source.is_file(), f"{source}: is no file, and is read more than once; save it as one.")

    def prepare():
        made_of = {"content": file_hash(data), "base_digest": digest, "tokenizer": tokenizer_hash(tokenizer)}
        file, now = out / "run.json", made_of | run
        results = (out / name for name in ("config.json", "adapter_config.json"))
        worth = checkpoints(out) or any(result.exists() for result in results)
        foreign = f"{out}: holds a model or metrics that no run has made here; take another --out."
        require(file.exists() or not worth and not (out / "metrics.jsonl").exists(), foreign)
        known = read_json(file) if worth else {}
        files = {"content": "other data", "base_digest": "another model", "tokenizer": "another tokenizer"}
        for name, value in known.items():
            differs = f"{name} {value}, not {now.get(name)}"
            differs = f"{files[name]}, or it has changed" if name in files else differs
            same = now.get(name, value) == value
            require(same, f"{out}: holds a run with {differs}; take another --out.")
        left = [*out.glob(".*.tmp"), *(out / "checkpoints").glob(".*.tmp")]  # of a run that was killed
        for old in left if file.exists() else ():  # without run.json they are somebody else's
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        replace_file(file, partial(Path.write_text, data=json.dumps(now, indent=2) + "\n"))
        Corpus.prepare(data, tokenizer, mask, out / "data.tokens", broken)
        if heldout:
            Corpus.prepare(heldout, tokenizer, mask, out / "heldout.tokens", broken)

    first_process(prepare)
    return Corpus.open(out / "data.tokens"), heldout and Corpus.open(out / "heldout.tokens")


def state_tensors(job: "Job") -> dict[str, Tensor]:
    """The trained tensors and AdamW's state, by name; writing into them changes the run.

    Before the first step this makes AdamW's state, all zeros.
    """
    tensors, fresh = {}, not job.optimizer.state
    for name, p in job.trained.items():
        state = job.optimizer.state[p]
        if fresh:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {key: torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"optimizer.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors


def save_checkpoint(out: Path, job: "Job", step: int) -> None:
    """Write a checkpoint, and delete all but the last `keep`.

    Raises InputError where it cannot be written; earlier ones stay.
    """
    place, tensors = out / "checkpoints" / f"step-{step:07d}", whole_tensors(state_tensors(job))

    def write():
        part = place.with_name(f".{place.name}.tmp")
        try:
            part.mkdir(parents=True)
            save_file(tensors, part / STATE)
            (part / CHECKSUM).write_text(file_hash(part / STATE))
            os.replace(part, place)
        except (OSError, SafetensorError) as error:
            stays = "earlier ones stay, and the same command goes on from the last one"
            problem = f"{place}: the checkpoint cannot be written ({brief(error)}); {stays}."
            raise InputError(problem) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in checkpoints(out)[: -job.settings.keep]:
            shutil.rmtree(old, ignore_errors=True)

    first_process(write)


def is_damaged(place: Path) -> bool:
    with suppress(OSError, UnicodeDecodeError):
        return (place / CHECKSUM).read_text() != file_hash(place / STATE)
    return True


def load_checkpoint(out: Path, job: "Job") -> int:
    """Take up the last checkpoint; the number of steps that were done then, or 0.

    Raises InputError where it is damaged, or of another model.
    """
    places = checkpoints(out)
    if not places:
        return 0
    place, tensors = places[-1], state_tensors(job)
    then = f"goes on from {places[-2].name}" if places[1:] else "starts at step 0"
    problem = f"{place}: the checkpoint is damaged; remove it, and the run {then}."
    first_process(lambda: require(not is_damaged(place), problem))
    with safe_open(place / STATE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        same = shapes == {name: list(tensor.shape) for name, tensor in tensors.items()}
        require(same, f"{place}: the checkpoint is of another model; take another --out.")
        for name, tensor in tensors.items():
            if is_shared(tensor):  # FSDP2 splits tensors by rows; the last processes may have none
                local, rows = tensor.to_local(), math.ceil(tensor.shape[0] / world_size())
                if len(local):
                    local.copy_(file.get_slice(name)[rank() * rows : (rank() + 1) * rows])
            else:
                tensor.copy_(file.get_tensor(name))
    return int(place.name.removeprefix("step-"))


# --- The loop ---


class Job(Protocol):
    """What `run` trains."""

    settings: RunSettings  # with a method learning_rate(step)
    trained: dict[str, Tensor]  # parameters by name
    optimizer: torch.optim.Optimizer
    row_tokens: int  # positions of a row
    rows: Callable  # () -> an iterator over rows of the data, without an end, in a seeded order
    step: Callable  # (rows, number, progress) -> losses, gradients in .grad; progress(rows that have run)
    evaluate: Callable  # () -> losses on held-out data, {} where there is none


def run(job: Job, out: Path) -> dict:
    """Train to the last step, from the last checkpoint in `out` if there is one; returns the last metrics.

    Why a kill loses nothing stands above, under "Checkpoints". Raises InputError when the loss is NaN or
    infinite, and where a checkpoint cannot be written or read.
    """
    settings, log, rows_each = job.settings, out / "metrics.jsonl", job.settings.batch_size
    done = load_checkpoint(out, job)
    require(done <= settings.steps, f"{out}: has done {done} steps, more than --steps {settings.steps}.")
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    lines = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= done]
    complete = done == settings.steps
    record = json.loads(lines[-1]) if lines else {}
    if settings.warmup > settings.steps:
        say(f"--warmup {settings.warmup} is more than --steps {settings.steps}: the rate never reaches --lr.")
    if rank() == 0:
        begin = f"Resuming at step {done}." if done else "No checkpoint yet, starting at step 0."
        click.echo(f"All {done} steps are done already." if complete else begin, err=True)
        replace_file(log, partial(Path.write_bytes, data=b"".join(lines)))  # later steps run again
    parameters = [*job.trained.values()]
    order = islice(job.rows(), done * rows_each, None)  # without the rows of the steps already done
    size = {"total": settings.steps * rows_each, "initial": done * rows_each, "unit": "row"}
    with tqdm(**size, disable=rank() > 0 or complete) as bar:
        for step in range(done, settings.steps):
            began, last = time.perf_counter(), step + 1 == settings.steps
            rows = list(islice(order, rows_each))
            losses = job.step(rows, step, bar.update)
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            norm = (norm.full_tensor() if is_shared(norm) else norm).item()
            if not all(map(math.isfinite, (norm, *losses.values()))):
                problem = f"step {step + 1}: the loss is NaN or infinite ({losses}, gradient norm {norm})"
                raise InputError(f"{problem}; the checkpoints stay; a lower --lr may help.")
            for group in job.optimizer.param_groups:
                group["lr"] = settings.learning_rate(step)
            job.optimizer.step()
            job.optimizer.zero_grad()
            seconds = time.perf_counter() - began
            record = {"step": step + 1, "tokens": rows_each * job.row_tokens, **losses}
            record |= {"grad_norm": norm, "lr": settings.learning_rate(step), "seconds": round(seconds, 4)}
            if (step + 1) % settings.eval_every == 0 or last:
                record |= job.evaluate()
            if rank() == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
            shown = {name: f"{value:.3f}" for name, value in record.items() if name.endswith("loss")}
            shown |= {"step": step + 1, "tokens/s": f"{record['tokens'] / seconds:,.0f}"}
            bar.set_postfix(shown, refresh=False)
            if (step + 1) % settings.saves_every == 0 or last:
                save_checkpoint(out, job, step + 1)
    if complete:
        record |= job.evaluate()  # the held-out data may be new
    return record
