"""Devices that are there."""

import torch


def checked_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError, TypeError) as error:  # A torch without CUDA asserts.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'`device` must be one that torch can use here, such as "cpu", got {str(device)!r}: '
            f"{reason}"
        ) from error
    return place
