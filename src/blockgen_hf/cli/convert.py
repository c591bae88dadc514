"""Convert a published checkpoint, or a Llama, Mistral, Qwen or SmolLM model, to a BlockGen folder, and back."""

import argparse

from ..checkpoints import find_checkpoint
from .figures import noise_name
from .parsing import integer, list_of


EXAMPLE = (
    "blockgen-hf convert hf:kuleshov-group/bd3lm-owt-block_size4 --tokenizer gpt2 --output bd3lm\n"
    "blockgen-hf convert hf:HuggingFaceTB/SmolLM2-135M --family causal-lm --output smollm2"
)
USAGE = "source --output DIR"
_FAMILIES = ("block-dit", "dense-dit", "ar", "bd3lm", "causal-lm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="folder or GGUF file, or hf:org/repo or hf:org/repo/folder; an adapter is joined with its base"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DIR; other files stay")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    group = parser.add_argument_group("what the published files do not contain")
    group.add_argument("--diffusion-type", choices=("masked", "uniform"), help="noise that the model was trained with")
    group.add_argument(
        "--block-sizes", type=list_of(integer(1)), metavar="N,N,...", help="block sizes of the training, such as 1,16"
    )
    group.add_argument(
        "--block-size-weights",
        type=list_of(float),
        metavar="W,W,...",
        help="their weights in the training, such as 0.05,0.95",
    )
    group.add_argument("--tokenizer", metavar="NAME", help="tokenizer to save with the model, a folder or on the Hub")
    group.add_argument("--family", choices=_FAMILIES, help="kind of checkpoint (default: found from the files)")
    group.add_argument(
        "--time-conditioning",
        action=argparse.BooleanOptionalAction,
        help="whether a full-sequence model knows the noise level (default: yes if uniform, no if masked)",
    )
    group.add_argument(
        "--noisy-attention",
        choices=("block", "causal"),
        help="of a causal language model: what noisy tokens see of their block (default: block)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--to",
        choices=("transformers", "published", "causal-lm"),
        default="transformers",
        help="published, causal-lm: convert a folder of this package back",
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default: as in the source)"
    )
    group.add_argument(
        "--max-shard-size", metavar="SIZE", help="split larger weights into several files (default: 50GB)"
    )


def run(args: argparse.Namespace) -> int:
    from ..hub.conversion import convert_checkpoint
    from .loading import one_line_errors, quiet_transformers

    with one_line_errors(), quiet_transformers():
        report = convert_checkpoint(
            find_checkpoint(args.source),
            args.output,
            diffusion_type=args.diffusion_type,
            block_sizes=args.block_sizes,
            block_size_weights=args.block_size_weights,
            time_conditioning=args.time_conditioning,
            noisy_attention=args.noisy_attention,
            tokenizer=args.tokenizer and find_checkpoint(args.tokenizer),
            family=args.family,
            to=args.to,
            dtype=args.dtype,
            revision=args.revision,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
        )
    config = report.config
    sizes = ", ".join(str(size) for size in config.block_sizes)
    dtype = str(report.dtype).removeprefix("torch.")
    print(f"{report.output}: {report.family}, {noise_name(config)}, {report.num_parameters:,} parameters in {dtype}")
    print(f"block sizes {sizes}, clean attention {config.clean_attention}, {config.vocab_size:,} rows", end="")
    print(", with a tokenizer" if report.wrote_tokenizer else "")
    for note in report.notes:
        print(note)
    return 0
