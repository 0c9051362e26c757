"""Which device a run uses, and why."""

import torch


def resolve_device(device: str) -> tuple[torch.device, str]:
    """The device that `--device` names, and the reason in words.

    "auto" is the CPU: no committed measurement shows CUDA faster for stepping Gymnasium
    environments, whose observations come from the CPU anyway.

    Raises:
        ValueError: a device that is unknown or not there.
    """
    if device == "auto":
        return torch.device("cpu"), "no committed measurement shows CUDA faster here"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:i, got {device}")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: torch {torch.__version__} finds no CUDA device here;"
                " use --device cpu, or install a CUDA build of torch"
            )
        if (resolved.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device}: expected an index below {torch.cuda.device_count()}"
            )
    return resolved, "as asked"
