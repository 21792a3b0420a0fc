"""What can be typed after ``haq``. What it does is imported when it is done."""

from pathlib import Path
from typing import Annotated

import typer

from haq.cli.terminal import told
from haq.version import own_version

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Plain text: the same on a terminal, in a pipe and in a log.
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 it failed and the message says why, 2 the command was not "
    "understood, 130 interrupted. Results are on standard output, all else on standard error.",
)

_TEXT = '"wikitext2" or "c4" from the hub, or a .txt, .json or .jsonl file'

Model = Annotated[str, typer.Argument(help="Directory of an int8 or float model, or its hub name.")]
Device = Annotated[str, typer.Option(help='Where it runs: "cpu", "cuda", "cuda:1".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON, for programs.")]
Seed = Annotated[int, typer.Option(help="Which windows of the text are taken.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of text that are read.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of a window.  [default: 2048, or as many as the model has positions]"
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Read no more of the text than this.  [default: all]")
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"haq {own_version()}")
        raise typer.Exit


@app.callback()
def haq(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Int8 weights and activations for language models of transformers.

    \b
    For example:
      haq quantize Qwen/Qwen3-0.6B qwen-int8
      haq evaluate qwen-int8 --reference Qwen/Qwen3-0.6B
      haq generate qwen-int8 "The cat sat on"
    """


@app.command(short_help="Make a model int8, from disk to disk.")
@told
def quantize(
    source: Annotated[str, typer.Argument(help="Directory of a float model, or its hub name.")],
    output: Annotated[Path, typer.Argument(help="Where to: a directory that is new, or empty.")],
    calibration: Annotated[str, typer.Option(help=f"Text like what it is for: {_TEXT}.")] = (
        "wikitext2"
    ),
    num_samples: Windows = 128,
    sequence_length: Length = None,
    seed: Seed = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help='Modules that stay float, such as "*.fc2"; can be repeated.'),
    ] = None,
    head: Annotated[
        bool, typer.Option("--head", help="Make the output head int8, too; else it stays float.")
    ] = False,
    smoothing: Annotated[str, typer.Option(help='"search", "fixed" or "none".')] = "search",
    smoothing_strength: Annotated[float, typer.Option(help="For --smoothing fixed.")] = 0.5,
    rounding: Annotated[str, typer.Option(help='"hessian" or "nearest".')] = "hessian",
    asymmetric_inputs: Annotated[
        bool,
        typer.Option(help="Give tokens a zero point where it helps; vLLM and others have none."),
    ] = True,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on with what an earlier call has done.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make a model int8, from disk to disk, one block in memory at a time.

    Stopped at any point, the same command goes on where it was.

    \b
    For example:
      haq quantize Qwen/Qwen3-0.6B qwen-int8
      haq quantize my-model my-model-int8 --calibration my-text.txt
    """
    from haq.cli import tasks
    from haq.config import QuantizationConfig

    config = QuantizationConfig(
        smoothing=smoothing,  # type: ignore[arg-type]
        smoothing_strength=smoothing_strength,
        rounding=rounding,  # type: ignore[arg-type]
        asymmetric_inputs=asymmetric_inputs,
        exclude=(*(() if head else QuantizationConfig.exclude), *(exclude or ())),
    )
    tasks.quantize(
        source,
        output,
        calibration,
        sequence_length,
        config,
        device=device,
        resume=resume,
        as_json=as_json,
        num_samples=num_samples,
        seed=seed,
    )


@app.command(short_help="Say what a checkpoint holds, without loading it.")
@told
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Say what a checkpoint holds, without loading it: what was done to each layer, and sizes.

    \b
    For example:
      haq inspect qwen-int8
      haq inspect Qwen/Qwen3-0.6B
    """
    from haq.cli import contents

    contents.inspect(model, as_json)


@app.command(short_help="Measure perplexity, and what a model loses against another.")
@told
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help=f"What to read: {_TEXT}.")] = "wikitext2",
    reference: Annotated[
        str | None, typer.Option(help="The float model, to say what int8 costs.")
    ] = None,
    sequence_length: Length = None,
    max_tokens: MaxTokens = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and what a model loses against another.

    \b
    For example:
      haq evaluate qwen-int8 --text my-text.txt
      haq evaluate qwen-int8 --reference Qwen/Qwen3-0.6B --max-tokens 65536
    """
    from haq.cli import tasks

    tasks.evaluate(
        model, text, reference, sequence_length, max_tokens, device=device, as_json=as_json
    )


@app.command(short_help="Let a model write.")
@told
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help='What to go on with; "-" for standard input.')],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 100,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; else the likeliest is taken.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens, with less or more daring than 1.0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw tokens, from the likeliest with this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="What is drawn.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="Where it runs.  [default: cpu; with --gpu-memory cuda]"),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help='What a mixture of experts may use of the GPU: "16GiB". The rest of it '
            "is computed on the CPU."
        ),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="For --gpu-memory: what `haq profile` wrote.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write.

    \b
    For example:
      haq generate qwen-int8 "The cat sat on"
      haq generate mixtral-int8 "Once" --gpu-memory 16GiB --temperature 0.8
    """
    from haq.cli import generation

    generation.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        sampling=generation.Sampling(sample, temperature, top_p),
        seed=seed,
        tiers=generation.Tiers.checked(device, gpu_memory, statistics),
        as_json=as_json,
    )


@app.command(short_help="Note which experts a mixture chooses.")
@told
def profile(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Where to: an .npz file.")],
    text: Annotated[str, typer.Option(help=f"Text like what it is for: {_TEXT}.")] = "wikitext2",
    num_samples: Windows = 32,
    sequence_length: Length = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Note which experts a mixture chooses, and after which ones: what offloading places by.

    \b
    For example:
      haq profile mixtral-int8 routing.npz --text my-text.txt
      haq generate mixtral-int8 "Once" --gpu-memory 16GiB --statistics routing.npz
    """
    from haq.cli import tasks

    tasks.profile(
        model,
        output,
        text,
        sequence_length,
        device=device,
        as_json=as_json,
        num_samples=num_samples,
        seed=seed,
    )


@app.command(short_help="Say which int8 products this machine has.")
@told
def backends(as_json: AsJson = False) -> None:
    """Say which int8 products this machine has, whether they are exact, and which one is used.

    \b
    For example:
      haq backends
      HAQ_BACKEND=reference haq generate qwen-int8 "The cat sat on"
    """
    from haq.cli import tasks

    tasks.backends(as_json)
