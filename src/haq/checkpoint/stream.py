"""`quantize_checkpoint`: a model that does not fit into memory, from disk to disk."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, distributed, nn
from transformers import GenerationConfig
from transformers.utils import logging

from haq.checkpoint.files import INDEX, TensorFiles, read_json
from haq.checkpoint.fill import check_headers, fill
from haq.checkpoint.format import HAQ_FILE, float_modules, stored_tensors
from haq.checkpoint.job import describe, digest
from haq.checkpoint.load import float_model
from haq.checkpoint.progress import Progress, finish, only_one, to_disk
from haq.checkpoint.save import (
    asymmetric_layers,
    check_new,
    take_tensors,
    write_configs,
    write_json,
    write_safetensors,
)
from haq.config import QuantizationConfig
from haq.devices import checked_device
from haq.memory import give_back
from haq.model.blocks import BlockInputs, capture_block_inputs, run_block
from haq.model.published import Piece, published_pieces
from haq.processes import Processes
from haq.quantization.block import quantize_block
from haq.quantization.pipeline import check_finite, kept_float, names_inside
from haq.quantization.report import BlockReport, QuantizationReport
from haq.quantization.validation import (
    check_iterable,
    check_weights_finite,
    checked_batches,
    checked_structure,
)

# Beside weights and configs, what belongs to a tokenizer.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@torch.inference_mode(False)
def quantize_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    calibration: Iterable[Tensor | Mapping[str, Tensor]],
    config: QuantizationConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a checkpoint from disk to disk, one decoder block in memory at a time.

    The result is what `haq.quantize_model` and `haq.save_pretrained` would make of the model, but
    for a file for each block. In memory are one block, its statistics, and in a mixture what
    enters its experts; the hidden states between blocks are on disk. What is done is beside
    ``output``, in a directory with ``.incomplete`` after its name. Stopped at any point, the same
    call goes on where it was, and ends with the same bytes; ``output`` appears when it is complete.

    Started by ``torchrun`` or ``accelerate launch`` as several processes that see the same disk,
    they share the calibration batches out, and the result is that of one up to the order of sums.

    Args:
        source: the directory of a float checkpoint, or its name on the hub.
        output: where to; it must not exist, or be empty.
        calibration: as for `haq.quantize_model`.
        config: what to do; the defaults are the recommended method.
        device: where blocks are quantized.
        resume: go on with what is there of the same job; if not, start anew.
        progress: show a bar with the blocks done and the time left.

    Returns:
        The report, which is saved with the model.

    Raises:
        FileExistsError: ``output`` holds something.
        FileNotFoundError: a file of ``source`` is missing.
        OSError: the disk is full, or not writable.
        RuntimeError: NaN or infinity appeared, or another process works on the same output.
        ValueError: the source is damaged, is no float checkpoint, or has changed since the call
            that is gone on with; or an argument cannot be worked with.

    Examples:
        >>> quantize_checkpoint("mixtral", "mixtral-int8", batches)  # doctest: +SKIP
    """
    config = QuantizationConfig() if config is None else config
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"`config` must be a QuantizationConfig, got {type(config).__name__}.")
    folder, target = _local(source), Path(output).resolve()  # "." has no name.
    check_iterable(calibration)
    batches = list(calibration)
    job = describe(folder, batches, config)
    done = _already_done(target, job)
    incomplete = target.parent / f"{target.name}.incomplete"
    place = checked_device(_own(device))
    processes = _processes(place, len(batches))
    if done is not None:
        if processes.first:
            shutil.rmtree(incomplete, ignore_errors=True)
        return done
    check_new(target)
    with only_one(incomplete) if processes.first else nullcontext():
        if not resume and processes.first:
            _empty(incomplete)
        state = Progress(incomplete, job, processes)
        try:
            streamed = _Streamed(folder, config, place, processes)
            report = streamed.run(batches, state, progress)
        except BaseException as error:
            if state.parts:
                error.add_note(
                    f"haq: {len(state.parts) - 1} blocks are done and kept in `{incomplete}`. The "
                    "same call goes on after them."
                )
            elif processes.first:
                shutil.rmtree(incomplete, ignore_errors=True)
            raise
        if processes.first:
            finish(incomplete, target)
        processes.wait()
    return report


class _Streamed:
    """A model of which one block at a time has weights."""

    def __init__(
        self,
        folder: Path,
        config: QuantizationConfig,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.folder, self.config, self.device = folder, config, device
        self.processes = processes
        self.files = TensorFiles(folder)
        self.model = float_model(folder)
        self.pieces = published_pieces(self.model)
        self.stored = stored_tensors(self.model, self.pieces)
        check_headers(self.stored, self.files, self.model)
        self.name, self.blocks, self.excluded = checked_structure(self.model, config)

    def run(
        self,
        calibration: Sequence[Tensor | Mapping[str, Tensor]],
        state: Progress,
        progress: bool,
    ) -> QuantizationReport:
        """Every part that is not done yet, and what belongs around the tensors."""
        self._load("")
        check_weights_finite(self.model)
        inputs = self._inputs(checked_batches(calibration, self.model), state)
        if not state.parts:
            kept = kept_float(self.model, self.blocks, f"{self.name}.", self.excluded)
            file = self._write(0, "", state)
            notes = self._notes("") | {"file": file, "kept": kept}
            inputs.hidden = state.commit(notes, None, len(inputs.hidden))
        dtype = self.model.dtype
        self._forget_what_is_around()
        self._quantize_blocks(inputs, state, progress)
        report = QuantizationReport(
            type(self.model).__name__,
            self.config,
            len(self.blocks),
            inputs.num_tokens,
            [BlockReport.from_dict(part["report"]) for part in state.parts[1:]],
            state.parts[0]["kept"],
        )
        if self.processes.first:
            self._write_around(state, report, dtype)
        return report

    def _inputs(self, batches: list[dict[str, Tensor]], state: Progress) -> BlockInputs:
        """How every block is called, and what enters the one that is next."""
        self._load(f"{self.name}.0.")  # It runs once, which shows what blocks return.
        keep = (lambda hidden: hidden[:0]) if state.parts else state.keeper(len(batches))
        inputs = capture_block_inputs(self.model, self.blocks, batches, keep)
        if state.parts:
            inputs.hidden = state.hidden()
        if len(state.parts) > 1:
            self.blocks[0].to("meta")
        return inputs

    def _quantize_blocks(self, inputs: BlockInputs, state: Progress, progress: bool) -> None:
        bar = logging.tqdm(
            total=len(self.blocks),
            initial=len(state.parts) - 1,
            desc="Quantizing",
            unit="block",
            disable=None if progress and self.processes.first else True,
        )
        with bar:
            for i in range(len(state.parts) - 1, len(self.blocks)):
                self._quantize_block(i, inputs, state)
                bar.update()

    def _quantize_block(self, i: int, inputs: BlockInputs, state: Progress) -> None:
        """One block from disk to disk. Nothing of it is held when the next one is read."""
        prefix = f"{self.name}.{i}"
        give_back()
        self._load(f"{prefix}.")
        check_weights_finite(self.blocks[i], prefix)
        inputs.hidden = [hidden.to(self.device) for hidden in inputs.hidden]
        batches = inputs.of_block(i)
        block, report = quantize_block(
            self.blocks[i],
            batches,
            self.config,
            prefix,
            names_inside(self.excluded, prefix),
            use_up=True,
            processes=self.processes,
        )
        self.blocks[i] = block
        notes = self._notes(f"{prefix}.") | {"report": report.to_dict()}
        notes["file"] = self._write(i + 1, f"{prefix}.", state)
        hidden = [run_block(block, batch) for batch in self.processes.share(batches)]
        check_finite(hidden, prefix)
        self.blocks[i] = nn.Identity()
        inputs.hidden = state.commit(notes, hidden, len(batches))

    def _load(self, prefix: str) -> None:
        """Fill a block, or with an empty prefix everything around them, from the source."""
        inside = f"{self.name}."
        stored = [s for s in self.stored if _belongs(s.key, prefix, inside)]
        fill(self.model, stored, self.files, self.device, None)
        if not prefix:
            self.model.tie_weights()

    def _forget_what_is_around(self) -> None:
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self.name}."):
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[key] = nn.Parameter(parameter.data.to("meta"))

    def _here(self, prefix: str) -> list[Piece]:
        inside = f"{self.name}."
        return [p for p in self.pieces if _belongs(p.parameter, prefix, inside)]

    def _notes(self, prefix: str) -> dict[str, Any]:
        """What the configs say of a part, noted while it is in memory."""
        return {
            "ignore": float_modules(self.model, self._here(prefix), prefix),
            "asymmetric": sorted(n for n in asymmetric_layers(self.model) if n.startswith(prefix)),
        }

    def _write(self, number: int, prefix: str, state: Progress) -> str:
        """One file with the tensors of a part; its name."""
        name = f"model-{number + 1:05}-of-{len(self.blocks) + 1:05}.safetensors"
        if not self.processes.first:
            return name
        stored = stored_tensors(self.model, self._here(prefix))
        write_safetensors(state.model / name, take_tensors(self.model, stored))
        to_disk(state.model / name)
        return name

    def _write_around(
        self, state: Progress, report: QuantizationReport, dtype: torch.dtype
    ) -> None:
        """Index, configs and tokenizer: with them the directory is complete."""
        headers = [TensorFiles(state.model, part["file"]).headers for part in state.parts]
        weight_map = {n: h.file.name for group in headers for n, h in group.items()}
        size = sum(h.num_bytes for group in headers for h in group.values())
        write_json(
            state.model / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        ignore = sorted({name for part in state.parts for name in part["ignore"]})
        asymmetric = sorted({name for part in state.parts for name in part["asymmetric"]})
        notes = {"job": digest(state.job)}
        write_configs(state.model, self.model, dtype, ignore, asymmetric, report, notes)
        for pattern in _TOKENIZER:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, state.model / file.name)


def _belongs(name: str, prefix: str, inside: str) -> bool:
    return name.startswith(prefix) if prefix else not name.startswith(inside)


def _processes(device: torch.device, batches: int) -> Processes:
    """Those that a launcher started, made known to each other if they are not yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    processes = Processes.of_torch()
    if processes.count > max(batches, 1):
        raise ValueError(
            f"`calibration` must have a batch for each of {processes.count} processes, got "
            f"{batches}. Make more batches, or start fewer processes."
        )
    return processes


def _own(device: str | torch.device) -> str | torch.device:
    """The GPU of this process, if a launcher started several and none was named."""
    rank = os.environ.get("LOCAL_RANK")
    if str(device) != "cuda" or rank is None:
        return device
    torch.cuda.set_device(int(rank))  # The backend that sums needs to know as well.
    return torch.device("cuda", int(rank))


def _local(source: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint; one of the hub is downloaded to the hub's cache."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:
            raise FileNotFoundError(
                f"`source` must be the directory of a checkpoint or a name on the hub, got "
                f"`{source}`."
            )
        patterns = ["*.json", "*.safetensors", *_TOKENIZER]
        folder = Path(snapshot_download(str(source), allow_patterns=patterns))
    entry = read_json(folder / "config.json").get("quantization_config")
    if entry is not None:
        raise ValueError(
            f"`{folder / 'config.json'}` must be of a float model, got one quantized with "
            f"{entry.get('quant_method')!r}. Take the original checkpoint."
        )
    return folder


def _already_done(output: Path, job: dict[str, Any]) -> QuantizationReport | None:
    """The report, if ``output`` is what this very call makes: it was stopped at its end."""
    file = output / HAQ_FILE
    if not file.is_file():
        return None
    notes = read_json(file)
    if notes.get("job") != digest(job):
        return None
    return QuantizationReport.from_dict(notes["report"])


def _empty(folder: Path) -> None:
    # Files first: without the progress, what is left of the rest does not count.
    for path in sorted(folder.iterdir(), key=Path.is_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
