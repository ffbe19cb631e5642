"""When memory does not suffice: an error that says what to change, or smaller parts before the first step."""

from __future__ import annotations

import resource

import torch

from nestseg.core.errors import RunError
from nestseg.core.types import Batch
from nestseg.engine.job import Job


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on a GPU or on the processor."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory_error(job: Job, *, evaluating: bool = False) -> RunError:
    """Return the error that says how much was used, and what would use less.

    Args:
        job: The run.
        evaluating: Whether it was scoring pictures and not taking a step.
    """
    device = job.fabric.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        used = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {total / 2**30:.1f} GiB"
    else:
        used = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of this process"
    if evaluating:
        return RunError(
            "E-RUN-025",
            f"out of memory in the evaluation after step {job.step}; peak {used}",
            fix="a smaller evaluation.base_size than "
            f"{job.recipe.evaluation.base_size}, or evaluation.every_steps=null and nestseg evaluate elsewhere",
            path=job.folder,
        )
    data, compute = job.recipe.data, job.recipe.compute
    share = data.batch_size // job.fabric.world_size
    more = next((parts for parts in range(compute.accumulate_steps + 1, share + 1) if share % parts == 0), None)
    ways = [] if more is None else [f"--set compute.accumulate_steps={more} (the same gradient, slower)"]
    ways += [] if compute.activation_checkpointing else ["--set compute.activation_checkpointing=true"]
    ways += [f"a smaller data.crop_size than {list(data.crop_size)}", f"data.batch_size below {data.batch_size}"]
    return RunError(
        "E-RUN-023",
        f"out of memory at step {job.step + 1} with {share // compute.accumulate_steps} images at once; peak {used}",
        fix=", or ".join(ways) + "; --auto-accumulate finds the first by itself",
        path=job.folder,
    )


def fit_accumulation(job: Job) -> None:
    """Raise ``compute.accumulate_steps`` to the least number of parts whose forward and backward pass fit into memory.

    Drawn images of the training size stand for the first batch. Nothing of the job but the number changes.

    Args:
        job: Before its first step; its recipe and stepper get the number.

    Raises:
        RunError: E-RUN-024 with several ranks, which would have to agree; E-RUN-023 if not even one image fits.
    """
    if job.fabric.world_size > 1:
        raise RunError(
            "E-RUN-024",
            f"--auto-accumulate with {job.fabric.world_size} devices",
            fix="find the number on one device with the same share of a batch, then set compute.accumulate_steps",
        )
    data, device = job.recipe.data, job.fabric.device
    share = data.batch_size
    for parts in range(job.recipe.compute.accumulate_steps, share + 1):
        if share % parts:
            continue
        images = torch.zeros((share, data.in_channels, *data.crop_size), dtype=getattr(torch, data.image_dtype))
        batch = Batch(images, torch.zeros((share, *data.crop_size), dtype=torch.uint8), torch.zeros(share))
        compute = job.recipe.compute.model_copy(update={"accumulate_steps": parts})
        job.recipe = job.recipe.model_copy(update={"compute": compute})
        job.stepper.accumulate_steps = parts
        try:
            # the size of a part decides about BatchNorm
            job.segmenter.check_batch_size(share // parts)
            job.stepper.rehearse(Batch(*(values.to(device) for values in batch)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
    raise out_of_memory_error(job)
