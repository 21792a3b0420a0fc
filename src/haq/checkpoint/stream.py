"""`quantize_checkpoint`: a model that does not fit into memory, from disk to disk."""

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import GenerationConfig
from transformers.utils import logging

from haq.checkpoint.files import INDEX, TensorFiles, read_json
from haq.checkpoint.fill import check_headers, fill
from haq.checkpoint.format import HAQ_FILE, float_modules, int8_heads, stored_tensors
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
from haq.checkpoint.source import copy_tokenizer, local_folder
from haq.config import QuantizationConfig
from haq.devices import checked_device
from haq.logs import get_logger
from haq.memory import give_back
from haq.model.blocks import BlockBatch, BlockInputs, capture_block_inputs, run_block
from haq.model.heads import untied, write_at_once
from haq.model.published import Piece, published_pieces, skeleton
from haq.model.tail import Route, tail_batches
from haq.processes import Processes
from haq.quantization.block import quantize_block
from haq.quantization.head import quantize_head
from haq.quantization.pipeline import check_finite, find_route, kept_float, names_inside
from haq.quantization.report import BlockReport, LayerReport, QuantizationReport
from haq.quantization.validation import (
    check_iterable,
    check_weights_finite,
    checked_batches,
    checked_config,
    checked_structure,
)

logger = get_logger(__name__)


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
    config = checked_config(config)
    folder, target = local_folder(source), Path(output).resolve()  # "." has no name.
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
        if state.parts and processes.first:
            logger.info(f"Going on after the {_blocks(state)} blocks done in `{incomplete}`.")
        try:
            streamed = _Streamed(folder, config, place, processes)
            report = streamed.run(batches, state, progress)
        except BaseException as error:
            if state.parts:
                error.add_note(
                    f"haq: {_blocks(state)} blocks are done and kept in `{incomplete}`. The same "
                    "call goes on after them."
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
        self.structure = checked_structure(self.model, config)
        self.name, self.blocks = self.structure.name, self.structure.blocks

    def run(
        self,
        calibration: Sequence[Tensor | Mapping[str, Tensor]],
        state: Progress,
        progress: bool,
    ) -> QuantizationReport:
        """Every part that is not done yet, and what belongs around the tensors."""
        self._load("")
        check_weights_finite(self.model)
        batches = checked_batches(calibration, self.model)
        inputs = self._inputs(batches, state)
        if not state.parts:
            notes = self._around(state) | {"kept": kept_float(self.model, self.structure)}
            inputs.hidden = state.commit(notes, None, len(inputs.hidden))
        left = self.structure if _head(state) is None else replace(self.structure, head=None)
        route = find_route(self.model, left, inputs, batches)
        dtype = self.model.dtype
        self._forget_what_is_around()
        with self._bar(state, progress) as bar:
            for i in range(_blocks(state), len(self.blocks)):
                self._quantize_block(i, inputs, state)
                bar.update()
            if route is not None:
                self._quantize_head(route, list(tail_batches(inputs, batches)), state)
                bar.update()
        report = QuantizationReport(
            type(self.model).__name__,
            self.config,
            len(self.blocks),
            inputs.num_tokens,
            [BlockReport.from_dict(part["report"]) for part in state.parts if "report" in part],
            state.parts[0]["kept"],
            with_head=self.structure.head is not None,
            head=_head(state),
        )
        if self.processes.first:
            self._write_around(state, report, dtype)
        return report

    def _around(self, state: Progress) -> dict[str, Any]:
        """Write what is around the blocks, and note what is said of it.

        With an int8 head that comes last: the head's scale is folded into a part of it.
        """
        if self.structure.head is not None:
            return {"file": None, "ignore": [], "asymmetric": []}
        return self._notes("") | {"file": self._write(0, "", state)}

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

    def _bar(self, state: Progress, progress: bool) -> Any:
        return logging.tqdm(
            total=len(self.blocks) + (self.structure.head is not None),
            initial=len(state.parts) - 1,
            desc="Quantizing",
            unit="block",
            disable=None if progress and self.processes.first else True,
        )

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
            names_inside(self.structure.excluded, prefix),
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

    def _quantize_head(self, route: Route, batches: Sequence[BlockBatch], state: Progress) -> None:
        """The head and all that is around the blocks, from disk to disk."""
        give_back()
        self._load("")
        excluded = self.structure.excluded
        head = quantize_head(route, batches, self.config, excluded, self.processes)
        write_at_once(head.places(route))
        # Tied to the embeddings before, it is a tensor of its own now.
        self.pieces = published_pieces(skeleton(type(self.model), copy.deepcopy(self.model.config)))
        notes = self._notes("") | {"head": asdict(head.report)}
        notes["heads"] = int8_heads(self.model, self.pieces)
        notes["file"] = self._write(0, "", state)
        state.commit(notes, None, len(batches))

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
        files = [part["file"] for part in state.parts if part["file"] is not None]
        headers = [TensorFiles(state.model, file).headers for file in files]
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
        heads = state.parts[-1].get("heads", [])
        if report.head is not None:  # It may have been done before this call.
            write_at_once(untied(self.model, report.head.name))
        write_configs(state.model, self.model, dtype, ignore, heads, asymmetric, report, notes)
        copy_tokenizer(self.folder, state.model)


def _blocks(state: Progress) -> int:
    """How many blocks are done."""
    return sum("report" in part for part in state.parts)


def _head(state: Progress) -> LayerReport | None:
    """The line of the head, if that is done."""
    values = next((part["head"] for part in state.parts if "head" in part), None)
    return None if values is None else LayerReport(**values)


def _belongs(name: str, prefix: str, inside: str) -> bool:
    return name.startswith(prefix) if prefix else not name.startswith(inside)


def _processes(device: torch.device, batches: int) -> Processes:
    """Those that a launcher started, made known to each other if they are not yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    processes = Processes.of_torch()
    processes.wait()  # Who leaves at once, below or behind, does not leave others half connected.
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
