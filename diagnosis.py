"""The samples and updates that are at fault: counted, named, and bounded.

All ranks call each function together, and learn the same from it.
"""

import numpy as np
import torch

from infra.distributed import all_gather_object, all_reduce, broadcast_object, get_rank
from utils import InputError


def count_bad(reasons, run, samples, fraction):
    """Counts and names the samples that had to be replaced, on all ranks together.

    Args:
        reasons: a text for each such sample of this rank.
        run: whose state counts them.
        samples: of the epoch, on all ranks.
        fraction: of these that may be replaced.

    Raises InputError, on every rank at once, above that fraction.
    """
    if not all_reduce(torch.tensor(len(reasons))):
        return
    reasons = all_gather_object(reasons)
    for reason in reasons:
        run.log.info_once(f"replaced by the next sample: {reason}")
    run.state.bad += len(reasons)
    if run.state.bad > fraction * samples:
        raise InputError(
            f"{run.state.bad} of the epoch's {samples} samples cannot be read, more than the "
            f"allowed fraction of {fraction:g}; the latest: {reasons[-1]}"
        )


def skip_update(training, metrics, sources, update, run):
    """Counts and names an update that was not taken. Raises InputError if it is one too many."""
    limit, state = training.skip_nonfinite, run.state
    state.skipped += 1
    fault = describe_fault([metrics["loss"].item()], [sources], update, run)
    if state.skipped > limit:
        raise InputError(f"more than {limit} updates of the run would be skipped: {fault}")
    run.log.info(f"skipped, {state.skipped} of {limit}: {fault}")


def describe_fault(losses, sources, update, run):
    """Names the first loss that is not finite, or the gradient; lists its samples in a file.

    Args:
        losses: this rank's losses of its latest updates.
        sources: the samples of each of these.
        update: the number of the last of them.
        run: whose log takes the file.

    Returns the text, the same on every rank; all call it together.
    """
    faults = all_gather_object([(i, get_rank(), x) for i, x in enumerate(losses)])
    faults = [fault for fault in faults if not np.isfinite(fault[2])]
    i, rank, loss = min(faults, default=(len(losses) - 1, 0, None))
    fault = "gradient is not finite" if loss is None else f"loss is {loss}"
    update, epoch = update + i + 1 - len(losses), run.state.epoch
    samples = all_gather_object([{"rank": get_rank(), **source} for source in sources[i]])
    facts = {"update": update, "epoch": epoch, "rank": rank, "loss": str(loss)}
    path = run.log.dump(f"nonfinite-{update}.json", {**facts, "samples": samples})
    return (
        f"{fault} at update {update} (epoch {epoch}) on rank {rank}; lower the learning rate, "
        "lengthen warm-up or try precision fp32; its samples are listed in "
        f"{broadcast_object(path)}"
    )
